"""Exponential families, ready for the p-n criterion: statistics, natural parameters, draws.

g(x; t) = exp(t xi(x) - Psi(t)) h(x). A `Family` is its functions; the mean of xi fixes the best and the fitted model
alike, eta(t) = grad Psi(t) = mean of xi. Of some, Psi is out of reach: they have draws only.

Shapes: data [n, d] (or [n] for one dimension), statistics [n, p], theta [p]; float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError

__all__ = [
    "Family",
    "bernoulli",
    "categorical",
    "exponential",
    "gamma",
    "gaussian",
    "ising",
    "natural_parameter",
    "poisson",
    "polynomial",
]


@dataclass(frozen=True)
class Family:
    """An exponential family as functions; write your own with `Family(name, statistics=..., sample=..., ...)`.

    statistics: data [n, d] to [n, p]; solve: the mean of the statistics [p] to theta [p]; sample: (theta, count,
    generator) to data [count, d]; psi: theta to a scalar, or None where it is out of reach; log_base: data to the
    logarithm of the base measure's density [n], None for 0. finite_from: as in RiskExpansion, for a fit to n samples.
    """

    name: str
    statistics: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, int, torch.Generator], Tensor]
    psi: Callable[[Tensor], Tensor] | None = None
    log_base: Callable[[Tensor], Tensor] | None = None
    finite_from: float = 1.0


def natural_parameter(psi: Callable[[Tensor], Tensor], mean: Tensor, start: Tensor) -> Tensor:
    """The theta with grad psi(theta) = mean, by Newton with halved steps on the convex psi(theta) - theta mean.

    Raises DataError where it does not converge: the mean lies on the boundary of what the family can have.
    """
    theta = start.double().clone()

    def dual(at: Tensor) -> Tensor:
        return psi(at) - at @ mean

    value = dual(theta)
    for _ in range(200):
        gradient, metric = torch.func.grad(dual)(theta), torch.func.jacrev(torch.func.grad(dual))(theta)
        if not bool(torch.isfinite(metric).all()):
            break
        direction = torch.linalg.lstsq(metric, -gradient.unsqueeze(1)).solution.squeeze(1)
        decrement = float(-gradient @ direction)
        if decrement < 1e-22 * (1.0 + abs(float(value))):
            return theta
        step = 1.0
        while step > 1e-12:
            candidate = dual(theta + step * direction)
            if bool(torch.isfinite(candidate)) and float(candidate) <= float(value) - 0.1 * step * decrement + 1e-15:
                break
            step *= 0.5
        theta, value = theta + step * direction, dual(theta + step * direction)
        if decrement < 1e-16 * (1.0 + abs(float(value))) or step <= 1e-12:
            return theta
        if float(theta.abs().amax()) > 1e4:
            break
    raise DataError("the maximum-likelihood fit does not exist: the mean of the statistics lies on their boundary")


def _column(x: Tensor) -> Tensor:
    x = x.double()
    if x.ndim == 2 and x.shape[1] == 1:
        x = x.squeeze(1)
    if x.ndim != 1:
        raise DataError(f"this family takes one number a sample, [n] or [n, 1], got {tuple(x.shape)}")
    return x


def _positive(x: Tensor) -> Tensor:
    x = _column(x)
    if not bool((x > 0.0).all()):
        raise DataError("this family takes positive numbers: some are not")
    return x


def exponential() -> Family:
    """The exponential law: xi = x, theta = -rate, Psi = -log(-theta)."""
    return Family(
        "exponential",
        statistics=lambda x: _positive(x).unsqueeze(1),
        solve=lambda mean: -1.0 / mean,
        sample=lambda theta, count, generator: (
            torch.empty(count, 1, dtype=torch.float64).exponential_(generator=generator) / -theta
        ),
        psi=lambda theta: -(-theta).log().sum(),
        finite_from=2.0,
    )


def gamma() -> Family:
    """The gamma law: xi = (log x, x), theta = (shape - 1, -rate)."""

    def psi(theta: Tensor) -> Tensor:
        shape, rate = theta[0] + 1.0, -theta[1]
        return torch.lgamma(shape) - shape * rate.log()

    def solve(mean: Tensor) -> Tensor:
        gap = float(mean[1].log() - mean[0])  # log E x - E log x > 0
        if not gap > 0.0:
            raise DataError("a gamma law needs samples that differ: all are the same")
        shape = (3.0 - gap + math.sqrt((gap - 3.0) ** 2 + 24.0 * gap)) / (12.0 * gap)
        for _ in range(50):
            value = math.log(shape) - float(torch.digamma(torch.tensor(shape).double())) - gap
            slope = 1.0 / shape - float(torch.polygamma(1, torch.tensor(shape).double()))
            shape = max(shape - value / slope, 0.5 * shape)
        return torch.stack([torch.tensor(shape - 1.0).double(), -shape / mean[1]])

    def sample(theta: Tensor, count: int, generator: torch.Generator) -> Tensor:
        shape = torch.full((count,), float(theta[0]) + 1.0, dtype=torch.float64)
        return (_standard_gamma(shape, generator) / -theta[1]).unsqueeze(1)

    return Family(
        "gamma",
        statistics=lambda x: torch.stack([_positive(x).log(), _positive(x)], dim=1),
        solve=solve,
        sample=sample,
        psi=psi,
        finite_from=3.0,
    )


def _standard_gamma(shape: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma draws of the shapes [n] by Marsaglia and Tsang, whose generator is given."""
    boost = torch.where(shape < 1.0, 1.0, 0.0).double()
    d = shape + boost - 1.0 / 3.0
    c = 1.0 / (9.0 * d).sqrt()
    result, todo = torch.empty_like(shape), torch.arange(len(shape))
    while len(todo):
        x = torch.randn(len(todo), generator=generator, dtype=torch.float64)
        u = torch.rand(len(todo), generator=generator, dtype=torch.float64)
        v = (1.0 + c[todo] * x) ** 3
        accepted = (v > 0.0) & (u.log() < 0.5 * x * x + d[todo] * (1.0 - v + v.clamp(min=1e-300).log()))
        result[todo[accepted]] = (d[todo] * v)[accepted]
        todo = todo[~accepted]
    small = torch.rand(len(shape), generator=generator, dtype=torch.float64).pow(1.0 / shape)
    return torch.where(boost > 0.0, result * small, result)


