"""The known f-divergences as FDivergence objects: six generators, of which all the others are special cases.

With t = p/q, L_b = log(b t + 1 - b), and f shifted so that f'(1) = 0:

| family        | f(t)                            | f'(t)                 | f*(y)                               |
|---------------|---------------------------------|-----------------------|-------------------------------------|
| alpha         | [t^a - a t - (1-a)] / (a (a-1)) | (t^(a-1) - 1) / (a-1) | [(1 + (a-1) y)^(a/(a-1)) - 1] / a   |
| Jeffreys      | (t - 1) log t                   | log t + 1 - 1/t       | W + 1/W + y - 2, W = omega(1 - y)   |
| general. JSD  | b t (log t - L_b) - (1-b) L_b   | b (log t - L_b)       | (1-b) log[(1-b) / (1 - b e^(y/b))]  |
| skew KL       | t (log t - L_a) - (1-a) (t - 1) | g - a (e^g - 1)       | (1-a) (w - 1), w = -W0(-a e^(y-a))/a |
| skew reverse  | (1-a) (t - 1) - L_(1-a)         | (1-a) (1 - e^-L)      | a (s - 1) - log s, s = 1 - y/(1-a)  |
| total var.    | abs(t - 1) / 2                  | sign(t - 1) / 2       | max(y, -1/2), y <= 1/2              |

(skew KL: g = log t - L_a; skew reverse: L = L_(1-a).)
alpha holds KL (1), reverse KL (0), Pearson (2, times 2), Neyman (-1, times 2) and squared Hellinger (1/2, over 4).
Shapes: elementwise in log t and y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.divergences import f as losses
from kullback.divergences.family import FDivergence
from kullback.divergences.lambert import lambert_w, wright_omega
from kullback.divergences.options import named

__all__ = ["F_NAMES", "f_divergence"]

_FAR = 1000.0  # log-ratios beyond which exp is 0 or inf in every type, so that clamping to it changes no number
_CAP = 60.0  # log-ratio beyond which b t + 1 - b equals b t in every type, for b above _SMALL
_SMALL = 1e-8  # shares of a mixture below which the generator is that of its KL limit


def _expm1_over(x: Tensor, c: float) -> Tensor:
    """(e^(c x) - 1) / c, which is x at c = 0."""
    return x if c == 0.0 else torch.expm1(c * x) / c


def _log1p_over(y: Tensor, c: float) -> Tensor:
    """log(1 + c y) / c, which is y at c = 0; its argument is cut at the end of the domain."""
    return y if c == 0.0 else torch.log1p((c * y).clamp(min=-1.0)) / c


def _alpha_f(log_t: Tensor, a: float) -> Tensor:
    """Three forms of one number, each accurate to first order at t = 1 and free of inf - inf on its own side."""
    if abs(a) < 0.05:
        low = log_t.clamp(max=_FAR)
        return (_expm1_over(low, a) - torch.expm1(low)) / (a - 1.0)
    high, low = log_t.clamp(min=0.0), log_t.clamp(max=0.0)
    above = high.exp() * (_expm1_over(high, a - 1.0) + torch.expm1(-high)) / a
    if abs(a - 1.0) < 0.05:
        low = low.clamp(min=-_FAR)
        below = (low.exp() * _expm1_over(low, a - 1.0) - torch.expm1(low)) / a
    else:
        below = (_expm1_over(low, a) - torch.expm1(low)) / (a - 1.0)
    return torch.where(log_t > 0, above, below)


def _alpha(a: float) -> FDivergence:
    def inverse(y: Tensor) -> Tensor:
        return _log1p_over(y, a - 1.0)

    edge = math.inf if a == 1.0 else 1.0 / (1.0 - a)
    domain = (-math.inf, edge) if a <= 1.0 else (edge, math.inf)

    def conjugate(y: Tensor) -> Tensor:
        # past the end of the domain inverse(y) is -inf (a > 1) or inf (a < 1); t = inf means f* = inf even where a < 0
        value = _expm1_over(inverse(y), a)
        return value if a >= 1.0 else value.masked_fill(y > edge, math.inf)

    return FDivergence(
        name=f"alpha_divergence(alpha={a:g})",
        loss=partial(losses.alpha_divergence, alpha=a),
        f=partial(_alpha_f, a=a),
        derivative=lambda log_t: _expm1_over(log_t, a - 1.0),
        conjugate=conjugate,
        domain=domain,
        second_at_one=1.0,
        derivative_inverse=inverse,
        opposite=lambda: f_divergence("alpha_divergence", alpha=1.0 - a),
    )


def _jeffreys() -> FDivergence:
    def inverse(y: Tensor) -> Tensor:
        omega = wright_omega(1.0 - y)
        return torch.where(y > 0, omega + y - 1.0, -omega.clamp(min=1e-30).log())

    def conjugate(y: Tensor) -> Tensor:
        omega = wright_omega(1.0 - y)
        return omega + 1.0 / omega + y - 2.0

    return FDivergence(
        name="jeffreys",
        loss=losses.jeffreys,
        f=lambda log_t: torch.expm1(log_t) * log_t,
        derivative=lambda log_t: log_t - torch.expm1(-log_t),
        conjugate=conjugate,
        domain=(-math.inf, math.inf),
        second_at_one=2.0,
        derivative_inverse=inverse,
        opposite=_jeffreys,
    )


def _log_mixed(log_t: Tensor, b: float) -> Tensor:
    """log(b t + 1 - b) for log t up to _CAP; there b t is all of it."""
    return torch.log1p(b * torch.expm1(log_t.clamp(max=_CAP)))


def _share(log_t: Tensor, b: float) -> Tensor:
    """log t - log(b t + 1 - b), which tends to -log b."""
    return log_t.clamp(max=_CAP) - _log_mixed(log_t, b)


def _generalized_jsd(b: float) -> FDivergence:
    def f(log_t: Tensor) -> Tensor:
        whole = _log_mixed(log_t, b) + (log_t - _CAP).clamp(0.0, _FAR)
        return b * log_t.exp() * _share(log_t.clamp(min=-_FAR), b) - (1.0 - b) * whole

    def conjugate(y: Tensor) -> Tensor:
        # past the end the argument falls below -1, where f* is inf
        return (1.0 - b) * (math.log1p(-b) - torch.log1p((-b * torch.exp(y / b)).clamp(min=-1.0)))

    def inverse(y: Tensor) -> Tensor:
        return math.log1p(-b) + y / b - torch.log1p(-b * torch.exp(y / b))

    return FDivergence(
        name=f"generalized_jsd(beta={b:g})",
        loss=partial(losses.generalized_jsd, beta=b),
        f=f,
        derivative=lambda log_t: b * _share(log_t, b),
        conjugate=conjugate,
        domain=(-math.inf, -b * math.log(b)),
        second_at_one=b * (1.0 - b),
        derivative_inverse=inverse,
        opposite=lambda: f_divergence("generalized_jsd", beta=1.0 - b),
    )


def _skew_kl(a: float) -> FDivergence:
    edge = a - 1.0 - math.log(a)

    def f(log_t: Tensor) -> Tensor:
        high, low = log_t.clamp(min=0.0), log_t.clamp(-_FAR, 0.0)
        above = high.exp() * (_share(high, a) + (1.0 - a) * torch.expm1(-high))
        below = low.exp() * _share(low, a) - (1.0 - a) * torch.expm1(low)
        return torch.where(log_t > 0, above, below)

    def weight(y: Tensor) -> Tensor:
        return -lambert_w(-a * torch.exp(y.clamp(max=edge) - a)) / a

    def inverse(y: Tensor) -> Tensor:
        w = weight(y)
        return w.log() + math.log1p(-a) - torch.log1p(-a * w)

    return FDivergence(
        name=f"skew_kl(alpha={a:g})",
        loss=partial(losses.skew_kl, alpha=a),
        f=f,
        derivative=lambda log_t: _share(log_t, a) - a * torch.expm1(_share(log_t, a)),
        conjugate=lambda y: ((1.0 - a) * (weight(y) - 1.0)).masked_fill(y > edge, math.inf),
        domain=(-math.inf, edge),
        second_at_one=(1.0 - a) ** 2,
        derivative_inverse=inverse,
        opposite=lambda: f_divergence("skew_reverse_kl", alpha=a),
    )


def _skew_reverse_kl(a: float) -> FDivergence:
    low = -((1.0 - a) ** 2) / a

    def f(log_t: Tensor) -> Tensor:
        whole = _log_mixed(log_t, 1.0 - a) + (log_t - _CAP).clamp(0.0, _FAR)
        return (1.0 - a) * torch.expm1(log_t) - whole

    def conjugate(y: Tensor) -> Tensor:
        inside = y.clamp(min=low)
        return -a * inside / (1.0 - a) - torch.log1p((-inside / (1.0 - a)).clamp(min=-1.0))

    def inverse(y: Tensor) -> Tensor:
        return torch.log1p(y / (1.0 - a) / (1.0 - a - y))

    return FDivergence(
        name=f"skew_reverse_kl(alpha={a:g})",
        loss=partial(losses.skew_reverse_kl, alpha=a),
        f=f,
        derivative=lambda log_t: -(1.0 - a) * torch.expm1(-_log_mixed(log_t, 1.0 - a)),
        conjugate=conjugate,
        domain=(low, 1.0 - a),
        second_at_one=(1.0 - a) ** 2,
        derivative_inverse=inverse,
        opposite=lambda: f_divergence("skew_kl", alpha=a),
    )


def _total_variation() -> FDivergence:
    return FDivergence(
        name="total_variation",
        loss=losses.total_variation,
        f=lambda log_t: 0.5 * torch.expm1(log_t).abs(),
        derivative=lambda log_t: 0.5 * log_t.sign(),
        conjugate=lambda y: y.clamp(min=-0.5).masked_fill(y > 0.5, math.inf),
        domain=(-0.5, 0.5),
        second_at_one=None,
        derivative_inverse=None,
        opposite=_total_variation,
    )


def _known(name: str, alpha: float, factor: float, opposite: str) -> FDivergence:
    """A member of the alpha family under its own name and with its own loss."""
    member = _alpha(alpha) if factor == 1.0 else _alpha(alpha).scaled(factor)
    return replace(member, name=name, loss=getattr(losses, name), opposite=lambda: f_divergence(opposite))


def _build_generalized_jsd(beta: float, normalised: bool = False) -> FDivergence:
    if normalised:
        name = f"generalized_jsd(beta={beta:g}, normalised)"
        loss = partial(losses.generalized_jsd, beta=beta, normalised=True)
        if min(beta, 1.0 - beta) < _SMALL:
            return f_divergence("kl" if beta < 0.5 else "reverse_kl")
        opposite = partial(f_divergence, "generalized_jsd", beta=1.0 - beta, normalised=True)
        return replace(_generalized_jsd(beta).normalised(), name=name, loss=loss, opposite=opposite)
    if min(beta, 1.0 - beta) < _SMALL:
        raise ConfigError(f"generalized_jsd at beta={beta:g} is all but zero: take normalised=True")
    return _generalized_jsd(beta)


_BUILD: dict[str, Callable[..., FDivergence]] = {
    "alpha_divergence": lambda alpha: _alpha(alpha),
    "generalized_jsd": _build_generalized_jsd,
    "jeffreys": _jeffreys,
    "jsd": lambda: replace(_generalized_jsd(0.5), name="jsd", loss=losses.jsd, opposite=partial(f_divergence, "jsd")),
    "kl": lambda: _known("kl", 1.0, 1.0, "reverse_kl"),
    "neyman": lambda: _known("neyman", -1.0, 2.0, "pearson"),
    "pearson": lambda: _known("pearson", 2.0, 2.0, "neyman"),
    "reverse_kl": lambda: _known("reverse_kl", 0.0, 1.0, "kl"),
    "skew_kl": lambda alpha: f_divergence("kl") if alpha < _SMALL else _skew_kl(alpha),
    "skew_reverse_kl": lambda alpha: f_divergence("reverse_kl") if alpha < _SMALL else _skew_reverse_kl(alpha),
    "squared_hellinger": lambda: _known("squared_hellinger", 0.5, 0.25, "squared_hellinger"),
    "total_variation": _total_variation,
}
F_NAMES: tuple[str, ...] = tuple(sorted(_BUILD))


def f_divergence(name: str, **options: Any) -> FDivergence:
    """The f-divergence called `name` ("reverse_kl" or "reverse-kl") with its options, as one object.

    Raises ConfigError for names and options that `named` refuses, and for a divergence that has no generator.

    >>> kl, log_t = f_divergence("kl"), torch.tensor([-1.0, 0.0, 1.0])
    >>> kl.f(log_t), kl.derivative(log_t)
    (tensor([0.2642, 0.0000, 1.0000]), tensor([-1.,  0.,  1.]))
    >>> f_divergence("skew-kl", alpha=0.1).second_at_one
    0.81
    >>> f_divergence("renyi", alpha=2.0)
    Traceback (most recent call last):
        ...
    kullback.core.errors.ConfigError: renyi is not an f-divergence: those are alpha_divergence, ...
    """
    named(name, **options)
    key = name.replace("-", "_")
    if key not in _BUILD:
        raise ConfigError(f"{key} is not an f-divergence: those are {', '.join(F_NAMES)}")
    return _BUILD[key](**options)
