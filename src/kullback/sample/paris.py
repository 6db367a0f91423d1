"""PaRIS: online smoothing of additive statistics with N particles and M backward draws for each, without stored paths.

With J^{i,1..M} drawn from the backward law of particle i (see backward.py), the statistic of each particle moves on as

    tau_t^i = 1/M sum_j [tau_{t-1}^{J^{i,j}} + h_t(xi_{t-1}^{J^{i,j}}, xi_t^i)],   E[h | y_{0:t}] ~ sum_i w_t^i tau_t^i.

M = 1 degenerates as tracing ancestors does; M >= 2 is stable; M = None is the exact mean over all N particles
(forward-only forward filtering, backward smoothing). The bias is of order t / N; `ppg` removes it.
Source: Olsson and Westerborn 2017; as used in Cardoso et al. 2023 (arXiv 2301.00900).

Shapes: R chains, N particles, d dimensions, K statistics: particles [R, N, d], log_weights [R, N] (normalised),
statistic [R, N, K]; an observation [p], or [R, p] where chains have data of their own; NaN: missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.types import Kernel
from kullback.sample._moves import chosen, effective_size, normalised, resampled, select
from kullback.sample.backward import BackwardMethod, backward_mean, backward_sample, check_method
from kullback.sample.draws import Generators, uniform
from kullback.sample.state_space import AdditiveStatistic, Proposal, StateSpaceModel, observed_log_density

__all__ = ["ParisInfo", "ParisState", "paris"]

Resampling: TypeAlias = Literal["multinomial", "stratified", "systematic"]
Pair: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class ParisState(NamedTuple):
    """Where a smoother stands after the observation at `time`; see the module's shapes. log_likelihood: [R], nats."""

    time: int
    particles: Tensor
    log_weights: Tensor
    statistic: Tensor
    log_likelihood: Tensor

    @property
    def estimate(self) -> Tensor:
        """E[h_t | y_{0:t}], as estimated: [R, K]."""
        return weighted_mean(self.log_weights, self.statistic)


class ParisInfo(NamedTuple):
    """Of one step, each [R]: effective sample size, log p(y_t | y_{0:t-1}) as estimated, accepted backward proposals.

    ancestors [R, N]: the parent of each particle, for tracing genealogies.
    """

    effective: Tensor
    log_increment: Tensor
    accept_rate: Tensor
    ancestors: Tensor


@dataclass(frozen=True, slots=True)
class Smoother:
    """The options that all particle smoothers share, checked."""

    model: StateSpaceModel
    statistic: AdditiveStatistic
    num_particles: int
    num_backward: int | None = 2
    backward: BackwardMethod = "auto"
    proposal: Proposal | None = None
    resampling: Resampling = "multinomial"
    threshold: float = 1.0
    max_tries: int | None = None
    steps: int = 4
    compiled: bool | None = None

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise ConfigError(f"num_particles is {self.num_particles}: two or more particles are needed")
        if self.num_backward is not None and self.num_backward < 1:
            raise ConfigError(f"num_backward is {self.num_backward}: at least 1 draw, or None for the exact mean")
        if self.num_backward is None and self.backward not in ("auto", "exact"):
            raise ConfigError(
                f"backward={self.backward!r} draws, and num_backward=None takes the exact mean: choose one"
            )
        check_method(self.model, self.backward)
        if self.resampling not in get_args(Resampling):
            raise ConfigError(f"resampling is one of {', '.join(get_args(Resampling))}, not {self.resampling!r}")
        if not 0.0 < self.threshold <= 1.0:
            raise ConfigError(f"threshold is a share of the particles in (0, 1] and is {self.threshold}")


