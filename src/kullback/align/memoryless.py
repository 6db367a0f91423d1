"""Sequences of independent letters with additive reward: the exact theory of best of n against the KL optimum.

p(y) = prod p(y_i), r(y) = sum log q(y_i), m letters, d nats of KL a letter. With T(b) = p q^b / Z and L(b) = log Z:

    optimum          prod of T(b) with b L'(b) - L(b) = d, for every m
    cumulants        log E exp(rho r) / (m rho) = -H_{1+rho}(T||q),  H_a(p||q) = log(sum p q^(a-1)) / (1 - a)
    deviations       P(r/m ~ t) ~ exp(-m J(t)),  J(t) = (tau - b) t - L(tau) + L(b) = KL(T(tau)||T(b)),  L'(tau) = t
    best of e^(m d)  (E_opt r - E_best r)/m -> 0 and KL(best||optimum)/m -> 0; at finite m about (log m)/m

At finite m everything is a sum over types, C(m + K - 1, K - 1) vectors of counts, or over the levels of a reward on a
lattice, by convolution of positive numbers, which keeps its relative precision in the tails.

Source: Yang et al. 2024 (arXiv 2404.01730), whose reward is log q up to a constant. Shapes: letters [K]; float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.align.tradeoff import largest_kl, solve_tilt_for_kl, tilt
from kullback.align.worlds import best_of_n_law
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = ["BestOfNGap", "MemorylessAlignment", "RateFunction", "renyi_cross_entropy", "reward_rate_function"]

_MOST_TYPES, _MOST_LEVELS = 5_000_000, 200_000


class BestOfNGap(NamedTuple):
    """Of best of n = exp(m delta) against the optimum of KL m delta, all a letter, in nats and units of reward.

    reward and kl: of best of n; optimum: the optimum's reward; reward_gap: by how much it is larger; kl_gap:
    KL(best||optimum); kl_upper: the bound log n - (n - 1)/n.
    """

    letters: int
    log_n: float
    reward: float
    kl: float
    optimum: float
    reward_gap: float
    kl_gap: float
    kl_upper: float


class RateFunction(NamedTuple):
    """J(t) [...] in nats a letter, and the tilt tau [...] whose mean reward is t."""

    rate: Tensor
    tau: Tensor


def renyi_cross_entropy(log_p: Tensor, log_q: Tensor, *, order: float) -> Tensor:
    """H_a(p||q) = log(sum p q^(a-1)) / (1 - a), -sum p log q at a = 1; [..., K] to [...], in nats; any real order.

    >>> p = torch.tensor([0.5, 0.5]).log()
    >>> renyi_cross_entropy(p, p, order=2.0)
    tensor(0.6931)
    """
    if not math.isfinite(order):
        raise ConfigError(f"the order of a Renyi cross entropy is finite, not {order}")
    held = log_p > -math.inf
    safe = torch.where(held, log_q, 0.0)
    mean = (log_p.exp() * safe).sum(-1)
    if order == 1.0:
        return -mean
    # About the mean, so that orders near 1 do not divide rounding errors by 1 - a.
    centred = (order - 1.0) * (safe - mean.unsqueeze(-1))
    excess = (log_p.exp() * torch.expm1(centred)).sum(-1)
    far = (log_p + centred).logsumexp(-1)
    return -mean + torch.where(excess.abs() < 0.5, torch.log1p(excess.clamp(min=-0.9)), far) / (1.0 - order)


def reward_rate_function(log_letters: Tensor, reward: Tensor, t: float | Tensor, *, beta: float = 0.0) -> RateFunction:
    """Large-deviation rate of the mean of independent rewards [K] under p exp(beta r) / Z, at t [...].

    Raises ConfigError for t outside the open range of the rewards that p can have.

    >>> coin, heads = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0])
    >>> reward_rate_function(coin, heads, 0.5).rate
    tensor(0., dtype=torch.float64)
    """
    log_p = tilt(log_letters, reward, beta)
    r = torch.where(log_p > -math.inf, reward.detach().double(), math.nan)
    low, high = r.nan_to_num(nan=math.inf).min(), r.nan_to_num(nan=-math.inf).max()
    wanted = torch.as_tensor(t, dtype=torch.float64, device=log_p.device)
    if not bool(((wanted > low) & (wanted < high)).all()):
        raise ConfigError(f"a mean reward lies strictly between {low:g} and {high:g}, and t is {wanted.tolist()}")
    r = r.nan_to_num(nan=low.item()) - low
    at = wanted.reshape(-1) - low
    shift = _mean_root(log_p, r, at)
    log_total = (log_p + shift.unsqueeze(1) * r).logsumexp(1)
    rate = (shift * at - log_total).clamp(min=0.0)
    return RateFunction(rate.view(wanted.shape), (shift + beta).view(wanted.shape))


def _mean_root(log_p: Tensor, r: Tensor, at: Tensor) -> Tensor:
    """The tilt with mean reward `at` [B], by Newton's method within a bracket on log(mean) - log(range - mean)."""
    top = r.max()
    wanted = at.log() - (top - at).log()
    tau, low, high = torch.zeros_like(at), torch.full_like(at, -math.inf), torch.full_like(at, math.inf)
    for _ in range(200):
        share = (log_p + tau.unsqueeze(1) * r).softmax(1)
        mean = share @ r
        rest = share @ (top - r)
        variance = (share * (r - mean.unsqueeze(1)).square()).sum(1)
        miss = mean.log() - rest.log() - wanted
        low, high = torch.where(miss < 0, tau, low), torch.where(miss > 0, tau, high)
        step = miss * mean * rest / (top * variance)
        proposed = tau - step
        outside = ~((proposed >= low) & (proposed <= high) & proposed.isfinite())
        far = tau - miss.sign() * (tau.abs() + 1.0 / top)
        middle = torch.where(low.isinf() | high.isinf(), far, 0.5 * (low + high))
        following = torch.where(outside, middle, proposed)
        if bool(((following - tau).abs() <= 1e-15 * tau.abs() + 1e-300).all()):
            break
        tau = torch.where(miss == 0, tau, following)
    return tau


