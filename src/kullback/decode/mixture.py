r"""Sampling from the geometric mixture of two language models, token by token.

    m(x_t | x_<t) = a(x_t | x_<t)^(1 - c) b(x_t | x_<t)^c / Z(x_<t)

The mixture is called as a model is, so that `ancestral.draw_tokens` samples it with a key-value cache of both. Of one
token it is the mixture of the two laws; of several it is that of each step, which is the one that can be sampled.
Source: arXiv 2312.00886, section 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from kullback.core.errors import ConfigError

__all__ = ["GeometricMixture"]

_CACHES = ("cache", "past_key_values")  # since and before transformers 5.24


class GeometricMixture:
    """first^(1 - share) second^share as a model to sample from; the first one gives mode and device.

    second: a model, or a function that is called like one. Raises ConfigError for a share outside [0, 1].
    """

    def __init__(self, first: Any, second: Callable[..., Any], *, share: float) -> None:
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"share is the second model's exponent, in [0, 1], got {share}")
        self.first, self.second, self.share = first, second, share

    def __call__(self, **given: Any) -> _Output:
        held = next((given.pop(name) for name in _CACHES if name in given), None)
        caches = held.parts if held is not None else ({}, {})
        mine = self.first(**given, **caches[0])
        other = self.second(**given, **caches[1])
        size = min(mine.logits.shape[-1], other.logits.shape[-1])
        logits = (1.0 - self.share) * mine.logits[..., :size].float() + self.share * other.logits[..., :size].float()
        return _Output(logits, _Both((_cache_of(mine), _cache_of(other))))

    @property
    def training(self) -> bool:
        """The first model's mode; the second's is its own."""
        return bool(self.first.training)

    def eval(self) -> GeometricMixture:
        """Switch the first model."""
        self.first.eval()
        return self

    def train(self, mode: bool = True) -> GeometricMixture:
        """Switch the first model."""
        self.first.train(mode)
        return self

    def parameters(self) -> Iterator[Tensor]:
        """The first model's."""
        found: Iterator[Tensor] = self.first.parameters()
        return found


class _Output(dict[str, Any]):
    """What a model returns, as far as sampling looks at it."""

    def __init__(self, logits: Tensor, cache: _Both) -> None:
        super().__init__(cache=cache)
        self.logits = logits


class _Both:
    """The caches of two models as one; it can select rows where both can."""

    def __init__(self, parts: tuple[dict[str, Any], dict[str, Any]]) -> None:
        self.parts = parts

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in ("batch_select_indices", "batch_repeat_interleave"):
            raise AttributeError(name)
        both = [getattr(next(iter(part.values())), name) for part in self.parts]

        def call(*given: Any) -> None:
            for method in both:
                method(*given)

        return call


def _cache_of(output: Any) -> dict[str, Any]:
    name = next(name for name in _CACHES if name in output)
    return {name: output[name]}
