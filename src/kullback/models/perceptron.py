"""A multilayer perceptron whose first weights come from a generator that is passed in."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from kullback.core.errors import ConfigError

__all__ = ["perceptron"]


def perceptron(*widths: int, generator: torch.Generator) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, from [..., widths[0]] to [..., widths[-1]].

    Weights and biases are uniform within one over the root of a layer's inputs, as in `torch.nn.Linear`, and lie on the
    generator's device. Raises ConfigError for less than two widths, or one below 1.

    >>> perceptron(64, 32, 10, generator=torch.Generator().manual_seed(0))(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ConfigError(f"a perceptron has two or more positive widths, inputs first, not {widths}")
    layers: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        # skip_init: the usual start would draw from the global generator
        linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, inside, outside, device=generator.device))
        bound = 1.0 / math.sqrt(inside)
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
