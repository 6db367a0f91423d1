"""f-DPG: the card's numbers, gradients by enumeration, Z and baselines that stay exact, and its limits."""

import math

import pytest
import torch

from kullback.align.f_dpg import (
    FDpg,
    PartitionEstimator,
    RunningBaseline,
    divergence_estimates,
    fdpg_loss,
    quasi_rejection,
    target_divergence,
)
from kullback.align.proposals import ProposalContest
from kullback.align.targets import fit_multipliers, moment_fit
from kullback.align.worlds import RecurrentPolicy, World, draw_sequences
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.divergences import f_divergence, kl

NAMES = ("kl", "reverse_kl", "js", "total_variation", "pearson", "neyman")
VALUES = {
    "kl": 0.3168722597, "reverse_kl": 0.4009410052, "js": 0.1686624605, "total_variation": 0.3680475459,
    "pearson": 0.5989888406, "neyman": 1.2671455040,
}  # fmt: skip
GRADIENTS = {
    "kl": (0.14288927, -0.06816320, -0.23648652, 0.22515828, -0.06339782),
    "reverse_kl": (0.10816963, -0.11820688, -0.24132068, 0.34219332, -0.09083539),
    "js": (0.06465729, -0.04245531, -0.10936567, 0.12262873, -0.03546505),
    "total_variation": (0.11818277, -0.08237755, -0.11119806, 0.13061216, -0.05521932),
}
THETA = torch.tensor([0.3, -0.2, 0.1, 0.4, -0.6], dtype=torch.float64)
LOG_P = torch.tensor([0.5, 1.0, 2.0, 0.25, 0.75], dtype=torch.float64).log()


def surrogate_gradient(name, *, theta=THETA, log_target=LOG_P, baseline=None, shift=0.0):
    """The gradient of fdpg_loss over all outcomes, each once: the proposal is uniform and Z exact."""
    theta = theta.clone().requires_grad_()
    log_policy = theta.log_softmax(0)
    uniform = torch.full_like(log_policy, -math.log(len(theta))).detach()
    partition = log_target.logsumexp(0) + shift
    output = fdpg_loss(
        log_target + shift, log_policy, uniform, partition, divergence=target_divergence(name), baseline=baseline
    )
    return torch.autograd.grad(output.loss, theta)[0]


