r"""What the regressors are trained by, and at which weight each of them has given up the same share of I(x; t).

    VIB: MSE + w KL(q(t|x); N(0, I)),     NIB: MSE + w I,     squared NIB: MSE + w I^2,    exponential NIB: MSE + w e^I,
    HSIC bottleneck: MSE + w HSIC(x, t),                      CS-IB: D_CS(p(y|x); q(yhat|x)) + w I_CS(x; t),

I is the bound on the information of a normal encoder by its pairwise divergences (Kolchinsky, Tracey and Wolpert 2019,
arXiv 1705.02436), whose convex transforms are those of Rodriguez Galvez, Thobaben and Skoglund 2020. Those of MSE with
a bound, and "CS-IB, noise", have an encoder with a learned variance; the others have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.distill.bottleneck import BottleneckOutput, CSIBLoss
from kullback.distill.bottleneck_bounds import independence_criterion

__all__ = ["FAMILIES", "Family", "Objective", "Point", "at_ratio", "cs_ib", "mse", "pairwise_bound", "raised", "vib"]

Objective = Callable[[Tensor, Tensor, BottleneckOutput], Tensor]
FACTOR, MOST = math.sqrt(10.0), 12  # from one weight to the next, and how many there are at most
GAP, HALVED = 0.2, 3  # ratios further apart than this are worth a weight in between, so often


def mse(x: Tensor, y: Tensor, out: BottleneckOutput) -> Tensor:
    return (out.prediction.squeeze(1) - y).square().mean()


def cs_ib(x: Tensor, y: Tensor, out: BottleneckOutput, *, loss: CSIBLoss) -> Tensor:
    return loss(x, y, out.prediction, out.representation)["loss"]


def log_variance_of(out: BottleneckOutput) -> Tensor:
    if out.log_variance is None:
        raise RuntimeError("a bound on the information needs an encoder with a variance")
    return out.log_variance


def vib(x: Tensor, y: Tensor, out: BottleneckOutput, *, weight: float) -> Tensor:
    """Squared error behind a noisy representation, and its KL from the standard normal."""
    log_variance = log_variance_of(out)
    kl = 0.5 * (out.mean.square() + log_variance.exp() - log_variance - 1).sum(1)
    return mse(x, y, out) + weight * kl.mean()


def pairwise_bound(mean: Tensor, log_variance: Tensor) -> Tensor:
    """-mean_i log mean_j exp(-KL(t|x_i; t|x_j)) of normals with means and log-variances [n, k]: at most log n."""
    precision = (-log_variance).exp()
    squares = log_variance.exp() + mean.square()
    own = log_variance.sum(1)
    crossed = squares @ precision.T - 2 * mean @ (mean * precision).T + (mean.square() * precision).sum(1)
    kl = 0.5 * (crossed + own - own.unsqueeze(1) - mean.shape[1])
    return math.log(len(mean)) - (-kl).logsumexp(1).mean()


def nib(
    x: Tensor, y: Tensor, out: BottleneckOutput, *, weight: float, transform: Callable[[Tensor], Tensor]
) -> Tensor:
    return mse(x, y, out) + weight * transform(pairwise_bound(out.mean, log_variance_of(out)))


def hsic(x: Tensor, y: Tensor, out: BottleneckOutput, *, weight: float) -> Tensor:
    t = out.representation
    widths = math.sqrt(x.shape[1]), math.sqrt(t.shape[1])
    return mse(x, y, out) + weight * independence_criterion(x, t, sigma_x=widths[0], sigma_t=widths[1]).float()


class Family(NamedTuple):
    """A way to train: its objective at a weight, whether its encoder has noise, and the first weight that is tried."""

    at: Callable[[float], Objective]
    stochastic: bool
    first: float


def _cs_ib(weight: float) -> Objective:
    return partial(cs_ib, loss=CSIBLoss(beta=weight))


def _nib(transform: Callable[[Tensor], Tensor]) -> Callable[[float], Objective]:
    return lambda weight: partial(nib, weight=weight, transform=transform)


FAMILIES = {
    "CS-IB": Family(_cs_ib, False, 0.01),
    "CS-IB, noise": Family(_cs_ib, True, 0.01),
    "VIB": Family(lambda weight: partial(vib, weight=weight), True, 1e-3),
    "NIB": Family(_nib(lambda bound: bound), True, 1e-2),
    "squared NIB": Family(_nib(torch.square), True, 1e-3),
    "exponential NIB": Family(_nib(torch.exp), True, 1e-3),
    "HSIC": Family(lambda weight: partial(hsic, weight=weight), False, 1.0),
}


class Point(NamedTuple):
    """A network's weight, the share of I(x; t) at weight 0 that it gave up, and its errors."""

    weight: float
    ratio: float
    errors: tuple[float, ...]


def raised(first: float, measure: Callable[[float], tuple[float, tuple[float, ...]]], ratio: float) -> list[Point]:
    """Points at weight 0 and from `first` on, each FACTOR times the one before, until one has given up `ratio`.

    Where the last step went far, weights in between are tried as well. measure(weight) is information and errors.
    Raises RuntimeError where MOST weights do not reach the ratio.
    """
    start, errors = measure(0.0)

    def point(weight: float) -> Point:
        information, errors = measure(weight)
        return Point(weight, 1.0 - information / start, errors)

    points = [Point(0.0, 0.0, errors)]
    while points[-1].ratio < ratio:
        if len(points) > MOST:
            raise RuntimeError(f"{MOST} weights did not reach a compression ratio of {ratio}: {points[-1]}")
        points.append(point(_rounded(first * FACTOR ** (len(points) - 1))))
    for _ in range(HALVED):
        place = next(index for index, found in enumerate(points) if found.ratio >= ratio)
        below, above = points[place - 1], points[place]
        if above.ratio - below.ratio <= GAP:
            break
        between = math.sqrt(below.weight * above.weight) if below.weight > 0.0 else above.weight / FACTOR
        points.insert(place, point(_rounded(between)))
    return points


def _rounded(weight: float) -> float:
    return float(f"{weight:.3g}")  # a tenth is a tenth


def at_ratio(points: Sequence[Point], ratio: float) -> tuple[float, ...]:
    """The errors where the ratio is first reached, on the line between the two weights around it."""
    for before, after in pairwise(points):
        if before.ratio <= ratio <= after.ratio:
            share = (ratio - before.ratio) / max(after.ratio - before.ratio, 1e-12)
            return tuple(a + share * (b - a) for a, b in zip(before.errors, after.errors, strict=True))
    raise RuntimeError(f"no two weights have a compression ratio of {ratio} between them")
