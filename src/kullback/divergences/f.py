"""f-divergences between categorical distributions, in log space.

D_f(p||q) = sum_i q_i f(p_i / q_i) with f convex and f(1) = 0. p is the reference (teacher, target), q the model.

Shapes: log_p and log_q [..., V], normalised log-probabilities in nats; results [...], in nats where a logarithm is
taken and pure numbers otherwise, never reduced. Normalisation is not checked (it would cost a pass): use `from_logits`.
Halves are computed and returned in float32, float32 and float64 in their own type. A probability of exactly 0
(log-probability -inf) is right on either side or both: 0 log 0 = 0, and inf where the divergence is infinite.
Every function is differentiable once in both arguments, from closed forms that reuse the exponentials of the value;
`f_divergence(name).definition` is the naive twin that autograd differentiates as often as wanted.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.divergences.fused import Kernel, Terms, carry_nan, fused, log_ratio

__all__ = [
    "alpha_divergence",
    "generalized_jsd",
    "jeffreys",
    "jsd",
    "kl",
    "neyman",
    "pearson",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
]


def _kl(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    p = log_p.exp()
    ratio = log_ratio(log_p, log_q)
    infinite = ratio.amax(-1) == math.inf
    product = ratio.clamp_(-1e38, 1e38).mul_(p)
    value = product.sum(-1).masked_fill(infinite, math.inf)
    return Terms(carry_nan(value, log_p, log_q), product if need_p else None, p if need_q else None)


def _jeffreys(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    p, q = log_p.exp(), log_q.exp()
    ratio = log_ratio(log_p, log_q)
    infinite = (ratio.amin(-1) == -math.inf) | (ratio.amax(-1) == math.inf)
    ratio.clamp_(-1e38, 1e38)
    value = (p - q).mul_(ratio).sum(-1).masked_fill(infinite, math.inf)
    grad_p = (p * ratio).sub_(q) if need_p else None
    grad_q = ratio.mul_(q).add_(p) if need_q else None
    return Terms(carry_nan(value, log_p, log_q), grad_p, grad_q)


_KL = Kernel(_kl, scale_q=-1.0)
_JEFFREYS = Kernel(_jeffreys, scale_q=-1.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward Kullback-Leibler divergence KL(p||q) = sum p log(p/q); [..., V] to [...], in nats.

    Raises ShapeError when the shapes differ.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> kl(p, q)
    tensor(0.2773)
    """
    return fused(_KL, log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(q||p) = sum q log(q/p); [..., V] to [...], in nats.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> reverse_kl(p, q)
    tensor(0.3466)
    """
    return fused(_KL, log_q, log_p)


def jeffreys(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jeffreys divergence KL(p||q) + KL(q||p) = sum (p - q) log(p/q); [..., V] to [...], in nats.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> jeffreys(p, q)
    tensor(0.6238)
    """
    return fused(_JEFFREYS, log_p, log_q)


def _mixture(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool, *, beta: float, scale: float) -> Terms:
    """Generalized JSD times scale, for beta <= 1/2: with L = log(m/q) it is b sum p (log(p/q) - L) - (1-b) sum q L."""
    p, q = log_p.exp(), log_q.exp()
    ratio = log_ratio(log_p, log_q, bounded=True)
    # (p - q) / q would cost less than expm1(ratio), but where p is close to q its rounding makes the value negative
    log_m_over_q = ratio.expm1().mul_(beta).log1p_()
    by_p = ratio.sub_(log_m_over_q).mul_(p)
    by_q = log_m_over_q.mul_(q)
    value = (scale * beta) * by_p.sum(-1) - (scale * (1.0 - beta)) * by_q.sum(-1)
    return Terms(value, by_p if need_p else None, by_q if need_q else None)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2; [..., V] to [...], in nats, at most log 2.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> jsd(p, q)
    tensor(0.0737)
    """
    return generalized_jsd(log_p, log_q, beta=0.5)


def generalized_jsd(log_p: Tensor, log_q: Tensor, *, beta: float, normalised: bool = False) -> Tensor:
    """Generalized Jensen-Shannon divergence b KL(p||m) + (1-b) KL(q||m) with m = b p + (1-b) q; [..., V] to [...].

    `normalised` divides by b (1-b): then KL(p||q) is the limit at beta = 0 and KL(q||p) at beta = 1, and a sweep over
    beta has no cliff. Plain, it is at most the entropy of (b, 1-b) and vanishes at both ends.
    Raises ConfigError for beta outside [0, 1], and for 0 or 1 without `normalised`, where it is zero everywhere.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> generalized_jsd(p, q, beta=0.1)
    tensor(0.0251)
    >>> generalized_jsd(p, q, beta=1e-6, normalised=True), kl(p, q)
    (tensor(0.2773), tensor(0.2773))
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"generalized_jsd takes a beta in [0, 1] and got {beta}: the weight of p in the mixture")
    if beta in (0.0, 1.0) and not normalised:
        raise ConfigError(f"generalized_jsd at beta={beta:g} is zero everywhere: normalised=True gives its KL limit")
    if beta > 0.5:
        return generalized_jsd(log_q, log_p, beta=1.0 - beta, normalised=normalised)
    if beta < 1e-30:
        return kl(log_p, log_q)
    scale = 1.0 / (beta * (1.0 - beta)) if normalised else 1.0
    terms = partial(_mixture, beta=beta, scale=scale)
    return fused(Kernel(terms, scale_p=scale * beta, scale_q=-scale * (1.0 - beta)), log_p, log_q)