@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_those_of_the_card(name):
    value = target_divergence(name)(LOG_P.log_softmax(0), THETA.log_softmax(0))
    assert value.item() == pytest.approx(VALUES[name], abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_surrogate_has_the_gradient_of_the_divergence(name):
    theta = THETA.clone().requires_grad_()
    value = target_divergence(name).definition(LOG_P.log_softmax(0), theta.log_softmax(0))
    exact = torch.autograd.grad(value, theta)[0]
    torch.testing.assert_close(surrogate_gradient(name), exact, atol=1e-12, rtol=1e-10)
    if name in GRADIENTS:
        assert exact.tolist() == pytest.approx(GRADIENTS[name], abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_baseline_and_the_scale_of_the_target_change_nothing(name):
    expected = surrogate_gradient(name)
    torch.testing.assert_close(surrogate_gradient(name, baseline=7.5), expected, atol=1e-11, rtol=1e-10)
    torch.testing.assert_close(surrogate_gradient(name, shift=3.0), expected, atol=1e-12, rtol=1e-10)


def test_a_wrong_sign_or_a_reward_with_a_gradient_is_caught():
    """Listed wrong: the pseudo-reward differentiated too, and the ratio upside down."""
    theta = THETA.clone().requires_grad_()
    log_policy, log_p = theta.log_softmax(0), LOG_P.log_softmax(0)
    js, exact = target_divergence("js"), torch.tensor(GRADIENTS["js"], dtype=torch.float64)
    live = -(log_policy.exp().detach() * -js.link(log_policy - log_p) * log_policy).sum()
    upside_down = -(log_policy.exp().detach() * js.pseudo_reward(log_p - log_policy) * log_policy).sum()
    for wrong in (live, upside_down):
        found = torch.autograd.grad(wrong, theta, retain_graph=True)[0]
        assert not torch.allclose(found, exact, atol=1e-3)


def test_reverse_kl_is_rl_with_a_kl_penalty():
    base, reward, beta = torch.tensor([0.1, -0.3, 0.5, 0.0, 0.2], dtype=torch.float64).log_softmax(0), LOG_P.exp(), 0.7
    theta = THETA.clone().requires_grad_()
    log_policy = theta.log_softmax(0)
    value = (log_policy.exp() * reward).sum() - beta * kl(log_policy, base)
    exact = torch.autograd.grad(value, theta)[0]
    found = surrogate_gradient("reverse_kl", log_target=base + reward / beta)
    torch.testing.assert_close(found, -exact / beta, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "total_variation"])  # which has a kink there
def test_at_the_target_there_is_nothing_to_learn(name):
    log_policy = LOG_P.log_softmax(0)
    output = fdpg_loss(LOG_P, log_policy, log_policy, LOG_P.logsumexp(0), divergence=target_divergence(name))
    assert output.pseudo_reward.abs().max() < 1e-12
    assert surrogate_gradient(name, theta=log_policy).abs().max() < 1e-12


def test_the_partition_function_in_pieces_is_that_at_once():
    draw = generator(0, "weights")
    log_target, log_proposal = (torch.randn(300, generator=draw, dtype=torch.float64) * 20 for _ in range(2))
    context = torch.randint(4, (300,), generator=draw)
    known = PartitionEstimator()
    for start in range(0, 300, 70):
        rows = slice(start, start + 70)
        known.update(log_target[rows], log_proposal[rows], context[rows])
    for place in range(4):
        weights = (log_target - log_proposal)[context == place]
        exact = weights.logsumexp(0) - math.log(len(weights))
        assert known.log_partition(torch.tensor([place])).item() == pytest.approx(exact.item(), abs=1e-12)
    copy = PartitionEstimator()
    copy.load_state_dict(known.state_dict())
    assert torch.equal(copy.log_partition(context), known.log_partition(context))
    with pytest.raises(DataError, match="before a sample"):
        known.log_partition(torch.tensor([9]))


def test_a_bound_on_the_partition_function_cuts_the_largest_weights():
    known = PartitionEstimator(largest=2.0)
    known.update(torch.tensor([1.0, 3.0, 100.0]).log(), torch.zeros(3))
    assert known.log_partition().exp().item() == pytest.approx(2.0)
    known.update(torch.tensor([0.5]).log(), torch.zeros(1))
    assert known.log_partition().exp().item() == pytest.approx(6.5 / 4)
    free = PartitionEstimator(largest=50.0)
    free.update(torch.tensor([1.0, 3.0, 100.0]).log(), torch.zeros(3))
    assert free.log_partition().exp().item() == pytest.approx(104 / 3)


def test_a_context_without_mass_is_passed_over():
    known = PartitionEstimator()
    known.update(torch.tensor([-math.inf, -math.inf, 0.0]), torch.zeros(3), torch.tensor([0, 0, 1]))
    partition = known.log_partition(torch.tensor([0, 0, 1]))
    log_policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([-math.inf, -math.inf, 0.0], dtype=torch.float64)
    output = fdpg_loss(target, log_policy, log_policy.detach(), partition)
    gradient = torch.autograd.grad(output.loss, log_policy)[0]
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert gradient[2] != 0.0


def test_the_baseline_is_the_mean_of_what_came_before():
    known = RunningBaseline(window=3)
    assert known.value is None
    known.update(torch.tensor([1.0, 2.0]))
    assert known.value == 1.5
    known.update(torch.tensor([6.0, 7.0]))
    assert known.value == 5.0


def test_multipliers_of_the_card():
    rate = torch.tensor([[1.0], [0.0]])
    found = fit_multipliers(rate, torch.tensor([0.5]), log_weights=torch.tensor([0.2, 0.8], dtype=torch.float64).log())
    assert found.item() == pytest.approx(math.log(4.0), abs=1e-10)


def test_two_multipliers_take_few_steps_of_newton(monkeypatch):
    solved = []
    solve = torch.linalg.lstsq
    monkeypatch.setattr(torch.linalg, "lstsq", lambda a, b: solved.append(1) or solve(a, b))
    features = torch.cartesian_prod(*2 * [torch.tensor([0.0, 1.0])]).double()
    weights = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    wanted = torch.tensor([0.5, 0.8], dtype=torch.float64)
    found = fit_multipliers(features, wanted, log_weights=weights.log())
    shares = (weights.log() + features @ found).softmax(0)
    torch.testing.assert_close(shares @ features, wanted, atol=1e-8, rtol=0)
    assert 2 <= len(solved) <= 10
    # as a reward with beta 1 they make the tilted target the law with these moments
    tilted = FDpg(beta=1.0)._preference(features @ found)
    torch.testing.assert_close((weights.log() + tilted).softmax(0), shares)


def test_the_steps_of_the_paper_go_where_newton_goes():
    draw = generator(3, "features")
    features = torch.randn(512, 2, generator=draw, dtype=torch.float64)
    log_weights = 0.3 * torch.randn(512, generator=draw, dtype=torch.float64)
    wanted = torch.tensor([0.3, -0.2], dtype=torch.float64)
    given = {"log_weights": log_weights}
    newton = fit_multipliers(features, wanted, **given)
    steps = fit_multipliers(features, wanted, **given, method="gradient")
    torch.testing.assert_close(steps, newton, atol=1e-4, rtol=0)
    near, exact, none = (moment_fit(features, wanted, x, **given) for x in (steps, newton, torch.zeros(2)))
    assert 1e-7 < near.error < 1e-5  # bites: it stops at the tolerance and not at Newton's
    assert exact.error < 1e-9
    assert none.error > 0.1
    share = (log_weights + features @ newton).softmax(0)
    assert exact.effective.item() == pytest.approx(1 / share.square().sum().item())
    assert exact.effective < none.effective < 512
    # by hand, for two steps
    binary, half = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    odds = torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    first = 0.05 * (0.5 - 0.2)
    rate = 1 / (1 + 4 * math.exp(-first))
    found = fit_multipliers(binary, half, log_weights=odds, method="gradient", tolerance=0.5 - rate + 1e-9)
    assert found.item() == pytest.approx(first)
    assert fit_multipliers(binary, half, log_weights=odds, method="gradient").item() == pytest.approx(
        math.log(4), abs=1e-3
    )
    with pytest.raises(ConfigError, match="newton or gradient"):
        fit_multipliers(binary, half, method="sgd")
    with pytest.raises(ShapeError, match="multipliers"):
        moment_fit(binary, half, torch.zeros(2))


def test_sampled_gradients_of_an_autoregressive_policy_are_right_in_the_mean():
    world = World(3, 3)
    policy = RecurrentPolicy(world, generator=generator(1, "policy"), width=4, dtype=torch.float64)
    draw = generator(2, "target")
    log_target = torch.randn(world.size, generator=draw, dtype=torch.float64)
    js = target_divergence("js")
    exact = torch.autograd.grad(js(log_target.log_softmax(0), policy.all_log_probs()), list(policy.parameters()))
    exact = torch.cat([g.flatten() for g in exact])
    everything = policy.all_log_probs()
    found = []
    for part in range(40):
        x = draw_sequences(world, everything, 500, generator=generator(3, "samples", part))
        places = world.index(x)
        output = fdpg_loss(
            log_target[places], everything[places], everything[places].detach(), log_target.logsumexp(0), divergence=js
        )
        gradients = torch.autograd.grad(output.loss, list(policy.parameters()), retain_graph=True)
        found.append(torch.cat([g.flatten() for g in gradients]))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() <= 6 * error + 1e-12).all()


