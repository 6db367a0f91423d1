"""Policies that keep a posterior over the arms (chapter 3 of the book).

Thompson sampling draws one model from the posterior and plays its best arm: each arm with its posterior probability of
being the best. Beta-Bernoulli: mean ~ Beta(a + S, b + F) after S successes and F failures. Gaussian: with prior
N(m0, s0^2) and noise s, N(m, v) with 1/v = 1/s0^2 + n/s^2. Finite prior: weights times likelihoods, in logarithms.
Bayes-UCB plays the largest posterior quantile at 1 - 1/(t (log T)^c). For tiny horizons the best play is computed.
Sources: Slivkins (arXiv 1904.07272), chapter 3; Kaufmann et al. 2012 (Bayes-UCB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import special

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream.bandits._policy import (
    Floats,
    RewardScale,
    Saved,
    best,
    check_arms,
    floats,
    restricted,
    tie_law,
    vector,
)
from kullback.stream.bandits._policy import draw as draw_arm
from kullback.stream.bandits.stochastic import ArmStatistics, IndexPolicy

__all__ = [
    "BayesUCB",
    "ThompsonBeta",
    "ThompsonFinite",
    "ThompsonGaussian",
    "bayes_optimal_arm",
    "bayes_optimal_value",
]


class ThompsonBeta(Saved):
    """Thompson sampling for rewards in [0, 1], with a Beta(prior) on each arm's mean.

    A reward strictly between 0 and 1 counts as that much success and the rest failure. parameters [2, K]: of the
    posteriors.

    >>> source, policy = torch.Generator().manual_seed(0), ThompsonBeta(2)
    >>> for _ in range(200):
    ...     arm = policy.pull(generator=source)
    ...     policy.update(arm, [0.0, 1.0][arm])
    >>> policy.parameters[:, 1].tolist()[0] > 190
    True
    """

    _saved = ("parameters",)

    def __init__(
        self, arms: int, *, prior: tuple[float, float] = (1.0, 1.0), reward_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        if not (prior[0] > 0.0 and prior[1] > 0.0):
            raise ConfigError(f"the parameters of a Beta prior are positive, and are {prior}")
        self.arms, self.prior, self.scale = check_arms(arms), prior, RewardScale(reward_range)
        self.parameters = torch.empty(2, self.arms, dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        """Return to the prior."""
        self.parameters[0], self.parameters[1] = self.prior

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The best arm of one draw from the posterior, out of `arms` where given."""
        gammas = torch._standard_gamma(self.parameters, generator=generator).numpy()
        return int(restricted(gammas[0] / (gammas[0] + gammas[1]), arms, -1.0).argmax())

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Add the reward to the arm's successes, and what it lacks of 1 to its failures."""
        if not 0 <= arm < self.arms:
            raise DataError(f"an arm is a number in 0..{self.arms - 1}, and is {arm}")
        value, table = self.scale(reward), self.parameters.numpy()
        table[0, arm] += value
        table[1, arm] += 1.0 - value

    def probabilities(self, context: Any = None) -> Floats:
        """The probability that each arm is the best, by Gauss-Legendre quadrature in 400 nodes."""
        nodes, weights = special.roots_legendre(400)
        x = 0.5 * (nodes[:, None] + 1.0)
        a, b = self.parameters.numpy()
        log_density = special.xlogy(a - 1.0, x) + special.xlog1py(b - 1.0, -x) - special.betaln(a, b)
        below = special.betainc(a, b, x)
        law = np.array([
            0.5 * weights @ (np.exp(log_density[:, arm]) * np.delete(below, arm, axis=1).prod(axis=1))
            for arm in range(self.arms)
        ])  # fmt: skip
        return law / law.sum()


class ThompsonGaussian(Saved):
    """Thompson sampling for Gaussian rewards of deviation `noise`, with N(mean, deviation^2) on each arm's mean."""

    _saved = ("precisions", "weighted")

    def __init__(self, arms: int, *, mean: float = 0.0, deviation: float = 1.0, noise: float = 1.0) -> None:
        if not (math.isfinite(mean) and deviation > 0.0 and noise > 0.0):
            raise ConfigError(f"mean is finite, deviation and noise positive: {mean}, {deviation}, {noise}")
        self.arms, self.mean, self.deviation, self.noise = check_arms(arms), mean, deviation, noise
        self.precisions, self.weighted = np.empty(self.arms), np.empty(self.arms)
        self.reset()

    def reset(self) -> None:
        """Return to the prior."""
        self.precisions[:] = self.deviation**-2
        self.weighted[:] = self.mean * self.deviation**-2

    def posterior(self) -> tuple[Floats, Floats]:
        """Mean and deviation of each arm's mean."""
        return self.weighted / self.precisions, self.precisions**-0.5

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The best arm of one draw from the posterior, out of `arms` where given."""
        mean, deviation = self.posterior()
        noise = torch.empty(self.arms, dtype=torch.float64).normal_(generator=generator).numpy()
        return int(restricted(mean + deviation * noise, arms, -math.inf).argmax())

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Condition on the reward of an arm. Raises DataError when it is not finite."""
        if not math.isfinite(reward) or not 0 <= arm < self.arms:
            raise DataError(f"a reward is finite and an arm in 0..{self.arms - 1}, and they are {reward} and {arm}")
        self.precisions[arm] += self.noise**-2
        self.weighted[arm] += reward * self.noise**-2


