"""DiDi-Instruct by enumeration: the gradient of the integral KL, the best discriminator, two steps and their score."""

import itertools
import math

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.distill.didi import (
    beta_density,
    corrected_log_odds,
    density_ratio_reward,
    discriminator_accuracy,
    discriminator_loss,
    grouped_advantages,
    ikl_surrogate,
    matching_kl,
    mean_entropy,
    sample_times,
    time_weights,
    two_step_trajectory,
)
from kullback.distill.didi_sampler import RGASampler
from kullback.divergences import kl, reverse_kl
from kullback.models.masked_diffusion import LogLinearSchedule, corrupt, mdm_exact_distribution, transition_logprob
from kullback.models.masked_diffusion_sampling import AncestralSampler

LINEAR = LogLinearSchedule(0.0)
MASK = 2


def words(symbols, length):
    return torch.cartesian_prod(*[torch.arange(symbols)] * length).view(-1, length)


def masking_law(alpha, symbols=2, length=2):
    """[words, states]: the probability that a word becomes a state at level alpha."""
    table = torch.zeros(symbols**length, (symbols + 1) ** length, dtype=torch.float64)
    states = words(symbols + 1, length)
    for i, word in enumerate(words(symbols, length)):
        for j, state in enumerate(states):
            if bool(((state == word) | (state == symbols)).all()):
                masked = int((state == symbols).sum())
                table[i, j] = alpha ** (length - masked) * (1 - alpha) ** masked
    return table


def test_the_policy_gradient_is_that_of_the_divergence_between_masked_laws(generator):
    """V = 2, L = 2, a factorised student: the expectation over x and z_t against autograd, with any baseline."""
    logits = torch.randn(2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(4, generator=generator, dtype=torch.float64).softmax(0)
    everything = words(2, 2)
    for t in (0.2, 0.5, 0.9):
        table = masking_law(1.0 - t)
        log_q_x = logits.log_softmax(-1)[torch.arange(2), everything].sum(-1)
        log_q_z, log_p_z = (log_q_x.exp() @ table).log(), (reference @ table).log()
        (wanted,) = torch.autograd.grad(reverse_kl(log_p_z, log_q_z), logits)
        ratio = (log_q_z - log_p_z).detach()
        chance = log_q_x.detach().exp().unsqueeze(-1) * table
        for baseline, sign in ((0.0, 1.0), (0.7, 1.0), (0.0, -1.0)):
            # ikl_surrogate takes means, so each pair (x, z) is a sample whose weight is its probability.
            x, z = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(9), indexing="ij"))
            log_q_x = logits.log_softmax(-1)[torch.arange(2), everything].sum(-1)
            loss = ikl_surrogate(log_q_x[x], -sign * (ratio[z] - baseline), 36 * chance.flatten())
            (found,) = torch.autograd.grad(loss, logits)
            if sign == 1.0:
                assert (found - wanted).abs().max().item() < 1e-10
            else:
                assert (found - wanted).abs().max().item() > 1e-3


def denoiser(symbols=2, length=3, seed=0, learn=False):
    """A denoiser whose logits are a table over all states."""
    source = torch.Generator().manual_seed(seed)
    table = torch.randn((symbols + 1,) * length + (length, symbols), generator=source, dtype=torch.float64)
    table.requires_grad_(learn)
    return (lambda z, t: table[tuple(z.T)]), table


def test_two_steps_follow_the_exact_law_and_their_score_is_its_gradient(generator):
    """grad log-probability has the mean 0, and times a reward f(x) the gradient of E f(x), which enumeration gives."""
    model, table = denoiser(learn=True)
    n, start, tau = 40_000, torch.full((40_000, 3), MASK), torch.full((40_000,), 0.5)
    way = two_step_trajectory(model, start, tau, schedule=LINEAR, mask_id=MASK, generator=generator)
    exact = mdm_exact_distribution(model, 2, 3, 2).flatten()
    code = torch.tensor([4, 2, 1])
    found = torch.bincount(way.x @ code, minlength=8) / n
    assert ((found - exact).abs() < 6 * (exact * (1 - exact) / n).sqrt()).all()
    assert (way.x < 2).all()

    reward = torch.randn(8, generator=generator, dtype=torch.float64)
    wanted = exact_gradient(table, reward)
    (estimate,) = torch.autograd.grad((reward[way.x @ code] * way.log_prob).mean(), table)
    scale = wanted.abs().max()
    assert (estimate - wanted).abs().max() < 0.03 * scale
    wrong = two_step_trajectory(
        model, start, tau, schedule=LINEAR, mask_id=MASK, generator=generator, kind="direct_score"
    )
    (other,) = torch.autograd.grad((reward[wrong.x @ code] * wrong.log_prob).mean(), table)
    assert (other - wanted).abs().max() > 0.2 * scale


