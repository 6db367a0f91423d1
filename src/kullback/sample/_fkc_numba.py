"""Systematic resampling as one compiled loop; the twin of what fkc.py does in tensors, number for number."""

# Types cannot be checked: the decorators replace the functions.
# mypy: ignore-errors

import numpy as np
from numba import njit

__all__ = ["systematic"]


@njit(cache=True)
def systematic(log_weights, numbers, ancestors):
    """Ancestors [R, K] of log-weights [R, K] by one uniform number a row [R]; False where no weight is a number."""
    size = log_weights.shape[1]
    weights = np.empty(size)
    for row in range(len(log_weights)):
        top = -np.inf
        for value in log_weights[row]:
            # Written so that a value that is not a number comes through.
            if not value <= top:
                top = value
        total = 0.0
        for k in range(size):
            weights[k] = np.exp(log_weights[row, k] - top)
            total += weights[k]
        if not np.isfinite(total):
            return False
        scale, number, reached, begin = size / total, numbers[row], 0.0, 0
        for k in range(size):
            reached += weights[k]
            end = min(size, int(np.ceil(reached * scale - number))) if k + 1 < size else size
            for place in range(begin, end):
                ancestors[row, place] = k
            begin = max(begin, end)
    return True
