"""Kernel density estimates in high dimension: three regimes of the bandwidth, and the theory for Gaussian data.

With n = e^(alpha d) points, b = 1/h^2 and energies e_i = |x - y_i|^2 / (2d), the estimate at x sums weights
e^(-b d e_i): a random energy model at inverse temperature b. For data with covariance eigenvalues lambda_a and a query
x, typically with x_a^2 = lambda_a,

    phi(b) = lim (1/d) log E_y e^(-b d e) = -(1/2d) sum [log(1 + b lambda) + b x^2 / (1 + b lambda)]
    e(b) = -phi'(b),    I(b) = -b e(b) - phi(b),    I'(b) = b phi''(b) >= 0.

There are e^(d (alpha - I)) points at the level e(b). Where I(b_c) = alpha they end: b_c = 1 / h_G^2. The weights have
tails P(w > W) ~ W^(-mu) with mu = (h / h_G)^2, so that

    gaussian       mu > 2, h > h_CLT = sqrt(2) h_G: the sum fluctuates normally
    heavy-tailed   1 < mu < 2: it has a mean, and its fluctuations are those of a stable law of index mu
    condensed      mu < 1, h < h_G: a few nearest points carry it, their shares are Poisson-Dirichlet(mu, 0).

The bandwidth best in KL is that of the nearest points, h_KL^2 = 2 e(b_c), below h_G. Source: Biroli and Mezard 2024
(arXiv 2408.05807); formulas derived anew and checked by simulation.

Shapes: eigenvalues, query_squared [d]; b, h and n numbers or tensors of any shape, results alike, float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.diagnose.quadratic_forms import SquaredDistance

__all__ = [
    "GAUSSIAN",
    "LAPLACE",
    "GaussianSpectrumTheory",
    "RadialKernel",
    "expected_largest_share",
    "expected_participation",
    "h_clt",
    "h_glass",
    "h_kl",
    "regime",
    "regime_of",
    "student",
    "tail_index",
]


@dataclass(frozen=True)
class RadialKernel:
    """A kernel exp(-d energy(u)) of u = |x - y|^2 / (d h^2), with the derivative `slope` of its energy.

    h_kl_u: the u at which u slope(u) = 1/2, where the log-density is best once a nearest point carries it.
    """

    energy: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    h_kl_u: float


GAUSSIAN = RadialKernel(lambda u: 0.5 * u, lambda u: torch.full_like(u, 0.5), 1.0)
LAPLACE = RadialKernel(torch.sqrt, lambda u: 0.5 * u.rsqrt(), 1.0)


def student(freedom: float) -> RadialKernel:
    """Student's t with freedom * d degrees of freedom: (1 + u / freedom)^(-d (freedom + 1) / 2)."""
    if not freedom > 0.0:
        raise ConfigError(f"freedom is the degrees of freedom per dimension, above 0, and is {freedom}")
    half = 0.5 * (freedom + 1.0)
    return RadialKernel(lambda u: half * torch.log1p(u / freedom), lambda u: half / (freedom + u), 1.0)


