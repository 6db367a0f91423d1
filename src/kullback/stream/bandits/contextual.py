"""Policies that see a context before each round (chapter 8 of the book).

    per context      a policy of its own for every context, or every cell of a mesh of them
    LinUCB           A = l I + sum x x^T, theta = A^-1 b: the arm of the largest theta . x + alpha root(x^T A^-1 x)
    linear Thompson  the arm of the largest theta . x for theta ~ N(A^-1 b, v^2 A^-1)
    with an oracle   policies of any class, trained on costs that are weighted by 1 / probability

Disjoint: one model an arm, contexts x [d]. Shared: one model, contexts [K, d], a row of features for each arm.
alpha = 1 + root(log(2/delta)/2). A^-1 is kept by Sherman and Morrison's formula, one reward at a time, or computed anew
after a batch. Tensors throughout, on any device.
Source: Slivkins (arXiv 1904.07272), chapter 8; Li et al. 2010 (LinUCB); Agrawal and Goyal 2013 (linear Thompson).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Policy
from kullback.stream.bandits._policy import Saved, check_arms

__all__ = ["LinTS", "LinUCB", "LinearModels", "PerContext", "confidence_width", "mesh_cell"]


def mesh_cell(width: float) -> Callable[[Any], tuple[int, ...]]:
    """The cell of a mesh of the given width in which a context lies, for Lipschitz contexts.

    >>> mesh_cell(0.25)([0.1, 0.6])
    (0, 2)
    """
    if not width > 0.0:
        raise ConfigError(f"width of the cells is positive, and is {width}")
    return lambda context: tuple(math.floor(float(x) / width) for x in context)


class PerContext:
    """A policy for every context: `make` makes one when a context is first seen.

    key: takes a context to what tells it from others, by default itself; `mesh_cell(width)` for contexts in space.
    """

    def __init__(self, make: Callable[[], Policy], *, key: Callable[[Any], Hashable] | None = None) -> None:
        self.make, self.key = make, key or (lambda context: context)
        self.policies: dict[Hashable, Any] = {}

    def reset(self) -> None:
        """Forget everything."""
        self.policies.clear()

    def _policy(self, context: Any) -> Any:
        key = self.key(context)
        if key not in self.policies:
            self.policies[key] = self.make()
        return self.policies[key]

    def pull(self, context: Any, *, generator: torch.Generator, **options: Any) -> int:
        """The arm that the context's policy pulls."""
        return self._policy(context).pull(None, generator=generator, **options)

    def update(self, arm: int, reward: float, context: Any, *, probability: float | None = None) -> None:
        """Tell the context's policy."""
        self._policy(context).update(arm, reward, None, probability=probability)

    def state_dict(self) -> dict[Hashable, Any]:
        """The states of the policies by context."""
        return {key: policy.state_dict() for key, policy in self.policies.items()}

    def load_state_dict(self, state: dict[Hashable, Any]) -> None:
        """Take over a state that `state_dict` gave."""
        self.policies.clear()
        for key, inner in state.items():
            self.policies[key] = self.make()
            self.policies[key].load_state_dict(inner)


def confidence_width(delta: float) -> float:
    """LinUCB's alpha = 1 + root(log(2/delta)/2), for bounds that hold with probability 1 - delta."""
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta lies in (0, 1), and is {delta}")
    return 1.0 + math.sqrt(0.5 * math.log(2.0 / delta))


