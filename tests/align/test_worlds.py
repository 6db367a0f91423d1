"""Exact worlds and targets against closed forms, enumeration by hand, and each other."""

import itertools
import math

import pytest
import torch

from kullback.align import targets, worlds
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl, reverse_kl

P = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
R = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)


def test_sequences_are_all_and_found_again():
    world = worlds.World(3, 4)
    sequences = world.sequences()
    assert sequences.tolist() == [list(t) for t in itertools.product(range(3), repeat=4)]
    assert torch.equal(world.index(sequences), torch.arange(81))
    with pytest.raises(ShapeError, match="4 tokens from 0 to 2"):
        world.index(torch.tensor([[0, 1, 3, 0]]))
    with pytest.raises(ConfigError, match="enumerates"):
        worlds.World(100, 10)


@pytest.mark.parametrize("kind", ["tabular", "recurrent"])
def test_policies_normalise_and_their_two_forms_agree(kind, generator):
    world = worlds.World(3, 4)
    build = {
        "tabular": lambda: worlds.TabularPolicy(world, generator=generator, scale=1.0),
        "recurrent": lambda: worlds.RecurrentPolicy(world, generator=generator, width=8, dtype=torch.float64),
    }
    policy = build[kind]()
    whole = policy.all_log_probs()
    assert whole.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(policy.log_probs(world.sequences()), whole, atol=1e-12)
    rows = torch.randint(3, (7, 4), generator=generator)
    assert torch.allclose(policy.log_probs(rows), whole[world.index(rows)], atol=1e-12)


