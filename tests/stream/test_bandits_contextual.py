"""Chapter 8: contexts, linear models, and learning from logs."""

import math

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream import bandits
from kullback.stream.bandits import contextual, off_policy


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- linear models ---------------------------------------------------------------------------------------------------


def test_one_hot_contexts_give_shrunk_means_per_context(generator):
    policy = bandits.LinUCB(2, 3, alpha=1.0)
    rewards = {}
    for _ in range(60):
        context, arm = (
            int(torch.randint(3, (1,), generator=generator)),
            int(torch.randint(2, (1,), generator=generator)),
        )
        reward = torch.rand((), generator=generator, dtype=torch.float64).item()
        rewards.setdefault((arm, context), []).append(reward)
        policy.update(arm, reward, torch.eye(3)[context])
    for (arm, context), values in rewards.items():
        n = len(values)
        assert policy.fit.theta[arm, context].item() == pytest.approx(sum(values) / (n + 1))
        assert policy.fit.inverse[arm, context, context].item() == pytest.approx(1 / (1 + n))
        bound = policy.bounds(torch.eye(3)[context])[arm].item()
        assert bound == pytest.approx(sum(values) / (n + 1) + 1 / math.sqrt(n + 1))


@pytest.mark.parametrize("shared", [False, True])
def test_rank_one_updates_keep_the_inverse(shared, generator):
    """After a thousand updates Sherman and Morrison's inverse is the direct one, and theta the ridge regression."""
    policy = bandits.LinUCB(3, 6, shared=shared, regularization=0.5)
    rows = {0: [], 1: [], 2: []}
    for _ in range(1000):
        arm = int(torch.randint(3, (1,), generator=generator))
        context = normal(generator, 3, 6) if shared else normal(generator, 6)
        reward = normal(generator).item()
        policy.update(arm, reward, context)
        rows[0 if shared else arm].append((context[arm] if shared else context, reward))
    for model in range(policy.fit.models):
        x, y = torch.stack([x for x, _ in rows[model]]), torch.tensor([y for _, y in rows[model]], dtype=torch.float64)
        precision = x.mT @ x + 0.5 * torch.eye(6, dtype=torch.float64)
        direct = torch.linalg.inv(precision)
        assert (policy.fit.inverse[model] - direct).abs().max() < 1e-8
        assert (policy.fit.theta[model] - direct @ (x.mT @ y)).abs().max() < 1e-8
        assert (policy.fit.precision[model] - precision).abs().max() < 1e-9
    forgetful = policy.fit.inverse[0] - policy.fit.inverse[0] @ torch.ones(6, 6, dtype=torch.float64) * 1e-4
    assert (forgetful - torch.linalg.inv(policy.fit.precision[0])).abs().max() > 1e-8


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [bandits.LinUCB, bandits.LinTS])
def test_a_batch_of_updates_is_its_updates_in_turn(kind, shared, generator):
    one, many = kind(3, 4, shared=shared), kind(3, 4, shared=shared)
    contexts = normal(generator, 50, 3, 4) if shared else normal(generator, 50, 4)
    arms, rewards = torch.randint(3, (50,), generator=generator), normal(generator, 50)
    for arm, reward, context in zip(arms, rewards, contexts, strict=True):
        one.update(int(arm), reward.item(), context)
    many.update_many(arms, rewards, contexts)
    for name in ("precision", "inverse", "moments", "theta"):
        torch.testing.assert_close(getattr(one.fit, name), getattr(many.fit, name), rtol=1e-9, atol=1e-9)
    if kind is bandits.LinUCB:
        arms = many.pull_many(contexts, generator=generator)
        assert arms.tolist() == [one.pull(context, generator=generator) for context in contexts]


