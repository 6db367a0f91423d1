"""Bandits with knapsacks: every pull pays a reward and uses up resources, and play ends with the first that runs out
(chapter 10 of the book).

d resources, each with the budget B: time, of which every round uses B/T, is one of them and stands last. The null arm,
last too, pays nothing and uses only time. The benchmark is the linear program

    max over distributions D of T sum_a D_a r_a   with   sum_a D_a c_ai <= B/T for every resource i

    Lagrange      payoff L(a, i) = r + 1 - (T/B) c_i: Exp3.P plays arms to raise it, Hedge resources to lower it
    primal-dual   the arm of the largest UCB(r) / sum_i v_i LCB(c_i); then v_i <- v_i (1+e)^LCB(c_i), e = root(log d/B)
    optimistic    solves the program each round with UCB for rewards, LCB for consumption, and the budget (1-s) B

The radius is root(exploration log T / n). In these policies a reward comes with its consumption: `update(arm, reward,
consumption)`. Source: Slivkins (arXiv 1904.07272), chapter 10; Badanidiyuru et al. 2013; Agrawal and Devanur 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream.bandits._policy import Floats, Saved, best, floats, stream_states, uniform, vector
from kullback.stream.bandits._policy import draw as draw_arm
from kullback.stream.bandits.adversarial import Exp3P
from kullback.stream.bandits.experts import Hedge

__all__ = [
    "KnapsackInstance",
    "LagrangeBwK",
    "Played",
    "PrimalDualBwK",
    "UcbBwK",
    "ad_allocation",
    "bwk_lp",
    "play_knapsack",
    "pricing",
    "procurement",
    "simulate_knapsack",
]


@dataclass(frozen=True, slots=True)
class KnapsackInstance:
    """Arms that succeed with `chances` [K], then pay `payments` [K] and use `uses` [K, d], and else do nothing.

    Every resource has the `budget`; the null arm and time are not among the arms and resources here, and always there.
    """

    chances: Floats
    payments: Floats
    uses: Floats
    budget: float
    horizon: int

    @property
    def arms(self) -> int:
        """The number of arms, the null arm among them."""
        return len(self.chances) + 1

    @property
    def resources(self) -> int:
        """The number of resources, time among them."""
        return self.uses.shape[1] + 1

    def expectations(self) -> tuple[Floats, Floats]:
        """Mean rewards [K + 1] and consumption [K + 1, d + 1], null arm and time last."""
        rewards = np.append(self.chances * self.payments, 0.0)
        consumption = np.zeros((self.arms, self.resources))
        consumption[:-1, :-1] = self.chances[:, None] * self.uses
        consumption[:, -1] = self.budget / self.horizon
        return rewards, consumption

    def value(self) -> float:
        """The value of the linear program, which no policy exceeds in expectation."""
        return bwk_lp(*self.expectations(), budget=self.budget, horizon=self.horizon)[0]

    def draw(self, arm: int, *, generator: torch.Generator) -> tuple[float, Floats]:
        """A reward, and the consumption [d + 1]."""
        use = np.zeros(self.resources)
        use[-1] = self.budget / self.horizon
        if arm == self.arms - 1 or uniform(generator) >= self.chances[arm]:
            return 0.0, use
        use[:-1] = self.uses[arm]
        return float(self.payments[arm]), use


def _instance(chances: Any, payments: Any, uses: Any, budget: float, horizon: int) -> KnapsackInstance:
    chances, payments = vector("chances", chances), vector("payments", payments)
    uses = floats(uses)
    if len(payments) != len(chances) or uses.ndim != 2 or len(uses) != len(chances):
        raise ShapeError(f"{len(chances)} arms need as many payments and rows of uses: {len(payments)}, {uses.shape}")
    if not all(float(x.min()) >= 0.0 and float(x.max()) <= 1.0 for x in (chances, payments, uses) if x.size):
        raise DataError("chances, payments and uses lie in [0, 1]")
    if not (horizon >= 1 and 0.0 < budget <= horizon):
        raise ConfigError(f"the horizon is at least 1 and the budget in (0, horizon], and they are {horizon}, {budget}")
    return KnapsackInstance(chances, payments, uses, float(budget), int(horizon))


def pricing(prices: Any, demand: Any, *, supply: float, horizon: int) -> KnapsackInstance:
    """Selling a limited supply: at each of the prices an item is sold with the probability in `demand`.

    >>> round(pricing([0.25, 0.5, 0.75], [0.75, 0.5, 0.25], supply=250, horizon=1000).value(), 6)
    187.5
    """
    prices = vector("prices", prices)
    return _instance(demand, prices, np.ones((len(prices), 1)), supply, horizon)


def procurement(prices: Any, acceptance: Any, *, budget: float, horizon: int) -> KnapsackInstance:
    """Buying with limited money: at price p an item is got, worth 1, with probability `acceptance`, and p is paid."""
    prices = vector("prices", prices)
    return _instance(acceptance, np.ones(len(prices)), prices[:, None], budget, horizon)


def ad_allocation(clicks: Any, bids: Any, advertisers: Any, *, budget: float, horizon: int) -> KnapsackInstance:
    """Showing ads: ad a of advertiser advertisers[a] is clicked with probability clicks[a] and then pays its bid.

    Each advertiser pays from a budget of its own, of which each has the same.
    """
    bids, owners = vector("bids", bids), np.asarray(advertisers, dtype=np.int64)
    uses = np.zeros((len(bids), int(owners.max()) + 1))
    uses[np.arange(len(bids)), owners] = bids
    return _instance(clicks, bids, uses, budget, horizon)


def bwk_lp(rewards: Any, consumption: Any, *, budget: float, horizon: int) -> tuple[float, Floats]:
    """The linear program over distributions: its value, times the horizon, and an optimal distribution [K].

    rewards [K], consumption [K, d]; what the distribution lacks of 1 is the null arm's. One resource that binds: a mix
    of two arms, found as the upper hull of (consumption, reward); more: by a solver.
    """
    gains, use = vector("rewards", rewards), floats(consumption)
    if use.ndim != 2 or len(use) != len(gains) or not np.isfinite(use).all():
        raise ShapeError(f"consumption is finite, one row for each of {len(gains)} arms, and has shape {use.shape}")
    share = budget / horizon
    if not (share > 0.0 and math.isfinite(share)):
        raise ConfigError(f"budget and horizon are positive, and are {budget} and {horizon}")
    can_bind = np.flatnonzero(use.max(axis=0) > share * (1.0 + 1e-12))
    if len(can_bind) <= 1:
        costs = use[:, can_bind[0]] if len(can_bind) else np.zeros(len(gains))
        law = _mix_of_two(gains, costs, share)
    else:
        law = _solved(gains, use, share)
    return float(gains @ law) * horizon, law


def _solved(gains: Floats, use: Floats, share: float) -> Floats:
    """The program by scipy's solver."""
    rows = np.vstack([use.T, np.ones(len(gains))])
    limits = np.append(np.full(use.shape[1], share), 1.0)
    solution = linprog(-gains, A_ub=rows, b_ub=limits, bounds=(0.0, None), method="highs")
    if not solution.success:
        raise DataError(f"the linear program has no solution: {solution.message}")
    return np.maximum(solution.x, 0.0)


