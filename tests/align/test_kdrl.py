"""KDRL: gradients by enumeration, the card's numbers, equal forms of one loss, masks and schedules."""

import math

import pytest
import torch

from kullback.align.kdrl import BetaSchedule, Kdrl, kd_mask, kd_terms, kdrl_loss, reverse_kl_top_k
from kullback.align.policy_gradient import clipped_policy_loss, grouped_advantages
from kullback.align.worlds import TabularPolicy, World
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator
from kullback.divergences import kl, reverse_kl

THETA = torch.tensor([0.3, -0.2, 0.7, 0.1], dtype=torch.float64)
TEACHER = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()


def expected(kind):
    """Value and gradient in the mean over the student's own tokens, by enumeration."""
    theta = THETA.clone().requires_grad_()
    log_student = theta.log_softmax(0)
    terms = kd_terms(TEACHER.unsqueeze(1), log_student.unsqueeze(1), kind=kind).squeeze(1)
    mean = (log_student.exp().detach() * terms).sum()
    gradient = torch.autograd.grad(mean, theta)[0] if mean.requires_grad else torch.zeros(4)
    return mean.item(), gradient


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k2", 0.470692, (-0.2686, -0.1612, 0.2102, 0.2196)),
        ("k3", 0.379822, (-0.2447, -0.1452, 0.2309, 0.1590)),
        ("k1_reward", 0.379822, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_estimators_have_the_values_and_gradients_of_the_card(kind, value, gradient):
    found, slope = expected(kind)
    assert found == pytest.approx(value, abs=1e-6)
    assert slope.tolist() == pytest.approx(gradient, abs=1e-4)


def test_k2_descends_the_reverse_kl_and_k3_the_forward():
    theta = THETA.clone().requires_grad_()
    for kind, divergence in (("k2", reverse_kl), ("k3", kl)):
        exact = torch.autograd.grad(divergence(TEACHER, theta.log_softmax(0)), theta)[0]
        torch.testing.assert_close(expected(kind)[1], exact, atol=1e-12, rtol=0)
        other = expected("k3" if kind == "k2" else "k2")[1]
        assert not torch.allclose(other, exact, atol=1e-2), "the other estimator is another gradient"


def test_return_to_go_is_the_gradient_of_whole_completions():
    world = World(3, 2)
    draw = generator(0, "tables")
    student = TabularPolicy(world, generator=draw, scale=1.0)
    teacher = TabularPolicy(world, generator=draw, scale=1.0)
    x = world.sequences()

    def tokens(policy):
        first = policy.logits[0].log_softmax(-1)[0, x[:, 0]]
        second = policy.logits[1].log_softmax(-1)[x[:, 0], x[:, 1]]
        return torch.stack([first, second], 1)

    exact = torch.autograd.grad(reverse_kl(teacher.all_log_probs(), student.all_log_probs()), list(student.logits))
    log_student, mask = tokens(student), torch.ones(len(x), 2)
    weights = log_student.sum(1).exp().detach()
    found = {}
    for credit in ("token", "return_to_go"):
        terms = kd_terms(tokens(teacher).detach(), log_student, credit=credit, mask=mask)
        loss = (weights * terms.sum(1)).sum()
        found[credit] = torch.autograd.grad(loss, list(student.logits), retain_graph=True)
    for place in range(2):
        torch.testing.assert_close(found["return_to_go"][place], exact[place], atol=1e-12, rtol=0)
    torch.testing.assert_close(found["token"][1], exact[1], atol=1e-12, rtol=0)
    assert not torch.allclose(found["token"][0], exact[0], atol=1e-3), "the first token's effect on the second is lost"


def batch(seed=0, rows=8, length=4):
    draw = generator(seed, "batch")
    student, teacher = (torch.randn(rows, length, generator=draw, dtype=torch.float64) - 2.0 for _ in range(2))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1, 2:] = False
    rewards = torch.randint(2, (rows,), generator=draw).double()
    return teacher, student.requires_grad_(), rewards, mask


def test_k2_is_a_reward_for_each_token():
    teacher, student, rewards, mask = batch()
    advantages = grouped_advantages(rewards.view(2, 4)).view(-1)
    joint = kdrl_loss(teacher, student, advantages, mask, beta=0.3)
    detached = torch.where(mask, teacher - student.detach(), 0.0)
    shaped = clipped_policy_loss(student, student.detach(), advantages.unsqueeze(1) + 0.3 * detached, mask)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (joint.loss, shaped))
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)
    by_kind = kdrl_loss(teacher, student, advantages, mask, beta=0.3, kind="k1_reward").loss
    torch.testing.assert_close(torch.autograd.grad(by_kind, student)[0], second, atol=1e-12, rtol=0)


