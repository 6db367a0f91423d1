"""BD-KD as an objective of distillation, from live teachers and from truncated ones.

Of a truncated teacher both KLs take the tail from the tokens drawn there, unbiased. The gate takes the student's
entropy whole, and the teacher's as the teacher says it, where it does: a cache stores it at temperature 1, the gate's
own. Then value and gradient are those of the live teacher on average over the draws. Elsewhere (another temperature of
the gate, another gate, a cache of an older format) the drawn tokens give an estimate, with which the gate of a few
tokens near a tie falls to the other side.

Shapes: log-probabilities and logits [n, V], labels [n], results [n]; K tokens kept, M drawn; nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.core.types import TeacherOutput
from kullback.distill.bd_kd import (
    Gate,
    GateRule,
    Mode,
    balanced_kl,
    balanced_rows,
    certainty,
    gate_rule,
    weights_of_gap,
)
from kullback.distill.objective import Objective
from kullback.distill.top_k import normalised, top_k_divergence, truncated_divergence
from kullback.divergences import f_divergence

__all__ = ["BalancedKL", "bdkd_objective", "truncated_balanced_kl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedKL:
    """`balanced_kl` as the divergence of an Objective at `temperature`: whole teachers, and truncated ones.

    The other options are those of `bdkd_weights`, without the gate of the label. Raises ConfigError for options out of
    range.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> BalancedKL()(p, q)
    tensor(0.9704)
    """

    delta: float = 2.0
    mode: Mode = "bdkd"
    gate: Gate = "entropy"
    gate_temperature: float = 1.0
    width: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.gate == "label":
            raise ConfigError('BalancedKL sees no labels: gate="label" belongs to bdkd_objective')
        self.rule()

    @property
    def name(self) -> str:
        """What reports call it."""
        return "bd_kd" if self.mode == "bdkd" else f"bd_kd(mode={self.mode})"

    def rule(self) -> GateRule:
        """What the options say, with the power that brings distributions at `temperature` to the gate's."""
        return _rule(self.mode, self.delta, self.gate, self.temperature, self.gate_temperature, self.width)

    def __call__(self, log_p: Tensor, log_q: Tensor, /) -> Tensor:
        """`balanced_kl` of log-probabilities [..., V], the gate at its own temperature."""
        rule = self.rule()
        return balanced_kl(
            log_p, log_q, delta=rule.delta, mode=rule.mode, gate=self.gate, power=rule.power,  # type: ignore[arg-type]
            width=rule.width,
        )  # fmt: skip

    def of_truncated(self, target: TeacherOutput, log_q: Tensor, /) -> Tensor:
        """The same [n] of a truncated teacher's rows; see `truncated_balanced_kl`."""
        if target.tail_ids is None and (self.gate_temperature != 1.0 or target.entropy is None):
            top = target.top_ids, target.top_log_probs, target.tail_log_prob
            return top_k_divergence(self, *top, log_q)  # type: ignore[arg-type]
        return truncated_balanced_kl(target, log_q, self.rule(), gate_temperature=self.gate_temperature)


def _rule(
    mode: Mode, delta: float, gate: Gate, temperature: float, gate_temperature: float, width: float | None
) -> GateRule:
    if not gate_temperature > 0.0 or not temperature > 0.0:
        raise ConfigError(f"temperatures must be positive and are {temperature} and, of the gate, {gate_temperature}")
    return gate_rule(mode, delta, gate, temperature / gate_temperature, width)


def truncated_balanced_kl(
    target: TeacherOutput,
    log_q: Tensor,
    rule: GateRule,
    *,
    gate_temperature: float = 1.0,
    labels: Tensor | None = None,
) -> Tensor:
    """w_F KL(p||q) + w_R KL(q||p) [n] of a truncated teacher and log_q [n, V].

    target: at the temperature of log_q, with tokens drawn from the tail, or else one bin for it. The gate compares
    rule.power: exact for the target's own `entropy` where gate_temperature is 1, and at power 1 for the confidence and
    for the label's probability, from label_log_probs [n] for labels [n]; from the drawn tokens for all else, or as if
    the tail were uniform without them. Raises ConfigError for what the target does not have.
    """
    with torch.no_grad():
        known = rule.gate == "entropy" and gate_temperature == 1.0 and target.entropy is not None
        sure = -target.entropy if known and target.entropy is not None else _teacher(target, log_q.shape[-1], rule)
        weights = weights_of_gap(sure.to(log_q.dtype) - certainty(log_q, rule, labels), rule)
    total = torch.zeros_like(weights.forward)
    for name, weight, without in zip(("kl", "reverse_kl"), weights, ("reverse", "dml"), strict=True):
        if rule.mode != without:
            total = total + weight * truncated_divergence(f_divergence(name), target, log_q)
    return total


