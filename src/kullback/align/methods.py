"""What one step of alignment minimises: a method takes log-probabilities of completions, and gives a loss.

A batch is a dict of tensors, rows B of T completion tokens: completion_mask [B, T]; reference_log_prob [B, T] where the
method needs the reference; for methods that learn from the policy's own samples rewards [B], old_log_prob [B, T],
prompt_index [B], the optimiser's step [] and whatever `prepare` adds. Pairs come as their chosen completions, followed
by their rejected ones, B = 2 pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kullback.align.f_dpo import FDPOLoss, preference_metrics
from kullback.align.log_probs import sequence_log_probs
from kullback.align.policy_gradient import reduce_tokens
from kullback.core.errors import ShapeError

__all__ = ["Batch", "Method", "OnlineMethod", "Preference", "StatefulMethod", "Supervised", "pair_halves"]

Batch = Mapping[str, Tensor]


class Method(Protocol):
    """A loss on log-probabilities [B, T] of completions.

    needs_reference: whether the batch must have the reference's log-probabilities. `count` is what the sum over a
    batch is divided by (tokens, completions or pairs); a trainer passes `loss` the count of the whole accumulated batch
    over all processes, so that neither changes the gradient. `loss` returns the scalar and what is worth a log.
    """

    @property
    def needs_reference(self) -> bool: ...
    def count(self, batch: Batch) -> float: ...
    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]: ...


class OnlineMethod(Method, Protocol):
    """A method that learns from the policy's own completions, which come with rewards.

    `prepare` is called once on what was sampled, without a gradient: rewards [B] of `group` completions a prompt, in
    the order of the prompts; it returns the batch with its own tensors added, of any number of rows.

    What else a method may have, and AlignTrainer looks for:
    - needs_policy: the batch has policy_log_prob [B, T], where something else has drawn the completions;
    - proposal "offline" and renews(step): a past policy draws them, and proposal_log_prob is its own;
    - anchor_decay, anchor_every: anchor_log_prob under a moving average of the weights;
    - opponents(group) and opponent ("reference", "mixture" with its exponent `mixture`, "anchor"): how many of a
      prompt's completions, its last, another policy draws; `opponent` [B] marks them;
    - critic and critic_rate (see `critic.Critic`): old_values [B, T], and values [B, T] with a gradient for the loss;
    - compares, a `compared.RowDivergence` or None: teacher_divergence [B, T] of next-token laws from the reference's,
      with a gradient, comes to `loss` in place of reference_log_prob;
    - settle(batches, step, total): called on the micro-batches of a step, total sums a tensor over processes;
    - epochs, mini_batches: how many steps the same completions serve, and in how many parts an epoch takes them;
    - gathers: `prepare` is given `gather` as that of a StatefulMethod; smallest_group: completions a prompt needs.
    """

    def prepare(self, batch: dict[str, Any], *, group: int, generator: torch.Generator) -> dict[str, Any]: ...


class StatefulMethod(OnlineMethod, Protocol):
    """An online method that remembers: running means, counts of prompts.

    Its `prepare` is given `gather` as well, from this process's tensor [B, ...] to those of all processes one after
    the other, so that all of them remember the same; `state_dict` is what a checkpoint holds.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def pair_halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected rows of a batch of pairs. Raises ShapeError for an odd number of rows."""
    if len(tensor) % 2 or not len(tensor):
        raise ShapeError(f"pairs come as chosen rows and then as many rejected ones, got {len(tensor)} rows")
    return tensor[: len(tensor) // 2], tensor[len(tensor) // 2 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Preference pairs under a pairwise loss: DPO, f-DPO, IPO, hinge (see `f_dpo.FDPOLoss`).

    length_normalised: divide the scores of completions by their tokens, as the authors of IPO report it.
    """

    options: FDPOLoss = field(default_factory=FDPOLoss)
    length_normalised: bool = False
    needs_reference: bool = field(default=True, init=False)

    def count(self, batch: Batch) -> float:
        """Pairs."""
        return len(batch["completion_mask"]) / 2

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the pairs from log_prob [2 pairs, T]."""
        mask = batch["completion_mask"]
        policy = pair_halves(sequence_log_probs(log_prob, mask))
        reference = pair_halves(sequence_log_probs(batch["reference_log_prob"], mask))
        lengths = pair_halves(mask.sum(-1)) if self.length_normalised else None
        output = self.options(*reference, *policy, lengths=lengths)
        return output.loss.sum() / count, preference_metrics(self.options, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """Completions as they are: cross-entropy, in nats a token."""

    needs_reference: bool = field(default=False, init=False)

    def count(self, batch: Batch) -> float:
        """Tokens."""
        return float(batch["completion_mask"].sum())

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean negative log-probability of the tokens."""
        return reduce_tokens(-log_prob, batch["completion_mask"], "token-mean", count=count), {}
