"""One training of a job: the Trainer's arguments, its events in the run, signals, and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from kullback.core.errors import ConfigError, Interrupted, MissingExtra
from kullback.core.runs import Run, stop_signals

__all__ = ["Listener", "LoraSettings", "TrainingConfig", "on_cpu", "train", "training_arguments"]

Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How a student is trained. batch: sequences a step, over all processes; the gradient is that of the whole batch.

    accumulate: micro-batches a process splits its part of the batch into, for memory; warmup: the share of the steps;
    clip: largest gradient norm, 0 for none; save_every and evaluate_every: steps; keep: checkpoints kept; fsdp:
    shard the student over the processes, with fsdp_options as in transformers' fsdp_config; report_to: "tensorboard",
    "trackio".
    """

    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    fsdp_options: dict[str, bool | int | str] = field(default_factory=dict)
    save_every: int = 200
    keep: int = 2
    evaluate_every: int = 100
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "keep", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate must be > 0, got {self.learning_rate}")
        if self.fsdp_options and not self.fsdp:
            raise ConfigError("training.fsdp_options does nothing without training.fsdp: set it to true")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"training.warmup is a share of the steps in [0, 1), got {self.warmup}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters as the only trainable weights; rank 0 trains the whole model."""

    rank: int = 0
    alpha: int = 16
    targets: tuple[str, ...] = ()


def training_arguments(config: TrainingConfig, run: Run, *, processes: int) -> TrainingArguments:
    """The Trainer's arguments. Raises ConfigError when the batch does not divide, MissingExtra without a tracker."""
    parts = processes * config.accumulate
    if config.batch % parts:
        raise ConfigError(
            f"training.batch is {config.batch}, which {processes} processes times {config.accumulate} micro-batches do "
            f"not divide: take a multiple of {parts}"
        )
    for tracker in config.report_to:
        _check_tracker(tracker)
    return TrainingArguments(
        output_dir=str(run.path / "trainer"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch // parts,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        bf16=config.precision == "bfloat16",
        fsdp=cast(Any, config.fsdp or None),
        fsdp_config={"state_dict_type": "FULL_STATE_DICT", **config.fsdp_options} if config.fsdp else None,
        use_cpu=on_cpu(),
        ddp_find_unused_parameters=False,
        seed=run.seed,
        data_seed=run.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        average_tokens_across_devices=True,
        dataloader_pin_memory=not on_cpu(),
        **_checkpointing(config.gradient_checkpointing),
    )


def on_cpu() -> bool:
    """Whether this machine has no accelerator; then several processes speak over gloo."""
    return not torch.accelerator.is_available()


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Recomputed activations, under the name that this version of transformers has for them."""
    known = TrainingArguments.__dataclass_fields__
    return {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": wanted}


def train(trainer: Any, run: Run, listen: Listener, evaluate: Callable[[], dict[str, float]], *, every: int) -> None:
    """Train from the run's latest checkpoint, if there is one, and leave events behind.

    `evaluate` is called before the first step, every `every` steps, and at the end. SIGINT and SIGTERM save a
    checkpoint and raise Interrupted; a loss that is not finite raises ConfigError and leaves the last checkpoint as it
    is.
    """
    checkpoint = run.latest_checkpoint()
    with stop_signals() as signals:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_RunEvents(run, listen, evaluate, every, signals))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if signals.requested and trainer.state.global_step < trainer.args.max_steps:
            raise Interrupted(f"stopped after step {trainer.state.global_step} of {trainer.args.max_steps}, all saved")


class _RunEvents(TrainerCallback):  # type: ignore[misc]
    """Losses and evaluations into the run and to the listener; stop requests into the Trainer's control."""

    def __init__(
        self, run: Run, listen: Listener, evaluate: Callable[[], dict[str, float]], every: int, signals: Any
    ) -> None:
        self.run, self.listen, self.evaluate, self.every = run, listen, evaluate, every
        self.signals, self.started, self.first = signals, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if state.global_step == 0:
            self._evaluate(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = (state.global_step - self.first) / max(time.monotonic() - self.started, 1e-9)
        self.listen({"kind": "progress", "step": state.global_step, "steps": state.max_steps, "steps_a_second": rate})
        last = state.global_step >= state.max_steps
        if last or state.global_step % self.every == 0:
            self._evaluate(state)
        if _any_process(self.signals.requested, args.device):
            control.should_save = control.should_training_stop = True
        control.should_save |= last

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if not abs(logs["loss"]) < float("inf"):
            raise ConfigError(
                f"the loss is {logs['loss']} at step {state.global_step}: lower training.learning_rate, or check the "
                "data; the last checkpoint is kept"
            )
        if state.is_world_process_zero:
            told = {key: value for key, value in logs.items() if key.startswith("metric/")}
            self.run.event(
                "step", step=state.global_step, loss=logs["loss"], learning_rate=logs.get("learning_rate"),
                gradient_norm=logs.get("grad_norm"), **told,
            )  # fmt: skip
        self.listen({"kind": "loss", "step": state.global_step, "loss": logs["loss"]})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.listen({"kind": "saved", "step": state.global_step})

    def _evaluate(self, state: Any) -> None:
        found = self.evaluate()
        if state.is_world_process_zero:
            self.run.event("evaluation", step=state.global_step, **found)
        self.listen({"kind": "evaluation", "step": state.global_step, **found})


def _any_process(requested: bool, device: Any) -> bool:
    """Whether any process was asked to stop: all of them save the same step."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return requested
    flag = torch.tensor(float(requested), device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())


def _check_tracker(name: str) -> None:
    from importlib.util import find_spec

    if name not in ("tensorboard", "trackio"):
        raise ConfigError(f"training.report_to knows tensorboard and trackio, got {name!r}")
    if find_spec(name) is None:
        raise MissingExtra(name, extra=name)
