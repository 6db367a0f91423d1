"""What happens to a cloud of particles between two model calls: resampling, normalising weights, gathering.

Each function is a few tensor operations, and, for particles in double precision on a CPU where numba is installed, one
compiled loop that does the same: with few particles the time of a smoother is that of calls, not of arithmetic.

Shapes: R chains, N particles, C drawn ancestors, P points, M draws, d dimensions, K statistics.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kullback.core.errors import DataError
from kullback.sample._threads import over_chains
from kullback.sample.draws import invert

__all__ = ["chosen", "effective_size", "loops_for", "normalised", "resampled", "select"]


@cache
def _numba() -> ModuleType | None:
    try:
        from kullback.sample import _moves_numba
    except ImportError:
        return None
    return _moves_numba


def loops_for(compiled: bool | None, *tensors: Tensor) -> ModuleType | None:
    """The compiled loops, where all tensors are of double precision, on a CPU, and outside any derivative."""
    if compiled is False:
        return None
    fits = all(x.dtype == torch.float64 and x.device.type == "cpu" and not x.requires_grad for x in tensors)
    return _numba() if fits else None


def select(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x [R, N, ...] by indices [R, ...] of each chain."""
    flat = indices if indices.ndim == 2 else indices.flatten(1)
    for width in x.shape[2:]:
        flat = flat.unsqueeze(-1).expand(*flat.shape, width)
    gathered = x.gather(1, flat)
    return gathered if indices.ndim == 2 else gathered.view(*indices.shape, *x.shape[2:])


def effective_size(log_weights: Tensor) -> Tensor:
    """1 / sum w^2 of normalised log-weights [R, N]: [R]."""
    return (2.0 * log_weights).exp().sum(-1).reciprocal()


def resampled(log_weights: Tensor, numbers: Tensor, x: Tensor, compiled: bool | None = None) -> tuple[Tensor, Tensor]:
    """Ancestors [R, C] by inversion of uniform numbers [R, C], and their states [R, C, d]."""
    loops = loops_for(compiled, log_weights, numbers, x)
    if loops is None:
        ancestors = invert(log_weights.exp().cumsum(-1), numbers)
        return ancestors, select(x, ancestors)
    ancestors = torch.empty(numbers.shape, dtype=torch.int64)
    parents = torch.empty(*numbers.shape, x.shape[-1], dtype=x.dtype)
    arrays = (tensor.contiguous().numpy() for tensor in (log_weights, numbers, x))
    over_chains(loops.resample, *arrays, ancestors.numpy(), parents.numpy())
    return ancestors, parents


def normalised(weights: Tensor, time: int, compiled: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights [R, N] that sum to one, the logarithm of their sum before, and the effective sample size, [R] each.

    Raises DataError, with the time, when all weights are zero, or one is infinite or not a number.
    """
    loops = loops_for(compiled, weights)
    if loops is None:
        log_total = weights.logsumexp(-1)
        if not bool(log_total.isfinite().all()):
            raise _useless(weights, time)
        log_weights = weights - log_total.unsqueeze(-1)
        return log_weights, log_total, effective_size(log_weights)
    log_weights = torch.empty(weights.shape, dtype=weights.dtype)
    log_total, effective = torch.empty(2, len(weights), dtype=weights.dtype)
    arrays = (tensor.numpy() for tensor in (weights.contiguous(), log_total, effective, log_weights))
    if not over_chains(loops.normalise, *arrays):
        raise _useless(weights, time)
    return log_weights, log_total, effective


def _useless(weights: Tensor, time: int) -> DataError:
    if bool(weights.isnan().any()):
        return DataError(f"a log-density at time {time} is not a number: check the model's parameters and the data")
    infinite = bool((weights == torch.inf).any())
    what = "a weight is infinite" if infinite else "no particle explains the observation"
    return DataError(f"{what} at time {time}: take more particles or a proposal that looks at the observation")


def chosen(values: Tensor, x: Tensor, indices: Tensor, compiled: bool | None = None) -> tuple[Tensor, Tensor]:
    """values [R, N, K] and x [R, N, d] at indices [R, P, M]: [R, P, M, K] and [R, P, M, d]."""
    loops = loops_for(compiled, values, x)
    if loops is None:
        return select(values, indices), select(x, indices)
    of_values = torch.empty(*indices.shape, values.shape[-1], dtype=values.dtype)
    of_x = torch.empty(*indices.shape, x.shape[-1], dtype=x.dtype)
    arrays = (tensor.contiguous().numpy() for tensor in (values, x, indices))
    over_chains(loops.choose, *arrays, of_values.numpy(), of_x.numpy())
    return of_values, of_x
