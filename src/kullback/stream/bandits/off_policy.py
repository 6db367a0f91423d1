"""Learning and judging policies from a log of (context, arm, reward, probability) (chapter 8 of the book).

With pi(x) the distribution over arms of the policy to be judged and w = pi(a|x) / p, estimates of its value are

    "ips"              mean of w r: unbiased
    "clipped"          mean of min(w, M) r: biased down by what is clipped, which is reported
    "self-normalised"  sum of w r / sum of w
    "direct"           mean over rounds of sum_a pi(a|x) f(x, a), with a model f of the reward
    "doubly robust"    "direct" + mean of w (r - f(x, a)): unbiased, and of no variance where the model is perfect and
                       rewards have no noise

Intervals are empirical Bernstein's: root(2 V log(4/d)/n) + 7 R log(4/d) / (3 (n-1)) on either side, with the variance V
and the range R of the terms. The probabilities are those with which the arms were in fact played.
Source: Slivkins (arXiv 1904.07272), chapter 8; Maurer and Pontil 2009; Dudik et al. 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream.bandits._policy import Floats, RewardScale, check_arms, floats, uniform, vector

__all__ = [
    "DecisionService",
    "Estimate",
    "Log",
    "OffPolicyEstimator",
    "OracleEpsilonGreedy",
    "OracleExploreFirst",
    "best_of",
    "empirical_bernstein",
    "linear_oracle",
    "weighted_costs",
]

Decide = Callable[[Any], int]
Oracle = Callable[[Sequence[Any], Floats], Decide]


@dataclass(slots=True)
class Log:
    """Rounds played: contexts, arms, rewards, and the probabilities with which the arms were played."""

    contexts: list[Any] = field(default_factory=list)
    arms: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.arms)

    def add(self, context: Any, arm: int, reward: float, probability: float) -> None:
        """One round. Raises DataError for a probability outside (0, 1] or a reward that is not a number."""
        if not 0.0 < probability <= 1.0 or not math.isfinite(reward):
            raise DataError(f"a reward is finite and a probability in (0, 1], and they are {reward} and {probability}")
        self.contexts.append(context)
        self.arms.append(int(arm))
        self.rewards.append(float(reward))
        self.probabilities.append(float(probability))

    def checked(self) -> tuple[Any, Floats, Floats]:
        """Arms, rewards and probabilities as arrays. Raises DataError for an empty log or what `add` would refuse."""
        if not len(self):
            raise DataError("the log is empty: it needs at least one round")
        if not len(self.contexts) == len(self.arms) == len(self.rewards) == len(self.probabilities):
            raise ShapeError("the log's contexts, arms, rewards and probabilities differ in number")
        rewards, chances = vector("rewards", self.rewards), vector("probabilities", self.probabilities)
        if not (chances.min() > 0.0 and chances.max() <= 1.0):
            raise DataError("logged probabilities lie in (0, 1]: an arm of probability 0 was never played")
        return np.asarray(self.arms, dtype=np.int64), rewards, chances


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The value of a policy: an estimate, an interval, the share of rounds clipped, the effective number of rounds."""

    value: float
    low: float
    high: float
    clipped: float
    effective: float


def empirical_bernstein(terms: Floats, extent: float, delta: float = 0.05) -> float:
    """Half the width of an interval for the mean of independent terms in a range of `extent`, at level 1 - delta."""
    count = len(terms)
    if count < 2:
        return math.inf
    log = math.log(4.0 / delta)
    return math.sqrt(2.0 * float(terms.var(ddof=1)) * log / count) + 7.0 * extent * log / (3.0 * (count - 1))


