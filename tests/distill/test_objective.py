"""The objective: the same number and gradients from hidden states, from logits, and from its written definition."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.types import TeacherOutput
from kullback.distill.objective import Objective
from kullback.distill.sinkd import sinkd_loss
from kullback.distill.top_k import keep_top
from kullback.divergences import jsd, kl, reverse_kl

B, T, H, V = 3, 5, 8, 11


@pytest.fixture
def parts(generator):
    """Teacher and student states with their heads, and labels of which some do not count."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 2] = labels[2, 1:4] = -100
    return {"teacher": normal(B, T, H + 1), "head": normal(V, H + 1), "student": normal(B, T, H),
            "weight": normal(V, H), "bias": normal(V), "labels": labels}  # fmt: skip


def definition(objective, parts, student_logits, count=None):
    """(1 - c) D(p || q) + c CE, one prediction at a time."""
    teacher_logits = parts["teacher"] @ parts["head"].T
    total, number, t = 0.0, 0, objective.temperature
    for b in range(B):
        for position in range(T - 1):
            label = parts["labels"][b, position + 1]
            if label == -100:
                continue
            log_p = (teacher_logits[b, position] / t).log_softmax(-1)
            log_q = (student_logits[b, position] / t).log_softmax(-1)
            soft = objective.divergence(log_p, log_q) * (t**2 if objective.squared_temperature else 1)
            hard = -student_logits[b, position].log_softmax(-1)[label]
            total = total + (1 - objective.cross_entropy) * soft + objective.cross_entropy * hard
            number += 1
    return total / (count or number)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


OBJECTIVES = {
    "kl": Objective(divergence=kl),
    "mixed": Objective(divergence=jsd, cross_entropy=0.3),
    "tempered": Objective(divergence=reverse_kl, cross_entropy=0.5, temperature=3.0),
    "tempered, squared": Objective(divergence=kl, cross_entropy=0.1, temperature=2.0, squared_temperature=True),
    "cross-entropy": Objective(divergence=kl, cross_entropy=1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("count", [None, 40])
def test_every_way_in_gives_the_definition(parts, name, count):
    objective = OBJECTIVES[name]
    student, weight, bias = (parts[key].clone().requires_grad_() for key in ("student", "weight", "bias"))
    expected = definition(objective, parts, student @ weight.T + bias, count)
    wanted = gradients(expected, student, weight, bias)
    hidden = TeacherOutput(hidden=parts["teacher"], weight=parts["head"])
    whole = TeacherOutput(logits=parts["teacher"] @ parts["head"].T)
    for target in (hidden, whole):
        from_hidden = objective.loss(target, student, parts["labels"], weight=weight, bias=bias, count=count)
        from_logits = objective.loss(target, student @ weight.T + bias, parts["labels"], count=count)
        for loss in (from_hidden, from_logits):
            torch.testing.assert_close(loss, expected)
            for found, right in zip(gradients(loss, student, weight, bias), wanted, strict=True):
                torch.testing.assert_close(found, right)


def test_a_wrong_objective_is_seen(parts):
    """The definition tells these apart, each a mistake that code of this kind has had."""
    objective = OBJECTIVES["tempered, squared"]
    logits = parts["student"] @ parts["weight"].T + parts["bias"]
    right = definition(objective, parts, logits)
    swapped = replace(objective, divergence=lambda p, q: kl(q, p))
    for wrong in (swapped, replace(objective, squared_temperature=False), replace(objective, temperature=1.0)):
        assert abs(definition(wrong, parts, logits) - right) > 1e-3
    unmasked = {**parts, "labels": parts["labels"].clamp(min=0)}
    assert abs(definition(objective, unmasked, logits) - right) > 1e-3


def test_micro_batches_add_up_to_the_whole_batch(parts):
    objective, count = OBJECTIVES["mixed"], 9
    student = parts["student"] @ parts["weight"].T
    target = TeacherOutput(logits=parts["teacher"] @ parts["head"].T)
    whole = objective.loss(target, student, parts["labels"], count=count)
    split = [
        objective.loss(
            TeacherOutput(hidden=parts["teacher"][b : b + 1], weight=parts["head"]),
            student[b : b + 1], parts["labels"][b : b + 1], count=count,
        )
        for b in range(B)
    ]  # fmt: skip
    torch.testing.assert_close(sum(split), whole)


def test_a_truncated_teacher_that_keeps_all_but_one_token_is_the_whole_one(parts):
    objective = OBJECTIVES["mixed"]
    logits = parts["teacher"] @ parts["head"].T
    ids, top, tail = keep_top(logits.log_softmax(-1), V - 1)
    truncated = TeacherOutput(top_ids=ids, top_log_probs=top, tail_log_prob=tail)
    arguments = {"weight": parts["weight"], "bias": parts["bias"]}
    found = objective.loss(truncated, parts["student"], parts["labels"], **arguments)
    expected = objective.loss(TeacherOutput(logits=logits), parts["student"], parts["labels"], **arguments)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("from_hidden", [True, False])
def test_the_batch_term_is_weighted_and_counts_its_rows(parts, from_hidden):
    term = partial(sinkd_loss, reduction="mean")
    objective = Objective(divergence=kl, batch_term=term, batch_weight=0.8)
    target = TeacherOutput(hidden=parts["teacher"], weight=parts["head"])
    weight = parts["weight"].clone().requires_grad_()
    student = parts["student"] if from_hidden else parts["student"] @ weight.T
    loss = objective.loss(target, student, parts["labels"], weight=weight if from_hidden else None, count=16)
    kept = parts["labels"][:, 1:].flatten() != -100
    rows = [(h[:, :-1].flatten(0, 1) @ w.T)[kept] for h, w in
            ((parts["teacher"], parts["head"]), (parts["student"], weight))]  # fmt: skip
    plain = Objective(divergence=kl).loss(target, parts["student"], parts["labels"], weight=weight, count=16)
    expected = plain + 0.8 * term(*rows) * kept.sum() / 16
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, weight), gradients(expected, weight))


