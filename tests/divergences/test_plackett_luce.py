"""Plackett-Luce rankings and losses: closed values, enumeration, a naive twin, laws, and wrong losses rejected."""

import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import plackett_luce as pl

F64 = torch.float64
SCORES, TEACHER = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=F64), torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=F64)
LABEL = torch.tensor(1)


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.fixture
def rows(generator):
    """Teacher and student logits [6, 7] and labels [6]."""
    teacher, student = 2 * torch.randn(2, 6, 7, generator=generator, dtype=F64)
    return teacher, student, torch.randint(7, (6,), generator=generator)


def naive(teacher, student, labels, *, reverse=False, by_teacher_alone=False, tempered=False, divide=False):
    """The loss [N] by a loop that autograd can differentiate twice; every option makes it wrong."""
    values = []
    for t, s, y in zip(teacher, student, labels.tolist()):
        order = sorted(range(len(t)), key=lambda i: (not by_teacher_alone and i != y, -float(t[i]), i))
        order = order[::-1] if reverse else order
        alpha, s = t.softmax(-1), s / 2 if tempered else s
        terms = [alpha[c] * (s[order[k:]].logsumexp(-1) - s[c]) for k, c in enumerate(order)]
        values.append(sum(terms) / (len(t) if divide else 1))
    return torch.stack(values)


def check_loss(loss, teacher, student, labels):
    """Values and gradients are those of the naive loop."""
    student = student.clone().requires_grad_()
    found, wanted = loss(teacher, student, labels), naive(teacher, student, labels)
    close(found, wanted)
    close(*(torch.autograd.grad(value.sum(), student)[0] for value in (found, wanted)))


# --- values and twins


def test_the_values_of_the_card():
    student = SCORES.clone().requires_grad_()
    loss = pl.pld_loss(TEACHER, student, LABEL)
    loss.backward()
    order, weights = pl.ranking_of(TEACHER, LABEL)
    assert order.tolist() == [1, 0, 2, 3]
    close(weights, torch.tensor([0.2369, 0.6439, 0.0871, 0.0321], dtype=F64), 5e-5)
    close(student.grad, torch.tensor([-0.1620, -0.1956, -0.0060, 0.3636], dtype=F64), 5e-5)
    assert loss.item() == pytest.approx(0.9193449519, abs=1e-10)
    assert pl.pld_loss(TEACHER, SCORES, LABEL, temperature=2.0).item() == pytest.approx(1.0194209059, abs=1e-10)


def test_cross_entropy_and_listmle_are_choices_of_weights():
    assert pl.pld_loss(TEACHER, SCORES, LABEL, weights="ce").item() == pytest.approx(1.7465672692, abs=1e-10)
    assert 4 * pl.pld_loss(TEACHER, SCORES, LABEL, weights="uniform").item() == pytest.approx(4.0029374668, abs=1e-10)
    assert pl.listmle_loss(TEACHER, SCORES, LABEL).item() == pytest.approx(4.0029374668, abs=1e-10)
    whole = pl.ranking_of(TEACHER, LABEL, weights="position").weights
    close(whole, torch.tensor([7.0, 3.0, 1.0, 0.0], dtype=F64) / 11)
    q = TEACHER.softmax(-1)[[1, 0, 2, 3]]
    rest = q / q.flip(0).cumsum(0).flip(0)
    close(pl.ranking_of(TEACHER, LABEL, weights="position_teacher").weights, rest)
    close(pl.ranking_of(TEACHER, LABEL, weights="position_teacher", topk=2).weights, rest[:2])
    one = torch.zeros(1, 1)
    for weights in ("teacher", "uniform", "ce", "position", "position_teacher"):
        assert pl.pld_loss(one, one, torch.tensor([0]), weights=weights).item() == 0.0


def test_equals_the_naive_loop(rows):
    check_loss(partial(pl.pld_loss, reduction="none"), *rows)
    teacher, student, labels = rows
    check_loss(partial(pl.pld_loss, reduction="none"), teacher, 60 * student, labels)  # the branch in log space


@pytest.mark.parametrize("option", ["reverse", "by_teacher_alone", "tempered", "divide"])
def test_the_check_rejects_wrong_losses(option, rows):
    with pytest.raises(AssertionError):
        check_loss(partial(naive, **{option: True}), *rows)