def test_linear_thompson_draws_have_the_posterior_law(generator):
    """Disjoint models are drawn through their projections, shared ones as a whole: both have the same law of values."""
    policy = bandits.LinTS(2, 3, scale=0.7, shared=True)
    for _ in range(10):
        policy.update(0, normal(generator).item(), normal(generator, 2, 3))
    x = normal(generator, 2, 3)
    values = policy._values(x.expand(20_000, -1, -1), generator)
    cov = 0.49 * x @ policy.fit.inverse[0] @ x.mT
    error = (cov.diagonal().outer(cov.diagonal()) + cov**2).div(20_000).sqrt()
    assert ((values.T.cov() - cov).abs() < 6 * error).all()
    assert ((values.mean(0) - x @ policy.fit.theta[0]).abs() < 6 * (cov.diagonal() / 20_000).sqrt()).all()
    disjoint = bandits.LinTS(2, 3, scale=0.7)
    disjoint.update(1, 1.0, x[0])
    values = disjoint._values(x[0].expand(20_000, 1, -1), generator)
    variance = 0.49 * torch.stack([x[0] @ disjoint.fit.inverse[arm] @ x[0] for arm in range(2)])
    assert ((values.var(0) - variance).abs() < 6 * variance * math.sqrt(2 / 20_000)).all()
    assert abs(values.T.cov()[0, 1]) < 6 * variance.prod().sqrt() / math.sqrt(20_000)


@pytest.mark.parametrize("kind", [bandits.LinUCB, bandits.LinTS])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_policies_learn(kind, shared, generator):
    truth = normal(generator, 4, 5)
    policy, late = kind(4, 5, shared=shared, **({"alpha": 0.5} if kind is bandits.LinUCB else {"scale": 0.3})), 0.0
    for moment in range(600):
        if shared:
            context = normal(generator, 4, 5)
            means = context @ truth[0]
        else:
            context = normal(generator, 5)
            means = truth @ context
        arm = policy.pull(context, generator=generator)
        policy.update(arm, (means[arm] + 0.1 * normal(generator)).item(), context)
        if moment >= 400:
            late += (means.max() - means[arm]).item() / 200
    assert late < 0.15


def test_bad_contexts_are_named(generator):
    policy = bandits.LinUCB(2, 3)
    with pytest.raises(ShapeError, match="context"):
        policy.pull(torch.zeros(4), generator=generator)
    with pytest.raises(DataError, match="NaN"):
        policy.pull(torch.tensor([0.0, math.nan, 1.0]), generator=generator)
    with pytest.raises(DataError, match="reward"):
        policy.update(0, math.nan, torch.zeros(3))
    with pytest.raises(ShapeError, match="as many"):
        policy.update_many([0, 1], [1.0], torch.zeros(2, 3))
    for call in (
        lambda: bandits.LinUCB(2, 0),
        lambda: bandits.LinUCB(2, 3, alpha=-1.0),
        lambda: bandits.LinUCB(2, 3, regularization=0.0),
        lambda: bandits.LinTS(2, 3, scale=0.0),
        lambda: contextual.confidence_width(1.0),
        lambda: bandits.mesh_cell(0.0),
    ):
        with pytest.raises(ConfigError):
            call()
    assert contextual.confidence_width(0.05) == pytest.approx(1 + math.sqrt(0.5 * math.log(40)))


# -- per context -----------------------------------------------------------------------------------------------------


def test_every_context_has_a_policy_of_its_own(generator):
    policy = bandits.PerContext(lambda: bandits.UCB1(2, horizon=300))
    for moment in range(600):
        context = "ab"[moment % 2]
        arm = policy.pull(context, generator=generator)
        policy.update(arm, float(arm == (context == "b")), context)
    counts = {context: policy.policies[context].seen.counts for context in "ab"}
    assert counts["a"][0] > 270
    assert counts["b"][1] > 270
    copy = bandits.PerContext(lambda: bandits.UCB1(2, horizon=300))
    copy.load_state_dict(policy.state_dict())
    assert copy.policies["b"].seen.counts.tolist() == counts["b"].tolist()


def test_lipschitz_contexts_share_a_cell(generator):
    policy = bandits.PerContext(lambda: bandits.ThompsonBeta(2), key=bandits.mesh_cell(0.5))
    for _ in range(400):
        context = torch.rand(1, generator=generator).tolist()
        arm = policy.pull(context, generator=generator)
        policy.update(arm, float(arm == (context[0] > 0.5)), context)
    assert set(policy.policies) == {(0,), (1,)}
    assert policy.policies[(1,)].parameters[0, 1] > 150


# -- logs ------------------------------------------------------------------------------------------------------------


