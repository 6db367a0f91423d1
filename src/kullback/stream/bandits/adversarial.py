"""Bandits against an adversary (chapter 6 of the book): Hedge on costs that are estimated from the arm that was played.

With c = 1 - reward, q_t the law of play (after mixing), a_t ~ q_t, and fake costs C_t(a) = c_t(a) 1{a = a_t} / q_t(a):

    Exp3        p_a ~ exp(-eta sum C);  regret <= root(2 T K ln K) for eta = root(2 ln K / (T K)), in expectation
    Exp3-IX     C = c / (q + g), g = eta/2: biased down a little, regret small with high probability
    Exp3.P      gains (r 1{a = a_t} + b) / q and a share g of uniform play; regret <= 5.15 root(T K ln(K/d)), probably
    Exp3.S      p <- (1-s) p + s/K each round: regret against sequences of arms that switch S times
    Exp4        arms advised by N experts, each a distribution; <= root(2 T K ln N) for eta = root(2 ln N / (T K))
    Tsallis-INF q_a = 4 (eta_t (sum C_a - x))^-2, x such that they sum to 1: best of both worlds, without a horizon

E[C_t(a)] = c_t(a) and E[sum_a q_a C_a^2] = sum_a c_a^2 <= K.
Sources: Slivkins (arXiv 1904.07272), chapter 6; Neu 2015 (IX); Auer et al. 2002, Bubeck and Cesa-Bianchi 2012 (P, S);
Zimmert and Seldin 2021 (Tsallis-INF).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream.bandits._policy import Floats, RewardScale, Saved, check_arms, restricted
from kullback.stream.bandits._policy import draw as draw_arm

__all__ = ["Exp3", "Exp3IX", "Exp3P", "Exp3S", "Exp4", "TsallisINF", "exp3_rate", "tsallis_law"]


def exp3_rate(arms: int, horizon: int, experts: int | None = None) -> float:
    """The rate root(2 ln N / (T K)), N the experts, by default the arms: regret <= root(2 T K ln N)."""
    if horizon < 1:
        raise ConfigError(f"horizon is the number of rounds, at least 1, and is {horizon}")
    return math.sqrt(2.0 * math.log(max(experts or arms, 2)) / (horizon * arms))


def _chosen_rate(arms: int, horizon: int | None, rate: float | None, experts: int | None = None) -> float:
    if (horizon is None) == (rate is None):
        raise ConfigError("either horizon or rate sets how fast the weights move: give one of the two")
    value = exp3_rate(arms, horizon, experts) if horizon is not None else float(rate or 0.0)
    if not (value > 0.0 and math.isfinite(value)):
        raise ConfigError(f"rate is positive, and is {rate}")
    return value


def _played(probability: float | None, own: float) -> float:
    """The probability with which an arm was played: the logged one, or the policy's own if it was not told."""
    value = own if probability is None else probability
    if not 0.0 < value <= 1.0:
        raise DataError(f"the probability of the arm that was played lies in (0, 1], and is {value}")
    return value


