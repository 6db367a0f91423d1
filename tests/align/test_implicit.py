"""f-SFT, implicit values and exact matching against the card's numbers, duality, finite differences and a tree."""

import math

import pytest
import torch

from kullback.align.f_dpo import fdpo_loss
from kullback.align.implicit import (
    FSFT,
    drift_report,
    fsft_loss,
    implicit_reward_accuracy,
    matching_divergence,
    phi_transform,
    prefix_values,
)
from kullback.align.matching import matching_dual, matching_optimum
from kullback.align.methods import Supervised
from kullback.align.worlds import TabularPolicy, World, draw_sequences, regularised_optimum
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import f_divergence, kl

EXPERT = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
POLICY = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
NAMES = ["chi2", "hellinger", "js", "reverse_kl", "forward_kl"]
CARD = {
    "chi2": ((0.2819931, 0.3250509, 0.3929561), 0.1885819568),
    "hellinger": ((0.3972696, 0.3123843, 0.2903461), 0.0914534743),
    "js": ((0.3984353, 0.3121408, 0.2894239), 0.0909563999),
    "reverse_kl": ((0.3391344, 0.3217312, 0.3391344), 0.1398676309),
    "forward_kl": ((0.3488349, 0.3102531, 0.3409121), 0.1368070824),
    "tv": ((0.3353594, 0.3000000, 0.3646406), 0.2204163407),
}


def dual_value(reward, log_expert, log_reference, beta, name):
    phi = phi_transform(reward, divergence=matching_divergence(name), largest_weight=None)[0]
    return (log_expert.exp() * phi).sum(-1) - beta * (log_reference + reward / beta).logsumexp(-1)


@pytest.mark.parametrize("name", CARD)
def test_matching_of_the_card(name):
    policy, value = CARD[name]
    found = matching_dual(EXPERT, REFERENCE, beta=1.0, divergence=matching_divergence(name))
    torch.testing.assert_close(found.log_policy.exp(), torch.tensor(policy, dtype=torch.float64), atol=6e-8, rtol=0)
    assert found.value.item() == pytest.approx(value, abs=1e-10)
    if name == "tv":
        assert found.reward.abs().max().item() <= 0.5 + 1e-12
        dual = (EXPERT.exp() * found.reward).sum() - (REFERENCE + found.reward).logsumexp(-1)
        assert dual.item() == pytest.approx(value, abs=1e-10)
        return
    assert dual_value(found.reward, EXPERT, REFERENCE, 1.0, name).item() == pytest.approx(value, abs=1e-10)
    wrong = matching_dual(EXPERT, REFERENCE, beta=1.0, divergence=matching_divergence(name).dual())
    assert abs(wrong.value.item() - value) > 1e-4 or name in ("hellinger", "js")


def test_likelihood_ignores_the_pull_and_reverse_kl_is_the_geometric_mean():
    found = matching_dual(EXPERT, REFERENCE, beta=1.0, divergence=None)
    assert torch.equal(found.log_policy, EXPERT)
    assert found.value.item() == pytest.approx(0.2748872196, abs=1e-10)
    mean = (0.5 * (EXPERT + REFERENCE)).log_softmax(-1)
    optimum = matching_optimum(EXPERT, REFERENCE, beta=1.0, divergence=f_divergence("reverse_kl"))
    torch.testing.assert_close(optimum, mean)