def test_many_classes_and_large_scores(generator):
    teacher, student = torch.randn(2, 1000, generator=generator, dtype=F64)
    label = torch.tensor(500)
    for scale in (1.0, 1e4):
        scores, order = (scale * student).numpy(), pl.teacher_optimal_permutation(teacher, label).numpy()
        alpha, left, total = teacher.softmax(-1).numpy(), -math.inf, 0.0
        for c in order[::-1]:
            left = np.logaddexp(left, scores[c])
            total += alpha[c] * (left - scores[c])
        found = pl.pld_loss(teacher, scale * student, label)
        assert found.item() == pytest.approx(total, rel=1e-12)
        single = pl.pld_loss(teacher.float(), (scale * student).float(), label)
        assert single.item() == pytest.approx(total, rel=2e-5)
    overflowing = (1e4 * student).exp().flip(-1).cumsum(-1).log()
    assert not overflowing.isfinite().all()


def test_two_classes():
    teacher, student = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.2, 0.9], dtype=F64)
    close(pl.pld_loss(teacher, student, torch.tensor(0)), teacher.softmax(-1)[0] * F.softplus(student[1] - student[0]))


def test_truncation_ends_in_cross_entropy_and_in_the_whole(rows):
    teacher, student, labels = rows
    loss = partial(pl.pld_loss, *rows, reduction="none")
    close(loss(topk=7), loss())
    close(loss(topk=99), loss())
    alpha = teacher.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    close(loss(topk=1), alpha * F.cross_entropy(student, labels, reduction="none"))
    for scale in (1.0, 60.0):
        scores = (scale * student).requires_grad_()
        order, weights = pl.ranking_of(teacher, labels)
        masked = weights.clone()
        masked[:, 3:] = 0
        by_topk, by_weights = pl.pld_loss(teacher, scores, labels, topk=3), pl.listwise_loss(scores, order, masked)
        close(by_topk, by_weights.mean())
        close(*(torch.autograd.grad(value, scores)[0] for value in (by_topk, by_weights.mean())))


# --- the distribution


@pytest.mark.parametrize("classes", [4, 5])
def test_rankings_have_probabilities(classes, generator):
    scores = 2 * torch.randn(classes, generator=generator, dtype=F64)
    every = torch.tensor(list(permutations(range(classes))))
    log_p = pl.pl_log_prob(scores.expand(len(every), -1), every)
    close(log_p.exp().sum(), torch.ones((), dtype=F64))
    begins = (every[:, :2] == every[0, :2]).all(-1)
    close(log_p[begins].logsumexp(-1), pl.pl_topk_log_prob(scores, every[0, :2]))


def test_samples_follow_it(generator):
    scores = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=F64)
    drawn = pl.pl_sample(scores, 20_000, generator)
    every = torch.tensor(list(permutations(range(4))))
    expected = 20_000 * pl.pl_log_prob(scores.expand(24, -1), every).exp()
    base = torch.tensor([64, 16, 4, 1])
    counts = ((drawn * base).sum(-1).unsqueeze(-1) == (every * base).sum(-1)).sum(0)
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 23 + 6 * math.sqrt(2 * 23)
    first = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    p = scores.softmax(-1)
    assert ((first - p).abs() < 6 * (p * (1 - p) / 20_000).sqrt()).all()


def test_ties_share_their_denominator(generator):
    scores = torch.randn(3, 5, generator=generator, dtype=F64)
    order = torch.tensor([[2, 0, 4, 1, 3]]).expand(3, -1)
    close(pl.pl_tied_log_prob(scores, order.argsort(-1)), pl.pl_log_prob(scores, order))
    tied = pl.pl_tied_log_prob(scores, torch.tensor([[0, 1, 0, 1, 1]]).expand(3, -1))
    rest = scores[:, [1, 3, 4]].logsumexp(-1)
    close(tied, scores.sum(-1) - 2 * scores.logsumexp(-1) - 3 * rest)


# --- laws


def test_gradcheck_and_components_that_cancel(rows):
    teacher, student, labels = rows
    for topk in (None, 3):
        for scale in (1.0, 40.0):
            scores = (scale * student).requires_grad_()
            loss = partial(pl.pld_loss, teacher, labels=labels, topk=topk, reduction="none")
            assert torch.autograd.gradcheck(loss, (scores,))
            (gradient,) = torch.autograd.grad(loss(scores).sum(), scores)
            close(gradient.sum(-1), torch.zeros(6, dtype=F64))


def test_convex(rows):
    teacher, student, labels = rows
    for t, s, y in zip(teacher, student, labels):
        hessian = torch.autograd.functional.hessian(lambda x, t=t, y=y: naive(t[None], x[None], y[None])[0], s)
        assert torch.linalg.eigvalsh(hessian).min() >= -1e-10
        between = pl.pld_loss(t, (s + t) / 2, y)
        assert between <= (pl.pld_loss(t, s, y) + pl.pld_loss(t, t, y)) / 2


