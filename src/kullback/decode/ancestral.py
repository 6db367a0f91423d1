"""Ancestral sampling from a causal language model, in batch and with a key-value cache.

Shapes: N prompts of P tokens, padded on the left; G continuations of each; T new tokens at most; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["Drawn", "check_prompts", "draw_tokens"]


class Drawn(NamedTuple):
    """New tokens [N G, T], which of them count [N G, T] (up to and with the end token), and their log-probabilities."""

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor


@torch.no_grad()
def draw_tokens(
    model: Any,
    ids: Tensor,
    *,
    count: int,
    generator: torch.Generator,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    group: int = 1,
    end: Sequence[int] = (),
    pad: int = 0,
    vocabulary: int | None = None,
) -> Drawn:
    """Draw up to `count` tokens after ids [N, P] from softmax(logits / temperature), `group` times for each prompt.

    mask [N, P]: false where a prompt is padded, on its left only. A continuation stops with a token of `end`, and goes
    on as `pad`, which no mask counts; the result is as long as the longest. Each prompt is read once, whatever `group`.
    log_probs are at the temperature given, 0 where nothing counts. vocabulary: only the first so many tokens of the
    head exist. The model's mode is kept. Raises ConfigError for numbers out of range, ShapeError for a mask that does
    not fit or has padding on the right.
    """
    _check(ids, mask, count, temperature, group)
    was_training = model.training
    model.eval()
    try:
        return _draw(model, ids, mask, count, generator, temperature, group, end, pad, vocabulary)
    finally:
        model.train(was_training)


def _draw(
    model: Any, ids: Tensor, mask: Tensor | None, count: int, generator: torch.Generator, temperature: float,
    group: int, end: Sequence[int], pad: int, vocabulary: int | None,
) -> Drawn:  # fmt: skip
    logits, cache, mask = _read_prompts(model, ids, mask, group)
    ends = torch.tensor(list(end), dtype=torch.long, device=ids.device)
    rows = torch.arange(len(logits), device=ids.device)  # of the result, that the model still works on
    running = torch.ones_like(rows, dtype=torch.bool)
    tokens = ids.new_full((len(rows), count), pad)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros(tokens.shape, device=ids.device)
    for place in range(count):
        scaled = logits[:, -1, :vocabulary].float() / temperature
        step = torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator)
        log_prob = (scaled.gather(1, step).squeeze(1) - scaled.logsumexp(-1)).masked_fill(~running, 0.0)
        step = step.squeeze(1).masked_fill(~running, pad)
        tokens[rows, place], counts[rows, place], log_probs[rows, place] = step, running, log_prob
        if len(ends):
            running = running & ~torch.isin(step, ends)
            left = int(running.sum())
            if not left:
                return Drawn(tokens[:, : place + 1], counts[:, : place + 1], log_probs[:, : place + 1])
            held = next(iter(cache.values()))
            if 2 * left <= len(rows) and hasattr(held, "batch_select_indices"):
                # most have ended: the model goes on with the others alone
                keep = running.nonzero().squeeze(1)
                held.batch_select_indices(keep)
                rows, running, step = rows[keep], running[keep], step[keep]
                mask = None if mask is None else mask[keep]
        if place + 1 < count:
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits, cache = _forward(model, step.unsqueeze(1), mask, cache)
    return Drawn(tokens, counts, log_probs)


def _read_prompts(
    model: Any, ids: Tensor, mask: Tensor | None, group: int
) -> tuple[Tensor, dict[str, Any], Tensor | None]:
    """The logits after each prompt and the cache, `group` times; a mask goes on only where there is padding."""
    mask = None if mask is None or bool(mask.bool().all()) else mask.long()
    wide = None if mask is None else mask.repeat_interleave(group, 0)
    logits, cache = _forward(model, ids, mask, {})
    if group == 1:
        return logits, cache, mask
    held = next(iter(cache.values()))
    if not hasattr(held, "batch_repeat_interleave"):  # states of another kind are formed again
        logits, cache = _forward(model, ids.repeat_interleave(group, 0), wide, {})
        return logits, cache, wide
    held.batch_repeat_interleave(group)
    return logits.repeat_interleave(group, 0), cache, wide


def _forward(
    model: Any, step: Tensor, mask: Tensor | None, cache: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    given = dict(cache)
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        given |= {"attention_mask": mask, "position_ids": positions}
    out = model(input_ids=step, use_cache=True, logits_to_keep=1, **given)
    name = "cache" if "cache" in out else "past_key_values"  # before and since transformers 5.24
    return out.logits, {name: out[name]}


def check_prompts(ids: Tensor, mask: Tensor | None) -> None:
    """Raises ShapeError unless prompts are [N, P], and a mask alike that has padding on the left only."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise ShapeError(f"prompts are [N, P] with a token each at least, got {tuple(ids.shape)}")
    if mask is None:
        return
    if mask.shape != ids.shape:
        raise ShapeError(f"the mask has an entry for each token {tuple(ids.shape)}, got {tuple(mask.shape)}")
    held = mask.bool()
    if not held[:, -1].all() or (held[:, :-1] & ~held[:, 1:]).any():
        raise ShapeError("prompts are padded on the left only, so that each ends where its continuation begins")


def _check(ids: Tensor, mask: Tensor | None, count: int, temperature: float, group: int) -> None:
    check_prompts(ids, mask)
    if count < 1 or group < 1:
        raise ConfigError(f"count and group are 1 or more, got {count} and {group}")
    if not temperature > 0:
        raise ConfigError(f"temperature must be > 0, got {temperature}")
