"""Checkpoints of a transformers.Trainer inside a run directory: safetensors and JSON, whole or not at all.

The Trainer's own checkpoints are pickled and written in place. `RunCheckpoints` goes in front of a Trainer class and
keeps everything else of it: the same model files, the optimiser, the schedule, the randomness and the position.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.tensor import DTensor

from kullback.core.checkpoint import load_state, save_state
from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.core.runs import Run

__all__ = ["RunCheckpoints"]

_FULL = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


class RunCheckpoints:
    """A mixin for transformers.Trainer: `class T(RunCheckpoints, Trainer)`, then `trainer.run = run`.

    A Trainer with a state of its own, the same in all processes, has `extra_state()` and `load_extra_state(state)`;
    with one of each process `process_state()` and `load_process_state(state)`.
    A checkpoint may be resumed by another number of processes: the batches are the same, and what processes draw by
    themselves (dropout, their own samples) is drawn anew. Raises CheckpointError when a checkpoint cannot be written or
    read, ConfigError for weights that are not finite.
    """

    run: Run
    keep_checkpoints: int = 2

    # What transformers.Trainer brings.
    accelerator: Any
    args: Any
    state: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    is_fsdp_enabled: bool

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self._check_finite()
        self.store_flos()  # type: ignore[attr-defined]
        with self._shared_folder() as folder:
            weights = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
            if self.args.should_save:
                unwrapped = self.accelerator.unwrap_model(self.model)
                unwrapped.save_pretrained(folder, state_dict=weights)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.run.prune_checkpoints(self.keep_checkpoints)

    def _check_finite(self) -> None:
        """Raise ConfigError in every process when a weight is not finite, before it replaces a good checkpoint."""
        weights = [weight.detach() for weight in self.model.parameters()]
        local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        sound = torch.stack([torch.isfinite(weight).all() for weight in local]).all()
        if self.accelerator.reduce((~sound).float()) > 0:
            raise ConfigError(
                f"weights are not finite after step {self.state.global_step}: lower training.learning_rate, or check "
                "the data; the last checkpoint is kept"
            )

    @contextmanager
    def _shared_folder(self) -> Iterator[Path]:
        """The main process makes the folder and moves it into place; the others write into it meanwhile."""
        if not self.accelerator.is_main_process:
            (name,) = broadcast_object_list([None])
            yield Path(name)
        else:
            with self.run.checkpoint(self.state.global_step) as folder:
                broadcast_object_list([str(folder)])
                yield folder
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            optimizer = sharded.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_FULL)
        else:
            optimizer = self.optimizer.state_dict()
        if self.args.should_save:
            save_state(Path(output_dir), "optimizer", optimizer)
            save_state(Path(output_dir), "schedule", self.lr_scheduler.state_dict())
            if hasattr(self, "extra_state"):
                save_state(Path(output_dir), "extra", self.extra_state())
        if hasattr(self, "process_state"):
            save_state(Path(output_dir), f"process-{self.args.process_index}", self.process_state())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint), "optimizer")
        if self.is_fsdp_enabled:
            sharded.set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=_FULL)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint), "schedule"))
        if hasattr(self, "load_extra_state"):
            self.load_extra_state(load_state(Path(checkpoint), "extra"))
        # Of as many processes only: what one of another number has held is drawn anew.
        same = len(list(Path(checkpoint).glob("process-*.json"))) == self.accelerator.num_processes
        if hasattr(self, "load_process_state") and same:
            self.load_process_state(load_state(Path(checkpoint), f"process-{self.args.process_index}"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        from safetensors.torch import load_file

        weights: dict[str, Any] = {}
        for shard in sorted(Path(resume_from_checkpoint).glob("model*.safetensors")):
            weights.update(load_file(shard))
        sharded.set_model_state_dict(
            self.model, weights, options=sharded.StateDictOptions(full_state_dict=True, strict=False)
        )

    def _save_rng_state(self, output_dir: str) -> None:
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the Trainer's own
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": {
                "kind": kind,
                "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            },
            "cpu": torch.random.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_state(Path(output_dir), self._rng_name(), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        before, now = len(list(Path(checkpoint).glob("randomness-*.json"))), self.accelerator.num_processes
        if before != now:
            # Batches are of the whole job, so the text goes on where it was; what each process draws is another matter.
            if self.accelerator.is_main_process:
                text = f"{now} processes go on from a checkpoint of {before}: the same batches, other random draws"
                self.run.event("note", step=self.state.global_step, text=text)
            self._fresh_randomness()
            return
        state = load_state(Path(checkpoint), self._rng_name())
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        numpy = state["numpy"]
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
        torch.random.set_rng_state(state["cpu"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])

    def _fresh_randomness(self) -> None:
        """The state of this process from the run's seed, its step and its number."""
        draw = generator(self.run.seed, "resumed randomness", self.state.global_step, self.args.process_index)
        torch.random.set_rng_state(draw.get_state())
        words = torch.randint(1 << 32, (624,), generator=draw).numpy().astype(np.uint32)
        random.setstate((3, (*words.tolist(), 624), None))
        np.random.set_state(("MT19937", words, 624, 0, 0.0))  # noqa: NPY002 - the Trainer's own
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.Generator("cuda").manual_seed(int(words[0])).get_state())

    def _rng_name(self) -> str:
        return f"randomness-{self.args.process_index}"

    def _save_scaler(self, output_dir: str) -> None:
        """Only fp16 has a scaler, which the jobs do not offer: bf16 needs none."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """See `_save_scaler`."""