def test_estimates_weighted_from_another_proposal():
    log_policy, log_p = THETA.log_softmax(0), LOG_P.log_softmax(0)
    places = torch.multinomial(torch.full((5,), 0.2), 200_000, replacement=True, generator=generator(4, "uniform"))
    uniform = torch.full((len(places),), -math.log(5.0), dtype=torch.float64)
    found = divergence_estimates(LOG_P[places], log_policy[places], uniform, LOG_P.logsumexp(0))
    for name, value in found.items():
        exact = target_divergence(name)(log_p, log_policy).item()
        assert value.item() == pytest.approx(exact, rel=0.02)


def test_quasi_rejection_is_exact_when_the_bound_holds():
    log_p = LOG_P.log_softmax(0)
    places = torch.multinomial(torch.full((5,), 0.2), 100_000, replacement=True, generator=generator(5, "uniform"))
    uniform = torch.full((len(places),), -math.log(5.0), dtype=torch.float64)
    bound = (LOG_P + math.log(5.0)).max().item()
    kept, rate = quasi_rejection(LOG_P[places], uniform, log_bound=bound, generator=generator(6, "coins"))
    assert rate.item() == pytest.approx(LOG_P.exp().sum().item() / math.exp(bound), rel=0.02)
    shares = places[kept].bincount(minlength=5) / kept.sum()
    error = (log_p.exp() * (1 - log_p.exp()) / kept.sum()).sqrt()
    assert ((shares - log_p.exp()).abs() < 6 * error).all()
    more, _ = quasi_rejection(LOG_P[places], uniform, log_bound=bound - 1.0, generator=generator(6, "coins"))
    assert more.sum() > kept.sum()


