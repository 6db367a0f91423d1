"""The perceptron: its weights come from the generator alone, within torch's bounds, and bad widths are refused."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.models.perceptron import perceptron


def test_a_generator_gives_the_same_weights_and_the_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    first, second, other = (perceptron(4, 3, 2, generator=generator(seed, "x")) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first.parameters(), other.parameters(), strict=True))


def test_weights_fill_the_bounds_of_the_linear_layer():
    for layer in perceptron(100, 400, 50, generator=generator(0, "x"))[::2]:
        bound = 1 / math.sqrt(layer.in_features)
        for parameter in layer.parameters():
            assert 0.9 * bound < parameter.abs().max() <= bound


def test_relu_stands_between_the_layers_alone():
    kinds = [type(part).__name__ for part in perceptron(4, 3, 3, 2, generator=generator(0, "x"))]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert (perceptron(4, 2, generator=generator(0, "x"))(torch.randn(64, 4, generator=generator(1, "x"))) < 0).any()


@pytest.mark.parametrize("widths", [(), (3,), (3, 0), (-1, 2)])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ConfigError, match="two or more positive widths"):
        perceptron(*widths, generator=generator(0, "x"))
