"""BD-KD: the card's numbers, closed gradients, limits, scipy as an oracle, and wrong gates that the checks reject."""

import math
from functools import partial

import pytest
import scipy.stats
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import TeacherOutput
from kullback.distill import balanced_kl, bdkd_loss, bdkd_objective, bdkd_teacher_loss, bdkd_weights
from kullback.distill.objective import Objective
from kullback.distill.top_k import keep_top
from kullback.divergences import from_logits, jeffreys, kl, reverse_kl

TEACHER = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.2, 0.1, 0.0, -0.1]], dtype=torch.float64)
STUDENT = torch.tensor([[0.5, 0.2, 0.1, 0.0], [2.0, 0.0, -1.0, -1.0]], dtype=torch.float64)
MODES = ("bdkd", "bdkd_inverse", "jeffreys", "reverse", "dml")


def logits(generator, *shape, scale=2.0):
    pair = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


def naive(teacher, student, *, delta=2.0, temperature=1.0):
    """The definition, for autograd: weights from entropies at temperature 1, KLs at the given one, mean times T^2."""
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
    gap = torch.distributions.Categorical(logits=student).entropy()
    gap = (gap - torch.distributions.Categorical(logits=teacher).entropy()).detach()
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    forward, reverse = torch.where(gap < 0, delta, 1.0) * forward, torch.where(gap > 0, delta, 1.0) * reverse
    return temperature**2 * (forward + reverse).mean()


# --- the card's numbers


def test_the_numbers_of_the_card():
    entropies = [torch.distributions.Categorical(logits=x).entropy().tolist() for x in (TEACHER, STUDENT)]
    assert entropies == [pytest.approx([0.9475, 1.3801], abs=1e-4), pytest.approx([1.3675, 0.6721], abs=1e-4)]
    weights = bdkd_weights(TEACHER, STUDENT)
    assert (weights.forward.tolist(), weights.reverse.tolist()) == ([1.0, 2.0], [2.0, 1.0])
    at_one = bdkd_loss(TEACHER, STUDENT, temperature=1.0)
    assert at_one["loss"].item() == pytest.approx(1.5094711, abs=5e-8)
    assert at_one["forward"].item() == pytest.approx((0.2789 + 0.7038) / 2, abs=1e-4)
    assert at_one["reverse"].item() == pytest.approx((0.3654 + 0.6016) / 2, abs=1e-4)
    assert at_one["reverse_share"].item() == 0.5
    at_four = bdkd_loss(TEACHER, STUDENT, temperature=4.0)
    assert at_four["loss"].item() == pytest.approx(1.6932521, abs=5e-8)
    assert at_four["distillation"].item() == pytest.approx(1.6932521 / 16, abs=5e-9)
    plain = bdkd_loss(TEACHER, STUDENT, temperature=4.0, squared_temperature=False)
    assert plain["loss"].item() == pytest.approx(1.6932521 / 16, abs=5e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, s: bdkd_loss(t, s, temperature=1.0, mode="jeffreys"),
        lambda t, s: bdkd_loss(t, s, temperature=1.0, mode="bdkd_inverse"),
        lambda t, s: bdkd_loss(t, s, temperature=1.0, delta=3.0),
        lambda t, s: bdkd_loss(t, s, temperature=1.0, gate_temperature=1e6, gate="label", labels=torch.zeros(2).long()),
    ],
)
def test_the_numbers_of_the_card_bite(wrong):
    assert wrong(TEACHER, STUDENT)["loss"].item() != pytest.approx(1.5094711, abs=1e-3)


def test_scipy_agrees_on_random_rows(generator):
    teacher, student = logits(generator, 20, 7)
    p, q = teacher.softmax(-1).numpy(), student.softmax(-1).numpy()
    forward, reverse = scipy.stats.entropy(p, q, axis=-1), scipy.stats.entropy(q, p, axis=-1)
    gap = scipy.stats.entropy(q, axis=-1) - scipy.stats.entropy(p, axis=-1)
    wanted = (1 + 0.5 * (gap < 0)) * forward + (1 + 0.5 * (gap > 0)) * reverse
    found = bdkd_loss(teacher, student, temperature=1.0, delta=1.5)
    assert found["loss"].item() == pytest.approx(wanted.mean(), abs=1e-12)
    assert found["forward"].item() == pytest.approx(forward.mean(), abs=1e-12)
    assert found["reverse"].item() == pytest.approx(reverse.mean(), abs=1e-12)


