"""Divergences by name, and wrappers that turn one divergence into another by closure.

Shapes: log_p and log_q [..., V] to [...], as everywhere in this room; the reference p comes first.
"""

from __future__ import annotations

import inspect
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
from kullback.divergences.f import kl  # noqa: F401
from kullback.divergences.renyi import renyi

__all__ = ["NAMES", "dual", "from_logits", "named"]

_BY_NAME: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(f, name) for name in f.__all__},
    "cauchy_schwarz": cauchy_schwarz,
    "renyi": renyi,
}
NAMES: tuple[str, ...] = tuple(sorted(_BY_NAME))


def named(name: str, **options: Any) -> Divergence:
    """The divergence called `name` ("reverse_kl" or "reverse-kl"), with its options bound.

    Raises ConfigError for an unknown name, an option that the divergence does not take, or one that it needs.

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
    return partial(function, **options) if options else function


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
