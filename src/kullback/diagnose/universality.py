"""Why a huge class can learn: the regret of a Bayesian mixture, bounded by the prior mass near the truth.

Class {P_t}, prior w, truth P_0; natural logarithms. The mixture Q(x^n) = int w(t) P_t(x^n) predicts with a regret that
is a KL divergence, D(P_0^n || Q) = sum of the expected KL of each prediction, and with D(t) = D(P_0 || P_t) a sample

    n R_o <= L(n) = -log int w(t) e^(-n D(t)) = min_rho [KL(rho || w) + n E_rho D]     (exponential bound)
          <= min_eps [n eps - log w(D <= eps)]                                         (ball bound),

so that what counts is the weight of what is close to the truth, not the number of parameters: L = (p/2) log n + const
for p regular ones, less where the minimum is flat. lambda(n) = n E_rho D = dL/d log n is the local dimension.
Source: Feder, Urbanke and Fogel 2025 (arXiv 2506.07661); the bounds are proved by Jensen's inequality.

Shapes: divergences [M] in nats, of M draws from the prior, or of an enumerated class with log_w [M]; results are of all
n samples together unless said otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "BallBound",
    "Bound",
    "UniversalityReport",
    "Weight",
    "averaged_predictor",
    "ball_bound",
    "capacity",
    "exp_bound",
    "hypothesis_weight",
    "laplace_bound",
    "local_dimension",
    "merge_functions",
    "posterior_bound",
    "regret_batch",
    "regret_online",
    "regret_supervised",
    "sample_complexity",
    "student_excess",
    "universality_report",
]


class Weight(NamedTuple):
    """The prior mass, its standard error, and a 95% upper end: 3/M where no draw fell in, never 0."""

    value: float
    se: float
    upper: float


class Bound(NamedTuple):
    """A bound on n R_o in nats, its jackknife standard error, and how many draws carry it (a Kish number)."""

    value: float
    se: float
    effective: float


class BallBound(NamedTuple):
    """A bound on n R_o in nats, and the radius at which it is smallest, in nats a sample."""

    value: float
    eps_star: float


def _log_weights(divergences: Tensor, log_w: Tensor | None) -> tuple[Tensor, Tensor]:
    d = torch.as_tensor(divergences).double()
    if d.ndim != 1 or not len(d):
        raise ShapeError(f"divergences have shape [M], one a hypothesis, got {tuple(d.shape)}")
    if bool(torch.isnan(d).any()) or float(d.amin()) < -1e-12:
        raise DataError("divergences are not negative and not NaN: for a truth outside the class subtract the smallest")
    if log_w is None:
        return d, torch.full_like(d, -math.log(len(d)))
    weights = torch.as_tensor(log_w).double()
    if weights.shape != d.shape:
        raise ShapeError(f"log_w has shape {tuple(weights.shape)} and divergences {tuple(d.shape)}: give one each")
    if abs(float(weights.logsumexp(0))) > 1e-6:
        total = math.exp(float(weights.logsumexp(0)))
        raise DataError(f"a prior sums to one and log_w sums to {total:.6g}: subtract its logsumexp")
    return d, weights


def _check_n(n: float) -> None:
    if not n >= 1:
        raise ConfigError(f"n is a number of samples, 1 or more, and is {n}")


def hypothesis_weight(divergences: Tensor, eps: float, *, log_w: Tensor | None = None) -> Weight:
    """The prior mass of the hypotheses within eps nats a sample of the truth.

    >>> hypothesis_weight(torch.tensor([0.0, 0.1, 0.2, 0.5]), 0.15).value
    0.5
    """
    if not eps > 0.0:
        raise ConfigError(f"eps is a radius in nats, above 0, and is {eps}")
    d, weights = _log_weights(divergences, log_w)
    value = min(float(weights[d <= eps].exp().sum()), 1.0)
    if log_w is not None:
        return Weight(value, 0.0, value)
    se = math.sqrt(value * (1.0 - value) / len(d))
    return Weight(value, se, value + 1.96 * se if value > 0.0 else min(3.0 / len(d), 1.0))


def exp_bound(divergences: Tensor, n: float, *, log_w: Tensor | None = None) -> Bound:
    """L(n) = -log E_w e^(-n D); warns where fewer than 30 draws from the prior carry it.

    >>> grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    >>> d = 0.3 * (0.3 / grid).log() + 0.7 * (0.7 / (1 - grid)).log()
    >>> round(exp_bound(d, 10).value, 4)
    1.0767
    """
    _check_n(n)
    d, weights = _log_weights(divergences, log_w)
    terms = weights - n * d
    total = terms.logsumexp(0)
    if float(total) == -math.inf:
        raise DataError("no hypothesis gives the truth's samples a chance: every divergence is infinite")
    if log_w is not None:
        return Bound(-float(total), 0.0, math.inf)
    share = (terms - total).exp()
    effective = 1.0 / float(share.square().sum())
    if effective < 30.0:
        few = f"{effective:.1f} draws from the prior carry the exponential bound at n = {n:g}"
        warnings.warn(f"{few}: draw more, or use thermodynamic integration (log_weight_ti)", stacklevel=2)
    # leaving draw i out changes the sum by its share p_i: log(1 - p_i) + log(M / (M - 1))
    size = len(d)
    left = torch.log1p(-share.clamp(max=1.0 - 1e-15)) + math.log(size / max(size - 1, 1))
    se = math.sqrt((size - 1) / size * float((left - left.mean()).square().sum()))
    return Bound(-float(total), se, effective)


def posterior_bound(kl_to_prior: float, mean_divergence: float, n: float) -> float:
    """KL(rho || w) + n E_rho D of any posterior rho at hand, never below L(n): the PAC-Bayes form."""
    _check_n(n)
    if kl_to_prior < 0.0 or mean_divergence < 0.0:
        raise DataError("a KL and a mean divergence are not negative: one of them is")
    return kl_to_prior + n * mean_divergence


def ball_bound(divergences: Tensor, n: float, *, log_w: Tensor | None = None) -> BallBound:
    """min over eps of n eps - log w(D <= eps), reached at one of the divergences."""
    _check_n(n)
    d, weights = _log_weights(divergences, log_w)
    ordered, order = d.sort()
    values = n * ordered - weights[order].logcumsumexp(0).clamp(max=0.0)
    best = int(values.argmin())
    return BallBound(float(values[best]), float(ordered[best]))


def local_dimension(divergences: Tensor, n: float, *, log_w: Tensor | None = None) -> float:
    """lambda(n) = n E_rho D with rho ~ w e^(-n D), the slope of L against log n: p/2 for p regular parameters."""
    _check_n(n)
    d, weights = _log_weights(divergences, log_w)
    share = (weights - n * d).softmax(0)
    return n * float((share * torch.where(share > 0.0, d, 0.0)).sum())


def sample_complexity(divergences: Tensor, regret: float, *, log_w: Tensor | None = None, limit: int = 10**12) -> int:
    """The smallest n with L(n)/n <= regret (nats a sample), about log(1/w)/regret for a discrete hypothesis.

    Raises DataError where the limit is reached: no hypothesis of positive weight is that close.
    """
    if not regret > 0.0:
        raise ConfigError(f"regret is in nats a sample, above 0, and is {regret}")
    d, weights = _log_weights(divergences, log_w)

    def enough(n: int) -> bool:
        return -float((weights - n * d).logsumexp(0)) <= regret * n

    high = 1
    while not enough(high):
        high *= 2
        if high > limit:
            raise DataError(f"the regret of {regret:g} nats is not reached by {limit} samples: the class is too far")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def laplace_bound(hessian: Tensor, log_prior: float, n: float) -> float:
    """(p/2) log(n / 2 pi) + log det H / 2 - log w(t_0), L(n) for large n about a regular minimum of D with Hessian H.

    Raises DataError for a singular H, where the formula is wrong and L grows more slowly.
    """
    _check_n(n)
    values = torch.linalg.eigvalsh(hessian.double())
    if not float(values[0]) > 1e-8 * float(values[-1]):
        raise DataError("the Hessian is singular or not positive: Laplace's formula fails, use exp_bound or a chain")
    return float(0.5 * len(values) * math.log(n / (2.0 * math.pi)) + 0.5 * values.log().sum()) - log_prior


def regret_online(log_truth: Tensor, log_mixture: Tensor, *, log_count: Tensor | None = None) -> Tensor:
    """n R_o = D(P_0^n || Q) from the log-probabilities of every sequence [..., S], to [...].

    log_count [S]: how many sequences each entry stands for, such as all with the same counts.
    """
    mass = log_truth if log_count is None else log_truth + log_count
    return (mass.exp() * (log_truth - log_mixture).masked_fill(log_truth == -math.inf, 0.0)).sum(-1)


def regret_batch(
    log_prefix: Tensor, log_truth_next: Tensor, log_next: Tensor, *, log_count: Tensor | None = None
) -> Tensor:
    """R_b = E over prefixes of D(P_0(. | prefix) || Q_b(. | prefix)): [..., S], [..., S, Y], [..., S, Y] to [...]."""
    mass = (log_prefix if log_count is None else log_prefix + log_count).exp()
    return (mass * regret_online(log_truth_next, log_next)).sum(-1)


def regret_supervised(log_truth: Tensor, log_prediction: Tensor, *, inputs: Tensor | None = None) -> Tensor:
    """E over inputs of D(P_0(. | x) || Q(. | x)) from [N, Y] and [..., N, Y] to [...]; inputs [N]: their weights."""
    each = regret_online(log_truth.expand_as(log_prediction), log_prediction)
    return each.mean(-1) if inputs is None else (each * inputs / inputs.sum()).sum(-1)


def averaged_predictor(log_predictions: Sequence[Tensor] | Tensor) -> Tensor:
    """log of the mean over the first axis of predictions [T, ..., Y], whose KL risk is at most R_o, whatever the class.

    Over the predictions from 0, ..., T - 1 samples, that is Cesaro's way to a bound on a batch learner.
    """
    table = log_predictions if isinstance(log_predictions, Tensor) else torch.stack(tuple(log_predictions))
    return table.logsumexp(0) - math.log(len(table))


def student_excess(log_truth: Tensor, log_ensemble: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """What one student loses of an ensemble Q [..., Y]: E_0 log(Q / student), and KL(Q || student) that trains it.

    The two differ, since the truth and not Q draws the samples; the first may be negative.
    """
    extra = (log_truth.exp() * (log_ensemble - log_student)).sum(-1)
    return extra, (log_ensemble.exp() * (log_ensemble - log_student)).sum(-1)


def capacity(log_likelihood: Tensor, *, tolerance: float = 1e-10, iterations: int = 100_000) -> tuple[float, Tensor]:
    """The minimax regret min_Q max_k D(P_k || Q) = max_w I_w of a finite class [K, X], and the prior [K] of it.

    By Blahut and Arimoto's iteration, until the largest D less their mean is below the tolerance.
    Raises DataError for rows that are not normalised.

    >>> value, prior = capacity(torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64).log())
    >>> round(value, 6), prior.tolist()
    (0.368064, [0.5, 0.5])
    """
    table = torch.as_tensor(log_likelihood).double()
    if table.ndim != 2:
        raise ShapeError(f"log_likelihood has shape [K, X], a law a row, got {tuple(table.shape)}")
    if float(table.logsumexp(1).abs().amax()) > 1e-6:
        raise DataError("every row of log_likelihood is a normalised law: subtract its logsumexp")
    log_w = torch.full((len(table),), -math.log(len(table)), dtype=torch.float64)
    for _ in range(iterations):
        divergences = regret_online(table, (log_w.unsqueeze(1) + table).logsumexp(0).expand_as(table))
        mean = float((log_w.exp() * divergences).sum())
        if float(divergences.amax()) - mean < tolerance:
            break
        log_w = (log_w + divergences).log_softmax(0)
    return mean, log_w.exp()


def merge_functions(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows [K, N] of the outputs [M, N] of M draws from a prior on functions, and their log-weights [K].

    "Uniform over parameters" is far from uniform over functions; in descending order of weight.
    """
    if outputs.ndim != 2 or not len(outputs):
        raise ShapeError(f"outputs have shape [M, N], a function a row, got {tuple(outputs.shape)}")
    functions, count = torch.unique(outputs, dim=0, return_counts=True)
    order = count.argsort(descending=True, stable=True)
    return functions[order], (count[order].double() / len(outputs)).log()


