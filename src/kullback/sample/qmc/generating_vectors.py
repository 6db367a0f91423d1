"""Generating vectors of rank-1 lattices by fast component-by-component construction (Nuyens and Cools 2006).

With product weights g_j and w(x) = 2 pi^2 B_2(x), the squared worst-case error over 2^m points in the Korobov space of
smoothness 1 is e^2 = -1 + 2^-m sum_i prod_j (1 + g_j w(i z_j / 2^m)). Points whose index has the same power of 2 are
the odd residues modulo 2^l, times a constant; up to sign these are the powers of 5, a cyclic group, on which the sum
over i, for all z at once, is a circular correlation, so that a component costs n log n. For embedded lattices the
entry minimises the largest ratio, over levels, of e^2 to that of the best vector of that level alone (Cools, Kuo and
Nuyens 2006).
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError

__all__ = ["construct_vector", "korobov_vector", "squared_error", "stored_vector"]

TABLE = "generating_vector.txt"
STORED_LEVELS = 20


@lru_cache(maxsize=1)
def _table() -> tuple[int, ...]:
    text = resources.files("kullback.sample.qmc").joinpath(TABLE).read_text(encoding="utf-8")
    return tuple(int(word) for line in text.splitlines() if not line.startswith("#") for word in line.split())


def stored_vector(dimensions: int) -> tuple[Tensor, int]:
    """The first entries [d] of kullback's generating vector, and the number of points it is made for.

    Raises ConfigError for more dimensions than it has.
    """
    table = _table()
    if dimensions > len(table):
        raise ConfigError(
            f"the stored generating vector has {len(table)} dimensions, not {dimensions}: pass vector=, from "
            "construct_vector or korobov_vector"
        )
    return torch.tensor(table[:dimensions], dtype=torch.int64), 1 << STORED_LEVELS


def korobov_vector(dimensions: int, multiplier: int, levels: int = STORED_LEVELS) -> Tensor:
    """The vector z_j = a^(j-1) mod 2^levels of a Korobov lattice, [d]; a is an odd multiplier.

    >>> korobov_vector(4, 5, 4)
    tensor([ 1,  5,  9, 13])
    """
    if multiplier % 2 == 0 or multiplier < 1:
        raise ConfigError(f"the multiplier of a Korobov lattice is odd and positive, not {multiplier}")
    return torch.tensor([pow(multiplier, j, 1 << levels) for j in range(dimensions)], dtype=torch.int64)


def _omega(x: np.ndarray) -> np.ndarray:
    return 2.0 * math.pi**2 * (x * x - x + 1.0 / 6.0)


def squared_error(vector: Tensor, weights: Tensor, levels: int) -> float:
    """The squared worst-case error of the first 2^levels points under product weights [d], by its definition.

    >>> squared_error(torch.tensor([1]), torch.tensor([1.0]), 3)  # 2 zeta(2) / 64
    0.0514...
    """
    index = np.arange(1 << levels)
    product = np.zeros(1 << levels)  # prod (1 + g w) - 1, kept apart from the 1 it is compared to
    for entry, weight in zip(vector.tolist(), weights.tolist()):
        term = weight * _omega((index * entry % (1 << levels)) / (1 << levels))
        product = product + term + product * term
    return float(product.mean())


class _Level:
    """The odd residues modulo 2^l up to sign, in the order of powers of 5, with the product q = prod (1 + g w) - 1."""

    def __init__(self, level: int) -> None:
        self.size = 1 << max(level - 2, 0)
        modulus = 1 << level
        powers = np.ones(1, dtype=np.int64)
        while len(powers) < self.size:
            powers = np.concatenate([powers, powers * pow(5, len(powers), modulus) % modulus])
        self.copies = 2 if level >= 2 else 1  # residues and their negatives
        self.omega = _omega((powers % modulus) / modulus)
        self.transform = np.fft.rfft(self.omega)
        self.product = np.zeros(self.size)

    def sums(self, weight: float) -> np.ndarray:
        """sum_i of the new q over this level's residues, for z = 5^e: indexed by e."""
        # correlation: c[e] = sum_k q[k] w[k + e]
        correlation = np.fft.irfft(np.conj(np.fft.rfft(self.product)) * self.transform, self.size)
        base = self.product.sum() + weight * self.omega.sum()
        return self.copies * (base + weight * correlation)

    def accept(self, exponent: int, weight: float) -> None:
        term = weight * np.roll(self.omega, -(exponent % self.size))
        self.product += term + self.product * term


def _errors(levels: list[_Level], weight: float, lowest: int) -> np.ndarray:
    """e^2 for z = 5^e, one row for each number of levels from `lowest` on."""
    candidates = levels[-1].size
    total = np.zeros(candidates)
    rows = []
    for number, level in enumerate(levels):
        total += np.tile(level.sums(weight), candidates // level.size)
        if number >= lowest:
            rows.append(total / (1 << number))
    return np.stack(rows)


def construct_vector(dimensions: int, *, lowest: int, highest: int, weights: Tensor | None = None) -> Tensor:
    """A generating vector [d] for 2^lowest to 2^highest points, component by component, in order d n log n.

    weights: product weights [d], 1/j^2 by default. Raises ConfigError for levels out of range.

    >>> construct_vector(3, lowest=5, highest=5)
    tensor([1, 7, 9])
    """
    if not 2 <= lowest <= highest <= 26:
        raise ConfigError(f"levels go from 2 to 26, the lowest first, not {lowest} to {highest}")
    chosen_weights = [1.0 / j**2 for j in range(1, dimensions + 1)] if weights is None else weights.tolist()
    if len(chosen_weights) < dimensions:
        raise ConfigError(f"weights has {len(chosen_weights)} entries for {dimensions} dimensions")
    best = [_alone(dimensions, number, chosen_weights) for number in range(lowest, highest + 1)]
    references = np.array(best)
    levels = [_Level(number) for number in range(highest + 1)]
    vector = []
    for j in range(dimensions):
        errors = _errors(levels, chosen_weights[j], lowest)
        ratio = (errors / references[:, j : j + 1]).max(0)
        exponent = 0 if j == 0 else int(ratio.argmin())
        for level in levels:
            level.accept(exponent, chosen_weights[j])
        entry = pow(5, exponent, 1 << highest)
        vector.append(min(entry, (1 << highest) - entry))
    return torch.tensor(vector, dtype=torch.int64)


def _alone(dimensions: int, number: int, weights: list[float]) -> list[float]:
    """The squared errors after each component of the vector that is best for 2^number points alone."""
    levels = [_Level(level) for level in range(number + 1)]
    found: list[float] = []
    for weight in weights[:dimensions]:
        errors = _errors(levels, weight, number)[0]
        exponent = int(errors.argmin()) if found else 0
        found.append(float(errors[exponent]))
        for level in levels:
            level.accept(exponent, weight)
    return found
