"""Feynman-Kac correctors: diffusion models sampled under annealing, guidance, products and rewards, with exact weights.

Mixed scores alone do not follow the marginals that were meant. Here each particle carries the weight that mixing leaves
out (fkc_targets.py has the equations), and particles are resampled: exact as their number grows, with no training and
no further call of a network. One step from v to v + h, at growth k:

    x <- e^(k h) x + (e^(k h) - 1)/k drift + zeta sqrt((e^(2 k h) - 1)/2k) noise,    log w <- log w + h rate,

then resampling, or births and deaths: particle i dies with probability 1 - exp(-(h rate_i - mean)^-) and j takes its
place with probability in proportion to (h rate_j - mean)^+. log Z grows by log mean w, or by the mean of h rate.

Source: Skreta et al. 2025 (arXiv 2503.02819). The image code's stabilisers bias the result; they are off by default.
Shapes: R swarms (independent islands), K particles each: particles [R, K, *shape], log-weights [R, K].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Kernel
from kullback.sample.draws import Generators, normal, uniform
from kullback.sample.fkc_islands import Migration
from kullback.sample.fkc_paths import Schedule, Step, steps_of
from kullback.sample.fkc_targets import Evaluation, Target

__all__ = [
    "FKCInfo",
    "FKCResult",
    "FKCState",
    "Resample",
    "Stabilisers",
    "birth_death_step",
    "fkc",
    "fkc_sampler",
    "log_normalizer",
    "systematic_resample",
]

Resample: TypeAlias = Literal["systematic", "birth_death", "none"]
Init: TypeAlias = "Literal['matched'] | Callable[..., tuple[Tensor, Tensor | None]]"


class FKCState(NamedTuple):
    """After `step` steps: particles [R, K, *shape], log_weights [R, K] of mean weight 1, log_z [R] since the start.

    log_z_start [R]: log of the first particles' mean weight, log Z_0 where all log-densities are normalised, else 0.
    origins [R, K]: the first particle that each descends from; where islands exchange particles, one of the island m
    places back around the ring is m K and more. error [R, K]: the variance gathered by estimated rates.
    """

    step: int
    particles: Tensor
    log_weights: Tensor
    log_z: Tensor
    log_z_start: Tensor
    origins: Tensor
    error: Tensor

    @property
    def mean(self) -> Tensor:
        """The weighted mean of the particles, [R, *shape]."""
        weights = self.log_weights.softmax(1)
        return (weights.unsqueeze(1) @ self.particles.flatten(2)).reshape(len(weights), *self.particles.shape[2:])


class FKCInfo(NamedTuple):
    """Of one step: effective sample size before resampling and growth of log Z, [R] each; parents [R, K].

    clipped [R]: the share of particles whose weight a stabiliser changed.
    """

    effective: Tensor
    log_increment: Tensor
    parents: Tensor
    clipped: Tensor


class FKCResult(NamedTuple):
    """Weighted samples [R, K, *shape] with log_weights [R, K] of mean weight 1, and how it went.

    log_z [R]: log Z_T / Z_0. ess [steps, R]. origins [R, K]. clipped and error: see FKCState and FKCInfo, the former
    [R] averaged over steps.
    """

    samples: Tensor
    log_weights: Tensor
    log_z: Tensor
    log_z_start: Tensor
    ess: Tensor
    origins: Tensor
    clipped: Tensor
    error: Tensor

    @property
    def unique_origins(self) -> Tensor:
        """How many of the first particles have descendants, [R]."""
        return (self.origins.sort(1).values.diff(dim=1) != 0).sum(1) + 1

    def resampled(self, *, generator: Generators) -> Tensor:
        """Samples [R, K, *shape] of equal weight."""
        return _gather(self.samples, systematic_resample(self.log_weights, generator=generator))


@dataclass(frozen=True, slots=True)
class Stabilisers:
    """What published image samplers do to weights, each a bias: None or 0 does nothing.

    clamp: increments of log w, less their mean, to +-clamp. quantile: increments above it come down to it. floor: the
    least share of a particle when resampling.
    """

    clamp: float | None = None
    quantile: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.clamp is not None and not self.clamp > 0.0:
            raise ConfigError(f"clamp is a positive bound of the increments of log-weights, not {self.clamp}")
        if self.quantile is not None and not 0.0 < self.quantile <= 1.0:
            raise ConfigError(f"quantile lies in (0, 1], not {self.quantile}")
        if not 0.0 <= self.floor < 1.0:
            raise ConfigError(f"floor is a share in [0, 1), not {self.floor}")

    def __call__(self, increments: Tensor) -> Tensor:
        """Increments [R, K] after clamp and quantile."""
        changed = increments
        if self.clamp is not None:
            mean = changed.mean(1, keepdim=True)
            changed = mean + (changed - mean).clamp(-self.clamp, self.clamp)
        if self.quantile is not None:
            changed = changed.minimum(changed.double().quantile(self.quantile, 1, keepdim=True).to(changed.dtype))
        return changed


def log_normalizer(log_weights: Tensor) -> Tensor:
    """log of the mean weight, [..., K] to [...].

    >>> log_normalizer(torch.tensor([1.0, 3.0]).log())
    tensor(0.6931)
    """
    # By the share of the heaviest, which takes a fifth of the time of logsumexp.
    top, share = log_weights.amax(-1), log_weights.softmax(-1).amax(-1)
    return torch.where(top == -math.inf, top, top - (share * log_weights.shape[-1]).log())


def systematic_resample(
    log_weights: Tensor, *, generator: Generators, floor: float = 0.0, compiled: bool | None = None
) -> Tensor:
    """Ancestors [R, K], in order, of log-weights [R, K]: the i-th appears floor(K w_i) or ceil(K w_i) times.

    One uniform number a row; no sorting or searching; sums in float64. floor: the least share of a particle, before
    shares are normalised again. compiled: None takes a compiled loop on a CPU where numba is there. Raises ConfigError
    for fewer than two particles, DataError for a row that has no weight or one that is not a number.

    >>> source = torch.Generator().manual_seed(0)
    >>> systematic_resample(torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log(), generator=source)
    tensor([[0, 0, 2, 3]])
    """
    if log_weights.ndim != 2 or log_weights.shape[1] < 2:
        raise ConfigError(f"resampling takes log-weights [R, K] of K >= 2 particles, got {tuple(log_weights.shape)}")
    logs = log_weights.detach().double()
    if floor:
        logs = logs.log_softmax(1).clamp(min=math.log(floor))
    numbers = uniform((len(logs), 1), generator)
    loops = None if compiled is False or logs.device.type != "cpu" else _loops()
    if loops is not None:
        ancestors = torch.empty(logs.shape, dtype=torch.int64)
        good = loops.systematic(logs.contiguous().numpy(), numbers[:, 0].numpy(), ancestors.numpy())
    else:
        ancestors, good = _systematic(logs, numbers)
    if not good:
        raise DataError("no particle has a weight, or a weight is not a number: see the scores at high noise first")
    return ancestors


@cache
def _loops() -> ModuleType | None:
    try:
        from kullback.sample import _fkc_numba
    except ImportError:
        return None
    return _fkc_numba


def _systematic(logs: Tensor, numbers: Tensor) -> tuple[Tensor, bool]:
    """The i-th ancestor ends where K times the cumulative weight, less the number, does."""
    rows, size = logs.shape
    cumulative = (logs - logs.amax(1, keepdim=True)).exp_().cumsum(1)
    total = cumulative[:, -1:]
    ends = (cumulative * (size / total)).sub_(numbers).ceil_().long().clamp_(0, size)
    ends[:, -1] = size
    marks = torch.zeros(rows, size + 1, dtype=torch.int64, device=logs.device)
    ancestors = marks.scatter_add_(1, ends, torch.ones_like(ends)).cumsum(1)[:, :size]
    return ancestors, bool(total.isfinite().all())


def birth_death_step(increments: Tensor, *, generator: Generators) -> Tensor:
    """Who takes each particle's place after births and deaths under increments h rate [R, K]: indices [R, K].

    >>> source = torch.Generator().manual_seed(0)
    >>> birth_death_step(torch.tensor([[0.0, 99.0, 0.0]]), generator=source)
    tensor([[1, 1, 1]])
    """
    if increments.ndim != 2 or increments.shape[1] < 2:
        raise ConfigError(f"births and deaths take increments [R, K] with K >= 2, got {tuple(increments.shape)}")
    excess = (increments - increments.mean(1, keepdim=True)).double()
    numbers = uniform((*increments.shape, 2), generator)
    rows, size = increments.shape
    taken = torch.arange(size, device=increments.device).repeat(rows, 1)
    swarm, place = (numbers[..., 0] < -torch.expm1(excess.clamp(max=0.0))).nonzero(as_tuple=True)
    if len(swarm):
        # One search for the dying of all swarms: that of swarm i runs from i to i + 1.
        births = excess.clamp_(min=0.0).cumsum(1)
        births = births / births[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
        line = births + torch.arange(rows, device=excess.device).unsqueeze(1)
        found = torch.searchsorted(line.flatten(), swarm + numbers[swarm, place, 1], right=True)
        taken[swarm, place] = torch.minimum(found - swarm * size, torch.full_like(found, size - 1))
    return taken


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x [R, K, ...] by indices [R, K]: one copy."""
    flat = indices + torch.arange(len(indices), device=indices.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view_as(x)


@dataclass(frozen=True, slots=True)
class _Corrector:
    """The options of `fkc`, checked."""

    target: Target
    schedule: Schedule
    steps: tuple[Step, ...]
    size: int
    resample: Resample
    every: int
    ess_threshold: float | None
    window: tuple[float, float]
    clip: Stabilisers | None
    heun: bool
    init: Init
    dtype: torch.dtype
    migration: Migration | None

    def __post_init__(self) -> None:
        if self.resample not in get_args(Resample):
            raise ConfigError(f"resample is one of {', '.join(get_args(Resample))}, not {self.resample!r}")
        least = 1 if self.resample == "none" else 2
        if self.size < least:
            raise ConfigError(f"num_particles is {self.size}: {self.resample} resampling takes {least} or more")
        if self.every < 1:
            raise ConfigError(f"every is a number of steps from 1, not {self.every}")
        if self.ess_threshold is not None and not 0.0 < self.ess_threshold <= 1.0:
            raise ConfigError(f"ess_threshold is a share of the particles in (0, 1], not {self.ess_threshold}")
        if self.resample != "systematic" and (self.every > 1 or self.ess_threshold is not None):
            raise ConfigError("every and ess_threshold say when to resample systematically: leave them out")
        if self.resample == "none" and self.migration is not None:
            raise ConfigError("migration would do nothing where particles are never chosen: leave it out, or resample")
        if not 0.0 <= self.window[0] < self.window[1] <= 1.0:
            raise ConfigError(f"window is two shares of the way, 0 <= begin < end <= 1, not {self.window}")

    def first(self, swarms: int, generator: Generators) -> FKCState:
        """Particles from the Gaussian at the first level, or from `init`, weighted where p is known."""
        if swarms < 1:
            raise ConfigError(f"num_swarms is {swarms}: at least one is needed")
        shape, first = (swarms, self.size, *self.target.shape), self.steps[0]
        if callable(self.init):
            x, log_weights = self.init(shape, generator=generator)
            if x.shape != shape:
                raise ShapeError(f"init returns particles {shape} and log-weights or None, got {tuple(x.shape)}")
            x = x.to(self.dtype)
        else:
            mean, variance = self.target.start(self.schedule, first)
            noise = normal(shape, generator)
            x = (mean.to(noise) + variance.sqrt().to(noise) * noise).to(self.dtype)
            known = self.target.log_start(x.flatten(0, 1), first)
            log_weights = None
            if known is not None:
                own = -0.5 * noise.square() - 0.5 * (2 * math.pi * variance).log().to(noise)
                log_weights = known.view(swarms, self.size) - own.flatten(2).sum(2)
        if log_weights is None:
            log_weights = x.new_zeros(shape[:2])
        log_weights = log_weights.to(torch.promote_types(self.dtype, torch.float32))
        log_z_start = log_normalizer(log_weights)
        _check_weights(log_weights, log_z_start, first)
        state = FKCState(
            0, x, log_weights - log_z_start.unsqueeze(1), torch.zeros_like(log_z_start), log_z_start,
            torch.arange(self.size, device=x.device).repeat(swarms, 1), torch.zeros_like(log_weights),
        )  # fmt: skip
        if self.resample != "birth_death":
            return state
        # Births and deaths carry no weights.
        return _taken(state, systematic_resample(state.log_weights, generator=generator))

    def moved(self, state: FKCState, generator: Generators) -> tuple[FKCState, Tensor]:
        """Particles moved one step, with their increments of log w [R, K]."""
        step, flat = self.steps[state.step], state.particles.flatten(0, 1)
        begin = self.target.evaluate(flat, step)
        growth, h = step.growth, step.h
        scale = math.exp(growth * h)
        gain = math.expm1(growth * h) / growth if growth else h
        spread = math.expm1(2 * growth * h) / (2 * growth) if growth else h
        noise = normal(state.particles.shape, generator, dtype=flat.dtype).flatten(0, 1)
        noise = noise.mul_(math.sqrt(begin.noise * spread))
        drift, rate, error = _drift(begin), begin.rate, begin.error
        x = torch.add(noise.add_(flat, alpha=scale), drift, alpha=gain)
        if self.heun:
            end = self.target.evaluate(x, step, end=True)
            x = torch.add(x, _drift(end) - drift, alpha=0.5 * gain)
            rate = 0.5 * (rate + end.rate)
            error = None if error is None or end.error is None else 0.25 * (error + end.error)
        increments = rate.view(state.log_weights.shape) * h
        _check_increments(increments, step)
        grown = state.error if error is None else state.error + h * h * error.view_as(state.error)
        return state._replace(step=state.step + 1, particles=x.view_as(state.particles), error=grown), increments

    def corrected(self, state: FKCState, increments: Tensor, generator: Generators) -> tuple[FKCState, FKCInfo]:
        """Weights, births and deaths or resampling, within the window; outside of it the particles stay as they are."""
        step = self.steps[state.step - 1]
        stay = torch.arange(self.size, device=increments.device).expand_as(increments)
        zero = torch.zeros_like(state.log_z)
        if step.next_progress <= self.window[0] or step.progress >= self.window[1]:
            return state, FKCInfo(_effective(state.log_weights), zero, stay, zero)
        clipped = zero
        if self.clip is not None:
            changed = self.clip(increments)
            clipped, increments = (changed != increments).to(zero.dtype).mean(1), changed
        increments = increments.to(state.log_weights.dtype)
        if self.resample == "birth_death":
            parents, grown = birth_death_step(increments, generator=generator), increments.mean(1)
            weights = increments - log_normalizer(increments).unsqueeze(1)
            info = FKCInfo(_effective(weights), grown, parents, clipped)
            return _taken(state._replace(log_z=state.log_z + grown), parents), info
        weights = state.log_weights + increments
        grown = log_normalizer(weights)
        _check_weights(weights, grown, step)
        weights = weights - grown.unsqueeze(1)
        state = state._replace(log_weights=weights, log_z=state.log_z + grown)
        effective = _effective(weights)
        if self.resample == "none" or state.step % self.every:
            return state, FKCInfo(effective, grown, stay, clipped)
        parents = systematic_resample(weights, generator=generator, floor=self.clip.floor if self.clip else 0.0)
        if self.ess_threshold is None:
            return _taken(state, parents), FKCInfo(effective, grown, parents, clipped)
        renew = (effective < self.ess_threshold * self.size).unsqueeze(1)
        parents = torch.where(renew, parents, stay)
        kept = torch.where(renew, torch.zeros_like(weights), weights)
        return _taken(state, parents)._replace(log_weights=kept), FKCInfo(effective, grown, parents, clipped)

    def migrated(self, state: FKCState, generator: Generators) -> FKCState:
        """Islands after an exchange, if it is time for one and not the end."""
        if self.migration is None or state.step % self.migration.every or state.step == len(self.steps):
            return state
        state = self.migration(state)
        if self.resample != "birth_death":
            return state
        return _taken(state, systematic_resample(state.log_weights, generator=generator))


def _drift(at: Evaluation) -> Tensor:
    drift = at.gradient if at.drift is None else at.drift
    return drift if at.noise == 1.0 else torch.add(drift, at.gradient, alpha=0.5 * (at.noise - 1.0))


def _effective(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of weights of mean 1, [R, K] to [R]."""
    return log_weights.shape[1] ** 2 / (2.0 * log_weights).exp().sum(1)


def _taken(state: FKCState, parents: Tensor) -> FKCState:
    """The parents' particles, with equal weights; all that belongs to a particle goes with it."""
    return state._replace(
        particles=_gather(state.particles, parents), log_weights=torch.zeros_like(state.log_weights),
        origins=state.origins.gather(1, parents), error=state.error.gather(1, parents),
    )  # fmt: skip


def _check_increments(increments: Tensor, step: Step) -> None:
    if not bool(increments.isfinite().all()):
        swarm, particle = (~increments.isfinite()).nonzero()[0].tolist()
        raise DataError(
            f"the score of particle {particle} of swarm {swarm} is not finite at level {step.level:g}: check the model "
            "there, or leave that part out with window"
        )


def _check_weights(log_weights: Tensor, total: Tensor, step: Step) -> None:
    if not bool(total.isfinite().all()):
        what = "a weight is not a number" if bool(log_weights.isnan().any()) else "no particle has a finite weight"
        raise DataError(f"{what} at level {step.level:g}: check the log-densities there, or give init other particles")


def fkc(
    target: Target,
    schedule: Schedule,
    *,
    num_particles: int,
    num_steps: int,
    resample: Resample = "systematic",
    every: int = 1,
    ess_threshold: float | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    clip: Stabilisers | None = None,
    heun: bool = False,
    init: Init = "matched",
    dtype: torch.dtype = torch.float64,
    migration: Migration | None = None,
) -> Kernel:
    """A corrected sampler: `init(*, generator, chains=1)`, then num_steps times `step(state, *, generator)`.

    init gives a FKCState, step a FKCState and a FKCInfo. every, ess_threshold: resample each so many steps, and only
    swarms whose effective size is below that share of K. window: shares of the way, in the log signal-to-noise ratio,
    between which weights count at all; outside, scores are mixed and no more, which is a bias, and a way to leave out
    levels where a network fits badly. clip: off; see Stabilisers. heun: a second evaluation a step, at the predicted
    point, for drift and weight. init: "matched" draws the Gaussian at the first level and weights it where p is known;
    or a function (shape, *, generator) to particles and log-weights or None. migration: islands exchange particles, and
    only log_z + log_z_start of all of them together keeps its meaning. Raises ConfigError for options out of range, and
    at a step DataError when a score is not finite or no particle has a weight.
    """
    steps = tuple(steps_of(schedule, num_steps))
    corrector = _Corrector(
        target, schedule, steps, num_particles, resample, every, ess_threshold, window, clip, heun, init, dtype,
        migration,
    )  # fmt: skip

    def begin(*, generator: Generators, chains: int = 1) -> FKCState:
        with torch.no_grad():
            return corrector.first(chains, generator)

    def step(state: FKCState, *, generator: Generators) -> tuple[FKCState, FKCInfo]:
        if state.step >= num_steps:
            raise ConfigError(f"all {num_steps} steps are done: begin again with init")
        with torch.no_grad():
            moved, increments = corrector.moved(state, generator)
            after, info = corrector.corrected(moved, increments, generator)
            return corrector.migrated(after, generator), info

    return Kernel(begin, step)


def fkc_sampler(
    target: Target,
    schedule: Schedule,
    num_particles: int,
    num_steps: int,
    *,
    generator: Generators,
    num_swarms: int = 1,
    **options: object,
) -> FKCResult:
    """Samples of a target by `fkc`, whose options it takes; num_swarms independent islands in one batch.

    >>> from kullback.sample.fkc_paths import VE, gaussian_mixture_path
    >>> from kullback.sample.fkc_targets import Annealed
    >>> schedule = VE(0.01, 10.0)
    >>> cold = Annealed(gaussian_mixture_path(torch.zeros(1, 1).double(), 1.0, schedule), beta=2.0)
    >>> result = fkc_sampler(cold, schedule, 4000, 100, generator=torch.Generator().manual_seed(0), heun=True)
    >>> result.samples.shape, abs(result.samples.var().item() - 0.5) < 0.1
    (torch.Size([1, 4000, 1]), True)
    """
    kernel = fkc(target, schedule, num_particles=num_particles, num_steps=num_steps, **options)  # type: ignore[arg-type]
    state = kernel.init(generator=generator, chains=num_swarms)
    ess, clipped = [], torch.zeros_like(state.log_z)
    for _ in range(num_steps):
        state, info = kernel.step(state, generator=generator)
        ess.append(info.effective)
        clipped = clipped + info.clipped / num_steps
    return FKCResult(
        state.particles, state.log_weights, state.log_z, state.log_z_start, torch.stack(ess), state.origins, clipped,
        state.error,
    )  # fmt: skip
