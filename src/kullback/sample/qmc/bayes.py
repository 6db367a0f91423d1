"""Bayesian cubature: the integrand is a Gaussian process whose kernel fits the points, so that it costs n log n.

With F the transform of the samples and l that of the Gram matrix's first column (scale 1), neither divided by root n,
and the weight w of the kernel, one number for all dimensions, chosen by `criterion`:
    mle   minimises sum log l + n log(sum_{k>0} |F_k|^2 / l_k);  half-width z sqrt((1 - n/l_0) n^-2 sum |F_k|^2 / l_k)
    full  the same w, with the scale and the mean integrated out: Student's t with n - 1 degrees
    gcv   generalized cross-validation, sum |F_k / l_k|^2 / (sum 1 / l_k)^2
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.cubature import CubatureResult, Integrand, Tolerance, doubling, evaluate
from kullback.sample.qmc.kernels import KernelDSI, KernelSI
from kullback.sample.qmc.periodic import periodized
from kullback.sample.qmc.point_set import PointSet
from kullback.sample.qmc.transforms import fftbr, fwht

__all__ = ["integrate_bayes"]

Criterion = Literal["mle", "full", "gcv"]
# bounds of the logarithm of the weight, about the size of K~ at 0: there the product is neither flat nor a spike
RANGE = (-8.0, 1.0)


def _unscaled(x: Tensor, lattice: bool) -> Tensor:
    return (fftbr(x) if lattice else fwht(x)) * x.shape[-1] ** 0.5


class _Spectrum:
    """Eigenvalues as a function of the kernel's weight, with the cancellation-free l_0 - n."""

    def __init__(self, parts: Tensor, squares: Tensor, lattice: bool, criterion: Criterion) -> None:
        self.parts, self.squares, self.lattice, self.criterion = parts, squares, lattice, criterion
        self.count = len(parts)

    def eigenvalues(self, weight: float) -> tuple[Tensor, float]:
        column = self.parts[:, 0] * weight
        for j in range(1, self.parts.shape[1]):
            term = self.parts[:, j] * weight
            column = term * (1.0 + column) + column
        found = _unscaled(column, self.lattice)
        values = (found.real if self.lattice else found).clamp(min=1e-15 * self.count)
        return values, float(values[0])  # without the mean, which adds n to the first

    def loss(self, log_weight: float) -> float:
        values, ring = self.eigenvalues(math.exp(log_weight))
        rest = values[1:]
        if self.criterion == "gcv":
            inverse = (1.0 / rest).sum() + 1.0 / (self.count + ring)
            return float((self.squares[1:] / rest**2).sum().log() - 2.0 * inverse.log())
        total = (self.squares[1:] / rest).sum().clamp(min=1e-300)
        return float(rest.log().sum() + math.log(self.count + ring) + self.count * total.log())

    def half_width(self, log_weight: float, quantile: float) -> float:
        values, ring = self.eigenvalues(math.exp(log_weight))
        n, rest = self.count, values[1:]
        share = ring / (n + ring)
        if self.criterion == "gcv":
            inverse = (1.0 / rest).sum() + 1.0 / (n + ring)
            return quantile * math.sqrt(share * float((self.squares[1:] / rest**2).sum() / inverse) / n)
        total = float((self.squares[1:] / rest).sum())
        if self.criterion == "full":
            return quantile * math.sqrt(ring / n * total / (n * (n - 1)))
        return quantile * math.sqrt(share * total) / n


def integrate_bayes(
    function: Integrand,
    points: PointSet,
    tolerance: Tolerance,
    *,
    n_min: int,
    n_max: int,
    alpha: int = 2,
    criterion: Criterion = "mle",
    level: float = 0.99,
    periodize: str | None = None,
) -> CubatureResult:
    """Bayesian cubature on a lattice or a net; see `integrate`.

    alpha: smoothness of the kernel; criterion: mle, full or gcv; level: of the credible interval; periodize: for
    lattices, "c1 sin" by default. The search for the weight is one-dimensional, one transform a step.
    """
    from scipy import optimize, stats

    lattice = points.kind == "lattice"
    if criterion not in ("mle", "full", "gcv"):
        raise ConfigError(f"criterion is mle, full or gcv, not {criterion!r}")
    if periodize is not None and not lattice:
        raise ConfigError("periodize is for lattices: nets do not ask for periodic functions")
    if not 0.0 < level < 1.0 or points.randomize == "nus":
        raise ConfigError("level lies in (0, 1), and points keep their group: nested scrambling does not")
    integrand = periodized(function, (periodize or "c1 sin") if lattice else "none")
    kernel = (KernelSI if lattice else KernelDSI)(points.dimensions, alpha=alpha)
    values = torch.empty(0)
    parts = torch.empty(0)
    history: list[dict[str, float]] = []
    origin = points.points(0, 1)
    largest = float(kernel.shape(torch.zeros(1, points.dimensions, dtype=torch.float64)).max())
    bounds = (RANGE[0] - math.log(largest), RANGE[1] - math.log(largest))
    for start, stop in doubling(n_min, n_max):
        block = points.points(start, stop)
        added = evaluate(integrand, block)
        new_parts = kernel.shape(kernel.difference(block, origin)).detach()
        values, parts = (added, new_parts) if not start else (torch.cat([values, added]), torch.cat([parts, new_parts]))
        flat = values.reshape(len(values), -1).mT
        image = _unscaled(flat, lattice)
        squares = (image * image.conj()).real if lattice else image.square()
        quantile = float(
            stats.t.ppf(0.5 + level / 2, stop - 1) if criterion == "full" else stats.norm.ppf(0.5 + level / 2)
        )
        halves = []
        for row in squares:
            spectrum = _Spectrum(parts, row, lattice, criterion)
            found = optimize.minimize_scalar(spectrum.loss, bounds=bounds, method="bounded", options={"xatol": 1e-2})
            halves.append(spectrum.half_width(float(found.x), quantile))
        half = torch.tensor(halves, dtype=torch.float64)
        mean = flat.mean(-1)
        lo, hi = (mean - half).reshape(values.shape[1:]), (mean + half).reshape(values.shape[1:])
        history.append({"n": stop, "half_width": float(half.max())})
        converged = bool(tolerance.met(lo, hi).all())
        if converged:
            break
    return CubatureResult(tolerance.centre(lo, hi), lo, hi, stop, 0.0, converged, (), tuple(history))
