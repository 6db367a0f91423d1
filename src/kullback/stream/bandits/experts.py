"""Prediction with full feedback (chapter 5 of the book): after each round the costs of all experts are seen.

    halving             the majority of the experts without a mistake; at most log2 K mistakes if one is perfect
    weighted majority   multiplies the weight of a wrong expert by 1 - e; mistakes <= 2/(1-e) best + (2/e) ln K
    Hedge               draws an expert with probability p_a ~ exp(-eta sum of costs); regret <= ln K / eta + eta T / 8

Hedge's bound holds for costs in [0, 1] of any sequence, without chance: it is on sum_t p_t . c_t.
Source: Slivkins (arXiv 1904.07272), chapter 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kullback.core.errors import ConfigError, DataError
from kullback.stream.bandits._policy import Floats, Saved, check_arms, restricted, vector
from kullback.stream.bandits._policy import draw as draw_arm

__all__ = ["Halving", "Hedge", "WeightedMajority", "hedge_rate", "unbounded_hedge_rate", "weighted_majority_bound"]


class WeightedMajority(Saved):
    """Predicts the label of most weight among the experts' advice; multiplies the weight of a wrong one by 1 - epsilon.

    epsilon=1 is halving: an expert that was wrong once has no say. Labels are any whole numbers.
    """

    _saved = ("log_weights", "mistakes")

    def __init__(self, experts: int, *, epsilon: float = 0.5) -> None:
        if not 0.0 < epsilon <= 1.0:
            raise ConfigError(f"epsilon lies in (0, 1], and is {epsilon}")
        self.experts = check_arms(experts)
        self.penalty = math.log1p(-epsilon) if epsilon < 1.0 else -math.inf
        self.log_weights = np.zeros(self.experts)
        self.mistakes = 0

    def reset(self) -> None:
        """Forget everything."""
        self.log_weights[:], self.mistakes = 0.0, 0

    def predict(self, advice: Any) -> int:
        """The label of most weight in the advice [K]; the smallest where several are."""
        labels, weights = vector("advice", advice, self.experts), np.exp(self.log_weights)
        names, place = np.unique(labels, return_inverse=True)
        return int(names[np.bincount(place, weights=weights).argmax()])

    def observe(self, advice: Any, label: int) -> None:
        """Learn the right label. Raises DataError when no expert is left: none was perfect."""
        wrong = vector("advice", advice, self.experts) != label
        self.mistakes += self.predict(advice) != label
        weights = self.log_weights + np.where(wrong, self.penalty, 0.0)
        if weights.max() == -math.inf:
            raise DataError("every expert has been wrong: halving needs a perfect one, take epsilon below 1")
        self.log_weights[:] = weights - weights.max()


def Halving(experts: int) -> WeightedMajority:
    """The majority of the experts that were never wrong: at most log2 K mistakes when one is perfect.

    >>> learner = Halving(4)
    >>> for advice in ([0, 0, 1, 1], [0, 1, 0, 1]):
    ...     learner.observe(advice, 1)
    >>> learner.mistakes, learner.predict([5, 6, 7, 8])
    (2, 8)
    """
    return WeightedMajority(experts, epsilon=1.0)


def weighted_majority_bound(experts: int, best: int, epsilon: float = 0.5) -> float:
    """The most mistakes weighted majority can make when the best expert makes `best`: 2/(1-e) best + (2/e) ln K."""
    return 2.0 / (1.0 - epsilon) * best + 2.0 / epsilon * math.log(experts)


def hedge_rate(experts: int, horizon: int) -> float:
    """The rate root(8 ln K / T), with which Hedge's regret is at most root(T ln K / 2)."""
    if horizon < 1:
        raise ConfigError(f"horizon is the number of rounds, at least 1, and is {horizon}")
    return math.sqrt(8.0 * math.log(max(experts, 2)) / horizon)


def unbounded_hedge_rate(experts: int, horizon: int, second_moment: float) -> float:
    """The rate -log(1 - e), e = root(ln K / (3uT)), for costs of any size with E[sum_a p_a c_a^2] <= u.

    The regret is then at most 2 root(3 u T ln K).
    """
    if not (horizon >= 1 and second_moment > 0.0):
        raise ConfigError(f"horizon is at least 1 and second_moment positive: {horizon} and {second_moment}")
    return -math.log1p(-min(math.sqrt(math.log(max(experts, 2)) / (3.0 * second_moment * horizon)), 0.5))


class Hedge(Saved):
    """Draws an expert with probability proportional to exp(-rate x its costs so far).

    Give rate, or horizon for `hedge_rate`, or epsilon for the form w <- w (1 - epsilon)^cost, whose rate is
    -log(1 - epsilon). signed: admits costs of any size; otherwise they are in [0, 1], and others raise DataError.

    >>> learner = Hedge(2, horizon=100)
    >>> for _ in range(100):
    ...     learner.observe([1.0, 0.0])
    >>> learner.probabilities().round(6).tolist()
    [0.0, 1.0]
    """

    _saved = ("log_weights",)

    def __init__(
        self,
        experts: int,
        *,
        horizon: int | None = None,
        rate: float | None = None,
        epsilon: float | None = None,
        signed: bool = False,
    ) -> None:
        if sum(option is not None for option in (horizon, rate, epsilon)) != 1:
            raise ConfigError("Hedge takes one of horizon, rate and epsilon")
        self.experts, self.signed = check_arms(experts), signed
        if horizon is not None:
            rate = hedge_rate(self.experts, horizon)
        elif epsilon is not None:
            rate = -math.log1p(-epsilon) if 0.0 < epsilon < 1.0 else math.nan
        if rate is None or not (rate > 0.0 and math.isfinite(rate)):
            raise ConfigError(f"rate is positive and epsilon in (0, 1), and they are {rate} and {epsilon}")
        self.rate = rate
        self.log_weights = np.zeros(self.experts)

    def reset(self) -> None:
        """Forget everything."""
        self.log_weights[:] = 0.0

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next draw."""
        weights = np.exp(self.log_weights)
        return weights / weights.sum()

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The next expert, out of `arms` where given."""
        return draw_arm(restricted(np.exp(self.log_weights), arms, 0.0), generator)

    def observe(self, costs: Any) -> None:
        """Learn the costs [K] of all experts."""
        costs = vector("costs", costs, self.experts)
        if not self.signed and not (costs.min() >= 0.0 and costs.max() <= 1.0):
            raise DataError("costs lie in [0, 1]: scale them, or admit others by signed=True")
        weights = self.log_weights - self.rate * costs
        self.log_weights[:] = weights - weights.max()
