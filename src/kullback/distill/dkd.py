r"""Decoupled distillation, and logits brought to one scale: what rankings of a teacher are compared with.

With b = (p_y, 1 - p_y) the label against the rest, and r = p / (1 - p_y) the other classes among themselves,

    KL(p, q) = KL(b_p, b_q) + (1 - p_y) KL(r_p, r_q),    DKD = T^2 (alpha KL(b_p, b_q) + beta KL(r_p, r_q)).

A teacher sure of the label mutes the second part of KL; here it has a weight of its own. The label's cross-entropy is
not in the loss: add it. Sources: DKD arXiv 2203.08679, standardisation arXiv 2403.01053; both beside PLD in 2506.12542.

Shapes: logits [..., V], labels [...].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences._ranking import check_labels, check_logits, check_temperature

__all__ = ["dkd_loss", "standardised"]


def dkd_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """T^2 (alpha KL of label against rest + beta KL among the other classes), the mean over rows or one a row [...].

    teacher_logits and student_logits [..., V], V >= 2, finite; labels [...]; nats. Halves are computed in float32.
    Raises ShapeError, DataError for labels that are no class, ConfigError for options out of range.

    >>> t, s = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    >>> dkd_loss(t, s, torch.tensor([1]), temperature=1.0, beta=0.0)  # 0.2369 against 0.1744
    tensor(0.0125)
    """
    if reduction not in ("mean", "none"):
        raise ConfigError(f'reduction is "mean" or "none", not {reduction!r}')
    if not (0.0 <= alpha < math.inf and 0.0 <= beta < math.inf):
        raise ConfigError(f"alpha and beta weigh two divergences, 0 or more, and are {alpha} and {beta}")
    check_temperature(temperature)
    check_logits(teacher_logits, labels)
    classes = teacher_logits.shape[-1]
    if student_logits.shape != teacher_logits.shape or classes < 2:
        shapes = f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        raise ShapeError(f"teacher and student have logits [..., V] of the same shape, V 2 or more, and not {shapes}")
    check_labels(labels, classes)
    own = labels.long().unsqueeze(-1)
    parts = [_parts(logits, own, temperature) for logits in (teacher_logits.detach(), student_logits)]
    binary, rest = (_kl(log_p, log_q) for log_p, log_q in zip(*parts, strict=True))
    value = temperature**2 * (alpha * binary + beta * rest)
    return value if reduction == "none" else value.mean()


def _parts(logits: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., 2] of the label and the rest, and [..., V - 1] of the others among themselves."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    place = torch.arange(wide.shape[-1] - 1, device=own.device).expand(*own.shape[:-1], -1)
    others = wide.gather(-1, place + (place >= own))
    binary = torch.cat([wide.gather(-1, own), others.logsumexp(-1, keepdim=True)], -1)
    return binary.log_softmax(-1), others.log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def standardised(logits: Tensor) -> Tensor:
    """Logits [..., V] less their mean, over their standard deviation (of all V): of each row, of the same shape.

    Give it the teacher's logits, or both, to losses that should not depend on their scale. What a ranking says of the
    order stays, its weights change. Equal logits give 0. Halves are computed in float32; a gradient goes through.
    Raises ShapeError for logits without a class, DataError for logits that are not finite.

    >>> standardised(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"logits have shape [..., V] with at least one class, got {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise DataError("logits with NaN or infinity have no mean and deviation: leave those classes out")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return layer_norm(wide, wide.shape[-1:], eps=1e-12)
