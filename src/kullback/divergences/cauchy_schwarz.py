"""The Cauchy-Schwarz divergence log sum p^2 + log sum q^2 - 2 log sum p q, in log space.

It is -2 log of the cosine between p and q: symmetric, unchanged when either is scaled, infinite on disjoint supports.
For densities sums are integrals; between normals and their mixtures they have closed forms. What is drawn from unknown
densities is compared in `cauchy_schwarz_samples`.

Shapes: log_p and log_q [..., V], normalised log-probabilities in nats; result [...] in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences.fused import Kernel, Terms, carry_nan, fused

__all__ = ["cauchy_schwarz", "cs_divergence", "cs_gaussian", "cs_gmm", "cs_qmi_gaussian"]


def _softmax_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """In place: exp(scores) divided by its sum, and the logarithm of that sum [...] (-inf when nothing is left)."""
    top = scores.amax(-1, keepdim=True).clamp_(min=-1e38)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    # the total is at least 1, or 0 when nothing is left: then all scores are 0 and no NaN reaches a gradient
    return scores.div_(total.clamp(min=1.0)), (total.log() + top).squeeze(-1)


def _cauchy_schwarz(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    cross, log_cross = _softmax_(log_p + log_q)
    square_p, log_square_p = _softmax_(log_p * 2.0)
    square_q, log_square_q = _softmax_(log_q * 2.0)
    value = (log_square_p - log_cross) + (log_square_q - log_cross)
    value = value.masked_fill(log_cross == -math.inf, math.inf)
    grad_p = square_p.sub_(cross) if need_p else None
    grad_q = square_q.sub_(cross) if need_q else None
    return Terms(carry_nan(value, log_p, log_q), grad_p, grad_q)


_CAUCHY_SCHWARZ = Kernel(_cauchy_schwarz, scale_p=2.0, scale_q=2.0)


def cauchy_schwarz(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Cauchy-Schwarz divergence -2 log [sum p q / sqrt(sum p^2 sum q^2)]; [..., V] to [...], in nats.

    >>> import torch
    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> cauchy_schwarz(p, q)
    tensor(0.4870)
    """
    return fused(_CAUCHY_SCHWARZ, log_p, log_q)


def cs_divergence(p: Tensor, q: Tensor, *, from_logits: bool = False) -> Tensor:
    """The divergence [...] of nonnegative weights p and q [..., V], which need not sum to 1; or of logits.

    Raises DataError for a weight that is negative or not finite and where all are 0, ShapeError for shapes that differ.

    >>> cs_divergence(torch.tensor([6.0, 3.0, 1.0]), torch.tensor([0.3, 0.3, 0.4]))
    tensor(0.4870)
    """
    if p.ndim and p.shape[-1] == 0:
        raise ShapeError("p and q have no outcomes: their last dimension is empty")
    if from_logits:
        return cauchy_schwarz(torch.log_softmax(p, -1), torch.log_softmax(q, -1))
    if not bool((p >= 0).all() and (q >= 0).all()):
        raise DataError("p and q are weights of 0 or more: for logits set from_logits=True")
    if not bool((p.amax(-1) > 0).all() and (q.amax(-1) > 0).all() and p.isfinite().all() and q.isfinite().all()):
        raise DataError("weights are finite and some of each p and q are above 0")
    return cauchy_schwarz(p.log(), q.log())


