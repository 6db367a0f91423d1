"""PaRIS against exact smoothing and against the recursions written out; what holds exactly; what is refused."""

import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.exact_smoothing import hmm_smoother, kalman_smoother
from kullback.sample.paris import paris
from kullback.sample.state_space import (
    AdditiveStatistic,
    BootstrapModel,
    FiniteModel,
    LinearGaussianModel,
    LinearGaussianProposal,
)

sys.path.insert(0, str(Path(__file__).parent))
from _smoothing import exact_finite_product, exact_product, product, simulate, spatial, weather, within_six

SCALAR = LinearGaussianModel.scalar(0.9, 0.6, 1.0)


def run(kernel, observations, generator, chains=1):
    """All states and all infos of a pass over observations [T+1, p] or [R, T+1, p]."""
    rows = observations.unbind(-2)
    states, infos = [kernel.init(rows[0], generator=generator, chains=chains)], []
    for row in rows[1:]:
        state, info = kernel.step(states[-1], row, generator=generator)
        states.append(state)
        infos.append(info)
    return states, infos


@pytest.mark.parametrize(
    "options", [{}, {"backward": "metropolis"}, {"resampling": "systematic", "threshold": 0.5}], ids=str
)
@pytest.mark.parametrize("model", [SCALAR, spatial()], ids=["1d", "3d"])
def test_estimates_meet_the_kalman_smoother(model, options, generator):
    y = simulate(model, 25, generator)
    states, _ = run(paris(model, product, num_particles=2000, **options), y, generator, chains=12)
    assert within_six(states[-1].estimate, exact_product(model, y))
    assert within_six((states[-1].log_likelihood - kalman_smoother(model, y).log_likelihood).unsqueeze(1), 0.0)
    # Filtered means are another matter: the estimate is of the smoothed statistic, at every time.
    assert within_six(states[9].estimate, exact_product(model, y[:10]))
    assert not within_six(states[9].estimate, exact_product(model, y))


def test_estimates_meet_forward_backward(generator):
    model, y = weather(), torch.randn(12, 1, generator=generator, dtype=torch.float64)
    states, _ = run(paris(model, product, num_particles=600), y, generator, chains=30)
    assert within_six(states[-1].estimate, exact_finite_product(model, y))
    assert within_six((states[-1].log_likelihood - hmm_smoother(model, y).log_likelihood).unsqueeze(1), 0.0)


@pytest.mark.slow
def test_forward_smoothing_over_a_hundred_steps(generator):
    y = simulate(SCALAR, 101, generator)
    states, _ = run(paris(SCALAR, product, num_particles=2000, num_backward=None), y, generator)
    values = torch.cat([states[-1].estimate, run(
        paris(SCALAR, product, num_particles=2000), y, generator, chains=20)[0][-1].estimate])  # fmt: skip
    assert abs(states[-1].estimate.mean() - exact_product(SCALAR, y)) < 3 * values.std()