@dataclass(frozen=True)
class MemorylessAlignment:
    """Letters with probabilities p [K] and reward log q [K] each; q need not sum to 1, r = log q for any reward r.

    Raises DataError for p that does not sum to 1 within 1e-6, or a q of 0 where p is not; ShapeError.

    >>> letters = MemorylessAlignment(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5]))
    >>> round(letters.beta(0.1), 6), round(letters.mean_rate(0.1), 6)
    (1.186694, -1.140418)
    """

    p: Tensor
    q: Tensor
    log_p: Tensor = field(init=False, repr=False)
    reward: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        p, q = self.p.detach().double(), self.q.detach().double()
        if p.ndim != 1 or p.shape != q.shape or len(p) < 2:
            raise ShapeError(f"p and q are over the same K >= 2 letters, got {tuple(p.shape)} and {tuple(q.shape)}")
        if not (bool((p >= 0).all()) and abs(p.sum().item() - 1.0) <= 1e-6):
            raise DataError(f"p is a distribution over letters and sums to {p.sum().item():g}: divide it by its sum")
        kept = p > 0
        if not bool(((q > 0) & q.isfinite()).masked_select(kept).all()):
            raise DataError("q is positive and finite at every letter that p can have, for the reward is its logarithm")
        object.__setattr__(self, "log_p", (p[kept] / p.sum()).log())
        object.__setattr__(self, "reward", q[kept].log())

    @property
    def largest_delta(self) -> float:
        """-log of p's mass on the best letters: the KL a letter at which the optimum plays only those."""
        return largest_kl(self.log_p, self.reward).item()

    def beta(self, delta: float) -> float:
        """The tilt at a KL of delta a letter; inf from the largest on."""
        return solve_tilt_for_kl(self.log_p, self.reward, delta).beta.item()

    def letters(self, delta: float) -> Tensor:
        """The optimum's letter law T [K'], over the letters that p can have."""
        return solve_tilt_for_kl(self.log_p, self.reward, delta).log_policy.exp()

    def mean_rate(self, delta: float) -> float:
        """The optimum's reward a letter."""
        return solve_tilt_for_kl(self.log_p, self.reward, delta).reward.item()

    def cumulant_rate(self, rho: float, delta: float) -> float:
        """log E exp(rho r) / (m rho) under the optimum, which is minus a Renyi cross entropy; the mean at rho = 0."""
        law = solve_tilt_for_kl(self.log_p, self.reward, delta).log_policy
        return -renyi_cross_entropy(law, self.reward, order=1.0 + rho).item()

    def rate_function(self, t: float, delta: float = 0.0) -> RateFunction:
        """J(t) of the reward a letter under the optimum of delta; 0 is p itself."""
        beta = self.beta(delta)
        if math.isinf(beta):
            raise ConfigError(f"delta is {delta:g} and from {self.largest_delta:g} on the reward is a constant")
        return reward_rate_function(self.log_p, self.reward, t, beta=beta)

    def levels(self, m: int) -> tuple[Tensor, Tensor]:
        """log-masses [J] under p and rewards [J], of types or of the levels of a lattice, whichever are fewer.

        Raises ConfigError for more than five million types where the rewards are on no lattice of some 200,000 levels.
        """
        if m < 1:
            raise ConfigError(f"m is a number of letters from 1, not {m}")
        count = math.comb(m + len(self.log_p) - 1, len(self.log_p) - 1)
        places = self._lattice() if count > 20_000 else None
        if places is not None and m * int(places.max()) + 1 < min(count, _MOST_LEVELS):
            return self._lattice_levels(m, places)
        if count > _MOST_TYPES:
            raise ConfigError(f"{m} of {len(self.log_p)} letters have {count} types: take fewer, or lattice rewards")
        return self._type_levels(m)

    def _type_levels(self, m: int) -> tuple[Tensor, Tensor]:
        # One letter after the other: those left go to the last.
        left = torch.full((1,), m)
        log_mass, reward = torch.full((1,), math.lgamma(m + 1), dtype=torch.float64), torch.zeros(1).double()
        for log_p, r in zip(self.log_p[:-1].tolist(), self.reward[:-1].tolist(), strict=True):
            rows = torch.repeat_interleave(torch.arange(len(left)), left + 1)
            begin = (left + 1).cumsum(0) - (left + 1)
            taken = torch.arange(len(rows)) - begin[rows]
            times = taken.double()  # a whole number times a number of Python is single precision
            log_mass = log_mass[rows] + times * log_p - torch.lgamma(times + 1.0)
            reward, left = reward[rows] + times * r, left[rows] - taken
        log_mass = log_mass + left * self.log_p[-1] - torch.lgamma(left.double() + 1.0)
        return log_mass, reward + left * self.reward[-1]

    def _lattice(self) -> Tensor | None:
        """The rewards less the least one as whole multiples of their smallest distance, where they are, [K]."""
        shifted = self.reward - self.reward.min()
        if not bool((shifted > 0).any()):
            return torch.zeros_like(shifted).long()
        unit = shifted[shifted > 0].min()
        for parts in range(1, 65):
            places = shifted * parts / unit
            if bool(((places - places.round()).abs() <= 1e-9 * places.clamp(min=1.0)).all()):
                return places.round().long()
        return None

    def _lattice_levels(self, m: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """The m-fold convolution of the letters' law, tilted to its upper half so that nothing of weight underflows."""
        import numpy as np

        single = torch.zeros(int(places.max()) + 1, dtype=torch.float64)
        beta = self.beta(0.5 * self.largest_delta)
        law = tilt(self.log_p, self.reward, beta).exp()
        power, whole = single.scatter_add_(0, places, law).numpy(), np.ones(1)
        left = m
        while left:
            whole = np.convolve(whole, power) if left & 1 else whole
            left >>= 1
            power = np.convolve(power, power) if left else power
        place = torch.arange(len(whole), dtype=torch.float64)
        span = self.reward.max() - self.reward.min()
        reward = m * self.reward.min() + place * (span / max(1, int(places.max())))
        log_mass = torch.from_numpy(whole).log() - beta * reward
        held = log_mass > -math.inf
        return (log_mass + m * (self.log_p + beta * self.reward).logsumexp(0))[held], reward[held]

    def bon_gap(self, m: int, delta: float) -> BestOfNGap:
        """Best of n = exp(m delta) against the optimum of that KL, exactly at m letters.

        Raises ConfigError unless 0 < delta < the largest, or for n beyond the range of float64.
        """
        if not 0.0 < delta < self.largest_delta:
            raise ConfigError(f"delta lies between 0 and the largest KL {self.largest_delta:g}, and is {delta:g}")
        if m * delta > 709.0:
            raise ConfigError(f"n = exp({m * delta:g}) is beyond float64: take a smaller m or delta")
        log_mass, reward = self.levels(m)
        log_mass = log_mass.log_softmax(0)  # rounding alone
        law = best_of_n_law(log_mass, reward, math.exp(m * delta), tie_tolerance=1e-11 * m)
        solution = solve_tilt_for_kl(self.log_p, self.reward, delta)
        spent, earned = kl(law, log_mass).item() / m, (law.exp() @ reward).item() / m
        optimum, beta = solution.reward.item(), solution.beta.item()
        log_total = (self.log_p + beta * self.reward).logsumexp(0).item()
        log_n = m * delta
        upper = (log_n + math.expm1(-log_n)) / m
        gap = spent - beta * earned + log_total
        return BestOfNGap(m, log_n, earned, spent, optimum, optimum - earned, gap, upper)
