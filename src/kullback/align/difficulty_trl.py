"""Prompts of the right difficulty for trl's GRPO trainer: a sampler of groups, and rewards that tell a tracker.

A `PassRateTracker` holds what is known of every prompt. `GroupSampler` draws the prompts of each generation batch in
proportion to the chance that their group will be kept, in the order that the trainer lays out; `recorded_reward` wraps
the reward that tells right from wrong and adds up its results by prompt; `sample_by_difficulty` puts the sampler into
a trainer and keeps its state beside the trainer's checkpoints. Nothing is imported from trl.

The trainer fetches a batch ahead of the one that it trains on, so a draw knows the results up to the batch before the
last. Source: arXiv 2504.03380.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from kullback.align.difficulty import DifficultyFilter, PassRateTracker
from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator as stream

__all__ = ["GroupSampler", "recorded_reward", "sample_by_difficulty"]

_FILE = "difficulty.json"


class GroupSampler(Sampler[int]):
    """Numbers of prompts, each `group` times in a row, `prompts` different ones a batch, each batch `repeats` times.

    tracker: what is known of all prompts; keep: the filter; group: answers of a prompt; prompts: of a generation batch,
    each draw in proportion to the chance to be kept, which counts as `floor` of the largest at least; repeats: times
    that the batch is handed out; batches: of a pass, by default as many as passing once over all prompts takes.
    generator: of the draws, with the same state in all processes. A batch is drawn when it is begun. Raises ConfigError
    for numbers out of range.

    >>> drawn = GroupSampler(PassRateTracker(5), group=2, prompts=2, generator=torch.Generator().manual_seed(0))
    >>> numbers = list(drawn)
    >>> numbers[::2] == numbers[1::2], len(numbers)
    (True, 8)
    """

    def __init__(
        self,
        tracker: PassRateTracker,
        *,
        group: int,
        prompts: int,
        generator: torch.Generator,
        keep: DifficultyFilter | None = None,
        repeats: int = 1,
        batches: int | None = None,
        floor: float = 0.1,
    ) -> None:
        count = len(tracker.solved)
        if group < 2 or repeats < 1 or (batches is not None and batches < 1):
            raise ConfigError(
                f"a group has 2 answers or more, repeats and batches are 1 or more, got {group}, {repeats}, {batches}"
            )
        if not 1 <= prompts <= count:
            raise ConfigError(f"a batch takes from 1 to all {count} prompts, got {prompts}: change the batch")
        if not 0.0 < floor <= 1.0:
            raise ConfigError(f"floor is a share above 0, 1 at most, got {floor}: hard prompts are to be seen again")
        self.tracker, self.keep, self.floor, self.generator = tracker, keep or DifficultyFilter(), floor, generator
        self.group, self.prompts, self.repeats = group, prompts, repeats
        self.batches = count // prompts if batches is None else batches
        self._pass, self._drawn, self._finished = 0, list[list[int]](), False
        self._loaded = False
        self._asked: int | None = None

    def __len__(self) -> int:
        return self.batches * self.prompts * self.group * self.repeats

    def chances(self) -> torch.Tensor:
        """What the first draw of a batch is proportional to, float64 [prompts of the tracker], 1 the largest."""
        likely = self.tracker.acceptance(self.group, keep=self.keep)
        return (likely / likely.max().clamp(min=1e-300)).clamp(min=self.floor)

    def set_epoch(self, epoch: int) -> None:
        """Which pass is begun next; trainers call it."""
        self._asked = epoch

    def __iter__(self) -> Iterator[int]:
        same = not self._finished if self._asked is None else self._asked == self._pass
        if not (self._loaded and same):
            self._pass = self._pass + bool(self._drawn) if self._asked is None else self._asked
            self._drawn = []
        self._loaded, self._finished, self._asked = False, False, None
        return self._numbers(self._drawn)

    def _numbers(self, drawn: list[list[int]]) -> Iterator[int]:
        """A pass, from its start; what was drawn of it before a resumption comes again."""
        for place in range(self.batches):
            if place == len(drawn):
                drawn.append(self._draw())
            for _ in range(self.repeats):
                for prompt in drawn[place]:
                    yield from [prompt] * self.group
        self._finished = self._finished or drawn is self._drawn  # unless another pass was begun

    def _draw(self) -> list[int]:
        chances = self.chances()
        draws = torch.rand(len(chances), generator=self.generator, dtype=torch.float64, device=self.generator.device)
        # Exponential clocks at these rates: in the order in which they ring, each is a draw from those left.
        order = (-draws.cpu().clamp(min=1e-300).log() / chances).argsort(stable=True)
        return [int(prompt) for prompt in order[: self.prompts]]

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, with the batches of this pass: a resumed trainer skips those it has had."""
        return {
            "pass": self._pass, "drawn": [list(batch) for batch in self._drawn], "finished": self._finished,
            "generator": self.generator.get_state(), "tracker": self.tracker.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler with the same options stood; the next pass begins with the batches drawn there.

        Raises DataError for the state of a sampler with other batches, ShapeError for one of other prompts.
        """
        if any(len(batch) != self.prompts for batch in state["drawn"]) or len(state["drawn"]) > self.batches:
            raise DataError(
                f"the state is not of {self.batches} batches of {self.prompts} prompts: resume with the same options"
            )
        self.tracker.load_state_dict(state["tracker"])
        self.generator.set_state(state["generator"])
        self._pass, self._finished, self._loaded = int(state["pass"]), bool(state["finished"]), True
        self._drawn = [[int(prompt) for prompt in batch] for batch in state["drawn"]]


def recorded_reward(
    reward: Callable[..., Any], tracker: PassRateTracker, *, column: str = "prompt_number", correct: float | None = None
) -> Callable[..., Any]:
    """The reward function itself, which also tells the tracker how many answers of each prompt were right.

    column: of the data, the number of the prompt in the tracker; a row whose number is None, as those of an evaluation
    should be, and a reward that is None or NaN are not counted. correct: a reward over this is a right answer; by
    default the reward, from 0 to 1, is the share that is right. It may be a coroutine function. With several processes
    each is told the results of all. Raises ConfigError for what is no function; when called, DataError for a column
    that is missing, a number of no prompt, or a reward outside 0 to 1.

    >>> tracker = PassRateTracker(2)
    >>> told = recorded_reward(lambda completions, **columns: [float(x == "4") for x in completions], tracker)
    >>> told(prompts=["2+2="] * 2, completions=["4", "5"], prompt_number=[1, 1])
    [1.0, 0.0]
    >>> tracker.solved.tolist(), tracker.failed.tolist()
    ([0.0, 1.0], [0.0, 1.0])
    """
    if not callable(reward) or isinstance(reward, (str, type, torch.nn.Module)):
        raise ConfigError(f"a reward that is recorded is a function of prompts and completions, not {reward!r:.80}")
    inner = reward
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):

        async def later(**given: Any) -> Any:
            numbers = _numbers(given, column, len(tracker.solved))
            found = await reward(**given)
            _record(tracker, numbers, found, correct)
            return found

        return _named(later, inner)

    def now(**given: Any) -> Any:
        numbers = _numbers(given, column, len(tracker.solved))
        found = reward(**given)
        _record(tracker, numbers, found, correct)
        return found

    return _named(now, inner)


def _named(function: Callable[..., Any], reward: Any) -> Callable[..., Any]:
    """With the name of the reward, by which trainers log."""
    function.__name__ = str(getattr(reward, "__name__", type(reward).__name__))
    return function


def _numbers(given: Mapping[str, Any], column: str, count: int) -> Sequence[int | None]:
    if column not in given:
        raise DataError(
            f"the data has no column {column!r}: number its prompts from 0 there, and set remove_unused_columns=False"
        )
    numbers: Sequence[int | None] = given[column]
    wrong = [number for number in numbers if number is not None and not 0 <= number < count]
    if wrong:
        raise DataError(f"column {column!r} has prompt {wrong[0]} and the tracker {count} prompts, numbered from 0")
    return numbers


def _record(tracker: PassRateTracker, numbers: Sequence[int | None], found: Any, correct: float | None) -> None:
    """Add the results up by prompt; a prompt's answers may be spread over processes."""
    pairs = []
    for number, value in zip(numbers, found, strict=True):
        reward = math.nan if value is None else float(value)
        if number is None or math.isnan(reward):
            continue
        pairs.append((number, reward if correct is None else float(reward > correct)))
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, pairs)
        pairs = [pair for part in parts for pair in part]
    if any(not 0.0 <= right <= 1.0 for _, right in pairs):
        wrong = next(right for _, right in pairs if not 0.0 <= right <= 1.0)
        raise DataError(f"a share of right answers is from 0 to 1, got the reward {wrong:g}: set `correct`")
    rights: dict[int, list[float]] = {}
    for number, right in pairs:
        rights.setdefault(number, []).append(right)
    for number, shares in rights.items():
        tracker.update([number], [math.fsum(shares)], len(shares))