@pytest.mark.parametrize("name", NAMES)
def test_no_gap_on_random_triples_and_the_two_limits(name, generator):
    scale = 3 * torch.rand(2, 100, 1, generator=generator, dtype=torch.float64)
    expert, reference = (scale * torch.randn(2, 100, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    divergence = matching_divergence(name)
    for beta in (0.05, 0.7, 4.0):
        found = matching_dual(expert, reference, beta=beta, divergence=divergence)
        assert (found.log_policy.logsumexp(-1)).abs().max() < 1e-12
        gap = dual_value(found.reward, expert, reference, beta, name) - found.value
        assert gap.abs().max() < 1e-8
        noise = 0.01 * torch.randn(100, 6, generator=generator, dtype=torch.float64)
        around = (found.log_policy + noise).log_softmax(-1)
        assert (divergence(expert, around) + beta * kl(around, reference) >= found.value - 1e-12).all()
    near, far = (matching_optimum(expert, reference, beta=beta, divergence=divergence) for beta in (1e-9, 1e9))
    assert (near.exp() - expert.exp()).abs().max() < 1e-3
    assert (far.exp() - reference.exp()).abs().max() < 1e-3


def test_objective_at_a_policy_of_the_card():
    d = POLICY - REFERENCE

    def objective(name, c=0.0):
        phi = phi_transform(d + c, divergence=matching_divergence(name), largest_weight=None)[0]
        return (EXPERT.exp() * phi).sum().item() - c

    assert objective("tv") == pytest.approx(0.2444084655, abs=1e-10)
    assert objective("chi2") == pytest.approx(0.1713046979, abs=1e-10)
    assert objective("hellinger") == pytest.approx(-0.0041602139, abs=1e-10)
    assert objective("js") == pytest.approx(-0.0169899039, abs=4e-10)
    assert objective("chi2", -(EXPERT.exp() * d).sum().item()) == pytest.approx(0.1862385724, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("largest", [4.0, 100.0])
def test_weights_are_the_slopes_of_phi(name, largest):
    divergence = matching_divergence(name)
    x = torch.linspace(-50.0, 50.0, 2001, dtype=torch.float64).requires_grad_()
    phi, weight = phi_transform(x, divergence=divergence, largest_weight=largest)
    (slope,) = torch.autograd.grad(phi.sum(), x)
    assert phi.isfinite().all()
    torch.testing.assert_close(slope, weight, rtol=1e-10, atol=1e-12)
    h = 1e-5
    ends = (phi_transform(x.detach() + s * h, divergence=divergence, largest_weight=largest)[0] for s in (1, -1))
    plus, minus = ends
    torch.testing.assert_close((plus - minus) / (2 * h), weight, rtol=1e-4, atol=1e-4)
    assert weight.max().item() == pytest.approx(largest) or name == "chi2"
    assert (weight.diff() <= 1e-12).all()
    middle = phi_transform(torch.zeros(1, dtype=torch.float64), divergence=divergence)
    assert (abs(middle[0].item()), middle[1].item()) == (0.0, pytest.approx(1.0))


def test_weights_of_the_table():
    x = torch.linspace(-0.4, 3.0, 18, dtype=torch.float64)
    table = {
        "chi2": 1 - x / 2, "hellinger": (1 + x) ** -2, "js": 1 / (2 * x.exp() - 1), "reverse_kl": (-x).exp(),
        "forward_kl": 1 / (1 + x), "tv": torch.ones_like(x),
    }  # fmt: skip
    for name, expected in table.items():
        weight = phi_transform(x, divergence=matching_divergence(name))[1]
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    assert (table["chi2"] < 0).any()


def batch(generator, rows=6, length=4):
    reference, policy = -2 * torch.rand(2, rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 0] = True
    policy[~mask] = math.nan
    return reference, policy.requires_grad_(), mask


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_total_variation_is_cross_entropy(level, generator):
    reference, policy, mask = batch(generator)
    plain = torch.where(mask, -policy, 0.0)
    (wanted,) = torch.autograd.grad(plain.sum(), policy)
    for given in (None, reference):
        output = fsft_loss(given, policy, mask, divergence=matching_divergence("tv"), beta=0.3, level=level)
        (found,) = torch.autograd.grad(output.loss.sum(), policy)
        assert torch.equal(found, wanted)
        constant = 0.0 if given is None else torch.where(mask, reference, 0.0).sum()
        torch.testing.assert_close(output.loss.sum(), plain.sum() + constant)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gradient_is_the_weighted_one_of_likelihood(name, level, generator):
    reference, policy, mask = batch(generator)
    output = fsft_loss(reference, policy, mask, divergence=matching_divergence(name), beta=0.2, level=level)
    (found,) = torch.autograd.grad(output.loss.sum(), policy)
    weight = output.weight if level == "token" else output.weight.unsqueeze(1)
    torch.testing.assert_close(found, torch.where(mask, -weight.expand_as(policy), 0.0), rtol=1e-10, atol=1e-12)
    same = fsft_loss(reference, reference, mask, divergence=matching_divergence(name), level=level)
    kept = same.weight[mask] if level == "token" else same.weight
    torch.testing.assert_close(kept, torch.ones_like(kept))


@pytest.mark.parametrize("name", NAMES)
def test_profile_is_the_best_constant(name, generator):
    reference, policy, mask = batch(generator)
    divergence = matching_divergence(name)

    def objective(baseline):
        return -fsft_loss(reference, policy, mask, divergence=divergence, beta=0.3, baseline=baseline).loss.mean()

    output = fsft_loss(reference, policy, mask, divergence=divergence, beta=0.3, baseline="profile")
    assert output.weight.mean().item() == pytest.approx(1.0, abs=1e-9)
    assert all(objective(output.baseline + s) < objective(output.baseline) - 1e-7 for s in (-0.05, 0.05))
    torch.testing.assert_close(objective("profile"), objective(output.baseline))
    if name == "chi2":
        x = 0.3 * torch.where(mask, policy - reference, 0.0).sum(-1)
        torch.testing.assert_close(0.3 * objective("profile"), x.mean() - 0.25 * x.var(correction=0))


def test_learned_baseline_ends_at_the_profile(generator):
    reference, policy, mask = batch(generator)
    learned = torch.zeros((), dtype=torch.float64, requires_grad=True)
    divergence = matching_divergence("js")
    optimizer = torch.optim.SGD([learned], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        fsft_loss(reference, policy, mask, divergence=divergence, beta=0.3, baseline=learned).loss.mean().backward()
        optimizer.step()
    wanted = fsft_loss(reference, policy, mask, divergence=divergence, beta=0.3, baseline="profile").baseline
    assert learned.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_method_is_sft_under_total_variation_and_says_what_it_sees(generator):
    reference, policy, mask = batch(generator)
    given = {"completion_mask": mask, "reference_log_prob": reference}
    plain = Supervised()
    method = FSFT(divergence=matching_divergence("tv"))
    assert not method.needs_reference
    assert method.count(given) == plain.count(given)
    loss, seen = method.loss(policy, {"completion_mask": mask}, count=method.count(given))
    torch.testing.assert_close(loss, plain.loss(policy, given, count=plain.count(given))[0])
    assert not seen
    for level in ("sequence", "token"):
        loss, seen = FSFT(divergence=matching_divergence("js"), beta=0.2, level=level).loss(policy, given, count=2.0)
        assert loss.isfinite()
        assert seen["weight/least"] <= seen["weight"] <= seen["weight/largest"]


def test_fitted_f_sft_reaches_the_matching_optimum():
    logits = REFERENCE.clone().requires_grad_()
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)
    divergence = matching_divergence("hellinger")
    optimizer = torch.optim.LBFGS([logits, constant], max_iter=1000, tolerance_grad=1e-13, tolerance_change=1e-18,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        output = fsft_loss(REFERENCE.unsqueeze(1), logits.log_softmax(-1).unsqueeze(1), torch.ones(3, 1),
                           divergence=divergence, baseline=constant, largest_weight=None)  # fmt: skip
        loss = (EXPERT.exp() * output.loss).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().softmax(-1)
    torch.testing.assert_close(found, torch.tensor(CARD["hellinger"][0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_prefix_values_are_those_of_the_tree(generator):
    world, beta = World(3, 3), 0.7
    log_reference = TabularPolicy(world, generator=generator, scale=1.0).all_log_probs().detach()
    reward = torch.randn(27, generator=generator, dtype=torch.float64)
    optimum = regularised_optimum(log_reference, reward, coefficient=beta)

    def conditional(table):
        """Log-probabilities of each token [27, 3] given what is before it."""
        whole = [table.view(3**k, -1).logsumexp(-1).repeat_interleave(27 // 3**k) for k in range(4)]
        return torch.stack([whole[k + 1] - whole[k] for k in range(3)], dim=1)

    tilted = (log_reference + reward / beta).view(27, 1)
    mass = [tilted.view(3**k, -1).logsumexp(-1) - log_reference.view(3**k, -1).logsumexp(-1) for k in range(4)]
    value = [beta * m for m in mass]  # V(s) = beta log E_reference[e^(r / beta) | s]
    wanted = torch.stack([value[k].repeat_interleave(27 // 3**k) - value[0] for k in range(4)], dim=1)
    found = prefix_values(conditional(log_reference), conditional(optimum), torch.ones(27, 3), beta=beta)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, -1], reward - value[0], rtol=1e-12, atol=1e-12)
    step = conditional(log_reference).view(3, 3, 3, 3)[:, :, 0, 1].exp()  # p(second | first)
    grown = (found.view(3, 3, 3, 4)[:, :, 0, 2] / beta).exp()
    torch.testing.assert_close((step * grown).sum(1), (found.view(3, 9, 4)[:, 0, 1] / beta).exp())  # a martingale
    tokens = conditional(log_reference), conditional(optimum), torch.ones(27, 3)
    shifted = prefix_values(*tokens, beta=beta, start=value[0])
    torch.testing.assert_close(shifted[:, -1], reward)


def test_accuracy_of_the_optimum_is_one_and_of_the_reference_one_half(generator):
    log_p = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(50, generator=generator, dtype=torch.float64)
    best = regularised_optimum(log_p, reward, coefficient=0.3)
    better, worse = reward.argsort(descending=True).view(2, 25)
    assert implicit_reward_accuracy(log_p[better], log_p[worse], best[better], best[worse]) == 1.0
    assert implicit_reward_accuracy(log_p[better], log_p[worse], log_p[better], log_p[worse]) == 0.5
    assert implicit_reward_accuracy(log_p[worse], log_p[better], best[worse], best[better]) == 0.0


def test_dpo_after_sft_starts_at_log_two(generator):
    model = -torch.rand(2, 8, generator=generator)
    assert torch.allclose(fdpo_loss(*model, *model).loss, torch.tensor(math.log(2)))


def test_drift_of_samples_is_that_of_the_laws(generator):
    world = World(3, 2)
    reference, policy = (TabularPolicy(world, generator=generator, scale=s) for s in (0.2, 1.0))
    with torch.no_grad():
        strings = draw_sequences(world, policy.all_log_probs(), 4000, generator=generator)
        exact = kl(policy.all_log_probs(), reference.all_log_probs()).item()
        spread = -(policy.all_log_probs().exp() * policy.all_log_probs()).sum().item()
        first = [m.logits[0].log_softmax(-1)[0, strings[:, 0]] for m in (reference, policy)]
        whole = [m.log_probs(strings) for m in (reference, policy)]
        tokens = [torch.stack([f, w - f], 1) for f, w in zip(first, whole, strict=True)]
    found = drift_report(*tokens, torch.ones(4000, 2))
    assert abs(found["kl"] - exact) < 6 * found["kl_error"]
    assert found["kl_error"] < 0.1 * exact
    assert found["kl_token"] == pytest.approx(found["kl"] / 2)
    assert found["tokens"] == 2.0
    assert found["entropy"] == pytest.approx(spread, abs=0.1)


def test_what_is_refused(generator):
    reference, policy, mask = batch(generator)
    js, tv = matching_divergence("js"), matching_divergence("tv")
    for options, words in (
        ({"divergence": js, "beta": 0.0}, "beta"), ({"divergence": tv, "baseline": "profile"}, "drops out"),
        ({"divergence": js, "baseline": "best"}, "baseline is"), ({"divergence": js, "level": "word"}, "level is"),
        ({"divergence": js, "largest_weight": 1.0}, "largest_weight exceeds"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            fsft_loss(reference, policy, mask, **options)
        with pytest.raises(ConfigError, match=words):
            FSFT(**options)
    with pytest.raises(ConfigError, match="give log_reference"):
        fsft_loss(None, policy, mask, divergence=js)
    with pytest.raises(ConfigError, match="the divergences of f-SFT"):
        matching_divergence("kl")
    with pytest.raises(DataError, match="phi of kl ends at x = -1"):
        fsft_loss(reference, reference - 3.0, mask, divergence=f_divergence("kl"), largest_weight=None)
    with pytest.raises(ShapeError, match="larger batch"):
        fsft_loss(reference[:1], policy[:1], mask[:1], divergence=js, baseline="profile")
    with pytest.raises(ShapeError, match="one number"):
        fsft_loss(reference, policy, mask, divergence=js, baseline=torch.zeros(6))
    with pytest.raises(ShapeError, match="\\[B, T\\]"):
        fsft_loss(reference, policy, mask[:, :2], divergence=js)
    with pytest.raises(DataError, match="log-ratios"):
        fsft_loss(reference, policy, torch.ones_like(mask), divergence=js)
    with pytest.raises(DataError, match="mass everywhere"):
        matching_dual(torch.tensor([0.0, -math.inf]), REFERENCE[:2], beta=1.0, divergence=js)
    with pytest.raises(ShapeError, match="same outcomes"):
        matching_dual(EXPERT, REFERENCE[:2], beta=1.0, divergence=js)
    with pytest.raises(ConfigError, match="beta"):
        matching_dual(EXPERT, REFERENCE, beta=math.inf, divergence=js)


@pytest.mark.parametrize("name", [*NAMES, "tv"])
def test_no_limit_of_the_weight_is_none_and_not_infinity(name):
    """phi's straight continuation from infinitely far is no number."""
    x = torch.linspace(-0.6, 3.0, 5)
    with pytest.raises(ConfigError, match="largest_weight exceeds"):
        phi_transform(x, divergence=matching_divergence(name), largest_weight=math.inf)
    found, _ = phi_transform(x, divergence=matching_divergence(name), largest_weight=1e6)
    whole, _ = phi_transform(x, divergence=matching_divergence(name), largest_weight=None)
    torch.testing.assert_close(found, whole)


def test_what_is_refused_of_values_and_drift():
    tokens, mask = -torch.rand(3, 4), torch.ones(3, 4)
    for start in (torch.zeros(2), torch.zeros(0)):
        with pytest.raises(ShapeError, match="start is one value, or one for each of 3"):
            prefix_values(tokens, tokens, mask, start=start)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="beta is positive"):
            prefix_values(tokens, tokens, mask, beta=beta)
    with pytest.raises(DataError, match="infinite or NaN"):
        prefix_values(torch.full((3, 4), -math.inf), tokens, mask)
    with pytest.raises(DataError, match="there is none"):
        drift_report(tokens, tokens, 0 * mask)
    with pytest.raises(DataError, match="there is none"):
        drift_report(tokens[:0], tokens[:0], mask[:0])
    with pytest.raises(ShapeError, match="entropies are"):
        drift_report(tokens, tokens, mask, entropy=torch.zeros(3))
    with pytest.raises(DataError, match="some entropies"):
        drift_report(tokens, tokens, mask, entropy=math.nan * tokens)
    one = drift_report(tokens, tokens, torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert one["tokens"] == 1.0  # an empty completion counts, as one of no tokens


def test_what_is_refused_of_matching_and_baselines():
    js, tokens = matching_divergence("js"), -torch.rand(3, 4)
    with pytest.raises(ShapeError, match="one or more"):
        matching_dual(torch.zeros(2, 0), torch.zeros(2, 0), beta=1.0, divergence=js)
    with pytest.raises(ShapeError, match="do not pair up"):
        matching_dual(EXPERT.expand(2, 3), REFERENCE.expand(4, 3), beta=1.0, divergence=js)
    for pair in ((EXPERT + 1.0, REFERENCE), (EXPERT, torch.zeros(3))):  # logits in the place of log-probabilities
        with pytest.raises(DataError, match="do not sum to 1"):
            matching_optimum(*pair, beta=1.0, divergence=js)
    half = matching_optimum(EXPERT.bfloat16(), REFERENCE.half(), beta=1.0, divergence=js)
    assert (half.exp() - torch.tensor(CARD["js"][0], dtype=torch.float64)).abs().max() < 1e-2
    with pytest.raises(DataError, match="the baseline is nan"):
        fsft_loss(tokens, tokens, torch.ones(3, 4), divergence=js, baseline=torch.tensor(math.nan))


def test_a_batch_without_tokens_leaves_the_learned_baseline(generator):
    reference, policy, mask = batch(generator)
    method = FSFT(divergence=matching_divergence("js"), beta=0.2, baseline="learned", level="token")
    given = {"completion_mask": 0 * mask, "reference_log_prob": reference}
    loss, seen = method.loss(policy, given, count=1.0)
    assert loss.item() == 0.0
    assert not seen
    assert method.state_dict() == {"baseline": 0.0}
