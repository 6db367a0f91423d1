"""Nash learning: the card's game, the rate that is proven, fixed points by other means, and sampled gradients."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from kullback.align.nash import (
    PreferenceGame,
    exploitability,
    nash_mirror_descent,
    nash_mirror_prox,
    nash_prox,
    proximal_step,
    regularised_nash,
    self_play,
    span_seminorm,
)
from kullback.align.nash_policy import (
    NashPolicy,
    judged,
    nash_policy_gradient_loss,
    online_ipo_loss,
    pair_preferences,
    win_rates,
)
from kullback.core.errors import ConfigError, DataError, RewardError, ShapeError
from kullback.core.rng import generator
from kullback.divergences import kl

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()


def card_game(beta=0.1):
    return PreferenceGame(P, REFERENCE, beta)


def random_game(size, beta, seed, batch=()):
    draw = generator(seed, "game", size)
    logits = 3.0 * torch.randn(*batch, size, size, generator=draw, dtype=torch.float64)
    reference = torch.rand(*batch, size, generator=draw, dtype=torch.float64).log().neg().log()
    return PreferenceGame((logits - logits.mT).sigmoid(), (-reference.neg()).log_softmax(-1), beta)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (1.0, (0.64425466, 0.24195217, 0.11379316)),
        (0.1, (0.49274733, 0.15414696, 0.35310571)),
        (0.01, (0.31471189, 0.27954170, 0.40574641)),
    ],
)
def test_the_equilibrium_of_the_card(beta, expected):
    game = card_game(beta)
    found = regularised_nash(game)
    assert found.exp().tolist() == pytest.approx(expected, abs=1e-8)
    gap = found - REFERENCE - game.beats(found) / beta
    assert (gap.max() - gap.min()).item() < 1e-11
    assert exploitability(game, found).item() < 1e-12
    assert game.payoff(found, found).item() == pytest.approx(0.5, abs=1e-12)


def test_mirror_prox_goes_as_on_the_card_and_within_its_rate():
    game, found = card_game(), {}
    nash = regularised_nash(game)
    nash_mirror_prox(game, 20, listen=lambda k, policy: found.update({k: policy}))
    start = kl(nash, REFERENCE.log_softmax(-1)).item()
    assert start == pytest.approx(0.2457961626, abs=1e-9)
    expected = {1: 0.1622218591, 5: 0.0304832004, 10: 0.0034203054, 20: 3.2457633e-05}
    paid = {1: 0.0327201904, 5: 0.0101039354, 10: 0.0011902418, 20: 1.2041151e-05}
    for k, policy in found.items():
        assert kl(nash, policy).item() <= 1.2**-k * start
        if k in expected:
            assert kl(nash, policy).item() == pytest.approx(expected[k], rel=1e-6)
            assert exploitability(game, policy).item() == pytest.approx(paid[k], rel=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("size", "games"), [(3, 20), (40, 12), (200, 3), (1000, 1)])
def test_the_rate_holds_for_every_number_of_answers(beta, size, games):
    game = random_game(size, beta, 1, batch=(games,))
    nash = regularised_nash(game)
    start = kl(nash, game.log_reference)

    def check(k, policy):
        assert (kl(nash, policy) <= (1 + 2 * beta) ** -k * start + 1e-14).all()

    nash_mirror_prox(game, 60, listen=check)


def test_exploitability_and_the_span_fall_as_fast():
    """From the first to the last by (1 + 2 beta)^-K and more, where self-play at the same step stays where it is."""
    game = card_game(0.01)
    nash = regularised_nash(game)
    for measure in (lambda policy: exploitability(game, policy), lambda policy: span_seminorm(policy, nash)):
        for method, falls in ((nash_mirror_prox, True), (self_play, False)):
            found = {}
            method(game, 100, listen=lambda k, policy, found=found: found.update({k: policy}))
            first = measure(found[1])
            assert all((measure(found[k]) <= 1.02**-k * first).item() == falls for k in (50, 75, 100))


def test_self_play_runs_in_circles_where_mirror_prox_arrives():
    game = random_game(10, 0.01, 2)
    nash = regularised_nash(game)
    circled = kl(nash, self_play(game, 1000)).item()
    arrived = kl(nash, nash_mirror_prox(game, 500)).item()
    assert arrived < 1e-8
    assert circled > 0.01


def test_limits():
    indifferent = PreferenceGame(torch.full((3, 3), 0.5), torch.tensor([0.6, 0.3, 0.1]).log(), 0.1)
    torch.testing.assert_close(nash_mirror_prox(indifferent, 1).exp(), torch.tensor([0.6, 0.3, 0.1]))
    assert regularised_nash(card_game(1e4)).exp().tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-4)
    cyclic = torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])
    for beta in (0.01, 0.1, 1.0):
        uniform = PreferenceGame(cyclic, torch.zeros(3), beta)
        assert regularised_nash(uniform).exp().tolist() == pytest.approx([1 / 3] * 3, abs=1e-12)
    strength = torch.tensor([4.0, 0.0, -4.0], dtype=torch.float64)
    best = PreferenceGame((strength.unsqueeze(1) - strength).sigmoid(), torch.zeros(3, dtype=torch.float64), 0.05)
    assert regularised_nash(best).exp()[0].item() > 0.99


def test_the_proximal_step_is_the_maximum_on_the_simplex():
    game, eta = card_game(), 0.15
    opponent, anchor = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.2, 0.5, 0.3), (0.3, 0.3, 0.4)))
    found = proximal_step(game, opponent, anchor, eta=eta)

    def negative(logits):
        policy = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
        won = (policy.exp() * game.beats(opponent)).sum()
        return -(won - 0.1 * kl(policy, REFERENCE) - 0.1 / eta * kl(policy, anchor)).item()

    def slope(logits):
        theta = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        return -objective_gradient(theta, game, opponent, anchor, eta).numpy()

    best = optimize.minimize(negative, np.zeros(3), jac=slope, method="BFGS", options={"gtol": 1e-12})
    expected = torch.tensor(best.x).softmax(0)
    torch.testing.assert_close(found.exp(), expected, atol=1e-8, rtol=0)
    wrong = proximal_step(game, opponent, REFERENCE, eta=eta)  # the anchor forgotten
    assert negative(wrong.tolist()) > negative(found.tolist()) + 1e-4


def test_batches_are_loops_and_inner_iterations_reach_the_implicit_step():
    game = random_game(5, 0.1, 3, batch=(3,))
    together = nash_mirror_prox(game, 20)
    for place in range(3):
        alone = PreferenceGame(game.preferences[place], game.log_reference[place], 0.1)
        torch.testing.assert_close(nash_mirror_prox(alone, 20), together[place], atol=1e-12, rtol=0)
    first = nash_prox(game, 1, inner=200)
    torch.testing.assert_close(proximal_step(game, first, game.log_reference, eta=0.2), first, atol=1e-10, rtol=0)
    half = proximal_step(game, game.log_reference, game.log_reference, eta=0.2)
    once = proximal_step(game, half, game.log_reference, eta=0.2)
    torch.testing.assert_close(nash_mirror_prox(game, 1), once, atol=1e-12, rtol=0)


def test_mirror_descent_is_its_own_recursion():
    game, eta, beta = card_game(), 0.2, 0.1
    policy = REFERENCE.exp()
    for _ in range(7):
        mixture = policy ** (1 - eta * beta) * REFERENCE.exp() ** (eta * beta)
        mixture = mixture / mixture.sum()
        policy = mixture * (eta * (P @ mixture)).exp()
        policy = policy / policy.sum()
    torch.testing.assert_close(nash_mirror_descent(game, 7, eta=0.2).exp(), policy, atol=1e-12, rtol=0)
    assert span_seminorm(policy.log(), policy.log() + 3.0).item() == pytest.approx(0.0, abs=1e-12)


def objective_gradient(theta, game, opponent, anchor, eta):
    policy = theta.log_softmax(0)
    won = (policy.exp() * game.beats(opponent)).sum()
    value = won - game.beta * kl(policy, game.log_reference) - game.beta / eta * kl(policy, anchor)
    return torch.autograd.grad(value, theta)[0]


def sampled_gradient(theta, game, opponent, anchor, eta):
    """The loss over all answers, each as often as the policy gives it."""
    policy = theta.log_softmax(0)
    weights = policy.exp().detach()
    total = theta.new_zeros(())
    for y in range(3):
        one = [x[y].view(1, 1) for x in (game.log_reference, anchor, policy, game.beats(opponent))]
        total = total + weights[y] * nash_policy_gradient_loss(*one, beta=game.beta, eta=eta, baseline="none")
    return torch.autograd.grad(total, theta)[0]


def test_the_policy_gradient_is_that_of_the_objective():
    game, eta = card_game(), 0.2
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    opponent, anchor = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.2, 0.5, 0.3), (0.3, 0.3, 0.4)))
    given = (game, opponent, anchor, eta)
    torch.testing.assert_close(
        sampled_gradient(theta, *given), -objective_gradient(theta, *given), atol=1e-10, rtol=0
    )
    at_best = proximal_step(game, opponent, anchor, eta=eta).clone().requires_grad_()
    assert sampled_gradient(at_best, *given).abs().max() < 1e-12
    forgotten = sampled_gradient(theta, game, opponent, game.log_reference, eta)
    assert not torch.allclose(forgotten, -objective_gradient(theta, *given), atol=1e-3)


def test_online_ipo_is_the_mean_over_labels():
    draw = generator(4, "ipo")
    reference, policy = (torch.randn(2, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    chances = pair_preferences(torch.randn(2, 3, generator=draw, dtype=torch.float64))
    beta, total = 0.3, 0.0
    for p in range(2):
        for i in range(3):
            for j in range(3):
                if i != j:
                    h = (policy - reference)[p, i] - (policy - reference)[p, j]
                    chance = chances[p, i, j]
                    label = chance * (h - 0.5 / beta) ** 2 + (1 - chance) * (h + 0.5 / beta) ** 2
                    total += (label - (0.25 - (chance - 0.5) ** 2) / beta**2) / (6 * 2)
    assert online_ipo_loss(reference, policy, chances, beta=beta).item() == pytest.approx(total.item(), abs=1e-10)


def test_judges_are_asked_in_both_orders():
    asked = []

    def biased(prompts, first, second):
        """Prefers what is first, and longer."""
        asked.extend(zip(prompts, first, second, strict=True))
        pairs = list(zip(first, second, strict=True))
        return [0.6 + 0.3 * (len(a) > len(b)) - 0.3 * (len(a) < len(b)) for a, b in pairs]

    found = judged(biased)(["p", "p", "p", "q"], ["aaa", "a", "a", "x"])
    assert asked == [("p", "aaa", "a"), ("p", "a", "aaa")], "each pair of texts once in both orders; no lone one"
    assert found.tolist() == pytest.approx([0.8, 0.35, 0.35, 0.5])
    once = judged(biased, both_orders=False)(["p", "p"], ["a", "b"])
    assert once.tolist() == pytest.approx([0.6, 0.4]), "the bias that both orders take away"
    for wrong in ([2.0, 0.5], [math.nan, 0.5], [0.5]):
        with pytest.raises(RewardError, match=r"a chance in \[0, 1\] for each of 2 pairs"):
            judged(lambda prompts, first, second, wrong=wrong: wrong)(["p", "p"], ["a", "b"])


def test_the_method_reaches_the_equilibrium_of_a_game_in_circles():
    game = card_game(0.2)
    nash, logits = regularised_nash(game), REFERENCE.clone().requires_grad_()
    optimizer, anchor = torch.optim.SGD([logits], lr=0.5), REFERENCE.clone()
    method = NashPolicy(beta=0.2, preferences="given", decay=0.9)
    for step in range(600):
        policy = logits.log_softmax(0)
        x = torch.multinomial(policy.exp().detach(), 512, replacement=True, generator=generator(5, "y", step))
        column = torch.ones(512, 1, dtype=torch.float64)
        batch = {
            "rewards": game.beats(policy.detach())[x], "completion_mask": column.bool(),
            "old_log_prob": column * policy.detach()[x, None],
            "reference_log_prob": column * game.log_reference[x, None],
            "anchor_log_prob": column * anchor.log_softmax(0)[x, None],
        }  # fmt: skip
        batch = method.prepare(batch, group=8, generator=generator(0))
        loss, _ = method.loss(policy[x, None], batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        anchor = 0.9 * anchor + 0.1 * logits.detach()
    start, end = (exploitability(game, x.detach().log_softmax(0)).item() for x in (REFERENCE, logits))
    assert end < 0.05 * start
    assert kl(nash, logits.detach().log_softmax(0)).item() < 0.02


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PreferenceGame(torch.zeros(0, 0), torch.zeros(0), 0.1), ShapeError, "preferences"),
        (lambda: PreferenceGame(torch.zeros(0, 3, 3), torch.zeros(0, 3), 0.1), ShapeError, "preferences"),
        (lambda: PreferenceGame(P.expand(2, 3, 3), REFERENCE.expand(3, 3), 0.1), ShapeError, "log_reference"),
        (lambda: card_game().beats(torch.zeros(2)), ShapeError, "policies of this game"),
        (lambda: proximal_step(card_game(), REFERENCE, REFERENCE, eta=-0.5), ConfigError, "eta"),
        (lambda: proximal_step(card_game(), REFERENCE, REFERENCE, eta=math.nan), ConfigError, "eta"),
        (lambda: proximal_step(card_game(), REFERENCE[:2], REFERENCE, eta=0.2), ShapeError, "policies"),
        (
            lambda: self_play(PreferenceGame(P.expand(2, 3, 3), REFERENCE, 0.1), 1, start=REFERENCE.expand(4, 3)),
            DataError, "start from",
        ),
        (lambda: exploitability(card_game(), REFERENCE.exp()), DataError, "log_softmax"),
        (lambda: exploitability(card_game(), REFERENCE * math.nan), DataError, "log_softmax"),
        (lambda: exploitability(card_game(), REFERENCE[:2]), ShapeError, "policies"),
        (lambda: span_seminorm(REFERENCE, REFERENCE[:2]), ShapeError, "alike"),
        (lambda: span_seminorm(torch.tensor([0.0, -math.inf]), torch.tensor([0.0, -math.inf])), DataError, "NaN"),
        (lambda: regularised_nash(card_game(), most=0), ConfigError, "most"),
        (lambda: pair_preferences(torch.tensor([[0.0, math.nan]])), DataError, "1 rewards"),
        (lambda: win_rates(torch.full((1, 1, 1), 0.5)), ShapeError, "two completions"),
        (lambda: win_rates(torch.full((1, 2, 2), 1.5)), DataError, "chances"),
        (lambda: online_ipo_loss(*[torch.ones(2, 1)] * 2, torch.full((2, 1, 1), 0.5), beta=0.1), ShapeError, "G >= 2"),
        (lambda: online_ipo_loss(*[torch.ones(1, 2)] * 2, torch.full((1, 2, 2), math.nan), beta=1.0), DataError, "NaN"),
        (lambda: nash_policy_gradient_loss(*[torch.full((1, 2), 2.0)] * 4, beta=0.1, eta=0.2), DataError, "chances"),
        (lambda: nash_policy_gradient_loss(*[torch.ones(1, 2)] * 4, beta=math.inf, eta=0.2), ConfigError, "finite"),
        (lambda: NashPolicy(beta=math.inf), ConfigError, "finite"),
        (
            lambda: NashPolicy(preferences="given").prepare(
                {"rewards": torch.full((4,), 3.0)}, group=4, generator=generator(0)
            ), DataError, "chances",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_input():
    with pytest.raises(DataError, match="both orders"):
        PreferenceGame(torch.full((2, 2), 0.7), torch.zeros(2), 0.1)
    with pytest.raises(DataError, match="outside"):
        PreferenceGame(torch.tensor([[0.5, 1.5], [-0.5, 0.5]]), torch.zeros(2), 0.1)
    with pytest.raises(DataError, match="no probability"):
        PreferenceGame(torch.full((2, 2), 0.5), torch.tensor([0.0, -math.inf]), 0.1)
    with pytest.raises(ShapeError):
        PreferenceGame(torch.full((2, 3), 0.5), torch.zeros(3), 0.1)
    with pytest.raises(ConfigError, match="twice beta"):
        nash_mirror_prox(card_game(), 1, eta=0.5)
    nash_mirror_prox(card_game(), 1, eta=0.5, unsafe=True)
    with pytest.raises(ConfigError, match="eta beta"):
        nash_mirror_descent(card_game(), 1, eta=20.0)
    for wrong in ({"beta": 0.0}, {"decay": 1.0}, {"mode": "md"}, {"mode": "ipo", "preferences": "given"}):
        with pytest.raises(ConfigError):
            NashPolicy(**wrong)
    with pytest.raises(ShapeError):
        pair_preferences(torch.zeros(3, 1))
    with pytest.raises(ConfigError, match="rule"):
        pair_preferences(torch.zeros(3, 2), rule="best")
    assert win_rates(torch.full((1, 4, 4), 0.5)).tolist() == [[0.5] * 4]
