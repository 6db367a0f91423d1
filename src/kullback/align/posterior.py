r"""RL with a KL penalty as Bayesian inference: the posterior it reaches, bounds of its evidence, and what collapse is.

With the base model as prior a, and exp(r / b) as the likelihood of what is wished for,

    p* = a exp(r / b) / Z,    J(pi) = E_pi r - b KL(pi, a) = b log Z - b KL(pi, p*)
    ELBO(pi) = E_pi [r / b - log pi + log a] = log Z - KL(pi, p*)     <= log Z
    EUBO(pi) = E_p* [r / b - log pi + log a] = log Z + KL(p*, pi)     >= log Z

Without the penalty J is linear in pi, and its maximum is a point mass. Evidences multiply: the posterior of r1 + r2 is
that of r2 with the posterior of r1 as prior. Here KL(x, y) = sum x log(x / y).

Shapes: tables over Y outcomes [..., Y]; samples [n], log-probabilities of whole completions; nats. Source: arXiv
2205.11275. Sampling and evidence without tables: `align.evidence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.align.measures import Estimate, distinct_n
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = [
    "Collapse",
    "ExactPosterior",
    "PosteriorTarget",
    "amortised_loss",
    "collapse_report",
    "elbo",
    "eubo",
    "implied_beta",
    "implied_reward",
]


class ExactPosterior(NamedTuple):
    """log_evidence [...], log_posterior [..., Y], mean_reward [...], kl = KL(p*, a), kl_prior = KL(a, p*) and best = b
    log Z, the largest value of the objective."""

    log_evidence: Tensor
    log_posterior: Tensor
    mean_reward: Tensor
    kl: Tensor
    kl_prior: Tensor
    best: Tensor


@dataclass(frozen=True, slots=True)
class PosteriorTarget:
    """A prior over Y outcomes [..., Y], rewards [..., Y] and their temperature beta: the target of KL-regularised RL.

    Raises ShapeError, ConfigError for beta <= 0, DataError for rewards that are NaN or infinite.

    >>> target = PosteriorTarget(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.tensor([0.0, 1.0, -1.0, 2.0]), 0.5)
    >>> target.exact().log_posterior.exp()
    tensor([0.0494, 0.2735, 0.0033, 0.6738])
    """

    log_prior: Tensor
    reward: Tensor
    beta: float

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        if self.log_prior.shape[-1:] != self.reward.shape[-1:] or not self.reward.numel():
            shapes = f"{tuple(self.log_prior.shape)} and {tuple(self.reward.shape)}"
            raise ShapeError(f"the prior and the rewards are over the same outcomes, got {shapes}")
        if not self.reward.isfinite().all():
            raise DataError(f"{int((~self.reward.isfinite()).sum())} rewards are NaN or infinite: score them again")

    def log_unnormalised(self) -> Tensor:
        """log a + r / b [..., Y]."""
        return self.log_prior + self.reward / self.beta

    def exact(self) -> ExactPosterior:
        """Everything about the posterior, by summing over all outcomes."""
        scores = self.log_unnormalised()
        log_evidence = scores.logsumexp(-1)
        log_posterior = scores - log_evidence.unsqueeze(-1)
        prior, posterior = torch.broadcast_tensors(self.log_prior, log_posterior)
        mean = (log_posterior.exp() * self.reward).sum(-1)
        kls = (kl(posterior, prior), kl(prior, posterior))
        return ExactPosterior(log_evidence, log_posterior, mean, *kls, self.beta * log_evidence)

    def update(self, reward: Tensor, beta: float) -> PosteriorTarget:
        """The target that has this one's posterior as prior, for further evidence; the order does not matter."""
        return PosteriorTarget(self.exact().log_posterior, reward, beta)

    def objective(self, log_policy: Tensor) -> Tensor:
        """J(pi) = E_pi r - b KL(pi, a), [..., Y] to [...]."""
        gap = kl(log_policy, self.log_prior.expand_as(log_policy))
        return (log_policy.exp() * self.reward).sum(-1) - self.beta * gap


def _check_beta(beta: float) -> None:
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")


def _evidence_terms(log_prior: Tensor, log_policy: Tensor, reward: Tensor, beta: float) -> Tensor:
    _check_beta(beta)
    if log_prior.shape != log_policy.shape or log_prior.shape != reward.shape or log_prior.ndim != 1:
        shapes = f"{tuple(log_prior.shape)}, {tuple(log_policy.shape)} and {tuple(reward.shape)}"
        raise ShapeError(f"prior, policy and rewards are one a sample, [n], got {shapes}")
    return (reward.detach() / beta + log_prior.detach() - log_policy.detach()).double()


def _mean(values: Tensor) -> Estimate:
    if not len(values):
        raise DataError("a bound of the evidence needs a sample at least, got none")
    if len(values) > 1:
        variance, mean = (x.item() for x in torch.var_mean(values))
        error = math.sqrt(variance / len(values)) if variance >= 0.0 else math.nan
    else:
        mean, error = values.item(), math.inf
    if not math.isfinite(mean):
        raise DataError("a bound of the evidence needs rewards and log-probabilities that are finite: score them again")
    return Estimate(mean, error, mean - 1.96 * error, mean + 1.96 * error)


