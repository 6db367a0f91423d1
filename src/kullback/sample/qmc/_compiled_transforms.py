"""Compiled transforms along the last axis of arrays [B, 2^m]; the twins in torch are in `transforms.py`."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["bit_reversal", "walsh_hadamard"]

NEAR, FAR = 12, 16  # 2^12 numbers stay in the first-level cache, 2^16 in the second


@njit(cache=True, nogil=True, error_model="numpy")
def _first_levels(source, target, scale):
    """Transforms of eight neighbours each, scaled, from source to target."""
    for i in range(0, source.shape[0], 8):
        a0, a1, a2, a3 = source[i], source[i + 1], source[i + 2], source[i + 3]
        a4, a5, a6, a7 = source[i + 4], source[i + 5], source[i + 6], source[i + 7]
        b0, b1, b2, b3 = a0 + a4, a1 + a5, a2 + a6, a3 + a7
        b4, b5, b6, b7 = a0 - a4, a1 - a5, a2 - a6, a3 - a7
        a0, a1, a2, a3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
        a4, a5, a6, a7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
        target[i], target[i + 1] = (a0 + a1) * scale, (a0 - a1) * scale
        target[i + 2], target[i + 3] = (a2 + a3) * scale, (a2 - a3) * scale
        target[i + 4], target[i + 5] = (a4 + a5) * scale, (a4 - a5) * scale
        target[i + 6], target[i + 7] = (a6 + a7) * scale, (a6 - a7) * scale


@njit(cache=True, nogil=True, error_model="numpy")
def _two_levels(x, step):
    # unsigned indices into one array: only so does the compiler see that short strides can be vectorised
    one = np.uint64(step)
    two, three, four = one + one, one + one + one, one + one + one + one
    for start in range(np.uint64(0), np.uint64(x.shape[0]), four):
        for k in range(start, start + one):
            a, b = x[k] + x[k + one], x[k] - x[k + one]
            c, d = x[k + two] + x[k + three], x[k + two] - x[k + three]
            x[k], x[k + one], x[k + two], x[k + three] = a + c, b + d, a - c, b - d


@njit(cache=True, nogil=True, error_model="numpy")
def _one_level(x, step):
    one = np.uint64(step)
    for start in range(np.uint64(0), np.uint64(x.shape[0]), one + one):
        for k in range(start, start + one):
            a, b = x[k], x[k + one]
            x[k], x[k + one] = a + b, a - b


@njit(cache=True, nogil=True, error_model="numpy")
def _levels(x, first, last):
    """Levels first..last-1 of the butterflies of x, two at a time."""
    level = first
    while level + 2 <= last:
        _two_levels(x, 1 << level)
        level += 2
    if level < last:
        _one_level(x, 1 << level)


@njit(cache=True, nogil=True, error_model="numpy")
def walsh_hadamard(source, target, levels):
    """target [B, n]: the orthonormal transform of each row of source."""
    scale = source.dtype.type(1.0 / np.sqrt(np.float64(1 << levels)))
    for row in range(source.shape[0]):
        x = target[row]
        if levels < 3:
            for i in range(1 << levels):
                x[i] = source[row, i] * scale
            _levels(x, 0, levels)
            continue
        near, far = min(NEAR, levels), min(FAR, levels)
        for begin in range(0, 1 << levels, 1 << far):
            for start in range(begin, begin + (1 << far), 1 << near):
                stop = start + (1 << near)
                _first_levels(source[row, start:stop], x[start:stop], scale)
                _levels(x[start:stop], 3, near)
            _levels(x[begin : begin + (1 << far)], near, far)
        _levels(x, far, levels)


@njit(cache=True, nogil=True, error_model="numpy")
def _reversed(value, width):
    result = 0
    for _ in range(width):
        result = (result << 1) | (value & 1)
        value >>= 1
    return result


@njit(cache=True, nogil=True, error_model="numpy")
def bit_reversal(source, target, levels):
    """target [B, n]: the rows of source in bit-reversed order, by tiles that use lines of the cache whole."""
    half = min(5, levels // 2)
    side = 1 << half
    middle = levels - 2 * half
    inner = np.empty(side, dtype=np.int64)
    for i in range(side):
        inner[i] = _reversed(i, half)
    tile = np.empty((side, side), dtype=source.dtype)
    for row in range(source.shape[0]):
        for m in range(1 << middle):
            here, there = m << half, _reversed(m, middle) << half
            for a in range(side):
                start = (a << (middle + half)) | here
                for c in range(side):
                    tile[inner[a], c] = source[row, start + c]
            for c in range(side):
                start = (inner[c] << (middle + half)) | there
                for a in range(side):
                    target[row, start + a] = tile[a, c]