def test_limits():
    teacher, student, rewards, mask = batch()
    advantages = grouped_advantages(rewards.view(2, 4)).view(-1)
    grpo = clipped_policy_loss(student, student.detach(), advantages, mask)
    none = kdrl_loss(teacher, student, advantages, mask, beta=0.0)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (grpo, none.loss)]
    torch.testing.assert_close(*gradients)
    alone = kdrl_loss(teacher, student, torch.zeros(8, dtype=torch.float64), mask, beta=1.0)
    assert alone.policy.item() == 0.0
    assert torch.autograd.grad(alone.loss, student)[0].abs().max() > 0.0
    for kind in ("k2", "k3"):
        same = kdrl_loss(student.detach(), student, torch.zeros(8, dtype=torch.float64), mask, beta=1.0, kind=kind)
        assert same.distillation.item() == pytest.approx(0.0, abs=1e-14)
        assert torch.autograd.grad(same.loss, student)[0].abs().max() < 1e-14


def test_padding_changes_nothing():
    teacher, student, rewards, mask = batch()
    advantages = grouped_advantages(rewards.view(2, 4)).view(-1)
    wide = [torch.nn.functional.pad(x, (0, 3), value=math.nan) for x in (teacher, student)]
    found = kdrl_loss(*wide, advantages, torch.nn.functional.pad(mask, (0, 3)), beta=0.3)
    expected = kdrl_loss(teacher, student, advantages, mask, beta=0.3)
    torch.testing.assert_close(found.loss, expected.loss)
    slopes = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found.loss, expected.loss)]
    torch.testing.assert_close(*slopes)


def test_masks_of_the_card():
    correct = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    assert [int(kd_mask(correct, mode=mode).sum()) for mode in ("none", "response", "group")] == [8, 7, 4]
    teacher, student, _, mask = batch()
    keep = kd_mask(correct, mode="group").reshape(-1)
    zero = torch.zeros(8, dtype=torch.float64)
    found = kdrl_loss(teacher, student, zero, mask, beta=1.0, keep=keep)
    alone = kdrl_loss(teacher[4:], student[4:], zero[4:], mask[4:], beta=1.0)
    torch.testing.assert_close(found.distillation, alone.distillation)
    nobody = kdrl_loss(teacher, student, zero, mask, beta=1.0, keep=torch.zeros(8))
    assert nobody.distillation.item() == 0.0
    assert nobody.kept.item() == 0.0


