"""PLD from a teacher's likeliest tokens and the label's probability: the loss of the live teacher, not one like it."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import TeacherOutput
from kullback.distill.objective import Objective
from kullback.distill.pld import pld_objective, truncated_pld_loss
from kullback.distill.top_k import keep_top
from kullback.divergences import kl
from kullback.divergences.plackett_luce import pld_loss, ranking_of_top

N, V, F64 = 40, 11, torch.float64
WEIGHTS = ("teacher", "uniform", "ce", "position", "position_teacher")


@pytest.fixture
def rows(generator):
    """Teacher and student logits [N, V] and labels [N], of which some are likely and some are not."""
    teacher, student = 2 * torch.randn(2, N, V, generator=generator, dtype=F64)
    return teacher, student, torch.randint(V, (N,), generator=generator)


def truncated(teacher, labels, kept, temperature=1.0):
    log_p = (teacher / temperature).log_softmax(-1)
    if kept == V:
        top, tail = log_p.sort(dim=-1, descending=True, stable=True), torch.full(labels.shape, -math.inf, dtype=F64)
        ids, top = top.indices, top.values
    else:
        ids, top, tail = keep_top(log_p, kept)
    label = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return TeacherOutput(top_ids=ids, top_log_probs=top, tail_log_prob=tail, label_log_probs=label)


def gap(found, wanted, student):
    """The largest difference in value and in gradient."""
    slopes = (torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (found, wanted))
    return float(torch.stack([(found - wanted).abs().max(), (next(slopes) - next(slopes)).abs().max()]).max().detach())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("kept", "topk"), [(1, 1), (4, 1), (4, 3), (4, 4), (V - 1, 4), (V - 1, V - 1), (V, V)])
def test_as_many_picks_as_tokens_kept_lose_nothing(rows, weights, kept, topk):
    teacher, student, labels = rows
    student.requires_grad_()
    target = truncated(teacher, labels, kept, 2.0)
    inside = (target.top_ids == labels.unsqueeze(-1)).any(-1)
    assert kept >= V - 1 or 0 < int(inside.sum()) < N, "labels both in and out of the tokens kept"
    found = truncated_pld_loss(target, student, labels, weights=weights, topk=topk)
    options = {"weights": weights, "temperature": 2.0, "reduction": "none"}
    assert gap(found, pld_loss(teacher, student, labels, topk=topk, **options), student) < 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kept", [V - 1, V])
def test_all_tokens_kept_or_all_but_one_are_the_whole_loss(rows, weights, kept):
    teacher, student, labels = rows
    student.requires_grad_()
    found = truncated_pld_loss(truncated(teacher, labels, kept), student, labels, weights=weights)
    assert gap(found, pld_loss(teacher, student, labels, weights=weights, reduction="none"), student) < 1e-12


def test_what_the_tail_takes_is_never_negative_and_falls_with_the_tokens_kept(rows):
    teacher, student, labels = rows
    whole = pld_loss(teacher, student, labels, reduction="none")
    lost = torch.stack([
        whole - truncated_pld_loss(truncated(teacher, labels, kept), student, labels) for kept in range(1, V)
    ])  # fmt: skip
    assert lost.min() > -1e-12
    assert (lost[1:] <= lost[:-1] + 1e-12).all()
    assert lost[0].min() > 1e-3


def test_the_check_tells_wrong_ones(rows):
    """A label that is ranked by the teacher, one that is picked twice, and one whose weight is that of the tail."""
    teacher, student, labels = rows
    student.requires_grad_()
    right, target = pld_loss(teacher, student, labels, topk=4, reduction="none"), truncated(teacher, labels, 4)
    first = truncated_pld_loss(target, student, target.top_ids[:, 0])
    twice = torch.cat([labels.unsqueeze(-1), target.top_ids], -1)[:, :4] == target.top_ids
    tail = truncated_pld_loss(target._replace(label_log_probs=target.tail_log_prob), student, labels)
    assert gap(first, right, student) > 0.1
    assert not twice.all()
    assert gap(tail, right, student) > 0.1


def test_halves_come_close_and_sum_to_one_again(rows):
    teacher, student, labels = rows
    target = truncated(teacher, labels, V - 1)
    low = target._replace(**{
        name: getattr(target, name).half() for name in ("top_log_probs", "tail_log_prob", "label_log_probs")
    })  # fmt: skip
    wanted = pld_loss(teacher, student, labels, reduction="none")
    torch.testing.assert_close(truncated_pld_loss(low, student, labels), wanted, rtol=4e-3, atol=0)


def test_a_class_that_the_teacher_rules_out_weighs_nothing(rows):
    teacher, student, labels = rows
    teacher = teacher.scatter(-1, labels.unsqueeze(-1), -math.inf)
    found = truncated_pld_loss(truncated(teacher, labels, 4), student, labels)
    torch.testing.assert_close(found, pld_loss(teacher, student, labels, topk=4, reduction="none"))


@pytest.mark.parametrize("kept", [3, V - 1])
@pytest.mark.parametrize("head", [True, False])
def test_an_objective_takes_the_truncated_teacher_for_the_live_one(generator, kept, head):
    logits = torch.randn(2, 6, V, generator=generator, dtype=F64)
    states = torch.randn(2, 6, 7, generator=generator, dtype=F64)
    weight = torch.randn(V, 7, generator=generator, dtype=F64)
    ids = torch.randint(V, (2, 6), generator=generator)
    labels = ids.clone()
    labels[1, 2:4] = -100
    target = truncated(logits, ids.roll(-1, -1), kept)
    given = {"weight": weight} if head else {}
    student = states if head else states @ weight.T
    for options in ({"topk": 3}, {"topk": 3, "cross_entropy": 0.3, "weights": "uniform"}):
        objective = pld_objective(**options)
        assert not objective.needs_whole_teacher
        assert objective.needs_labels
        expected = objective.loss(TeacherOutput(logits=logits), student, labels, **given)
        torch.testing.assert_close(objective.loss(target, student, labels, **given), expected, rtol=0, atol=1e-12)
    at_most = pld_objective(topk=500).loss(target, student, labels, **given)
    expected = pld_objective(topk=kept).loss(TeacherOutput(logits=logits), student, labels, **given)
    torch.testing.assert_close(at_most, expected, rtol=0, atol=1e-12)


def test_what_cannot_be_is_said(rows):
    teacher, student, labels = rows
    target = truncated(teacher, labels, 4)
    with pytest.raises(ConfigError, match="how probable the teacher finds the label"):
        truncated_pld_loss(target._replace(label_log_probs=None), student, labels)
    with pytest.raises(ConfigError, match="together"):
        truncated_pld_loss(TeacherOutput(), student, labels)
    with pytest.raises(ConfigError, match="weights are"):
        truncated_pld_loss(target, student, labels, weights="rising")
    with pytest.raises(DataError, match="labels must lie in"):
        truncated_pld_loss(target, student, labels + V)
    with pytest.raises(ConfigError, match="goes with the row_term"):
        Objective(divergence=kl, truncated_row_term=truncated_pld_loss)
    parts = (target.top_ids, target.top_log_probs, target.tail_log_prob, target.label_log_probs, labels)
    with pytest.raises(ConfigError, match="keeps 4 classes ranks from 1 to 4 of them, and topk is 5"):
        ranking_of_top(*parts, classes=V, topk=5)
    with pytest.raises(ShapeError, match="one label a row"):
        ranking_of_top(*parts[:4], labels[:-1], classes=V)
