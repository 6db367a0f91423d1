"""Matching a demonstrator with a pull to a reference, exactly: min D(demonstrator||policy) + b KL(policy||reference).

With s the link of D at v = log policy - log demonstrator, the optimum has

    s(v) + b (log policy - log reference) = m   for every outcome,   m so that the policy sums to 1,

and the dual, sup_r E_demonstrator phi(r) - b log E_reference e^(r/b) with phi(x) = -f*(-x), is attained at
r = b log(policy / reference) - m = -s(v): the policy is the best one for that reward. Maximum likelihood is the case in
which phi is the identity: its optimum is the demonstrator whatever b, the pull does nothing.
Source: arXiv 2507.00018. Shapes: log-probabilities [..., Y], in nats; m and values [...]. Float64 throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence, kl

__all__ = ["Matching", "matching_dual", "matching_optimum"]

_STEPS = 200
_ROUNDING = 1e-2  # of the logarithm of a sum of probabilities, as of half precision
_ENTRIES = 1 << 15  # of a block of problems, which so stays in the caches


class Matching(NamedTuple):
    """reward [..., Y] of the dual, log_policy [..., Y] of the optimum, and the value [...] that both reach."""

    reward: Tensor
    log_policy: Tensor
    value: Tensor


@torch.no_grad()
def matching_dual(
    log_demonstrator: Tensor, log_reference: Tensor, *, beta: float, divergence: FDivergence | None
) -> Matching:
    """The optimum of D(demonstrator||policy) + beta KL(policy||reference), its reward and its value.

    log_demonstrator and log_reference [..., Y], with mass everywhere; divergence None is maximum likelihood. Raises
    ConfigError for beta <= 0, ShapeError, and DataError where a probability is 0 or NaN or they do not sum to 1.

    >>> from kullback.divergences import f_divergence
    >>> demonstrator, reference = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    >>> found = matching_dual(demonstrator, reference, beta=1.0, divergence=f_divergence("reverse_kl"))
    >>> found.log_policy.exp(), found.value  # the geometric mean of the two
    (tensor([0.3391, 0.3217, 0.3391], dtype=torch.float64), tensor(0.1399, dtype=torch.float64))
    """
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
    log_e, log_p = _checked(log_demonstrator, log_reference)
    if divergence is None:
        return Matching(beta * (log_e - log_p), log_e, beta * kl(log_e, log_p))
    log_policy, multiplier = torch.empty_like(log_e.contiguous()), log_e.new_empty(log_e.shape[:-1])
    rows = [x.reshape(-1, log_e.shape[-1]) for x in (log_policy, log_e, log_p)]
    step = max(_ENTRIES // log_e.shape[-1], 1)
    for found, place, e, p in zip(*(x.split(step) for x in (rows[0], multiplier.view(-1), *rows[1:])), strict=True):
        solved = _within_limits(e, p, beta) if divergence.name == "total_variation" else _solve(divergence, e, p, beta)
        found.copy_(solved[0]), place.copy_(solved[1])
    reward = beta * (log_policy - log_p) - multiplier.unsqueeze(-1)
    return Matching(reward, log_policy, divergence(log_e, log_policy) + beta * kl(log_policy, log_p))


def _checked(log_demonstrator: Tensor, log_reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 and of one shape."""
    shapes = f"{tuple(log_demonstrator.shape)} and {tuple(log_reference.shape)}"
    if log_demonstrator.shape[-1:] != log_reference.shape[-1:] or not log_reference.shape[-1:].numel():
        raise ShapeError(f"demonstrator and reference have the same outcomes, one or more, got shapes {shapes}")
    try:
        log_e, log_p = torch.broadcast_tensors(log_demonstrator.double(), log_reference.double())
    except RuntimeError as error:
        raise ShapeError(f"demonstrators and references do not pair up in shapes {shapes}: give one of each") from error
    for name, given in (("demonstrator", log_demonstrator), ("reference", log_reference)):
        if not given.isfinite().all():
            raise DataError(f"the {name} must have mass everywhere: leave out or smooth what has none")
        if given.numel() and given.double().logsumexp(-1).abs().max() > _ROUNDING:
            raise DataError(f"the {name}'s probabilities do not sum to 1: apply log_softmax to the logits first")
    return log_e, log_p