def _mix_of_two(gains: Floats, costs: Floats, share: float) -> Floats:
    """The best mix of at most two arms (or one and the null arm) of mean cost at most `share`."""
    law, count = np.zeros(len(gains)), len(gains)
    gain, cost = np.append(gains, 0.0), np.append(costs, 0.0)
    fits, exceeds = np.flatnonzero(cost <= share), np.flatnonzero(cost > share)
    value, choice = 0.0, (count, count, 1.0)
    single = fits[gain[fits].argmax()]
    if gain[single] > value:
        value, choice = gain[single], (single, single, 1.0)
    if len(exceeds):
        weight = (share - cost[fits])[:, None] / (cost[exceeds] - cost[fits][:, None])
        mixed = gain[fits][:, None] * (1.0 - weight) + gain[exceeds] * weight
        one, other = np.unravel_index(int(mixed.argmax()), mixed.shape)
        if mixed[one, other] > value:
            choice = (fits[one], exceeds[other], 1.0 - float(weight[one, other]))
    first, second, part = choice
    for arm, mass in ((first, part), (second, 1.0 - part)):
        if arm < count:
            law[arm] += mass
    return law


class _Bounds(Saved):
    """Counts and means of rewards and consumption, and their confidence bounds, cut to [0, 1]."""

    _saved = ("counts", "rewards", "consumption")

    def __init__(self, arms: int, resources: int, horizon: int, exploration: float) -> None:
        self.counts, self.rewards = np.zeros(arms), np.zeros(arms)
        self.consumption = np.zeros((arms, resources))
        self.level = exploration * math.log(max(horizon, 2))

    def add(self, arm: int, reward: float, use: Floats) -> None:
        self.counts[arm] += 1.0
        self.rewards[arm] += (reward - self.rewards[arm]) / self.counts[arm]
        self.consumption[arm] += (use - self.consumption[arm]) / self.counts[arm]

    def optimistic(self) -> tuple[Floats, Floats]:
        """Upper bounds of rewards [K], lower ones of consumption [K, d]; 1 and 0 for arms without a pull."""
        radius = np.sqrt(self.level / np.maximum(self.counts, 1e-12))
        return np.minimum(self.rewards + radius, 1.0), np.maximum(self.consumption - radius[:, None], 0.0)


