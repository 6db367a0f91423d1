"""MDCS inside transformers.Trainer: batches of two views, class counts of the whole training set.

Shapes: b samples, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kullback.core.errors import DataError, ShapeError
from kullback.distill.mdcs import MDCSLoss

__all__ = ["MDCSTrainer", "TwoViews"]


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
    """

    def __init__(self, *args: Any, loss: MDCSLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss.to(self.args.device)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "labels" not in inputs:
            raise DataError(f"MDCS learns from labels, and this batch holds {', '.join(inputs)} alone")
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if "logits" not in outputs or outputs["logits"].ndim < 3:
            raise ShapeError('the model gives no logits [E, 2b, C] under "logits": wrap it in MultiExpert')
        logits = outputs["logits"]
        twice = logits.shape[1] == 2 * len(labels)
        weak, strong = logits.chunk(2, dim=1) if twice else (logits, logits)
        self.loss.set_epoch(self.state.epoch or 0.0)
        loss = self.loss(weak, strong, labels)["loss"]
        mean = outputs["output"] if "output" in outputs else logits.mean(0)
        return (loss, {"logits": mean[: len(labels)]}) if return_outputs else loss