def test_schedules():
    linear = BetaSchedule(kind="linear")
    assert [linear(step) for step in (0, 40, 80, 280)] == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])
    cosine = BetaSchedule(kind="cosine", start=1.0, end=0.0, steps=10)
    assert [cosine(step) for step in (0, 5, 10, 20)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    switch = BetaSchedule(kind="switch", start=1.0, end=0.0, steps=3)
    assert [switch(step) for step in range(5)] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_whole_and_a_part_of_the_vocabulary():
    draw = generator(1, "logits")
    teacher, student = torch.randn(2, 5, 12, generator=draw, dtype=torch.float64)
    whole = reverse_kl(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(reverse_kl_top_k(teacher, student), whole)
    torch.testing.assert_close(reverse_kl_top_k(teacher, student, kept=12), whole)
    for support in ("student", "teacher"):
        before = torch.zeros(5, dtype=torch.float64)
        for kept in (1, 3, 6, 11):
            bound = reverse_kl_top_k(teacher, student, kept=kept, support=support)
            assert (bound <= whole + 1e-12).all()
            if support == "student":
                assert (bound >= before - 1e-12).all(), "more tokens, a tighter bound"
            before = bound
    assert (reverse_kl_top_k(teacher, student, kept=4, tail="renormalise") >= 0.0).all()


@pytest.mark.parametrize("shaping", ["loss", "reward"])
@pytest.mark.parametrize("keep", ["none", "response", "group"])
def test_the_method(shaping, keep):
    teacher, student, rewards, mask = batch()
    given = {
        "rewards": rewards, "completion_mask": mask, "old_log_prob": student.detach(), "reference_log_prob": teacher,
        "step": torch.tensor(40),
    }  # fmt: skip
    method = Kdrl(schedule=BetaSchedule(kind="linear"), keep=keep, shaping=shaping)
    prepared = method.prepare(given, group=4, generator=generator(0))
    assert prepared["beta"][0].item() == pytest.approx(3e-3)
    whole, metrics = method.loss(student, prepared, count=method.count(prepared))
    assert metrics["beta"].item() == pytest.approx(3e-3)
    assert whole.isfinite()
    if keep == "none":  # micro-batches add up
        halves = [{k: v[rows] if v.ndim else v for k, v in prepared.items()} for rows in (slice(0, 4), slice(4, 8))]
        parts = [method.loss(student[rows], half, count=method.count(prepared))[0]
                 for rows, half in zip((slice(0, 4), slice(4, 8)), halves, strict=True)]  # fmt: skip
        torch.testing.assert_close(sum(parts), whole)


def test_distillation_alone_does_not_look_at_rewards():
    teacher, student, rewards, mask = batch()
    given = {
        "completion_mask": mask, "old_log_prob": student.detach(), "reference_log_prob": teacher,
        "step": torch.tensor(0),
    }  # fmt: skip

    def gradient(method, rewards):
        prepared = method.prepare({**given, "rewards": rewards}, group=4, generator=generator(0))
        log_prob = student.detach().clone().requires_grad_()
        loss, _ = method.loss(log_prob, prepared, count=method.count(prepared))
        return torch.autograd.grad(loss, log_prob)[0]

    schedule = BetaSchedule(start=0.1)
    alone, joint = Kdrl(schedule=schedule, reinforced=False), Kdrl(schedule=schedule)
    blind = gradient(joint, torch.zeros_like(rewards))
    torch.testing.assert_close(gradient(alone, rewards), blind)
    assert not torch.allclose(gradient(joint, rewards), blind), "with the reward's part it is another gradient"
    for options in ({"keep": "response"}, {"shaping": "reward"}, {"reward_from": 3}):
        with pytest.raises(ConfigError, match="teacher"):
            Kdrl(reinforced=False, **options)


def test_distilled_first_and_reinforced_then():
    teacher, student, rewards, mask = batch()
    schedule = BetaSchedule(kind="switch", start=0.1, end=0.0, steps=5)
    method = Kdrl(schedule=schedule, reward_from=5)

    def loss(method, step):
        given = {
            "rewards": rewards, "completion_mask": mask, "old_log_prob": student.detach(),
            "reference_log_prob": teacher, "step": torch.tensor(step),
        }  # fmt: skip
        prepared = method.prepare(given, group=4, generator=generator(0))
        found = method.loss(student, prepared, count=method.count(prepared))[0]
        return torch.autograd.grad(found, student)[0]

    torch.testing.assert_close(loss(method, 4), loss(Kdrl(schedule=BetaSchedule(start=0.1), reinforced=False), 4))
    torch.testing.assert_close(loss(method, 5), loss(Kdrl(schedule=BetaSchedule(start=0.0)), 5))
    assert not torch.allclose(loss(method, 4), loss(Kdrl(schedule=schedule), 4)), "a switch of beta alone is both"
    for wrong in ({"reward_from": -1}, {"reward_from": 2, "shaping": "reward"}):
        with pytest.raises(ConfigError, match="reward_from"):
            Kdrl(**wrong)


def test_a_teacher_that_finds_a_token_impossible():
    teacher, student, rewards, mask = batch()
    advantages = grouped_advantages(rewards.view(2, 4)).view(-1)
    known = kdrl_loss(teacher, student, advantages, mask, beta=0.3)
    wide = kdrl_loss(teacher, student, advantages, mask, beta=0.3, most_log_ratio=50.0)
    torch.testing.assert_close(wide.loss, known.loss)
    teacher[0, 1] = -math.inf
    assert not kdrl_loss(teacher, student, advantages, mask, beta=0.3).loss.isfinite()
    for kind in ("k2", "k3", "k1_reward"):
        cut = kdrl_loss(teacher, student, advantages, mask, beta=0.3, kind=kind, most_log_ratio=20.0)
        assert torch.autograd.grad(cut.loss, student, retain_graph=True)[0].isfinite().all()
    far = teacher.clone()
    far[0, 1] = student.detach()[0, 1] - 20.0
    gradients = [
        torch.autograd.grad(kdrl_loss(t, student, advantages, mask, beta=0.3, most_log_ratio=20.0).loss, student)[0]
        for t in (teacher, far)
    ]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ConfigError, match="most_log_ratio"):
        kdrl_loss(far, student, advantages, mask, beta=0.3, most_log_ratio=0.0)
    with pytest.raises(ConfigError, match="most_log_ratio"):
        Kdrl(most_log_ratio=-1.0)


def test_bad_input():
    teacher, student, rewards, _ = batch()
    with pytest.raises(ConfigError, match="kind"):
        kd_terms(teacher, student, kind="k4")
    with pytest.raises(ConfigError, match="return_to_go"):
        kd_terms(teacher, student, kind="k3", credit="return_to_go")
    with pytest.raises(ShapeError):
        kd_mask(rewards)
    with pytest.raises(ConfigError, match="kept"):
        reverse_kl_top_k(teacher, student, kept=99)
    with pytest.raises(ShapeError, match="vocabulary"):
        reverse_kl_top_k(teacher, student[:, :2])
    for wrong in ({"keep": "best"}, {"kind": "k4"}, {"shaping": "both"}):
        with pytest.raises(ConfigError):
            Kdrl(**wrong)
    with pytest.raises(ConfigError, match="steps"):
        BetaSchedule(steps=0)
