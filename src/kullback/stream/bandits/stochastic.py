"""Policies for rewards that are independent and identically distributed (chapter 1 of the book).

With n_a pulls of arm a, their mean m_a, and the radius r_a = root(2 log T / n_a):

    explore-first        every arm N times, then the best mean;  N = (T/K)^(2/3) (log T)^(1/3)
    epsilon-greedy       a random arm with probability e_t = min(1, t^(-1/3) (K log t)^(1/3)), else the best mean
    elimination          every arm in turn; drops a when m_a + r_a < m_b - r_b for some b
    UCB1                 the largest m_a + r_a
    UCB-V                the largest m_a + root(2 v_a E / n_a) + 3 c E / n_a, with the variance v_a and E = z log t
    KL-UCB               the largest q with n_a kl(m_a, q) <= log t + 3 log log t

The book takes log T; without a horizon it is log t, as in most libraries: curves of the two do not compare.
Sources: Slivkins (arXiv 1904.07272), chapter 1; Audibert et al. 2009 (UCB-V); Garivier and Cappe 2011 (KL-UCB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import special

from kullback.core.errors import ConfigError, DataError
from kullback.core.types import Policy
from kullback.stream.bandits._policy import Floats, RewardScale, Saved, best, check_arms, restricted, tie_law, uniform
from kullback.stream.bandits.lower_bounds import kl_upper_bound

__all__ = [
    "KLUCB",
    "UCB1",
    "UCBV",
    "ArmStatistics",
    "Doubling",
    "EpsilonGreedy",
    "ExploreFirst",
    "IndexPolicy",
    "SuccessiveElimination",
    "explore_first_pulls",
]

Index = Callable[["ArmStatistics"], Floats]


class ArmStatistics(Saved):
    """Per arm the count of rewards, their mean, their sum of squared deviations, and 1 / root(count), inf at first."""

    _saved = ("rounds", "unplayed", "counts", "means", "squares", "inverse_roots")

    def __init__(self, arms: int) -> None:
        self.arms = check_arms(arms)
        self.counts, self.means, self.squares, self.inverse_roots = (np.zeros(self.arms) for _ in range(4))
        self.reset()

    def reset(self) -> None:
        self.rounds, self.unplayed = 0, self.arms
        self.counts[:], self.means[:], self.squares[:], self.inverse_roots[:] = 0.0, 0.0, 0.0, math.inf

    def add(self, arm: int, reward: float) -> None:
        """Count one reward; IndexError for an arm that is not there."""
        if arm < 0:
            raise DataError(f"an arm is a number in 0..{self.arms - 1}, and is {arm}")
        count = float(self.counts[arm]) + 1.0
        mean = float(self.means[arm])
        change = reward - mean
        mean += change / count
        self.rounds += 1
        self.unplayed -= count == 1.0
        self.counts[arm], self.means[arm], self.inverse_roots[arm] = count, mean, 1.0 / math.sqrt(count)
        self.squares[arm] += change * (reward - mean)

    def first_unplayed(self, arms: Sequence[int] | None) -> int | None:
        """The lowest allowed arm without a reward, or None."""
        if self.unplayed == 0:
            return None
        fresh = np.flatnonzero(restricted(self.counts, arms, 1.0) == 0.0)
        return int(fresh[0]) if len(fresh) else None


class IndexPolicy(Saved):
    """Plays every arm once, then the arm of the largest index; `index` takes the statistics to one number per arm.

    ties: "random", by the generator, or "first", by the lowest number. Rewards outside `reward_range` are refused and
    those inside taken to [0, 1] before the index sees them.
    """

    _saved = ("seen",)

    def __init__(
        self, arms: int, *, index: Index, reward_range: tuple[float, float] = (0.0, 1.0), ties: str = "random"
    ) -> None:
        if ties not in ("random", "first"):
            raise ConfigError(f'ties are broken "random" or "first", not {ties!r}')
        self.seen, self.index, self.scale, self.ties = ArmStatistics(arms), index, RewardScale(reward_range), ties

    def reset(self) -> None:
        """Forget everything."""
        self.seen.reset()

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The next arm, out of `arms` where given."""
        fresh = self.seen.first_unplayed(arms)
        if fresh is not None:
            return fresh
        index = restricted(self.index(self.seen), arms, -math.inf)
        return best(index, None if self.ties == "first" else generator)

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Count the reward of an arm."""
        self.seen.add(arm, self.scale(reward))

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next pull."""
        fresh = self.seen.first_unplayed(None)
        if fresh is not None:
            return np.eye(self.seen.arms)[fresh]
        index = self.index(self.seen)
        return tie_law(index) if self.ties == "random" else np.eye(self.seen.arms)[best(index, None)]