def test_exact_mean_equals_the_recursion_written_out(generator):
    y = simulate(SCALAR, 6, generator)
    statistic = AdditiveStatistic(
        lambda x, x_next, y, time: torch.cat([x * x_next, (x_next - y).square() * time + 0 * x], -1),
        initial=lambda x, y: torch.cat([x, y - x], -1),
    )
    states, _ = run(paris(SCALAR, statistic, num_particles=9, num_backward=None), y, generator, chains=2)
    for chain in range(2):
        tau = torch.stack([torch.cat([x, y[0] - x]) for x in states[0].particles[chain]])
        for time in range(1, 6):
            old, new = states[time - 1], states[time].particles[chain]
            rows = []
            for x_next in new:
                weights = (
                    old.log_weights[chain].exp() * (-(x_next - 0.9 * old.particles[chain]).square() / 0.72).exp()[:, 0]
                )
                terms = [
                    weight * (value + torch.cat([x * x_next, (x_next - y[time]) ** 2 * time]))
                    for weight, value, x in zip(weights / weights.sum(), tau, old.particles[chain])
                ]
                rows.append(sum(terms))
            tau = torch.stack(rows)
        torch.testing.assert_close(states[-1].statistic[chain], tau, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [
    {"num_backward": None}, {"num_backward": 1}, {"backward": "exact"}, {"backward": "hybrid"},
    {"backward": "rejection"}, {"backward": "metropolis"}, {"resampling": "stratified"}, {"threshold": 0.3},
], ids=str)  # fmt: skip
def test_a_constant_statistic_counts_the_steps(options, generator):
    y = simulate(SCALAR, 8, generator)
    states, infos = run(
        paris(SCALAR, lambda x, x_next, y, time: 1 + 0 * x * x_next, num_particles=5, **options), y, generator
    )
    for time, state in enumerate(states):
        torch.testing.assert_close(state.statistic, torch.full_like(state.statistic, time), rtol=0, atol=1e-12)
        torch.testing.assert_close(state.log_weights.logsumexp(-1), torch.zeros(1).double(), rtol=0, atol=1e-12)
    for info in infos:
        assert bool((info.effective >= 1).all())
        assert bool((info.effective <= 5 + 1e-9).all())


def test_one_transition(generator):
    y = simulate(SCALAR, 2, generator)
    states, _ = run(paris(SCALAR, product, num_particles=3000), y, generator, chains=40)
    assert within_six(states[-1].estimate, exact_product(SCALAR, y))


@pytest.mark.parametrize("proposal", [None, LinearGaussianProposal(SCALAR)], ids=["bootstrap", "guided"])
@pytest.mark.parametrize("options", [{}, {"resampling": "systematic"}, {"threshold": 0.5}], ids=str)
def test_the_likelihood_is_unbiased(proposal, options, generator):
    y = simulate(SCALAR, 11, generator)
    kernel = paris(SCALAR, product, num_particles=50, num_backward=1, proposal=proposal, **options)
    states, _ = run(kernel, y, generator, chains=4000)
    ratio = (states[-1].log_likelihood - kalman_smoother(SCALAR, y).log_likelihood).exp()
    assert within_six(ratio.unsqueeze(1), 1.0)
    # The logarithm is not: the same test tells the two apart.
    assert not within_six(ratio.log().unsqueeze(1), 0.0)


def test_a_guided_filter_keeps_more_particles_alive_and_gives_the_same_estimates(generator):
    model = LinearGaussianModel.scalar(0.9, 0.6, 0.3)
    y = simulate(model, 20, generator)
    plain = run(paris(model, product, num_particles=1000), y, generator, chains=20)
    guided = run(
        paris(model, product, num_particles=1000, proposal=LinearGaussianProposal(model)), y, generator, chains=20
    )
    assert within_six(guided[0][-1].estimate, exact_product(model, y))
    assert torch.stack([i.effective for i in guided[1]]).mean() > torch.stack([i.effective for i in plain[1]]).mean()
    assert guided[0][-1].log_likelihood.std() < plain[0][-1].log_likelihood.std()


def test_one_draw_degenerates_and_two_do_not(generator):
    y = simulate(SCALAR, 101, generator)
    spread = [
        run(paris(SCALAR, product, num_particles=50, num_backward=draws), y, generator, chains=40)[0][-1].estimate.std()
        for draws in (1, 2)
    ]
    assert spread[1] < spread[0]


@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_missing_observations_are_skipped(threshold, generator):
    y = simulate(SCALAR, 12, generator)
    y[[0, 4, 5]] = torch.nan
    states, infos = run(paris(SCALAR, product, num_particles=2000, threshold=threshold), y, generator, chains=12)
    assert within_six(states[-1].estimate, exact_product(SCALAR, y))
    torch.testing.assert_close(infos[3].log_increment, torch.zeros(12).double(), rtol=0, atol=1e-12)


