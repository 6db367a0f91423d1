"""Which regime a bandwidth, an attention head or a memory is in, from data alone: no model of the density.

Near a query x the number of points within r grows as n F(r^2), and b_c = 2 d log F / d r^2 where it is one. So
h_G = b_c^(-1/2) comes from the k nearest, by a local power law of r^2 or, for d beyond some hundreds, by their gaps,

    power:        m = (k - 2) / sum_{j < k} log(r^2_(k) / r^2_(j)),    b_c = 2 m k^(1/m) / r^2_(k)
    exponential:  b_c = 2 (k - 1) / sum_{j < k} (r^2_(k) - r^2_(j))

and mu(h) = h^2 b_c, h_CLT = sqrt(2) h_G, h_KL = r_(1) / sqrt(d).

For any weights w_i = e^(l_i), such as those of softmax attention, mu is the same from the largest l_i, and heating by a
temperature T divides it by T: the sum condenses below T_c with mu(T_c) = 1. See `kde_theory` for what the regimes are.

Shapes: points [n, d], queries [m, d], log-weights [..., n].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.diagnose._parameters import Parameters, as_table, check_fitted
from kullback.diagnose.kde import hill_tail_index, log_sum_quantiles, power_tail_index
from kullback.diagnose.kde_theory import GaussianSpectrumTheory, regime_of
from kullback.diagnose.kernel_sums import Points
from kullback.diagnose.quadratic_forms import SquaredDistance

__all__ = [
    "Condensation",
    "KDEDiagnosis",
    "KDERegimes",
    "collapse_step",
    "condensation",
    "knn_order_statistics",
    "participation_ratio",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KDEDiagnosis:
    """What `KDERegimes.diagnose` found, medians over the queries; bandwidths in the units of the data.

    mu_ci: a 95% interval for the median tail index; participation: sum p_i^2 of the shares p_i of the points, and n_eff
    one over it; stderr_log: half the width of the central 68% of the log-density over data sets; gaussian_h_glass: h_G
    of Gaussian data with the same covariance, exact in n and d, to hold against h_glass.
    """

    regime: str
    mu: float
    mu_ci: tuple[float, float]
    h_glass: float
    h_clt: float
    h_kl: float
    participation: float
    n_eff: float
    stderr_log: float
    gaussian_h_glass: float
    message: str


@dataclass(eq=False, repr=False)
class KDERegimes(Parameters):
    """Diagnose the bandwidth of a kernel density estimate on given points.

    k: how many nearest points the slope is taken from, sqrt(n) between 5 and 20 by default; slope: see above;
    n_queries: how many points stand for all where no queries are given; leave_one_out: such a point is no neighbour of
    itself (otherwise it carries everything as h shrinks, whatever the data).
    After fit: k_, spectrum_ [d], n_samples_, n_features_in_.

    >>> data = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    >>> found = KDERegimes().fit(data).diagnose(0.6)
    >>> found.regime, round(found.h_glass, 2), round(found.gaussian_h_glass, 2)
    ('condensed', 0.86, 0.84)
    """

    k: int | None = None
    slope: Literal["power", "exponential"] = "power"
    n_queries: int = 256
    leave_one_out: bool = True

    def fit(self, X: Any, y: Any = None) -> Self:
        """Take the points [n, d] and their spectrum; n is 4 or more. Raises ShapeError, DataError, ConfigError."""
        table = as_table(X, name="X")
        n = len(table)
        if n < 4:
            raise ConfigError(f"regimes are told from four points or more, got {n}")
        if self.n_queries < 1:
            raise ConfigError(f"n_queries is 1 or more, not {self.n_queries}")
        if self.slope not in ("power", "exponential"):
            raise ConfigError(f'slope is "power" or "exponential", not {self.slope!r}')
        k = min(max(5, min(20, math.isqrt(n))), n - 1) if self.k is None else self.k
        if not 3 <= k <= n - 1:
            raise ConfigError(f"k is from 3 to the number of other points, {n - 1}, and is {k}")
        points = Points.of(table, single=table.dtype == torch.float32)
        rows = points.rows.double()
        spectrum = torch.linalg.eigvalsh(rows.T @ rows / (n - 1)).flip(0)
        if not float(spectrum[0]) > 0.0:
            raise DataError("all points are the same: there is no density to estimate")
        self.spectrum_ = spectrum.clamp(min=0.0)
        self._gaussian: float | None = None
        self.k_, self.points_, self.n_samples_, self.n_features_in_ = k, points, n, table.shape[1]
        return self

    @property
    def theory_(self) -> GaussianSpectrumTheory:
        """The theory for Gaussian data of the fitted spectrum, without its vanishing directions."""
        check_fitted(self, "points_")
        return GaussianSpectrumTheory(self.spectrum_[self.spectrum_ > 1e-12 * self.spectrum_[0]])

    def diagnose(self, h: float, X: Any = None) -> KDEDiagnosis:
        """The regime at bandwidth h for queries [m, d], or for n_queries of the points themselves.

        Raises DataError where the nearest points of most queries are all at one distance, as in discrete data.
        """
        check_fitted(self, "points_")
        if not 0.0 < h < math.inf:
            raise ConfigError(f"a bandwidth is positive and finite, got {h}")
        exclude = None
        if X is None:
            chosen = torch.randperm(self.n_samples_, generator=stream(0, "regime queries"))[: self.n_queries]
            queries, exclude = self.points_.rows[chosen], chosen if self.leave_one_out else None
        else:
            queries = self.points_.centred(as_table(X, features=self.n_features_in_, name="X"))
        found = self.points_.sums(queries, h, squares=True, nearest=self.k_, exclude=exclude)
        if found.squared is None or found.log_sum_squares is None:
            raise DataError("a pass for the nearest points returned none")
        return self._report(h, found.squared, found.log_sum, found.log_sum_squares)

    def _report(self, h: float, squared: Tensor, log_sum: Tensor, log_squares: Tensor) -> KDEDiagnosis:
        top = -0.5 * squared / (h * h)
        mu = power_tail_index(top)[0] if self.slope == "power" else hill_tail_index(top)
        if not bool(torch.isfinite(mu.median())):
            raise DataError(f"the {self.k_} nearest points of most queries are at one distance: give a larger k")
        centre, h_glass = float(mu.median()), h / math.sqrt(float(mu.median()))
        width = [float(end) for end in _median_interval(mu)]
        some = (mu - centre).abs().argsort()[:_TYPICAL]
        spread = log_sum_quantiles(top[some], log_sum[some], log_squares[some], self.n_samples_, (0.1587, 0.8413))
        participation = (log_squares - 2.0 * log_sum).exp().clamp(max=1.0)
        name = regime_of(centre)
        return KDEDiagnosis(
            regime=name,
            mu=centre,
            mu_ci=(width[0], width[1]),
            h_glass=h_glass,
            h_clt=math.sqrt(2.0) * h_glass,
            h_kl=math.sqrt(float(squared[:, 0].median()) / int((self.spectrum_ > 1e-12 * self.spectrum_[0]).sum())),
            participation=float(participation.median()),
            n_eff=1.0 / float(participation.median()),
            stderr_log=float((0.5 * (spread[:, 1] - spread[:, 0])).median()),
            gaussian_h_glass=self._gaussian_h_glass(),
            message=_MESSAGES[name].format(h=h, mu=centre, h_glass=h_glass, h_clt=math.sqrt(2.0) * h_glass),
        )

    def _gaussian_h_glass(self) -> float:
        """That of the fitted spectrum, found once: it takes as long as a pass over some thousand points."""
        if self._gaussian is None:
            self._gaussian = float(self.theory_.h_glass(self.n_samples_, finite=True))
        return self._gaussian


_TYPICAL = 8  # queries, those nearest to the median tail index, whose replicates stand for the median of all
_MESSAGES = {
    "gaussian": "h = {h:.4g} is above h_CLT = {h_clt:.4g}: the estimate fluctuates normally, as its variance says.",
    "heavy-tailed": "h = {h:.4g} lies between h_G = {h_glass:.4g} and h_CLT = {h_clt:.4g}: its mean is right, but its "
    "fluctuations are those of a stable law of index {mu:.2f}, and normal error bars are too narrow.",
    "condensed": "h = {h:.4g} is below h_G = {h_glass:.4g}: a few nearest points carry the estimate. It is best in KL "
    "there, but has no law of large numbers.",
}


def _median_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """A 95% interval for the median from order statistics [m]; the ends where m is small."""
    ordered = values.sort().values
    reach = 0.98 * math.sqrt(len(values))
    low, high = math.floor(0.5 * len(values) - reach), math.ceil(0.5 * len(values) + reach)
    return ordered[max(low, 0)], ordered[min(high, len(values) - 1)]


def participation_ratio(log_weights: Tensor, *, q: float = 2.0) -> Tensor:
    """sum p_i^q of the shares p_i = w_i / sum w of log-weights [..., n] to [...]; at q = 2, 1/n if all are equal.

    >>> participation_ratio(torch.tensor([[0.0, 0.0], [0.0, -100.0]]))
    tensor([0.5000, 1.0000])
    """
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise ShapeError(f"log_weights has shape [..., n] with n of 1 or more, got {tuple(log_weights.shape)}")
    if not q > 0.0:
        raise ConfigError(f"q is a positive power, got {q}")
    return torch.logsumexp(q * log_weights.log_softmax(-1), -1).exp()


def knn_order_statistics(
    log_n: float,
    law: SquaredDistance | Callable[[Tensor], Tensor],
    *,
    size: int,
    k: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw the squared distances [size, k] of the k nearest of e^log_n points, ascending, without drawing the points.

    law: a SquaredDistance, or its quantile as a function of log-probabilities. n F(r^2_(j)) are the points of a Poisson
    process of rate one, the law for a Poisson number of points and, to a relative 1/n, for a fixed one; inf where there
    are fewer than j.
    """
    if size < 1 or k < 1:
        raise ConfigError(f"size and k are 1 or more, got {size} and {k}")
    steps = torch.empty(size, k, dtype=torch.float64).exponential_(generator=generator)
    log_p = steps.cumsum_(1).log_() - log_n
    return law.quantile(log_p) if isinstance(law, SquaredDistance) else law(log_p)


