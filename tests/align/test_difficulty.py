"""Difficulty filtering: its theory by enumeration, filters on tables, the tracker's posterior."""

import math

import pytest
import torch

from kullback.align.difficulty import (
    DifficultyFilter,
    PassRateTracker,
    acceptance_probability,
    best_pass_rate,
    difficulty_filter,
    expected_advantage,
    expected_reward_variance,
    informative_probability,
    kl_to_optimum,
    offline_prompts,
    pinsker_bound,
    tilted_pass_rate,
    variance_bound,
)
from kullback.align.policy_gradient import grouped_advantages
from kullback.align.worlds import regularised_optimum
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.divergences import kl


@pytest.mark.parametrize(
    ("rate", "beta", "value", "bound", "holds"),
    [
        (0.25, 1.0, 0.1073740195, 0.09375, True),
        (0.75, 1.0, 0.0779889392, 0.09375, False),
        (0.5, 1.0, 0.1201145070, 0.125, False),
        (0.25, 0.1, 6.1138418294, 9.375, False),
        (0.5, 0.1, 4.3068982183, 12.5, False),
    ],
)
def test_the_divergences_and_bounds_of_the_card(rate, beta, value, bound, holds):
    exact = kl_to_optimum(rate, beta).item()
    assert exact == pytest.approx(value, abs=1e-9)
    assert variance_bound(rate, beta).item() == pytest.approx(bound)
    assert (variance_bound(rate, beta) <= exact) == holds


@pytest.mark.parametrize(("rate", "limit"), [(0.1, 16.99), (0.25, 5.18), (0.4, 1.658)])
def test_where_the_published_bound_ends(rate, limit):
    for tilt, holds in ((0.99 * limit, True), (1.01 * limit, False)):
        assert (kl_to_optimum(rate, 1 / tilt) >= variance_bound(rate, 1 / tilt)) == holds


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0, 40.0, 1e4])
def test_enumerated_policies_have_the_divergence_of_two_outcomes(beta):
    draws = stream(1)
    log_reference = torch.randn(5, 30, generator=draws, dtype=torch.float64).log_softmax(-1)
    reward = (torch.rand(5, 30, generator=draws) < 0.3).double()
    optimum = regularised_optimum(log_reference, reward, coefficient=beta)
    rate = (log_reference.exp() * reward).sum(-1)
    assert torch.allclose(tilted_pass_rate(rate, beta), (optimum.exp() * reward).sum(-1), atol=1e-12)
    forward, reverse = kl(log_reference, optimum), kl(optimum, log_reference)
    assert torch.allclose(kl_to_optimum(rate, beta), forward, atol=1e-12)
    assert torch.allclose(kl_to_optimum(rate, beta, direction="reverse"), reverse, atol=1e-12)
    assert (pinsker_bound(rate, beta) <= torch.minimum(forward, reverse) + 1e-15).all()
    if beta >= 1e3:
        assert torch.allclose(kl_to_optimum(rate, beta) / variance_bound(rate, beta), torch.ones(5).double(), atol=1e-3)


def test_extreme_tilts_and_rates():
    assert kl_to_optimum(torch.tensor([0.0, 1.0]), 1e-4).tolist() == [0.0, 0.0]
    assert kl_to_optimum(0.25, 1e-4).item() == pytest.approx(0.75e4 + math.log(0.25))
    assert tilted_pass_rate(1e-3, 1e-3).item() == pytest.approx(1.0)
    assert kl_to_optimum(0.3, 1e6).item() == pytest.approx(0.3 * 0.7 / 2e12, rel=1e-3)


@pytest.mark.parametrize(
    ("tilt", "best"), [(0.1, 0.4917), (1.0, 0.4180), (2.0, 0.3435), (5.0, 0.1932), (10.0, 0.1000), (1e-4, 0.5)]
)
def test_the_best_rate_is_the_grids(tilt, best):
    assert best_pass_rate(1 / tilt) == pytest.approx(best, abs=1e-4)
    grid = torch.linspace(0.001, 0.999, 9981, dtype=torch.float64)
    found = kl_to_optimum(grid, 1 / tilt)
    assert kl_to_optimum(best_pass_rate(1 / tilt), 1 / tilt) >= found.max() - 1e-12
    if tilt >= 0.1:
        assert grid[found.argmax()].item() == pytest.approx(best_pass_rate(1 / tilt), abs=2e-4)


