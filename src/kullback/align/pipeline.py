"""Fine-tuning and preference training as one object: the first at a reduced rate, the second from where it ends.

The remedy of arXiv 2507.00018 against the drift of fine-tuning is a learning rate divided by about five at the same
number of steps. What the pipeline settles is who is whose reference: the first stage is compared with the model as it
came, the second with the model that the first has left (so that DPO starts at log 2). How a stage trains is a function:
a loop of your own, or `kullback.align._hf_pipeline.trained_by_trainer`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from kullback.align.methods import Method
from kullback.core.errors import CheckpointError, ConfigError
from kullback.core.files import atomic_directory
from kullback.divergences import FDivergence

__all__ = ["PipelineResult", "PostTrainingPipeline", "Stage", "TrainStage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage is told: its name, the method that gives its loss, the learning rate and the optimiser's steps."""

    name: str
    method: Method
    learning_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (0.0 < self.learning_rate < float("inf")) or self.steps < 1 or self.steps != int(self.steps):
            raise ConfigError(
                f"a stage has a positive learning rate and a whole number of steps, one at least, got "
                f"{self.learning_rate} and {self.steps}"
            )
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(f"a stage's name is also its folder's, without a slash, not {self.name!r}")


class TrainStage(Protocol):
    """Trains the model in place as the stage says; the reference, frozen, is what its method compares with."""

    def __call__(self, model: Any, reference: Any, stage: Stage) -> None: ...


class PipelineResult(NamedTuple):
    """The model as it came and after each stage (copies, frozen but for the last), and what was measured after each."""

    base: Any
    tuned: Any
    final: Any
    reports: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PostTrainingPipeline:
    """Two stages, sft and preference. lr_divisor: what the first one's learning rate is divided by; its steps stay.

    Raises ConfigError for a divisor below 1 and for stages of one name.

    >>> from kullback.align.methods import Preference, Supervised
    >>> pipeline = PostTrainingPipeline(
    ...     sft=Stage(name="sft", method=Supervised(), learning_rate=1e-3, steps=100),
    ...     preference=Stage(name="dpo", method=Preference(), learning_rate=5e-7, steps=100),
    ... )
    >>> [(stage.name, stage.learning_rate) for stage in pipeline.stages]
    [('sft', 0.0002), ('dpo', 5e-07)]
    """

    sft: Stage
    preference: Stage
    lr_divisor: float = 5.0
    stages: tuple[Stage, Stage] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1.0 <= self.lr_divisor < float("inf"):
            raise ConfigError(f"lr_divisor reduces the learning rate of fine-tuning: 1 or more, got {self.lr_divisor}")
        if self.sft.name == self.preference.name:
            raise ConfigError(f'both stages are called "{self.sft.name}": give them two names')
        reduced = replace(self.sft, learning_rate=self.sft.learning_rate / self.lr_divisor)
        object.__setattr__(self, "stages", (reduced, self.preference))

    def run(
        self,
        model: nn.Module,
        train: TrainStage,
        *,
        measure: Callable[[nn.Module, nn.Module], Mapping[str, float]] | None = None,
        folder: Path | None = None,
    ) -> PipelineResult:
        """Train the model through both stages, in place.

        measure(base, model): numbers to report after each stage, such as `drift_report` of samples. folder: keeps the
        weights after each stage, and a stage that is finished there is loaded and not trained again.
        Raises CheckpointError for a folder that another pipeline has written.
        """
        base = _frozen(model)
        reference, reports = base, {}
        for stage in self.stages:
            place = None if folder is None else Path(folder) / stage.name
            if place is None or not _loaded(model, stage, place):
                train(model, reference, stage)
                if place is not None:
                    _save(model, stage, place)
            if measure is not None:
                reports[stage.name] = dict(measure(base, model))
            if stage is self.stages[0]:
                reference = _frozen(model)
        return PipelineResult(base, reference, model, reports)


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _description(value: Any) -> Any:
    """What a stage consists of, the same in every process: functions, which are not, are left out."""
    if isinstance(value, FDivergence):
        return value.name
    if is_dataclass(value):
        parts = {part.name: _description(getattr(value, part.name)) for part in fields(value) if part.init}
        return {"type": type(value).__name__, **parts}
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def _save(model: nn.Module, stage: Stage, place: Path) -> None:
    from safetensors.torch import save_file

    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(place) as new:
        # Copies, for the format refuses tensors that share memory, as tied embeddings do.
        save_file({key: value.detach().clone().contiguous() for key, value in model.state_dict().items()},
                  new / "model.safetensors")  # fmt: skip
        (new / "stage.json").write_text(json.dumps(_description(stage), indent=1))


def _loaded(model: nn.Module, stage: Stage, place: Path) -> bool:
    """Whether the stage was finished before; the model then has its weights."""
    from safetensors.torch import load_file

    if not (place / "stage.json").exists():
        return False
    if json.loads((place / "stage.json").read_text()) != _description(stage):
        raise CheckpointError(f"{place} has a stage of other settings: name a new folder, or go on with those it has")
    model.load_state_dict(load_file(place / "model.safetensors"))
    return True
