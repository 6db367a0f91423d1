"""Changes of variable that make an integrand periodic, x -> p(x) with weight p'(x), in each dimension.

Lattice rules converge fast on smooth periodic functions only: f(p(x)) p'(x) has the same integral and is one.
    baker 1 - |2x - 1|; c0, c1: polynomials; c1 sin, c2 sin, c3 sin: Sidi's
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.lattices import baker

__all__ = ["PERIODIC", "periodized"]

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
PI = math.pi

PERIODIC: dict[str, Pair] = {
    "none": (lambda x: x, torch.ones_like),
    "baker": (baker, torch.ones_like),
    "c0": (lambda x: x**2 * (3 - 2 * x), lambda x: 6 * x * (1 - x)),
    "c1": (lambda x: x**3 * (10 - 15 * x + 6 * x**2), lambda x: 30 * x**2 * (1 - x) ** 2),
    "c1 sin": (lambda x: x - torch.sin(2 * PI * x) / (2 * PI), lambda x: 1 - torch.cos(2 * PI * x)),
    "c2 sin": (
        lambda x: (8 - 9 * torch.cos(PI * x) + torch.cos(3 * PI * x)) / 16,
        lambda x: (9 * torch.sin(PI * x) - 3 * torch.sin(3 * PI * x)) * PI / 16,
    ),
    "c3 sin": (
        lambda x: x + (torch.sin(4 * PI * x) - 8 * torch.sin(2 * PI * x)) / (12 * PI),
        lambda x: 1 - 4 / 3 * torch.cos(2 * PI * x) + torch.cos(4 * PI * x) / 3,
    ),
}


def periodized(function: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """The integrand f(p(x)) prod_j p'(x_j) of points [n, d], with the integral of f; ConfigError for an unknown name.

    >>> periodized(lambda x: x.sum(-1), "baker")(torch.tensor([[0.25], [0.75]]))
    tensor([0.5000, 0.5000])
    """
    key = name.lower().replace("_", " ")
    if key not in PERIODIC:
        raise ConfigError(f"periodize is one of {', '.join(PERIODIC)}, not {name!r}")
    change, derivative = PERIODIC[key]
    if key == "none":
        return function

    def integrand(points: Tensor) -> Tensor:
        # rounding must not leave the open cube, where inverse distribution functions are finite
        inner = change(points).clamp(2.0**-53, 1.0 - 2.0**-53)
        values = function(inner)
        weight = derivative(points).prod(-1)
        return values * weight.reshape(weight.shape + (1,) * (values.ndim - 1))

    return integrand