@pytest.mark.parametrize(
    ("rate", "group", "mode", "value"),
    [
        (0.05, 8, "balanced", 0.0572446443), (0.1, 8, "balanced", 0.1868945400), (0.25, 8, "balanced", 0.6325378418),
        (0.5, 8, "balanced", 0.9296875), (0.1, 16, "balanced", 0.0684061739), (0.25, 16, "balanced", 0.5950091067),
        (0.5, 16, "balanced", 0.9787292480), (0.05, 8, "nonzero", 0.3365795687), (0.3, 8, "plain", 1.0),
    ],
)  # fmt: skip
def test_acceptance_of_the_card(rate, group, mode, value):
    assert acceptance_probability(rate, group, keep=difficulty_filter(mode)).item() == pytest.approx(value, abs=1e-9)
    if mode == "nonzero":
        assert informative_probability(rate, group).item() == pytest.approx(value, abs=1e-9)
    open_ends = DifficultyFilter(low_included=False, high_included=False)
    if mode == "balanced":
        assert abs(acceptance_probability(rate, group, keep=open_ends).item() - value) > 1e-3, "the ends are reached"


def outcomes(group):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * group)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_signals_by_enumeration_of_groups(rate):
    table = outcomes(5)
    law = torch.where(table > 0, rate, 1 - rate).double().prod(1)
    share = table.double().mean(1)
    for correction in (0, 1):
        size = grouped_advantages(table.double(), eps=0.0, correction=correction).abs().mean(1)
        assert expected_advantage(rate, 5, correction=correction).item() == pytest.approx(float((law * size).sum()))
    found = expected_reward_variance(rate, 5).item()
    assert found == pytest.approx(float((law * share * (1 - share)).sum()))
    assert found == pytest.approx(0.8 * rate * (1 - rate))
    mode = difficulty_filter("balanced", 0.3)
    exact = float((law * mode(table).double()).sum())
    assert acceptance_probability(rate, 5, keep=mode).item() == pytest.approx(exact)


