"""Compiled kernels of digital nets in any bases; the twins in torch are in `digits.py`.

An index is split into a low part, below B = b^L, and a high part, which counts like an odometer: a digit that goes up
by one, or back from b - 1 to 0, adds its column of the generating matrix modulo b either way.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kullback.sample.qmc._compiled import GOLDEN, _mix

__all__ = ["fill_digits", "fill_nested_digits"]

FACTORIALS = np.array([1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0, 5040.0])
SEPARABLE, TABULATED, DIRECT = 0, 1, 2
GROUP = 128  # dimensions whose tables are held at once
CHUNK = 512  # rows, so that a chunk of points stays in the cache


@njit(cache=True, nogil=True, error_model="numpy")
def _is_separable(columns, used, kept):
    """Whether index digit a decides digit a of the point and no other, as in Halton's sequence."""
    for a in range(used):
        for k in range(kept):
            if k != a and columns[a, k] != 0:
                return False
    return used <= kept


@njit(cache=True, nogil=True, error_model="numpy")
def _low_depth(base, bound):
    depth, size = 1, base
    while size * base <= bound:
        size *= base
        depth += 1
    return depth, size


@njit(cache=True, nogil=True, error_model="numpy")
def _low_digits(columns, base, depth, size, kept):
    """Digits [kept, size] of the low indices."""
    digits = np.zeros((kept, size), dtype=np.int64)
    for k in range(kept):
        step = 1
        for a in range(min(depth, columns.shape[0])):
            column = columns[a, k]
            for i in range(step):
                value = digits[k, i]
                for c in range(1, base):
                    value += column
                    if value >= base:
                        value -= base
                    digits[k, c * step + i] = value
            step *= base
    return digits


@njit(cache=True, nogil=True, error_model="numpy")
def _lay_out(low, mode, columns, table, base, kept, depth, size, used):
    """What the low part contributes, laid out for the mode."""
    if mode == SEPARABLE:
        constant = 0
        for k in range(max(used, depth), kept):
            constant += table[k * base]
        low[0] = constant
        step = 1
        for a in range(depth):
            column = columns[a, a] if a < used else 0
            for c in range(base - 1, -1, -1):
                term = table[a * base + (c * column) % base]
                for i in range(step):
                    low[c * step + i] = low[i] + term
            step *= base
        return
    digits = _low_digits(columns, base, depth, size, kept)
    for k in range(kept):
        if mode == DIRECT:
            low[k * size : (k + 1) * size] = digits[k]
            continue
        for v in range(base):
            for i in range(size):
                place = digits[k, i] + v
                if place >= base:
                    place -= base
                low[(k * base + v) * size + i] = table[k * base + place]


@njit(cache=True, nogil=True, error_model="numpy")
def _advance(state, high, columns, base, kept, depth, used):
    """One more in the high part: its digits in state, what they add to the digits of the point in high."""
    a = depth
    while a < used:
        for k in range(kept):
            value = high[k] + columns[a, k]
            high[k] = value - base if value >= base else value
        state[a] += 1
        if state[a] < base:
            return
        state[a] = 0
        a += 1


@njit(cache=True, nogil=True, error_model="numpy")
def _start(block, state, high, columns, base, kept, depth, used):
    high[:kept] = 0
    for a in range(depth, used):
        digit = block % base
        block //= base
        state[a] = digit
        for k in range(kept):
            high[k] = (high[k] + digit * columns[a, k]) % base


