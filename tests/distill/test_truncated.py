"""Losses from a truncated teacher with drawn tokens, by enumeration of every draw: BD-KD, Renyi, and by function."""

import itertools
import math
from functools import partial

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.core.types import TeacherOutput
from kullback.distill import BalancedKL, balanced_kl, bdkd_loss, bdkd_objective, bdkd_weights
from kullback.distill.objective import Objective
from kullback.distill.top_k import keep_top, sample_tail, top_k_divergence, truncated_divergence, truncated_renyi
from kullback.divergences import F_NAMES, f_divergence, jeffreys, kl, renyi, skew_kl
from kullback.divergences import f as losses

N, V, K, F64 = 6, 9, 4, torch.float64
GATES = ({}, {"mode": "bdkd_soft", "width": 0.3}, {"mode": "bdkd_inverse"}, {"mode": "dml"}, {"mode": "reverse"},
         {"mode": "jeffreys"}, {"delta": 4.0})  # fmt: skip


@pytest.fixture
def rows(generator):
    """Teacher logits [N, V] that are sure in some rows and not in others, and student logits that want a gradient."""
    teacher, student = 2.0 * torch.randn(2, N, V, generator=generator, dtype=F64)
    teacher = teacher * torch.linspace(0.2, 2.0, N, dtype=F64).unsqueeze(-1)
    return teacher, student.requires_grad_()


def entropy(logits):
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def targets(teacher, drawn, *, temperature=1.0, exact=True, labels=None):
    """Every draw of so many tail tokens with its chance [N], as a cache would hold it."""
    log_p = (teacher / temperature).log_softmax(-1)
    ids, top, tail = keep_top(log_p, K)
    rest = log_p.argsort(-1, descending=True)[:, K:]
    label = None if labels is None else log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    for places in itertools.product(range(V - K), repeat=drawn):
        picked = rest[:, list(places)]
        found = log_p.gather(-1, picked)
        chance = (found - tail.unsqueeze(-1)).exp().prod(-1)
        yield chance, TeacherOutput(
            top_ids=ids, top_log_probs=top, tail_log_prob=tail, tail_ids=picked, tail_log_probs=found,
            entropy=entropy(teacher) if exact else None, label_log_probs=label,
        )  # fmt: skip


def average(value, teacher, drawn, **options):
    return sum((chance * value(target)).sum() for chance, target in targets(teacher, drawn, **options))


def gap(found, wanted, student):
    """The largest difference in value and in gradient."""
    slopes = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, wanted)]
    return max(float((found - wanted).detach().abs()), float((slopes[0] - slopes[1]).abs().max()))


@pytest.mark.parametrize("drawn", [1, 2])
@pytest.mark.parametrize("options", GATES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bd_kd_is_unbiased_with_the_teacher_s_entropy(rows, options, drawn, temperature):
    teacher, student = rows
    divergence = BalancedKL(temperature=temperature, **options)
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in rows)
    whole = divergence(log_p, log_q).sum()
    found = average(lambda target: divergence.of_truncated(target, log_q), teacher, drawn, temperature=temperature)
    assert gap(found, whole, student) < 1e-11
    reference = bdkd_loss(teacher, student, temperature=temperature, squared_temperature=False, **options)
    torch.testing.assert_close(whole / N, reference["loss"])
    coarse = top_k_divergence(divergence, *keep_top(log_p, K), log_q).sum()
    assert gap(coarse, whole, student) > 1e-2, "one bin for the tail is seen"


def test_the_gate_needs_the_whole_entropy(rows):
    """Estimated from two tokens it is unbiased itself, yet moves the gate near a tie, and with it the loss."""
    teacher, student = rows
    log_q = student.detach().log_softmax(-1)
    close = teacher.clone()
    for _ in range(60):  # temper each row until its entropy is nearly the student's
        close = close * (1.0 + 0.2 * (entropy(close) - entropy(student.detach())).unsqueeze(-1))
    close = close * 1.002
    whole = balanced_kl(close.log_softmax(-1), log_q).sum()
    for exact, least, most in (True, 0.0, 1e-11), (False, 1e-2, math.inf):
        found = average(lambda target: BalancedKL().of_truncated(target, log_q), close, 2, exact=exact)
        assert least <= float((found - whole).abs()) <= most


