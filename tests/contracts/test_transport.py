"""What every transport loss on logits obeys, law by law, and for each law a wrong loss that it rejects.

A loss is (teacher [n, V], student [n, V], mask=None) -> scalar, a sum over rows. The table says which laws need what.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kullback.distill.sinkd import sinkd_loss


@dataclass(frozen=True)
class Row:
    """A loss; whether it is zero for equal outputs, whether it adds up over rows, whether it sees their order."""

    loss: Callable
    zero_for_equal: bool = True
    additive: bool = False
    sees_order: bool = False


exact = partial(sinkd_loss, n_iters=2000)
TABLE = {
    "batchwise sharp": Row(exact, zero_for_equal=False),
    "batchwise entropic": Row(partial(exact, estimator="entropic"), zero_for_equal=False),
    "batchwise debiased": Row(partial(exact, estimator="debiased")),
    "batchwise debiased, squared": Row(partial(exact, estimator="debiased", cost="squared")),
    "samplewise sharp": Row(partial(exact, mode="samplewise"), zero_for_equal=False, additive=True, sees_order=True),
    "samplewise debiased": Row(partial(exact, mode="samplewise", estimator="debiased"), additive=True, sees_order=True),
}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def law_not_negative(row, teacher, student, generator):
    assert row.loss(teacher, student).item() > 1e-6


def law_zero_for_equal(row, teacher, student, generator):
    value = abs(row.loss(teacher, teacher).item())
    assert value < 1e-9 if row.zero_for_equal else value > 1e-6


def law_shift(row, teacher, student, generator):
    shift = torch.randn(len(student), 1, generator=generator, dtype=student.dtype)
    close(row.loss(teacher + shift, student - 2 * shift), row.loss(teacher, student))


def law_names_of_classes(row, teacher, student, generator):
    order = torch.randperm(student.shape[1], generator=generator)
    close(row.loss(teacher[:, order], student[:, order]), row.loss(teacher, student))


def law_order_of_samples(row, teacher, student, generator):
    order = torch.arange(len(student)).roll(1)
    close(row.loss(teacher[order], student[order]), row.loss(teacher, student))
    change = (row.loss(teacher, student[order]) - row.loss(teacher, student)).abs().item()
    assert change > 1e-6 if row.sees_order else change < 1e-9


def law_mask(row, teacher, student, generator):
    mask = torch.arange(len(student)) % 3 != 1
    close(row.loss(teacher, student, mask=mask), row.loss(teacher[mask], student[mask]))


def law_split(row, teacher, student, generator):
    parts = row.loss(teacher[:3], student[:3]) + row.loss(teacher[3:], student[3:])
    difference = (parts - row.loss(teacher, student)).abs().item()
    assert difference < 1e-9 if row.additive else difference > 1e-6


def law_teacher_is_constant(row, teacher, student, generator):
    teacher, student = teacher.requires_grad_(), student.requires_grad_()
    row.loss(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 1e-6


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


def outputs(generator):
    return torch.randn(2, 7, 5, generator=generator, dtype=torch.float64).mul(2).unbind()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_law(name, law, generator):
    LAWS[law](TABLE[name], *outputs(generator), generator)


debiased, samples = TABLE["batchwise debiased"].loss, TABLE["samplewise debiased"].loss
WRONG = [
    ("not_negative", Row(lambda t, s, mask=None: -debiased(t, s))),
    ("zero_for_equal", Row(exact)),
    ("shift", Row(lambda t, s, mask=None: exact(t, s, tau=None, estimator="debiased"))),
    ("names_of_classes", Row(lambda t, s, mask=None: samples(t.cumsum(-1), s.cumsum(-1)))),
    ("order_of_samples", Row(samples)),
    ("order_of_samples", Row(debiased, sees_order=True)),
    ("mask", Row(lambda t, s, mask=None: debiased(t, s))),
    (
        "mask",
        Row(lambda t, s, mask=None: debiased(t, s) if mask is None else debiased(t * mask[:, None], s * mask[:, None])),
    ),
    ("split", Row(partial(samples, reduction="mean"), additive=True)),
    ("split", Row(debiased, additive=True)),
    ("teacher_is_constant", Row(lambda t, s, mask=None: debiased(t, s) + debiased(s, t))),
]


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    with pytest.raises(AssertionError):
        LAWS[law](wrong, *outputs(generator), generator)


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)
