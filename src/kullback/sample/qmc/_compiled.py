"""Kernels compiled by numba: the inner loops of generators, scrambles and transforms, on arrays in main memory.

Imported through `bits.compiled` only, since numba is optional. Each has a twin in torch that gives the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["fill_additive", "interlace", "linear_scramble", "scramble_nested"]

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
    """out [R, n, d]: point i combines, by XOR or addition modulo 2^63, shift and the columns of i's digits.

    columns: [R, m, d], or [1, m, d] where all replications have the same.

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
        own = columns[r if columns.shape[0] > 1 else 0]
        table = _low_table(own, depth, xor)
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
                        value = value ^ own[k, j] if xor else (value + own[k, j]) & MASK
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


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _spread(word):
    """The 32 lower digits of a word moved to its even places."""
    word = (word | (word << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    word = (word | (word << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    word = (word | (word << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    word = (word | (word << np.uint64(2))) & np.uint64(0x3333333333333333)
    return (word | (word << np.uint64(1))) & np.uint64(0x5555555555555555)


@njit(cache=True, nogil=True, error_model="numpy")
def interlace(bits, result, alpha, width, result_width):
    """result [R, n, d] from bits [R, n, alpha d]; the twin is `bits.interlace`."""
    count = min(alpha * width, result_width)
    for r in range(result.shape[0]):
        for i in range(result.shape[1]):
            for j in range(result.shape[2]):
                if alpha == 2 and width == 63 and result_width == 63:
                    first, second = np.uint64(bits[r, i, 2 * j]), np.uint64(bits[r, i, 2 * j + 1])
                    both = (_spread(first >> np.uint64(31)) << ONE) | _spread(second >> np.uint64(31))
                    result[r, i, j] = np.int64(both >> ONE)
                    continue
                woven, taken = np.int64(0), 0
                for k in range(width - 1, -1, -1):
                    for part in range(alpha):
                        if taken < count:
                            woven = (woven << 1) | ((bits[r, i, j * alpha + part] >> k) & 1)
                            taken += 1
                result[r, i, j] = woven << (result_width - count)


@njit(cache=True, nogil=True, error_model="numpy")
def linear_scramble(matrices, scrambler, result):
    """result [R, d, m] = L g for columns g [d, m] and the columns of L [R, d, digits]; the twin is in `nets`."""
    digits = scrambler.shape[2]
    for r in range(result.shape[0]):
        for j in range(result.shape[1]):
            for k in range(result.shape[2]):
                column, value = matrices[j, k], np.int64(0)
                for place in range(digits):
                    value ^= -((column >> (digits - 1 - place)) & 1) & scrambler[r, j, place]
                result[r, j, k] = value
