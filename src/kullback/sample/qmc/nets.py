"""Digital nets in base 2: Sobol' points, or any generating matrices, with shifts, scrambles and higher order.

Point i with binary digits i_0 (the least), i_1, ... is x_ij = 2^-t XOR_k i_k g_jk, with g_jk the columns of dimension
j's generating matrix as integers of t bits, the most significant first. Randomizations, independent per dimension:
    ds       digital shift, x XOR s
    lms      linear matrix scramble g' = L g over GF(2), L lower triangular with unit diagonal (Matousek 1998)
    lms ds   both, the default
    nus      nested uniform scrambling (Owen 1995): every node of the binary tree flips or not
alpha > 1 weaves alpha nets of alpha d dimensions into one of higher order: scrambles come before, shifts after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.sample.qmc.bits import (
    WIDTH,
    compiled,
    empty,
    interlace,
    mantissa,
    random_bits,
    reverse_bits,
    scramble_nested,
    to_unit,
)
from kullback.sample.qmc.direction_numbers import COLUMNS, sobol_matrices
from kullback.sample.qmc.point_set import Kind, PointSet, check_count, chosen

__all__ = ["DigitalNetB2", "NetSource", "Sobol", "additive_bits", "linear_scramble"]

RANDOMIZATIONS = ("none", "ds", "lms", "lms ds", "nus")


def additive_bits(columns: Tensor, shift: Tensor, first: int, count: int, *, gray: bool, xor: bool) -> Tensor:
    """Integers [R, n, d] of points first..first+n-1 from columns [R or 1, m, d] and shift [R, d], at most 63 bits.

    Combined by XOR, or by addition modulo 2^63. Two tables, of the lower and the upper digits of the index, are
    combined in one pass; the compiled twin does the same block by block.
    """
    last = first + count
    depth = min(max(1, (last.bit_length() + 1) // 2), columns.shape[1])
    size = 1 << depth
    blocks = torch.arange(first // size, (last - 1) // size + 1, device=columns.device)
    code = torch.arange(size, device=columns.device)
    if gray:  # the Gray code of block * size + i is that of i, with its highest digit turned where block is odd
        code = code ^ (code >> 1)
        code = torch.cat([code, code ^ (size >> 1)])
    low = _combined(columns[:, :depth], code, xor)
    high = _combined(columns[:, depth:], blocks ^ (blocks >> 1) if gray else blocks, xor)
    high = high ^ shift.unsqueeze(1) if xor else high + shift.unsqueeze(1)
    low = low.unflatten(1, (-1, size))[:, (blocks & 1) if gray else torch.zeros_like(blocks)]
    result = low ^ high.unsqueeze(2) if xor else (low + high.unsqueeze(2)) & ((1 << WIDTH) - 1)
    return result.flatten(1, 2)[:, first % size : first % size + count]


def _combined(columns: Tensor, index: Tensor, xor: bool) -> Tensor:
    """The columns [R, m, d] of each index's digits, combined: [R, n, d]; modulo 2^64 where they are added."""
    result = columns.new_zeros(columns.shape[0], len(index), columns.shape[2])
    for k in range(columns.shape[1]):
        digit = ((index >> k) & 1).unsqueeze(-1)
        term = digit * columns[:, k].unsqueeze(1)
        result = result ^ term if xor else result + term
    return result


