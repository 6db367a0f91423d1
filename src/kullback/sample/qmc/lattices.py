"""Rank-1 lattices x_i = z v(i) mod 1, randomly shifted modulo 1.

v(i) is i/n in linear order, the radical inverse sum_k i_k 2^-(k+1) in natural order, and that of the Gray code of i in
Gray order; the last two are extensible: every first 2^m points are a lattice. Positions are held as 63-bit fractions,
in which addition modulo 1 is addition modulo 2^63, so that points are exact and any block of them costs one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.sample.qmc.bits import WIDTH, compiled, empty, mantissa, random_bits, to_unit
from kullback.sample.qmc.generating_vectors import stored_vector
from kullback.sample.qmc.nets import additive_bits
from kullback.sample.qmc.point_set import Kind, PointSet, check_count, chosen, power_of_two

__all__ = ["Lattice", "LatticeSource", "baker"]

LEVELS = 32  # at most 2^32 points
MASK = (1 << WIDTH) - 1


@dataclass(frozen=True, slots=True)
class LatticeSource:
    """What each digit of the index adds, columns [1, m, d], and the shifts [R, d], as 63-bit fractions."""

    columns: Tensor
    shift: Tensor
    order: str
    limit: int
    width: int = WIDTH
    kind: Kind = "lattice"

    def _ordered(self, first: int, count: int) -> Tensor:
        """The columns in the order of the index's digits, the least significant first."""
        if self.order != "linear":
            return self.columns
        levels = power_of_two(count, "the number of points of a lattice in linear order")
        if first:
            raise ConfigError("the linear order has no blocks, since i/n changes with n: natural and gray have")
        return self.columns[:, : max(levels, 1)].flip(1).contiguous()

    def unit(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        columns = self._ordered(first, count)
        kernels = compiled(columns) if device.type == "cpu" else None
        gray = self.order == "gray"
        if kernels is None:
            columns, shift = columns.to(device), self.shift.to(device)
            return to_unit(additive_bits(columns, shift, first, count, gray=gray, xor=False), WIDTH, dtype)
        result = empty(len(self.shift), count, columns.shape[2], dtype=dtype)
        kept = mantissa(dtype)
        arrays = result.numpy(), columns.numpy(), self.shift.numpy()
        kernels.fill_additive(*arrays, first, gray, False, WIDTH - kept, 2.0**-kept)
        return result

    def bits(self, first: int, count: int, device: torch.device) -> Tensor:
        raise ConfigError("a lattice has no binary digits of its own: take its points as numbers")


def Lattice(
    dimensions: int,
    *,
    randomize: str | None = "shift",
    replications: int | None = None,
    order: Literal["natural", "gray", "linear"] = "natural",
    vector: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> PointSet:
    """A rank-1 lattice, by default with kullback's own generating vector, extensible to 2^20 points.

    randomize: shift or none. vector: a generating vector of d or more integers, odd ones; see
    `construct_vector`, and `korobov_vector` for many dimensions; it may have 2^32 points.
    Raises ConfigError for options out of range, or for more dimensions than the stored vector has.

    >>> Lattice(2, randomize="shift", generator=torch.Generator().manual_seed(0)).points(4).shape
    torch.Size([4, 2])
    """
    name = chosen(randomize, ("none", "shift"), replications, generator)
    count = check_count(dimensions, replications, 1 << 20, "a lattice")
    if order not in ("natural", "gray", "linear"):
        raise ConfigError(f'order is "natural", "gray" or "linear", not {order!r}')
    if vector is None:
        entries, limit = stored_vector(dimensions)
    else:
        entries, limit = torch.as_tensor(vector), 1 << LEVELS
        if entries.ndim != 1 or len(entries) < dimensions or entries.is_floating_point():
            raise ShapeError(f"vector has {dimensions} or more integers, and has shape {tuple(entries.shape)}")
        entries = entries[:dimensions].to(torch.int64)
        if int(entries.min()) < 1:
            raise ConfigError("the entries of a generating vector are positive, odd ones for 2^m points")
    if name == "shift" and generator is not None:
        shift = random_bits(count, dimensions, generator=generator)
    else:
        shift = torch.zeros(count, dimensions, dtype=torch.int64)
    # z 2^-(k + 1) modulo 1 for each digit k of the index
    places = WIDTH - 1 - torch.arange((limit - 1).bit_length())
    columns = ((entries << places.unsqueeze(-1)) & MASK).unsqueeze(0)
    return PointSet(LatticeSource(columns, shift, order, limit), dimensions, replications, name, order)


def baker(points: Tensor) -> Tensor:
    """The tent map x -> 1 - |2x - 1|, after which shifted lattices integrate smooth functions at order 2.

    >>> baker(torch.tensor([0.0, 0.25, 0.5, 0.75]))
    tensor([0.0000, 0.5000, 1.0000, 0.5000])
    """
    return 1.0 - (2.0 * points - 1.0).abs()