class OffPolicyEstimator:
    """Judges policies from a log.

    kind: "ips", "clipped", "self-normalised", "direct" or "doubly robust"; clip: M, the largest weight, for "clipped";
    model: (context) to predicted rewards [K], for the last two; extent: range of the terms, by default as seen.

    >>> log = Log(contexts=[0, 0], arms=[0, 1], rewards=[1.0, 0.0], probabilities=[0.5, 0.5])
    >>> OffPolicyEstimator().value(log, lambda context: 0, arms=2).value
    1.0
    """

    def __init__(
        self,
        kind: str = "ips",
        *,
        clip: float | None = None,
        model: Callable[[Any], Any] | None = None,
        delta: float = 0.05,
        extent: float | None = None,
    ) -> None:
        if kind not in ("ips", "clipped", "self-normalised", "direct", "doubly robust"):
            names = '"ips", "clipped", "self-normalised", "direct" or "doubly robust"'
            raise ConfigError(f"kind is {names}, not {kind!r}")
        if (clip is None) == (kind == "clipped") or (clip is not None and not clip > 0.0):
            raise ConfigError(f'clip, above 0, goes with kind "clipped" and no other, and is {clip} for {kind!r}')
        if (model is None) == (kind in ("direct", "doubly robust")):
            raise ConfigError('a model goes with the kinds "direct" and "doubly robust", and no other')
        if not 0.0 < delta < 1.0:
            raise ConfigError(f"delta lies in (0, 1), and is {delta}")
        self.kind, self.clip, self.model, self.delta, self.extent = kind, clip, model, delta, extent

    def terms(self, log: Log, laws: Floats) -> tuple[Floats, Floats]:
        """What is averaged, one term a round, and the weights w; laws [n, K] are the policy's at the log's contexts."""
        arms, rewards, chances = log.checked()
        if laws.ndim != 2 or len(laws) != len(log) or arms.min() < 0 or arms.max() >= laws.shape[1]:
            raise ShapeError(f"laws have one row over all arms for each of {len(log)} rounds, and shape {laws.shape}")
        weights = laws[np.arange(len(arms)), arms] / chances
        if self.clip is not None:
            return np.minimum(weights, self.clip) * rewards, weights
        if self.model is None:
            return weights * rewards, weights
        predicted = np.stack([floats(self.model(context)) for context in log.contexts])
        direct = (laws * predicted).sum(axis=1)
        if self.kind == "direct":
            return direct, weights
        return direct + weights * (rewards - predicted[np.arange(len(arms)), arms]), weights

    def value(self, log: Log, policy: Callable[[Any], Any], *, arms: int) -> Estimate:
        """The value of a policy, (context) to an arm or to a law over arms [K]; arms: K."""
        laws = np.stack([_law(policy(context), arms) for context in log.contexts]) if len(log) else np.zeros((0, arms))
        terms, weights = self.terms(log, laws)
        value = float(terms.mean())
        if self.kind == "self-normalised":
            total = float(weights.sum())
            if total <= 0.0:
                raise DataError("the policy never plays what was logged: its value cannot be told from this log")
            value = float(terms.sum()) / total
            terms = (terms - value * weights) / float(weights.mean())  # the linearisation, for the interval
        half = empirical_bernstein(terms, float(np.ptp(terms)) if self.extent is None else self.extent, self.delta)
        return Estimate(
            value=value,
            low=value - half,
            high=value + half,
            clipped=float((weights > self.clip).mean()) if self.clip is not None else 0.0,
            effective=float(weights.sum() ** 2 / max(float((weights**2).sum()), 1e-300)),
        )


def _law(decision: Any, arms: int) -> Floats:
    law = floats(decision)
    if law.ndim == 0:
        return np.eye(arms)[int(law)]
    if law.shape != (arms,) or not (law.min() >= 0.0 and abs(law.sum() - 1.0) < 1e-6):
        raise DataError(f"a policy gives an arm or a law over {arms} arms, and gave {decision}")
    return law


def weighted_costs(log: Log, arms: int) -> Floats:
    """Costs [n, K] whose expectation is each arm's: (1 - reward) / probability for the arm played, and 0."""
    played, rewards, chances = log.checked()
    costs = np.zeros((len(played), check_arms(arms)))
    costs[np.arange(len(played)), played] = (1.0 - rewards) / chances
    return costs


def best_of(policies: Sequence[Decide]) -> Oracle:
    """The oracle for a finite class: the policy of least total cost, the first where several are."""
    if not policies:
        raise ConfigError("a class of policies has at least one")

    def oracle(contexts: Sequence[Any], costs: Floats) -> Decide:
        totals = [sum(float(row[policy(x)]) for x, row in zip(contexts, costs)) for policy in policies]
        return policies[int(np.argmin(totals))]

    return oracle


def linear_oracle(regularization: float = 1.0) -> Oracle:
    """An oracle by reduction to regression: a ridge regression of cost on features for each arm, then the least."""
    if not regularization > 0.0:
        raise ConfigError(f"regularization is positive, and is {regularization}")

    def oracle(contexts: Sequence[Any], costs: Floats) -> Decide:
        x = np.stack([np.append(floats(context), 1.0) for context in contexts])
        weights = np.linalg.solve(x.T @ x + regularization * np.eye(x.shape[1]), x.T @ costs)
        return lambda context: int((np.append(floats(context), 1.0) @ weights).argmin())

    return oracle