# --- gates


def test_delta_one_is_jeffreys_and_exchanging_networks_exchanges_the_weights(generator):
    teacher, student = logits(generator, 50, 6)
    found = bdkd_loss(teacher, student, delta=1.0, temperature=1.0)["loss"]
    assert found.item() == pytest.approx(from_logits(jeffreys, teacher, student).mean().item(), abs=1e-13)
    one, other = bdkd_weights(teacher, student, delta=3.0), bdkd_weights(student, teacher, delta=3.0)
    assert torch.equal(one.forward, other.reverse)
    assert torch.equal(one.reverse, other.forward)
    inverse = bdkd_weights(teacher, student, delta=3.0, mode="bdkd_inverse")
    assert torch.equal(inverse.forward, one.reverse)
    assert one.forward.sum() + one.reverse.sum() == 4.0 * 50
    assert 0 < (one.forward == 3.0).sum() < 50
    # so the value is symmetric: delta always favours the KL whose first argument is the less certain of the two
    ahead, back = bdkd_loss(teacher, student), bdkd_loss(student, teacher)
    assert ahead["loss"].item() == pytest.approx(back["loss"].item(), abs=1e-13)
    assert ahead["forward"].item() == pytest.approx(back["reverse"].item(), abs=1e-13)


def test_gates_compare_confidence_or_the_label_when_asked(generator):
    teacher, student = logits(generator, 200, 5)
    labels = torch.randint(0, 5, (200,), generator=generator)
    p, q = teacher.softmax(-1), student.softmax(-1)
    confident = bdkd_weights(teacher, student, gate="confidence").reverse == 2.0
    assert torch.equal(confident, p.amax(-1) > q.amax(-1))
    rows = torch.arange(200)
    right = bdkd_weights(teacher, student, labels, gate="label").reverse == 2.0
    assert torch.equal(right, p[rows, labels] > q[rows, labels])
    entropic = bdkd_weights(teacher, student).reverse == 2.0
    assert 0 < (confident ^ entropic).sum() < 100
    assert (right ^ entropic).any()
    value = bdkd_loss(teacher, student, labels, gate="label", temperature=1.0)
    by_hand = from_logits(kl, teacher, student) * torch.where(right, 1.0, 2.0)
    by_hand = by_hand + from_logits(reverse_kl, teacher, student) * torch.where(right, 2.0, 1.0)
    assert value["distillation"].item() == pytest.approx(by_hand.mean().item(), abs=1e-12)


def test_the_gate_has_a_temperature_of_its_own():
    # surer at temperature 1, less sure at temperature 8: one class apart from the others, against two levels
    teacher, student = torch.tensor([[4.0, 4.0, -20.0, -20.0]]).double(), torch.tensor([[3.5, 0.0, 0.0, 0.0]]).double()
    one, eight = (bdkd_weights(teacher, student, gate_temperature=t).reverse.item() for t in (1.0, 8.0))
    assert {one, eight} == {1.0, 2.0}
    losses = [bdkd_loss(teacher, student, temperature=8.0, gate_temperature=t) for t in (1.0, 8.0)]
    assert [loss["reverse_share"].item() for loss in losses] == [one - 1.0, eight - 1.0]


