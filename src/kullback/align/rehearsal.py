"""A buffer of a policy's own correct answers, with the log-probabilities it gave them: rehearsal without the policy.

Prompts that the first policy masters are told from those to be explored by its pass rate; of the mastered ones the
buffer holds answers drawn afresh, so that none is there because it was lucky, and only if correct.

Shapes: P prompts, k answers of each; rows of L prompt and T completion tokens. Source: arXiv 2509.07430.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.rollouts import Rollouts, pad_left
from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["Partition", "RehearsalBuffer", "partition_by_pass_rate", "rehearse"]

_FORMAT = "kullback rehearsal 1"
# (model, prompt numbers, *, group, generator) -> completions and their rewards, as align.scored.ScoredRollouts
Source = Callable[..., tuple[Rollouts, Tensor]]


class Partition(NamedTuple):
    """Numbers of the prompts that the policy masters, and of those that it is to explore, both ascending."""

    mastered: Tensor
    exploring: Tensor


def partition_by_pass_rate(correct: Tensor, *, threshold: float = 0.75) -> Partition:
    """Split prompts by the share of correct ones among their k answers, correct [P, k]; mastered from the threshold on.

    A threshold over 1 masters nothing. Raises ShapeError, ConfigError for a threshold that is not positive.

    >>> partition_by_pass_rate(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]))
    Partition(mastered=tensor([0, 2]), exploring=tensor([1]))
    """
    if correct.ndim != 2 or not correct.shape[1]:
        raise ShapeError(f"correct is [prompts, answers], one answer at least, got {tuple(correct.shape)}")
    if not threshold > 0.0:
        raise ConfigError(f"the threshold of the pass rate is positive, got {threshold}: at 0 all would be mastered")
    held = correct.bool().double().mean(1) >= threshold - 1e-12
    return Partition(held.nonzero().squeeze(1), (~held).nonzero().squeeze(1))


class RehearsalBuffer:
    """Correct completions with the log-probabilities [T] of their tokens at one temperature, kept without padding.

    temperature: that of the log-probabilities, which the loss has to use as well; pad: what fills up rows.
    """

    def __init__(self, *, temperature: float = 1.0, pad: int = 0) -> None:
        self.temperature, self.pad = temperature, pad
        self._prompts: list[list[int]] = []
        self._completions: list[list[int]] = []
        self._log_probs: list[Tensor] = []
        self._index: list[int] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, rollouts: Rollouts, correct: Tensor) -> int:
        """Keep the rows whose answer is correct [B]; how many these are.

        Raises ConfigError for another temperature, ShapeError, DataError for log-probabilities that are not finite.
        """
        if rollouts.temperature != self.temperature:
            raise ConfigError(
                f"the buffer holds log-probabilities at temperature {self.temperature:g} and these were drawn at "
                f"{rollouts.temperature:g}: one loss cannot use both"
            )
        if correct.shape != (len(rollouts),):
            raise ShapeError(f"correct has an entry for each of {len(rollouts)} rows, got {tuple(correct.shape)}")
        kept = rollouts.select(correct.bool()).to("cpu")
        if not kept.log_probs[kept.completion_mask].isfinite().all():
            raise DataError("log-probabilities of the first policy are NaN or infinite: nothing can be rehearsed")
        length = kept.prompt_length
        for row in range(len(kept)):
            held = kept.completion_mask[row].bool()
            if not held.any():
                continue
            self._prompts.append(kept.ids[row, :length][kept.attention_mask[row, :length].bool()].tolist())
            self._completions.append(kept.completion_ids[row][held].tolist())
            self._log_probs.append(kept.log_probs[row][held].float())
            self._index.append(int(kept.prompt_index[row]))
        return len(kept)

    def rows(self, which: Sequence[int]) -> Rollouts:
        """The entries of these numbers as rollouts; their log_probs are those of the first policy."""
        if not which:
            raise DataError("no entries of the buffer were asked for")
        ids, prompt_mask = pad_left([self._prompts[row] for row in which], self.pad)
        backwards, held = pad_left([self._completions[row][::-1] for row in which], self.pad)
        held = held.flip(1)
        log_probs = torch.zeros(held.shape)
        log_probs[held] = torch.cat([self._log_probs[row] for row in which])
        return Rollouts(
            ids=torch.cat([ids, backwards.flip(1)], 1),
            attention_mask=torch.cat([prompt_mask, held], 1),
            completion_mask=held,
            prompt_index=torch.tensor([self._index[row] for row in which]),
            log_probs=log_probs,
            finished=torch.ones(len(held), dtype=torch.bool),
            temperature=self.temperature,
        )

    def sample(self, count: int, *, generator: torch.Generator) -> Rollouts:
        """`count` entries, none twice before all have come once. DataError where the buffer is empty."""
        if count < 1:
            raise ConfigError(f"count is 1 or more, got {count}")
        if not len(self):
            raise DataError("the rehearsal buffer is empty: lower the threshold of the pass rate, or train without it")
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(self), generator=generator, device=generator.device).tolist()
        return self.rows(order[:count])

    def shard(self, rank: int, count: int) -> RehearsalBuffer:
        """The part of one of `count` processes: every count-th entry, from `rank` on."""
        if not 0 <= rank < count:
            raise ConfigError(f"rank is from 0 to {count - 1}, got {rank}")
        part = RehearsalBuffer(temperature=self.temperature, pad=self.pad)
        for name in ("_prompts", "_completions", "_log_probs", "_index"):
            setattr(part, name, getattr(self, name)[rank::count])
        return part

    def save(self, path: Path) -> None:
        """Write all entries as one safetensors file."""
        from safetensors.torch import save_file

        def flat(rows: list[list[int]]) -> Tensor:
            return torch.tensor([token for row in rows for token in row], dtype=torch.long)

        def lengths(rows: list[list[int]]) -> Tensor:
            return torch.tensor([len(row) for row in rows], dtype=torch.long)

        tensors = {
            "prompts": flat(self._prompts), "prompt_lengths": lengths(self._prompts),
            "completions": flat(self._completions), "completion_lengths": lengths(self._completions),
            "log_probs": torch.cat(self._log_probs) if self._log_probs else torch.zeros(0),
            "prompt_index": torch.tensor(self._index, dtype=torch.long),
        }  # fmt: skip
        about = {"format": _FORMAT, "options": json.dumps({"temperature": self.temperature, "pad": self.pad})}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=about)

    @classmethod
    def load(cls, path: Path) -> RehearsalBuffer:
        """Read what `save` wrote; DataError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise DataError(f"{path} is no rehearsal buffer of this version: write it again")
                held: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a rehearsal buffer: {error}") from error
        buffer = cls(**json.loads(about["options"]))
        counts = held["completion_lengths"].tolist()
        buffer._prompts = [part.tolist() for part in held["prompts"].split(held["prompt_lengths"].tolist())]
        buffer._completions = [part.tolist() for part in held["completions"].split(counts)]
        buffer._log_probs = list(held["log_probs"].split(counts))
        buffer._index = held["prompt_index"].tolist()
        return buffer


