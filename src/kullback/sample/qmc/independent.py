"""Independent uniform points with the interface of low-discrepancy sets: what they are compared to, and Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.bits import GOLDEN, mix, random_bits, to_unit
from kullback.sample.qmc.point_set import Kind, PointSet, check_count

__all__ = ["Independent"]


@dataclass(frozen=True, slots=True)
class IndependentSource:
    """Hashes of a counter under keys [R, d] (the SplitMix64 generator): any block of points by itself."""

    keys: Tensor
    limit: int = 1 << 40
    width: int = 63
    kind: Kind = "independent"

    def bits(self, first: int, count: int, device: torch.device) -> Tensor:
        counter = torch.arange(first + 1, first + count + 1, device=device)
        words = mix(counter[:, None] * GOLDEN + self.keys.to(device).unsqueeze(1))
        return words & ((1 << 63) - 1)

    def unit(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return to_unit(self.bits(first, count, device), self.width, dtype)


def Independent(dimensions: int, *, replications: int | None = None, generator: torch.Generator) -> PointSet:
    """Independent uniform points in [0, 1)^d. Raises ConfigError for a dimension or a number out of range.

    >>> Independent(2, generator=torch.Generator().manual_seed(0)).points(3).shape
    torch.Size([3, 2])
    """
    count = check_count(dimensions, replications, 1 << 20, "a sample")
    if generator is None:
        raise ConfigError("independent points need a generator: kullback.core.rng.generator(seed, name)")
    source = IndependentSource(random_bits(count, dimensions, generator=generator))
    return PointSet(source, dimensions, replications, "independent", "natural")
