"""The only reductions of per-element losses; the divergences themselves never reduce.

Shapes: x and mask are [...]; the result is a scalar.
"""

import torch
from torch import Tensor

from kullback.core.errors import ShapeError

__all__ = ["masked_mean", "masked_sum"]


def masked_sum(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of x where mask is true; an empty mask gives 0 and still carries a (zero) gradient.

    Entries that are masked out may be infinite or NaN: neither the value nor the gradient sees them.
    Raises ShapeError when mask has another shape than x.

    >>> x = torch.tensor([1.0, 2.0, float("nan")])
    >>> masked_sum(x, torch.tensor([True, True, False]))
    tensor(3.)
    """
    if mask is None:
        return x.sum()
    if mask.shape != x.shape:
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)} and the values have {tuple(x.shape)}: give one entry per value"
        )
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor | None = None, *, count: Tensor | float | None = None) -> Tensor:
    """Masked sum divided by `count`, or by the number of true entries when no count is given.

    `count` is the global number of tokens that a trainer knows under gradient accumulation or several processes:
    with it, the sum over micro-batches equals the mean over the whole batch. An empty mask gives 0.

    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> masked_mean(x, torch.tensor([True, True, False]))
    tensor(1.5000)
    >>> masked_mean(x, torch.tensor([True, True, False]), count=6)
    tensor(0.5000)
    """
    total = masked_sum(x, mask)
    if count is not None:
        return total / count
    if mask is None:
        return total / max(x.numel(), 1)
    return total / mask.bool().sum().clamp(min=1)