def _log_time(horizon: int | None) -> Callable[[ArmStatistics], float]:
    """log T for a horizon, else log of the coming round."""
    if horizon is None:
        return lambda seen: math.log(max(seen.rounds + 1, 2))
    if horizon < 1:
        raise ConfigError(f"horizon is the number of rounds, at least 1, and is {horizon}")
    fixed = math.log(max(horizon, 2))
    return lambda seen: fixed


def UCB1(arms: int, *, horizon: int | None = None, exploration: float = 2.0, **options: Any) -> IndexPolicy:
    """Optimism: the largest mean + root(exploration log T / n), or log t without a horizon. Options: `IndexPolicy`'s.

    >>> source, policy = torch.Generator().manual_seed(0), UCB1(2, horizon=1000)
    >>> for _ in range(1000):
    ...     arm = policy.pull(generator=source)
    ...     policy.update(arm, [0.0, 1.0][arm])
    >>> int(policy.seen.counts[0])
    12
    """
    if not exploration > 0.0:
        raise ConfigError(f"exploration is positive, and is {exploration}")
    log_time = _log_time(horizon)

    def index(seen: ArmStatistics) -> Floats:
        return seen.means + math.sqrt(exploration * log_time(seen)) * seen.inverse_roots

    return IndexPolicy(arms, index=index, **options)


def UCBV(
    arms: int, *, horizon: int | None = None, exploration: float = 1.2, bias: float = 1.0, **options: Any
) -> IndexPolicy:
    """Optimism that knows the variance: mean + root(2 v E/n) + 3 bias E/n, E = exploration log T (or log t)."""
    if not (exploration > 0.0 and bias >= 0.0):
        raise ConfigError(f"exploration is positive and bias not negative, and they are {exploration} and {bias}")
    log_time = _log_time(horizon)

    def index(seen: ArmStatistics) -> Floats:
        level = exploration * log_time(seen)
        inverse = 1.0 / np.maximum(seen.counts, 1.0)
        return seen.means + np.sqrt(2.0 * level * seen.squares) * inverse + (3.0 * bias * level) * inverse

    return IndexPolicy(arms, index=index, **options)


def kl_ucb_budget(rounds: int, factor: float) -> float:
    """log t + factor log log t at the coming round t = rounds + 1, at least 0."""
    log = math.log(max(rounds + 1, 2))
    return max(log + factor * math.log(log), 0.0) if log > 0.0 else 0.0


def kl_ucb_budgets(horizon: int, factor: float) -> Floats:
    """The same of every round 0 (as round 1) to `horizon` at once."""
    logs = np.log(np.maximum(np.arange(horizon + 1), 2.0))
    return np.maximum(logs + factor * np.log(logs), 0.0)