def batch_of(world, log_policy, reference, reward, count, draw):
    """What a trainer would hand over: completions of one prompt of which every token is known."""
    x = draw_sequences(world, log_policy, count, generator=draw)
    places = world.index(x)
    mask = torch.zeros(count, 2, dtype=torch.bool)
    mask[:, 0] = True
    columns = torch.zeros(count, 2, dtype=torch.float64)
    old, given = columns.clone(), columns.clone()
    old[:, 0], given[:, 0] = log_policy[places], reference[places]
    return {
        "completion_mask": mask, "old_log_prob": old, "reference_log_prob": given, "rewards": reward[places],
        "prompt_index": torch.zeros(count, dtype=torch.long),
    }, places  # fmt: skip


def test_the_method_reaches_the_tilted_optimum():
    world, beta = World(4, 2), 0.5
    reference = torch.randn(world.size, generator=generator(7, "reference"), dtype=torch.float64).log_softmax(0)
    reward = torch.rand(world.size, generator=generator(8, "reward"), dtype=torch.float64)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.03)
    method = FDpg(beta=beta)
    for step in range(300):
        log_policy = logits.log_softmax(0)
        draw = generator(9, "rollouts", step)
        batch, places = batch_of(world, log_policy.detach(), reference, reward, 256, draw)
        batch = method.prepare(batch, group=4, generator=draw)
        log_prob = torch.stack([log_policy[places], torch.zeros(256, dtype=torch.float64)], 1)
        loss, _ = method.loss(log_prob, batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimum = (reference + reward / beta).log_softmax(0)
    start, end = (kl(optimum, x).item() for x in (reference, logits.detach().log_softmax(0)))
    assert end < 0.05 * start
    partition = (reference + reward / beta).logsumexp(0).item()
    assert method.partition.log_partition().item() == pytest.approx(partition, abs=0.05)
    again = FDpg(beta=beta)
    again.load_state_dict(method.state_dict())
    assert again.running.value == method.running.value


@pytest.mark.parametrize("baseline", ["window", "leave-one-out", "none"])
def test_every_baseline_and_a_constraint(baseline):
    world = World(3, 2)
    reference = torch.zeros(world.size, dtype=torch.float64).log_softmax(0)
    reward = (torch.arange(world.size) % 3 == 0).double()
    batch, _ = batch_of(world, reference, reference, reward, 64, generator(10, "x"))
    method = FDpg(target="constraint", baseline=baseline, divergence=target_divergence("js"))
    prepared = method.prepare(batch, group=4, generator=generator(11, "x"))
    right = batch["rewards"] > 0.5
    assert prepared["advantages"][right].min() > prepared["advantages"][~right].max()
    _, metrics = method.loss(prepared["old_log_prob"], prepared, count=64.0)
    assert metrics["target_share"].item() == pytest.approx(right.double().mean().item()), "what Z and kl rest on"
    nothing = method.prepare({**batch, "rewards": torch.zeros(64), "prompt_index": torch.ones(64).long()}, group=4,
                             generator=generator(11, "x"))  # fmt: skip
    assert method.loss(nothing["old_log_prob"], nothing, count=64.0)[1]["target_share"].item() == 0.0


def test_bad_input():
    good = torch.zeros(3, dtype=torch.float64) - 1.0
    with pytest.raises(ShapeError, match="one log-probability a sample"):
        fdpg_loss(good, good[:2], good, 0.0)
    with pytest.raises(ShapeError):
        fdpg_loss(good[:0], good[:0], good[:0], 0.0)
    with pytest.raises(DataError, match="NaN"):
        fdpg_loss(good, good * math.nan, good, 0.0)
    outside = good.clone()
    outside[0] = -math.inf
    with pytest.raises(DataError, match="outside the target's support"):
        fdpg_loss(outside, good, good, 0.0, divergence=f_divergence("reverse_kl"))
    assert fdpg_loss(outside, good, good, 0.0).pseudo_reward.isfinite().all()
    with pytest.raises(ConfigError, match="constraint leaves no mass"):
        FDpg(target="constraint", divergence=f_divergence("reverse_kl"))
    for wrong in ({"beta": 0.0}, {"target": "best"}, {"baseline": "median"}):
        with pytest.raises(ConfigError):
            FDpg(**wrong)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="largest ratio"):
            FDpg(max_ratio=wrong)
        with pytest.raises(ConfigError, match="largest ratio"):
            fdpg_loss(good, good, good, 0.0, max_ratio=wrong)
    estimator = PartitionEstimator()
    for context in (None, torch.tensor([0, 1])):
        with pytest.raises(ShapeError, match="one a sample"):
            estimator.update(good, good[:2] if context is None else good, context)
    with pytest.raises(DataError, match="numbered from 0"):
        estimator.update(good, good, torch.tensor([0, 1, -1]))
    with pytest.raises(ConfigError, match="window"):
        RunningBaseline(0)
    with pytest.raises(ConfigError, match="bound"):
        quasi_rejection(good, good, log_bound=math.inf, generator=generator(0))


