"""Targets of Feynman-Kac correctors: what particles follow between noise and data, and the weight this leaves them.

In the clock v of fkc_paths.py (k the schedule's growth), p_v a path of unnormalised targets, zeta^2 >= 0 any noise:

    dx = [k x + drift + (zeta^2 - 1) / 2 grad log p] dv + zeta dW,    d log w = rate dv.

    prod q_i^b_i     drift = S = sum b_i s_i
                     rate  = (|S|^2 - sum b_i |s_i|^2) / 2 - (sum b_i - 1) k d + sum b_i' log q_i
    p e^(b r)        drift = S + b grad r / 2
                     rate  = that of p + b' r + <b grad r, S / 2 + k x>
    learned energy   drift = grad log p / 2 + F for any field F
                     rate  = d/dv log p + k d + div F + <grad log p, k x + F>

with s_i = grad log q_i, d the number of dimensions, ' the derivative in v. Then for every function phi

    E_p phi = E[w phi(x)] / E[w]  at each v,    d/dv log Z = E_p[rate].

Annealing is one q with power b; guidance q_u^(1 - w) q_c^w. Adding nu grad log p dv and sqrt(2 nu) dW leaves p as it
is, whence the freedom in zeta; below 1 weights vary more, soon without bound; above 1 steps have to be finer. `a` names
it for annealing as the paper does: drift [b + a (1 - b)] s, zeta^2 = 1 + 2 a (1 - b) / b; a = 0 is the target score,
a = 1/2 tempered noise.

Source: Skreta et al. 2025 (arXiv 2503.02819). Shapes: N particles [N, *shape], rates [N].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.fkc_paths import DiffusionPath, Schedule, Step, shared_shape

__all__ = [
    "Annealed",
    "Evaluation",
    "GeometricMean",
    "LearnedEnergy",
    "Power",
    "ProductOfExperts",
    "RewardTilted",
    "Target",
]

Power: TypeAlias = "float | Callable[[float], float]"
"""A number, or a function of progress, which goes from 0 at noise to 1 at data."""

Joint: TypeAlias = Callable[[Tensor, Tensor], Sequence[Tensor]]
Scalar: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Evaluation(NamedTuple):
    """Of particles [N, *shape]: the gradient of log p, the drift without k x (None: that same gradient), the rate [N].

    noise: zeta^2. error: the variance of the rate's estimate [N], where it is estimated.
    """

    gradient: Tensor
    drift: Tensor | None
    rate: Tensor
    noise: float
    error: Tensor | None = None


class Target(Protocol):
    """What the sampler asks for: see `Evaluation`; at the begin of a step or, for Heun's rule, at its end."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def evaluate(self, x: Tensor, step: Step, *, end: bool = False) -> Evaluation: ...
    def start(self, schedule: Schedule, step: Step) -> tuple[Tensor, Tensor]: ...
    def log_start(self, x: Tensor, step: Step) -> Tensor | None: ...


def _at(power: Power, progress: float) -> float:
    return power(progress) if callable(power) else power


def _level(x: Tensor, step: Step, end: bool) -> Tensor:
    return torch.tensor(step.next_level if end else step.level, dtype=x.dtype, device=x.device)


def _squares(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return torch.linalg.vecdot(flat, flat)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1)


def _check_noise(noise: float) -> None:
    if not 0.0 <= noise < math.inf:
        raise ConfigError(f"noise is zeta^2, the share of the path's noise that is kept, 0 or more, not {noise}")


