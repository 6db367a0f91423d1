"""Losses over a vocabulary from hidden states, a few rows at a time, so that the logits of all rows are never held.

The loss is a sum over rows, so the gradient by a chunk's logits is known as soon as they are, and takes their place in
memory: all of it is formed inside the forward pass, and the backward pass only scales it. Four matrix products in all,
as for whole logits.

Shapes: N rows, H hidden size (each head its own), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.types import Divergence

__all__ = ["LinearHead", "RowLoss", "linear_chunked", "linear_chunked_values", "rows_chunked"]

# (rows, *logits of each head [n, V]) -> loss of each row [n]; rows says which of the N rows these are
RowLoss = Callable[..., Tensor]

# Logits of one head held at once, a chunk: enough rows for products at full speed, and no more.
_ENTRIES_CPU, _ENTRIES_ACCELERATOR = 1 << 23, 1 << 26
_FEWEST_ROWS = 128  # with fewer, reading the weights would take longer than the product
_BLOCK = 1 << 17  # logits of which a thread takes the loss at once, so that all it holds on the way stays in the caches


class LinearHead(NamedTuple):
    """Logits hidden @ weight.T + bias: hidden [N, H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def linear_chunked(
    divergence: Divergence,
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Mean divergence between softmax(hidden_p W_p^T / T) and softmax(hidden_q W_q^T / T) over the rows of the mask.

    hidden_p [..., H_p] and hidden_q [..., H_q] with weights [V, H] and biases [V]; mask [...]: rows that count, the
    others cost nothing; count: what the sum is divided by, the number of such rows by default (a trainer's global count
    of tokens makes micro-batches add up). Differentiable once in every tensor but mask. Halves are widened row by row.
    chunk: rows at once. Raises ShapeError when shapes do not match, ConfigError for a temperature or chunk below zero.

    >>> import torch
    >>> from kullback.divergences import kl
    >>> h, w = torch.eye(3), torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> linear_chunked(kl, h, w, h.flip(0), w), linear_chunked(kl, h, w, h, w)
    (tensor(0.2539), tensor(0.))
    """
    heads, scale = _prepare(hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, mask, count)
    return rows_chunked(_of_logits(divergence, temperature), heads, scale, chunk=chunk)


@torch.no_grad()
def linear_chunked_values(
    divergence: Divergence,
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The divergences [...] of `linear_chunked` row by row, without a gradient.

    >>> import torch
    >>> from kullback.divergences import kl
    >>> h, w = torch.eye(3), torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> linear_chunked_values(kl, h, w, h.flip(0), w)
    tensor([0.3278, 0.0000, 0.4338])
    """
    heads, scale = _prepare(hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, None, None)
    row_loss, step = _of_logits(divergence, temperature), _chunk(chunk, heads)
    heads = [_of_one_type(head) for head in heads]
    values = torch.empty_like(scale)
    with torch.autocast(scale.device.type, enabled=False):
        rooms = [_room(head, step) for head in heads]
        for rows in _parts(slice(0, len(values)), step):
            logits = [_logits(head, rows, room) for head, room in zip(heads, rooms, strict=True)]
            for block in _parts(slice(0, rows.stop - rows.start), _block(heads)):
                place = slice(rows.start + block.start, rows.start + block.stop)
                values[place] = row_loss(place, *(_widened(z[block]) for z in logits))
    return values.reshape(hidden_p.shape[:-1])


def rows_chunked(loss: RowLoss, heads: Sequence[LinearHead], scale: Tensor, *, chunk: int | None = None) -> Tensor:
    """The sum over N rows of scale [N] times loss(rows, *logits), from the heads' hidden states; a scalar.

    loss(rows, *logits) takes a slice of the N rows and the logits [n, V] of each head, and returns [n]; it must treat
    rows apart. Differentiable once in the tensors of all heads, and in nothing that loss closes over.

    >>> import torch
    >>> head = LinearHead(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> labels = torch.tensor([0, 2])
    >>> def cross_entropy(rows, logits):
    ...     return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")
    >>> rows_chunked(cross_entropy, [head], torch.ones(2) / 2)
    tensor(1.0514)
    """
    tensors = [tensor for head in heads for tensor in head]
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    result: Tensor = _RowsChunked.apply(loss, scale, _chunk(chunk, heads), needs, *tensors)
    return result


class _RowsChunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: RowLoss, scale: Tensor, step: int, needs: tuple[bool, ...], *tensors: Any) -> Tensor:
        heads = [_of_one_type(LinearHead(*tensors[i : i + 3])) for i in range(0, len(tensors), 3)]
        wants = [needs[i : i + 3] for i in range(0, len(needs), 3)]
        with torch.autocast(scale.device.type, enabled=False):
            # Scaled in backward only, halves do not underflow where rows are many, and a loss scaler still helps them.
            unit = scale.abs().amax().clamp(min=torch.finfo(scale.dtype).tiny) if len(scale) else scale.new_ones(())
            total, gradients = _accumulate(loss, scale / unit, step, heads, wants)
        ctx.unit = unit
        ctx.gradients = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, tensors, strict=True)
        ]
        return total * unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() and grad.requires_grad:
            raise RuntimeError("a chunked loss has no second derivative: take the divergence of whole logits instead")
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss gives its gradient once: compute the loss again for another backward")
        # In place, since a head's gradient can be as large as the model; so it can be given out once only.
        (gradients, ctx.gradients), factor = (ctx.gradients, None), grad * ctx.unit
        return None, None, None, None, *(None if g is None else g.mul_(factor) for g in gradients)


