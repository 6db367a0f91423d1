"""Multilevel Monte Carlo and quasi-Monte Carlo: E f_L = E f_0 + sum_l E(f_l - f_(l-1)), most points on cheap levels.

The integrand takes points and a level and gives the differences f_l - f_(l-1), f_0 itself at level 0. Independent
points: n_l proportional to sqrt(V_l / C_l), from the variance V_l and the cost C_l of a level. Low-discrepancy points
with replications: the level with the largest V_l / (n_l C_l) doubles, V_l being the variance of its mean over them.
Levels are added while the bias, by extrapolating the means of the last levels, is too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.cubature import CubatureResult, Tolerance, evaluate
from kullback.sample.qmc.point_set import PointSet

__all__ = ["integrate_multilevel"]

LevelFunction = Callable[[Tensor, int], Tensor]


@dataclass(slots=True)
class _Level:
    """What is known of a level: evaluations, their sums by replication, the cost of one."""

    points: PointSet
    cost: float
    count: int = 0
    sums: Tensor | None = None
    square: float = 0.0

    def add(self, function: LevelFunction, level: int, count: int) -> int:
        """Evaluate `count` more points (of each replication); returns how many evaluations that were."""
        block = self.points.points(self.count, self.count + count)
        flat = block.flatten(0, 1) if self.points.replications is not None else block
        values = evaluate(lambda x: function(x, level), flat)
        if values.ndim != 1:
            raise ConfigError("mlmc takes a scalar integrand: points [n, d] and a level to [n]")
        self.square += float(values.square().sum())
        sums = values.unflatten(0, (-1, count)).sum(1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += count
        return len(flat)

    @property
    def mean(self) -> float:
        return 0.0 if self.sums is None else float(self.sums.mean()) / self.count

    @property
    def variance(self) -> float:
        """Of one evaluation, or of the mean over replications where there are some."""
        if self.sums is None:
            return 0.0
        if self.points.replications is not None:
            return float((self.sums / self.count).var()) / len(self.sums)
        return max(0.0, self.square / self.count - self.mean**2) * self.count / max(1, self.count - 1)


def integrate_multilevel(
    function: LevelFunction,
    points: Callable[[int], PointSet],
    tolerance: Tolerance,
    *,
    n_min: int,
    n_max: int,
    levels: int = 3,
    max_levels: int = 12,
    cost: Callable[[int], float] = lambda level: 2.0**level,
    level: float = 0.99,
) -> CubatureResult:
    """Multilevel cubature of function(points, level); see `integrate`. abs_tol bounds the half-width of an interval.

    points: of a level, Independent ones or a set with replications; n_min: first evaluations on a level; levels,
    max_levels: at first and at most; cost: of one evaluation on a level; level: of the interval. n is the number of
    evaluations, on all levels; lo and hi hold the sampling error and half the tolerance again for the bias.
    """
    from scipy import stats

    if not 2 <= levels <= max_levels:
        raise ConfigError(f"levels start at 2 or more, up to max_levels: got {levels} and {max_levels}")
    if tolerance.relative > 0.0:
        raise ConfigError("mlmc takes an absolute tolerance")
    quantile = float(stats.norm.ppf(0.5 + level / 2))
    # the mean square error is shared evenly by variance and squared bias
    root = tolerance.absolute / quantile
    known: list[_Level] = []
    used, flags = 0, []
    history: list[dict[str, float]] = []

    def extend() -> int:
        number = len(known)
        found = points(number)
        if found.replications is None and found.kind != "independent":
            raise ConfigError("a low-discrepancy set needs replications here: its error is seen between them")
        known.append(_Level(found, cost(number)))
        return known[-1].add(function, number, max(2, n_min // (found.replications or 1)))

    for _ in range(levels):
        used += extend()
    while True:
        used, exhausted = _sample_more(known, function, root**2 / 2, used, n_max)
        bias = _bias(known)
        history.append({"n": used, "half_width": quantile * math.sqrt(_variance_of_sum(known)), "levels": len(known)})
        if exhausted:
            flags.append("n_max was reached")
            break
        if bias <= root / math.sqrt(2.0):
            break
        if len(known) == max_levels:
            flags.append("max_levels was reached with a bias above the tolerance")
            break
        used += extend()
    value = torch.tensor(sum(one.mean for one in known), dtype=torch.float64)
    half = quantile * math.sqrt(_variance_of_sum(known) + _bias(known) ** 2)
    return CubatureResult(value, value - half, value + half, used, 0.0, not flags, tuple(flags), tuple(history))


def _variance_of_sum(known: list[_Level]) -> float:
    return sum(one.variance if one.points.replications is not None else one.variance / one.count for one in known)


def _bias(known: list[_Level]) -> float:
    """What lies beyond the last level, if the means decay at the rate of the last three, at least by half."""
    means = [abs(one.mean) for one in known[1:]]
    rates = [math.log2(a / b) for a, b in pairwise(means) if a > 0 and b > 0]
    rate = max(0.5, sum(rates) / len(rates)) if rates else 1.0
    tail = max(means[-1], means[-2] / 2**rate) if len(means) > 1 else means[-1]
    return tail / (2**rate - 1)


def _sample_more(
    known: list[_Level], function: LevelFunction, variance: float, used: int, n_max: int
) -> tuple[int, bool]:
    """Add points until the variance of the sum is low enough; returns the evaluations and whether n_max stopped it."""
    independent = known[0].points.replications is None
    while True:
        if not independent:
            if _variance_of_sum(known) <= variance:
                return used, False
            worst = max(known, key=lambda one: one.variance / (one.cost * one.count))
            count = worst.count * len(worst.sums) if worst.sums is not None else 0
            if used + count > n_max:
                return used, True
            used += worst.add(function, known.index(worst), worst.count)
            continue
        scale = sum(math.sqrt(one.variance * one.cost) for one in known) / variance
        wanted = [math.ceil(scale * math.sqrt(one.variance / one.cost)) - one.count for one in known]
        if max(wanted) <= 0:
            return used, False
        for number, (one, more) in enumerate(zip(known, wanted)):
            if used + max(more, 0) > n_max:
                return used, True
            if more > 0:
                used += one.add(function, number, more)
