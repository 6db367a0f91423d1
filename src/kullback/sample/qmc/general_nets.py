"""Halton and Faure points, and digital nets in any bases, with their randomizations, independent per dimension:

ds      digital shift, y_k + s_k mod b
dp      digital permutation: an independent random permutation for each digit
lms     linear matrix scramble, C' = L C mod b, L lower triangular with nonzero diagonal; lms ds, lms dp: both
nus     nested uniform scrambling: a permutation for each node of the b-ary tree
qrng    fixed multipliers y_k -> f y_k mod b, and a digital shift: a generalized Halton sequence
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.sample.qmc.bits import random_bits
from kullback.sample.qmc.digits import DigitSource, digit_count, matrix_scramble, place_values, weave
from kullback.sample.qmc.point_set import PointSet, check_count, chosen

__all__ = ["DigitalNet", "Faure", "Halton", "multiplier", "primes"]

RANDOMIZATIONS = ("none", "ds", "dp", "lms", "lms ds", "lms dp", "nus")
LIMIT = 1 << 32


def primes(count: int) -> list[int]:
    """The first `count` primes.

    >>> primes(6)
    [2, 3, 5, 7, 11, 13]
    """
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % prime for prime in found if prime * prime <= candidate):
            found.append(candidate)
        candidate += 1
    return found


def multiplier(base: int) -> int:
    """The f for which f/b has the smallest sum of partial quotients, so that k f mod b spreads best over k.

    >>> [multiplier(base) for base in (2, 3, 5, 7, 11, 13)]
    [1, 1, 2, 2, 3, 5]
    """

    def spread(factor: int) -> int:
        total, numerator, denominator = 0, base, factor
        while denominator:
            total += numerator // denominator
            numerator, denominator = denominator, numerator % denominator
        return total

    return min(range(1, max(2, base // 2 + 1)), key=spread)


def Halton(
    dimensions: int,
    *,
    randomize: str | None = "lms dp",
    replications: int | None = None,
    generator: torch.Generator | None = None,
) -> PointSet:
    """Halton points: dimension j in base of the j-th prime; any number of points, at most 2^32.

    randomize: none, ds, dp, lms, lms ds, lms dp, nus, or qrng. Raises ConfigError for options out of range.

    >>> Halton(2, randomize="dp", generator=torch.Generator().manual_seed(0)).points(6).shape
    torch.Size([6, 2])
    """
    check_count(dimensions, replications, 4000, "a Halton sequence")
    bases = torch.tensor(primes(dimensions))
    digits = 32
    columns = torch.eye(digits, dtype=torch.int64).expand(dimensions, -1, -1)
    name = chosen(randomize, (*RANDOMIZATIONS, "qrng"), replications, generator)
    return _net(bases, columns, LIMIT, dimensions, name, replications, 1, generator)


def Faure(
    dimensions: int,
    *,
    randomize: str | None = "lms dp",
    replications: int | None = None,
    alpha: int = 1,
    generator: torch.Generator | None = None,
) -> PointSet:
    """Faure points: all dimensions in the smallest prime base >= alpha d, with powers of the Pascal matrix.

    They are a (0, d)-sequence: best in multiples of powers of the base. alpha: order, as in `DigitalNet`.
    Raises ConfigError for options out of range.
    """
    check_count(dimensions, replications, 4000, "a Faure sequence")
    if alpha < 1:
        raise ConfigError(f"alpha, the order of the net, is at least 1, not {alpha}")
    base = next(prime for prime in primes(4000) if prime >= alpha * dimensions)
    size = 1
    while base**size < LIMIT:
        size += 1
    size = min(size, digit_count(base))
    pascal = torch.zeros(size, size, dtype=torch.int64)
    pascal[:, 0] = 1
    for a in range(1, size):
        pascal[a, 1 : a + 1] = (pascal[a - 1, :a] + pascal[a - 1, 1 : a + 1]) % base
    gaps = torch.arange(size).unsqueeze(-1) - torch.arange(size)
    columns = []
    for j in range(alpha * dimensions):
        powers = torch.tensor([pow(j, k, base) for k in range(size)])
        columns.append((pascal * powers[gaps.clamp(min=0)] % base).tril())
    name = chosen(randomize, RANDOMIZATIONS, replications, generator)
    bases = torch.full((alpha * dimensions,), base)
    return _net(bases, torch.stack(columns), min(LIMIT, base**size), dimensions, name, replications, alpha, generator)


def DigitalNet(
    bases: int | Sequence[int] | Tensor,
    matrices: Tensor,
    *,
    randomize: str | None = "lms dp",
    replications: int | None = None,
    alpha: int = 1,
    generator: torch.Generator | None = None,
) -> PointSet:
    """A digital net from generating matrices [alpha d, m, t]: for each digit of the index, the digits of its column.

    bases: one or alpha d numbers, 2 or more. alpha: weaves alpha dimensions into one net of higher order, in a common
    base. Raises ConfigError for digits beyond their base, ShapeError for matrices of another shape.

    >>> DigitalNet(3, torch.eye(2, dtype=torch.int64).unsqueeze(0), randomize=None).points(1, 4).squeeze(-1)
    tensor([0.3333, 0.6667, 0.1111], dtype=torch.float64)
    """
    if matrices.ndim != 3 or matrices.is_floating_point() or matrices.shape[0] % alpha:
        raise ShapeError(f"matrices are integers [alpha d, m, t] and have shape {tuple(matrices.shape)}")
    every = torch.as_tensor(bases).reshape(-1).to(torch.int64).expand(len(matrices)).clone()
    if int(every.min()) < 2 or bool(((matrices < 0) | (matrices >= every[:, None, None])).any()):
        raise ConfigError("bases are 2 or more, and the digits of each matrix lie below its base")
    if alpha > 1 and len(every.unique()) > 1:
        raise ConfigError("a net of higher order has one base for all dimensions, since it weaves their digits")
    dimensions = len(matrices) // alpha
    name = chosen(randomize, RANDOMIZATIONS, replications, generator)
    check_count(dimensions, replications, 1 << 20, "a net")
    limit = min(LIMIT, int(every.min()) ** matrices.shape[1])
    return _net(every, matrices.to(torch.int64), limit, dimensions, name, replications, alpha, generator)


def _net(
    bases: Tensor,
    columns: Tensor,
    limit: int,
    dimensions: int,
    name: str,
    replications: int | None,
    alpha: int,
    generator: torch.Generator | None,
) -> PointSet:
    count = 1 if replications is None else replications
    kept = torch.tensor([digit_count(base) for base in bases.tolist()])
    width = int(kept.max())
    padded = columns.new_zeros(*columns.shape[:2], width)
    padded[:, :, : min(width, columns.shape[2])] = columns[:, :, :width]
    every, keys = padded.unsqueeze(0), None
    if name.startswith("lms") and generator is not None:
        every = matrix_scramble(padded, bases, count, generator)
    if name == "nus" and generator is not None:
        keys = random_bits(count, len(bases), generator=generator)
        tables = torch.zeros(count, 0, dtype=torch.int64)
    else:
        if alpha > 1:
            every, bases, kept = weave(every, alpha, width), bases[::alpha].contiguous(), kept[::alpha].contiguous()
        sizes = zip(bases.tolist(), kept.tolist())
        tables = torch.cat([_table(base, digits, name, count, generator).flatten(1) for base, digits in sizes], 1)
    source = DigitSource(bases, kept, every.contiguous(), tables.contiguous(), limit, keys, alpha)
    return PointSet(source, dimensions, replications, name, "natural")


def _table(base: int, digits: int, name: str, count: int, generator: torch.Generator | None) -> Tensor:
    """pi_k(y) times the weight of digit k: [R, t, b]."""
    values = torch.arange(base).expand(count, digits, base)
    if name == "qrng":
        values = values * multiplier(base) % base
    if name.endswith("dp"):
        uniform = torch.rand(count, digits, base, dtype=torch.float64, generator=generator)
        values = uniform.argsort(-1)
    elif name.endswith("ds") or name == "qrng":
        shift = torch.randint(base, (count, digits, 1), generator=generator)
        values = (values + shift) % base
    return values * place_values(base, digits).unsqueeze(-1)
