"""How a teacher's logits become a ranking: checks, and a sort of whole numbers that hold logit and class.

Shapes: logits [..., V], labels [...], the order [..., K].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["check_labels", "check_logits", "check_picks", "check_temperature", "check_topk", "label_first"]

_BLOCK = 2**17  # numbers sorted at a time on a CPU, so that their keys stay in the cache


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise ShapeError unless logits are [..., V] with V >= 1 and labels are integers [...]."""
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"logits have shape [..., V] with at least one class, got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(f"labels have shape {tuple(labels.shape)} and the rows {tuple(logits.shape[:-1])}: one a row")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"labels are class indices, got {labels.dtype}: for soft labels give them as teacher")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise DataError for labels outside 0..classes - 1."""
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels must lie in 0..{classes - 1} and reach from {int(labels.min())} to {int(labels.max())}: "
            "give rows that do not count the ignore_index"
        )


def check_temperature(temperature: float) -> None:
    """Raise ConfigError unless the temperature is a finite number above 0."""
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"temperature must be positive and finite and is {temperature}")


def check_topk(topk: int | None) -> None:
    """Raise ConfigError unless topk is None or a whole number of picks."""
    if topk is not None and (not isinstance(topk, int | np.integer) or topk < 1):
        raise ConfigError(f"topk counts the picks, the label among them, and must be at least 1, got {topk}")


def check_picks(order: Tensor, weights: Tensor, classes: int) -> None:
    """Raise ShapeError or DataError unless order [..., K] holds classes and weights broadcast to it, 0 or more."""
    if order.is_floating_point() or order.dtype == torch.bool:
        raise ShapeError(f"a ranking holds class indices, got {order.dtype}")
    pairs = zip(reversed(weights.shape), reversed(order.shape), strict=False)
    if weights.ndim > order.ndim or any(own not in (1, wanted) for own, wanted in pairs):
        raise ShapeError(f"weights by rank broadcast to the ranking {tuple(order.shape)}, got {tuple(weights.shape)}")
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < classes:
        raise DataError(f"a ranking of {classes} classes holds indices in 0..{classes - 1}, and this one others")
    if not bool((weights >= 0.0).all()):  # a NaN is not either
        raise DataError("weights by rank are nonnegative numbers: a negative one would reward a wrong pick")


def _keys(raised: Tensor) -> Tensor:
    """Whole numbers that rise as the float32 falls, and with the class where two are equal."""
    bits = (raised + 0.0).view(torch.int32)  # + 0.0 makes one of both zeros
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (falling.long() << 32) + torch.arange(raised.shape[-1], device=raised.device)


def label_first(logits: Tensor, labels: Tensor, topk: int | None) -> Tensor:
    """The first topk (or all) classes, int64: the label, then by falling logit, ties by index."""
    classes = logits.shape[-1]
    check_topk(topk)
    picks = classes if topk is None else min(topk, classes)
    if logits.numel() and not bool(logits.amax(-1).isfinite().all()):  # the largest is NaN where any is
        raise DataError(
            "teacher logits hold NaN or +inf, or a row of -inf alone: no ranking; look at the teacher's output"
        )
    if logits.dtype == torch.float64:
        raised = logits.scatter(-1, labels.unsqueeze(-1), math.inf)
        return raised.sort(dim=-1, descending=True, stable=True).indices[..., :picks]
    if logits.device.type != "cpu":
        keys = _keys(logits.float().scatter(-1, labels.unsqueeze(-1), math.inf))
        ranked = keys.sort(-1).values if picks == classes else keys.topk(picks, largest=False, sorted=True).values
        return ranked & 0xFFFFFFFF
    rows, own = logits.reshape(-1, classes), labels.reshape(-1, 1)
    order = torch.empty(len(rows), picks, dtype=torch.int64)
    for begin in range(0, len(rows), max(_BLOCK // classes, 1)):
        part = slice(begin, begin + max(_BLOCK // classes, 1))
        order[part] = _first(rows[part].float().scatter(-1, own[part], math.inf), picks)
    return order.view(*logits.shape[:-1], picks)


def _first(raised: Tensor, picks: int) -> Tensor:
    array = _keys(raised).numpy()  # numpy sorts whole numbers with vector instructions
    if picks < raised.shape[-1]:
        array = np.partition(array, picks - 1, axis=-1)[..., :picks].copy()
    array.sort(axis=-1)
    return torch.from_numpy(array) & 0xFFFFFFFF