def paris(
    model: StateSpaceModel,
    statistic: AdditiveStatistic | Pair,
    *,
    num_particles: int,
    num_backward: int | None = 2,
    backward: BackwardMethod = "auto",
    proposal: Proposal | None = None,
    resampling: Resampling = "multinomial",
    threshold: float = 1.0,
    max_tries: int | None = None,
    steps: int = 4,
    compiled: bool | None = None,
) -> Kernel:
    """An online smoother: `init(y_0, *, generator, chains=1)`, then `step(state, y_t, *, generator)` for each t.

    init gives a ParisState, step a ParisState and a ParisInfo; `state.estimate` [R, K] is the smoothed statistic.
    num_backward: M; None for the exact mean. backward, max_tries, steps, compiled: see `backward_sample`. proposal:
    None moves particles by the model. threshold: resample a chain when its effective sample size is below this share
    of N; at 1 always. Raises ConfigError for options out of range, DataError when no particle explains an observation
    or a density is not a number.

    >>> from kullback.sample.state_space import LinearGaussianModel
    >>> smoother = paris(LinearGaussianModel.scalar(0.9, 0.6, 1.0), lambda x, x_next, y, time: x * x_next,
    ...                  num_particles=100)
    >>> source = torch.Generator().manual_seed(0)
    >>> state = smoother.init(torch.tensor([0.3]), generator=source)
    >>> for y in (0.2, -0.4):
    ...     state, info = smoother.step(state, torch.tensor([y]), generator=source)
    >>> state.time, state.estimate.shape
    (2, torch.Size([1, 1]))
    """
    smoother = Smoother(
        model, as_statistic(statistic), num_particles, num_backward, backward, proposal, resampling, threshold,
        max_tries, steps, compiled,
    )  # fmt: skip

    def init(observation: Tensor, *, generator: Generators, chains: int = 1) -> ParisState:
        row = observation_row(observation)
        first = first_particles(smoother, row, chains, generator)
        tau = initial_statistic(smoother, first.x, row)
        return ParisState(0, first.x, first.log_weights, tau, first.log_increment)

    def step(state: ParisState, observation: Tensor, *, generator: Generators) -> tuple[ParisState, ParisInfo]:
        row, time = observation_row(observation), state.time + 1
        moved = move(smoother, state.particles, state.log_weights, row, time, generator)
        tau, _, rate = carry(smoother, state.log_weights, state.particles, state.statistic, moved, row, time, generator)
        log_likelihood = state.log_likelihood + moved.log_increment
        info = ParisInfo(moved.effective, moved.log_increment, rate, moved.ancestors)
        return ParisState(time, moved.x, moved.log_weights, tau, log_likelihood), info

    return Kernel(init, step)


def as_statistic(statistic: AdditiveStatistic | Pair) -> AdditiveStatistic:
    return statistic if isinstance(statistic, AdditiveStatistic) else AdditiveStatistic(statistic)


def observation_row(observation: Tensor) -> Tensor:
    """An observation [p] or [R, p] as [1, 1, p] or [R, 1, p], which broadcasts against particles."""
    if observation.ndim not in (1, 2):
        raise ShapeError(f"an observation is [p], or [R, p] with one for each chain, got {tuple(observation.shape)}")
    return observation.reshape(-1, 1, observation.shape[-1])


def weighted_mean(log_weights: Tensor, values: Tensor) -> Tensor:
    return (log_weights.exp().unsqueeze(1).to(values.dtype) @ values).squeeze(1)


class Moved(NamedTuple):
    """Particles one step on, x [R, N, d], with normalised log_weights [R, N] and ancestors [R, N].

    log_increment [R]: of the likelihood; effective [R]: the effective sample size.
    """

    x: Tensor
    log_weights: Tensor
    ancestors: Tensor
    log_increment: Tensor
    effective: Tensor


def first_particles(
    smoother: Smoother, row: Tensor, chains: int, generator: Generators, frozen: Tensor | None = None
) -> Moved:
    """Particles at time 0, their own ancestors; frozen [R, d] takes the last place."""
    model, proposal, size = smoother.model, smoother.proposal, smoother.num_particles
    if chains < 1 or len(row) not in (1, chains):
        raise ShapeError(f"observations are for {len(row)} chains and {chains} are asked for: set chains to match")
    shape = (chains, size - (frozen is not None))
    if proposal is None:
        x = model.sample_init(shape, generator=generator)
    else:
        x = proposal.sample_init(shape, row, generator=generator)
    if frozen is not None:
        x = torch.cat([x, frozen.unsqueeze(1).to(x.dtype)], dim=1)
    weights = observed_log_density(model, x, row, 0)
    if proposal is not None:
        weights = weights + model.log_init(x) - proposal.log_init(x, row)
    log_weights, log_total, effective = normalised(weights, 0, smoother.compiled)
    themselves = torch.arange(size, device=x.device).expand(chains, -1)
    return Moved(x, log_weights, themselves, log_total - math.log(size), effective)


