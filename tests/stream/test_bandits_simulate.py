"""The compiled simulator beside policy objects, its regrets beside the card's, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.stream import bandits
from kullback.stream.bandits import simulate as sim
from kullback.stream.bandits.lower_bounds import kl_upper_bound
from kullback.stream.bandits.stochastic import kl_ucb_budget

pytest.importorskip("numba")

HORIZON, ARMS = 600, 5
TWINS = {
    "explore_first": ({}, lambda: bandits.ExploreFirst(ARMS, horizon=HORIZON)),
    "successive_elimination": (
        {"exploration": 0.1},
        lambda: bandits.SuccessiveElimination(ARMS, horizon=HORIZON, exploration=0.1),
    ),
    "ucb1": ({"ties": "first"}, lambda: bandits.UCB1(ARMS, horizon=HORIZON, ties="first")),
    "ucb1, any time": ({"anytime": True}, lambda: bandits.UCB1(ARMS)),
    "ucb_v": ({}, lambda: bandits.UCBV(ARMS, horizon=HORIZON)),
    "ucb_v, any time": ({"anytime": True}, lambda: bandits.UCBV(ARMS)),
    "kl_ucb": ({}, lambda: bandits.KLUCB(ARMS)),
    "epsilon_greedy": ({"epsilon": 0.0}, lambda: bandits.EpsilonGreedy(ARMS, epsilon=0.0)),
}


@pytest.mark.parametrize("name", TWINS)
def test_compiled_policy_pulls_the_arms_of_the_policy_object(name, generator):
    """On a table of rewards without ties nothing is left to chance: regret and counts agree round by round."""
    table = torch.rand(HORIZON, ARMS, generator=generator, dtype=torch.float64) * torch.tensor(
        [0.3, 0.9, 0.5, 1.0, 0.7]
    )
    options, make = TWINS[name]
    kwargs = {"generator": generator, "points": HORIZON}
    fast = sim.simulate(name.split(",")[0], sim.RewardTable(table), HORIZON, **kwargs, **options)
    naive = sim.simulate(make, sim.RewardTable(table), HORIZON, **kwargs)
    assert torch.equal(fast.pulls, naive.pulls)
    torch.testing.assert_close(fast.curves, naive.curves, rtol=0, atol=1e-9)
    assert fast.pulls.min() < fast.pulls.max()


WORLDS = {
    "coins": torch.tensor([0.6, 0.5, 0.5, 0.4]),
    "rare": torch.tensor([0.02, 0.01, 0.01, 0.0]),
    "sure": torch.tensor([1.0, 0.9, 0.5, 1.0]),
    "many": torch.cat([torch.tensor([0.7]), torch.full((29,), 0.5)]),
}


def largest_indices(table, factor):
    """Arms by KL-UCB with every index computed in every round, ties to the lowest number."""
    counts, sums, chosen = np.zeros(table.shape[1]), np.zeros(table.shape[1]), []
    for moment, row in enumerate(table):
        arm = moment
        if moment >= len(row):
            level = kl_ucb_budget(moment, factor)
            arm = int(np.argmax([kl_upper_bound(s / n, level / n) for s, n in zip(sums, counts, strict=True)]))
        counts[arm] += 1.0
        sums[arm] += row[arm]
        chosen.append(arm)
    return chosen


@pytest.mark.parametrize("factor", [3.0, 0.0, -0.5])
@pytest.mark.parametrize("name", WORLDS)
def test_kl_ucb_pulls_as_if_every_index_were_computed(name, factor, generator):
    """Coins, so that many indices tie; the loop computes one in ten."""
    means = WORLDS[name].double()
    table = (torch.rand(1500, len(means), generator=generator, dtype=torch.float64) < means).double().numpy()
    found = sim.simulate(
        "kl_ucb", sim.RewardTable(table), 1500, generator=generator, points=1500, ties="first", factor=factor
    )
    chosen = largest_indices(table, factor)
    assert found.pulls[0].tolist() == np.bincount(chosen, minlength=len(means)).tolist()
    received = np.cumsum(table[np.arange(1500), chosen])
    expected = torch.from_numpy(table.cumsum(0).max(1) - received)
    torch.testing.assert_close(found.curves[0], expected, rtol=0, atol=1e-9)
    if name != "sure":
        assert chosen != largest_indices(table, factor + 0.5)


def test_normal_and_gamma_numbers_of_the_compiled_loops_have_their_laws():
    """A million of each against their distribution functions, the normal ones beyond the lowest layer's end as well."""
    from numba import njit
    from scipy import stats

    from kullback.stream.bandits import _compiled_thompson as loops

    @njit
    def filled(shape, z, out):
        kept = np.zeros((3, 1))
        loops.prepare(max(shape, 0.1), 0, 0, kept)
        for place in range(len(out)):
            if shape == 0.0:
                out[place], z = loops.normal(z)
            else:
                out[place], z = loops.gamma(kept[0, 0], kept[1, 0], kept[2, 0], z)

    count = 1_000_000
    values = np.empty(count)
    for shape in (0.0, 0.3, 1.0, 400.0):
        filled(shape, np.uint64(7), values)
        law = stats.gamma(shape) if shape else stats.norm()
        edges = law.ppf(np.linspace(0.01, 0.99, 99))
        shares = np.searchsorted(np.sort(values), edges) / count
        assert np.abs(shares - np.linspace(0.01, 0.99, 99)).max() < 6 * 0.5 / count**0.5
        for edge in law.isf([1e-3, 2e-4, 5e-5]):
            expected = law.sf(edge)
            assert abs((values > edge).mean() - expected) < 6 * (expected / count) ** 0.5
    filled(0.0, np.uint64(7), values)
    assert abs((values < -3.6).mean() - stats.norm.sf(3.6)) < 6 * (stats.norm.sf(3.6) / count) ** 0.5


