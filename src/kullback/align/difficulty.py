"""Online difficulty filtering: train on prompts that the policy now solves sometimes, and what theory says of it.

A group of G answers with rewards in [0, 1] is kept if its pass rate, their mean, lies between two thresholds. With 0/1
rewards, pass rate p under a reference pi_0 and l = 1 / beta, the optimum pi* of E r - beta KL has

    pass rate        q = p e^l / (1 - p + p e^l)
    KL(pi_0||pi*)    log(1 - p + p e^l) - p l        forward, the reference first
    KL(pi*||pi_0)    q l - log(1 - p + p e^l)        reverse

exactly, because the laws agree given the reward. The published reason for 1/2, p (1 - p) / (2 beta^2), is the term of
second order of the forward KL: a lower bound of it for p < 1/2 and small l only, never one at or above 1/2. The forward
KL is largest at p = 1 / l - 1 / (e^l - 1), below 1/2: strong tilts favour harder prompts.

Shapes: rewards [P, G]; rates [...]. Divergences in nats. Source: arXiv 2504.03380.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "DifficultyFilter",
    "PassRateTracker",
    "acceptance_probability",
    "best_pass_rate",
    "difficulty_filter",
    "expected_advantage",
    "expected_reward_variance",
    "informative_probability",
    "kl_to_optimum",
    "offline_prompts",
    "pinsker_bound",
    "tilted_pass_rate",
    "variance_bound",
]

_EDGE = 1e-9  # a pass rate of k / G meets a threshold of the same value, whatever the rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class DifficultyFilter:
    """Keeps groups whose pass rate lies from `low` to `high`, each end itself included or not.

    variance: the group's rewards must vary by more, for graded rewards; below 0 for no such condition. Raises
    ConfigError for thresholds that are not 0 <= low <= high <= 1.

    >>> DifficultyFilter()(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([ True, False])
    """

    low: float = 0.25
    high: float = 0.75
    low_included: bool = True
    high_included: bool = True
    variance: float = -1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ConfigError(f"thresholds are 0 <= low <= high <= 1, got {self.low} and {self.high}")
        if self.low == self.high and not (self.low_included and self.high_included):
            raise ConfigError(f"nothing lies between {self.low} and {self.high} where an end is left out")

    def __call__(self, rewards: Tensor) -> Tensor:
        """Which groups [P, G] are kept, [P]. ShapeError for groups of one, DataError for rewards outside 0 to 1."""
        if rewards.ndim != 2 or rewards.shape[1] < 2:
            raise ShapeError(f"rewards are [prompts, group] with groups of 2 or more, got {tuple(rewards.shape)}")
        wide = rewards.double()
        if not ((wide >= 0.0) & (wide <= 1.0)).all():
            raise DataError("rewards are numbers from 0 to 1 here: scale them, or set the thresholds on their ranks")
        return self.keeps(wide.mean(1)) & (wide.var(1, correction=0) > self.variance)

    def keeps(self, rate: Tensor) -> Tensor:
        """Whether pass rates [...] lie between the thresholds."""
        low = rate >= self.low - _EDGE if self.low_included else rate > self.low + _EDGE
        high = rate <= self.high + _EDGE if self.high_included else rate < self.high - _EDGE
        return low & high


def difficulty_filter(
    mode: Literal["balanced", "easy", "hard", "nonzero", "plain"] = "balanced", threshold: float = 0.25
) -> DifficultyFilter:
    """The paper's filters: "balanced" from t to 1 - t, "easy" from t to below 1, "hard" from above 0 to 1 - t.

    "nonzero" leaves out what is solved never or always (dynamic sampling, DAPO), "plain" nothing; both without t.
    """
    if mode == "balanced":
        return DifficultyFilter(low=threshold, high=1.0 - threshold)
    if mode == "easy":
        return DifficultyFilter(low=threshold, high=1.0, high_included=False)
    if mode == "hard":
        return DifficultyFilter(low=0.0, high=1.0 - threshold, low_included=False)
    if mode == "nonzero":
        return DifficultyFilter(low=0.0, high=1.0, low_included=False, high_included=False)
    if mode == "plain":
        return DifficultyFilter(low=0.0, high=1.0)
    raise ConfigError(f"a filter is one of balanced, easy, hard, nonzero, plain, not {mode!r}")


def offline_prompts(rewards: Tensor, *, keep: DifficultyFilter, easy_first: bool = False) -> Tensor:
    """The paper's baselines that look once, with the first policy: the numbers of the prompts that a filter keeps.

    rewards [P, G] of the first policy; easy_first: in the order of a curriculum, from high pass rates to low ones, in
    place of that of their numbers. Raises as the filter does.

    >>> offline_prompts(torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).float(), keep=DifficultyFilter())
    tensor([0, 2])
    """
    kept = keep(rewards).nonzero().squeeze(1)
    if not easy_first:
        return kept
    return kept[rewards[kept].double().mean(1).sort(descending=True, stable=True).indices]


def _counts(group: int) -> Tensor:
    if group < 2:
        raise ConfigError(f"a group has 2 answers or more, got {group}")
    return torch.arange(group + 1, dtype=torch.float64)


def _rate(rate: Tensor | float) -> Tensor:
    p = torch.as_tensor(rate, dtype=torch.float64)
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise DataError("a pass rate is a number from 0 to 1")
    return p


def _binomial(rate: Tensor | float, group: int) -> tuple[Tensor, Tensor]:
    """The shares k / G [G + 1] and their probabilities [..., G + 1]."""
    k = _counts(group)
    p = _rate(rate).unsqueeze(-1)
    ways = torch.tensor([math.comb(group, place) for place in range(group + 1)], dtype=torch.float64)
    return k / group, ways * p**k * (1.0 - p) ** (group - k)


def acceptance_probability(rate: Tensor | float, group: int, *, keep: DifficultyFilter) -> Tensor:
    """The chance that a prompt of this pass rate [...] is kept, of a group of G answers; 1 over it is the cost of one.

    >>> acceptance_probability(0.5, 8, keep=DifficultyFilter())
    tensor(0.9297, dtype=torch.float64)
    """
    share, law = _binomial(rate, group)
    variance = share * (1.0 - share) > keep.variance
    return torch.where(keep.keeps(share) & variance, law, 0.0).sum(-1)


def informative_probability(rate: Tensor | float, group: int) -> Tensor:
    """The chance that a group is solved neither never nor always, 1 - p^G - (1 - p)^G."""
    _counts(group)
    p = _rate(rate)
    return 1.0 - p**group - (1.0 - p) ** group


def expected_advantage(rate: Tensor | float, group: int, *, correction: int = 1) -> Tensor:
    """E|A| of GRPO's advantages, normalised by the standard deviation with this correction: E 2 sqrt(s (1 - s))."""
    share, law = _binomial(rate, group)
    found = (2.0 * (share * (1.0 - share)).sqrt() * law).sum(-1)
    return found * math.sqrt((group - 1) / group) if correction else found


