"""Group-relative policy optimisation and its kin, as one method of the room.

    loss = clipped surrogate of the group's advantages + beta KL(policy||reference), estimated on the same tokens

With scale="none" and a constant length as reduction it is Dr. GRPO, with baseline="leave-one-out" RLOO, with
clip_high=0.28, token means and a filter of groups DAPO, with level="sequence" GSPO.
Sources: arXiv 2402.03300, 2503.20783, 2402.14740, 2503.14476, 2507.18071.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kullback.align.log_probs import sequence_log_probs
from kullback.align.methods import Batch
from kullback.align.policy_gradient import (
    Reduction,
    clipped_policy_loss,
    clipped_share,
    grouped_advantages,
    reference_penalty,
)
from kullback.core.errors import ConfigError

__all__ = ["Grpo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo:
    """Options of the GRPO family.

    beta: coefficient of the KL to the reference, 0 for none; penalty: how it enters: "k3" as a loss (GRPO's own, whose
    gradient is that of the forward KL on the prefixes visited), "k2" as a loss, which descends the reverse KL, or "k1"
    inside the reward; epochs, mini_batches: steps that the same completions serve, and parts they are cut into for it;
    the rest as in `policy_gradient`. Raises ConfigError for values out of range.
    """

    beta: float = 0.0
    penalty: Literal["k1", "k2", "k3"] = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    scale: Literal["group", "batch", "none"] = "group"
    baseline: Literal["mean", "leave-one-out"] = "mean"
    reduction: Reduction = "token-mean"
    level: Literal["token", "sequence"] = "token"
    epochs: int = 1
    mini_batches: int = 1
    needs_reference: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.beta >= 0.0:
            raise ConfigError(f"beta is 0 or more, got {self.beta}")
        if self.epochs < 1 or self.mini_batches < 1:
            raise ConfigError(f"epochs and mini_batches are 1 or more, got {self.epochs} and {self.mini_batches}")
        if self.penalty not in ("k1", "k2", "k3"):
            raise ConfigError(f"penalty is one of k1, k2, k3, not {self.penalty!r}")
        object.__setattr__(self, "needs_reference", self.beta > 0.0)

    def prepare(self, batch: dict[str, Any], *, group: int, generator: torch.Generator) -> dict[str, Any]:
        """Adds advantages [B]; with penalty "k1" they are those of r - beta log(policy / reference)."""
        rewards = batch["rewards"]
        if self.beta and self.penalty == "k1":
            ratio = sequence_log_probs(batch["old_log_prob"] - batch["reference_log_prob"], batch["completion_mask"])
            rewards = rewards - self.beta * ratio
        advantages = grouped_advantages(rewards.view(-1, group), scale=self.scale, baseline=self.baseline)
        return {**batch, "advantages": advantages.view(-1)}

    def count(self, batch: Batch) -> float:
        """Tokens or completions, as the reduction has it."""
        return float(batch["completion_mask"].sum() if self.reduction == "token-mean" else len(batch["rewards"]))

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate and the penalty."""
        mask, old, advantages = batch["completion_mask"], batch["old_log_prob"], batch["advantages"]
        limits: dict[str, Any] = {"clip_low": self.clip_low, "clip_high": self.clip_high, "level": self.level}
        loss = clipped_policy_loss(
            log_prob, old, advantages, mask,
            dual_clip=self.dual_clip, reduction=self.reduction, count=count, **limits,
        )  # fmt: skip
        metrics = {
            "reward": batch["rewards"].float().mean(),
            "clipped": clipped_share(log_prob, old, advantages, mask, **limits).sum(),
        }
        if self.beta:
            divergence = self._divergence(log_prob, batch, "token-mean", None).detach()
            metrics["divergence"] = divergence
            if self.penalty != "k1":
                loss = loss + self.beta * self._divergence(log_prob, batch, self.reduction, count)
        return loss, metrics

    def without_reference(self) -> Grpo:
        """The same without a penalty."""
        return replace(self, beta=0.0)

    def _divergence(self, log_prob: Tensor, batch: Batch, reduction: Reduction, count: Any) -> Tensor:
        estimator: Literal["k2", "k3"] = "k2" if self.penalty == "k2" else "k3"
        return reference_penalty(
            log_prob, batch["reference_log_prob"], batch["completion_mask"], estimator=estimator,
            gradient="reverse" if estimator == "k2" else "forward", reduction=reduction, count=count,
        )  # fmt: skip