def poisson() -> Family:
    """The Poisson law: xi = x, theta = log of the mean. A sample of zeros has no fit, so that the risk is infinite."""

    def statistics(x: Tensor) -> Tensor:
        x = _column(x)
        if not bool(((x >= 0) & (x == x.round())).all()):
            raise DataError("a Poisson law takes counts, 0, 1, 2, ...: some are not")
        return x.unsqueeze(1)

    def solve(mean: Tensor) -> Tensor:
        if not float(mean) > 0.0:
            raise DataError("the maximum-likelihood fit does not exist: all counts are zero")
        return mean.log()

    return Family(
        "poisson",
        statistics=statistics,
        solve=solve,
        sample=lambda theta, count, generator: torch.poisson(theta.exp().expand(count, 1), generator=generator),
        psi=lambda theta: theta.exp().sum(),
        log_base=lambda x: -torch.lgamma(_column(x) + 1.0),
        finite_from=math.inf,
    )


def categorical(cells: int) -> Family:
    """A law on cells 0, ..., cells - 1: xi are the indicators of all cells but the last, theta their log-odds."""
    if cells < 2:
        raise ConfigError(f"a categorical law has two cells or more, got {cells}")

    def statistics(x: Tensor) -> Tensor:
        x = _column(x)
        if not bool(((x >= 0) & (x < cells) & (x == x.round())).all()):
            raise DataError(f"a law on {cells} cells takes whole numbers from 0 to {cells - 1}: some are not")
        return torch.nn.functional.one_hot(x.long(), cells)[:, :-1].double()

    def solve(mean: Tensor) -> Tensor:
        last = 1.0 - mean.sum()
        if not bool((mean > 0.0).all()) or not float(last) > 1e-15:
            raise DataError("the maximum-likelihood fit does not exist: a cell has no sample, merge it with another")
        return (mean / last).log()

    def sample(theta: Tensor, count: int, generator: torch.Generator) -> Tensor:
        mass = torch.cat([theta, theta.new_zeros(1)]).softmax(0)
        return torch.multinomial(mass, count, replacement=True, generator=generator).double().unsqueeze(1)

    return Family(
        "categorical",
        statistics=statistics,
        solve=solve,
        sample=sample,
        psi=lambda theta: torch.cat([theta, theta.new_zeros(1)]).logsumexp(0),
        finite_from=math.inf,
    )


