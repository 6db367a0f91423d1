"""Backward draws as compiled loops, for transitions that are Gaussian once whitened; twin of the loops in backward.py.

They see the same counted random numbers as the vectorised draws, and so return the same indices.
Shapes as in backward.py: cumulative and log-weights [R, N], means [R, N, d], points [R, P, d], indices [R, P, M].
"""

# Types cannot be checked: the decorators replace the functions.
# mypy: ignore-errors

import numpy as np
from numba import njit

__all__ = ["draw_exact", "draw_hybrid", "fill_guide", "search"]

_STRIDE, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ONE, _11, _27, _30, _31 = (np.uint64(c) for c in (1, 11, 27, 30, 31))
_UNIT = 2.0**-53


@njit(cache=True, inline="always")
def _counted(seed, counter):
    state = np.uint64(seed) + (np.uint64(counter) + _ONE) * _STRIDE
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    state = state ^ (state >> _31)
    return np.float64(state >> _11) * _UNIT


@njit(cache=True, inline="always")
def _half_square(means, points, chain, source, row):
    total = 0.0
    for k in range(means.shape[2]):
        difference = means[chain, source, k] - points[chain, row, k]
        total += difference * difference
    return 0.5 * total


@njit(cache=True)
def fill_guide(cumulative, guide):
    """guide [C]: for each k the first index whose cumulative weight exceeds k / C of the total, where searches begin.

    A little less than k / C, so that rounding never lets a search begin too late.
    """
    size, cells = len(cumulative), len(guide)
    step, index = cumulative[size - 1] * (1.0 - 1e-15) / cells, 0
    for k in range(cells):
        bound = k * step
        while index < size - 1 and cumulative[index] <= bound:
            index += 1
        guide[k] = index


@njit(cache=True, inline="always")
def search(cumulative, guide, number):
    """The first index whose cumulative weight exceeds a share `number` in [0, 1) of the total."""
    size = len(cumulative)
    target = number * cumulative[size - 1]
    index = guide[min(int(number * len(guide)), len(guide) - 1)]
    while cumulative[index] <= target and index < size - 1:
        index += 1
    return index


@njit(cache=True)
def _fill_row(log_weights, means, points, chain, row, buffer):
    """The cumulative backward weights of one row in `buffer`; its last entry is not positive when all are zero."""
    size = log_weights.shape[1]
    top = -np.inf
    for source in range(size):
        value = log_weights[chain, source] - _half_square(means, points, chain, source, row)
        buffer[source] = value
        top = max(top, value)
    if not top > -np.inf:
        buffer[size - 1] = -1.0
        return
    total = 0.0
    for source in range(size):
        total += np.exp(buffer[source] - top)
        buffer[source] = total


@njit(cache=True)
def _draw_row(buffer, number):
    size = len(buffer)
    return min(np.searchsorted(buffer, number * buffer[size - 1], side="right"), size - 1)


@njit(cache=True, nogil=True)
def draw_exact(log_weights, means, points, seeds, out):
    """Indices by inversion of each row's cumulative weights; False when a row has no weight at all."""
    chains, rows, draws = out.shape
    buffer = np.empty(log_weights.shape[1])
    for chain in range(chains):
        for row in range(rows):
            _fill_row(log_weights, means, points, chain, row, buffer)
            if not buffer[-1] > 0.0:
                return False
            for draw in range(draws):
                out[chain, row, draw] = _draw_row(buffer, _counted(seeds[chain], row * draws + draw))
    return True


@njit(cache=True, nogil=True)
def draw_hybrid(max_tries, cumulative, log_weights, means, points, seeds, tries, accepts, out):
    """Indices by at most `max_tries` rejections each, by inversion for those then left; tries and accepts
    [R] count proposals."""
    chains, rows, draws = out.shape
    size = log_weights.shape[1]
    guide, buffer = np.empty(2 * size, np.int64), np.empty(size)
    stride = 2 * max_tries + 1
    for chain in range(chains):
        weights, mean, seed, proposed, kept = cumulative[chain], means[chain], seeds[chain], 0, 0
        fill_guide(weights, guide)
        for row in range(rows):
            point, filled = points[chain, row], False
            for draw in range(draws):
                counter = (row * draws + draw) * stride
                accepted = False
                # A row whose weights have once been summed goes on with them.
                for _ in range(0 if filled else max_tries):
                    index = search(weights, guide, _counted(seed, counter))
                    coin = _counted(seed, counter + 1)
                    counter += 2
                    proposed += 1
                    total = 0.0
                    for k in range(mean.shape[1]):
                        difference = mean[index, k] - point[k]
                        total += difference * difference
                    half = 0.5 * total
                    # 1 - s <= exp(-s) <= 1 / (1 + s): most coins need no exponential.
                    if coin * (1.0 + half) < 1.0 and (coin < 1.0 - half or coin < np.exp(-half)):
                        out[chain, row, draw] = index
                        kept += 1
                        accepted = True
                        break
                if not accepted:
                    if not filled:
                        _fill_row(log_weights, means, points, chain, row, buffer)
                        filled = True
                    if not buffer[-1] > 0.0:
                        return False
                    last = (row * draws + draw) * stride + 2 * max_tries
                    out[chain, row, draw] = _draw_row(buffer, _counted(seed, last))
        tries[chain], accepts[chain] = proposed, kept
    return True