def test_hedge_finds_back_to_an_arm_that_was_bad_for_long():
    """Its weight has been too small for a number; later it is the better arm."""
    table = np.zeros((12_000, 2))
    table[:4000, 0], table[4000:, 1] = 1.0, 1.0
    found = sim.simulate("hedge", sim.RewardTable(table), 12_000, generator=stream(0, "x"), rate=0.3, points=12_000)
    naive = sim.simulate(
        lambda: bandits.Hedge(2, rate=0.3), sim.RewardTable(table), 12_000,
        generator=stream(0, "x"), points=12_000,
    )  # fmt: skip
    moments = [3999, 7900, 11_999]
    torch.testing.assert_close(found.curves[0, moments], naive.curves[0, moments], atol=40, rtol=0)
    assert found.pulls[0, 1] > 3900


LAWS = {
    "epsilon_greedy": ({}, lambda: bandits.EpsilonGreedy(3)),
    "ucb1": ({}, lambda: bandits.UCB1(3, horizon=60)),
    "kl_ucb": ({}, lambda: bandits.KLUCB(3)),
    "thompson_beta": ({}, lambda: bandits.ThompsonBeta(3)),
    "thompson_beta, another prior": ({"prior": (0.5, 2.0)}, lambda: bandits.ThompsonBeta(3, prior=(0.5, 2.0))),
    "thompson_gaussian": ({"noise": 0.5}, lambda: bandits.ThompsonGaussian(3, noise=0.5)),
    "exp3": ({"rate": 0.2, "mixing": 0.1}, lambda: bandits.Exp3(3, rate=0.2, mixing=0.1)),
    "exp3_ix": ({}, lambda: bandits.Exp3IX(3, horizon=60)),
    "exp3_p": ({}, lambda: bandits.Exp3P(3, horizon=60)),
    "exp3_s": ({"switches": 3}, lambda: bandits.Exp3S(3, horizon=60, switches=3)),
    "tsallis_inf": ({}, lambda: bandits.TsallisINF(3)),
    "hedge": ({}, lambda: bandits.Hedge(3, horizon=60)),
}


@pytest.mark.parametrize("name", LAWS)
def test_compiled_policy_has_the_regret_of_the_policy_object(name, generator):
    options, make = LAWS[name]
    environment = sim.Bernoulli([0.2, 0.8, 0.5])
    fast = sim.simulate(name.split(",")[0], environment, 60, runs=20_000, generator=generator, **options)
    naive = sim.simulate(make, environment, 60, runs=150, generator=generator)
    assert abs(fast.mean - naive.mean) < 6 * math.hypot(fast.error, naive.error)
    other = sim.simulate("explore_first", environment, 60, runs=100, generator=generator, pulls=20)
    assert abs(other.mean - naive.mean) > 6 * naive.error  # the check would see another policy


MEASURED = {  # the card's regrets after 20,000 rounds of one arm of 0.6 and nine of 0.5
    "explore_first": (306.0, 0.5),
    "epsilon_greedy": (454.6, 3.6),
    "successive_elimination": (1800.0, 0.0),
    "ucb1": (887.9, 10.4),
    "thompson_beta": (181.9, 8.2),
    "exp3": (604.8, 19.4),
    "hedge": (81.6, 3.1),
}


@pytest.mark.parametrize("name", MEASURED)
def test_regret_is_the_cards(name, generator):
    result = sim.simulate(name, sim.Bernoulli([0.6] + 9 * [0.5]), 20_000, runs=100, generator=generator)
    value, error = MEASURED[name]
    assert abs(result.mean - value) <= 6 * math.hypot(error, result.error) + 0.5