def bernoulli() -> Family:
    """A coin: xi = x in {0, 1}, theta its log-odds."""
    coin = categorical(2)
    return Family(
        "bernoulli",
        statistics=lambda x: 1.0 - coin.statistics(x),
        solve=lambda mean: -coin.solve(1.0 - mean),
        sample=lambda theta, count, generator: coin.sample(-theta, count, generator),
        psi=lambda theta: torch.nn.functional.softplus(theta).sum(),
        finite_from=math.inf,
    )


def gaussian(
    d: int, *, part: Literal["mean", "covariance", "both"] = "both", known: Tensor | None = None, quasi: bool = False
) -> Family:
    """The normal law in d dimensions.

    part: "mean" with the covariance known [d, d] (the unit matrix by default), "covariance" with the mean known [d]
    (zero by default), or "both". Statistics x and the products x_i x_j, i <= j, of what is not known.
    quasi: draws from a scrambled Sobol sequence and its mirror image, of smaller error in averages.
    """
    if d < 1 or part not in ("mean", "covariance", "both"):
        raise ConfigError(f'd is 1 or more and part "mean", "covariance" or "both", got {d} and {part!r}')
    if part == "both" and known is not None:
        raise ConfigError('known is the covariance for part="mean" or the mean for part="covariance": "both" has none')
    rows, columns = torch.triu_indices(d, d)
    factor = torch.where(rows == columns, -0.5, -1.0).double()  # theta of x_i x_j, in units of the precision
    mean_known = torch.zeros(d).double() if known is None or part == "mean" else known.double()
    covariance_known = torch.eye(d).double() if known is None or part != "mean" else known.double()

    def statistics(x: Tensor) -> Tensor:
        x = x.double().unsqueeze(1) if x.ndim == 1 else x.double()
        if x.ndim != 2 or x.shape[1] != d:
            raise DataError(f"this normal law takes rows of {d} features, got the shape {tuple(x.shape)}")
        centred = x - mean_known
        products = centred[:, rows] * centred[:, columns]
        return {"mean": x, "covariance": products, "both": torch.cat([x, products], dim=1)}[part]

    def unpack(theta: Tensor) -> tuple[Tensor, Tensor]:
        """Precision times mean, and the precision."""
        if part == "mean":
            return theta, torch.linalg.inv(covariance_known)
        precision = _symmetric(d, theta[-len(rows) :] / factor)
        return (theta[:d] if part == "both" else theta.new_zeros(d)), precision

    def solve(mean: Tensor) -> Tensor:
        if part == "mean":
            return torch.linalg.solve(covariance_known, mean)
        centre = mean[:d] if part == "both" else torch.zeros(d).double()
        precision = _inverted(_symmetric(d, mean[-len(rows) :].double()) - torch.outer(centre, centre))
        theta = factor * precision[rows, columns]
        return torch.cat([precision @ centre, theta]) if part == "both" else theta

    def psi(theta: Tensor) -> Tensor:
        linear, precision = unpack(theta)
        return 0.5 * linear @ torch.linalg.solve(precision, linear) - 0.5 * torch.logdet(precision)

    def sample(theta: Tensor, count: int, generator: torch.Generator) -> Tensor:
        linear, precision = unpack(theta)
        covariance = torch.linalg.inv(precision)
        noise = _sobol_normal(count, d, generator) if quasi else torch.randn(count, d, generator=generator).double()
        return mean_known + covariance @ linear + noise @ torch.linalg.cholesky(covariance).T

    def log_base(x: Tensor) -> Tensor:
        base = torch.full((len(x),), -0.5 * d * math.log(2.0 * math.pi), dtype=torch.float64)
        if part == "mean":
            x = x.double().reshape(len(x), d)
            return base - 0.5 * (x * torch.linalg.solve(covariance_known, x.T).T).sum(1)
        return base

    finite_from = {"mean": 1.0, "covariance": d + 2.0, "both": d + 3.0}[part]
    return Family("gaussian", statistics, solve, sample, psi, log_base, finite_from)