def KLUCB(arms: int, *, factor: float = 3.0, **options: Any) -> IndexPolicy:
    """Optimism by the coin's own divergence: the largest q with n kl(mean, q) <= log t + factor log log t.

    Exact where it matters: with the index q of a promising arm in hand, arms with n kl(mean, q) above the right side
    have a smaller one, and get their Pinsker bound, cut at q, in its place.
    """

    def index(seen: ArmStatistics) -> Floats:
        budget = kl_ucb_budget(seen.rounds, factor)
        played = np.maximum(seen.counts, 1.0)
        bounds = np.minimum(seen.means + math.sqrt(budget / 2.0) / np.sqrt(played), 1.0)
        bounds[seen.counts == 0.0] = -math.inf  # only ever here when the allowed arms leave them out
        top = int(bounds.argmax())
        highest = kl_upper_bound(float(seen.means[top]), budget / float(played[top]))
        inside = min(max(highest, 1e-300), 1.0 - 1e-16)
        divergence = special.kl_div(seen.means, inside) + special.kl_div(1.0 - seen.means, 1.0 - inside)
        larger = (played * divergence <= budget + 1e-9 * (1.0 + played)) | (seen.means > highest)
        bounds[~larger] = np.minimum(bounds[~larger], np.nextafter(highest, 0.0))
        for arm in np.flatnonzero(larger & (bounds > -math.inf)).tolist():
            bounds[arm] = kl_upper_bound(float(seen.means[arm]), budget / float(played[arm]))
        return bounds

    return IndexPolicy(arms, index=index, **options)


def explore_first_pulls(arms: int, horizon: int) -> int:
    """The book's N = (T/K)^(2/3) (log T)^(1/3), rounded down, at least 1.

    >>> explore_first_pulls(10, 20_000)
    340
    """
    return max(1, int((horizon / arms) ** (2.0 / 3.0) * math.log(max(horizon, 2)) ** (1.0 / 3.0)))


