"""Resampling, normalising and gathering as compiled loops; twins of the functions in _moves.py, of the same shapes."""

# Types cannot be checked: the decorators replace the functions.
# mypy: ignore-errors

import numpy as np
from numba import njit

from kullback.sample._backward_numba import fill_guide, search

__all__ = ["choose", "normalise", "resample"]


@njit(cache=True, nogil=True)
def resample(log_weights, numbers, x, ancestors, parents):
    """Ancestors [R, C] by inversion of numbers [R, C], and their states as parents [R, C, d]."""
    chains, size = log_weights.shape
    cumulative, guide = np.empty(size), np.empty(2 * size, np.int64)
    for chain in range(chains):
        total = 0.0
        for k in range(size):
            total += np.exp(log_weights[chain, k])
            cumulative[k] = total
        fill_guide(cumulative, guide)
        for k in range(numbers.shape[1]):
            ancestor = search(cumulative, guide, numbers[chain, k])
            ancestors[chain, k] = ancestor
            for j in range(x.shape[2]):
                parents[chain, k, j] = x[chain, ancestor, j]
    return True


@njit(cache=True, nogil=True)
def normalise(weights, log_total, effective, log_weights):
    """Normalised log-weights [R, N], the log of their sum and the effective size, [R] each; False: not finite."""
    for chain in range(weights.shape[0]):
        top = -np.inf
        for value in weights[chain]:
            # Written so that a value that is not a number comes through.
            if not value <= top:
                top = value
        if not np.isfinite(top):
            return False
        total, squares = 0.0, 0.0
        for value in weights[chain]:
            share = np.exp(value - top)
            total += share
            squares += share * share
        if not np.isfinite(total):
            return False
        shift = top + np.log(total)
        for k in range(weights.shape[1]):
            log_weights[chain, k] = weights[chain, k] - shift
        log_total[chain] = shift
        effective[chain] = total * total / squares
    return True


@njit(cache=True, nogil=True)
def choose(values, x, indices, chosen_values, chosen_x):
    """values [R, N, K] and x [R, N, d] at indices [R, P, M]."""
    for chain in range(indices.shape[0]):
        for row in range(indices.shape[1]):
            for draw in range(indices.shape[2]):
                index = indices[chain, row, draw]
                for k in range(values.shape[2]):
                    chosen_values[chain, row, draw, k] = values[chain, index, k]
                for k in range(x.shape[2]):
                    chosen_x[chain, row, draw, k] = x[chain, index, k]
    return True