def expected_reward_variance(rate: Tensor | float, group: int) -> Tensor:
    """E s (1 - s), the energy of advantages that are not normalised: (1 - 1/G) p (1 - p)."""
    _counts(group)
    p = _rate(rate)
    return (1.0 - 1.0 / group) * p * (1.0 - p)


def _tilt(beta: float) -> float:
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
    return 1.0 / beta


def _log_partition(p: Tensor, tilt: float) -> Tensor:
    """log(1 - p + p e^l), by the form that keeps its digits at either end."""
    if tilt < 1.0:
        return torch.log1p(p * math.expm1(tilt))
    return torch.logaddexp(torch.log1p(-p), p.log() + tilt)


def tilted_pass_rate(rate: Tensor | float, beta: float) -> Tensor:
    """The pass rate of the optimum of E r - beta KL(.||pi_0), [...] to [...], float64.

    >>> tilted_pass_rate(0.25, 1.0)
    tensor(0.4754, dtype=torch.float64)
    """
    p, tilt = _rate(rate), _tilt(beta)
    return (p.log() + tilt - _log_partition(p, tilt)).exp().clamp(max=1.0)


def kl_to_optimum(
    rate: Tensor | float, beta: float, *, direction: Literal["forward", "reverse"] = "forward"
) -> Tensor:
    """KL between a policy of this pass rate and the optimum of E r - beta KL, exact for 0/1 rewards; nats, float64.

    "forward" is KL(pi_0||pi*), "reverse" KL(pi*||pi_0).

    >>> kl_to_optimum(0.25, 1.0)
    tensor(0.1074, dtype=torch.float64)
    """
    p, tilt = _rate(rate), _tilt(beta)
    if direction == "forward":
        return (_log_partition(p, tilt) - p * tilt).clamp(min=0.0)
    if direction == "reverse":
        return (tilted_pass_rate(p, beta) * tilt - _log_partition(p, tilt)).clamp(min=0.0)
    raise ConfigError(f'direction is "forward" or "reverse", not {direction!r}')