def _checked(arms: int, resources: int, budget: float, horizon: int) -> None:
    if not (arms >= 1 and resources >= 1 and horizon >= 1 and 0.0 < budget <= horizon):
        given = f"{arms}, {resources}, {budget}, {horizon}"
        raise ConfigError(f"arms, resources, horizon >= 1 and a budget in (0, horizon] are needed, and got {given}")


def _consumption(use: Any, resources: int) -> Floats:
    values = vector("consumption", use, resources)
    if not (values.min() >= 0.0 and values.max() <= 1.0):
        raise DataError("consumption lies in [0, 1] for every resource")
    return values


class PrimalDualBwK(Saved):
    """Pulls every arm once, then the one with most reward for its price: UCB(r) / sum_i v_i LCB(c_i).

    arms and resources count the null arm and time; time's consumption, known, is kept at budget / horizon.
    """

    _saved = ("seen", "log_prices")

    def __init__(
        self, arms: int, resources: int, *, budget: float, horizon: int, exploration: float = 2.0
    ) -> None:
        _checked(arms, resources, budget, horizon)
        self.seen = _Bounds(arms, resources, horizon, exploration)
        self.share, self.resources = budget / horizon, resources
        self.rate = math.log1p(math.sqrt(math.log(max(resources, 2)) / budget))
        self.log_prices = np.zeros(resources)

    def _uses(self) -> tuple[Floats, Floats]:
        rewards, use = self.seen.optimistic()
        use[:, -1] = self.share
        return rewards, use

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The next arm."""
        fresh = np.flatnonzero(self.seen.counts == 0)
        if len(fresh):
            return int(fresh[0])
        rewards, use = self._uses()
        prices = np.exp(self.log_prices - self.log_prices.max())
        return best(rewards / np.maximum(use @ prices, 1e-300), generator)

    def update(self, arm: int, reward: float, context: Any) -> None:
        """Learn a reward and, as the context, its consumption [d]; raise the prices of what it is thought to use."""
        played = self.seen.counts.min() > 0
        if played:
            self.log_prices += self.rate * self._uses()[1][arm]
        self.seen.add(arm, reward, _consumption(context, self.resources))


class UcbBwK(Saved):
    """Solves the optimistic linear program each round and draws the arm from its distribution.

    shrink: the share s taken off the budget, by default min(1/2, root(K log T / B)/4). Null arm and time as above.
    """

    _saved = ("seen",)

    def __init__(
        self,
        arms: int,
        resources: int,
        *,
        budget: float,
        horizon: int,
        exploration: float = 2.0,
        shrink: float | None = None,
    ) -> None:
        _checked(arms, resources, budget, horizon)
        self.seen = _Bounds(arms, resources, horizon, exploration)
        self.budget, self.horizon, self.resources = budget, horizon, resources
        default = min(0.5, 0.25 * math.sqrt(arms * math.log(max(horizon, 2)) / budget))
        self.shrink = default if shrink is None else shrink
        if not 0.0 <= self.shrink < 1.0:
            raise ConfigError(f"shrink is a share in [0, 1), and is {shrink}")

    def probabilities(self, context: Any = None) -> Floats:
        """The distribution of the next arm; what it lacks of 1 goes to the null arm, the last."""
        rewards, use = self.seen.optimistic()
        _, law = bwk_lp(rewards, use[:, :-1], budget=self.budget * (1.0 - self.shrink), horizon=self.horizon)
        law[-1] += max(1.0 - law.sum(), 0.0)
        return law

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The next arm."""
        fresh = np.flatnonzero(self.seen.counts == 0)
        return int(fresh[0]) if len(fresh) else draw_arm(self.probabilities(), generator)

    def update(self, arm: int, reward: float, context: Any) -> None:
        """Learn a reward and, as the context, its consumption [d]."""
        self.seen.add(arm, reward, _consumption(context, self.resources))


