"""The risk of a maximum-likelihood fit to order 1/n^2, in an exponential family that need not hold the truth.

Model g(x; t) = exp(t xi(x) - Psi(t)), truth g, information projection g* (its mean of xi is the truth's), fit g_n to n
samples. With G, T3, T4 the second to fourth cumulants of xi under g* and C, K3 the second and third under g,

    E D(g* || g_n) = a/n + b/n^2 + O(n^-3),   a = tr(G^-1 C) / 2,
    b = -<T3, K3>/3 + 3/8 [-<T4, C C> + T3^{ij e} T3^{kl}_e C_ij C_kl + 2 T3^{ik e} T3^{jl}_e C_ij C_kl],

indices raised by G^-1. Whitened, with z and w from the model, y from the truth and S = Cov(y), all of it is averages:
<T3, K3> = E (z y)^3, <T4, S S> = E (z'Sz)^2 - (tr S)^2 - 2 tr S^2, the brackets |E (z'Sz) z|^2 and E (z'Sw)^2 (z w); so
it needs no array of p^3 or p^4 and no Psi. Squares of means are taken without bias. Source: Sheena 2021 (arXiv
2105.08947), derived anew for natural families.

A conditional model (a softmax head, a regression) has cumulants given the covariate, averaged: scores (y - E[y|x]) x
stand for centred statistics, and a second draw for the same covariate gives E_x of products of conditional covariances.

Shapes: xi_data [n, p], xi_model and twins [m, p]; float64; risks in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["RiskExpansion", "estimation_risk", "estimation_risk_psi", "first_order_risk", "risk_from_cumulants"]

_BATCHES = 8
_TENSOR = 48  # up to this p, the third moments are held as an array
_PAIRS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskExpansion:
    """a/n + b/n^2 for p parameters, with standard errors of a and b from the data and the draws.

    order: 1 where b is not known and taken as 0. finite_from: the n from which on the exact risk is finite; inf where
    it never is, since the fit may not exist (a category that was not seen): then the expansion is given that it does.

    >>> normal = RiskExpansion(a=1.0, b=61 / 12, p=2)
    >>> round(normal.risk(20), 4), normal.required_n(0.08), normal.valid(20)
    (0.0627, 17, True)
    """

    a: float
    b: float
    p: int
    se_a: float = 0.0
    se_b: float = 0.0
    order: int = 2
    finite_from: float = 1.0

    def risk(self, n: float) -> float:
        """a/n + b/n^2, in nats; inf below finite_from, where that is finite."""
        if not n >= 1:
            raise ConfigError(f"n is a number of samples, 1 or more, and is {n}")
        if n < self.finite_from < math.inf:
            return math.inf
        return self.a / n + self.b / n**2

    def standard_error(self, n: float) -> float:
        """Of `risk`, as if the errors of a and b were independent."""
        return math.hypot(self.se_a / n, self.se_b / n**2)

    def valid(self, n: float) -> bool:
        """Whether the second term is less than half of the first, so that the expansion can be trusted, and n > p."""
        return n > self.p and abs(self.b) < 0.5 * self.a * n

    def required_n(self, budget: float) -> int:
        """The smallest n above p from which on the risk is within the budget.

        Where b < 0 keeps the expansion below the budget for every n this is p + 1, and `valid` denies it.
        """
        if not budget > 0.0:
            raise ConfigError(f"a budget is a positive number of nats, and is {budget}")
        square = self.a**2 + 4.0 * self.b * budget
        n = 0.0 if square < 0.0 else (self.a + math.sqrt(square)) / (2.0 * budget)
        least = self.finite_from if self.finite_from < math.inf else 0
        return max(math.ceil(n - 1e-9), self.p + 1, math.ceil(least))


def estimation_risk(
    xi_data: Tensor,
    xi_model: Tensor,
    *,
    twins: Tensor | None = None,
    weights: Tensor | None = None,
    population: bool = False,
    order: Literal[1, 2] = 2,
    method: Literal["auto", "tensor", "pairs"] = "auto",
    chunk: int = 4096,
) -> RiskExpansion:
    """The expansion from statistics of the data [n, p] and of draws of the fitted model [m, p].

    population: the data are the whole truth and not a sample from it (no correction for n); weights [n] of its points
    imply it. twins [m, p]: for a conditional model, scores of second draws for the same covariates as xi_model.
    method: "tensor" holds p^3 third moments and so uses all pairs of draws, "pairs" takes chunks of products between
    at most 10000 draws a side; "auto" changes at p = 48. order=1 needs xi_model for its covariance only.
    Raises ShapeError, DataError (not finite, n <= p, statistics that are affinely dependent: it says which).

    >>> source = torch.Generator().manual_seed(0)
    >>> x = torch.empty(200_000, 1, dtype=torch.float64).exponential_(generator=source)
    >>> found = estimation_risk(x[:100_000], x[100_000:])
    >>> abs(found.a - 1 / 2) < 6 * found.se_a, abs(found.b - 11 / 12) < 6 * found.se_b
    (True, True)
    """
    data, model, other = _checked(xi_data, xi_model, twins, weights)
    if order not in (1, 2) or method not in ("auto", "tensor", "pairs"):
        raise ConfigError(f'order is 1 or 2 and method "auto", "tensor" or "pairs", not {order!r} and {method!r}')
    n, p = data.shape
    mass = torch.full((n,), 1.0 / n, dtype=torch.float64) if weights is None else weights.double() / weights.sum()
    exact = population or weights is not None
    root = _root(model, other)
    y = torch.linalg.solve_triangular(root, (data - mass @ data).T, upper=False).T
    z = torch.linalg.solve_triangular(root, (model - _centre(model, other)).T, upper=False).T
    w = None if other is None else torch.linalg.solve_triangular(root, other.T, upper=False).T
    spread = (y * mass.unsqueeze(1)).T @ y * (1.0 if exact else n / (n - 1))
    half = 0.5 * y.square().sum(1)
    a = 0.5 * float(spread.trace())
    se_a = 0.0 if exact else float(half.std()) / math.sqrt(n)
    if order == 1:
        return RiskExpansion(a=a, b=0.0, p=p, se_a=se_a, order=1)
    skew = mass * (1.0 if exact else n * n / ((n - 1) * (n - 2)))
    moments = _moments_by_tensor if method == "tensor" or (method == "auto" and p <= _TENSOR) else _moments_by_pairs
    parts = torch.arange(len(z)).tensor_split(_BATCHES)
    batches = [moments(z[part], None if w is None else w[part], y, spread, chunk) for part in parts]
    each = torch.tensor([_second_order(one, y, skew, spread)[0] for one in batches], dtype=torch.float64)
    b, matrix, cubes = _second_order(_pooled(batches), y, skew, spread)
    influence = 0.75 * ((y @ matrix) * y).sum(1) - cubes / 3.0
    se_data = 0.0 if exact else float(influence.std()) / math.sqrt(n)
    return RiskExpansion(a=a, b=b, p=p, se_a=se_a, se_b=math.hypot(se_data, float(each.std()) / math.sqrt(_BATCHES)))


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of `count` whitened draws: E (z'Sz) zz' less its Gaussian part [p, p], and the rest from one of two sources.

    third [p, p, p] = E z z z; or, from pairs, m = E (z'Sz) z, along = E (m z) zz', R = E (z'Sw)(z w) z w' and
    cubes [n] = E (z y_i)^3. diagonal: E (z'Sz)^2 |z|^2, what a draw paired with itself adds.
    """

    count: int
    fourth: Tensor
    diagonal: float
    third: Tensor | None = None
    m: Tensor | None = None
    along: Tensor | None = None
    r: Tensor | None = None
    cubes: Tensor | None = None


