"""How far two samples are apart: the exact Wasserstein distance, that of their log-densities, and the kernel mean's.

    W_p(x, y)^p = min over permutations s of mean_i |x_i - y_s(i)|^p
    MMD^2       = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

with k(x, y) = exp(-|x - y|^2 / (2 h^2)). Two samples of one law have a distance above 0 as well: report that of two
exact samples beside it.

Shapes: n points of d dimensions [n, d]. Source: Gretton et al. 2012 for the unbiased estimate of MMD^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["kernel_distance", "wasserstein_distance"]


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1:] != y.shape[1:] or not len(x) or not len(y):
        raise ShapeError(f"samples are [n, d] and [m, d] of one d, not {tuple(x.shape)} and {tuple(y.shape)}")
    one, other = (sample.detach().to("cpu", torch.float64) for sample in (x, y))
    if not bool(one.isfinite().all() and other.isfinite().all()):
        raise DataError("a point of a sample is not finite: look at how it was drawn")
    return one, other


def wasserstein_distance(x: Tensor, y: Tensor, *, order: float = 2.0) -> float:
    """The exact p-Wasserstein distance of two samples [n, d] of equal size, in n^3 operations at worst.

    In one dimension it sorts, so that `wasserstein_distance(log_p(x)[:, None], log_p(y)[:, None])` of log-densities,
    the "energy" distance of samplers, costs nothing. Raises ConfigError for an order below 1, ShapeError for samples of
    two sizes, DataError for points that are not finite.

    >>> wasserstein_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]))
    2.0
    """
    one, other = _checked(x, y)
    if len(one) != len(other):
        raise ShapeError(f"both samples have as many points, not {len(one)} and {len(other)}: draw from the larger")
    if not 1.0 <= order < math.inf:
        raise ConfigError(f"order is 1 or more, and finite, not {order}")
    if one.shape[1] == 1:
        gaps = (one[:, 0].sort().values - other[:, 0].sort().values).abs() ** order
        return float(gaps.mean() ** (1.0 / order))
    from scipy.optimize import linear_sum_assignment

    costs = torch.cdist(one, other) ** order
    rows, columns = linear_sum_assignment(costs.numpy())
    return float(costs[torch.from_numpy(rows), torch.from_numpy(columns)].mean() ** (1.0 / order))


def kernel_distance(x: Tensor, y: Tensor, *, bandwidth: float | None = None) -> float:
    """The unbiased estimate of MMD^2 under a Gaussian kernel, which may come out below 0.

    bandwidth: h; left out, the median distance among the points of both samples. Raises ConfigError for a bandwidth
    that is not positive, ShapeError for fewer than two points, DataError for points that are not finite.

    >>> points = torch.tensor([[0.0], [1.0]])
    >>> round(kernel_distance(points, points + 100.0, bandwidth=1.0), 4)
    1.2131
    """
    one, other = _checked(x, y)
    if len(one) < 2 or len(other) < 2:
        raise ShapeError(f"an unbiased estimate takes two points or more of each, not {len(one)} and {len(other)}")
    if bandwidth is None:
        distances = torch.pdist(torch.cat([one, other]))
        bandwidth = float(distances.median()) or 1.0  # all points in one place: any will do
    if not 0.0 < bandwidth < math.inf:
        raise ConfigError(f"bandwidth is positive and finite, not {bandwidth}")
    factor = -0.5 / bandwidth**2
    within = [(factor * torch.pdist(sample).square()).exp().mean() for sample in (one, other)]
    return float(within[0] + within[1] - 2.0 * (factor * torch.cdist(one, other).square()).exp().mean())
