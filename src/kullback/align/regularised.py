"""The policy that maximises E r - b D(reference||policy) for any f-divergence: exact, for tables of outcomes.

With s the link of the divergence (f' of arXiv 2309.16240 at the log-ratio) the optimum is

    log policy = log reference + s^-1((r - m) / b),    m so that the policy sums to 1.

m lies between max_i r_i - b s(-log p_i), where one term alone is 1, and max_i r_i, where no ratio exceeds 1. For
reverse KL it is a log-sum-exp. For the other divergences of the paper it is found as w = x_i - a_i from one of the sums

    alpha (forward KL: 1)    sum p_i x_i^(-1/alpha) = 1,        a_i = alpha (max r - r_i) / b
    Jensen-Shannon, share h  sum (1 - h) p_i e_i / x_i = 1,     a_i = h (1 - e_i),  e_i = exp((r_i - max r) / b g),

where g is the link's slope at 0 mass and h = 1/2 in the paper. Their power means (sum c_i x_i^-k)^(-1/k) are concave in
w: Newton's method climbs to 1 from the left end of the bounds without ever passing it, and every a_i >= 0, so that
nothing cancels however small the mass that bounds w. For all others m is the root of
F(m) = s(log sum reference exp s^-1((r - m) / b)), a quasi-linear mean of (r - m) / b and a straight line for equal
rewards; so the secant method, kept inside a bracket, needs few steps.

Shapes: log-probabilities and rewards [..., Y], in nats; multipliers [...]. Float64 throughout.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence

__all__ = ["RegularisedPolicy", "f_regularised_policy"]

_ENTRIES = 1 << 15  # of a block of problems, which so stays in the caches
_STEPS = 100
_LEAST = -300.0  # a log-probability whose reciprocal a float64 still holds


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
    for part in torch.arange(len(log_policy)).split(max(_ENTRIES // shape[-1], 1)) if len(log_policy) else ():
        rows = slice(int(part[0]), int(part[-1]) + 1)
        log_p, y = log_reference[rows].double(), reward[rows].double() / beta
        log_policy[rows], multiplier[rows] = _optimum(divergence, log_p, y, tolerance)
    if not multiplier.isfinite().all():
        wrong = int((~multiplier.isfinite()).sum())
        raise DataError(f"{wrong} rows have a reward or reference that is NaN or infinite, or no mass: look at them")
    return RegularisedPolicy(log_policy.reshape(shape), beta * multiplier.reshape(shape[:-1]))


class _Form(NamedTuple):
    """A link that is one of two: scale (1 - e^(-d / order)) order, or with share > 0 scale (d - log(h e^d + 1 - h))."""

    scale: float
    order: float
    share: float


@lru_cache(maxsize=128)
def _form(divergence: FDivergence) -> _Form | None:
    """The form of a divergence's link, recognised by its values; None for another one. Reverse KL has order inf."""
    at = torch.tensor([1.0, 2.0, -40.0, -600.0, *(0.5 * i for i in range(-12, 13))], dtype=torch.float64)
    one, two, far, farther = divergence.link(at[:4]).tolist()
    candidates = []
    curvature = divergence.second_at_one
    if curvature is not None and two > one > 0.0:
        alpha = -math.log(two / one - 1.0)
        if abs(alpha) < 1e-14:
            candidates.append(_Form(curvature, math.inf, 0.0))
        elif alpha > 0.02:  # below, m = (w - 1) / alpha would lose digits
            order = 1.0 / alpha
            candidates.append(_Form(curvature, round(order) if abs(order - round(order)) < 1e-12 else order, 0.0))
    scale, end = (far - farther) / 560.0, divergence.dual().domain[1]
    if math.isfinite(end) and math.isfinite(scale) and scale > 0.0:
        candidates.append(_Form(scale, 1.0, math.exp(-end / scale)))
    probes = at[4:]
    for form in candidates:
        if form.share:
            values = form.scale * (probes - torch.log1p(form.share * torch.expm1(probes)))
        elif form.order == math.inf:
            values = form.scale * probes
        else:
            values = -form.scale * form.order * torch.expm1(-probes / form.order)
        if torch.allclose(values, divergence.link(probes), rtol=1e-12, atol=1e-13):
            return form
    return None