def exact_gradient(table, reward):
    """By the table, of E reward(x) under two steps at tau = 1/2: all ways over z, with autograd."""
    everything, states = words(2, 3), words(3, 3)
    total = torch.zeros((), dtype=torch.float64)
    first = table[MASK, MASK, MASK].log_softmax(-1)
    for state in states:
        open_ = state == MASK
        to_state = math.log(0.5) * 3 + sum(first[i, state[i]] for i in range(3) if not open_[i])
        second = table[tuple(state)].log_softmax(-1)
        for word, value in zip(everything, reward):
            if bool((word[~open_] == state[~open_]).all()):
                total = total + value * torch.exp(to_state + sum(second[i, word[i]] for i in range(3) if open_[i]))
    return torch.autograd.grad(total, table)[0]


def test_the_score_is_the_sum_of_the_transitions_without_the_schedule(generator):
    model, _ = denoiser(learn=True)
    tau = torch.full((6,), 0.4, dtype=torch.float64)
    way = two_step_trajectory(
        model, torch.full((6, 3), MASK), tau, schedule=LINEAR, mask_id=MASK, generator=generator
    )
    options = {"schedule": LINEAR, "mask_id": MASK, "changed_only": True}
    total = transition_logprob(model(way.start, None), way.start, way.z, 1.0, 0.4, **options)
    total = total + transition_logprob(model(way.z, None), way.z, way.x, 0.4, 0.0, **options)
    torch.testing.assert_close(way.log_prob, total)
    full = {"schedule": LINEAR, "mask_id": MASK}
    exact = transition_logprob(model(way.start, None), way.start, way.z, 1.0, 0.4, **full)
    exact = exact + transition_logprob(model(way.z, None), way.z, way.x, 0.4, 0.0, **full)
    opened = (way.z != MASK).sum(-1).double()
    torch.testing.assert_close(exact - total, opened * math.log(0.6) + (3 - opened) * math.log(0.4))


def test_one_step_prompts_and_remasking(generator):
    model, _ = denoiser(learn=True)
    start, tau = torch.full((500, 3), MASK), torch.full((500,), 0.5)
    options = {"schedule": LINEAR, "mask_id": MASK, "generator": generator}
    one = two_step_trajectory(model, start, tau, kind="one_step", **options)
    assert torch.equal(one.z, start)
    first = model(start, None).log_softmax(-1).gather(-1, one.x.unsqueeze(-1)).sum((-1, -2))
    torch.testing.assert_close(one.log_prob, first)
    prompt = start.clone()
    prompt[:, 0] = 1
    way = two_step_trajectory(model, prompt, tau, **options)
    assert (way.x[:, 0] == 1).all()
    assert len(way.first) == 1000
    shy = two_step_trajectory(model, start, tau, remask=0.9, **options)
    assert (shy.z == MASK).float().mean() > 0.9
    with pytest.raises(ConfigError, match="kind"):
        two_step_trajectory(model, start, tau, kind="three", **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_best_discriminator_says_the_ratio_of_the_laws(smoothing, generator):
    """One logit for each state, minimised over all states with their probabilities under both laws."""
    real, fake = torch.randn(2, 9, generator=generator, dtype=torch.float64).softmax(-1)
    logits = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=400, tolerance_grad=1e-13, tolerance_change=1e-16)

    def value(name, state):
        """The loss of one state on one side, which discriminator_loss halves."""
        at = torch.stack([logits[state : state + 1]])
        nothing = torch.zeros(1, 1, dtype=torch.bool)
        sides = (torch.ones_like(nothing), nothing) if name == "real" else (nothing, torch.ones_like(nothing))
        return discriminator_loss(at, at, *sides, smoothing=smoothing)

    def closure():
        optimizer.zero_grad()
        loss = sum(real[i] * value("real", i) + fake[i] * value("fake", i) for i in range(9))
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = (real / fake).log()
    share = real / (real + fake)
    shrunk = torch.logit((1 - smoothing) * share + smoothing * (1 - share))
    assert (logits.detach() - shrunk).abs().max().item() < 1e-6
    assert (corrected_log_odds(logits.detach(), smoothing) - exact).abs().max().item() < 1e-5
    if smoothing:
        assert (logits.detach() - exact).abs().max().item() > 0.1