def _symmetric(d: int, upper: Tensor) -> Tensor:
    """The symmetric matrix [d, d] with these entries [d (d + 1) / 2] on and above its diagonal."""
    rows, columns = torch.triu_indices(d, d)
    filled = torch.zeros(d, d, dtype=upper.dtype).index_put((rows, columns), upper)
    return filled + filled.T - torch.diag(filled.diagonal())


def _inverted(covariance: Tensor) -> Tensor:
    """The precision of a covariance. Raises DataError for one that is singular."""
    values = torch.linalg.eigvalsh(covariance)
    if not float(values[0]) > 1e-12 * float(values[-1]):
        raise DataError("the maximum-likelihood fit does not exist: the covariance is singular, drop a feature")
    return torch.linalg.inv(covariance)


def _sobol_normal(count: int, d: int, generator: torch.Generator) -> Tensor:
    seed = int(torch.randint(1 << 31, (), generator=generator))
    points = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw((count + 1) // 2, dtype=torch.float64)
    noise = torch.special.ndtri(points.clamp(1e-12, 1.0 - 1e-12))
    both = torch.stack([noise, -noise], dim=1).flatten(0, 1)[:count]
    # batches of draws are compared for the error: each is to hold points of the whole sequence
    return both[torch.randperm(count, generator=generator)]


def polynomial(degree: int, d: int = 1, *, nodes: int = 64) -> Family:
    """Densities on the unit cube whose logarithm is a polynomial: xi are the monomials of total degree 1 to `degree`.

    In Legendre's polynomials of 2x - 1, which are orthogonal there; Psi by Gauss-Legendre quadrature with so many nodes
    a dimension; draws by rejection; d <= 3.
    """
    if degree < 1 or not 1 <= d <= 3 or nodes < 8:
        raise ConfigError(f"degree is 1 or more, d from 1 to 3 and nodes 8 or more, got {degree}, {d} and {nodes}")
    import numpy as np

    at, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(nodes))
    exponents = torch.cartesian_prod(*[torch.arange(degree + 1)] * d).reshape(-1, d).tolist()
    powers = [p for p in exponents if 0 < sum(p) <= degree]

    def evaluate(x: Tensor) -> Tensor:
        values = [torch.ones_like(x), 2.0 * x - 1.0]
        for k in range(1, degree):
            values.append(((2 * k + 1) * (2.0 * x - 1.0) * values[-1] - k * values[-2]) / (k + 1))
        table = torch.stack(values)  # [degree + 1, n, d]
        columns = [math.prod([table[power, :, axis] for axis, power in enumerate(p)]) for p in powers]
        return torch.stack(columns, dim=1)  # type: ignore[arg-type]

    def statistics(x: Tensor) -> Tensor:
        x = x.double().unsqueeze(1) if x.ndim == 1 else x.double()
        if x.ndim != 2 or x.shape[1] != d or not bool(((x >= 0.0) & (x <= 1.0)).all()):
            raise DataError(f"this family takes rows of {d} features in the unit cube: scale them to it")
        return evaluate(x)

    grid = torch.cartesian_prod(*[(at + 1.0) / 2.0] * d).reshape(-1, d)
    log_weight = sum((weight.log() - math.log(2.0))[index] for index in _grid_index(nodes, d))
    table = evaluate(grid)

    def psi(theta: Tensor) -> Tensor:
        return (table @ theta + log_weight).logsumexp(0)

    def sample(theta: Tensor, count: int, generator: torch.Generator) -> Tensor:
        top = (evaluate(torch.rand(20_000, d, generator=generator, dtype=torch.float64)) @ theta).amax()
        top = torch.maximum(top, (table @ theta).amax()) + 0.05
        parts: list[Tensor] = []
        while sum(map(len, parts)) < count:
            x = torch.rand(4 * count, d, generator=generator, dtype=torch.float64)
            u = torch.rand(4 * count, generator=generator, dtype=torch.float64)
            parts.append(x[u.log() < evaluate(x) @ theta - top])
        return torch.cat(parts)[:count]

    start = torch.zeros(len(powers), dtype=torch.float64)
    return Family("polynomial", statistics, lambda mean: natural_parameter(psi, mean, start), sample, psi)