def sample_by_difficulty(
    trainer: Any,
    tracker: PassRateTracker,
    *,
    keep: DifficultyFilter | None = None,
    floor: float = 0.1,
    column: str = "prompt_number",
    generator: torch.Generator | None = None,
) -> GroupSampler:
    """Have a `trl.GRPOTrainer`, before it trains, draw its prompts by difficulty; the sampler that it now uses.

    The sampler's state is written into each checkpoint and read again when the trainer resumes from one in its output
    directory. generator: by default from the seed of the trainer. Give the trainer a reward wrapped by
    `recorded_reward` with this tracker. Raises ConfigError for a trainer that makes no groups, DataError where `column`
    does not number the training rows from 0.
    """
    group: int | None = getattr(trainer, "num_generations", None)
    args: Any = getattr(trainer, "args", None)
    if group is None or not hasattr(args, "generation_batch_size"):
        raise ConfigError(f"a trainer of groups, as trl.GRPOTrainer, is needed, got {type(trainer).__name__}")
    data, count = trainer.train_dataset, len(tracker.solved)
    if not hasattr(data, "__len__") or len(data) != count or column not in getattr(data, "column_names", ()):
        raise DataError(f"the training data needs {count} rows, as the tracker has, with their numbers as {column!r}")
    if list(data[column]) != list(range(count)):
        raise DataError(f"column {column!r} numbers the training rows from 0 in order: number them after shuffling")
    sampler = GroupSampler(
        tracker, group=group, prompts=args.generation_batch_size // group, keep=keep, floor=floor,
        repeats=trainer.num_iterations * args.steps_per_generation,
        generator=stream(args.seed, "difficulty") if generator is None else generator,
    )  # fmt: skip
    trainer._get_train_sampler = lambda dataset=None: sampler
    trainer.add_callback(_checkpoints(sampler))
    return sampler


def _checkpoints(sampler: GroupSampler) -> Any:
    """A callback that writes the sampler's state into checkpoints and takes it up from one."""
    from transformers import TrainerCallback

    class Checkpoints(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.is_world_process_zero:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
                place.write_text(json.dumps(_plain(sampler.state_dict())) + "\n", encoding="utf-8")

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE
            if place.is_file():
                sampler.load_state_dict(_tensors(json.loads(place.read_text(encoding="utf-8"))))
            elif state.global_step:
                warnings.warn(
                    f"{place.parent} holds no {_FILE}: the pass rates of prompts are learnt anew", stacklevel=2
                )

    return Checkpoints()


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: part.tolist() for name, part in state["tracker"].items()}
    return {**state, "generator": bytes(state["generator"].tolist()).hex(), "tracker": counts}


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: torch.tensor(part, dtype=torch.float64) for name, part in state["tracker"].items()}
    code = torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8)
    return {**state, "generator": code, "tracker": counts}
