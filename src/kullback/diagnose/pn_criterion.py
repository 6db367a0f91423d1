"""The p-n criterion: whether n samples carry a model of p parameters, before or after fitting it.

Two laws told apart by the best test at equal priors are mistaken with probability P_e = (1 - TV) / 2. A fit is good
enough where that is a coin flip but for delta, P_e >= 1/2 - delta between the best model and the fit: by Pinsker's
inequality and Jensen's, on average where the risk E D(g* || g_n) is within the budget 8 delta^2. The risk comes from
`risk_expansion`; solving a/n + b/n^2 = c for n plans a sample. Source: Sheena 2021 (arXiv 2105.08947); the budget is
ours and proved, not the paper's constant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator as stream
from kullback.diagnose._parameters import Parameters, check_fitted
from kullback.diagnose.exponential_families import Family
from kullback.diagnose.risk_expansion import RiskExpansion, estimation_risk, estimation_risk_psi

__all__ = ["PNCriterion", "PNResult", "kl_budget", "max_dimension", "pn_criterion", "required_n", "tic"]

Bound = Literal["pinsker", "bh", "best"]


def kl_budget(delta: float, *, bound: Bound = "best") -> float:
    """The KL in nats within which the best test errs with probability 1/2 - delta or more, for delta in (0, 1/2).

    bound: "pinsker", 8 delta^2; "bh" (Bretagnolle and Huber), -log(1 - 4 delta^2); "best", the larger of the two, which
    is Pinsker's up to delta = 0.446. Either holds for means over fits as well.

    >>> round(kl_budget(0.1), 6), round(kl_budget(0.1, bound="bh"), 6)
    (0.08, 0.040822)
    """
    if not 0.0 < delta < 0.5:
        raise ConfigError(f"delta is how far the best test may be from a coin flip, in (0, 1/2), and is {delta}")
    pinsker, huber = 8.0 * delta**2, -math.log1p(-4.0 * delta**2)
    if bound not in ("pinsker", "bh", "best"):
        raise ConfigError(f'bound is "pinsker", "bh" or "best", not {bound!r}')
    return {"pinsker": pinsker, "bh": huber, "best": max(pinsker, huber)}[bound]


class PNResult(NamedTuple):
    """accepted: risk <= budget, both in nats; n_star: the n from which on it is; first_order: a/n; p_over_2n: the risk
    of a well-specified model to first order, as AIC has it; ratio: the second term over the first, in size, and valid
    whether it and n > p let the expansion be trusted.
    """

    accepted: bool
    risk: float
    budget: float
    n_star: int
    first_order: float
    p_over_2n: float
    ratio: float
    valid: bool


def required_n(expansion: RiskExpansion, delta: float, *, bound: Bound = "best") -> int:
    """The smallest n above p from which on the risk is within the budget of delta."""
    return expansion.required_n(kl_budget(delta, bound=bound))


def pn_criterion(expansion: RiskExpansion, n: int, delta: float, *, bound: Bound = "best") -> PNResult:
    """Accept or reject the pair (p, n) at delta.

    >>> result = pn_criterion(RiskExpansion(a=1.0, b=61 / 12, p=2), 20, 0.1)
    >>> result.accepted, round(result.risk, 4), round(result.budget, 4), result.n_star
    (True, 0.0627, 0.08, 17)
    """
    budget, risk = kl_budget(delta, bound=bound), expansion.risk(n)
    return PNResult(
        accepted=risk <= budget and n > expansion.p,
        risk=risk,
        budget=budget,
        n_star=expansion.required_n(budget),
        first_order=expansion.a / n,
        p_over_2n=0.5 * expansion.p / n,
        ratio=abs(expansion.b) / (n * expansion.a) if expansion.a > 0.0 else 0.0,
        valid=expansion.valid(n),
    )


def max_dimension(expansions: Sequence[RiskExpansion], n: int, delta: float, *, bound: Bound = "best") -> int:
    """The largest p that is accepted at n and delta among nested models; 0 where none is."""
    return max((one.p for one in expansions if pn_criterion(one, n, delta, bound=bound).accepted), default=0)


def tic(log_likelihood: Tensor, curvature: Tensor, score_covariance: Tensor) -> float:
    """Takeuchi's information criterion -2 sum l + 2 tr(J^-1 I); AIC where J = I.

    log_likelihood [n] of the samples at the fit; J [p, p] = minus the mean second derivative, I [p, p] the covariance
    of the scores. tr(J^-1 I) is 2a of the risk in an exponential family.
    """
    trace = torch.linalg.solve(curvature.double(), score_covariance.double()).trace()
    return float(-2.0 * log_likelihood.double().sum() + 2.0 * trace)


@dataclass(eq=False, repr=False)
class PNCriterion(Parameters):
    """Fit an exponential family and judge whether the sample carries it, with scikit-learn's manners.

    family: see `exponential_families`; delta and bound: see `kl_budget`; draws: of the fitted model, for cumulants;
    exact: from derivatives of Psi instead, for p up to 12; well_specified: take the family for the truth, so that a is
    p / 2; order: 1 for the first term alone; bootstrap: so many resamplings for the standard errors of a and b, 0 for
    those of the influence function. seed: of the draws.
    After fit: theta_ [p], expansion_, result_, accepted_, n_star_, tic_ (where Psi is known), n_samples_, p_.
    Raises ConfigError, ShapeError, and DataError where the fit does not exist or statistics depend on each other;
    warns where the exact risk is infinite, since a sample of this size may have no fit.

    >>> from kullback.diagnose.exponential_families import gaussian
    >>> data = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> criterion = PNCriterion(gaussian(1), exact=True, well_specified=True).fit(data)
    >>> criterion.accepted_, criterion.n_star_, round(criterion.expansion_.b, 4)
    (True, 17, 5.0833)
    """

    family: Family
    delta: float = 0.1
    bound: Bound = "best"
    draws: int = 100_000
    exact: bool = False
    well_specified: bool = False
    order: Literal[1, 2] = 2
    bootstrap: int = 0
    seed: int = field(default=0)

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the family to data [n, d] and judge the pair (p, n)."""
        budget = kl_budget(self.delta, bound=self.bound)
        if self.draws < 1000 or self.bootstrap < 0:
            raise ConfigError(f"draws is 1000 or more and bootstrap not negative, got {self.draws}, {self.bootstrap}")
        if self.exact and self.family.psi is None:
            raise ConfigError(f"exact cumulants need Psi, and that of {self.family.name} is out of reach: exact=False")
        xi = self._statistics(X)
        n, p = xi.shape
        if n <= p:
            raise DataError(f"{n} samples do not carry {p} parameters: give more, or a smaller model")
        theta = self.family.solve(xi.mean(0))
        expansion = replace(self._expansion(xi, theta), finite_from=self.family.finite_from)
        if self.family.finite_from == math.inf:
            reason = "infinite, since a sample may have no fit: the expansion holds given that it has one"
            warnings.warn(f"the exact risk of a fit of the family {self.family.name} is {reason}", stacklevel=2)
        result = pn_criterion(expansion, n, self.delta, bound=self.bound)
        self.theta_, self.expansion_, self.result_, self.budget_ = theta, expansion, result, budget
        self.accepted_, self.n_star_, self.n_samples_, self.p_ = result.accepted, result.n_star, n, p
        if self.family.psi is not None:
            self.tic_ = -2.0 * float(self._log_likelihood(X, xi).sum()) + 4.0 * expansion.a
        return self

    def _statistics(self, X: Any) -> Tensor:
        data = torch.as_tensor(X) if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float64)
        if not len(data) or not bool(torch.isfinite(data.double()).all()):
            raise DataError("X is empty or has entries that are not finite: give rows of finite numbers")
        return self.family.statistics(data)

    def _expansion(self, xi: Tensor, theta: Tensor) -> RiskExpansion:
        data = None if self.well_specified else xi
        if self.exact and self.family.psi is not None and self.order == 2:
            psi = self.family.psi
            return self._with_errors(lambda rows: estimation_risk_psi(psi, theta, rows), data)
        source = stream(self.seed, "p-n draws")
        model = self.family.statistics(self.family.sample(theta, self.draws, source))
        if data is None:
            halves = model.tensor_split(2)
            found = estimation_risk(halves[0], halves[1], population=True, order=self.order)
            return replace(found, a=0.5 * xi.shape[1])
        return self._with_errors(lambda rows: estimation_risk(rows, model, order=self.order), data)

    def _with_errors(self, expand: Any, data: Tensor | None) -> RiskExpansion:
        found: RiskExpansion = expand(data)
        if data is None or self.bootstrap == 0:
            return found
        source = stream(self.seed, "p-n bootstrap")
        chosen = [torch.randint(len(data), (len(data),), generator=source) for _ in range(self.bootstrap)]
        again = torch.tensor([(one.a, one.b) for one in (expand(data[rows]) for rows in chosen)], dtype=torch.float64)
        errors = again.std(0)
        return replace(found, se_a=float(errors[0]), se_b=float(errors[1]))

    def _log_likelihood(self, X: Any, xi: Tensor) -> Tensor:
        psi, base = self.family.psi, self.family.log_base
        if psi is None:
            raise ConfigError(f"{self.family.name} has no Psi, so its likelihood is not known: give the family one")
        value = xi @ self.theta_ - psi(self.theta_)
        return value if base is None else value + base(torch.as_tensor(X))

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log-likelihood of data [n, d]; raises ConfigError for a family without Psi."""
        check_fitted(self, "theta_")
        return float(self._log_likelihood(X, self._statistics(X)).mean())

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw data [count, d] from the fitted model."""
        check_fitted(self, "theta_")
        return self.family.sample(self.theta_, count, generator)
