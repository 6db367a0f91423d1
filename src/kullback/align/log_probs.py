"""Log-probabilities of given tokens, and entropies, from logits or from hidden states and head.

From hidden states the logits of all tokens are never held: rows go through in chunks, forward and, once the gradient by
the log-probabilities is known, backward. Shapes: ... any, mostly B, T; H hidden size, V vocabulary; nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align._token_log_probs import token_log_probs
from kullback.core.chunk import LinearHead, rows_chunked
from kullback.core.errors import ConfigError, ShapeError
from kullback.models.heads import has_plain_head, replaced_head

__all__ = [
    "TokenLogProbs",
    "completion_log_probs",
    "completion_logits",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "sequence_log_probs",
]


class TokenLogProbs(NamedTuple):
    """log_probs [...] of given tokens and, where asked for, the entropy [...] of the distributions they came from."""

    log_probs: Tensor
    entropy: Tensor | None = None


def log_probs_from_logits(
    logits: Tensor, ids: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0, entropy: bool = False
) -> TokenLogProbs:
    """Log-probabilities of ids [...] under softmax(logits / temperature), logits [..., V]; 0 where mask [...] is false.

    Float32 at least. Raises ShapeError when the shapes do not fit, ConfigError for a temperature that is not positive.

    >>> log_probs_from_logits(torch.zeros(2, 4), torch.tensor([1, 3]), entropy=True)
    TokenLogProbs(log_probs=tensor([-1.3863, -1.3863]), entropy=tensor([1.3863, 1.3863]))
    """
    _check(logits.shape[:-1], ids, mask, temperature)
    if mask is None:
        return TokenLogProbs(*_of_rows(logits, ids, temperature, entropy)[:2])
    held = mask.bool()
    chosen, spread, _ = _of_rows(logits[held], ids[held], temperature, entropy)
    return TokenLogProbs(_spread(chosen, held), None if spread is None else _spread(spread, held))


def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> TokenLogProbs:
    """The same from hidden [..., H] and a head of weight [V, H] and bias [V], a chunk of rows at a time.

    Rows outside the mask [...] cost nothing. Differentiable once in hidden, weight and bias, both of log_probs and
    entropy; chunk: rows at once. Raises as `log_probs_from_logits`.

    >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> log_probs_from_hidden(hidden, weight, torch.tensor([0, 2])).log_probs
    tensor([-0.5514, -1.5514])
    """
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ShapeError(f"hidden is [..., H] and weight [V, H] with the same H, got {shapes}")
    _check(hidden.shape[:-1], ids, mask, temperature)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    held = None if mask is None else mask.reshape(-1).bool()
    if held is not None:
        rows, targets = rows[held], targets[held]
    if entropy:
        found = _WithEntropy.apply(rows, weight, bias, targets, temperature, chunk)  # type: ignore[no-untyped-call]
    else:
        found = (token_log_probs(rows, weight, targets, bias=bias, temperature=temperature, chunk=chunk),)
    parts = [part if held is None else _spread(part, held) for part in found]
    return TokenLogProbs(*(part.reshape(ids.shape) for part in parts))


def completion_log_probs(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool | Literal["measured"] = False,
    vocabulary: int | None = None,
) -> TokenLogProbs:
    """Log-probabilities of the last T tokens of ids [B, P + T] under a causal language model, completion_mask [B, T].

    attention_mask [B, P + T]; padding may stand on the left, since positions are counted from the first real token.
    The model may be wrapped by DDP or FSDP; where its head is linear the logits are never held. vocabulary: only the
    first so many tokens of the head exist. With a gradient unless inside torch.no_grad(); entropy="measured" has none,
    costs another product with the head, and leaves the log-probabilities and their gradient as they are to the bit.
    """
    _check_completions(ids, attention_mask, completion_mask)
    if entropy not in (True, False, "measured"):
        raise ConfigError(f'entropy is True, False or "measured", not {entropy!r}')
    options: dict[str, Any] = {"mask": completion_mask, "temperature": temperature}
    given, length = (ids, attention_mask, completion_mask), completion_mask.shape[1]
    targets, bare = ids[:, -length:], getattr(model, "module", model)
    if not has_plain_head(bare):
        logits = completion_logits(model, *given)[..., :vocabulary]
        return _asked(lambda spread: log_probs_from_logits(logits, targets, entropy=spread, **options), entropy)
    head = bare.get_output_embeddings()

    def from_hidden(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias[:vocabulary]
        rows = hidden[:, -length - 1 : -1]
        parts = (rows, head.weight[:vocabulary], targets)
        found = _asked(lambda spread: log_probs_from_hidden(*parts, bias=bias, entropy=spread, **options), entropy)
        return torch.stack([part for part in found if part is not None], -1)

    with replaced_head(bare, from_hidden):
        return TokenLogProbs(*completion_logits(model, *given, cut=False).unbind(-1))


def _asked(find: Callable[[bool], TokenLogProbs], entropy: bool | str) -> TokenLogProbs:
    """What find(entropy) gives, with a measured entropy beside it where that is asked for."""
    found = find(entropy is True)
    if entropy != "measured":
        return found
    with torch.no_grad():
        return found._replace(entropy=find(True).entropy)


def completion_logits(
    model: Any, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *, cut: bool = True
) -> Tensor:
    """What the head gives for the last T tokens of ids [B, P + T], [B, T, V]; cut=False: for one token more.

    Raises ShapeError as `completion_log_probs`.
    """
    _check_completions(ids, attention_mask, completion_mask)
    length = completion_mask.shape[1]
    found: Tensor = model(
        input_ids=ids,
        attention_mask=attention_mask.long(),
        position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits
    return found[:, -length - 1 : -1] if cut else found


def sequence_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    """The sum over each sequence's tokens, [B, T] to [B]; what stands outside the mask may be NaN.

    >>> sequence_log_probs(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]))
    tensor([-1.])
    """
    if mask.shape != log_probs.shape:
        raise ShapeError(f"log_probs and mask are alike, got {tuple(log_probs.shape)} and {tuple(mask.shape)}")
    return torch.where(mask.bool(), log_probs, 0.0).sum(-1)


def _check_completions(ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> None:
    fits = 0 < completion_mask.shape[1] < ids.shape[1] and len(ids) == len(completion_mask)
    if not fits or attention_mask.shape != ids.shape:
        shapes = f"{tuple(ids.shape)}, {tuple(attention_mask.shape)} and {tuple(completion_mask.shape)}"
        raise ShapeError(f"ids and attention_mask are [B, P + T], completion_mask [B, T] with P > 0, got {shapes}")


def _check(rows: torch.Size, ids: Tensor, mask: Tensor | None, temperature: float) -> None:
    if ids.shape != rows or (mask is not None and mask.shape != rows):
        shapes = f"{tuple(ids.shape)}{'' if mask is None else f' and {tuple(mask.shape)}'}"
        raise ShapeError(f"ids and mask have an entry for each of the rows {tuple(rows)}, got {shapes}")
    if not temperature > 0.0:
        raise ConfigError(f"temperature must be positive and is {temperature}")


def _of_rows(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities of ids, entropies or None, and the logarithms of the partition function."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if temperature != 1.0:
        logits = logits / temperature
    log_partition = logits.logsumexp(-1)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_partition
    if not entropy:
        return chosen, None, log_partition
    share = (logits - log_partition.unsqueeze(-1)).exp()
    # A token that is ruled out by logits of -inf adds nothing.
    mean = (share * logits.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
    return chosen, log_partition - mean, log_partition


def _spread(values: Tensor, held: Tensor) -> Tensor:
    """values [n] put where held [...] is true, 0 elsewhere."""
    return values.new_zeros(held.shape).masked_scatter(held, values)


class _KnownSlope(torch.autograd.Function):
    """0 for each row, with the gradient of first * log-probability + second * entropy by its logits.

    From what the forward pass has kept it takes one exponential of each logit: p the softmax, H its entropy, it is
    first (1[token] - p) - second p (log p + H), over the temperature.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, first: Tensor, second: Tensor, log_partition: Tensor,
        entropy: Tensor, temperature: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(logits, ids, first, second, log_partition, entropy)
        ctx.temperature = temperature
        return logits.new_zeros(len(logits))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        logits, ids, first, second, log_partition, entropy = ctx.saved_tensors
        scaled = logits if ctx.temperature == 1.0 else logits / ctx.temperature
        log_p = scaled - log_partition.unsqueeze(-1)
        by_token = (grad * first).unsqueeze(-1)
        share = log_p.exp()
        # A token that is ruled out by logits of -inf has no slope.
        log_p = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(entropy.unsqueeze(-1))
        slope = log_p.mul_((grad * second).unsqueeze(-1)).add_(by_token).mul_(share).neg_()
        slope.scatter_add_(-1, ids.unsqueeze(-1), by_token)
        return slope.div_(ctx.temperature), None, None, None, None, None, None


