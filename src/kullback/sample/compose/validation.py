"""Is an algorithm valid? Its exact law on a small program beside that program's meaning, in rational arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kullback.sample.compose.algorithms import Algorithm
from kullback.sample.compose.programs import Program
from kullback.sample.compose.representations import Enum, Represented, gathered

__all__ = ["ValidationReport", "algorithm", "meaning", "validate"]


def meaning(program: Program, *, max_outcomes: int = 10**6) -> dict[Any, Any]:
    """The unnormalised measure of a program: each result to its weight, exact unless factors are logarithms.

    Raises ConfigError for laws that are not finite, DataError for more outcomes than max_outcomes.
    """
    base = Enum(limit=max_outcomes)
    return gathered(base.of(program))


@dataclass(frozen=True)
class ValidationReport:
    """equal: whether the measures are; max_abs_diff: the largest gap at a value; outcomes: of the algorithm's law."""

    equal: bool
    max_abs_diff: Fraction | float
    outcomes: int


def validate(
    method: Algorithm,
    program: Program,
    *,
    grid: int | None = None,
    expected: dict[Any, Any] | None = None,
    tolerance: float = 1e-12,
    max_outcomes: int = 10**6,
) -> ValidationReport:
    """Run an algorithm on exact enumeration and compare what it stands for with the meaning of the program.

    grid: points in place of a uniform number, for those that trace; expected: another measure to compare with, for
    those that change the result. Rationals must be equal, and logarithmic weights up to the tolerance.

    >>> from kullback.sample.compose import SMC, bernoulli, factor, program, sample, yield_
    >>> @program
    ... def coin():
    ...     heads = yield sample(bernoulli(0.5))
    ...     yield factor(3 if heads else 1)
    ...     yield yield_()
    ...     return heads
    >>> validate(SMC(2, 1), coin())
    ValidationReport(equal=True, max_abs_diff=Fraction(0, 1), outcomes=5)
    """
    base = Enum(grid, max_outcomes)
    found = method.on(base, program)
    outcomes = len(found.value) if isinstance(found.value, tuple) else 1
    stands_for = found.meaning()
    wanted = meaning(program, max_outcomes=max_outcomes) if expected is None else expected
    gap: Any = Fraction(0)
    for value in {**wanted, **stands_for}:
        one, other = stands_for.get(value, Fraction(0)), wanted.get(value, Fraction(0))
        exact = isinstance(one, Fraction) and isinstance(other, Fraction)
        gap = max(gap, abs(one - other) if exact else abs(float(one) - float(other)))
    return ValidationReport(not gap if isinstance(gap, Fraction) else gap <= tolerance, gap, outcomes)


@dataclass(frozen=True)
class _Made:
    make: Callable[..., Represented]

    def on(self, base: Any, program: Program) -> Represented:
        return self.make(base, base.prepare(program))


def algorithm(make: Callable[[Any, Program], Represented]) -> Algorithm:
    """A function of a base and a program as an algorithm that can be validated and run.

    >>> from kullback.sample.compose import Population, bernoulli, resample, sample, spawn
    >>> @algorithm
    ... def resampled(base, program):
    ...     population = Population(base)
    ...     return resample(Represented(population, population.of(spawn(2) >> program)))
    >>> validate(resampled, sample(bernoulli(0.5))).equal
    True
    """
    return _Made(make)


