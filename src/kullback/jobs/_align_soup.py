"""The average of several reference models, and whether they have one: the loss must not rise between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kullback.align.log_probs import completion_log_probs
from kullback.align.rollouts import Rollouts, join_rollouts, sample_rollouts
from kullback.align.soup import soup_state_dict
from kullback.core.rng import generator

__all__ = ["averaged"]

_PROMPTS, _TOKENS = 16, 64  # of which the loss is taken
_RISE = 0.1


def averaged(
    models: Sequence[Any], weights: Sequence[float] | None, prompts: Sequence[Sequence[int]], *, length: int, end: int,
    vocabulary: int, tell: Callable[[str], None],
) -> Any:  # fmt: skip
    """The first of the models, with the weighted average of all their weights.

    On completions that all of them draw of a few prompts, its cross-entropy should be about the average of theirs; a
    tenth above it, they lie apart in the space of weights, and `tell` hears of it. Raises as `soup_state_dict`.
    """
    mixed = soup_state_dict([model.state_dict() for model in models], weights)
    options: dict[str, Any] = {"length": min(length, _TOKENS), "end": end, "pad": end, "vocabulary": vocabulary}
    drawn = [
        sample_rollouts(model, prompts[:_PROMPTS], group=1, generator=generator(0, "soup", place), **options)
        for place, model in enumerate(models)
    ]
    texts = join_rollouts(drawn, pad=end)
    losses = [_loss(model, texts, vocabulary) for model in models]
    shares = weights or [1.0 / len(models)] * len(models)
    chord = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    models[0].load_state_dict(mixed)
    between = _loss(models[0], texts, vocabulary)
    if between > (1.0 + _RISE) * chord:
        tell(
            f"the average of the {len(models)} references has a cross-entropy of {between:.3f} nats a token on their "
            f"own completions, where they have {chord:.3f}: models that do not come from one ancestor have no average "
            "that is worth being a reference"
        )
    return models[0]


@torch.no_grad()
def _loss(model: Any, texts: Rollouts, vocabulary: int) -> float:
    """Nats a token."""
    mask = texts.completion_mask
    found = completion_log_probs(model.eval(), texts.ids, texts.attention_mask, mask, vocabulary=vocabulary)
    return -(found.log_probs.double().sum() / mask.sum()).item()
