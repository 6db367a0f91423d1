"""The stages of `pipeline.PostTrainingPipeline` inside transformers.Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainingArguments

from kullback.align._hf import AlignTrainer, frozen_reference
from kullback.align.pipeline import Stage, TrainStage
from kullback.core.errors import ConfigError

__all__ = ["trained_by_trainer"]


def trained_by_trainer(
    arguments: TrainingArguments,
    datasets: Mapping[str, Any],
    data_collator: Callable[[list[Any]], dict[str, Any]],
    **options: Any,
) -> TrainStage:
    """How a stage of the pipeline trains with `AlignTrainer`; datasets: by the names of the stages.

    The stage's learning rate and steps stand in for those of the arguments, and each stage writes into a folder of its
    own in their output_dir. options: further keywords of the trainer, such as callbacks. Raises ConfigError for a stage
    without a data set, when it begins.
    """

    def train(model: Any, reference: Any, stage: Stage) -> None:
        if stage.name not in datasets:
            names = ", ".join(map(repr, datasets)) or "none"
            raise ConfigError(f"stage {stage.name!r} has no data set: there are {names}, name one for each stage")
        own = replace(
            arguments, learning_rate=stage.learning_rate, max_steps=stage.steps,
            output_dir=f"{arguments.output_dir}/{stage.name}",
        )  # fmt: skip
        trainer = AlignTrainer(
            model=model, args=own, train_dataset=datasets[stage.name], data_collator=data_collator,
            method=stage.method, reference=frozen_reference(reference) if stage.method.needs_reference else None,
            **options,
        )  # fmt: skip
        trainer.train()

    return train