def move(
    smoother: Smoother,
    x: Tensor,
    log_weights: Tensor,
    row: Tensor,
    time: int,
    generator: Generators,
    frozen: Tensor | None = None,
    frozen_ancestor: Tensor | None = None,
) -> Moved:
    """Resample, move and weight. frozen [R, d] takes the last place, with frozen_ancestor [R] or that same place."""
    model, proposal = smoother.model, smoother.proposal
    size = log_weights.shape[1]
    ancestors, parents, base = _resample(smoother, log_weights, x, size - (frozen is not None), generator)
    if proposal is None:
        x_next = model.sample_trans(parents, time, generator=generator)
    else:
        x_next = proposal.sample_trans(parents, row, time, generator=generator)
    if frozen is not None:
        last = ancestors.new_full((len(x), 1), size - 1) if frozen_ancestor is None else frozen_ancestor.unsqueeze(1)
        ancestors = torch.cat([ancestors, last], dim=1)
        x_next = torch.cat([x_next, frozen.unsqueeze(1).to(x_next.dtype)], dim=1)
    weights = base + observed_log_density(model, x_next, row, time)
    if proposal is not None:
        parents = select(x, ancestors)
        weights = weights + model.log_trans(parents, x_next, time) - proposal.log_trans(parents, x_next, row, time)
    new_log_weights, log_total, effective = normalised(weights, time, smoother.compiled)
    return Moved(x_next, new_log_weights, ancestors, log_total, effective)


def _resample(
    smoother: Smoother, log_weights: Tensor, x: Tensor, count: int, generator: Generators
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Ancestors [R, count], their states, and the log-weights, [R, N] or a number, with which the moved ones begin."""
    chains, size = log_weights.shape
    numbers = uniform((chains, 1 if smoother.resampling == "systematic" else count), generator)
    if smoother.resampling != "multinomial":
        numbers = (torch.arange(count, device=numbers.device) + numbers) / count
    ancestors, parents = resampled(log_weights, numbers, x, smoother.compiled)
    even = -math.log(size)
    if smoother.threshold == 1.0:
        return ancestors, parents, even
    renew = (effective_size(log_weights) < smoother.threshold * size).unsqueeze(-1)
    ancestors = torch.where(renew, ancestors, torch.arange(count, device=ancestors.device))
    return ancestors, select(x, ancestors), torch.where(renew, even, log_weights)


def initial_statistic(smoother: Smoother, x: Tensor, row: Tensor) -> Tensor:
    """tau at time 0: [R, N, K], or zeros [R, N, 1], which broadcast, when the statistic has no initial part."""
    if smoother.statistic.initial is None:
        return torch.zeros(*x.shape[:2], 1, dtype=torch.float64, device=x.device)
    value = smoother.statistic.initial(x, row)
    if value.ndim != 3 or value.shape[:2] != x.shape[:2]:
        raise ShapeError(f"initial returns [R, N, K] for states {tuple(x.shape)}, got {tuple(value.shape)}")
    return value


def carry(
    smoother: Smoother,
    log_weights: Tensor,
    x: Tensor,
    tau: Tensor,
    moved: Moved,
    row: Tensor,
    time: int,
    generator: Generators,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """tau one step on [R, N, K], the backward indices [R, N, M] (None for the exact mean), and the acceptance [R]."""
    model, rows = smoother.model, row.unsqueeze(2)

    def pair(x: Tensor, x_next: Tensor) -> Tensor:
        value = smoother.statistic.pair(x, x_next, rows, time)
        if value.ndim != 4:
            raise ShapeError(f"pair returns [R, ..., K] for states [R, ..., d]: 4 dimensions, got {value.ndim}")
        return value

    if smoother.num_backward is None:
        mean = backward_mean(model, log_weights, x, moved.x, time, values=tau, pair=pair)
        return mean, None, torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    indices, rate = backward_sample(
        model, log_weights, x, moved.x, time,
        num_draws=smoother.num_backward, method=smoother.backward, ancestors=moved.ancestors,
        max_tries=smoother.max_tries, steps=smoother.steps, compiled=smoother.compiled, generator=generator,
    )  # fmt: skip
    before, parents = chosen(tau, x, indices, smoother.compiled)
    terms = before + pair(parents, moved.x.unsqueeze(2))
    # the same bits: over two entries torch's mean takes many times as long as their sum
    mean = 0.5 * (terms[:, :, 0] + terms[:, :, 1]) if terms.shape[2] == 2 else terms.mean(2)
    return mean, indices, rate