def test_shifts_relabelling_and_monotone_transforms(rows, generator):
    teacher, student, labels = rows
    loss = partial(pl.pld_loss, reduction="none")
    close(loss(teacher + 3.0, student - 7.0, labels), loss(*rows))
    renamed = torch.randperm(7, generator=generator)
    close(loss(teacher[:, renamed], student[:, renamed], renamed.argsort()[labels]), loss(*rows))
    first, second = pl.ranking_of(teacher, labels), pl.ranking_of(teacher.exp(), labels)
    assert torch.equal(first.order, second.order)
    assert not torch.allclose(first.weights, second.weights)


def test_the_label_comes_first_and_ties_go_by_class():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0, -0.0, 1.0]])
    for dtype in (torch.float32, F64, torch.bfloat16):
        order = pl.teacher_optimal_permutation(logits.to(dtype), torch.tensor([4]))
        assert order.tolist() == [[4, 0, 1, 2, 5, 3]]
        assert pl.teacher_optimal_permutation(logits.to(dtype), torch.tensor([4]), 3).tolist() == [[4, 0, 1]]


def test_both_sorts_agree(generator):
    logits = torch.randn(300, 700, generator=generator)
    logits[:, ::7] = logits[:, 1:2]
    labels = torch.randint(700, (300,), generator=generator)
    single = pl.teacher_optimal_permutation(logits, labels)
    assert torch.equal(single, pl.teacher_optimal_permutation(logits.double(), labels))
    assert torch.equal(single[:, :20], pl.teacher_optimal_permutation(logits, labels, 20))


def test_rows_that_do_not_count_are_not_looked_at(rows):
    teacher, student, labels = rows
    kept = torch.tensor([True, False, True, True, False, True])
    clean = pl.pld_loss(teacher[kept], student[kept], labels[kept])
    teacher[~kept], student[~kept], labels[~kept] = math.nan, math.nan, -100
    close(pl.pld_loss(teacher, student, labels), clean)
    close(pl.pld_loss(teacher, student, labels, reduction="sum"), 4 * clean)
    close(pl.pld_loss(teacher, student, labels, count=8), clean / 2)
    single = pl.pld_loss(teacher, student.requires_grad_(), labels, reduction="none")
    assert single[~kept].eq(0).all()
    assert torch.autograd.grad(single.sum(), student)[0][~kept].eq(0).all()
    assert pl.pld_loss(teacher, student, torch.full((6,), -100)).item() == 0.0
    positions = [x.reshape(2, 3, *x.shape[1:]) for x in (teacher, student, labels)]
    close(pl.pld_loss(*positions, reduction="none"), single.reshape(2, 3))


def test_classes_out_of_the_list():
    out = torch.tensor([0.0, 0.0, -math.inf, 0.0], dtype=F64)
    left = [0, 1, 3]
    for weights in ("teacher", torch.ones(4, dtype=F64)):
        shorter = weights if isinstance(weights, str) else weights[:3]
        found = pl.pld_loss(TEACHER + out, SCORES + out, LABEL, weights=weights)
        close(found, pl.pld_loss(TEACHER[left], SCORES[left], LABEL, weights=shorter))
    assert pl.pld_loss(TEACHER, SCORES + out, LABEL).item() == math.inf
    assert pl.pld_loss(TEACHER + out, SCORES, LABEL).isfinite()
    assert pl.pld_loss(TEACHER, SCORES * math.nan, LABEL).isnan()


def test_halves_are_widened(rows):
    teacher, student, labels = (x.to(torch.bfloat16) if x.is_floating_point() else x for x in rows)
    found = pl.pld_loss(teacher, student, labels)
    assert found.dtype == torch.float32
    close(found.double(), pl.pld_loss(teacher.double(), student.double(), labels), 1e-5)


@pytest.mark.parametrize(
    ("error", "arguments", "options"),
    [
        (ShapeError, (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)), {}),
        (ShapeError, (torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)), {}),
        (ShapeError, (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), {}),
        (ShapeError, (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)), {}),
        (DataError, (torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([3])), {}),
        (DataError, (torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([-1])), {}),
        (DataError, (torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2), torch.tensor([0])), {}),
        (DataError, (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])), {"weights": torch.tensor([1.0, -1.0])}),
        (ShapeError, (torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0])), {"weights": torch.ones(2)}),
        (ConfigError, (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])), {"weights": "listmle"}),
        (ConfigError, (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])), {"temperature": 0.0}),
        (ConfigError, (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])), {"topk": 0}),
        (ConfigError, (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])), {"reduction": "batchmean"}),
    ],
)
def test_bad_input(error, arguments, options):
    with pytest.raises(error):
        pl.pld_loss(*arguments, **options)
