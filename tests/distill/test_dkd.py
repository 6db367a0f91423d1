"""Decoupled distillation against its definition, and standardised logits."""

import pytest
import torch
import torch.nn.functional as F

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.distill import dkd_loss, standardised
from kullback.divergences import kl
from kullback.divergences.plackett_luce import ranking_of

F64 = torch.float64


@pytest.fixture
def rows(generator):
    """Teacher and student logits [2, 3, 7] and labels [2, 3]."""
    teacher, student = 2 * torch.randn(2, 2, 3, 7, generator=generator, dtype=F64)
    return teacher, student, torch.randint(7, (2, 3), generator=generator)


def naive(teacher, student, label, temperature, alpha, beta, *, keep_label=False):
    """One row by probabilities; keep_label: a wrong reading in which the label stays among the others."""
    p, q = (teacher / temperature).softmax(0), (student / temperature).softmax(0)
    other = torch.arange(len(p)) != label
    if keep_label:
        other = torch.ones_like(other)
    binary = sum(a * (a / b).log() for a, b in ((p[label], q[label]), (1 - p[label], 1 - q[label])))
    p, q = p[other] / p[other].sum(), q[other] / q[other].sum()
    return temperature**2 * (alpha * binary + beta * (p * (p / q).log()).sum())


@pytest.mark.parametrize("options", [(1.0, 1.0, 8.0), (4.0, 0.5, 2.0), (2.0, 0.0, 1.0)])
def test_equals_the_definition(rows, options):
    named = dict(zip(("temperature", "alpha", "beta"), options, strict=True))
    found = dkd_loss(*rows, **named, reduction="none")
    flat = list(zip(*(x.flatten(0, 1) for x in rows), strict=True))
    right = torch.stack([naive(*row, *options) for row in flat]).view(2, 3)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(dkd_loss(*rows, **named), right.mean())
    wrong = torch.stack([naive(*row, *options, keep_label=True) for row in flat]).view(2, 3)
    assert (found - wrong).abs().max() > 1e-2


def test_both_parts_make_up_the_divergence(rows):
    teacher, student, labels = rows
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    parts = [dkd_loss(*rows, temperature=1.0, alpha=alpha, beta=1 - alpha, reduction="none") for alpha in (1.0, 0.0)]
    rest = 1 - log_p.exp().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(parts[0] + rest * parts[1], kl(log_p, log_q))


def test_gradient_of_sure_networks_and_halves(rows):
    teacher, student, labels = rows
    assert torch.autograd.gradcheck(lambda s: dkd_loss(teacher, s, labels), student.requires_grad_())
    sure = (300 * F.one_hot(labels, 7)).double()
    value = dkd_loss(sure, sure.clone().requires_grad_(), labels, temperature=1.0)
    assert value.item() == 0.0
    assert dkd_loss(-sure, sure, labels, temperature=1.0).isfinite()
    assert dkd_loss(teacher.half(), student.half(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigError, "0 or more", {"beta": -1.0}),
        (ConfigError, "temperature", {"temperature": 0.0}),
        (ConfigError, "reduction", {"reduction": "sum"}),
        (DataError, "0..6", {"labels": torch.full((2, 3), 7)}),
        (ShapeError, "same shape", {"student_logits": torch.zeros(2, 3, 6)}),
        (ShapeError, "2 or more", {"teacher_logits": torch.zeros(2, 3, 1), "student_logits": torch.zeros(2, 3, 1)}),
    ],
)
def test_bad_input(rows, error, words, options):
    given = dict(zip(("teacher_logits", "student_logits", "labels"), rows, strict=True))
    with pytest.raises(error, match=words):
        dkd_loss(**{**given, **options})


def test_standardised_rows(rows):
    teacher, _, labels = rows
    found = standardised(teacher)
    centred = teacher - teacher.mean(-1, keepdim=True)
    torch.testing.assert_close(found, centred / teacher.std(-1, correction=0, keepdim=True))
    torch.testing.assert_close(standardised(3 * teacher + 5), found)  # blind to scale and shift
    assert not torch.allclose(teacher.std(-1), teacher.std(-1, correction=0))  # bites: the other deviation
    before, after = ranking_of(teacher, labels), ranking_of(found, labels)
    assert torch.equal(before.order, after.order)
    assert not torch.allclose(before.weights, after.weights)
    assert torch.autograd.gradcheck(standardised, teacher.requires_grad_())


def test_standardised_at_the_edges():
    equal = torch.ones(2, 3, requires_grad=True)
    assert standardised(equal).eq(0).all()
    assert torch.autograd.grad(standardised(equal).sum(), equal)[0].isfinite().all()
    assert standardised(torch.tensor([1.0, 3.0]).half()).dtype == torch.float32
    with pytest.raises(DataError, match="NaN or infinity"):
        standardised(torch.tensor([1.0, -torch.inf]))
    with pytest.raises(ShapeError, match="one class"):
        standardised(torch.zeros(2, 0))
