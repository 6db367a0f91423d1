r"""Student and teacher side by side over the whole vocabulary, at the tokens of the student's completions.

From hidden states and heads neither's logits of all tokens are ever held: chunks of rows go through both heads forward,
and again backward, once the gradients by the log-probabilities and by the divergences are known.
Shapes: B rows of L prompt and T completion tokens; H hidden sizes, each model its own; V vocabulary; nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.log_probs import completion_logits, log_probs_from_logits
from kullback.core.chunk import LinearHead, rows_chunked
from kullback.core.errors import ConfigError, ShapeError
from kullback.models.heads import has_plain_head, replaced_head

__all__ = ["Compared", "RowDivergence", "TeacherStates", "compared_completions", "compared_from_hidden",
           "teacher_states"]  # fmt: skip

# (teacher's logits [n, V], student's logits [n, V]) -> [n], differentiable in the student's
RowDivergence = Callable[[Tensor, Tensor], Tensor]


class Compared(NamedTuple):
    """log_probs [B, T] of given tokens under the student, and divergence [B, T] of its next-token laws from another's.
    """

    log_probs: Tensor
    divergence: Tensor


class TeacherStates(NamedTuple):
    """What a teacher says at each token: logits hidden [B, T, H] @ weight.T + bias; weight None: hidden are the logits.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


@torch.no_grad()
def teacher_states(
    model: Any, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *, vocabulary: int | None = None
) -> TeacherStates:
    """One forward pass of a causal language model over ids [B, L + T], up to its head; no gradient.

    Where the head is not linear these are its logits. vocabulary: only the first so many tokens of the head exist.
    """
    bare = getattr(model, "module", model)
    if not has_plain_head(bare):
        return TeacherStates(completion_logits(model, ids, attention_mask, completion_mask)[..., :vocabulary])
    with replaced_head(bare, lambda hidden: hidden):
        hidden = completion_logits(model, ids, attention_mask, completion_mask)
    head = bare.get_output_embeddings()
    return TeacherStates(hidden, head.weight[:vocabulary], None if head.bias is None else head.bias[:vocabulary])


def compared_completions(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    teacher: TeacherStates,
    divergence: RowDivergence,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> Compared:
    """The last T tokens of ids [B, L + T] under a causal language model, beside its teacher, 0 outside the mask.

    As `log_probs.completion_log_probs`, and the same pass gives the divergence of softmax(logits / temperature) from
    the teacher's at the same temperature. Raises ShapeError for another vocabulary.
    """
    options: dict[str, Any] = {"divergence": divergence, "mask": completion_mask, "temperature": temperature}
    targets, bare = ids[:, -completion_mask.shape[1] :], getattr(model, "module", model)
    given = (ids, attention_mask, completion_mask)
    if not has_plain_head(bare):
        logits = completion_logits(model, *given)[..., :vocabulary]
        return _from_logits(teacher, logits, targets, **options)
    head = bare.get_output_embeddings()

    def from_hidden(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias[:vocabulary]
        rows = hidden[:, -targets.shape[1] - 1 : -1]
        found = compared_from_hidden(teacher, rows, head.weight[:vocabulary], targets, bias=bias, **options)
        return torch.stack(found, -1)

    with replaced_head(bare, from_hidden):
        return Compared(*completion_logits(model, *given, cut=False).unbind(-1))


def compared_from_hidden(
    teacher: TeacherStates,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    divergence: RowDivergence,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Compared:
    """The same from the student's hidden [B, T, H], weight [V, H] and bias [V], tokens ids and mask [B, T].

    Differentiable once in hidden, weight and bias, both of log_probs and of the divergence; chunk: rows at once.

    >>> from kullback.align.kdrl import reverse_kl_top_k
    >>> law = torch.tensor([[[0.3, 0.3, 0.4]]]).log()
    >>> teacher = TeacherStates(torch.tensor([[[0.6, 0.3, 0.1]]]).log())
    >>> compared_from_hidden(teacher, law, torch.eye(3), torch.tensor([[2]]), divergence=reverse_kl_top_k)
    Compared(log_probs=tensor([[-0.9163]]), divergence=tensor([[0.3466]]))
    """
    _check(teacher, hidden, weight, ids, mask, temperature)
    held = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    side = TeacherStates(teacher.hidden[held].detach(), teacher.weight, teacher.bias)
    found = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden[held], weight, bias, ids[held], side, divergence, temperature, chunk
    )
    return Compared(*(part.new_zeros(held.shape).masked_scatter(held, part) for part in found))


def _from_logits(
    teacher: TeacherStates, logits: Tensor, ids: Tensor, *, divergence: RowDivergence, mask: Tensor, temperature: float
) -> Compared:
    """From whole logits [B, T, V], of a student whose head is not linear."""
    held = mask.bool()
    log_probs = log_probs_from_logits(logits, ids, mask=mask, temperature=temperature).log_probs
    other = teacher.hidden[held]
    if teacher.weight is not None:
        other = torch.nn.functional.linear(other, teacher.weight, teacher.bias)
    _check_vocabulary(other.shape[-1], logits.shape[-1])
    found = divergence(_scaled(other, temperature), _scaled(logits[held], temperature))
    return Compared(log_probs, found.new_zeros(held.shape).masked_scatter(held, found))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits if temperature == 1.0 else logits / temperature


def _check(
    teacher: TeacherStates, hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor | None, temperature: float
) -> None:
    rows = hidden.shape[:-1]
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:] or ids.shape != rows:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(ids.shape)}"
        raise ShapeError(f"hidden is [..., H], weight [V, H] and ids [...], got {shapes}")
    if teacher.hidden.shape[:-1] != rows or (mask is not None and mask.shape != rows):
        raise ShapeError(f"the teacher speaks of {tuple(teacher.hidden.shape[:-1])} tokens, the student {tuple(rows)}")
    _check_vocabulary(len(teacher.weight) if teacher.weight is not None else teacher.hidden.shape[-1], len(weight))
    if not temperature > 0.0:
        raise ConfigError(f"temperature must be positive and is {temperature}")