def test_the_soft_gate_reaches_the_hard_one_and_its_weights_add_up(generator):
    teacher, student = logits(generator, 50, 6)
    hard, soft = bdkd_weights(teacher, student), bdkd_weights(teacher, student, mode="bdkd_soft", width=1e-6)
    assert torch.allclose(torch.stack(hard), torch.stack(soft), atol=1e-9)
    wide = bdkd_weights(teacher, student, mode="bdkd_soft", width=0.7, delta=2.5)
    gap = torch.distributions.Categorical(logits=student).entropy()
    gap = gap - torch.distributions.Categorical(logits=teacher).entropy()
    assert torch.allclose(wide.reverse, 1.0 + 1.5 * torch.sigmoid(gap / 0.7), atol=1e-12)
    assert torch.allclose(wide.forward + wide.reverse, torch.full_like(gap, 3.5), atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_at_a_power_is_the_loss(generator, temperature):
    """An Objective at a temperature with power equal to it has the loss and the gate of bdkd_loss."""
    teacher, student = logits(generator, 2, 5, 9)
    labels = torch.randint(0, 9, (2, 5), generator=generator)
    objective = Objective(
        divergence=partial(balanced_kl, delta=3.0, power=temperature), temperature=temperature, squared_temperature=True
    )
    wanted = bdkd_loss(teacher[:, :-1], student[:, :-1], delta=3.0, temperature=temperature)["loss"]
    found = objective.loss(TeacherOutput(logits=teacher), student, labels)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_the_objective_of_a_language_model(generator):
    teacher, student = logits(generator, 2, 5, 9)
    labels = torch.randint(0, 9, (2, 5), generator=generator)
    objective = bdkd_objective(delta=3.0, temperature=2.0, cross_entropy=0.4, squared_temperature=True)
    found = objective.loss(TeacherOutput(logits=teacher), student, labels)
    parts = bdkd_loss(teacher[:, :-1], student[:, :-1], labels[:, 1:], delta=3.0, temperature=2.0)
    wanted = 0.6 * 4.0 * parts["distillation"] + 0.4 * parts["cross_entropy"]
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert objective.on_own_samples().cross_entropy == 0.0
    log_p = teacher.log_softmax(-1)
    ids, top, tail = keep_top(log_p, 4)
    coarse = TeacherOutput(top_ids=ids, top_log_probs=top, tail_log_prob=tail)
    whole = bdkd_objective(cross_entropy=0.0).loss(TeacherOutput(logits=teacher), student, labels)
    assert 0.0 < bdkd_objective(cross_entropy=0.0).loss(coarse, student, labels).item() != whole.item()
    soft = bdkd_objective(mode="bdkd_soft", width=0.2, cross_entropy=0.0)
    assert soft.loss(TeacherOutput(logits=teacher), student, labels).item() != pytest.approx(whole.item(), rel=1e-6)
    for wrong in ({"delta": 0.0}, {"mode": "bdkd_soft"}, {"gate": "labels"}, {"gate_temperature": 0.0}, {"width": 1.0}):
        with pytest.raises(ConfigError):
            bdkd_objective(**wrong)


# --- gradients


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_closed_gradients(generator, temperature):
    teacher, student = logits(generator, 6, 5)
    for which in (0, 1):
        pair = [teacher.clone(), student.clone()]
        pair[which].requires_grad_()
        p, q = (x.detach().div(temperature).softmax(-1) for x in pair)
        forward, reverse = (p * (p / q).log()).sum(-1, keepdim=True), (q * (q / p).log()).sum(-1, keepdim=True)
        if which == 1:
            weights = [w.unsqueeze(-1) for w in bdkd_weights(teacher, student)]
            wanted = weights[0] * (q - p) + weights[1] * q * ((q / p).log() - reverse)
            loss = bdkd_loss(*pair, temperature=temperature)["loss"]
        else:
            wanted = p * ((p / q).log() - forward)
            loss = bdkd_teacher_loss(*pair, temperature=temperature)["loss"]
        (found,) = torch.autograd.grad(loss, pair[which])
        assert torch.allclose(found, temperature * wanted / 6, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_both_losses(generator, mode):
    teacher, student = logits(generator, 3, 4)
    labels = torch.tensor([1, 0, 3])
    of_student = partial(bdkd_loss, labels=labels, mode=mode, temperature=3.0, alpha=0.7)
    of_teacher = partial(bdkd_teacher_loss, labels=labels, mode=mode, temperature=3.0, alpha=0.7)
    assert torch.autograd.gradcheck(lambda s: of_student(teacher, s)["loss"], student.requires_grad_())
    assert torch.autograd.gradcheck(lambda t: of_teacher(t, student)["loss"], teacher.requires_grad_())


def test_no_gradient_reaches_the_other_party_nor_passes_the_gate(generator):
    teacher, student = (x.requires_grad_() for x in logits(generator, 6, 5))
    bdkd_loss(teacher, student)["loss"].backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    student.grad = None
    bdkd_teacher_loss(teacher, student)["loss"].backward()
    assert student.grad is None
    assert teacher.grad.abs().sum() > 0
    assert not any(w.requires_grad for w in bdkd_weights(teacher, student))
    parts = bdkd_loss(teacher, student)
    assert not any(parts[name].requires_grad for name in ("forward", "reverse", "reverse_share"))


def test_a_soft_gate_has_no_gradient_though_the_value_moves_with_it(generator):
    teacher, student = logits(generator, 6, 5)
    student.requires_grad_()
    options = {"mode": "bdkd_soft", "width": 0.3, "temperature": 1.0}
    (found,) = torch.autograd.grad(bdkd_loss(teacher, student, **options)["loss"], student)
    weights = bdkd_weights(teacher, student, mode="bdkd_soft", width=0.3)
    held = weights.forward * from_logits(kl, teacher, student)
    held = held + weights.reverse * from_logits(reverse_kl, teacher, student)
    (wanted,) = torch.autograd.grad(held.mean(), student)
    assert torch.allclose(found, wanted, atol=1e-13)


def test_fused_equals_the_definition_over_many_blocks(generator):
    teacher, student = logits(generator, 3, 700, 101)
    student.requires_grad_()
    mine, wanted = bdkd_loss(teacher, student, temperature=4.0)["loss"], naive(teacher, student, temperature=4.0)
    assert mine.item() == pytest.approx(wanted.item(), abs=1e-12)
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (mine, wanted))
    assert torch.allclose(one, other, atol=1e-14)
    halves = bdkd_loss(teacher.bfloat16(), student.detach().bfloat16(), temperature=4.0)["loss"]
    assert halves.dtype == torch.float32
    assert halves.item() == pytest.approx(wanted.item(), rel=1e-2)


def test_without_the_teachers_entropy_the_gradient_is_the_same(generator):
    teacher, student = logits(generator, 6, 5)
    student.requires_grad_()
    whole, part = (bdkd_loss(teacher, student, teacher_entropy=entropy) for entropy in (True, False))
    one, other = (torch.autograd.grad(x["loss"], student)[0] for x in (whole, part))
    assert torch.equal(one, other)
    p = (teacher / 2).softmax(-1)
    crossed = -(p * (student / 2).log_softmax(-1)).sum(-1)
    assert part["forward"].item() == pytest.approx(crossed.mean().item(), abs=1e-12)
    assert part["loss"] > whole["loss"]


# --- limits and invariances


def test_equal_networks_have_no_loss_no_gradient_and_equal_weights(generator):
    teacher, _ = logits(generator, 6, 5)
    student = teacher.clone().requires_grad_()
    weights = bdkd_weights(teacher, student)
    assert torch.equal(torch.stack(weights), torch.ones(2, 6, dtype=torch.float64))
    loss = bdkd_loss(teacher, student)["loss"]
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert gradient.abs().max().item() < 1e-15


def test_at_a_high_temperature_the_loss_is_the_centred_squared_distance(generator):
    teacher, student = logits(generator, 30, 6, scale=1.0)
    distance = (teacher - student) - (teacher - student).mean(-1, keepdim=True)
    wanted = distance.square().sum(-1).mean().item() * (1.0 + 2.0) / (2 * 6)
    found = bdkd_loss(teacher, student, temperature=1e4)
    assert found["loss"].item() == pytest.approx(wanted, rel=1e-3)
    assert (1e8 * found["forward"]).item() == pytest.approx((1e8 * found["reverse"]).item(), rel=1e-3)


def test_masked_rows_and_unlabelled_ones_change_nothing(generator):
    teacher, student = logits(generator, 4, 5, 6)
    labels = torch.randint(0, 6, (4, 5), generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    broken = student.masked_fill(~mask.unsqueeze(-1) & (torch.arange(6) < 3), -math.inf).requires_grad_()
    unlabelled = labels.masked_fill(torch.rand(4, 5, generator=generator) < 0.3, -100)
    kept = mask & (unlabelled != -100)
    found = bdkd_loss(teacher, broken, unlabelled, mask=mask)
    sliced = bdkd_loss(teacher[kept], student[kept], labels[kept])
    for name, value in sliced.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-12), name
    (gradient,) = torch.autograd.grad(found["loss"], broken)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).all()
    halves = [bdkd_loss(teacher[i], student[i], labels[i], mask=mask[i], count=mask.sum())["loss"] for i in range(4)]
    assert sum(halves).item() == pytest.approx(bdkd_loss(teacher, student, labels, mask=mask)["loss"].item(), abs=1e-12)


