"""BD-KD: forward and reverse KL, weighted sample by sample by which of two networks is the more uncertain.

With p = softmax(teacher / T), q = softmax(student / T), H the Shannon entropy at the gate's own temperature (1), and y
the label, the student and, in online distillation, the teacher minimise

    student:  CE(student, y) + alpha T^2 mean [ w_F KL(p||q) + w_R KL(q||p) ],    gap = H(q) - H(p),
    teacher:  CE(teacher, y) + alpha T^2 mean KL(p||q), differentiated through p,

with (w_F, w_R) = (1, delta) where gap > 0, to sharpen a student less sure than its teacher, (delta, 1) where gap < 0,
to flatten one surer than it, and (1, 1) at a tie. The gate is a constant. In other words, delta goes to the KL whose
first argument is the less certain of the two: as a value the sum is symmetric, and delta = 1 makes it Jeffreys'.
Source: Amara et al. 2022 (arXiv 2212.12965); the paper's own delta is not known to us, public baselines take 2 or 3.

Shapes: logits and log-probabilities [..., V], labels, masks and weights [...]; nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.reduce import masked_mean
from kullback.divergences import from_logits, kl, reverse_kl
from kullback.divergences.fused import check_pair

__all__ = [
    "BalanceWeights", "Gate", "GateRule", "Mode", "balanced_kl", "balanced_rows", "bdkd_loss", "bdkd_teacher_loss",
    "bdkd_weights", "certainty", "gate_rule", "weights_of_gap",
]  # fmt: skip

Mode = Literal["bdkd", "bdkd_inverse", "bdkd_soft", "jeffreys", "reverse", "dml"]
Gate = Literal["entropy", "confidence", "label"]
_BLOCK = 2**17  # numbers a thread takes at a time on a CPU, so that what it holds stays in the cache


class BalanceWeights(NamedTuple):
    """The weight [...] of KL(teacher||student), forward, and of KL(student||teacher), reverse; both constants."""

    forward: Tensor
    reverse: Tensor


class GateRule(NamedTuple):
    """How the weights come from the gap; gate and power say between what the gap is taken."""

    mode: Mode
    delta: float
    gate: Gate
    power: float
    width: float | None


def gate_rule(mode: Mode, delta: float, gate: Gate, power: float, width: float | None) -> GateRule:
    """The rule of some options, or ConfigError for one that is out of range."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode is one of {', '.join(get_args(Mode))}, not {mode!r}")
    if gate not in get_args(Gate):
        raise ConfigError(f"gate is one of {', '.join(get_args(Gate))}, not {gate!r}")
    if not 1.0 <= delta < math.inf:
        raise ConfigError(f"delta multiplies the favoured divergence and is at least 1, got {delta}")
    if not 0.0 < power < math.inf:
        raise ConfigError(f"the gate's temperature and power are positive numbers, and the power is {power}")
    if (mode == "bdkd_soft") != (width is not None):
        raise ConfigError('mode="bdkd_soft" and width go together: width is the gap, in nats, at which the gate opens')
    if width is not None and not width > 0.0:
        raise ConfigError(f"width is the scale of a smooth gate and must be positive, got {width}")
    return GateRule(mode, float(delta), gate, float(power), width)


# --- the gate


class _Side(NamedTuple):
    """One network in a block of rows: logits less their largest, by temperature, their exponentials, and the sum."""

    exponent: Tensor
    worth: Tensor
    total: Tensor


def _side(logits: Tensor, scale: float) -> _Side:
    exponent = logits - logits.amax(-1, keepdim=True)
    if scale != 1.0:
        exponent.mul_(scale)
    worth = exponent.exp()
    return _Side(exponent, worth, worth.sum(-1, keepdim=True))


def _power(side: _Side, power: float) -> Tensor:
    """exp(power * exponent), where it can be by squaring."""
    if power == 1.0:
        return side.worth
    if power in (2.0, 4.0, 8.0):
        worth = side.worth.square()
        while power > 2.0:
            worth.square_()
            power /= 2.0
        return worth
    return side.exponent.mul(power).exp_()