class ExploreFirst(Saved):
    """Pulls every arm `pulls` times in turn, then the arm that was best at that moment, for ever.

    pulls: by default `explore_first_pulls(arms, horizon)`; give one of the two.
    """

    _saved = ("seen", "chosen")

    def __init__(
        self,
        arms: int,
        *,
        horizon: int | None = None,
        pulls: int | None = None,
        reward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if (horizon is None) == (pulls is None):
            raise ConfigError("explore-first takes either horizon or pulls: give one of the two")
        self.seen, self.scale = ArmStatistics(arms), RewardScale(reward_range)
        self.pulls = explore_first_pulls(arms, horizon) if horizon is not None else int(pulls or 0)
        if self.pulls < 1:
            raise ConfigError(f"pulls of each arm are at least 1, and are {pulls}")
        self.chosen = -1

    def reset(self) -> None:
        """Forget everything."""
        self.seen.reset()
        self.chosen = -1

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The least pulled arm while exploring, then the chosen one, or the best of the allowed `arms`."""
        counts = restricted(self.seen.counts, arms, math.inf)
        if self.chosen < 0 and counts.min() < self.pulls:
            return int(counts.argmin())
        means = restricted(self.seen.means, arms, -math.inf)
        if self.chosen < 0 and arms is None:
            self.chosen = best(means, generator)
        return self.chosen if self.chosen >= 0 and means[self.chosen] > -math.inf else best(means, generator)

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Count the reward of an arm."""
        self.seen.add(arm, self.scale(reward))

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next pull."""
        if self.chosen < 0 and self.seen.counts.min() >= self.pulls:
            return tie_law(self.seen.means)
        return np.eye(self.seen.arms)[self.chosen if self.chosen >= 0 else int(self.seen.counts.argmin())]


class EpsilonGreedy(Saved):
    """A random arm with probability epsilon, else the arm of the best mean; arms without a reward come first.

    epsilon: None for the book's min(1, t^(-1/3) (K log t)^(1/3)), a number, or a function of the round t = 1, 2, ...
    """

    _saved = ("seen",)

    def __init__(
        self,
        arms: int,
        *,
        epsilon: float | Callable[[int], float] | None = None,
        reward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.seen, self.scale = ArmStatistics(arms), RewardScale(reward_range)
        if isinstance(epsilon, int | float) and not 0.0 <= epsilon <= 1.0:
            raise ConfigError(f"epsilon is a probability, and is {epsilon}")
        self._epsilon = epsilon

    def reset(self) -> None:
        """Forget everything."""
        self.seen.reset()

    def epsilon(self) -> float:
        """The probability that the coming round explores."""
        moment = self.seen.rounds + 1
        if self._epsilon is None:
            return min(1.0, (self.seen.arms * math.log(moment) / moment) ** (1.0 / 3.0)) if moment > 1 else 1.0
        return float(self._epsilon(moment)) if callable(self._epsilon) else float(self._epsilon)

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The next arm, out of `arms` where given."""
        fresh = self.seen.first_unplayed(arms)
        if fresh is not None:
            return fresh
        means = restricted(self.seen.means, arms, -math.inf)
        chance, epsilon = uniform(generator), self.epsilon()
        if chance < epsilon:  # and then chance / epsilon is uniform
            allowed = range(self.seen.arms) if arms is None else arms
            return int(allowed[min(int(chance / epsilon * len(allowed)), len(allowed) - 1)])
        return best(means, generator)

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Count the reward of an arm."""
        self.seen.add(arm, self.scale(reward))

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next pull."""
        fresh = self.seen.first_unplayed(None)
        if fresh is not None:
            return np.eye(self.seen.arms)[fresh]
        epsilon = self.epsilon()
        return epsilon / self.seen.arms + (1.0 - epsilon) * tie_law(self.seen.means)


class SuccessiveElimination(Saved):
    """Pulls the arms still active in turn; after each turn drops those whose upper bound lies below a lower bound.

    radius: root(exploration log T / n). With two arms it is the book's high-confidence elimination.
    """

    _saved = ("seen", "active")

    def __init__(
        self, arms: int, *, horizon: int, exploration: float = 2.0, reward_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        if not (horizon >= 1 and exploration > 0.0):
            raise ConfigError(f"horizon is at least 1 and exploration positive: {horizon} and {exploration}")
        self.seen, self.scale = ArmStatistics(arms), RewardScale(reward_range)
        self.active = np.ones(arms, dtype=np.bool_)
        self.root_log = math.sqrt(exploration * math.log(max(horizon, 2)))

    def reset(self) -> None:
        """Forget everything."""
        self.seen.reset()
        self.active[:] = True

    def _turn(self, arms: Sequence[int] | None) -> Floats:
        counts = restricted(self.seen.counts, arms, math.inf)
        active = np.where(self.active, counts, math.inf)
        return active if active.min() < math.inf else counts

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The least pulled of the active arms, out of `arms` where given (of all these when none is active)."""
        return int(self._turn(arms).argmin())

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Count the reward of an arm, and eliminate when a turn is complete."""
        self.seen.add(arm, self.scale(reward))
        counts = self.seen.counts[self.active]
        if len(counts) > 1 and counts.min() == counts.max():
            radius = self.root_log * self.seen.inverse_roots
            lowest = (self.seen.means - radius)[self.active].max()
            self.active &= self.seen.means + radius >= lowest

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next pull."""
        return np.eye(self.seen.arms)[int(self._turn(None).argmin())]


class Doubling:
    """A policy that needs a horizon, run without one: a new policy for each of the phases of 1, 2, 4, ... rounds.

    make: takes a phase's length to a policy. Costs a constant factor of regret.
    """

    def __init__(self, make: Callable[[int], Policy]) -> None:
        self.make = make
        self.reset()

    def reset(self) -> None:
        """Begin again with a phase of one round."""
        self.length, self.left = 1, 1
        self.policy: Any = self.make(1)

    def pull(self, context: Any = None, *, generator: torch.Generator, **options: Any) -> int:
        """The arm that the phase's policy pulls."""
        return self.policy.pull(context, generator=generator, **options)

    def update(self, arm: int, reward: float, context: Any = None, **options: Any) -> None:
        """Tell the phase's policy, and begin the next phase when this was its last round."""
        self.policy.update(arm, reward, context, **options)
        self.left -= 1
        if self.left == 0:
            self.length *= 2
            self.left = self.length
            self.policy = self.make(self.length)

    def state_dict(self) -> dict[str, Any]:
        """The phase and its policy's state."""
        return {"length": self.length, "left": self.left, "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` gave."""
        self.length, self.left = state["length"], state["left"]
        self.policy = self.make(self.length)
        self.policy.load_state_dict(state["policy"])
