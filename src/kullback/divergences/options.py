"""Divergences by name, and wrappers that turn one divergence into another by closure.

Shapes: log_p and log_q [..., V] to [...], as everywhere in this room; the reference p comes first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.core.types import Divergence
from kullback.divergences import f
from kullback.divergences.cauchy_schwarz import cauchy_schwarz
from kullback.divergences.f import generalized_jsd, jsd, kl
from kullback.divergences.fused import check_pair
from kullback.divergences.renyi import renyi

__all__ = ["NAMES", "dual", "from_logits", "log_mixture", "mixture", "named"]

_BY_NAME: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(f, name) for name in f.__all__},
    "cauchy_schwarz": cauchy_schwarz,
    "renyi": renyi,
}
NAMES: tuple[str, ...] = tuple(sorted(_BY_NAME))


def named(name: str, **options: Any) -> Divergence:
    """The divergence called `name` ("reverse_kl" or "reverse-kl"), with its options bound.

    Raises ConfigError for an unknown name, an option that the divergence does not take, one that it needs, or a value
    out of range.

    >>> named("skew-kl", alpha=0.1)(torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log())
    tensor(0.2279)
    >>> named("reverse-lk")
    Traceback (most recent call last):
        ...
    kullback.core.errors.ConfigError: no divergence is called 'reverse-lk': did you mean 'reverse_kl'?
    """
    key = name.replace("-", "_")
    if key not in _BY_NAME:
        near = get_close_matches(key, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(NAMES)}"
        raise ConfigError(f"no divergence is called {name!r}: {hint}")
    function = _BY_NAME[key]
    takes = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in takes:
            raise ConfigError(
                f"{key} takes no option {option!r}: it takes {', '.join(takes) if takes else 'none at all'}"
            )
    missing = [option for option, p in takes.items() if p.default is p.empty and option not in options]
    if missing:
        raise ConfigError(f"{key} needs {' and '.join(missing)}: named({key!r}, {missing[0]}=...)")
    if not options:
        return function
    bound = partial(function, **options)
    bound(torch.zeros(1), torch.zeros(1))  # a value out of range is said here and not at the first step
    return bound


def from_logits(div: Divergence, target: Tensor, model: Tensor, temperature: float = 1.0) -> Tensor:
    """div(softmax(target / T), softmax(model / T)) from logits [..., V] to [...], in at least float32.

    The factor T^2 that keeps gradients at one scale over temperatures is not applied: multiply by it where wanted.
    Raises ConfigError for a temperature that is not positive.

    >>> target, model = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([0.5, 0.2, 0.1, 0.0])
    >>> from_logits(kl, target, model)
    tensor(0.2789)
    """
    if not temperature > 0.0:
        raise ConfigError(f"temperature must be positive and is {temperature}")
    return div(_log_softmax(target, temperature), _log_softmax(model, temperature))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def dual(div: Divergence) -> Divergence:
    """The divergence with its arguments exchanged: dual(div)(p, q) = div(q, p).

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> dual(kl)(p, q), kl(q, p)
    (tensor(0.3466), tensor(0.3466))
    """

    def exchanged(log_p: Tensor, log_q: Tensor, /) -> Tensor:
        return div(log_q, log_p)

    return exchanged


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q), elementwise and differentiable, -inf where both are; beta strictly inside (0, 1).

    >>> log_mixture(torch.tensor([-torch.inf, -1e4]), torch.tensor([-torch.inf, -1e4]), 0.3)
    tensor([   -inf, -10000.])
    """
    if not 0.0 < beta < 1.0:
        raise ConfigError(f"a mixture takes a beta in (0, 1) and got {beta}: at the ends it is one of its parts")
    from_p, from_q = log_p + math.log(beta), log_q + math.log1p(-beta)
    nothing = (from_p == -math.inf) & (from_q == -math.inf)
    mixed = torch.logaddexp(from_p.masked_fill(nothing, 0.0), from_q.masked_fill(nothing, 0.0))
    return mixed.masked_fill(nothing, -math.inf)


def mixture(div: Divergence, beta: float, normalised: bool = True) -> Divergence:
    """beta div(p, m) + (1 - beta) div(q, m) with m = beta p + (1 - beta) q, divided by beta (1 - beta).

    Normalised, its limits are div(p, q) at beta = 0 and div(q, p) at beta = 1. `kl` gives the generalized JSD; `jsd`,
    which is that mixture at 1/2, gives the same with its weight moved to beta. Those two are accurate at any beta; any
    other divergence is evaluated at m, which is resolved to the rounding of log m: keep beta above 0.01.
    Raises ConfigError for beta outside [0, 1], and at 0 or 1 where it is not normalised and so zero.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> mixture(jsd, 1e-6)(p, q), mixture(jsd, 0.5, normalised=False)(p, q)
    (tensor(0.2773), tensor(0.0737))
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"mixture takes a beta in [0, 1] and got {beta}: the weight of p in the mixture")
    if beta in (0.0, 1.0) and not normalised:
        raise ConfigError(f"mixture at beta={beta:g} is zero everywhere: normalised=True gives its limit")
    if div in (kl, jsd):
        return partial(generalized_jsd, beta=beta, normalised=normalised)
    if beta in (0.0, 1.0):
        return div if beta == 0.0 else dual(div)
    scale = 1.0 / (beta * (1.0 - beta)) if normalised else 1.0

    def mixed(log_p: Tensor, log_q: Tensor, /) -> Tensor:
        log_p, log_q = check_pair(log_p, log_q)
        log_m = log_mixture(log_p, log_q, beta)
        return scale * (beta * div(log_p, log_m) + (1.0 - beta) * div(log_q, log_m))

    return mixed
