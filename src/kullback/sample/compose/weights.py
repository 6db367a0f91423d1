"""Numbers that weights may be: exact rationals, or logarithms that neither overflow nor vanish.

Both obey the same arithmetic, so that an algorithm is written once and runs in exact enumeration as well as in long
products of densities. A rational times a `LogWeight` is a `LogWeight`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeAlias

from kullback.core.errors import DataError

__all__ = ["LogWeight", "Number", "as_weight", "log_of", "shares", "total"]


class LogWeight:
    """A number of 0 or more, kept as its logarithm in nats.

    >>> LogWeight(-1000.0) * 3 + LogWeight(-1000.0)
    LogWeight(-998.6137056388801)
    """

    __slots__ = ("log",)

    def __init__(self, log: float) -> None:
        if math.isnan(log) or log == math.inf:
            raise DataError(f"a log weight is a number below infinity, and this one is {log}: look at the densities")
        self.log = float(log)

    def __mul__(self, other: Number) -> LogWeight:
        return LogWeight(self.log + log_of(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Number) -> LogWeight:
        return LogWeight(self.log - log_of(other))

    def __rtruediv__(self, other: Number) -> LogWeight:
        return LogWeight(log_of(other) - self.log)

    def __add__(self, other: Number) -> LogWeight:
        high, low = sorted((self.log, log_of(other)), reverse=True)
        return self if high == -math.inf else LogWeight(high + math.log1p(math.exp(low - high)))

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (LogWeight, Fraction, int, float)) and self.log == log_of(other)

    def __hash__(self) -> int:
        return hash(self.log)

    def __lt__(self, other: Number) -> bool:
        return self.log < log_of(other)

    def __gt__(self, other: Number) -> bool:
        return self.log > log_of(other)

    def __float__(self) -> float:
        return math.exp(self.log)

    def __repr__(self) -> str:
        return f"LogWeight({self.log!r})"


Number: TypeAlias = "LogWeight | Fraction | int | float"


def log_of(number: Number) -> float:
    """The logarithm, -inf for zero."""
    if isinstance(number, LogWeight):
        return number.log
    if number <= 0:
        return -math.inf
    if isinstance(number, float):
        return math.log(number)
    return math.log(number.numerator) - math.log(number.denominator)


def as_weight(value: Any) -> Fraction | LogWeight:
    """A factor as an exact rational, floats included; a `LogWeight` stays one. Raises DataError below 0 and for NaN."""
    if isinstance(value, LogWeight):
        return value
    number = value if isinstance(value, (int, Fraction)) else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        raise DataError(f"a factor is a finite number, and this one is {number}: look at the density it comes from")
    if number < 0:
        raise DataError(f"a factor is a weight of 0 or more, and this one is {float(number):g}")
    return Fraction(number)


def total(weights: Sequence[Number]) -> Number:
    """The sum; of logarithms without loss."""
    if not any(isinstance(weight, LogWeight) for weight in weights):
        return sum(weights, Fraction(0))  # type: ignore[arg-type, return-value]
    logs = [log_of(weight) for weight in weights]
    high = max(logs)
    if high == -math.inf:
        return LogWeight(-math.inf)
    return LogWeight(high + math.log(math.fsum(math.exp(log - high) for log in logs)))


def shares(weights: Sequence[Number]) -> list[Any]:
    """Each weight over the sum, which is not zero: rationals, or floats where logarithms are among the weights."""
    whole = total(weights)
    if not isinstance(whole, LogWeight):
        return [Fraction(weight) / whole for weight in weights]  # type: ignore[arg-type]
    return [math.exp(log_of(weight) - whole.log) for weight in weights]
