"""What every bandit policy obeys, law by law, and for each law a wrong policy that it rejects.

A policy is `pull(context, *, generator) -> arm` and `update(arm, reward, context)`; the table says what it offers.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kullback.stream import bandits

ARMS = 3
MEANS = (0.1, 0.9, 0.5)


@dataclass(frozen=True)
class Row:
    """How to make the policy; the context of a round; whether it has a law, takes sets of arms, learns here."""

    make: Callable
    context: Callable = lambda moment: None
    law: bool = True
    subsets: bool = True
    learns: bool = True
    rounds: int = 400


def features(moment):
    return torch.eye(2, dtype=torch.float64)[moment % 2]


def matrix(moment):
    return torch.stack([features(moment), torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)])


def advice(moment):
    return np.roll(np.eye(ARMS), moment, axis=0)


no_law = {"law": False}
plain = {"law": False, "subsets": False}
TABLE = {
    "explore-first": Row(lambda: bandits.ExploreFirst(ARMS, pulls=10)),
    "epsilon-greedy": Row(lambda: bandits.EpsilonGreedy(ARMS)),
    "elimination": Row(lambda: bandits.SuccessiveElimination(ARMS, horizon=2000), rounds=2000),
    "UCB1": Row(lambda: bandits.UCB1(ARMS, horizon=400)),
    "UCB1, any time": Row(lambda: bandits.UCB1(ARMS)),
    "UCB-V": Row(lambda: bandits.UCBV(ARMS)),
    "KL-UCB": Row(lambda: bandits.KLUCB(ARMS)),
    "doubling": Row(lambda: bandits.Doubling(lambda length: bandits.UCB1(ARMS, horizon=length)), law=False),
    "Thompson, Beta": Row(lambda: bandits.ThompsonBeta(ARMS)),
    "Thompson, Gaussian": Row(lambda: bandits.ThompsonGaussian(ARMS), **no_law),
    "Thompson, finite": Row(lambda: bandits.ThompsonFinite([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.3, 0.3, 0.6]])),
    "Bayes-UCB": Row(lambda: bandits.BayesUCB(ARMS)),
    "Exp3": Row(lambda: bandits.Exp3(ARMS, horizon=400)),
    "Exp3-IX": Row(lambda: bandits.Exp3IX(ARMS, horizon=400)),
    "Exp3.P": Row(lambda: bandits.Exp3P(ARMS, horizon=2000), rounds=2000),
    "Exp3.S": Row(lambda: bandits.Exp3S(ARMS, horizon=400)),
    "Exp4": Row(lambda: bandits.Exp4(ARMS, ARMS, horizon=400), context=lambda moment: np.eye(ARMS)),
    "Tsallis-INF": Row(lambda: bandits.TsallisINF(ARMS)),
    "Tsallis-INF, reduced": Row(lambda: bandits.TsallisINF(ARMS, estimator="reduced")),
    "discretisation": Row(lambda: bandits.UniformDiscretization(horizon=400, cells=ARMS), **plain),
    "per context": Row(
        lambda: bandits.PerContext(lambda: bandits.UCB1(ARMS, horizon=200)), context=lambda m: m % 2, law=False
    ),
    "LinUCB": Row(lambda: bandits.LinUCB(ARMS, 2, alpha=0.5), context=features, **plain),
    "LinUCB, shared": Row(
        lambda: bandits.LinUCB(ARMS, 2, alpha=0.5, shared=True), context=matrix, learns=False, **plain
    ),
    "LinTS": Row(lambda: bandits.LinTS(ARMS, 2, scale=0.5), context=features, **plain),
    "LinTS, shared": Row(lambda: bandits.LinTS(ARMS, 2, scale=0.5, shared=True), context=matrix, learns=False, **plain),
}


def play(row, policy, rounds, generator, first=0):
    """The arms pulled; arm a pays 1 with probability MEANS[a]."""
    arms = []
    for moment in range(first, first + rounds):
        context = row.context(moment)
        arms.append(policy.pull(context, generator=generator))
        reward = float(torch.rand((), generator=generator) < MEANS[arms[-1]])
        policy.update(arms[-1], reward, context)
    return arms


def law_arms_are_whole_numbers_in_range(row, generator):
    for arm in play(row, row.make(), 60, generator):
        assert type(arm) is int
        assert 0 <= arm < ARMS


def law_all_chance_is_the_generators(row, generator):
    state, ambient = generator.get_state(), torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = play(row, row.make(), 80, generator)
    assert torch.equal(ambient, torch.random.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert play(row, row.make(), 80, generator.set_state(state)) == first


def law_a_saved_state_goes_on_as_the_policy_would(row, generator):
    policy, other = row.make(), row.make()
    play(row, policy, 58, generator)
    saved = policy.state_dict()
    state, rest = generator.get_state(), play(row, copy.deepcopy(policy), 60, generator, 58)
    play(row, policy, 20, generator, 58)  # what was saved is a copy, and does not follow
    other.load_state_dict(saved)
    assert play(row, other, 60, generator.set_state(state), 58) == rest


def law_reset_forgets_everything(row, generator):
    policy = row.make()
    play(row, policy, 50, generator)
    policy.reset()
    state = generator.get_state()
    again = play(row, policy, 60, generator)
    assert again == play(row, row.make(), 60, generator.set_state(state))


def law_the_best_arm_is_pulled_most(row, generator):
    if not row.learns:  # one model for all arms, of whose features these rewards are no linear function
        return
    counts = np.bincount(play(row, row.make(), row.rounds, generator), minlength=ARMS)
    assert counts.argmax() == 1
    assert counts[1] > 1.25 * row.rounds / ARMS
    assert counts[0] < row.rounds / ARMS


def law_probabilities_are_those_of_the_next_pull(row, generator):
    if not row.law:
        return
    policy = row.make()
    play(row, policy, 40, generator)
    context, draws = row.context(40), 1500
    law = policy.probabilities(context)
    assert law.sum() == pytest.approx(1.0)
    pulls = [copy.deepcopy(policy).pull(context, generator=generator) for _ in range(draws)]
    shares = np.bincount(pulls, minlength=ARMS) / draws
    assert (np.abs(shares - law) <= 6 * np.sqrt(law * (1 - law) / draws) + 1e-9).all()


def law_only_allowed_arms_are_pulled(row, generator):
    if not row.subsets:
        return
    policy = row.make()
    play(row, policy, 30, generator)
    for allowed in ([0], [0, 2], [2, 1]):
        pulled = {policy.pull(row.context(30), generator=generator, arms=allowed) for _ in range(20)}
        assert pulled <= set(allowed)
    with pytest.raises(ValueError, match="arms"):
        policy.pull(row.context(30), generator=generator, arms=[])
    with pytest.raises(ValueError, match="arms"):
        policy.pull(row.context(30), generator=generator, arms=[ARMS])


def law_rewards_that_are_no_numbers_are_refused_and_change_nothing(row, generator):
    policy = row.make()
    play(row, policy, 30, generator)
    arm, untouched = policy.pull(row.context(30), generator=generator), copy.deepcopy(policy)
    with pytest.raises(ValueError, match="reward"):
        policy.update(arm, math.nan, row.context(30))
    state = generator.get_state()
    after = play(row, policy, 40, generator, 30)
    assert after == play(row, untouched, 40, generator.set_state(state), 30)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_law(name, law, generator):
    LAWS[law](TABLE[name], generator)


class Wrong:
    """UCB1 with one thing done wrong."""

    def __init__(self, **wrong):
        self.inner = bandits.UCB1(ARMS, horizon=400)
        self.wrong, self.count = wrong, 0

    def pull(self, context=None, *, generator, arms=None):
        arm = self.inner.pull(context, generator=generator, arms=None if "deaf" in self.wrong else arms)
        self.count += 1
        if "ambient" in self.wrong and torch.rand(()) < 0.5:
            return 0
        if "tensor" in self.wrong:
            return torch.tensor(arm)
        return self.count % ARMS if "forgetful" in self.wrong else arm

    def update(self, arm, reward, context=None):
        if "credulous" in self.wrong:
            reward = 0.0 if math.isnan(reward) else reward
        if "hasty" in self.wrong and math.isnan(reward):
            self.inner.update(0, 1.0)
        self.inner.update(arm, 1.0 - reward if "costs" in self.wrong else reward)

    def reset(self):
        if "lasting" not in self.wrong:
            self.inner.reset()
            self.count = 0

    def probabilities(self, context=None):
        return np.full(ARMS, 1 / ARMS) if "flat" in self.wrong else self.inner.probabilities()

    def state_dict(self):
        state = self.inner.state_dict()
        if "alias" in self.wrong:
            state["seen"]["means"] = self.inner.seen.means
        return state

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


WRONG = [
    ("arms_are_whole_numbers_in_range", "tensor"),
    ("all_chance_is_the_generators", "ambient"),
    ("a_saved_state_goes_on_as_the_policy_would", "forgetful"),
    ("a_saved_state_goes_on_as_the_policy_would", "alias"),
    ("reset_forgets_everything", "lasting"),
    ("the_best_arm_is_pulled_most", "costs"),
    ("probabilities_are_those_of_the_next_pull", "flat"),
    ("only_allowed_arms_are_pulled", "deaf"),
    ("rewards_that_are_no_numbers_are_refused_and_change_nothing", "credulous"),
    ("rewards_that_are_no_numbers_are_refused_and_change_nothing", "hasty"),
]


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    with pytest.raises((AssertionError, pytest.fail.Exception)), torch.random.fork_rng():
        LAWS[law](Row(lambda: Wrong(**{wrong: True})), generator)


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)


def test_the_policy_that_is_varied_is_right(generator):
    for law in LAWS.values():
        law(Row(Wrong), generator)