def _check_vocabulary(teacher: int, student: int) -> None:
    if teacher != student:
        raise ShapeError(
            f"the teacher's head has {teacher} tokens and the student's {student}: cut both to the tokenizer's "
            "vocabulary if one is padded"
        )


class _Chunked(torch.autograd.Function):
    """Forward keeps hidden states only; backward forms both logits again, now with a slope for each row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, teacher: TeacherStates,
        divergence: RowDivergence, temperature: float, chunk: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        values = torch.zeros(2, len(ids), dtype=wide, device=hidden.device)
        rows_of = _rows(teacher, ids, divergence, temperature)

        def record(rows: slice, *logits: Tensor) -> Tensor:
            for place, part in enumerate(rows_of(rows, *logits)):
                values[place, rows] = part.to(wide)
            return values[0, rows]

        with torch.no_grad():
            heads = [LinearHead(hidden, weight, bias), *_teacher_head(teacher)]
            rows_chunked(record, heads, values.new_ones(len(ids)), chunk=chunk)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rows_of, ctx.teacher, ctx.chunk = rows_of, teacher, chunk
        return values[0].clone(), values[1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_log_probs: Tensor, by_divergence: Tensor) -> tuple[Any, ...]:
        scale = by_log_probs.abs() + by_divergence.abs()
        safe = torch.where(scale > 0, scale, 1.0)
        first, second = by_log_probs / safe, by_divergence / safe

        def weighed(rows: slice, *logits: Tensor) -> Tensor:
            log_probs, divergence = ctx.rows_of(rows, *logits)
            found: Tensor = first[rows] * log_probs + second[rows] * divergence
            return found

        tensors = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        live = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        with torch.enable_grad():
            heads = [LinearHead(*tensors), *_teacher_head(ctx.teacher)]  # type: ignore[arg-type]
            total = rows_chunked(weighed, heads, scale, chunk=ctx.chunk)
        found = iter(torch.autograd.grad(total, live))
        gradients = [next(found) if t is not None and t.requires_grad else None for t in tensors]
        return *gradients, None, None, None, None, None


def _teacher_head(teacher: TeacherStates) -> list[LinearHead]:
    return [] if teacher.weight is None else [LinearHead(teacher.hidden, teacher.weight.detach(), teacher.bias)]


def _rows(
    teacher: TeacherStates, ids: Tensor, divergence: RowDivergence, temperature: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """From a slice of rows and their logits to log-probabilities of the tokens, and divergences."""

    def found(rows: slice, student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        other = others[0] if others else teacher.hidden[rows]
        student, other = _scaled(student, temperature), _scaled(other, temperature)
        chosen = student.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1) - student.logsumexp(-1)
        return chosen, divergence(other, student)

    return found