def cs_gaussian(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """The divergence [...] between normals with means [..., d] and covariances [..., d, d], in nats.

    log det(S_p + S_q) - log det(2 S_p) / 2 - log det(2 S_q) / 2 + m^T (S_p + S_q)^-1 m with m the difference of means.
    At equal covariances it is KL; elsewhere it may be below or above. Raises ShapeError, and DataError for means that
    are not finite and covariances that are not symmetric or not positive definite.

    >>> one = torch.eye(1)
    >>> cs_gaussian(torch.zeros(1), one, torch.ones(1), one), cs_gaussian(torch.zeros(1), one, torch.zeros(1), 4 * one)
    (tensor(0.5000), tensor(0.2231))
    """
    _check_normals(mean_p, cov_p)
    _check_normals(mean_q, cov_q)
    _check_space(mean_p, mean_q)
    cross = _log_product(mean_p, cov_p, mean_q, cov_q)
    return _log_product(mean_p, cov_p, mean_p, cov_p) + _log_product(mean_q, cov_q, mean_q, cov_q) - 2.0 * cross


def cs_gmm(
    weights_p: Tensor, means_p: Tensor, covs_p: Tensor, weights_q: Tensor, means_q: Tensor, covs_q: Tensor
) -> Tensor:
    """The divergence between two mixtures of normals: weights [C], means [C, d], covariances [C, d, d]; in nats.

    Weights need not sum to 1. Raises what `cs_gaussian` raises, and for weights that are negative or all 0 DataError.

    >>> one = torch.eye(1).unsqueeze(0)
    >>> p, q = (torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [1.0]])), (torch.ones(1), torch.zeros(1, 1))
    >>> cs_gmm(*p, one.expand(2, 1, 1), *q, one)
    tensor(0.1172)
    """

    def total(w: Tensor, m: Tensor, s: Tensor, v: Tensor, n: Tensor, r: Tensor) -> Tensor:
        pairs = _log_product(m.unsqueeze(1), s.unsqueeze(1), n.unsqueeze(0), r.unsqueeze(0))
        return (pairs + w.log().unsqueeze(1) + v.log().unsqueeze(0)).flatten().logsumexp(0)

    p, q = (weights_p, means_p, covs_p), (weights_q, means_q, covs_q)
    for weights, means, covs in (p, q):
        if means.ndim != 2 or weights.shape != means.shape[:1] or covs.shape[:-2] != weights.shape:
            shapes = tuple(weights.shape), tuple(means.shape), tuple(covs.shape)
            raise ShapeError(f"a mixture has weights [C], means [C, d] and covariances [C, d, d], got {shapes}")
        if not bool((weights >= 0).all() and weights.sum() > 0 and weights.isfinite().all()):
            raise DataError("the weights of a mixture are finite, 0 or more and not all 0")
        _check_normals(means, covs)
    _check_space(means_p, means_q)
    return total(*p, *p) + total(*q, *q) - 2.0 * total(*p, *q)


def cs_qmi_gaussian(correlation: Tensor | float) -> Tensor:
    """The information between two normal variables with correlation r: log(1 - r^2 / 4) - log(1 - r^2) / 2, in nats.

    It is infinite at -1 and 1. Raises ConfigError beyond them.

    >>> cs_qmi_gaussian(0.5)
    tensor(0.0793)
    """
    square = torch.as_tensor(correlation).square()
    if not bool((square <= 1.0).all()):
        raise ConfigError(f"a correlation lies between -1 and 1, got {correlation}")
    return torch.log1p(-square / 4) - 0.5 * torch.log1p(-square)


def _check_normals(mean: Tensor, cov: Tensor) -> None:
    d = mean.shape[-1] if mean.ndim else 0
    if d == 0 or cov.shape[-2:] != (d, d):
        raise ShapeError(f"means are [..., d] and covariances [..., d, d], got {tuple(mean.shape)}, {tuple(cov.shape)}")
    held = cov.detach()
    # a NaN is not close to itself either; the factor is taken from one triangle and would not notice the other
    sound = torch.allclose(held, held.mT, rtol=1e-4, atol=1e-6) and bool(mean.detach().isfinite().all())
    if not sound or bool((torch.linalg.cholesky_ex(held).info != 0).any()):
        raise DataError("means are finite, covariances symmetric and positive definite: add a little to the diagonal")


def _check_space(mean_p: Tensor, mean_q: Tensor) -> None:
    if mean_p.shape[-1] != mean_q.shape[-1]:
        raise ShapeError(f"p and q lie in one space, got {mean_p.shape[-1]} and {mean_q.shape[-1]} dimensions")


def _log_product(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """log of the integral of the product of two normal densities, which is a normal density at the difference."""
    factor = torch.linalg.cholesky(cov_p + cov_q)
    white = torch.linalg.solve_triangular(factor, (mean_p - mean_q).unsqueeze(-1), upper=False).squeeze(-1)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (white.square().sum(-1) + log_det + white.shape[-1] * math.log(2.0 * math.pi))