def _skew(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool, *, alpha: float) -> Terms:
    """sum p log(p/m) with m = a p + (1-a) q; the gradients need p q / m, which takes no further exponential."""
    p = log_p.exp()
    if alpha < 0.5:
        log_p_over_m = log_ratio(log_p, log_q, bounded=True)
        m_over_q = log_p_over_m.expm1().mul_(alpha)
        log_p_over_m.sub_(m_over_q.log1p())
        harmonic = torch.div(p, m_over_q.add_(1.0)) if need_p or need_q else None
    else:
        log_p_over_m = log_ratio(log_q, log_p, bounded=True).expm1_().mul_(1.0 - alpha)
        harmonic = log_q.exp().div_(log_p_over_m + 1.0) if need_p or need_q else None
        log_p_over_m.log1p_().neg_()
    product = log_p_over_m.mul_(p)
    value = carry_nan(product.sum(-1), log_p, log_q)
    grad_p = torch.add(product, harmonic, alpha=1.0 - alpha) if need_p and harmonic is not None else None
    return Terms(value, grad_p, harmonic if need_q else None)


def skew_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """Skew Kullback-Leibler divergence KL(p||m) with m = a p + (1-a) q; [..., V] to [...], in nats, at most -log a.

    alpha = 0 is KL(p||q). Raises ConfigError for alpha outside [0, 1); at 1 it would be zero everywhere.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> skew_kl(p, q, alpha=0.1)
    tensor(0.2279)
    """
    if not 0.0 <= alpha < 1.0:
        raise ConfigError(f"a skew divergence takes an alpha in [0, 1) and got {alpha}: it is the share mixed in")
    if alpha < 1e-30:
        return kl(log_p, log_q)
    return fused(Kernel(partial(_skew, alpha=alpha), scale_q=alpha - 1.0), log_p, log_q)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """Skew reverse KL(q||m) with m = a q + (1-a) p; [..., V] to [...], in nats, at most -log a.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> skew_reverse_kl(p, q, alpha=0.1)
    tensor(0.2570)
    """
    return skew_kl(log_q, log_p, alpha=alpha)


def _alpha(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool, *, alpha: float, scale: float) -> Terms:
    """With w = p^a q^(1-a): gradients (p-w)/(1-a) and (q-w)/a, which sum to the value; for a >= 1/2 away from 1."""
    p, q = log_p.exp(), log_q.exp()
    w = (log_p - log_q).mul_(alpha - 1.0).add_(log_p).exp_().nan_to_num_(nan=0.0)
    infinite = w.amax(-1) == torch.finfo(w.dtype).max
    by_p, by_q = p.sub_(w), q.sub_(w)
    value = scale * (by_p.sum(-1) / (1.0 - alpha) + by_q.sum(-1) / alpha)
    value = value.masked_fill(infinite, math.inf)
    return Terms(value, by_p if need_p else None, by_q if need_q else None)


