"""The stage before DPH-RL: the first policy's own correct answers, drawn once and kept in the part's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kullback.align.rehearsal import RehearsalBuffer, rehearse
from kullback.core.errors import DataError
from kullback.core.files import atomic_write
from kullback.core.rng import generator
from kullback.core.runs import Run

if TYPE_CHECKING:
    from kullback.jobs._align_methods import Choice
    from kullback.jobs._alignment import Alignment

__all__ = ["rehearsed"]


def rehearsed(work: Alignment, choice: Choice, policy: Any, run: Run) -> tuple[Sequence[int], Any]:
    """The numbers of the prompts to explore, and the method with its buffer, each process its share of it.

    Raises DataError when the policy masters every prompt.
    """
    with work.state.main_process_first():
        partition, answers = run.path / "partition.json", run.path / "rehearsal.safetensors"
        if not partition.exists():  # written last: a stage that was killed begins anew
            _draw(work, choice, policy, run)
    split = json.loads(partition.read_text(encoding="utf-8"))
    if not split["exploring"]:
        raise DataError("the model masters every prompt: raise method.options.threshold, or give harder prompts")
    buffer = RehearsalBuffer.load(answers).shard(work.state.process_index, work.state.num_processes)
    method: Any = choice.method
    return split["exploring"], replace(method, buffer=buffer)


def _draw(work: Alignment, choice: Choice, policy: Any, run: Run) -> None:
    options, config = choice.rehearsal, work.config
    if options is None:
        return
    work.listen({"kind": "stage", "text": "the model's own answers, to tell what it masters"})
    source = work.rollouts(work.examples, work.reward_failed(run))
    partition, buffer = rehearse(
        source, policy.eval(), range(len(work.examples)), generator=generator(run.seed, "rehearsal"),
        answers=options.answers, threshold=options.threshold, kept=options.kept, correct_over=config.reward.correct,
        batch=config.sampling.batch or 16, pad=work.tokenizer.eos_token_id,
    )  # fmt: skip
    buffer.save(run.path / "rehearsal.safetensors")
    numbers = {"mastered": partition.mastered.tolist(), "exploring": partition.exploring.tolist()}
    atomic_write(run.path / "partition.json", json.dumps(numbers) + "\n")
    text = f"{len(numbers['mastered'])} prompts mastered, {len(numbers['exploring'])} to explore, {len(buffer)} answers"
    work.listen({"kind": "note", "text": text})