@dataclass(frozen=True, eq=False)
class GaussianSpectrumTheory:
    """The theory for Gaussian data with covariance eigenvalues [d], and a query with squared coordinates [d].

    query_squared: x_a^2 in the eigenbasis; None is a typical query, x_a^2 = lambda_a. An outlier has a larger h_G.
    Zero eigenvalues are dropped with a warning, and d counts the others. Methods that take n accept finite=True where
    the O(log d / d) drift matters: the number of points within r is then exact (SquaredDistance), with h_G from its
    logarithmic slope where one point is expected.
    Raises ShapeError, DataError (not finite, negative, all zero), and ConfigError for h <= 0 or n < 2.

    >>> theory = GaussianSpectrumTheory(torch.ones(30))
    >>> n = math.exp(0.3 * 30)
    >>> [round(float(h), 4) for h in (theory.h_glass(n), theory.h_clt(n), theory.h_kl(n))]
    [0.8677, 1.2272, 0.7836]
    >>> theory.regime(1.0, n), float(theory.h_glass(n, finite=True).round(decimals=4))
    ('heavy-tailed', 0.9576)
    """

    eigenvalues: Tensor
    query_squared: Tensor | None = None

    def __post_init__(self) -> None:
        spectrum = torch.as_tensor(self.eigenvalues, dtype=torch.float64).detach().cpu()
        query = self.query_squared
        query = spectrum if query is None else torch.as_tensor(query, dtype=torch.float64).detach().cpu()
        if spectrum.ndim != 1 or spectrum.shape != query.shape:
            shapes = f"{tuple(spectrum.shape)} and {tuple(query.shape)}"
            raise ShapeError(f"eigenvalues and query_squared have one entry a dimension, [d], got {shapes}")
        if not bool(torch.isfinite(spectrum).all() and torch.isfinite(query).all()) or bool((query < 0).any()):
            raise DataError("eigenvalues and squared coordinates are finite and not negative: this spectrum is not")
        kept = spectrum > 1e-12 * spectrum.amax() if len(spectrum) else spectrum > 0
        if not bool(kept.any()):
            raise DataError("the spectrum has no positive eigenvalue: all points are the same, no bandwidth matters")
        if bool((spectrum < -1e-12 * spectrum.amax()).any()):
            raise DataError("eigenvalues of a covariance are not negative: this spectrum has a negative one")
        if not bool(kept.all()):
            dropped = int((~kept).sum())
            warnings.warn(f"{dropped} eigenvalues are zero and dropped: d is {int(kept.sum())}", stacklevel=3)
        object.__setattr__(self, "eigenvalues", spectrum[kept])
        object.__setattr__(self, "query_squared", query[kept])

    @property
    def dimension(self) -> int:
        """The number of directions with variance."""
        return len(self.eigenvalues)

    @property
    def distances(self) -> SquaredDistance:
        """The exact law of the squared distance from the query to a point."""
        return SquaredDistance(self.eigenvalues, self.query_squared)

    def _terms(self, b: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b = torch.as_tensor(b, dtype=torch.float64).unsqueeze(-1)
        if bool((b < 0).any()):
            raise ConfigError("b = 1/h^2 is not negative: give a positive bandwidth")
        query = self.eigenvalues if self.query_squared is None else self.query_squared
        return b, self.eigenvalues, query, 1.0 / (1.0 + b * self.eigenvalues)

    def phi(self, b: float | Tensor) -> Tensor:
        """(1/d) log E_y exp(-b |x - y|^2 / 2) at the query, [...] to [...]."""
        b, _, query, inverse = self._terms(b)
        return 0.5 * (inverse.log() - b * query * inverse).mean(-1)

    def energy(self, b: float | Tensor) -> Tensor:
        """e(b) = -phi'(b): half the squared distance per dimension to the points that carry the mean at b."""
        _, values, query, inverse = self._terms(b)
        return 0.5 * (values * inverse + query * inverse.square()).mean(-1)

    def rate(self, b: float | Tensor) -> Tensor:
        """I(b) = -b e(b) - phi(b): a share e^(-d I) of all points lies at distances of the level e(b) and below."""
        b, values, query, inverse = self._terms(b)
        u = b * values * inverse
        return 0.5 * (-inverse.log() - u + b * query * inverse * u).mean(-1)

    def critical(self, n: float | Tensor, *, log_n: bool = False) -> Tensor:
        """b_c, where I(b_c) = log(n) / d; log_n: n is given as its logarithm, for n beyond floating point.

        Newton in log b inside a bracket, all n at once.
        """
        alpha = self._alpha(n, log_n)
        scale = self.eigenvalues.square().mean().sqrt()
        low = torch.full_like(alpha, -60.0)
        high = torch.full_like(alpha, 690.0)
        x = torch.where(alpha > 0.5, 2.0 * alpha, 0.5 * (alpha / 0.75).log()) - scale.log()
        for _ in range(100):
            b, values, query, inverse = self._terms(x.exp())
            u = b * values * inverse
            xb = b * query * inverse
            excess = 0.5 * (-inverse.log() - u + xb * u).mean(-1) - alpha
            # b I'(b) = b^2 phi''(b)
            slope = (0.5 * u.square() + xb * inverse * u).mean(-1)
            low, high = torch.where(excess > 0, low, x), torch.where(excess > 0, x, high)
            following = x - excess / slope
            following = torch.where((following > low) & (following < high), following, 0.5 * (low + high))
            done = bool(((following - x).abs() < 1e-12 * (1.0 + x.abs())).all())
            x = following
            if done:
                break
        if bool((x > 600.0).any()):
            raise ConfigError("log(n)/d is so large that I(b) does not reach it: n is out of reach in these dimensions")
        return x.exp()

    def _alpha(self, n: float | Tensor, log_n: bool) -> Tensor:
        value = torch.as_tensor(n, dtype=torch.float64)
        value = value if log_n else value.log()
        if not bool((value >= math.log(2.0) - 1e-12).all()) or bool((value == math.inf).any()):
            raise ConfigError("n is a finite number of points, 2 or more: where it overflows, give log_n=True")
        return value / self.dimension

    def _nearest(self, n: float | Tensor, log_n: bool) -> tuple[Tensor, Tensor]:
        """The r^2 within which one point is expected, and b_c from the slope of log F there; exact in n and d."""
        law = self.distances
        squared = law.quantile(-self._alpha(n, log_n) * self.dimension)
        return squared, 2.0 * law.log_slope(squared)

    def h_glass(self, n: float | Tensor, *, finite: bool = False, log_n: bool = False) -> Tensor:
        """h_G = b_c^(-1/2), below which a few points carry the estimate; finite: exact in n and d."""
        b = self._nearest(n, log_n)[1] if finite else self.critical(n, log_n=log_n)
        return b.rsqrt()

    def h_clt(self, n: float | Tensor, *, finite: bool = False, log_n: bool = False) -> Tensor:
        """h_CLT = sqrt(2) h_G, below which the variance of the estimate no longer describes it."""
        return math.sqrt(2.0) * self.h_glass(n, finite=finite, log_n=log_n)

    def h_kl(self, n: float | Tensor, *, finite: bool = False, log_n: bool = False) -> Tensor:
        """The bandwidth best in KL, the nearest neighbour's distance over sqrt(d); below h_G."""
        if finite:
            return (self._nearest(n, log_n)[0] / self.dimension).sqrt()
        return (2.0 * self.energy(self.critical(n, log_n=log_n))).sqrt()

    def h_collapse(self, n: float | Tensor, *, log_n: bool = False) -> Tensor:
        """The noise-to-signal ratio sigma/alpha below which a diffusion model falls onto a training point.

        That is h_G for a query at distance h from a point, x_a^2 = lambda_a + h^2, where I becomes
        (1/2d) sum log(1 + b lambda). It is larger than h_G of a typical query.
        """
        alpha = self._alpha(n, log_n)
        low, high = torch.full_like(alpha, -60.0), torch.full_like(alpha, 690.0)
        for _ in range(200):
            middle = 0.5 * (low + high)
            above = 0.5 * torch.log1p(middle.exp().unsqueeze(-1) * self.eigenvalues).mean(-1) > alpha
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (-0.5 * low).exp()

    def percolation_radius(self, n: float | Tensor, *, log_n: bool = False) -> Tensor:
        """The distance of the nearest point: a kernel of compact support, smaller than this, finds no point at all."""
        return self.h_kl(n, log_n=log_n) * math.sqrt(self.dimension)

    def tail_index(
        self,
        h: float | Tensor,
        n: float | Tensor,
        *,
        finite: bool = False,
        log_n: bool = False,
        kernel: RadialKernel = GAUSSIAN,
    ) -> Tensor:
        """mu, the index of the tails of the weights: (h / h_G)^2 for the Gaussian kernel.

        Another kernel exp(-d k(u)), u = |x - y|^2 / (d h^2), is tilted by q until the level e_c of the nearest points
        carries it, q k'(2 e_c / h^2) 2 / h^2 = b_c, and q is mu.
        """
        h = _bandwidth(h)
        b, level = self._boundary(n, finite, log_n)
        return 0.5 * b * h.square() / kernel.slope(level / h.square())

    def _boundary(self, n: float | Tensor, finite: bool, log_n: bool) -> tuple[Tensor, Tensor]:
        """b_c, and the squared distance per dimension of the nearest points."""
        if finite:
            squared, b = self._nearest(n, log_n)
            return b, squared / self.dimension
        b = self.critical(n, log_n=log_n)
        return b, 2.0 * self.energy(b)

    def kernel_bandwidths(
        self, n: float | Tensor, kernel: RadialKernel, *, finite: bool = False, log_n: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h_G, h_CLT and h_KL of a kernel whose energy is not quadratic, by bisection in log h."""
        b, level = self._boundary(n, finite, log_n)
        best = (level / kernel.h_kl_u).sqrt()
        found = []
        for mu in (1.0, 2.0):
            low, high = best.log() - 30.0, best.log() + 30.0
            for _ in range(80):
                middle = 0.5 * (low + high)
                squared = (2.0 * middle).exp()
                above = 0.5 * b * squared / kernel.slope(level / squared) > mu
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            found.append(low.exp())
        return found[0], found[1], best

    def log_density(self, h: float | Tensor, n: float | Tensor, *, log_n: bool = False) -> Tensor:
        """(1/d) log of the estimate at the query: phi(b) - log(2 pi / b) / 2 above h_G, with -alpha - b e_c below."""
        b = _bandwidth(h).square().reciprocal()
        critical = self.critical(n, log_n=log_n)
        annealed, quenched = self.phi(b), -self._alpha(n, log_n) - b * self.energy(critical)
        return torch.where(b < critical, annealed, quenched) - 0.5 * (2.0 * math.pi / b).log()

    def log_fluctuation(self, h: float | Tensor, n: float | Tensor, *, log_n: bool = False) -> Tensor:
        """log of the scale of the relative fluctuations of the estimate; 0 below h_G, where they are of order one.

        d (phi(2b) - 2 phi(b) - alpha) / 2 above h_CLT, and d (-alpha - b e_c - phi(b)), one point at the nearest level
        over the mean, between.
        """
        b = _bandwidth(h).square().reciprocal()
        critical, alpha = self.critical(n, log_n=log_n), self._alpha(n, log_n)
        normal = 0.5 * (self.phi(2.0 * b) - 2.0 * self.phi(b) - alpha)
        stable = -alpha - b * self.energy(critical) - self.phi(b)
        scale = torch.where(2.0 * b < critical, normal, torch.where(b < critical, stable, 0.0))
        return self.dimension * scale

    def regime(
        self, h: float, n: float, *, finite: bool = False, log_n: bool = False, kernel: RadialKernel = GAUSSIAN
    ) -> str:
        """What the estimate is like at bandwidth h: "gaussian", "heavy-tailed" or "condensed"."""
        return regime_of(float(self.tail_index(h, n, finite=finite, log_n=log_n, kernel=kernel)))


def _bandwidth(h: float | Tensor) -> Tensor:
    value = torch.as_tensor(h, dtype=torch.float64)
    if not bool((value > 0.0).all()) or bool((value == math.inf).any()):
        raise ConfigError(f"a bandwidth is positive and finite, got {h}")
    return value


def regime_of(mu: float) -> str:
    """The regime that belongs to a tail index: "gaussian" above 2, "heavy-tailed" from 1 to 2, "condensed" below 1."""
    if not mu > 0.0:
        raise ConfigError(f"a tail index is positive, got {mu}")
    return "gaussian" if mu > 2.0 else "heavy-tailed" if mu > 1.0 else "condensed"


def _theory(d: int, eigenvalues: Tensor | None) -> GaussianSpectrumTheory:
    if eigenvalues is not None and len(eigenvalues) != d:
        raise ShapeError(f"{len(eigenvalues)} eigenvalues do not fit d={d}: give one a dimension")
    if eigenvalues is None and d < 1:
        raise ConfigError(f"d is the number of dimensions, 1 or more, and is {d}")
    return GaussianSpectrumTheory(torch.ones(d) if eigenvalues is None else eigenvalues)


def h_glass(n: float, d: int, *, eigenvalues: Tensor | None = None, finite: bool = False) -> float:
    """h_G of Gaussian data with n points in d dimensions (unit variance without eigenvalues [d]); see the class.

    >>> round(h_glass(math.exp(0.4 * 20), 20), 4)
    0.7454
    """
    return float(_theory(d, eigenvalues).h_glass(n, finite=finite))


def h_clt(n: float, d: int, *, eigenvalues: Tensor | None = None, finite: bool = False) -> float:
    """h_CLT = sqrt(2) h_G; arguments as in `h_glass`."""
    return float(_theory(d, eigenvalues).h_clt(n, finite=finite))


def h_kl(n: float, d: int, *, eigenvalues: Tensor | None = None, finite: bool = False) -> float:
    """The bandwidth best in KL; arguments as in `h_glass`."""
    return float(_theory(d, eigenvalues).h_kl(n, finite=finite))


def tail_index(h: float, n: float, d: int, *, eigenvalues: Tensor | None = None, finite: bool = False) -> float:
    """mu = (h / h_G)^2; arguments as in `h_glass`."""
    return float(_theory(d, eigenvalues).tail_index(h, n, finite=finite))


def regime(h: float, n: float, d: int, *, eigenvalues: Tensor | None = None, finite: bool = False) -> str:
    """The regime of the bandwidth h; arguments as in `h_glass`.

    >>> [regime(h, 2981, 20) for h in (0.6, 0.9, 1.2)]
    ['condensed', 'heavy-tailed', 'gaussian']
    """
    return _theory(d, eigenvalues).regime(h, n, finite=finite)


def expected_participation(mu: float, q: float = 2.0) -> float:
    """E sum p_i^q of the shares under Poisson-Dirichlet(mu, 0): Gamma(q - mu) / (Gamma(q) Gamma(1 - mu)); 1 - mu at 2.

    >>> expected_participation(0.36)
    0.64
    """
    if not (0.0 < mu < 1.0 and q > mu):
        raise ConfigError(f"shares are Poisson-Dirichlet for 0 < mu < 1 and have moments for q > mu, got {mu} and {q}")
    return round(math.exp(math.lgamma(q - mu) - math.lgamma(q) - math.lgamma(1.0 - mu)), 15)


def expected_largest_share(mu: float) -> float:
    """E max p_i under Poisson-Dirichlet(mu, 0): the integral over t > 0 of 1 / (1 + e^t t^mu gamma(1 - mu, t)).

    From the Laplace transform of 1 / max p (Pitman and Yor 1997, prop. 8); gamma is the lower incomplete function.

    >>> round(expected_largest_share(0.5), 4)
    0.6265
    """
    from scipy.integrate import quad
    from scipy.special import gamma, gammainc

    if not 0.0 < mu < 1.0:
        raise ConfigError(f"shares are Poisson-Dirichlet for 0 < mu < 1, got {mu}")

    def integrand(t: float) -> float:
        return 1.0 / (1.0 + math.exp(t) * t**mu * gamma(1.0 - mu) * gammainc(1.0 - mu, t))

    return float(quad(integrand, 0.0, 60.0, limit=200)[0])
