"""Generating matrices of Sobol' nets in 21201 dimensions, from the direction numbers (Joe, Kuo) that scipy installs."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError

__all__ = ["COLUMNS", "sobol_matrices"]

COLUMNS = 32  # columns and binary digits of a matrix: 2^32 points


@lru_cache(maxsize=1)
def _direction_numbers() -> tuple[np.ndarray, np.ndarray]:
    """The primitive polynomials [D], as binary numbers, and the first odd integers [D, 18] of each recurrence."""
    spec = find_spec("scipy")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / "stats" / "_sobol_direction_numbers.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                return stored["poly"], stored["vinit"]
    raise DataError("scipy's table of direction numbers is not where it was expected: pass matrices of your own")


@lru_cache(maxsize=8)
def _matrices(dimensions: int) -> np.ndarray:
    polynomials, first = (array[:dimensions] for array in _direction_numbers())
    degrees = np.frexp(polynomials)[1] - 1
    odd = np.ones((dimensions, COLUMNS), dtype=np.int64)
    for degree in np.unique(degrees[1:]):
        rows = np.flatnonzero(degrees == degree)
        rows = rows[rows > 0]
        odd[rows, :degree] = first[rows, :degree]
        for k in range(degree, COLUMNS):
            value = odd[rows, k - degree] ^ (odd[rows, k - degree] << degree)
            for step in range(1, degree):
                coefficient = (polynomials[rows] >> (degree - step)) & 1
                value ^= coefficient * (odd[rows, k - step] << step)
            odd[rows, k] = value
    return odd << np.arange(COLUMNS - 1, -1, -1)


def sobol_matrices(dimensions: int) -> Tensor:
    """Columns [d, 32] of the Sobol' generating matrices, as integers of 32 bits, the most significant digit first.

    Raises ConfigError for more than 21201 dimensions, DataError where scipy keeps its table elsewhere.

    >>> sobol_matrices(2)[:, :3] >> 29
    tensor([[4, 2, 1],
            [4, 6, 5]])
    """
    limit = len(_direction_numbers()[0])
    if not 1 <= dimensions <= limit:
        raise ConfigError(f"Sobol' nets have 1 to {limit} dimensions, not {dimensions}: pass matrices of your own")
    return torch.from_numpy(_matrices(dimensions).copy())
