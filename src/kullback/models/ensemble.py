"""Many small networks trained at once: multilayer perceptrons whose weights have a leading dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["EnsembleMLP", "train_ensemble"]


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


def train_ensemble(
    ensemble: EnsembleMLP,
    inputs: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    steps: int = 120,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.01,
) -> EnsembleMLP:
    """Train every model by AdamW on all its data at once; returns the ensemble.

    inputs [n, D], labels [n], weights [count, n]: of each example in each model's mean loss (0 leaves it out), ones by
    default. Raises ShapeError for weights of another shape, ConfigError for a model without any example.
    """
    shape = (ensemble.count, len(labels))
    chosen = torch.ones(shape) if weights is None else weights
    if chosen.shape != shape:
        raise ShapeError(f"weights are [models, examples] = {shape}, got {tuple(chosen.shape)}")
    if not (chosen.sum(1) > 0).all():
        raise ConfigError("a model without a single example cannot be trained: give each some weight")
    share = chosen / chosen.sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=learning_rate, weight_decay=weight_decay)
    targets = labels.expand(shape)
    for _ in range(steps):
        losses = functional.cross_entropy(ensemble(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        optimizer.zero_grad()
        (losses.view(shape) * share).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return ensemble
