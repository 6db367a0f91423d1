"""Chapters 1 to 3: index policies, lower bounds, posteriors, and the compiled simulator beside policy objects."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream import bandits
from kullback.stream.bandits import simulate as sim
from kullback.stream.bandits.lower_bounds import kl_upper_bound


def play(policy, rewards, rounds, generator):
    """The arms pulled when arm a pays rewards[a] always, or rewards[t, a] in round t."""
    table = np.broadcast_to(rewards, (rounds, np.shape(rewards)[-1]))
    arms = []
    for row in table:
        arms.append(policy.pull(None, generator=generator))
        policy.update(arms[-1], float(row[arms[-1]]), None)
    return arms


# -- lower bounds ----------------------------------------------------------------------------------------------------


def test_lai_robbins_constant_of_the_card():
    constant = bandits.lai_robbins_constant([0.6] + 9 * [0.5])
    assert constant == pytest.approx(44.094, abs=5e-4)
    assert constant * math.log(20_000) == pytest.approx(436.68, abs=5e-3)
    swapped = 9 * 0.1 / bandits.bernoulli_kl(0.6, 0.5)
    assert abs(swapped - constant) > 0.5


def test_book_form_is_weaker():
    assert bandits.lai_robbins_constant([0.6, 0.5], form="book") == pytest.approx(2.4)
    with pytest.raises(ConfigError, match="form"):
        bandits.lai_robbins_constant([0.6], form="other")


@pytest.mark.parametrize("edge", [0.01, 0.2, 0.49])
def test_divergence_of_two_coins_is_below_the_books_bounds(edge):
    biased = 0.5 * (1 + edge)
    assert bandits.bernoulli_kl(biased, 0.5) <= 2 * edge**2
    assert bandits.bernoulli_kl(0.5, biased) <= edge**2


def test_pinsker_on_every_event_of_eight_tosses():
    p, q = stats.binom(8, 0.55), stats.binom(8, 0.5)
    divergence = 8 * bandits.bernoulli_kl(0.55, 0.5)
    for event in range(2**9):
        chosen = [k for k in range(9) if event >> k & 1]
        difference = p.pmf(chosen).sum() - q.pmf(chosen).sum()
        assert 2 * difference**2 <= divergence


def test_two_coins_are_not_told_apart_below_the_bound():
    for edge in (0.1, 0.3):
        tosses = bandits.min_samples_two_coins(edge) - 1
        distance = abs(
            stats.binom(tosses, 0.5).pmf(range(tosses + 1)) - stats.binom(tosses, (1 + edge) / 2).pmf(range(tosses + 1))
        )
        assert 0.5 * distance.sum() < 0.5  # so that the two errors add up to more than 1/2


def test_worst_case_instance_needs_rounds():
    assert bandits.worst_case_instance(4, 400, best=2) == [0.5, 0.5, 0.525, 0.5]
    with pytest.raises(ConfigError, match="too few"):
        bandits.worst_case_instance(10, 2)


@pytest.mark.parametrize("mean", [0.0, 1e-9, 0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("budget", [0.0, 1e-10, 1e-3, 0.3, 4.0])
def test_kl_upper_bound_solves_its_equation(mean, budget):
    bound = kl_upper_bound(mean, budget)
    assert mean <= bound <= 1.0
    if budget > 0.0 and bound < 1.0 - 1e-9:
        assert bandits.bernoulli_kl(mean, bound) == pytest.approx(budget, rel=1e-6, abs=1e-13)


# -- index policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [500, 3000])
def test_bad_arm_of_a_deterministic_instance_is_pulled_as_often_as_the_bound_says(horizon, generator):
    most = math.ceil(8 * math.log(horizon)) + 1
    for policy in (bandits.UCB1(2, horizon=horizon), bandits.SuccessiveElimination(2, horizon=horizon)):
        arms = play(policy, [1.0, 0.0], horizon, generator)
        assert 1 < arms.count(1) <= most
    wasteful = bandits.UCB1(2, horizon=horizon, exploration=32.0)
    assert play(wasteful, [1.0, 0.0], horizon, generator).count(1) > min(most, horizon // 3)


def test_ucb1_bad_arm_count_is_where_the_radii_cross(generator):
    horizon = 1000
    pulls = play(bandits.UCB1(2, horizon=horizon), [1.0, 0.0], horizon, generator).count(1)
    radius = lambda n: math.sqrt(2 * math.log(horizon) / n)  # noqa: E731
    good = horizon - pulls
    assert radius(pulls) <= 1.0 + radius(good) + 0.01
    assert radius(pulls - 1) >= 1.0


def test_explore_first_of_the_card():
    assert bandits.ExploreFirst(10, horizon=20_000).pulls == 340


def test_explore_first_explores_in_turn_and_commits(generator):
    arms = play(bandits.ExploreFirst(3, pulls=4), [0.2, 0.9, 0.5], 30, generator)
    assert arms[:12] == 4 * [0, 1, 2]
    assert set(arms[12:]) == {1}


def test_elimination_drops_only_arms_below_and_never_the_best(generator):
    policy = bandits.SuccessiveElimination(4, horizon=4000)
    play(policy, [1.0, 0.9, 0.3, 0.0], 4000, generator)
    assert policy.active.tolist() == [True, True, False, False]


def test_epsilon_greedy_explores_as_often_as_it_says(generator):
    policy = bandits.EpsilonGreedy(10)
    assert policy.epsilon() == 1.0
    expected = 0.0
    other = 0
    for moment in range(4000):
        expected += 0.9 * policy.epsilon() if moment >= 10 else 0.9
        arm = policy.pull(None, generator=generator)
        other += arm != 0
        policy.update(arm, float(arm == 0), None)
    assert abs(other - expected) < 6 * math.sqrt(expected)


def test_kl_ucb_index_is_above_every_larger_candidate(generator):
    policy = bandits.KLUCB(5)
    rewards = torch.rand(400, 5, generator=generator, dtype=torch.float64).numpy() * [0.5, 0.9, 1.0, 0.1, 0.9]
    play(policy, rewards, 400, generator)
    seen = policy.seen
    budget = math.log(401) + 3 * math.log(math.log(401))
    exact = np.array([kl_upper_bound(m, budget / n) for m, n in zip(seen.means, seen.counts, strict=True)])
    index = policy.index(seen)
    assert index.argmax() == exact.argmax()
    assert index.max() == exact.max()


def test_kl_ucb_prefers_an_arm_that_always_pays():
    """Its index is 1, and above that of an arm with one reward, whose bound by Pinsker is 1 as well."""
    policy = bandits.KLUCB(2, ties="first")
    policy.update(0, 0.5, None)
    for _ in range(20_000):
        policy.update(1, 1.0, None)
    index = policy.index(policy.seen)
    assert index[1] == 1.0 > index[0]


def test_ucb_v_knows_the_variance(generator):
    """Two arms without any: UCB-V needs of the order of 1/gap pulls of the worse one, UCB1 of 1/gap^2."""
    policies = bandits.UCBV(2, horizon=3000), bandits.UCB1(2, horizon=3000)
    seldom, often = (play(policy, [0.5, 0.4], 3000, generator).count(1) for policy in policies)
    assert seldom < 0.6 * often


@pytest.mark.parametrize("make", [bandits.UCB1, bandits.KLUCB, bandits.BayesUCB])
def test_ties_go_to_all_arms_or_to_the_first(make, generator):
    played = [make(4) for _ in range(200)]
    for policy in played:
        play(policy, [0.5] * 4, 4, generator)
    counts = np.bincount([policy.pull(None, generator=generator) for policy in played], minlength=4)
    assert counts.min() > 50 - 6 * math.sqrt(200 * 3 / 16)
    first = make(4, ties="first")
    play(first, [0.5] * 4, 4, generator)
    assert first.pull(None, generator=generator) == 0


def test_doubling_restarts_at_powers_of_two(generator):
    lengths = []

    def make(length):
        lengths.append(length)
        return bandits.SuccessiveElimination(2, horizon=length)

    policy = bandits.Doubling(make)
    play(policy, [0.0, 1.0], 20, generator)
    assert lengths == [1, 2, 4, 8, 16]
    assert policy.left == 31 - 20
    state = policy.state_dict()
    copy = bandits.Doubling(lambda length: bandits.SuccessiveElimination(2, horizon=length))
    copy.load_state_dict(state)
    assert copy.pull(None, generator=generator) == policy.pull(None, generator=generator)


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan])
def test_rewards_outside_the_range_are_refused(bad):
    with pytest.raises(DataError, match="reward"):
        bandits.UCB1(2).update(0, bad, None)


def test_a_reward_range_scales(generator):
    plain, scaled = bandits.UCB1(2, horizon=300), bandits.UCB1(2, horizon=300, reward_range=(-2.0, 8.0))
    first, second = play(plain, [0.4, 0.6], 300, generator), play(scaled, [2.0, 4.0], 300, generator)
    assert first.count(1) == pytest.approx(second.count(1), abs=2)


def test_bad_options_are_named():
    for call in (
        lambda: bandits.UCB1(0),
        lambda: bandits.UCB1(2.5),
        lambda: bandits.UCB1(2, exploration=0.0),
        lambda: bandits.UCB1(2, horizon=0),
        lambda: bandits.UCB1(2, ties="last"),
        lambda: bandits.UCB1(2, reward_range=(1.0, 1.0)),
        lambda: bandits.UCBV(2, bias=-1.0),
        lambda: bandits.ExploreFirst(2),
        lambda: bandits.ExploreFirst(2, pulls=0),
        lambda: bandits.EpsilonGreedy(2, epsilon=1.5),
        lambda: bandits.SuccessiveElimination(2, horizon=0),
        lambda: bandits.ThompsonBeta(2, prior=(0.0, 1.0)),
        lambda: bandits.ThompsonGaussian(2, noise=0.0),
        lambda: bandits.BayesUCB(2, exponent=5.0),
    ):
        with pytest.raises(ConfigError):
            call()


# -- posteriors ------------------------------------------------------------------------------------------------------


def test_thompson_with_two_models_draws_by_their_weights(generator):
    policy = bandits.ThompsonFinite([[0.9, 0.1], [0.2, 0.6]], prior=[0.5, 0.5])
    policy.update(0, 1.0, None)
    policy.update(1, 0.0, None)
    weights = np.array([0.9 * 0.9, 0.2 * 0.4])
    np.testing.assert_allclose(policy.probabilities(), weights / weights.sum())
    draws = np.array([policy.pull(None, generator=generator) for _ in range(4000)])
    chance = policy.probabilities()[1]
    assert abs(draws.mean() - chance) < 6 * math.sqrt(chance * (1 - chance) / 4000)


def test_exact_bayesian_regret_of_thompson_is_the_simulators(generator):
    """Two arms, four rounds, two models: by enumeration of the histories, and by simulation."""
    models, prior = [[0.9, 0.3], [0.4, 0.7]], [0.3, 0.7]
    exact = sum(
        weight * sim.exact_regret(bandits.ThompsonFinite(models, prior=prior), model, 4)
        for weight, model in zip(prior, models, strict=True)
    )
    values = []
    for weight, model in zip(prior, models, strict=True):
        make = lambda: bandits.ThompsonFinite(models, prior=prior)  # noqa: E731
        result = sim.simulate(make, sim.Bernoulli(model), 4, runs=1500, generator=generator)
        values.append((weight * result.mean, weight * result.error))
    simulated, error = sum(value for value, _ in values), math.hypot(*(error for _, error in values))
    assert abs(simulated - exact) < 6 * error
    uniform = sum(w * 4 * (max(m) - sum(m) / 2) for w, m in zip(prior, models, strict=True))
    assert abs(uniform - exact) > 6 * error  # the check would see a policy that does not learn


def test_optimal_play_earns_no_less_than_thompson():
    prior = ((1.0, 1.0), (1.0, 1.0))
    value = bandits.bayes_optimal_value(4, prior)
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact for the polynomials that appear
    points, weights = (nodes + 1) / 2, weights / 2
    earned = 0.0
    for x, wx in zip(points, weights, strict=True):
        for y, wy in zip(points, weights, strict=True):
            earned += wx * wy * (4 * max(x, y) - sim.exact_regret(bandits.UCB1(2), [x, y], 4))
    assert 2.0 < earned < value < 4 * 2 / 3


def test_optimal_first_arm_prefers_what_is_less_known():
    assert bandits.bayes_optimal_arm(8, [(10.0, 10.0), (1.0, 1.0)]) == 1
    assert bandits.bayes_optimal_arm(1, [(10.0, 9.0), (1.0, 1.0)]) == 0


def test_beta_posterior_probabilities_are_those_of_its_draws(generator):
    policy = bandits.ThompsonBeta(3)
    for arm, reward in ((0, 1.0), (0, 0.0), (1, 1.0), (2, 0.25)):
        policy.update(arm, reward, None)
    assert policy.parameters[:, 2].tolist() == [1.25, 1.75]
    law = policy.probabilities()
    counts = np.bincount([policy.pull(None, generator=generator) for _ in range(6000)], minlength=3) / 6000
    assert (abs(counts - law) < 6 * np.sqrt(law * (1 - law) / 6000)).all()
    two = bandits.ThompsonBeta(2)
    two.update(0, 1.0, None)
    assert two.probabilities()[0] == pytest.approx(2 / 3, abs=1e-9)  # P(x > y), x ~ Beta(2, 1), y uniform


def test_gaussian_posterior_in_closed_form():
    policy = bandits.ThompsonGaussian(2, mean=1.0, deviation=2.0, noise=0.5)
    for reward in (3.0, 2.0):
        policy.update(0, reward, None)
    mean, deviation = policy.posterior()
    precision = 1 / 4 + 2 / 0.25
    assert mean[0] == pytest.approx((1 / 4 + 5.0 / 0.25) / precision)
    assert deviation[0] == pytest.approx(precision**-0.5)
    assert (mean[1], deviation[1]) == (1.0, 2.0)


def test_bayes_ucb_is_the_quantile():
    policy = bandits.BayesUCB(2, horizon=1000, exponent=5.0)
    for arm, reward in ((0, 1.0), (1, 0.0), (0, 1.0)):
        policy.update(arm, reward, None)
    level = 1 - 1 / (4 * math.log(1000) ** 5)
    np.testing.assert_allclose(policy.index(policy.seen), stats.beta([3, 1], [1, 2]).ppf(level), rtol=1e-9)


def test_bad_priors_and_rewards_are_refused():
    with pytest.raises(ShapeError, match="models"):
        bandits.ThompsonFinite([0.5, 0.5])
    with pytest.raises(DataError, match="NaN"):
        bandits.ThompsonFinite([[0.5, math.nan]])
    with pytest.raises(DataError, match="prior"):
        bandits.ThompsonFinite([[0.5, 0.5]], prior=[-1.0])
    with pytest.raises(DataError, match="0 or 1"):
        bandits.ThompsonFinite([[0.5, 0.5]]).update(0, 0.5, None)
    with pytest.raises(DataError, match="no model"):
        bandits.ThompsonFinite([[1.0, 0.5]]).update(0, 0.0, None)
    with pytest.raises(DataError, match="finite"):
        bandits.ThompsonGaussian(2).update(0, math.inf, None)
    with pytest.raises(ConfigError, match="horizon"):
        bandits.bayes_optimal_value(0)
