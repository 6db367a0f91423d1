"""Work on the binary digits of points: integers of `width` <= 63 bits, the most significant first, in torch.int64.

An integer v of width t stands for v / 2^t in [0, 1). 63 bits keep clear of the sign, so that the same code runs on any
device; conversion to floating point drops what the mantissa cannot hold, so that 1.0 never comes out.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError

__all__ = [
    "WIDTH",
    "compiled",
    "empty",
    "from_unit",
    "interlace",
    "mantissa",
    "mix",
    "random_bits",
    "reverse_bits",
    "scramble_nested",
    "to_unit",
]

WIDTH = 63
# Constants of the SplitMix64 generator as signed 64-bit integers: torch multiplies modulo 2^64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)
BLOCK = 6  # levels of the binary tree whose 63 nodes share one random word


@lru_cache(maxsize=4)
def _kernels(name: str) -> ModuleType | None:
    if find_spec("numba") is None:
        return None
    return import_module(f"kullback.sample.qmc.{name}")


def compiled(*tensors: Tensor, module: str = "_compiled") -> ModuleType | None:
    """The compiled kernels where numba is installed and every tensor lies in main memory, else None.

    They give the same bits as the torch code beside them, and are an order of magnitude faster.
    """
    return _kernels(module) if all(tensor.device.type == "cpu" for tensor in tensors) else None


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in main memory, from numpy, which asks for huge pages: half the time of a fill."""
    return torch.from_numpy(np.empty(shape, dtype=str(dtype).removeprefix("torch.")))


def mantissa(dtype: torch.dtype) -> int:
    """How many binary digits a number in [0, 1) of this type holds exactly: 53 or 24."""
    if dtype == torch.float64:
        return 53
    if dtype == torch.float32:
        return 24
    raise ConfigError(f"points are float64 or float32, not {dtype}: convert them afterwards")


def to_unit(bits: Tensor, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [0, 1) from integers of `width` bits, cut to what dtype holds.

    >>> to_unit(torch.tensor([1, 3]), 2)
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    kept = min(mantissa(dtype), width)
    return (bits >> (width - kept)).to(dtype) * 2.0**-kept


def from_unit(points: Tensor, width: int = 53) -> Tensor:
    """The first `width` binary digits of numbers in [0, 1), as integers: the inverse of `to_unit` up to 53 digits."""
    return (points.to(torch.float64) * 2.0**width).to(torch.int64)


def reverse_bits(index: Tensor, width: int) -> Tensor:
    """The integers whose `width` binary digits are those of index in reverse.

    >>> reverse_bits(torch.arange(4), 2)
    tensor([0, 2, 1, 3])
    """
    result = torch.zeros_like(index)
    for place in range(width):
        result |= ((index >> place) & 1) << (width - 1 - place)
    return result


def random_bits(*shape: int, width: int = WIDTH, generator: torch.Generator) -> Tensor:
    """Independent uniform integers of `width` bits, on the generator's device."""
    words = torch.empty(shape, dtype=torch.int64, device=generator.device)
    return words.random_(generator=generator) >> (WIDTH - width)


def interlace(bits: Tensor, alpha: int, width: int, result_width: int) -> Tensor:
    """Digits of alpha neighbouring dimensions woven into one: [..., alpha d] to [..., d].

    Digit (k - 1) alpha + l of output j is digit k of input (j - 1) alpha + l, counted from 1; what lies beyond
    result_width is cut off.

    >>> interlace(torch.tensor([0b11, 0b00]), 2, 2, 4).item() == 0b1010
    True
    """
    kernels = compiled(bits)
    if kernels is not None and bits.ndim == 3:
        woven = torch.empty(*bits.shape[:-1], bits.shape[-1] // alpha, dtype=torch.int64)
        kernels.interlace(bits.contiguous().numpy(), woven.numpy(), alpha, width, result_width)
        return woven
    groups = bits.unflatten(-1, (-1, alpha))
    result = torch.zeros_like(groups[..., 0])
    for place in range(min(alpha * width, result_width)):
        digit = (groups[..., place % alpha] >> (width - 1 - place // alpha)) & 1
        result |= digit << (result_width - 1 - place)
    return result


def _logical_shift(words: Tensor, places: int) -> Tensor:
    return (words >> places) & ((1 << (64 - places)) - 1)


def mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit words under which a counter times GOLDEN looks random."""
    words = (words ^ _logical_shift(words, 30)) * FIRST
    words = (words ^ _logical_shift(words, 27)) * SECOND
    return words ^ _logical_shift(words, 31)


def scramble_nested(bits: Tensor, keys: Tensor, width: int = WIDTH, digits: int | None = None) -> Tensor:
    """Owen's nested uniform scrambling of integers [R, n, d] of `width` bits, by keys [R, d].

    Each digit is flipped by a fair bit that belongs to the node of the binary tree, that is to the dimension and all
    digits before. The bit is a hash of key and node, so any block of points can be scrambled by itself, in any
    order, and later points never change earlier ones. digits: how many are kept, all by default; the rest are 0.
    """
    digits = width if digits is None else digits
    kernels = compiled(bits, keys)
    if kernels is not None:
        result = bits.contiguous().clone()
        kernels.scramble_nested(result.numpy(), keys.contiguous().numpy(), width, digits)
        return result
    result = torch.zeros_like(bits)
    for block in range(-(-digits // BLOCK)):
        prefix = bits >> (width - BLOCK * block)
        word = mix((prefix * 16 + block) * GOLDEN + keys.unsqueeze(-2))
        for level in range(BLOCK):
            place = BLOCK * block + level
            if place >= digits:
                break
            inside = (bits >> (width - place)) & ((1 << level) - 1)
            flip = (word >> (inside | (1 << level))) & 1
            result |= (((bits >> (width - 1 - place)) & 1) ^ flip) << (width - 1 - place)
    return result