@dataclass(frozen=True, slots=True)
class ProductOfExperts:
    """prod_i q_i^b_i: powers one for all or one each, of either sign; functions of progress need log-densities.

    joint: all scores in one call, (x, level) to one tensor for each expert, in place of those of the experts; for
    networks that take conditions as a batch. noise: zeta^2. Raises ConfigError for no expert, for another number of
    powers, for one that is not finite, or for a function where an expert has no log-density.
    """

    experts: Sequence[DiffusionPath]
    powers: Power | Sequence[Power] = 1.0
    joint: Joint | None = None
    noise: float = 1.0
    _each: tuple[Power, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shared_shape(self.experts)
        _check_noise(self.noise)
        one = callable(self.powers) or isinstance(self.powers, (int, float))
        powers: tuple[Power, ...] = (self.powers,) * len(self.experts) if one else tuple(self.powers)  # type: ignore
        object.__setattr__(self, "_each", powers)
        if len(powers) != len(self.experts):
            raise ConfigError(f"{len(self.experts)} experts take one power for all or one each, not {len(powers)}")
        if not all(math.isfinite(_at(power, share)) for power in powers for share in (0.0, 1.0)):
            raise ConfigError("powers of experts are finite numbers, or functions of progress from 0 to 1")
        if any(callable(power) and path.log_density is None for power, path in zip(powers, self.experts, strict=True)):
            raise ConfigError("a power that changes along the path needs the log_density of its DiffusionPath")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.experts[0].shape)

    def evaluate(self, x: Tensor, step: Step, *, end: bool = False) -> Evaluation:
        """Gradient, drift and rate of particles [N, *shape]."""
        level, powers = _level(x, step, end), self._each
        now = [_at(power, step.next_progress if end else step.progress) for power in powers]
        scores = self._scores(x, level)
        gradient = scores[0] * now[0] if now[0] != 1.0 else scores[0]
        for share, score in zip(now[1:], scores[1:], strict=True):
            gradient = torch.add(gradient, score, alpha=share)
        rate = _rate(now, scores, gradient, step.growth * math.prod(x.shape[1:]))
        for power, path in zip(powers, self.experts, strict=True):
            if callable(power) and path.log_density is not None:
                slope = (_at(power, step.next_progress) - _at(power, step.progress)) / step.h
                rate = torch.add(rate, path.log_density(x, level).to(rate.dtype), alpha=slope)
        return Evaluation(gradient, None, rate, self.noise)

    def _scores(self, x: Tensor, level: Tensor) -> list[Tensor]:
        if self.joint is None:
            return [path.score(x, level).to(x.dtype) for path in self.experts]
        scores = [score.to(x.dtype) for score in self.joint(x, level)]
        if len(scores) != len(self.experts):
            raise ConfigError(f"joint returns a score for each of {len(self.experts)} experts, and gave {len(scores)}")
        return scores

    def start(self, schedule: Schedule, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and variance of the product of the experts' Gaussians at the first level."""
        precision, weighted = torch.zeros(()).double(), torch.zeros(()).double()
        for power, path in zip(self._each, self.experts, strict=True):
            mean, variance = path.start(schedule, step.level)
            part = _at(power, step.progress) / variance
            precision, weighted = precision + part, weighted + part * mean
        if not bool((precision > 0).all()):
            raise ConfigError(
                "at the first level these powers make no distribution, for their precisions sum to 0 or less: raise "
                "the power of the narrower expert, or take more noise"
            )
        return weighted / precision, 1.0 / precision

    def log_start(self, x: Tensor, step: Step) -> Tensor | None:
        """log p [N] at the first level, where all experts have a log-density."""
        level, total = _level(x, step, False), x.new_zeros(len(x))
        for power, path in zip(self._each, self.experts, strict=True):
            if path.log_density is None:
                return None
            total = total + _at(power, step.progress) * path.log_density(x, level).to(x.dtype)
        return total


def _rate(powers: Sequence[float], scores: Sequence[Tensor], gradient: Tensor, growth: float) -> Tensor:
    """Of a product at constant powers; growth: k d. Two short cases need one norm and lose no digits."""
    total = sum(powers)
    if len(powers) == 1:
        rate = (0.5 * powers[0] * (powers[0] - 1.0)) * _squares(scores[0])
    elif len(powers) == 2 and total == 1.0:
        rate = (-0.5 * powers[0] * powers[1]) * _squares(scores[1] - scores[0])
    else:
        rate = 0.5 * _squares(gradient)
        for power, score in zip(powers, scores, strict=True):
            rate = torch.add(rate, _squares(score), alpha=-0.5 * power)
    return rate if growth == 0.0 or total == 1.0 else rate - (total - 1.0) * growth


@dataclass(frozen=True, slots=True)
class Annealed:
    """q^beta: low temperatures for beta > 1; beta may be a function of progress, which needs q's log-density.

    a in [0, 1/2]: see the module. Raises ConfigError for beta <= 0 or another a.
    """

    path: DiffusionPath
    beta: Power
    a: float = 0.0
    _product: ProductOfExperts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.a <= 0.5:
            raise ConfigError(f"a lies between 0, the target score, and 1/2, tempered noise; got {self.a}")
        for share in (0.0, 1.0):
            if not 0.0 < _at(self.beta, share) < math.inf:
                raise ConfigError(f"the inverse temperature beta is positive and finite, not {_at(self.beta, share)}")
        object.__setattr__(self, "_product", ProductOfExperts((self.path,), self.beta))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.path.shape)

    def evaluate(self, x: Tensor, step: Step, *, end: bool = False) -> Evaluation:
        """Gradient, drift and rate of particles [N, *shape]."""
        beta = _at(self.beta, step.next_progress if end else step.progress)
        return self._product.evaluate(x, step, end=end)._replace(noise=1.0 + 2.0 * self.a * (1.0 - beta) / beta)

    def start(self, schedule: Schedule, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian at the first level."""
        return self._product.start(schedule, step)

    def log_start(self, x: Tensor, step: Step) -> Tensor | None:
        """beta log q [N] at the first level, where the log-density is known."""
        return self._product.log_start(x, step)


@dataclass(frozen=True, slots=True)
class GeometricMean:
    """q_u^(1 - w) q_c^w: classifier-free guidance of weight w, any finite number; w = 1 is the conditional model.

    The weight costs no call: its rate is w (w - 1) |s_u - s_c|^2 / 2. joint: both scores, unconditional first, from
    one call. noise: zeta^2.
    """

    unconditional: DiffusionPath
    conditional: DiffusionPath
    weight: float
    joint: Joint | None = None
    noise: float = 1.0
    _product: ProductOfExperts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        paths, powers = (self.unconditional, self.conditional), (1.0 - self.weight, self.weight)
        object.__setattr__(self, "_product", ProductOfExperts(paths, powers, self.joint, self.noise))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.conditional.shape)

    def evaluate(self, x: Tensor, step: Step, *, end: bool = False) -> Evaluation:
        """Gradient, drift and rate of particles [N, *shape]."""
        return self._product.evaluate(x, step, end=end)

    def start(self, schedule: Schedule, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian at the first level."""
        return self._product.start(schedule, step)

    def log_start(self, x: Tensor, step: Step) -> Tensor | None:
        """log p [N] at the first level, where both log-densities are known."""
        return self._product.log_start(x, step)


def _check_differentiable(values: Tensor, what: str) -> None:
    if not values.requires_grad:
        raise ConfigError(f"{what} is differentiable in the particles: this one keeps no graph, drop its no_grad")


def _with_gradient(function: Scalar, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """A function's values [N] and gradient, detached."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = function(leaf, level)
        _check_differentiable(values, "a reward or log-density")
        (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, materialize_grads=True)
    return values.detach().to(x.dtype), gradient.detach()


@dataclass(frozen=True, slots=True)
class RewardTilted:
    """p e^(b r) with b = strength profile(progress), for a model or any target p of ours.

    reward: from particles and a level to [N], differentiable. profile: None is linear; a constant one starts tilted.
    by_level: the reward depends on the level; a second call of it a step. noise: zeta^2, in place of the base's.
    Raises ConfigError for a strength that is not finite.
    """

    base: Target | DiffusionPath
    reward: Scalar
    strength: float
    profile: Callable[[float], float] | None = None
    by_level: bool = False
    noise: float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.noise)
        if not math.isfinite(self.strength):
            raise ConfigError(f"the strength of a reward is a finite number, not {self.strength}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def _base(self) -> Target:
        return ProductOfExperts((self.base,)) if isinstance(self.base, DiffusionPath) else self.base

    def _coefficient(self, progress: float) -> float:
        return self.strength * (progress if self.profile is None else self.profile(progress))

    def evaluate(self, x: Tensor, step: Step, *, end: bool = False) -> Evaluation:
        """Gradient, drift and rate of particles [N, *shape]."""
        base = self._base().evaluate(x, step, end=end)
        first, last = self._coefficient(step.progress), self._coefficient(step.next_progress)
        reward, slope = _with_gradient(self.reward, x, _level(x, step, end))
        other = reward
        if self.by_level:
            with torch.no_grad():
                other = self.reward(x, _level(x, step, not end)).to(x.dtype)
        change = (last * reward - first * other if end else last * other - first * reward) / step.h
        slope = slope * (last if end else first)
        drift = base.gradient if base.drift is None else base.drift
        # b' r and b r' together, over the step as it is
        rate = base.rate + change + _product(slope, drift - 0.5 * base.gradient + step.growth * x)
        return Evaluation(base.gradient + slope, drift + 0.5 * slope, rate, self.noise, base.error)

    def start(self, schedule: Schedule, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and variance of the base's Gaussian at the first level."""
        return self._base().start(schedule, step)

    def log_start(self, x: Tensor, step: Step) -> Tensor | None:
        """log p + b r [N] at the first level, where that of the base is known."""
        known = self._base().log_start(x, step)
        if known is None:
            return None
        with torch.no_grad():
            return known + self._coefficient(step.progress) * self.reward(x, _level(x, step, False)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LearnedEnergy:
    """A density known up to a constant at each level, with particles driven by any field F.

    log_density: from particles and a level to [N], differentiable, as -gamma_t U(x). drive: F, from particles and a
    level to [N, *shape]; for a score network half its score; it need not be a gradient. divergence of F: "exact" by d
    derivatives, or "hutchinson" with Rademacher probes, drawn from `generator`; the noise of the latter inflates E w
    by half its accumulated variance, which the sampler reports. "auto" is exact up to d = 64.
    """

    log_density: Scalar
    drive: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    divergence: Literal["auto", "exact", "hutchinson"] = "auto"
    probes: int = 2
    generator: torch.Generator | None = None
    mean: float | Tensor = 0.0
    variance: float | Tensor = 0.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.noise)
        if self.divergence not in ("auto", "exact", "hutchinson"):
            raise ConfigError(f"divergence is auto, exact or hutchinson, not {self.divergence!r}")
        if not self._exact() and (self.generator is None or self.probes < 1):
            raise ConfigError("an estimated divergence takes a generator and at least one probe")

    def _exact(self) -> bool:
        return self.divergence == "exact" or (self.divergence == "auto" and math.prod(self.shape) <= 64)

    def evaluate(self, x: Tensor, step: Step, *, end: bool = False) -> Evaluation:
        """Gradient, drift and rate of particles [N, *shape]."""
        level = _level(x, step, end)
        values, gradient = _with_gradient(self.log_density, x, level)
        with torch.no_grad():
            other = self.log_density(x, _level(x, step, not end)).to(x.dtype)
        push, divergence, error = self._drive(x, level)
        change = (values - other if end else other - values) / step.h
        rate = change + divergence + step.growth * math.prod(self.shape)
        rate = rate + _product(gradient, push + step.growth * x)
        return Evaluation(gradient, torch.add(push, gradient, alpha=0.5), rate, self.noise, error)

    def _drive(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """F, its divergence [N], and the variance of the latter's estimate."""
        exact, found = self._exact(), []
        # Reverse mode: it is there for every network, and one pass forward serves all directions.
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            push = self.drive(leaf, level)
            _check_differentiable(push, "a drive")
            count = math.prod(self.shape) if exact else self.probes
            for index in range(count):
                direction = self._direction(x, index)
                (change,) = torch.autograd.grad(
                    (push * direction).sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                found.append(_product(direction, change))
        each, push = torch.stack(found), push.detach().to(x.dtype)
        if exact:
            return push, each.sum(0), None
        error = each.var(0) / len(found) if len(found) > 1 else torch.full_like(each[0], math.nan)
        return push, each.mean(0), error

    def _direction(self, x: Tensor, index: int) -> Tensor:
        """A unit vector for all particles [1, *shape], or random signs [N, *shape]."""
        if self._exact():
            unit = torch.zeros_like(x[:1]).flatten(1)
            unit[:, index] = 1.0
            return unit.view_as(x[:1])
        signs = torch.randint(2, x.shape, generator=self.generator, device=x.device)
        return (2 * signs - 1).to(x.dtype)

    def start(self, schedule: Schedule, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian at the first level."""
        return DiffusionPath(self.drive, self.shape, None, self.mean, self.variance).start(schedule, step.level)

    def log_start(self, x: Tensor, step: Step) -> Tensor | None:
        """log p [N] at the first level."""
        with torch.no_grad():
            return self.log_density(x, _level(x, step, False)).to(x.dtype)