def rehearse(
    source: Source,
    model: Any,
    prompts: Sequence[int],
    *,
    generator: torch.Generator,
    answers: int = 8,
    threshold: float = 0.75,
    kept: int = 1,
    correct_over: float = 0.5,
    batch: int = 16,
    pad: int = 0,
) -> tuple[Partition, RehearsalBuffer]:
    """The first stage, once, with the policy to be trained: partition the prompts of these numbers and fill a buffer.

    source: draws completions with their rewards, as `ScoredRollouts`; a reward over correct_over is correct;
    answers: drawn for the pass rate of a prompt; kept: drawn afresh for the buffer of a mastered one, 1 as published,
    more where prompts are few; batch: prompts at once. The partition has the numbers given.
    """
    if min(answers, kept, batch) < 1:
        raise ConfigError(f"answers, kept and batch are 1 or more, got {answers}, {kept} and {batch}")
    if not prompts:
        raise DataError("there are no prompts to partition")

    def drawn(numbers: Sequence[int], group: int) -> list[tuple[Rollouts, Tensor]]:
        parts = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
        return [source(model, part, group=group, generator=generator) for part in parts]

    rewards = torch.cat([found.reshape(-1, answers).cpu() for _, found in drawn(list(prompts), answers)])
    split = partition_by_pass_rate(rewards > correct_over, threshold=threshold)
    numbers = torch.tensor(list(prompts))
    named = Partition(numbers[split.mastered], numbers[split.exploring])
    fresh = drawn(named.mastered.tolist(), kept)
    buffer = RehearsalBuffer(temperature=fresh[0][0].temperature if fresh else 1.0, pad=pad)
    for rollouts, found in fresh:
        buffer.add(rollouts, found > correct_over)
    return named, buffer
