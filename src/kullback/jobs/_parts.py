"""What every training job does with its parts: each is a run directory of its own, trained once, resumed where it was.

A part is one training with one seed. Under several processes the first one writes, and the others wait for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.utils import DistributedType

from kullback.core.errors import ConfigError, KullbackError
from kullback.core.files import atomic_directory
from kullback.core.runs import Run
from kullback.jobs._models import merged
from kullback.jobs._training import Listener, TrainingConfig, on_cpu, train

__all__ = ["Part", "Work", "processes", "quiet_elsewhere", "removed_on_error", "start_run", "train_part"]


class Part(Protocol):
    """One training: a frozen dataclass of all that determines it; `text` says what it does."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def text(self) -> str: ...


class Work(Protocol):
    """A job at work: it makes a Trainer for a part and measures the model that the Trainer has."""

    out: Path
    state: PartialState
    listen: Listener
    tokenizer: Any

    def trainer(self, part: Any, run: Run) -> Any: ...
    def evaluate(self, trainer: Any) -> dict[str, float]: ...


def processes(training: TrainingConfig) -> PartialState:
    """The processes of this job. Raises ConfigError when sharding is asked for and there is nothing to shard over."""
    state = PartialState(cpu=on_cpu())
    if training.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            "training.fsdp shards over several processes with an accelerator each: start them, or leave it out"
        )
    return state


def quiet_elsewhere(listen: Listener, state: PartialState) -> Listener:
    """The listener in the first process, and nobody in the others."""
    return listen if state.is_main_process else _say_nothing


def start_run(state: PartialState, path: Path, config: Any, *, kind: str, seed: int = 0, resume: bool = False) -> Run:
    """The run directory, made or resumed by the first process and opened by all others."""
    if state.is_main_process:
        run = Run.start(path, config, kind=kind, seed=seed, resume=resume)
    state.wait_for_everyone()
    return run if state.is_main_process else Run.open(path)


def train_part(work: Work, part: Part, *, kind: str, metrics: Sequence[str]) -> None:
    """Train one part to its end, from its latest checkpoint; a part that is finished is left as it is.

    Its folder ends with model/ and report.json: the `metrics` of the first and of the last evaluation, and the seconds.
    """
    folder = work.out / "parts" / part.name
    if (folder / "report.json").exists():
        return
    started = time.monotonic()
    run = start_run(work.state, folder, part, kind=kind, seed=part.seed, resume=folder.exists())
    work.listen({"kind": "part", "name": part.name, "steps": part.training.steps, "text": part.text})
    trainer = work.trainer(part, run)
    train(trainer, run, work.listen, lambda: work.evaluate(trainer), every=part.training.evaluate_every)
    _save_model(work, trainer, folder)
    if work.state.is_main_process:
        found = [event for event in run.events() if event["kind"] == "evaluation"]
        before, after = ({key: event[key] for key in metrics if key in event} for event in (found[0], found[-1]))
        run.report({"before": before, "after": after, "seconds": time.monotonic() - started})
    work.state.wait_for_everyone()


def _save_model(work: Work, trainer: Any, folder: Path) -> None:
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not work.state.is_main_process or (folder / "model").exists():
        return
    model = merged(trainer.accelerator.unwrap_model(trainer.model))
    with atomic_directory(folder / "model") as place:
        model.save_pretrained(place, state_dict=weights)
        work.tokenizer.save_pretrained(place)


@contextmanager
def removed_on_error(folder: Path | None) -> Iterator[None]:
    """Leave nothing half-written when the very first steps fail on what the user gave."""
    try:
        yield
    except KullbackError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _say_nothing(event: Any) -> None:
    """The listener of all processes but the first."""
