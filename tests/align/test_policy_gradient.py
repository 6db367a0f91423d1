"""Advantages and clipped losses: against trl's loss on one batch, and against exact gradients in enumerable worlds."""

import math
from types import SimpleNamespace

import pytest
import torch

from kullback.align.policy_gradient import (
    clipped_policy_loss,
    clipped_share,
    grouped_advantages,
    leave_one_out_baseline,
    policy_ratio,
    reduce_tokens,
    reference_penalty,
)
from kullback.align.worlds import TabularPolicy, World, expected_reward
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.divergences import kl


@pytest.fixture
def batch():
    draws = stream(5, "policy gradient")
    lengths = torch.tensor([9, 1, 4, 7, 9, 2])
    mask = torch.arange(9) < lengths[:, None]
    old = -3 * torch.rand(6, 9, generator=draws, dtype=torch.float64)
    log_prob = old + 0.4 * torch.randn(6, 9, generator=draws, dtype=torch.float64)
    reference = old + 0.3 * torch.randn(6, 9, generator=draws, dtype=torch.float64)
    advantages = torch.randn(6, generator=draws, dtype=torch.float64)
    new = log_prob.requires_grad_()
    return SimpleNamespace(old=old, new=new, reference=reference, advantages=advantages, mask=mask)


def trl_loss(batch, loss_type, *, level="token", beta=0.0, delta=None, maximum=11):
    """The loss of trl's own trainer, its method called on a stand-in that holds just the options it reads."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    tokens = batch.mask.sum()
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    names = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean",
             "clip_ratio/high_max", "clip_ratio/region_mean")  # fmt: skip
    args = SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (batch.new, torch.zeros_like(batch.old), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta,
        loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.28, args=args, use_vllm=False, aux_loss_enabled=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=maximum,
        accelerator=accelerator, _entropy_bonus_enabled=False, _metrics={"train": {name: [] for name in names}},
        vllm_importance_sampling_correction=False,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(6, 2), "prompt_mask": torch.ones(6, 2), "completion_ids": torch.zeros(6, 9),
        "completion_mask": batch.mask.long(), "advantages": batch.advantages, "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.reference, "num_items_in_batch": tokens,
    }  # fmt: skip
    loss = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, torch.autograd.grad(loss, batch.new)[0], trainer._metrics["train"]


def ours(batch, **options):
    loss = clipped_policy_loss(batch.new, batch.old, batch.advantages, batch.mask, clip_high=0.28, **options)
    return loss, torch.autograd.grad(loss, batch.new)[0]


def same(found, expected):
    return all((a - b).abs().max() < 1e-6 for a, b in zip(found, expected, strict=False))


@pytest.mark.parametrize(
    ("loss_type", "reduction"),
    [("grpo", "seq-mean-token-mean"), ("bnpo", "token-mean"), ("dapo", "token-mean"), ("dr_grpo", 11)],
)
@pytest.mark.parametrize("delta", [None, 1.4])
def test_the_loss_and_its_gradient_are_those_of_trl(batch, loss_type, reduction, delta):
    expected = trl_loss(batch, loss_type, delta=delta)
    assert same(ours(batch, reduction=reduction, dual_clip=delta), expected)
    other = "seq-mean-token-sum" if reduction != "seq-mean-token-sum" else "token-mean"
    assert not same(ours(batch, reduction=other, dual_clip=delta), expected)
    assert not same(ours(batch, reduction=reduction, dual_clip=1.4 if delta is None else None), expected)


def test_sequence_level_is_that_of_trl(batch):
    expected = trl_loss(batch, "grpo", level="sequence")
    assert same(ours(batch, reduction="seq-mean-token-mean", level="sequence"), expected)
    assert not same(ours(batch, reduction="seq-mean-token-mean"), expected)


def test_the_penalty_of_trl_has_the_value_of_k3_and_the_forward_gradient(batch):
    expected = trl_loss(batch, "bnpo", beta=0.3)
    def joint(**names):
        loss = clipped_policy_loss(batch.new, batch.old, batch.advantages, batch.mask, clip_high=0.28)
        loss = loss + 0.3 * reference_penalty(batch.new, batch.reference, batch.mask, **names)
        return loss, torch.autograd.grad(loss, batch.new)[0]
    assert same(joint(estimator="k3", gradient="forward"), expected)
    value, gradient = joint(estimator="k3", gradient="reverse")
    assert abs(value - expected[0]) < 1e-6
    assert (gradient - expected[1]).abs().max() > 1e-3, "the usual k3 loss does not have the reverse gradient"


def test_clipped_shares_are_those_of_trl(batch):
    metrics = trl_loss(batch, "bnpo")[2]
    share = clipped_share(batch.new, batch.old, batch.advantages, batch.mask, clip_high=0.28)
    assert share.tolist() == pytest.approx([metrics["clip_ratio/low_mean"][0], metrics["clip_ratio/high_mean"][0]])
    assert share.sum() > 0


def test_advantages_against_their_formula_and_trl_scale():
    rewards = torch.rand(4, 6, generator=stream(1), dtype=torch.float64)
    deviation = torch.stack([row.std() for row in rewards])
    expected = (rewards - rewards.mean(1, keepdim=True)) / (deviation[:, None] + 1e-4)
    assert torch.allclose(grouped_advantages(rewards, eps=1e-4), expected, atol=1e-14)
    assert torch.allclose(grouped_advantages(rewards, scale="none"), rewards - rewards.mean(1, keepdim=True))
    batch = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-6)
    assert torch.allclose(grouped_advantages(rewards, scale="batch"), batch)
    others = torch.stack([(rewards.sum(1) - rewards[:, i]) / 5 for i in range(6)], 1)
    assert torch.allclose(leave_one_out_baseline(rewards), others)
    scaled = 6 / 5 * grouped_advantages(rewards, scale="none")
    assert torch.allclose(grouped_advantages(rewards, scale="none", baseline="leave-one-out"), scaled)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_group_of_equal_rewards_has_no_advantage_and_no_gradient(batch, value, eps):
    advantages = grouped_advantages(torch.full((2, 3), value), eps=eps)
    assert (advantages == 0).all()
    loss = clipped_policy_loss(batch.new, batch.old, advantages.flatten(), batch.mask)
    assert (torch.autograd.grad(loss, batch.new)[0] == 0).all()


def test_what_the_mask_hides_reaches_nothing(batch):
    broken = batch.new.detach().clone()
    broken[~batch.mask] = math.nan
    broken.requires_grad_()
    old = batch.old.masked_fill(~batch.mask, -math.inf)
    for level in ("token", "sequence"):
        loss = clipped_policy_loss(broken, old, batch.advantages, batch.mask, level=level)
        clean = clipped_policy_loss(batch.new, batch.old, batch.advantages, batch.mask, level=level)
        assert loss == clean
        assert torch.autograd.grad(loss, broken)[0].isfinite().all()
    assert reference_penalty(broken, old, batch.mask).isfinite()


def test_micro_batches_add_up(batch):
    whole = ours(batch, reduction="token-mean")[0]
    total = batch.mask.sum()
    parts = [
        clipped_policy_loss(
            batch.new[rows], batch.old[rows], batch.advantages[rows], batch.mask[rows], clip_high=0.28, count=total
        )
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert torch.isclose(sum(parts), whole)
    per_sequence = [reduce_tokens(batch.new[rows], batch.mask[rows], 9, count=6) for rows in (slice(0, 4), slice(4, 6))]
    assert torch.isclose(sum(per_sequence), reduce_tokens(batch.new, batch.mask, 9))


def exact_world():
    world = World(3, 3)
    policy = TabularPolicy(world, generator=stream(2), scale=0.7)
    reward = torch.rand(world.size, generator=stream(3), dtype=torch.float64)
    return world, policy, reward


def token_log_probs(policy):
    """Log-probabilities [N, T] of every token of every sequence of the world."""
    world = policy.world
    sequences, parts = world.sequences(), []
    for place, table in enumerate(policy.logits):
        prefix = torch.zeros(world.size, dtype=torch.long)
        for earlier in range(place):
            prefix = prefix * world.vocabulary + sequences[:, earlier]
        parts.append(table.log_softmax(-1)[prefix, sequences[:, place]])
    return torch.stack(parts, 1)


def gradients(value, policy):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.logits))])


@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_on_policy_it_is_the_gradient_of_the_expected_reward(baseline):
    """Over all sequences, each weighted by its probability: the sum over tokens has the gradient of -E r exactly."""
    world, policy, reward = exact_world()
    log_prob = token_log_probs(policy)
    law = log_prob.sum(1).exp().detach()
    weighted = world.size * law * (reward - baseline)
    ones = torch.ones(log_prob.shape)
    found = clipped_policy_loss(log_prob, log_prob.detach(), weighted, ones, reduction="seq-mean-token-sum")
    exact = gradients(-expected_reward(policy.all_log_probs(), reward), policy)
    assert torch.allclose(gradients(found, policy), exact, atol=1e-12)
    wrong = clipped_policy_loss(token_log_probs(policy), log_prob.detach(), weighted * reward, ones, reduction=3)
    assert not torch.allclose(gradients(wrong, policy), exact, atol=1e-3)


@pytest.mark.parametrize(("gradient", "estimator"), [("reverse_sequence", "k1"), ("reverse_sequence", "k3")])
def test_the_penalty_over_a_world_is_the_divergence_between_sequences(gradient, estimator):
    world, policy, _ = exact_world()
    reference = TabularPolicy(world, generator=stream(4), scale=0.7)
    log_prob, log_reference = token_log_probs(policy), token_log_probs(reference).detach()
    law = log_prob.sum(1).exp().detach()
    weight = (world.size * law).unsqueeze(1).expand_as(log_prob)
    ones = torch.ones(log_prob.shape)
    found = reference_penalty(
        log_prob, log_reference, ones, estimator=estimator, gradient=gradient, ratio=weight,
        reduction="seq-mean-token-sum",
    )  # fmt: skip
    exact = kl(policy.all_log_probs(), reference.all_log_probs())
    assert torch.isclose(found, exact)
    assert torch.allclose(gradients(found, policy), gradients(exact, policy), atol=1e-12)


def test_dual_clip_bounds_the_loss_of_a_bad_completion():
    new, old, one = torch.tensor([[5.0]]), torch.zeros(1, 1), torch.ones(1, 1)
    assert clipped_policy_loss(new, old, -one[0], one) == pytest.approx(math.exp(5.0))
    assert clipped_policy_loss(new, old, -one[0], one, dual_clip=3.0) == 3.0
    assert clipped_policy_loss(new, old, one[0], one, dual_clip=3.0) == pytest.approx(-1.2)
    unlimited = clipped_policy_loss(new, old, one[0], one, clip_low=math.inf, clip_high=math.inf)
    assert unlimited == pytest.approx(-math.exp(5.0))
    assert (policy_ratio(new, old, torch.zeros(1, 1)) == 1).all()


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (DataError, lambda one: grouped_advantages(torch.tensor([[1.0, math.nan]]))),
        (ShapeError, lambda one: grouped_advantages(torch.ones(3))),
        (ShapeError, lambda one: grouped_advantages(torch.ones(3, 1))),
        (ShapeError, lambda one: leave_one_out_baseline(torch.ones(3, 1))),
        (ConfigError, lambda one: grouped_advantages(one, scale="std")),
        (ConfigError, lambda one: grouped_advantages(one, baseline="median")),
        (ConfigError, lambda one: clipped_policy_loss(one, one, one, one, clip_low=-0.1)),
        (ConfigError, lambda one: clipped_policy_loss(one, one, one, one, dual_clip=0.5)),
        (ConfigError, lambda one: clipped_policy_loss(one, one, one, one, reduction="mean")),
        (ConfigError, lambda one: clipped_policy_loss(one, one, one, one, reduction=0)),
        (ConfigError, lambda one: clipped_policy_loss(one, one, one, one, level="word")),
        (ShapeError, lambda one: clipped_policy_loss(one, one, torch.ones(5), one)),
        (ShapeError, lambda one: clipped_policy_loss(one, one[:1], one, one)),
        (ShapeError, lambda one: reduce_tokens(one, one[:1], "token-mean")),
        (ShapeError, lambda one: reference_penalty(one, one[:1], one)),
        (ConfigError, lambda one: reference_penalty(one, one, one, estimator="k4")),
    ],
)  # fmt: skip
def test_what_is_refused(error, call):
    with pytest.raises(error):
        call(torch.ones(2, 3))
