"""Batches of prompts of intermediate difficulty, filled while the policy trains: rollouts run ahead in workers.

Prompts come without replacement within a pass over all of them; each is rolled out once and kept if its pass rate lies
between the thresholds. What is kept beyond a batch goes into the next one, unless it is of too old a policy. Results
are taken in the order in which they were asked for, so that they do not depend on the number of workers, or else as
they come, so that a few slow ones do not hold up the others.

Shapes: B prompts a batch, G answers of each. Source: arXiv 2504.03380.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.difficulty import DifficultyFilter, PassRateTracker
from kullback.align.rollouts import Rollouts, join_rollouts
from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator, stream_seed

__all__ = ["FilteredBatch", "FilteredSource", "OnlineDifficultySampler", "StarvationWarning"]

# (number of the prompt, seed, version of the policy) -> whatever the trainer needs of the group, and its rewards [G]
Rollout = Callable[[int, int, int], tuple[Any, Tensor]]
_RECENT, _STARVED = 5, 0.02


class StarvationWarning(UserWarning):
    """Hardly any prompt is of a difficulty that is kept: nearly all rollouts are thrown away."""


class FilteredBatch(NamedTuple):
    """The kept groups of a batch and what they cost.

    prompts: their numbers [B]; groups: what the rollouts returned; rewards [B, G]; versions: of the policy that each
    came from [B]; draws: prompts rolled out for this batch; acceptance: kept of those; scale: kept over the number
    asked for, 1 for a full batch, by which a loss that averages may be multiplied; rates: pass rates of all draws.
    """

    prompts: Tensor
    groups: list[Any]
    rewards: Tensor
    versions: Tensor
    draws: int
    acceptance: float
    scale: float
    rates: Tensor


class _Asked(NamedTuple):
    prompt: int
    turn: int
    version: int
    future: Future[tuple[Any, Tensor, Tensor]]


class OnlineDifficultySampler:
    """An endless iterator of FilteredBatch; each is one version of the policy, the next begins when it is asked for.

    count: prompts; rollout: draws a group's answers, with a seed of its own that depends on the prompt and the pass
    only; keep: the filter; max_in_flight: groups asked for ahead, at 1 without a thread; workers: threads that roll
    out; max_draws: of a batch, after which it is given up as short (None: four passes); short_batch: "scale" hands out
    what there is, "repeat" fills up with groups again, "raise" is a DataError; max_staleness: versions that a group may
    be behind; reuse: train on the answers that passed the filter (as published), or on fresh ones of the same prompts,
    which the filter has not selected; ordered: take results in order, or False for as they come; tracker: spends
    rollouts where they are likely to be kept, in each pass on a prompt with a chance in proportion to that, of at least
    `floor`. Close it, or use it in a with statement, to stop the workers.
    Raises ConfigError for numbers out of range.
    """

    def __init__(
        self,
        count: int,
        rollout: Rollout,
        keep: DifficultyFilter,
        *,
        batch_size: int,
        max_in_flight: int = 64,
        workers: int = 1,
        max_draws: int | None = None,
        max_staleness: int = 1,
        short_batch: Literal["scale", "repeat", "raise"] = "scale",
        reuse: bool = True,
        ordered: bool = True,
        tracker: PassRateTracker | None = None,
        floor: float = 0.05,
        seed: int = 0,
    ) -> None:
        if min(count, batch_size, max_in_flight, workers) < 1 or max_staleness < 0:
            given = f"{count}, {batch_size}, {max_in_flight}, {workers}"
            raise ConfigError(f"prompts, batch_size, max_in_flight and workers are 1 or more, got {given}")
        if max_draws is not None and max_draws < batch_size:
            raise ConfigError(f"max_draws is the batch size {batch_size} or more, got {max_draws}")
        if short_batch not in ("scale", "repeat", "raise"):
            raise ConfigError(f"short_batch is one of scale, repeat, raise, not {short_batch!r}")
        if not 0.0 < floor <= 1.0:
            raise ConfigError(f"floor is a probability above 0, got {floor}: hard prompts are to be seen again")
        self.count, self.rollout, self.keep, self.batch_size = count, rollout, keep, batch_size
        self.max_in_flight, self.max_draws, self.max_staleness = max_in_flight, max_draws or 4 * count, max_staleness
        self.short_batch, self.reuse, self.tracker, self.floor, self.seed = short_batch, reuse, tracker, floor, seed
        self.ordered, self.version, self.turn = ordered, 0, 0
        self._group = 0
        self._queue: deque[tuple[int, int]] = deque()
        self._asked: deque[_Asked] = deque()
        self._again: deque[tuple[int, int, int]] = deque()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._starved = False
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="rollout")

    def __iter__(self) -> Iterator[FilteredBatch]:
        return self

    def __enter__(self) -> OnlineDifficultySampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; rollouts that have begun are finished and thrown away."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> FilteredBatch:
        kept: list[tuple[_Asked, Any, Tensor]] = []
        rates: list[Tensor] = []
        passed = 0
        while len(kept) < self.batch_size and len(rates) < self.max_draws:
            self._ask({asked.prompt for asked, _, _ in kept})
            asked = self._take()
            group, rewards, first = asked.future.result()
            self._group = len(rewards)
            rates.append(first.double().mean())
            if self.tracker is not None:
                self.tracker.update([asked.prompt], [float(first.sum())], len(first))
            if bool(self.keep(first.unsqueeze(0))):
                passed += 1
                if self.version - asked.version <= self.max_staleness:
                    kept.append((asked, group, rewards))
        self.version += 1
        acceptance = passed / len(rates)
        self._watch(acceptance)
        return self._batch(kept, torch.stack(rates), acceptance)

    def _take(self) -> _Asked:
        """The first that was asked for, or the first of those that are done, once there is one."""
        place = 0
        if not self.ordered:
            wait([asked.future for asked in self._asked], return_when=FIRST_COMPLETED)
            place = next(at for at, asked in enumerate(self._asked) if asked.future.done())
        taken = self._asked[place]
        del self._asked[place]
        return taken

    def _batch(self, kept: list[tuple[_Asked, Any, Tensor]], rates: Tensor, acceptance: float) -> FilteredBatch:
        found = len(kept)
        if found < self.batch_size and (self.short_batch == "raise" or (self.short_batch == "repeat" and not found)):
            raise DataError(
                f"{found} of {self.batch_size} prompts were of the difficulty asked for after {len(rates)} draws: "
                "widen the thresholds, allow more draws, or bring prompts that the policy solves sometimes"
            )
        if self.short_batch == "repeat":
            kept = [kept[place % found] for place in range(self.batch_size)]
        rewards = torch.stack([rewards for _, _, rewards in kept]) if kept else torch.zeros(0, self._group)
        return FilteredBatch(
            prompts=torch.tensor([asked.prompt for asked, _, _ in kept], dtype=torch.long),
            groups=[group for _, group, _ in kept],
            rewards=rewards,
            versions=torch.tensor([asked.version for asked, _, _ in kept], dtype=torch.long),
            draws=len(rates),
            acceptance=acceptance,
            scale=len(kept) / self.batch_size,
            rates=rates,
        )

    def _watch(self, acceptance: float) -> None:
        self._recent.append(acceptance)
        before, self._starved = self._starved, len(self._recent) == _RECENT and sum(self._recent) < _STARVED * _RECENT
        if self._starved and not before:
            share = 100.0 * sum(self._recent) / _RECENT
            warnings.warn(
                f"of the last {_RECENT} batches {share:.1f} % of the prompts were kept: the thresholds do not fit the "
                "policy, or a tracker should choose what is rolled out",
                StarvationWarning,
                stacklevel=3,
            )

    def _ask(self, held: set[int]) -> None:
        """Fill up what is in flight, never with a prompt that is already there or in the batch."""
        while len(self._asked) < self.max_in_flight:
            if self._again:
                prompt, turn, version = self._again.popleft()
            else:
                busy = held | {asked.prompt for asked in self._asked}
                if not self._queue:
                    self._queue.extend(self._next_pass())
                place = next((at for at, (prompt, _) in enumerate(self._queue) if prompt not in busy), None)
                if place is None:  # what is left of this pass waits for what is in flight
                    if self._asked:
                        return
                    place = 0
                (prompt, turn), version = self._queue[place], self.version
                del self._queue[place]
            self._asked.append(_Asked(prompt, turn, version, self._submit(prompt, turn, version)))

    def _submit(self, prompt: int, turn: int, version: int) -> Future[tuple[Any, Tensor, Tensor]]:
        if self.max_in_flight > 1:
            return self._workers.submit(self._roll, prompt, turn, version)
        done: Future[tuple[Any, Tensor, Tensor]] = Future()  # nothing would run beside it: no thread is needed
        done.set_result(self._roll(prompt, turn, version))
        return done

    def _next_pass(self) -> list[tuple[int, int]]:
        """All prompts in random order, or with a tracker those that a draw of each one's own lets through."""
        draws = generator(self.seed, "pass", self.turn)
        order = torch.randperm(self.count, generator=draws)
        if self.tracker is not None and self._group:
            likely = self.tracker.acceptance(self._group, keep=self.keep)
            chance = (likely / likely.max().clamp(min=1e-300)).clamp(min=self.floor)
            chosen = torch.rand(self.count, generator=draws, dtype=torch.float64) < chance
            order = order[chosen[order]] if chosen.any() else order
        turn, self.turn = self.turn, self.turn + 1
        return [(prompt, turn) for prompt in order.tolist()]

    def _roll(self, prompt: int, turn: int, version: int) -> tuple[Any, Tensor, Tensor]:
        group, first = self.rollout(prompt, stream_seed(self.seed, "rollout", turn, prompt), version)
        if self.reuse or not bool(self.keep(first.unsqueeze(0))):
            return group, first, first
        return *self.rollout(prompt, stream_seed(self.seed, "fresh", turn, prompt), version), first

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next; groups in flight are asked for again, with their seeds and versions."""
        return {
            "version": self.version, "turn": self.turn, "group": self._group, "queue": list(self._queue),
            "again": [(asked.prompt, asked.turn, asked.version) for asked in self._asked] + list(self._again),
            "recent": list(self._recent), "tracker": None if self.tracker is None else self.tracker.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler with the same options stood."""
        for asked in self._asked:
            asked.future.cancel()
        self._asked.clear()
        self.version, self.turn, self._group = state["version"], state["turn"], state["group"]
        self._queue = deque((int(prompt), int(turn)) for prompt, turn in state["queue"])
        self._again = deque((int(a), int(b), int(c)) for a, b, c in state["again"])
        self._recent = deque(state["recent"], maxlen=_RECENT)
        if self.tracker is not None and state["tracker"] is not None:
            self.tracker.load_state_dict(state["tracker"])


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredSource:
    """A source of completions, as `ScoredRollouts`, that hands on only prompts of the right difficulty.

    It is called as the source itself is: with the numbers of prompts to begin with; in place of those that the filter
    rejects, others are drawn, at most `max_draws` prompts in all. Where too few were kept, the groups that were are
    handed out again; where none was, those first asked for. told: is called with draws and kept, for a log. tracker:
    remembers the pass rate of every prompt, and then all prompts are drawn, each as likely as it is to be kept, but
    `floor` at least; only their number is taken from those to begin with.
    """

    source: Any
    keep: DifficultyFilter
    max_draws: int = 256
    told: Callable[[int, int], None] | None = None
    tracker: PassRateTracker | None = None
    floor: float = 0.1

    def __len__(self) -> int:
        return len(self.source)

    def __call__(
        self, model: Any, index: Sequence[int], *, group: int, generator: torch.Generator
    ) -> tuple[Rollouts, Tensor]:
        """Rollouts and rewards of as many prompts as `index` has."""
        wanted = len(index)
        asked, rest = self._order(index, group, generator)
        rollouts: list[Rollouts] = []
        rewards: list[Tensor] = []
        kept: list[int] = []
        draws = 0
        while asked:
            found, scores = self.source(model, asked, group=group, generator=generator)
            rollouts.append(found)
            rewards.append(scores)
            kept += [draws + at for at in self.keep(scores.reshape(-1, group)).nonzero().flatten().tolist()]
            if self.tracker is not None:
                self.tracker.update(asked, scores.reshape(-1, group).double().sum(1).cpu(), group)
            draws += len(asked)
            room = max(min(wanted, self.max_draws - draws), 0) if len(kept) < wanted else 0
            asked, rest = rest[:room], rest[room:]
        if self.told is not None:
            self.told(draws, len(kept))
        chosen = [kept[place % len(kept)] if kept else place % draws for place in range(wanted)]
        rows = torch.tensor([at * group + answer for at in chosen for answer in range(group)])
        return join_rollouts(rollouts).select(rows), torch.cat(rewards)[rows.to(rewards[0].device)]

    def _order(self, index: Sequence[int], group: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """The prompts to begin with, and those that may follow, in their order."""
        if self.tracker is None:
            others = torch.randperm(len(self), generator=generator, device=generator.device).tolist()
            return list(index), [number for number in others if number not in set(index)]
        likely = self.tracker.acceptance(group, keep=self.keep)
        chance = (likely / likely.max().clamp(min=1e-300)).clamp(min=self.floor)
        draws = torch.rand(len(self), generator=generator, device=generator.device).double().cpu()
        # Exponential clocks at these rates: what rings first is a draw without replacement, one after the other.
        order = (-draws.clamp(min=1e-12).log() / chance).argsort().tolist()
        return order[: len(index)], order[len(index) :]

    def state_dict(self) -> dict[str, Any]:
        """What the tracker knows; empty without one."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back."""
        if self.tracker is not None and state:
            self.tracker.load_state_dict(state)
