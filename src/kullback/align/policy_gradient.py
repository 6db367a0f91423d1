"""Policy gradients on sampled completions: advantages of groups, the clipped loss, the penalty to a reference.

With G completions of each of P prompts, B = P G in the order of the prompts, and T tokens at most:

    advantage    A_i = (r_i - mean_group r) / (std_group r + eps), one number a completion
    ratio        rho_it = exp(log pi(y_it) - log pi_old(y_it)), or for the level "sequence" exp(mean_t of the same)
    loss         -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), and for A < 0 at most -dual_clip A

The loss is reduced in one place, `reduce_tokens`, under a mask of the completion's tokens; what stands outside it may
be infinite or NaN. Shapes: rewards [P, G]; log_prob, old_log_prob, reference_log_prob and mask [B, T], nats.
Sources: PPO arXiv 1707.06347; dual clip 1912.09729; GRPO 2402.03300; clip_high and token means (DAPO) 2503.14476;
constant length (Dr. GRPO) 2503.20783; ratios of sequences (GSPO) 2507.18071; leave-one-out 2402.14740.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl_sampled

__all__ = [
    "Reduction",
    "clipped_policy_loss",
    "clipped_share",
    "grouped_advantages",
    "leave_one_out_baseline",
    "policy_ratio",
    "reduce_tokens",
    "reference_penalty",
]

Reduction = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] | int
_REDUCTIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def leave_one_out_baseline(rewards: Tensor) -> Tensor:
    """For each of a group's completions the mean reward of the others; [P, G] to [P, G], G of 2 or more.

    >>> leave_one_out_baseline(torch.tensor([[1.0, 0.0, 2.0]]))
    tensor([[1.0000, 1.5000, 0.5000]])
    """
    _check_rewards(rewards, smallest=2)
    return (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)


def grouped_advantages(
    rewards: Tensor,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    baseline: Literal["mean", "leave-one-out"] = "mean",
    eps: float = 1e-6,
    correction: int = 1,
) -> Tensor:
    """Advantages of completions against their group: rewards [P, G] less a baseline, over a standard deviation; [P, G].

    scale: divide by the standard deviation of the group plus eps (GRPO), by that of the whole batch, or by nothing
    (Dr. GRPO, RLOO). A group of equal rewards gives exactly 0. correction: 1 for the unbiased variance that
    implementations use, 0 for the population's. Raises ConfigError for an unknown name, ShapeError, and DataError for
    rewards that are NaN or infinite.

    >>> grouped_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), correction=0)
    tensor([[ 1.0000, -1.0000, -1.0000,  1.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"scale is one of group, batch, none, not {scale!r}")
    if baseline not in ("mean", "leave-one-out"):
        raise ConfigError(f"baseline is one of mean, leave-one-out, not {baseline!r}")
    if not eps >= 0.0 or correction not in (0, 1):
        raise ConfigError(f"eps is 0 or more and correction 0 or 1, got {eps} and {correction}")
    _check_rewards(rewards, smallest=2 if baseline == "leave-one-out" or (scale == "group" and correction) else 1)
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    centre = leave_one_out_baseline(rewards) if baseline == "leave-one-out" else rewards.mean(-1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # whose mean may be off by a rounding
    centred = (rewards - centre).masked_fill(equal, 0.0)
    if scale == "none":
        return centred
    spread = rewards.std(-1, keepdim=True, correction=correction)
    if scale == "batch":
        spread = rewards.std(correction=correction if rewards.numel() > 1 else 0)
    tiny = torch.finfo(rewards.dtype).tiny  # with eps = 0, a group of equal rewards is 0 / tiny
    return centred / (spread + eps).clamp(min=tiny)


def _check_rewards(rewards: Tensor, smallest: int) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < smallest or len(rewards) == 0:
        raise ShapeError(f"rewards are [prompts, group], groups of {smallest} or more, got {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        wrong = int((~rewards.isfinite()).sum())
        raise DataError(f"{wrong} rewards are NaN or infinite: score those completions again or drop them")


def reduce_tokens(values: Tensor, mask: Tensor, reduction: Reduction, *, count: Tensor | float | None = None) -> Tensor:
    """One number from values [B, T] under the mask [B, T] of tokens that count.

    token-mean: sum over tokens / number of tokens; seq-mean-token-sum: mean over completions of their sums;
    seq-mean-token-mean: mean over completions of their means, one without a token giving 0; a number L: sum / (B L),
    so that long completions weigh no less. count: what the last sum is divided by in place of the number of tokens
    (token-mean) or of completions (the others), where a trainer knows those of all micro-batches and processes.
    Where the mask is false, values may be NaN. Raises ConfigError for another name or a length below 1.

    >>> values, mask = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> [reduce_tokens(values, mask, how).item() for how in ("token-mean", "seq-mean-token-sum", 4)]
    [3.0, 4.5, 1.125]
    """
    if mask.shape != values.shape or values.ndim != 2:
        raise ShapeError(f"values and mask are [B, T] alike, got {tuple(values.shape)} and {tuple(mask.shape)}")
    held = mask.bool()
    kept = torch.where(held, values, 0.0)
    if reduction == "token-mean":
        return kept.sum() / (held.sum().clamp(min=1) if count is None else count)
    sequences = max(len(values), 1) if count is None else count
    if reduction == "seq-mean-token-sum":
        return kept.sum() / sequences
    if reduction == "seq-mean-token-mean":
        return (kept.sum(-1) / held.sum(-1).clamp(min=1)).sum() / sequences
    if isinstance(reduction, str) or not (reduction >= 1 and math.isfinite(reduction)):
        raise ConfigError(f"reduction is one of {', '.join(_REDUCTIONS)} or a length of 1 or more, not {reduction!r}")
    return kept.sum() / reduction / sequences


def policy_ratio(
    log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, *, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """pi / pi_old of each token [B, T], 1 outside the mask; level "sequence": its geometric mean along the completion.

    The gradient flows into log_prob only. Raises ShapeError, and ConfigError for another level.
    """
    for name, other in (("old_log_prob", old_log_prob), ("mask", mask)):
        if other.shape != log_prob.shape or log_prob.ndim != 2:
            raise ShapeError(f"log_prob is [B, T] and {name} alike: {tuple(log_prob.shape)}, {tuple(other.shape)}")
    if level not in ("token", "sequence"):
        raise ConfigError(f'level is "token" or "sequence", not {level!r}')
    held = mask.bool()
    log_ratio = torch.where(held, log_prob, 0.0) - torch.where(held, old_log_prob.detach(), 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / held.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_prob)
    return log_ratio.exp()


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    reduction: Reduction = "token-mean",
    level: Literal["token", "sequence"] = "token",
    count: Tensor | float | None = None,
) -> Tensor:
    """The clipped surrogate loss of policy gradients, a scalar to be minimised.

    log_prob, old_log_prob, mask [B, T]; advantages [B], or [B, T] for one a token. clip_low and clip_high: how far the
    ratio may fall below and rise above 1, math.inf for no limit. dual_clip: a number over 1 that bounds the loss of a
    bad completion whose ratio has grown. reduction, count: see `reduce_tokens`; level: see `policy_ratio`.
    Raises ConfigError for limits that make no sense and ShapeError for shapes that do not fit.

    >>> log_prob = torch.tensor([[0.0, 0.5]], requires_grad=True)
    >>> clipped_policy_loss(log_prob, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2)).detach()
    tensor(-1.1000)
    """
    _check_limits(clip_low, clip_high, dual_clip)
    ratio = policy_ratio(log_prob, old_log_prob, mask, level=level)
    advantage = _per_token(advantages, log_prob)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage)
    if dual_clip is not None:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return reduce_tokens(-objective, mask, reduction, count=count)


@torch.no_grad()
def clipped_share(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """The share of tokens whose gradient the clipping removes, from below (A < 0) and from above (A > 0); [2]."""
    ratio = policy_ratio(log_prob, old_log_prob, mask, level=level)
    advantage = _per_token(advantages, log_prob)
    low = (ratio < 1.0 - clip_low) & (advantage < 0)
    high = (ratio > 1.0 + clip_high) & (advantage > 0)
    return torch.stack([reduce_tokens(part.to(ratio.dtype), mask, "token-mean") for part in (low, high)])


def reference_penalty(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    gradient: Literal["reverse", "reverse_sequence", "forward", "none"] = "reverse",
    ratio: Tensor | None = None,
    reduction: Reduction = "token-mean",
    count: Tensor | float | None = None,
) -> Tensor:
    """KL(policy||reference) estimated on the policy's own tokens; its value and its gradient are chosen apart.

    estimator: the value, as in `kullback.divergences.kl_sampled`. gradient: "reverse" is that of KL(policy||reference)
    token by token, what a k2 loss and k1 inside the reward give; "reverse_sequence" counts what a token does to later
    ones; "forward" is what the usual k3 loss gives, the gradient of KL(reference||policy) on the prefixes visited.
    ratio [B, T]: policy over the one that drew the tokens. reduction, count: see `reduce_tokens`.

    >>> log_prob = torch.tensor([[-1.0]], requires_grad=True)
    >>> penalty = reference_penalty(log_prob, torch.tensor([[-1.5]]), torch.ones(1, 1), gradient="forward")
    >>> penalty.detach(), torch.autograd.grad(penalty, log_prob)[0]  # the derivative of k3 itself
    (tensor(0.1065), tensor([[0.3935]]))
    """
    if mask.shape != log_prob.shape:
        raise ShapeError(f"log_prob and mask are [B, T] alike, got {tuple(log_prob.shape)} and {tuple(mask.shape)}")
    held = mask.bool()
    if reference_log_prob.shape != log_prob.shape:
        shapes = f"{tuple(log_prob.shape)} and {tuple(reference_log_prob.shape)}"
        raise ShapeError(f"log_prob and reference_log_prob are [B, T] alike, got {shapes}")
    values = kl_sampled(
        torch.where(held, reference_log_prob, 0.0),
        torch.where(held, log_prob, 0.0),
        value=estimator,
        gradient=gradient,
        ratio=ratio,
        mask=mask if gradient == "reverse_sequence" else None,
    )
    return reduce_tokens(values, mask, reduction, count=count)


def _per_token(advantages: Tensor, log_prob: Tensor) -> Tensor:
    if advantages.shape == log_prob.shape[:1]:
        advantages = advantages.unsqueeze(1)
    elif advantages.shape != log_prob.shape:
        wanted = f"[{log_prob.shape[0]}] or {list(log_prob.shape)}"
        raise ShapeError(f"advantages are {wanted}, as the log-probabilities, got {list(advantages.shape)}")
    return advantages.detach().to(log_prob.dtype)


def _check_limits(low: float, high: float, dual: float | None) -> None:
    if not (low >= 0.0 and high >= 0.0):
        raise ConfigError(f"clip_low and clip_high are 0 or more, got {low} and {high}: math.inf switches one off")
    if dual is not None and not dual > 1.0:
        raise ConfigError(f"dual_clip is over 1, got {dual}: None switches it off")