def _optimum(divergence: FDivergence, log_p: Tensor, y: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """log policy [n, Y] and m / b [n] for rewards y already divided by b."""
    form = _form(divergence)
    nothing = log_p == -math.inf if bool((log_p.amin() == -math.inf).item()) else None
    if nothing is not None:
        lowest = y.masked_fill(nothing, math.inf).amin(-1, keepdim=True)
        y = torch.where(nothing, lowest, y)
    if form is None:
        log_p = log_p if nothing is None else log_p.masked_fill(nothing, -1e300)
        log_policy, multiplier = _solve(divergence, log_p, y, tolerance)
        return log_policy if nothing is None else log_policy.masked_fill_(nothing, -math.inf), multiplier
    if form.order == math.inf:
        tilted = y.div(form.scale).add_(log_p)
        log_total = tilted.logsumexp(-1, keepdim=True)
        return tilted.sub_(log_total), form.scale * log_total.squeeze(-1)
    return _by_powers(form, log_p, y, tolerance)


def _by_powers(form: _Form, log_p: Tensor, y: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The same from sum c (w + a)^-k = 1, with a >= 0 counted from the largest reward: nothing cancels in w + a."""
    k, h = form.order, form.share
    largest = y.amax(-1, keepdim=True)
    if h:
        lifted = y.sub(largest).div_(form.scale)
        log_c, a = log_p.add(lifted).add_(math.log1p(-h)), lifted.expm1_().mul_(-h)
    else:
        log_c, a = log_p, largest.sub(y).div_(form.scale * k)
    # A mass below the floor counts for something only where it bounds w, and there its size does not matter.
    floor = _LEAST * min(1.0, k)
    beneath = log_c < floor if bool((log_c.amin() < floor).item()) else None
    c = log_c.exp() if beneath is None else log_c.clamp(min=floor).exp()
    root = c if k == 1.0 else c.pow(1.0 / k)
    w, log_total = _climb(c, a, root.sub(a).amax(-1, keepdim=True), k, tolerance)
    log_x = a.add_(w).log_()
    if beneath is not None:
        log_c = torch.where(beneath & (log_x < 0.5 * floor / k), floor, log_c)
    log_policy = torch.sub(log_c, log_x, alpha=k)
    if h:
        multiplier = largest + form.scale * (w + h).log()
    else:
        multiplier = largest + form.scale * k * (w - 1.0)
    return _completed(log_policy, log_total), multiplier.where(log_total.isfinite(), math.nan).squeeze(-1)


def _climb(c: Tensor, a: Tensor, low: Tensor, k: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """w and log sum c (w + a)^-k, both [n, 1], by Newton's method on the power mean from w = low."""
    found, total_found, rows, w = low.clone(), torch.full_like(low, math.nan), torch.arange(len(low)), low
    x, terms = torch.empty_like(c), torch.empty_like(c)
    for count in range(_STEPS):
        torch.add(a, w, out=x)
        if k == 1.0:
            torch.mul(c, x.reciprocal_(), out=terms)
            total, slope = terms.sum(-1, keepdim=True), terms.mul_(x).sum(-1, keepdim=True)
        else:
            _negative_power(x, k, terms).mul_(c)
            total, slope = terms.sum(-1, keepdim=True), terms.div_(x).sum(-1, keepdim=True)
        log_total = total.log()
        gap = -log_total / k
        step = torch.maximum(w - torch.expm1(gap) * (-gap).exp() * total / slope, low)
        done = (log_total.abs() <= tolerance) | ((step - w).abs() <= 4e-16 * w) | log_total.isnan()
        if done.all() or count == _STEPS - 1:
            found[rows], total_found[rows] = w, log_total
            break
        w = torch.where(done, w, step)
        if 2 * int(done.sum()) >= len(done):  # go on with the other rows
            found[rows], total_found[rows] = w, log_total
            on = (~done).squeeze(-1).nonzero().squeeze(-1)
            rows, c, a, w, low = rows[on], c[on], a[on], w[on], low[on]
            x, terms = x[: len(on)], terms[: len(on)]
    return found, total_found


def _negative_power(x: Tensor, k: float, out: Tensor) -> Tensor:
    """x^-k in out; through log and exp, of which vectorised forms are at hand, unless k is a small whole number."""
    if k == 2.0:
        return torch.reciprocal(x, out=out).square_()
    return torch.log(x, out=out).mul_(-k).exp_()


def _solve(divergence: FDivergence, log_p: Tensor, y: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """log policy [n, Y] and m / b [n] for rewards y already divided by b."""
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
        value, moved = divergence.link(log_total.clamp(max=700.0)), at - before
        if count:  # a difference of a few roundings says nothing of the slope
            slope = torch.where(moved.abs() > 1e-13 * at.abs(), (value - value_before) / moved, slope)
        else:  # that of the bounding term alone
            slope = -_slope(divergence, log_total) / (log_total.exp() * _slope(divergence, surprise))
        low, high = torch.where(value > 0.0, at, low), torch.where(value < 0.0, at, high)
        step = at - value / slope
        halved = (step < low) | (step > high) | step.isnan()
        if count % 6 == 5:  # against a slope from the steep end of the domain, under which m would creep
            halved |= log_total.abs() > 0.01
        step = torch.where(halved, 0.5 * (low + high), step)
        done = (log_total.abs() <= tolerance) | ((step - at).abs() <= 4e-16 * at.abs()) | value.isnan()
        if done.all() or count == _STEPS - 1:
            found[rows], place[rows] = _remaining(log_policy, log_total, best), at.where(~log_total.isnan(), math.nan)
            place.masked_fill_(found.isnan().any(-1, keepdim=True), math.nan)
            break
        before, value_before, at = at, value, torch.where(done, at, step)
        if 4 * int(done.sum()) >= len(done):  # go on with the other rows
            over, on = done.squeeze(-1), (~done).squeeze(-1).nonzero().squeeze(-1)
            found[rows[over]] = _remaining(log_policy[over], log_total[over], best[over])
            place[rows[over]] = at[over]
            rows, y, log_p, low, high, best = rows[on], y[on], log_p[on], low[on], high[on], best[on]
            before, value_before, slope, at = before[on], value_before[on], slope[on], at[on]
    return found, (place + origin).squeeze(-1)


def _log_ratio(divergence: FDivergence, y: Tensor) -> Tensor:
    """s^-1(y), -inf below and inf above the values of s where it is bounded there."""
    least, most = divergence.dual().domain
    if math.isinf(least) and math.isinf(most):
        return divergence.link_inverse(y)
    found = divergence.link_inverse(y.clamp(least, most))
    found.masked_fill_(found.isnan() & (y > 0.0), math.inf)  # the end of the domain, missed by a rounding
    return found.masked_fill_(y <= least, -math.inf).masked_fill_(y >= most, math.inf)


def _completed(log_policy: Tensor, log_total: Tensor) -> Tensor:
    """The policy with what is missing to 1 given to its largest entry.

    Where a reference is small that entry lies so near the end of the domain that its mass, unlike its reward, is lost
    in the rounding of m; to divide all by the sum would carry that error to the others.
    """
    largest, where = log_policy.max(-1, keepdim=True)
    return log_policy.scatter_(-1, where, (largest.exp() - torch.expm1(log_total)).log())


def _remaining(log_policy: Tensor, log_total: Tensor, best: Tensor) -> Tensor:
    """The policy made to sum to 1, also where no m does because the bounding entry's mass is 0 to rounding.

    Then m is the bound itself, on which the other entries depend smoothly, and that entry has what they leave.
    """
    policy = _completed(log_policy.clone(), log_total)
    others = log_policy.scatter(-1, best, -math.inf).exp().sum(-1, keepdim=True)
    lost = (log_total.abs() > 1e-9) & (others < 1.0)
    return torch.where(lost, log_policy.scatter(-1, best, torch.log1p(-others)), policy)


def _slope(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    """s'(log u)."""
    with torch.enable_grad():
        at = log_ratio.detach().requires_grad_()
        return torch.autograd.grad(divergence.link(at).sum(), at)[0]