def test_student_and_reference_alike_give_no_gradient(generator):
    """The ratio is 1 at every level, and the mean of the score is 0 whatever the constant."""
    model, table = denoiser(learn=True)
    start = torch.full((30_000, 3), MASK)
    way = two_step_trajectory(
        model, start, torch.full((30_000,), 0.5), schedule=LINEAR, mask_id=MASK, generator=generator
    )
    scores = torch.autograd.grad(ikl_surrogate(way.log_prob, torch.ones(30_000), torch.ones(30_000)), table)[0]
    assert scores.abs().max().item() < 6 * 1.0 / 30_000**0.5


def test_advantages_by_hand_and_by_group(generator):
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    found = grouped_advantages(rewards, 4, clip=100.0)
    assert found.view(3, 4).sum(-1).abs().max().item() < 1e-12
    assert found.view(3, 4).std(-1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    shifted = grouped_advantages(3.0 * rewards + torch.arange(3).repeat_interleave(4), 4, clip=100.0)
    torch.testing.assert_close(shifted, found)
    whole = grouped_advantages(rewards, 4, over="batch", clip=100.0)
    torch.testing.assert_close(whole, (rewards - rewards.mean()) / rewards.std())
    assert not torch.allclose(whole, found)
    assert grouped_advantages(rewards, 4, clip=0.5).abs().max() == 0.5
    assert grouped_advantages(torch.ones(4), 4).abs().max() == 0.0
    with pytest.raises(ShapeError, match="whole groups"):
        grouped_advantages(rewards, 5)
    with pytest.raises(ConfigError, match="over"):
        grouped_advantages(rewards, 4, over="all")


def test_rewards_are_of_masked_positions_alone():
    logits = torch.tensor([[1.0, 100.0, 3.0], [5.0, -100.0, 7.0]])
    masked = torch.tensor([[True, False, True], [False, True, False]])
    assert density_ratio_reward(logits, masked).tolist() == [2.0, -8.0]
    assert density_ratio_reward(logits, torch.zeros_like(masked)).tolist() == [0.0, 0.0]
    far = density_ratio_reward(logits, masked, smoothing=0.1)
    assert far[1] == -8.0  # beyond what smoothed labels reach, and clipped
    mask = torch.tensor([[True, True, False]])
    real, fake = torch.tensor([[1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -1.0, 1.0]])
    assert discriminator_accuracy(real, fake, mask, mask) == 0.75
    with pytest.raises(ShapeError):
        density_ratio_reward(logits, masked[:1])


def test_times_and_their_weights(generator):
    for beta in ((1.0, 1.0), (2.0, 2.0), (2.0, 5.0)):
        times = sample_times(40_000, beta=beta, clip=(1e-6, 1 - 1e-6), generator=generator)
        mean = beta[0] / sum(beta)
        deviation = (mean * (1 - mean) / (sum(beta) + 1)) ** 0.5
        assert abs(times.mean().item() - mean) < 6 * deviation / 200
        grid = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
        assert beta_density(grid, beta).mean().item() == pytest.approx(1.0, abs=2e-3)
    clipped = sample_times(1000, clip=(0.4, 0.6), generator=generator)
    assert (clipped.min().item(), clipped.max().item()) == (0.4, 0.6)
    t = torch.tensor([0.02, 0.5, 1.0])
    assert time_weights(t, LINEAR).tolist() == pytest.approx([10.0, 2.0, 1.0])
    assert time_weights(t[1:2], LINEAR, beta=(2.0, 2.0)).item() == pytest.approx(2.0 / 1.5)


def test_regularisers_are_divergences_of_the_library(generator):
    teacher, student = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    forward, backward = kl(teacher, student).mean(), reverse_kl(teacher, student).mean()
    assert matching_kl(teacher, student).item() == pytest.approx(forward.item())
    assert matching_kl(teacher, student, mix=1.0).item() == pytest.approx(backward.item())
    assert matching_kl(teacher, student, mix=0.25).item() == pytest.approx((0.75 * forward + 0.25 * backward).item())
    hole = torch.full((7, 1), -math.inf, dtype=torch.float64)
    padded = [torch.cat([x, hole], -1) for x in (teacher, student)]
    assert matching_kl(*padded).item() == pytest.approx(forward.item())
    assert mean_entropy(padded[0]).item() == pytest.approx(-(teacher.exp() * teacher).sum(-1).mean().item())
    assert matching_kl(teacher[:0], student[:0]).item() == 0.0
    with pytest.raises(ConfigError, match="mix"):
        matching_kl(teacher, student, mix=1.5)


# --- the sampler ---


def prefers(symbol):
    """A discriminator that likes one symbol at every place."""

    def score(z, t):
        if z.is_floating_point():
            return 5.0 * z[..., symbol].sum(-1, keepdim=True).expand(z.shape[:-1])
        return 5.0 * (z == symbol).double().sum(-1, keepdim=True).expand(z.shape)

    return score


def test_no_tilt_and_one_candidate_is_plain_sampling():
    model, _ = denoiser()
    plain = AncestralSampler(model, steps=4, mask_id=MASK)
    guided = RGASampler(model, prefers(1), h=(0.0, 0.0), candidates=1, steps=4, mask_id=MASK)
    for seed in range(3):
        one, other = (
            sampler.run(50, 3, generator=torch.Generator().manual_seed(seed)) for sampler in (plain, guided)
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("tilt", ["input_grad", "token_value"])
def test_guidance_moves_samples_to_what_the_discriminator_likes(tilt, generator):
    model, _ = denoiser()

    def share(**options):
        sampler = RGASampler(model, prefers(1), steps=4, mask_id=MASK, tilt=tilt, **options)
        return (sampler.run(300, 3, generator=generator) == 1).double().mean().item()

    plain = share(h=(0.0, 0.0), candidates=1)
    assert share(h=(2.0, 4.0), candidates=1) > plain + 0.1
    few, many = share(h=(0.0, 0.0), candidates=4), share(h=(0.0, 0.0), candidates=64, rerank_scale=4.0)
    assert plain + 0.05 < few < many
    assert share(h=(-4.0, -4.0), candidates=1) < plain


def test_the_strength_rises_over_the_tilted_half():
    model, _ = denoiser()
    sampler = RGASampler(model, prefers(1), h=(30.0, 40.0), steps=6, mask_id=MASK)
    assert [sampler.strength(i) for i in range(6)] == [30.0, 35.0, 40.0, 0.0, 0.0, 0.0]
    for name, options in {"candidates": {"candidates": 0}, "tilt": {"tilt": "no"}, "scored": {"scored": "no"}}.items():
        with pytest.raises(ConfigError, match=name):
            RGASampler(model, prefers(1), steps=2, mask_id=MASK, **options)


def test_reranking_alone_is_the_softmax_over_candidates_in_law():
    """One step, M = 2: P(x) is the sum over pairs of draws of the chance to keep x."""
    model, _ = denoiser(length=1)
    p = model(torch.tensor([[MASK]]), None)[0, 0].softmax(-1)
    sampler = RGASampler(model, prefers(1), candidates=2, rerank_ratio=1.0, steps=1, mask_id=MASK)
    exact = torch.zeros(2, dtype=torch.float64)
    for a, b in itertools.product(range(2), repeat=2):
        weights = torch.tensor([5.0 * (a == 1), 5.0 * (b == 1)], dtype=torch.float64).softmax(0)
        exact[a] += p[a] * p[b] * weights[0]
        exact[b] += p[a] * p[b] * weights[1]
    n = 20_000
    x = sampler.run(n, 1, generator=torch.Generator().manual_seed(5))
    found = torch.bincount(x.flatten(), minlength=2) / n
    assert ((found - exact).abs() < 6 * (exact * (1 - exact) / n).sqrt()).all()
    assert (found - p).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"rerank_ratio": 1.0}, {"h": (1.0, 2.0), "rerank_ratio": 0.0}])