class LinearModels(Saved):
    """M ridge regressions kept up to date: precision [M, d, d] and its inverse, moments b [M, d], theta [M, d]."""

    _saved = ("precision", "inverse", "moments", "theta")

    def __init__(
        self,
        models: int,
        dimension: int,
        *,
        regularization: float = 1.0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not (dimension >= 1 and regularization > 0.0):
            raise ConfigError(f"dimension >= 1 and regularization > 0, and they are {dimension} and {regularization}")
        self.models, self.dimension, self.regularization = check_arms(models), dimension, regularization
        eye = torch.eye(dimension, device=device, dtype=dtype).expand(models, -1, -1)
        self.precision, self.inverse = regularization * eye, eye / regularization
        self.moments = torch.zeros(models, dimension, device=device, dtype=dtype)
        self.theta = self.moments.clone()

    def reset(self) -> None:
        """Forget everything."""
        eye = torch.eye(self.dimension, device=self.theta.device, dtype=self.theta.dtype).expand_as(self.precision)
        self.precision, self.inverse = self.regularization * eye, eye / self.regularization
        self.moments, self.theta = torch.zeros_like(self.moments), torch.zeros_like(self.theta)

    def tensor(self, x: Any) -> Tensor:
        """Features as a tensor of the models' kind."""
        return torch.as_tensor(x, dtype=self.theta.dtype, device=self.theta.device)

    def add(self, model: int, x: Tensor, reward: float) -> None:
        """One observation x [d] of a model: rank one, by Sherman and Morrison."""
        if not math.isfinite(reward):
            raise DataError(f"a reward is finite, and is {reward}")
        inverse, theta = self.inverse[model], self.theta[model]
        along = inverse @ x
        scale, error = 1.0 + float(x @ along), reward - float(x @ theta)
        self.precision[model].addr_(x, x)
        inverse.addr_(along, along, alpha=-1.0 / scale)
        theta.add_(along, alpha=error / scale)
        self.moments[model].add_(x, alpha=reward)

    def add_many(self, models: Tensor, x: Tensor, rewards: Tensor) -> None:
        """Observations x [B, d] with rewards [B] of models [B]: sums of rank one, then one solve a model."""
        outer = x.unsqueeze(-1) * x.unsqueeze(-2)
        self.precision.index_add_(0, models, outer)
        self.moments.index_add_(0, models, rewards.unsqueeze(-1) * x)
        self.refresh()

    def refresh(self) -> None:
        """Compute inverse and theta anew from the precision, without the rounding errors of many updates."""
        self.inverse = torch.linalg.inv(self.precision)
        self.inverse = (self.inverse + self.inverse.mT) / 2.0
        self.theta = (self.inverse @ self.moments.unsqueeze(-1)).squeeze(-1)


class _Linear(Saved):
    """What LinUCB and LinTS share: models, contexts and updates."""

    _saved = ("fit",)

    def __init__(self, arms: int, dimension: int, *, shared: bool, **options: Any) -> None:
        self.arms, self.shared = check_arms(arms), shared
        self.fit = LinearModels(1 if shared else self.arms, dimension, **options)

    def reset(self) -> None:
        """Forget everything."""
        self.fit.reset()

    def _features(self, context: Any) -> Tensor:
        """The context as [..., K or 1, d]."""
        x = self.fit.tensor(context)
        wanted = (self.arms, self.fit.dimension) if self.shared else (self.fit.dimension,)
        if tuple(x.shape[-len(wanted) :]) != wanted:
            raise ShapeError(f"the context has shape {wanted} after any batch, and came as {tuple(x.shape)}")
        if not math.isfinite(x.sum()):
            raise DataError("the context has NaN or infinity in it: every feature must be a number")
        return x if self.shared else x.unsqueeze(-2)

    def _means_and_deviations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """theta . x and root(x^T A^-1 x) for every arm, [..., K]."""
        if x.ndim == 2 and not self.shared:  # one context: three products
            mean, square = self.fit.theta @ x[0], self.fit.inverse @ x[0] @ x[0]
            return mean, square.clamp_(min=0.0).sqrt_()
        mean = (x * self.fit.theta).sum(-1)
        if self.shared:
            square = (x @ self.fit.inverse[0] * x).sum(-1)
        else:
            square = ((x.unsqueeze(-2) @ self.fit.inverse).squeeze(-2) * x).sum(-1)
        return mean, square.clamp(min=0.0).sqrt()

    def update(self, arm: int, reward: float, context: Any, *, probability: float | None = None) -> None:
        """Learn the reward of an arm in a context."""
        x = self._features(context)
        self.fit.add(0 if self.shared else arm, x[arm if self.shared else 0], float(reward))

    def update_many(self, arms: Any, rewards: Any, contexts: Any) -> None:
        """Learn rewards [B] of arms [B] in contexts [B, ...] at once, when feedback is delayed or comes in batches."""
        x, rewards = self._features(contexts), self.fit.tensor(rewards)
        arms = torch.as_tensor(arms, device=x.device)
        if not (x.ndim == 3 and len(x) == len(arms) == len(rewards)):
            raise ShapeError(f"{len(arms)} arms and {len(rewards)} rewards need as many contexts, got {tuple(x.shape)}")
        if not torch.isfinite(rewards).all():
            raise DataError("rewards have NaN or infinity in them: every reward must be a number")
        if self.shared:
            self.fit.add_many(torch.zeros_like(arms), x[torch.arange(len(arms), device=x.device), arms], rewards)
        else:
            self.fit.add_many(arms, x.squeeze(-2), rewards)


class LinUCB(_Linear):
    """Optimism in a linear model: the largest theta . x + alpha root(x^T A^-1 x).

    alpha, or delta for `confidence_width(delta)`; shared: one model for all arms; device, dtype: of the models.

    >>> source, policy = torch.Generator().manual_seed(0), LinUCB(2, 2, alpha=0.5)
    >>> for step in range(100):
    ...     x = torch.eye(2)[step % 2]
    ...     arm = policy.pull(x, generator=source)
    ...     policy.update(arm, float(arm == step % 2), x)
    >>> [policy.pull(x, generator=source) for x in torch.eye(2)]
    [0, 1]
    """

    def __init__(
        self,
        arms: int,
        dimension: int,
        *,
        alpha: float | None = None,
        delta: float = 0.05,
        shared: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(arms, dimension, shared=shared, **options)
        self.alpha = confidence_width(delta) if alpha is None else alpha
        if not self.alpha >= 0.0:
            raise ConfigError(f"alpha is not negative, and is {alpha}")

    def bounds(self, context: Any) -> Tensor:
        """The upper confidence bounds [..., K]."""
        mean, deviation = self._means_and_deviations(self._features(context))
        return mean + self.alpha * deviation

    def pull(self, context: Any, *, generator: torch.Generator) -> int:
        """The arm of the largest bound; ties are broken at random."""
        bounds = self.bounds(context).tolist()
        top = max(bounds)
        ties = [arm for arm, bound in enumerate(bounds) if bound == top]
        if len(ties) == 1:
            return ties[0]
        return ties[int(torch.randint(len(ties), (), generator=generator, device=generator.device))]

    def pull_many(self, contexts: Any, *, generator: torch.Generator) -> Tensor:
        """The arms [B] for contexts [B, ...], all before any reward; ties go to the lowest number."""
        return self.bounds(contexts).argmax(-1)


class LinTS(_Linear):
    """Thompson sampling in a linear model: theta is drawn from N(A^-1 b, scale^2 A^-1) each round.

    Disjoint models need no draw of theta: theta_a . x is N(theta_a . x, scale^2 x^T A_a^-1 x), independent across arms.
    """

    def __init__(
        self, arms: int, dimension: int, *, scale: float = 1.0, shared: bool = False, **options: Any
    ) -> None:
        super().__init__(arms, dimension, shared=shared, **options)
        if not scale > 0.0:
            raise ConfigError(f"scale is positive, and is {scale}")
        self.scale = scale

    def _values(self, x: Tensor, generator: torch.Generator) -> Tensor:
        kind: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
        if not self.shared:
            mean, deviation = self._means_and_deviations(x)
            return mean + self.scale * deviation * torch.randn(mean.shape, **kind)
        noise = torch.randn(*x.shape[:-2], self.fit.dimension, 1, **kind)
        theta = self.fit.theta[0] + self.scale * (torch.linalg.cholesky(self.fit.inverse[0]) @ noise).squeeze(-1)
        return (x * theta.unsqueeze(-2)).sum(-1)

    def pull(self, context: Any, *, generator: torch.Generator) -> int:
        """The best arm of one draw of the models."""
        return int(self._values(self._features(context), generator).argmax())

    def pull_many(self, contexts: Any, *, generator: torch.Generator) -> Tensor:
        """The arms [B] for contexts [B, ...], each from a draw of its own."""
        return self._values(self._features(contexts), generator).argmax(-1)
