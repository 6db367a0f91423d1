"""Kalman and Rauch-Tung-Striebel against dense conditioning, hidden Markov models against the sum over all paths."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.exact_smoothing import hmm_paths, hmm_smoother, kalman_paths, kalman_smoother
from kullback.sample.state_space import FiniteModel, LinearGaussianModel

sys.path.insert(0, str(Path(__file__).parent))
from _smoothing import simulate, spatial, weather, within_six

TIMES = 5


def dense(model, observations):
    """Mean and covariance of all states given all observations there are, and the likelihood, by one big normal."""
    width, times = len(model.transition), len(observations)
    mean, covariance = [model.initial_mean], {(0, 0): model.initial_covariance}
    for t in range(1, times):
        mean.append(model.transition @ mean[-1])
        for s in range(t):
            covariance[s, t] = covariance[s, t - 1] @ model.transition.T
            covariance[t, s] = covariance[s, t].T
        covariance[t, t] = model.transition @ covariance[t - 1, t] + model.transition_covariance
    m = torch.cat(mean)
    p = torch.cat([torch.cat([covariance[s, t] for t in range(times)], 1) for s in range(times)])
    there = [t for t in range(times) if not observations[t].isnan().any()]
    blocks = torch.eye(times, dtype=torch.float64)
    c = torch.cat([torch.kron(blocks[t : t + 1], model.observation) for t in there])
    v = torch.block_diag(*[model.observation_covariance for _ in there])
    y = observations[there].flatten()
    seen = c @ p @ c.T + v
    gain = torch.linalg.solve(seen, c @ p).T
    log_likelihood = torch.distributions.MultivariateNormal(c @ m, seen).log_prob(y)
    return (m + gain @ (y - c @ m)).reshape(times, width), p - gain @ c @ p, log_likelihood


@pytest.mark.parametrize("missing", [(), (2,), (0, 4)], ids=str)
@pytest.mark.parametrize("model", [LinearGaussianModel.scalar(0.9, 0.6, 1.0), spatial()], ids=["1d", "3d"])
def test_kalman_equals_dense_conditioning(model, missing, generator):
    y = simulate(model, TIMES, generator)
    for time in missing:
        y[time, -1] = torch.nan
    mean, covariance, log_likelihood = dense(model, y)
    got, width = kalman_smoother(model, y), len(model.transition)
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(got.mean[0], mean, **close)
    torch.testing.assert_close(got.log_likelihood[0], log_likelihood, **close)
    blocks = covariance.reshape(TIMES, width, TIMES, width)
    for t in range(TIMES):
        torch.testing.assert_close(got.covariance[0, t], blocks[t, :, t], **close)
    for t in range(TIMES - 1):
        torch.testing.assert_close(got.lag_covariance[0, t], blocks[t, :, t + 1], **close)


def test_chains_with_their_own_parameters_and_data_equal_a_loop(generator):
    coefficients = torch.tensor([0.3, 0.9], dtype=torch.float64)
    y = torch.randn(2, TIMES, 1, generator=generator, dtype=torch.float64)
    batch = kalman_smoother(LinearGaussianModel.scalar(coefficients, 0.6, 1.0), y)
    for index, coefficient in enumerate(coefficients):
        alone = kalman_smoother(LinearGaussianModel.scalar(coefficient, 0.6, 1.0), y[index])
        for one, other in zip(alone, batch, strict=True):
            torch.testing.assert_close(one[0], other[index], rtol=0, atol=1e-13)


@pytest.mark.parametrize("model", [LinearGaussianModel.scalar(0.9, 0.6, 1.0), spatial()], ids=["1d", "3d"])
def test_paths_have_the_smoothed_moments(model, generator):
    y = simulate(model, TIMES, generator)
    exact, paths = kalman_smoother(model, y), kalman_paths(model, y, 20_000, generator=generator)
    assert within_six(paths, exact.mean[0])
    centred = paths - exact.mean[0]
    lag = (centred[:, :-1].unsqueeze(-1) * centred[:, 1:].unsqueeze(-2)).flatten(1)
    assert within_six(lag, exact.lag_covariance[0].flatten())
    assert not within_six(lag, exact.lag_covariance[0].mT.flatten() + 0.1)


def every_path(model, observations):
    """log p(x, y) of every path, as a table over the states at all times."""
    states, times = len(model.log_initial), len(observations)
    table = torch.full((states,) * times, -torch.inf, dtype=torch.float64)
    for path in itertools.product(range(states), repeat=times):
        value = model.log_initial[path[0]]
        for time, state in enumerate(path):
            value = value + (model.log_transition[path[time - 1], state] if time else 0.0)
            if not observations[time].isnan().any():
                value = value + model.log_emission(observations[time], time)[state]
        table[path] = value
    return table


@pytest.mark.parametrize("missing", [(), (0, 2)], ids=str)
def test_forward_backward_equals_the_sum_over_all_paths(missing, generator):
    model, y = weather(), torch.randn(4, 1, generator=generator, dtype=torch.float64)
    y[list(missing)] = torch.nan
    table, got = every_path(model, y), hmm_smoother(model, y)
    total = table.logsumexp((0, 1, 2, 3))
    torch.testing.assert_close(got.log_likelihood[0], total, rtol=0, atol=1e-12)
    posterior = (table - total).exp()
    for time in range(4):
        others = tuple(t for t in range(4) if t != time)
        torch.testing.assert_close(got.marginal[0, time], posterior.sum(others), rtol=0, atol=1e-12)
    for time in range(3):
        others = tuple(t for t in range(4) if t not in (time, time + 1))
        torch.testing.assert_close(got.pair[0, time], posterior.sum(others), rtol=0, atol=1e-12)
    paths = hmm_paths(model, y, 30_000, generator=generator)
    codes = (paths * torch.tensor([27, 9, 3, 1])).sum(-1)
    share, exact = torch.bincount(codes, minlength=81) / 30_000, posterior.flatten()
    assert bool(((share - exact).abs() <= 6 * (exact * (1 - exact) / 30_000).sqrt() + 1 / 30_000).all())


def test_both_are_differentiable(generator):
    y = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    coefficient = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a: kalman_smoother(LinearGaussianModel.scalar(a, 0.6, 1.0), y)[::5], (coefficient,)
    )
    logits = torch.randn(2, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def likelihood(z):
        even = torch.full((2,), 0.5, dtype=torch.float64).log()
        model = FiniteModel(even, z.log_softmax(-1), lambda y, time: torch.cat([y, -y], -1))
        return hmm_smoother(model, y).log_likelihood

    assert torch.autograd.gradcheck(likelihood, (logits,))


def test_bad_input():
    model, finite = LinearGaussianModel.scalar(0.9, 0.6, 1.0), weather()
    with pytest.raises(ShapeError, match="observations are"):
        kalman_smoother(model, torch.zeros(4))
    with pytest.raises(ShapeError, match="not empty"):
        kalman_smoother(model, torch.zeros(0, 1))
    with pytest.raises(ShapeError, match="different numbers of chains"):
        kalman_smoother(LinearGaussianModel.scalar(torch.full((3,), 0.5), 0.6, 1.0), torch.zeros(2, 4, 1))
    with pytest.raises(ConfigError, match="stationary"):
        LinearGaussianModel.scalar(1.0, 0.6, 1.0)
    never = FiniteModel(finite.log_initial, finite.log_transition, lambda y, time: torch.full((1, 1, 3), -torch.inf))
    with pytest.raises(DataError, match="probability zero"):
        hmm_smoother(never, torch.zeros(2, 1))
    with pytest.raises(ShapeError, match="log_initial is"):
        FiniteModel(torch.zeros(2), torch.zeros(3, 3), finite.log_emission)
    with pytest.raises(ConfigError, match="at least one path"):
        hmm_paths(finite, torch.zeros(2, 1), 0, generator=torch.Generator())
