"""Many small networks trained at once: weights with a leading dimension, one product for all models of a layer.

Perceptrons are trained with gradients written out by hand, examples in the last dimension: without a graph, in buffers
that stay from step to step, and with the first layers of all models as one product. Modules of any other kind are
stacked and mapped over.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["EnsembleMLP", "StackedEnsemble", "train_ensemble"]


_TOGETHER = 100  # models whose activations stay in the last cache of a processor

Ensemble = TypeVar("Ensemble", bound="EnsembleMLP | StackedEnsemble")


class EnsembleMLP(nn.Module):
    """`count` perceptrons of the layer widths `sizes` with rectifiers between: inputs [n, D] or [count, n, D] to logits
    [count, n, C]. Each is drawn anew from the generator, uniform in +-1 / sqrt(inputs).

    >>> EnsembleMLP(3, (4, 8, 2), generator=torch.Generator().manual_seed(0))(torch.zeros(5, 4)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(
        self, count: int, sizes: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if count < 1 or len(sizes) < 2 or min(sizes) < 1:
            raise ConfigError(f"an ensemble has a model at least and widths of two layers or more: {count}, {sizes}")
        self.count = count
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inside, outside in pairwise(sizes):
            for shape, place in (((count, inside, outside), self.weights), ((count, 1, outside), self.biases)):
                drawn = torch.rand(shape, generator=generator, dtype=dtype)
                place.append(nn.Parameter((2.0 * drawn - 1.0) / math.sqrt(inside)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [count, n, C]."""
        hidden = inputs.expand(self.count, -1, -1) if inputs.ndim == 2 else inputs
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if place + 1 < len(self.weights):
                hidden = hidden.relu()
        return hidden

    def member(self, place: int) -> nn.Sequential:
        """A copy of one model, from inputs [n, D] to logits [n, C]."""
        layers: list[nn.Module] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            layer = nn.utils.skip_init(nn.Linear, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
            layer.weight.data.copy_(weight.data[place].T)
            layer.bias.data.copy_(bias.data[place, 0])
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])


class StackedEnsemble(nn.Module):
    """Modules of one structure, from inputs [n, ...] to logits [n, C], as an ensemble: inputs to logits [count, n, C].

    Parameters are copied and stacked, and the first module's code is mapped over them. Raises ConfigError for modules
    that differ in their parameters, or that hold buffers, as batch normalisation does: they would have to be shared.

    >>> StackedEnsemble([nn.Linear(4, 2) for _ in range(3)])(torch.zeros(5, 4)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in modules]
        if not shapes or not shapes[0] or any(other != shapes[0] for other in shapes):
            raise ConfigError("an ensemble stacks modules with parameters of the same names and shapes, one at least")
        if any(True for module in modules for _ in module.buffers()):
            raise ConfigError("modules with buffers cannot be stacked: use a norm without running statistics")
        self.count = len(modules)
        self.stacked = nn.ParameterList()
        for name in shapes[0]:
            self.stacked.append(nn.Parameter(torch.stack([m.get_parameter(name).detach() for m in modules])))
        self._names = tuple(shapes[0])
        self._code = [copy.deepcopy(modules[0]).to("meta")]  # in a list, so that its parameters are not this module's

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [count, n, C]."""

        def one(parameters: Mapping[str, Tensor]) -> Tensor:
            found: Tensor = torch.func.functional_call(self._code[0], dict(parameters), (inputs,))
            return found

        return torch.func.vmap(one)(dict(zip(self._names, self.stacked, strict=True)))

    def member(self, place: int) -> nn.Module:
        """A copy of one module, as it stands now."""
        found = copy.deepcopy(self._code[0]).to_empty(device=self.stacked[0].device)
        for name, stacked in zip(self._names, self.stacked, strict=True):
            found.get_parameter(name).data.copy_(stacked.data[place])
        return found


def train_ensemble(
    ensemble: Ensemble,
    inputs: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    steps: int = 120,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.01,
) -> Ensemble:
    """Train every model by AdamW on all its data at once; returns the ensemble.

    inputs [n, D], labels [n], weights [count, n]: of each example in each model's mean loss (0 leaves it out), ones by
    default. Raises ShapeError, ConfigError for a model without any example, DataError for labels without an output.
    """
    if len(inputs if inputs.ndim == 2 else inputs.movedim(0, 1)) != len(labels) and isinstance(ensemble, EnsembleMLP):
        shapes = f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        raise ShapeError(f"inputs are [n, D] or [models, n, D] and labels [n], got {shapes}")
    _check_data(ensemble, inputs, labels)
    if steps < 0:
        raise ConfigError(f"steps is 0 or more, got {steps}")
    shape = (ensemble.count, len(labels))
    chosen = torch.ones(shape) if weights is None else weights
    if chosen.shape != shape:
        raise ShapeError(f"weights are [models, examples] = {shape}, got {tuple(chosen.shape)}")
    if not bool((chosen >= 0).all()):
        raise ConfigError("weights are 0 or more, and some are not")
    if not (chosen.sum(1) > 0).all():
        raise ConfigError("a model without a single example cannot be trained: give each some weight")
    share = chosen / chosen.sum(1, keepdim=True)
    options = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if isinstance(ensemble, StackedEnsemble):
        optimizer = torch.optim.AdamW(ensemble.parameters(), **options)  # type: ignore[arg-type]
        for _ in range(steps):
            _by_autograd(ensemble, inputs, labels, share)
            optimizer.step()
        return ensemble
    for start in range(0, ensemble.count, _TOGETHER):
        rows = slice(start, start + _TOGETHER)
        some = tuple([p.data[rows] for p in kind] for kind in (ensemble.weights, ensemble.biases))
        stack = _Stack(some, inputs if inputs.ndim == 2 else inputs[rows], labels, share[rows])
        optimizer = torch.optim.AdamW(stack.parameters, **options)  # type: ignore[arg-type]
        for _ in range(steps):
            stack.backward()
            optimizer.step()
        stack.write(some)
    return ensemble


def _check_data(ensemble: EnsembleMLP | StackedEnsemble, inputs: Tensor, labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        raise ShapeError(f"labels are [n] whole numbers, got {tuple(labels.shape)} of {labels.dtype}")
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise DataError("inputs are finite numbers, and some are not: leave out or repair these examples")
    if isinstance(ensemble, StackedEnsemble):
        return
    first, last = ensemble.weights[0], ensemble.weights[-1]
    if inputs.shape[-1] != first.shape[1] or inputs.dtype != first.dtype:
        given = f"{inputs.shape[-1]} of {inputs.dtype}"
        raise ShapeError(f"inputs have {first.shape[1]} numbers of {first.dtype} each, as the networks, got {given}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < last.shape[2]:
        raise DataError(f"labels are from 0 to {last.shape[2] - 1}, as the networks have outputs, and one is not")


def _by_autograd(ensemble: nn.Module, inputs: Tensor, labels: Tensor, share: Tensor) -> None:
    """Set the gradients of the weighted cross-entropy."""
    losses = functional.cross_entropy(ensemble(inputs).transpose(1, 2), labels.expand_as(share), reduction="none")
    ensemble.zero_grad()
    (losses * share).sum().backward()  # type: ignore[no-untyped-call]


class _Stack:
    """Perceptrons [count] with a gradient by hand: weights as [count, out, in], activations as [count, width, n].

    given: copies are made of the weights [count, in, out] and of the biases [count, 1, out] of all layers. Where all
    models have the same inputs, the first biases are a last column of the first weights.
    """

    def __init__(self, given: Sequence[Sequence[Tensor]], inputs: Tensor, labels: Tensor, share: Tensor) -> None:
        turned = [[x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in kind] for kind in given]
        self.alike = inputs.ndim == 2
        self.inputs = inputs.transpose(-2, -1).contiguous()
        if self.alike:
            turned[0][0] = torch.cat([turned[0][0], turned[1].pop(0)], 2)
            self.inputs = torch.cat([self.inputs, inputs.new_ones(1, len(inputs))])
        self.weights, self.biases = ([nn.Parameter(x) for x in kind] for kind in turned)
        self.parameters = [*self.weights, *self.biases]
        self.gradients = [torch.empty_like(parameter.data) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.layers = [w.data.new_empty(*w.shape[:2], self.inputs.shape[-1]) for w in self.weights]
        self.slopes = [torch.empty_like(layer) for layer in self.layers[:-1]]
        self.share = share.to(self.inputs.dtype)
        self.taken = -self.share.unsqueeze(1)
        self.labels = labels.expand(len(share), 1, -1)

    @torch.no_grad()
    def backward(self) -> None:
        """Set the gradients of the weighted cross-entropy."""
        entering, (*hidden, top) = self.inputs, self.layers
        for place, layer in enumerate(self.layers):
            self._enter(place, entering, layer)
            entering = layer if layer is top else layer.relu_()
        top.sub_(top.amax(1, keepdim=True)).exp_()
        wrong = top.mul_((self.share / top.sum(1)).unsqueeze(1)).scatter_add_(1, self.labels, self.taken)
        for place in reversed(range(len(self.weights))):
            weight, entering = self.weights[place].data, hidden[place - 1] if place else self.inputs
            gradient = self.gradients[place]
            if entering.ndim == 2:
                torch.mm(wrong.flatten(0, 1), entering.T, out=gradient.flatten(0, 1))
                return
            torch.sum(wrong, 2, keepdim=True, out=self.gradients[len(self.weights) + place - self.alike])
            torch.bmm(wrong, entering.transpose(1, 2), out=gradient)
            if place:
                torch.bmm(weight.transpose(1, 2), wrong, out=self.slopes[place - 1])
                wrong = self.slopes[place - 1].mul_(entering.sign_())

    def _enter(self, place: int, entering: Tensor, out: Tensor) -> None:
        weight = self.weights[place].data
        if entering.ndim == 2:
            torch.mm(weight.flatten(0, 1), entering, out=out.flatten(0, 1))
        else:
            torch.baddbmm(self.biases[place - self.alike].data, weight, entering, out=out)

    def write(self, places: Sequence[Sequence[Tensor]]) -> None:
        """Copy what was learnt to weights [count, in, out] and biases [count, 1, out], those of all layers each."""
        learnt = [[x.data.transpose(1, 2) for x in kind] for kind in (self.weights, self.biases)]
        if self.alike:
            first = learnt[0][0]
            learnt[0][0] = first[:, :-1]
            learnt[1].insert(0, first[:, -1:])
        for kind, found in zip(places, learnt, strict=True):
            for x, value in zip(kind, found, strict=True):
                x.copy_(value)
