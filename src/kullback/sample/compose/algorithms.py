"""Inference algorithms as compositions of pieces that keep the meaning of a program.

    importance n   = spawn n, then the program, as a population
    smc k n        = finish . (advance . hoist resample)^k . hoist (spawn n)          on Suspended(Population)
    mh n           = marginal . mh_step^n                                             on Traced(Weighted)
    rmsmc k n t    = marginal . finish . (advance . mh_step^t . resample)^k . spawn n on Suspended(Traced(Population))
    pmmh t         = mh t of (parameters; then the evidence of smc k n as a factor)
    smc2 k n p t   = rmsmc k p t of (parameters; then smc k n, its evidence a factor at each checkpoint)

`on(base, program)` of each builds it on a base: on Sam() it is a program to run, on Enum() its exact law.
Source: Scibior et al. 2018 (arXiv 1711.03219), and its companion library for the order of compositions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from kullback.core.errors import ConfigError, DataError
from kullback.sample.compose.laws import bernoulli
from kullback.sample.compose.programs import Kept, Paused, Program, Ret, factor, prim, program, sample, spawn, yield_
from kullback.sample.compose.representations import (
    Enum,
    Population,
    Representation,
    Represented,
    Suspended,
    Traced,
    Weighted,
)  # fmt: skip
from kullback.sample.compose.transformations import (
    Transformation,
    advance,
    collapse,
    compose,
    finish,
    freeze,
    hoist,
    marginal,
    mh_step,
    resample,
)  # fmt: skip
from kullback.sample.compose.weights import LogWeight, log_of, total

__all__ = ["MH", "PMMH", "RMSMC", "SMC", "SMC2", "Algorithm", "Importance", "Rejection", "Transformed"]


class Algorithm(Protocol):
    """What `validate` and `run` take."""

    def on(self, base: Representation, program: Program) -> Represented:
        """The algorithm for a program, on a source of randomness."""
        ...


def _positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < (0 if name in {"num_steps", "mh_steps"} else 1):
            raise ConfigError(f"{name} is a count, and {count} is too few")


@dataclass(frozen=True)
class Importance:
    """num_particles runs, weighted by their factors: a Population."""

    num_particles: int

    def __post_init__(self) -> None:
        _positive(num_particles=self.num_particles)

    def on(self, base: Representation, program: Program) -> Represented:
        population = Population(base)
        return Represented(population, population.of(spawn(self.num_particles) >> base.prepare(program)))


@dataclass(frozen=True)
class Rejection:
    """Runs until one is accepted with probability weight / bound: the base itself, with the normalised law.

    attempts: give up after so many, with the result None. Raises DataError for a weight above the bound.
    """

    bound: Any
    attempts: int | None = None

    def __post_init__(self) -> None:
        _positive(attempts=self.attempts)
        if not self.bound > 0:
            raise ConfigError(f"bound is the largest weight of a run, above 0, and is {self.bound}")

    def on(self, base: Representation, program: Program) -> Represented:
        weighted, prepared = Weighted(base), base.prepare(program)

        def attempt(left: int | None) -> Any:
            if left == 0:
                return base.of(Ret(None))

            def judged(pair: Any) -> Any:
                share = pair[0] / self.bound
                if share > 1:
                    raise DataError(f"a run has the weight {float(pair[0]):g}, above the bound {self.bound}: raise it")
                accepted = base.of(sample(bernoulli(share if not isinstance(share, LogWeight) else float(share))))
                more = None if left is None else left - 1
                return base.chain(accepted, lambda yes: base.of(Ret(pair[1])) if yes else attempt(more))

            return base.chain(weighted.of(prepared), judged)

        return Represented(base, attempt(self.attempts))


@dataclass(frozen=True)
class SMC:
    """A particle filter over the checkpoints of a program, as a Population.

    num_steps: checkpoints at which to resample, all of them when left out. See `resample` for scheme, ess_threshold.
    """

    num_particles: int
    num_steps: int | None = None
    resampler: str = "systematic"
    ess_threshold: float = 1.0

    def __post_init__(self) -> None:
        _positive(num_particles=self.num_particles, num_steps=self.num_steps)
        resample(scheme=self.resampler, ess_threshold=self.ess_threshold)

    def step(self) -> Transformation:
        """From one checkpoint to the next."""
        chosen = resample(scheme=self.resampler, ess_threshold=self.ess_threshold)
        return compose(advance, hoist(chosen))

    def on(self, base: Representation, program: Program) -> Represented:
        suspended = Suspended(Population(base))
        value = Represented(suspended, suspended.of(spawn(self.num_particles) >> base.prepare(program)))
        if self.num_steps is None:
            return finish(_to_the_last(self.step(), value))
        for _ in range(self.num_steps):
            value = self.step()(value)
        return finish(value)


def _to_the_last(step: Transformation, value: Represented) -> Represented:
    """The step again and again, until no particle waits."""
    base = value.representation.base

    def onward(pairs: Any) -> Any:
        if not any(isinstance(state, Paused) for _, state in pairs):
            return base.of(Ret(pairs))
        after = step(Represented(value.representation, base.of(Ret(pairs))))
        return base.chain(after.value, onward)

    return Represented(value.representation, base.chain(value.value, onward))


@dataclass(frozen=True)
class MH:
    """A Markov chain over traces from a draw of the prior, num_steps long, as Weighted: the weight is the prior draw's.

    sites, drift: see `mh_step`. init: where a chain that is drawn begins instead, such as `Chain.trace` of another: the
    uniform numbers of a run, or over tensors noise [T, sites] or [R, T, sites].
    """

    num_steps: int
    sites: Any = "one"
    drift: float | None = None
    accept: Callable[..., Any] | None = None
    init: Any = None

    def __post_init__(self) -> None:
        _positive(num_steps=self.num_steps)

    def start(self, base: Representation, program: Program) -> Program:
        """The program whose traces are moved."""
        return base.prepare(program)

    def on(self, base: Representation, program: Program) -> Represented:
        if self.init is not None:
            raise ConfigError("init is of a chain that is drawn, and this law begins at the prior: leave it out")
        return _chained(self, base, program, accept=self.accept)


def _chained(method: Any, base: Representation, program: Program, **options: Any) -> Represented:
    traced = Traced(Weighted(base))
    value = Represented(traced, traced.of(method.start(base, program)))
    for _ in range(method.num_steps):
        value = mh_step(value, sites=method.sites, drift=method.drift, **options)
    return marginal(value)


@dataclass(frozen=True)
class RMSMC:
    """A particle filter that moves each particle's trace mh_steps times after it resampled, as a Population.

    local: choices are frozen once they are moved, so that only the newest ones are.
    """

    num_particles: int
    num_steps: int
    mh_steps: int = 1
    resampler: str = "systematic"
    local: bool = False
    sites: Any = "one"
    drift: float | None = None

    def __post_init__(self) -> None:
        _positive(num_particles=self.num_particles, num_steps=self.num_steps, mh_steps=self.mh_steps)
        resample(scheme=self.resampler)

    def on(self, base: Representation, program: Program) -> Represented:
        suspended = Suspended(Traced(Population(base)))
        value = Represented(suspended, suspended.of(spawn(self.num_particles) >> base.prepare(program)))
        moves = [hoist(mh_step(sites=self.sites, drift=self.drift))] * self.mh_steps
        frozen = [hoist(freeze)] if self.local else []
        step = compose(advance, *frozen, *moves, hoist(hoist(resample(scheme=self.resampler))))
        for _ in range(self.num_steps):
            value = step(value)
        return marginal(finish(value))


@dataclass(frozen=True)
class PMMH:
    """A Markov chain over parameters, each judged by the evidence of a particle filter, as Weighted values (t, x).

    model: parameters to a program; the program given to `on` is the prior. x is a result of that filter.
    """

    model: Callable[[Any], Program]
    num_particles: int
    num_filter_steps: int | None = None
    num_steps: int = 1
    resampler: str = "systematic"
    sites: Any = "one"
    drift: float | None = None

    def __post_init__(self) -> None:
        _positive(num_particles=self.num_particles, num_steps=self.num_steps)
        resample(scheme=self.resampler)

    def start(self, base: Representation, program: Program) -> Program:
        """The prior, and then the evidence of a filter as a factor, whose draws no trace records."""
        inner = SMC(self.num_particles, self.num_filter_steps, self.resampler)
        judged = _judged_parameters(base.prepare(program), self.model, inner)
        return Kept(judged) if isinstance(base, Enum) else judged

    def on(self, base: Representation, program: Program) -> Represented:
        return _chained(self, base, program)


@program
def _judged_parameters(prior: Program, model: Callable[[Any], Program], inner: SMC) -> Any:
    parameters = yield prior
    weight, x = yield prim(lambda base: collapse(inner.on(base, model(parameters))).value)
    yield factor(weight)
    return parameters, x


@dataclass(frozen=True)
class SMC2:
    """A particle filter over parameters, each with a filter of its own over the model, as a Population of (t, x)."""

    model: Callable[[Any], Program]
    num_parameters: int
    num_particles: int
    num_steps: int
    mh_steps: int = 1
    resampler: str = "systematic"
    sites: Any = "one"
    drift: float | None = None

    def __post_init__(self) -> None:
        _positive(num_parameters=self.num_parameters, num_particles=self.num_particles)
        _positive(num_steps=self.num_steps, mh_steps=self.mh_steps)
        resample(scheme=self.resampler)

    def on(self, base: Representation, program: Program) -> Represented:
        inner = SMC(self.num_particles, self.num_steps, self.resampler)
        outer = RMSMC(
            self.num_parameters, self.num_steps, self.mh_steps, self.resampler, sites=self.sites, drift=self.drift
        )
        return outer.on(base, _filtered_parameters(program, self.model, inner))


@program
def _filtered_parameters(prior: Program, model: Callable[[Any], Program], inner: SMC) -> Any:
    """Parameters, and a filter whose evidence is a factor up to each of its checkpoints."""
    parameters = yield prior

    def started(base: Representation) -> Any:
        suspended = Suspended(Population(base))
        return suspended.of(spawn(inner.num_particles) >> base.prepare(model(parameters)))

    pairs = yield prim(started)
    for _ in range(inner.num_steps or 0):
        pairs = yield _settled(pairs)
        yield yield_()
        pairs = yield prim(partial(_as_suspended, inner.step(), pairs))
    weight, x = yield prim(partial(_as_suspended, compose(collapse, finish), pairs))
    yield factor(weight)
    return parameters, x


@program
def _settled(pairs: Any) -> Any:
    """The mass of a population as a factor, and its weights over it."""
    mass = total([weight for weight, _ in pairs])
    yield factor(mass)
    return pairs if log_of(mass) == float("-inf") else tuple((weight / mass, state) for weight, state in pairs)


def _as_suspended(step: Transformation, pairs: Any, base: Representation) -> Any:
    return step(Represented(Suspended(Population(base)), base.of(Ret(pairs)))).value


@dataclass(frozen=True)
class Transformed:
    """An algorithm, and then a transformation of what it gives: how a new piece is put to the test.

    on a `Suspended` or `Traced`, hoist the transformation to where it belongs.
    """

    algorithm: Algorithm
    transformation: Transformation

    def on(self, base: Representation, program: Program) -> Represented:
        return self.transformation(self.algorithm.on(base, program))
