"""The main job: a teacher's distribution is brought into a student, on text, with a run directory as its record."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.core.config import load
from kullback.core.errors import ConfigError
from kullback.core.runs import Run
from kullback.jobs._training import Listener, TrainingConfig

if TYPE_CHECKING:
    from kullback.distill.objective import Objective

__all__ = [
    "DistillConfig", "LoraSettings", "ObjectiveConfig", "TextConfig",
    "baseline_of", "check", "embedded", "objective_of", "plan", "resume", "run",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The text. train: a file or folder, empty for the standard library's prose; validation: the same, empty to hold
    out the share `holdout` of train; field: the JSONL or Parquet field; length: tokens a block; validation_blocks: at
    most.
    """

    train: str = ""
    validation: str = ""
    field: str = "text"
    length: int = 128
    holdout: float = 0.05
    validation_blocks: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: `name`, a divergence of the family or "sinkd", with its options, mixed with cross-entropy.

    on_policy: the share of steps on the student's own continuations of `prompt` tokens.
    """

    name: str = "kl"
    options: dict[str, float | str] = field(default_factory=dict)
    cross_entropy: float = 0.2
    temperature: float = 1.0
    squared_temperature: bool = False
    on_policy: float = 0.0
    prompt: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters as the only trainable weights; rank 0 trains the whole student."""

    rank: int = 0
    alpha: int = 16
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """The whole configuration of `kullback distill`.

    teacher: a model directory, a teacher cache, the address of a server, or empty for the embedded one; student: a
    model directory (fresh weights where it holds a config.json alone), or empty for the embedded one; seeds: the
    student is trained once for each; baseline: train it on cross-entropy alone as well.
    """

    teacher: str = ""
    student: str = ""
    data: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    seeds: tuple[int, ...] = (0,)
    baseline: bool = False


def embedded() -> DistillConfig:
    """The job that runs when nothing is named: the embedded teacher and student on the standard library's prose."""
    return DistillConfig(
        data=TextConfig(validation_blocks=64),
        training=TrainingConfig(steps=150, batch=16, learning_rate=3e-3, evaluate_every=50, save_every=50),
        seeds=(0, 1, 2),
        baseline=True,
    )


def run(config: DistillConfig, out: Path, *, listen: Listener | None = None, resume: bool = False) -> Run:
    """Distil and return the finished run directory `out`; with resume, go on with what is missing in it.

    The directory ends with model/, report.json, samples.jsonl, curves.csv and figures/. Raises ConfigError, DataError
    or ShapeError for input that cannot work, CheckpointError for a directory that cannot be written or resumed, and
    Interrupted after a signal, with everything saved.
    """
    from kullback.jobs._distillation import Distillation
    from kullback.jobs._models import without_bars

    with without_bars():
        work = Distillation(config, out, listen=listen or (lambda event: None), resume=resume)
        for part in work.parts:
            work.train(part)
        return work.finish()


def resume(out: Path, *, listen: Listener | None = None) -> Run:
    """Go on with the run directory `out` under the configuration it was started with."""
    return run(load(DistillConfig, Run.open(out).config), out, listen=listen, resume=True)


def plan(config: DistillConfig) -> dict[str, Any]:
    """What `run` would do, without training: tokens, bytes of memory and minutes, from two timed steps."""
    from kullback.jobs._models import without_bars
    from kullback.jobs._plan import estimate

    with without_bars():
        return estimate(config)


def objective_of(config: ObjectiveConfig) -> Objective:
    """The Objective that a configuration names. Raises ConfigError for an unknown name or option."""
    from functools import partial

    from kullback.distill.objective import Objective
    from kullback.distill.sinkd import sinkd_loss
    from kullback.divergences import F_NAMES, f_divergence, kl, named

    shared: dict[str, Any] = {
        "cross_entropy": config.cross_entropy,
        "temperature": config.temperature,
        "squared_temperature": config.squared_temperature,
    }
    if config.name != "sinkd":
        name = config.name.replace("-", "_")
        divergence = f_divergence if name in F_NAMES else named
        return Objective(divergence=divergence(name, **config.options), **shared)
    options: dict[str, Any] = {"weight": 0.8, "rows": 1024, **config.options}
    weight, rows = float(options.pop("weight")), int(options.pop("rows"))
    term = partial(sinkd_loss, reduction="mean", **_keywords(sinkd_loss, options))
    return Objective(divergence=kl, batch_term=term, batch_weight=weight, batch_rows=rows, **shared)


def _keywords(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options as keywords of `function`, whole numbers where it counts. ConfigError for one it does not take."""
    from inspect import signature

    defaults = {name: p.default for name, p in signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    offered = {name for name, default in defaults.items() if isinstance(default, (int, float, str))} - {"reduction"}
    for name in options:
        if name not in offered:
            raise ConfigError(f"sinkd takes no option {name!r}: it takes weight, rows, {', '.join(sorted(offered))}")
    return {name: type(defaults[name])(value) for name, value in options.items()}


def check(config: DistillConfig) -> None:
    """Raise ConfigError for a combination that cannot work or would ignore an option."""
    objective, text = config.objective, config.data
    if config.teacher and not config.student:
        raise ConfigError("a teacher was named and no student: name the student's model directory too")
    if config.student and not config.teacher:
        raise ConfigError("a student was named and no teacher: name the teacher's model directory, cache or server too")
    if not config.seeds:
        raise ConfigError("seeds is empty: give at least one")
    if not 0 <= objective.on_policy <= 1:
        raise ConfigError(f"objective.on_policy is a share of the steps in [0, 1], got {objective.on_policy}")
    if objective.on_policy and not 1 <= objective.prompt < text.length:
        raise ConfigError(f"objective.prompt must lie in [1, {text.length - 1}] for blocks of {text.length} tokens")
    if text.length < 2:
        raise ConfigError(f"data.length must be at least 2 tokens, got {text.length}")
    if text.validation == "" and not 0 < text.holdout < 1:
        raise ConfigError(f"data.holdout is a share of the text in (0, 1), got {text.holdout}")
    if config.lora.rank < 0:
        raise ConfigError(f"lora.rank must be at least 0, got {config.lora.rank}")
    if config.lora.rank and not config.student:
        raise ConfigError("lora needs a student of your own with weights to adapt: name its directory")
    if config.baseline and objective.cross_entropy == 1:
        raise ConfigError(
            "the baseline is cross-entropy alone, and so is this objective: lower objective.cross_entropy"
        )


def baseline_of(config: DistillConfig) -> ObjectiveConfig:
    """The objective of the baseline: cross-entropy alone."""
    return replace(config.objective, name="kl", options={}, cross_entropy=1.0, on_policy=0.0)