@njit(cache=True, nogil=True, error_model="numpy")
def _write(target, accumulator, low, table, high, mode, base, kept, depth, size, used, inside, divisor):
    """target [rows]: the points from `inside` on of one block."""
    rows = target.shape[0]
    if mode == SEPARABLE:
        value = 0
        for a in range(depth, used):
            value += table[a * base + high[a]]
        for i in range(rows):
            target[i] = (low[inside + i] + value) / divisor
        return
    accumulator[:rows] = 0
    if mode == TABULATED:
        k = 0
        while k + 4 <= kept:
            one = low[(k * base + high[k]) * size + inside :]
            two = low[((k + 1) * base + high[k + 1]) * size + inside :]
            three = low[((k + 2) * base + high[k + 2]) * size + inside :]
            four = low[((k + 3) * base + high[k + 3]) * size + inside :]
            for i in range(rows):
                accumulator[i] += (one[i] + two[i]) + (three[i] + four[i])
            k += 4
        while k < kept:
            one = low[(k * base + high[k]) * size + inside :]
            for i in range(rows):
                accumulator[i] += one[i]
            k += 1
    else:
        for k in range(kept):
            digits = low[k * size + inside :]
            values = table[k * base : (k + 1) * base]
            add = high[k]
            for i in range(rows):
                place = digits[i] + add
                accumulator[i] += values[place - base if place >= base else place]
    for i in range(rows):
        target[i] = accumulator[i] / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def _index_digits(last, base):
    count = 1
    while last >= base:
        last //= base
        count += 1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _plan(columns, base, kept, used, count):
    """The mode of a dimension, the depth and size of its low part, and how many numbers it keeps."""
    if _is_separable(columns, used, kept):
        depth, size = _low_depth(base, min(2048, max(64, count // 2)))
        return SEPARABLE, depth, size, size
    depth, size = _low_depth(base, 256)
    if kept * base * size <= 40000 and count >= base * size:
        return TABULATED, depth, size, kept * base * size
    depth, size = _low_depth(base, 256 if count >= 2048 else 32)
    return DIRECT, depth, size, kept * size


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_group(out, columns, bases, counts, table, first):
    count, dimensions = out.shape
    plan = np.empty((dimensions, 7), dtype=np.int64)
    needed, start = 0, 0
    for j in range(dimensions):
        base, kept = bases[j], counts[j]
        used = min(columns.shape[1], _index_digits(first + count - 1, base))
        mode, depth, size, length = _plan(columns[j], base, kept, used, count)
        plan[j] = np.array([mode, depth, size, used, needed, start, length])
        needed += length
        start += base * kept
    low = np.empty(needed, dtype=np.int64)
    state = np.zeros((dimensions, columns.shape[1] + 1), dtype=np.int64)
    high = np.zeros((dimensions, 64), dtype=np.int64)
    for j in range(dimensions):
        mode, depth, size, used, place, start, length = plan[j]
        _lay_out(low[place : place + length], mode, columns[j], table[start:], bases[j], counts[j], depth, size, used)
        _start(first // size, state[j], high[j], columns[j], bases[j], counts[j], depth, used)
    accumulator = np.empty(CHUNK, dtype=np.int64)
    # a pitch that is no power of 2, or a row of the buffer would fall on few lines of the cache
    buffer = np.empty((dimensions, CHUNK + 8))
    for begin in range(first, first + count, CHUNK):
        for j in range(dimensions):
            mode, depth, size, used, place, start, length = plan[j]
            base, kept = bases[j], counts[j]
            divisor = np.float64(base) ** kept
            i, end = begin, min(begin + CHUNK, first + count)
            while i < end:
                inside = i % size
                rows = min(size - inside, end - i)
                _write(
                    buffer[j, i - begin : i - begin + rows], accumulator, low[place : place + length], table[start:],
                    high[j], mode, base, kept, depth, size, used, inside, divisor,
                )  # fmt: skip
                i += rows
                if i % size == 0:
                    _advance(state[j], high[j], columns[j], base, kept, depth, used)
        # whole lines of the cache at a time: a column of its own would touch each line once a dimension
        for i in range(min(CHUNK, first + count - begin)):
            for j in range(dimensions):
                out[begin - first + i, j] = buffer[j, i]


@njit(cache=True, nogil=True, error_model="numpy")
def fill_digits(out, columns, bases, counts, tables, first):
    """out [R, n, d] from columns [R or 1, d, m, t], bases [d], digits kept [d] and tables [R, sum t b]."""
    dimensions = out.shape[2]
    for r in range(out.shape[0]):
        place = 0
        for j in range(0, dimensions, GROUP):
            stop = min(j + GROUP, dimensions)
            own = columns[r if columns.shape[0] > 1 else 0, j:stop]
            _fill_group(out[r, :, j:stop], own, bases[j:stop], counts[j:stop], tables[r, place:], first)
            for k in range(j, stop):
                place += bases[k] * counts[k]


@njit(cache=True, nogil=True, error_model="numpy")
def _nested_value(digits, level_keys, weights, base, count, permutations):
    """The sum of the scrambled digits of one dimension, each times its weight."""
    value, prefix = np.int64(0), np.uint64(0)
    step = np.uint64(base)
    if base <= 7:
        choices = FACTORIALS[base]
        for k in range(count):
            node = _mix(prefix * GOLDEN + level_keys[k])
            which = np.int64(np.float64(node >> np.uint64(11)) * 2.0**-53 * choices)
            value += weights[k] * permutations[which * base + digits[k]]
            prefix = prefix * step + np.uint64(digits[k])
        return value
    for k in range(count):
        word = _mix(prefix * GOLDEN + level_keys[k])
        own = np.int64(_mix(word + np.uint64(digits[k] + 1) * GOLDEN))
        rank = 0
        for _ in range(base):
            word = word + GOLDEN
            rank += 1 if np.int64(_mix(word)) < own else 0
        value += weights[k] * rank
        prefix = prefix * step + np.uint64(digits[k])
    return value


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_nested(out, columns, bases, counts, keys, tables, starts, alpha, first):
    """out [n, d] of one replication, one input dimension after the other."""
    count = out.shape[0]
    state = np.zeros(columns.shape[1] + 1, dtype=np.int64)
    digits = np.zeros(64, dtype=np.int64)
    level_keys = np.empty(64, dtype=np.uint64)
    weights = np.zeros(64, dtype=np.int64)
    values = np.empty(count, dtype=np.int64)
    for j in range(columns.shape[0]):
        base, kept, part = bases[j], counts[j], j % alpha
        used = min(columns.shape[1], _index_digits(first + count - 1, base))
        own = (kept - part + alpha - 1) // alpha
        for k in range(own):
            level_keys[k] = _mix(np.uint64(keys[j]) + np.uint64(k + 1) * GOLDEN)
            weights[k] = base ** (kept - 1 - part - k * alpha)
        _start(first, state, digits, columns[j], base, kept, 0, used)
        if part == 0:
            values[:] = 0
        permutations = tables[starts[j] :]
        for i in range(count):
            values[i] += _nested_value(digits, level_keys, weights, base, own, permutations)
            _advance(state, digits, columns[j], base, kept, 0, used)
        if part == alpha - 1:
            divisor = np.float64(base) ** kept
            for i in range(count):
                out[i, j // alpha] = values[i] / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def fill_nested_digits(out, columns, bases, counts, keys, tables, starts, alpha, first):
    """out [R, n, d] from columns [1, alpha d, m, t] and keys [R, alpha d], under nested uniform scrambling.

    tables: all permutations of the digits of each dimension, from `starts` [alpha d] on, for bases up to 7.
    """
    for r in range(out.shape[0]):
        _fill_nested(out[r], columns[0], bases, counts, keys[r], tables, starts, alpha, first)
