"""Chapters 5 and 6: regrets that hold for every sequence of costs, and estimates that are unbiased, by enumeration."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream import bandits
from kullback.stream.bandits.adversarial import exp3_rate, tsallis_law
from kullback.stream.bandits.experts import unbounded_hedge_rate, weighted_majority_bound


def sequences(rounds, arms, generator):
    """Costs [rounds, arms] of several kinds, those that mislead a leader among them."""
    alternating = torch.zeros(rounds, arms, dtype=torch.float64)
    alternating[0::2, 0], alternating[1::2, 1] = 1.0, 1.0
    switching = torch.ones(rounds, arms, dtype=torch.float64)
    switching[: rounds // 2, 0], switching[rounds // 2 :, 1] = 0.0, 0.0
    random = torch.rand(rounds, arms, generator=generator, dtype=torch.float64)
    return {"alternating": alternating, "switching": switching, "random": random, "coins": random.round()}


def hedge_regret(learner, costs):
    paid = 0.0
    for row in costs:
        paid += float(torch.from_numpy(learner.probabilities()) @ row)
        learner.observe(row)
    return paid - costs.sum(0).min().item()


@pytest.mark.parametrize("kind", ["alternating", "switching", "random", "coins"])
@pytest.mark.parametrize(("rounds", "arms"), [(10, 2), (300, 7)])
def test_hedge_is_within_its_bound_on_any_sequence(kind, rounds, arms, generator):
    costs = sequences(rounds, arms, generator)[kind]
    for rate in (0.05, 0.5, math.sqrt(8 * math.log(arms) / rounds)):
        bound = math.log(arms) / rate + rate * rounds / 8
        assert hedge_regret(bandits.Hedge(arms, rate=rate), costs) <= bound + 1e-9
    assert hedge_regret(bandits.Hedge(arms, horizon=rounds), costs) <= math.sqrt(rounds * math.log(arms) / 2) + 1e-9


def test_hedge_bound_bites_on_a_leader_that_is_followed(generator):
    """Following the leader is Hedge at an infinite rate: it pays every round of the alternating sequence."""
    costs = sequences(300, 2, generator)["alternating"]
    assert hedge_regret(bandits.Hedge(2, rate=1e6), costs) > 5 * math.sqrt(300 * math.log(2) / 2)


def test_hedge_against_an_adversary_that_charges_the_likely_arm():
    learner, paid, sums = bandits.Hedge(5, horizon=400), 0.0, np.zeros(5)
    for _ in range(400):
        law = learner.probabilities()
        costs = np.eye(5)[law.argmax()]
        paid, sums = paid + law @ costs, sums + costs
        learner.observe(costs)
    regret = paid - sums.min()
    assert 0.2 * math.sqrt(200 * math.log(5)) < regret <= math.sqrt(200 * math.log(5))


def test_multiplicative_form_is_the_exponential_one(generator):
    one, other = bandits.Hedge(3, epsilon=0.2), bandits.Hedge(3, rate=-math.log(0.8))
    for costs in torch.rand(20, 3, generator=generator):
        one.observe(costs)
        other.observe(costs)
    np.testing.assert_allclose(one.probabilities(), other.probabilities(), rtol=1e-12)
    weights = np.array([1.0, 1.0])
    learner = bandits.Hedge(2, epsilon=0.5)
    learner.observe([1.0, 0.0])
    np.testing.assert_allclose(learner.probabilities(), weights * [0.5, 1.0] / 1.5)


def test_unbounded_costs_keep_the_books_order(generator):
    rounds, arms = 400, 4
    costs = 3.0 * torch.rand(rounds, arms, generator=generator, dtype=torch.float64)
    second = 9.0  # sum_a p_a c_a^2 <= 9
    learner = bandits.Hedge(arms, rate=unbounded_hedge_rate(arms, rounds, second), signed=True)
    assert hedge_regret(learner, costs) <= 2 * math.sqrt(3 * second * rounds * math.log(arms))


def test_halving_and_weighted_majority_make_no_more_mistakes_than_they_may(generator):
    experts, rounds = 16, 200
    labels = torch.randint(3, (rounds,), generator=generator)
    advice = torch.randint(3, (rounds, experts), generator=generator)
    advice[:, 5] = labels
    learner = bandits.Halving(experts)
    for row, label in zip(advice, labels, strict=True):
        learner.observe(row, int(label))
    assert 0 < learner.mistakes <= math.log2(experts)
    wrong = torch.rand(rounds, generator=generator) < 0.1
    advice[wrong, 5] = (labels[wrong] + 1) % 3
    learner = bandits.WeightedMajority(experts)
    for row, label in zip(advice, labels, strict=True):
        learner.observe(row, int(label))
    best = int((advice != labels[:, None]).sum(0).min())
    assert best < learner.mistakes <= weighted_majority_bound(experts, best)
    with pytest.raises(DataError, match="perfect"):
        bandits.Halving(2).observe([1, 1], 0)


# -- bandits against an adversary ------------------------------------------------------------------------------------


def fake_costs(policy, costs, rate):
    """The law of play, and the fake costs for every arm that can be played, read off the weights after an update."""
    law, table = policy.probabilities().copy(), []
    for arm in range(len(costs)):
        copy = type(policy)(len(costs), rate=rate, mixing=policy.mixing, implicit=policy.implicit, bonus=policy.bonus)
        copy.load_state_dict(policy.state_dict())
        copy.update(arm, 1.0 - costs[arm], None)
        change = policy.log_weights - copy.log_weights
        table.append((change - change[(arm + 1) % len(costs)]) / rate)
    return law, np.array(table)


@pytest.mark.parametrize("mixing", [0.0, 0.3])
def test_fake_costs_are_unbiased(mixing):
    policy = bandits.Exp3(4, rate=0.3, mixing=mixing)
    for arm, reward in ((0, 0.2), (1, 0.9), (3, 0.5)):
        policy.update(arm, reward, None)
    costs = np.array([0.7, 0.1, 1.0, 0.4])
    law, table = fake_costs(policy, costs, 0.3)
    np.testing.assert_allclose(law @ table, costs, rtol=1e-9)
    np.testing.assert_allclose((law[:, None] * law * table**2).sum(), (costs**2).sum(), rtol=1e-9)
    implicit = bandits.Exp3(4, rate=0.3, implicit=0.15)
    law, table = fake_costs(implicit, costs, 0.3)
    assert (law @ table < costs).all()  # Exp3-IX is biased down: the check sees it


def test_update_divides_by_the_probability_it_is_told():
    policy, logged = bandits.Exp3(2, rate=0.1), bandits.Exp3(2, rate=0.1)
    policy.update(0, 0.0, None)
    logged.update(0, 0.0, None, probability=0.5)
    np.testing.assert_allclose(policy.log_weights, logged.log_weights)
    logged.update(0, 0.0, None, probability=0.25)
    change = logged.log_weights[1] - logged.log_weights[0]
    assert change == pytest.approx(0.1 * (1 / 0.5 + 1 / 0.25))
    for bad in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(DataError, match="probability"):
            policy.update(0, 0.5, None, probability=bad)


def test_exp4_with_constant_experts_is_exp3(generator):
    arms, rounds = 4, 300
    rewards = torch.rand(rounds, arms, generator=generator, dtype=torch.float64)
    state = generator.get_state()
    played = []
    for policy, context in (
        (bandits.Exp3(arms, horizon=rounds), None),
        (bandits.Exp4(arms, arms, horizon=rounds), np.eye(arms)),
    ):
        generator.set_state(state)
        arms_played = []
        for row in rewards:
            arm = policy.pull(context, generator=generator)
            policy.update(arm, float(row[arm]), context)
            arms_played.append(arm)
        played.append(arms_played)
    assert played[0] == played[1]
    assert len(set(played[0])) == arms


def test_exp4_follows_the_best_expert(generator):
    """The good arm depends on the context; one of 50 experts knows it."""
    experts, arms, rounds = 50, 3, 1500
    policy, missed = bandits.Exp4(experts, arms, horizon=rounds, dtype=np.float32), 0
    for _ in range(rounds):
        good = int(torch.randint(arms, (1,), generator=generator))
        advice = np.eye(arms)[torch.randint(arms, (experts,), generator=generator).numpy()]
        advice[17] = np.eye(arms)[good]
        arm = policy.pull(advice, generator=generator)
        policy.update(arm, float(arm == good), advice)
        missed += arm != good
    assert missed <= math.sqrt(2 * rounds * arms * math.log(experts))
    assert missed < rounds * (1 - 1 / arms) / 2
    assert policy.log_weights.argmax() == 17


def played_cost(policy, costs, generator):
    paid = 0.0
    for row in costs.tolist():
        arm = policy.pull(None, generator=generator)
        policy.update(arm, 1.0 - row[arm], None)
        paid += row[arm]
    return paid


def test_exp3s_follows_a_switch_that_exp3_does_not(generator):
    costs = sequences(3000, 4, generator)["switching"]
    plain = played_cost(bandits.Exp3(4, horizon=3000), costs, generator)
    following = played_cost(bandits.Exp3S(4, horizon=3000, switches=1), costs, generator)
    bound = math.sqrt(2 * 3000 * 4 * (2 * math.log(4) + math.log(math.e * 3000)))
    assert following <= bound
    assert following < 0.75 * plain


@pytest.mark.parametrize("make", [bandits.Exp3IX, bandits.Exp3P])
def test_high_probability_variants_keep_their_bounds_in_every_run(make, generator):
    rounds, arms = 1500, 4
    costs = sequences(rounds, arms, generator)["alternating"]
    bound = 5.15 * math.sqrt(rounds * arms * math.log(arms / 0.05))
    for _ in range(3):
        regret = played_cost(make(arms, horizon=rounds), costs, generator) - costs.sum(0).min().item()
        assert regret <= bound


def test_tsallis_law_sums_to_one_where_newton_is_hard():
    for costs in ([0.0, 0.0], [0.0, 1e6, 1e-9], [0.0] + 99 * [3.0]):
        for rate in (1e-4, 1.0, 50.0):
            costs = np.array(costs)
            law, gap = tsallis_law(costs, rate)
            np.testing.assert_allclose(tsallis_law(costs, rate, 100 * gap)[0], law, rtol=1e-9)
            assert law.sum() == pytest.approx(1.0, abs=1e-12)
            x = costs - 2 / (rate * np.sqrt(law))  # the same x for all arms
            assert np.ptp(x[law > 1e-12]) < 1e-6 * max(1.0, abs(x).max())


@pytest.mark.parametrize("estimator", ["weighted", "reduced"])
def test_tsallis_inf_is_near_best_for_coins_and_on_a_switch(estimator, generator):
    coins = (
        torch.rand(3000, 4, generator=generator, dtype=torch.float64) < torch.tensor([0.3, 0.6, 0.6, 0.6])
    ).double()
    for costs in (coins, sequences(3000, 4, generator)["alternating"]):
        regret = played_cost(bandits.TsallisINF(4, estimator=estimator), costs, generator) - costs.sum(0).min().item()
        assert regret <= 4 * math.sqrt(3000 * 4) + 1


def test_tsallis_estimates_are_unbiased():
    costs = np.array([0.9, 0.2, 0.5])
    for estimator in ("weighted", "reduced"):
        policy = bandits.TsallisINF(3, estimator=estimator)
        policy.update(0, 0.4, None)
        law, before = policy.probabilities(), policy.costs.copy()
        mean = np.zeros(3)
        for arm in range(3):
            copy = bandits.TsallisINF(3, estimator=estimator)
            copy.load_state_dict(policy.state_dict())
            copy.update(arm, 1.0 - costs[arm], None)
            change = copy.costs - before
            mean += law[arm] * (change - change[0])
        np.testing.assert_allclose(mean - mean[0], costs - costs[0], atol=1e-9)


def test_exp3_rate_is_the_books():
    assert exp3_rate(10, 20_000) == pytest.approx(math.sqrt(2 * math.log(10) / 200_000))
    assert math.sqrt(2 * 20_000 * 10 * math.log(10)) == pytest.approx(959.7, abs=0.05)
    assert math.sqrt(20_000 * math.log(10) / 2) == pytest.approx(151.7, abs=0.05)


def test_bad_input_is_named():
    calls = {
        ConfigError: [
            lambda: bandits.Exp3(2),
            lambda: bandits.Exp3(2, rate=-1.0),
            lambda: bandits.Exp3(2, rate=1.0, mixing=2.0),
            lambda: bandits.Exp3P(2, horizon=10, confidence=0.0),
            lambda: bandits.Exp3S(2, horizon=10, switches=10),
            lambda: bandits.TsallisINF(2, estimator="other"),
            lambda: bandits.Hedge(2),
            lambda: bandits.Hedge(2, epsilon=1.0),
            lambda: bandits.WeightedMajority(2, epsilon=0.0),
        ],
        DataError: [
            lambda: bandits.Hedge(2, rate=1.0).observe([0.5, 1.5]),
            lambda: bandits.Hedge(2, rate=1.0).observe([0.5, math.nan]),
            lambda: bandits.Exp4(2, 2, rate=1.0).probabilities([[1.5, -0.5], [1.0, 0.0]]),
        ],
        ShapeError: [
            lambda: bandits.Hedge(2, rate=1.0).observe([0.5]),
            lambda: bandits.Exp4(2, 2, rate=1.0).probabilities([0.5, 0.5]),
        ],
    }
    for error, listed in calls.items():
        for call in listed:
            with pytest.raises(error):
                call()


def test_enumerated_regret_of_exp3_agrees_with_its_draws(generator):
    from kullback.stream.bandits.simulate import Bernoulli, exact_regret, simulate

    exact = exact_regret(bandits.Exp3(2, rate=0.5), [0.9, 0.2], 4)
    result = simulate(lambda: bandits.Exp3(2, rate=0.5), Bernoulli([0.9, 0.2]), 4, runs=1500, generator=generator)
    assert abs(result.mean - exact) < 6 * result.error
    histories = list(product(range(2), repeat=4))
    assert len(histories) * 0.7 > exact > 0  # of the right size at all
