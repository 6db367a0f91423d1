"""The policy that maximises E r - b D(reference||policy) for any f-divergence: exact, for tables of outcomes.

With s the link of the divergence (f' of arXiv 2309.16240 at the log-ratio) the optimum is

    log policy = log reference + s^-1((r - m) / b),    m so that the policy sums to 1.

m is found by Newton's method on F(m) = s(log sum reference exp s^-1((r - m) / b)), a quasi-linear mean of (r - m) / b,
which is a straight line for equal rewards and for reverse KL, so that a few steps are enough. It lies between
max_i r_i - b s(-log p_i), where the largest term alone is 1, and max_i r_i - b s(-log(Y p_i)), where all are below 1/Y.

Shapes: log-probabilities and rewards [..., Y], in nats; multipliers [...]. Float64 throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence

__all__ = ["RegularisedPolicy", "f_regularised_policy"]

_ENTRIES = 1 << 16  # of a block of problems, which so stays in the caches
_STEPS = 100


class RegularisedPolicy(NamedTuple):
    """log_policy [..., Y] and the multiplier [...] of its normalisation."""

    log_policy: Tensor
    multiplier: Tensor


@torch.no_grad()
def f_regularised_policy(
    log_reference: Tensor,
    reward: Tensor,
    *,
    divergence: FDivergence,
    beta: float,
    tolerance: float = 1e-13,
) -> RegularisedPolicy:
    """The policy that maximises E r - beta D(reference||policy), and its multiplier m; [..., Y] to [..., Y] and [...].

    r - beta s(log policy - log reference) = m wherever the policy has mass. Outcomes without mass under the reference
    have none. Where s is finite at ratio 0 (chi-squared) outcomes of low reward have none either.
    tolerance: of the sum of the policy, which then is normalised. Raises ConfigError for beta <= 0 and for total
    variation, ShapeError, and DataError for NaN or a reference without mass.

    >>> from kullback.divergences import f_divergence
    >>> reference, reward = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([1.0, 0.0, -1.0])
    >>> f_regularised_policy(reference, reward, divergence=f_divergence("kl"), beta=0.5).log_policy.exp()
    tensor([0.8408, 0.1156, 0.0435], dtype=torch.float64)
    """
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
    divergence.link_inverse(torch.zeros(()))  # refuses what has no inverse
    log_p, scaled = _checked(log_reference, reward)
    shape = log_p.shape
    log_p, scaled = log_p.reshape(-1, shape[-1]), (scaled / beta).reshape(-1, shape[-1])
    rows = max(_ENTRIES // shape[-1], 1)
    log_policy, multiplier = torch.empty_like(log_p), log_p.new_empty(len(log_p))
    for start in range(0, len(log_p), rows):
        part = slice(start, start + rows)
        log_policy[part], multiplier[part] = _solve(divergence, log_p[part], scaled[part], tolerance)
    return RegularisedPolicy(log_policy.reshape(shape), beta * multiplier.reshape(shape[:-1]))


def _checked(log_reference: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    if log_reference.ndim < 1 or reward.shape[-1:] != log_reference.shape[-1:] or not log_reference.shape[-1]:
        shapes = f"{tuple(log_reference.shape)} and {tuple(reward.shape)}"
        raise ShapeError(f"the reference and the reward have an entry for each outcome, got shapes {shapes}")
    log_p, reward = torch.broadcast_tensors(log_reference.detach().double(), reward.detach().double())
    log_p = log_p.log_softmax(-1)
    if log_p.isnan().any():
        raise DataError("the reference has NaN, infinity or a row without any mass: give log-probabilities")
    held = log_p > -math.inf
    if not reward.isfinite().all():
        if not reward[held].isfinite().all():
            raise DataError("rewards must be finite where the reference has mass: score those outcomes again")
        reward = reward.masked_fill(~held, 0.0)
    return log_p, reward


def _solve(divergence: FDivergence, log_p: Tensor, y: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """log policy [n, Y] and m / b [n] for rewards y already divided by b."""
    held = log_p > -math.inf
    surprise = log_p.neg().masked_fill(~held, 0.0)
    count = math.log(log_p.shape[-1])
    low = (y - divergence.link(surprise)).masked_fill(~held, -math.inf).amax(-1)
    high = (y - divergence.link(surprise - count)).masked_fill(~held, -math.inf).amax(-1)
    at = low.clone()
    for _ in range(_STEPS):
        log_ratio, log_total, slope = _mean(divergence, log_p, y, at)
        low, high = torch.where(log_total > 0, at, low), torch.where(log_total < 0, at, high)
        if (log_total.abs() <= tolerance).all() or ((high - low) <= 4e-16 * at.abs()).all():
            break
        step = at - divergence.link(log_total) / slope
        inside = (step > low) & (step < high)
        at = torch.where(log_total.abs() <= tolerance, at, torch.where(inside, step, 0.5 * (low + high)))
    return (log_p + log_ratio).masked_fill(~held, -math.inf).log_softmax(-1), at


def _mean(divergence: FDivergence, log_p: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-ratios [n, Y] at multipliers at [n], the log of the total mass [n], and the slope of F by at [n]."""
    with torch.enable_grad():
        place = at.detach().requires_grad_()
        log_ratio = divergence.link_inverse(y - place.unsqueeze(-1))
        log_total = (log_p + log_ratio).logsumexp(-1)
        (slope,) = torch.autograd.grad(divergence.link(log_total).sum(), place)
    return log_ratio.detach(), log_total.detach(), slope
