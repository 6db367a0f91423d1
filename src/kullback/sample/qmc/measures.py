"""True measures: maps from the unit cube to the distribution that an expectation is under.

A measure is called with points [..., d] in [0, 1)^d and gives samples of the same shape; its `weight` [...] is 1 for
probabilities and the volume that a point stands for under Lebesgue measure. `expectation` makes an integrand of a
function and a measure. Points are kept 2^-53 away from 0 and 1, where inverse distribution functions are infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError

__all__ = [
    "BrownianMotion",
    "Gaussian",
    "JohnsonSU",
    "Kumaraswamy",
    "Lebesgue",
    "Marginals",
    "Measure",
    "StudentT",
    "Uniform",
    "expectation",
    "normal_quantile",
    "open_unit",
]

SMALLEST = 2.0**-53
Factor = Literal["cholesky", "pca"]


class Measure(Protocol):
    """Samples [..., d] from points [..., d], and the weight [...] of each point."""

    def __call__(self, points: Tensor, /) -> Tensor: ...
    def weight(self, points: Tensor, /) -> Tensor: ...


def open_unit(points: Tensor) -> Tensor:
    """Points moved off the borders of the cube, in float64."""
    return points.to(torch.float64).clamp(SMALLEST, 1.0 - SMALLEST)


def normal_quantile(points: Tensor) -> Tensor:
    """The inverse of the standard normal distribution function, elementwise, finite on [0, 1].

    >>> normal_quantile(torch.tensor([0.5, 0.975])).round(decimals=4)
    tensor([0.0000, 1.9600], dtype=torch.float64)
    """
    return torch.special.ndtri(open_unit(points))


def expectation(function: Callable[[Tensor], Tensor], measure: Measure) -> Callable[[Tensor], Tensor]:
    """The integrand on the cube whose integral is that of `function` under the measure."""

    def integrand(points: Tensor) -> Tensor:
        values, weight = function(measure(points)), measure.weight(points)
        return values * weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))

    return integrand


def _ones(points: Tensor) -> Tensor:
    return torch.ones(points.shape[:-1], dtype=torch.float64, device=points.device)


@dataclass(frozen=True, slots=True)
class Uniform:
    """The uniform distribution on a box, low to high, numbers or [d]."""

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def __call__(self, points: Tensor) -> Tensor:
        return self.low + (torch.as_tensor(self.high) - torch.as_tensor(self.low)) * points.to(torch.float64)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class Lebesgue:
    """Lebesgue measure on the support of a measure with a density: every point weighs 1 / density.

    Of a box it weighs the volume; of R^d through a Gaussian, whose tails must be heavier than the integrand's.
    """

    through: Uniform | Gaussian

    def __call__(self, points: Tensor) -> Tensor:
        return self.through(points)

    def weight(self, points: Tensor) -> Tensor:
        if isinstance(self.through, Gaussian):
            return torch.exp(-self.through.log_density(self.through(points)))
        sides = torch.as_tensor(self.through.high) - torch.as_tensor(self.through.low)
        return _ones(points) * sides.to(torch.float64).expand(points.shape[-1]).prod()


def _root(covariance: Tensor, factor: Factor) -> Tensor:
    """A with A A' = covariance; pca puts the directions of most variance first, which nets resolve best."""
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ShapeError(f"a covariance has shape [d, d], not {tuple(covariance.shape)}")
    matrix = covariance.to(torch.float64)
    if factor == "cholesky":
        root, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise ConfigError("the covariance is not positive definite: add a small diagonal, or take factor='pca'")
        return root
    if factor != "pca":
        raise ConfigError(f'factor is "cholesky" or "pca", not {factor!r}')
    values, vectors = torch.linalg.eigh(matrix)
    if float(values.min()) < -1e-10 * float(values.max()):
        raise ConfigError("the covariance has a negative eigenvalue: it is none")
    return (vectors * values.clamp(min=0.0).sqrt()).flip(-1)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """The normal distribution with a mean, number or [d], and a covariance: a variance, variances [d], or [d, d]."""

    mean: float | Tensor = 0.0
    covariance: float | Tensor = 1.0
    factor: Factor = "pca"

    def __call__(self, points: Tensor) -> Tensor:
        normal = normal_quantile(points)
        covariance = torch.as_tensor(self.covariance, dtype=torch.float64)
        if covariance.ndim < 2:
            return self.mean + covariance.sqrt() * normal
        if covariance.shape[-1] != points.shape[-1]:
            raise ShapeError(f"points have {points.shape[-1]} dimensions and the covariance {covariance.shape[-1]}")
        return self.mean + normal @ _root(covariance, self.factor).mT

    def log_density(self, x: Tensor) -> Tensor:
        """log of the density at x [..., d]: [...]."""
        covariance = torch.as_tensor(self.covariance, dtype=torch.float64)
        dimensions = x.shape[-1]
        centred = x - torch.as_tensor(self.mean, dtype=torch.float64)
        if covariance.ndim < 2:
            variances = covariance.expand(dimensions)
            square, logdet = (centred.square() / variances).sum(-1), variances.log().sum()
        else:
            root = _root(covariance, "cholesky")
            solved = torch.linalg.solve_triangular(root, centred.unsqueeze(-1), upper=False).squeeze(-1)
            square, logdet = solved.square().sum(-1), 2.0 * root.diagonal().log().sum()
        return -0.5 * (square + logdet + dimensions * math.log(2.0 * math.pi))

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class BrownianMotion:
    """Brownian motion with drift at d increasing positive times: Gaussian with covariance diffusion min(s, t)."""

    times: Sequence[float]
    drift: float = 0.0
    start: float = 0.0
    diffusion: float = 1.0
    factor: Factor = "pca"

    def __call__(self, points: Tensor) -> Tensor:
        times = torch.tensor(self.times, dtype=torch.float64)
        if len(times) != points.shape[-1] or not bool((times.diff(prepend=torch.zeros(1)) > 0).all()):
            raise ConfigError(f"times are {points.shape[-1]} increasing positive numbers, as many as the dimensions")
        covariance = self.diffusion * torch.minimum(times.unsqueeze(-1), times)
        return Gaussian(self.start + self.drift * times, covariance, self.factor)(points)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class Marginals:
    """Independent dimensions, each a frozen distribution of scipy.stats or anything with an inverse `ppf`."""

    distributions: Sequence[Any]

    def __call__(self, points: Tensor) -> Tensor:
        return through_quantiles(points, self.distributions)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


