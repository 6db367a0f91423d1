"""KL-regularised RL as inference: the card's numbers, identities, the evidence from samples, samplers, collapse."""

import math
import warnings

import pytest
import torch
from scipy import stats

from kullback.align.evidence import PriorSampler, log_evidence, posterior_sample, suffix_move, token_move
from kullback.align.policy_gradient import reference_penalty
from kullback.align.posterior import (
    PosteriorTarget,
    amortised_loss,
    collapse_report,
    elbo,
    eubo,
    implied_beta,
    implied_reward,
)
from kullback.align.ppo import shaped_rewards
from kullback.align.worlds import TabularPolicy, World, draw_sequences
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.divergences import kl

PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
REWARD = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
TARGET = PosteriorTarget(PRIOR, REWARD, 0.5)
UNIFORM = torch.full((4,), 0.25, dtype=torch.float64).log()


def test_the_posterior_of_the_card():
    found = TARGET.exact()
    expected = [0.0493607847, 0.2735472054, 0.0033401279, 0.6737518821]
    assert found.log_posterior.exp().tolist() == pytest.approx(expected, abs=1e-10)
    numbers = [found.log_evidence, found.best, found.mean_reward, found.kl, found.kl_prior]
    expected = [2.0923082704, 1.0461541352, 1.6177108416, 1.1431134128, 1.4923082704]
    assert [x.item() for x in numbers] == pytest.approx(expected, abs=1e-9)


def test_bounds_of_the_evidence_and_the_identity():
    exact = TARGET.exact()
    objective = TARGET.objective(UNIFORM).item()
    assert objective == pytest.approx(0.4391113629, abs=1e-9)
    assert objective == pytest.approx((exact.best - 0.5 * kl(UNIFORM, exact.log_posterior)).item(), abs=1e-12)
    assert objective / 0.5 == pytest.approx(0.8782227257, abs=1e-9)
    upper = (exact.log_posterior.exp() * (PRIOR + REWARD / 0.5 - UNIFORM)).sum().item()
    assert upper == pytest.approx(2.6903970504, abs=1e-9)
    for law, bound, value in ((UNIFORM, elbo, objective / 0.5), (exact.log_posterior, eubo, upper)):
        x = torch.multinomial(law.exp(), 200_000, replacement=True, generator=generator(0, "x"))
        found = bound(PRIOR[x], UNIFORM[x], REWARD[x], beta=0.5)
        assert abs(found.mean - value) < 6 * found.standard_error
        assert found.low < found.mean < found.high


def test_constants_and_scales_of_the_reward():
    exact = TARGET.exact()
    shifted, scaled = PosteriorTarget(PRIOR, REWARD + 3.0, 0.5).exact(), PosteriorTarget(PRIOR, 7 * REWARD, 3.5).exact()
    torch.testing.assert_close(shifted.log_posterior, exact.log_posterior)
    assert (shifted.log_evidence - exact.log_evidence).item() == pytest.approx(6.0)
    torch.testing.assert_close(scaled.log_posterior, exact.log_posterior)


def test_evidences_multiply_in_any_order():
    second = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64)
    one = TARGET.update(second, 0.7).exact().log_posterior
    other = PosteriorTarget(PRIOR, second, 0.7).update(REWARD, 0.5).exact().log_posterior
    together = PosteriorTarget(PRIOR, REWARD / 0.5 + second / 0.7, 1.0).exact().log_posterior
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    torch.testing.assert_close(one, together, atol=1e-12, rtol=0)


