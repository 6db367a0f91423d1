"""Backward draws: every method has the backward law, compiled loops equal vectorised ones, bad input is refused."""

import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError
from kullback.sample._moves import select
from kullback.sample.backward import backward_mean, backward_sample
from kullback.sample.draws import counted_uniform, draw_index
from kullback.sample.state_space import BootstrapModel, LinearGaussianModel

sys.path.insert(0, str(Path(__file__).parent))
from _smoothing import spatial, weather

METHODS = ("exact", "hybrid", "rejection", "metropolis")
MODELS = {"1d": LinearGaussianModel.scalar(0.9, 0.6, 1.0), "3d": spatial(), "finite": weather()}


def cloud(model, chains, size, points, generator):
    """Weighted particles and points to which some of them have moved."""
    x = model.sample_init((chains, size), generator=generator)
    log_weights = torch.randn(chains, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    ancestors = draw_index(log_weights, torch.rand(chains, points, generator=generator, dtype=torch.float64))
    return x, log_weights, model.sample_trans(select(x, ancestors), 1, generator=generator), ancestors


def law(model, log_weights, x, x_next):
    """The backward law itself, one pair at a time: [R, P, N]."""
    table = torch.empty(*x_next.shape[:2], x.shape[1], dtype=torch.float64)
    for r in range(len(x)):
        for i in range(x_next.shape[1]):
            for j in range(x.shape[1]):
                density = model.log_trans(x[r : r + 1, j : j + 1], x_next[r : r + 1, i : i + 1], 1)
                table[r, i, j] = log_weights[r, j] + density.squeeze()
    return table.softmax(-1)


def has_law(indices, probabilities):
    """A chi-squared test of each row, six deviations wide."""
    counts = torch.nn.functional.one_hot(indices, probabilities.shape[-1]).sum(-2)
    expected = indices.shape[-1] * probabilities
    seen = expected >= 5
    statistic = ((counts - expected).square() / expected)[seen].sum()
    degrees = int((seen.sum(-1) - 1).sum())
    return bool(statistic - degrees <= 6 * (2 * degrees) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_all_methods_have_the_backward_law(name, method, generator):
    model = MODELS[name]
    x, log_weights, x_next, ancestors = cloud(model, 2, 7, 3, generator)
    # Many steps, since these ancestors are given, and not of the backward law for each point.
    options = {"steps": 60} if method == "metropolis" else {"max_tries": 3} if method == "hybrid" else {}
    many, parents = x_next.repeat(1, 10_000, 1), ancestors.repeat(1, 10_000)
    drawn, rate = backward_sample(
        model, log_weights, x, many, 1, num_draws=2, method=method, ancestors=parents, generator=generator, **options
    )
    indices = drawn.reshape(2, 10_000, 3, 2).transpose(1, 2).flatten(2)
    assert has_law(indices, law(model, log_weights, x, x_next))
    assert bool((rate > 0).all())
    assert bool((rate <= 1).all())
    assert not has_law(indices, law(model, torch.zeros_like(log_weights), x, x_next))


def test_one_step_of_metropolis_has_the_law_when_ancestors_do(generator):
    model = MODELS["1d"]
    x, log_weights, x_next, _ = cloud(model, 1, 6, 1, generator)
    exact = law(model, log_weights, x, x_next)
    many = x_next.expand(1, 20_000, 1)
    ancestors = draw_index(exact[:, 0].log(), torch.rand(1, 20_000, generator=generator, dtype=torch.float64))
    options = {"num_draws": 1, "method": "metropolis", "steps": 1, "generator": generator}
    drawn = backward_sample(model, log_weights, x, many, 1, ancestors=ancestors, **options)
    assert has_law(drawn.indices.mT, exact)
    elsewhere = backward_sample(model, log_weights, x, many, 1, ancestors=ancestors * 0, **options)
    assert not has_law(elsewhere.indices.mT, exact)


@pytest.mark.parametrize(("size", "points", "draws", "tries"), [(2, 1, 1, 1), (33, 7, 2, 1), (200, 201, 3, 9)])
@pytest.mark.parametrize("name", ["1d", "3d"])
def test_compiled_loops_give_the_indices_of_the_vectorised_twin(name, size, points, draws, tries, generator):
    pytest.importorskip("numba")
    x, log_weights, x_next, _ = cloud(MODELS[name], 3, size, points, generator)
    log_weights[1, : size // 2] = -torch.inf
    for method in ("exact", "hybrid"):
        options = {"max_tries": tries} if method == "hybrid" else {}
        one, other = (
            backward_sample(
                MODELS[name], log_weights, x, x_next, 1,
                num_draws=draws, method=method, compiled=compiled,
                generator=torch.Generator().manual_seed(3), **options,
            ).indices
            for compiled in (True, False)
        )  # fmt: skip
        assert torch.equal(one, other)
        assert not bool((one[1] < size // 2).any())


@pytest.mark.parametrize("method", ["exact", "hybrid"])
def test_threads_change_no_bit_and_lose_no_error(method, monkeypatch, generator):
    pytest.importorskip("numba")
    model, options = MODELS["1d"], {"method": method, "compiled": True}
    x, log_weights, x_next, _ = cloud(model, 5, 20, 2000, generator)

    def drawn(threads, points):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return backward_sample(model, log_weights, x, points, 1, generator=torch.Generator().manual_seed(1), **options)

    one, two = drawn(1, x_next), drawn(2, x_next)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.accept_rate, two.accept_rate)
    for chain in (0, 4):  # the first block and the last
        lost = x_next.clone()
        lost[chain, -1] = 1e200
        with pytest.raises(DataError, match="can have come from none"):
            drawn(2, lost)


def test_bootstrap_and_linear_models_of_one_law_agree(generator):
    linear = MODELS["1d"]
    scale = torch.tensor([0.6], dtype=torch.float64)
    bootstrap = BootstrapModel(
        initial_mean=torch.zeros(1, dtype=torch.float64),
        initial_scale=scale / (1 - 0.81) ** 0.5,
        mean=lambda x, time: 0.9 * x,
        scale=scale,
        log_observation=lambda x, y, time: torch.distributions.Normal(x, 1.0).log_prob(y).sum(-1),
    )
    x, x_next = torch.randn(2, 2, 5, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 1, 1, generator=generator, dtype=torch.float64)
    for one, other in (
        (linear.log_init(x), bootstrap.log_init(x)),
        (linear.log_trans(x, x_next, 1), bootstrap.log_trans(x, x_next, 1)),
        (linear.log_obs(x, y, 1), bootstrap.log_obs(x, y, 1)),
        (linear.log_trans_sup(1), bootstrap.log_trans_sup(1)),
        (linear.whitened_mean(x, 1) - linear.whitened(x_next, 1), bootstrap.whitened_mean(x, 1) - x_next / scale),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_mean_over_all_particles_equals_the_sum(generator):
    for model in MODELS.values():
        x, log_weights, x_next, _ = cloud(model, 2, 6, 4, generator)
        values = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
        weights = law(model, log_weights, x, x_next)

        def pair(one, other):
            return torch.stack([(one * other).sum(-1), one.sum(-1).expand_as((one * other).sum(-1))], -1)

        expected = torch.einsum("rpn,rnk->rpk", weights, values)
        expected = expected + torch.einsum("rpn,rpnk->rpk", weights, pair(x.unsqueeze(1), x_next.unsqueeze(2)))
        got = backward_mean(model, log_weights, x, x_next, 1, values=values, pair=pair)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_counted_numbers_are_uniform_and_distinct():
    counters = torch.arange(100_000)
    first, second = counted_uniform(torch.tensor([[1], [2]]), counters)
    for numbers in (first, second, (first + second) % 1.0):
        counts = torch.histc(numbers, 50, 0.0, 1.0)
        statistic = ((counts - 2000).square() / 2000).sum()
        assert abs(statistic - 49) < 6 * (2 * 49) ** 0.5
    # The finaliser of splitmix64 from state 0, as published.
    assert int(counted_uniform(torch.tensor(0), torch.tensor(0)) * 2**53) == 0xE220A8397B1DCDAF >> 11
    for numbers in (first, second):
        correlation = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
        assert abs(correlation) < 6 / 100_000**0.5


def test_bad_input(generator):
    model = MODELS["1d"]
    x, log_weights, x_next, _ = cloud(model, 1, 4, 2, generator)

    def draw(model=model, x_next=x_next, **options):
        return backward_sample(model, log_weights, x, x_next, 1, generator=generator, **options)

    with pytest.raises(ConfigError, match="backward is one of"):
        draw(method="alias")
    with pytest.raises(ConfigError, match="at least one backward draw"):
        draw(num_draws=0)
    with pytest.raises(ConfigError, match="pass ancestors"):
        draw(method="metropolis")
    with pytest.raises(ConfigError, match="max_tries is 0"):
        draw(method="hybrid", max_tries=0)
    with pytest.raises(ConfigError, match="compiled draws need"):
        draw(model=weather(), method="exact", compiled=True)

    class Unbounded:
        log_trans = staticmethod(model.log_trans)

    with pytest.raises(ConfigError, match="needs a bound"):
        draw(model=Unbounded(), method="rejection")
    assert draw(model=Unbounded()).indices.shape == (1, 2, 2)
    for compiled in (True, False):
        for method in ("exact", "hybrid"):
            with pytest.raises(DataError, match="at time 1 can have come from none"):
                draw(x_next=x_next * torch.nan, method=method, compiled=compiled)
