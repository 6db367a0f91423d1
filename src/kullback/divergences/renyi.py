"""Renyi divergences R_a(p||q) = log(sum p^a q^(1-a)) / (a - 1), in log space.

Not an f-divergence but a monotone function of one: R_a = log(1 + a (a-1) D_a) / (a-1) with D_a the alpha-divergence.

Shapes: log_p and log_q [..., V], normalised log-probabilities in nats; result [...] in nats.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.divergences.f import kl
from kullback.divergences.fused import Kernel, Terms, carry_nan, fused, log_ratio

__all__ = ["renyi"]


def _renyi(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool, *, alpha: float) -> Terms:
    """With w = p^a q^(1-a): log sum w / (a-1); the gradients are multiples of w / sum w."""
    log_w = (log_p - log_q).mul_(alpha - 1.0).add_(log_p)
    log_w.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    top = log_w.amax(-1, keepdim=True)
    # top is -inf on disjoint supports and inf where q = 0 < p: the NaN of that subtraction is the largest term
    w = log_w.sub_(top).nan_to_num_(nan=0.0, neginf=-math.inf).exp_()
    total = w.sum(-1, keepdim=True)
    value = (top + total.log()).squeeze(-1) / (alpha - 1.0)
    value = value.masked_fill(top.squeeze(-1).isinf(), math.inf)
    share = w.div_(total) if need_p or need_q else None
    return Terms(carry_nan(value, log_p, log_q), share if need_p else None, share if need_q else None)


def _renyi_near_one(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool, *, alpha: float) -> Terms:
    """The same where a - 1 is too small to divide rounding errors by: log1p(sum p expm1((a-1) log(p/q)))."""
    far, _, share = _renyi(log_p, log_q, False, need_q, alpha=alpha)
    p = log_p.exp()
    tilt = log_ratio(log_p, log_q).mul_(alpha - 1.0)
    excess = tilt.expm1().mul_(p).sum(-1)
    near = excess.abs() < 0.5
    value = carry_nan(torch.where(near, excess.log1p() / (alpha - 1.0), far), log_p, log_q)
    if not need_p:
        return Terms(value, None, share)
    log_total = ((alpha - 1.0) * value).unsqueeze(-1)
    return Terms(value, tilt.sub_(log_total).expm1_().mul_(p).nan_to_num_(nan=0.0), share)


def renyi(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """Renyi divergence of order alpha > 0, log(sum p^a q^(1-a)) / (a - 1); [..., V] to [...], in nats.

    a -> 1 is KL(p||q), as a smooth limit; a = 1/2 is -2 log of the Bhattacharyya coefficient. It stays finite where
    the alpha-divergence overflows. Raises ConfigError for alpha <= 0.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> renyi(p, q, alpha=2.0)
    tensor(0.4220)
    """
    if not 0.0 < alpha < math.inf:
        raise ConfigError(f"renyi takes an alpha in (0, inf) and got {alpha}: at 0 it only compares the supports")
    if alpha == 1.0:
        return kl(log_p, log_q)
    terms = partial(_renyi_near_one if abs(alpha - 1.0) < 0.05 else _renyi, alpha=alpha)
    return fused(Kernel(terms, scale_p=alpha / (alpha - 1.0), scale_q=-1.0), log_p, log_q)
