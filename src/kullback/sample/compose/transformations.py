"""Pieces that algorithms are stacked from: each takes a `Represented` and returns one of the same meaning.

Only `self_normalised` changes it, and says so in its name. Of a population of weights w, `resample` draws ancestors
with n w_i / sum w expected copies and gives each the weight sum w / n, so that the total is kept; where all weights are
zero it does nothing. `mh_step` runs a program again with one of its m uniform numbers drawn anew and accepts with
probability min(1, p' m / (p m')), which leaves the measure of traces as it is (Metropolis, Hastings and Green).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from kullback.core.errors import ConfigError
from kullback.sample.compose.laws import Finite, Quantile, Stratum, Systematic, Unit, bernoulli, uniform_integer
from kullback.sample.compose.programs import Bound, Factor, Program, Recorded, Ret, Sample, Trace, program, sample
from kullback.sample.compose.representations import (
    Enum,
    Population,
    Representation,
    Represented,
    Suspended,
    Traced,
    Weighted,
    to_checkpoint,
    to_end,
)  # fmt: skip
from kullback.sample.compose.weights import Number, log_of, shares, total

__all__ = [
    "RESAMPLERS", "Transformation", "acceptance", "advance", "ancestors", "apply_weight", "collapse", "compose",
    "evidence", "extract_evidence", "finish", "flatten", "freeze", "hoist", "marginal", "mh_step", "propose",
    "push_evidence", "resample", "self_normalised",
]  # fmt: skip

Transformation = Callable[[Represented], Represented]
R = TypeVar("R", bound=Representation)


def compose(*steps: Transformation) -> Transformation:
    """The steps one after another, the last given first, as functions compose."""
    return lambda value: functools.reduce(lambda now, step: step(now), reversed(steps), value)


def _expect(value: Represented, kind: type[R], doing: str) -> R:
    if not isinstance(value.representation, kind):
        found = type(value.representation).__name__
        raise ConfigError(f"{doing} takes a {kind.__name__}, and this is a {found}: hoist it to where there is one")
    return value.representation


# --- populations ---


def ancestors(weights: Sequence[Number], size: int, scheme: str) -> Program:
    """The program that draws the indices [size] of ancestors."""
    if scheme not in RESAMPLERS:
        raise ConfigError(f"resampling is {', '.join(RESAMPLERS)}, and not {scheme!r}")
    return RESAMPLERS[scheme](weights, size)


def _multinomial(weights: Sequence[Number], size: int) -> Program:
    return _draws(size, [Finite(range(len(weights)), shares(weights))] * size)


def _systematic(weights: Sequence[Number], size: int) -> Program:
    return Sample(Systematic(weights, size))


def _stratified(weights: Sequence[Number], size: int) -> Program:
    return _draws(size, [Stratum(weights, size, index) for index in range(size)])


def _residual(weights: Sequence[Number], size: int) -> Program:
    expected = [share * size for share in shares(weights)]
    whole = [math.floor(count) for count in expected]
    sure = tuple(index for index, count in enumerate(whole) for _ in range(count))
    if len(sure) >= size:
        return Ret(sure[:size])
    left = [count - one for count, one in zip(expected, whole, strict=True)]
    more = _draws(size - len(sure), [Finite(range(len(left)), shares(left))] * (size - len(sure)))
    return Bound(more, lambda found: Ret(sure + found))


def _draws(size: int, laws: Sequence[Any]) -> Program:
    @program
    def draws() -> Any:
        found = []
        for law in laws:
            found.append((yield sample(law)))
        return tuple(found)

    return draws()


RESAMPLERS: dict[str, Callable[[Sequence[Number], int], Program]] = {
    "multinomial": _multinomial,
    "systematic": _systematic,
    "stratified": _stratified,
    "residual": _residual,
}


def resample(
    value: Represented | None = None,
    *,
    scheme: str = "multinomial",
    size: int | None = None,
    ess_threshold: float = 1.0,
) -> Any:
    """Particles drawn by their weights, each with an equal share of the total; without a value, that transformation.

    size: how many, as many as before by default. ess_threshold: only where the effective size (sum w)^2 / sum w^2 is
    at most this share of the number. Raises ConfigError for an unknown scheme or size.
    """
    if size is not None and size < 1:
        raise ConfigError(f"size is a number of particles, 1 or more, and is {size}")
    if not 0.0 < ess_threshold <= 1.0:
        raise ConfigError(f"ess_threshold is a share of the particles, in (0, 1], and is {ess_threshold}")
    if scheme not in RESAMPLERS:
        raise ConfigError(f"resampling is {', '.join(RESAMPLERS)}, and not {scheme!r}")
    if value is None:
        return functools.partial(resample, scheme=scheme, size=size, ess_threshold=ess_threshold)
    population = _expect(value, Population, "resample")
    inner = population.inner

    def onward(pairs: Any) -> Any:
        weights = [weight for weight, _ in pairs]
        count, mass = size or len(pairs), total(weights)
        if mass == 0 or (size is None and _effective(weights) > ess_threshold * len(pairs)):
            return inner.of(Ret(pairs))
        drawn = inner.of(ancestors(weights, count, scheme))
        return inner.map(drawn, lambda found: tuple((mass * Fraction(1, count), pairs[index][1]) for index in found))

    return Represented(population, inner.chain(value.value, onward))


def _effective(weights: Sequence[Number]) -> float:
    share = shares(weights)
    return float(1 / sum(one * one for one in share)) * (1.0 - 1e-12)


def collapse(value: Represented) -> Represented:
    """One particle drawn by the weights, with their sum as its weight: Population(T) to Weighted(T)."""
    population = _expect(value, Population, "collapse")
    inner = population.inner

    def onward(pairs: Any) -> Any:
        weights = [weight for weight, _ in pairs]
        mass = total(weights)
        if mass == 0:
            return inner.of(Ret((mass, pairs[0][1])))
        drawn = inner.of(ancestors(weights, 1, "multinomial"))
        return inner.map(drawn, lambda found: (mass, pairs[found[0]][1]))

    return Represented(Weighted(inner), inner.chain(value.value, onward))


def evidence(value: Represented) -> Represented:
    """The sum of the weights, an unbiased estimate of the mass: Population(T) to T, or Weighted(T) to T."""
    if isinstance(value.representation, Weighted):
        inner = value.representation.inner
        return Represented(inner, inner.map(value.value, lambda pair: pair[0]))
    inner = _expect(value, Population, "evidence").inner
    return Represented(inner, inner.map(value.value, lambda pairs: total([weight for weight, _ in pairs])))


def extract_evidence(value: Represented) -> Represented:
    """Weights that sum to one, and their old sum as a weight of the whole: Population(T) to Population(Weighted(T))."""
    inner = _expect(value, Population, "extract_evidence").inner
    return Represented(Population(Weighted(inner)), inner.map(value.value, _divided))


def push_evidence(value: Represented) -> Represented:
    """The same, with the old sum as a factor of T, which has one: Population(T) to Population(T)."""
    population = _expect(value, Population, "push_evidence")
    inner = population.inner
    if not hasattr(inner, "inner"):
        name = type(inner).__name__
        raise ConfigError(f"push_evidence needs a representation with factors below, and {name} is a base")

    def onward(pairs: Any) -> Program:
        mass, divided = _divided(pairs)
        return Factor(mass, lambda _: Ret(divided))

    return Represented(population, inner.bind(value.value, onward))


def _divided(pairs: Any) -> tuple[Any, Any]:
    mass = total([weight for weight, _ in pairs])
    if mass == 0:
        return mass, tuple((Fraction(1, len(pairs)), x) for _, x in pairs)
    return mass, tuple((weight / mass, x) for weight, x in pairs)


def self_normalised(value: Represented) -> Represented:
    """Weights that sum to one, their sum forgotten. NOT valid: estimates are biased at finite size, and no evidence."""
    population = _expect(value, Population, "self_normalised")
    return Represented(population, population.inner.map(value.value, lambda pairs: _divided(pairs)[1]))


def flatten(value: Represented) -> Represented:
    """A population of populations as one, weights multiplied: Population(Population(T)) to Population(T)."""
    inner = _expect(value, Population, "flatten").inner
    if not isinstance(inner, Population):
        raise ConfigError(f"flatten takes a population of populations, and this is one of {type(inner).__name__}")

    def product(outer: Any) -> Any:
        return tuple((share * weight, x) for share, pairs in outer for weight, x in pairs)

    return Represented(inner, inner.inner.map(value.value, product))


def apply_weight(value: Represented) -> Represented:
    """The weight as a factor of T, which has one: Weighted(T) to T."""
    inner = _expect(value, Weighted, "apply_weight").inner
    if not hasattr(inner, "inner"):
        raise ConfigError(f"apply_weight needs a representation with factors below: {type(inner).__name__} is a base")
    return Represented(inner, inner.bind(value.value, lambda pair: Factor(pair[0], lambda _: Ret(pair[1]))))


# --- suspended and traced ---


def advance(value: Represented) -> Represented:
    """Every run up to its next checkpoint."""
    suspended = _expect(value, Suspended, "advance")
    return Represented(suspended, suspended.inner.bind(value.value, to_checkpoint))


def finish(value: Represented) -> Represented:
    """Every run to its end: Suspended(T) to T."""
    suspended = _expect(value, Suspended, "finish")
    return Represented(suspended.inner, suspended.inner.bind(value.value, to_end))


def hoist(transformation: Transformation) -> Transformation:
    """A transformation of T as one of Suspended(T) or Traced(T), at the place where it now stands."""

    def hoisted(value: Represented) -> Represented:
        outer = value.representation
        if not isinstance(outer, (Suspended, Traced)):
            raise ConfigError(f"hoist takes a Suspended or a Traced, and this is a {type(outer).__name__}")
        changed = transformation(Represented(outer.inner, value.value))
        return Represented(type(outer)(changed.representation), changed.value)

    return hoisted


def marginal(value: Represented) -> Represented:
    """The values without their traces: Traced(T) to T."""
    inner = _expect(value, Traced, "marginal").inner
    return Represented(inner, inner.map(value.value, lambda pair: pair[1].value))


def freeze(value: Represented) -> Represented:
    """Choices so far as constants: later moves change only what is drawn after them."""
    traced = _expect(value, Traced, "freeze")
    inner = traced.inner
    return Represented(traced, inner.map(value.value, lambda pair: (Ret(pair[1].value), _fixed(pair[1]))))


def _fixed(trace: Trace) -> Trace:
    return Trace((), trace.value, Fraction(1))


def mh_step(
    value: Represented | None = None,
    *,
    sites: str | Sequence[Sequence[int]] = "one",
    drift: float | None = None,
    accept: Callable[[Trace, Trace], Fraction] | None = None,
) -> Any:
    """A Metropolis-Hastings move of every trace; without a value, that transformation.

    sites: "one", drawn evenly; "all"; or blocks, lists of places of which one is drawn evenly. drift: the standard
    deviation of a step of the uniform numbers, reflected at 0 and 1, instead of new ones; it is not enumerated.
    accept: another probability of going from one trace to another, at the user's risk.
    """
    if value is None:
        return functools.partial(mh_step, sites=sites, drift=drift, accept=accept)
    traced = _expect(value, Traced, "mh_step")
    inner = traced.inner

    known: dict[Any, Any] | None = {} if isinstance(traced.base, Enum) else None  # the same traces come again and again

    def onward(pair: Any) -> Any:
        if known is not None and pair in known:
            return known[pair]
        model, trace = pair
        moved = traced.base.of(propose(model, trace, sites=sites, drift=drift, accept=accept))
        law = inner.map(inner.lift(moved), lambda found: (model, found))
        if known is not None:
            known[pair] = law
        return law

    return Represented(traced, inner.chain(value.value, onward))


@program
def propose(
    model: Program,
    trace: Trace,
    *,
    sites: Any = "one",
    drift: float | None = None,
    accept: Callable[[Trace, Trace], Fraction] | None = None,
) -> Any:
    """The program of one move of a trace of the model, which returns the trace after it."""
    length = len(trace.choices)
    if not length:
        return trace
    moved = yield _places(length, sites)
    choices = list(trace.choices)
    for place in moved:
        choices[place] = yield _moved(choices[place], drift)
    found = yield Recorded(model, tuple(choices), silent=True)
    ratio = accept(trace, found) if accept else acceptance(trace, found, single=sites == "one")
    accepted = yield sample(bernoulli(ratio))
    return found if accepted else trace


def acceptance(trace: Trace, found: Trace, *, single: bool = True) -> Fraction:
    """min(1, p' m / (p m')); from a trace of density zero, 1 to any that has another; without m unless single."""
    if trace.density == 0:
        return Fraction(1) if found.density != 0 else Fraction(0)
    lengths = Fraction(len(trace.choices), max(len(found.choices), 1)) if single else Fraction(1)
    ratio = found.density * lengths / trace.density
    if isinstance(ratio, Fraction):
        return min(Fraction(1), ratio)
    return Fraction(math.exp(min(0.0, log_of(ratio))))


def _places(length: int, sites: Any) -> Program:
    if sites == "all":
        return Ret(tuple(range(length)))
    if sites == "one":
        return Bound(sample(uniform_integer(length)), lambda place: Ret((place,)))
    if isinstance(sites, str) or not sites:
        raise ConfigError(f"sites is 'one', 'all' or blocks of places, and not {sites!r}")
    blocks = tuple(tuple(block) for block in sites)
    chosen = sample(uniform_integer(len(blocks)))
    return Bound(chosen, lambda block: Ret(tuple(place for place in blocks[block] if place < length)))


def _moved(u: Any, drift: float | None) -> Program:
    if drift is None:
        return sample(Unit())
    if not drift > 0.0:
        raise ConfigError(f"drift is a standard deviation, above 0, and is {drift}")
    import torch

    step = sample(Quantile(torch.distributions.Normal(0.0, drift)))
    return Bound(step, lambda z: Ret(_reflected(u + z)))


def _reflected(u: float) -> float:
    u = u % 2.0
    return min(2.0 - u if u >= 1.0 else u, 1.0 - 2.0**-53)