def test_recurrent_policy_is_the_usual_gated_unit(generator):
    policy = worlds.RecurrentPolicy(worlds.World(3, 2), generator=generator, width=8, dtype=torch.float64)
    cell = torch.nn.GRUCell(8, 8, dtype=torch.float64)
    own = {"weight_ih": "into", "weight_hh": "again", "bias_ih": "into_bias", "bias_hh": "again_bias"}
    cell.load_state_dict({name: policy.get_parameter(ours).detach() for name, ours in own.items()})
    state, tokens = torch.randn(5, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    assert torch.allclose(policy._step(tokens, state)[0], cell(policy.embedding[tokens], state), atol=1e-12)


def test_exact_gradient_of_the_reward_is_the_policy_gradient(generator):
    world = worlds.World(3, 3)
    policy = worlds.TabularPolicy(world, generator=generator, scale=0.5)
    reward = torch.randn(world.size, generator=generator, dtype=torch.float64)
    whole = policy.all_log_probs()
    (exact,) = torch.autograd.grad(worlds.expected_reward(whole, reward), policy.logits[0], retain_graph=True)
    (score,) = torch.autograd.grad(whole, policy.logits[0], grad_outputs=whole.exp().detach() * reward)
    assert torch.allclose(exact, score, atol=1e-12)


def test_regularised_optimum_is_the_card_and_beats_others(generator):
    log_p, reward = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([1.0, 0.0, -1.0]).double()
    best = worlds.regularised_optimum(log_p, reward, coefficient=0.5)
    assert torch.allclose(best.exp(), torch.tensor([0.9186723, 0.0745973, 0.0067304]).double(), atol=1e-7)
    value = worlds.regularised_value(log_p, best, reward, coefficient=0.5)
    assert value.item() == pytest.approx(0.5 * (log_p + reward / 0.5).logsumexp(0).item(), abs=1e-12)
    others = torch.randn(200, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    gap = value - worlds.regularised_value(log_p, others, reward, coefficient=0.5)
    assert torch.allclose(gap, 0.5 * kl(others, best.expand_as(others)), atol=1e-12)  # an identity, hence >= 0
    assert not torch.allclose(gap, 0.5 * reverse_kl(others, best.expand_as(others)), atol=1e-3)  # bites


def test_entropy_and_draws(generator):
    world = worlds.World(2, 2)
    policy = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64).log()
    assert worlds.entropy(policy).item() == pytest.approx(-sum(x * math.log(x) for x in (0.5, 0.2, 0.3)), abs=1e-12)
    drawn = world.index(worlds.draw_sequences(world, policy, 20_000, generator=generator))
    found = torch.bincount(drawn, minlength=4).double() / 20_000
    assert found[1] == 0
    assert ((found - policy.exp()).abs() <= 6 * (policy.exp() * (1 - policy.exp()) / 20_000).sqrt()).all()
    with pytest.raises(ShapeError, match="4 sequences"):
        worlds.draw_sequences(world, policy[:3], 1, generator=generator)


def enumerated_best(p, reward, n):
    """The same law by going through all n-tuples, ties shared out in proportion to the counts of the draw."""
    law = torch.zeros_like(p)
    for draw in itertools.product(range(len(p)), repeat=n):
        top = max(reward[i].item() for i in draw)
        winners = [i for i in draw if reward[i] == top]
        for winner in winners:
            law[winner] += p[list(draw)].prod() / len(winners)
    return law


def broken_ties(p, reward, n):
    """Wrong where rewards are equal: the index decides."""
    order = reward.argsort(stable=True)
    f = p[order].cumsum(0) ** n
    return torch.zeros_like(p).scatter(0, order, f.diff(prepend=f.new_zeros(1)))


def test_best_of_n_is_enumeration_also_with_ties():
    assert torch.allclose(
        worlds.best_of_n_law(P.log(), R, 4).exp(), torch.tensor([0.0625, 0.25390625, 0.33969375, 0.3439]).double()
    )
    tied = torch.tensor([1.0, 0.0, 1.0, 2.0]).double()
    exact = enumerated_best(P, tied, 4)
    assert torch.allclose(worlds.best_of_n_law(P.log(), tied, 4).exp(), exact, atol=1e-14)
    assert not torch.allclose(broken_ties(P, tied, 4), exact, atol=1e-3)  # bites
    near = tied + torch.tensor([0.0, 0.0, 1e-9, 0.0]).double()
    assert torch.allclose(worlds.best_of_n_law(P.log(), near, 4, tie_tolerance=1e-6).exp(), exact, atol=1e-14)
    assert not torch.allclose(worlds.best_of_n_law(P.log(), near, 4).exp(), exact, atol=1e-3)


def test_best_of_n_at_its_ends_and_in_batches(generator):
    log_p = torch.randn(5, 40, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.randint(6, (5, 40), generator=generator).double()
    one = worlds.best_of_n_law(log_p, reward, 1)
    assert torch.allclose(one, log_p, atol=1e-11)
    law = worlds.best_of_n_law(log_p, reward, 7.5)
    assert torch.allclose(law.logsumexp(-1), torch.zeros(5).double(), atol=1e-12)
    assert torch.allclose(law[3], worlds.best_of_n_law(log_p[3], reward[3], 7.5), atol=1e-12)
    top = worlds.best_of_n_law(P.log(), R, 1e9).exp()
    assert top[3].item() == pytest.approx(1.0, abs=1e-12)


def test_best_of_n_keeps_its_digits_with_huge_n_and_tiny_masses():
    p = torch.tensor([1.0 - 2e-28, 1e-28, 1e-28], dtype=torch.float64)
    law = worlds.best_of_n_law(p.log(), torch.arange(3).double(), math.exp(64.0)).exp()
    load = math.exp(64.0) * 1e-28  # Poisson's limit
    wanted = [math.exp(-2 * load), math.exp(-load) - math.exp(-2 * load), -math.expm1(-load)]
    assert torch.allclose(law, torch.tensor(wanted).double(), rtol=1e-9)
    naive = (p.cumsum(0) ** math.exp(64.0)).diff(prepend=torch.zeros(1).double())
    assert not torch.allclose(naive, torch.tensor(wanted).double(), rtol=1e-2)  # bites
    low = worlds.best_of_n_law(torch.tensor([-2000.0, -1999.0, 0.0]).double(), torch.arange(3).double(), 3)
    assert low[0].item() == pytest.approx(-6000.0, abs=1e-6)
    assert low[1].item() == pytest.approx(3 * math.log1p(math.exp(-1)) - 5997 + math.log(1 - (1 / (1 + math.e)) ** 3))


@pytest.mark.parametrize(("n", "tolerance"), [(0.5, 0.0), (math.inf, 0.0), (math.nan, 0.0), (2, -1.0)])
def test_best_of_n_refuses(n, tolerance):
    with pytest.raises(ConfigError, match="best of n"):
        worlds.best_of_n_law(P.log(), R, n, tie_tolerance=tolerance)
    with pytest.raises(DataError, match="1 rewards are NaN"):
        worlds.best_of_n_law(P.log(), R.masked_fill(R == 4, math.nan), 2)


# --- targets ---


@pytest.fixture
def setting(generator):
    world = worlds.World(3, 4)
    log_p = torch.randn(world.size, generator=generator, dtype=torch.float64).log_softmax(-1)
    score = torch.randint(5, (world.size,), generator=generator).double()
    return world, log_p, score, lambda s: log_p[world.index(s)], lambda s: score[world.index(s)]


def test_reward_target_is_the_optimum(setting):
    world, log_p, score, reference, reward = setting
    target = targets.reward_target(reference, reward, coefficient=0.7)
    exact = worlds.regularised_optimum(log_p, score, coefficient=0.7)
    assert torch.allclose(target.law(world.sequences()), exact, atol=1e-12)


def test_best_of_n_target_is_the_law_from_all_and_close_from_samples(setting, generator):
    world, log_p, score, reference, reward = setting
    exact = worlds.best_of_n_law(log_p, score, 4)
    target = targets.best_of_n_target(reference, reward, n=4, reference_rewards=score, log_weights=log_p)
    assert torch.allclose(target(world.sequences()), exact, atol=1e-12)
    drawn = reward(worlds.draw_sequences(world, log_p, 20_000, generator=generator))
    sampled = targets.best_of_n_target(reference, reward, n=4, reference_rewards=drawn).law(world.sequences())
    assert kl(exact, sampled).item() < 1e-3
    # a continuous reward: where no sample has that very score, the density ratio is n F^(n-1)
    f = torch.linspace(0.005, 0.995, 100).double()
    flat = lambda s: torch.zeros(len(s)).double()  # noqa: E731
    between = targets.best_of_n_target(flat, lambda s: s[:, 0], n=3, reference_rewards=f)
    assert between(torch.tensor([[0.5]]).double()).item() == pytest.approx(math.log(3 * 0.5**2), abs=1e-12)


def test_constraints_are_met_and_nearest(setting, generator):
    world, log_p, score, reference, _ = setting
    sequences = world.sequences()
    features = lambda s: torch.stack([(s == 0).sum(-1), (s[:, 0] == 1)], dim=1).double()  # noqa: E731
    moments = torch.tensor([2.2, 0.8]).double()
    multipliers = targets.fit_multipliers(features(sequences), moments, log_weights=log_p)
    law = targets.constraint_target(reference, features=features, multipliers=multipliers).law(sequences)
    assert torch.allclose(law.exp() @ features(sequences), moments, atol=1e-9)
    # Pythagoras: any other law with these moments is farther, by its divergence to this one
    other = targets.fit_multipliers(features(sequences), moments, log_weights=log_p + 0.3 * score)
    same_moments = (log_p + 0.3 * score + features(sequences) @ other).log_softmax(0)
    assert kl(same_moments, log_p).item() == pytest.approx((kl(same_moments, law) + kl(law, log_p)).item(), abs=1e-8)
    off = (log_p + 0.3 * score).log_softmax(0)
    assert abs(kl(off, log_p) - kl(off, law) - kl(law, log_p)) > 1e-3  # bites: other moments


def test_must_restricts_and_conditions_are_passed_on(setting):
    world, log_p, _, reference, _ = setting
    first = lambda s: s[:, 0] == 1  # noqa: E731
    law = targets.constraint_target(reference, must=first).law(world.sequences())
    kept = first(world.sequences())
    assert torch.allclose(law[kept], log_p[kept].log_softmax(0), atol=1e-12)
    assert (law[~kept] == -math.inf).all()
    conditional = targets.reward_target(
        lambda s, x: reference(s), lambda s, x: x.double(), coefficient=1.0, conditions_on="prompt"
    )
    rows = world.sequences()[:2]
    assert torch.equal(conditional(rows, torch.tensor([0, 2])) - log_p[:2], torch.tensor([0.0, 2.0]).double())
    with pytest.raises(ConfigError, match="conditions on a prompt"):
        conditional(rows)


def test_product_of_experts_is_the_weighted_sum(setting):
    world, log_p, score, reference, reward = setting
    target = targets.product_of_experts([reference, reward], weights=[0.5, 2.0])
    assert torch.allclose(target(world.sequences()), 0.5 * log_p + 2 * score, atol=1e-12)
    plain = targets.product_of_experts([reference, reward])
    assert not torch.allclose(plain(world.sequences()), target(world.sequences()))


def test_multipliers_have_a_closed_form_and_refuse():
    phi = torch.tensor([[0.0], [1.0]])
    assert targets.fit_multipliers(phi, torch.tensor([0.9])).item() == pytest.approx(math.log(9.0), abs=1e-6)
    with pytest.raises(DataError, match="moment 0 is 1 and its feature goes from 0 to 1"):
        targets.fit_multipliers(phi, torch.tensor([1.0]))
    square = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.4]])
    with pytest.raises(DataError, match="no finite multipliers"):
        targets.fit_multipliers(square, torch.tensor([0.2, 0.9]))
    with pytest.raises(ShapeError, match=r"\[M, K\]"):
        targets.fit_multipliers(phi, torch.tensor([0.5, 0.5]))


def test_targets_refuse(setting):
    world, _, _, reference, reward = setting
    rows = world.sequences()[:3]
    with pytest.raises(ShapeError, match="one number a sequence"):
        targets.Target(lambda s: s.double())(rows)
    with pytest.raises(DataError, match="NaN or infinity for 3 of 3"):
        targets.Target(lambda s: torch.full((len(s),), math.nan))(rows)
    with pytest.raises(ConfigError, match="conditions on nothing"):
        targets.Target(reward)(rows, rows)
    with pytest.raises(ConfigError, match="positive and finite"):
        targets.reward_target(reference, reward, coefficient=0.0)
    with pytest.raises(ConfigError, match="features with their multipliers"):
        targets.constraint_target(reference)
    with pytest.raises(ConfigError, match="positive weight"):
        targets.product_of_experts([reference], weights=[-1.0])
    with pytest.raises(ConfigError, match="n of 1 or more"):
        targets.best_of_n_target(reference, reward, n=0, reference_rewards=torch.ones(2))
    with pytest.raises(DataError, match="finite numbers"):
        targets.best_of_n_target(reference, reward, n=2, reference_rewards=torch.ones(0))