class ThompsonFinite(Saved):
    """Thompson sampling when the means are one of M known models: exact posterior weights and exact probabilities.

    models [M, K]: mean rewards; prior [M]: weights, by default equal. likelihood: (arm, reward) to [M] likelihoods;
    by default those of coins, for rewards 0 and 1.
    """

    _saved = ("log_weights",)

    def __init__(
        self, models: Any, *, prior: Any = None, likelihood: Callable[[int, float], Floats] | None = None
    ) -> None:
        self.models = floats(models)
        if self.models.ndim != 2 or self.models.size == 0:
            raise ShapeError(f"models are a table [M, K] of means, and have shape {self.models.shape}")
        if not np.isfinite(self.models).all():
            raise DataError("models have NaN or infinity in them: every mean must be a number")
        self.arms, self.likelihood = self.models.shape[1], likelihood or self._coins
        weights = np.ones(len(self.models)) if prior is None else vector("prior", prior, len(self.models))
        if weights.min() < 0.0 or weights.sum() <= 0.0:
            raise DataError("prior weights are not negative and not all zero")
        if likelihood is None and not (self.models.min() >= 0.0 and self.models.max() <= 1.0):
            raise DataError("means of coins lie in [0, 1]: give a likelihood for other rewards")
        with np.errstate(divide="ignore"):
            self.prior = np.log(weights / weights.sum())
        self._laws = np.stack([tie_law(row) for row in self.models])
        self.log_weights = self.prior.copy()

    def _coins(self, arm: int, reward: float) -> Floats:
        if reward not in (0.0, 1.0):
            raise DataError(f"the reward of a coin is 0 or 1, and is {reward}: give a likelihood for other rewards")
        return self.models[:, arm] if reward else 1.0 - self.models[:, arm]

    def reset(self) -> None:
        """Return to the prior."""
        self.log_weights[:] = self.prior

    def posterior(self) -> Floats:
        """The weights [M] of the models."""
        return np.exp(self.log_weights)

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The best arm of a model drawn from the posterior, out of `arms` where given."""
        model = self.models[draw_arm(self.posterior(), generator)]
        return best(restricted(model, arms, -math.inf), generator)

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Condition on the reward of an arm. Raises DataError for one that no model allows."""
        with np.errstate(divide="ignore"):
            weights = self.log_weights + np.log(self.likelihood(arm, reward))
        total = special.logsumexp(weights)
        if not math.isfinite(total):
            raise DataError(f"no model of the prior allows the reward {reward} of arm {arm}")
        self.log_weights[:] = weights - total

    def probabilities(self, context: Any = None) -> Floats:
        """The probability that each arm is the best, ties shared: the law of the next pull."""
        return self.posterior() @ self._laws


def BayesUCB(
    arms: int,
    *,
    prior: tuple[float, float] = (1.0, 1.0),
    horizon: int | None = None,
    exponent: float = 0.0,
    **options: Any,
) -> IndexPolicy:
    """The largest quantile of the Beta posteriors at 1 - 1/(t (log T)^exponent); exponent 5 is the theory's, 0 use."""
    if not (prior[0] > 0.0 and prior[1] > 0.0):
        raise ConfigError(f"the parameters of a Beta prior are positive, and are {prior}")
    if (horizon is None) != (exponent == 0.0):
        raise ConfigError("an exponent and a horizon go together: give both or neither")
    factor = math.log(max(horizon, 2)) ** exponent if horizon is not None else 1.0

    def index(seen: ArmStatistics) -> Floats:
        successes = seen.means * seen.counts
        level = 1.0 - 1.0 / ((seen.rounds + 1) * factor)
        return special.betaincinv(prior[0] + successes, prior[1] + seen.counts - successes, max(level, 0.0))

    return IndexPolicy(arms, index=index, **options)


Counts = tuple[tuple[float, float], ...]


@lru_cache(maxsize=200_000)
def _value(horizon: int, counts: Counts) -> float:
    return max(_value_of(horizon, counts, arm) for arm in range(len(counts))) if horizon else 0.0


def _value_of(horizon: int, counts: Counts, arm: int) -> float:
    """Expected reward of pulling `arm` now and playing optimally after."""
    a, b = counts[arm]
    chance = a / (a + b)
    won = (*counts[:arm], (a + 1.0, b), *counts[arm + 1 :])
    lost = (*counts[:arm], (a, b + 1.0), *counts[arm + 1 :])
    return chance * (1.0 + _value(horizon - 1, won)) + (1.0 - chance) * _value(horizon - 1, lost)


def bayes_optimal_value(horizon: int, prior: Sequence[tuple[float, float]] = ((1.0, 1.0), (1.0, 1.0))) -> float:
    """The largest expected sum of rewards over `horizon` pulls of coins with Beta(prior) means, by dynamic programming.

    The states grow as horizon^(2K): for two arms and a dozen rounds, say.

    >>> bayes_optimal_value(1), round(bayes_optimal_value(2), 6)
    (0.5, 1.083333)
    """
    return _value(horizon, _checked(horizon, prior))


def bayes_optimal_arm(horizon: int, prior: Sequence[tuple[float, float]]) -> int:
    """The first arm of a play that earns `bayes_optimal_value`; the lowest where several do."""
    counts = _checked(horizon, prior)
    values = [_value_of(horizon, counts, arm) for arm in range(len(counts))]
    return values.index(max(values))


def _checked(horizon: int, prior: Sequence[tuple[float, float]]) -> Counts:
    counts = tuple((float(a), float(b)) for a, b in prior)
    if horizon < 1 or not counts or min(min(pair) for pair in counts) <= 0.0:
        raise ConfigError(f"needs a horizon of at least 1 and positive Beta parameters, and got {horizon}, {counts}")
    return counts