def logs(rewards, chances):
    """Every log of one round with a given context, with its probability under the logging law."""
    return [
        (bandits.Log(["x"], [arm], [float(rewards[arm])], [float(chances[arm])]), chances[arm])
        for arm in range(len(rewards))
        if chances[arm] > 0
    ]


REWARDS, CHANCES, TARGET = np.array([0.2, 0.9, 0.5]), np.array([0.5, 0.2, 0.3]), np.array([0.1, 0.6, 0.3])


@pytest.mark.parametrize("kind", ["ips", "doubly robust"])
def test_estimates_are_unbiased_by_enumeration_of_the_logging_policy(kind):
    model = (lambda context: [0.7, 0.1, 0.4]) if kind == "doubly robust" else None
    judge = bandits.OffPolicyEstimator(kind, model=model)
    value = sum(chance * judge.value(log, lambda x: TARGET, arms=3).value for log, chance in logs(REWARDS, CHANCES))
    assert value == pytest.approx(float(TARGET @ REWARDS), abs=1e-12)
    wrong = sum(
        chance * judge.value(bandits.Log(log.contexts, log.arms, log.rewards, [0.5]), lambda x: TARGET, arms=3).value
        for log, chance in logs(REWARDS, CHANCES)
    )
    assert abs(wrong - TARGET @ REWARDS) > 0.01  # with other than the logged probabilities it is biased


def test_a_perfect_model_leaves_no_variance():
    judge = bandits.OffPolicyEstimator("doubly robust", model=lambda context: REWARDS)
    values = [judge.value(log, lambda x: TARGET, arms=3).value for log, _ in logs(REWARDS, CHANCES)]
    np.testing.assert_allclose(values, TARGET @ REWARDS, atol=1e-12)
    plain = [
        bandits.OffPolicyEstimator().value(log, lambda x: TARGET, arms=3).value for log, _ in logs(REWARDS, CHANCES)
    ]
    assert np.ptp(plain) > 0.1


def big_log(rounds, generator):
    log = bandits.Log()
    for _ in range(rounds):
        context = int(torch.randint(2, (1,), generator=generator))
        arm = int(torch.multinomial(torch.tensor(CHANCES), 1, generator=generator))
        reward = float(torch.rand((), generator=generator) < (REWARDS[arm] if context else 1 - REWARDS[arm]))
        log.add(context, arm, reward, CHANCES[arm])
    return log


def test_intervals_hold_the_truth_and_clipping_is_reported(generator):
    log = big_log(3000, generator)
    policy = lambda context: TARGET if context else TARGET[::-1]  # noqa: E731
    truth = 0.5 * TARGET @ REWARDS + 0.5 * TARGET[::-1] @ (1 - REWARDS)
    kinds = {
        "ips": {},
        "self-normalised": {},
        "doubly robust": {"model": lambda context: [0.5, 0.5, 0.5]},
        "direct": {"model": lambda context: REWARDS if context else 1 - REWARDS},
    }
    for kind, options in kinds.items():
        estimate = bandits.OffPolicyEstimator(kind, **options).value(log, policy, arms=3)
        assert estimate.low <= truth <= estimate.high
        assert estimate.high - estimate.low < 0.3
        assert estimate.clipped == 0.0
    clipped = bandits.OffPolicyEstimator("clipped", clip=1.0).value(log, policy, arms=3)
    assert clipped.value < truth
    assert 0.1 < clipped.clipped < 0.5
    assert 500 < clipped.effective < 3000


def test_empirical_bernstein_is_the_formula():
    terms = np.array([0.0, 1.0, 1.0, 0.0])
    log = math.log(4 / 0.05)
    expected = math.sqrt(2 * terms.var(ddof=1) * log / 4) + 7 * log / 9
    assert off_policy.empirical_bernstein(terms, 1.0) == pytest.approx(expected)
    assert off_policy.empirical_bernstein(terms[:1], 1.0) == math.inf


