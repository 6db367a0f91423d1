"""Digital nets in any bases: x_ij = sum_k pi_jk(y_k) b_j^-k with digits y = C_j i mod b_j of an index in base b_j.

Digits are kept as far as b^t <= 2^53, so that a point is a quotient of two exact numbers, correctly rounded. Tables
hold pi_jk(y) b^(t-k) for each dimension, digit and value; they stand for shifts and permutations of digits alike.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.bits import GOLDEN, compiled, empty, mix, to_unit
from kullback.sample.qmc.point_set import Kind

__all__ = ["DigitSource", "digit_count", "index_digits", "matrix_scramble", "nested_digits", "place_values", "weave"]


def digit_count(base: int) -> int:
    """The largest t with base^t <= 2^53.

    >>> digit_count(2), digit_count(3), digit_count(541)
    (53, 33, 5)
    """
    count = int(53 / math.log2(base))
    return count + 1 if base ** (count + 1) <= 1 << 53 else count if base**count <= 1 << 53 else count - 1


def index_digits(index: Tensor, base: int, count: int) -> Tensor:
    """The digits [n, count] of indices [n], the least significant first."""
    places = torch.tensor([base**k for k in range(count)], dtype=torch.int64, device=index.device)
    return (index.unsqueeze(-1) // places) % base


def place_values(base: int, count: int) -> Tensor:
    """The weights b^(t-1), ..., b, 1 of t digits, the most significant first."""
    return torch.tensor([base ** (count - 1 - k) for k in range(count)], dtype=torch.int64)


def matrix_scramble(columns: Tensor, bases: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """L C mod b for `count` random lower triangular L with nonzero diagonal: columns [d, m, t] to [R, d, m, t]."""
    dimensions, _, digits = columns.shape
    base = bases[:, None, None]
    uniform = torch.rand(count, dimensions, digits, digits, dtype=torch.float64, generator=generator)
    below = (uniform * base).to(torch.int64).tril(-1)
    diagonal = 1 + (uniform.diagonal(dim1=-2, dim2=-1) * (bases[:, None] - 1)).to(torch.int64)
    scrambler = below + torch.diag_embed(diagonal)
    # sums of at most 53 products of digits are exact in double precision for bases up to 2^23
    product = columns.to(torch.float64) @ scrambler.to(torch.float64).mT
    return product.to(torch.int64) % base


def weave(digits: Tensor, alpha: int, count: int) -> Tensor:
    """Digits of alpha neighbouring dimensions woven into one: [..., alpha d, m, t] to [..., d, m, count]."""
    groups = digits.unflatten(-3, (-1, alpha)).movedim(-3, -1)
    return groups.flatten(-2)[..., :count]


def nested_digits(digits: Tensor, key: Tensor, base: int) -> Tensor:
    """Owen's nested uniform scrambling of digits [n, t] in a base, by one key: each node permutes its digit.

    Up to base 7 the hash of a node picks one of all permutations; beyond, it sends y to the rank of a further hash
    among those of all digits at that node.
    """
    count = digits.shape[1]
    result = torch.empty_like(digits)
    prefix = torch.zeros_like(digits[:, 0])
    values = torch.arange(base, device=digits.device)
    table = permutations_of(base).to(digits.device)
    for k in range(count):
        node = mix(prefix * GOLDEN + mix(key + torch.full_like(key, k + 1) * GOLDEN))
        if len(table):
            which = (to_unit(node >> 1 & ((1 << 63) - 1)) * len(table)).to(torch.int64)
            result[:, k] = table[which, digits[:, k]]
        else:
            scores = mix(node.unsqueeze(-1) + (values + 1) * GOLDEN)
            own = scores.gather(-1, digits[:, k : k + 1])
            result[:, k] = (scores < own).sum(-1)
        prefix = prefix * base + digits[:, k]
    return result


@lru_cache(maxsize=8)
def permutations_of(base: int) -> Tensor:
    """All permutations [b!, b] of the digits up to base 7, and an empty table [0, b] beyond."""
    rows = list(itertools.permutations(range(base))) if base <= 7 else []
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, base)


@dataclass(frozen=True, slots=True)
class DigitSource:
    """Columns [R or 1, D, m, t] of digits, most significant first, in bases [D]; D = alpha d where keys are given.

    counts [D]: digits kept; tables: [R, t_j, b_j] per dimension, laid end to end as [R, sum t_j b_j]; keys [R, D] for
    nested scrambling; limit: the number of points.
    """

    bases: Tensor
    counts: Tensor
    columns: Tensor
    tables: Tensor
    limit: int
    keys: Tensor | None = None
    alpha: int = 1
    width: int = 53
    kind: Kind = "digits"

    def unit(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        kernels = compiled(self.columns, module="_compiled_digits") if device.type == "cpu" else None
        result = self._naive(first, count, device) if kernels is None else self._compiled(kernels, first, count)
        if dtype == torch.float64:
            return result
        return result.to(dtype).clamp_(max=1.0 - 2.0**-24)

    def bits(self, first: int, count: int, device: torch.device) -> Tensor:
        raise ConfigError("only nets in base 2 have binary digits: take the points as numbers")

    def _compiled(self, kernels: ModuleType, first: int, count: int) -> Tensor:
        dimensions = len(self.bases) // (1 if self.keys is None else self.alpha)
        result = empty(len(self.tables), count, dimensions, dtype=torch.float64)
        shared = [x.numpy() for x in (self.columns, self.bases, self.counts)]
        if self.keys is None:
            kernels.fill_digits(result.numpy(), *shared, self.tables.numpy(), first)
        else:
            every = [permutations_of(base) for base in self.bases.tolist()]
            starts = torch.tensor([0, *(table.numel() for table in every[:-1])]).cumsum(0)
            tables = torch.cat([table.flatten() for table in every])
            arrays = self.keys.numpy(), tables.numpy(), starts.numpy()
            kernels.fill_nested_digits(result.numpy(), *shared, *arrays, self.alpha, first)
        return result

    def _digits(self, dimension: int, index: Tensor) -> Tensor:
        """The digits [R or 1, n, t] before permutation."""
        base, count = int(self.bases[dimension]), int(self.counts[dimension])
        columns = self.columns[:, dimension, :, :count].to(index.device)
        used = min(columns.shape[1], index_digits_needed(int(index[-1]), base))
        digits = index_digits(index, base, used)
        result = columns.new_zeros(len(columns), len(index), count)
        for k in range(used):
            result = (result + digits[:, k, None] * columns[:, None, k]) % base
        return result

    def _naive(self, first: int, count: int, device: torch.device) -> Tensor:
        index = torch.arange(first, first + count, device=device)
        columns: list[Tensor] = []
        scrambled: list[list[Tensor]] = []
        start = 0
        for dimension, (base, kept) in enumerate(zip(self.bases.tolist(), self.counts.tolist())):
            digits = self._digits(dimension, index)
            if self.keys is not None:
                own = self.keys[:, dimension].to(device)
                scrambled.append([nested_digits(digits[0], key, base) for key in own])
                continue
            table = self.tables[:, start : start + base * kept].unflatten(-1, (kept, base)).to(device)
            start += base * kept
            digits = digits.expand(len(table), -1, -1)
            values = table.unsqueeze(1).expand(-1, count, -1, -1).gather(-1, digits.unsqueeze(-1)).squeeze(-1).sum(-1)
            columns.append(values.to(torch.float64) / base**kept)
        return torch.stack(columns, -1) if self.keys is None else self._woven(scrambled)

    def _woven(self, digits: list[list[Tensor]]) -> Tensor:
        """Points [R, n, d] from digits [n, t] of each of alpha d dimensions and replications."""
        result = []
        for start in range(0, len(digits), self.alpha):
            base, kept = int(self.bases[start]), int(self.counts[start])
            group = torch.stack([torch.stack(columns) for columns in digits[start : start + self.alpha]], -1)
            values = group.flatten(-2)[..., :kept] * place_values(base, kept).to(group.device)
            result.append(values.sum(-1).to(torch.float64) / base**kept)
        return torch.stack(result, -1)


def index_digits_needed(last: int, base: int) -> int:
    """How many digits an index has in a base, at least one."""
    count = 1
    while last >= base:
        last //= base
        count += 1
    return count
