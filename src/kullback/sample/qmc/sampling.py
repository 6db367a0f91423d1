"""Cubature with intervals from independent replications, or from independent points."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.cubature import Control, CubatureResult, Integrand, Tolerance, doubling, evaluate
from kullback.sample.qmc.point_set import PointSet

__all__ = ["integrate_by_clt", "integrate_by_replications", "integrate_guaranteed"]

BLOCK = 1 << 18  # points held at once


def _check(level: float, inflate: float) -> None:
    if not 0.0 < level < 1.0 or inflate < 1.0:
        raise ConfigError(f"level lies in (0, 1) and inflate is at least 1: got {level} and {inflate}")


def integrate_by_replications(
    function: Integrand,
    points: PointSet,
    tolerance: Tolerance,
    *,
    n_min: int,
    n_max: int,
    level: float = 0.99,
    inflate: float = 1.0,
) -> CubatureResult:
    """Student's t over R independent randomizations of any set; see `integrate`. n counts all of their points.

    level: of the confidence interval; inflate: a factor of the standard deviation, 1 or more.
    """
    from scipy import stats

    _check(level, inflate)
    replications = points.replications or 1
    quantile = inflate * float(stats.t.ppf(0.5 + level / 2, replications - 1)) / math.sqrt(replications)
    first = max(1, n_min // replications)
    first = 1 << (first.bit_length() - 1)
    total = torch.zeros(())
    history: list[dict[str, float]] = []
    for start, stop in doubling(first, max(first, n_max // replications)):
        block = points.points(start, stop)
        values = evaluate(function, block.flatten(0, 1)).unflatten(0, (replications, stop - start))
        total = total + values.sum(1)
        means = total / stop
        value, half = means.mean(0), quantile * means.std(0)
        history.append({"n": replications * stop, "half_width": float(half.max())})
        lo, hi = value - half, value + half
        converged = bool(tolerance.met(lo, hi).all())
        if converged:
            break
    return CubatureResult(tolerance.centre(lo, hi), lo, hi, replications * stop, 0.0, converged, (), tuple(history))


class _Moments:
    """Mean and spread of a function over independent points, block by block, with control variates."""

    def __init__(self, function: Integrand, points: PointSet, control: Control | None) -> None:
        self.function, self.points, self.control = function, points, control
        self.weights: Tensor | None = None
        self.position = 0

    def _values(self, count: int) -> Tensor:
        block = self.points.points(self.position, self.position + count)
        self.position += count
        values = evaluate(self.function, block)
        if self.control is None:
            return values
        extra = evaluate(self.control.function, block).reshape(len(block), -1) - self.control.means.to(torch.float64)
        if self.weights is None:
            flat = values.reshape(len(values), -1)
            self.weights = torch.linalg.lstsq(extra - extra.mean(0), flat - flat.mean(0)).solution
        return values - (extra @ self.weights).reshape(values.shape)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next `count` values."""
        total: Tensor | float = 0.0
        square: Tensor | float = 0.0
        left, centre = count, None
        while left:
            values = self._values(min(left, BLOCK))
            left -= len(values)
            centre = values.mean(0) if centre is None else centre
            total = total + (values - centre).sum(0)
            square = square + (values - centre).square().sum(0)
        mean = torch.as_tensor(total) / count
        variance = (torch.as_tensor(square) - count * mean.square()).clamp(min=0.0) / max(count - 1, 1)
        return mean + (0.0 if centre is None else centre), variance.sqrt()


def integrate_by_clt(
    function: Integrand,
    points: PointSet,
    tolerance: Tolerance,
    *,
    n_min: int,
    n_max: int,
    level: float = 0.99,
    inflate: float = 1.2,
    control: Control | None = None,
) -> CubatureResult:
    """Two stages by the central limit theorem: n_min points for the deviation, then as many as it asks for.

    level: of the interval; inflate: a factor of the deviation found; control: control variates, fitted at the first
    stage. The value is that of the second stage, independent of the first.
    """
    from scipy import stats

    _check(level, inflate)
    moments = _Moments(function, points, control)
    mean, deviation = moments.sample(max(2, n_min))
    quantile = inflate * float(stats.norm.ppf(0.5 + level / 2))
    wanted = (quantile * deviation / tolerance.at(mean)).square().max()
    count = int(torch.ceil(wanted.clamp(min=2.0, max=2.0**62)))
    return _second_stage(moments, tolerance, count, n_min, n_max, lambda n: quantile * deviation / math.sqrt(n))