def elbo(log_prior: Tensor, log_policy: Tensor, reward: Tensor, *, beta: float) -> Estimate:
    """The lower bound of log Z from samples [n] of the policy, J / b, with its standard error and 95% interval.

    >>> a, pi = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.5]).log()
    >>> elbo(a, pi, torch.tensor([1.0, 3.0]), beta=1.0).mean  # the samples are one of each outcome
    2.0
    """
    return _mean(_evidence_terms(log_prior, log_policy, reward, beta))


def eubo(log_prior: Tensor, log_policy: Tensor, reward: Tensor, *, beta: float) -> Estimate:
    """The upper bound of log Z from samples [n] of the posterior, scored under the policy: the same mean of others."""
    return _mean(_evidence_terms(log_prior, log_policy, reward, beta))


def amortised_loss(log_policy: Tensor, log_weights: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Weighted maximum likelihood []: KL(p*, pi) but for a constant, from samples [n] with log-weights of p* over q.

    Weights are normalised among the samples, 0 of all equal weights gives the plain mean; count replaces n.
    """
    if log_policy.shape != log_weights.shape or log_policy.ndim != 1 or not len(log_policy):
        shapes = f"{tuple(log_policy.shape)} and {tuple(log_weights.shape)}"
        raise ShapeError(f"log-probabilities and weights are one a sample, [n], got {shapes}")
    weights = log_weights.detach().softmax(0) * len(log_policy)
    return -(weights * log_policy).sum() / (len(log_policy) if count is None else count)


def implied_reward(log_prior: Tensor, log_policy: Tensor, *, beta: float) -> Tensor:
    """b (log pi - log a): the reward, up to a constant for each prompt, of which a policy is the posterior."""
    _check_beta(beta)
    return beta * (log_policy - log_prior)


def implied_beta(log_prior: Tensor, log_policy: Tensor, reward: Tensor) -> tuple[float, float]:
    """(beta, R^2): the slope of the rewards [n] against log pi - log a of the same samples, and how well it fits.

    For p* it is beta with R^2 = 1: how Bayesian a policy is, and at which temperature. Raises DataError where all
    log-ratios are equal, as of a policy that has not moved.
    """
    if not log_prior.shape == log_policy.shape == reward.shape or log_prior.ndim != 1:
        shapes = f"{tuple(log_prior.shape)}, {tuple(log_policy.shape)} and {tuple(reward.shape)}"
        raise ShapeError(f"prior, policy and rewards are one a sample, [n], got {shapes}")
    ratio, score = (x.detach().double() - x.detach().double().mean() for x in (log_policy - log_prior, reward))
    spread = ratio.square().sum()
    if not len(reward) or spread <= 1e-24 * len(reward):
        raise DataError("the policy has the prior's probabilities on all samples: no temperature can be read from it")
    beta = (ratio * score).sum() / spread
    left = (score - beta * ratio).square().sum()
    total = score.square().sum()
    return float(beta), float(1.0 - left / total) if total > 0 else 0.0


class Collapse(NamedTuple):
    """What is left of a policy's variety.

    entropy (nats) and effective_support, its exponential; top: the mass of the likeliest outcomes; divergence: KL to
    the prior; distinct: different n-grams over all; single: the share of prompts whose samples are all alike.
    """

    entropy: float
    effective_support: float
    top: float
    divergence: float
    distinct: float | None = None
    single: float | None = None


def collapse_report(
    log_prior: Tensor,
    log_policy: Tensor,
    *,
    top: int = 1,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    prompt_index: Tensor | None = None,
    n: int = 3,
) -> Collapse:
    """Of a table [Y], exactly, or of samples [B] with their tokens ids and mask [B, T], in the mean.

    With ids entropy and divergence are means over the samples (of -log pi and log pi - log a), top is the share of the
    most frequent completions, distinct counts n-grams, and single needs prompt_index [B]. Raises ShapeError.
    """
    if log_prior.shape != log_policy.shape or log_policy.ndim != 1 or not len(log_policy):
        shapes = f"{tuple(log_prior.shape)} and {tuple(log_policy.shape)}"
        raise ShapeError(f"prior and policy are over the same outcomes or samples, got {shapes}")
    prior, policy = log_prior.detach().double(), log_policy.detach().double()
    if ids is None or mask is None:
        spread = -(policy.exp() * policy.clamp(min=torch.finfo(policy.dtype).min)).sum().item()
        kept = policy.exp().sort(descending=True).values[:top].sum().item()
        return Collapse(spread, math.exp(spread), kept, kl(policy, prior).item())
    spread = -policy.mean().item()
    rows = [tuple(row[held].tolist()) for row, held in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
    counts = sorted((rows.count(row) for row in set(rows)), reverse=True)
    single = None
    if prompt_index is not None:
        groups: dict[int, set[tuple[int, ...]]] = {}
        for prompt, row in zip(prompt_index.tolist(), rows, strict=True):
            groups.setdefault(prompt, set()).add(row)
        single = sum(len(found) == 1 for found in groups.values()) / len(groups)
    kept = sum(counts[:top]) / len(rows)
    gap = (policy - prior).mean().item()
    return Collapse(spread, math.exp(min(spread, 700.0)), kept, gap, distinct_n(ids, mask, n), single)