def test_seed_and_workers(generator):
    run = lambda seed, workers: sim.simulate(  # noqa: E731
        "thompson_beta", sim.Bernoulli([0.3, 0.6]), 300, runs=7, generator=stream(seed, "runs"), workers=workers
    )
    one, two, other = run(1, 1), run(1, 2), run(2, 1)
    assert torch.equal(one.curves, two.curves)
    assert torch.equal(one.pulls, two.pulls)
    assert not torch.equal(one.curves, other.curves)
    assert len(one.curves.unique(dim=0)) == 7


def test_counts_and_curves_add_up(generator):
    means = torch.tensor([0.1, 0.7, 0.4], dtype=torch.float64)
    for policy in ("epsilon_greedy", "exp3"):
        result = sim.simulate(policy, sim.Bernoulli(means), 1000, runs=4, generator=generator, points=7)
        assert result.pulls.sum(-1).tolist() == 4 * [1000]
        torch.testing.assert_close(result.pulls.double() @ (0.7 - means), result.final)
        assert result.steps[-1] == 1000
        assert (result.curves.diff() >= 0).all()


def test_every_run_has_its_own_means(generator):
    means = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    result = sim.simulate("explore_first", sim.Bernoulli(means), 2, runs=50, generator=generator, pulls=1)
    torch.testing.assert_close(result.final, (means[:, 0] - means[:, 1]).abs())


def test_gaussian_rewards_have_their_moments(generator):
    environment = sim.Gaussian([0.0, 1.0], deviation=2.0)
    fast = sim.simulate("thompson_gaussian", environment, 200, runs=4000, generator=generator, noise=2.0)
    naive = sim.simulate(lambda: bandits.ThompsonGaussian(2, noise=2.0), environment, 200, runs=60, generator=generator)
    assert abs(fast.mean - naive.mean) < 6 * math.hypot(fast.error, naive.error)


def test_a_sequence_that_fools_ucb1_does_not_fool_exp3(generator):
    """The card's claim in small: UCB1 loses T (1 - 1/K), Exp3 stays within its bound."""
    horizon = 5000
    table = sim.fooling_table(bandits.UCB1(10, horizon=horizon, ties="first"), 10, horizon)
    fooled = sim.simulate("ucb1", table, horizon, generator=generator, ties="first")
    assert fooled.mean >= horizon * 0.9
    exp3 = sim.simulate("exp3", table, horizon, runs=20, generator=generator)
    assert exp3.mean <= math.sqrt(2 * horizon * 10 * math.log(10))


def test_bayesian_regret_is_below_the_information_bound(generator):
    means = torch.rand(400, 10, generator=generator, dtype=torch.float64)
    result = sim.simulate("thompson_beta", sim.Bernoulli(means), 2000, runs=400, generator=generator)
    assert 0 < result.mean < math.sqrt(0.5 * 2000 * 10 * math.log(10))


def test_exact_regret_of_uniform_play():
    policy = bandits.EpsilonGreedy(2, epsilon=1.0)
    value = sim.exact_regret(policy, [0.2, 0.8], 4)
    assert value == pytest.approx(4 * 0.3)
    assert policy.seen.rounds == 0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda g: sim.simulate("ucb2", sim.Bernoulli([0.5]), 10, generator=g), ConfigError),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli([0.5]), 10, generator=g, rate=1.0), ConfigError),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli([0.5]), 10, generator=g, ties="last"), ConfigError),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli([0.5]), 0, generator=g), ConfigError),
        (
            lambda g: sim.simulate(lambda: bandits.UCB1(1), sim.Bernoulli([0.5]), 9, generator=g, ties="first"),
            ConfigError,
        ),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli([0.5, math.nan]), 10, generator=g), DataError),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli([0.5, 1.5]), 10, generator=g), DataError),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli([]), 10, generator=g), ShapeError),
        (lambda g: sim.simulate("ucb1", sim.Bernoulli(np.ones((3, 2))), 10, runs=2, generator=g), ShapeError),
        (lambda g: sim.simulate("ucb1", sim.RewardTable(np.ones((3, 2))), 10, generator=g), ShapeError),
        (lambda g: sim.simulate("ucb1", sim.RewardTable(2 * np.ones((10, 2))), 10, generator=g), DataError),
        (lambda g: sim.simulate("ucb1", sim.Gaussian([0.5], deviation=-1.0), 10, generator=g), DataError),
    ],
)
def test_bad_input_is_named(call, error, generator):
    with pytest.raises(error):
        call(generator)