def test_shifts_and_the_order_of_classes_do_not_matter(generator):
    teacher, student = logits(generator, 8, 6)
    order = torch.randperm(6, generator=generator)
    wanted = bdkd_loss(teacher, student)["loss"].item()
    assert bdkd_loss(teacher[:, order], student[:, order])["loss"].item() == pytest.approx(wanted, abs=1e-13)
    assert bdkd_loss(teacher + 7.0, student - 3.0)["loss"].item() == pytest.approx(wanted, abs=1e-12)
    assert bdkd_loss(teacher[3], student[3])["loss"].ndim == 0


@pytest.mark.parametrize("mode", MODES)
def test_classes_that_neither_has_count_for_nothing(generator, mode):
    teacher, student = logits(generator, 8, 6)
    nothing = torch.full((8, 2), -math.inf, dtype=torch.float64)
    padded = (torch.cat([x, nothing], -1) for x in (teacher, student))
    wanted = bdkd_loss(teacher, student, mode=mode)["loss"].item()
    assert bdkd_loss(*padded, mode=mode)["loss"].item() == pytest.approx(wanted, abs=1e-13)
    hole = student.masked_fill(torch.arange(6) == 0, -math.inf)
    assert math.isinf(bdkd_loss(teacher, hole, mode=mode)["loss"].item()) == (mode != "reverse")
    hole = teacher.masked_fill(torch.arange(6) == 0, -math.inf)
    assert math.isinf(bdkd_loss(hole, student, mode=mode)["loss"].item()) == (mode != "dml")