@dataclass(frozen=True, slots=True)
class NetSource:
    """Columns [R or 1, m, d or alpha d] and shift [R, d] of `width` bits; keys [R, alpha d] for nested scrambling."""

    columns: Tensor
    shift: Tensor
    gray: bool
    width: int = WIDTH
    keys: Tensor | None = None
    alpha: int = 1
    kind: Kind = "net"

    @property
    def limit(self) -> int:
        return 1 << self.columns.shape[1]

    def unit(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        kernels = compiled(self.columns) if device.type == "cpu" else None
        if kernels is None or self.keys is not None:
            return to_unit(self.bits(first, count, device), self.width, dtype)
        result = empty(len(self.shift), count, self.columns.shape[2], dtype=dtype)
        kept = min(mantissa(dtype), self.width)
        columns, shift = self.columns.numpy(), self.shift.numpy()
        kernels.fill_additive(result.numpy(), columns, shift, first, self.gray, True, self.width - kept, 2.0**-kept)
        return result

    def bits(self, first: int, count: int, device: torch.device) -> Tensor:
        columns, shift = self.columns.to(device), self.shift.to(device)
        kernels = compiled(columns)
        if kernels is None:
            result = additive_bits(columns, shift, first, count, gray=self.gray, xor=True)
        else:
            result = empty(len(shift), count, columns.shape[2], dtype=torch.int64)
            kernels.fill_additive(result.numpy(), columns.numpy(), shift.numpy(), first, self.gray, True, 0, 1)
        if self.keys is None:
            return result
        digits = -(-self.width // self.alpha)
        result = scramble_nested(result, self.keys.to(device), self.width, digits)
        return result if self.alpha == 1 else interlace(result, self.alpha, self.width, self.width)


def linear_scramble(matrices: Tensor, digits: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """L g for `count` random lower triangular L with unit diagonal: columns [d, m] of `digits` bits to [R, d, m].

    The result has `width` >= digits bits; what lies below the matrices' last digit is filled with random bits.
    """
    dimensions = matrices.shape[0]
    scrambler = random_bits(count, dimensions, digits, width=width, generator=generator)
    below = width - 1 - torch.arange(digits)
    scrambler = (scrambler & ((1 << below) - 1)) | (1 << below)
    result = torch.zeros(count, *matrices.shape, dtype=torch.int64)
    kernels = compiled(matrices)
    if kernels is not None:
        kernels.linear_scramble(matrices.contiguous().numpy(), scrambler.numpy(), result.numpy())
        return result
    for place in range(digits):
        digit = (matrices >> (digits - 1 - place)) & 1
        result ^= -digit & scrambler[:, :, place, None]
    return result


def DigitalNetB2(
    dimensions: int,
    *,
    randomize: str | None = "lms ds",
    replications: int | None = None,
    alpha: int = 1,
    order: Literal["natural", "gray"] = "natural",
    width: int = WIDTH,
    matrices: Tensor | None = None,
    digits: int | None = None,
    most_significant_first: bool = True,
    generator: torch.Generator | None = None,
) -> PointSet:
    """A digital net in base 2, Sobol' by default: points of any block, 2^32 at most, best in powers of 2.

    randomize: none, ds, lms, lms ds or nus. alpha: order of the net, 1 for the plain one; do not give matrices that
    are interlaced already as well. width: binary digits of the result, 63 at most. matrices: columns [alpha d, m] as
    integers of `digits` bits (32 by default for Sobol', else as many as the largest needs).
    Raises ConfigError for options out of range, ShapeError for matrices of another shape.

    >>> DigitalNetB2(2, randomize="ds", generator=torch.Generator().manual_seed(0)).points(4).shape
    torch.Size([4, 2])
    """
    name = chosen(randomize, RANDOMIZATIONS, replications, generator)
    count = check_count(dimensions, replications, 1 << 20, "a net")
    if order not in ("natural", "gray"):
        raise ConfigError(f'order is "natural" or "gray", not {order!r}')
    if alpha < 1:
        raise ConfigError(f"alpha, the order of the net, is at least 1, not {alpha}")
    if matrices is None:
        columns, digits = sobol_matrices(alpha * dimensions), COLUMNS
    else:
        columns, digits = _given(matrices, alpha * dimensions, digits, most_significant_first)
    if not digits <= width <= WIDTH:
        raise ConfigError(f"width is {digits}, what the matrices have, to {WIDTH} binary digits, not {width}")
    keys = None
    if name.startswith("lms") and generator is not None:
        columns = linear_scramble(columns, digits, width, count, generator)
    else:
        columns = (columns << (width - digits)).unsqueeze(0)
    if name == "nus" and generator is not None:
        keys = random_bits(count, alpha * dimensions, generator=generator)
    elif alpha > 1:
        columns = interlace(columns.mT, alpha, width, width).mT
    if name.endswith("ds") and generator is not None:
        shift = random_bits(count, dimensions, width=width, generator=generator)
    else:
        shift = torch.zeros(count, columns.shape[1], dtype=torch.int64)
    source = NetSource(columns.mT.contiguous(), shift, order == "gray", width, keys, alpha)
    return PointSet(source, dimensions, replications, name, order)


def _given(matrices: Tensor, dimensions: int, digits: int | None, most_significant_first: bool) -> tuple[Tensor, int]:
    if matrices.ndim != 2 or matrices.shape[0] < dimensions or matrices.is_floating_point():
        raise ShapeError(
            f"matrices are integers [{dimensions}, m], a column each, for these dimensions and alpha, and have shape "
            f"{tuple(matrices.shape)}"
        )
    columns = matrices[:dimensions].to(torch.int64)
    needed = int(columns.max()).bit_length()
    digits = needed if digits is None else digits
    if columns.shape[1] > COLUMNS or needed > digits or int(columns.min()) < 0:
        raise ConfigError(f"matrices have at most {COLUMNS} columns of integers from 0 to 2^{digits} - 1")
    return (columns if most_significant_first else reverse_bits(columns, digits)), digits


Sobol = DigitalNetB2