def test_the_contest_of_proposals_estimates_both_divergences_and_renews_for_the_nearer():
    """From samples of the uniform proposal; listed wrong: the policy's divergence without the weight pi / q."""
    log_policy, log_p = THETA.log_softmax(0), LOG_P.log_softmax(0)
    uniform = torch.full((5,), 0.2, dtype=torch.float64).log()
    places = torch.arange(5).repeat_interleave(100)  # each as often as the proposal draws it
    given = (LOG_P[places], log_policy[places], uniform[places], LOG_P.logsumexp(0).expand(500))
    for name in ("kl", "js", "total_variation"):
        contest = ProposalContest(divergence=target_divergence(name), every=4)
        for _ in range(2):
            contest.update(*given)
        exact = [target_divergence(name)(log_p, q).item() for q in (log_policy, uniform)]
        assert contest.values == pytest.approx(exact, abs=1e-12)
        again = ProposalContest(divergence=target_divergence(name), every=4)
        again.load_state_dict(contest.state_dict())
        assert not contest.decide(3)
        assert contest.decide(4) == again.decide(4) == (exact[0] < exact[1])
        assert not contest.decide(8), "nothing has come since"
        unweighted = target_divergence(name).penalty(log_policy - log_p, samples_from="model")[places].mean().item()
        assert unweighted != pytest.approx(exact[0], abs=1e-3)
    nearer = ProposalContest()
    nearer.update(LOG_P[places], log_p[places], uniform[places], LOG_P.logsumexp(0).expand(500))
    assert nearer.values[0] == pytest.approx(0.0, abs=1e-12)
    assert nearer.decide(16)
    with pytest.raises(ConfigError, match="every"):
        ProposalContest(every=0)


def test_a_defended_proposal_is_the_mixture_that_was_sampled():
    reference, log_policy = torch.tensor([0.7, 0.2, 0.1]).double().log(), torch.tensor([0.1, 0.3, 0.6]).double().log()
    method = FDpg(defence=0.25, baseline="none", beta=0.5)
    places = torch.arange(3).repeat(4)
    columns = {"policy_log_prob": log_policy, "old_log_prob": log_policy, "reference_log_prob": reference}
    batch = {name: law[places].unsqueeze(1) for name, law in columns.items()} | {
        "completion_mask": torch.ones(12, 1, dtype=torch.bool), "rewards": torch.zeros(12).double(),
        "prompt_index": torch.zeros(12, dtype=torch.long),
    }  # fmt: skip
    assert (method.opponents(4), method.opponents(12)) == (1, 3)
    found = method.prepare(batch, group=12, generator=generator(0))["log_proposal"]
    exact = (0.75 * log_policy.exp() + 0.25 * reference.exp()).log()
    torch.testing.assert_close(found, exact[places])
    with pytest.raises(ConfigError, match="defence"):
        FDpg(defence=1.0)
    with pytest.raises(ConfigError, match="proposal"):
        FDpg(proposal="best")