def _certainty(side: _Side, rule: GateRule, labels: Tensor | None) -> Tensor:
    """How sure of itself a distribution is, [...]: minus its entropy, its largest entry, or that of the label."""
    worth = _power(side, rule.power)
    total = side.total.squeeze(-1) if rule.power == 1.0 else worth.sum(-1)
    if rule.gate == "confidence":
        return total.reciprocal()  # the largest logit has worth 1
    if rule.gate == "label" and labels is not None:
        return worth.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) / total
    return rule.power * _dot(worth, side.exponent) / total - total.log()


def certainty(log_p: Tensor, rule: GateRule, labels: Tensor | None = None) -> Tensor:
    """What the gate compares, [...], of log-probabilities or logits [..., V]: the larger, the surer."""
    return _certainty(_side(log_p, 1.0), rule, labels)


def _dot(worth: Tensor, exponent: Tensor) -> Tensor:
    """sum worth * exponent, where 0 * -inf is 0."""
    product = worth * exponent
    total = product.sum(-1)
    return total if _clean(total) else product.nan_to_num_(nan=0.0).sum(-1) + 0.0 * worth.sum(-1)


def _clean(*values: Tensor) -> bool:
    """Whether no NaN needs to be looked for, as far as can be told without waiting for an accelerator."""
    return all(value.device.type == "cpu" and bool(value.isfinite().all()) for value in values)


def _gap(teacher: _Side, student: _Side, rule: GateRule, labels: Tensor | None) -> Tensor:
    """How much surer of itself the teacher is than the student, [...]."""
    if rule.mode in ("dml", "reverse", "jeffreys"):  # which have no gate
        return teacher.total.new_zeros(teacher.total.shape[:-1])
    return _certainty(teacher, rule, labels) - _certainty(student, rule, labels)


def weights_of_gap(gap: Tensor, rule: GateRule) -> BalanceWeights:
    """From the gap [...], which is positive where the student is the less sure of the two."""
    one = torch.ones_like(gap)
    if rule.mode == "dml":
        return BalanceWeights(one, 0.0 * one)
    if rule.mode == "reverse":
        return BalanceWeights(0.0 * one, one)
    if rule.mode == "jeffreys":
        return BalanceWeights(one, one)
    if rule.width is not None:
        share = torch.sigmoid(gap / rule.width)
    else:
        share = (gap > 0).to(gap.dtype)
    other = (gap < 0).to(gap.dtype) if rule.width is None else 1.0 - share
    extra = rule.delta - 1.0
    weights = BalanceWeights(1.0 + extra * other, 1.0 + extra * share)
    return BalanceWeights(weights.reverse, weights.forward) if rule.mode == "bdkd_inverse" else weights


@torch.no_grad()
def bdkd_weights(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor | None = None,
    *,
    delta: float = 2.0,
    mode: Mode = "bdkd",
    gate: Gate = "entropy",
    gate_temperature: float = 1.0,
    width: float | None = None,
) -> BalanceWeights:
    """The weights [...] of forward and reverse KL for logits [..., V]; no gradient passes through them.

    gate: what is compared at gate_temperature: "entropy", the "confidence" in the likeliest class, or the probability
    of the "label", for which labels [...] are needed. At a high temperature all entropies are nearly log V and the gap
    is lost, hence 1. mode: "bdkd"; "bdkd_inverse" exchanges the weights (a control); "bdkd_soft" moves delta - 1 from
    one to the other as sigmoid(gap / width), so that they add up to 1 + delta; "jeffreys" (1, 1), "reverse" (0, 1) and
    "dml" (1, 0) have no gate. Raises ShapeError for different shapes, ConfigError for a wrong option.

    >>> teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.2, 0.1, 0.0, -0.1]])
    >>> student = torch.tensor([[0.5, 0.2, 0.1, 0.0], [2.0, 0.0, -1.0, -1.0]])
    >>> bdkd_weights(teacher, student)
    BalanceWeights(forward=tensor([1., 2.]), reverse=tensor([2., 1.]))
    """
    if not gate_temperature > 0.0:
        raise ConfigError(f"gate_temperature must be positive and is {gate_temperature}")
    rule = gate_rule(mode, delta, gate, 1.0, width)
    labels = _gate_labels(rule, labels, teacher_logits)
    teacher, student = _pair(teacher_logits, student_logits)
    scale = 1.0 / gate_temperature
    return weights_of_gap(_gap(_side(teacher, scale), _side(student, scale), rule, labels), rule)


