"""KLoM as compiled loops over margins in memory order; the twin of the tensor operations in unlearning.py."""

# Types cannot be checked: the decorators replace the functions.
# mypy: ignore-errors

import numpy as np
from numba import njit

__all__ = ["klom"]


@njit(cache=True, nogil=True)
def _span(x, clip, low, high):
    """Extend low and high [n] over margins [N, n] in +-clip; False where one is NaN."""
    fine = True
    for row in x:
        for j in range(len(row)):
            value = np.float64(row[j])
            fine &= value == value
            value = min(max(value, -clip), clip)
            low[j], high[j] = min(low[j], value), max(high[j], value)
    return fine


@njit(cache=True, nogil=True)
def _count(x, clip, low, high, scale, last, include_max, counts, totals):
    """Margins in the bins of each point [n, bins], and how many of them."""
    for row in x:
        for j in range(len(row)):
            value = min(max(np.float64(row[j]), -clip), clip)
            if include_max or value < high[j]:
                place = min(np.int64((value - low[j]) * scale[j]), last)
                counts[j, place] += 1
                totals[j] += 1


@njit(cache=True, nogil=True)
def klom(first, second, bins, eps, clip, include_max, found):
    """Set found [n] to KL(first, second) of margins [N, n] and [M, n]; False where a margin is NaN."""
    points = first.shape[1]
    low, high = np.full(points, np.inf), np.full(points, -np.inf)
    if not (_span(first, clip, low, high) and _span(second, clip, low, high)):
        return False
    scale = np.ones(points)
    for j in range(points):
        if high[j] > low[j]:
            scale[j] = bins / (high[j] - low[j])
    counts, totals = np.zeros((2, points, bins), np.int32), np.zeros((2, points), np.int32)
    _count(first, clip, low, high, scale, bins - 1, include_max, counts[0], totals[0])
    _count(second, clip, low, high, scale, bins - 1, include_max, counts[1], totals[1])
    for j in range(points):
        own, other = max(totals[0, j], 1), max(totals[1, j], 1)
        total = 0.0
        for k in range(bins):
            if counts[0, j, k]:
                p, q = counts[0, j, k] / own, counts[1, j, k] / other
                total += p * np.log(p / (q if q > 0.0 else eps))
        found[j] = total
    return True
