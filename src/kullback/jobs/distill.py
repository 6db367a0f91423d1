"""The main job: a teacher's distribution is brought into a student, on text, with a run directory as its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.core.config import load
from kullback.core.errors import ConfigError
from kullback.core.runs import Run
from kullback.jobs._options import as_default
from kullback.jobs._training import Listener, LoraSettings, TrainingConfig

if TYPE_CHECKING:
    from kullback.core.types import Divergence
    from kullback.distill.objective import Objective

_LABELS = 0.2  # the share of cross-entropy where none is named
_SHARED = ("cross_entropy", "temperature", "squared_temperature")  # what an objective may take from its configuration

__all__ = [
    "DistillConfig", "LoraSettings", "ObjectiveConfig", "TextConfig",
    "baseline_of", "check", "embedded", "objective_names", "objective_of", "plan", "resume", "run",
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
    """What is minimised: `name`, one of `objective_names()`, with its options, mixed with cross-entropy.

    cross_entropy: its share; left out, it is 0.2, and 0 for pld, which holds the label already. temperature: of both
    models' distributions, and for pld of the teacher's weights. on_policy: the share of steps on the student's own
    continuations of `prompt` tokens.
    """

    name: str = "kl"
    options: dict[str, float | str] = field(default_factory=dict)
    cross_entropy: float | None = None
    temperature: float = 1.0
    squared_temperature: bool = False
    on_policy: float = 0.0
    prompt: int = 16


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
    from kullback.distill.objective import Objective

    name = config.name.replace("-", "_")
    builder = _builders().get(name)
    if builder is not None:
        return builder(**_keywords(name, builder, config))
    _check_name(name)
    return Objective(
        divergence=_divergence(name, config.options),
        cross_entropy=_LABELS if config.cross_entropy is None else config.cross_entropy,
        temperature=config.temperature,
        squared_temperature=config.squared_temperature,
    )


def _divergence(name: str, options: Mapping[str, Any]) -> Divergence:
    """The divergence with its options. ConfigError for one that is missing, of another type, or out of range."""
    from kullback import divergences as room

    takes = {p.name: p.default for p in signature(getattr(room, name)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, default in takes.items():
        if default is Parameter.empty and option not in options:
            raise ConfigError(f"{name} needs objective.options.{option}, a number")
    defaults = {option: None if default is Parameter.empty else default for option, default in takes.items()}
    given = {
        option: as_default(f"objective.options.{option}", value, defaults[option])
        for option, value in options.items()
        if option in takes
    }
    room.named(name, **{**options, **given})  # also what it does not take is said before a run begins
    return room.f_divergence(name, **given) if name in room.F_NAMES else room.named(name, **given)


def objective_names() -> tuple[str, ...]:
    """Every name that ObjectiveConfig knows: the divergences, and the losses that are more than one."""
    from kullback.divergences import NAMES

    return tuple(sorted({*NAMES, *_builders()}))


_ELSEWHERE = {  # what is another objective with options, and methods of the room that are not of two models' logits
    "kd": "is kl here, with objective.temperature, objective.squared_temperature and objective.cross_entropy",
    "gkd": "is generalized_jsd here, with its beta, and objective.on_policy for the share of the student's own samples",
    "dml": "is bd_kd here with objective.options.mode=dml; two networks that both learn take OnlineDistillationTrainer",
    "listmle": "is pld here, with objective.options.weights=uniform",
    "dkd": "takes a classifier's labels apart from its other classes: kullback.distill.dkd_loss, in a loop of your own",
    "mcmi": "fine-tunes a teacher, before it is distilled: kullback.distill.MCMITeacherTrainer, and then kl here",
    "mdcs": "makes several experts of one classifier differ, without a teacher: kullback.distill.MDCSTrainer",
    "cs_ib": "trains a regressor from its inputs and representation: kullback.distill.CSIBRegressor",
    "didi": "distils a diffusion model into few steps: kullback.distill.DiDiTrainer",
}


def _check_name(name: str) -> None:
    """Raise ConfigError for what is no objective, with the place of a method of the room that is something else."""
    from difflib import get_close_matches

    names = objective_names()
    if name in _ELSEWHERE:
        raise ConfigError(f"{name} {_ELSEWHERE[name]}")
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(names)}"
        raise ConfigError(f"no objective is called {name!r}: {hint}")


def _builders() -> dict[str, Callable[..., Objective]]:
    """The objectives that are more than a divergence: what makes each, by name.

    A builder takes keywords that have defaults, numbers or strings: those of `_SHARED` that mean something to it, and
    its own options. Whether it can do with a truncated teacher or the student's own samples, the Objective says.
    """
    from kullback.distill.bd_kd_objective import bdkd_objective
    from kullback.distill.pld import pld_objective

    return {"bd_kd": bdkd_objective, "pld": pld_objective, "sinkd": _sinkd}


def _sinkd(
    *, weight: float = 0.8, rows: int = 1024, tau: float = 2.0, eps: float = 0.1, n_iters: int = 20,
    mode: str = "batchwise", estimator: str = "sharp", gradient: str = "envelope", cost: str = "l1", gather: int = 0,
    cross_entropy: float = _LABELS, temperature: float = 1.0, squared_temperature: bool = False,
) -> Objective:  # fmt: skip
    """KL with the Sinkhorn distance of `rows` rows beside it."""
    from functools import partial

    import torch

    from kullback.distill.objective import Objective
    from kullback.distill.sinkd import sinkd_loss
    from kullback.divergences import f_divergence

    options: dict[str, Any] = {
        "tau": tau, "eps": eps, "n_iters": n_iters, "mode": mode, "estimator": estimator, "gradient": gradient,
        "cost": cost, "gather": bool(gather), "reduction": "mean",
    }  # fmt: skip
    two = torch.zeros(2, 2)
    sinkd_loss(two, two, **{**options, "gather": False})  # what is out of range is said before a run begins
    if gather not in (0, 1):
        raise ConfigError(f"gather is 0 or 1, got {gather}")
    return Objective(
        divergence=f_divergence("kl"), batch_term=partial(sinkd_loss, **options), batch_weight=weight, batch_rows=rows,
        cross_entropy=cross_entropy, temperature=temperature, squared_temperature=squared_temperature,
    )  # fmt: skip


def _keywords(name: str, builder: Callable[..., Any], config: ObjectiveConfig) -> dict[str, Any]:
    """What the configuration says to a builder. ConfigError for what it does not take or cannot read."""
    takes = {p.name: p.default for p in signature(builder).parameters.values() if p.kind is Parameter.KEYWORD_ONLY}
    own = sorted(takes.keys() - set(_SHARED))
    for option in config.options:
        if option not in own:
            raise ConfigError(f"{name} takes no option {option!r}: it takes {', '.join(own)}")
    unsaid = {part.name: part.default for part in fields(ObjectiveConfig)}
    said = {key: getattr(config, key) for key in _SHARED if getattr(config, key) != unsaid[key]}
    for key in said.keys() - takes.keys():
        raise ConfigError(f"objective.{key} would do nothing to {name}: leave it out")
    given = {**said, **config.options}
    return {key: as_default(f"objective.options.{key}", value, takes[key]) for key, value in given.items()}


def check(config: DistillConfig) -> None:
    """Raise ConfigError for a combination that cannot work or would ignore an option."""
    objective, text = config.objective, config.data
    if config.teacher and not config.student:
        raise ConfigError("a teacher was named and no student: name the student's model directory too")
    if config.student and not config.teacher:
        raise ConfigError("a student was named and no teacher: name the teacher's model directory, cache or server too")
    if not config.seeds:
        raise ConfigError("seeds is empty: give at least one")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds has one twice, {list(config.seeds)}: each is a training of its own")
    if not 0 <= objective.on_policy <= 1:
        raise ConfigError(f"objective.on_policy is a share of the steps in [0, 1], got {objective.on_policy}")
    if objective.on_policy and not 1 <= objective.prompt < text.length:
        raise ConfigError(f"objective.prompt must lie in [1, {text.length - 1}] for blocks of {text.length} tokens")
    if text.length < 2:
        raise ConfigError(f"data.length must be at least 2 tokens, got {text.length}")
    if text.validation_blocks < 1:
        raise ConfigError(f"data.validation_blocks must be at least 1, got {text.validation_blocks}")
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
    _check_objective(config)


def _check_objective(config: DistillConfig) -> None:
    """Raise ConfigError for an objective that its teacher or its texts cannot serve."""
    from kullback.distill.teachers import is_teacher_cache

    name, teacher, objective = config.objective.name, config.teacher, objective_of(config.objective)
    truncated = teacher.startswith(("http://", "https://")) or (teacher != "" and is_teacher_cache(teacher))
    if truncated and objective.needs_whole_teacher:
        raise ConfigError(
            f"{name} compares whole distributions, and a cache or a server has the likeliest tokens alone: name the "
            "teacher's model directory as the teacher"
        )
    if config.objective.on_policy:
        objective.on_own_samples()


def baseline_of(config: DistillConfig) -> ObjectiveConfig:
    """The objective of the baseline: cross-entropy alone."""
    return replace(config.objective, name="kl", options={}, cross_entropy=1.0, on_policy=0.0)