def _accumulate(
    loss: RowLoss, scale: Tensor, step: int, heads: list[LinearHead], wants: list[tuple[bool, ...]]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and for each tensor of each head its gradient where it is wanted."""
    total = torch.zeros((), dtype=_wide(scale, *(head.hidden for head in heads)), device=scale.device)
    gradients = [_zeros(head, want) for head, want in zip(heads, wants, strict=True)]
    rooms = [_room(head, step) for head in heads]
    for rows in _parts(slice(0, len(scale)), step):
        logits = [_logits(head, rows, room) for head, room in zip(heads, rooms, strict=True)]
        for block in _parts(rows, _block(heads)):
            inside = slice(block.start - rows.start, block.stop - rows.start)
            pieces = [z[inside] for z in logits]
            total += _differentiated(loss, block, scale[block], pieces, [any(want) for want in wants])
        for head, want, gradient, slope in zip(heads, wants, gradients, logits, strict=True):
            if any(want):
                _add(gradient, head, rows, slope)
    return total, [tensor for gradient in gradients for tensor in gradient]


def _differentiated(loss: RowLoss, block: slice, scale: Tensor, pieces: list[Tensor], wants: list[bool]) -> Tensor:
    """The loss of a block of rows; its gradient by the logits that want one takes the place of these logits."""
    logits = [_widened(piece).detach().requires_grad_(want) for piece, want in zip(pieces, wants, strict=True)]
    with torch.set_grad_enabled(any(wants)):
        values = loss(block, *logits)
    if any(wants):
        live = [z for z in logits if z.requires_grad]
        slopes: Iterator[Tensor | None] = iter([None] * len(live))
        if values.requires_grad:
            slopes = iter(torch.autograd.grad(values, live, scale.to(values.dtype), allow_unused=True))
        for piece, want in zip(pieces, wants, strict=True):
            if want:
                slope = next(slopes)
                piece.zero_() if slope is None else piece.copy_(slope)
    return (values.detach() * scale).sum()


def _add(gradient: list[Tensor | None], head: LinearHead, rows: slice, slope: Tensor) -> None:
    """Add what the slope [n, V] of a chunk's logits gives to the gradients by hidden, weight and bias."""
    by_hidden, by_weight, by_bias = gradient
    if by_hidden is not None:
        torch.mm(slope, head.weight, out=by_hidden[rows])
    if by_weight is not None:
        if by_weight.dtype == slope.dtype:
            by_weight.addmm_(slope.T, head.hidden[rows])
        else:
            by_weight.add_(slope.T @ head.hidden[rows])
    if by_bias is not None:
        by_bias.add_(slope.sum(0, dtype=by_bias.dtype))


def _zeros(head: LinearHead, want: tuple[bool, ...]) -> list[Tensor | None]:
    """Room for a head's gradients; sums over rows are kept in float32 at least."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    return [
        torch.zeros_like(head.hidden) if want[0] else None,
        torch.zeros_like(head.weight, dtype=wide) if want[1] else None,
        torch.zeros_like(head.bias, dtype=wide) if want[2] and head.bias is not None else None,
    ]


def _room(head: LinearHead, step: int) -> Tensor:
    """Memory for the logits of a chunk, used for one after the other: fresh pages cost as much as filling them."""
    return head.hidden.new_empty(min(step, head.hidden.shape[0]), head.weight.shape[0])


def _logits(head: LinearHead, rows: slice, room: Tensor) -> Tensor:
    out = room[: rows.stop - rows.start]
    if head.bias is None:
        return torch.mm(head.hidden[rows], head.weight.T, out=out)
    return torch.addmm(head.bias, head.hidden[rows], head.weight.T, out=out)


def _wide(*tensors: Tensor) -> torch.dtype:
    """The widest type of the tensors, float32 at least."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _of_one_type(head: LinearHead) -> LinearHead:
    """The head detached, contiguous and in one type: that of autocast where it is on, else the wider of the two."""
    device = head.weight.device.type
    dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    hidden, weight, bias = (None if t is None else t.detach().to(dtype) for t in head)
    return LinearHead(hidden.contiguous(), weight, bias)  # type: ignore[union-attr, arg-type]


def _parts(rows: slice, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


def _of_logits(divergence: Divergence, temperature: float) -> RowLoss:
    if not temperature > 0.0:
        raise ConfigError(f"temperature must be positive and is {temperature}")

    def row_loss(rows: slice, target: Tensor, model: Tensor) -> Tensor:
        if temperature != 1.0:
            target, model = target / temperature, model / temperature
        return divergence(torch.log_softmax(target, -1), torch.log_softmax(model, -1))

    return row_loss


def _chunk(chunk: int | None, heads: Sequence[LinearHead]) -> int:
    if chunk is None:
        weight = heads[0].weight
        entries = _ENTRIES_CPU if weight.device.type == "cpu" else _ENTRIES_ACCELERATOR
        return max(entries // max(weight.shape[0], 1), _FEWEST_ROWS)
    if chunk < 1:
        raise ConfigError(f"chunk is a number of rows, at least 1, got {chunk}")
    return chunk


def _block(heads: Sequence[LinearHead]) -> int:
    """Rows of which the loss is taken at once: on an accelerator all of the chunk."""
    vocabulary, device = heads[0].weight.shape[0], heads[0].weight.device.type
    if device != "cpu":
        return _ENTRIES_ACCELERATOR
    threads = torch.get_num_threads()
    return max(_BLOCK * threads // max(vocabulary, 1), threads)


def _prepare(
    hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor,
    bias_p: Tensor | None, bias_q: Tensor | None, mask: Tensor | None, count: Tensor | float | None,
) -> tuple[list[LinearHead], Tensor]:  # fmt: skip
    """Both heads on the rows of the mask, and the weight of each row."""
    for side, hidden, weight in (("p", hidden_p, weight_p), ("q", hidden_q, weight_q)):
        if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
            raise ShapeError(
                f"hidden_{side} has shape {tuple(hidden.shape)} and weight_{side} {tuple(weight.shape)}: "
                "give [..., H] and [V, H] with the same H"
            )
    if weight_p.shape[0] != weight_q.shape[0]:
        raise ShapeError(
            f"the reference's head has {weight_p.shape[0]} tokens and the model's {weight_q.shape[0]}: "
            "cut both to the shared vocabulary if one is padded"
        )
    for side, bias, weight in (("p", bias_p, weight_p), ("q", bias_q, weight_q)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ShapeError(f"bias_{side} has shape {tuple(bias.shape)} and the head {len(weight)} tokens: give [V]")
    if hidden_p.shape[:-1] != hidden_q.shape[:-1]:
        raise ShapeError(
            f"hidden_p has rows {tuple(hidden_p.shape[:-1])} and hidden_q {tuple(hidden_q.shape[:-1])}: give the same"
        )
    if mask is not None and mask.shape != hidden_p.shape[:-1]:
        raise ShapeError(f"mask has shape {tuple(mask.shape)} and the rows {tuple(hidden_p.shape[:-1])}: give the same")
    rows_p, rows_q = hidden_p.reshape(-1, hidden_p.shape[-1]), hidden_q.reshape(-1, hidden_q.shape[-1])
    if mask is not None:
        kept = mask.reshape(-1).bool()
        rows_p, rows_q = rows_p[kept], rows_q[kept]
    number: Tensor | float = max(len(rows_q), 1) if count is None else count
    dtype = _wide(rows_p, weight_p, rows_q, weight_q)
    scale = torch.ones(len(rows_q), dtype=dtype, device=rows_q.device) / number
    return [LinearHead(rows_p, weight_p, bias_p), LinearHead(rows_q, weight_q, bias_q)], scale