def through_quantiles(points: Tensor, distributions: Sequence[Any]) -> Tensor:
    """Points [..., d] through the inverse distribution function of each dimension."""
    if len(distributions) not in (1, points.shape[-1]):
        raise ShapeError(f"there are {len(distributions)} distributions for {points.shape[-1]} dimensions")
    inside = open_unit(points).cpu().numpy()
    every = list(distributions) * (points.shape[-1] if len(distributions) == 1 else 1)
    columns = [np.asarray(one.ppf(inside[..., j]), dtype=np.float64) for j, one in enumerate(every)]
    return torch.from_numpy(np.stack(columns, -1)).to(points.device)


@dataclass(frozen=True, slots=True)
class StudentT:
    """Independent Student t distributions with degrees of freedom, location and scale."""

    degrees: float
    location: float | Tensor = 0.0
    scale: float | Tensor = 1.0

    def __call__(self, points: Tensor) -> Tensor:
        from scipy import special

        if not self.degrees > 0.0:
            raise ConfigError(f"degrees of freedom are positive, not {self.degrees}")
        quantiles = special.stdtrit(self.degrees, open_unit(points).cpu().numpy())
        return self.location + self.scale * torch.from_numpy(quantiles).to(points.device)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class Kumaraswamy:
    """Kumaraswamy's distribution on (0, 1), F(x) = 1 - (1 - x^a)^b."""

    a: float | Tensor
    b: float | Tensor

    def __call__(self, points: Tensor) -> Tensor:
        if not bool((torch.as_tensor(self.a) > 0).all()) or not bool((torch.as_tensor(self.b) > 0).all()):
            raise ConfigError(f"a and b are positive, not {self.a} and {self.b}")
        rest = torch.log1p(-open_unit(points)) / self.b
        return (-torch.expm1(rest)) ** (1.0 / torch.as_tensor(self.a))

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class JohnsonSU:
    """Johnson's SU distribution, x = location + scale sinh((z - gamma) / delta) with z standard normal."""

    gamma: float | Tensor = 0.0
    delta: float | Tensor = 1.0
    location: float | Tensor = 0.0
    scale: float | Tensor = 1.0

    def __call__(self, points: Tensor) -> Tensor:
        if not bool((torch.as_tensor(self.delta) > 0).all()) or not bool((torch.as_tensor(self.scale) > 0).all()):
            raise ConfigError(f"delta and scale are positive, not {self.delta} and {self.scale}")
        return self.location + self.scale * torch.sinh((normal_quantile(points) - self.gamma) / self.delta)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)