def _alpha_near_one(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool, *, alpha: float, scale: float) -> Terms:
    """The same through expm1, smooth at alpha = 1: with A = p expm1((a-1) log(p/q))/(a-1), it is sum (A + q - p)/a."""
    p, q = log_p.exp(), log_q.exp()
    by_p = (log_p - log_q).mul_(alpha - 1.0).expm1_().div_(alpha - 1.0)
    by_p.mul_(p).nan_to_num_(nan=0.0)
    infinite = by_p.amax(-1) == torch.finfo(by_p.dtype).max
    value = (q.sub_(p).add_(by_p).sum(-1) * (scale / alpha)).masked_fill(infinite, math.inf)
    by_q = p.add_(by_p, alpha=alpha - 1.0).neg_() if need_q else None
    return Terms(value, by_p if need_p else None, by_q)


def _alpha_family(log_p: Tensor, log_q: Tensor, alpha: float, scale: float) -> Tensor:
    if alpha < 0.5:
        return _alpha_family(log_q, log_p, 1.0 - alpha, scale)
    if alpha == 1.0:
        return kl(log_p, log_q)
    if abs(alpha - 1.0) < 0.05:
        terms = partial(_alpha_near_one, alpha=alpha, scale=scale)
        return fused(Kernel(terms, scale_p=scale, scale_q=scale / alpha), log_p, log_q)
    terms = partial(_alpha, alpha=alpha, scale=scale)
    return fused(Kernel(terms, scale_p=scale / (1.0 - alpha), scale_q=scale / alpha), log_p, log_q)


def alpha_divergence(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """Alpha-divergence (Cichocki-Amari) [sum p^a q^(1-a) - 1] / (a (a-1)); [..., V] to [...].

    a -> 1 is KL(p||q), a -> 0 KL(q||p), both as smooth limits; 1/2 is four times the squared Hellinger distance, 2 half
    of Pearson's and -1 half of Neyman's chi-squared. Amari's own parameter is 1 - 2a or 2a - 1 depending on the author.
    For a > 1 it is infinite where q = 0 < p, and it overflows where p^a q^(1-a) does.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> alpha_divergence(p, q, alpha=0.5)
    tensor(0.3029)
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"alpha_divergence takes a finite alpha and got {alpha}")
    return _alpha_family(log_p, log_q, alpha, 1.0)


def pearson(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Pearson's chi-squared sum (p - q)^2 / q; [..., V] to [...].

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> pearson(p, q)
    tensor(0.5250)
    """
    return _alpha_family(log_p, log_q, 2.0, 2.0)


def neyman(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Neyman's chi-squared sum (p - q)^2 / p; [..., V] to [...].

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> neyman(p, q)
    tensor(1.0500)
    """
    return _alpha_family(log_q, log_p, 2.0, 2.0)


def _total_variation(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    p, q = log_p.exp(), log_q.exp()
    difference = p - q
    value = 0.5 * difference.abs().sum(-1)
    if not (need_p or need_q):
        return Terms(value, None, None)
    sign = difference.sign_()
    return Terms(value, p.mul_(sign) if need_p else None, q.mul_(sign) if need_q else None)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation sum |p - q| / 2; [..., V] to [...], at most 1; where p = q its gradient is the subgradient 0.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> total_variation(p, q)
    tensor(0.3000)
    """
    return fused(_TOTAL_VARIATION, log_p, log_q)


def _squared_hellinger(log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    root_p, root_q = log_p.mul(0.5).exp_(), log_q.mul(0.5).exp_()
    product = root_p * root_q if need_p or need_q else None
    value = 0.5 * root_p.sub_(root_q).square_().sum(-1)
    return Terms(value, product if need_p else None, product if need_q else None)


def squared_hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Squared Hellinger distance 1 - sum sqrt(p q) = sum (sqrt p - sqrt q)^2 / 2; [..., V] to [...], at most 1.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> squared_hellinger(p, q)
    tensor(0.0757)
    """
    return fused(_SQUARED_HELLINGER, log_p, log_q)


_TOTAL_VARIATION = Kernel(_total_variation, scale_p=0.5, scale_q=-0.5)
_SQUARED_HELLINGER = Kernel(_squared_hellinger, scale_p=-0.5, scale_q=-0.5)