def test_the_batch_term_takes_a_few_rows_of_many(parts, generator):
    seen = []

    def term(teacher, student):
        seen.append((len(teacher), len(student)))
        return student.sum() * 0

    objective = Objective(divergence=kl, batch_term=term, batch_weight=1.0, batch_rows=4)
    target = TeacherOutput(logits=parts["teacher"] @ parts["head"].T)
    objective.loss(target, parts["student"], parts["labels"], weight=parts["weight"], generator=generator)
    assert seen == [(4, 4)]


def test_nothing_counted_gives_zero_and_a_live_gradient(parts):
    student = parts["student"].requires_grad_()
    labels = torch.full((B, T), -100)
    for objective in OBJECTIVES.values():
        loss = objective.loss(
            TeacherOutput(hidden=parts["teacher"], weight=parts["head"]), student, labels, weight=parts["weight"]
        )
        assert loss == 0.0
        assert torch.equal(gradients(loss, student)[0], torch.zeros_like(student))


def test_bfloat16_is_compared_in_float32(parts):
    objective = OBJECTIVES["mixed"]
    low = {key: value.bfloat16() if value.is_floating_point() else value for key, value in parts.items()}
    target = TeacherOutput(hidden=low["teacher"], weight=low["head"])
    loss = objective.loss(target, low["student"], low["labels"], weight=low["weight"])
    assert loss.dtype == torch.float32
    wide = definition(objective, parts, parts["student"] @ parts["weight"].T)
    assert math.isclose(loss.item(), wide.item(), rel_tol=0.02)


def test_what_cannot_be_is_said(parts):
    labels, weight = parts["labels"], parts["weight"]
    with pytest.raises(ConfigError, match=r"\[0, 1\], got 1.5"):
        Objective(divergence=kl, cross_entropy=1.5)
    with pytest.raises(ConfigError, match="temperature must be positive and finite"):
        Objective(divergence=kl, temperature=0.0)
    with pytest.raises(ConfigError, match="needs a teacher"):
        Objective(divergence=kl).loss(None, parts["student"], labels, weight=weight)
    with pytest.raises(ShapeError, match=r"labels have shape \(3, 5\)"):
        Objective(divergence=kl).loss(TeacherOutput(logits=torch.zeros(3, 4, V)), parts["student"], labels)
    with pytest.raises(ConfigError, match="on-policy steps need a divergence"):
        OBJECTIVES["cross-entropy"].on_own_samples()
    top = keep_top(torch.zeros(B, T, V).log_softmax(-1), 3)
    truncated = TeacherOutput(top_ids=top[0], top_log_probs=top[1], tail_log_prob=top[2])
    with pytest.raises(ConfigError, match="truncated"):
        Objective(divergence=kl, batch_term=sinkd_loss, batch_weight=1.0).loss(
            truncated, parts["student"], labels, weight=weight
        )