class Condensation(NamedTuple):
    """Of weighted sums [...]: the tail index mu, sum p_i^2, one over it, and the temperature at which mu would be 1."""

    mu: Tensor
    participation: Tensor
    n_eff: Tensor
    temperature: Tensor


def condensation(log_weights: Tensor, *, k: int | None = None, mask: Tensor | None = None) -> Condensation:
    """How condensed weighted sums are, from log-weights or logits [..., n]: rows of attention, scores of a memory.

    k: the slope is taken from the k largest, by default sqrt(n) from 5 to 200; mask [..., n]: what counts, k or more a
    row. temperature: T_c, a head at temperature 1 is condensed where T_c > 1, and dividing its logits by T_c or more
    spreads it. For attention probabilities give their logarithm.
    Raises ShapeError for masks of another shape or rows with fewer than k entries, DataError for NaN.
    """
    n = log_weights.shape[-1] if log_weights.ndim else 0
    k = min(max(5, min(200, math.isqrt(n))), n) if k is None else k
    if not 2 <= k <= n:
        raise ConfigError(f"k is from 2 to the number of weights, {n}, and is {k}")
    logits = log_weights.double()
    if bool(torch.isnan(logits).any()):
        raise DataError("log_weights has NaN: mask those rows before")
    if mask is not None:
        if mask.shape != logits.shape:
            raise ShapeError(f"mask has shape {tuple(mask.shape)} and log_weights {tuple(logits.shape)}: give the same")
        logits = logits.masked_fill(~mask.bool(), -math.inf)
    top = logits.topk(k, dim=-1).values
    if bool((top[..., -1] == -math.inf).any()):
        raise ShapeError(f"some rows have fewer than k={k} weights above zero: leave them out or give a smaller k")
    mu = hill_tail_index(top)
    shares = participation_ratio(logits)
    return Condensation(mu, shares, 1.0 / shares, 1.0 / mu)


def collapse_step(noise_to_signal: Tensor, threshold: float) -> int | None:
    """The first step of a diffusion's way back at which sigma_t / alpha_t [T] falls below a bandwidth, or None.

    threshold: `GaussianSpectrumTheory.h_collapse(n)` of the training set; from there on the score points at a single
    training point.
    """
    below = (torch.as_tensor(noise_to_signal) < threshold).nonzero()
    return int(below[0, 0]) if len(below) else None