def _teacher(target: TeacherOutput, vocabulary: int, rule: GateRule) -> Tensor:
    """How sure the teacher is, [n], from the tokens kept and those that stand for its tail."""
    if target.top_log_probs is None or target.tail_log_prob is None:
        raise ConfigError("a truncated teacher gives top_ids, top_log_probs and tail_log_prob together")
    kept = target.top_log_probs.shape[-1]
    top, tail, drawn = normalised(
        target.top_log_probs, target.tail_log_prob, target.tail_log_probs, target.top_log_probs.dtype
    )
    if not drawn.shape[-1]:
        drawn = tail - math.log(max(vocabulary - kept, 1))
    mass = torch.cat([top, (tail - math.log(drawn.shape[-1])).expand_as(drawn)], -1)
    own = torch.cat([top, drawn], -1)
    absent = torch.isneginf(own) | torch.isneginf(mass)
    own = own.masked_fill(absent, 0.0)
    weight = (mass + (rule.power - 1.0) * own).masked_fill(absent, -math.inf)
    log_sum = weight.logsumexp(-1)  # of p^power
    if rule.gate == "confidence":
        return (rule.power * top.amax(-1) - log_sum).exp()
    if rule.gate == "label":
        if target.label_log_probs is None:
            raise ConfigError(
                'gate="label" asks how probable the teacher finds the next token, and this teacher does not say: write '
                "its cache again, or give the live teacher"
            )
        return (rule.power * target.label_log_probs - log_sum).exp()
    share = (weight - log_sum.unsqueeze(-1)).exp()
    return rule.power * (share * own).sum(-1) - log_sum


def bdkd_objective(
    *,
    delta: float = 2.0,
    mode: Mode = "bdkd",
    gate: Gate = "entropy",
    gate_temperature: float = 1.0,
    width: float = 0.0,
    cross_entropy: float = 0.2,
    temperature: float = 1.0,
    squared_temperature: bool = False,
) -> Objective:
    """The objective of a language model whose teacher is fixed: a gate for each token, from live or truncated teachers.

    width: of the gate of mode="bdkd_soft", 0 in the others. gate="label" compares the probability of the next token;
    what is measured then is Jeffreys' divergence, and the student's own samples will not do. The other options are
    those of `bdkd_weights` and `Objective`. Raises ConfigError for options out of range.

    >>> bdkd_objective(delta=3.0, temperature=2.0).temperature
    2.0
    """
    if gate != "label":
        divergence = BalancedKL(
            delta=delta, mode=mode, gate=gate, gate_temperature=gate_temperature, width=width or None,
            temperature=temperature,
        )  # fmt: skip
        return Objective(
            divergence=divergence, cross_entropy=cross_entropy, temperature=temperature,
            squared_temperature=squared_temperature,
        )  # fmt: skip
    rule = _rule(mode, delta, gate, temperature, gate_temperature, width or None)
    factor = temperature**2 if squared_temperature else 1.0
    options: dict[str, Any] = {"rule": rule, "temperature": temperature, "factor": factor}
    return Objective(
        divergence=f_divergence("jeffreys"), cross_entropy=cross_entropy, row_term=partial(_by_label, **options),
        truncated_row_term=partial(_truncated_by_label, **options),
    )  # fmt: skip


def _by_label(
    teacher: Tensor, student: Tensor, labels: Tensor, *, rule: GateRule, temperature: float, factor: float
) -> Tensor:
    return factor * balanced_rows(teacher, student, rule, temperature=temperature, labels=labels)


def _truncated_by_label(
    target: TeacherOutput, student: Tensor, labels: Tensor, *, rule: GateRule, temperature: float, factor: float
) -> Tensor:
    log_q = (student / temperature).log_softmax(-1)
    return factor * truncated_balanced_kl(target, log_q, rule, labels=labels)