def _second_stage(
    moments: _Moments,
    tolerance: Tolerance,
    count: int,
    n_min: int,
    n_max: int,
    half_width: Callable[[int], Tensor],
) -> CubatureResult:
    enough = n_min + count <= n_max
    count = count if enough else max(1, n_max - n_min)
    mean, _ = moments.sample(count)
    half = half_width(count)
    lo, hi = mean - half, mean + half
    converged = bool(tolerance.met(lo, hi).all()) if enough else False
    # a relative tolerance was set by the first stage's mean: a smaller second one may miss it by little
    history = ({"n": n_min + count, "half_width": float(half.max())},)
    return CubatureResult(tolerance.centre(lo, hi), lo, hi, n_min + count, 0.0, converged, (), history)


def _berry_esseen(root_n: float, ratio: float, kurtosis: float) -> float:
    """A bound on P(|mean - mu| > ratio sigma) / 2 over root_n^2 points of this kurtosis."""
    from scipy import stats

    third = kurtosis**0.75
    uniform = 0.3328 * (third + 0.429)
    local = 18.1139 * third / (1.0 + (root_n * ratio) ** 3)
    return float(stats.norm.cdf(-root_n * ratio)) + min(uniform, local) / root_n


def _points_needed(ratio: float, chance: float, kurtosis: float) -> int:
    """The fewest points for which |mean - mu| <= ratio sigma but with a chance, by Chebyshev or Berry-Esseen."""
    from scipy import optimize

    chebyshev = math.ceil(1.0 / (chance * ratio**2))

    def excess(log_root: float) -> float:
        return _berry_esseen(math.exp(log_root), ratio, kurtosis) - chance / 2

    top = 0.5 * math.log(chebyshev)
    if top <= 0.0 or excess(top) > 0.0:
        return chebyshev
    return min(chebyshev, math.ceil(math.exp(2.0 * optimize.brentq(excess, 0.0, top))) if excess(0.0) > 0.0 else 1)


def integrate_guaranteed(
    function: Integrand,
    points: PointSet,
    tolerance: Tolerance,
    *,
    n_min: int,
    n_max: int,
    level: float = 0.99,
    inflate: float = 1.2,
    control: Control | None = None,
) -> CubatureResult:
    """Two stages with a guarantee for every integrand whose kurtosis is below a bound; a scalar one, abs_tol only.

    The bound follows from inflate, the factor of the first stage's deviation: a larger one holds for more integrands,
    and costs more points.
    """
    _check(level, inflate)
    if tolerance.relative > 0.0:
        raise ConfigError('method="guaranteed" takes an absolute tolerance: take "clt" for a relative one')
    if inflate == 1.0:
        raise ConfigError("inflate is above 1 here: it is what leaves room for the kurtosis")
    chance = 1.0 - level
    first = chance / 2.0
    spread = 1.0 - 1.0 / inflate**2
    kurtosis = (n_min - 3) / (n_min - 1) + first * n_min / (1.0 - first) * spread**2
    moments = _Moments(function, points, control)
    _, deviation = moments.sample(max(4, n_min))
    if deviation.ndim:
        raise ConfigError('method="guaranteed" takes a scalar integrand, [n, d] to [n]')
    upper = max(inflate * float(deviation), 1e-300)
    second = 1.0 - (1.0 - chance) / (1.0 - first)
    count = _points_needed(tolerance.absolute / upper, second, kurtosis)
    half = torch.full((), tolerance.absolute, dtype=torch.float64)
    return _second_stage(moments, tolerance, count, n_min, n_max, lambda n: half)
