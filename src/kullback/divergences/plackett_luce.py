r"""Plackett-Luce rankings: their likelihood, samples, and losses that weight every pick of a ranking.

Scores s [..., V] are log-worths. A ranking picks pi_1, pi_2, ... one after the other, each among what is left:

    P(pi | s) = prod_k exp(s_{pi_k}) / Z_k,    Z_k = sum of exp(s_l) over the classes l not yet picked,
    L(s) = sum_k alpha_k (log Z_k - s_{pi_k}),    dL/ds_i = exp(s_i) sum_{k <= pos(i)} alpha_k / Z_k - alpha_{pos(i)}.

alpha = (1, 0, 0, ...) is cross-entropy with pi_1 as the label and alpha = 1 is ListMLE. PLD takes as pi the label and
then the other classes as the teacher orders them, and as alpha_k the teacher's probability of the class picked. L is
convex in s and blind to s + c. Its minimiser is a ranking with growing gaps, not the teacher's distribution.
Source: arXiv 2506.12542, section 3.

Shapes: scores and logits [..., V]; a ranking [..., K], K <= V picks (whatever is not picked stays in every Z_k).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.reduce import masked_mean, masked_sum
from kullback.divergences._ranking import (
    check_labels,
    check_logits,
    check_picks,
    check_temperature,
    check_topk,
    label_first,
)

__all__ = [
    "RankWeights", "Ranking", "check_options", "listmle_loss", "listwise_loss", "pl_log_prob", "pl_sample",
    "pl_tied_log_prob", "pl_topk_log_prob", "pld_loss", "rank_weights", "ranking_of", "ranking_of_top",
    "teacher_optimal_permutation",
]  # fmt: skip

RankWeights = Literal["teacher", "uniform", "ce", "position", "position_teacher"]
Reduction = Literal["mean", "sum", "none"]
_RANGE = 60.0  # log-worths this far apart have sums and quotients that float32 holds
_BLOCK = 2**17  # numbers a thread takes at a time on a CPU, so that what it holds stays in the cache


class Ranking(NamedTuple):
    """What a student is asked to reproduce: the classes picked [..., K], in order, and the weight [..., K] of each."""

    order: Tensor
    weights: Tensor


# --- the weighted loss of a ranking and its closed gradient


def _near(scores: Tensor, top: Tensor, order: Tensor, weights: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """Value and gradient from sums of worths, for rows whose scores lie within _RANGE of each other."""
    worth = scores.sub(top).exp_()
    picked = worth.gather(-1, order)
    left = picked.flip(-1).cumsum_(-1).flip(-1)
    if order.shape[-1] < scores.shape[-1]:
        left += worth.scatter(-1, order, 0.0).sum(-1, keepdim=True)
    value = (weights * (left / picked).log_()).sum(-1)
    if not need:
        return value, None
    push = (weights / left).cumsum_(-1)
    worth.mul_(push[..., -1:])
    return value, worth.scatter_(-1, order, picked.mul_(push).sub_(weights))


def _far(scores: Tensor, order: Tensor, weights: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """The same in log space, for any scores."""
    picked = scores.gather(-1, order)
    chain = picked.flip(-1)
    if order.shape[-1] < scores.shape[-1]:
        rest = scores.scatter(-1, order, -math.inf).logsumexp(-1, keepdim=True)
        chain = torch.cat([rest, chain], -1)
    left = chain.logcumsumexp(-1)[..., -order.shape[-1] :].flip(-1)
    none = weights == 0
    terms = (weights * (left - picked)).masked_fill(none, 0.0).masked_fill(~none & (picked == -math.inf), math.inf)
    value = terms.sum(-1) + 0.0 * scores.amax(-1).nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0)
    if not need:
        return value, None
    push = (weights.log() - left).masked_fill(none | (left == -math.inf), -math.inf).logcumsumexp(-1)
    whole = (scores + push[..., -1:]).exp_()
    return value, whole.scatter_(-1, order, (picked + push).exp_().sub_(weights))


def _evaluate(scores: Tensor, order: Tensor, weights: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """Value [N] and, if needed, gradient [N, V] of rows [N, V], on a CPU a block of rows at a time."""
    if scores.device.type != "cpu":
        return _far(scores, order.long(), weights, need)
    value = scores.new_empty(len(scores))
    gradient = torch.empty_like(scores, memory_format=torch.contiguous_format) if need else None
    step = max(_BLOCK * torch.get_num_threads() // scores.shape[-1], 1)
    for begin in range(0, len(scores), step):
        rows = slice(begin, begin + step)
        part, top = scores[rows], scores[rows].amax(-1, keepdim=True)
        given = order[rows].long(), weights[rows].to(scores.dtype), need
        near = bool(((top - part.amin(-1, keepdim=True)) <= _RANGE).all())
        value[rows], slope = _near(part, top, *given) if near else _far(part, *given)
        if gradient is not None and slope is not None:
            gradient[rows] = slope
    return value, gradient


class _Listwise(torch.autograd.Function):
    """The gradient is taken with the value, so that nothing but it is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        value, gradient = _evaluate(scores.detach(), order, weights, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(-1), None, None


def listwise_loss(scores: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k (log Z_k - s_{order_k}) of scores [..., V], order [..., K] and constant weights [..., K]: [...].

    order: different classes in 0..V-1, of any integer type; weights: nonnegative, broadcast against order. A pick with
    weight 0 adds nothing; another whose score is -inf gives inf. Differentiable once, in scores. Halves are computed in
    float32. O(K) beside a few passes over V. Raises ShapeError for shapes that do not belong together, DataError for
    classes out of range and for weights that are negative or NaN. NaN scores give NaN.

    >>> order = torch.tensor([1, 0, 2])
    >>> listwise_loss(torch.tensor([1.0, 2.0, 0.0]), order, torch.tensor([1.0, 0.0, 0.0]))
    tensor(0.4076)
    """
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ShapeError(f"scores have shape [..., V] with at least one class, got {tuple(scores.shape)}")
    if order.shape[:-1] != scores.shape[:-1] or not 1 <= order.shape[-1] <= scores.shape[-1]:
        raise ShapeError(
            f"a ranking has shape [..., K] with 1 <= K <= V for scores {tuple(scores.shape)}, got {tuple(order.shape)}"
        )
    check_picks(order, weights, scores.shape[-1])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = weights.detach().to(scores.dtype).expand_as(order)
    classes, picks = scores.shape[-1], order.shape[-1]
    rows = scores.reshape(-1, classes), order.reshape(-1, picks), weights.reshape(-1, picks)
    value: Tensor = _Listwise.apply(*rows)
    return value.view(scores.shape[:-1])


# --- the Plackett-Luce distribution


def pl_log_prob(scores: Tensor, permutation: Tensor) -> Tensor:
    """The log-probability [...] of whole rankings, permutation [..., V], under scores [..., V], in nats.

    >>> pl_log_prob(torch.zeros(3), torch.tensor([2, 0, 1])).exp()
    tensor(0.1667)
    """
    if permutation.shape != scores.shape:
        raise ShapeError(
            f"a whole ranking has the shape of its scores, {tuple(scores.shape)}, and this one has "
            f"{tuple(permutation.shape)}: for its first picks alone take pl_topk_log_prob"
        )
    return pl_topk_log_prob(scores, permutation)


def pl_topk_log_prob(scores: Tensor, picks: Tensor) -> Tensor:
    """The log-probability [...] that a ranking under scores [..., V] begins with picks [..., K], in this order.

    Raises ShapeError, and DataError for picks that are no classes or are picked twice.
    """
    value = -listwise_loss(scores, picks, torch.ones((), device=scores.device))
    seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, picks.long(), True)
    if not bool((seen.sum(-1) == picks.shape[-1]).all()):
        raise DataError("a ranking picks every class once at most, and here one is picked again")
    return value


def pl_tied_log_prob(scores: Tensor, ranks: Tensor) -> Tensor:
    """The log-likelihood [...] of a ranking with ties, in Breslow's form: one Z for all members of a tie.

    ranks [..., V]: integers, the lowest is picked first, equal ones are tied; every tie counts, the last one too. For
    classes that nobody ranked take `pl_topk_log_prob`.
    Without ties this is `pl_log_prob` of the order of the ranks. Differentiable any number of times.
    """
    if ranks.shape != scores.shape or ranks.is_floating_point():
        raise ShapeError(f"ranks are integers of the shape of the scores, {tuple(scores.shape)}")
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ShapeError(f"scores have shape [..., V] with at least one class, got {tuple(scores.shape)}")
    level, order = ranks.sort(dim=-1, stable=True)
    picked = scores.to(torch.promote_types(scores.dtype, torch.float32)).gather(-1, order)
    left = picked.flip(-1).logcumsumexp(-1).flip(-1)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    begins = torch.ones_like(level, dtype=torch.bool)
    begins[..., 1:] = level[..., 1:] != level[..., :-1]
    first = place.masked_fill(~begins, 0).cummax(-1).values
    none = picked == -math.inf  # what has no worth is never picked, not even when nothing else is left
    return (picked - left.gather(-1, first).masked_fill(none, 0.0)).sum(-1)


def pl_sample(scores: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n rankings [n, ..., V] of scores [..., V]: the order of the scores with Gumbel noise added.

    Classes with a score of -inf come last. Raises ConfigError for n below 1, ShapeError for scores without a class,
    DataError for scores that are NaN or +inf.

    >>> pl_sample(torch.tensor([0.0, 50.0, 100.0]), 1, torch.Generator().manual_seed(0))
    tensor([[2, 1, 0]])
    """
    if n < 1:
        raise ConfigError(f"n counts the rankings that are drawn and must be at least 1, got {n}")
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ShapeError(f"scores have shape [..., V] with at least one class, got {tuple(scores.shape)}")
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if not bool((wide < math.inf).all()):  # a NaN is not smaller either
        raise DataError("scores hold NaN or +inf: they have no distribution of rankings")
    noise = torch.empty(n, *wide.shape, dtype=wide.dtype, device=wide.device).exponential_(generator=generator)
    return (wide - noise.log()).argsort(-1, descending=True)


# --- the teacher's ranking and its weights


def teacher_optimal_permutation(teacher_logits: Tensor, labels: Tensor, topk: int | None = None) -> Tensor:
    """The label first, then the other classes by falling teacher logit, ties by index: int64 [..., V].

    teacher_logits [..., V], labels [...]. topk: only the first so many. Raises ShapeError for shapes that do not match,
    DataError for labels outside 0..V-1 and for logits that are NaN or +inf, ConfigError for topk out of range.

    >>> teacher_optimal_permutation(torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor(1))
    tensor([1, 0, 2, 3])
    """
    check_logits(teacher_logits, labels)
    check_labels(labels, teacher_logits.shape[-1])
    return label_first(teacher_logits.detach(), labels.long(), topk)


def rank_weights(log_q: Tensor, order: Tensor, kind: RankWeights | Tensor) -> Tensor:
    """The weight [..., K] of every pick; log_q [..., V] are the teacher's log-probabilities.

    "teacher": q of the class picked; "uniform": 1 / V; "ce": the first pick alone; "position": proportional to
    2^(V-k) - 1; "position_teacher": q_k over the q that is left at pick k, a reading of the paper's unclear ablation; a
    tensor: nonnegative weights by rank, [V] or [..., K]. Raises ConfigError for an unknown name, DataError for negative
    weights, ShapeError for too few or too many.
    """
    classes, picks = log_q.shape[-1], order.shape[-1]
    if isinstance(kind, Tensor):
        if kind.ndim == 0 or kind.shape[-1] not in (picks, classes):
            raise ShapeError(f"weights by rank have {picks} or {classes} entries, got {tuple(kind.shape)}")
        by_rank = kind.detach()[..., :picks].to(log_q)
        check_picks(order, by_rank, classes)
        return by_rank.expand_as(order)
    if kind == "teacher":
        return log_q.gather(-1, order).exp()
    if kind == "position_teacher":
        picked = log_q.gather(-1, order)
        return _share_of_the_rest(picked, log_q.scatter(-1, order, -math.inf).logsumexp(-1))
    return _by_rank(kind, picks, classes, log_q)


def check_options(temperature: float, kind: RankWeights | Tensor, topk: int | None) -> None:
    """Raise ConfigError or DataError for options of `pld_loss` that no input could go with."""
    check_temperature(temperature)
    check_topk(topk)
    if isinstance(kind, Tensor):
        check_picks(torch.zeros(kind.shape, dtype=torch.long), kind, 1)
    else:
        rank_weights(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), kind)


def _by_rank(kind: str, picks: int, classes: int, like: Tensor) -> Tensor:
    """The weights [..., K] that do not look at the teacher, with the rows, the type and the device of `like`."""
    rank = torch.arange(1, picks + 1, device=like.device, dtype=torch.float64)
    if kind == "uniform":
        fixed = torch.full_like(rank, 1.0 / classes)
    elif kind == "ce":
        fixed = (rank == 1).double()
    elif kind == "position":
        # divided by 2^V, which no float holds for a vocabulary; a lone class keeps its weight
        fixed = torch.exp2(-rank) - 2.0**-classes if classes > 1 else torch.ones_like(rank)
        fixed = fixed / (1.0 - (classes + 1) * 2.0**-classes if classes > 1 else 1.0)
    else:
        raise ConfigError(f"weights are teacher, uniform, ce, position, position_teacher or a tensor, not {kind!r}")
    return fixed.to(like.dtype).expand(*like.shape[:-1], picks)


def _share_of_the_rest(picked: Tensor, rest: Tensor) -> Tensor:
    """q_k over what is left at pick k, from log q of the picks [..., K] and of all that is never picked [...]."""
    chain = torch.cat([rest.unsqueeze(-1), picked.flip(-1)], -1)
    left = chain.logcumsumexp(-1)[..., 1:].flip(-1)
    return (picked - left).nan_to_num(nan=-math.inf, neginf=-math.inf).exp()


def ranking_of(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    weights: RankWeights | Tensor = "teacher",
    topk: int | None = None,
) -> Ranking:
    """The teacher's ranking of every row, to be kept and used again: `listwise_loss(student_logits, *ranking)`.

    Options as in `pld_loss`. order is int16 or int32 where that holds every class.
    """
    check_temperature(temperature)
    order = teacher_optimal_permutation(teacher_logits, labels, topk)
    small = torch.int16 if teacher_logits.shape[-1] <= 2**15 else torch.int32
    return Ranking(order.to(small), _weights_of(teacher_logits.detach(), order, temperature, weights))


def _weights_of(teacher: Tensor, order: Tensor, temperature: float, kind: RankWeights | Tensor) -> Tensor:
    """The weights [..., K] of every pick, on a CPU a block of rows at a time: no second [..., V] is held."""
    wide = torch.promote_types(teacher.dtype, torch.float32)
    if isinstance(kind, Tensor) or kind not in ("teacher", "position_teacher"):
        return rank_weights(torch.zeros((), dtype=wide, device=teacher.device).expand(teacher.shape), order, kind)

    def part(logits: Tensor, picks: Tensor) -> Tensor:
        logits = logits.to(wide)
        return rank_weights(torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1), picks, kind)

    if teacher.device.type != "cpu":
        return part(teacher, order)
    classes, picks = teacher.shape[-1], order.shape[-1]
    rows, picked = teacher.reshape(-1, classes), order.reshape(-1, picks)
    step = max(_BLOCK * torch.get_num_threads() // classes, 1)
    found = torch.empty(picked.shape, dtype=wide)
    for begin in range(0, len(rows), step):
        found[begin : begin + step] = part(rows[begin : begin + step], picked[begin : begin + step])
    return found.view(order.shape)


def ranking_of_top(
    top_ids: Tensor,
    top_log_probs: Tensor,
    tail_log_prob: Tensor,
    label_log_probs: Tensor,
    labels: Tensor,
    *,
    classes: int,
    weights: RankWeights = "teacher",
    topk: int | None = None,
) -> Ranking:
    r"""The same ranking from a truncated teacher: its K likeliest classes, and the label's own probability.

    The loss with topk picks looks at the teacher through pi_1..pi_topk and alpha_1..alpha_topk alone, the label and the
    topk - 1 likeliest others, and at the student through all of its V scores. For topk <= K the picks are among what
    is given, whether the label is one of the K or not, so nothing is approximated, whatever the weights: those by rank
    need V, those of "position_teacher" the mass of the tail, here without the label where that is in it. The tail
    stays in every Z_k of the student. What it takes from the loss over all V picks is the sum over k > topk of
    alpha_k (log Z_k - s_{pi_k}) >= 0, which is 0 for topk >= V - 1, as the last pick has no choice.

    top_ids and top_log_probs [..., K], by falling probability; tail_log_prob [...], the mass of all others;
    label_log_probs and labels [...]; all at the temperature of the weights. topk: at most K, which None stands for.
    Equal probabilities stay as they come. Raises ConfigError for topk out of range, DataError for a label that is no
    class and for what is no log-probability, ShapeError for shapes that do not belong together.

    >>> log_p, label = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.tensor(3)
    >>> ranking_of_top(torch.tensor([0, 1]), log_p[:2], log_p[2:].logsumexp(0), log_p[3], label, classes=4).order
    tensor([3, 0])
    """
    kept = top_ids.shape[-1]
    picks = kept if topk is None else topk
    if not 1 <= picks <= kept:
        raise ConfigError(f"a teacher that keeps {kept} classes ranks from 1 to {kept} of them, and topk is {topk}")
    rows = (top_log_probs.shape[:-1], tail_log_prob.shape, label_log_probs.shape, labels.shape)
    if top_log_probs.shape != top_ids.shape or any(shape != top_ids.shape[:-1] for shape in rows):
        raise ShapeError(f"a truncated teacher has [..., K] classes and one label a row: {top_ids.shape} and {rows}")
    check_labels(labels, classes)
    check_picks(top_ids, top_log_probs.new_zeros(()), classes)
    if not all(bool((x <= 1e-2).all()) for x in (top_log_probs, tail_log_prob, label_log_probs)):
        raise DataError("a truncated teacher gives log-probabilities, 0 at most: here are NaN or others")
    mine = top_ids == labels.unsqueeze(-1)
    others = mine.long().argsort(dim=-1, stable=True)  # the label last, where it is there at all
    order = torch.cat([labels.unsqueeze(-1), top_ids.gather(-1, others[..., : picks - 1])], -1)
    wide = torch.promote_types(top_log_probs.dtype, torch.float32)
    top, tail, label = (x.detach().to(wide) for x in (top_log_probs, tail_log_prob, label_log_probs))
    total = torch.logaddexp(top.logsumexp(-1), tail)  # what was stored in half precision sums to 1 again
    picked = torch.cat([label.unsqueeze(-1), top.gather(-1, others[..., : picks - 1])], -1) - total.unsqueeze(-1)
    if weights == "teacher":
        return Ranking(order, picked.exp())
    if weights != "position_teacher":
        return Ranking(order, _by_rank(weights, picks, classes, picked))
    unpicked = top.masked_fill(mine, -math.inf).gather(-1, others[..., picks - 1 :]).exp().sum(-1)
    outside = (tail.exp() - label.exp().masked_fill(mine.any(-1), 0.0)).clamp(min=0.0)
    return Ranking(order, _share_of_the_rest(picked, (unpicked + outside).log() - total))


# --- losses


def pld_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    weights: RankWeights | Tensor = "teacher",
    topk: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    count: Tensor | float | None = None,
) -> Tensor:
    """The weighted Plackett-Luce loss of the teacher's ranking: a scalar, or [...] with reduction="none".

    teacher_logits and student_logits [..., V], labels [...]: classes, tokens to come, or the relevant document of a
    list. It contains the label's term; do not add cross-entropy. temperature: of the teacher's weights alone, never
    of the student; weights: as in `rank_weights`; topk: the first so many picks, the label among them, with all other
    classes left in every denominator (for vocabularies, where a full sort is the cost). ignore_index: rows that do not
    count; count: what the sum is divided by instead of the rows kept. -inf as a student logit gives inf where that
    class has weight, and a class with -inf on both sides is out of the list. NaN of the student gives NaN. Raises
    ShapeError, DataError (NaN teacher, label out of range) or ConfigError.

    >>> t, s = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    >>> pld_loss(t, s, torch.tensor([1]))
    tensor(0.9193)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f'reduction is "mean", "sum" or "none", not {reduction!r}')
    if teacher_logits.shape != student_logits.shape:
        raise ShapeError(
            f"teacher logits have shape {tuple(teacher_logits.shape)} and student logits {tuple(student_logits.shape)}:"
            " both must have the same rows and classes, so cut the padded vocabulary to the shared one"
        )
    check_logits(teacher_logits, labels)
    kept = labels != ignore_index
    labels = labels.long()
    whole = bool(kept.all())
    if whole:
        teacher, student, own = teacher_logits, student_logits, labels
    else:
        teacher, student, own = teacher_logits[kept], student_logits[kept], labels[kept]
        if isinstance(weights, Tensor) and weights.shape[:-1] == kept.shape:
            weights = weights[kept]
    ranking = ranking_of(teacher, own, temperature=temperature, weights=weights, topk=topk)
    if isinstance(weights, Tensor) or weights != "teacher":  # the teacher's are 0 for -inf as they come
        picks = ranking.order.long()
        absent = torch.isneginf(teacher.gather(-1, picks)) & torch.isneginf(student.detach().gather(-1, picks))
        ranking = ranking._replace(weights=ranking.weights.masked_fill(absent, 0.0))
    values = listwise_loss(student, *ranking)
    if reduction == "none":
        return values if whole else values.new_zeros(labels.shape).masked_scatter(kept, values)
    return masked_sum(values) if reduction == "sum" else masked_mean(values, count=count)


def listmle_loss(
    teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """ListMLE: the negative log-likelihood of the whole ranking of `teacher_optimal_permutation`, all weights 1."""
    ones = torch.ones(teacher_logits.shape[-1], device=teacher_logits.device)
    return pld_loss(teacher_logits, student_logits, labels, weights=ones, reduction=reduction)
