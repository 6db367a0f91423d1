r"""Cauchy-Schwarz divergences from samples, with Gaussian kernels k(u) = exp(-|u|^2 / (2 sigma^2)).

Two samples x ~ p and z ~ q:         D = log mean k(x, x') + log mean k(z, z') - 2 log mean k(x, z),
two conditionals of y and yhat on x: D = log S(y, y) + log S(yhat, yhat) - 2 log S(yhat, y),
                                     S(a, b) = sum_ji K_ji k(a_j, b_i) / d_j^2,    d_j = sum_i K_ji,
information between x and t:         I = log mean K Q + log (mean K mean Q) - 2 log mean_i (mean_j K_ij) (mean_j Q_ij),

with K the kernels of x and Q those of t. All three compare densities smoothed by the kernel: a bandwidth sigma stands
for densities convolved with a normal of variance sigma^2 / 2. Sums are taken in log space, so none underflows.
Source: arXiv 2404.17951; Principe, Information Theoretic Learning, 2010.

Shapes: samples [..., n, d], or [n] for [n, 1]; results [...], in nats unless log_base is "2".
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences.kernel_rows import log_kernel_rows

__all__ = [
    "conditional_cs", "cs_divergence_features", "cs_divergence_samples", "cs_qmi", "cs_qmi_normalized",
    "fourier_features", "median_bandwidth",
]  # fmt: skip

LogBase = Literal["e", "2"]
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0  # whose multiples modulo 1 are spread evenly, whatever their number


def cs_divergence_samples(
    x: Tensor,
    z: Tensor,
    *,
    sigma: float | Tensor,
    unbiased_diag: bool = False,
    log_base: LogBase = "e",
    chunk: int | None = None,
) -> Tensor:
    """The divergence [...] between what x [..., M, d] and z [..., N, d] were drawn from, at bandwidth sigma.

    unbiased_diag: means over different points alone, whose expectations have no kernel of a point with itself; the
    value can then be negative, as it never is otherwise. log_base: "e" for nats, "2" for bits. chunk: rows held at
    once, chosen by default so that memory stays bounded. sigma: a number, or a tensor that broadcasts against the
    points, as one for each column does. Raises ShapeError, DataError for no points and for values that are not finite,
    ConfigError.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> cs_divergence_samples(x, x + 1.0, sigma=1.0), cs_divergence_samples(x, x.flip(0), sigma=1.0).abs() < 1e-6
    (tensor(0.3813), tensor(True))
    """
    x, z = _samples(x, "x"), _samples(z, "z")
    if x.shape[-1] != z.shape[-1] or x.shape[:-2] != z.shape[:-2]:
        raise ShapeError(f"x {tuple(x.shape)} and z {tuple(z.shape)} are points of one space: give the same dimensions")
    if unbiased_diag and min(x.shape[-2], z.shape[-2]) < 2:
        raise DataError("means over different points need two of them: give more, or leave unbiased_diag out")
    u, v = _scaled(x, sigma), _scaled(z, sigma)

    def mean(one: Tensor, other: Tensor, own: bool) -> Tensor:
        left_out = own and unbiased_diag
        rows = log_kernel_rows(one, other, exclude_self=left_out, chunk=chunk)
        return rows.logsumexp(-1) - math.log(one.shape[-2] * (other.shape[-2] - left_out))

    return ((mean(u, u, True) + mean(v, v, True) - 2.0 * mean(u, v, False)) / _unit(log_base)).to(u.dtype)


def conditional_cs(
    x: Tensor,
    y: Tensor,
    yhat: Tensor,
    *,
    sigma_x: float | Tensor,
    sigma_y: float | Tensor,
    symmetric: bool = True,
    log_base: LogBase = "e",
    chunk: int | None = None,
) -> Tensor:
    """The divergence [...] between p(y|x) and q(yhat|x) from triples x [..., n, dx], y and yhat [..., n, dy].

    symmetric: divide by d_j d_i in the place of d_j^2, which is symmetric in y and yhat and never negative (equal only
    for proportional weighted means); False is the paper's. Other options as in `cs_divergence_samples`. y and yhat may
    be [n], which then stand for [n, 1]. Raises ShapeError, DataError, ConfigError.

    >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 1.0, 4.0])
    >>> conditional_cs(x, y, torch.tensor([0.0, 2.0, 4.0]), sigma_x=1.0, sigma_y=1.0)
    tensor(0.1640)
    """
    x, y, yhat = _samples(x, "x"), _samples(y, "y"), _samples(yhat, "yhat")
    if y.shape != yhat.shape or x.shape[:-1] != y.shape[:-1]:
        raise ShapeError(
            f"x, y and yhat have a row a sample, and y and yhat as many columns, got {tuple(x.shape)}, "
            f"{tuple(y.shape)} and {tuple(yhat.shape)}"
        )
    at, own, other = _scaled(x, sigma_x), _scaled(y, sigma_y), _scaled(yhat, sigma_y)
    log_d = log_kernel_rows(at, at, chunk=chunk)
    log_d = log_d - log_d.detach().mean(-1, keepdim=True)  # a factor on all weights changes nothing
    left, right = (-log_d, -log_d.to(at.dtype)) if symmetric else (-2.0 * log_d, None)

    def total(one: Tensor, two: Tensor) -> Tensor:
        joined = torch.cat([at, one], -1), torch.cat([at, two], -1)
        return (log_kernel_rows(*joined, offset=right, chunk=chunk) + left).logsumexp(-1)

    return ((total(own, own) + total(other, other) - 2.0 * total(other, own)) / _unit(log_base)).to(at.dtype)


def cs_qmi(
    x: Tensor,
    t: Tensor,
    *,
    sigma_x: float | Tensor,
    sigma_t: float | Tensor,
    gram: Tensor | None = None,
    log_base: LogBase = "e",
    chunk: int | None = None,
) -> Tensor:
    """The quadratic mutual information [...] of pairs x [..., n, dx] and t [..., n, dt]: never negative.

    It is the divergence of the joint density from the product of its margins, both smoothed; values of other bandwidths
    or dimensions do not compare. A single pair says nothing: 0. gram [..., n, n]: kernels of x taken beforehand, for
    data with a kernel of their own; symmetric, 0 or more, each row with a sum above 0. Other options as in
    `cs_divergence_samples`. Raises ShapeError, DataError, ConfigError.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> cs_qmi(x, x, sigma_x=1.0, sigma_t=1.0), cs_qmi(x, 0.0 * x, sigma_x=1.0, sigma_t=1.0).abs() < 1e-6
    (tensor(0.1961), tensor(True))
    """
    x, t = _samples(x, "x"), _samples(t, "t")
    if x.shape[:-1] != t.shape[:-1]:
        raise ShapeError(f"x and t are pairs, a row each, got {tuple(x.shape)} and {tuple(t.shape)}")
    v = _scaled(t, sigma_t)
    n, log_n = t.shape[-2], math.log(t.shape[-2])
    rows_t = log_kernel_rows(v, v, chunk=chunk)
    if gram is None:
        u = _scaled(x, sigma_x)
        rows_x, both = log_kernel_rows(u, u, chunk=chunk), torch.cat([u, v], -1)
        joint = log_kernel_rows(both, both, chunk=chunk).logsumexp(-1)
    else:
        log_gram = _checked_gram(gram, (*t.shape[:-1], n)).log()
        rows_x = log_gram.logsumexp(-1).to(rows_t.dtype)
        joint = (log_gram - 0.5 * (v.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)).flatten(-2).logsumexp(-1)
    apart = rows_x.logsumexp(-1) + rows_t.logsumexp(-1)
    across = (rows_x + rows_t).logsumexp(-1)
    return ((joint - 2 * log_n + apart - 4 * log_n - 2.0 * (across - 3 * log_n)) / _unit(log_base)).to(v.dtype)


def cs_qmi_normalized(
    x: Tensor, t: Tensor, *, sigma_x: float | Tensor, sigma_t: float | Tensor, chunk: int | None = None
) -> Tensor:
    """I(x, t) / sqrt(I(x, x) I(t, t)) [...] of `cs_qmi`: 1 for t = x, 0 where either is constant, and in between.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> cs_qmi_normalized(x, 3.0 * x, sigma_x=1.0, sigma_t=3.0)
    tensor(1.)
    """
    x, t = _samples(x, "x"), _samples(t, "t")  # so that what is wrong with t is said of t
    own = [cs_qmi(a, a, sigma_x=sigma, sigma_t=sigma, chunk=chunk) for a, sigma in ((x, sigma_x), (t, sigma_t))]
    smallest = 64 * torch.finfo(own[0].dtype).eps  # below it there is only rounding
    scale = own[0].clamp(min=smallest) * own[1].clamp(min=smallest)
    return cs_qmi(x, t, sigma_x=sigma_x, sigma_t=sigma_t, chunk=chunk) / scale.sqrt()


def median_bandwidth(x: Tensor, scale: float = 1.0, max_pairs: int = 10_000) -> float:
    """`scale` times the median distance between different rows of x [n, d]: a length, not its square.

    Of more than max_pairs pairs it takes as many, evenly spread. The authors' code takes ten times the median
    square for a length, which depends on units and is left out. Raises DataError for fewer than two rows and where
    more than half of the pairs coincide, ConfigError for numbers out of range.

    >>> median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]]))
    2.0
    """
    x = _samples(x.detach(), "x")
    n = x.shape[-2]
    if x.ndim != 2 or n < 2:
        raise DataError(f"a median distance needs rows [n, d] with n >= 2, got {tuple(x.shape)}")
    if not 0.0 < scale < math.inf or max_pairs < 1:
        raise ConfigError(f"scale and max_pairs must be positive and finite, got {scale} and {max_pairs}")
    pairs = n * (n - 1) // 2
    if pairs <= max_pairs:
        first, second = torch.triu_indices(n, n, 1, device=x.device)
    else:
        places = torch.arange(max_pairs, device=x.device, dtype=torch.float64) * _GOLDEN % 1.0 * n * n
        first, second = places.long() // n, places.long() % n
        first, second = first[first != second], second[first != second]
    middle = (x[first] - x[second]).square().sum(-1).sqrt().median().item()
    if not middle > 0.0:
        raise DataError("more than half of the pairs coincide and their median distance is 0: give a bandwidth")
    return scale * middle


def fourier_features(x: Tensor, frequencies: Tensor, *, sigma: float) -> Tensor:
    """cos and sin features [..., n, 2 D] of x [..., n, d] with products near k(x, x'), from normal draws [D, d].

    Raises ShapeError, DataError for values that are not finite, ConfigError for a bandwidth that is no length.
    """
    x = _samples(x, "x")
    if frequencies.ndim != 2 or len(frequencies) == 0 or frequencies.shape[1] != x.shape[-1]:
        raise ShapeError(f"frequencies are draws [D, {x.shape[-1]}], at least one, got {tuple(frequencies.shape)}")
    angles = _scaled(x, sigma) @ frequencies.to(x.dtype).mT
    return torch.cat([angles.cos(), angles.sin()], -1) / math.sqrt(len(frequencies))


def cs_divergence_features(mean_x: Tensor, mean_z: Tensor, *, log_base: LogBase = "e") -> Tensor:
    """The divergence [...] between mean features [..., F]: -2 log of their cosine, for streams that keep only means.

    Raises ShapeError, and DataError where the product of the means is not positive: too few features for so little
    overlap.
    """
    if mean_x.shape != mean_z.shape or mean_x.ndim == 0:
        raise ShapeError(f"both means have shape [..., F], got {tuple(mean_x.shape)} and {tuple(mean_z.shape)}")
    _check_finite(mean_x, "mean_x")
    _check_finite(mean_z, "mean_z")
    product = (mean_x * mean_z).sum(-1)
    if not bool((product > 0.0).all()):
        raise DataError("the mean features have no positive product: the samples are far apart for so few features")
    squares = mean_x.square().sum(-1).log() + mean_z.square().sum(-1).log()
    return (squares - 2.0 * product.log()) / _unit(log_base)


# --- inputs


def _samples(x: Tensor, name: str) -> Tensor:
    """x as [..., n, d] in float32 at least."""
    x = x.unsqueeze(-1) if x.ndim == 1 else x
    if x.ndim < 2 or x.shape[-1] == 0 or x.is_complex():
        raise ShapeError(f"{name} has shape [n, d], a row of real numbers a sample, got {x.dtype} {tuple(x.shape)}")
    if x.shape[-2] == 0:
        raise DataError(f"{name} has no samples: give at least one")
    _check_finite(x, name)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_finite(x: Tensor, name: str) -> None:
    if not bool(x.detach().isfinite().all()):
        raise DataError(f"{name} holds NaN or infinite values: drop such samples, or see where a training diverged")


def _scaled(x: Tensor, sigma: float | Tensor) -> Tensor:
    if isinstance(sigma, str) or sigma is None:
        raise ConfigError(f"a bandwidth is a number, or a tensor of them, got {sigma!r}")
    width = torch.as_tensor(sigma)
    if not bool(((width > 0.0) & width.isfinite()).all()):
        raise ConfigError(f"a bandwidth is a finite length above 0, got {sigma}")
    pairs = zip(reversed(width.shape), reversed(x.shape), strict=False)
    if width.ndim > x.ndim or any(own not in (1, wanted) for own, wanted in pairs):
        raise ShapeError(f"bandwidths broadcast against points {tuple(x.shape)}, got {tuple(width.shape)}")
    return x / sigma


def _checked_gram(gram: Tensor, shape: tuple[int, ...]) -> Tensor:
    if gram.shape != shape:
        raise ShapeError(f"gram has shape [..., n, n], kernels of the {shape[-1]} samples, got {tuple(gram.shape)}")
    held = gram.detach()
    even = torch.allclose(held, held.mT, rtol=1e-4, atol=1e-6)  # a NaN is not close to itself either
    if not (even and bool((held >= 0.0).all()) and bool((held.sum(-1) > 0.0).all()) and bool(held.isfinite().all())):
        raise DataError("gram holds kernels: symmetric, 0 or more, and each row with a finite sum above 0")
    return gram


def _unit(log_base: str) -> float:
    if log_base not in ("e", "2"):
        raise ConfigError(f'log_base is "e" for nats or "2" for bits, not {log_base!r}')
    return 1.0 if log_base == "e" else math.log(2.0)
