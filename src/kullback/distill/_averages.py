"""A moving average of a model's weights over its training, which serves as its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["WeightAverage"]


class WeightAverage:
    """average <- decay average + (1 - decay) weights at each `move`, of the weights that are trained; float32 at least.

    Buffers of real numbers, such as running means, are averaged too. Called with the model and its inputs, it gives
    what the model would with the averages, in evaluation mode and without a gradient, so that the model serves both
    and no second one is held. Raises ConfigError for a decay outside [0, 1).

    >>> layer, average = nn.Linear(1, 1, bias=False), WeightAverage(0.75)
    >>> _ = layer.weight.data.fill_(0.0), average.start(layer), layer.weight.data.fill_(4.0), average.move(layer)
    >>> average(layer, torch.ones(1)), layer(torch.ones(1))
    (tensor([1.]), tensor([4.], grad_fn=<...>))
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"the decay of averaged weights lies in [0, 1), 0 for the weights now: got {decay}")
        self.decay = decay
        self.held: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Begin with the weights as they are."""
        self.held = {name: _wide(tensor).clone() for name, tensor in _averaged(model).items()}

    @torch.no_grad()
    def move(self, model: nn.Module) -> None:
        """One step towards the weights as they are."""
        now = _averaged(model)
        self._check(now)
        current = [_wide(now[name]) for name in self.held]
        torch._foreach_lerp_(list(self.held.values()), current, 1.0 - self.decay)

    @torch.no_grad()
    def __call__(self, model: nn.Module, *inputs: Any, **named: Any) -> Any:
        modes = [(module, module.training) for module in model.modules()]
        now = _averaged(model)
        placed = {name: tensor.to(now[name].dtype) for name, tensor in self.held.items()}
        try:
            model.eval()
            return functional_call(model, placed, inputs, named)
        finally:
            for module, training in modes:
                module.training = training

    def load(self, held: Mapping[str, Tensor], model: nn.Module) -> None:
        """Go on from averages that were `held`; ShapeError for those of another model."""
        now = _averaged(model)
        self.held = {name: tensor.to(now[name].device) for name, tensor in held.items() if name in now}
        self._check(now)

    def _check(self, now: Mapping[str, Tensor]) -> None:
        if {name: x.shape for name, x in self.held.items()} != {name: x.shape for name, x in now.items()}:
            raise ShapeError("the averaged weights are those of another model: start the average with this one")


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return weights | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
