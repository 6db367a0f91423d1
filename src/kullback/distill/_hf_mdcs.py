"""MDCS inside transformers.Trainer: batches of two views, class counts of the whole training set.

Shapes: b samples, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.distill._averages import WeightAverage
from kullback.distill.mdcs import MDCSLoss

__all__ = ["MDCSTrainer", "TwoViews"]

_AVERAGE = "teacher_average.safetensors"


class TwoViews:
    """A collator: every item passes through two transformations, and both views are stacked, the weak ones first.

    weak, strong: from an item's `field` to a tensor; items are mappings with that field and "label" or "labels". The
    batch has the field [2b, ...] and labels [b].
    """

    def __init__(
        self, weak: Callable[[Any], Tensor], strong: Callable[[Any], Tensor], field: str = "pixel_values"
    ) -> None:
        self.weak, self.strong, self.field = weak, strong, field

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [item.get("label", item.get("labels")) for item in items]
        if not items or any(label is None for label in labels) or any(self.field not in item for item in items):
            raise DataError(f'every item has a field {self.field!r} and a "label" or "labels"; one of these has not')
        views = [view(item[self.field]) for view in (self.weak, self.strong) for item in items]
        shapes = {tuple(view.shape) for view in views}
        if len(shapes) > 1:
            raise ShapeError(f"both views of all items have one shape, to be stacked; these have {sorted(shapes)}")
        return {self.field: torch.stack(views), "labels": torch.as_tensor(labels)}


class MDCSTrainer(Trainer):
    """A Trainer of a multi-expert model on batches of two views, as `TwoViews` makes them.

    The model's output holds the plain logits [E, 2b, C] of its experts under "logits", as that of `MultiExpert` does;
    loss: an `MDCSLoss`, whose ramp follows the Trainer's epoch. The loss is a mean over samples, so processes average
    it. A batch with as many labels as views is taken as it is, both views the same: that is how evaluation reads one.
    teacher_decay, in [0, 1): the experts of the weak view are those of the weights' moving average over the steps,
    in evaluation mode, at one more pass over the weak views; 0 are the weights as they are. The average starts where
    training does, and checkpoints hold it. Raises ConfigError for another decay, and for weights in shards.
    """

    def __init__(self, *args: Any, loss: MDCSLoss, teacher_decay: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss.to(self.args.device)
        self.model_accepts_loss_kwargs = False
        self.average = None if teacher_decay is None else WeightAverage(teacher_decay)
        if self.average is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ConfigError("an average of the weights needs them whole in every process: leave the shards out")
            self.add_callback(_Averaging(self))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "labels" not in inputs:
            raise DataError(f"MDCS learns from labels, and this batch holds {', '.join(inputs)} alone")
        labels = inputs["labels"]
        views = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**views)
        if "logits" not in outputs or outputs["logits"].ndim < 3:
            raise ShapeError('the model gives no logits [E, 2b, C] under "logits": wrap it in MultiExpert')
        logits = outputs["logits"]
        twice = logits.shape[1] == 2 * len(labels)
        weak, strong = logits.chunk(2, dim=1) if twice else (logits, logits)
        self.loss.set_epoch(self.state.epoch or 0.0)
        teacher = self._teacher(model, views, len(labels)) if self.average is not None else None
        loss = self.loss(weak, strong, labels, teacher_logits=teacher)["loss"]
        mean = outputs["output"] if "output" in outputs else logits.mean(0)
        return (loss, {"logits": mean[: len(labels)]}) if return_outputs else loss

    def _teacher(self, model: Any, views: dict[str, Any], rows: int) -> Tensor | None:
        """The averaged experts' logits [E, b, C] of the weak views; None before there is an average."""
        if self.average is None or not self.average.held:
            return None
        weak = {name: value[:rows] if isinstance(value, Tensor) else value for name, value in views.items()}
        with self.compute_loss_context_manager():
            found: Tensor = self.average(self.accelerator.unwrap_model(model), **weak)["logits"]
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            from safetensors.torch import save_file

            save_file({name: x.contiguous() for name, x in self.average.held.items()}, Path(output_dir) / _AVERAGE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            from safetensors.torch import load_file

            place = Path(checkpoint) / _AVERAGE
            if not place.is_file():
                raise DataError(f"{checkpoint} has no averaged weights: train from the start, or without teacher_decay")
            self.average.load(load_file(place), self.accelerator.unwrap_model(self.model))


class _Averaging(TrainerCallback):
    """Starts the average with training, where no checkpoint gave one, and moves it after each step."""

    def __init__(self, trainer: MDCSTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None and state.global_step == 0:
            self.trainer.average.start(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.move(self.trainer.accelerator.unwrap_model(self.trainer.model))