def _grid_index(nodes: int, d: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(nodes)] * d).reshape(-1, d).T


def ising(d: int, *, sweeps: int = 20, draws: int = 4000, seed: int = 0) -> Family:
    """The pairwise law on {-1, 1}^d: xi are x_i and x_i x_j, i < j; Psi by enumeration up to d = 12.

    Draws by Gibbs sampling, `sweeps` from a random start, all chains at once. Beyond 12 the fit is by Monte-Carlo
    Newton from `draws` such chains of the given seed, and Psi is None.
    """
    if d < 2:
        raise ConfigError(f"a pairwise law has two variables or more, got {d}")
    from kullback.core.rng import generator as stream

    rows, columns = torch.triu_indices(d, d, offset=1)

    def evaluate(x: Tensor) -> Tensor:
        return torch.cat([x, x[:, rows] * x[:, columns]], dim=1)

    def statistics(x: Tensor) -> Tensor:
        x = x.double()
        if x.ndim != 2 or x.shape[1] != d or not bool((x.abs() == 1.0).all()):
            raise DataError(f"a pairwise law takes rows of {d} features -1 or 1, got {tuple(x.shape)} or other values")
        return evaluate(x)

    def sample(theta: Tensor, count: int, generator: torch.Generator) -> Tensor:
        field, coupling = theta[:d], torch.zeros(d, d, dtype=torch.float64)
        coupling[rows, columns] = theta[d:]
        coupling = coupling + coupling.T
        x = torch.randint(2, (count, d), generator=generator).double() * 2.0 - 1.0
        for _ in range(sweeps):
            for site in range(d):
                up = torch.sigmoid(2.0 * (field[site] + x @ coupling[site]))
                x[:, site] = torch.where(torch.rand(count, generator=generator, dtype=torch.float64) < up, 1.0, -1.0)
        return x

    p = d + len(rows)
    start = torch.zeros(p, dtype=torch.float64)
    if d <= 12:
        states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * d)
        table = evaluate(states)

        def psi(theta: Tensor) -> Tensor:
            return (table @ theta).logsumexp(0)

        return Family("ising", statistics, lambda mean: _inside(mean, psi, start), sample, psi, finite_from=math.inf)

    def solve(mean: Tensor) -> Tensor:
        if float(mean.abs().amax()) >= 1.0:
            raise DataError("the maximum-likelihood fit does not exist: a variable or a product never changes")
        theta, source = start.clone(), stream(seed, "ising fit")
        theta[:d] = torch.atanh(mean[:d])
        for step in range(40):
            xi = evaluate(sample(theta, draws, source))
            metric = torch.cov(xi.T) + 1e-3 * torch.eye(p, dtype=torch.float64)
            rate = 1.0 if step < 8 else 4.0 / step
            theta = theta + rate * torch.linalg.solve(metric, mean - xi.mean(0)).clamp(-0.5, 0.5)
        return theta

    return Family("ising", statistics, solve, sample, None, finite_from=math.inf)


def _inside(mean: Tensor, psi: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    if float(mean.abs().amax()) >= 1.0:
        raise DataError("the maximum-likelihood fit does not exist: a variable or a product never changes")
    return natural_parameter(psi, mean, start)
