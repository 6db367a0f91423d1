"""The parts of PPO with a critic: rewards for tokens, advantages over time, and the critic's loss.

    r_t = -b (log pi - log ref)_t + [t is the last token] R
    A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}),   returns = A + V
    critic: max((V - returns)^2, (V_old + clip(V - V_old) - returns)^2) / 2

With `policy_gradient.clipped_policy_loss` on the advantages [B, T] it is the PPO of RLHF: the method `Ppo`. Shapes:
[B, T], a mask of completion tokens, nats. Sources: arXiv 1506.02438 (advantages), 1707.06347, 2203.02155.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kullback.align.critic import CriticKind
from kullback.align.log_probs import sequence_log_probs
from kullback.align.methods import Batch
from kullback.align.policy_gradient import Reduction, clipped_policy_loss, clipped_share, reduce_tokens
from kullback.core.errors import ConfigError, ShapeError

__all__ = ["Ppo", "clipped_value_loss", "generalised_advantages", "shaped_rewards", "whitened"]


def shaped_rewards(
    reference_log_prob: Tensor, log_prob: Tensor, rewards: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """Rewards of tokens [B, T]: the KL to the reference at each, and the completion's reward [B] at its last.

    Their sum is R - b (log pi(y) - log ref(y)); 0 outside the mask. A row without a token has none. Only this estimate
    (k1) belongs in a reward: k3 there descends KL(pi, ref) - KL(ref, pi), which has no pull near the reference, and the
    whole KL of a token's law has none at that token.

    >>> mask = torch.tensor([[True, True, False]])
    >>> shaped_rewards(torch.full((1, 3), -2.0), torch.full((1, 3), -1.0), torch.tensor([5.0]), mask, beta=0.1)
    tensor([[-0.1000,  4.9000,  0.0000]])
    """
    _check(mask, reference_log_prob, log_prob)
    if rewards.shape != mask.shape[:1]:
        raise ShapeError(f"rewards are one a completion, [{len(mask)}], got {tuple(rewards.shape)}")
    held = mask.bool()
    found = torch.sub(reference_log_prob.detach(), log_prob.detach()).mul_(beta)
    _cleared(found, held)
    # The largest place that is held, counted from 1, in the narrowest type that has it: no search of bytes.
    narrow = torch.int16 if held.shape[1] < 1 << 15 else torch.int32
    ends = held.mul(torch.arange(1, held.shape[1] + 1, dtype=narrow, device=held.device)).amax(1, keepdim=True)
    last, gained = (ends - 1).clamp_(min=0).long(), rewards.detach().unsqueeze(1).to(found)
    return found.scatter_add_(1, last, gained.where(ends > 0, 0.0))


def _cleared(values: Tensor, held: Tensor) -> None:
    """Zero outside the mask, in place, NaN and infinities too: a product of bits, a fifth of the time of a choice."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size())
    if whole is None:
        values.masked_fill_(~held, 0.0)
    else:
        values.view(whole).mul_(held.to(whole))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, T] and 0 outside the mask, from rewards and values of tokens.

    trace is GAE's lambda. A completion ends where its mask ends: nothing is worth anything afterwards. The values'
    gradient is not taken. Raises ShapeError, ConfigError for gamma or trace outside [0, 1].

    >>> one = torch.ones(1, 3)
    >>> generalised_advantages(one, torch.zeros(1, 3), one, trace=1.0)[0]
    tensor([[3., 2., 1.]])
    """
    _check(mask, rewards, values)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= trace <= 1.0):
        raise ConfigError(f"gamma and trace lie in [0, 1], got {gamma} and {trace}")
    held = mask.bool()
    value = torch.where(held, values.detach(), 0.0)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    surprise = torch.where(held, rewards + gamma * following - value, 0.0)
    found, running = torch.zeros_like(surprise), torch.zeros_like(surprise[:, 0])
    for place in range(mask.shape[1] - 1, -1, -1):
        running = torch.where(held[:, place], surprise[:, place] + gamma * trace * running, 0.0)
        found[:, place] = running
    return found, torch.where(held, found + value, 0.0)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    reduction: Reduction = "token-mean",
    count: Tensor | float | None = None,
) -> Tensor:
    """The critic's squared error, which gains nothing from moving further than clip from its old values; a scalar."""
    _check(mask, values, old_values, returns)
    if not clip > 0.0:
        raise ConfigError(f"clip is positive, got {clip}: math.inf switches it off")
    held = mask.bool()
    now, old, goal = (torch.where(held, x, 0.0) for x in (values, old_values.detach(), returns.detach()))
    bounded = old + (now - old).clamp(-clip, clip)
    loss = 0.5 * torch.maximum((now - goal).square(), (bounded - goal).square())
    return reduce_tokens(loss, mask, reduction, count=count)