class _WithEntropy(torch.autograd.Function):
    """Forward keeps hidden states only; backward forms the logits again, now with a slope for each row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        values = torch.zeros(3, len(ids), dtype=wide, device=hidden.device)

        def record(rows: slice, logits: Tensor) -> Tensor:
            for place, part in enumerate(_of_rows(logits, ids[rows], temperature, True)):
                if part is not None:
                    values[place, rows] = part.to(wide)
            return values[0, rows]

        with torch.no_grad():
            rows_chunked(record, [LinearHead(hidden, weight, bias)], values.new_ones(len(ids)), chunk=chunk)
        ctx.save_for_backward(hidden, weight, bias, ids, values[1], values[2])
        ctx.options = (temperature, chunk)
        return values[0].clone(), values[1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_log_probs: Tensor, by_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, ids, spread, log_partition = ctx.saved_tensors
        temperature, chunk = ctx.options
        scale = by_log_probs.abs() + by_entropy.abs()
        safe = torch.where(scale > 0, scale, 1.0)
        first, second = by_log_probs / safe, by_entropy / safe

        def slope(rows: slice, logits: Tensor) -> Tensor:
            given = (ids[rows], first[rows], second[rows], log_partition[rows], spread[rows], temperature)
            found: Tensor = _KnownSlope.apply(logits, *given)
            return found

        tensors = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        live = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        with torch.enable_grad():
            total = rows_chunked(slope, [LinearHead(*tensors)], scale, chunk=chunk)  # type: ignore[arg-type]
        found = iter(torch.autograd.grad(total, live))
        gradients = [next(found) if t is not None and t.requires_grad else None for t in tensors]
        return *gradients, None, None, None
