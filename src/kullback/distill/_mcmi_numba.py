"""What a meter takes in of single-precision logits, as one compiled loop; the twin of `CMIMeter._take`.

A row is read from memory once: its largest entry, its exponentials and their sums are made while it is in the cache
nearest to the processor, and only the sums of its group are written.
"""

# Types cannot be checked: the decorator replaces the function.
# mypy: ignore-errors

import numpy as np
from numba import njit

__all__ = ["take"]

_LOG2E, _HIGH, _LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C5, _C4, _C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C2, _C1, _C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _HALF, _LEAST = np.float32(1.0), np.float32(0.5), np.float32(-87.0)


@njit(cache=True, nogil=True, fastmath=True)
def _largest(row):
    """In four at once, which do not wait for one another."""
    a = b = c = d = row[0]
    whole = len(row) // 4 * 4
    for j in range(0, whole, 4):
        a, b = max(a, row[j]), max(b, row[j + 1])
        c, d = max(c, row[j + 2]), max(d, row[j + 3])
    for j in range(whole, len(row)):
        a = max(a, row[j])
    return max(max(a, b), max(c, d))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def take(logits, labels, groups, sharpness, probs, log_probs, entropies):
    """Add rows [n, C] to the sums of P [G, C], of log P (or an array of size 0) and of P log P [G].

    Labels and groups [n] are in range; sharpness is 1 / T. The exponential is 2^k times a polynomial, to 1e-7. Returns
    how many labels come first, the summed cross-entropy, and the first row with NaN or no finite top, or -1.
    """
    rows, classes = logits.shape
    powers = np.empty(classes, np.float32)
    hits, cross = 0, 0.0
    for i in range(rows):
        row = logits[i]
        top = _largest(row) * sharpness
        total, moment = np.float32(0.0), np.float32(0.0)
        for j in range(classes):
            t = max(row[j] * sharpness - top, _LEAST)
            k = np.floor(t * _LOG2E + _HALF)
            r = t - k * _HIGH - k * _LOW
            series = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
            scale = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
            power = (series * r * r + r + _ONE) * scale
            powers[j] = power
            total += power
            moment += power * t
        if not (total >= _HALF and total < np.inf):
            return hits, cross, i
        group, own = groups[i], row[labels[i]] * sharpness
        log_total = np.log(np.float64(total))
        entropies[group] += np.float64(moment) / np.float64(total) - log_total
        cross += log_total - np.float64(own - top)
        share = _ONE / total
        for j in range(classes):
            probs[group, j] += np.float64(powers[j] * share)
        if log_probs.size:
            for j in range(classes):
                log_probs[group, j] += np.float64(row[j] * sharpness - top) - log_total
        if own == top:
            first = True
            for j in range(labels[i]):
                first = first and row[j] < row[labels[i]]
            hits += first
    return hits, cross, -1
