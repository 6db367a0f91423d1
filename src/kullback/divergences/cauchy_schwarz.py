"""The Cauchy-Schwarz divergence log sum p^2 + log sum q^2 - 2 log sum p q, in log space.

It is -2 log of the cosine between p and q: symmetric, unchanged when either is scaled, infinite on disjoint supports.

Shapes: log_p and log_q [..., V], normalised log-probabilities in nats; result [...] in nats.
"""

from __future__ import annotations

import math

from torch import Tensor

from kullback.divergences.fused import Kernel, Terms, carry_nan, fused

__all__ = ["cauchy_schwarz"]


def _softmax_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """In place: exp(scores) divided by its sum, and the logarithm of that sum [...] (-inf when nothing is left)."""
    top = scores.amax(-1, keepdim=True).clamp_(min=-1e38)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    # the total is at least 1, or 0 when nothing is left: then all scores are 0 and no NaN reaches a gradient
    return scores.div_(total.clamp(min=1.0)), (total.log() + top).squeeze(-1)


def _cauchy_schwarz(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    cross, log_cross = _softmax_(log_p + log_q)
    square_p, log_square_p = _softmax_(log_p * 2.0)
    square_q, log_square_q = _softmax_(log_q * 2.0)
    value = (log_square_p - log_cross) + (log_square_q - log_cross)
    value = value.masked_fill(log_cross == -math.inf, math.inf)
    grad_p = square_p.sub_(cross) if need_p else None
    grad_q = square_q.sub_(cross) if need_q else None
    return Terms(carry_nan(value, log_p, log_q), grad_p, grad_q)


_CAUCHY_SCHWARZ = Kernel(_cauchy_schwarz, scale_p=2.0, scale_q=2.0)


def cauchy_schwarz(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Cauchy-Schwarz divergence -2 log [sum p q / sqrt(sum p^2 sum q^2)]; [..., V] to [...], in nats.

    >>> import torch
    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> cauchy_schwarz(p, q)
    tensor(0.4870)
    """
    return fused(_CAUCHY_SCHWARZ, log_p, log_q)
