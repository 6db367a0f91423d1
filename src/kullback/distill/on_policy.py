"""Text made on policy: the student's own continuations, sampled in batch from a generator.

Shapes: B batch, P prompt tokens, T tokens in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.decode.ancestral import draw_tokens

__all__ = ["sample_continuations"]


@torch.no_grad()
def sample_continuations(
    model: Any,
    prompt: Tensor,
    *,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> Tensor:
    """Continue prompt [B, P] to [B, T=length] by ancestral sampling from softmax(logits / temperature).

    Sampling goes on past end-of-text tokens, as packed training text does. `vocabulary` limits the choice to the first
    so many tokens, where the head is padded. Raises ConfigError when there is nothing to add or temperature is not > 0.
    """
    if length <= prompt.shape[1] or prompt.shape[1] < 1:
        raise ConfigError(f"length must be over the prompt's {prompt.shape[1]} >= 1 tokens, got {length}")
    if not temperature > 0:
        raise ConfigError(f"temperature must be > 0, got {temperature}")
    count = length - prompt.shape[1]
    drawn = draw_tokens(
        model, prompt, count=count, generator=generator, temperature=temperature, vocabulary=vocabulary
    )
    return torch.cat([prompt, drawn.tokens], 1)
