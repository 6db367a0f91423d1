"""Probability laws that programs sample from: finite ones, with exact probabilities, and those given by a quantile.

Every law turns one uniform number into a draw by `icdf(u)`, so that a trace is a list of uniform numbers. Finite laws
also list their outcomes, which exact enumeration asks for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

from kullback.core.errors import ConfigError, DataError
from kullback.sample.compose.weights import Number, shares

__all__ = ["Finite", "Law", "Quantile", "Unit", "as_law", "bernoulli", "categorical", "uniform_integer"]


class Law:
    """A law that a program may sample from."""

    def icdf(self, u: Any) -> Any:
        """The draw that belongs to a uniform number in [0, 1)."""
        raise ConfigError(f"{type(self).__name__} is a law without a quantile: give it icdf(u)")

    def outcomes(self, grid: int | None) -> list[tuple[Any, Fraction]]:
        """Values with their probabilities. Raises ConfigError where there are too many to list."""
        raise ConfigError(f"{self!r} has no finite list of outcomes: enumeration takes finite laws only")


class Finite(Law):
    """Finitely many values, with probabilities that are rationals or, in sampling, floats."""

    def __init__(self, values: Sequence[Any], probabilities: Sequence[Any]) -> None:
        self.values, self.probabilities = values, probabilities

    def __repr__(self) -> str:
        return f"Finite({list(self.values)!r}, {[str(p) for p in self.probabilities]!r})"

    @cached_property
    def cumulative(self) -> list[Any]:
        """Sums of the probabilities up to each value."""
        return list(accumulate(self.probabilities))

    def icdf(self, u: Any) -> Any:
        at = bisect_right(self.cumulative, u)
        while at >= len(self.values) or not self.probabilities[at]:  # past a sum that rounding left below one
            at -= 1
        return self.values[at]

    def outcomes(self, grid: int | None) -> list[tuple[Any, Fraction]]:
        pairs = zip(self.values, self.probabilities, strict=True)
        return [(value, Fraction(p)) for value, p in pairs if p]


class Unit(Law):
    """A uniform number in [0, 1); in enumeration, one of `grid` midpoints."""

    def __repr__(self) -> str:
        return "Unit()"

    def icdf(self, u: Any) -> Any:
        return u

    def outcomes(self, grid: int | None) -> list[tuple[Any, Fraction]]:
        if grid is None:
            return super().outcomes(grid)
        return _midpoints(grid)


@cache
def _midpoints(grid: int) -> list[tuple[Any, Fraction]]:
    return [(Fraction(2 * i + 1, 2 * grid), Fraction(1, grid)) for i in range(grid)]


class Quantile(Law):
    """A law by the icdf of an object such as those of torch.distributions."""

    def __init__(self, distribution: Any) -> None:
        self.distribution = distribution

    def __repr__(self) -> str:
        return repr(self.distribution)

    def icdf(self, u: Any) -> Any:
        import torch

        inside = min(max(float(u), 2.0**-54), 1.0 - 2.0**-53)  # the ends would be infinite
        value = self.distribution.icdf(torch.tensor(inside, dtype=torch.float64))
        return value.item() if value.ndim == 0 else value


def bernoulli(probability: Any) -> Finite:
    """True with this probability, exactly that of the number given, be it a float."""
    p = Fraction(probability)
    if not 0 <= p <= 1:
        raise DataError(f"a probability is in [0, 1], and this one is {float(p):g}")
    return Finite((False, True), (1 - p, p))


def categorical(weights: Sequence[Number] | Mapping[Any, Number]) -> Finite:
    """Values with probabilities in proportion to weights: a mapping, or a sequence for 0, 1, ..."""
    table = weights if isinstance(weights, Mapping) else dict(enumerate(weights))
    if not table or any(weight < 0 for weight in table.values()) or not any(weight > 0 for weight in table.values()):
        raise DataError("weights of outcomes are not negative and not all zero: some are, or there are none")
    given = [Fraction(weight) if isinstance(weight, (int, float)) else weight for weight in table.values()]
    return Finite(tuple(table), shares(given))


def uniform_integer(size: int) -> Finite:
    """0, ..., size - 1 with equal probabilities."""
    if size < 1:
        raise DataError(f"a uniform integer is one of 1 or more, and not of {size}")
    return Finite(range(size), [Fraction(1, size)] * size)


def as_law(given: Any) -> Law:
    """A law as it is, or that of a torch distribution: Bernoulli, Categorical, or one of numbers that has an icdf."""
    if isinstance(given, Law):
        return given
    name = type(given).__name__
    if name == "Bernoulli":
        return bernoulli(given.probs.item())
    if name == "Categorical":
        return categorical([Fraction(p) for p in given.probs.tolist()])
    if name in _QUANTILES or (hasattr(given, "icdf") and not hasattr(given, "rsample")):
        return Quantile(given)
    raise ConfigError(f"{name} is no law to sample from: give a finite one or one with icdf, as torch's Normal has")


_QUANTILES = {"Cauchy", "Exponential", "Gumbel", "HalfNormal", "Laplace", "LogNormal", "Normal", "Uniform", "Weibull"}


def breakpoints(cuts: Iterable[Any]) -> list[tuple[Any, Any]]:
    """A number inside and the length of each interval that cuts inside (0, 1) leave."""
    ends = sorted({Fraction(0), Fraction(1), *(cut for cut in cuts if 0 < cut < 1)})
    return [((low + high) / 2, high - low) for low, high in pairwise(ends)]


class Systematic(Law):
    """Ancestors by one uniform number u: those in whose share of the weights (u + i) / n falls, i = 0, ..., n - 1."""

    def __init__(self, weights: Sequence[Number], size: int) -> None:
        self.ends, self.size = [share * size for share in accumulate(shares(weights))], size

    def icdf(self, u: Any) -> tuple[int, ...]:
        return tuple(min(bisect_right(self.ends, u + i), len(self.ends) - 1) for i in range(self.size))

    def outcomes(self, grid: int | None) -> list[tuple[Any, Fraction]]:
        return [(self.icdf(u), p) for u, p in breakpoints(end - math.floor(end) for end in self.ends)]


class Stratum(Law):
    """The ancestor in whose share of the weights (u + index) / n falls, for a uniform number u."""

    def __init__(self, weights: Sequence[Number], size: int, index: int) -> None:
        self.ends, self.index = [share * size for share in accumulate(shares(weights))], index

    def icdf(self, u: Any) -> int:
        return min(bisect_right(self.ends, u + self.index), len(self.ends) - 1)

    def outcomes(self, grid: int | None) -> list[tuple[Any, Fraction]]:
        return [(self.icdf(u), p) for u, p in breakpoints(end - self.index for end in self.ends)]