def matching_optimum(
    log_demonstrator: Tensor, log_reference: Tensor, *, beta: float, divergence: FDivergence | None
) -> Tensor:
    """The policy [..., Y] that minimises D(demonstrator||policy) + beta KL(policy||reference), as log-probabilities."""
    return matching_dual(log_demonstrator, log_reference, beta=beta, divergence=divergence).log_policy


def _within_limits(log_e: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Total variation, |r| <= 1/2: the demonstrator, kept between the reference's tilts by m - 1/2 and m + 1/2."""
    apart = beta * (log_e - log_p)
    low, high = apart.amin(-1, keepdim=True) - 0.5, apart.amax(-1, keepdim=True) + 0.5
    for _ in range(_STEPS):
        at = 0.5 * (low + high)
        log_policy = torch.minimum(torch.maximum(log_e, log_p + (at - 0.5) / beta), log_p + (at + 0.5) / beta)
        over = log_policy.logsumexp(-1, keepdim=True) > 0.0
        low, high = torch.where(over, low, at), torch.where(over, at, high)
        if ((high - low) <= 4e-16 * at.abs().clamp(min=1e-3)).all():
            break
    return log_policy, at.squeeze(-1)


def _solve(divergence: FDivergence, log_e: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log policy [..., Y] and m [...]: Newton's method on the log of the policy's sum, kept inside a bracket."""
    apart = beta * (log_e - log_p)
    low, high = apart.amin(-1, keepdim=True), apart.amax(-1, keepdim=True)
    at = (log_e.exp() * apart).sum(-1, keepdim=True)
    guess = None
    for _ in range(_STEPS):
        ratio, slope = _inverse(divergence, at - apart, beta, guess)
        log_policy = log_e + ratio
        total = log_policy.logsumexp(-1, keepdim=True)
        low, high = torch.where(total < 0.0, at, low), torch.where(total > 0.0, at, high)
        step = at - total / (log_policy.softmax(-1) / slope).sum(-1, keepdim=True)
        step = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        done = (total.abs() <= 1e-14) | ((step - at).abs() <= 4e-16 * at.abs())
        if done.all():
            break
        step = torch.where(done, at, step)
        guess, at = ratio + (step - at) / slope, step
    return log_policy - total, at.squeeze(-1)


def _inverse(divergence: FDivergence, z: Tensor, beta: float, guess: Tensor | None) -> tuple[Tensor, Tensor]:
    """v with s(v) + beta v = z, and the slope of the left side there; elementwise, from a guess if there is one."""

    def from_link(y: Tensor) -> Tensor:
        least, most = divergence.dual().domain
        value = divergence.link_inverse(y.clamp(least, most)).nan_to_num(nan=math.inf)
        return value.masked_fill(y >= most, math.inf).masked_fill(y <= least, -math.inf)

    # Both terms have the sign of z, so one of them is at least half of it and neither is more than all of it.
    whole, half = (z / beta, from_link(z)), (0.5 * z / beta, from_link(0.5 * z))
    negative = z < 0.0
    low = torch.where(negative, torch.maximum(*whole), torch.minimum(*half))
    high = torch.where(negative, torch.maximum(*half), torch.minimum(*whole))
    at = low if guess is None else guess.clamp(low, high)
    for _ in range(_STEPS):
        with torch.enable_grad():
            place = at.detach().requires_grad_()
            value = divergence.link(place)
            (slope,) = torch.autograd.grad(value.sum(), place)
        slope = slope + beta
        error = value.detach() + beta * at - z
        low, high = torch.where(error < 0.0, at, low), torch.where(error > 0.0, at, high)
        step = at - error / slope
        step = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        if ((step - at).abs() <= 2e-15 * at.abs().clamp(min=1e-2)).all():
            break
        at = step
    return at, slope
