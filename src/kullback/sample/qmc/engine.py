"""A kullback point set as an engine of scipy.stats.qmc, for code that expects one."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import qmc

from kullback.core.errors import ConfigError
from kullback.sample.qmc.point_set import PointSet

__all__ = ["Engine"]


class Engine(qmc.QMCEngine):
    """scipy's interface (random, integers, fast_forward, reset) over a PointSet without replications.

    >>> from kullback.sample.qmc import Sobol
    >>> import torch
    >>> Engine(Sobol(2, generator=torch.Generator().manual_seed(0))).random(4).shape
    (4, 2)
    """

    def __init__(self, points: PointSet) -> None:
        if points.replications is not None:
            raise ConfigError("an engine gives one set of points: leave replications out")
        super().__init__(d=points.dimensions, rng=np.random.default_rng(0))
        self.points = points

    def _random(self, n: int = 1, *, workers: int = 1) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self.points.points(self.num_generated, self.num_generated + n).numpy()
        return found

    def fast_forward(self, n: int) -> Engine:
        """Skip n points, in no time."""
        self.num_generated += n
        return self

    def reset(self) -> Engine:
        """Start again at the first point; the randomization stays."""
        self.num_generated = 0
        return self