def test_policies_are_trained_on_weighted_costs(generator):
    log = big_log(2000, generator)
    costs = off_policy.weighted_costs(log, 3)
    for context, best in ((1, 1), (0, 0)):
        rows = np.array(log.contexts) == context
        means = costs[rows].mean(0)
        assert means.argmin() == best
        assert means == pytest.approx(1 - REWARDS if context else REWARDS, abs=0.15)
    everything = [lambda x, a=a, b=b: a if x else b for a in range(3) for b in range(3)]
    chosen = off_policy.best_of(everything)(log.contexts, costs)
    assert (chosen(1), chosen(0)) == (1, 0)
    linear = off_policy.linear_oracle()([[float(x)] for x in log.contexts], costs)
    assert (linear([1.0]), linear([0.0])) == (1, 0)


@pytest.mark.parametrize("name", ["greedy", "first"])
def test_oracle_policies_learn_and_log_what_they_did(name, generator):
    everything = [lambda x, a=a, b=b: a if x else b for a in range(3) for b in range(3)]
    oracle = off_policy.best_of(everything)
    if name == "greedy":
        policy = bandits.OracleEpsilonGreedy(3, oracle, epsilon=0.2)
    else:
        policy = bandits.OracleExploreFirst(3, oracle, rounds=300)
    for _ in range(1000):
        context = int(torch.randint(2, (1,), generator=generator))
        arm = policy.pull(context, generator=generator)
        reward = float(torch.rand((), generator=generator) < (REWARDS[arm] if context else 1 - REWARDS[arm]))
        policy.update(arm, reward, context)
    assert policy.trained(1) == 1
    assert policy.trained(0) == 0
    if name == "first":
        assert set(policy.log.probabilities[:300]) == {1 / 3}
        assert set(policy.log.probabilities[300:]) == {1.0}
        assert policy.due == math.inf
    else:
        assert min(policy.log.probabilities) == pytest.approx(0.2 / 3)
        assert policy.due == 1024
    arms = np.bincount(policy.log.arms, minlength=3)
    assert arms.min() > 0


def test_decision_service_goes_round(generator):
    everything = [lambda x, a=a, b=b: a if x else b for a in range(3) for b in range(3)]
    service, keys = bandits.DecisionService(3, off_policy.best_of(everything), epsilon=0.5), []
    for _ in range(1500):
        context = int(torch.randint(2, (1,), generator=generator))
        key, arm, chance = service.decide(context, generator=generator)
        assert chance == pytest.approx(0.5 / 3 + 0.5 * (arm == service.deployed(context)))
        keys.append((key, REWARDS[arm] if context else 1 - REWARDS[arm]))
    for key, reward in reversed(keys):  # rewards come late and in another order
        service.reward(key, float(reward))
    policy, estimate = service.learn()
    assert (policy(1), policy(0)) == (1, 0)
    assert estimate.low <= 0.85 <= estimate.high
    service.deploy(policy)
    assert service.deployed(1) == 1
    with pytest.raises(DataError, match="key"):
        service.reward(keys[0][0], 1.0)


def test_bad_logs_are_refused():
    judge = bandits.OffPolicyEstimator()
    with pytest.raises(DataError, match="empty"):
        judge.value(bandits.Log(), lambda x: 0, arms=2)
    for chance in (0.0, -0.1, math.nan, 1.5):
        with pytest.raises(DataError, match="probabilit"):
            bandits.Log().add("x", 0, 1.0, chance)
        with pytest.raises(DataError):
            judge.value(bandits.Log(["x"], [0], [1.0], [chance]), lambda x: 0, arms=2)
    with pytest.raises(ShapeError, match="differ"):
        judge.value(bandits.Log(["x"], [0], [1.0], []), lambda x: 0, arms=2)
    with pytest.raises(DataError, match="law"):
        judge.value(bandits.Log(["x"], [0], [1.0], [0.5]), lambda x: [0.7, 0.7], arms=2)
    with pytest.raises(DataError, match="never plays"):
        bandits.OffPolicyEstimator("self-normalised").value(bandits.Log(["x"], [0], [1.0], [0.5]), lambda x: 1, arms=2)
    for options in (
        {"kind": "other"},
        {"kind": "ips", "clip": 2.0},
        {"kind": "clipped"},
        {"kind": "direct"},
        {"kind": "ips", "model": lambda x: [0.0]},
        {"kind": "ips", "delta": 1.0},
    ):
        with pytest.raises(ConfigError):
            bandits.OffPolicyEstimator(**options)
