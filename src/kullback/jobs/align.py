"""The align job: a language model's distribution is brought toward what a reward or preferences ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kullback.core.config import load
from kullback.core.errors import ConfigError
from kullback.core.runs import Run
from kullback.jobs._training import Listener, LoraSettings, TrainingConfig

__all__ = [
    "AlignConfig", "ExampleConfig", "MethodConfig", "RewardConfig", "SamplingConfig",
    "check", "embedded", "plan", "resume", "run",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleConfig:
    """The examples. train: a JSONL or Parquet file or a folder of them, empty for sums at hand; validation: the same,
    empty to hold out the share `holdout` of the prompts; prompt_length: tokens kept of a prompt, its end; length:
    tokens of a completion at most; validation_prompts: at most.
    """

    train: str = ""
    validation: str = ""
    holdout: float = 0.1
    prompt_length: int = 512
    length: int = 256
    validation_prompts: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """The method, by name, and its options (see `kullback.jobs._align_methods`)."""

    name: str = "grpo"
    options: dict[str, bool | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """The reward. name: exact, regex, arithmetic, "module:function", "file.py:function" or the directory of a reward
    model; pattern: of exact, with a group around the answer, or of regex; seconds: what one call may take; on_error:
    "stop", or "zero" to give the completions of a call that failed nothing and go on; correct: a completion whose
    reward is over this counts as right in pass@k. pairwise: the function is a judge, of (prompts, firsts, seconds) to
    the chances that the first is preferred, and the reward is a completion's mean chance against those of its prompt.
    remembered: what the judge said of so many pairs is used again in later steps, 0 for one that changes its mind; a
    judge with an attribute `symmetric` that is true is asked in one order of the two.
    """

    name: str = ""
    pattern: str = ""
    seconds: float = 60.0
    on_error: Literal["stop", "zero"] = "stop"
    correct: float = 0.5
    pairwise: bool = False
    remembered: int = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Sampling. group: completions a prompt and step, of methods that learn from samples; temperature: of the policy;
    validation: completions a validation prompt; batch: prompts that are sampled at once, 0 for all; server: the address
    of an OpenAI-compatible server that draws the training completions in the policy's place, from a copy of it: they
    have the server's log-probabilities, to which the ratio is clipped; filter: balanced, easy, hard or nonzero, to
    train on groups of that difficulty only, drawing at most most_draws prompts a step for them; filter_threshold: t,
    where the share of right answers is from t on (easy), up to 1 - t (hard), or both (balanced); tracked: remember each
    prompt's pass rate, of late above all, and draw those that are likely to be kept.
    """

    group: int = 8
    temperature: float = 1.0
    validation: int = 8
    batch: int = 0
    server: str = ""
    filter: str = ""
    filter_threshold: float = 0.25
    tracked: bool = False
    most_draws: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignConfig:
    """The whole configuration of `kullback align`.

    model: a model directory, empty for the embedded one; reference: directories of the reference policy, none for the
    model as it starts out, several for their average (a soup), with reference_weights, equal ones by default; or the
    address of an OpenAI-compatible server of one, asked how probable it finds the tokens drawn. Batches are of
    `training.batch` prompts or pairs.
    """

    model: str = ""
    reference: tuple[str, ...] = ()
    reference_weights: tuple[float, ...] = ()
    data: ExampleConfig = field(default_factory=ExampleConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(learning_rate=1e-6, batch=16, weight_decay=0.0)
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    seeds: tuple[int, ...] = (0,)


def embedded() -> AlignConfig:
    """The job that runs when nothing is named: a small model that adds and is often wrong learns to be right."""
    return AlignConfig(
        data=ExampleConfig(length=4, validation_prompts=40),
        reward=RewardConfig(name="exact"),
        sampling=SamplingConfig(validation=16),
        training=TrainingConfig(
            steps=150, batch=32, learning_rate=1e-3, weight_decay=0.0, schedule="constant", evaluate_every=50,
            save_every=50,
        ),
        seeds=(0, 1, 2),
    )  # fmt: skip


def run(config: AlignConfig, out: Path, *, listen: Listener | None = None, resume: bool = False) -> Run:
    """Align and return the finished run directory `out`; with resume, go on with what is missing in it.

    The directory ends with model/, report.json, samples.jsonl, curves.csv and figures/. Raises ConfigError, DataError
    or ShapeError for input that cannot work, RewardError for a reward that fails, CheckpointError for a directory that
    cannot be written or resumed, and Interrupted after a signal, with everything saved.
    """
    from kullback.jobs._alignment import Alignment
    from kullback.jobs._models import without_bars

    with without_bars():
        work = Alignment(config, out, listen=listen or (lambda event: None), resume=resume)
        for part in work.parts:
            work.train(part)
        return work.finish()


def resume(out: Path, *, listen: Listener | None = None) -> Run:
    """Go on with the run directory `out` under the configuration it was started with."""
    return run(load(AlignConfig, Run.open(out).config), out, listen=listen, resume=True)


def plan(config: AlignConfig) -> dict[str, Any]:
    """What `run` would do, without training: examples, bytes of memory and minutes, from a few timed steps."""
    from kullback.jobs._models import without_bars
    from kullback.jobs._plan import estimate_alignment

    with without_bars():
        return estimate_alignment(config)


def check(config: AlignConfig) -> None:
    """Raise ConfigError for a combination that cannot work or would ignore an option."""
    data, sampling = config.data, config.sampling
    if config.data.train and not config.model:
        raise ConfigError("data was named and no model: name the model directory to align too")
    if config.model and not config.data.train:
        raise ConfigError("a model was named and no data: name a JSONL or Parquet file of prompts or pairs too")
    if config.reference_weights and len(config.reference_weights) != len(config.reference):
        raise ConfigError(
            f"reference_weights are one a reference, got {len(config.reference_weights)} for {len(config.reference)}"
        )
    if not config.seeds:
        raise ConfigError("seeds is empty: give at least one")
    if min(data.prompt_length, data.length, data.validation_prompts) < 1:
        raise ConfigError("data.prompt_length, data.length and data.validation_prompts must be at least 1")
    if data.validation == "" and not 0 < data.holdout < 1:
        raise ConfigError(f"data.holdout is a share of the prompts in (0, 1), got {data.holdout}")
    if sampling.group < 1 or sampling.validation < 2 or sampling.batch < 0:
        raise ConfigError(
            "sampling.group is at least 1, sampling.validation at least 2 and sampling.batch 0 or more: got "
            f"{sampling.group}, {sampling.validation} and {sampling.batch}"
        )
    if sampling.tracked and not sampling.filter:
        raise ConfigError("sampling.tracked predicts what sampling.filter keeps: name a filter, or leave it out")
    if not sampling.temperature > 0:
        raise ConfigError(f"sampling.temperature must be > 0, got {sampling.temperature}")
    if sampling.server and sampling.temperature != 1:
        raise ConfigError(
            f"a server answers with log-probabilities at temperature 1 and sampling.temperature is "
            f"{sampling.temperature}: leave one of them out"
        )
    if config.reward.remembered < 0:
        raise ConfigError(f"reward.remembered is a number of pairs, 0 for none, got {config.reward.remembered}")
    if not config.reward.seconds > 0:
        raise ConfigError(f"reward.seconds must be > 0, got {config.reward.seconds}")
    if config.lora.rank < 0:
        raise ConfigError(f"lora.rank must be at least 0, got {config.lora.rank}")
    if config.lora.rank and not config.model:
        raise ConfigError("lora needs a model of your own with weights to adapt: name its directory")