def _fourth(z: Tensor, w: Tensor | None, q: Tensor, spread: Tensor) -> Tensor:
    """The sum over draws of (z'Sz) zz' less the Gaussian part, which twins w give conditionally."""
    whole = (z * q.unsqueeze(1)).T @ z
    if w is None:
        eye = torch.eye(len(spread), dtype=torch.float64)
        return whole - len(z) * (spread.trace() * eye + 2.0 * spread)
    crossed = (z * ((z @ spread) * w).sum(1, keepdim=True)).T @ w
    return whole - (w * q.unsqueeze(1)).T @ w - crossed - crossed.T


def _moments_by_tensor(z: Tensor, w: Tensor | None, y: Tensor, spread: Tensor, chunk: int) -> _Moments:
    p = len(spread)
    third, fourth = torch.zeros(p * p, p, dtype=torch.float64), torch.zeros(p, p, dtype=torch.float64)
    diagonal = 0.0
    for start in range(0, len(z), chunk):
        part = z[start : start + chunk]
        q = ((part @ spread) * part).sum(1)
        third += (part.unsqueeze(2) * part.unsqueeze(1)).flatten(1).T @ part
        fourth += _fourth(part, None if w is None else w[start : start + chunk], q, spread)
        diagonal += float((q.square() * part.square().sum(1)).sum())
    return _Moments(len(z), fourth / len(z), diagonal / len(z), third=third.view(p, p, p) / len(z))