def test_limits_and_the_derivative_of_the_evidence():
    hot, cold = PosteriorTarget(PRIOR, REWARD, 1e6).exact(), PosteriorTarget(PRIOR, REWARD, 1e-2).exact()
    torch.testing.assert_close(hot.log_posterior, PRIOR, atol=1e-5, rtol=0)
    assert cold.log_posterior.exp()[3].item() == pytest.approx(1.0)
    inverse, step = 2.0, 1e-4
    near = [PosteriorTarget(PRIOR, REWARD, 1.0 / (inverse + sign * step)).exact() for sign in (-1, 0, 1)]
    slope = (near[2].log_evidence - near[0].log_evidence) / (2 * step)
    assert slope.item() == pytest.approx(near[1].mean_reward.item(), abs=1e-6)
    variance = (near[1].log_posterior.exp() * (REWARD - near[1].mean_reward).square()).sum()
    bend = (near[2].log_evidence - 2 * near[1].log_evidence + near[0].log_evidence) / step**2
    assert bend.item() == pytest.approx(variance.item(), abs=1e-4)


def test_thermodynamic_integration_by_enumeration():
    nodes = torch.linspace(0.0, 2.0, 65, dtype=torch.float64)
    means = torch.stack([(PRIOR + s * REWARD).softmax(0) @ REWARD for s in nodes])
    weights = torch.full((65,), 2.0, dtype=torch.float64)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    assert (weights @ means).item() * (2.0 / 64) / 3.0 == pytest.approx(2.0923082704, abs=1e-6)


def test_rewards_of_tokens_have_the_gradient_of_the_objective():
    world = World(3, 2)
    draw = generator(1, "tables")
    policy, prior = (TabularPolicy(world, generator=draw, scale=1.0) for _ in range(2))
    reward = torch.randn(world.size, generator=draw, dtype=torch.float64)
    target = PosteriorTarget(prior.all_log_probs().detach(), reward, 0.4)
    exact = torch.autograd.grad(target.objective(policy.all_log_probs()), list(policy.logits))
    x = world.sequences()

    def tokens(model):
        first = model.logits[0].log_softmax(-1)[0, x[:, 0]]
        return torch.stack([first, model.logits[1].log_softmax(-1)[x[:, 0], x[:, 1]]], 1)

    log_prob, reference = tokens(policy), tokens(prior).detach()
    shaped = shaped_rewards(reference, log_prob, reward, torch.ones(len(x), 2), beta=0.4)
    torch.testing.assert_close(shaped.sum(1), reward - 0.4 * (log_prob - reference).sum(1))
    surrogate = (log_prob.sum(1).exp().detach() * shaped.sum(1).detach() * log_prob.sum(1)).sum()
    found = torch.autograd.grad(surrogate, list(policy.logits))
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-10, rtol=0)