class OracleEpsilonGreedy:
    """Explores with probability epsilon, else plays a policy that an oracle trains on the log, at rounds 1, 2, 4, ...

    oracle: (contexts, costs [n, K]) to a policy, see `best_of` and `linear_oracle`; epsilon: a number or a function of
    the round t, by default min(1, t^(-1/3) (K log t)^(1/3)); schedule: the first round that trains, and the factor to
    the next. `log` holds what was played, for off-policy estimates.
    """

    def __init__(
        self,
        arms: int,
        oracle: Oracle,
        *,
        epsilon: float | Callable[[int], float] | None = None,
        schedule: tuple[int, float] = (1, 2.0),
        reward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.trained: Decide | None
        self.due: float
        self.arms, self.oracle, self.scale = check_arms(arms), oracle, RewardScale(reward_range)
        if isinstance(epsilon, int | float) and not 0.0 <= epsilon <= 1.0:
            raise ConfigError(f"epsilon is a probability, and is {epsilon}")
        self._epsilon = epsilon
        self._schedule, self.trained = schedule, None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.log, self.trained, self.due = Log(), None, self._schedule[0]

    def epsilon(self) -> float:
        """The probability that the coming round explores."""
        moment = len(self.log) + 1
        if self._epsilon is None:
            return min(1.0, (self.arms * math.log(moment) / moment) ** (1.0 / 3.0)) if moment > 1 else 1.0
        return float(self._epsilon(moment)) if callable(self._epsilon) else float(self._epsilon)

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next arm in this context."""
        if self.trained is None:
            return np.full(self.arms, 1.0 / self.arms)
        epsilon = self.epsilon()
        law = np.full(self.arms, epsilon / self.arms)
        law[self.trained(context)] += 1.0 - epsilon
        return law

    def pull(self, context: Any, *, generator: torch.Generator) -> int:
        """The next arm in this context."""
        if self.trained is None or uniform(generator) < self.epsilon():
            return int(uniform(generator) * self.arms)
        return self.trained(context)

    def update(self, arm: int, reward: float, context: Any, *, probability: float | None = None) -> None:
        """Log the reward, and train where it is due."""
        chance = float(self.probabilities(context)[arm]) if probability is None else probability
        self.log.add(context, arm, self.scale(reward), chance)
        if len(self.log) >= self.due:
            self.due *= self._schedule[1]
            self.trained = self.oracle(self.log.contexts, weighted_costs(self.log, self.arms))


def OracleExploreFirst(arms: int, oracle: Oracle, *, rounds: int, **options: Any) -> OracleEpsilonGreedy:
    """Explores for so many rounds, then plays what the oracle made of them."""
    if rounds < 1:
        raise ConfigError(f"rounds of exploration are at least 1, and are {rounds}")
    schedule = (rounds, math.inf)  # trained once
    return OracleEpsilonGreedy(
        arms, oracle, epsilon=lambda moment: float(moment <= rounds), schedule=schedule, **options
    )


class DecisionService:
    """The loop of a service that decides: explore, log with probabilities, learn, deploy.

    Rewards may come late and in any order: `decide` hands out a key, `reward` joins by it. `learn` trains on what has
    been joined, and says what the new policy is estimated to be worth; `deploy` puts it to work.
    """

    def __init__(self, arms: int, oracle: Oracle, *, epsilon: float = 0.1) -> None:
        if not 0.0 < epsilon <= 1.0:
            raise ConfigError(f"epsilon lies in (0, 1], and is {epsilon}: without exploration nothing can be learned")
        self.arms, self.oracle, self.epsilon = check_arms(arms), oracle, epsilon
        self.log = Log()
        self.open: dict[int, tuple[Any, int, float]] = {}
        self.deployed: Decide = lambda context: 0
        self._next = 0

    def decide(self, context: Any, *, generator: torch.Generator) -> tuple[int, int, float]:
        """A key, an arm, and the probability it had."""
        preferred = self.deployed(context)
        explores = uniform(generator) < self.epsilon
        arm = int(uniform(generator) * self.arms) if explores else preferred
        chance = self.epsilon / self.arms + (1.0 - self.epsilon) * (arm == preferred)
        key, self._next = self._next, self._next + 1
        self.open[key] = (context, arm, chance)
        return key, arm, chance

    def reward(self, key: int, reward: float) -> None:
        """Join a reward in [0, 1] to its decision. Raises DataError for a key that is not open."""
        if key not in self.open:
            raise DataError(f"no decision with key {key} waits for a reward")
        context, arm, chance = self.open.pop(key)
        self.log.add(context, arm, RewardScale()(reward), chance)

    def learn(self) -> tuple[Decide, Estimate]:
        """A policy trained on the first half of the log, and its value on the second, by IPS."""
        half = max(len(self.log) // 2, 1)
        parts = [
            Log(self.log.contexts[rows], self.log.arms[rows], self.log.rewards[rows], self.log.probabilities[rows])
            for rows in (slice(half), slice(half, None))
        ]
        policy = self.oracle(parts[0].contexts, weighted_costs(parts[0], self.arms))
        return policy, OffPolicyEstimator().value(parts[1], policy, arms=self.arms)

    def deploy(self, policy: Decide) -> None:
        """Prefer this policy's arms from now on."""
        self.deployed = policy
