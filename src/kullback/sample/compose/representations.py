"""Representations of measures, stacked on a source of randomness; each knows the measure that its values stand for.

Bases:         Sam         a program that only samples; run it with uniform numbers, or list its outcomes
               Enum        a finite list of (value, weight), exactly, equal values merged
On any T:      Weighted(T) T of (weight, value)                                  meaning E sum over draws of w delta_x
               Population(T) T of ((w_1, x_1), ..., (w_n, x_n))                  meaning E sum_i w_i delta_(x_i)
On the last:   Suspended(T) T of Done(value) or Paused(rest): stopped at a checkpoint
               Traced(T)   T of (program, Trace): with the uniform numbers behind each value, to be run again

`of(program)` interprets a program, `bind(value, then)` goes on with programs then(x), both without a change of meaning:
`of` is a monad morphism. `Represented` pairs a value with its representation, which transformations take and return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

from kullback.core.errors import ConfigError, DataError
from kullback.sample.compose.laws import Finite
from kullback.sample.compose.programs import (
    Bound,
    Done,
    Factor,
    Kept,
    Lift,
    Operation,
    Paused,
    Program,
    Recorded,
    Ret,
    Sample,
    Spawn,
    ToCheckpoint,
    Viewed,
    after,
)
from kullback.sample.compose.weights import LogWeight, Number, log_of

__all__ = [
    "Enum", "Population", "Representation", "Represented", "Sam", "Suspended", "Traced", "Weighted", "to_checkpoint",
    "to_end",
]  # fmt: skip

Outcomes = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Represented:
    """A value with its representation."""

    representation: Representation
    value: Any

    def bind(self, then: Callable[[Any], Program]) -> Represented:
        """Go on with a program for each result."""
        return Represented(self.representation, self.representation.bind(self.value, then))

    def meaning(self) -> dict[Any, Any]:
        """The measure that it stands for, by listing all outcomes: a value to its weight, zeros left out."""
        return gathered(self.representation.integrate(self.value))


def gathered(outcomes: Outcomes) -> dict[Any, Any]:
    """Outcomes as a dictionary, equal values added up and zeros left out."""
    found: dict[Any, Any] = {}
    for value, weight in outcomes:
        found[value] = found[value] + weight if value in found else weight
    return {value: weight for value, weight in found.items() if weight != 0}


@dataclass(frozen=True)
class Representation:
    """What all have; those that carry others also have `inner`."""

    @property
    def base(self) -> Representation:
        """The source of randomness at the bottom."""
        return self

    def prepare(self, program: Program) -> Program:
        """The program in the form that suits the base: exact, or with weights as logarithms."""
        return self.base.prepare(program)

    def of(self, program: Program) -> Any:
        """Interpret a program."""
        raise NotImplementedError

    def bind(self, value: Any, then: Callable[[Any], Program]) -> Any:
        """Go on with a program for each result."""
        return self.chain(value, lambda x: self.of(then(x)))

    def chain(self, value: Any, then: Callable[[Any], Any]) -> Any:
        """Go on with a value of this representation for each result."""
        raise NotImplementedError

    def map(self, value: Any, function: Callable[[Any], Any]) -> Any:
        """The image under a function."""
        return self.bind(value, lambda x: Ret(function(x)))

    def lift(self, value: Any) -> Any:
        """A value of the base in this representation."""
        return value

    def each(self, makers: Sequence[Callable[[], Any]]) -> Any:
        """The tuple of the results of independent values, one after another."""
        done = self.of(Ret(()))
        for make in makers:
            done = self.chain(done, self._joined(make))
        return done

    def _joined(self, make: Callable[[], Any]) -> Callable[[Any], Any]:
        return lambda found: self.map(make(), lambda x: (*found, x))

    def integrate(self, value: Any) -> Outcomes:
        """All outcomes with their weights."""
        raise NotImplementedError


# --- bases ---


@dataclass(frozen=True)
class _Each(Program):
    """Programs one after another, returning the tuple of their results; `found` is a chain of pairs, the last first."""

    current: Program | None
    waiting: Sequence[Callable[[], Program]]
    at: int = 0
    found: Any = None

    def head(self) -> Ret | Operation:
        current, at, found = self.current, self.at, self.found
        while True:
            if current is None:
                if at == len(self.waiting):
                    return Ret(_unchained(found))
                current, at = self.waiting[at](), at + 1
            first = current.head()
            if not isinstance(first, Ret):
                return replace(first, then=after(first.then, self._at(at, found)))
            found, current = (found, first.value), None


    def _at(self, at: int, found: Any) -> Callable[[Program], Program]:
        return lambda current: _Each(current, self.waiting, at, found)


def _unchained(pairs: Any) -> tuple[Any, ...]:
    values = []
    while pairs is not None:
        pairs, value = pairs
        values.append(value)
    return tuple(reversed(values))


@dataclass(frozen=True)
class Sam(Representation):
    """Programs that only sample. `draw` runs one."""

    def prepare(self, program: Program) -> Program:
        return Viewed(program, _logarithmic)

    def of(self, program: Program) -> Program:
        return _OnlySamples(program, self)

    def chain(self, value: Program, then: Callable[[Any], Program]) -> Program:
        return Bound(value, then)

    def map(self, value: Program, function: Callable[[Any], Any]) -> Program:
        return Bound(value, lambda x: Ret(function(x)))

    def each(self, makers: Sequence[Callable[[], Program]]) -> Program:
        return _Each(None, makers)

    def integrate(self, value: Program) -> Outcomes:
        return list(Enum().of(value))

    def draw(self, value: Program, uniform: Callable[[], float]) -> Any:
        """Run it, with a new uniform number for each draw."""
        waiting: list[Callable[[Any], Program]] = []
        while True:
            while isinstance(value, Bound):
                waiting.append(value.then)
                value = value.inner
            first = value.head()
            if not isinstance(first, Ret):
                value = first.then(first.argument.icdf(uniform()))
            elif waiting:
                value = waiting.pop()(first.value)
            else:
                return first.value


def _logarithmic(operation: Operation) -> Operation:
    if isinstance(operation, Factor):
        return replace(operation, argument=LogWeight(log_of(operation.argument)))
    return operation


@dataclass(frozen=True)
class _OnlySamples(Program):
    inner: Program
    base: Sam

    def head(self) -> Ret | Operation:
        inner = self.inner
        while True:
            first = inner.head()
            if isinstance(first, Ret):
                return first
            onward = after(first.then, self._rest)
            if isinstance(first, Sample):
                return replace(first, then=onward)
            if isinstance(first, Lift):
                return Bound(first.argument(self.base), onward).head()
            if isinstance(first, Factor):
                raise ConfigError("Sam samples and has no factor: represent the program as Weighted(Sam())")
            inner = first.then(None)

    def _rest(self, inner: Program) -> Program:
        return _OnlySamples(inner, self.base)


@dataclass(frozen=True)
class Enum(Representation):
    """Exact enumeration. grid: how many points stand for a uniform number; limit: of outcomes at any place.

    A traced program draws by uniform numbers: its finite laws are kept by a grid that all their cumulative
    probabilities are multiples of.
    """

    grid: int | None = None
    limit: int = 10**6

    def prepare(self, program: Program) -> Program:
        return Kept(program)

    def on_the_grid(self, operation: Operation) -> Operation:
        """Refuse finite laws that a trace of grid points would change."""
        law = operation.argument
        if self.grid is None or not isinstance(operation, Sample) or not isinstance(law, Finite):
            return operation
        if any((Fraction(end) * self.grid).denominator != 1 for end in law.cumulative):
            raise ConfigError(f"a grid of {self.grid} points does not resolve {law!r}: take a common denominator")
        return operation

    def _merged(self, outcomes: Any) -> tuple[tuple[Any, Any], ...]:
        found: dict[Any, Any] = {}
        loose: Outcomes = []
        for value, weight in outcomes:
            try:
                known = found.get(value)  # hashing rationals takes long
                found[value] = weight if known is None else known + weight
            except TypeError:  # not hashable
                loose.append((value, weight))
            if len(found) + len(loose) > self.limit:
                raise DataError(f"more than {self.limit} outcomes: make the program smaller, or bound its loops")
        return (*found.items(), *loose)

    def of(self, program: Program) -> Any:
        """Depth first, without recursion: an endless program meets the limit."""
        return self._merged(self._walk(program))

    def _walk(self, program: Program) -> Any:
        stack: list[tuple[Program, Any]] = [(program, Fraction(1))]
        steps = 0
        while stack:
            now, weight = stack.pop()
            first = now.head()
            steps += 1
            if steps > 50 * self.limit:
                raise DataError(f"more than {self.limit} outcomes: make the program smaller, or bound its loops")
            if isinstance(first, Ret):
                yield first.value, weight
            elif isinstance(first, Factor):
                if first.argument != 0:
                    stack.append((first.then(None), weight * first.argument))
            elif isinstance(first, (Sample, Lift)):
                law = isinstance(first, Sample)
                outcomes = first.argument.outcomes(self.grid) if law else first.argument(self)
                if len(stack) + len(outcomes) > self.limit:
                    raise DataError(f"more than {self.limit} outcomes: make the program smaller, or bound its loops")
                stack.extend((first.then(value), weight * p) for value, p in reversed(outcomes))
            else:
                stack.append((first.then(None), weight))

    def chain(self, value: Any, then: Callable[[Any], Any]) -> Any:
        return self._merged((y, p * q) for x, p in value for y, q in then(x))

    def map(self, value: Any, function: Callable[[Any], Any]) -> Any:
        return self._merged((function(x), p) for x, p in value)

    def integrate(self, value: Any) -> Outcomes:
        return list(value)


# --- on a base, or on one another ---


@dataclass(frozen=True)
class _Carried(Representation):
    inner: Representation

    @property
    def base(self) -> Representation:
        return self.inner.base

    def one(self, weight: Number, value: Any) -> Any:
        """A single weighted value."""
        raise NotImplementedError

    def copies(self, count: int, make: Callable[[Fraction], Any]) -> Any:
        """What `spawn` stands for."""
        return make(Fraction(1))

    def lift(self, value: Any) -> Any:
        return self._from(self.inner.lift(value))

    def _from(self, value: Any) -> Any:
        """A value of `inner`, with weight one."""
        raise NotImplementedError

    def _on(self, onward: Callable[[Any], Program], weight: Any) -> Callable[..., Any]:
        return lambda answer, share=Fraction(1): self.of(onward(answer), weight * share)

    def of(self, program: Program, weight: Any = Fraction(1)) -> Any:
        while True:
            first = program.head()
            if isinstance(first, Ret):
                return self.inner.of(Ret(self.one(weight, first.value)))
            onward = first.then
            if isinstance(first, (Sample, Lift)):
                drawn = self.inner.of(replace(first, then=Ret))
                return self.inner.chain(drawn, self._on(onward, weight))
            if isinstance(first, Spawn):
                return self.copies(first.argument, partial(self._on(onward, weight), None))
            if isinstance(first, Factor):
                weight = weight * first.argument
            program = onward(None)


@dataclass(frozen=True)
class Weighted(_Carried):
    """T of (weight, value)."""

    def one(self, weight: Number, value: Any) -> Any:
        return weight, value

    def _from(self, value: Any) -> Any:
        return self.inner.map(value, lambda x: (Fraction(1), x))

    def chain(self, value: Any, then: Callable[[Any], Any]) -> Any:
        def onward(pair: tuple[Any, Any]) -> Any:
            return self.inner.map(then(pair[1]), lambda other: (pair[0] * other[0], other[1]))

        return self.inner.chain(value, onward)

    def bind(self, value: Any, then: Callable[[Any], Program]) -> Any:
        return self.inner.chain(value, lambda pair: self.of(then(pair[1]), pair[0]))

    def map(self, value: Any, function: Callable[[Any], Any]) -> Any:
        return self.inner.map(value, lambda pair: (pair[0], function(pair[1])))

    def integrate(self, value: Any) -> Outcomes:
        return [(x, p * weight) for (weight, x), p in self.inner.integrate(value)]


@dataclass(frozen=True)
class Population(_Carried):
    """T of weighted particles; their weights do not sum to one, but to an unbiased estimate of the whole mass."""

    def one(self, weight: Number, value: Any) -> Any:
        return ((weight, value),)

    def copies(self, count: int, make: Callable[[Fraction], Any]) -> Any:
        parts = self.inner.each([lambda: make(Fraction(1, count))] * count)
        return self.inner.map(parts, lambda found: tuple(pair for part in found for pair in part))

    def _from(self, value: Any) -> Any:
        return self.inner.map(value, lambda x: ((Fraction(1), x),))

    def chain(self, value: Any, then: Callable[[Any], Any]) -> Any:
        def onward(pairs: Any) -> Any:
            parts = self.inner.each([partial(then, x) for _, x in pairs])
            return self.inner.map(parts, lambda found: tuple(_scaled(pairs, found)))

        return self.inner.chain(value, onward)

    def bind(self, value: Any, then: Callable[[Any], Program]) -> Any:
        def onward(pairs: Any) -> Any:
            parts = self.inner.each([partial(self._bound, then, weight, x) for weight, x in pairs])
            return self.inner.map(parts, lambda found: tuple(pair for part in found for pair in part))

        return self.inner.chain(value, onward)

    def _bound(self, then: Callable[[Any], Program], weight: Any, x: Any) -> Any:
        return self.of(then(x), weight)

    def map(self, value: Any, function: Callable[[Any], Any]) -> Any:
        return self.inner.map(value, lambda pairs: tuple((weight, function(x)) for weight, x in pairs))

    def integrate(self, value: Any) -> Outcomes:
        return [(x, p * weight) for pairs, p in self.inner.integrate(value) for weight, x in pairs]


def _scaled(pairs: Any, parts: Any) -> Any:
    for (weight, _), part in zip(pairs, parts, strict=True):
        for other, y in part:
            yield weight * other, y


@dataclass(frozen=True)
class Suspended(Representation):
    """T of runs that are done or wait at a checkpoint."""

    inner: Representation

    @property
    def base(self) -> Representation:
        return self.inner.base

    def of(self, program: Program) -> Any:
        return self.inner.of(ToCheckpoint(program))

    def bind(self, value: Any, then: Callable[[Any], Program]) -> Any:
        def onward(state: Done | Paused) -> Program:
            if isinstance(state, Done):
                return ToCheckpoint(then(state.value))
            return Ret(Paused(Bound(state.rest, then)))

        return self.inner.bind(value, onward)

    def integrate(self, value: Any) -> Outcomes:
        return self.inner.integrate(self.inner.bind(value, to_end))


def to_end(state: Done | Paused) -> Program:
    """What is left of a run."""
    return Ret(state.value) if isinstance(state, Done) else state.rest


def to_checkpoint(state: Done | Paused) -> Program:
    """A run up to its next checkpoint; one that is done stays."""
    return Ret(state) if isinstance(state, Done) else ToCheckpoint(state.rest)


@dataclass(frozen=True)
class Traced(Representation):
    """T of (program, Trace): the program gives that trace's value again when run on its choices."""

    inner: Representation

    @property
    def base(self) -> Representation:
        return self.inner.base

    def of(self, program: Program) -> Any:
        checked = _checked(program, self.base)
        return self.inner.map(self.inner.of(Recorded(checked)), lambda trace: (checked, trace))

    def bind(self, value: Any, then: Callable[[Any], Program]) -> Any:
        go_on = _Checked(then, self.base)

        def onward(pair: Any) -> Program:
            program, trace = pair
            follows = Recorded(go_on(trace.value), choices=trace.choices, density=trace.density)
            return Bound(follows, lambda longer: Ret((Bound(program, go_on), longer)))

        return self.inner.bind(value, onward)

    def integrate(self, value: Any) -> Outcomes:
        return self.inner.integrate(self.inner.map(value, lambda pair: pair[1].value))


def _checked(program: Program, base: Representation) -> Program:
    return Viewed(program, base.on_the_grid) if isinstance(base, Enum) and base.grid is not None else program


@dataclass(frozen=True)
class _Checked:
    """A continuation that is equal to another of the same, so that traces of the same program are."""

    then: Callable[[Any], Program]
    base: Representation

    def __call__(self, x: Any) -> Program:
        return _checked(self.then(x), self.base)
