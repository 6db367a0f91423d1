r"""PLD: the student reproduces one ranking, the label first and the other classes as the teacher orders them.

    L = sum_k alpha_k (log sum_{l >= k} exp(s_{pi_l}) - s_{pi_k}),    alpha_k = softmax(t / tau)_{pi_k},

which has cross-entropy with the label as its first term: there is no weight to tune between label and teacher. The loss
itself is `kullback.divergences.plackett_luce.pld_loss`; here it is a module for classifiers, whose rankings can be kept
so that the teacher runs once, and an objective for language models. `kullback.distill.PLDTrainer` trains with it.
Source: arXiv 2506.12542.

A truncated teacher will do: with topk picks the loss looks at the teacher through the label and its topk - 1 likeliest
other classes, so what a teacher cache holds, the K likeliest tokens and the label's probability, gives the loss of the
live teacher for every topk <= K and every kind of weights (`ranking_of_top`).

Shapes: logits [..., V], labels [...], rankings [..., K] with K <= V picks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.reduce import masked_mean
from kullback.core.types import TeacherOutput
from kullback.distill.objective import Objective
from kullback.divergences import f_divergence
from kullback.divergences.plackett_luce import (
    Ranking,
    RankWeights,
    check_options,
    listwise_loss,
    pld_loss,
    ranking_of,
    ranking_of_top,
)

__all__ = ["PLDLoss", "pld_objective", "truncated_pld_loss"]


class PLDLoss(nn.Module):
    """The mean PLD loss over rows with a label, in place of cross-entropy and KL together.

    temperature: of the teacher's weights alone (the paper: 1 on ImageNet, 4 on CIFAR-100); weights: by rank, as in
    `rank_weights`; topk: the first so many picks, the label among them; ignore_index: the label of rows that do not
    count. Raises what `pld_loss` raises.

    >>> loss, t, s = PLDLoss(), torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    >>> loss(t, s, torch.tensor([1]))
    tensor(0.9193)
    >>> loss.of_ranking(loss.ranking(t, torch.tensor([1])), s, torch.tensor([1]))
    tensor(0.9193)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        weights: RankWeights | Tensor = "teacher",
        topk: int | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_options(temperature, weights, topk)
        self.temperature, self.topk, self.ignore_index = temperature, topk, ignore_index
        self.kind = None if isinstance(weights, Tensor) else weights
        self.register_buffer("by_rank", weights if isinstance(weights, Tensor) else None)

    @property
    def weights(self) -> RankWeights | Tensor:
        """The weights by rank, as they were given."""
        return self.by_rank if self.kind is None else self.kind  # type: ignore[return-value]

    def extra_repr(self) -> str:
        kind = "by rank" if self.kind is None else self.kind
        return f"temperature={self.temperature}, weights={kind}, topk={self.topk}"

    def forward(
        self, teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, *, count: Tensor | float | None = None
    ) -> Tensor:
        """The scalar loss of logits [..., V] and labels [...]; count: what the sum is divided by, not the rows kept."""
        return pld_loss(
            teacher_logits, student_logits, labels, temperature=self.temperature, weights=self.weights, topk=self.topk,
            ignore_index=self.ignore_index, count=count,
        )  # fmt: skip

    def ranking(self, teacher_logits: Tensor, labels: Tensor) -> Ranking:
        """Order and weights [..., K] of every row, to keep for later epochs; rows that do not count weigh nothing."""
        if labels.shape != teacher_logits.shape[:-1]:
            raise ShapeError(f"labels are one a row of logits {tuple(teacher_logits.shape)}, got {tuple(labels.shape)}")
        kept = labels != self.ignore_index
        found = ranking_of(
            teacher_logits[kept], labels[kept], temperature=self.temperature, weights=self.weights, topk=self.topk
        )
        picks = found.order.shape[-1]
        order = torch.arange(picks, dtype=found.order.dtype, device=labels.device).repeat(*labels.shape, 1)
        weights = found.weights.new_zeros(order.shape)
        order[kept], weights[kept] = found
        return Ranking(order, weights)

    def of_ranking(
        self, ranking: Ranking, student_logits: Tensor, labels: Tensor, *, count: Tensor | float | None = None
    ) -> Tensor:
        """The same scalar loss from what `ranking` gave for these rows."""
        if not ranking.order.shape[:-1] == student_logits.shape[:-1] == labels.shape:
            raise ShapeError(
                f"rankings have rows {tuple(ranking.order.shape[:-1])}, the student {tuple(student_logits.shape[:-1])} "
                f"and labels {tuple(labels.shape)}: give those of the same rows"
            )
        kept = labels != self.ignore_index
        values = listwise_loss(student_logits[kept], ranking.order[kept], ranking.weights[kept])
        return masked_mean(values, count=count)


def truncated_pld_loss(
    target: TeacherOutput,
    student_logits: Tensor,
    labels: Tensor,
    *,
    weights: RankWeights = "teacher",
    topk: int | None = None,
) -> Tensor:
    """The PLD loss [n] of student logits [n, V] and labels [n] from a truncated teacher's rows.

    target: top_ids and top_log_probs [n, K], tail_log_prob and label_log_probs [n], at the temperature of the weights.
    topk: picks of a ranking, at most K; with as many the loss is that of the live teacher. Raises ConfigError for a
    teacher that does not say how probable the label is, and what `ranking_of_top` raises.

    >>> log_p, s = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1), torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    >>> target = TeacherOutput(top_ids=torch.tensor([[0, 1, 2]]), top_log_probs=log_p[:, :3],
    ...                        tail_log_prob=log_p[:, 3], label_log_probs=log_p[:, 1])
    >>> truncated_pld_loss(target, s, torch.tensor([1]))
    tensor([0.9193])
    """
    if target.top_ids is None or target.top_log_probs is None or target.tail_log_prob is None:
        raise ConfigError("a truncated teacher gives top_ids, top_log_probs and tail_log_prob together")
    if target.label_log_probs is None:
        raise ConfigError(
            "pld asks how probable the teacher finds the label, and this teacher does not say: write its cache again, "
            "or give the live teacher"
        )
    kept = target.top_ids.shape[-1]
    ranking = ranking_of_top(
        target.top_ids, target.top_log_probs, target.tail_log_prob, target.label_log_probs, labels,
        classes=student_logits.shape[-1], weights=weights, topk=None if topk is None else min(topk, kept),
    )  # fmt: skip
    return listwise_loss(student_logits, *ranking)


def pld_objective(
    *, topk: int = 64, weights: RankWeights = "teacher", temperature: float = 1.0, cross_entropy: float = 0.0
) -> Objective:
    """The objective of a language model that ranks the next token first and then the teacher's others.

    topk: picks of a ranking, of a truncated teacher at most those that it kept; the rest of the vocabulary stays in
    every denominator. temperature: of the teacher's weights, at which a truncated teacher has to come; cross_entropy:
    the label is in the loss already, so a share of it is seldom wanted. It needs a text, since the student's own
    samples are no labels. What is measured is KL. Raises ConfigError for weights or numbers that do not exist.
    """
    check_options(temperature, weights, topk)  # what is wrong with them is said before a run begins
    loss = partial(pld_loss, temperature=temperature, weights=weights, topk=topk, reduction="none")
    truncated = partial(truncated_pld_loss, weights=weights, topk=topk)
    return Objective(
        divergence=f_divergence("kl"), row_term=loss, truncated_row_term=truncated, cross_entropy=cross_entropy
    )
