"""Exploration when people choose and must want to follow the recommendation (chapter 11 of the book).

Two arms; arm 0 is better a priori. A signal S, the rewards of n earlier pulls of arm 0, gives the posterior gap
G = E[mean_1 - mean_0 | S]. Hidden exploration: with probability e recommend the explorer's arm, else the better arm
given S. It is in everyone's interest to follow (Bayesian incentive-compatible) if e <= E[G 1{G > 0}] / 3.
Repeated, it hides one round of any bandit algorithm among rounds that exploit, in phases of 1/e.
Source: Slivkins (arXiv 1904.07272), chapter 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special, stats

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Policy
from kullback.stream.bandits._policy import Floats, floats, uniform, vector

__all__ = ["BetaPrior", "FinitePrior", "HiddenExploration", "RepeatedHE", "is_bic", "max_bic_epsilon", "posterior_gap"]


@dataclass(frozen=True, slots=True)
class FinitePrior:
    """Pairs of means [M, 2], one of which is true, with their probabilities [M]."""

    means: Any
    weights: Any

    def gaps(self, samples: int) -> tuple[Floats, Floats]:
        """For k = 0..samples successes of arm 0 among so many pulls: their probability, and the posterior gap."""
        means, weights = floats(self.means), vector("weights", self.weights)
        if means.shape != (len(weights), 2):
            raise ShapeError(f"means are pairs [{len(weights)}, 2], one a weight, and have shape {means.shape}")
        if not (means.min() >= 0.0 and means.max() <= 1.0 and weights.min() >= 0.0 and weights.sum() > 0.0):
            raise DataError("means lie in [0, 1], and weights are not negative nor all zero")
        joint = stats.binom.pmf(np.arange(samples + 1)[:, None], samples, means[:, 0]) * (weights / weights.sum())
        chance = joint.sum(axis=1)
        gap = joint @ (means[:, 1] - means[:, 0])
        return chance, np.divide(gap, chance, out=np.zeros_like(gap), where=chance > 0.0)


@dataclass(frozen=True, slots=True)
class BetaPrior:
    """Independent Beta(a, b) means, of arm 0 and of arm 1."""

    first: tuple[float, float]
    second: tuple[float, float]

    def gaps(self, samples: int) -> tuple[Floats, Floats]:
        """For k = 0..samples successes of arm 0 among so many pulls: their probability, and the posterior gap."""
        (a, b), (c, d) = self.first, self.second
        if min(a, b, c, d) <= 0.0:
            raise DataError(f"the parameters of Beta priors are positive, and are {self.first} and {self.second}")
        k = np.arange(samples + 1.0)
        log_chance = special.betaln(a + k, b + samples - k) - special.betaln(a, b)
        log_chance -= special.betaln(k + 1.0, samples - k + 1.0) + math.log(samples + 1.0)
        return np.exp(log_chance), c / (c + d) - (a + k) / (a + b + samples)


def posterior_gap(prior: FinitePrior | BetaPrior, samples: int, successes: int) -> float:
    """E[mean_1 - mean_0 | so many successes of arm 0 among the samples].

    >>> round(posterior_gap(BetaPrior((2.0, 1.0), (1.0, 1.0)), 3, 0), 6)
    0.166667
    """
    _check_samples(samples)
    if not 0 <= successes <= samples:
        raise DataError(f"successes lie in 0..{samples}, the samples, and are {successes}")
    return float(prior.gaps(samples)[1][successes])


def _check_samples(samples: int) -> None:
    if samples < 0:
        raise ConfigError(f"samples are the earlier pulls of arm 0, not fewer than 0, and are {samples}")


def max_bic_epsilon(prior: FinitePrior | BetaPrior, samples: int) -> float:
    """The book's E[G 1{G > 0}] / 3, up to which hidden exploration is incentive-compatible for any explorer."""
    _check_samples(samples)
    chance, gap = prior.gaps(samples)
    return float(chance @ np.maximum(gap, 0.0)) / 3.0


def is_bic(prior: FinitePrior | BetaPrior, samples: int, epsilon: float, *, explorer: Any = 1) -> bool:
    """Whether hidden exploration at epsilon is incentive-compatible, by enumeration of the signals.

    explorer: the probability with which it recommends arm 1, for every signal [samples + 1] or one for all. Following
    pays for arm 1 if E[G 1{arm 1 recommended}] >= 0, and for arm 0 if E[G 1{arm 0 recommended}] <= 0.
    """
    _check_samples(samples)
    if not 0.0 <= epsilon <= 1.0:
        raise ConfigError(f"epsilon is a probability, and is {epsilon}")
    chance, gap = prior.gaps(samples)
    explores = np.broadcast_to(floats(explorer), chance.shape)
    second = epsilon * explores + (1.0 - epsilon) * (gap > 0.0)
    return bool(chance @ (gap * second) >= -1e-12 and chance @ (gap * (1.0 - second)) <= 1e-12)


class HiddenExploration:
    """Recommends the explorer's arm with probability epsilon, else the better arm given the signal.

    epsilon: by default the largest the book allows. The signal is the number of successes in `samples` pulls of arm 0.
    """

    def __init__(self, prior: FinitePrior | BetaPrior, samples: int, *, epsilon: float | None = None) -> None:
        allowed = max_bic_epsilon(prior, samples)
        self.epsilon = allowed if epsilon is None else epsilon
        if not 0.0 < self.epsilon <= 1.0:
            raise ConfigError(f"epsilon lies in (0, 1], and is {self.epsilon}: this prior and signal may allow none")
        self.gaps = prior.gaps(samples)[1]

    def recommend(self, signal: int, explorer: int, *, generator: torch.Generator) -> tuple[int, bool]:
        """The arm, and whether it was the explorer's turn (which nobody is told)."""
        if not 0 <= signal < len(self.gaps):
            raise DataError(f"the signal is a number of successes in 0..{len(self.gaps) - 1}, and is {signal}")
        explores = uniform(generator) < self.epsilon
        return (explorer if explores else int(self.gaps[signal] > 0.0)), explores


class RepeatedHE:
    """Hides each round of a bandit policy among 1/epsilon rounds that exploit, and feeds its reward back to it.

    First `samples` pulls of arm 0 make the signal; the policy then has one round in every phase, at a random place.
    """

    def __init__(
        self, policy: Policy, prior: FinitePrior | BetaPrior, samples: int, *, epsilon: float | None = None
    ) -> None:
        self.policy, self.samples = policy, samples
        self.hidden = HiddenExploration(prior, samples, epsilon=epsilon)
        self.phase = math.ceil(1.0 / self.hidden.epsilon)
        self.rounds, self.signal, self.slot = 0, 0, -1

    def _place(self) -> int:
        return (self.rounds - self.samples) % self.phase

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The arm to recommend to the next person."""
        if self.rounds < self.samples:
            return 0
        if self._place() == 0 and self.slot < 0:
            self.slot = int(uniform(generator) * self.phase)
        if self._place() == self.slot:
            return self.policy.pull(context, generator=generator)
        return int(self.hidden.gaps[self.signal] > 0.0)

    def update(self, arm: int, reward: float, context: Any = None) -> None:
        """The reward of the person, who followed; rewards are 0 or 1."""
        if reward not in (0.0, 1.0):
            raise DataError(f"a reward is 0 or 1, and is {reward}")
        if self.rounds < self.samples:
            self.signal += int(reward)
        elif self._place() == self.slot:
            self.policy.update(arm, reward, context)
        self.rounds += 1
        if self.rounds > self.samples and self._place() == 0:
            self.slot = -1
