"""Text made on policy: the student's own continuations, sampled in batch from a generator.

Shapes: B batch, P prompt tokens, T tokens in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError

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
    was_training = model.training
    model.eval()
    try:
        tokens, step = prompt, prompt
        cache: dict[str, Any] = {}
        while tokens.shape[1] < length:
            out = model(input_ids=step, use_cache=True, logits_to_keep=1, **cache)
            name = "cache" if "cache" in out else "past_key_values"  # before and since transformers 5.24
            cache = {name: out[name]}
            probabilities = torch.softmax(out.logits[:, -1, :vocabulary].float() / temperature, -1)
            step = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, step], 1)
    finally:
        model.train(was_training)
    return tokens
