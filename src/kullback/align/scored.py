"""Completions with their rewards: prompts, a policy and a reward function in, rollouts and numbers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kullback.align.rewards import Reward, score
from kullback.align.rollouts import Rollouts, join_rollouts, sample_rollouts, served_rollouts
from kullback.core.errors import RewardError
from kullback.decode.served import ServedSampler

__all__ = ["ScoredRollouts", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollouts:
    """Samples completions of its prompts and has them rewarded.

    prompts: token ids of each, texts: the same as text; columns: further fields of the data by name, one value a
    prompt; length: completion tokens at most; decode: ids to text; seconds: what one call of the reward may take;
    on_error: None lets a RewardError through, a function is told of it and all rewards of that call are 0; told: a
    function that hears of the rewards of each call that did not fail; seen: one that sees all completions; server:
    draws them in the model's place, at temperature 1, and they have the log-probabilities of its policy.
    """

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    reward: Reward
    length: int
    decode: Callable[[list[int]], str]
    end: int | Sequence[int] | None = None
    pad: int | None = None
    temperature: float = 1.0
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    vocabulary: int | None = None
    batch: int | None = None
    seconds: float | None = 60.0
    name: str | None = None
    on_error: Callable[[RewardError], None] | None = None
    told: Callable[[Tensor], None] | None = None
    seen: Callable[[Rollouts], None] | None = None
    server: ServedSampler | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(
        self, model: Any, index: Sequence[int], *, group: int, generator: torch.Generator
    ) -> tuple[Rollouts, Tensor]:
        """`group` completions for each of the prompts with these numbers, and their rewards [B] on the model's device.

        Raises RewardError when the reward fails and nobody wants to hear of it.
        """
        rollouts = self.draw(model, index, group=group, generator=generator)
        return rollouts, self.rewards(rollouts)

    def draw(
        self, model: Any, index: Sequence[int], *, group: int, generator: torch.Generator, locally: bool = False
    ) -> Rollouts:
        """The completions alone; locally: by the model, whether or not there is a server."""
        chosen = [self.prompts[i] for i in index]
        options: dict[str, Any] = {
            "group": group, "length": self.length, "generator": generator, "end": self.end, "pad": self.pad,
            "prompt_index": index, "decode": self.decode,
        }  # fmt: skip
        if self.server is not None and not locally:
            return served_rollouts(self.server, chosen, **options).to(next(model.parameters()).device)
        more: dict[str, Any] = {"temperature": self.temperature, "vocabulary": self.vocabulary, "batch": self.batch}
        return sample_rollouts(model, chosen, **options, **more)

    def rewards(self, rollouts: Rollouts, **more: Sequence[Any]) -> Tensor:
        """The rewards [B] of completions of these prompts; more: columns of the completions' own."""
        if self.seen is not None:
            self.seen(rollouts)
        rows, texts = rollouts.prompt_index.tolist(), list(rollouts.texts or ())
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()} | more
        try:
            found = score(
                self.reward, [self.texts[i] for i in rows], texts, seconds=self.seconds, name=self.name, **columns
            )
        except RewardError as error:
            if self.on_error is None:
                raise
            self.on_error(error)
            return torch.zeros(len(rows), device=rollouts.ids.device)
        if self.told is not None:
            self.told(found)
        return found.to(rollouts.ids.device)


def interleaved(own: Rollouts, others: Rollouts, *, prompts: int, pad: int = 0) -> tuple[Rollouts, Tensor]:
    """Completions of the same prompts by two policies, each prompt's one after the other, and which [B] are others'."""
    sizes = [len(part) // prompts for part in (own, others)]
    places = torch.arange(len(own) + len(others)).split([len(own), len(others)])
    order = torch.cat([place.view(prompts, size) for place, size in zip(places, sizes, strict=True)], 1).flatten()
    found = join_rollouts([own, others], pad=pad).select(order)
    return found, (order >= len(own)).to(found.ids.device)