def variance_bound(rate: Tensor | float, beta: float) -> Tensor:
    """p (1 - p) / (2 beta^2), published as a lower bound of the forward KL: its leading term at small 1 / beta.

    It bounds for p below 1/2 up to some 1 / beta (17 at p = 0.1, 5.2 at 0.25, 1.7 at 0.4) and never at or above 1/2;
    `pinsker_bound` always does.
    """
    p = _rate(rate)
    return p * (1.0 - p) * _tilt(beta) ** 2 / 2.0


def pinsker_bound(rate: Tensor | float, beta: float) -> Tensor:
    """2 (q - p)^2, below both KL divergences for every pass rate and beta."""
    p = _rate(rate)
    return 2.0 * (tilted_pass_rate(p, beta) - p).square()


def best_pass_rate(beta: float) -> float:
    """The pass rate at which the forward KL to the optimum is largest: 1/2 for weak tilts, smaller for strong ones.

    >>> round(best_pass_rate(1.0), 4), round(best_pass_rate(0.1), 4)
    (0.418, 0.1)
    """
    tilt = _tilt(beta)
    if tilt < 1e-3:  # where the two terms cancel
        return 0.5 - tilt / 12.0
    return 1.0 / tilt - (math.exp(-tilt) / -math.expm1(-tilt))


class PassRateTracker:
    """A Beta posterior of every prompt's pass rate, which forgets, so that rollouts are spent where they will be kept.

    count: prompts; before and against: the prior's successes and failures; forgetting: what is left of earlier counts
    at each update of a prompt, 1 for all. Raises ConfigError for numbers out of range.

    >>> tracker = PassRateTracker(3)
    >>> tracker.update([1], [3], 4)
    >>> tracker.predict([0, 1])[0]
    tensor([0.5000, 0.6667], dtype=torch.float64)
    """

    def __init__(self, count: int, *, before: float = 1.0, against: float = 1.0, forgetting: float = 1.0) -> None:
        if count < 1 or not (before > 0.0 and against > 0.0):
            raise ConfigError(f"count is 1 or more and a prior positive, got {count}, {before} and {against}")
        if not 0.0 <= forgetting <= 1.0:
            raise ConfigError(f"forgetting is from 0 to 1, got {forgetting}")
        self.prior, self.forgetting = (before, against), forgetting
        self.solved = torch.zeros(count, dtype=torch.float64)
        self.failed = torch.zeros(count, dtype=torch.float64)

    def update(self, index: Any, solved: Any, answers: int) -> None:
        """Add `solved` [K] of `answers` each for the prompts of these numbers [K], which differ."""
        rows, found = torch.as_tensor(index), torch.as_tensor(solved, dtype=torch.float64)
        if rows.shape != found.shape or len(rows.unique()) != rows.numel():
            raise ShapeError(f"index and solved are alike and no prompt comes twice, got {tuple(rows.shape)}")
        if ((found < 0) | (found > answers)).any():
            raise DataError(f"solved answers are from 0 to {answers}")
        self.solved[rows] = self.forgetting * self.solved[rows] + found
        self.failed[rows] = self.forgetting * self.failed[rows] + answers - found

    def predict(self, index: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """The mean and variance of the pass rate, float64 [K], of all prompts or of those numbered."""
        a, b = self._posterior(index)
        mean = a / (a + b)
        return mean, mean * (1.0 - mean) / (a + b + 1.0)

    def acceptance(self, group: int, *, keep: DifficultyFilter, index: Any = slice(None)) -> Tensor:
        """The chance that a group is kept, with the pass rate itself uncertain (a beta-binomial law), [K]."""
        k = _counts(group)
        a, b = (part.unsqueeze(-1) for part in self._posterior(index))
        ways = torch.tensor([math.log(math.comb(group, place)) for place in range(group + 1)], dtype=torch.float64)

        def log_beta(x: Tensor, y: Tensor) -> Tensor:
            return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)

        law = (ways + log_beta(k + a, group - k + b) - log_beta(a, b)).exp()
        share = k / group
        held = keep.keeps(share) & (share * (1.0 - share) > keep.variance)
        return torch.where(held, law, 0.0).sum(-1)

    def state_dict(self) -> dict[str, Any]:
        """All counts, for `load_state_dict`."""
        return {"solved": self.solved.clone(), "failed": self.failed.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the counts of a tracker of as many prompts."""
        if state["solved"].shape != self.solved.shape:
            raise ShapeError(f"the state is of {len(state['solved'])} prompts and this tracker of {len(self.solved)}")
        self.solved, self.failed = state["solved"].clone(), state["failed"].clone()

    def _posterior(self, index: Any) -> tuple[Tensor, Tensor]:
        rows = index if isinstance(index, slice) else torch.as_tensor(index)
        return self.solved[rows] + self.prior[0], self.failed[rows] + self.prior[1]
