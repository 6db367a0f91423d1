"""How much reward a KL buys: the exact frontier, how far a policy is from it, and where best of n lies.

With p the reference, r the reward and beta the factor of the reward (RLHF's coefficient of the KL is 1 / beta):

    optimum      phi_b = p exp(b r) / Z(b),  L(b) = log Z(b),  E_b r = L'(b),  KL(phi_b||p) = b L'(b) - L(b)
    slopes       d KL / d b = b Var_b r,  d E r / d KL = 1 / b;  at KL = -log p(best) it ends, b = inf
    gap          KL(phi||phi_b) = KL(phi||p) - KL(phi_b||p) + b (E_b r - E_phi r)  for any phi

Best of n draws has KL at most log n - (n - 1)/n, and exactly that only for rewards without ties; its law is
`best_of_n_law` in worlds.py, the optimum at one coefficient `regularised_optimum`.

Source: Yang et al. 2024 (arXiv 2404.01730); Beirami et al. 2024 (arXiv 2401.01879) for the estimate of best of n's KL.
Shapes: log-probabilities and rewards [..., N] over outcomes, prompts first; nats; computed in float64.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.worlds import best_of_n_law
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = [
    "Frontier",
    "TiltSolution",
    "alignment_gap",
    "best_of_n_kl",
    "best_of_n_kl_estimate",
    "best_of_n_kl_upper",
    "best_of_n_mean",
    "kl_reward_frontier",
    "largest_kl",
    "log_partition",
    "solve_tilt_for_kl",
    "tilt",
]

_HELD = 600.0  # a surprise whose probability float64 holds
_BLOCK = 1 << 16  # numbers that are solved for together: they stay in the cache from one step to the next


class TiltSolution(NamedTuple):
    """An optimum: beta, KL to the reference and mean reward [...], log-probabilities log_policy [..., N]."""

    beta: Tensor
    log_policy: Tensor
    kl: Tensor
    reward: Tensor


class Frontier(NamedTuple):
    """The best reward at each KL, [..., G] over a grid of beta [G]: slope is d reward / d KL = 1 / beta."""

    beta: Tensor
    kl: Tensor
    reward: Tensor
    slope: Tensor


def _checked(log_reference: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """Both [..., N] in float64; outcomes that the reference never has get the lowest reward, so that none matters."""
    try:
        log_p, r = torch.broadcast_tensors(log_reference.detach().double(), reward.detach().double())
    except RuntimeError:
        shapes = f"{tuple(log_reference.shape)} and {tuple(reward.shape)}"
        raise ShapeError(f"log-probabilities and rewards are both [..., N], got {shapes}") from None
    if log_p.ndim == 0 or log_p.shape[-1] == 0:
        raise ShapeError("log-probabilities and rewards are over at least one outcome, got none")
    total, plain = _sums(log_p.reshape(-1, log_p.shape[-1]), r.reshape(-1, r.shape[-1]))
    total = total.view(log_p.shape[:-1]).log()
    if not bool((total.abs() <= 1e-6).all()):
        worst = total.flatten()[(total.abs().nan_to_num(nan=math.inf)).argmax()]
        raise DataError(f"the reference does not sum to 1 (its log-sum is {worst:.2g}): take log_softmax of its logits")
    if plain:
        return log_p, r
    held = log_p > -math.inf
    if not bool(r.masked_fill(~held, 0.0).isfinite().all()):
        raise DataError("a reward of an outcome that the reference can have is not finite: score it again or mask it")
    lowest = r.masked_fill(~held, math.inf).amin(-1, keepdim=True)
    return log_p, torch.where(held, r, lowest)


def _sums(log_p: Tensor, r: Tensor) -> tuple[Tensor, bool]:
    """The sums of exp(log_p [B, N]), and whether neither it nor r has an infinite entry or one that is not a number."""
    total, size = log_p.new_empty(len(log_p)), max(1, _BLOCK // log_p.shape[1])
    workspace, plain = log_p.new_empty(min(size, len(log_p)), log_p.shape[1]), True
    for begin in range(0, len(log_p), size):  # both are read once, since memory is slower than the arithmetic
        block = slice(begin, begin + size)
        part = log_p[block]
        torch.sum(torch.exp(part, out=workspace[: len(part)]), -1, out=total[block])
        plain = plain and bool(part.amin() > -math.inf) and all(bool(end.isfinite()) for end in r[block].aminmax())
    return total, plain


def _checked_beta(beta: float | Tensor, like: Tensor) -> Tensor:
    value = torch.as_tensor(beta, dtype=torch.float64, device=like.device)
    if bool(value.isnan().any()):
        raise ConfigError("beta is not a number: it multiplies the reward, and may be infinite")
    return value


def log_partition(log_reference: Tensor, reward: Tensor, beta: float | Tensor) -> Tensor:
    """log E_p exp(beta r), [..., N] to [...]; beta finite, one or broadcast to [...].

    >>> log_partition(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]), 1.0)
    tensor(0.6201, dtype=torch.float64)
    """
    log_p, r = _checked(log_reference, reward)
    factor = _checked_beta(beta, log_p)
    if bool(factor.isinf().any()):
        raise ConfigError("log E exp(beta r) has no value at an infinite beta: take largest_kl for that end")
    return (log_p + factor.unsqueeze(-1) * r).logsumexp(-1)


def tilt(log_reference: Tensor, reward: Tensor, beta: float | Tensor) -> Tensor:
    """The optimum p exp(beta r) / Z: log-probabilities [..., N]; beta one or [...], of any sign, infinite as well.

    At beta = inf it is p among the outcomes of the largest reward. Raises ShapeError, DataError for a reference that
    does not sum to 1 within 1e-6 or a reward that is not finite.

    >>> tilt(torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([1.0, 1.0, 0.0]), math.inf).exp()
    tensor([0.6250, 0.3750, 0.0000], dtype=torch.float64)
    """
    log_p, r = _checked(log_reference, reward)
    return _tilted(log_p, r, _checked_beta(beta, log_p).expand(log_p.shape[:-1]))


def _tilted(log_p: Tensor, r: Tensor, beta: Tensor) -> Tensor:
    factor = beta.unsqueeze(-1)
    ends = factor.isinf()
    if not bool(ends.any()):
        return (log_p + factor * r).log_softmax(-1)
    sign = torch.where(factor > 0, 1.0, -1.0)
    best = sign * r == (sign * r).masked_fill(log_p == -math.inf, -math.inf).amax(-1, keepdim=True)
    finite = torch.where(ends, 0.0, factor)
    return torch.where(ends & ~best, -math.inf, log_p + finite * r).log_softmax(-1)


def largest_kl(log_reference: Tensor, reward: Tensor) -> Tensor:
    """-log of the reference's mass on the largest reward, [..., N] to [...]: no more KL buys anything.

    >>> largest_kl(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), torch.tensor([0.0, 1.0, 2.0, 4.0]))
    tensor(2.3026, dtype=torch.float64)
    """
    return _largest(*_checked(log_reference, reward))


def _largest(log_p: Tensor, r: Tensor) -> Tensor:
    highest, place = r.max(-1, keepdim=True)
    return _limit(log_p, r, highest, place, torch.empty_like(r))


def _limit(log_p: Tensor, r: Tensor, highest: Tensor, place: Tensor, workspace: Tensor) -> Tensor:
    """-log of the mass on r = highest [..., 1], which is at `place` and perhaps elsewhere."""
    others = torch.scatter(r, -1, place, -math.inf, out=workspace).amax(-1, keepdim=True)
    if bool((others < highest).all()):  # no ties: no exponentials, which are slow at -inf
        return -log_p.gather(-1, place).squeeze(-1).clamp(max=0.0)
    best = log_p.masked_fill(r < highest, -math.inf)
    top = best.amax(-1, keepdim=True)
    return -((best - top).exp_().sum(-1).log_() + top.squeeze(-1)).clamp(max=0.0)


def _moments(
    log_p: Tensor, r: Tensor, beta: Tensor, workspace: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """KL, mean and variance of r under the tilt, [B, N] to [B], with r <= 0 whose maximum is 0.

    workspace [B, N]: what the weights are written to, since memory that is new at every step takes longer than the
    arithmetic. The weights are then taken as they are: none exceeds 1 and the best has that of the reference, which
    must be a number that float64 holds.
    """
    weights = torch.addcmul(log_p, beta.unsqueeze(1), r, out=workspace)
    top = None if workspace is not None else weights.amax(1, keepdim=True)
    weights = (weights if top is None else weights.sub_(top)).exp_()
    total = weights.sum(1)
    mean = weights.mul_(r).sum(1).div_(total)
    # r is at most 0 and 0 at its best, so that squares about 0 lose nothing where the tilt has gone to its end
    second = weights.mul_(r).sum(1).div_(total)
    log_z = total.log() if top is None else total.log() + top.squeeze(1)
    return (beta * mean - log_z).clamp_(min=0.0), mean, (second - mean.square()).clamp_(min=0.0)


def _root(
    log_p: Tensor, r: Tensor, delta: Tensor, limit: Tensor, tolerance: float, workspace: Tensor
) -> Tensor:
    """beta [B] with KL = delta in (0, limit): Newton's method on a scale that bends little, within a bracket.

    sqrt(-log(1 - KL / limit)) is linear in beta near 0 and grows like its square root at the end.
    """
    held = workspace[: len(r)] if bool((limit < _HELD).all()) else None
    share, most = -1.0 / limit, limit * (1.0 - 1e-15)
    wanted = torch.log1p(delta * share).neg_().sqrt_()
    near = tolerance * delta.clamp(max=1.0) + 4e-16
    low, high = torch.zeros_like(delta), torch.full_like(delta, math.inf)
    beta = (2.0 * delta / _moments(log_p, r, low, held)[2]).sqrt()
    for count in range(200):
        found, _, variance = _moments(log_p, r, beta, held)
        excess = found - delta
        done = excess.abs() <= near
        if count > 6:  # before, no bracket is that narrow
            done |= low >= (1.0 - 4e-16) * high
        if bool(done.all()):
            break
        short = excess < 0
        low, high = torch.where(short, beta, low), torch.where(short, high, beta)
        inside = found.minimum(most)
        scale = torch.log1p(inside * share).neg_().sqrt_()
        slope = beta * variance / ((limit - inside) * scale * 2.0)
        proposed = beta - (scale - wanted) / slope
        within = (proposed > low) & (proposed < high)
        if not bool(within.all()):
            between = torch.where(high.isinf(), 2.0 * beta, 0.5 * (low + high))
            proposed = torch.where(within, proposed, between)
        beta = torch.where(done, beta, proposed)
    return beta


def solve_tilt_for_kl(
    log_reference: Tensor,
    reward: Tensor,
    delta: float | Tensor,
    *,
    constraint: Literal["per_prompt", "average"] = "per_prompt",
    tolerance: float = 1e-12,
) -> TiltSolution:
    """The largest mean reward within a KL of delta to the reference: the tilt of that KL, batched over prompts.

    "per_prompt": every prompt has its own beta for its delta ([...] or one). "average": one beta for all, such that
    the KL averages to one delta. From the largest KL on, beta is inf. Raises ConfigError for delta < 0, and what
    `tilt` raises.

    >>> p, r = torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), torch.tensor([0.0, 1.0, 2.0, 4.0])
    >>> solution = solve_tilt_for_kl(p, r, 0.5)
    >>> solution.beta, solution.reward
    (tensor(0.6390, dtype=torch.float64), tensor(2.3940, dtype=torch.float64))
    """
    log_p, r = _checked(log_reference, reward)
    shape = log_p.shape[:-1]
    budget = torch.as_tensor(delta, dtype=torch.float64, device=log_p.device)
    if not bool((budget >= 0.0).all()):
        raise ConfigError(f"a KL budget delta is 0 or more, got {budget.min().item():g}")
    if constraint not in ("per_prompt", "average"):
        raise ConfigError(f"constraint is per_prompt or average, not {constraint!r}")
    flat, rewards = log_p.reshape(-1, log_p.shape[-1]), r.reshape(-1, r.shape[-1])
    if constraint == "average":
        if budget.ndim:
            raise ConfigError("constraint='average' takes one delta for all prompts")
        below = rewards - rewards.amax(-1, keepdim=True)
        budgets = _shared_root(flat, below, budget, _largest(flat, below), tolerance).expand(len(flat))
    else:
        budgets = budget.expand(shape).reshape(-1)
    log_policy = torch.empty_like(flat, memory_format=torch.contiguous_format)
    beta, spent, earned = log_policy.new_empty(3, len(flat))
    rows = max(1, min(_BLOCK // flat.shape[1], len(flat)))
    shifted, workspace = log_policy.new_empty(2, rows, flat.shape[1])
    for begin in range(0, len(flat), rows):  # a block stays in the caches from its root to its reward
        block = slice(begin, begin + rows)
        p, own, used = flat[block], rewards[block], workspace[: len(flat[block])]
        top, place = own.max(-1, keepdim=True)
        below = torch.sub(own, top, out=shifted[: len(p)])
        limit = _limit(p, below, torch.zeros_like(top), place, used)
        if constraint == "average":
            beta[block] = budgets[block]
        else:
            beta[block] = _roots(p, below, budgets[block], limit, tolerance, used)
        plain = bool(((limit < _HELD) & beta[block].isfinite()).all())
        write = _write_tilt if plain else _write_any_tilt
        spent[block], earned[block] = write(log_policy[block], p, below, own, beta[block], used)
    return TiltSolution(beta.view(shape), log_policy.view(log_p.shape), spent.view(shape), earned.view(shape))


def _write_tilt(
    log_policy: Tensor, log_p: Tensor, below: Tensor, reward: Tensor, beta: Tensor, workspace: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the tilt [B, N] to log_policy; its KL and mean reward [B]. below: the rewards less their maximum, which
    are written over. For weights that need no shift, see `_moments`.
    """
    torch.addcmul(log_p, beta.unsqueeze(1), below, out=log_policy)
    weights = torch.exp(log_policy, out=workspace)
    total = weights.sum(1, keepdim=True)
    log_policy.sub_(total.log())
    spent = torch.sub(log_policy, log_p, out=below).mul_(weights).sum(1)
    earned = weights.mul_(reward).sum(1).div_(total.squeeze(1))
    if bool(spent.isnan().any()):
        return kl(log_policy, log_p).clamp_(min=0.0), earned
    return spent.div_(total.squeeze(1)).clamp_(min=0.0), earned