def test_k2_and_k3_as_losses_are_two_divergences():
    theta = torch.tensor([0.3, -0.1, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    log_policy = theta.log_softmax(0)
    weights = log_policy.exp().detach().unsqueeze(1)
    ones = torch.ones(4, 1)
    forms = {("k2", "reverse"): kl(log_policy, PRIOR), ("k3", "forward"): kl(PRIOR, log_policy)}
    for (estimator, gradient), divergence in forms.items():
        options = {"estimator": estimator, "gradient": gradient}
        pairs = [(log_policy[i].view(1, 1), PRIOR[i].view(1, 1)) for i in range(4)]
        terms = torch.stack([reference_penalty(*pair, ones[:1], **options) for pair in pairs])
        mean = (weights.squeeze(1) * terms).sum()
        found, exact = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (mean, divergence))
        torch.testing.assert_close(found, exact, atol=1e-14, rtol=0)


def table_problem(*, move=False):
    def sample(count, draw):
        return torch.multinomial(PRIOR.exp(), count, replacement=True, generator=draw)

    return PriorSampler(sample, lambda x: REWARD[x], (lambda x, draw: sample(len(x), draw)) if move else None)


@pytest.mark.parametrize("method", ["importance", "annealed", "thermodynamic"])
def test_evidence_from_samples(method):
    found = [
        log_evidence(table_problem(), 4000, beta=0.5, generator=generator(2, method, seed), method=method)
        for seed in range(10)
    ]
    mean = sum(x.log_evidence for x in found) / 10
    error = max(x.standard_error for x in found) / 10**0.5
    assert abs(mean - 2.0923082704) < 6 * error
    assert all(0.0 < x.effective_size <= 4000 for x in found)


def test_annealing_is_better_where_the_posterior_is_far_away():
    """Sequences of 12 tokens at a KL of 10 nats; a move of two tokens reads the laws twice, and counts as two calls."""
    length = 12
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def draws(count, draw):
        return torch.multinomial(law, count * length, replacement=True, generator=draw).view(count, length)

    move = token_move(lambda x: law.log().expand(*x.shape, 4), tokens=2)
    problem = PriorSampler(draws, lambda x: (x == 3).sum(1).double(), move)
    beta = 0.35
    exact = length * (law * torch.tensor([0.0, 0.0, 0.0, 1.0 / beta]).exp()).sum().log().item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        plain, annealed = ([], [])
        for seed in range(12):
            plain.append(log_evidence(problem, 8000, beta=beta, generator=generator(3, "is", seed)).log_evidence)
            options = {"method": "annealed", "temperatures": 8, "moves": 12}
            found = log_evidence(problem, 40, beta=beta, generator=generator(3, "smc", seed), **options)
            annealed.append(found.log_evidence)
    errors = [sum((x - exact) ** 2 for x in values) / 12 for values in (plain, annealed)]
    assert errors[1] < 0.6 * errors[0], "with as many calls of the base model"
    back = suffix_move(length, lambda x, kept, draw: torch.cat([x[:, :kept], draws(len(x), draw)[:, kept:]], 1))
    assert back(draws(5, generator(4, "x")), generator(4, "m")).shape == (5, length)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_move_of_tokens_keeps_the_prior(tokens):
    """Two tokens of three, the second strongly after the first: what keeps the second must be weighed."""
    first = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    second = torch.tensor([[0.8, 0.1, 0.1], [0.05, 0.9, 0.05], [0.2, 0.2, 0.6]], dtype=torch.float64)
    joint = (first.unsqueeze(1) * second).flatten()

    def laws(x):
        return torch.stack([first.log().expand(len(x), 3), second.log()[x[:, 0]]], 1)

    def shares(move):
        draw = generator(9, "tokens", tokens)
        place = torch.multinomial(joint, 60_000, replacement=True, generator=draw)
        x = torch.stack([place // 3, place % 3], 1)
        for _ in range(4):
            x = move(x, draw)
        return (x[:, 0] * 3 + x[:, 1]).bincount(minlength=9)

    expected = joint * 60_000
    assert stats.chisquare(shares(token_move(laws, tokens=tokens)).numpy(), expected.numpy()).pvalue > 1e-3

    def unweighed(x, draw):
        places = torch.randint(2, (len(x), 1), generator=draw)
        drawn = torch.multinomial(laws(x)[torch.arange(len(x)), places[:, 0]].exp(), 1, generator=draw)
        return x.scatter(1, places, drawn)

    assert stats.chisquare(shares(unweighed).numpy(), expected.numpy()).pvalue < 1e-6
    with pytest.raises(ConfigError, match="token at least"):
        token_move(laws, tokens=0)
    with pytest.raises(ShapeError, match="tokens"):
        token_move(laws, tokens=3)(torch.zeros(4, 2, dtype=torch.long), generator(0))


def test_rejection_is_exact():
    found = posterior_sample(
        table_problem(), 100_000, beta=0.5, generator=generator(4, "r"), method="rejection", largest_reward=2.0
    )
    assert found.acceptance == pytest.approx(8.1036 / 54.598, abs=6 * (0.148 * 0.852 / 1e5) ** 0.5)
    expected = TARGET.exact().log_posterior.exp() * len(found.x)
    assert stats.chisquare(found.x.bincount(minlength=4).numpy(), expected.numpy()).pvalue > 1e-3
    wrong = PRIOR.exp() * len(found.x)
    assert stats.chisquare(found.x.bincount(minlength=4).numpy(), wrong.numpy()).pvalue < 1e-6


@pytest.mark.parametrize("method", ["resampling", "metropolis", "annealed"])
def test_other_samplers_come_near(method):
    problem = table_problem(move=method != "resampling")
    found = posterior_sample(problem, 20_000, beta=0.5, generator=generator(5, method), method=method, steps=60)
    shares = found.x.bincount(minlength=4) / len(found.x)
    assert 0.5 * (shares - TARGET.exact().log_posterior.exp()).abs().sum().item() < 0.01


def test_the_temperature_that_a_policy_implies():
    posterior = TARGET.exact().log_posterior
    beta, fit = implied_beta(PRIOR, posterior, REWARD)
    assert (beta, fit) == (pytest.approx(0.5, abs=1e-12), pytest.approx(1.0, abs=1e-12))
    gap = implied_reward(PRIOR, posterior, beta=0.5) - REWARD
    assert (gap.max() - gap.min()).item() < 1e-12
    assert implied_beta(PRIOR, UNIFORM, REWARD)[1] < 0.9
    with pytest.raises(DataError, match="temperature"):
        implied_beta(PRIOR, PRIOR, REWARD)


def test_weighted_likelihood_descends_the_forward_kl():
    theta = torch.tensor([0.3, -0.1, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    log_policy, posterior = theta.log_softmax(0), TARGET.exact().log_posterior
    exact = torch.autograd.grad(kl(posterior, log_policy), theta, retain_graph=True)[0]
    x = torch.arange(4)  # each outcome once: a uniform proposal
    found = torch.autograd.grad(amortised_loss(log_policy[x], TARGET.log_unnormalised()[x]), theta)[0]
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


def test_collapse_is_seen():
    table = collapse_report(PRIOR, torch.tensor([1e-9, 1e-9, 1e-9, 1.0], dtype=torch.float64).log())
    assert table.entropy < 1e-6
    assert table.top == pytest.approx(1.0)
    assert table.effective_support == pytest.approx(1.0, abs=1e-6)
    world = World(4, 4)
    prior = torch.full((256,), -math.log(256.0), dtype=torch.float64)
    x = draw_sequences(world, prior, 400, generator=generator(6, "x"))
    varied = collapse_report(
        prior.repeat(2)[:400], prior.repeat(2)[:400], ids=x, mask=torch.ones_like(x),
        prompt_index=torch.arange(400) // 4,
    )  # fmt: skip
    alike = collapse_report(
        prior.repeat(2)[:400], torch.zeros(400), ids=x[:1].expand(400, -1), mask=torch.ones_like(x),
        prompt_index=torch.arange(400) // 4,
    )  # fmt: skip
    assert varied.entropy == pytest.approx(math.log(256.0))
    assert (alike.top, alike.single) == (1.0, 1.0)
    assert alike.distinct < 0.01 < varied.distinct
    assert varied.single == 0.0


def test_plain_rl_collapses_and_the_penalty_prevents_it():
    world = World(4, 4)
    prior = TabularPolicy(world, generator=generator(7, "prior"), scale=1.0)
    law = prior.all_log_probs().detach()
    x = world.sequences()
    reward = (x == 3).sum(1).double() - 0.5 * (x[:, 1:] == x[:, :-1]).sum(1)
    ends = {}
    for beta, steps in ((1e-6, 1200), (0.5, 600)):
        target = PosteriorTarget(law, reward, beta)
        policy = TabularPolicy(world)
        policy.load_state_dict(prior.state_dict())
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
        for _ in range(steps):
            loss = -target.objective(policy.all_log_probs())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[beta] = policy.all_log_probs().detach()
    alone, before = collapse_report(law, ends[1e-6]), collapse_report(law, law)
    assert alone.entropy < 0.2 * before.entropy
    assert alone.effective_support < 2.5 < 7, "it picks among seven strings that are equally good"
    assert (ends[1e-6].exp() * reward).sum().item() == pytest.approx(2.5, abs=0.01)
    posterior = PosteriorTarget(law, reward, 0.5).exact().log_posterior
    assert 0.5 * (ends[0.5].exp() - posterior.exp()).abs().sum().item() < 1e-3


def test_bad_input():
    with pytest.raises(ConfigError, match="beta"):
        PosteriorTarget(PRIOR, REWARD, 0.0)
    with pytest.raises(ShapeError, match="same outcomes"):
        PosteriorTarget(PRIOR, REWARD[:3], 0.5)
    with pytest.raises(DataError, match="NaN"):
        PosteriorTarget(PRIOR, REWARD * math.nan, 0.5)
    with pytest.raises(ShapeError, match="one a sample"):
        elbo(PRIOR, UNIFORM[:2], REWARD, beta=0.5)
    for bound in (elbo, eubo):
        with pytest.raises(DataError, match="got none"):
            bound(PRIOR[:0], UNIFORM[:0], REWARD[:0], beta=0.5)
        for wrong in (math.nan, math.inf, -math.inf):
            for size in (1, 4):
                with pytest.raises(DataError, match="finite"):
                    bound(PRIOR[:size], UNIFORM[:size], torch.full_like(REWARD[:size], wrong), beta=0.5)
    assert elbo(PRIOR[:1], UNIFORM[:1], REWARD[:1], beta=0.5).standard_error == math.inf
    with pytest.raises(ConfigError, match="bound"):
        posterior_sample(table_problem(), 10, beta=0.5, generator=generator(0), method="rejection")
    with pytest.raises(DataError, match="above the bound"):
        posterior_sample(
            table_problem(), 1000, beta=0.5, generator=generator(0), method="rejection", largest_reward=0.5
        )
    with pytest.raises(ConfigError, match="even"):
        log_evidence(table_problem(), 10, beta=0.5, generator=generator(0), method="thermodynamic", temperatures=3)
    nothing = PriorSampler(table_problem().sample, lambda x: torch.full((len(x),), math.nan))
    with pytest.raises(DataError, match="finite number"):
        log_evidence(nothing, 10, beta=0.5, generator=generator(0))
    starved = PriorSampler(lambda n, draw: torch.arange(n), lambda x: x.double())
    with pytest.warns(RuntimeWarning, match="rests on"):
        log_evidence(starved, 1000, beta=1e-2, generator=generator(0))
    with pytest.warns(RuntimeWarning, match="samples rest on"):
        posterior_sample(starved, 1000, beta=1e-2, generator=generator(0))


@pytest.mark.slow
def test_plain_rl_ends_in_one_of_the_ties_and_the_penalty_at_the_posterior():
    """3000 exact steps, as the card has them; seven strings are equally good."""
    world = World(4, 4)
    prior = TabularPolicy(world, generator=generator(0, "prior"), scale=1.0)
    law, x = prior.all_log_probs().detach(), world.sequences()
    reward = (x == 3).sum(1).double() - 0.5 * (x[:, 1:] == x[:, :-1]).sum(1)
    ends = {}
    for name in ("plain", "penalty"):
        target = PosteriorTarget(law, reward, 0.5)
        policy = TabularPolicy(world)
        policy.load_state_dict(prior.state_dict())
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
        for _ in range(3000):
            log_policy = policy.all_log_probs()
            loss = -(log_policy.exp() @ reward) if name == "plain" else -target.objective(log_policy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[name] = policy.all_log_probs().detach()
    alone = collapse_report(law, ends["plain"])
    posterior = PosteriorTarget(law, reward, 0.5).exact().log_posterior
    assert int((reward == reward.max()).sum()) == 7
    # The card has 0.016 nats in its own random world, this one 0.052: the string that leads depends on the prior.
    assert alone.entropy < 0.06
    assert alone.top > 0.99
    assert 0.5 * (ends["penalty"].exp() - posterior.exp()).abs().sum().item() < 1e-4
