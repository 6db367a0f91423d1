"""PPG, the Parisian particle Gibbs sampler: PaRIS inside conditional sequential Monte Carlo.

A sweep holds one path zeta_{0:T} in the last of N places, resamples and moves the others around it, and carries the
statistics tau of all N as PaRIS does. It yields the mean of tau, and a path that becomes the next one held:

    Pi = sum_i w_T^i tau_T^i,   zeta' = the path of K ~ w_T through the backward indices J^{i,1},

both of which are of the smoothing law when zeta is. Started anywhere, the bias decays geometrically in the number of
sweeps, whereas that of PaRIS is of order T / N; each sweep averages over all its particles.
Source: Cardoso et al. 2023 (arXiv 2301.00900). Baselines: particle Gibbs with traced paths (Andrieu, Doucet and
Holenstein 2010), with ancestor sampling (Lindsten, Jordan and Schön 2014), with backward simulation (Whiteley 2010).

Shapes: R chains, N particles, T + 1 times, K statistics: observations [T+1, p], or [R, T+1, p] where chains have data
of their own (NaN: missing); path [R, T+1, d]; estimate [R, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Kernel
from kullback.sample._moves import select
from kullback.sample.backward import BackwardMethod, backward_sample
from kullback.sample.draws import Generators, draw_index, uniform
from kullback.sample.exact_smoothing import sequence_rows
from kullback.sample.paris import (
    Pair,
    Smoother,
    as_statistic,
    carry,
    first_particles,
    initial_statistic,
    move,
    weighted_mean,
)
from kullback.sample.state_space import AdditiveStatistic, Proposal, StateSpaceModel

__all__ = ["PPGInfo", "PPGState", "Rollout", "particle_gibbs", "path_statistic", "ppg", "ppg_rollout"]

Refresh: TypeAlias = Literal["backward", "ancestor", "traced"]


class PPGState(NamedTuple):
    """The path held in the next sweep [R, T+1, d], and the number of sweeps behind it."""

    path: Tensor
    sweeps: int


class PPGInfo(NamedTuple):
    """Of one sweep: estimate [R, K]; and each [R]: smallest effective sample size, accepted backward proposals, and
    the share of times at which the path is new."""

    estimate: Tensor
    effective: Tensor
    accept_rate: Tensor
    renewed: Tensor


class Rollout(NamedTuple):
    """The mean over the sweeps after burn-in [R, K], the estimates of all sweeps [R, k, K], and the state to go on."""

    mean: Tensor
    per_sweep: Tensor
    state: PPGState


class History(NamedTuple):
    """All particles of one pass: lists over time of [R, N, d], [R, N], [R, N] and [R, N], and what was carried.

    indices: the first backward index of each particle, None where none was drawn; statistic [R, N, K].
    """

    particles: list[Tensor]
    log_weights: list[Tensor]
    ancestors: list[Tensor]
    indices: list[Tensor | None]
    statistic: Tensor
    effective: Tensor
    accept_rate: Tensor


def forward_pass(
    smoother: Smoother,
    rows: Sequence[Tensor],
    chains: int,
    generator: Generators,
    *,
    frozen: Tensor | None = None,
    carried: bool = True,
    draw_ancestor: bool = False,
) -> History:
    """One pass over all observations: conditional on the path `frozen` [R, T+1, d], or plain PaRIS without one.

    carried: whether the statistics are wanted; draw_ancestor: whether the held particle draws its parent anew.
    """
    held = [None] * len(rows) if frozen is None else list(frozen.unbind(1))
    moved = first_particles(smoother, rows[0], chains, generator, held[0])
    x, log_weights, effective = moved.x, moved.log_weights, moved.effective
    tau = initial_statistic(smoother, x, rows[0]) if carried else x
    rate = torch.ones(chains, dtype=torch.float64, device=x.device)
    history = History([x], [log_weights], [], [], tau, effective, rate)
    rates = []
    for time in range(1, len(rows)):
        parent, point = None, held[time]
        if draw_ancestor and point is not None:
            target = point.unsqueeze(1).to(x.dtype)
            parent = _one_back(smoother.model, log_weights, x, target, time, generator).squeeze(1)
        moved = move(smoother, x, log_weights, rows[time], time, generator, point, parent)
        if carried:
            tau, drawn, rate = carry(smoother, log_weights, x, tau, moved, rows[time], time, generator)
            history.indices.append(None if drawn is None else drawn[..., 0])
            rates.append(rate)
        x, log_weights = moved.x, moved.log_weights
        history.particles.append(x)
        history.log_weights.append(log_weights)
        history.ancestors.append(moved.ancestors)
        effective = torch.minimum(effective, moved.effective)
    rate = torch.stack(rates).mean(0) if rates else rate
    return history._replace(statistic=tau, effective=effective, accept_rate=rate)


def _one_back(model: StateSpaceModel, log_weights, x, x_next: Tensor, time: int, generator: Generators) -> Tensor:
    """One exact backward draw for each point x_next [R, P, d]: [R, P]."""
    draws = backward_sample(model, log_weights, x, x_next, time, num_draws=1, method="exact", generator=generator)
    return draws.indices.squeeze(-1)


def trace(particles: Sequence[Tensor], pointers: Sequence[Tensor], last: Tensor) -> Tensor:
    """The paths that end in the particles `last` [R, n], followed back along pointers: [R, n, T+1, d]."""
    path = [select(particles[-1], last)]
    for x, pointer in zip(reversed(particles[:-1]), reversed(pointers)):
        last = pointer.gather(1, last)
        path.append(select(x, last))
    return torch.stack(path[::-1], dim=2)


def simulate_back(model: StateSpaceModel, history: History, last: Tensor, generator: Generators) -> Tensor:
    """Paths that end in the particles `last` [R, n], drawn backwards: [R, n, T+1, d]."""
    path = [select(history.particles[-1], last)]
    for time in range(len(history.particles) - 1, 0, -1):
        x, log_weights = history.particles[time - 1], history.log_weights[time - 1]
        path.append(select(x, _one_back(model, log_weights, x, path[-1], time, generator)))
    return torch.stack(path[::-1], dim=2)


def backward_paths(smoother: Smoother, history: History, last: Tensor, generator: Generators) -> Tensor:
    """Paths [R, n, T+1, d] from the drawn backward indices where there are any, else simulated."""
    pointers = [index for index in history.indices if index is not None]
    if len(pointers) == len(history.particles) - 1:
        return trace(history.particles, pointers, last)
    return simulate_back(smoother.model, history, last, generator)


def draw_last(history: History, generator: Generators) -> Tensor:
    """One final particle of each chain by its weight: [R, 1]."""
    log_weights = history.log_weights[-1]
    return draw_index(log_weights, uniform((len(log_weights), 1), generator))


def ppg(
    model: StateSpaceModel,
    statistic: AdditiveStatistic | Pair,
    observations: Tensor,
    *,
    num_particles: int,
    num_backward: int | None = 2,
    backward: BackwardMethod = "auto",
    proposal: Proposal | None = None,
    max_tries: int | None = None,
    steps: int = 4,
    compiled: bool | None = None,
) -> Kernel:
    """The sampler: `init(path=None, *, generator, chains=None)`, then `step(state, *, generator)` a sweep at a time.

    init takes a path [T+1, d] or [R, T+1, d], or draws one with plain PaRIS for each of `chains` (by default as many
    as there are observed sequences). step gives a PPGState and a PPGInfo, whose estimate is of E[h_T | y_{0:T}].
    The options are those of `paris`; resampling is multinomial at every step, as the sampler's law demands.
    Raises ShapeError for a path that does not fit, and what `paris` raises.

    >>> from kullback.sample.state_space import LinearGaussianModel
    >>> kernel = ppg(LinearGaussianModel.scalar(0.9, 0.6, 1.0), lambda x, x_next, y, time: x * x_next,
    ...              torch.tensor([[0.3], [0.2], [-0.4]]), num_particles=10)
    >>> source = torch.Generator().manual_seed(0)
    >>> state, info = kernel.step(kernel.init(generator=source, chains=5), generator=source)
    >>> state.path.shape, info.estimate.shape
    (torch.Size([5, 3, 1]), torch.Size([5, 1]))
    """
    smoother = Smoother(
        model, as_statistic(statistic), num_particles, num_backward, backward, proposal,
        max_tries=max_tries, steps=steps, compiled=compiled,
    )  # fmt: skip
    rows = sequence_rows(observations)

    def init(path: Tensor | None = None, *, generator: Generators, chains: int | None = None) -> PPGState:
        return PPGState(initial_path(smoother, rows, path, chains, generator), 0)

    def step(state: PPGState, *, generator: Generators) -> tuple[PPGState, PPGInfo]:
        history = forward_pass(smoother, rows, len(state.path), generator, frozen=state.path)
        path = backward_paths(smoother, history, draw_last(history, generator), generator).squeeze(1)
        estimate = weighted_mean(history.log_weights[-1], history.statistic)
        info = PPGInfo(estimate, history.effective, history.accept_rate, _renewed(path, state.path))
        return PPGState(path, state.sweeps + 1), info

    return Kernel(init, step)


def particle_gibbs(
    model: StateSpaceModel,
    statistic: AdditiveStatistic | Pair,
    observations: Tensor,
    *,
    num_particles: int,
    refresh: Refresh = "backward",
    proposal: Proposal | None = None,
) -> Kernel:
    """Particle Gibbs, whose estimate is the statistic of the one path drawn: the baselines of `ppg`, same kernel.

    refresh: the new path is simulated "backward", follows the ancestors with that of the held particle drawn anew at
    each step ("ancestor"), or follows them as they are ("traced", which hardly renews the early times).
    """
    if refresh not in get_args(Refresh):
        raise ConfigError(f"refresh is one of {', '.join(get_args(Refresh))}, not {refresh!r}")
    smoother = Smoother(model, as_statistic(statistic), num_particles, proposal=proposal)
    rows = sequence_rows(observations)

    def init(path: Tensor | None = None, *, generator: Generators, chains: int | None = None) -> PPGState:
        return PPGState(initial_path(smoother, rows, path, chains, generator), 0)

    def step(state: PPGState, *, generator: Generators) -> tuple[PPGState, PPGInfo]:
        history = forward_pass(
            smoother, rows, len(state.path), generator,
            frozen=state.path, carried=False, draw_ancestor=refresh == "ancestor",
        )  # fmt: skip
        last = draw_last(history, generator)
        if refresh == "backward":
            path = simulate_back(model, history, last, generator).squeeze(1)
        else:
            path = trace(history.particles, history.ancestors, last).squeeze(1)
        estimate = path_statistic(smoother.statistic, path, observations)
        info = PPGInfo(estimate, history.effective, history.accept_rate, _renewed(path, state.path))
        return PPGState(path, state.sweeps + 1), info

    return Kernel(init, step)


def path_statistic(statistic: AdditiveStatistic | Pair, path: Tensor, observations: Tensor) -> Tensor:
    """h of paths [R, T+1, d] with observations [T+1, p] or [R, T+1, p]: [R, K]."""
    statistic, rows = as_statistic(statistic), sequence_rows(observations)
    states = [state.unsqueeze(1) for state in path.unbind(1)]
    if len(states) != len(rows):
        raise ShapeError(f"a path has a state for each of the {len(rows)} observations, got {tuple(path.shape)}")
    if statistic.initial is None:
        total = torch.zeros(len(path), 1, 1, dtype=path.dtype, device=path.device)
    else:
        total = statistic.initial(states[0], rows[0])
    for time in range(1, len(rows)):
        total = total + statistic.pair(states[time - 1], states[time], rows[time], time)
    return total.squeeze(1)


def ppg_rollout(
    kernel: Kernel,
    num_sweeps: int,
    burn_in: int = 0,
    *,
    generator: Generators,
    state: PPGState | None = None,
    chains: int | None = None,
) -> Rollout:
    """k = num_sweeps sweeps and the mean of the estimates after the first k_0 = burn_in, from `state` or a new one.

    Raises ConfigError unless 0 <= burn_in < num_sweeps.
    """
    if not 0 <= burn_in < num_sweeps:
        raise ConfigError(f"burn_in is less than num_sweeps and not negative, got {burn_in} of {num_sweeps}")
    if state is None:
        state = kernel.init(generator=generator, chains=chains)
    elif chains is not None and chains != len(state.path):
        raise ConfigError(f"the state has {len(state.path)} chains and {chains} are asked for: leave chains out")
    estimates = []
    for _ in range(num_sweeps):
        state, info = kernel.step(state, generator=generator)
        estimates.append(info.estimate)
    per_sweep = torch.stack(estimates, dim=1)
    return Rollout(per_sweep[:, burn_in:].mean(1), per_sweep, state)


def initial_path(
    smoother: Smoother, rows: Sequence[Tensor], path: Tensor | None, chains: int | None, generator: Generators
) -> Tensor:
    if path is None:
        history = forward_pass(smoother, rows, chains or len(rows[0]), generator)
        return backward_paths(smoother, history, draw_last(history, generator), generator).squeeze(1)
    if path.ndim not in (2, 3) or path.shape[-2] != len(rows):
        raise ShapeError(f"a path is [T+1, d] or [R, T+1, d] with T+1 = {len(rows)} times, got {tuple(path.shape)}")
    path = path.unsqueeze(0) if path.ndim == 2 else path
    wanted = chains or max(len(path), len(rows[0]))
    if len(path) not in (1, wanted) or len(rows[0]) not in (1, wanted):
        raise ShapeError(f"{len(path)} paths and {len(rows[0])} observed sequences do not make {wanted} chains")
    if not bool(path.isfinite().all()):
        raise DataError("a path to hold is finite everywhere, and this one has an entry that is not: check it")
    return path.expand(wanted, -1, -1)


def _renewed(path: Tensor, former: Tensor) -> Tensor:
    return (path != former).any(-1).to(torch.float64).mean(-1)
