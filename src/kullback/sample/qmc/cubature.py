"""Integrals over the unit cube to a tolerance: points are added until the bound of the error is small enough.

    net, lattice     decay of the samples' Walsh or Fourier coefficients (Hickernell and Jimenez Rugama 2014)
    bayes            credible interval of a Gaussian process whose kernel fits the points (Rathinavel, Hickernell 2019)
    replications     Student's t over independent randomizations
    clt, guaranteed  independent points: central limit theorem; bound on the kurtosis (Hickernell et al. 2013)
    mlmc             telescoping levels of independent or low-discrepancy points (Giles 2008, 2009)
With bounds [lo, hi] and the tolerance e(v) = max(abs_tol, rel_tol |v|), or min for tolerance="both", it stops when
hi - lo <= e(lo) + e(hi), and the value is (lo + hi + e(lo) - e(hi)) / 2.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.qmc.point_set import PointSet, power_of_two

__all__ = ["Control", "CubatureResult", "Tolerance", "evaluate", "integrate"]

Integrand = Callable[[Tensor], Tensor]
Method = Literal["net", "lattice", "bayes", "replications", "clt", "guaranteed", "mlmc"]


@dataclass(frozen=True, slots=True)
class CubatureResult:
    """value, lo and hi have the shape of one output of the integrand; n counts evaluations, seconds the time.

    converged: whether the tolerance was met everywhere; flags: what a user should know; history: n and the widest
    half-width at each step.
    """

    value: Tensor
    lo: Tensor
    hi: Tensor
    n: int
    seconds: float
    converged: bool
    flags: tuple[str, ...] = ()
    history: tuple[Mapping[str, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The error that is allowed around a value: max(absolute, relative |value|), or min where both must hold."""

    absolute: float = 1e-2
    relative: float = 0.0
    both: bool = False

    def __post_init__(self) -> None:
        if min(self.absolute, self.relative) < 0.0 or max(self.absolute, self.relative) == 0.0:
            raise ConfigError(
                f"tolerances are not negative, one of them positive: got {self.absolute}, {self.relative}"
            )
        if self.both and min(self.absolute, self.relative) == 0.0:
            raise ConfigError('tolerance="both" needs an absolute and a relative one, both positive')

    def at(self, value: Tensor) -> Tensor:
        relative = self.relative * value.abs()
        return relative.clamp(max=self.absolute) if self.both else relative.clamp(min=self.absolute)

    def met(self, lo: Tensor, hi: Tensor) -> Tensor:
        # a half-width that was set to the tolerance must not miss it by a rounding
        return hi - lo <= (self.at(lo) + self.at(hi)) * (1.0 + 1e-9)

    def centre(self, lo: Tensor, hi: Tensor) -> Tensor:
        return 0.5 * (lo + hi + self.at(lo) - self.at(hi))


@dataclass(frozen=True, slots=True)
class Control:
    """Control variates: functions of the points, [n, d] to [n, c], whose means [c] are known."""

    function: Integrand
    means: Tensor


def evaluate(function: Integrand, points: Tensor) -> Tensor:
    """Values [n, ...] in float64 at points [n, d]; ShapeError or DataError for what cannot be integrated."""
    values = function(points)
    if not isinstance(values, Tensor) or values.ndim < 1 or len(values) != len(points):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(f"the integrand takes points [n, d] to values [n] or [n, ...], n = {len(points)}; got {shape}")
    values = values.detach().to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise DataError("the integrand is not finite at some points: it has a singularity, or the points hit a border")
    return values


