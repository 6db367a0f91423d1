"""One-dimensional kernels of mean zero that go with a group of points, K~(x, z) as a function of the difference alone.

Shift invariant (SI), of x - z mod 1, for lattices, with Bernoulli polynomials B_n:
    K~_a(x) = (-1)^(a+1) (2 pi)^(2a) / (2a)! B_2a(x),  a = 1..5
Digitally shift invariant (DSI), of u = x XOR z, for nets, with Walsh functions wal_k and mu_a(k) the sum of the a
largest positions of ones in k:
    1 + K~_a(u) = sum_k wal_k(u) 2^-mu_a(k),  a = 2, 3, 4, in closed form;  K~_1 = 2 sum_{k>0} wal_k(u) 4^-mu_1(k)
    adaptive: K~(u) = sum_{k>0} wal_k(u) 2^-(a+1)(mu_1(k)-1), any real a > 0
Differences come as numbers [..., d] in [0, 1); the values are [..., d].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError

__all__ = ["AdaptiveWalsh", "Bernoulli", "Combined", "Walsh", "bernoulli_polynomial"]

LARGEST = {"lattice": 5, "net": 4}
AT_ZERO = {1: 2.0, 2: 5 / 2, 3: 43 / 18, 4: 701 / 294}  # 1 + K~_a(0)
CHUNK = 9  # binary digits that one look-up adds to the sum in K~_4


@lru_cache(maxsize=16)
def _coefficients(degree: int) -> tuple[float, ...]:
    """Of the Bernoulli polynomial, the highest power first: sum_k C(n, k) B_k x^(n-k)."""
    numbers = [Fraction(1)]
    for m in range(1, degree + 1):
        numbers.append(-sum((math.comb(m + 1, k) * numbers[k] for k in range(m)), Fraction(0)) / (m + 1))
    return tuple(float(math.comb(degree, k) * numbers[k]) for k in range(degree + 1))


def bernoulli_polynomial(degree: int, x: Tensor) -> Tensor:
    """B_n(x), elementwise.

    >>> bernoulli_polynomial(2, torch.tensor([0.0, 0.5]))
    tensor([ 0.1667, -0.0833])
    """
    result = torch.ones_like(x)
    for coefficient in _coefficients(degree)[1:]:
        result = result * x + coefficient
    return result


def _orders(alpha: int | Sequence[int], dimensions: int, largest: int) -> tuple[int, ...]:
    orders = (alpha,) * dimensions if isinstance(alpha, int) else tuple(alpha)
    if len(orders) != dimensions or any(order not in range(1, largest + 1) for order in orders):
        raise ConfigError(f"alpha is one or {dimensions} of the numbers 1 to {largest}, and is {alpha}")
    return orders


class Bernoulli(nn.Module):
    """The SI shape with smoothness alpha, one number or one for each dimension; 1 to 5."""

    group = "lattice"

    def __init__(self, dimensions: int, alpha: int | Sequence[int] = 2) -> None:
        super().__init__()
        self.alpha = _orders(alpha, dimensions, LARGEST["lattice"])

    def forward(self, difference: Tensor) -> Tensor:
        return self.derivative(difference, (0,) * len(self.alpha), (0,) * len(self.alpha))

    def derivative(self, difference: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
        """Derivatives of these orders by x and by z, for each dimension; their sum is at most 2 alpha - 2."""
        columns: dict[tuple[int, int, int], list[int]] = {}
        for j, orders in enumerate(zip(self.alpha, first, second)):
            columns.setdefault(orders, []).append(j)
        parts = torch.empty_like(difference)
        for (alpha, by_x, by_z), dimensions in columns.items():
            degree = 2 * alpha - by_x - by_z
            if min(by_x, by_z) < 0 or degree < 2:
                raise ConfigError(f"alpha={alpha} has derivatives up to order {2 * alpha - 2}, not {by_x} + {by_z}")
            scale = (-1) ** (alpha + 1 + by_z) * (2 * math.pi) ** (2 * alpha) / math.factorial(degree)
            if len(columns) == 1:
                return scale * bernoulli_polynomial(degree, difference)
            parts[..., dimensions] = scale * bernoulli_polynomial(degree, difference[..., dimensions])
        return parts


@lru_cache(maxsize=1)
def _signed_sums() -> Tensor:
    """sum_a (-1)^(bit a) 8^-a over the nine digits of each number below 512, the most significant first."""
    numbers = torch.arange(1 << CHUNK)
    total = torch.zeros(1 << CHUNK, dtype=torch.float64)
    for place in range(CHUNK):
        total += (1 - 2 * ((numbers >> (CHUNK - 1 - place)) & 1)) * 8.0**-place
    return total


def _walsh_sum(alpha: int, u: Tensor) -> Tensor:
    """1 + K~_alpha at u in [0, 1), in closed form."""
    exponent = torch.frexp(u).exponent
    positive = u > 0
    beta = torch.where(positive, 1 - exponent, 0).to(u.dtype)
    small = torch.where(positive, torch.exp2(-beta), 0.0)  # 2^-beta, and 0 at u = 0
    if alpha == 1:
        return 2.0 - 3.0 * small  # 6 * 2^(floor(log2 u) - 1), with floor(log2 u) = -beta
    if alpha == 2:
        return -beta * u + 2.5 * (1 - small)
    if alpha == 3:
        return beta * u**2 - 5 * (1 - small) * u + 43 / 18 * (1 - small**2)
    table = _signed_sums().to(u)
    digits = (u * 2.0 ** (2 * CHUNK)).to(torch.int64)
    signed = table[digits >> CHUNK] + 8.0**-CHUNK * table[digits & ((1 << CHUNK) - 1)]
    head = -2 / 3 * beta * u**3 + 5 * (1 - small) * u**2 - 43 / 9 * (1 - small**2) * u + 701 / 294 * (1 - small**3)
    return head + beta * (signed / 48 - 1 / 42)


class Walsh(nn.Module):
    """The DSI shape with smoothness alpha, one number or one for each dimension; 1 to 4."""

    group = "net"

    def __init__(self, dimensions: int, alpha: int | Sequence[int] = 2) -> None:
        super().__init__()
        self.alpha = _orders(alpha, dimensions, LARGEST["net"])

    def forward(self, difference: Tensor) -> Tensor:
        if len(set(self.alpha)) == 1:
            return _walsh_sum(self.alpha[0], difference) - 1.0
        parts = [_walsh_sum(alpha, difference[..., j]) for j, alpha in enumerate(self.alpha)]
        return torch.stack(parts, -1) - 1.0


class AdaptiveWalsh(nn.Module):
    """The DSI shape of any real smoothness alpha > 0 for each dimension, which can be learned."""

    group = "net"

    def __init__(self, dimensions: int, alpha: float | Sequence[float] | Tensor = 1.0) -> None:
        super().__init__()
        values = torch.as_tensor(alpha, dtype=torch.float64).expand(dimensions).clone()
        if not bool((values > 0).all()):
            raise ConfigError(f"alpha is positive, and is {alpha}")
        self.log_alpha = nn.Parameter(values.log())

    def forward(self, difference: Tensor) -> Tensor:
        alpha = self.log_alpha.exp().to(difference)
        level = 1.0 / (1.0 - torch.exp2(-alpha))
        # floor(log2 u) + 1 is the exponent of u as frexp has it; at u = 0 the power is 0
        power = torch.exp2(alpha * torch.frexp(difference).exponent)
        return level - (level + 1.0) * torch.where(difference > 0, power, 0.0)


class Combined(nn.Module):
    """sum_p a_jp K~_p over the smoothness p = 1, 2, ..., with weights a >= 0 of each dimension that can be learned."""

    def __init__(self, group: str, dimensions: int, weights: Tensor | None = None) -> None:
        super().__init__()
        if group not in LARGEST:
            raise ConfigError(f'group is "lattice" or "net", not {group!r}')
        self.group = group
        count = 4
        values = torch.full((dimensions, count), 1.0 / count) if weights is None else weights
        if values.shape != (dimensions, count) or not bool((values > 0).all()):
            raise ConfigError(f"weights are positive, [{dimensions}, {count}]: one for each dimension and smoothness")
        self.log_weights = nn.Parameter(values.to(torch.float64).log())
        shape = Bernoulli if group == "lattice" else Walsh
        self.shapes = nn.ModuleList(shape(dimensions, alpha) for alpha in range(1, count + 1))

    def forward(self, difference: Tensor) -> Tensor:
        weights = self.log_weights.exp().to(difference)
        return sum((weights[:, p] * shape(difference) for p, shape in enumerate(self.shapes)), torch.zeros(()))
