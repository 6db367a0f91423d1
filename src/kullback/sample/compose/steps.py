"""Programs over tensors: all particles of all chains in one step, in place of one interpreter for each.

A `Steps` program starts with `sites` numbers for each particle and goes on with as many at each step; given these it
is deterministic, so that a trace is a tensor [R, n, T, sites] of them. Between its steps are checkpoints.

Shapes: R chains, n particles, T steps. Noise [R, n, sites] gives a state, any tensors [R, n, ...] in tuples or
dictionaries, and log-weights [R, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "Filter", "Mass", "Numbers", "Particles", "Steps", "ancestor_index", "begin", "check_weights", "equal_weights",
    "frozen", "gathered", "mass", "onward", "replayed",
]  # fmt: skip

Noise = Literal["uniform", "normal"]


class Numbers:
    """Where random numbers come from: a torch generator, or uniform numbers that are given and taken in order."""

    def __init__(self, source: torch.Generator | Sequence[float] | Tensor) -> None:
        self._generator = source if isinstance(source, torch.Generator) else None
        self.device = source.device if isinstance(source, torch.Generator) else torch.device("cpu")
        self._given = torch.empty(0, dtype=torch.float64, device=self.device)
        if not isinstance(source, torch.Generator):
            self._given = torch.as_tensor(source, dtype=torch.float64, device=self.device).flatten()
        self._block: list[float] = self._given.tolist()
        self._at = 0

    def __call__(self) -> float:
        """The next uniform number."""
        if self._at == len(self._block):
            self._block, self._at = self._more(256).tolist(), 0
        self._at += 1
        return self._block[self._at - 1]

    def _more(self, count: int) -> Tensor:
        if self._generator is None:
            raise DataError(f"the {len(self._given)} uniform numbers that were given are used up: give more")
        return torch.rand(count, generator=self._generator, dtype=torch.float64, device=self.device)

    def take(self, shape: Sequence[int], kind: Noise = "uniform") -> Tensor:
        """The next numbers as a tensor; normal ones are quantiles of uniform ones where those are given."""
        if self._generator is not None:
            make = torch.rand if kind == "uniform" else torch.randn
            return make(shape, generator=self._generator, dtype=torch.float64, device=self.device)
        first, self._at = self._at, self._at + math.prod(shape)
        if self._at > len(self._given):
            self._more(1)
        taken = self._given[first : self._at].view(tuple(shape))
        return taken if kind == "uniform" else torch.special.ndtri(taken)


@dataclass(frozen=True)
class Steps:
    """start(noise) -> (state, log_weight); step(state, noise, time) -> the same, for time = 1, ..., length - 1.

    sites: numbers that each particle takes at a step; noise: their law, uniform on [0, 1) or standard normal.
    """

    start: Callable[[Tensor], tuple[Any, Tensor]]
    step: Callable[[Any, Tensor, int], tuple[Any, Tensor]]
    length: int
    sites: int = 1
    noise: Noise = "normal"

    def __post_init__(self) -> None:
        if self.length < 1 or self.sites < 0:
            raise ConfigError(f"length is 1 or more and sites 0 or more, got {self.length} and {self.sites}")
        if self.noise not in ("uniform", "normal"):
            raise ConfigError(f"noise is 'uniform' or 'normal', and not {self.noise!r}")

    def at(self, time: int, state: Any, noise: Tensor) -> tuple[Any, Tensor]:
        """The step of a time, with the shape of its log-weights looked over; `check_weights` looks at their values."""
        after, log_weight = self.start(noise) if time == 0 else self.step(state, noise, time)
        if log_weight.shape != noise.shape[:-1]:
            wanted, found = tuple(noise.shape[:-1]), tuple(log_weight.shape)
            raise ShapeError(f"step {time} returned log-weights {found} for particles {wanted}: each needs its own")
        return after, log_weight


def gathered(state: Any, index: Tensor) -> Any:
    """A state [R, n, ...] with the particles index [R, m] of each chain."""
    if index.shape[0] == 1:
        flat = index[0]
        if isinstance(state, Tensor):
            return state.index_select(1, flat)
        return _selected(state, lambda part: part.index_select(1, flat))
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)

    def taken(part: Tensor) -> Tensor:
        # a copy of whole rows takes a third of the time of an index by two tensors
        found = part.flatten(0, 1).index_select(0, (rows * part.shape[1] + index).flatten())
        return found.view(*index.shape, *part.shape[2:])

    return _selected(state, taken)


def _selected(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    return _mapped(state, lambda part: _selected(part, function))


def _mapped(state: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(state, dict):
        return {name: function(part) for name, part in state.items()}
    if isinstance(state, tuple):
        parts = [function(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise ShapeError(f"a state is tensors in tuples or dictionaries, and holds a {type(state).__name__}")


def chosen(accept: Tensor, new: Any, old: Any) -> Any:
    """A state with the new particles where accept [R, n] is true."""
    if isinstance(new, Tensor):
        return torch.where(accept.view(*accept.shape, *[1] * (new.ndim - 2)), new, old)
    if isinstance(new, dict):
        return {name: chosen(accept, part, old[name]) for name, part in new.items()}
    parts = [chosen(accept, part, other) for part, other in zip(new, old, strict=True)]
    return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)


@dataclass(frozen=True)
class Particles:
    """Weighted values: tensors [R, n, ...] with log_weights [R, n], or a list of n values with log_weights [n]."""

    values: Any
    log_weights: Tensor

    def log_evidence(self) -> Tensor:
        """log of the sum of weights, [R] or a number: of an unbiased estimate of the mass."""
        return self.log_weights.logsumexp(-1)

    def expect(self, function: Callable[[Any], Any]) -> Tensor:
        """The mean under weights that sum to one; biased at a finite number of particles, NaN without any weight."""
        return self._sum(function, self.log_weights.softmax(-1))

    def unnormalized_expect(self, function: Callable[[Any], Any]) -> Tensor:
        """The integral of a function against the unnormalised measure, without bias."""
        return self._sum(function, self.log_weights.exp())

    def _sum(self, function: Callable[[Any], Any], weights: Tensor) -> Tensor:
        if isinstance(self.values, list):
            found = torch.stack([torch.as_tensor(function(value), dtype=torch.float64) for value in self.values])
        else:
            found = function(self.values)
        over = weights.ndim - 1
        return (weights.view(*weights.shape, *[1] * (found.ndim - weights.ndim)) * found).sum(over)


class Filter(NamedTuple):
    """A particle filter at a checkpoint: state [R, n, ...], log_weights [R, n] that sum to the evidence so far.

    Where paths are kept: noise [R, n, time + 1 - since, sites] from the step `since` on, log_density [R, n] of the
    weights since, and `fixed`, the state before that step.
    """

    state: Any
    log_weights: Tensor
    time: int
    noise: Tensor | None = None
    log_density: Tensor | None = None
    since: int = 0
    fixed: Any = None

    def reindexed(self, index: Tensor, log_weights: Tensor) -> Filter:
        """The filter with the particles index [R, m] and these weights."""
        if self.noise is None or self.log_density is None:
            return Filter(gathered(self.state, index), log_weights, self.time)
        fixed = gathered(self.fixed, index) if self.since else None
        kept = (gathered(self.noise, index), gathered(self.log_density, index), self.since, fixed)
        return Filter(gathered(self.state, index), log_weights, self.time, *kept)


def begin(model: Steps, shape: tuple[int, int], numbers: Numbers, *, keep: bool = False) -> Filter:
    """Particles after the first step, of weight e^log_weight / n."""
    noise = numbers.take((*shape, model.sites), model.noise)
    state, log_weight = model.at(0, None, noise)
    weights = log_weight - math.log(shape[1])
    return Filter(state, weights, 0, noise.unsqueeze(2), log_weight) if keep else Filter(state, weights, 0)


def onward(model: Steps, now: Filter, numbers: Numbers) -> Filter:
    """The next step of all particles."""
    noise = numbers.take((*now.log_weights.shape, model.sites), model.noise)
    state, log_weight = model.at(now.time + 1, now.state, noise)
    weights = now.log_weights + log_weight
    if now.noise is None or now.log_density is None:
        return Filter(state, weights, now.time + 1)
    longer = torch.cat([now.noise, noise.unsqueeze(2)], dim=2)
    return Filter(state, weights, now.time + 1, longer, now.log_density + log_weight, now.since, now.fixed)


def frozen(now: Filter) -> Filter:
    """Choices so far as constants: later moves change only what is drawn after them."""
    if now.noise is None or now.log_density is None:
        return now
    return now._replace(
        noise=now.noise[:, :, :0], log_density=torch.zeros_like(now.log_density), since=now.time + 1, fixed=now.state
    )


def replayed(model: Steps, noise: Tensor, since: int = 0, fixed: Any = None) -> tuple[Any, Tensor]:
    """The state and the summed log-weights [R, n] that belong to noise [R, n, t, sites]; NaN counts as -inf.

    since: the first step that is run again, from the state `fixed`.
    """
    state, total = fixed, None
    for time, now in enumerate(noise.unbind(2), start=since):
        state, log_weight = model.step(state, now, time) if time else model.start(now)
        total = log_weight if total is None else total + log_weight
    if total is None:
        raise ConfigError("nothing is left to move where all choices are frozen: advance before")
    return state, total if float(total.amax()) < math.inf else total.nan_to_num(nan=-math.inf)


class Mass(NamedTuple):
    """Of weights [R, n]: log of their sum, [R, 1]; their shares [R, n], NaN in a chain without any weight; whether all
    chains have one."""

    total: Tensor
    share: Tensor
    alive: bool


def mass(now: Filter) -> Mass:
    """The mass of a filter, whose log-weights are looked over in passing.

    log sum w = max log w - log max share, which is several times as fast as logsumexp for few particles.
    """
    weights = now.log_weights
    top, share = weights.amax(1, keepdim=True), weights.softmax(1)
    if weights.shape[0] == 1:
        low = high = float(top)
    else:
        low, high = (float(bound) for bound in top.aminmax())
    _check(high, now.time)
    total, alive = top - share.amax(1, keepdim=True).log_(), low > -math.inf
    return Mass(total if alive else torch.where(top == -math.inf, top, total), share, alive)


def check_weights(now: Filter) -> None:
    """Raises DataError for a log-weight that is NaN or infinite; `mass` does so as well."""
    _check(float(now.log_weights.amax()), now.time)


def _check(largest: float, time: int) -> None:
    if not largest < math.inf:  # so written that NaN comes through
        raise DataError(f"a log-weight of step {time} is NaN or infinite: look at its density there")


class _Constants(NamedTuple):
    """0, 1, ..., n - 1; n; and log n, as tensors, which take half the time of arithmetic with Python numbers."""

    places: Tensor
    size: Tensor
    log_size: Tensor


@lru_cache(maxsize=32)
def _constants(count: int, device: torch.device) -> _Constants:
    size = torch.tensor(float(count), dtype=torch.float64, device=device)
    return _Constants(torch.arange(count, dtype=torch.float64, device=device), size, size.log())


def ancestor_index(log_weights: Tensor, scheme: str, numbers: Numbers, found: Mass | None = None) -> Tensor:
    """Ancestors [R, n] by log-weights [R, n]; a chain without any weight keeps its particles as they are.

    found: their mass, where it is known.
    """
    total, share, alive = mass(Filter(None, log_weights, 0)) if found is None else found
    chains, count = share.shape
    ends, (places, size, _) = share.cumsum(1), _constants(count, share.device)
    if scheme == "systematic":
        quick = alive and chains * count >= 4000
        index = _systematic(ends.mul_(size), numbers.take((chains, 1)), places, quick=quick)
    elif scheme == "stratified":
        index = torch.searchsorted(ends * count, numbers.take((chains, count)) + places, right=True)
    elif scheme == "multinomial":
        index = torch.searchsorted(ends, numbers.take((chains, count)), right=True)
    elif scheme == "residual":
        index = _residual(share, numbers.take((chains, count)), places)
    else:
        raise ConfigError(f"resampling is multinomial, systematic, stratified or residual, and not {scheme!r}")
    index = index.clamp_(max=count - 1)
    if alive:
        return index
    return torch.where(total == -math.inf, torch.arange(count, device=index.device), index)


def equal_weights(found: Mass) -> Tensor:
    """Log-weights [R, n] that share the mass equally."""
    share = found.share
    return (found.total - _constants(share.shape[1], share.device).log_size).expand_as(share)


def _systematic(ends: Tensor, u: Tensor, places: Tensor, *, quick: bool) -> Tensor:
    """In whose share u + 0, u + 1, ... fall; quick: by how many fall below each end, for weights that are not all 0."""
    if not quick:
        return torch.searchsorted(ends, u + places, right=True)
    chains, count = ends.shape
    below = (ends - u).ceil_().clamp_(0, count).long()
    below[:, -1] = count
    copies = below.clone()
    copies[:, 1:] -= below[:, :-1]
    index = torch.arange(count, device=ends.device)
    index = index if chains == 1 else index.repeat(chains)
    return index.repeat_interleave(copies.flatten(), output_size=chains * count).view(chains, count)


def _residual(share: Tensor, u: Tensor, places: Tensor) -> Tensor:
    expected = share * share.shape[1]
    whole = (expected + 1e-12).floor()
    sure = whole.sum(1, keepdim=True)
    copies = torch.searchsorted(whole.cumsum(1), places.expand_as(share).contiguous(), right=True)
    left = (expected - whole).clamp(min=0.0)
    ends = left.cumsum(1)
    drawn = torch.searchsorted(ends, u * ends[:, -1:], right=True)
    return torch.where(places < sure, copies, drawn)