@pytest.mark.parametrize("gate", ["entropy", "confidence", "label"])
@pytest.mark.parametrize(("temperature", "gate_temperature"), [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0)])
def test_every_gate_from_many_drawn_tokens_is_that_of_the_live_teacher(
    generator, gate, temperature, gate_temperature
):
    teacher, student = 2.0 * torch.randn(2, 1, 40, 30, generator=generator, dtype=F64)
    labels = torch.randint(30, (1, 40), generator=generator)
    shared = {"delta": 10.0, "gate_temperature": gate_temperature, "temperature": temperature}
    options = {"gate": gate, "cross_entropy": 0.1, **shared}
    objective = bdkd_objective(**options)
    log_p = (teacher / temperature).log_softmax(-1)
    ids, top, tail = keep_top(log_p, 20)
    picked, found = sample_tail(log_p, ids, 4000, generator)
    label = log_p.gather(-1, labels.roll(-1, -1).unsqueeze(-1)).squeeze(-1)
    target = TeacherOutput(
        top_ids=ids, top_log_probs=top, tail_log_prob=tail, tail_ids=picked, tail_log_probs=found, label_log_probs=label
    )
    whole = objective.loss(TeacherOutput(logits=teacher), student, labels)
    assert objective.loss(target, student, labels).item() == pytest.approx(whole.item(), rel=0.01)
    parts = bdkd_loss(
        teacher[:, :-1], student[:, :-1], labels[:, 1:], squared_temperature=False, gate=gate, **shared
    )
    assert whole.item() == pytest.approx((0.9 * parts["distillation"] + 0.1 * parts["cross_entropy"]).item())
    other = bdkd_objective(**{**options, "gate": "entropy" if gate == "label" else "label"})
    assert abs(other.loss(target, student, labels).item() / whole.item() - 1.0) > 0.01, "the gate is seen"


def test_the_gate_of_the_label_is_exact_and_asks_for_its_probability(rows, generator):
    teacher, student = rows
    labels = torch.randint(V, (N,), generator=generator)
    objective = bdkd_objective(gate="label", temperature=2.0, squared_temperature=True, gate_temperature=2.0)
    value = partial(objective.truncated_row_term, student=student, labels=labels)
    found = average(lambda target: value(target), teacher, 1, temperature=2.0, labels=labels)
    weights = bdkd_weights(teacher, student, labels, gate="label", gate_temperature=2.0)
    assert 0 < int((weights.forward > 1).sum()) < N
    assert gap(found, objective.row_term(teacher, student, labels).sum(), student) < 1e-11
    _, target = next(targets(teacher, 1))
    with pytest.raises(ConfigError, match="how probable the teacher finds the next token"):
        value(target)
    with pytest.raises(ConfigError, match="sees no labels"):
        BalancedKL(gate="label")
    with pytest.raises(ConfigError, match="no labels but the student's own samples"):
        objective.on_own_samples()


def test_without_drawn_tokens_the_gate_is_exact_and_the_rest_is_one_bin(rows):
    teacher, student = rows
    log_p, log_q = (logits.detach().log_softmax(-1) for logits in rows)
    ids, top, tail = keep_top(log_p, K)
    target = TeacherOutput(top_ids=ids, top_log_probs=top, tail_log_prob=tail, entropy=entropy(teacher))
    weights = bdkd_weights(teacher, student)
    parts = [top_k_divergence(f_divergence(name), ids, top, tail, log_q) for name in ("kl", "reverse_kl")]
    wanted = weights.forward * parts[0] + weights.reverse * parts[1]
    torch.testing.assert_close(BalancedKL().of_truncated(target, log_q), wanted)
    coarse = top_k_divergence(BalancedKL(), ids, top, tail, log_q)
    torch.testing.assert_close(BalancedKL().of_truncated(target._replace(entropy=None), log_q), coarse)


