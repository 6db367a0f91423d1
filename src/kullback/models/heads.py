"""A language model's head, seen from outside: whether it is linear, and how another computation takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["has_plain_head", "head_inputs", "replaced_head"]

# Options of a model's configuration that change the logits after the head; with one of them the logits are taken whole.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def has_plain_head(model: Any) -> bool:
    """Whether the model's logits are exactly a linear map of its last hidden states."""
    config = model.config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD)
    return type(model.get_output_embeddings()) is nn.Linear and not scaled


@contextmanager
def replaced_head(model: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the model's head computes `forward(hidden)` in place of the logits.

    The replacement runs inside the model's own forward pass, where DDP and FSDP have the head's weights at hand.
    """
    head = model.get_output_embeddings()
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """While open, a list into which goes the hidden state that each call of the model's head is given."""
    heard: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, given: heard.append(given[0]))
    try:
        yield heard
    finally:
        hook.remove()
