"""Costs between clouds against their definitions, in value and in every gradient."""

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.divergences.pairwise import COSTS, pairwise_cost

NAIVE = {
    "l1": lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1),
    "l2": lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).sqrt(),
    "squared": lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1),
    "cosine": lambda x, y: 1 - torch.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1),
}
# (leading, rows of x, rows of y, width): narrow ones go to cdist, wide ones over several tiles of rows and columns
SHAPES = [((), 5, 3, 7), ((2, 3), 4, 4, 5), ((), 1, 6, 64), ((2,), 3, 5, 513), ((), 40, 40, 1100)]


def clouds(shape, generator, dtype=torch.float64):
    lead, m, n, d = shape
    x = torch.randn(*lead, m, d, generator=generator, dtype=dtype)
    y = torch.randn(*lead, n, d, generator=generator, dtype=dtype)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", COSTS)
def test_value_and_gradients_equal_the_definition(kind, shape, generator):
    x, y = clouds(shape, generator)
    ours, naive = pairwise_cost(x, y, kind), NAIVE[kind](x, y)
    weights = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)
    grads = (torch.autograd.grad((weights * cost).sum(), (x, y)) for cost in (ours, naive))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_l1_between_distributions_is_twice_the_total_variation(generator):
    x, y = (torch.randn(4, 90, generator=generator).softmax(-1) for _ in range(2))
    cost = pairwise_cost(x, y)
    torch.testing.assert_close(cost.diagonal(), (x - y).abs().sum(-1))
    assert cost.max() <= 2


@pytest.mark.parametrize("width", [8, 600])
def test_equal_rows_cost_nothing_and_have_the_subgradient_zero(width, generator):
    x = torch.randn(4, width, generator=generator, requires_grad=True)
    for kind in ("l1", "l2"):
        cost = pairwise_cost(x, x.detach(), kind)
        assert cost.diagonal().eq(0).all()
        (gradient,) = torch.autograd.grad(cost.diagonal().sum(), x)
        assert gradient.eq(0).all()


def test_a_tile_boundary_that_is_lost_is_seen(generator):
    """The check above bites: a cost that drops the columns beyond the first tile differs."""
    x, y = clouds(SHAPES[-1], generator)
    assert not torch.allclose(pairwise_cost(x[..., :512], y[..., :512]), NAIVE["l1"](x, y), rtol=1e-3)


def test_transposed_and_half_inputs(generator):
    x, y = (torch.randn(600, 6, generator=generator).mT for _ in range(2))
    torch.testing.assert_close(pairwise_cost(x, y), NAIVE["l1"](x, y))
    halves = pairwise_cost(x.bfloat16(), y.bfloat16())
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, NAIVE["l1"](x.bfloat16().float(), y.bfloat16().float()))


@pytest.mark.parametrize("kind", ["squared", "cosine"])
def test_autocast_leaves_the_precision(kind, generator):
    x, y = (torch.randn(6, 40, generator=generator) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = pairwise_cost(x, y, kind)
    torch.testing.assert_close(cost, pairwise_cost(x, y, kind), rtol=0, atol=0)


def test_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(ConfigError, match="did you mean 'squared'"):
        pairwise_cost(x, x, "square")
    with pytest.raises(ShapeError, match="4 entries and those of the second 5"):
        pairwise_cost(x, torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="same leading dimensions"):
        pairwise_cost(x, torch.zeros(2, 3, 4))