def test_chains_with_data_of_their_own(generator):
    y = torch.stack([simulate(SCALAR, 8, generator) for _ in range(3)])
    y[1, 5:] = torch.nan
    kernel = paris(SCALAR, product, num_particles=4000)
    states, _ = run(kernel, y.repeat_interleave(12, 0), generator, chains=36)
    exact = exact_product(SCALAR, y)
    for index in range(3):
        assert within_six(states[-1].estimate[12 * index : 12 * index + 12], exact[index])
    assert (exact[0] - exact[1]).abs() > 0.5


def test_a_model_of_volatility_runs_and_agrees_with_its_own_exact_mean(generator):
    scale = torch.tensor([0.4], dtype=torch.float64)
    model = BootstrapModel(
        initial_mean=torch.zeros(1, dtype=torch.float64),
        initial_scale=scale / (1 - 0.95**2) ** 0.5,
        mean=lambda x, time: 0.95 * x,
        scale=scale,
        log_observation=lambda x, y, time: (-0.5 * (x + y.square() * (-x).exp())).sum(-1),
    )
    y = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    draws, mean = (
        run(paris(model, product, num_particles=200, num_backward=count), y, generator, chains=100)[0][-1].estimate
        for count in (2, None)
    )
    assert within_six(draws, mean.mean())
    assert within_six(mean, draws.mean())


@pytest.mark.parametrize("options", [{}, {"num_backward": None}, {"backward": "metropolis"}], ids=str)
def test_single_precision_gives_the_same_estimates(options, generator):
    y = simulate(SCALAR, 15, generator)
    single = BootstrapModel(
        initial_mean=torch.zeros(1),
        initial_scale=torch.tensor([0.6 / 0.19**0.5]),
        mean=lambda x, time: 0.9 * x,
        scale=torch.tensor([0.6]),
        log_observation=lambda x, y, time: -0.5 * (y - x).square().sum(-1),
    )
    states, _ = run(paris(single, product, num_particles=600, **options), y.float(), generator, chains=15)
    assert states[-1].particles.dtype == torch.float32
    assert within_six(states[-1].estimate, exact_product(SCALAR, y))


def test_bad_options():
    for options, message in (
        ({"num_particles": 1}, "two or more particles"),
        ({"num_backward": 0}, "at least 1 draw"),
        ({"num_backward": None, "backward": "hybrid"}, "choose one"),
        ({"backward": "none"}, "backward is one of"),
        ({"resampling": "residual"}, "resampling is one of"),
        ({"threshold": 0.0}, "threshold is a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            paris(SCALAR, product, **{"num_particles": 10, **options})


def test_bad_input(generator):
    kernel = paris(SCALAR, product, num_particles=10)
    y = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ShapeError, match="an observation is"):
        kernel.init(torch.zeros(1, 2, 3), generator=generator)
    with pytest.raises(ShapeError, match="set chains to match"):
        kernel.init(torch.zeros(4, 1), generator=generator)
    with pytest.raises(ConfigError, match="one generator for all or 3"):
        kernel.init(y, generator=[generator], chains=3)
    state = kernel.init(y, generator=generator)
    with pytest.raises(DataError, match="no particle explains the observation at time 1"):
        kernel.step(state, torch.tensor([1e200], dtype=torch.float64), generator=generator)
    flat = paris(SCALAR, lambda x, x_next, y, time: (x * x_next).sum(-1), num_particles=10)
    with pytest.raises(ShapeError, match="pair returns"):
        flat.step(state, y, generator=generator)
    odd = FiniteModel(torch.zeros(2).log_softmax(-1), torch.zeros(2, 2).log_softmax(-1), lambda y, time: y * torch.nan)
    with pytest.raises(DataError, match="at time 0 is not a number"):
        paris(odd, product, num_particles=10).init(torch.zeros(2), generator=generator)