def _moments_by_pairs(z: Tensor, w: Tensor | None, y: Tensor, spread: Tensor, chunk: int) -> _Moments:
    q = ((z @ spread) * z).sum(1)
    half = min(len(z) // 2, _PAIRS)
    first, second = z[:half], z[half : 2 * half]
    r = torch.zeros_like(spread)
    cubes = torch.zeros(len(y), dtype=torch.float64)
    for part in first.split(chunk):
        products = (part @ spread @ second.T) * (part @ second.T)
        r += part.T @ products @ second
    for part in z[: 2 * half].split(chunk):
        cubes += (y @ part.T).pow(3).sum(1)
    r = 0.5 * (r + r.T) / half**2
    diagonal = float((q.square() * z.square().sum(1)).mean())
    m = (z * q.unsqueeze(1)).mean(0)
    along = (z * (z @ m).unsqueeze(1)).T @ z / len(z)
    fourth, cubes = _fourth(z, w, q, spread) / len(z), cubes / (2 * half)
    return _Moments(len(z), fourth, diagonal, m=m, along=along, r=r, cubes=cubes)


def _pooled(batches: list[_Moments]) -> _Moments:
    """The moments of all batches, each a mean over its draws; of R, the mean over pairs within batches."""
    total = sum(one.count for one in batches)
    names = ("fourth", "diagonal", "third", "m", "along", "r", "cubes")
    columns = {name: [getattr(one, name) for one in batches] for name in names}
    share = [one.count / total for one in batches]
    means = {
        name: None if column[0] is None else sum(s * value for s, value in zip(share, column, strict=True))
        for name, column in columns.items()
    }
    return _Moments(total, **means)  # type: ignore[arg-type]


def _second_order(moments: _Moments, y: Tensor, skew: Tensor, spread: Tensor) -> tuple[float, Tensor, Tensor]:
    """b; the matrix M(S) with <M, S> the bracket of b; and E (z y_i)^3 [n]."""
    n, third = moments.count, moments.third
    own = n * moments.diagonal
    if third is not None:
        m = torch.einsum("ije,ij->e", third, spread)
        along = torch.einsum("e,kle->kl", m, third)
        r = torch.einsum("jke,jle->kl", torch.einsum("ike,ij->jke", third, spread), third)
        outer = (n * n * float((r * spread).sum()) - own) / (n * (n - 1))
        cubes = _cubes(third, y)
    elif moments.m is not None and moments.along is not None and moments.r is not None and moments.cubes is not None:
        m, along, r, cubes = moments.m, moments.along, moments.r, moments.cubes
        outer = float((r * spread).sum())
    else:
        raise DataError("there are no third moments of the model: give draws")
    squared = (n * n * float(m.square().sum()) - own) / (n * (n - 1))
    bracket = squared + 2.0 * outer - float((moments.fourth * spread).sum())
    return 0.375 * bracket - float(skew @ cubes) / 3.0, along + 2.0 * r - moments.fourth, cubes


def _cubes(third: Tensor, y: Tensor) -> Tensor:
    """T3(y, y, y) for every row, [n, p] to [n]."""
    p = y.shape[1]
    flat = third.reshape(p * p, p)
    parts = [((rows.unsqueeze(2) * rows.unsqueeze(1)).flatten(1) @ flat * rows).sum(1) for rows in y.split(4096)]
    return torch.cat(parts)


def _checked(
    xi_data: Tensor, xi_model: Tensor, twins: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    data, model = torch.as_tensor(xi_data).double(), torch.as_tensor(xi_model).double()
    other = None if twins is None else torch.as_tensor(twins).double()
    if data.ndim != 2 or model.ndim != 2 or data.shape[1] != model.shape[1] or data.shape[1] == 0:
        shapes = f"{tuple(data.shape)} and {tuple(model.shape)}"
        raise ShapeError(f"statistics of the data and of the draws have shapes [n, p] and [m, p], got {shapes}")
    if other is not None and other.shape != model.shape:
        raise ShapeError(f"twins {tuple(other.shape)} are second draws for xi_model {tuple(model.shape)}: one each")
    if weights is not None:
        if weights.shape != data.shape[:1]:
            raise ShapeError(f"weights have shape {tuple(weights.shape)} and there are {len(data)} rows: one each")
        if not bool((weights >= 0).all()) or not float(weights.sum()) > 0.0:
            raise DataError("weights are not negative and have a positive sum: these do not")
    for name, table in (("xi_data", data), ("xi_model", model), ("twins", other)):
        if table is not None and not bool(torch.isfinite(table).all()):
            raise DataError(f"{name} has entries that are not finite: drop those rows")
    if weights is None and len(data) < max(3, data.shape[1] + 1):
        raise DataError(f"{len(data)} samples do not carry {data.shape[1]} parameters: n > p is needed, and 3 or more")
    if len(model) < 2 * _BATCHES:
        raise DataError(f"{len(model)} draws of the model are too few: give thousands")
    return data, model, other


def _centre(model: Tensor, twins: Tensor | None) -> Tensor:
    return model.mean(0) if twins is None else torch.zeros(model.shape[1], dtype=torch.float64)


def _root(model: Tensor, twins: Tensor | None) -> Tensor:
    """The Cholesky factor of G [p, p]; raises DataError with the null vector where G is singular."""
    centred = model - _centre(model, twins)
    metric = centred.T @ centred / len(model)
    if twins is not None:
        metric = 0.5 * (metric + twins.T @ twins / len(model))
    return cholesky_of_metric(metric)


def cholesky_of_metric(metric: Tensor) -> Tensor:
    """The Cholesky factor of a Fisher metric [p, p]; raises DataError that names its null vector where it has one."""
    scale = metric.diagonal().clamp(min=1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(metric * scale.unsqueeze(0) * scale.unsqueeze(1))
    if not float(values[0]) > 1e-10 or float(metric.diagonal().amin()) <= 0.0:
        null = vectors[:, 0] * scale
        null = null / null.abs().amax()
        terms = [f"{value:+.3g} xi_{index}" for index, value in enumerate(null.tolist()) if abs(value) > 1e-3][:8]
        raise DataError(f"the statistics are affinely dependent: {' '.join(terms)} is constant, drop one of them")
    return torch.linalg.cholesky(metric)


def risk_from_cumulants(
    metric: Tensor, third: Tensor, fourth: Tensor, spread: Tensor | None = None, skew: Tensor | None = None
) -> RiskExpansion:
    """The expansion from cumulants: G [p, p], T3 [p, p, p], T4 [p, p, p, p] of the model, C and K3 of the truth.

    Without C and K3 the model is well specified: a = p / 2.
    """
    spread = metric if spread is None else spread
    skew = third if skew is None else skew
    root = cholesky_of_metric(metric)
    p = len(metric)
    inverse = torch.linalg.solve_triangular(root, torch.eye(p, dtype=metric.dtype), upper=False)
    t3 = torch.einsum("abc,ia,jb,kc->ijk", third, inverse, inverse, inverse)
    k3 = torch.einsum("abc,ia,jb,kc->ijk", skew, inverse, inverse, inverse)
    t4 = torch.einsum("abcd,ia,jb,kc,ld->ijkl", fourth, inverse, inverse, inverse, inverse)
    c = inverse @ spread @ inverse.T
    bracket = torch.einsum("ije,kle,ij,kl->", t3, t3, c, c) + 2.0 * torch.einsum("ike,jle,ij,kl->", t3, t3, c, c)
    bracket = bracket - torch.einsum("ijkl,ij,kl->", t4, c, c)
    b = 0.375 * float(bracket) - float((t3 * k3).sum()) / 3.0
    return RiskExpansion(a=0.5 * float(c.trace()), b=b, p=p)


def estimation_risk_psi(
    psi: Callable[[Tensor], Tensor], theta: Tensor, xi_data: Tensor | None = None
) -> RiskExpansion:
    """The expansion from the log-partition function at theta [p], whose derivatives are taken by autograd; p <= 12.

    xi_data [n, p]: a sample of the truth; None where the model is well specified. Raises ConfigError for larger p.

    >>> found = estimation_risk_psi(lambda theta: -(-theta).log().sum(), torch.tensor([-1.0], dtype=torch.float64))
    >>> round(found.a, 6), round(found.b, 6)
    (0.5, 0.916667)
    """
    if theta.ndim != 1 or not 1 <= len(theta) <= 12:
        raise ConfigError(f"exact cumulants are for 1 to 12 parameters and theta is {tuple(theta.shape)}: give draws")
    from torch.func import grad, jacrev

    at = theta.double()
    metric, t3 = jacrev(grad(psi))(at), jacrev(jacrev(grad(psi)))(at)
    t4 = jacrev(jacrev(jacrev(grad(psi))))(at)
    if xi_data is None:
        return risk_from_cumulants(metric, t3, t4)
    data = _checked(xi_data, torch.zeros(2 * _BATCHES, len(at)), None, None)[0]
    n = len(data)
    y = data - data.mean(0)
    skew = torch.einsum("na,nb,nc->abc", y, y, y) * n / ((n - 1) * (n - 2))
    return risk_from_cumulants(metric, t3, t4, y.T @ y / (n - 1), skew)


def first_order_risk(fisher: Tensor, curvature: Tensor, score_covariance: Tensor) -> RiskExpansion:
    """a = tr(G J^-1 I J^-1) / 2 of any smooth model: all [p, p], at the best parameters; order 1.

    fisher: G, of the model at them; curvature: J = -E of the second derivatives of log g under the truth;
    score_covariance: I, under the truth. Equal to tr(G^-1 C) / 2 in an exponential family.
    """
    shapes = {tuple(one.shape) for one in (fisher, curvature, score_covariance)}
    if len(shapes) != 1 or fisher.ndim != 2 or fisher.shape[0] != fisher.shape[1]:
        raise ShapeError(f"the three matrices have one shape [p, p], got {sorted(shapes)}")
    inverse = torch.linalg.inv(curvature.double())
    a = 0.5 * float((fisher.double() @ inverse @ score_covariance.double() @ inverse).trace())
    return RiskExpansion(a=a, b=0.0, p=len(fisher), order=1)
