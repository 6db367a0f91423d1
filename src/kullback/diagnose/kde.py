"""A Gaussian kernel density estimate for many dimensions, with error bars that hold where normal ones do not.

rho(x) = (1/n) sum_i (2 pi h^2)^(-d/2) exp(-|x - y_i|^2 / (2 h^2)), in logarithms throughout: beyond some 50 dimensions
it underflows. Below h_CLT (see `kde_theory`) the sum over data sets is not normal, and `interval` takes its law from
the points nearest to x. Within the distance of the k-th, they are a Poisson number of points whose distances follow a
local power law, P(r^2 <= s r^2_(k)) = s^m:

    S = sum_{i <= N} exp(-r^2_(k) U_i^(1/m) / (2 h^2)) + the rest,   N ~ Poisson(k),  U_i uniform.

As d grows that is W sum U_i^(-1/mu), a stable law of index mu for 1 < mu < 2 and its analogue without a mean below 1.

Shapes: points [n, d], queries [m, d], results [m]; densities in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.core.rng import generator as stream
from kullback.diagnose._parameters import Parameters, as_table, check_fitted
from kullback.diagnose.kernel_sums import Points

__all__ = ["HighDimKDE", "hill_tail_index", "log_sum_quantiles", "power_tail_index"]

_RULES = ("kl", "likelihood", "scott", "silverman")
_TOP, _DRAWS = 48, 2000  # nearest points and replicates behind an interval
_NORMAL = 2.5  # tail index above which the normal law is used


@dataclass(eq=False, repr=False)
class HighDimKDE(Parameters):
    """A kernel density estimate with scikit-learn's manners, from matrix products.

    bandwidth: a number; or "kl", the root mean square distance of a point to its nearest other over sqrt(d), best in KL
    as d grows; "likelihood", the largest leave-one-out likelihood; "scott" or "silverman", the classical rules times
    the root mean variance. precision: "single" takes the products in float32, "double" in float64, None in the type of
    the data. queries: how many points stand for all in the first two rules.
    After fit: bandwidth_, n_features_in_, n_samples_. Raises ConfigError for bad options, ShapeError and DataError for
    bad data, NotFitted.

    >>> data = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    >>> density = HighDimKDE(bandwidth=0.8).fit(data)
    >>> density.score_samples(torch.zeros(1, 20)).round(decimals=2)
    tensor([-23.7600], dtype=torch.float64)
    """

    bandwidth: float | Literal["kl", "likelihood", "scott", "silverman"] = "kl"
    precision: Literal["single", "double"] | None = None
    queries: int = 512

    def fit(self, X: Any, y: Any = None) -> Self:
        """Take the points [n, d], n >= 2, and choose the bandwidth."""
        table = as_table(X, name="X")
        if self.precision not in (None, "single", "double"):
            raise ConfigError(f'precision is "single", "double" or None, not {self.precision!r}')
        if self.queries < 1:
            raise ConfigError(f"queries is how many points choose the bandwidth, 1 or more, not {self.queries}")
        if len(table) < 2:
            raise ConfigError("a density estimate needs two points or more and got one")
        single = self.precision == "single" or (self.precision is None and table.dtype == torch.float32)
        points = Points.of(table, single=single)
        self.bandwidth_ = self._chosen(points)
        self.points_, self.n_samples_, self.n_features_in_ = points, len(table), table.shape[1]
        return self

    def _chosen(self, points: Points) -> float:
        n, d = points.rows.shape
        if isinstance(self.bandwidth, str):
            if self.bandwidth not in _RULES:
                rules = ", ".join(_RULES)
                raise ConfigError(f"bandwidth is a positive number or one of {rules}, not {self.bandwidth!r}")
            deviation = math.sqrt(2.0 * float(points.half_norms.sum()) / ((n - 1) * d))
            if deviation == 0.0:
                raise ConfigError("all points are the same: give the bandwidth as a number")
            if self.bandwidth == "scott":
                return float(deviation * n ** (-1.0 / (d + 4)))
            if self.bandwidth == "silverman":
                return float(deviation * (n * (d + 2) / 4.0) ** (-1.0 / (d + 4)))
            chosen = torch.randperm(n, generator=stream(0, "kde queries"))[: self.queries]
            best = _nearest_bandwidth(points, chosen)
            return best if self.bandwidth == "kl" else _likeliest_bandwidth(points, chosen, best)
        if not 0.0 < self.bandwidth < math.inf:
            raise ConfigError(f"a bandwidth is positive and finite, got {self.bandwidth}")
        return float(self.bandwidth)

    def _constant(self) -> float:
        return -math.log(self.n_samples_) - 0.5 * self.n_features_in_ * math.log(2.0 * math.pi * self.bandwidth_**2)

    def score_samples(self, X: Any) -> Tensor:
        """log rho(x) of queries [m, d] to [m], float64."""
        check_fitted(self, "points_")
        queries = as_table(X, features=self.n_features_in_, name="X")
        return self.points_.sums(self.points_.centred(queries), self.bandwidth_).log_sum + self._constant()

    def score(self, X: Any, y: Any = None) -> float:
        """The sum of log rho(x) over queries [m, d]."""
        return float(self.score_samples(X).sum())

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw [count, d] from the estimate."""
        check_fitted(self, "points_")
        chosen = torch.randint(self.n_samples_, (count,), generator=generator)
        noise = torch.randn(count, self.n_features_in_, generator=generator, dtype=torch.float64)
        return self.points_.rows[chosen].double() + self.points_.centre + self.bandwidth_ * noise

    def interval(self, X: Any, level: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
        """Lower and upper end [m], and the estimate's tail index [m], for queries [m, d].

        The interval is for the typical log-density, the median of log rho(x) over data sets of this size; where the
        tail index is above 1 that is the logarithm of the smoothed density but for small terms.
        Raises ConfigError for a level outside (0, 1) or fewer than 8 points.
        """
        check_fitted(self, "points_")
        if not 0.0 < level < 1.0:
            raise ConfigError(f"level is the share of data sets whose interval is to cover, in (0, 1), and is {level}")
        if self.n_samples_ < 8:
            raise ConfigError(f"an interval needs 8 points or more, to see how they crowd, not {self.n_samples_}")
        queries = self.points_.centred(as_table(X, features=self.n_features_in_, name="X"))
        found = self.points_.sums(queries, self.bandwidth_, squares=True, nearest=min(_TOP, self.n_samples_ // 2))
        if found.squared is None or found.log_sum_squares is None:
            raise ConfigError("a pass for the nearest points returned none")
        top = -0.5 * found.squared / self.bandwidth_**2
        mu, _ = power_tail_index(top)
        tails = (0.5 - 0.5 * level, 0.5 + 0.5 * level)
        low, high = log_sum_quantiles(top, found.log_sum, found.log_sum_squares, self.n_samples_, tails).unbind(-1)
        centre = found.log_sum + self._constant()
        return centre - high, centre - low, mu


def hill_tail_index(log_weights: Tensor) -> Tensor:
    """mu from the k largest log-weights [..., k] in descending order: (k - 1) / sum (l_j - l_k); [...].

    Near the largest, log-weights form a Poisson process whose density grows as e^(-mu l): gaps to the k-th are
    exponential. inf where all are equal. For a Gaussian kernel l = -r^2 / (2 h^2), so that mu = h^2 b_c.
    """
    if log_weights.shape[-1] < 2:
        raise ConfigError(f"a tail index needs two weights or more, got {log_weights.shape[-1]}")
    gaps = (log_weights[..., :-1] - log_weights[..., -1:]).sum(-1)
    return (log_weights.shape[-1] - 1) / gaps


def power_tail_index(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """mu and the power m from the k largest l = -r^2 / (2 h^2) [..., k], k >= 3, in descending order; [...] each.

    m = (k - 2) / sum log(r^2_k / r^2_j) without bias, and mu = m / |l| at the level where one point is expected,
    |l_k| k^(-1/m). In 20 to 60 dimensions the gaps of `hill_tail_index` make h_G too large by up to a third, since the
    slope falls with the distance; this one is right to some percent.
    """
    k = log_weights.shape[-1]
    if k < 3:
        raise ConfigError(f"a power takes three distances or more, got {k}")
    squared = -log_weights
    last = squared[..., -1:]
    ratios = (last / squared.clamp(min=1e-12 * last.clamp(min=1e-300))).log().sum(-1)
    m = (k - 2) / ratios
    return m / (squared[..., -1] * (-math.log(k) / m).exp()), m


def log_sum_quantiles(
    top: Tensor, log_sum: Tensor, log_sum_squares: Tensor, n: int, tails: tuple[float, ...]
) -> Tensor:
    """Quantiles [m, q] of log S minus its median over data sets, S the sum of the weights.

    top: the largest l = -r^2 / (2 h^2) [m, k], descending; log sum w and log sum w^2 [m] of n weights. Normal where the
    tail index is above 2.5, and the law of the module's equation otherwise, with the rest normal about its sum.
    """
    mu, power = power_tail_index(top)
    normal = torch.special.ndtri(torch.tensor(tails, dtype=torch.float64))
    spread = ((log_sum_squares - 2.0 * log_sum).exp() - 1.0 / n).clamp(min=0.0).sqrt()
    result = spread.unsqueeze(-1) * normal
    source = stream(0, "kde intervals")
    counts = torch.poisson(torch.full((_DRAWS,), float(top.shape[-1])), generator=source)
    uniform = torch.rand(_DRAWS, int(counts.amax()), generator=source, dtype=torch.float64)
    absent = torch.arange(uniform.shape[1]) >= counts.unsqueeze(1)
    log_uniform = uniform.clamp(min=1e-300).log()
    noise = torch.randn(_DRAWS, generator=source, dtype=torch.float64)
    at = torch.tensor((0.5, *tails), dtype=torch.float64)
    for row in (mu <= _NORMAL).nonzero().squeeze(-1).tolist():
        last = top[row, -1]
        gaps = last * torch.expm1(log_uniform / power[row])
        drawn = gaps.masked_fill_(absent, -math.inf).logsumexp(1)
        # what the k weights leave, in units of the k-th: its sum, and the deviation of a Poisson number of points
        own = top[row] - last
        rest = (log_sum[row] - last).exp() - own.exp().sum()
        squares = (log_sum_squares[row] - 2.0 * last).exp() - (2.0 * own).exp().sum()
        beyond = rest.clamp(min=0.0) + squares.clamp(min=0.0).sqrt() * noise
        quantiles = torch.quantile(torch.logaddexp(drawn, beyond.clamp(min=1e-300).log()), at)
        result[row] = quantiles[1:] - quantiles[0]
    return result


def _nearest_bandwidth(points: Points, chosen: Tensor) -> float:
    found = points.sums(points.rows[chosen], 1.0, nearest=1, exclude=chosen).squared
    if found is None or not bool((found > 0.0).any()):
        raise ConfigError("every point has a copy: its nearest neighbour says nothing, give the bandwidth as a number")
    return math.sqrt(float(found.mean()) / points.rows.shape[1])


def _likeliest_bandwidth(points: Points, chosen: Tensor, start: float) -> float:
    """The h of the largest mean leave-one-out log-density, by golden sections in log h around `start`."""
    rows, d = points.rows[chosen], points.rows.shape[1]

    def loss(log_h: float) -> float:
        log_sum = points.sums(rows, math.exp(log_h), exclude=chosen).log_sum
        return d * log_h - float(log_sum.mean())

    golden = 0.5 * (math.sqrt(5.0) - 1.0)
    low, high = math.log(start) - 1.5, math.log(start) + 1.5
    inner, outer = high - golden * (high - low), low + golden * (high - low)
    at_inner, at_outer = loss(inner), loss(outer)
    while high - low > 1e-3:
        if at_inner < at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - golden * (high - low)
            at_inner = loss(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + golden * (high - low)
            at_outer = loss(outer)
    return math.exp(0.5 * (low + high))
