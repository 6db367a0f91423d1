r"""Unlikelihood training: some tokens are made less likely, against a language model's repetitions.

Next to the likelihood of what comes, - sum over candidates c of log(1 - p(c | tokens before)) is minimised:

    tokens      on data: candidates are all tokens of the text until there, but for the one that comes
    sequences   on the model's own texts: the token itself, where it belongs to an n-gram that was there before

Shapes: logits [B, T, V] that score ids [B, T] at the same place; mask [B, T] true where a token counts; nats a token.
Source: arXiv 1908.04319.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.reduce import masked_mean

__all__ = ["repeated_tokens", "unlikelihood_loss"]


def unlikelihood_loss(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    candidates: Literal["tokens", "sequences"] = "tokens",
    n: int = 4,
) -> Tensor:
    """The mean over tokens [] of the unlikelihood of their candidates; n: of the n-grams of "sequences".

    Raises ShapeError, ConfigError, DataError for ids without a logit and for logits that are NaN.

    >>> logits = torch.zeros(1, 2, 2)  # of two tokens, each with 1/2; the first is a candidate at the second place
    >>> round(unlikelihood_loss(logits, torch.tensor([[0, 1]])).item() * 2, 4)
    0.6931
    """
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or (mask is not None and mask.shape != ids.shape):
        raise ShapeError(f"logits are [B, T, V] for ids [B, T], got {tuple(logits.shape)} and {tuple(ids.shape)}")
    if candidates not in ("tokens", "sequences"):
        raise ConfigError(f"candidates is tokens or sequences, not {candidates!r}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[-1]:
        raise DataError(f"ids lie from 0 to {logits.shape[-1] - 1}, as logits do, got {int(ids.max())}")
    held = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    probs = logits.float().softmax(-1)
    if probs.isnan().any():
        raise DataError("logits are NaN, or infinite beyond what a softmax takes")
    if candidates == "sequences":
        chosen = probs.gather(2, ids.unsqueeze(2)).squeeze(2)
        terms = torch.where(repeated_tokens(ids, held, n=n), _unlikely(chosen), 0.0)
        return masked_mean(terms, held)
    marks = torch.zeros_like(probs).scatter_(2, ids.unsqueeze(2), held.unsqueeze(2).to(probs.dtype))
    before = (marks.cumsum(1) - marks > 0).scatter_(2, ids.unsqueeze(2), False)
    terms = torch.where(before, _unlikely(probs), 0.0).sum(2)
    return masked_mean(terms, held)


def repeated_tokens(ids: Tensor, mask: Tensor, *, n: int = 4) -> Tensor:
    """Which tokens [B, T] belong to an n-gram that has been in their row before; none with a token outside the mask.

    >>> repeated_tokens(torch.tensor([[5, 6, 7, 5, 6, 8]]), torch.ones(1, 6), n=2).int()
    tensor([[0, 0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    if n < 1 or ids.shape != mask.shape or ids.ndim != 2:
        raise ConfigError(f"n-grams have a token or more, and ids and mask are [B, T], got n={n}, {tuple(ids.shape)}")
    found = torch.zeros_like(ids, dtype=torch.bool)
    if ids.shape[1] < n:
        return found
    grams, whole = ids.unfold(1, n, 1), mask.bool().unfold(1, n, 1).all(2)
    alike = (grams.unsqueeze(1) == grams.unsqueeze(2)).all(3) & whole.unsqueeze(1) & whole.unsqueeze(2)
    again = alike.tril(-1).any(2)  # [B, T - n + 1]: an equal one begins earlier
    for place in range(n):
        found[:, place : place + again.shape[1]] |= again
    return found


def _unlikely(probs: Tensor) -> Tensor:
    """-log(1 - p), finite where p is 1."""
    return -torch.log1p(-probs.clamp(max=1.0 - 1e-6))
