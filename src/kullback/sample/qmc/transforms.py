"""Orthonormal transforms in the order of the points: bit-reversed Fourier and Walsh-Hadamard, n = 2^m, last axis.

    fftbr(x) = fft(x[rev]) / sqrt(n)         rev: bit reversal, for lattices in natural order
    ifftbr(y) = sqrt(n) ifft(y) [rev]        its inverse
    fwht(x) = H x / sqrt(n)                  H_jk = (-1)^(j . k), its own inverse, for nets in natural order

When points double, with y1 and y2 the transforms of the old and the new half, the transform of all of them is
[y1 + w y2, y1 - w y2] / sqrt(2), with w = 1 (omega_fwht) or exp(-i pi k / n) (omega_fftbr).
All take numpy arrays or tensors of any leading shape, and are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ShapeError
from kullback.sample.qmc.bits import compiled, reverse_bits

__all__ = ["bit_reversed", "fftbr", "fwht", "ifftbr", "omega_fftbr", "omega_fwht"]

Array = TypeVar("Array", Tensor, np.ndarray)
GATHERED = 1 << 17  # up to here plain indexing stays in the cache and wins over tiles


def _levels(x: Tensor | np.ndarray) -> int:
    count = x.shape[-1] if x.ndim else 0
    if count < 1 or count & (count - 1):
        raise ShapeError(f"the last axis has a power of 2 entries, as the points it belongs to, and has {count}")
    return count.bit_length() - 1


# --- arrays in main memory ---


@lru_cache(maxsize=32)
def _order(levels: int) -> np.ndarray:
    return reverse_bits(torch.arange(1 << levels), levels).numpy()


def _permute_array(x: np.ndarray) -> np.ndarray:
    levels = _levels(x)
    if x.shape[-1] <= GATHERED or x.dtype.char not in "fdFD":
        return x[..., _order(levels)]
    kernels = compiled(module="_compiled_transforms")
    if kernels is None:
        return x[..., _order(levels)]
    result = np.empty(x.shape, dtype=x.dtype)
    kernels.bit_reversal(np.ascontiguousarray(x).reshape(-1, 1 << levels), result.reshape(-1, 1 << levels), levels)
    return result


def _fourier_array(x: np.ndarray) -> np.ndarray:
    from scipy import fft

    result: np.ndarray = fft.fft(_permute_array(x), norm="ortho")
    return result


def _inverse_array(y: np.ndarray) -> np.ndarray:
    from scipy import fft

    _levels(y)
    return _permute_array(fft.ifft(y, norm="ortho"))


def _walsh_array(x: np.ndarray) -> np.ndarray:
    levels = _levels(x)
    kernels = compiled(module="_compiled_transforms")
    if kernels is None or x.dtype.char not in "fd":
        return _walsh_by_products(torch.from_numpy(np.ascontiguousarray(x)), levels).numpy()
    result = np.empty(x.shape, dtype=x.dtype)
    source = np.ascontiguousarray(x).reshape(-1, 1 << levels)
    kernels.walsh_hadamard(source, result.reshape(-1, 1 << levels), levels)
    return result


# --- tensors on any device ---


def _walsh_by_products(x: Tensor, levels: int) -> Tensor:
    """Products with small Hadamard matrices along factors of the axis: what an accelerator does best."""
    result, done = x, 0
    while done < levels:
        step = min(5, levels - done)
        matrix = _hadamard(step).to(x)
        parts = result.unflatten(-1, (-1, 1 << step, 1 << done))
        result = torch.einsum("ab,...bc->...ac", matrix, parts).flatten(-3)
        done += step
    return result if levels else x.clone()


@lru_cache(maxsize=8)
def _hadamard(levels: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(levels):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2.0)
    return matrix


def _through_array(function: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    return torch.from_numpy(function(x.detach().resolve_conj().numpy()))


@lru_cache(maxsize=16)
def _reversal(levels: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_order(levels)).to(device)


class _Walsh(torch.autograd.Function):
    """The transform is symmetric, so that its gradient is the transform of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _through_array(_walsh_array, x) if x.device.type == "cpu" else _walsh_by_products(x, _levels(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return fwht(gradients[0])


class _Fourier(torch.autograd.Function):
    """The transform is unitary, so that its gradient is the inverse transform of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.real = not x.is_complex()
        if x.device.type == "cpu":
            return _through_array(_fourier_array, x)
        return torch.fft.fft(x[..., _reversal(_levels(x), x.device)], norm="ortho")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result = ifftbr(gradients[0])
        return result.real if ctx.real else result


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.real = not y.is_complex()
        if y.device.type == "cpu":
            return _through_array(_inverse_array, y)
        return torch.fft.ifft(y, norm="ortho")[..., _reversal(_levels(y), y.device)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result = fftbr(gradients[0])
        return result.real if ctx.real else result


class _Permutation(torch.autograd.Function):
    """Bit reversal is its own inverse, and so its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return _through_array(_permute_array, x)
        return x[..., _reversal(_levels(x), x.device)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return bit_reversed(gradients[0])


def bit_reversed(x: Array) -> Array:
    """x [..., n] in bit-reversed order of its last axis; ShapeError unless n is a power of 2.

    >>> bit_reversed(torch.arange(8.0))
    tensor([0., 4., 2., 6., 1., 5., 3., 7.])
    """
    return _permute_array(x) if isinstance(x, np.ndarray) else _Permutation.apply(x)


def fftbr(x: Array) -> Array:
    """Orthonormal Fourier transform of x [..., n] in bit-reversed order; ShapeError unless n is a power of 2.

    >>> fftbr(torch.tensor([1.0, 2.0, 3.0, 4.0])).abs()
    tensor([5.0000, 0.7071, 2.0000, 0.7071])
    """
    return _fourier_array(x) if isinstance(x, np.ndarray) else _Fourier.apply(_floating(x))


def ifftbr(y: Array) -> Array:
    """The inverse of `fftbr`: complex, [..., n]; take the real part where the input was real.

    >>> ifftbr(fftbr(torch.arange(4.0))).real
    tensor([0., 1., 2., 3.])
    """
    return _inverse_array(y) if isinstance(y, np.ndarray) else _Inverse.apply(_floating(y))


def fwht(x: Array) -> Array:
    """Orthonormal Walsh-Hadamard transform of x [..., n], its own inverse; ShapeError unless n is a power of 2.

    >>> fwht(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([ 5., -1., -2.,  0.])
    """
    if isinstance(x, np.ndarray):
        if np.iscomplexobj(x):
            return _walsh_array(x.real) + 1j * _walsh_array(x.imag)
        return _walsh_array(x if x.dtype.char in "fd" else x.astype(np.float64))
    if x.is_complex():
        return torch.complex(fwht(x.real), fwht(x.imag))
    return _Walsh.apply(_floating(x))


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


def omega_fwht(levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The factors [2^levels] of the second half when the points of a net double: ones."""
    return torch.ones(1 << levels, dtype=dtype)


def omega_fftbr(levels: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    """The factors exp(-i pi k / n), k < n = 2^levels, of the second half when the points of a lattice double."""
    angle = -math.pi * torch.arange(1 << levels, dtype=torch.float64) / (1 << levels)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)
