r"""What Cauchy-Schwarz information says of robustness and generalisation: bounds on a sample, and diagnostics.

With mean embeddings of the joint sample and of the product of its margins, a, b their squared lengths and c their
product (the cross-kernel mean), I = log(a b / c^2), and for functions f of x and g of t in the kernels' spaces

    |Cov(f(x), g(t))| <= |f| |g| sqrt(HSIC),   HSIC = a + b - 2c = (sqrt a - sqrt b)^2 + 2 sqrt(ab) (1 - exp(-I / 2)):

what compression lowers. For f = k(., u) - k(., u'), whose length is sqrt(2 - 2 exp(-|u - u'|^2 / (2 sigma_x^2))), it
limits how far a shift of u moves the kernel-smoothed prediction at u. The paper (arXiv 2404.17951) has a bound of this
form on E|h(x + delta) - h(x)|, after Wang et al. 2021 (arXiv 2106.02734), with constants that cannot be measured and up
to o(radius); the one here holds exactly, for the smoothed prediction over the sample, and is a diagnostic: it says
nothing of the prediction at a single input.

Shapes: inputs x [n, d], representations t [n, k], predictions [n] or [n, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences.cauchy_schwarz_samples import cs_qmi
from kullback.divergences.kernel_rows import log_kernel_rows

__all__ = ["generalisation_proxy", "independence_criterion", "robustness_bound", "smoothed_shift"]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def generalisation_proxy(information: float, samples: int) -> float:
    """sqrt(I(x; t) / n), to which the gap between the errors on new and on seen data is related; not a bound.

    >>> generalisation_proxy(0.04, 100)
    0.02
    """
    if samples < 1 or not math.isfinite(information):
        raise ConfigError(f"the proxy is of a number and a sample of one or more, got {information} and {samples}")
    return math.sqrt(max(information, 0.0) / samples)


def independence_criterion(x: Tensor, t: Tensor, *, sigma_x: float, sigma_t: float) -> Tensor:
    """HSIC of pairs x [n, d] and t [n, k], from their Cauchy-Schwarz information: a scalar, 0 where they say nothing.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> independence_criterion(x, x, sigma_x=1.0, sigma_t=1.0)
    tensor(0.0893, dtype=torch.float64)
    """
    x, t = x.double(), t.double()
    information = cs_qmi(x, t, sigma_x=sigma_x, sigma_t=sigma_t)
    u, v, log_n = x / sigma_x, t / sigma_t, math.log(max(len(x), 1))
    both = torch.cat([u, v], -1)
    log_a = log_kernel_rows(both, both).logsumexp(-1) - 2 * log_n
    log_b = sum((log_kernel_rows(w, w).logsumexp(-1) for w in (u, v)), torch.zeros_like(log_a)) - 4 * log_n
    root_a, root_b = (0.5 * log_a).exp(), (0.5 * log_b).exp()
    return (root_a - root_b).square() - 2.0 * root_a * root_b * torch.expm1(-0.5 * information.clamp(min=0.0))


def robustness_bound(
    x: Tensor,
    t: Tensor,
    prediction: Tensor,
    *,
    radius: float,
    sigma_x: float,
    sigma_t: float,
    ridges: Sequence[float] = RIDGES,
) -> Tensor:
    """A scalar that `smoothed_shift` never exceeds, whichever u and whichever u' within `radius` of it.

    sqrt(2 - 2 exp(-radius^2 / (2 sigma_x^2))) (|g| sqrt(HSIC) + e): g is the ridge regression of the centred prediction
    on t in the space of its kernel, |g| its length and e the root mean square of what it leaves, at the best of
    `ridges`. To first order it is proportional to radius / sigma_x; it falls with I(x; t). In the prediction's units.
    Raises ShapeError, DataError for values that are not finite, and ConfigError for numbers out of range.

    >>> x = torch.linspace(-1, 1, 9).unsqueeze(1)
    >>> robustness_bound(x, x, x, radius=0.0, sigma_x=1.0, sigma_t=1.0)
    tensor(0., dtype=torch.float64)
    """
    if not 0.0 <= radius < math.inf or not ridges or not min(ridges) > 0.0:
        raise ConfigError(f"radius is a length and ridges are positive, got {radius} and {tuple(ridges)}")
    centred = _centred(x, prediction)
    if t.ndim != 2 or len(t) != len(x):
        raise ShapeError(f"t has a row for each of the {len(x)} inputs, [n, k], got {tuple(t.shape)}")
    dependence = independence_criterion(x.detach(), t.detach(), sigma_x=sigma_x, sigma_t=sigma_t).clamp(min=0.0).sqrt()
    v, n = t.detach().double() / sigma_t, len(x)
    gram = _kernels(v, v)
    values, vectors = torch.linalg.eigh(gram)
    values, along = values.clamp(min=0.0), vectors.mT @ centred
    found = []
    for ridge in ridges:
        weights = along / (values + n * ridge)
        length = (values * weights.square()).sum().sqrt()
        left = centred - vectors @ (values * weights)
        found.append(length * dependence + (left - left.mean()).square().mean().sqrt())
    return torch.stack(found).min() * math.sqrt(-2.0 * math.expm1(-0.5 * (radius / sigma_x) ** 2))


def smoothed_shift(x: Tensor, prediction: Tensor, at: Tensor, moved: Tensor, *, sigma_x: float) -> Tensor:
    """|mean_i (k(x_i, u) - k(x_i, u')) (h_i - mean h)| for each u in `at` [m, d] and u' in `moved` [m, d]: [m].

    What an attack moves of a prediction smoothed by the kernel over the sample x [n, d], h its predictions. Raises
    ShapeError, DataError for values that are not finite, ConfigError for a bandwidth that is no length.
    """
    centred = _centred(x, prediction)
    if not 0.0 < sigma_x < math.inf:
        raise ConfigError(f"a bandwidth is a finite length above 0, got {sigma_x}")
    if at.shape != moved.shape or at.shape[-1:] != x.shape[-1:]:
        raise ShapeError(f"at and moved are points [m, {x.shape[-1]}], got {tuple(at.shape)} and {tuple(moved.shape)}")
    if not bool((at.detach() - moved.detach()).isfinite().all()):
        raise DataError("at and moved hold NaN or infinite values")
    u = x.detach().double() / sigma_x
    one, other = (_kernels(points.detach().double() / sigma_x, u) for points in (at, moved))
    return ((one - other) @ centred / len(x)).abs()


def _kernels(u: Tensor, v: Tensor) -> Tensor:
    return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square().mul_(-0.5).exp_()


def _centred(x: Tensor, prediction: Tensor) -> Tensor:
    flat = prediction.detach().double().reshape(-1)
    if x.ndim != 2 or len(x) == 0 or len(flat) != len(x):
        raise ShapeError(f"x is [n, d] with one prediction a row, got {tuple(x.shape)} and {tuple(prediction.shape)}")
    if not bool(flat.isfinite().all() and x.detach().isfinite().all()):
        raise DataError("inputs and predictions are finite, and these hold NaN or infinite values")
    return flat - flat.mean()