@dataclass(frozen=True, slots=True, kw_only=True)
class UniversalityReport:
    """The bounds over a grid of n, in nats for all n samples; exact: the regret where it is known.

    n_at_regret: (regret a sample, smallest n by the exponential bound) pairs.
    """

    n_grid: tuple[int, ...]
    exp_bound: tuple[float, ...]
    ball_bound: tuple[float, ...]
    eps_star: tuple[float, ...]
    dimension: tuple[float, ...]
    n_at_regret: tuple[tuple[float, int], ...]
    exact: tuple[float, ...] | None = None

    def plot(self, path: Path) -> None:
        """Bounds and regret against n, as SVG."""
        from kullback.figures import figure

        curves = {"exponential bound": self.exp_bound, "ball bound": self.ball_bound}
        if self.exact is not None:
            curves["exact"] = self.exact
        with figure(path) as axes:
            for name, values in curves.items():
                axes.plot(self.n_grid, values, label=name)
            axes.set(xlabel="n", ylabel="regret of n samples (nats)", xscale="log")
            axes.legend(frameon=False)


def universality_report(
    divergences: Tensor,
    n_grid: Sequence[int],
    *,
    log_w: Tensor | None = None,
    exact: Callable[[int], float] | None = None,
    regrets: Sequence[float] = (0.1, 0.01),
    misspecified: bool = False,
) -> UniversalityReport:
    """All bounds over n_grid; exact: n to n R_o; misspecified: against the best member, D less its minimum."""
    d = torch.as_tensor(divergences).double()
    d = d - d.amin() if misspecified else d
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        exponential = [exp_bound(d, n, log_w=log_w).value for n in n_grid]
    balls = [ball_bound(d, n, log_w=log_w) for n in n_grid]
    return UniversalityReport(
        n_grid=tuple(n_grid),
        exp_bound=tuple(exponential),
        ball_bound=tuple(ball.value for ball in balls),
        eps_star=tuple(ball.eps_star for ball in balls),
        dimension=tuple(local_dimension(d, n, log_w=log_w) for n in n_grid),
        n_at_regret=tuple((value, sample_complexity(d, value, log_w=log_w)) for value in regrets),
        exact=None if exact is None else tuple(exact(n) for n in n_grid),
    )
