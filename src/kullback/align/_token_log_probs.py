"""Log-probabilities of given tokens from hidden states, with few passes over the logits beside the matrix products.

Forward puts e = exp(z - max) in the place of a chunk's logits z; its sum s gives the partition function. With g the
gradient by the log-probabilities and f = -g / s, the gradients are then products alone,

    by hidden   f (e W) + g W[token]        by weight   e^T (f h), plus g h at the row of each token,

in which f stands on [N] and never on [N, V]. The last chunk's e is kept for backward, which forms the others again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError

__all__ = ["token_log_probs"]

_ENTRIES_CPU, _ENTRIES_ACCELERATOR = 1 << 22, 1 << 26  # logits held at once, a chunk: less than the last cache holds
_FEWEST_ROWS = 128  # with fewer, reading the weights would take longer than the product
_BLOCK = 1 << 19  # logits that a thread goes over several times while they are in its cache


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Log-probabilities [N] of ids [N] under softmax((hidden W^T + bias) / temperature), float32 at least.

    hidden [N, H], weight [V, H], bias [V]; chunk: rows at once. Differentiable once in hidden, weight and bias.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is a number of rows, at least 1, got {chunk}")
    found: Tensor = _TokenLogProbs.apply(hidden, weight, bias, ids, temperature, chunk)  # type: ignore[no-untyped-call]
    return found


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float,
        chunk: int | None,
    ) -> Tensor:  # fmt: skip
        head = _Head(hidden, weight, bias, ids, temperature, chunk)
        log_probs, sums = head.room.new_zeros(2, len(ids), dtype=head.wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                head.exponentials(rows, sums, log_probs)
        ctx.save_for_backward(hidden, weight, bias, sums)
        ctx.head = head if any(ctx.needs_input_grad) else None
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, sums = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            found = ctx.head.gradients(grad, sums, ctx.needs_input_grad[:3])
        parts = zip(found, (hidden, weight, bias), strict=True)
        return *(None if part is None else part.to(tensor.dtype) for part, tensor in parts), None, None, None


class _Head:
    """A head on N rows, in one type: that of autocast where it is on, else the wider of both; and room for a chunk."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, chunk: int | None
    ) -> None:
        device, kind = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(device) and kind != torch.float64:  # which autocast leaves alone
            kind = torch.get_autocast_dtype(device)
        self.hidden, self.weight = hidden.detach().to(kind).contiguous(), weight.detach().to(kind)
        self.bias = None if bias is None else bias.detach().to(kind)
        self.ids, self.temperature = ids, temperature
        self.wide = torch.promote_types(kind, torch.float32)
        vocabulary = max(len(weight), 1)
        entries = _ENTRIES_CPU if device == "cpu" else _ENTRIES_ACCELERATOR
        self.step = chunk or max(entries // vocabulary, _FEWEST_ROWS)
        self.block = max(_BLOCK * torch.get_num_threads() // vocabulary, 1) if device == "cpu" else self.step
        self.room = self.hidden.new_empty(min(self.step, len(ids)), len(weight))
        self.held: slice | None = None  # the rows that are in the room

    def chunks(self) -> Iterator[slice]:
        return (slice(at, min(at + self.step, len(self.ids))) for at in range(0, len(self.ids), self.step))

    def exponentials(self, rows: slice, sums: Tensor, log_probs: Tensor | None = None) -> Tensor:
        """exp(z - max) of these rows in the room, of halves over its sum; with log_probs, these and the sums are set.
        """
        room, hidden = self.room[: rows.stop - rows.start], self.hidden[rows]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=room)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=room)
        for start in range(0, len(room), self.block):
            piece = room[start : start + self.block]
            place = slice(rows.start + start, rows.start + start + len(piece))
            z = piece.to(self.wide)
            z = z.div_(self.temperature) if self.temperature != 1.0 else z
            top = z.amax(1, keepdim=True)
            own = z.gather(1, self.ids[place].unsqueeze(1)) if log_probs is not None else None
            e = z.sub_(top).exp_()
            if log_probs is not None and own is not None:
                sums[place] = e.sum(1)
                log_probs[place] = (own - top).squeeze(1) - sums[place].log()
            if piece.dtype != self.wide:
                piece.copy_(e.div_(sums[place].unsqueeze(1)))
        self.held = rows
        return room

    def gradients(self, grad: Tensor, sums: Tensor, wants: tuple[bool, ...]) -> list[Tensor | None]:
        """By hidden, weight and bias, each where it is wanted."""
        half = self.room.dtype != self.wide
        unit = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny) if half and len(grad) else None
        by_row = (grad / self.temperature).unsqueeze(1)
        by_row = by_row if unit is None else by_row / unit  # so that halves do not underflow
        spread = -by_row if half else -by_row / sums.unsqueeze(1)
        by_hidden = self.hidden.new_empty(self.hidden.shape, dtype=self.wide) if wants[0] else None
        by_weight: Tensor | None = None
        by_bias = self.bias.new_zeros(self.bias.shape, dtype=self.wide) if wants[2] and self.bias is not None else None
        for rows in reversed(list(self.chunks())):
            hidden, token, f, g = self.hidden[rows], self.ids[rows], spread[rows], by_row[rows]
            e = self.room[: rows.stop - rows.start] if self.held == rows else self.exponentials(rows, sums)
            if by_hidden is not None:
                by_hidden[rows] = torch.mm(e, self.weight) * f + self.weight[token] * g
            if wants[1]:
                by_weight = _with_product(by_weight, e.T, (hidden * f).to(e.dtype), self.wide)
                by_weight.index_add_(0, token, (hidden * g).to(self.wide))
            if by_bias is not None:
                by_bias.add_((e.T @ f.to(e.dtype)).squeeze(1)).index_add_(0, token, g.squeeze(1).to(self.wide))
        if wants[1] and by_weight is None:
            by_weight = self.weight.new_zeros(self.weight.shape, dtype=self.wide)
        found = (by_hidden, by_weight, by_bias)
        return list(found) if unit is None else [None if part is None else part.mul_(unit) for part in found]


def _with_product(total: Tensor | None, one: Tensor, other: Tensor, wide: torch.dtype) -> Tensor:
    """The total and the product: it is as large as the weights, so that a pass over zeros is worth leaving out."""
    if total is None:
        return torch.mm(one, other).to(wide)
    return total.addmm_(one, other) if total.dtype == one.dtype else total.add_(one @ other)
