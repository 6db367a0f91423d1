"""Fine-tuning a teacher for conditional mutual information inside transformers.Trainer: only the loss differs.

Shapes: B batch, T positions, C outputs (classes, or the vocabulary of a language model).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from kullback.core.errors import ConfigError
from kullback.distill.mcmi import Bonus, CMIMeter, mcmi_loss
from kullback.distill.mcmi_teacher import CentroidTracker, Refresh

__all__ = ["MCMITeacherTrainer"]


class _Renew(TrainerCallback):
    def __init__(self, trainer: MCMITeacherTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.renew_centroids()


class MCMITeacherTrainer(Trainer):
    """A Trainer whose loss is CE - lam I(X; Yhat | Y), the centroids renewed by a pass over the data, see `refresh`.

    The model gives logits [B, C] for a batch with labels [B], as image and text classifiers do. `lam`, `refresh`,
    `decay`, `train_mode` and `bonus` are those of `mcmi_loss` and `CentroidTracker`; set the arguments' epochs to about
    20 and their learning rate to half of the first training's. Logs have "ce" and "cmi" beside the loss, evaluations
    "eval_cmi", "eval_ce" and "eval_accuracy": metric_for_best_model="eval_accuracy" keeps the best teacher.

    Language models, an extension: with group_fn, which takes labels to one of num_groups clusters, logits [B, T, C] at
    position t predict label t + 1 and the information is conditioned on its cluster; -100 is left out.
    """

    def __init__(
        self,
        *args: Any,
        lam: float,
        refresh: Refresh = "epoch",
        decay: float = 0.9999,
        train_mode: bool = False,
        bonus: Bonus = "cmi",
        group_fn: Callable[[Tensor], Tensor] | None = None,
        num_groups: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not lam >= 0.0:
            raise ConfigError(f"lam is 0 or more and is {lam}: the information is subtracted from the loss")
        if (group_fn is None) != (num_groups is None):
            raise ConfigError("group_fn and num_groups go together: give both, or neither for classifiers")
        super().__init__(*args, **kwargs)
        self.lam, self.bonus, self.group_fn, self.num_groups = lam, bonus, group_fn, num_groups
        self.tracker: CentroidTracker | None = None
        self._tracking: dict[str, Any] = {"refresh": refresh, "decay": decay, "train_mode": train_mode}
        self._terms: list[Tensor] = []
        self._meter: CMIMeter | None = None
        self.model_accepts_loss_kwargs = False  # a mean over the batch, as the information is
        self.add_callback(_Renew(self))

    def _rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, C], labels [n] and groups [n] of what counts."""
        if self.group_fn is None:
            return logits, labels, labels
        logits, labels = logits[:, :-1].flatten(0, -2), labels[:, 1:].flatten()
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        return logits, labels, self.group_fn(labels)

    @torch.no_grad()
    def renew_centroids(self) -> None:
        """Set the centroids by a pass over the training data, all processes together; "never" does so only once."""
        if self.tracker is not None and self.tracker.refresh == "never":
            return
        model: Any = self.model
        meter = None
        training = model.training
        model.train(self._tracking["train_mode"])
        try:
            for inputs in self.get_train_dataloader():
                inputs = self._prepare_inputs(inputs)
                logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
                rows = self._rows(logits, inputs["labels"])
                meter = self._new_meter(logits.shape[-1]) if meter is None else meter
                meter.update(*rows)
        finally:
            model.train(training)
        if meter is None:
            raise ConfigError("centroids are means over the training data, and it has no batch: give a train_dataset")
        if self.tracker is None:
            self.tracker = CentroidTracker(len(meter.count), **self._tracking)
        self.tracker.set(meter.all_reduce().centroids())

    def _new_meter(self, classes: int) -> CMIMeter:
        return CMIMeter(classes, num_groups=self.num_groups)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits, labels, groups = self._rows(outputs.logits, inputs["labels"])
        if self.tracker is None:  # evaluation before training
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            return (loss, outputs) if return_outputs else loss
        if model.training:
            self.tracker.update(logits.detach().float().softmax(-1), groups)
        centroids = self.tracker.centroids.to(logits.device)
        terms = mcmi_loss(logits, labels, centroids, lam=self.lam, bonus=self.bonus, groups=groups)
        if model.training:
            self._terms.append(torch.stack([terms.ce.detach(), terms.cmi.detach()]))
        return (terms.loss, outputs) if return_outputs else terms.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._terms and "loss" in logs:
            ce, cmi = torch.stack(self._terms).mean(0).tolist()
            logs |= {"ce": ce, "cmi": cmi}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if logits is not None and labels is not None:
            if self._meter is None:
                self._meter = self._new_meter(logits.shape[-1])
            self._meter.update(*self._rows(logits, labels))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._meter = None
        output = super().evaluation_loop(*args, **kwargs)
        if self._meter is not None:
            meter = self._meter.all_reduce()
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_cmi"] = meter.cmi
            output.metrics[f"{prefix}_ce"] = meter.mean_cross_entropy
            output.metrics[f"{prefix}_accuracy"] = meter.accuracy
        return output
