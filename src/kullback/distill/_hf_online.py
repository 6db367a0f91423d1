"""Online distillation inside transformers.Trainer: several networks in one module, one optimizer, one backward pass.

Shapes: B batch, T positions, V vocabulary. In a causal language model position t predicts token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from kullback.core.errors import ConfigError, DataError
from kullback.distill.online import OnlineLoss, by_size

__all__ = ["OnlineDistillationTrainer", "OnlineNetworks"]


class OnlineNetworks(nn.Module):
    """Two or more networks as one module that returns the sum of their losses, so that DDP, FSDP and a Trainer take it.

    networks: by name, any models whose output has logits; the one with the fewest parameters gives the output's
    logits. causal: whether they are language models, whose labels are moved by one position.
    """

    def __init__(self, networks: dict[str, nn.Module], loss: OnlineLoss, *, causal: bool = False) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ConfigError(f"online distillation is between two networks or more, got {len(networks)}")
        self.networks = nn.ModuleDict(networks)
        self.loss, self.causal = loss, causal
        names = list(networks)
        self.order = [names[place] for place in by_size(list(networks.values()))]

    def forward(self, labels: Tensor, count: Tensor | float | None = None, **inputs: Any) -> dict[str, Tensor]:
        """The summed "loss", each network's own under "loss_<name>", and the smallest network's "logits" [..., V]."""
        outputs = [self.networks[name](**inputs).logits for name in self.order]
        whole = outputs[-1]
        if self.causal:
            outputs, labels = [logits[:, :-1] for logits in outputs], labels[:, 1:]
        terms = self.loss(outputs, labels, count=count)
        losses = {f"loss_{name}": term["loss"] for name, term in zip(self.order, terms)}
        return {"loss": torch.stack(list(losses.values())).sum(), "logits": whole, **losses}

    def save_pretrained(self, folder: str | Path) -> None:
        """Every network in a folder of its own name, from which from_pretrained reads it."""
        for name, network in self.networks.items():
            network.save_pretrained(Path(folder) / name)  # type: ignore[operator]


class OnlineDistillationTrainer(Trainer):
    """A Trainer for `OnlineNetworks`; learning_rates: by name, where a network's is not that of the arguments.

    The batch has labels and whatever the networks take. The loss is divided by the labels of the whole accumulated
    batch that are not -100, over all processes. Checkpoints hold all networks in one file; the module's save_pretrained
    writes them one by one.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, learning_rates: dict[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, OnlineNetworks):
            raise ConfigError("OnlineDistillationTrainer trains OnlineNetworks: wrap the networks in one")
        unknown = set(learning_rates or {}) - set(self.model.networks)
        if unknown:
            raise ConfigError(f"there is no network {min(unknown)!r}: the names are {', '.join(self.model.networks)}")
        self.learning_rates = learning_rates or {}
        self.model_accepts_loss_kwargs = True  # asks the Trainer for the number of labels of the accumulated batch
        self._loss_shifts_labels = self.model.causal  # the first label of a causal model is not counted

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the networks named in learning_rates in groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            networks = self.accelerator.unwrap_model(self.model if model is None else model).networks
            for name, rate in self.learning_rates.items():
                _move_to_own_groups(optimizer, list(networks[name].parameters()), rate)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "labels" not in inputs:
            raise DataError("online distillation learns from labels beside its peers: give a batch with labels")
        outputs = model(count=num_items_in_batch, **inputs)
        loss = outputs["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        return (loss, {"logits": outputs["logits"]}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is None and self.model is not None:
            state_dict = self.model.state_dict()
        super()._save(output_dir, None if state_dict is None else _without_copies(state_dict))


def _move_to_own_groups(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


def _without_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without second names of the same memory, as tied embeddings have, which safetensors refuses."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or tensor.numel() == 0:
            kept[name] = tensor
        seen.add(place)
    return kept