class _Drawn(Saved):
    """A policy that draws arms from a law, computed once a round."""

    _law: Floats | None = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave."""
        super().load_state_dict(state)
        self._law = None

    def _fresh_law(self) -> Floats:
        raise NotImplementedError

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next pull, uniform play mixed in."""
        if self._law is None:
            self._law = self._fresh_law()
        return self._law

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The next arm; out of `arms` where given, in proportion, and then `update` needs the probability it had."""
        return draw_arm(restricted(self.probabilities(), arms, 0.0), generator)


class Exp3(_Drawn):
    """Hedge over arms on fake costs; `Exp3IX`, `Exp3P` and `Exp3S` set its options.

    Give horizon for `exp3_rate`, or rate. mixing: share g of uniform play; implicit: added to q in C = c / (q + it);
    bonus b: gains (r + b)/q take the place of costs; share s: part of the probability that is spread evenly each round.
    `update` divides by the probability of the arm at that moment: for delayed rewards pass the `probability` it had.

    >>> source, policy = torch.Generator().manual_seed(0), Exp3(2, horizon=500)
    >>> for _ in range(500):
    ...     arm = policy.pull(generator=source)
    ...     policy.update(arm, [0.0, 1.0][arm])
    >>> policy.probabilities()[1] > 0.9
    np.True_
    """

    _saved = ("log_weights",)

    def __init__(
        self,
        arms: int,
        *,
        horizon: int | None = None,
        rate: float | None = None,
        mixing: float = 0.0,
        implicit: float = 0.0,
        bonus: float = 0.0,
        share: float = 0.0,
        reward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.arms, self.scale = check_arms(arms), RewardScale(reward_range)
        self.rate = _chosen_rate(self.arms, horizon, rate)
        if not (0.0 <= mixing <= 1.0 and 0.0 <= share < 1.0 and implicit >= 0.0 and bonus >= 0.0):
            raise ConfigError(f"mixing, share in [0, 1], implicit, bonus >= 0: {mixing}, {share}, {implicit}, {bonus}")
        self.mixing, self.implicit, self.bonus, self.share = mixing, implicit, bonus, share
        self.log_weights = np.full(self.arms, -math.log(self.arms))

    def reset(self) -> None:
        """Forget everything."""
        self.log_weights[:], self._law = -math.log(self.arms), None

    def _fresh_law(self) -> Floats:
        law = np.exp(self.log_weights)
        total = np.add.reduce(law)
        if not 1e-100 < total < 1e100:  # seldom: the weights lose their common factor
            self.log_weights -= self.log_weights.max()
            law = np.exp(self.log_weights)
            total = np.add.reduce(law)
        law /= total
        return (1.0 - self.mixing) * law + self.mixing / self.arms if self.mixing else law

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Learn the reward of an arm that was played with `probability`, by default the current one."""
        if not 0 <= arm < self.arms:
            raise DataError(f"an arm is a number in 0..{self.arms - 1}, and is {arm}")
        gain, law = self.scale(reward), self.probabilities()
        played = _played(probability, float(law[arm]))
        if self.bonus:
            self.log_weights += (self.rate * self.bonus) / law
            self.log_weights[arm] += self.rate * gain / played
        else:
            self.log_weights[arm] -= self.rate * (1.0 - gain) / (played + self.implicit)
        self._law = None
        if self.share:
            weights = np.exp(self.log_weights - self.log_weights.max())
            np.log((1.0 - self.share) * weights / weights.sum() + self.share / self.arms, out=self.log_weights)


def Exp3IX(arms: int, *, horizon: int | None = None, rate: float | None = None, **options: Any) -> Exp3:
    """Exp3 with implicit exploration: C = c / (q + rate/2), whose regret is small with high probability."""
    rate = _chosen_rate(check_arms(arms), horizon, rate)
    return Exp3(arms, rate=rate, implicit=rate / 2.0, **options)


def Exp3P(arms: int, *, horizon: int, confidence: float = 0.05, **options: Any) -> Exp3:
    """Exp3.P: gains with a bonus, and uniform play; regret <= 5.15 root(T K ln(K/d)) with probability 1 - d."""
    if not (0.0 < confidence < 1.0 and horizon >= 1):
        raise ConfigError(f"confidence lies in (0, 1) and horizon is at least 1: {confidence} and {horizon}")
    log, count = math.log(max(check_arms(arms), 2)), float(arms)
    return Exp3(
        arms,
        rate=0.95 * math.sqrt(log / (horizon * count)),
        mixing=min(1.0, 1.05 * math.sqrt(count * log / horizon)),
        bonus=math.sqrt(math.log(count / confidence) / (horizon * count)),
        **options,
    )


def Exp3S(arms: int, *, horizon: int, switches: int = 1, **options: Any) -> Exp3:
    """Exp3 that follows the best sequence of arms with so many switches: share S/T, and the rate for that comparison.

    Regret against it is at most root(2 T K ((S+1) ln K + S ln(e T/S))), in expectation.
    """
    if not 1 <= switches < horizon:
        raise ConfigError(f"switches are at least 1 and fewer than the {horizon} rounds, and are {switches}")
    complexity = (switches + 1) * math.log(max(check_arms(arms), 2)) + switches * math.log(math.e * horizon / switches)
    return Exp3(arms, rate=math.sqrt(2.0 * complexity / (horizon * arms)), share=switches / horizon, **options)


