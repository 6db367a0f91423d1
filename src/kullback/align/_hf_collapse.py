"""What is left of a model's variety, and how Bayesian it is, at each evaluation of any Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from kullback.align.log_probs import completion_log_probs, sequence_log_probs
from kullback.align.posterior import collapse_report, implied_beta
from kullback.align.rollouts import Rollouts, sample_rollouts
from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator

__all__ = ["CollapseMonitor"]


class CollapseMonitor(TrainerCallback):
    """A callback for transformers' Trainer or one of its kind: at each evaluation `group` answers to each prompt are
    drawn, and `history` gets their entropy and divergence from the reference in nats, variety, the share of prompts
    with a single answer, the mean reward, and the implied beta with its R^2 (None or R^2 near 0 where the policy has
    not moved).

    rewards: from rollouts to [B]; length: most tokens of an answer; end: the token that ends one. What is found goes to
    the Trainer's metrics too, as eval_collapse_... . Every process draws all prompts, with one seed.
    Raises ConfigError for no prompt or fewer than two answers to each.
    """

    def __init__(
        self,
        reference: Any,
        prompts: Sequence[Sequence[int]],
        rewards: Callable[[Rollouts], Tensor],
        *,
        group: int = 8,
        length: int = 64,
        end: int | None = None,
        seed: int = 0,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        if not len(prompts) or group < 2:
            raise ConfigError(f"variety takes a prompt and two answers to each at least, got {len(prompts)}, {group}")
        self.reference, self.prompts, self.rewards = reference, prompts, rewards
        self.group, self.length, self.end, self.seed, self.decode = group, length, end, seed, decode
        self.history: list[dict[str, float | None]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the Trainer."""
        draw = generator(self.seed, "collapse", state.global_step, device=next(given["model"].parameters()).device)
        found = self.report(given["model"], draw)
        self.history.append({"step": float(state.global_step), **found})
        metrics = given.get("metrics")
        if metrics is not None:
            metrics.update({f"eval_collapse_{name}": value for name, value in found.items() if value is not None})

    @torch.no_grad()
    def report(self, policy: Any, draw: torch.Generator) -> dict[str, float | None]:
        """All of it for a policy as it is."""
        rollouts = sample_rollouts(
            policy, self.prompts, group=self.group, length=self.length, generator=draw, end=self.end,
            decode=self.decode,
        )  # fmt: skip
        mask = rollouts.completion_mask
        parts = (rollouts.ids, rollouts.attention_mask, mask)
        own = sequence_log_probs(rollouts.log_probs, mask)
        prior = sequence_log_probs(completion_log_probs(self.reference, *parts).log_probs, mask)
        rewards = self.rewards(rollouts).to(own)
        found = collapse_report(prior, own, ids=rollouts.completion_ids, mask=mask, prompt_index=rollouts.prompt_index)
        beta: float | None = None
        fit: float | None = None
        with contextlib.suppress(DataError):  # raised where it has not moved
            beta, fit = implied_beta(*(self._centred(x) for x in (prior, own, rewards)))
        return {
            "entropy": found.entropy, "divergence": found.divergence, "distinct": found.distinct,
            "single": found.single, "top": found.top, "reward": rewards.mean().item(), "beta": beta, "fit": fit,
        }  # fmt: skip

    def _centred(self, values: Tensor) -> Tensor:
        """Without each prompt's mean, since Z is a prompt's own."""
        groups = values.double().view(len(self.prompts), self.group)
        return (groups - groups.mean(1, keepdim=True)).flatten()