def _write_any_tilt(
    log_policy: Tensor, log_p: Tensor, below: Tensor, reward: Tensor, beta: Tensor, workspace: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for infinite betas and references that are nearly 0 at the best outcome."""
    log_policy.copy_(_tilted(log_p, below, beta))
    earned = torch.exp(log_policy, out=workspace).mul_(reward).sum(1)
    return kl(log_policy, log_p).clamp_(min=0.0), earned


def _roots(
    log_p: Tensor, r: Tensor, delta: Tensor, limit: Tensor, tolerance: float, workspace: Tensor
) -> Tensor:
    beta = torch.zeros_like(delta).masked_fill(delta >= limit, math.inf)
    open_ = (delta > 0) & (delta < limit)
    if bool(open_.all()):
        return _root(log_p, r, delta, limit, tolerance, workspace)
    if bool(open_.any()):
        beta[open_] = _root(log_p[open_], r[open_], delta[open_], limit[open_], tolerance, workspace)
    return beta


def _shared_root(log_p: Tensor, r: Tensor, delta: Tensor, limit: Tensor, tolerance: float) -> Tensor:
    """One beta for all prompts, by Newton's method on the square root of the mean KL, within a bracket."""
    if delta >= limit.mean():
        return torch.full_like(delta, math.inf)
    if delta == 0:
        return torch.zeros_like(delta)

    def average(at: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, _BLOCK // log_p.shape[1])
        parts = [_moments(a, b, at.expand(len(a))) for a, b in zip(log_p.split(rows), r.split(rows), strict=True)]
        return torch.cat([part[0] for part in parts]).mean(), torch.cat([part[2] for part in parts]).mean()

    low, high = torch.zeros_like(delta), torch.full_like(delta, math.inf)
    beta = (2.0 * delta / average(low)[1]).sqrt()
    for _ in range(200):
        found, variance = average(beta)
        if (found - delta).abs() <= tolerance * min(1.0, float(delta)) + 4e-16 or low >= (1.0 - 4e-16) * high:
            break
        low, high = (beta, high) if found < delta else (low, beta)
        root = found.sqrt()
        proposed = beta - (root - delta.sqrt()) * 2.0 * root / (beta * variance)
        between = 2.0 * beta if high.isinf() else 0.5 * (low + high)
        beta = proposed if bool(low < proposed) and bool(proposed < high) else between
    return beta


def kl_reward_frontier(log_reference: Tensor, reward: Tensor, betas: Tensor) -> Frontier:
    """KL and mean reward of the optimum [..., G] at each beta [G], one prompt after the other.

    >>> p, r = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0])
    >>> kl_reward_frontier(p, r, torch.tensor([0.0, 1.0])).reward
    tensor([0.5000, 0.7311], dtype=torch.float64)
    """
    log_p, r = _checked(log_reference, reward)
    grid = _checked_beta(betas, log_p)
    if grid.ndim != 1:
        raise ShapeError(f"betas are a grid [G], got {tuple(grid.shape)}")
    shape = log_p.shape[:-1]
    flat, rewards = log_p.reshape(-1, log_p.shape[-1]), r.reshape(-1, r.shape[-1])
    kls, means = torch.empty(2, len(flat), len(grid), dtype=torch.float64, device=flat.device)
    for place, beta in enumerate(grid):
        log_policy = _tilted(flat, rewards, beta.expand(len(flat)))
        kls[:, place], means[:, place] = kl(log_policy, flat), (log_policy.exp() * rewards).sum(-1)
    return Frontier(grid, kls.view(*shape, -1), means.view(*shape, -1), 1.0 / grid)


def alignment_gap(
    log_reference: Tensor,
    reward: Tensor,
    policy_kl: float | Tensor,
    policy_reward: float | Tensor,
    *,
    beta: float | Tensor | None = None,
    delta: float | Tensor | None = None,
) -> Tensor:
    """KL(policy||optimum) of any policy from its KL to the reference and its mean reward alone, [...].

    The optimum is that of `beta`, or of the KL `delta`; by default of the policy's own KL, and then it is beta times
    the reward that is left on the table. Raises ConfigError for both, or where that beta is infinite.

    >>> p, r = torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), torch.tensor([0.0, 1.0, 2.0, 4.0])
    >>> alignment_gap(p, r, 0.5764189575, 2.30889375)  # best of 4
    tensor(0.1373, dtype=torch.float64)
    """
    if beta is not None and delta is not None:
        raise ConfigError("the optimum to compare with has one beta or one delta, and both were given")
    spent = torch.as_tensor(policy_kl, dtype=torch.float64, device=log_reference.device)
    earned = torch.as_tensor(policy_reward, dtype=torch.float64, device=log_reference.device)
    if beta is None:
        beta = solve_tilt_for_kl(log_reference, reward, spent if delta is None else delta).beta
    factor = _checked_beta(beta, log_reference)
    if bool(factor.isinf().any()):
        raise ConfigError("beyond the largest KL the optimum has an infinite beta, and no gap to it is finite")
    # KL(phi_b||p) - b E_b r = -log Z(b)
    return spent + log_partition(log_reference, reward, factor) - factor * earned


def best_of_n_kl(log_reference: Tensor, reward: Tensor, n: float, *, tie_tolerance: float = 0.0) -> Tensor:
    """KL of the best of n draws to the reference, exactly, ties included: [..., N] to [...].

    >>> best_of_n_kl(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), torch.tensor([0.0, 1.0, 2.0, 4.0]), 4)
    tensor(0.5764, dtype=torch.float64)
    """
    log_p, r = _checked(log_reference, reward)
    return kl(best_of_n_law(log_p, r, n, tie_tolerance=tie_tolerance), log_p).clamp(min=0.0)


def best_of_n_kl_upper(n: float | Tensor) -> Tensor:
    """log n - (n - 1)/n, the most that the KL of best of n can be; ConfigError for n below 1.

    >>> best_of_n_kl_upper(4)
    tensor(0.6363, dtype=torch.float64)
    """
    value = torch.as_tensor(n, dtype=torch.float64)
    if not bool((value >= 1.0).all()):
        raise ConfigError(f"best of n takes n of 1 or more, got {value.min().item():g}")
    return value.log() - (value - 1.0) / value


def best_of_n_kl_estimate(probabilities: Tensor, n: float | Tensor) -> Tensor:
    """An estimate of best of n's KL from the reference's probability e in (0, 1] of each selected output, [...].

    (1-e)^n [log n + (n-1) log(1-e) - (n-1)/n] + (1 - (1-e)^n) log((1 - (1-e)^n)/e): average it over prompts. It goes
    to `best_of_n_kl_upper` as e goes to 0. Raises ConfigError for n below 1, DataError for another probability.

    >>> best_of_n_kl_estimate(torch.tensor([0.1, 1e-12]), 4)
    tensor([0.6349, 0.6363], dtype=torch.float64)
    """
    epsilon, upper = probabilities.detach().double(), best_of_n_kl_upper(n)
    if not bool(((epsilon > 0.0) & (epsilon <= 1.0)).all()):
        raise DataError("the probabilities of selected outputs lie in (0, 1]: give exp of their log-probabilities")
    count = torch.as_tensor(n, dtype=torch.float64)
    log_miss = torch.log1p(-epsilon.clamp(max=1.0 - 1e-16))
    hit = -torch.expm1(count * log_miss)
    return (1.0 - hit) * (upper + (count - 1.0) * log_miss) + hit * (hit.log() - epsilon.log())


def best_of_n_mean(rewards: Tensor, n: int) -> Tensor:
    """The unbiased estimate of best of n's mean reward from M >= n scored samples, [..., M] to [...], with no redraw.

    sum_i r_(i) C(i-1, n-1) / C(M, n), with r_(i) rising. Raises ConfigError for n outside 1..M, DataError for NaN.

    >>> best_of_n_mean(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor(2.6667, dtype=torch.float64)
    """
    value = rewards.detach().double()
    size = value.shape[-1] if value.ndim else 0
    if int(n) != n or not 1 <= n <= size:
        raise ConfigError(f"best of n of {size} scored samples takes a whole n from 1 to {size}, not {n}")
    if bool(value.isnan().any()):
        raise DataError(f"{int(value.isnan().sum())} rewards are NaN: score them again or leave them out")
    place = torch.arange(int(n), size + 1, dtype=torch.float64, device=value.device)
    log_shares = torch.lgamma(place) - torch.lgamma(place - n + 1.0)
    shares = log_shares.softmax(0)
    return value.sort(-1).values[..., int(n) - 1 :] @ shares
