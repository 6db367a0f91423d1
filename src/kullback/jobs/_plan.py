"""What a job would take, from a few of its own steps in a folder that is thrown away."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kullback.core.runs import Run
from kullback.jobs._parts import Work
from kullback.jobs._training import TrainingConfig, train

if TYPE_CHECKING:
    from kullback.jobs.align import AlignConfig
    from kullback.jobs.distill import DistillConfig

__all__ = ["estimate", "estimate_alignment"]

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
    """The plan of a distill job: tokens, parameters, bytes of memory (measured) and minutes, for all its parts."""
    from kullback.distill._hf import LiveTeacher
    from kullback.jobs._distillation import Distillation

    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix="kullback-") as scratch:
        out = Path(scratch) / "run"
        short = replace(config, training=_few_steps(config.training), seeds=config.seeds[:1])
        work = Distillation(short, out, listen=watch)
        seconds = _time(work, work.parts[0], watch)
        student = work.student(config.seeds[0])
        texts, teacher = work.texts, work.teacher.model if isinstance(work.teacher, LiveTeacher) else None
    a_step = config.training.batch * config.data.length
    parts = len(config.seeds) * (2 if config.baseline else 1)
    return {
        "parts": parts,
        "tokens_of_text": texts.train.tokens,
        "tokens_a_step": a_step,
        "tokens_in_all": a_step * config.training.steps * parts,
        "passes_over_the_text": round(a_step * config.training.steps / max(texts.train.tokens, 1), 2),
        "student_parameters": _parameters(student),
        "teacher_parameters": _parameters(teacher),
        **_cost(config.training, parts, seconds),
    }


def estimate_alignment(config: AlignConfig) -> dict[str, Any]:
    """The plan of an align job: examples, completions, parameters, bytes of memory (measured) and minutes."""
    from kullback.jobs._alignment import Alignment

    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix="kullback-") as scratch:
        short = replace(config, training=_few_steps(config.training), seeds=config.seeds[:1])
        work = Alignment(short, Path(scratch) / "run", listen=watch)
        seconds = _time(work, work.parts[0], watch)
        policy = work.policy(config.seeds[0])
    sides = {"online": config.sampling.group, "pair": 2, "completion": 1}[work.kind]
    a_step = config.training.batch * sides
    return {
        "parts": len(config.seeds),
        "training_examples": len(work.examples),
        "validation_prompts": len(work.validation_examples),
        "completions_a_step": a_step,
        "completions_in_all": a_step * config.training.steps * len(config.seeds),
        "policy_parameters": _parameters(policy),
        **_cost(config.training, len(config.seeds), seconds),
    }


def _few_steps(training: TrainingConfig) -> TrainingConfig:
    return replace(training, steps=_STEPS, evaluate_every=_NEVER, save_every=_NEVER, report_to=())


def _cost(training: TrainingConfig, parts: int, seconds: Mapping[str, float]) -> dict[str, float]:
    evaluations = 2 + training.steps // training.evaluate_every
    minutes = parts * (training.steps * seconds["step"] + evaluations * seconds["evaluation"]) / 60
    return {
        "memory_bytes": _peak_memory(),
        "seconds_a_step": round(seconds["step"], 3),
        "minutes": round(minutes, 2),
    }


def _time(work: Work, part: Any, watch: _Watch) -> dict[str, float]:
    run = Run.start(work.out / "parts" / part.name, part, kind="plan-part", seed=part.seed)
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
