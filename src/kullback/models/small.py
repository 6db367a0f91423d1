"""Small Llama-style language models: fresh from a configuration, or trained on the spot and kept in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kullback.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["small_llama"]


def small_llama(
    vocabulary: int, *, hidden: int, layers: int, heads: int, length: int, generator: torch.Generator
) -> LlamaForCausalLM:
    """A causal language model with fresh weights, all drawn from `generator`; input and output embeddings are not tied.

    vocabulary: tokens; hidden: width, shared among `heads` attention heads; length: positions. The feed-forward width
    is 8/3 of hidden, rounded up to a multiple of 16; weights are normal with deviation 0.02, scales of norms 1. It has
    no end token: set `config.eos_token_id` for generation that ends. Raises ConfigError for sizes that do not fit.

    >>> model = small_llama(300, hidden=16, layers=1, heads=2, length=8, generator=torch.Generator().manual_seed(0))
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 300])
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocabulary": vocabulary, "hidden": hidden, "layers": layers, "heads": heads, "length": length}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")
    if hidden % (2 * heads):
        raise ConfigError(f"hidden must be a multiple of 2 x heads for rotary positions, got {hidden} and {heads}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 48) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    # The layers draw weights of their own as they are made: from a copy of the global state, and they are not kept.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(1.0)
    return model