def integrate(
    function: Integrand,
    points: PointSet | Callable[[int], PointSet],
    method: Method,
    *,
    abs_tol: float = 1e-2,
    rel_tol: float = 0.0,
    tolerance: Literal["either", "both"] = "either",
    n_min: int = 1 << 10,
    n_max: int = 1 << 24,
    **options: Any,
) -> CubatureResult:
    """The integral over [0, 1)^d of a function of points [n, d], [n] or [n, ...], to within a tolerance.

    points: the set that the method asks for (a net, a lattice, one with replications, Independent points; for mlmc a
    function of the level that gives one). n_min, n_max: evaluations at first and at most, powers of 2 for all but
    independent points. options: of the method; control=Control(...) for net, lattice and clt, periodize for lattice
    and bayes, see `cone`, `bayes`, `sampling`, `multilevel`.
    Warns when n_max is reached first. Raises ConfigError where points and method do not belong together.

    >>> from kullback.sample.qmc import Sobol
    >>> net = Sobol(2, generator=torch.Generator().manual_seed(0))
    >>> result = integrate(lambda x: x.prod(-1), net, "net", abs_tol=1e-4)
    >>> result.converged, abs(result.value.item() - 0.25) < 1e-4
    (True, True)
    """
    from kullback.sample.qmc import bayes, cone, multilevel, sampling

    methods: dict[str, Callable[..., CubatureResult]] = {
        "net": cone.integrate_by_coefficients,
        "lattice": cone.integrate_by_coefficients,
        "bayes": bayes.integrate_bayes,
        "replications": sampling.integrate_by_replications,
        "clt": sampling.integrate_by_clt,
        "guaranteed": sampling.integrate_guaranteed,
        "mlmc": multilevel.integrate_multilevel,
    }
    if method not in methods:
        raise ConfigError(f"method is one of {', '.join(methods)}, not {method!r}")
    if tolerance not in ("either", "both"):
        raise ConfigError(f'tolerance is "either" or "both", not {tolerance!r}')
    if not 1 <= n_min <= n_max:
        raise ConfigError(f"n_min is at least 1 and at most n_max, and they are {n_min} and {n_max}")
    if isinstance(points, PointSet):
        _check_points(points, method)
    elif method != "mlmc":
        raise ConfigError(f'points is a set, as Sobol gives one, for method="{method}"')
    begin = time.perf_counter()
    bound = Tolerance(abs_tol, rel_tol, tolerance == "both")
    result = methods[method](function, points, bound, n_min=n_min, n_max=n_max, **options)
    if not result.converged:
        warnings.warn(f"{result.n} evaluations do not meet the tolerance: raise n_max, or ask for less", stacklevel=2)
    seconds = time.perf_counter() - begin
    return CubatureResult(
        result.value, result.lo, result.hi, result.n, seconds, result.converged, result.flags, result.history
    )


def _check_points(points: PointSet, method: str) -> None:
    kinds = {"net": ("net",), "lattice": ("lattice",), "bayes": ("net", "lattice")}
    if method == "mlmc":
        raise ConfigError("mlmc takes a function of the level that gives a set: points=lambda level: Independent(...)")
    if method in kinds and points.kind not in kinds[method]:
        raise ConfigError(f'method="{method}" takes points of kind {" or ".join(kinds[method])}, not {points.kind!r}')
    if method in ("net", "lattice", "bayes"):
        if points.replications is not None or points.order != "natural":
            raise ConfigError(f'method="{method}" takes one set of points in natural order, without replications')
        if points.randomize in ("none", "lms"):
            raise ConfigError(f'method="{method}" takes randomized points: the first of these is the origin')
    if method == "replications" and (points.replications or 0) < 2:
        raise ConfigError("replications takes a set with two or more: Sobol(d, replications=16, generator=...)")
    if method in ("clt", "guaranteed") and (points.kind != "independent" or points.replications is not None):
        raise ConfigError(f'method="{method}" takes Independent points: its theory holds for no others')


def doubling(n_min: int, n_max: int) -> Sequence[tuple[int, int]]:
    """Blocks (0, n_min), (n_min, 2 n_min), ... up to n_max."""
    power_of_two(n_min, "n_min")
    blocks, stop = [(0, n_min)], n_min
    while 2 * stop <= n_max:
        blocks.append((stop, 2 * stop))
        stop *= 2
    return blocks
