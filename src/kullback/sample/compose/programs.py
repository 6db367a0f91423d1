"""Probabilistic programs as data: return a value, or do one operation and go on with its answer.

    Program X = Ret X | Sample law (x -> Program X) | Factor weight (-> ...) | Yield (-> ...) | Spawn n (-> ...) | Lift

Its meaning is an unnormalised measure on results: `sample` contributes a law, `factor` multiplies by a weight, and
`bind` integrates. `yield_` marks a checkpoint and `spawn` asks for copies; neither changes the meaning. A function with
`@program` writes one as plain Python, each `yield` of a program handing back its result; continuations can be entered
many times, for which the function is run again on the answers that it had, so that it must be deterministic.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from kullback.core.errors import ConfigError
from kullback.sample.compose.laws import Law, Unit, as_law
from kullback.sample.compose.weights import LogWeight, as_weight

__all__ = [
    "Factor", "Lift", "Operation", "Program", "Ret", "Sample", "Spawn", "Yield",
    "bind", "factor", "prim", "program", "sample", "spawn", "yield_",
]  # fmt: skip

Then = Callable[[Any], "Program"]


class Program:
    """A probabilistic program; make one with `@program`, or by `bind` and `>>`."""

    def head(self) -> Ret | Operation:
        """Its result, or the operation that it does first."""
        raise ConfigError("a program is a result or an operation: make one with @program")

    def bind(self, then: Then) -> Program:
        """Go on with then(result)."""
        return Bound(self, then)

    def __rshift__(self, other: Program) -> Program:
        return Bound(self, _Always(other))


@dataclass(frozen=True)
class Ret(Program):
    """The program that returns a value."""

    value: Any

    def head(self) -> Ret:
        return self


@dataclass(frozen=True, eq=False)
class Operation(Program):
    """An operation with its argument, and how to go on with its answer."""

    argument: Any
    then: Then = Ret

    def head(self) -> Operation:
        return self


class Sample(Operation):
    """Draw from a law."""


class Factor(Operation):
    """Multiply the measure by a weight."""


class Yield(Operation):
    """A checkpoint."""


class Spawn(Operation):
    """So many copies, of one n-th of the weight each."""


class Lift(Operation):
    """A computation of the random source alone, made by argument(base), whose draws no trace records."""


@dataclass(frozen=True)
class _Always:
    program: Program

    def __call__(self, _: Any) -> Program:
        return self.program


@dataclass(frozen=True)
class Bound(Program):
    """inner, and then then(its result)."""

    inner: Program
    then: Then

    def head(self) -> Ret | Operation:
        first = self.inner.head()
        if isinstance(first, Ret):
            return self.then(first.value).head()
        then = self.then
        return replace(first, then=after(first.then, lambda rest: Bound(rest, then)))


def after(onward: Then, change: Callable[[Program], Program]) -> Then:
    """Go on, with what follows changed."""
    return lambda answer: change(onward(answer))


def bind(first: Program, then: Then) -> Program:
    """first, and then then(its result): integration of the one measure against the other."""
    return Bound(first, then)


def sample(law: Any) -> Program:
    """Draw from a law: of `laws`, or a torch distribution that is finite or has an icdf."""
    return Sample(as_law(law))


def factor(weight: Any = None, *, log: float | None = None) -> Program:
    """Multiply by a weight of 0 or more, taken exactly; or by e^log. Raises DataError for weights below 0 and NaN."""
    if (weight is None) == (log is None):
        raise ConfigError("a factor is one weight: give either the weight or its logarithm")
    return Factor(as_weight(weight) if log is None else LogWeight(log))


def yield_() -> Program:
    """A checkpoint, where particles wait for one another."""
    return Yield(None)


def spawn(copies: int) -> Program:
    """So many copies of what follows, in a population; elsewhere nothing."""
    if copies < 1:
        raise ConfigError(f"spawn makes 1 copy or more, and was asked for {copies}")
    return Spawn(copies)


def prim(make: Callable[[Any], Any]) -> Program:
    """A computation of the base representation, make(base), as a single step that no trace records."""
    return Lift(make)


# --- plain Python as programs ---


@dataclass(frozen=True, eq=False)
class _Do(Program):
    function: Callable[..., Generator[Program, Any, Any]]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def head(self) -> Ret | Operation:
        return _run_on(self, self.function(*self.arguments, **self.options), (), None)

    def again(self, answers: tuple[Any, ...]) -> Generator[Program, Any, Any]:
        """A generator that has been given these answers and waits for one more."""
        fresh = self.function(*self.arguments, **self.options)
        for answer in (None, *answers):
            fresh.send(answer)
        return fresh


def _run_on(code: _Do, live: Generator[Program, Any, Any], answers: tuple[Any, ...], answer: Any) -> Ret | Operation:
    """Send an answer and go on to the next operation; `answers`: those that a generator needs to be where it is now."""
    while True:
        try:
            asked = live.send(answer)
        except StopIteration as stop:
            return Ret(stop.value)
        if not isinstance(asked, Program):
            raise ConfigError(f"a program yields programs, such as sample(...), and {code.function.__name__} {asked!r}")
        first = asked.head()
        if not isinstance(first, Ret):
            return Bound(first, _Resume(code, answers, [live])).head()
        answer = first.value
        answers = (*answers, answer)


@dataclass(frozen=True, eq=False)
class _Resume:
    """Go on in a generator: the first time in the live one, later in one that was brought to the same place."""

    code: _Do
    answers: tuple[Any, ...]
    live: list[Generator[Program, Any, Any]]

    def __call__(self, answer: Any) -> Program:
        source = self.live.pop() if self.live else self.code.again(self.answers)
        return _run_on(self.code, source, (*self.answers, answer), answer)


def program(function: Callable[..., Generator[Program, Any, Any]]) -> Callable[..., Program]:
    """Make a generator function one that returns programs.

    >>> @program
    ... def coin():
    ...     heads = yield sample(bernoulli(0.5))
    ...     yield factor(3 if heads else 1)
    ...     return heads
    >>> from kullback.sample.compose import bernoulli, meaning
    >>> meaning(coin())
    {False: Fraction(1, 2), True: Fraction(3, 2)}
    """
    if not inspect.isgeneratorfunction(function):
        raise ConfigError(f"{function.__name__} has no yield: a program yields sample(...), factor(...) and the like")

    @functools.wraps(function)
    def make(*arguments: Any, **options: Any) -> Program:
        return _Do(function, arguments, options)

    return make


# --- one program out of another ---


@dataclass(frozen=True)
class Done:
    """A run that has come to its end."""

    value: Any


@dataclass(frozen=True)
class Paused:
    """A run that waits at a checkpoint."""

    rest: Program


@dataclass(frozen=True)
class ToCheckpoint(Program):
    """The program up to its next checkpoint, returning Done or Paused."""

    inner: Program

    def head(self) -> Ret | Operation:
        first = self.inner.head()
        if isinstance(first, Ret):
            return Ret(Done(first.value))
        if isinstance(first, Yield):
            return Ret(Paused(first.then(None)))
        return replace(first, then=after(first.then, ToCheckpoint))


@dataclass(frozen=True)
class Trace:
    """Uniform numbers behind a run, its result, and the product of its factors."""

    choices: tuple[Any, ...]
    value: Any
    density: Any

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:  # of rationals it is slow, and asked for often
            found = hash((self.choices, self.value, self.density))
            object.__setattr__(self, "_hash", found)
        return found


@dataclass(frozen=True)
class Recorded(Program):
    """The program with every draw by a uniform number, returning a Trace.

    given: choices that are taken in order instead of drawn, for as long as there are some. silent: factors only count
    in the trace's density, copies and checkpoints are passed over.
    """

    inner: Program
    given: tuple[Any, ...] = ()
    silent: bool = False
    choices: tuple[Any, ...] = ()
    density: Any = field(default=Fraction(1))

    def head(self) -> Ret | Operation:
        inner, choices, density = self.inner, self.choices, self.density
        while True:
            first = inner.head()
            if isinstance(first, Ret):
                return Ret(Trace(choices, first.value, density))
            onward = first.then
            if isinstance(first, Sample) and len(choices) < len(self.given):
                u = self.given[len(choices)]
                choices, inner = (*choices, u), onward(first.argument.icdf(u))
            elif isinstance(first, Factor):
                density = density * first.argument
                if not self.silent:
                    return replace(first, then=self._after(onward, choices, density))
                inner = onward(None)
            elif isinstance(first, Sample):
                law: Law = first.argument
                return Sample(_UNIT, self._drawn(onward, law, choices, density))
            elif self.silent and not isinstance(first, Lift):
                inner = onward(None)
            else:
                return replace(first, then=self._after(onward, choices, density))

    def _after(self, onward: Then, choices: tuple[Any, ...], density: Any) -> Then:
        return after(onward, lambda rest: replace(self, inner=rest, choices=choices, density=density))

    def _drawn(self, onward: Then, law: Law, choices: tuple[Any, ...], density: Any) -> Then:
        return lambda u: replace(self, inner=onward(law.icdf(u)), choices=(*choices, u), density=density)


_UNIT = Unit()


@dataclass(frozen=True)
class Viewed(Program):
    """The program with every operation changed by a function."""

    inner: Program
    change: Callable[[Operation], Operation]

    def head(self) -> Ret | Operation:
        first = self.inner.head()
        if isinstance(first, Ret):
            return first
        change = self.change
        return replace(change(first), then=after(first.then, lambda rest: Viewed(rest, change)))


class Kept(Program):
    """The program with its operations and continuations kept, so that equal runs end in the same objects."""

    def __init__(self, inner: Program) -> None:
        self._inner = inner
        self._head: Ret | Operation | None = None
        self._onward: dict[Any, Program] = {}

    def head(self) -> Ret | Operation:
        if self._head is None:
            first = self._inner.head()
            if isinstance(first, Lift):
                first = replace(first, argument=functools.cache(first.argument))
            self._head = first if isinstance(first, Ret) else replace(first, then=self._next(first.then))
        return self._head

    def _next(self, onward: Then) -> Then:
        def then(answer: Any) -> Program:
            try:
                if answer not in self._onward:
                    self._onward[answer] = Kept(onward(answer))
                return self._onward[answer]
            except TypeError:  # not hashable
                return Kept(onward(answer))

        return then
