r"""What a distilled student minimises:  (1 - c) \* D(teacher || student) + c \* cross-entropy + w \* batch term.

Where there is a row term, a loss that looks at the labels too, it takes the place of D.

Shapes: B batch, T positions, N = B (T - 1) predictions, H hidden size, V vocabulary, K tokens kept of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kullback.core.chunk import LinearHead, RowLoss, rows_chunked
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.types import Divergence, TeacherOutput
from kullback.distill.top_k import truncated_divergence

__all__ = ["Objective"]

BatchTerm = Callable[[Tensor, Tensor], Tensor]
RowTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
TruncatedRowTerm = Callable[[TeacherOutput, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The loss of distillation, from hidden states or from logits, with any teacher.

    divergence: compares next-token distributions at `temperature`, of a truncated teacher as `truncated_divergence`
    says; cross_entropy: its share in [0, 1], the divergence has the rest; squared_temperature: multiply the divergence
    by T^2, which keeps its gradient's size (Hinton et al. 2015); row_term: an optional loss that wants the labels too,
    (teacher logits [n, V], student logits [n, V], labels [n]) -> [n], in the place of the divergence, which then is
    only what one measures; it sees whole logits, and both temperature options are its own matter; truncated_row_term:
    the same from a truncated teacher, where that can be, (TeacherOutput of n rows, student logits [n, V], labels [n])
    -> [n]; batch_term: an optional loss over the rows of a batch, (teacher logits [n, V], student logits [n, V]) ->
    mean over rows, weighted by batch_weight and taken on at most batch_rows rows.
    Raises ConfigError for values out of range, for a temperature beside a row_term, and for a truncated_row_term alone.
    """

    divergence: Divergence
    cross_entropy: float = 0.0
    temperature: float = 1.0
    squared_temperature: bool = False
    row_term: RowTerm | None = None
    truncated_row_term: TruncatedRowTerm | None = None
    batch_term: BatchTerm | None = None
    batch_weight: float = 0.0
    batch_rows: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy <= 1:
            raise ConfigError(f"the share of cross-entropy must lie in [0, 1], got {self.cross_entropy}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be positive and finite, got {self.temperature}")
        if self.batch_term is not None and (not 0 <= self.batch_weight < math.inf or self.batch_rows < 1):
            raise ConfigError(
                f"a batch term has a weight of at least 0 and one row or more, got {self.batch_weight} and "
                f"{self.batch_rows}"
            )
        if self.row_term is not None and (self.temperature != 1 or self.squared_temperature):
            raise ConfigError("a row_term gets whole logits: bind a temperature to it, and leave this one at 1")
        if self.truncated_row_term is not None and self.row_term is None:
            raise ConfigError("a truncated_row_term goes with the row_term that it takes the place of: give both")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher at all; plain cross-entropy does not."""
        return self.cross_entropy < 1 or self.batch_term is not None

    @property
    def needs_whole_teacher(self) -> bool:
        """Whether the loss wants all logits of the teacher, which a cache and a server do not have."""
        return (self.row_term is not None and self.truncated_row_term is None) or self.batch_term is not None

    @property
    def needs_labels(self) -> bool:
        """Whether a truncated teacher has to say how probable the labels are, kept or not: a row term looks at them."""
        return self.row_term is not None

    def on_own_samples(self) -> Objective:
        """The same objective without cross-entropy, which on the student's own samples would only praise them.

        Raises ConfigError where nothing is left, and for a row_term, to which these samples would be the labels.
        """
        if self.row_term is not None:
            raise ConfigError("on-policy steps have no labels but the student's own samples: choose a divergence there")
        if self.cross_entropy == 1:
            raise ConfigError("on-policy steps need a divergence: set the share of cross-entropy below 1")
        return replace(self, cross_entropy=0.0)

    def loss(
        self,
        target: TeacherOutput | None,
        student: Tensor,
        labels: Tensor,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        count: Tensor | float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The scalar loss of student states [B, T, H] with their head, or of student logits [B, T, V] without one.

        labels [B, T]: -100 is not counted; position t predicts label t + 1. count: the tokens of the whole accumulated
        batch. generator: picks the rows of the batch term.
        """
        if weight is None and bias is not None:
            raise ConfigError("a bias belongs to a head: give its weight too, or logits that have it added")
        kept = labels[:, 1:].reshape(-1) != -100
        labels_N = labels[:, 1:].reshape(-1)[kept]
        student_N = _predictions(student, labels, kept)
        target = target and _target_rows(target, labels, kept)
        number = max(len(labels_N), 1) if count is None else count
        wide = torch.promote_types(student.dtype, torch.float32)
        scale = torch.ones(len(labels_N), dtype=wide, device=student.device) / number
        row_loss = self._row_loss(target, labels_N)
        if weight is None:
            logits = [] if target is None or target.hidden is None else [_logits(target)]
            loss = (row_loss(slice(None), *logits, student_N) * scale).sum()
        else:
            heads = [] if target is None or target.hidden is None else [_head(target)]
            loss = rows_chunked(row_loss, [*heads, LinearHead(student_N, weight, bias)], scale)
        if self.batch_term is None or target is None or not len(labels_N):
            return loss
        rows = self._batch_rows(len(labels_N), generator, student.device)
        student_rows = student_N[rows]
        student_logits = student_rows if weight is None else torch.nn.functional.linear(student_rows, weight, bias)
        return loss + self.batch_weight * self.batch_term(_logits(target, rows), student_logits) * scale.sum()

    def _row_loss(self, target: TeacherOutput | None, labels: Tensor) -> RowLoss:
        """The loss [n] of the rows of a chunk from the student's logits, behind the teacher's where it has a head."""
        soft, hard = 1.0 - self.cross_entropy, self.cross_entropy
        if self.squared_temperature:
            soft *= self.temperature**2
        if soft and target is None:
            raise ConfigError("a divergence needs a teacher: give its output, or set the share of cross-entropy to 1")

        def row_loss(rows: slice, *logits: Tensor) -> Tensor:
            bare = self.row_term is not None and not hard  # then no term asks for log-probabilities
            log_q = _wide(logits[-1]) if bare else _log_softmax(logits[-1])
            values = torch.zeros(log_q.shape[:-1], dtype=log_q.dtype, device=log_q.device)
            if soft and target is not None and self.row_term is not None:
                values = soft * self._row_term(target, rows, logits, labels[rows])
            elif soft and target is not None:
                tempered = log_q if self.temperature == 1.0 else _log_softmax(logits[-1], self.temperature)
                values = soft * self._to_teacher(target, rows, logits, tempered)
            if hard:
                values = values - hard * log_q.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
            return values

        return row_loss

    def _row_term(self, target: TeacherOutput, rows: slice, logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        student = _wide(logits[-1])
        if target.top_ids is not None and self.truncated_row_term is not None:
            return self.truncated_row_term(_part(target, rows), student, labels)
        if self.row_term is None:
            raise ConfigError("an objective without a row_term has a divergence in its place")
        return self.row_term(_chunk_logits(target, rows, logits), student, labels)

    def _to_teacher(self, target: TeacherOutput, rows: slice, logits: tuple[Tensor, ...], log_q: Tensor) -> Tensor:
        if target.top_ids is None:
            return self.divergence(_log_softmax(_chunk_logits(target, rows, logits), self.temperature), log_q)
        return truncated_divergence(self.divergence, _part(target, rows), log_q)

    def _batch_rows(self, number: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """At most batch_rows of the rows, at random where there are more."""
        if number <= self.batch_rows:
            return torch.arange(number, device=device)
        return torch.randperm(number, generator=generator)[: self.batch_rows].to(device)


def _predictions(field: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """What stands at the positions that predict a counted label: [B, T, ...] to [N, ...]."""
    if field.shape[:2] != labels.shape:
        raise ShapeError(
            f"labels have shape {tuple(labels.shape)} and an output of teacher or student {tuple(field.shape)}: "
            "both must be about the same [B, T] tokens"
        )
    return field[:, :-1].reshape(-1, *field.shape[2:])[kept]


_BY_POSITION = (
    "logits", "hidden", "top_ids", "top_log_probs", "tail_log_prob", "tail_ids", "tail_log_probs", "label_log_probs",
    "entropy",
)  # fmt: skip


def _target_rows(target: TeacherOutput, labels: Tensor, kept: Tensor) -> TeacherOutput:
    found = {name: getattr(target, name) for name in _BY_POSITION}
    return target._replace(
        **{name: _predictions(field, labels, kept) for name, field in found.items() if field is not None}
    )


def _part(target: TeacherOutput, rows: slice) -> TeacherOutput:
    found = {name: getattr(target, name) for name in _BY_POSITION}
    return target._replace(**{name: field[rows] for name, field in found.items() if field is not None})


def _head(target: TeacherOutput) -> LinearHead:
    if target.hidden is None or target.weight is None:
        raise ConfigError("a teacher that gives hidden states gives its head's weight too")
    return LinearHead(target.hidden, target.weight, target.bias)


def _chunk_logits(target: TeacherOutput, rows: slice, logits: tuple[Tensor, ...]) -> Tensor:
    """The teacher's logits of a chunk: before the student's where they come from its head."""
    if target.top_ids is not None:
        raise ConfigError("a row term sees whole distributions: give a live teacher, not a truncated one")
    return logits[0] if target.logits is None else target.logits[rows]


def _logits(target: TeacherOutput, rows: Tensor | slice = slice(None)) -> Tensor:
    """The teacher's whole logits at some rows; ConfigError for a truncated teacher, which has none."""
    if target.top_ids is not None:
        raise ConfigError("a batch term compares whole distributions: give a live teacher, not a truncated one")
    if target.logits is not None:
        return target.logits[rows]
    head = _head(target)
    return torch.nn.functional.linear(head.hidden[rows], head.weight, head.bias)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    logits = _wide(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)
