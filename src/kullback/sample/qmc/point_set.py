"""A set of low-discrepancy points, or R independent randomizations of it, with blocks of points at any index.

Point i does not depend on how many points are asked for, nor in which blocks: processes take blocks of their own, and
more points never change earlier ones. (The linear order of lattices is the exception, and says so.)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.bits import mantissa

__all__ = ["Kind", "PointSet", "Source", "check_count", "chosen", "power_of_two"]

Kind = Literal["lattice", "net", "digits", "independent"]


class Source(Protocol):
    """What stands behind a PointSet: floating-point blocks [R, n, d] at any index, and integers where there are any."""

    @property
    def kind(self) -> Kind: ...
    @property
    def limit(self) -> int: ...
    @property
    def width(self) -> int: ...

    def unit(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor: ...
    def bits(self, first: int, count: int, device: torch.device) -> Tensor: ...


@dataclass(slots=True)
class PointSet:
    """Points in [0, 1)^d; made by Lattice, DigitalNetB2 (Sobol), Halton, Faure and DigitalNet.

    dimensions d; replications R, or None for a single set without that axis; randomize and order by name.
    """

    source: Source
    dimensions: int
    replications: int | None
    randomize: str
    order: str
    position: int = field(default=0, init=False)

    @property
    def kind(self) -> Kind:
        """Which group the points form: it decides which kernels and transforms go with them."""
        return self.source.kind

    @property
    def width(self) -> int:
        """Binary digits of a point's integer, for nets in base 2."""
        return self.source.width

    def points(
        self,
        start: int,
        stop: int | None = None,
        *,
        as_bits: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Points start..stop-1, or the first `start` where stop is left out: [n, d], or [R, n, d] with replications.

        as_bits: integers of `width` binary digits instead, for nets in base 2. dtype: float64 or float32.
        Warns when a set without randomization is asked for its first point, the origin.
        Raises ConfigError for an empty range, one beyond the limit of the set, or bits where there are none.
        """
        first, last = (0, start) if stop is None else (start, stop)
        if first < 0 or last <= first:
            raise ConfigError(f"points {first} to {last} are none: ask for a count, or a start below a stop")
        if last > self.source.limit:
            raise ConfigError(f"this set has {self.source.limit} points and {last} were asked for")
        if first == 0 and self.randomize in ("none", "lms") and not as_bits:
            warnings.warn(
                "the first point is the origin, where inverse distribution functions are infinite: randomize it",
                stacklevel=2,
            )
        place = torch.device(device)
        if as_bits:
            if self.kind != "net":
                raise ConfigError("only nets in base 2 have binary digits: take the points as numbers")
            result = self.source.bits(first, last - first, place)
        else:
            mantissa(dtype)
            result = self.source.unit(first, last - first, dtype, place)
        return result.squeeze(0) if self.replications is None else result

    def next(self, count: int, **options: Any) -> Tensor:
        """The next `count` points after those taken by `next` before; options as in `points`."""
        result = self.points(self.position, self.position + count, **options)
        self.position += count
        return result

    def reset(self) -> None:
        """Start `next` again at the first point; the randomization stays."""
        self.position = 0


def check_count(dimensions: int, replications: int | None, limit: int, what: str) -> int:
    """The number of randomizations, 1 for None; ConfigError for a dimension or a number out of range."""
    if not 1 <= dimensions <= limit:
        raise ConfigError(f"{what} has 1 to {limit} dimensions, not {dimensions}")
    if replications is not None and replications < 1:
        raise ConfigError(f"replications is a number of independent randomizations, at least 1, not {replications}")
    return 1 if replications is None else replications


def chosen(
    randomize: str | None, known: tuple[str, ...], replications: int | None, generator: torch.Generator | None
) -> str:
    """The name of a randomization as `known` has it; ConfigError for another, or for one without its generator."""
    name = "none" if randomize is None else randomize.lower().replace("_", " ").strip()
    if name not in known:
        raise ConfigError(f"randomize is one of {', '.join(known)}, not {randomize!r}")
    if name == "none":
        if replications not in (None, 1):
            raise ConfigError("replications without a randomization would all be the same: choose one")
    elif generator is None:
        raise ConfigError(f"randomize={name!r} needs a generator: kullback.core.rng.generator(seed, name)")
    return name


def power_of_two(count: int, what: str) -> int:
    """The m of count = 2^m; ConfigError for another number."""
    if count < 1 or count & (count - 1):
        raise ConfigError(f"{what} is a power of 2, not {count}: take {1 << max(count, 1).bit_length()}")
    return count.bit_length() - 1
