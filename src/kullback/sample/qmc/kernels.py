"""Product kernels whose Gram matrices over lattices and nets are diagonal in a fast transform, and dense ones beside.

    K(x, z) = S prod_j (1 + g_j K~_j(x_j, z_j)),   the integral of K(x, .) is S for every x

KernelSI goes with lattices, KernelDSI, KernelDSIAdaptive with nets, KernelCombined with either; see `shapes`. All are
modules: their parameters (scale S, weights g > 0, what the shape has) are learned in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, ShapeError
from kullback.sample.qmc.bits import from_unit, to_unit
from kullback.sample.qmc.shapes import AdaptiveWalsh, Bernoulli, Combined, Walsh

__all__ = [
    "KernelCombined",
    "KernelDSI",
    "KernelDSIAdaptive",
    "KernelMultiTask",
    "KernelSI",
    "ProductKernel",
    "RadialKernel",
]

DIGITS = 53


def _positive(value: Any, shape: tuple[int, ...], name: str) -> nn.Parameter:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.numel() not in (1, math.prod(shape)) or not bool((tensor > 0).all()):
        raise ConfigError(f"{name} is positive, of shape {list(shape)} or one number, and is {value}")
    return nn.Parameter(tensor.expand(shape).clone().log())


class ProductKernel(nn.Module):
    """K(x, z) = scale prod_j (1 + weights_j K~_j(x_j, z_j)) for points [..., d] that broadcast: [...]."""

    def __init__(self, shape: Any, dimensions: int, *, scale: Any = 1.0, weights: Any = 1.0) -> None:
        super().__init__()
        self.shape = shape
        self.dimensions = dimensions
        self.log_scale = _positive(scale, (), "scale")
        self.log_weights = _positive(weights, (dimensions,), "weights")

    @property
    def group(self) -> str:
        """Which points diagonalise it: "lattice" or "net"."""
        return str(self.shape.group)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    @property
    def weights(self) -> Tensor:
        return self.log_weights.exp()

    def difference(self, x: Tensor, z: Tensor) -> Tensor:
        """x - z modulo 1, or the digits' XOR as a number, [..., d]."""
        if x.shape[-1:] != (self.dimensions,) or z.shape[-1:] != (self.dimensions,):
            shapes = f"{tuple(x.shape)} and {tuple(z.shape)}"
            raise ShapeError(f"points have shape [..., {self.dimensions}], as the kernel, and have {shapes}")
        if self.group == "lattice":
            return torch.remainder(x - z, 1.0)
        return to_unit(from_unit(x, DIGITS) ^ from_unit(z, DIGITS), DIGITS).to(x.dtype)

    def without_mean(self, x: Tensor, z: Tensor) -> Tensor:
        """K - scale, without cancellation where the weights are small: [...]."""
        return self.scale.to(x) * _product_minus_one(self.weights.to(x) * self.shape(self.difference(x, z)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """K(x, z) for x, z [..., d] that broadcast."""
        return self.scale.to(x) * (1.0 + self.weights.to(x) * self.shape(self.difference(x, z))).prod(-1)

    def matrix(self, x: Tensor, z: Tensor) -> Tensor:
        """The dense matrix [n, m] between points [n, d] and [m, d]."""
        return self(x.unsqueeze(-2), z.unsqueeze(-3))

    def derivative(self, x: Tensor, z: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
        """The derivative of K of orders `first` by x and `second` by z, for each dimension; SI kernels only."""
        if not isinstance(self.shape, Bernoulli):
            raise ConfigError("only KernelSI has derivatives: Walsh functions are steps")
        parts = self.weights.to(x) * self.shape.derivative(self.difference(x, z), first, second)
        plain = torch.tensor([one + two == 0 for one, two in zip(first, second)], device=x.device)
        return self.scale.to(x) * (plain.to(x) + parts).prod(-1)


def _product_minus_one(terms: Tensor) -> Tensor:
    """prod (1 + t_j) - 1 by a <- t (1 + a) + a, so that small terms keep their digits."""
    result = terms[..., 0]
    for j in range(1, terms.shape[-1]):
        result = terms[..., j] * (1.0 + result) + result
    return result


def KernelSI(dimensions: int, *, alpha: int | Sequence[int] = 2, scale: Any = 1.0, weights: Any = 1.0) -> ProductKernel:
    """The shift-invariant kernel of smoothness alpha, 1 to 5, for lattices: periodic functions.

    >>> KernelSI(1, alpha=1)(torch.zeros(1), torch.tensor([0.5])).item()  # 1 - pi^2 / 6
    -0.644...
    """
    return ProductKernel(Bernoulli(dimensions, alpha), dimensions, scale=scale, weights=weights)


def KernelDSI(
    dimensions: int, *, alpha: int | Sequence[int] = 2, scale: Any = 1.0, weights: Any = 1.0
) -> ProductKernel:
    """The digitally shift-invariant kernel of smoothness alpha, 1 to 4, for nets in base 2.

    >>> KernelDSI(1, alpha=2)(torch.zeros(1), torch.tensor([0.5])).item()
    0.75
    """
    return ProductKernel(Walsh(dimensions, alpha), dimensions, scale=scale, weights=weights)


def KernelDSIAdaptive(
    dimensions: int, *, alpha: float | Sequence[float] | Tensor = 1.0, scale: Any = 1.0, weights: Any = 1.0
) -> ProductKernel:
    """The digitally shift-invariant kernel of any real smoothness alpha > 0, learned with the rest, for nets."""
    return ProductKernel(AdaptiveWalsh(dimensions, alpha), dimensions, scale=scale, weights=weights)


def KernelCombined(
    dimensions: int, group: str, *, mixture: Tensor | None = None, scale: Any = 1.0, weights: Any = 1.0
) -> ProductKernel:
    """A mixture [d, 4] of the kernels of smoothness 1 to 4 in each dimension, for "lattice" or "net"."""
    return ProductKernel(Combined(group, dimensions, mixture), dimensions, scale=scale, weights=weights)


class KernelMultiTask(nn.Module):
    """K((t, x), (s, z)) = (F F' + diag v)_ts K(x, z) between T tasks, or between derivatives of one function.

    factor F [T, r] and the positive diagonal v [T] are learned. derivatives: the orders [T, d] of the derivative that
    each task observes, for KernelSI; F = 1 and v near 0 then make them derivatives of the same function.
    """

    def __init__(
        self,
        base: ProductKernel,
        tasks: int,
        *,
        factor: Tensor | None = None,
        diagonal: Any = 1.0,
        derivatives: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.base, self.tasks = base, tasks
        start = torch.ones(tasks, 1, dtype=torch.float64) if factor is None else factor.to(torch.float64)
        if start.ndim != 2 or len(start) != tasks:
            raise ShapeError(f"factor has shape [{tasks}, r], a row for each task, and has {tuple(start.shape)}")
        if derivatives is not None and [len(orders) for orders in derivatives] != [base.dimensions] * tasks:
            raise ShapeError(f"derivatives are {tasks} rows of {base.dimensions} orders, for tasks and dimensions")
        self.factor = nn.Parameter(start.clone())
        self.log_diagonal = _positive(diagonal, (tasks,), "diagonal")
        self.derivatives = derivatives

    @property
    def group(self) -> str:
        return self.base.group

    def covariance(self) -> Tensor:
        """F F' + diag v, [T, T]."""
        return self.factor @ self.factor.mT + torch.diag(self.log_diagonal.exp())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """All tasks against all: points [..., d] that broadcast to [...] give [..., T, T]."""
        covariance = self.covariance().to(x)
        if self.derivatives is None:
            return self.base(x, z)[..., None, None] * covariance
        rows = [torch.stack([self.base.derivative(x, z, a, b) for b in self.derivatives], -1) for a in self.derivatives]
        return torch.stack(rows, -2) * covariance

    def matrix(self, x: Tensor, z: Tensor) -> Tensor:
        """The dense matrix [T n, T m], task by task."""
        blocks = self(x.unsqueeze(-2), z.unsqueeze(-3))
        return blocks.permute(2, 0, 3, 1).reshape(self.tasks * len(x), self.tasks * len(z))


class RadialKernel(nn.Module):
    """scale r(|x - z| / lengths) for any points: dense, for comparison and for data that is not on a lattice or net.

    name: "gaussian", "rational quadratic" (with its mixture parameter alpha), "matern 1/2", "matern 3/2", "matern 5/2".
    """

    NAMES = ("gaussian", "rational quadratic", "matern 1/2", "matern 3/2", "matern 5/2")

    def __init__(
        self, dimensions: int, name: str = "gaussian", *, scale: Any = 1.0, lengths: Any = 1.0, alpha: Any = 1.0
    ) -> None:
        super().__init__()
        if name not in self.NAMES:
            raise ConfigError(f"a radial kernel is one of {', '.join(self.NAMES)}, not {name!r}")
        self.name, self.dimensions = name, dimensions
        self.log_scale = _positive(scale, (), "scale")
        self.log_lengths = _positive(lengths, (dimensions,), "lengths")
        self.log_alpha = _positive(alpha, (), "alpha")

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """K(x, z) for x, z [..., d] that broadcast."""
        square = ((x - z) / self.log_lengths.exp().to(x)).square().sum(-1)
        return self.log_scale.exp().to(x) * self._profile(square)

    def _profile(self, square: Tensor) -> Tensor:
        if self.name == "gaussian":
            return torch.exp(-0.5 * square)
        if self.name == "rational quadratic":
            alpha = self.log_alpha.exp().to(square)
            return (1.0 + square / (2.0 * alpha)) ** -alpha
        # the root has no derivative at 0, where the kernel's own is 0 or does not matter
        distance = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
        if self.name == "matern 1/2":
            return torch.exp(-distance)
        if self.name == "matern 3/2":
            scaled = math.sqrt(3.0) * distance
            return (1.0 + scaled) * torch.exp(-scaled)
        scaled = math.sqrt(5.0) * distance
        return (1.0 + scaled + scaled.square() / 3.0) * torch.exp(-scaled)

    def matrix(self, x: Tensor, z: Tensor) -> Tensor:
        """The dense matrix [n, m] between points [n, d] and [m, d]."""
        return self(x.unsqueeze(-2), z.unsqueeze(-3))