@pytest.mark.parametrize("alpha", [0.3, 0.97, 1.0, 1.03, 2.5])
@pytest.mark.parametrize("drawn", [1, 2])
def test_the_sum_in_renyi_is_unbiased_and_its_gradient_too(rows, alpha, drawn):
    teacher, student = rows
    log_p, log_q = (logits.log_softmax(-1) for logits in rows)
    whole = renyi(log_p, log_q, alpha=alpha)

    def total(value):
        return value if alpha == 1.0 else ((alpha - 1.0) * value).exp()

    def estimate(target):
        return total(truncated_divergence(partial(renyi, alpha=alpha), target, log_q))

    found, wanted = average(estimate, teacher, drawn), total(whole).sum()
    scale = float(wanted.detach().abs())
    assert gap(found, wanted, student) < 1e-11 * max(scale, 1.0)
    coarse = total(top_k_divergence(partial(renyi, alpha=alpha), *keep_top(log_p, K), log_q)).sum()
    assert gap(coarse, wanted, student) > 1e-3, "one bin for the tail is seen"


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_renyi_itself_is_low_above_one_and_high_below_and_less_so_with_more_tokens(rows, alpha):
    teacher = rows[0]
    log_p, log_q = (logits.detach().log_softmax(-1) for logits in rows)
    whole = renyi(log_p, log_q, alpha=alpha)
    off = []
    for drawn in (1, 2, 4):
        value = partial(truncated_divergence, partial(renyi, alpha=alpha))
        found = sum(chance * value(target, log_q) for chance, target in targets(teacher, drawn))
        off.append(float((found - whole).mul(math.copysign(1.0, 1.0 - alpha)).sum()))
    assert off[0] > 1.5 * off[1] > 1.5 * 1.5 * off[2] > 0.0
    coarse = top_k_divergence(partial(renyi, alpha=alpha), *keep_top(log_p, K), log_q)
    assert float((whole - coarse).sum()) > off[2], "and closer than one bin"


def test_renyi_with_all_tokens_but_one_and_one_that_the_teacher_rules_out(rows):
    teacher, student = rows
    teacher = teacher.scatter(-1, teacher.argmin(-1, keepdim=True), -math.inf)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    for alpha in (0.5, 0.98, 2.0):
        kept = keep_top(log_p, V - 1)
        drawn = log_p.argmin(-1, keepdim=True), torch.full((N, 1), -math.inf, dtype=F64)
        found = truncated_renyi(*kept, *drawn, log_q, alpha=alpha)
        whole = renyi(log_p, log_q, alpha=alpha)
        assert gap(found.sum(), whole.sum(), student) < 1e-12
    low = [x.half() if x.is_floating_point() else x for x in (*keep_top(log_p, 4), *drawn)]
    assert math.isfinite(truncated_renyi(*low, log_q.detach(), alpha=2.0).sum())


def test_an_f_divergence_by_its_function_takes_the_drawn_tokens_too(rows):
    teacher, student = rows
    log_p, log_q = (logits.log_softmax(-1) for logits in rows)
    for function in (kl, jeffreys, partial(skew_kl, alpha=0.1), partial(losses.alpha_divergence, alpha=1.5)):
        found = average(partial(truncated_divergence, function, log_q=log_q), teacher, 1)
        assert gap(found, function(log_p, log_q).sum(), student) < 1e-11
    own = average(partial(truncated_divergence, lambda p, q: kl(p, q), log_q=log_q), teacher, 1)
    assert gap(own, kl(log_p, log_q).sum(), student) > 1e-2, "a function that is not known has one bin"
    assert all(callable(getattr(losses, name)) for name in F_NAMES)


def test_an_objective_of_a_truncated_teacher_needs_all_three_parts(rows):
    teacher, student = rows
    ids, top, tail = keep_top(teacher.log_softmax(-1), K)
    for parts in {"top_ids": ids}, {"top_ids": ids, "top_log_probs": top}, {"top_ids": ids, "tail_log_prob": tail}:
        target = TeacherOutput(**{name: x.unsqueeze(0) for name, x in parts.items()})
        for divergence in (kl, BalancedKL()):
            with pytest.raises(ConfigError, match="together"):
                Objective(divergence=divergence).loss(target, student.unsqueeze(0), ids[:, :1].T)