def test_a_natural_gradient_step_gains_the_variance_of_the_reward():
    """theta' = (Fisher)^-1 grad E r on a softmax has dp/dt = p (1 - p): by finite differences."""
    theta = torch.randn(6, generator=stream(2), dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    law = theta.softmax(0)
    fisher = law.diag() - torch.outer(law, law)
    direction = torch.linalg.pinv(fisher) @ (law * (reward - law @ reward))
    step = 1e-6
    after, before = ((theta + side * step * direction).softmax(0) @ reward for side in (1, -1))
    gain = (after - before) / (2 * step)
    rate = float(law @ reward)
    assert gain.item() == pytest.approx(rate * (1 - rate), rel=1e-6)


def test_filters_on_a_table():
    table = torch.tensor([[k >= at for at in range(1, 9)] for k in range(9)]).float()
    kept = {mode: difficulty_filter(mode)(table).nonzero().flatten().tolist() for mode in
            ("balanced", "easy", "hard", "nonzero", "plain")}  # fmt: skip
    assert kept == {
        "balanced": [2, 3, 4, 5, 6], "easy": [2, 3, 4, 5, 6, 7], "hard": [1, 2, 3, 4, 5, 6],
        "nonzero": [1, 2, 3, 4, 5, 6, 7], "plain": list(range(9)),
    }  # fmt: skip
    assert torch.equal(difficulty_filter("balanced")(1 - table), difficulty_filter("balanced")(table))
    assert torch.equal(difficulty_filter("easy")(1 - table), difficulty_filter("hard")(table))
    assert torch.equal(difficulty_filter("nonzero")(table), grouped_advantages(table).abs().sum(1) > 0)
    tenths = torch.tensor([[1.0] * 3 + [0.0] * 7, [1.0] * 7 + [0.0] * 3])
    assert difficulty_filter("balanced", 0.3)(tenths).all(), "0.3 of ten is 3, whatever its rounding"
    assert not DifficultyFilter(low=0.3, high=0.7, low_included=False, high_included=False)(tenths).any()


def test_looking_once():
    table = torch.tensor([[k >= at for at in range(1, 9)] for k in (3, 8, 0, 6, 3, 2)]).float()
    assert offline_prompts(table, keep=difficulty_filter("balanced")).tolist() == [0, 3, 4, 5]
    assert offline_prompts(table, keep=difficulty_filter("balanced"), easy_first=True).tolist() == [3, 0, 4, 5]
    assert offline_prompts(table, keep=difficulty_filter("plain"), easy_first=True).tolist() == [1, 3, 0, 4, 5, 2]


def test_graded_rewards_need_some_variance():
    graded = torch.tensor([[0.5, 0.5, 0.5], [0.4, 0.5, 0.6]])
    assert DifficultyFilter()(graded).tolist() == [True, True]
    assert DifficultyFilter(variance=1e-4)(graded).tolist() == [False, True]
    assert DifficultyFilter(low=0.0, high=1.0, variance=0.0)(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [
        False, True,
    ]  # fmt: skip


def test_the_tracker_is_a_beta_posterior():
    tracker = PassRateTracker(4, before=2.0, against=3.0)
    tracker.update([1, 3], [5, 0], 8)
    tracker.update(torch.tensor([1]), torch.tensor([2]), 4)
    mean, variance = tracker.predict()
    a, b = 2 + 7.0, 3 + 5.0
    assert mean.tolist() == pytest.approx([0.4, a / (a + b), 0.4, 2 / 13])
    assert variance[1].item() == pytest.approx(a * b / (a + b) ** 2 / (a + b + 1))
    keep = difficulty_filter("balanced")
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    exact = (density * acceptance_probability(grid, 8, keep=keep)).sum() / density.sum()
    assert tracker.acceptance(8, keep=keep, index=[1]).item() == pytest.approx(exact.item(), abs=1e-8)
    other = PassRateTracker(4, before=2.0, against=3.0)
    other.load_state_dict(tracker.state_dict())
    assert torch.equal(other.predict()[0], mean)
    forgets = PassRateTracker(1, forgetting=0.5)
    forgets.update([0], [8], 8)
    forgets.update([0], [0], 8)
    assert forgets.predict([0])[0].item() == pytest.approx(5 / 14)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ConfigError, lambda: DifficultyFilter(low=0.6, high=0.4)),
        (ConfigError, lambda: DifficultyFilter(low=-0.1)),
        (ConfigError, lambda: DifficultyFilter(low=0.5, high=0.5, low_included=False)),
        (ConfigError, lambda: difficulty_filter("other")),
        (ShapeError, lambda: DifficultyFilter()(torch.ones(2, 1))),
        (ShapeError, lambda: DifficultyFilter()(torch.ones(2))),
        (DataError, lambda: DifficultyFilter()(torch.tensor([[0.0, 2.0]]))),
        (DataError, lambda: DifficultyFilter()(torch.tensor([[0.0, math.nan]]))),
        (ConfigError, lambda: acceptance_probability(0.5, 1, keep=DifficultyFilter())),
        (DataError, lambda: kl_to_optimum(1.5, 1.0)),
        (ConfigError, lambda: kl_to_optimum(0.5, 0.0)),
        (ConfigError, lambda: kl_to_optimum(0.5, 1.0, direction="both")),
        (ConfigError, lambda: PassRateTracker(0)),
        (ConfigError, lambda: PassRateTracker(1, forgetting=2.0)),
        (ShapeError, lambda: PassRateTracker(3).update([1, 1], [1, 1], 2)),
        (DataError, lambda: PassRateTracker(3).update([1], [3], 2)),
        (ShapeError, lambda: PassRateTracker(3).load_state_dict(PassRateTracker(2).state_dict())),
    ],
)
def test_what_is_refused(error, call):
    with pytest.raises(error):
        call()
