"""Unnormalised targets: the law that a policy is to be brought to, as one small object.

A target is P(y|x) proportional to exp(log_density(y, x)), with p the reference:

    RLHF's tilt          log p + r / c
    constraints (GDC)    log p + <lambda, phi>, lambda so that E phi = m; -inf where a `must` fails
    best of n            log p + log[(F(r)^n - F(r-)^n) / (F(r) - F(r-))], F the distribution function of r under p
    product of experts   sum_i w_i log p_i

Shapes: sequences [B, T] and what is conditioned on, if anything, to [B], in nats.
Sources: arXiv 2302.08215 for targets in general; arXiv 2012.11635 for constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "MomentFit",
    "Target",
    "best_of_n_target",
    "constraint_target",
    "fit_multipliers",
    "moment_fit",
    "product_of_experts",
    "reward_target",
]

Scorer = Callable[..., Tensor]  # (sequences) or (sequences, context) -> [B]


@dataclass(frozen=True, slots=True)
class Target:
    """An unnormalised law over sequences: log-density up to a constant for each value of what it conditions on.

    log_density: from sequences [B, T], and from the context too where `conditions_on` names one, to [B]; -inf where the
    target has no mass. A call checks both: ConfigError for a context that is missing or in vain, ShapeError for a
    result of another shape, DataError for NaN or +inf.

    >>> ones = Target(lambda sequences: sequences.sum(-1).float())
    >>> ones(torch.tensor([[0, 1], [1, 1]]))
    tensor([1., 2.])
    """

    log_density: Scorer
    conditions_on: str | None = None
    name: str = "target"

    def __call__(self, sequences: Tensor, context: Any = None) -> Tensor:
        """Log-density [B] of sequences [B, T], up to a constant for each context."""
        if (context is None) != (self.conditions_on is None):
            wanted = "conditions on nothing" if self.conditions_on is None else f"conditions on a {self.conditions_on}"
            raise ConfigError(f"{self.name} {wanted}: call it with {'one' if self.conditions_on else 'sequences only'}")
        value = self.log_density(sequences) if context is None else self.log_density(sequences, context)
        if value.shape != sequences.shape[:1]:
            shapes = f"{tuple(value.shape)} from sequences {tuple(sequences.shape)}"
            raise ShapeError(f"the log-density of {self.name} is one number a sequence, and it gave {shapes}")
        wrong = value.isnan() | (value == math.inf)
        if wrong.any():
            raise DataError(f"{self.name} gave NaN or infinity for {int(wrong.sum())} of {len(value)} sequences")
        return value

    def law(self, sequences: Tensor, context: Any = None) -> Tensor:
        """Normalised log-probabilities [N] where the sequences are all there are."""
        return self(sequences, context).log_softmax(-1)


def reward_target(
    log_reference: Scorer, reward: Scorer, *, coefficient: float, conditions_on: str | None = None
) -> Target:
    """The optimum of E r - c KL(policy||reference): log p + r / c; ConfigError unless 0 < c < inf."""
    if not (coefficient > 0.0 and math.isfinite(coefficient)):
        raise ConfigError(f"the coefficient of the KL is positive and finite, not {coefficient}")

    def log_density(*given: Any) -> Tensor:
        return log_reference(*given) + reward(*given) / coefficient

    return Target(log_density, conditions_on, "reward target")


def constraint_target(
    log_reference: Scorer,
    *,
    features: Scorer | None = None,
    multipliers: Tensor | None = None,
    must: Scorer | None = None,
    conditions_on: str | None = None,
) -> Target:
    """The law nearest to the reference in KL(.||reference) under constraints on moments, on each sequence, or on both.

    features [B, K] with multipliers [K] from `fit_multipliers`: their means are the moments asked for. must [B] bool:
    only sequences for which it holds have mass; then the multipliers are those of the reference so restricted.
    """
    if (features is None) != (multipliers is None) or (features is None and must is None):
        raise ConfigError("a constraint is features with their multipliers, or a must for each sequence, or both")

    def log_density(*given: Any) -> Tensor:
        value = log_reference(*given)
        if features is not None and multipliers is not None:
            found = features(*given)
            if found.ndim != 2 or found.shape[1] != len(multipliers):
                raise ShapeError(f"features are [B, {len(multipliers)}], as the multipliers, not {tuple(found.shape)}")
            value = value + found.to(value.dtype) @ multipliers.to(value)
        return value if must is None else value.masked_fill(~must(*given).bool(), -math.inf)

    return Target(log_density, conditions_on, "constraint target")


class MomentFit(NamedTuple):
    """error: the largest distance of a moment from the one asked for; effective: samples that the weights amount to."""

    error: Tensor
    effective: Tensor


def fit_multipliers(
    features: Tensor,
    moments: Tensor,
    *,
    log_weights: Tensor | None = None,
    method: Literal["newton", "gradient"] = "newton",
    tolerance: float | None = None,
) -> Tensor:
    """lambda [K] such that E phi = moments [K] under weights times exp(<lambda, phi>), from features [M, K]; float64.

    Rows are samples of the reference, or with log_weights [M] any sequences with their weights (all of a world with its
    log-probabilities: exact; of another proposal log p - log q). Both methods go down the convex dual
    log E exp<lambda, phi> - <lambda, m>. "newton": damped, until no moment is off by more than tolerance (1e-10) of its
    feature's deviation. "gradient": 1000 plain steps of 0.05 at most, as in the paper, until none is off by more than
    tolerance (1e-5). It builds no [K, K] matrix and is slow, so it may end short of that: `moment_fit` says by how
    much. Raises ConfigError, ShapeError, and DataError for moments that no reweighting
    reaches, which have no finite multipliers.

    >>> fit_multipliers(torch.tensor([[0.0], [1.0]]), torch.tensor([0.75]))  # log 3
    tensor([1.0986], dtype=torch.float64)
    """
    if features.ndim != 2 or moments.shape != features.shape[1:]:
        shapes = f"{tuple(features.shape)} and {tuple(moments.shape)}"
        raise ShapeError(f"features are [M, K] and moments [K], got {shapes}")
    if method not in ("newton", "gradient"):
        raise ConfigError(f"method is newton or gradient, not {method!r}")
    phi, wanted = features.detach().double(), moments.detach().double()
    if not (phi.isfinite().all() and wanted.isfinite().all()):
        raise DataError("features and moments must be finite: score those sequences again or leave them out")
    weights = phi.new_zeros(len(phi)) if log_weights is None else log_weights.detach().double()
    held = phi[weights > -math.inf]
    outside = (wanted <= held.amin(0)) | (wanted >= held.amax(0))
    if outside.any():
        which = int(outside.nonzero()[0])
        span = f"{held[:, which].min():g} to {held[:, which].max():g}"
        raise DataError(
            f"moment {which} is {wanted[which]:g} and its feature goes from {span}: ask for one strictly inside, or "
            "take must for what every sequence has to obey"
        )
    if method == "newton":
        return _newton(phi, wanted, weights, 1e-10 if tolerance is None else tolerance)
    return _gradient(phi, wanted, weights, 1e-5 if tolerance is None else tolerance)


def moment_fit(
    features: Tensor, moments: Tensor, multipliers: Tensor, *, log_weights: Tensor | None = None
) -> MomentFit:
    """How well multipliers [K] of `fit_multipliers` give the moments [K], and on how many samples that rests.

    features [M, K] and log_weights [M] as there; with others, held out, it says how the multipliers generalise.
    Raises ShapeError.

    >>> fit = moment_fit(torch.tensor([[0.0], [1.0]]), torch.tensor([0.75]), torch.tensor([0.0]))
    >>> fit.error.item(), fit.effective.item()
    (0.25, 2.0)
    """
    if features.ndim != 2 or not moments.shape == multipliers.shape == features.shape[1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (features, moments, multipliers))
        raise ShapeError(f"features are [M, K], moments and multipliers [K], got {shapes}")
    phi = features.detach().double()
    weights = phi.new_zeros(len(phi)) if log_weights is None else log_weights.detach().double()
    share = (weights + phi @ multipliers.to(phi)).softmax(0)
    return MomentFit((share @ phi - moments.to(phi)).abs().max(), 1.0 / share.square().sum())


def _gradient(phi: Tensor, wanted: Tensor, weights: Tensor, tolerance: float) -> Tensor:
    multipliers = torch.zeros_like(wanted)
    for _ in range(1000):
        slope = (weights + phi @ multipliers).softmax(0) @ phi - wanted
        if bool((slope.abs() < tolerance).all()):
            break
        multipliers = multipliers - 0.05 * slope
    return multipliers


def _newton(phi: Tensor, wanted: Tensor, weights: Tensor, tolerance: float) -> Tensor:
    multipliers = torch.zeros_like(wanted)
    scale = phi.std(0, correction=0).clamp(min=1e-12)

    def dual(at: Tensor) -> Tensor:
        return (weights + (phi - wanted) @ at).logsumexp(0)

    for _ in range(200):
        share = (weights + phi @ multipliers).softmax(0)
        mean = share @ phi
        slope = mean - wanted
        if (slope.abs() <= tolerance * scale).all():
            return multipliers
        centred = phi - mean
        curvature = centred.T @ (share.unsqueeze(1) * centred)
        ridge = 1e-12 * curvature.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        step = torch.linalg.lstsq(curvature + ridge, slope.unsqueeze(1)).solution.squeeze(1)
        value, length = dual(multipliers), 1.0
        while dual(multipliers - length * step) > value - 1e-4 * length * (slope @ step) and length > 1e-8:
            length *= 0.5
        multipliers = multipliers - length * step
    raise DataError(
        f"no finite multipliers give these moments together (short by {slope.abs().max():.1e}): relax some of them"
    )


def best_of_n_target(
    log_reference: Scorer,
    reward: Scorer,
    *,
    n: float,
    reference_rewards: Tensor,
    log_weights: Tensor | None = None,
    conditions_on: str | None = None,
) -> Target:
    """The best of n draws of the reference, given rewards of its samples [M], or of all sequences with log_weights [M].

    Where the samples have a reward level of some mass it is F_j^n - F_(j-1)^n over that mass, as for ties; between
    levels its limit n F^(n-1), for which F counts half a sample below the lowest. n is real, 1 or more.
    """
    if not (n >= 1.0 and math.isfinite(n)):
        raise ConfigError(f"best of n takes a finite n of 1 or more, not {n}")
    if reference_rewards.ndim != 1 or len(reference_rewards) == 0 or not reference_rewards.isfinite().all():
        raise DataError(f"reference_rewards are finite numbers [M], got shape {tuple(reference_rewards.shape)}")
    known = reference_rewards.detach().double()
    weights = torch.zeros_like(known) if log_weights is None else log_weights.detach().double()
    levels, where = known.unique(return_inverse=True)
    mass = torch.zeros_like(levels).scatter_add(0, where, weights.softmax(0))
    upto = mass.cumsum(0).clamp(max=1.0)
    smallest = 0.5 / len(known)

    def log_density(*given: Any) -> Tensor:
        base, score = log_reference(*given), reward(*given).double()
        upper = torch.searchsorted(levels, score, right=True) - 1
        at = upper.clamp(min=0)
        f = torch.where(upper >= 0, upto[at], 0.0)
        own = torch.where((upper >= 0) & (levels[at] == score), mass[at], 0.0)
        part = torch.where(own > 0, own / f.clamp(min=1e-300), 0.5).clamp(max=1.0)
        tied = n * f.log() + torch.log(-torch.expm1(n * torch.log1p(-part))) - own.log()
        between = math.log(n) + (n - 1.0) * f.clamp(min=smallest).log()
        return base + torch.where(own > 0, tied, between).to(base.dtype)

    return Target(log_density, conditions_on, "best-of-n target")


def product_of_experts(
    experts: Sequence[Scorer], *, weights: Sequence[float] | None = None, conditions_on: str | None = None
) -> Target:
    """sum_i w_i log p_i of experts' log-probabilities [B], each with weight 1 by default; -inf where any has no mass.

    Raises ConfigError for no expert, for another number of weights, or a weight that is not positive.
    """
    chosen = [1.0] * len(experts) if weights is None else list(weights)
    if not experts or len(chosen) != len(experts) or not all(0.0 < weight < math.inf for weight in chosen):
        raise ConfigError(f"a product takes experts with a positive weight each, got {len(experts)} and {chosen}")

    def log_density(*given: Any) -> Tensor:
        return torch.stack([weight * expert(*given) for weight, expert in zip(chosen, experts, strict=True)]).sum(0)

    return Target(log_density, conditions_on, "product of experts")
