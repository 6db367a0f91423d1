"""The policy that maximises E r - b D(reference||policy) for any f-divergence: exact, for tables of outcomes.

With s the link of the divergence (f' of arXiv 2309.16240 at the log-ratio) the optimum is

    log policy = log reference + s^-1((r - m) / b),    m so that the policy sums to 1.

m is the root of F(m) = s(log sum reference exp s^-1((r - m) / b)), a quasi-linear mean of (r - m) / b, which is a
straight line for equal rewards and for reverse KL; so the secant method, kept inside a bracket, needs few steps. m lies
between max_i r_i - b s(-log p_i), where one term alone is 1, and max_i r_i, where no ratio exceeds 1.

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
    tolerance: float = 1e-12,
) -> RegularisedPolicy:
    """The policy that maximises E r - beta D(reference||policy), and its multiplier m; [..., Y] to [..., Y] and [...].

    r - beta s(log policy - log reference) = m wherever the policy has mass. Outcomes without mass under the reference
    have none. Where s is finite at ratio 0 (chi-squared) outcomes of low reward have none either.
    tolerance: of the logarithm of the sum, which then is made 1. Raises ConfigError for beta <= 0 and for
    total variation, ShapeError, and DataError for NaN or a reference without mass.

    >>> from kullback.divergences import f_divergence
    >>> reference, reward = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([1.0, 0.0, -1.0])
    >>> f_regularised_policy(reference, reward, divergence=f_divergence("kl"), beta=0.5).log_policy.exp()
    tensor([0.8408, 0.1156, 0.0435], dtype=torch.float64)
    """
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
    divergence.link_inverse(torch.zeros(()))  # refuses what has no inverse
    if log_reference.ndim < 1 or reward.shape[-1:] != log_reference.shape[-1:] or not log_reference.shape[-1]:
        shapes = f"{tuple(log_reference.shape)} and {tuple(reward.shape)}"
        raise ShapeError(f"the reference and the reward have an entry for each outcome, got shapes {shapes}")
    log_reference, reward = torch.broadcast_tensors(log_reference, reward)
    shape = reward.shape
    log_reference, reward = log_reference.reshape(-1, shape[-1]), reward.reshape(-1, shape[-1])
    log_policy = torch.empty(log_reference.shape, dtype=torch.float64, device=reward.device)
    multiplier = log_policy.new_empty(len(log_policy))
    for part in torch.arange(len(log_policy)).split(max(_ENTRIES // shape[-1], 1)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        log_p, y = log_reference[rows].double(), reward[rows].double() / beta
        log_policy[rows], multiplier[rows] = _solve(divergence, log_p, y, tolerance)
    if not multiplier.isfinite().all():
        wrong = int((~multiplier.isfinite()).sum())
        raise DataError(f"{wrong} rows have a reward or reference that is NaN or infinite, or no mass: look at them")
    return RegularisedPolicy(log_policy.reshape(shape), beta * multiplier.reshape(shape[:-1]))


def _solve(divergence: FDivergence, log_p: Tensor, y: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """log policy [n, Y] and m / b [n] for rewards y already divided by b."""
    nothing = log_p == -math.inf if bool((log_p.amin() == -math.inf).item()) else None
    if nothing is not None:
        least = y.masked_fill(nothing, math.inf).amin(-1, keepdim=True)
        log_p, y = log_p.masked_fill(nothing, -1e300), torch.where(nothing, least, y)
    low, best = (y - divergence.link(-log_p)).max(-1, keepdim=True)
    # Counted from the reward whose term bounds m, so that a small distance to the end of the domain keeps its digits.
    origin, surprise = y.gather(-1, best), -log_p.gather(-1, best)
    y, at = y - origin, low - origin
    found, place = torch.empty_like(log_p), torch.empty_like(at)
    rows, high = torch.arange(len(at), device=at.device), y.amax(-1, keepdim=True)
    low, before, value_before, slope = at, at, at, at
    for count in range(_STEPS):
        log_policy = _log_ratio(divergence, y - at).add_(log_p)
        log_total = log_policy.exp().sum(-1, keepdim=True).log()
        value, moved = divergence.link(log_total), at - before
        if count:  # a difference of a few roundings says nothing of the slope
            slope = torch.where(moved.abs() > 1e-9 * at.abs(), (value - value_before) / moved, slope)
        else:  # that of the bounding term alone
            slope = -_slope(divergence, log_total) / (log_total.exp() * _slope(divergence, surprise))
        low, high = torch.where(value > 0.0, at, low), torch.where(value < 0.0, at, high)
        step = at - value / slope
        step = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        done = (log_total.abs() <= tolerance) | ((step - at).abs() <= 4e-16 * at.abs()) | value.isnan()
        if done.all() or count == _STEPS - 1:
            found[rows], place[rows] = _completed(log_policy, log_total), at.where(log_total.isfinite(), math.nan)
            break
        before, value_before, at = at, value, torch.where(done, at, step)
        if 4 * int(done.sum()) >= len(done):  # go on with the other rows
            over, on = done.squeeze(-1), (~done).squeeze(-1).nonzero().squeeze(-1)
            found[rows[over]], place[rows[over]] = _completed(log_policy[over], log_total[over]), at[over]
            rows, y, log_p, low, high = rows[on], y[on], log_p[on], low[on], high[on]
            before, value_before, slope, at = before[on], value_before[on], slope[on], at[on]
    if nothing is not None:
        found.masked_fill_(nothing, -math.inf)
    return found, (place + origin).squeeze(-1)


def _log_ratio(divergence: FDivergence, y: Tensor) -> Tensor:
    """s^-1(y), -inf below the values of s where it is bounded there."""
    least = divergence.dual().domain[0]
    if least == -math.inf:
        return divergence.link_inverse(y)
    return divergence.link_inverse(y.clamp(min=least)).masked_fill_(y <= least, -math.inf)


def _completed(log_policy: Tensor, log_total: Tensor) -> Tensor:
    """The policy with what is missing to 1 given to its largest entry.

    Where a reference is small that entry lies so near the end of the domain that its mass, unlike its reward, is lost
    in the rounding of m; to divide all by the sum would carry that error to the others.
    """
    largest, where = log_policy.max(-1, keepdim=True)
    return log_policy.scatter(-1, where, (largest.exp() - torch.expm1(log_total)).log())


def _slope(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    """s'(log u)."""
    with torch.enable_grad():
        at = log_ratio.detach().requires_grad_()
        return torch.autograd.grad(divergence.link(at).sum(), at)[0]
