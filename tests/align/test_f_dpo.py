"""f-DPO against the card's numbers, closed gradients, limits, trl, and what goes wrong in float32."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from kullback.align import f_dpo
from kullback.align.f_dpo import (
    FDPOLoss,
    fdpo_loss,
    fppo_penalty,
    implicit_reward,
    paper_divergence,
    preference_metrics,
)
from kullback.align.regularised import f_regularised_policy
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import f_divergence, kl, reverse_kl

POLICY = torch.tensor([[-3.0, -1.0, -7.0], [-2.5, -4.0, -6.0]])
REFERENCE = torch.tensor([[-3.5, -1.2, -5.0], [-2.0, -3.0, -6.5]])
NAMES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jensen_shannon", 0.5), *(("alpha", a) for a in (0.3, 0.5, 0.7))]
LOSSES = [
    (0.6444, 0.6349, 0.8259), (0.6424, 0.6027, 1.0887), (0.6685, 0.6580, 0.7792),
    (0.6442, 0.6274, 0.8662), (0.6439, 0.6215, 0.9058), (0.6434, 0.6147, 0.9608),
]  # fmt: skip
FAMILY = [paper_divergence(name, alpha=alpha) for name, alpha in NAMES]


def pairs(generator, count=64, scale=1.0):
    """Log-probabilities of the reference and of the policy, chosen and rejected: four [count] in float64."""
    reference = -5.0 - torch.rand(2, count, generator=generator, dtype=torch.float64)
    policy = reference + scale * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return *reference, *policy


@pytest.mark.parametrize(("divergence", "expected"), list(zip(FAMILY, LOSSES, strict=True)))
def test_losses_of_the_card(divergence, expected):
    output = fdpo_loss(*REFERENCE, *POLICY, divergence=divergence, beta=0.1)
    torch.testing.assert_close(output.loss, torch.tensor(expected), atol=5e-5, rtol=0)
    # the paper's Jensen-Shannon divergence is not the usual one, and the two KLs are not each other
    for other in (f_divergence("jsd"), f_divergence("alpha_divergence", alpha=0.45)):
        wrong = fdpo_loss(*REFERENCE, *POLICY, divergence=other, beta=0.1).loss
        assert (wrong - torch.tensor(expected)).abs().max() > 1e-3


def weights(name, alpha, d):
    return {"reverse_kl": torch.ones_like(d), "forward_kl": (-d).exp(), "jensen_shannon": torch.sigmoid(-d)}.get(
        name, (-alpha * d).exp()
    )


@pytest.mark.parametrize(("name", "alpha"), NAMES)
def test_gradient_has_the_closed_weights(name, alpha, generator):
    reference_w, reference_l, chosen, rejected = pairs(generator)
    chosen.requires_grad_(), rejected.requires_grad_()
    output = fdpo_loss(reference_w, reference_l, chosen, rejected, divergence=paper_divergence(name, alpha=alpha))
    by_chosen, by_rejected = torch.autograd.grad(output.loss.sum(), (chosen, rejected))
    push = 0.1 * torch.sigmoid(output.rejected_reward - output.chosen_reward)
    expected = -push * weights(name, alpha, (chosen - reference_w).detach())
    torch.testing.assert_close(by_chosen, expected, rtol=1e-10, atol=1e-10)
    expected = push * weights(name, alpha, (rejected - reference_l).detach())
    torch.testing.assert_close(by_rejected, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha", "name", "tolerance"), [(1e-4, "reverse_kl", 1e-4), (1 - 1e-4, "forward_kl", 1e-3)])
def test_alpha_ends_at_the_two_kls(alpha, name, tolerance):
    d = torch.linspace(-3.0, 3.0, 25, dtype=torch.float64)
    ratios = torch.cartesian_prod(d, d).T
    zero = torch.zeros_like(ratios[0])
    found, wanted = (
        fdpo_loss(zero, zero, *ratios, divergence=divergence).loss
        for divergence in (paper_divergence("alpha", alpha=alpha), paper_divergence(name))
    )
    assert (found - wanted).abs().max() < tolerance
    other = fdpo_loss(zero, zero, *ratios, divergence=paper_divergence("alpha", alpha=1 - alpha)).loss
    assert (other - wanted).abs().max() > 0.05


@pytest.mark.parametrize("divergence", FAMILY, ids=lambda d: d.name)
def test_a_shared_constant_matters_to_all_but_reverse_kl(divergence, generator):
    reference_w, reference_l, chosen, rejected = pairs(generator)
    moved = fdpo_loss(reference_w, reference_l, chosen + 1.0, rejected + 1.0, divergence=divergence).loss
    change = (moved - fdpo_loss(reference_w, reference_l, chosen, rejected, divergence=divergence).loss).abs().max()
    assert change < 1e-12 if divergence.name == "reverse_kl" else change > 1e-3
    same = fdpo_loss(reference_w, reference_l, reference_w, reference_l, divergence=divergence).loss
    torch.testing.assert_close(same, torch.full_like(same, math.log(2)))


@pytest.mark.parametrize("divergence", FAMILY, ids=lambda d: d.name)
@pytest.mark.parametrize("far", [-2000.0, -200.0, -90.0, 90.0, 200.0, 2000.0])
def test_far_log_ratios_stay_finite_and_ordered_in_float32(divergence, far):
    d = torch.tensor([[far, far, 0.0, far], [far, 0.0, far, far + 10.0]], requires_grad=True)
    options = FDPOLoss(divergence=divergence)
    output = options(torch.zeros(4), torch.zeros(4), d[0], d[1])
    (gradient,) = torch.autograd.grad(output.loss.sum(), d)
    assert output.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert output.loss[0].item() == pytest.approx(math.log(2), abs=1e-6)
    assert (gradient[0] <= 0).all()
    assert (gradient[1] >= 0).all()
    if far < 0:
        assert output.loss[3] > 0.7  # the rejected one of two lost completions is the likelier
    share = preference_metrics(options, output)["straight"].item()
    assert (share > 0) == (far < -69 and divergence.name.startswith(("kl", "alpha")) and far < -_edge(divergence))


def _edge(divergence):
    return -f_dpo._edges(divergence, 1e30).low


def test_the_naive_margin_has_no_number_there():
    d = torch.tensor(-200.0, requires_grad=True)
    margin = (1 - torch.exp(-d)) - (1 - torch.exp(-(d - 10.0)))
    assert torch.nn.functional.logsigmoid(margin).isnan()


def test_the_continuation_meets_the_link_with_its_slope():
    options = FDPOLoss(divergence=paper_divergence("forward_kl"), steepest=100.0)
    edge = f_dpo._edges(options.used, 100.0).low
    assert -math.log(100.0) <= edge < -math.log(100.0) + 1
    d = torch.tensor([edge - 1e-6, edge + 1e-6, edge - 3.0], dtype=torch.float64, requires_grad=True)
    score = implicit_reward(torch.zeros_like(d), d, divergence=options.used, steepest=100.0)
    (slope,) = torch.autograd.grad(score.sum(), d)
    assert score[0].item() == pytest.approx(score[1].item(), abs=1e-3)
    assert slope[0].item() == pytest.approx(slope[1].item(), rel=1e-5)
    assert slope[2].item() == slope[0].item()


def test_whole_weighted_batches_reach_the_exact_optimum():
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    reward = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    share = torch.sigmoid(reward[first] - reward[second])
    for divergence in FAMILY:
        logits = reference.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def closure(logits=logits, optimizer=optimizer, divergence=divergence):
            optimizer.zero_grad()
            policy = logits.log_softmax(-1)
            options = FDPOLoss(divergence=divergence, beta=0.5)
            loss = options(reference[first], reference[second], policy[first], policy[second]).loss
            total = (share * loss).sum()
            total.backward()
            return total

        optimizer.step(closure)
        wanted = f_regularised_policy(reference, reward, divergence=divergence, beta=0.5).log_policy.exp()
        assert (logits.detach().softmax(-1) - wanted).abs().max() < 1e-5, divergence.name


def trl_loss(inputs, kind, coefficient, loss_type, smoothing):
    """trl's own loss from sequence log-probabilities, each split over two tokens."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    reference_w, reference_l, chosen, rejected = inputs
    sums = torch.cat([chosen, rejected])
    tokens = torch.stack([0.25 * sums, 0.75 * sums], dim=1)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type=kind, f_alpha_divergence_coef=coefficient, beta=0.1, loss_types=[loss_type],
        loss_weights=[1.0], label_smoothing=smoothing, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
    )  # fmt: skip
    blank = torch.zeros_like(tokens)
    answer = SimpleNamespace(log_probs=tokens, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    ones = torch.ones(len(sums), 3, dtype=torch.long)
    mask = ones.clone()
    mask[:, 0] = 0
    batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": mask}
    batch |= {"ref_chosen_logps": reference_w, "ref_rejected_logps": reference_l}
    return trainer.DPOTrainer._compute_loss(stub, lambda **_: answer, batch, False)


@pytest.mark.parametrize(
    ("name", "alpha", "kind"),
    [
        ("reverse_kl", 0.5, "reverse_kl"), ("forward_kl", 0.5, "forward_kl"), ("jensen_shannon", 0.5, "js_divergence"),
        ("alpha", 0.3, "alpha_divergence"), ("alpha", 0.7, "alpha_divergence"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"])
def test_equal_to_trl(name, alpha, kind, loss, generator):
    inputs = [x.float().requires_grad_(place > 1) for place, x in enumerate(pairs(generator, scale=2.0))]
    smoothing = 0.2 if loss == "robust" else 0.0
    theirs = trl_loss(inputs, kind, 1.0 - alpha, loss, smoothing)
    options = FDPOLoss(
        divergence=paper_divergence(name, alpha=alpha), loss="sigmoid" if loss == "sigmoid_norm" else loss,
        label_smoothing=smoothing,
    )  # fmt: skip
    two = torch.full((64,), 2)
    ours = options(*inputs, lengths=(two, two) if loss in ("ipo", "sigmoid_norm") else None).loss.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    slopes = (torch.autograd.grad(loss, inputs[2:]) for loss in (ours, theirs))
    for found, wanted in zip(*slopes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    if name == "alpha" and loss == "sigmoid":  # the mapping of alpha matters
        assert (trl_loss(inputs, kind, alpha, loss, smoothing) - ours).abs() > 1e-3


def test_label_smoothing_mixes_both_orders_and_its_robust_form_is_unbiased(generator):
    inputs = pairs(generator)
    right = fdpo_loss(*inputs).loss
    wrong = fdpo_loss(inputs[1], inputs[0], inputs[3], inputs[2]).loss
    smooth = fdpo_loss(*inputs, label_smoothing=0.1).loss
    torch.testing.assert_close(smooth, 0.9 * right + 0.1 * wrong)
    robust = FDPOLoss(loss="robust", label_smoothing=0.1)
    seen = 0.9 * robust(*inputs).loss + 0.1 * robust(inputs[1], inputs[0], inputs[3], inputs[2]).loss
    torch.testing.assert_close(seen, right)


def test_matched_curvature_doubles_jensen_shannon(generator):
    inputs = pairs(generator)
    js = paper_divergence("jensen_shannon")
    matched = fdpo_loss(*inputs, divergence=js, match_curvature=True).loss
    torch.testing.assert_close(matched, fdpo_loss(*inputs, divergence=js, beta=0.2).loss)
    plain = fdpo_loss(*inputs, match_curvature=True).loss
    torch.testing.assert_close(plain, fdpo_loss(*inputs).loss)


def test_halves_come_back_in_float32(generator):
    inputs = [x.bfloat16() for x in pairs(generator)]
    options = FDPOLoss(divergence=paper_divergence("forward_kl"))
    output = options(*inputs)
    assert output.loss.dtype == output.chosen_reward.dtype == torch.float32
    assert torch.equal(output.loss, options(*(x.float() for x in inputs)).loss)


def test_rewards_of_tokens_sum_over_their_mask(generator):
    reference, policy = -torch.rand(2, 5, 4, generator=generator)
    mask = torch.rand(5, 4, generator=generator) < 0.6
    policy[~mask] = math.nan
    found = implicit_reward(reference, policy, mask, beta=0.3)
    difference = torch.where(mask, policy - reference, 0.0).sum(-1)
    torch.testing.assert_close(found, 0.3 * difference)


@pytest.mark.parametrize("divergence", FAMILY, ids=lambda d: d.name)
def test_penalty_of_samples_has_the_mean_of_the_divergence(divergence, generator):
    reference, policy = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    mean = (policy.exp() * fppo_penalty(reference, policy, divergence=divergence, beta=0.5)).sum()
    assert mean.item() == pytest.approx(-0.5 * divergence(reference, policy).item(), rel=1e-12)
    if divergence.name == "reverse_kl":
        assert mean.item() == pytest.approx(-0.5 * reverse_kl(reference, policy).item())
        assert mean.item() != pytest.approx(-0.5 * kl(reference, policy).item(), rel=1e-3)


def test_metrics(generator):
    options = FDPOLoss(divergence=paper_divergence("forward_kl"))
    output = options(*pairs(generator, 1000))
    found = preference_metrics(options, output)
    assert found["rewards/accuracy"] == (output.chosen_reward > output.rejected_reward).double().mean()
    assert found["rewards/margin"] == pytest.approx((found["rewards/chosen"] - found["rewards/rejected"]).item())
    assert found["divergence"] > 0
    same = options(*REFERENCE, *REFERENCE)
    assert preference_metrics(options, same)["rewards/accuracy"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta is positive"), ({"loss": "square"}, "loss is one of"), ({"steepest": 0.0}, "steepest"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "does nothing"), ({"label_smoothing": 0.5}, "share of wrong"),
        ({"loss": "robust"}, "without label_smoothing"), ({"divergence": f_divergence("neyman")}, "finite slope"),
        ({"divergence": f_divergence("total_variation")}, "finite slope"),
        ({"divergence": f_divergence("reverse_kl"), "steepest": 0.5}, "steeper than"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        FDPOLoss(**options)(*REFERENCE, *POLICY)


def test_other_refusals():
    with pytest.raises(ConfigError, match="alpha lies strictly"):
        paper_divergence("alpha", alpha=1.0)
    with pytest.raises(ConfigError, match="the paper has"):
        paper_divergence("kl")
    with pytest.raises(ShapeError, match="pairs"):
        fdpo_loss(*REFERENCE, POLICY[0], POLICY[1, :2])
    with pytest.raises(ShapeError, match="pairs"):
        fdpo_loss(*torch.zeros(4, 0))
    for whole in (torch.zeros(4, 3, 5), torch.zeros(4)):  # tokens, which are another objective, and no batch
        with pytest.raises(ShapeError, match="sum over each one's tokens"):
            fdpo_loss(*whole)
    with pytest.raises(ShapeError, match="the reference has shape"):
        fdpo_loss(REFERENCE[0, :2], REFERENCE[1], *POLICY)
    with pytest.raises(DataError, match="1 of 3 log-ratios"):
        fdpo_loss(torch.tensor([-1.0, -math.inf, -2.0]), REFERENCE[1], *POLICY)
    with pytest.raises(ShapeError, match="lengths"):
        FDPOLoss()(*REFERENCE, *POLICY, lengths=(torch.ones(2), torch.ones(3)))
    valid = FDPOLoss(divergence=f_divergence("neyman"), allow_invalid=True)
    assert valid(*REFERENCE, *POLICY).loss.isfinite().all()
