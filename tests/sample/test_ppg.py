"""PPG: its two laws by enumeration and by simulation, its bias beside that of PaRIS, and the baselines."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.draws import draw_index, uniform
from kullback.sample.exact_smoothing import hmm_paths, hmm_smoother, kalman_paths
from kullback.sample.paris import paris
from kullback.sample.ppg import particle_gibbs, path_statistic, ppg, ppg_rollout
from kullback.sample.state_space import AdditiveStatistic, FiniteModel, LinearGaussianModel, LinearGaussianProposal

sys.path.insert(0, str(Path(__file__).parent))
from _smoothing import exact_product, product, simulate, spatial, within_six

SCALAR = LinearGaussianModel.scalar(0.9, 0.6, 1.0)
INITIAL = [0.6, 0.4]
TRANSITION = [[0.8, 0.2], [0.3, 0.7]]
EMISSION = [[0.5, 1.0], [1.0, 0.25], [0.3, 0.9]]  # by time and state
GUIDE = [[[0.3, 0.7], [0.3, 0.7]], [[0.6, 0.4], [0.5, 0.5]], [[0.2, 0.8], [0.4, 0.6]]]  # by time, old and new state
COIN = FiniteModel(
    torch.tensor(INITIAL, dtype=torch.float64).log(),
    torch.tensor(TRANSITION, dtype=torch.float64).log(),
    lambda y, time: torch.tensor(EMISSION[time], dtype=torch.float64).log() + 0 * y,
)
BLIND = torch.zeros(3, 1, dtype=torch.float64)
PATHS = list(itertools.product((0, 1), repeat=3))


class Guide:
    """A proposal for the two-state model that is neither the model nor optimal."""

    def __init__(self):
        self.table = torch.tensor(GUIDE, dtype=torch.float64).log()

    def sample_init(self, shape, observation, *, generator):
        draws = uniform(shape, generator)
        return draw_index(self.table[0, 0].expand(shape[0], -1), draws).double().unsqueeze(-1)

    def log_init(self, x, observation):
        return self.table[0, 0][x[..., 0].long()]

    def sample_trans(self, x, observation, time, *, generator):
        return draw_index(self.table[time][x[..., 0].long()], uniform(x.shape, generator)).to(x.dtype)

    def log_trans(self, x, x_next, observation, time):
        return self.table[time][x[..., 0].long(), x_next[..., 0].long()]


def posterior():
    """phi over the eight paths, and E[sum x_{t-1} x_t]."""
    joint = []
    for a, b, c in PATHS:
        prior = INITIAL[a] * TRANSITION[a][b] * TRANSITION[b][c]
        joint.append(prior * EMISSION[0][a] * EMISSION[1][b] * EMISSION[2][c])
    phi = torch.tensor(joint, dtype=torch.float64)
    return phi / phi.sum(), torch.tensor([a * b + b * c for a, b, c in PATHS], dtype=torch.float64)


def backward_weights(x, w, state):
    mass = [w[l] * TRANSITION[x[l]][state] for l in range(2)]
    return [value / sum(mass) for value in mass]


def forward_outcomes(path, guided, variant):
    """Every (probability, particles, weights) of a conditional pass with one free particle beside the held path."""
    first = GUIDE[0][0] if guided else INITIAL
    outcomes = []
    for free in (0, 1):
        x = (free, path[0])
        w = tuple(EMISSION[0][s] * (INITIAL[s] / GUIDE[0][0][s] if guided else 1.0) for s in x)
        outcomes.append((first[free], [x], [w]))
    for time in (1, 2):
        grown = []
        for probability, xs, ws in outcomes:
            total = sum(ws[-1])
            for parent, state in itertools.product((0, 1), (0, 1)):
                chance = ws[-1][parent] / total
                if variant == "held particle has no children":
                    chance = float(parent == 0)
                move = GUIDE[time] if guided else TRANSITION
                x = (state, path[time])
                parents = (xs[-1][parent], xs[-1][1])
                w = []
                for old, new in zip(parents, x):
                    w.append(EMISSION[time][new] * (TRANSITION[old][new] / GUIDE[time][old][new] if guided else 1.0))
                grown.append((probability * chance * move[xs[-1][parent]][state], [*xs, x], [*ws, tuple(w)]))
        outcomes = grown
    return outcomes


def sweep_by_enumeration(path, *, guided=False, variant=""):
    """The law of the new path, and the mean of the estimate, of one sweep of PPG with N = 2."""
    law, estimate = torch.zeros(8, dtype=torch.float64), 0.0
    for probability, xs, ws in forward_outcomes(path, guided, variant):
        for last, middle, first in itertools.product((0, 1), repeat=3):
            weights = [ws[0], ws[1]]
            if variant == "weights of the wrong time":
                weights = [ws[1], ws[2]]
            chance = ws[2][last] / sum(ws[2])
            chance *= backward_weights(xs[1], weights[1], xs[2][last])[middle]
            chance *= backward_weights(xs[0], weights[0], xs[1][middle])[first]
            drawn = (xs[0][first], xs[1][middle], xs[2][last])
            law[PATHS.index(drawn)] += probability * chance
            estimate += probability * chance * (drawn[0] * drawn[1] + drawn[1] * drawn[2])
    return law, estimate


def transition_matrix(**options):
    return torch.stack([sweep_by_enumeration(path, **options)[0] for path in PATHS])


@pytest.mark.parametrize("guided", [False, True])
def test_a_sweep_leaves_the_smoothing_law_and_is_unbiased_under_it_by_enumeration(guided):
    phi, values = posterior()
    matrix = transition_matrix(guided=guided)
    torch.testing.assert_close(matrix.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(phi @ matrix, phi, rtol=0, atol=1e-12)
    means = torch.tensor([sweep_by_enumeration(path, guided=guided)[1] for path in PATHS], dtype=torch.float64)
    torch.testing.assert_close(phi @ means, phi @ values, rtol=0, atol=1e-12)
    torch.testing.assert_close(hmm_smoother(COIN, BLIND).pair[0, :, 1, 1].sum(), phi @ values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["held particle has no children", "weights of the wrong time"])
def test_the_enumeration_rejects_wrong_samplers(variant):
    phi, _ = posterior()
    assert (phi @ transition_matrix(variant=variant) - phi).abs().max() > 1e-3


@pytest.mark.parametrize("guided", [False, True])
def test_the_sampler_has_the_enumerated_transitions(guided, generator):
    matrix, repeats = transition_matrix(guided=guided), 20_000
    kernel = ppg(COIN, product, BLIND, num_particles=2, proposal=Guide() if guided else None)
    held = torch.tensor(PATHS, dtype=torch.float64).unsqueeze(-1).repeat_interleave(repeats, 0)
    state, info = kernel.step(kernel.init(held, generator=generator), generator=generator)
    codes = (state.path.squeeze(-1) @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()
    shares = torch.nn.functional.one_hot(codes, 8).double().reshape(8, repeats, 8).mean(1)
    width = 6 * (matrix * (1 - matrix) / repeats).sqrt() + 1 / repeats
    assert bool(((shares - matrix).abs() <= width).all())
    estimates = info.estimate.reshape(8, repeats, 1)
    for index, path in enumerate(PATHS):
        assert within_six(estimates[index], sweep_by_enumeration(path, guided=guided)[1])
    wrong = transition_matrix(guided=guided, variant="held particle has no children")
    assert not bool(((shares - wrong).abs() <= width).all())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("refresh", ["backward", "ancestor", "traced"])
def test_baselines_leave_the_smoothing_law(refresh, guided, generator):
    phi, values = posterior()
    kernel = particle_gibbs(
        COIN, product, BLIND, num_particles=3, refresh=refresh, proposal=Guide() if guided else None
    )
    held = hmm_paths(COIN, BLIND, 100_000, generator=generator).double().unsqueeze(-1)
    state, info = kernel.step(kernel.init(held, generator=generator), generator=generator)
    codes = (state.path.squeeze(-1) @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()
    assert within_six(torch.nn.functional.one_hot(codes, 8).double(), phi)
    assert within_six(info.estimate, phi @ values)
    torch.testing.assert_close(info.estimate, path_statistic(product, state.path, BLIND))
    assert bool((info.renewed > 0).any())


OPTIONS = [
    {},
    {"num_backward": 1},
    {"num_backward": None},
    {"backward": "hybrid"},
    {"backward": "metropolis", "steps": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["1d", "3d"])
def test_one_sweep_from_an_exact_path_is_unbiased(name, options, generator):
    model, count = {"1d": (SCALAR, 20_000), "3d": (spatial(), 5_000)}[name]
    y = simulate(model, 21, generator)
    exact = exact_product(model, y)
    kernel = ppg(model, product, y, num_particles=3, **options)
    held = kalman_paths(model, y, count, generator=generator)
    state, info = kernel.step(kernel.init(held, generator=generator), generator=generator)
    assert within_six(info.estimate, exact)
    assert within_six(path_statistic(product, state.path, y), exact)
    assert not within_six(path_statistic(product, 0.97 * state.path, y), exact)


def test_plain_paris_fails_the_same_test(generator):
    y = simulate(SCALAR, 21, generator)
    kernel = paris(SCALAR, product, num_particles=3)
    state = kernel.init(y[0], generator=generator, chains=5_000)
    for row in y[1:]:
        state, _ = kernel.step(state, row, generator=generator)
    error = (state.estimate - exact_product(SCALAR, y)).squeeze(-1)
    assert error.mean().abs() > 12 * error.std() / 5_000**0.5


def test_a_guided_sweep_is_unbiased(generator):
    y = simulate(SCALAR, 21, generator)
    kernel = ppg(SCALAR, product, y, num_particles=3, proposal=LinearGaussianProposal(SCALAR))
    held = kalman_paths(SCALAR, y, 20_000, generator=generator)
    assert within_six(
        kernel.step(kernel.init(held, generator=generator), generator=generator)[1].estimate, exact_product(SCALAR, y)
    )


def test_the_bias_dies_out_from_a_bad_start(generator):
    y = simulate(SCALAR, 21, generator)
    exact = exact_product(SCALAR, y)
    kernel = ppg(SCALAR, product, y, num_particles=10)
    start = kernel.init(torch.full((21, 1), 5.0, dtype=torch.float64), generator=generator, chains=2000)
    rollout = ppg_rollout(kernel, 8, 6, generator=generator, state=start)
    assert not within_six(rollout.per_sweep[:, 0], exact)
    assert within_six(rollout.mean, exact)
    torch.testing.assert_close(rollout.mean, rollout.per_sweep[:, 6:].mean(1))
    assert rollout.state.sweeps == 8


def test_averaging_over_particles_beats_the_single_path(generator):
    y = simulate(SCALAR, 21, generator)
    held = kalman_paths(SCALAR, y, 2000, generator=generator)
    spread = []
    for kernel in (ppg(SCALAR, product, y, num_particles=20), particle_gibbs(SCALAR, product, y, num_particles=20)):
        spread.append(kernel.step(kernel.init(held, generator=generator), generator=generator)[1].estimate.var())
    assert spread[0] < 0.5 * spread[1]


def test_traced_paths_are_hardly_renewed(generator):
    y = simulate(SCALAR, 81, generator)
    renewed = []
    for refresh in ("traced", "ancestor", "backward"):
        kernel = particle_gibbs(SCALAR, product, y, num_particles=10, refresh=refresh)
        _, info = kernel.step(kernel.init(generator=generator, chains=50), generator=generator)
        renewed.append(info.renewed.mean().item())
    assert renewed[0] < 0.5
    assert min(renewed[1:]) > 0.8


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_constant_statistic_counts_the_steps(options, generator):
    y = simulate(SCALAR, 9, generator)
    ones = AdditiveStatistic(lambda x, x_next, y, time: 1 + 0 * x * x_next, lambda x, y: 2 + 0 * x)
    rollout = ppg_rollout(ppg(SCALAR, ones, y, num_particles=4, **options), 3, generator=generator, chains=2)
    torch.testing.assert_close(rollout.per_sweep, torch.full((2, 3, 1), 10.0).double(), rtol=0, atol=1e-12)


def test_sequences_of_their_own_and_missing_observations(generator):
    y = torch.stack([simulate(SCALAR, 10, generator) for _ in range(2)])
    y[1, 6:] = torch.nan
    exact = exact_product(SCALAR, y)
    rollout = ppg_rollout(
        ppg(SCALAR, product, y.repeat_interleave(400, 0), num_particles=20), 8, 4, generator=generator
    )
    for index in range(2):
        assert within_six(rollout.mean[400 * index : 400 * index + 400], exact[index])


def test_bad_input(generator):
    y = simulate(SCALAR, 5, generator)
    kernel = ppg(SCALAR, product, y, num_particles=4)
    with pytest.raises(ShapeError, match=r"a path is .* T\+1 = 5"):
        kernel.init(torch.zeros(4, 1), generator=generator)
    with pytest.raises(ShapeError, match="do not make 3 chains"):
        kernel.init(torch.zeros(2, 5, 1), generator=generator, chains=3)
    with pytest.raises(DataError, match="finite everywhere"):
        kernel.init(y * torch.nan, generator=generator)
    with pytest.raises(ConfigError, match="burn_in is less"):
        ppg_rollout(kernel, 2, 2, generator=generator)
    with pytest.raises(ConfigError, match="leave chains out"):
        ppg_rollout(kernel, 2, generator=generator, state=kernel.init(generator=generator), chains=2)
    with pytest.raises(ConfigError, match="refresh is one of"):
        particle_gibbs(SCALAR, product, y, num_particles=4, refresh="none")
    with pytest.raises(ConfigError, match="two or more"):
        ppg(SCALAR, product, y, num_particles=1)
    with pytest.raises(ShapeError, match="observations are"):
        ppg(SCALAR, product, y[:, 0], num_particles=4)
    with pytest.raises(ShapeError, match="a state for each"):
        path_statistic(product, torch.zeros(1, 4, 1), y)
