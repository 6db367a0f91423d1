"""What a distill job would take, from a few of its own steps in a folder that is thrown away."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kullback.core.runs import Run
from kullback.distill._hf import LiveTeacher
from kullback.jobs._distillation import Distillation
from kullback.jobs._training import train
from kullback.jobs.distill import DistillConfig

__all__ = ["estimate"]

_STEPS = 4  # the first warms up, the last is followed by an evaluation: the two between are timed
_NEVER = 1 << 30


class _Watch:
    """A listener that keeps when each event came."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, int], float] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.times.setdefault((event["kind"], int(event.get("step", 0))), time.monotonic())

    def between(self, first: tuple[str, int], last: tuple[str, int]) -> float:
        return self.times[last] - self.times[first]


def estimate(config: DistillConfig) -> dict[str, Any]:
    """The plan of a job: tokens, parameters, bytes of memory (measured) and minutes, for all its parts together."""
    training = replace(config.training, steps=_STEPS, evaluate_every=_NEVER, save_every=_NEVER, report_to=())
    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix="kullback-") as scratch:
        out = Path(scratch) / "run"
        work = Distillation(replace(config, training=training, seeds=config.seeds[:1]), out, listen=watch)
        part = work.parts[0]
        run = Run.start(out / "parts" / part.name, part, kind="distill-part", seed=part.seed)
        seconds = _time(work, part, run, watch)
        student = work.student(config.seeds[0])
        texts, teacher = work.texts, work.teacher.model if isinstance(work.teacher, LiveTeacher) else None
    steps = config.training.steps
    a_step = config.training.batch * config.data.length
    evaluations = 2 + steps // config.training.evaluate_every
    parts = len(config.seeds) * (2 if config.baseline else 1)
    return {
        "parts": parts,
        "tokens_of_text": texts.train.tokens,
        "tokens_a_step": a_step,
        "tokens_in_all": a_step * steps * parts,
        "passes_over_the_text": round(a_step * steps / max(texts.train.tokens, 1), 2),
        "student_parameters": _parameters(student),
        "teacher_parameters": _parameters(teacher),
        "memory_bytes": _peak_memory(),
        "seconds_a_step": round(seconds["step"], 3),
        "minutes": round(parts * (steps * seconds["step"] + evaluations * seconds["evaluation"]) / 60, 2),
    }


def _time(work: Distillation, part: Any, run: Run, watch: _Watch) -> dict[str, float]:
    trainer = work.trainer(part, run)
    watch({"kind": "begin"})
    train(trainer, run, watch, lambda: work.evaluate(trainer), every=_NEVER)
    return {
        "evaluation": watch.between(("begin", 0), ("evaluation", 0)),
        "step": watch.between(("progress", 1), ("progress", _STEPS - 1)) / (_STEPS - 2),
    }


def _parameters(model: Any) -> int:
    """The number of weights; 0 for a teacher that is not in memory."""
    return 0 if model is None else sum(p.numel() for p in model.parameters())


def _peak_memory() -> int:
    """The most memory this process has held: of the accelerator where there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
