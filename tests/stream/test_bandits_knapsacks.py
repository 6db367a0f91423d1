"""Chapters 10 and 11: budgets and their linear program, and recommendations that people want to follow."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream import bandits
from kullback.stream.bandits import incentives, knapsacks


def uniform(generator, *shape):
    return torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()


def pricing(horizon, supply=0.25):
    prices = np.arange(1, 11) / 10
    return knapsacks.pricing(prices, 1 - prices, supply=supply * horizon, horizon=horizon)


def reference(rewards, use, budget, horizon):
    """The program as scipy solves it, in totals over all rounds."""
    rows = np.vstack([use.T, np.ones(len(rewards))])
    limits = np.append(np.full(use.shape[1], budget), horizon)
    return -optimize.linprog(-rewards, A_ub=rows, b_ub=limits).fun


@pytest.mark.parametrize("resources", [1, 2, 4])
def test_program_is_scipys(resources, generator):
    for _ in range(30):
        rewards, use = uniform(generator, 6), uniform(generator, 6, resources)
        budget = 100 * float(uniform(generator, 1)[0]) + 1
        value, law = bandits.bwk_lp(rewards, use, budget=budget, horizon=100)
        assert value == pytest.approx(reference(rewards, use, budget, 100), rel=1e-8)
        assert law.min() >= 0
        assert law.sum() <= 1 + 1e-9
        assert (law @ use <= budget / 100 + 1e-9).all()
        assert 100 * rewards @ law == pytest.approx(value)


def test_program_without_time_is_wrong():
    """One arm that uses nothing would be worth its reward for ever: the sum of the distribution is what stops it."""
    value, law = bandits.bwk_lp([0.5, 0.9], [[0.0], [1.0]], budget=10, horizon=100)
    assert value == pytest.approx(100 * (0.9 * 0.5 + 0.1 * 0.9))
    assert law.tolist() == pytest.approx([0.9, 0.1])


def test_program_of_linear_demand_by_hand():
    """Ten prices p, sold with probability 1 - p, supply of a quarter: p = 3/4 would do, between 0.7 and 0.8."""
    instance = pricing(1000)
    weight = (0.3 - 0.25) / (0.3 - 0.2)
    assert instance.value() == pytest.approx(1000 * ((1 - weight) * 0.21 + weight * 0.16))


def test_policies_stop_before_a_budget_goes_below_zero(generator):
    instance = pricing(400, supply=0.1)
    always_cheapest = type("Cheapest", (), {"pull": lambda *a, **k: 0, "update": lambda *a, **k: None})()
    played = bandits.play_knapsack(always_cheapest, instance, generator=generator)
    assert played.used[0] == 40
    assert played.rounds < 100
    assert played.reward == pytest.approx(4.0)
    null = type("Null", (), {"pull": lambda *a, **k: 10, "update": lambda *a, **k: None})()
    played = bandits.play_knapsack(null, instance, generator=generator)
    assert (played.rounds, played.reward, played.used[0]) == (400, 0.0, 0.0)
    assert played.used[1] == pytest.approx(40)


POLICIES = {
    "primal-dual": (lambda i: bandits.PrimalDualBwK(i.arms, i.resources, **budget(i), exploration=0.5), 0.6),
    "optimistic": (lambda i: bandits.UcbBwK(i.arms, i.resources, **budget(i), exploration=0.1), 0.7),
    "lagrange": (lambda i: bandits.LagrangeBwK(i.arms, i.resources, **budget(i)), 0.35),
}


def budget(instance):
    return {"budget": instance.budget, "horizon": instance.horizon}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_earn_a_share_of_the_program(name, generator):
    make, least = POLICIES[name]
    shares = []
    for _ in range(2):
        instance = pricing(3000)
        shares.append(bandits.play_knapsack(make(instance), instance, generator=generator).reward / instance.value())
    assert least < np.mean(shares) < 1.1
    blind = bandits.UCB1(11, horizon=3000, exploration=0.5)
    adapter = type(
        "Blind", (), {"pull": blind.pull, "update": lambda self, arm, reward, use: blind.update(arm, reward)}
    )
    earned = bandits.play_knapsack(adapter(), pricing(3000), generator=generator).reward / pricing(3000).value()
    if name == "optimistic":
        assert earned < np.mean(shares)


@pytest.mark.parametrize("world", ["procurement", "ads"])
def test_other_worlds(world, generator):
    if world == "procurement":
        prices = np.array([0.2, 0.5, 0.8])
        instance = knapsacks.procurement(prices, [0.2, 0.6, 0.9], budget=300, horizon=1500)
        assert instance.value() == pytest.approx(
            reference(instance.chances, instance.chances[:, None] * prices[:, None], 300, 1500)
        )
    else:
        instance = knapsacks.ad_allocation([0.3, 0.5, 0.4], [1.0, 0.5, 0.8], [0, 0, 1], budget=200, horizon=1500)
        assert instance.resources == 3
        assert instance.uses.tolist() == [[1.0, 0.0], [0.5, 0.0], [0.0, 0.8]]
    policy = bandits.PrimalDualBwK(instance.arms, instance.resources, **budget(instance), exploration=0.2)
    played = bandits.play_knapsack(policy, instance, generator=generator)
    assert 0.4 * instance.value() < played.reward < 1.1 * instance.value()
    assert (played.used <= instance.budget + 1e-9).all()


def test_compiled_knapsack_earns_what_the_policy_earns(generator):
    pytest.importorskip("numba")
    instance = pricing(1500)
    for blind in (False, True):
        name = "ucb1" if blind else "primal_dual"
        fast = knapsacks.simulate_knapsack(name, instance, runs=200, exploration=0.5, generator=generator)
        naive = []
        for _ in range(10):
            policy = bandits.PrimalDualBwK(11, 2, **budget(instance), exploration=0.5)
            if blind:
                inner = bandits.UCB1(11, horizon=1500, exploration=0.5)
                policy = type("Blind", (), {"pull": inner.pull, "update": lambda s, a, r, u, i=inner: i.update(a, r)})()
            naive.append(bandits.play_knapsack(policy, instance, generator=generator).reward)
        error = math.hypot(np.std(naive, ddof=1) / math.sqrt(10), np.std(fast, ddof=1) / math.sqrt(200))
        assert abs(np.mean(naive) - np.mean(fast)) < 6 * error
    assert abs(np.mean(fast) - instance.value()) > 6 * error


def test_lagrange_payoffs_are_in_range_and_right(generator):
    policy = bandits.LagrangeBwK(3, 2, budget=25, horizon=100)
    policy.pull(None, generator=generator)
    policy.resource = 0
    before = policy.dual.log_weights.copy()
    policy.update(0, 1.0, [1.0, 0.25])
    change = (before - policy.dual.log_weights) / policy.dual.rate
    # L = 2 - 4 = -2 for the first resource and 2 - 1 = 1 for time; from [-3, 2] to [0, 1]
    assert change[1] - change[0] == pytest.approx((1 - -2) / 5)


def test_bad_knapsacks_are_refused():
    with pytest.raises(ShapeError, match="as many"):
        knapsacks.pricing([0.1, 0.2], [0.5], supply=5, horizon=10)
    with pytest.raises(DataError, match="0, 1"):
        knapsacks.pricing([0.1], [1.5], supply=5, horizon=10)
    with pytest.raises(ConfigError, match="budget"):
        knapsacks.pricing([0.1], [0.5], supply=0, horizon=10)
    with pytest.raises(ShapeError, match="consumption"):
        bandits.bwk_lp([0.5], [0.5], budget=1, horizon=2)
    with pytest.raises(ConfigError, match="budget"):
        bandits.bwk_lp([0.5], [[0.5]], budget=-1, horizon=2)
    with pytest.raises(ConfigError, match="budget"):
        bandits.PrimalDualBwK(2, 2, budget=20, horizon=10)
    with pytest.raises(ConfigError, match="policy"):
        knapsacks.simulate_knapsack("other", pricing(10), generator=torch.Generator())
    with pytest.raises(ConfigError, match="shrink"):
        bandits.UcbBwK(2, 2, budget=5, horizon=10, shrink=1.0)
    with pytest.raises(DataError, match="consumption"):
        bandits.PrimalDualBwK(2, 2, budget=5, horizon=10).update(0, 0.5, [1.5, 0.5])


# -- incentives ------------------------------------------------------------------------------------------------------

FINITE = bandits.FinitePrior([[0.8, 0.4], [0.3, 0.6], [0.5, 0.5]], [0.5, 0.3, 0.2])


@pytest.mark.parametrize("successes", [0, 1, 3])
def test_gap_of_a_beta_prior_by_quadrature(successes):
    prior = bandits.BetaPrior((3.0, 2.0), (1.0, 2.0))
    weight = lambda m: stats.beta(3, 2).pdf(m) * stats.binom.pmf(successes, 3, m)  # noqa: E731
    total = integrate.quad(weight, 0, 1)[0]
    mean = integrate.quad(lambda m: m * weight(m), 0, 1)[0] / total
    assert bandits.posterior_gap(prior, 3, successes) == pytest.approx(1 / 3 - mean, abs=1e-9)
    assert prior.gaps(3)[0][successes] == pytest.approx(total, abs=1e-9)
    assert prior.gaps(3)[0].sum() == pytest.approx(1.0)


def test_gap_of_a_finite_prior_by_enumeration_of_outcomes():
    chance, gap = np.zeros(3), np.zeros(3)
    for (first, second), weight in zip(FINITE.means, FINITE.weights, strict=True):
        for one in (0, 1):
            for two in (0, 1):
                mass = weight * np.prod([first if outcome else 1 - first for outcome in (one, two)])
                chance[one + two] += mass
                gap[one + two] += mass * (second - first)
    np.testing.assert_allclose(FINITE.gaps(2)[0], chance)
    np.testing.assert_allclose(FINITE.gaps(2)[1], gap / chance)


@pytest.mark.parametrize("prior", [FINITE, bandits.BetaPrior((3.0, 2.0), (1.0, 2.0))])
def test_the_books_epsilon_is_incentive_compatible_and_a_large_one_is_not(prior):
    samples = 6
    epsilon = bandits.max_bic_epsilon(prior, samples)
    assert epsilon > 0
    for explorer in (1, 0, np.arange(samples + 1) % 2, np.linspace(0, 1, samples + 1)):
        assert bandits.is_bic(prior, samples, epsilon, explorer=explorer)
    assert not bandits.is_bic(prior, samples, 1.0)
    assert not bandits.is_bic(prior, samples, 0.9)


def test_without_a_signal_that_can_change_the_mind_nothing_is_allowed():
    prior = bandits.FinitePrior([[0.8, 0.4], [0.7, 0.3]], [0.5, 0.5])
    assert bandits.max_bic_epsilon(prior, 5) == 0.0
    with pytest.raises(ConfigError, match="epsilon"):
        bandits.HiddenExploration(prior, 5)


def test_recommendations_explore_as_often_as_they_may(generator):
    hidden = bandits.HiddenExploration(FINITE, 4, epsilon=0.25)
    signals = [(hidden.recommend(4, 1, generator=generator)) for _ in range(2000)]
    assert all(explored == (arm == 1) for arm, explored in signals)
    share = np.mean([explored for _, explored in signals])
    assert abs(share - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 2000)
    assert hidden.recommend(0, 0, generator=generator)[0] in (0, 1)


def test_repeated_exploration_hides_one_round_in_every_phase(generator):
    inner = bandits.ThompsonBeta(2)
    policy = bandits.RepeatedHE(inner, FINITE, 4, epsilon=0.1)
    arms = []
    for _ in range(4 + 20 * policy.phase):
        arm = policy.pull(None, generator=generator)
        arms.append(arm)
        policy.update(arm, float(torch.rand((), generator=generator) < (0.9, 0.2)[arm]), None)
    assert arms[:4] == [0, 0, 0, 0]
    assert inner.parameters.sum() - 4 == 20
    exploit = int(policy.hidden.gaps[policy.signal] > 0)
    assert sum(arm != exploit for arm in arms[4:]) <= 20
    with pytest.raises(DataError, match="0 or 1"):
        policy.update(0, 0.5, None)


def test_bad_priors_are_refused():
    with pytest.raises(DataError, match="positive"):
        bandits.posterior_gap(bandits.BetaPrior((0.0, 1.0), (1.0, 1.0)), 2, 1)
    with pytest.raises(ShapeError, match="pairs"):
        bandits.max_bic_epsilon(bandits.FinitePrior([[0.5, 0.5]], [0.5, 0.5]), 2)
    with pytest.raises(DataError, match="successes"):
        bandits.posterior_gap(FINITE, 2, 3)
    with pytest.raises(ConfigError, match="epsilon"):
        bandits.is_bic(FINITE, 2, 1.5)
    with pytest.raises(ConfigError, match="samples"):
        incentives.max_bic_epsilon(FINITE, -1)
