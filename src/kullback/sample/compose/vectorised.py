"""The algorithms over `Steps`: the compositions of `algorithms`, with a tensor in place of a list of particles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.sample.compose.algorithms import MH, PMMH, RMSMC, SMC, SMC2, Importance
from kullback.sample.compose.steps import (
    Filter,
    Noise,
    Numbers,
    Particles,
    Steps,
    ancestor_index,
    begin,
    check_weights,
    chosen,
    equal_weights,
    frozen,
    gathered,
    mass,
    onward,
    replayed,
)  # fmt: skip

__all__ = ["Chain", "Prior", "over"]


@dataclass(frozen=True)
class Chain:
    """States of a Markov chain: values [S, R, ...], log_density [S, R], and the share of moves accepted, [R].

    trace: noise [R, T, sites] of the last state, from which `init` of another chain goes on, where it is kept. For a
    program that is not over tensors, values is a list of S results, log_density [S], accepted a number, trace a tuple.
    """

    values: Any
    log_density: Tensor
    accepted: Any
    trace: Any = None


@dataclass(frozen=True)
class Prior:
    """Parameters as a function of sites numbers: noise [R, n, sites] to tensors [R, n, ...]."""

    parameters: Callable[[Tensor], Any]
    sites: int = 1
    noise: Noise = "normal"


def over(method: Any, model: Steps | Prior, numbers: Numbers, *, chains: int = 1) -> Particles | Chain:
    """Run an algorithm over a Steps program, or over a Prior for PMMH and SMC2."""
    kind, needed = type(method), Prior if isinstance(method, (PMMH, SMC2)) else Steps
    if kind not in _RUNNERS:
        raise ConfigError(f"{kind.__name__} does not run over tensors: run it on a program")
    if not isinstance(model, needed):
        raise ConfigError(f"{kind.__name__} over tensors takes a {needed.__name__}, and got a {type(model).__name__}")
    if chains < 1:
        raise ConfigError(f"chains is a count of 1 or more, and is {chains}")
    found: Particles | Chain = _RUNNERS[kind](method, model, numbers, chains)
    return found


def resampled(now: Filter, scheme: str, ess_threshold: float, numbers: Numbers) -> Filter:
    """Chains whose effective size is low enough resampled, each particle with an equal share of the total."""
    weights, found = now.log_weights, mass(now)
    after = equal_weights(found)
    if ess_threshold < 1.0:
        effective = torch.exp(2.0 * found.total - (2.0 * weights).logsumexp(1, keepdim=True))
        count = weights.shape[1]
        low = (effective <= ess_threshold * count) & (found.total > -math.inf)
        if not bool(low.any()):
            return now
        index = torch.where(low, ancestor_index(weights, scheme, numbers, found), _places(weights))
        return now.reindexed(index, torch.where(low, after, weights))
    return now.reindexed(ancestor_index(weights, scheme, numbers, found), after)


def _places(weights: Tensor) -> Tensor:
    return torch.arange(weights.shape[1], device=weights.device)


def _advance(method: Any, model: Steps, now: Filter, numbers: Numbers) -> Filter:
    return onward(model, resampled(now, method.resampler, method.ess_threshold, numbers), numbers)


def _checkpoints(method: Any, model: Steps) -> int:
    return model.length - 1 if method.num_steps is None else min(method.num_steps, model.length - 1)


def _smc(method: SMC, model: Steps, numbers: Numbers, chains: int) -> Particles:
    now = begin(model, (chains, method.num_particles), numbers)
    for _ in range(_checkpoints(method, model)):
        now = _advance(method, model, now, numbers)
    return _ended(model, now, numbers)


def _ended(model: Steps, now: Filter, numbers: Numbers) -> Particles:
    """The rest of the way without resampling."""
    check_weights(now)
    while now.time < model.length - 1:
        now = onward(model, now, numbers)
        check_weights(now)
    return Particles(now.state, now.log_weights)


def _importance(method: Importance, model: Steps, numbers: Numbers, chains: int) -> Particles:
    return _smc(SMC(method.num_particles, 0), model, numbers, chains)


def _moved(method: Any, noise: Tensor, kind: Noise, numbers: Numbers) -> Tensor:
    """A proposal for noise [R, n, ...]: one place, all, or one of the blocks of places of each particle."""
    flat = noise.flatten(2)
    if method.sites == "one":
        pick = (numbers.take(flat.shape[:2]) * flat.shape[2]).long().unsqueeze(2)
        return flat.scatter(2, pick, _shifted(method.drift, flat.gather(2, pick), kind, numbers)).view_as(noise)
    drawn = _shifted(method.drift, flat, kind, numbers)
    if method.sites == "all":
        return drawn.view_as(noise)
    places = torch.arange(flat.shape[2], device=flat.device)
    inside = torch.stack([torch.isin(places, torch.tensor(block, device=flat.device)) for block in method.sites])
    pick = (numbers.take(flat.shape[:2]) * len(inside)).long()
    return torch.where(inside[pick], drawn, flat).view_as(noise)


def _shifted(drift: float | None, noise: Tensor, kind: Noise, numbers: Numbers) -> Tensor:
    """New noise, or noise moved by a step that keeps its law."""
    drawn = numbers.take(noise.shape, kind)
    if drift is None:
        return drawn
    if not drift > 0.0:
        raise ConfigError(f"drift is a standard deviation, above 0, and is {drift}")
    if kind == "normal":
        return math.sqrt(max(1.0 - drift**2, 0.0)) * noise + min(drift, 1.0) * drawn
    step = (noise + drift * torch.special.ndtri(drawn.clamp(2.0**-54, 1.0 - 2.0**-53))) % 2.0
    return torch.where(step >= 1.0, 2.0 - step, step).clamp(max=1.0 - 2.0**-53)


def _accepted(change: Tensor, numbers: Numbers) -> Tensor:
    """Where to accept a change [R, n] of the log-density; from density zero, anything that has one."""
    return numbers.take(change.shape).log() < change.nan_to_num(nan=-math.inf)


def _move(method: Any, model: Steps, now: Filter, numbers: Numbers) -> tuple[Filter, Tensor]:
    """A move of the trace of each particle."""
    if now.noise is None or now.log_density is None:
        raise ConfigError("moves need the traces of particles, and this filter did not keep them")
    noise = _moved(method, now.noise, model.noise, numbers)
    state, density = replayed(model, noise, now.since, now.fixed)
    accept = _accepted(density - now.log_density, numbers)
    after = now._replace(
        state=chosen(accept, state, now.state), noise=chosen(accept, noise, now.noise),
        log_density=torch.where(accept, density, now.log_density),
    )  # fmt: skip
    return after, accept


def _rmsmc(method: RMSMC, model: Steps, numbers: Numbers, chains: int) -> Particles:
    now = begin(model, (chains, method.num_particles), numbers, keep=True)
    for _ in range(_checkpoints(method, model)):
        now = resampled(now, method.resampler, 1.0, numbers)
        for _ in range(method.mh_steps):
            now, _ = _move(method, model, now, numbers)
        now = onward(model, frozen(now) if method.local else now, numbers)
    return _ended(model, now, numbers)


def _collected(states: list[Any]) -> Any:
    """States [R, 1, ...] of each time as [S, R, ...]."""
    if isinstance(states[0], Tensor):
        return torch.stack(states).squeeze(2)
    if isinstance(states[0], dict):
        return {name: _collected([state[name] for state in states]) for name in states[0]}
    return tuple(_collected([state[i] for state in states]) for i in range(len(states[0])))


def _mh(method: MH, model: Steps, numbers: Numbers, chains: int) -> Chain:
    if method.accept is not None:
        raise ConfigError("accept is of traces one by one: over tensors leave it out")
    now = _first_trace(model, numbers, chains) if method.init is None else _begun(model, method.init, numbers, chains)
    states, densities, accepted = [], [], torch.zeros_like(now.log_weights[:, 0])
    for _ in range(method.num_steps):
        now, accept = _move(method, model, now, numbers)
        states.append(now.state)
        densities.append(now.log_density)
        accepted += accept[:, 0]
    if not states:
        raise ConfigError("a chain takes num_steps of 1 or more")
    density = torch.stack(densities).squeeze(2)  # type: ignore[arg-type]
    return Chain(_collected(states), density, accepted / method.num_steps, now.noise[:, 0])  # type: ignore[index]


def _first_trace(model: Steps, numbers: Numbers, chains: int) -> Filter:
    """A run of the prior for each chain."""
    now = begin(model, (chains, 1), numbers, keep=True)
    check_weights(now)
    while now.time < model.length - 1:
        now = onward(model, now, numbers)
        check_weights(now)
    return now


def _begun(model: Steps, init: Any, numbers: Numbers, chains: int) -> Filter:
    """The runs of noise that is given."""
    shape = (model.length, model.sites)
    noise = torch.as_tensor(init, dtype=torch.float64, device=numbers.device)
    if noise.shape not in (shape, (1, *shape), (chains, *shape)) or not bool(noise.isfinite().all()):
        raise ShapeError(f"init is finite noise {shape}, or {(chains, *shape)}, and is {tuple(noise.shape)}")
    noise = noise.expand(chains, *shape).unsqueeze(1).contiguous()
    state, density = replayed(model, noise)
    return Filter(state, density, model.length - 1, noise, density)


@dataclass(frozen=True)
class _Judged:
    """Parameters [P, 1, ...] from noise [P, 1, sites], a filter [P, n] over the model of each, and its evidence [P]."""

    noise: Tensor
    parameters: Any
    filtered: Filter
    log_evidence: Tensor

    def where(self, accept: Tensor, new: _Judged) -> _Judged:
        """The new ones where accept [P] is true."""
        parameters, kept = chosen(accept.unsqueeze(1), new.parameters, self.parameters), self.filtered
        state = chosen(accept.unsqueeze(1).expand_as(kept.log_weights), new.filtered.state, kept.state)
        weights = torch.where(accept.unsqueeze(1), new.filtered.log_weights, kept.log_weights)
        evidence = torch.where(accept, new.log_evidence, self.log_evidence)
        noise = chosen(accept.unsqueeze(1), new.noise, self.noise)
        return _Judged(noise, parameters, Filter(state, weights, kept.time), evidence)


def _model(method: PMMH | SMC2, parameters: Any) -> Steps:
    made: Any = method.model(parameters)
    if not isinstance(made, Steps):
        raise ConfigError(f"over tensors a model of parameters is a Steps program, and got a {type(made).__name__}")
    return made


def _judge(method: PMMH | SMC2, prior: Prior, noise: Tensor, checkpoints: int | None, numbers: Numbers) -> _Judged:
    """A new filter for each of the parameters, up to a checkpoint or to the end."""
    parameters = prior.parameters(noise)
    model = _model(method, parameters)
    inner = SMC(method.num_particles, None, method.resampler)
    now = begin(model, (len(noise), method.num_particles), numbers)
    for _ in range(model.length - 1 if checkpoints is None else checkpoints):
        now = _advance(inner, model, now, numbers)
    return _Judged(noise, parameters, now, mass(now).total[:, 0])


def _pmmh_step(
    method: Any, prior: Prior, now: _Judged, checkpoints: int | None, numbers: Numbers
) -> tuple[_Judged, Tensor]:
    noise = _moved(method, now.noise, prior.noise, numbers)
    new = _judge(method, prior, noise, checkpoints, numbers)
    accept = _accepted(new.log_evidence - now.log_evidence, numbers)
    return now.where(accept, new), accept


def _pmmh(method: PMMH, prior: Prior, numbers: Numbers, chains: int) -> Chain:
    now = _judge(method, prior, numbers.take((chains, 1, prior.sites), prior.noise), method.num_filter_steps, numbers)
    states, evidences, accepted = [], [], torch.zeros_like(now.log_evidence)
    for _ in range(method.num_steps):
        now, accept = _pmmh_step(method, prior, now, method.num_filter_steps, numbers)
        pick = ancestor_index(now.filtered.log_weights, "multinomial", numbers)[:, :1]
        states.append((now.parameters, gathered(now.filtered.state, pick)))
        evidences.append(now.log_evidence)
        accepted += accept
    return Chain(_collected(states), torch.stack(evidences), accepted / method.num_steps)


def _smc2(method: SMC2, prior: Prior, numbers: Numbers, chains: int) -> Particles:
    """One chain; parameters are the particles, and each has a row of the inner filter."""
    if chains > 1:
        raise ConfigError("SMC2 over tensors runs one chain: its parameters are the batch")
    count = method.num_parameters
    now = _judge(method, prior, numbers.take((count, 1, prior.sites), prior.noise), 0, numbers)
    weights = (now.log_evidence - math.log(count)).unsqueeze(0)
    length = _model(method, now.parameters).length
    inner = SMC(method.num_particles, None, method.resampler)
    for time in range(length - 1):
        if time < method.num_steps:
            index = ancestor_index(weights, method.resampler, numbers)
            weights = (weights.logsumexp(1, keepdim=True) - math.log(count)).expand_as(weights)
            now = _reindexed(now, index[0])
            for _ in range(method.mh_steps):
                now, _ = _pmmh_step(method, prior, now, time, numbers)
        after = _advance(inner, _model(method, now.parameters), now.filtered, numbers)
        evidence = mass(after).total[:, 0]
        gain = torch.where(now.log_evidence > -math.inf, evidence - now.log_evidence, -math.inf)
        weights = weights + gain.unsqueeze(0)
        now = _Judged(now.noise, now.parameters, after, evidence)
    pick = ancestor_index(now.filtered.log_weights, "multinomial", numbers)[:, :1]
    drawn = (now.parameters, gathered(now.filtered.state, pick))
    return Particles(_transposed(drawn), weights)


def _reindexed(now: _Judged, index: Tensor) -> _Judged:
    kept = Filter(_rows(now.filtered.state, index), now.filtered.log_weights[index], now.filtered.time)
    return _Judged(now.noise[index], _rows(now.parameters, index), kept, now.log_evidence[index])


def _rows(state: Any, index: Tensor) -> Any:
    return _each(state, lambda part: part[index])


def _transposed(state: Any) -> Any:
    return _each(state, lambda part: part.transpose(0, 1))


def _each(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: _each(part, function) for name, part in state.items()}
    return tuple(_each(part, function) for part in state)


_RUNNERS: dict[type, Callable[..., Any]] = {
    Importance: _importance, SMC: _smc, RMSMC: _rmsmc, MH: _mh, PMMH: _pmmh, SMC2: _smc2,
}  # fmt: skip
