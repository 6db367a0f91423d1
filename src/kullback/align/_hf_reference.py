"""The reference of a training of the align room: what it says of completions, token by token or in whole laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kullback.align.compared import TeacherStates, teacher_states
from kullback.align.log_probs import completion_log_probs
from kullback.core.errors import ConfigError
from kullback.decode.served import ServedScorer

__all__ = [
    "LocalReference",
    "Reference",
    "ServedReference",
    "adapter_reference",
    "check_reference",
    "check_temperatures",
    "frozen_reference",
]

# (ids [B, L + T], attention_mask [B, L + T], completion_mask [B, T]) -> log-probabilities [B, T]; with `temperature`,
# that at which it speaks, and `states`, what it says of all tokens, where it can: see LocalReference
Reference = Callable[[Tensor, Tensor, Tensor], Tensor]


class LocalReference:
    """A model at hand that is not trained; adapters: it is the policy itself with its adapters off.

    Called, it gives log-probabilities [B, T] at `temperature`; `states` what stands before its softmax.
    """

    def __init__(
        self, model: Any, *, temperature: float = 1.0, vocabulary: int | None = None, adapters: bool = False
    ) -> None:
        self.model, self.temperature, self.vocabulary, self.adapters = model, temperature, vocabulary, adapters
        if not adapters:
            model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        with self._placed(ids.device) as model:
            options: dict[str, Any] = {"temperature": self.temperature, "vocabulary": self.vocabulary}
            return completion_log_probs(model, ids, attention_mask, completion_mask, **options).log_probs

    def states(self, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> TeacherStates:
        """Its hidden states [B, T, H] and head, before any temperature; no gradient."""
        with self._placed(ids.device) as model:
            return teacher_states(model, ids, attention_mask, completion_mask, vocabulary=self.vocabulary)

    @contextmanager
    def _placed(self, device: torch.device) -> Iterator[Any]:
        if not self.adapters:
            yield self.model.to(device)
            return
        training = self.model.training
        try:
            with self.model.eval().disable_adapter():
                yield self.model
        finally:
            self.model.train(training)


def frozen_reference(model: Any, *, temperature: float = 1.0, vocabulary: int | None = None) -> LocalReference:
    """The log-probabilities of a model that is not trained."""
    return LocalReference(model, temperature=temperature, vocabulary=vocabulary)


def adapter_reference(model: Any, *, temperature: float = 1.0, vocabulary: int | None = None) -> LocalReference:
    """The log-probabilities of a model with its adapters switched off, which needs no second model."""
    return LocalReference(model, temperature=temperature, vocabulary=vocabulary, adapters=True)


class ServedReference:
    """A model behind an OpenAI-compatible server, asked for the log-probabilities of given tokens at temperature 1.

    url and options as of `decode.served.ServedScorer`; what it says of all other tokens it does not tell.
    """

    temperature = 1.0

    def __init__(self, url: str, **options: Any) -> None:
        self.scorer = ServedScorer(url, **options)

    def __call__(self, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        found = torch.zeros(completion_mask.shape)
        rows = [row[held].tolist() for row, held in zip(ids.cpu(), attention_mask.bool().cpu(), strict=True)]
        for place, (values, held) in enumerate(zip(self.scorer(rows), completion_mask.bool().cpu(), strict=True)):
            count = int(held.sum())
            if count:
                found[place, held] = torch.tensor(values[-count:])
        return found.to(ids.device)


def check_reference(method: Any, reference: Reference | None) -> None:
    """Whether the method can do with this reference. Raises ConfigError."""
    if method.needs_reference and reference is None:
        raise ConfigError(f"{type(method).__name__} looks at the reference policy: give the trainer one")
    if getattr(method, "compares", None) is not None and not hasattr(reference, "states"):
        raise ConfigError(
            f"divergence {method.divergence} compares the laws of all tokens, and this reference gives "
            "log-probabilities of drawn tokens alone: give a model at hand, or leave divergence at sampled"
        )


def check_temperatures(temperature: float, **others: Any) -> None:
    """Whether all that is compared with the policy has its temperature, where it says one. Raises ConfigError."""
    for name, other in others.items():
        its = getattr(other, "temperature", temperature)
        if its != temperature:
            raise ConfigError(
                f"the {name} has temperature {its} and the policy {temperature}, which biases every estimate of their "
                "divergence: give both the same, or set allow_temperature_mismatch"
            )
