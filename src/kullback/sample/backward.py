"""Backward draws of particle smoothing: from which particle at time t - 1 may one at time t have come?

For particles xi^l with weights w^l and a point x at the next time, the backward law is

    beta(l | x) proportional to w^l m(xi^l, x).

"exact": inversion, N operations a draw. "hybrid": propose l from w, accept with probability m(xi^l, x) / sup m, and
after a number of rejections draw exactly. "rejection": the same without a limit. "metropolis": a few steps of
independent Metropolis that start at the ancestor, for models whose density has no known bound; it has the backward law
when the particles were moved by the model itself. Rejection: Douc et al. 2011; the others: Dau and Chopin 2022.

Shapes: R chains, N particles, P points, M draws: log_weights [R, N], x [R, N, d], x_next [R, P, d], indices [R, P, M].
Where numba is installed and the transition is Gaussian (see `StateSpaceModel`), compiled loops draw on the CPU; they
give the same indices as the vectorised ones for the same max_tries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError
from kullback.sample._moves import select
from kullback.sample._threads import over_chains
from kullback.sample.draws import Generators, chain_seeds, counted_uniform, invert
from kullback.sample.state_space import StateSpaceModel

__all__ = ["BackwardDraws", "BackwardMethod", "backward_mean", "backward_sample"]

BackwardMethod: TypeAlias = Literal["auto", "exact", "hybrid", "rejection", "metropolis"]

_BLOCK = 1 << 20  # entries of a block of backward weights: more would leave the cache and less would leave it idle
_UNBOUNDED = 1 << 20  # rejections after which a pure rejection sampler is called stuck


class BackwardDraws(NamedTuple):
    """indices [R, P, M] into the particles; accept_rate [R]: accepted of all proposals, 1 where nothing is proposed."""

    indices: Tensor
    accept_rate: Tensor


def backward_sample(
    model: StateSpaceModel,
    log_weights: Tensor,
    x: Tensor,
    x_next: Tensor,
    time: int,
    *,
    num_draws: int = 2,
    method: BackwardMethod = "auto",
    ancestors: Tensor | None = None,
    max_tries: int | None = None,
    steps: int = 4,
    compiled: bool | None = None,
    generator: Generators,
) -> BackwardDraws:
    """M independent draws from the backward law of each of the P points x_next at `time`.

    ancestors [R, P] and steps: for "metropolis". max_tries: for "hybrid"; by default about sqrt(N), or N / 4 where
    compiled. compiled: None takes numba where it fits, True insists. "auto" is "hybrid" beyond 512 particles, or
    beyond 32 where compiled, if the density has a bound, and else "exact".
    Raises ConfigError for options that do not fit, DataError for a point that no particle can have come from.
    """
    check_method(model, method)
    if method == "auto":
        limit = 512 if _loops(model, x, compiled) is None else 32
        method = "hybrid" if x.shape[1] > limit and hasattr(model, "log_trans_sup") else "exact"
    if num_draws < 1:
        raise ConfigError(f"num_draws is {num_draws}: a point needs at least one backward draw")
    seeds = chain_seeds(x.shape[0], generator)
    if method == "metropolis":
        if ancestors is None:
            raise ConfigError("metropolis starts at the ancestors of the points: pass ancestors [R, P]")
        return _metropolis(model, log_weights, x, x_next, time, seeds, num_draws, ancestors, steps)
    loops = _loops(model, x, compiled)
    if method == "exact":
        if loops is not None:
            return _compiled(loops, model, log_weights, x, x_next, time, seeds, num_draws, 0)
        numbers = counted_uniform(seeds[:, None, None], _counters(x_next.shape[1], num_draws, 1, x.device))
        indices = _exact(model, log_weights, x, x_next, time, numbers)
        return BackwardDraws(indices, torch.ones(x.shape[0], dtype=torch.float64, device=x.device))
    size = x.shape[1]
    if method == "rejection":
        max_tries = _UNBOUNDED
    elif max_tries is None:
        max_tries = 8 + (math.isqrt(size) if loops is None else size // 4)
    if max_tries < 1:
        raise ConfigError(f"max_tries is {max_tries}: a hybrid draw tries at least once; for none at all take exact")
    if loops is not None:
        return _compiled(loops, model, log_weights, x, x_next, time, seeds, num_draws, max_tries)
    return _rejection(model, log_weights, x, x_next, time, seeds, num_draws, max_tries)


def check_method(model: StateSpaceModel, method: str) -> None:
    """ConfigError for a method that is unknown, or that needs a bound of a model that has none."""
    if method not in get_args(BackwardMethod):
        raise ConfigError(f"backward is one of {', '.join(get_args(BackwardMethod))}, not {method!r}")
    if method in ("hybrid", "rejection") and not hasattr(model, "log_trans_sup"):
        raise ConfigError(f"{method} needs a bound: give the model log_trans_sup(time), or take exact or metropolis")


@cache
def _numba() -> ModuleType | None:
    try:
        from kullback.sample import _backward_numba
    except ImportError:
        return None
    return _backward_numba


def _loops(model: StateSpaceModel, x: Tensor, compiled: bool | None) -> ModuleType | None:
    """The compiled loops where they apply, or None."""
    if compiled is False:
        return None
    fits = hasattr(model, "whitened_mean") and x.device.type == "cpu"
    if compiled and not fits:
        raise ConfigError("compiled draws need a Gaussian transition (whitened_mean and whitened) and a CPU")
    loops = _numba() if fits else None
    if compiled and loops is None:
        from kullback.core.errors import MissingExtra

        raise MissingExtra("numba", extra="numba")
    return loops


def _compiled(loops, model, log_weights, x, x_next, time, seeds, num_draws, max_tries) -> BackwardDraws:
    means, points = _double(model.whitened_mean(x, time)), _double(model.whitened(x_next, time))
    weights = _double(log_weights)
    chains, rows = points.shape[:2]
    out = torch.empty(chains, rows, num_draws, dtype=torch.int64)
    tries, accepts = torch.zeros(2, chains, dtype=torch.int64)
    if max_tries == 0:
        arrays = (array.numpy() for array in (weights, means, points, seeds, out))
        done = over_chains(loops.draw_exact, *arrays)
        rate = torch.ones(chains, dtype=torch.float64)
    else:
        cumulative = _cumulative(weights)
        arrays = (array.numpy() for array in (cumulative, weights, means, points, seeds, tries, accepts, out))
        done = over_chains(partial(loops.draw_hybrid, max_tries), *arrays)
        rate = accepts / tries.to(torch.float64)
    if not done:
        raise _lost(time)
    return BackwardDraws(out, rate)


def _double(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64).contiguous()


def _cumulative(log_weights: Tensor) -> Tensor:
    return (log_weights - log_weights.amax(-1, keepdim=True)).exp().cumsum(-1)


def _counters(rows: int, draws: int, stride: int, device: torch.device) -> Tensor:
    """The first counter of each draw: [P, M]."""
    return (torch.arange(rows * draws, device=device) * stride).reshape(rows, draws)


def _lost(time: int) -> DataError:
    return DataError(
        f"a particle at time {time} can have come from none at time {time - 1}: all its backward weights are zero or "
        "not a number; check log_trans, or widen the proposal"
    )


def _log_backward(model: Any, log_weights: Tensor, x: Tensor, x_next: Tensor, time: int) -> Tensor:
    """log w^l + log m(xi^l, x) up to a constant of the row: [R, P, N]."""
    if not hasattr(model, "whitened_mean"):
        return log_weights.unsqueeze(1) + model.log_trans(x.unsqueeze(1), x_next.unsqueeze(2), time)
    means, points = model.whitened_mean(x, time), model.whitened(x_next, time)
    if x.shape[-1] <= 3:
        square = (points.unsqueeze(2) - means.unsqueeze(1)).square().sum(-1)
        return log_weights.unsqueeze(1) - 0.5 * square
    # |p|^2 is constant in a row; centred, so that little cancels.
    centre = means.mean(1, keepdim=True)
    means, points = means - centre, points - centre
    return (log_weights - 0.5 * means.square().sum(-1)).unsqueeze(1) + points @ means.mT


def _blocks(rows: int, chains: int, size: int) -> int:
    return max(1, min(rows, _BLOCK // max(1, chains * size)))


def _exact(model, log_weights: Tensor, x: Tensor, x_next: Tensor, time: int, numbers: Tensor) -> Tensor:
    """Indices by inversion of uniform numbers [R, P, M], a block of points at a time."""
    step = _blocks(x_next.shape[1], *x.shape[:2])
    parts = []
    for points, uniforms in zip(x_next.split(step, dim=1), numbers.split(step, dim=1)):
        logits = _log_backward(model, log_weights, x, points, time)
        top = logits.amax(-1, keepdim=True)
        if not bool(top.isfinite().all()):
            raise _lost(time)
        parts.append(invert((logits - top).exp_().cumsum(-1), uniforms))
    return torch.cat(parts, dim=1)


def _acceptance(model: Any, x: Tensor, x_next: Tensor, time: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of particle and point indices [R, Q]: log m - log sup m of those pairs."""
    if hasattr(model, "whitened_mean"):
        means, points = model.whitened_mean(x, time), model.whitened(x_next, time)
        return lambda source, row: -0.5 * (select(means, source) - select(points, row)).square().sum(-1)
    bound = torch.as_tensor(model.log_trans_sup(time), device=x.device)
    bound = bound.unsqueeze(-1) if bound.ndim else bound
    return lambda source, row: model.log_trans(select(x, source), select(x_next, row), time) - bound