def test_guided_steps_call_the_denoiser_where_something_is_unmasked(options, generator):
    """Six places and 64 steps: a call for each place at most if tilted, and for each candidate's place if re-ranked."""
    table = torch.randn(7, 2, generator=generator, dtype=torch.float64)

    def denoise(z, t):
        return table[:6].expand(len(z), -1, -1) + z.sum(-1).view(-1, 1, 1) * table[6]

    found = []
    for cache in (True, False):
        sampler = RGASampler(denoise, prefers(1), steps=64, mask_id=MASK, candidates=2, cache=cache, **options)
        state, source, called = sampler.init(20, 6), torch.Generator().manual_seed(1), 0
        for _ in range(64):
            state, info = sampler.step(state, generator=source)
            called += info.evaluated
        found.append(state.z)
        assert called <= 20 * 6 * 2 if cache else called == 20 * 64
    assert torch.equal(*found)
    assert (found[0] < 2).all()


def test_masking_to_a_level_is_the_enumerated_law(generator):
    x = torch.tensor([[0, 1]]).expand(20_000, 2)
    z = corrupt(x, torch.full((20_000,), 0.3), MASK, generator=generator)
    found = torch.bincount(z @ torch.tensor([3, 1]), minlength=9) / 20_000
    exact = masking_law(0.3)[1]
    assert ((found - exact).abs() <= 6 * (exact * (1 - exact) / 20_000).sqrt()).all()