def whitened(
    values: Tensor, mask: Tensor, *, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """values [B, T] less their mean over the mask and over their standard deviation, 0 outside it.

    gather: from this process's sums to those of all. Values that are all alike, or one alone, become 0.

    >>> whitened(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-1.,  1.,  0.]])
    """
    _check(mask, values)
    held = mask.bool()
    kept = torch.where(held, values, 0.0).double()
    total, count = gather(torch.stack([kept.sum(), held.sum().double()]).unsqueeze(0)).sum(0)
    mean = total / count.clamp(min=1.0)
    centred = torch.where(held, kept - mean, 0.0)
    variance = gather(centred.square().sum().view(1)).sum() / count.clamp(min=1.0)
    tiny = torch.finfo(values.dtype).eps * (1.0 + mean.abs())  # what rounding leaves of values that are alike
    found = centred / variance.sqrt() if variance.sqrt() > tiny else torch.zeros_like(centred)
    return found.to(values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ppo:
    """PPO as a method of the room: the KL to the reference inside the reward, a critic, several epochs a batch.

    beta: coefficient of the KL; critic: see `critic.Critic`, with a learning rate critic_rate times the policy's;
    gamma, trace: of the advantages, which are whitened unless told otherwise; clip_low, clip_high, dual_clip: of the
    ratio; value_clip: of the critic's values, which weigh value_weight; epochs, mini_batches: steps that the same
    completions serve, and parts they are cut into for it. Raises ConfigError for values out of range.
    """

    beta: float = 0.05
    critic: CriticKind = "head"
    critic_rate: float = 10.0
    gamma: float = 1.0
    trace: float = 0.95
    whiten: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float = 0.2
    value_weight: float = 0.5
    epochs: int = 1
    mini_batches: int = 1
    reduction: Reduction = "token-mean"
    needs_reference: bool = field(default=False, init=False)
    gathers: bool = field(default=True, init=False)
    smallest_group: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not self.beta >= 0.0 or not self.value_weight > 0.0 or not self.critic_rate > 0.0:
            given = f"{self.beta}, {self.value_weight} and {self.critic_rate}"
            raise ConfigError(f"beta is 0 or more, value_weight and critic_rate are positive, got {given}")
        if self.epochs < 1 or self.mini_batches < 1:
            raise ConfigError(f"epochs and mini_batches are 1 or more, got {self.epochs} and {self.mini_batches}")
        if self.critic not in ("head", "shared", "model"):
            raise ConfigError(f"critic is head, shared or model, not {self.critic!r}")
        one = torch.ones(1, 1)
        generalised_advantages(one, one, one, gamma=self.gamma, trace=self.trace)
        clipped_value_loss(one, one, one, one, clip=self.value_clip)
        clipped_policy_loss(one, one, one, one, dual_clip=self.dual_clip, **self._limits())
        object.__setattr__(self, "needs_reference", self.beta > 0.0)

    def prepare(
        self,
        batch: dict[str, Any],
        *,
        group: int,
        generator: torch.Generator,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> dict[str, Any]:
        """Adds advantages and returns [B, T], from old_values [B, T]."""
        mask, old = batch["completion_mask"], batch["old_log_prob"]
        reference = batch["reference_log_prob"] if self.beta else old
        rewards = shaped_rewards(reference, old, batch["rewards"], mask, beta=self.beta)
        values = batch["old_values"].to(rewards.dtype)
        advantages, returns = generalised_advantages(rewards, values, mask, gamma=self.gamma, trace=self.trace)
        if self.whiten:
            advantages = whitened(advantages, mask, gather=gather)
        return {**batch, "advantages": advantages, "returns": returns}

    def count(self, batch: Batch) -> float:
        """Tokens or completions, as the reduction has it."""
        return float(batch["completion_mask"].sum() if self.reduction == "token-mean" else len(batch["rewards"]))

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate and the critic's error, from values [B, T] in the batch."""
        mask, old, advantages = batch["completion_mask"], batch["old_log_prob"], batch["advantages"]
        options: dict[str, Any] = {"reduction": self.reduction, "count": count}
        policy = clipped_policy_loss(
            log_prob, old, advantages, mask, dual_clip=self.dual_clip, **self._limits(), **options
        )
        given = (batch["values"], batch["old_values"], batch["returns"], mask)
        critic = clipped_value_loss(*given, clip=self.value_clip, **options)
        held = mask.bool()
        left = (batch["returns"] - batch["values"].detach())[held].var(correction=0)
        metrics = {
            "reward": batch["rewards"].float().mean(),
            "clipped": clipped_share(log_prob, old, advantages, mask, **self._limits()).sum(),
            "value_error": reduce_tokens((given[0].detach() - given[2]).square(), mask, "token-mean"),
            "explained": 1.0 - left / batch["returns"][held].var(correction=0).clamp(min=1e-8),
        }
        if self.beta:
            gap = sequence_log_probs(log_prob.detach() - batch["reference_log_prob"], mask)
            metrics["divergence"] = gap.mean()
        return policy + self.value_weight * critic, metrics

    def _limits(self) -> dict[str, Any]:
        return {"clip_low": self.clip_low, "clip_high": self.clip_high}


def _check(mask: Tensor, *others: Tensor) -> None:
    if mask.ndim != 2 or any(other.shape != mask.shape for other in others):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mask, *others))
        raise ShapeError(f"the mask and what belongs to tokens are [B, T] alike, got {shapes}")