class Exp4(Saved):
    """Hedge over experts that each advise a law over arms: the context is that advice [N, K], rows summing to 1.

    Give horizon for root(2 ln N / (T K)), or rate; mixing: share of uniform play. The book's own choice is
    rate -log(1 - root(ln N / (3 K T))) and mixing below 1/(2T). dtype: float32 serves up to 10^5 experts.
    """

    _saved = ("log_weights",)

    def __init__(
        self,
        experts: int,
        arms: int,
        *,
        horizon: int | None = None,
        rate: float | None = None,
        mixing: float = 0.0,
        reward_range: tuple[float, float] = (0.0, 1.0),
        dtype: Any = np.float64,
    ) -> None:
        self.experts, self.arms, self.scale = check_arms(experts), check_arms(arms), RewardScale(reward_range)
        self.rate = _chosen_rate(self.arms, horizon, rate, self.experts)
        if not 0.0 <= mixing <= 1.0:
            raise ConfigError(f"mixing is a share in [0, 1], and is {mixing}")
        self.mixing = mixing
        self.log_weights = np.full(self.experts, -math.log(self.experts), dtype=dtype)

    def reset(self) -> None:
        """Forget everything."""
        self.log_weights[:] = -math.log(self.experts)

    def _advice(self, context: Any) -> Any:
        advice = np.asarray(context)
        if advice.shape != (self.experts, self.arms):
            wanted = (self.experts, self.arms)
            raise ShapeError(f"the context is advice of shape {wanted}, a law over arms each, and has {advice.shape}")
        return advice

    def probabilities(self, context: Any = None) -> Floats:
        """The law of the next pull, given the advice."""
        weights = np.exp(self.log_weights)
        law = (weights @ self._advice(context)).astype(np.float64)
        total = law.sum()
        if not (law.min() >= 0.0 and total > 0.0):
            raise DataError("advice has a negative entry, NaN, or no probability at all: each row is a law over arms")
        return (1.0 - self.mixing) * (law / total) + self.mixing / self.arms

    def pull(self, context: Any = None, *, generator: torch.Generator, arms: Sequence[int] | None = None) -> int:
        """The next arm, given the advice."""
        return draw_arm(restricted(self.probabilities(context), arms, 0.0), generator)

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Learn the reward of an arm that was played under this advice, with `probability` or the current one."""
        advice = self._advice(context)
        own = float(self.probabilities(advice)[arm]) if probability is None else 1.0
        cost = (1.0 - self.scale(reward)) / _played(probability, own)
        self.log_weights -= (self.rate * cost) * advice[:, arm].astype(self.log_weights.dtype)
        self.log_weights -= self.log_weights.max()


def tsallis_law(costs: Floats, rate: float, gap: float = 0.0) -> tuple[Floats, float]:
    """The law q_a = 4 (rate (costs_a - x))^-2, whose x lies `gap` below the smallest cost, where it sums to 1; and gap.

    Newton's method: the sum is convex and falling in the gap, and at least 1 at 2 / rate, so that the iteration climbs
    to the root from there, or from below it after one step from a gap that is too large. gap: a guess to begin with.
    """
    lowest, least = float(np.minimum.reduce(costs)), 2.0 / rate
    gap = max(gap, least)
    for _ in range(100):
        inverse = least / (costs - (lowest - gap))
        law = inverse * inverse
        total = float(np.add.reduce(law))
        if abs(total - 1.0) < 1e-12:
            break
        gap = max(gap + (total - 1.0) / (rate * float(law.dot(inverse))), least)
    return law / total, gap


class TsallisINF(_Drawn):
    """Follow the regularised leader with Tsallis entropy 1/2, rate 2 / root(t), or 4 / root(t) with reduced variance.

    Near optimal both for i.i.d. and for adversarial rewards, without a horizon. estimator: "weighted" c 1/q, or
    "reduced": c - B over q, plus B, where B = 1/2 for arms with q >= rate^2.
    """

    _saved = ("costs", "rounds", "gap")

    def __init__(
        self, arms: int, *, estimator: str = "weighted", reward_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        if estimator not in ("weighted", "reduced"):
            raise ConfigError(f'estimator is "weighted" or "reduced", not {estimator!r}')
        self.arms, self.scale, self.estimator = check_arms(arms), RewardScale(reward_range), estimator
        self.costs, self.rounds, self.gap, self._found = np.zeros(self.arms), 0, 0.0, 0.0

    def reset(self) -> None:
        """Forget everything."""
        self.costs[:], self.rounds, self.gap, self._law = 0.0, 0, 0.0, None

    def rate(self) -> float:
        """The rate of the coming round."""
        return (2.0 if self.estimator == "weighted" else 4.0) / math.sqrt(self.rounds + 1.0)

    def _fresh_law(self) -> Floats:
        law, self._found = tsallis_law(self.costs, self.rate(), self.gap)
        return law

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Learn the reward of an arm that was played with `probability`, by default the current one."""
        cost, law = 1.0 - self.scale(reward), self.probabilities()
        played = _played(probability, float(law[arm]))
        if self.estimator == "reduced":
            baseline = np.where(law >= self.rate() ** 2, 0.5, 0.0)
            self.costs += baseline
            cost -= float(baseline[arm])
        self.costs[arm] += cost / played
        self.costs -= self.costs.min()
        self.rounds, self.gap = self.rounds + 1, self._found  # kept only now, so that a saved state gives the same bits
        self._law = None
