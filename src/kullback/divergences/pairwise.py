"""Costs between all rows of two clouds, C_ij = c(x_i, y_j): the ground costs of batchwise optimal transport.

Shapes: x [..., M, D] and y [..., N, D], points as rows (softmax rows, logits, hidden states); C [..., M, N].
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["COSTS", "pairwise_cost"]

_COLUMNS, _TILE = 512, 2**19  # a tile's columns and numbers, small enough to stay in a core's cache


class _TiledL1(torch.autograd.Function):
    """sum_k |x_ik - y_jk| by tiles of rows and columns, in O(M N) memory; wide rows take a quarter of cdist's time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        cost = x.new_zeros(*x.shape[:-1], y.shape[-2])
        for x_part, y_part in zip(x.split(_COLUMNS, -1), y.split(_COLUMNS, -1)):
            y_part = y_part.contiguous().unsqueeze(-3)
            rows = max(1, _TILE // y_part.numel())
            for x_rows, cost_rows in zip(x_part.split(rows, -2), cost.split(rows, -2)):
                cost_rows += (x_rows.unsqueeze(-2) - y_part).abs_().sum(-1)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        by_x = _l1_gradient(grad, x, y) if ctx.needs_input_grad[0] else None
        by_y = _l1_gradient(grad.mT, y, x) if ctx.needs_input_grad[1] else None
        return by_x, by_y


def _l1_gradient(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum_j grad_ij sign(x_i - y_j) by torch's own kernel, which is fast and for p = 1 ignores its last argument."""
    return torch.ops.aten._cdist_backward(grad.contiguous(), x.contiguous(), y.contiguous(), 1.0, grad.contiguous())


def _l1(x: Tensor, y: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.shape[-1] < 64:
        return torch.cdist(x, y, p=1.0)
    return _TiledL1.apply(x, y)


def _l2(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _squared(x: Tensor, y: Tensor) -> Tensor:
    centre = y.detach().mean(-2, keepdim=True)  # the three terms below cancel less around it
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return torch.sub(squares, x @ y.mT, alpha=2).clamp(min=0.0)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1.0 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT


COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "squared": _squared,
    "cosine": _cosine,
}


def pairwise_cost(x: Tensor, y: Tensor, kind: str = "l1") -> Tensor:
    """The cost between every row of x [..., M, D] and every row of y [..., N, D]; returns [..., M, N].

    "l1": sum |x - y|, on probabilities twice the total variation; "l2": the Euclidean distance; "squared": its square;
    "cosine": 1 - cos(x, y). Halves are computed in float32. No [..., M, N, D] tensor is formed. "l1" is differentiable
    once. Raises ShapeError for clouds that do not belong together, ConfigError for an unknown kind.

    >>> pairwise_cost(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[1.],
            [2.]])
    """
    if kind not in COSTS:
        near = get_close_matches(str(kind), COSTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the kinds are {', '.join(COSTS)}"
        raise ConfigError(f"no cost between rows is called {kind!r}: {hint}")
    if x.ndim < 2 or x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2]:
        raise ShapeError(
            f"a cost needs two clouds [..., M, D] and [..., N, D] and got {tuple(x.shape)} and {tuple(y.shape)}: "
            "give both the same leading dimensions"
        )
    if x.shape[-1] != y.shape[-1]:
        raise ShapeError(
            f"the rows of the first cloud have {x.shape[-1]} entries and those of the second {y.shape[-1]}: "
            "cut both to the shared classes or vocabulary, or project them to one width"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return COSTS[kind](x.to(dtype), y.to(dtype))
