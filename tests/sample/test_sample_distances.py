"""Distances of samples: closed forms, a peer, and what is refused."""

import itertools
import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.sample_distances import kernel_distance, wasserstein_distance


def normal(count, dimension, seed):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dimension", [1, 2])
def test_the_best_of_all_permutations(order, dimension):
    x, y = normal(6, dimension, 1), normal(6, dimension, 2)
    costs = torch.cdist(x, y) ** order
    best = min(sum(costs[i, s[i]].item() for i in range(6)) / 6 for s in itertools.permutations(range(6)))
    assert wasserstein_distance(x, y, order=order) == pytest.approx(best ** (1 / order))
    assert (costs.diagonal().mean() ** (1 / order)).item() > best ** (1 / order)  # in the order given it is farther


def test_shifts_and_scales_have_closed_forms():
    x = normal(400, 3, 3)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(4))
    assert wasserstein_distance(x, (x + shift)[order]) == pytest.approx(shift.norm().item())
    line = normal(400, 1, 5)
    assert wasserstein_distance(line, 3.0 * line[order]) == pytest.approx(2.0 * line.square().mean().sqrt().item())
    assert wasserstein_distance(x, x[order]) == pytest.approx(0.0, abs=1e-7)


def test_beside_a_peer():
    ot = pytest.importorskip("ot")
    x, y = normal(150, 2, 6), 1.5 * normal(150, 2, 7) + 1.0
    even = torch.full((150,), 1 / 150, dtype=torch.float64)
    expected = math.sqrt(ot.emd2(even.numpy(), even.numpy(), torch.cdist(x, y).square().numpy()))
    assert wasserstein_distance(x, y) == pytest.approx(expected)


def test_the_kernel_distance_of_two_normal_laws():
    """With h^2 = 1: E k of normal laws of unit variance, d means apart, is 3^(-1/2) exp(-d^2 / 6) in one dimension."""
    gap = 1.5
    exact = 2 / math.sqrt(3) * (1 - math.exp(-(gap**2) / 6))
    found = torch.tensor([kernel_distance(normal(200, 1, s), normal(200, 1, s + 99) + gap, bandwidth=1.0)
                          for s in range(60)])  # fmt: skip
    error = 6 * found.std().item() / math.sqrt(60)
    assert found.mean().item() == pytest.approx(exact, abs=error)
    null = torch.tensor([kernel_distance(normal(50, 2, s), normal(50, 2, s + 99)) for s in range(100)])
    assert abs(null.mean().item()) < 6 * null.std().item() / 10
    assert null.min().item() < 0.0
    # with each point counted as its own neighbour, samples of one law would be apart
    assert abs(null.mean().item() + 2 * (1 - 0.5) / 50) > 6 * null.std().item() / 10


def test_what_is_refused():
    x = torch.zeros(4, 2)
    with pytest.raises(ShapeError, match="as many points"):
        wasserstein_distance(x, torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="one d"):
        wasserstein_distance(x, torch.zeros(4, 3))
    with pytest.raises(ShapeError, match="two points"):
        kernel_distance(x, x[:1])
    with pytest.raises(ConfigError, match="order"):
        wasserstein_distance(x, x, order=0.5)
    with pytest.raises(ConfigError, match="bandwidth"):
        kernel_distance(x, x, bandwidth=0.0)
    with pytest.raises(DataError, match="not finite"):
        kernel_distance(x, x * math.nan)
    assert kernel_distance(x, x) == pytest.approx(0.0)
