"""Classifiers of several experts on one trunk: parallel layers as batched products, cosine heads, and the whole.

Shapes: E experts, b rows (any leading shape [...]), D features, C classes; experts come first: [E, ..., D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["CosineHead", "ExpertLinear", "Experts", "MultiExpert"]


class ExpertLinear(nn.Module):
    """A linear layer for each expert in one batched product: [E, ..., D], or [b, D] shared by all, to [E, ..., M].

    shared: the features are of any shape [..., D] and belong to all experts; without it those of more than two
    dimensions have the experts first. Drawn as nn.Linear draws its own, from the generator given. Raises ConfigError
    for sizes below 1, ShapeError for another number of features or experts.

    >>> ExpertLinear(3, 4, 2, generator=torch.Generator().manual_seed(0))(torch.ones(5, 4)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(
        self, experts: int, inside: int, outside: int, *, shared: bool = False, generator: torch.Generator
    ) -> None:
        super().__init__()
        if min(experts, inside, outside) < 1:
            raise ConfigError(f"experts and features are at least 1, got {experts}, {inside} and {outside}")
        bound = 1 / math.sqrt(inside)
        self.weight = nn.Parameter(torch.empty(experts, outside, inside).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(experts, 1, outside).uniform_(-bound, bound, generator=generator))
        self.shared = shared

    def forward(self, features: Tensor) -> Tensor:
        experts, outside, inside = self.weight.shape
        if features.shape[-1] != inside:
            raise ShapeError(f"the layer takes {inside} features and got {features.shape[-1]}")
        if self.shared or features.ndim <= 2:  # one product for all: the weights of the experts one below the other
            product = functional.linear(features.reshape(-1, inside), self.weight.flatten(0, 1), self.bias.flatten())
            return product.view(-1, experts, outside).transpose(0, 1).reshape(experts, *features.shape[:-1], outside)
        if features.shape[0] != experts:
            raise ShapeError(
                f"a layer of {experts} experts takes [{experts}, ..., {inside}] and got {tuple(features.shape)}: with "
                "shared=True all experts read the same features"
            )
        product = torch.baddbmm(self.bias, features.reshape(experts, -1, inside), self.weight.transpose(1, 2))
        return product.view(experts, *features.shape[1:-1], outside)


class CosineHead(nn.Module):
    """Logits scale * cos(features, weight of the class), so between -scale and scale, for one head or for E at once.

    experts: None takes [..., D] to [..., C]; a number takes [E, ..., D] to [E, ..., C]. scale: 30 in the released MDCS;
    learn_scale: makes it a parameter. Neither the length of the features nor that of the weights matters.
    Raises ConfigError for a scale that is not positive, ShapeError for another number of features or experts.

    >>> head = CosineHead(2, 2, scale=10.0, generator=torch.Generator())
    >>> _ = head.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    >>> head(torch.tensor([0.0, 5.0]))
    tensor([ 0., 10.], grad_fn=<...>)
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        experts: int | None = None,
        scale: float = 30.0,
        learn_scale: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if not 0.0 < scale < math.inf:
            raise ConfigError(f"scale bounds the logits of a cosine head and must be positive, got {scale}")
        if min(features, classes, experts or 1) < 1 or experts == 0:
            raise ConfigError(f"features, classes and experts are at least 1, got {features}, {classes} and {experts}")
        shape = (classes, features) if experts is None else (experts, classes, features)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.experts = experts
        value = torch.tensor(float(scale))
        self.scale: Tensor
        if learn_scale:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.weight.shape[-1]:
            raise ShapeError(f"the head takes {self.weight.shape[-1]} features and got {features.shape[-1]}")
        if self.experts is not None and (features.ndim < 2 or features.shape[0] != self.experts):
            raise ShapeError(f"a head of {self.experts} experts takes [{self.experts}, ..., D], got {features.shape}")
        direction = self.scale * functional.normalize(self.weight, dim=-1)
        rows = functional.normalize(features, dim=-1)
        if self.experts is None:
            return functional.linear(rows, direction)
        logits = torch.bmm(rows.reshape(self.experts, -1, rows.shape[-1]), direction.transpose(1, 2))
        return logits.view(*features.shape[:-1], direction.shape[1])


class Experts(nn.Module):
    """Any modules side by side, one after the other in time: shared features [b, ...] to [E, b, ...].

    make(k) builds expert k. For linear layers `ExpertLinear` does the same in one product.
    """

    def __init__(self, make: Callable[[int], nn.Module], experts: int) -> None:
        super().__init__()
        if experts < 1:
            raise ConfigError(f"there is at least one expert, got {experts}")
        self.members = nn.ModuleList([make(index) for index in range(experts)])

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([member(features) for member in self.members])


class MultiExpert(nn.Module):
    """A shared stem, branches of E experts and their heads: "output" [b, C], "logits" [E, b, C], "features" [E, b, D].

    stem: inputs to [b, ...]; branches: that to [E, b, D], such as `Experts` or `ExpertLinear`; heads: [E, b, D] to
    [E, b, C], such as `CosineHead` with experts. "output" is the mean of the experts' plain logits, without any prior.

    >>> draw = torch.Generator().manual_seed(0)
    >>> heads = CosineHead(8, 10, experts=3, generator=draw)
    >>> model = MultiExpert(nn.Identity(), ExpertLinear(3, 4, 8, generator=draw), heads)
    >>> {name: tuple(value.shape) for name, value in model(torch.ones(5, 4)).items()}
    {'output': (5, 10), 'logits': (3, 5, 10), 'features': (3, 5, 8)}
    """

    def __init__(self, stem: nn.Module, branches: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.stem, self.branches, self.heads = stem, branches, heads

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        features = self.branches(self.stem(*inputs, **named))
        logits = self.heads(features)
        return {"output": logits.mean(0), "logits": logits, "features": features}
