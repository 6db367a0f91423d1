"""The frontier of reward against KL from scored samples of a real model: what training on that reward can reach.

For each prompt, M completions of the reference with rewards r_1..M are an empirical reference of equal weights, whose
tilts have w_i proportional to exp(beta r_i), E r ~ sum w r, log Z ~ log mean exp(beta r), KL = beta E r - log Z. With
few samples of weight these are badly biased: the effective number 1 / sum w^2 is reported, and below a least one the
estimate is refused (NaN).

What is kept of a prompt is two numbers for each beta, so that processes and machines score prompts of their own and
join their estimators.

Source: Yang et al. 2024 (arXiv 2404.01730) for the optimum; self-normalised weights. Shapes: rewards [prompts, M].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.tradeoff import best_of_n_kl_upper, best_of_n_mean
from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError

__all__ = ["FrontierEstimate", "FrontierEstimator"]


class FrontierEstimate(NamedTuple):
    """Means over prompts at each beta [G], with the ends of bootstrap intervals; NaN where too few samples have weight.

    effective: the smallest effective number of samples of any prompt.
    """

    beta: Tensor
    kl: Tensor
    kl_interval: tuple[Tensor, Tensor]
    reward: Tensor
    reward_interval: tuple[Tensor, Tensor]
    effective: Tensor


@dataclass
class FrontierEstimator:
    """Estimates the frontier at `betas`, factors of the reward, and best of n at `sizes`; `fit`, then `predict`.

    least_effective: the effective number of samples below which a point is refused. Raises ConfigError for an empty or
    infinite grid.

    >>> rewards = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    >>> estimate = FrontierEstimator([0.5, 1.0]).fit(rewards).predict(generator=torch.Generator().manual_seed(1))
    >>> [round(value, 1) for value in estimate.kl.tolist()]  # beta^2 / 2 for normal rewards
    [0.1, 0.5]
    """

    betas: Sequence[float]
    sizes: Sequence[int] = ()
    least_effective: float = 20.0
    kl_: Tensor | None = field(default=None, init=False, repr=False)
    reward_: Tensor | None = field(default=None, init=False, repr=False)
    effective_: Tensor | None = field(default=None, init=False, repr=False)
    best_: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.betas or not all(math.isfinite(beta) for beta in self.betas):
            raise ConfigError(f"betas are finite factors of the reward, at least one, got {list(self.betas)}")
        if any(size < 1 for size in self.sizes):
            raise ConfigError(f"sizes are numbers of samples from 1, got {list(self.sizes)}")

    def fit(self, rewards: Any) -> FrontierEstimator:
        """Takes rewards [prompts, M], forgetting any before."""
        self.kl_ = self.reward_ = self.effective_ = self.best_ = None
        return self.partial_fit(rewards)

    def partial_fit(self, rewards: Any) -> FrontierEstimator:
        """Adds prompts with rewards [prompts, M], of which M may differ from call to call.

        Raises ShapeError, and DataError for a reward that is not finite.
        """
        r = torch.as_tensor(rewards).detach().double()
        if r.ndim != 2 or r.shape[0] == 0 or r.shape[1] < 2:
            raise ShapeError(f"rewards are [prompts, M] with two samples or more a prompt, got {tuple(r.shape)}")
        if not bool(r.isfinite().all()):
            raise DataError(f"{int((~r.isfinite()).sum())} rewards are not finite: score them again or leave them out")
        kls, means, effective = (r.new_empty(len(r), len(self.betas)) for _ in range(3))
        top = r.amax(1, keepdim=True)
        for place, beta in enumerate(self.betas):
            logits = beta * (r - top)
            weights = logits.softmax(1)
            means[:, place] = (weights * r).sum(1)
            log_total = logits.logsumexp(1) - math.log(r.shape[1]) + beta * top.squeeze(1)
            kls[:, place] = (beta * means[:, place] - log_total).clamp(min=0.0)
            effective[:, place] = weights.square().sum(1).reciprocal()
        best = [best_of_n_mean(r, size) for size in self.sizes]
        self._add(kls, means, effective, torch.stack(best, 1) if best else r.new_empty(len(r), 0))
        return self

    def merge(self, other: FrontierEstimator) -> FrontierEstimator:
        """Adds the prompts of another estimator of the same grids; ConfigError for other grids."""
        if list(other.betas) != list(self.betas) or list(other.sizes) != list(self.sizes):
            raise ConfigError("estimators are joined when their betas and sizes are the same")
        if other.kl_ is not None:
            self._add(other.kl_, other.reward_, other.effective_, other.best_)
        return self

    def _add(self, *parts: Tensor | None) -> None:
        for name, part in zip(("kl_", "reward_", "effective_", "best_"), parts, strict=True):
            held = getattr(self, name)
            setattr(self, name, part if held is None or part is None else torch.cat([held, part]))

    def predict(
        self, *, generator: torch.Generator, level: float = 0.95, replicates: int = 1000
    ) -> FrontierEstimate:
        """The frontier with bootstrap intervals over prompts of that level; NotFitted before any `fit`."""
        if self.kl_ is None or self.reward_ is None or self.effective_ is None:
            raise NotFitted("a FrontierEstimator is fitted to rewards [prompts, M] before it predicts")
        if not 0.0 < level < 1.0 or replicates < 1:
            raise ConfigError(f"level lies in (0, 1) and replicates from 1, got {level} and {replicates}")
        effective = self.effective_.amin(0)
        refused = effective < self.least_effective
        prompts = len(self.kl_)
        rows = torch.randint(prompts, (replicates, prompts), generator=generator)
        counts = torch.zeros(replicates, prompts, dtype=torch.float64)
        counts.scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))
        ends = torch.tensor([0.5 * (1.0 - level), 0.5 * (1.0 + level)], dtype=torch.float64)

        def summed(values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            low, high = (counts @ values / prompts).quantile(ends, 0)
            mean, low, high = (x.masked_fill(refused, math.nan) for x in (values.mean(0), low, high))
            return mean, (low, high)

        kl, kl_interval = summed(self.kl_)
        reward, reward_interval = summed(self.reward_)
        grid = torch.tensor(list(self.betas), dtype=torch.float64)
        return FrontierEstimate(grid, kl, kl_interval, reward, reward_interval, effective)

    def best_of_n(self) -> tuple[Tensor, Tensor]:
        """For each of `sizes` [S]: the upper bound of best of n's KL, and its mean reward over prompts, unbiased."""
        if self.best_ is None:
            raise NotFitted("a FrontierEstimator is fitted to rewards [prompts, M] before it knows best of n")
        return best_of_n_kl_upper(torch.tensor(list(self.sizes), dtype=torch.float64)), self.best_.mean(0)