def _rejection(model, log_weights, x, x_next, time, seeds, num_draws, max_tries) -> BackwardDraws:
    """Rejection in rounds over the draws still open, gathered to the front of each chain; inversion of those left."""
    chains, rows, device = x.shape[0], x_next.shape[1], x.device
    log_ratio, cumulative = _acceptance(model, x, x_next, time), _cumulative(log_weights)
    indices = torch.full((chains, rows * num_draws), -1, device=device)
    tries = torch.zeros(chains, dtype=torch.int64, device=device)
    first = _counters(rows, num_draws, 2 * max_tries + 1, device).flatten()
    slots = torch.arange(rows * num_draws, device=device).expand(chains, -1)
    for attempt in range(max_tries):
        open_ = indices.gather(1, slots) < 0
        count = open_.sum(1)
        most = int(count.max())
        if most == 0:
            break
        if most <= 0.7 * slots.shape[1]:
            front = open_.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            slots, open_ = slots.gather(1, front), open_.gather(1, front)
        tries += count
        counters = first[slots] + 2 * attempt
        proposed = invert(cumulative, counted_uniform(seeds[:, None], counters))
        accepted = counted_uniform(seeds[:, None], counters + 1).log() < log_ratio(proposed, slots // num_draws)
        indices = indices.scatter(1, slots, torch.where(accepted & open_, proposed, indices.gather(1, slots)))
    rate = (indices >= 0).sum(1) / tries.to(torch.float64)
    # As in the compiled loops: a point whose weights have once been summed goes on with them for its other draws.
    left = (indices < 0).reshape(chains, rows, num_draws).cummax(-1).values.flatten(1)
    most = int(left.sum(1).max())
    if most:
        slots = left.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        numbers = counted_uniform(seeds[:, None], first[slots] + 2 * max_tries)
        drawn = _exact(model, log_weights, x, select(x_next, slots // num_draws), time, numbers.unsqueeze(-1))
        chosen = torch.where(left.gather(1, slots), drawn.squeeze(-1), indices.gather(1, slots))
        indices = indices.scatter(1, slots, chosen)
    return BackwardDraws(indices.reshape(chains, rows, num_draws), rate)


def _metropolis(model, log_weights, x, x_next, time, seeds, num_draws, ancestors, steps) -> BackwardDraws:
    if steps < 1:
        raise ConfigError(f"steps is {steps}: metropolis moves at least once")
    chains, rows = x_next.shape[:2]
    cumulative, points = _cumulative(log_weights), x_next.unsqueeze(2)
    first = _counters(rows, num_draws, 2 * steps, x.device)
    current = ancestors.unsqueeze(-1).expand(chains, rows, num_draws)
    log_current = model.log_trans(select(x, current), points, time)
    accepted_count = torch.zeros(chains, dtype=torch.int64, device=x.device)
    for step in range(steps):
        numbers = counted_uniform(seeds[:, None, None], first + 2 * step)
        proposed = invert(cumulative, numbers.flatten(1)).reshape(current.shape)
        log_proposed = model.log_trans(select(x, proposed), points, time)
        coins = counted_uniform(seeds[:, None, None], first + 2 * step + 1).log()
        accepted = coins < log_proposed - log_current
        current = torch.where(accepted, proposed, current)
        log_current = torch.where(accepted, log_proposed, log_current)
        accepted_count += accepted.flatten(1).sum(1)
    if not bool(log_current.isfinite().all()):
        raise _lost(time)
    return BackwardDraws(current, accepted_count / (steps * rows * num_draws))


def backward_mean(
    model: StateSpaceModel,
    log_weights: Tensor,
    x: Tensor,
    x_next: Tensor,
    time: int,
    *,
    values: Tensor,
    pair: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The mean of values^l + pair(xi^l, x) under the backward law of each point: [R, P, K], in N P operations.

    values [R, N, K]; pair(x [R, 1, N, d], x_next [R, P, 1, d]) -> [R, P, N, K]. This is M = infinity, the forward-only
    form of forward filtering and backward smoothing (Del Moral, Doucet and Singh 2010).
    """
    parts = []
    for points in x_next.split(_blocks(x_next.shape[1], *x.shape[:2]), dim=1):
        logits = _log_backward(model, log_weights, x, points, time)
        if not bool(logits.amax(-1).isfinite().all()):
            raise _lost(time)
        weights = logits.softmax(-1).to(values.dtype)
        terms = pair(x.unsqueeze(1), points.unsqueeze(2))
        parts.append(weights @ values + (weights.unsqueeze(-1) * terms).sum(2))
    return torch.cat(parts, dim=1)