def _gate_labels(rule: GateRule, labels: Tensor | None, logits: Tensor) -> Tensor | None:
    if rule.gate != "label":
        return None
    if labels is None:
        raise ConfigError('gate="label" compares the probability of the label: give labels')
    _check_labels(labels, logits)
    return labels.long()


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:-1]:
        raise ShapeError(f"labels have shape {tuple(labels.shape)}, the rows {tuple(logits.shape[:-1])}: one a row")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"labels are whole numbers of classes, got {labels.dtype}: convert them with .long()")
    wrong = (labels != -100) & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(wrong.any()):
        raise DataError(
            f"labels are classes from 0 to {logits.shape[-1] - 1}, or -100 for a row that has none; "
            f"one is {int(labels[wrong][0])}"
        )


def _pair(teacher_logits: Tensor, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    if teacher_logits.shape != student_logits.shape or teacher_logits.ndim == 0:
        raise ShapeError(
            f"teacher logits have shape {tuple(teacher_logits.shape)} and student logits {tuple(student_logits.shape)}:"
            " both must have the same rows and classes, so cut a padded vocabulary to the shared one"
        )
    return check_pair(teacher_logits, student_logits)


# --- the balanced divergence, with its closed gradient


class _Balanced(NamedTuple):
    """Per row [...]: the weighted value, which alone is differentiable, its two parts, and the weights."""

    value: Tensor
    forward: Tensor
    reverse: Tensor
    weights: BalanceWeights


def _rows(
    teacher: Tensor, student: Tensor, labels: Tensor | None, rule: GateRule, scale: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """Value, forward, reverse, both weights and both gradients by the logits [n, V] of rows."""
    ours, theirs = _side(student, scale), _side(teacher, scale)
    weights = weights_of_gap(_gap(theirs, ours, rule, labels), rule)
    ratio = (theirs.exponent - ours.exponent).sub_(theirs.total.log() - ours.total.log())
    infinite = None
    if not _clean(ratio.sum(-1)):
        # In units in which an infinite row stays a number times delta and times 0; 0 where neither has the class.
        nothing = torch.isneginf(theirs.exponent) & torch.isneginf(ours.exponent)
        ratio.masked_fill_(nothing, 0.0)
        infinite = ratio.amax(-1) == math.inf, ratio.amin(-1) == -math.inf
        ratio.clamp_(-1e30, 1e30)
    p, q = theirs.worth.div_(theirs.total), ours.worth.div_(ours.total)
    forward, reverse = (p * ratio).sum(-1), -(q * ratio).sum(-1)
    first, second = weights.forward.unsqueeze(-1), weights.reverse.unsqueeze(-1)
    shift_p, shift_q = second - first * forward.unsqueeze(-1), first - second * reverse.unsqueeze(-1)
    grad_p = (ratio * first).add_(shift_p).mul_(p).sub_(q * second).mul_(scale) if needs[0] else None
    grad_q = ratio.mul_(-second).add_(shift_q).mul_(q).sub_(p.mul_(first)).mul_(scale) if needs[1] else None
    if infinite is not None:
        forward, reverse = forward.masked_fill(infinite[0], math.inf), reverse.masked_fill(infinite[1], math.inf)
    parts = [(w * part).masked_fill(w == 0, 0.0) for w, part in zip(weights, (forward, reverse))]
    return parts[0] + parts[1], forward, reverse, *weights, grad_p, grad_q


def _blocks(
    teacher: Tensor, student: Tensor, labels: Tensor | None, rule: GateRule, scale: float, needs: tuple[bool, bool]
) -> list[Any]:
    """The same for rows [N, V], on a CPU a block of rows at a time."""
    step = max(_BLOCK * torch.get_num_threads() // max(teacher.shape[-1], 1), 1)
    if teacher.device.type != "cpu" or len(teacher) <= step:
        return list(_rows(teacher, student, labels, rule, scale, needs))
    found: list[Any] = [teacher.new_empty(len(teacher)) for _ in range(5)]
    found += [torch.empty_like(teacher, memory_format=torch.contiguous_format) if need else None for need in needs]
    for begin in range(0, len(teacher), step):
        part = slice(begin, begin + step)
        inside = None if labels is None else labels[part]
        for whole, piece in zip(found, _rows(teacher[part], student[part], inside, rule, scale, needs)):
            if whole is not None and piece is not None:
                whole[part] = piece
    return found


class _BalancedKL(torch.autograd.Function):
    """The gradient is taken with the value; the gate is a constant in it."""

    @staticmethod
    def forward(
        ctx: Any, teacher: Tensor, student: Tensor, labels: Tensor | None, rule: GateRule, scale: float,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *found, grad_p, grad_q = _blocks(teacher.detach(), student.detach(), labels, rule, scale, needs)
        ctx.needs = needs
        ctx.save_for_backward(*[gradient for gradient in (grad_p, grad_q) if gradient is not None])
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        by_p, by_q = (next(saved) * grad.unsqueeze(-1) if need else None for need in ctx.needs)
        return by_p, by_q, None, None, None, None


def _balanced(
    teacher: Tensor, student: Tensor, rule: GateRule, scale: float = 1.0, labels: Tensor | None = None
) -> _Balanced:
    """Of softmax(scale * logits); log-probabilities are logits too."""
    outcomes, rows = teacher.shape[-1], teacher.shape[:-1]
    recording = torch.is_grad_enabled()
    needs = recording and teacher.requires_grad, recording and student.requires_grad
    flat = teacher.reshape(-1, outcomes), student.reshape(-1, outcomes)
    found = _BalancedKL.apply(*flat, None if labels is None else labels.reshape(-1), rule, scale, needs)
    value, forward, reverse, first, second = (x.view(rows) for x in found)
    return _Balanced(value, forward, reverse, BalanceWeights(first, second))


def balanced_kl(
    log_p: Tensor,
    log_q: Tensor,
    *,
    delta: float = 2.0,
    mode: Mode = "bdkd",
    gate: Literal["entropy", "confidence"] = "entropy",
    power: float = 1.0,
    width: float | None = None,
) -> Tensor:
    """w_F KL(p||q) + w_R KL(q||p), weighted as in `bdkd_weights`: a Divergence, [..., V] to [...], in nats.

    power: the gate compares p^power and q^power, normalised; with power=T it sees distributions taken at temperature T
    as they are at temperature 1. An Objective takes `BalancedKL` or `bdkd_objective`, which know truncated teachers
    too. Differentiable once in both arguments, the gate held constant; both KLs, both entropies and the gradient come
    out of one pass.
    Raises ShapeError when the shapes differ, ConfigError for options out of range.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> balanced_kl(p, q)
    tensor(0.9704)
    """
    if gate == "label":
        raise ConfigError('balanced_kl sees no labels: gate="label" belongs to bdkd_loss')
    return _balanced(*check_pair(log_p, log_q), gate_rule(mode, delta, gate, power, width)).value


def balanced_rows(
    teacher_logits: Tensor, student_logits: Tensor, rule: GateRule, *, temperature: float = 1.0,
    labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`balanced_kl` [...] of logits [..., V] at a temperature, by a rule whose gate may be the label's, labels [...].

    The teacher is a constant. Raises ShapeError, DataError for labels out of range, or ConfigError for none given.
    """
    labels = _gate_labels(rule, labels, student_logits)
    return _balanced(*_pair(teacher_logits.detach(), student_logits), rule, 1.0 / temperature, labels).value


# --- losses


def bdkd_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor | None = None,
    *,
    delta: float = 2.0,
    temperature: float = 2.0,
    alpha: float = 1.0,
    squared_temperature: bool = True,
    mode: Mode = "bdkd",
    gate: Gate = "entropy",
    gate_temperature: float = 1.0,
    width: float | None = None,
    teacher_entropy: bool = True,
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """The student's loss from logits [..., V]: a mapping of scalars, "loss" and its unweighted parts.

    The teacher is a constant. loss = cross_entropy + alpha T^2 distillation, with distillation the mean of
    w_F forward + w_R reverse; reverse_share is the share of rows whose reverse KL has the larger weight. labels [...]:
    -100 is left out; without labels there is no cross_entropy. teacher_entropy: False leaves it out of the forward
    part, which then is cross-entropy with the teacher's distribution, as in later work on language models; the gradient
    is the same. mode, gate and width as in `bdkd_weights`. mask [...]: the rows that count; count: what sums are
    divided by instead of their number. Raises ShapeError, DataError for labels out of range, or ConfigError.

    >>> teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.2, 0.1, 0.0, -0.1]])
    >>> student = torch.tensor([[0.5, 0.2, 0.1, 0.0], [2.0, 0.0, -1.0, -1.0]])
    >>> bdkd_loss(teacher, student, temperature=1.0)["loss"], bdkd_loss(teacher, student, temperature=4.0)["loss"]
    (tensor(1.5095), tensor(1.6933))
    """
    if not gate_temperature > 0.0:
        raise ConfigError(f"gate_temperature must be positive and is {gate_temperature}")
    _check_numbers(temperature, alpha)
    rule = gate_rule(mode, delta, gate, temperature / gate_temperature, width)
    gate_labels = _gate_labels(rule, labels, teacher_logits)
    teacher, student = _pair(teacher_logits.detach(), student_logits)
    found = _balanced(teacher, student, rule, 1.0 / temperature, gate_labels)
    value, forward = found.value, found.forward
    if not teacher_entropy:
        entropy = -_certainty(_side(teacher, 1.0 / temperature), rule._replace(gate="entropy", power=1.0), None)
        value, forward = value + found.weights.forward * entropy, forward + entropy
    parts = {
        "distillation": value,
        "forward": forward,
        "reverse": found.reverse,
        "reverse_share": (found.weights.reverse > found.weights.forward).to(value.dtype),
    }
    return _summed(parts, student_logits, labels, alpha * (temperature**2 if squared_temperature else 1.0), mask, count)


def _check_numbers(temperature: float, alpha: float) -> None:
    if not 0.0 < temperature < math.inf or not 0.0 <= alpha < math.inf:
        raise ConfigError(f"temperature must be positive and alpha at least 0, both finite: got {temperature}, {alpha}")


def _summed(
    parts: dict[str, Tensor],
    logits: Tensor,
    labels: Tensor | None,
    weight: float,
    mask: Tensor | None,
    count: Tensor | float | None,
) -> dict[str, Tensor]:
    """Means of the parts over the rows that count, with cross-entropy where there are labels, and the loss in front."""
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, the rows {tuple(logits.shape[:-1])}: one a row")
    if labels is not None:
        _check_labels(labels, logits)
        mask = labels != -100 if mask is None else mask.bool() & (labels != -100)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = wide.reshape(-1, wide.shape[-1]), labels.reshape(-1).long()
        hard = torch.nn.functional.cross_entropy(*rows, reduction="none")
        parts = {**parts, "cross_entropy": hard.view(labels.shape)}
    means = {name: masked_mean(part, mask, count=count) for name, part in parts.items()}
    loss = weight * means["distillation"]
    return {"loss": loss + means["cross_entropy"] if labels is not None else loss, **means}


def bdkd_teacher_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    squared_temperature: bool = True,
    mode: Mode = "bdkd",
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """The teacher's loss in online distillation: its cross-entropy and KL(teacher||student) with the student constant.

    The gradient passes through the first argument: the teacher keeps its own modes. mode="dml" takes KL(student||
    teacher) instead, as deep mutual learning does (Zhang et al. 2018); the other modes do not differ here. Shapes,
    labels, mask and count as in `bdkd_loss`.
    """
    _check_numbers(temperature, alpha)
    gate_rule("jeffreys" if mode == "bdkd_soft" else mode, 1.0, "entropy", 1.0, None)
    divergence: Callable[[Tensor, Tensor], Tensor] = reverse_kl if mode == "dml" else kl
    logits = _pair(teacher_logits, student_logits.detach())
    parts = {"distillation": from_logits(divergence, *logits, temperature)}
    weight = alpha * (temperature**2 if squared_temperature else 1.0)
    return _summed(parts, teacher_logits, labels, weight, mask, count)
