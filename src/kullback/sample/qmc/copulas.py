"""Copulas: dependence between dimensions, with any margins, as maps from the unit cube.

Gaussian and Student copulas take a correlation matrix; Clayton's and Frank's take one parameter, and are sampled by
conditional inversion, one dimension after another, so that every point of the cube gives exactly one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.measures import Gaussian, open_unit, through_quantiles

__all__ = ["ClaytonCopula", "FrankCopula", "GaussianCopula", "StudentCopula"]


def _with_margins(uniform: Tensor, margins: Sequence[Any] | None) -> Tensor:
    return uniform if margins is None else through_quantiles(uniform, margins)


def _ones(points: Tensor) -> Tensor:
    return torch.ones(points.shape[:-1], dtype=torch.float64, device=points.device)


def _check_correlation(correlation: Tensor) -> Tensor:
    matrix = correlation.to(torch.float64)
    if matrix.ndim != 2 or not torch.allclose(matrix.diagonal(), torch.ones(len(matrix), dtype=torch.float64)):
        raise ConfigError("a correlation matrix is [d, d] with ones on its diagonal")
    return matrix


@dataclass(frozen=True, slots=True)
class GaussianCopula:
    """The dependence of a normal distribution with a correlation matrix [d, d]; margins: uniform, or with a `ppf`."""

    correlation: Tensor
    margins: Sequence[Any] | None = None

    def __call__(self, points: Tensor) -> Tensor:
        normal = Gaussian(0.0, _check_correlation(self.correlation), "cholesky")(points)
        return _with_margins(torch.special.ndtr(normal), self.margins)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class StudentCopula:
    """The dependence of a multivariate t with a correlation matrix [d, d]; takes points of d + 1 dimensions.

    The last dimension is the common chi-square variable.
    """

    correlation: Tensor
    degrees: float
    margins: Sequence[Any] | None = None

    def __call__(self, points: Tensor) -> Tensor:
        from scipy import special

        matrix = _check_correlation(self.correlation)
        if points.shape[-1] != len(matrix) + 1 or not self.degrees > 0.0:
            raise ConfigError(f"a Student copula of {len(matrix)} dimensions takes points of one more, degrees > 0")
        normal = Gaussian(0.0, matrix, "cholesky")(points[..., :-1])
        last = open_unit(points[..., -1:]).cpu().numpy()
        chi_square = torch.from_numpy(special.chdtri(self.degrees, 1.0 - last)).to(points.device)
        student = normal * (self.degrees / chi_square).sqrt()
        uniform = torch.from_numpy(special.stdtr(self.degrees, student.cpu().numpy())).to(points.device)
        return _with_margins(uniform, self.margins)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class ClaytonCopula:
    """C(u) = (sum u_j^-t - d + 1)^(-1/t), t > 0, of any dimension; Kendall's tau is t / (t + 2)."""

    theta: float
    margins: Sequence[Any] | None = None

    def __call__(self, points: Tensor) -> Tensor:
        if not self.theta > 0.0:
            raise ConfigError(f"theta is positive, not {self.theta}")
        uniform = open_unit(points)
        columns = [uniform[..., 0]]
        total = columns[0] ** -self.theta  # sum of u_j^-t - 1 so far, plus 1
        for k in range(1, points.shape[-1]):
            power = uniform[..., k] ** (-self.theta / (1.0 + k * self.theta))
            value = (1.0 + total * (power - 1.0)) ** (-1.0 / self.theta)
            columns.append(value)
            total = total + value**-self.theta - 1.0
        return _with_margins(torch.stack(columns, -1).clamp(0.0, 1.0), self.margins)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)


@dataclass(frozen=True, slots=True)
class FrankCopula:
    """C(u, v) = -log(1 + (e^-tu - 1)(e^-tv - 1) / (e^-t - 1)) / t, t != 0, in two dimensions."""

    theta: float
    margins: Sequence[Any] | None = None

    def __call__(self, points: Tensor) -> Tensor:
        if self.theta == 0.0 or points.shape[-1] != 2:
            raise ConfigError(f"Frank's copula has two dimensions and theta other than 0, not {self.theta}")
        u, w = open_unit(points).unbind(-1)
        theta = self.theta
        # the conditional distribution of v given u, solved for v
        grown = torch.exp(-theta * u)
        ratio = w * torch.expm1(torch.tensor(-theta, dtype=torch.float64)) / (w + (1.0 - w) * grown)
        v = -torch.log1p(ratio) / theta
        return _with_margins(torch.stack([u, v], -1).clamp(0.0, 1.0), self.margins)

    def weight(self, points: Tensor) -> Tensor:
        return _ones(points)