def test_modes_without_a_gate(generator):
    teacher, student = logits(generator, 8, 6)
    for mode, divergence in (("dml", kl), ("reverse", reverse_kl), ("jeffreys", jeffreys)):
        found = bdkd_loss(teacher, student, mode=mode, temperature=1.0)["loss"].item()
        assert found == pytest.approx(from_logits(divergence, teacher, student).mean().item(), abs=1e-13)
    mutual = bdkd_teacher_loss(teacher, student, mode="dml", temperature=1.0)["loss"].item()
    assert mutual == pytest.approx(from_logits(kl, student, teacher).mean().item(), abs=1e-13)
    own = bdkd_teacher_loss(teacher, student, temperature=1.0)["loss"].item()
    assert own == pytest.approx(from_logits(kl, teacher, student).mean().item(), abs=1e-13)


# --- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bdkd_weights(TEACHER, STUDENT, delta=0.5), ConfigError, "at least 1"),
        (lambda: bdkd_weights(TEACHER, STUDENT[:, :3]), ShapeError, "same rows and classes"),
        (lambda: bdkd_weights(TEACHER, STUDENT, mode="kd"), ConfigError, "mode is one of"),
        (lambda: bdkd_weights(TEACHER, STUDENT, gate="margin"), ConfigError, "gate is one of"),
        (lambda: bdkd_weights(TEACHER, STUDENT, gate="label"), ConfigError, "give labels"),
        (lambda: bdkd_weights(TEACHER, STUDENT, width=0.1), ConfigError, "go together"),
        (lambda: bdkd_weights(TEACHER, STUDENT, mode="bdkd_soft"), ConfigError, "go together"),
        (lambda: bdkd_weights(TEACHER, STUDENT, mode="bdkd_soft", width=0.0), ConfigError, "width is the scale"),
        (lambda: bdkd_weights(TEACHER, STUDENT, gate_temperature=0.0), ConfigError, "gate_temperature"),
        (lambda: bdkd_loss(TEACHER, STUDENT, temperature=-1.0), ConfigError, "temperature must be positive"),
        (lambda: bdkd_loss(TEACHER, STUDENT, temperature=math.inf), ConfigError, "both finite"),
        (lambda: bdkd_loss(TEACHER, STUDENT, alpha=math.nan), ConfigError, "alpha at least 0"),
        (lambda: bdkd_loss(TEACHER, STUDENT, gate_temperature=0.0), ConfigError, "gate_temperature"),
        (lambda: bdkd_loss(TEACHER, STUDENT, torch.ones(2)), DataError, "whole numbers"),
        (lambda: bdkd_loss(TEACHER, STUDENT, mask=torch.ones(3)), ShapeError, "mask has shape"),
        (lambda: bdkd_loss(TEACHER, STUDENT, torch.tensor([0, 4])), DataError, "from 0 to 3"),
        (lambda: bdkd_loss(TEACHER, STUDENT, torch.tensor([0])), ShapeError, "one a row"),
        (lambda: bdkd_teacher_loss(TEACHER, STUDENT, temperature=0.0), ConfigError, "temperature must be positive"),
        (lambda: bdkd_teacher_loss(TEACHER, STUDENT, mode="kd"), ConfigError, "mode is one of"),
        (lambda: balanced_kl(TEACHER, STUDENT, gate="label"), ConfigError, "no labels"),
        (lambda: balanced_kl(TEACHER, STUDENT, power=0.0), ConfigError, "power"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
