"""Random numbers for batches of chains: from one generator for all, or from one for each chain.

With one generator for each chain, chain r of a batch of R gets the numbers that it would get alone. Counted draws are
a function of a seed and a counter, so that a loop that draws as many numbers as it happens to need, a compiled twin of
it and a vectorised one see the same numbers.

Shapes: R chains first, n draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["Generators", "chain_seeds", "counted_uniform", "draw_index", "normal", "uniform"]

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator]"

# The finaliser of splitmix64 (Steele, Lea and Flood 2014); constants as signed 64-bit numbers.
_STRIDE, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def uniform(shape: Sequence[int], generator: Generators, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1) of the given shape, whose first entry is the number of chains.

    >>> uniform((2, 1), [torch.Generator().manual_seed(s) for s in (5, 6)])[1] == uniform(
    ...     (1, 1), torch.Generator().manual_seed(6))[0]
    tensor([True])
    """
    return _draw(torch.rand, shape, generator, dtype)


def normal(shape: Sequence[int], generator: Generators, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of the given shape, whose first entry is the number of chains."""
    return _draw(torch.randn, shape, generator, dtype)


def chain_seeds(chains: int, generator: Generators) -> Tensor:
    """A seed for counted draws for each chain: int64 [R]."""
    if isinstance(generator, torch.Generator):
        return torch.randint(1 << 62, (chains,), generator=generator, device=generator.device)
    _check_one_each(chains, generator)
    return torch.cat([torch.randint(1 << 62, (1,), generator=one, device=one.device) for one in generator])


def _draw(kind, shape: Sequence[int], generator: Generators, dtype: torch.dtype) -> Tensor:
    if isinstance(generator, torch.Generator):
        return kind(tuple(shape), generator=generator, dtype=dtype, device=generator.device)
    _check_one_each(shape[0], generator)
    return torch.stack([kind(tuple(shape[1:]), generator=one, dtype=dtype, device=one.device) for one in generator])


def _check_one_each(chains: int, generator: Sequence[torch.Generator]) -> None:
    if len(generator) != chains:
        raise ConfigError(f"{chains} chains need one generator for all or {chains}, one each, and got {len(generator)}")


def counted_uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """The uniform number in [0, 1) that belongs to each pair of a seed and a counter (int64, broadcast): float64.

    >>> counted_uniform(torch.tensor([7, 7, 8]), torch.tensor([0, 1, 0]))
    tensor([0.3898, 0.0168, 0.6185], dtype=torch.float64)
    """
    state = seeds + (counters + 1) * _STRIDE
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    state = state ^ _shifted(state, 31)
    return _shifted(state, 11).to(torch.float64) * 2.0**-53


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Right shift of the 64 bits without a sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def draw_index(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Independent draws from the categorical laws with log-weights [..., n], by inversion of uniforms [..., m]: int64.

    >>> draw_index(torch.tensor([0.25, 0.0, 0.75]).log(), torch.tensor([0.1, 0.24, 0.25, 0.99]))
    tensor([0, 0, 2, 2])
    """
    if log_weights.shape[:-1] != uniforms.shape[:-1]:
        shapes = f"{tuple(log_weights.shape)} and {tuple(uniforms.shape)}"
        raise ShapeError(f"log-weights and uniforms differ in their last dimension alone, got {shapes}")
    cumulative = (log_weights - log_weights.amax(-1, keepdim=True)).exp().cumsum(-1)
    return invert(cumulative, uniforms)


def invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first index at which the cumulative weights [..., n] exceed uniforms [..., m] of their total."""
    found = torch.searchsorted(cumulative, uniforms.to(cumulative.dtype) * cumulative[..., -1:], right=True)
    return found.clamp_(max=cumulative.shape[-1] - 1)
