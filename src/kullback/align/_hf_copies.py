"""What stands beside a policy in training: copies of its weights, and other policies that complete the prompts too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kullback.align._weights import average_into, copied_weights, put_in_place
from kullback.align.rollouts import Rollouts
from kullback.align.scored import interleaved
from kullback.core.errors import ConfigError
from kullback.decode.mixture import GeometricMixture

__all__ = ["Copies", "Opponents"]


@dataclass(slots=True)
class Copies:
    """Trained weights beside the policy's own: the anchor, a moving average of them, and the proposal.

    The anchor is there for methods with an anchor_decay, which may be renewed every anchor_every steps alone; the
    proposal for those with proposal "offline", whose `renews(step)` says when the policy takes its place.
    """

    anchor: dict[str, Tensor] = field(default_factory=dict)
    proposal: dict[str, Tensor] = field(default_factory=dict)

    def move(self, method: Any, policy: Any, step: int) -> None:
        """To be called before each step that samples."""
        decay = getattr(method, "anchor_decay", None)
        if decay is not None and (step % getattr(method, "anchor_every", 1) == 0 or not self.anchor):
            average_into(self.anchor, policy, decay=decay)
        if getattr(method, "proposal", "online") == "offline" and (not self.proposal or method.renews(step)):
            self.proposal = copied_weights(policy)

    @contextmanager
    def placed(self, name: str, policy: Any) -> Iterator[None]:
        """While open, the policy has the weights of this copy."""
        with put_in_place(policy, getattr(self, name)):
            yield

    def state_dict(self) -> dict[str, Any]:
        """All copies."""
        return {"anchor": self.anchor, "proposal": self.proposal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.anchor, self.proposal = state["anchor"], state["proposal"]


@dataclass(frozen=True, slots=True)
class Opponents:
    """Who completes the prompts beside the policy: nobody, or what the method's `opponent` names.

    "reference"; "mixture", the geometric mixture of the policy and, with the exponent method.mixture, the reference;
    "anchor", the moving average of the policy. reference_model: None for the policy with its adapters off.
    """

    method: Any
    reference_model: Any
    copies: Copies

    def draw(
        self, source: Any, policy: Any, index: Sequence[int], *, group: int, generator: torch.Generator
    ) -> tuple[Rollouts, Tensor, Tensor | None]:
        """(completions, their rewards [B], which of them [B] are the opponents', None for none of `group`)."""
        count = self.method.opponents(group) if hasattr(self.method, "opponents") else 0
        with self.copies.placed("proposal", policy):
            if not count:
                rolled, rewards = source(policy, index, group=group, generator=generator)
                return rolled, rewards, None
            if not hasattr(source, "draw"):
                raise ConfigError("completions of two policies are compared: leave sampling.filter out")
            own = source.draw(policy, index, group=group - count, generator=generator)
        with self._other(policy) as other:
            others = source.draw(other, index, group=count, generator=generator, locally=True)
        rolled, opponent = interleaved(own, others, prompts=len(index), pad=int(source.pad or 0))
        return rolled, source.rewards(rolled, opponent=opponent.tolist()), opponent

    @contextmanager
    def _other(self, policy: Any) -> Iterator[Any]:
        kind = self.method.opponent
        if kind == "anchor":
            with self.copies.placed("anchor", policy):
                yield policy
            return
        if kind == "mixture":
            yield GeometricMixture(policy, self._reference(policy), share=self.method.mixture)
        elif self.reference_model is not None:
            yield self._reference(policy)
        else:
            with policy.disable_adapter():
                yield policy

    def _reference(self, policy: Any) -> Callable[..., Any]:
        if self.reference_model is None:
            return _without_adapters(policy)
        model: Callable[..., Any] = self.reference_model.to(next(policy.parameters()).device)
        return model


def _without_adapters(policy: Any) -> Callable[..., Any]:
    """The policy as it was before its adapters, as a function."""

    def call(**given: Any) -> Any:
        with policy.disable_adapter():
            return policy(**given)

    return call