class LagrangeBwK(Saved):
    """Exp3.P over arms against Hedge over resources, in the game L(a, i) = r + 1 - (T/B) c_i, scaled to [0, 1]."""

    _saved = ("primal", "dual", "resource")

    def __init__(self, arms: int, resources: int, *, budget: float, horizon: int, confidence: float = 0.05) -> None:
        _checked(arms, resources, budget, horizon)
        self.ratio, self.resources = horizon / budget, resources
        self.primal = Exp3P(arms, horizon=horizon, confidence=confidence)
        self.dual = Hedge(resources, horizon=horizon)
        self.resource = 0

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The next arm; the resource that it is judged by is drawn along with it."""
        self.resource = self.dual.pull(generator=generator)
        return self.primal.pull(generator=generator)

    def update(self, arm: int, reward: float, context: Any) -> None:
        """Learn a reward and, as the context, its consumption [d]."""
        use = _consumption(context, self.resources)
        payoffs = (reward + 1.0 - self.ratio * use - (1.0 - self.ratio)) / (1.0 + self.ratio)
        self.primal.update(arm, float(payoffs[self.resource]))
        self.dual.observe(payoffs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a policy earned, in how many rounds, and how much it used of each resource, time last."""

    reward: float
    rounds: int
    used: Floats


def play_knapsack(policy: Any, instance: KnapsackInstance, *, generator: torch.Generator) -> Played:
    """Play until the horizon, or until a pull could use more of a resource than is left: no budget goes below 0."""
    earned, used, rounds = 0.0, np.zeros(instance.resources), 0
    largest = np.append(instance.uses.max(axis=0, initial=0.0), 0.0)
    while rounds < instance.horizon and (used + largest <= instance.budget * (1.0 + 1e-12)).all():
        arm = policy.pull(None, generator=generator)
        reward, use = instance.draw(arm, generator=generator)
        policy.update(arm, reward, use)
        earned, used, rounds = earned + reward, used + use, rounds + 1
    return Played(reward=earned, rounds=rounds, used=used)


def simulate_knapsack(
    policy: str, instance: KnapsackInstance, *, runs: int = 1, exploration: float = 2.0, generator: torch.Generator
) -> Floats:
    """What each of `runs` runs earns, compiled: policy "primal_dual", or "ucb1", which knows nothing of the budget.

    `PrimalDualBwK` and `UCB1` under `play_knapsack` are the naive twins. Raises MissingExtra without numba.
    """
    if policy not in ("primal_dual", "ucb1"):
        raise ConfigError(f'policy is "primal_dual" or "ucb1", not {policy!r}')
    if not (runs >= 1 and exploration > 0.0):
        raise ConfigError(f"runs are at least 1 and exploration is positive, and they are {runs} and {exploration}")
    from kullback.stream.bandits._compiled_worlds import run_knapsack

    level = exploration * math.log(max(instance.horizon, 2))
    world = (instance.chances, instance.payments, instance.uses, instance.budget, instance.horizon, level)
    return np.array([run_knapsack(policy == "ucb1", *world, z)[0] for z in stream_states(runs, generator)])
