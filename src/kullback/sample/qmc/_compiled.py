"""Kernels compiled by numba: the inner loops of generators, scrambles and transforms, on arrays in main memory.

Imported through `bits.compiled` only, since numba is optional. Each has a twin in torch that gives the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["fill_additive", "scramble_nested"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
ONE = np.uint64(1)
MASK = np.int64((1 << 63) - 1)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _mix(word):
    word = (word ^ (word >> np.uint64(30))) * FIRST
    word = (word ^ (word >> np.uint64(27))) * SECOND
    return word ^ (word >> np.uint64(31))


@njit(cache=True, nogil=True, error_model="numpy")
def _xor_rows(out, low, tile, drop, scale):
    width = tile.shape[0]
    for start in range(0, out.shape[0], width):
        for k in range(min(width, out.shape[0] - start)):
            out[start + k] = ((low[start + k] ^ tile[k]) >> drop) * scale


@njit(cache=True, nogil=True, error_model="numpy")
def _add_rows(out, low, tile, drop, scale):
    width = tile.shape[0]
    for start in range(0, out.shape[0], width):
        for k in range(min(width, out.shape[0] - start)):
            out[start + k] = (((low[start + k] + tile[k]) & MASK) >> drop) * scale


@njit(cache=True, nogil=True, error_model="numpy")
def _low_table(columns, depth, xor):
    """Combinations of the first `depth` columns [m, d] in natural order: [2^depth, d]."""
    dimensions = columns.shape[1]
    table = np.zeros((1 << depth, dimensions), dtype=np.int64)
    for k in range(depth):
        size = 1 << k
        for i in range(size):
            for j in range(dimensions):
                old = table[i, j]
                table[size + i, j] = old ^ columns[k, j] if xor else (old + columns[k, j]) & MASK
    return table


@njit(cache=True, nogil=True, error_model="numpy")
def fill_additive(out, columns, shift, first, gray, xor, drop, scale):
    """out [R, n, d]: point i combines, by XOR or addition modulo 2^63, the columns [R, m, d] of i's digits and shift.

    What is written is (v >> drop) * scale. gray: i is replaced by its Gray code.
    """
    replications, count, dimensions = out.shape
    depth = 3
    while (1 << depth) * dimensions < 4096 and (1 << depth) < count:
        depth += 1
    depth = min(depth, columns.shape[1])
    size = 1 << depth
    copies = max(1, 256 // dimensions)
    tile = np.empty(copies * dimensions, dtype=np.int64)
    for r in range(replications):
        table = _low_table(columns[r], depth, xor)
        tables = np.empty((2, size * dimensions), dtype=np.int64)
        for i in range(size):
            code = i ^ (i >> 1) if gray else i
            # the lowest digit of the block's number turns the highest of the Gray code within the block
            other = code ^ (size >> 1) if gray else code
            for j in range(dimensions):
                tables[0, i * dimensions + j] = table[code, j]
                tables[1, i * dimensions + j] = table[other, j]
        flat = out[r].reshape(-1)
        i = first
        while i < first + count:
            block, inside = i >> depth, i & (size - 1)
            rows = min(size - inside, first + count - i)
            code = block ^ (block >> 1) if gray else block
            for j in range(dimensions):
                value = shift[r, j]
                rest, k = code, depth
                while rest:
                    if rest & 1:
                        value = value ^ columns[r, k, j] if xor else (value + columns[r, k, j]) & MASK
                    rest >>= 1
                    k += 1
                for c in range(copies):
                    tile[c * dimensions + j] = value
            target = flat[(i - first) * dimensions : (i - first + rows) * dimensions]
            low = tables[block & 1, inside * dimensions : (inside + rows) * dimensions]
            if xor:
                _xor_rows(target, low, tile, drop, scale)
            else:
                _add_rows(target, low, tile, drop, scale)
            i += rows


@njit(cache=True, nogil=True, error_model="numpy")
def _scramble_segment(values, keys, width, digits):
    """Nested scrambling of values [c] by keys [c], both uint64, in place; one hash serves six levels of the tree."""
    count = values.shape[0]
    result = np.zeros(count, dtype=np.uint64)
    blocks = (digits + 5) // 6
    for block in range(blocks):
        levels = min(6, digits - 6 * block)
        # the six digits of the block, moved to the lowest places
        place = np.uint64(width - 6 * block - levels)
        above = np.uint64(width - 6 * block)
        number = np.uint64(block)
        if levels == 6:
            for c in range(count):
                value = values[c]
                prefix = value >> above
                word = _mix((prefix * np.uint64(16) + number) * GOLDEN + keys[c])
                six = (value >> place) & np.uint64(63)
                flips = (word >> ONE) & ONE
                for level in range(1, 6):
                    node = (six | np.uint64(64)) >> np.uint64(6 - level)
                    flips = (flips << ONE) | ((word >> node) & ONE)
                result[c] |= (six ^ flips) << place
        else:
            for c in range(count):
                value = values[c]
                word = _mix(((value >> above) * np.uint64(16) + number) * GOLDEN + keys[c])
                some = (value >> place) & ((ONE << np.uint64(levels)) - ONE)
                flips = np.uint64(0)
                for level in range(levels):
                    node = (some | (ONE << np.uint64(levels))) >> np.uint64(levels - level)
                    flips = (flips << ONE) | ((word >> node) & ONE)
                result[c] |= (some ^ flips) << place
    values[:] = result


@njit(cache=True, nogil=True, error_model="numpy")
def _scramble_nested(bits, keys, width, digits):
    replications, count, dimensions = bits.shape
    rows = max(1, 256 // dimensions)
    tile = np.empty(rows * dimensions, dtype=np.uint64)
    for r in range(replications):
        for row in range(rows):
            tile[row * dimensions : (row + 1) * dimensions] = keys[r]
        flat = bits[r].reshape(-1)
        for start in range(0, count * dimensions, rows * dimensions):
            segment = flat[start : min(start + rows * dimensions, count * dimensions)]
            _scramble_segment(segment, tile, width, digits)


def scramble_nested(bits, keys, width, digits):
    """Nested uniform scrambling of bits [R, n, d] by keys [R, d], in place; the twin is `bits.scramble_nested`."""
    _scramble_nested(bits.view(np.uint64), keys.view(np.uint64), width, digits)
