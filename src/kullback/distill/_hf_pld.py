"""PLD inside transformers.Trainer, for classifiers: only the loss differs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from kullback.core.errors import ConfigError
from kullback.distill.pld import PLDLoss
from kullback.divergences.plackett_luce import Ranking

__all__ = ["PLDTrainer"]


class PLDTrainer(Trainer):
    """A Trainer of a classifier whose loss is PLD against a teacher, or against rankings kept from one.

    teacher: a model that takes the same inputs, run without a gradient; None where batches hold `order` and `weights`
    [B, K], as those of `WithRankings` do (then set remove_unused_columns=False). loss: a PLDLoss. The rest is the
    Trainer's. A batch has labels [B] and the model's inputs; the loss is divided by the labels of the whole accumulated
    batch over all processes. Raises ConfigError for a batch with neither teacher nor rankings, or without labels.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, teacher: nn.Module | None = None, loss: PLDLoss | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss = PLDLoss() if loss is None else loss
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.loss.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # asks the Trainer for the number of labels of the accumulated batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = dict(inputs)
        labels, order, weights = (given.pop(name, None) for name in ("labels", "order", "weights"))
        if labels is None or (self.teacher is None and (order is None or weights is None)):
            named = ", ".join(inputs)
            raise ConfigError(f"PLD needs labels, and a teacher or order and weights: this batch holds {named} alone")
        outputs = model(**given)
        if order is not None and weights is not None:
            loss = self.loss.of_ranking(Ranking(order, weights), outputs.logits, labels, count=num_items_in_batch)
        else:
            with torch.no_grad():
                taught = self.teacher(**given).logits  # type: ignore[misc]
            loss = self.loss(taught, outputs.logits, labels, count=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        return (loss, outputs) if return_outputs else loss
