"""The frontier of reward and KL, gaps to it and best of n, against numbers worked out by hand and enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.align import tradeoff
from kullback.align.frontier import FrontierEstimator
from kullback.align.tradeoff import (
    alignment_gap,
    best_of_n_kl,
    best_of_n_kl_estimate,
    best_of_n_kl_upper,
    best_of_n_mean,
    kl_reward_frontier,
    largest_kl,
    log_partition,
    solve_tilt_for_kl,
    tilt,
)
from kullback.align.worlds import best_of_n_law, regularised_optimum
from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.divergences import kl

P = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log()
R = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(value, wanted, tolerance=5e-11):
    assert float(value) == pytest.approx(wanted, abs=tolerance)


def test_a_budget_of_half_a_nat_and_of_one():
    half, one = solve_tilt_for_kl(P, R, 0.5), solve_tilt_for_kl(P, R, 1.0)
    close(half.beta, 0.6390435091)
    torch.testing.assert_close(
        half.log_policy.exp(),
        torch.tensor([0.17852209, 0.16912003, 0.19225576, 0.46010212], dtype=torch.float64), atol=5e-9, rtol=0,
    )  # fmt: skip
    close(half.reward, 2.3940400408)
    close(one.beta, 0.9185392848)
    close(one.reward, 3.0411008495)
    close(largest_kl(P, R), 2.3025850930)


def check_best_of_four(kl_of_law, gap):
    law = best_of_n_law(P, R, 4)
    torch.testing.assert_close(law.exp(), torch.tensor([0.0625, 0.25390625, 0.33969375, 0.3439], dtype=torch.float64))
    spent, earned = kl_of_law(P, R, 4), (law.exp() * R).sum()
    close(spent, 0.5764189575)
    close(earned, 2.30889375)
    best = solve_tilt_for_kl(P, R, spent)
    close(best.reward, 2.5095327762)
    close(gap(P, R, spent, earned), kl(law, best.log_policy).item(), 1e-12)
    close(gap(P, R, spent, earned), 0.1373333267)


def test_best_of_four_and_its_gap():
    check_best_of_four(best_of_n_kl, alignment_gap)
    close(best_of_n_kl_upper(4), 0.6362943611)


@pytest.mark.parametrize(
    ("kl_of_law", "gap"),
    [
        (lambda p, r, n: best_of_n_kl_upper(n), alignment_gap),  # the bound taken for the value
        (lambda p, r, n: best_of_n_kl(p, torch.tensor([0.0, 1.0, 2.0, 2.0]), n), alignment_gap),
        (best_of_n_kl, lambda p, r, spent, earned: solve_tilt_for_kl(p, r, spent).reward - earned),  # beta forgotten
    ],
)
def test_wrong_accounts_of_best_of_four_are_told(kl_of_law, gap):
    with pytest.raises(AssertionError):
        check_best_of_four(kl_of_law, gap)


def test_ends_of_best_of_n():
    torch.testing.assert_close(best_of_n_law(P, R, 1), P)
    assert best_of_n_law(P, R, 1e9).exp()[3].item() == pytest.approx(1.0)
    close(best_of_n_kl(P, R, 1e9), math.log(10), 1e-9)


def test_the_gap_holds_for_any_policy_and_any_optimum():
    for seed in range(5):
        source = seeded(seed)
        log_p, log_q = torch.randn(2, 6, generator=source, dtype=torch.float64).log_softmax(-1)
        r = torch.randn(6, generator=source, dtype=torch.float64)
        for beta in (-0.5, 0.0, 0.3, 2.0):
            found = alignment_gap(log_p, r, kl(log_q, log_p), (log_q.exp() * r).sum(), beta=beta)
            close(found, kl(log_q, tilt(log_p, r, beta)).item(), 1e-12)
        spent = kl(log_q, log_p)
        by_delta = alignment_gap(log_p, r, spent, (log_q.exp() * r).sum(), delta=0.2)
        close(by_delta, kl(log_q, solve_tilt_for_kl(log_p, r, 0.2).log_policy).item(), 1e-11)


def test_the_estimate_of_best_of_ns_kl():
    close(best_of_n_kl_estimate(torch.tensor(0.1, dtype=torch.float64), 4), 0.6348702809)
    close(best_of_n_kl_estimate(torch.tensor(0.1, dtype=torch.float64), 16), 1.7561419079)
    close(best_of_n_kl_estimate(torch.tensor(1e-14, dtype=torch.float64), 16), best_of_n_kl_upper(16).item(), 1e-9)
    assert best_of_n_kl_estimate(torch.tensor(1.0), 4).item() == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 30), n=st.floats(1, 1000), share=st.floats(0.001, 0.999))
def test_laws_of_the_frontier(seed, size, n, share):
    source = seeded(seed)
    log_p = torch.randn(3, size, generator=source, dtype=torch.float64).log_softmax(-1)
    r = torch.randint(0, 8, (3, size), generator=source).double()
    limit = largest_kl(log_p, r)
    solution = solve_tilt_for_kl(log_p, r, share * limit)
    free = limit > 1e-9
    torch.testing.assert_close(solution.kl[free], (share * limit)[free], atol=1e-11, rtol=1e-9)
    # the bound, and the optimum, hold for best of n
    spent = best_of_n_kl(log_p, r, n)
    law = best_of_n_law(log_p, r, n)
    assert bool((spent <= best_of_n_kl_upper(n) + 1e-12).all())
    best = solve_tilt_for_kl(log_p, r, spent).reward
    assert bool((best >= (law.exp() * r).sum(-1) - 1e-9).all())
    # r + c and s r and the order of outcomes
    moved = solve_tilt_for_kl(log_p, 3.0 * r - 7.0, share * limit)
    torch.testing.assert_close(moved.log_policy[free], solution.log_policy[free], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(3.0 * moved.beta[free], solution.beta[free], atol=1e-6, rtol=1e-6)
    order = torch.randperm(size, generator=source)
    torch.testing.assert_close(tilt(log_p[:, order], r[:, order], 0.7), tilt(log_p, r, 0.7)[:, order])


def test_slopes_against_differences():
    grid = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    h = 1e-5
    up, down, at = (kl_reward_frontier(P, R, grid + shift) for shift in (h, -h, 0.0))
    law = tilt(P.expand(3, 4), R, grid).exp()
    variance = (law * R.square()).sum(-1) - (law * R).sum(-1).square()
    torch.testing.assert_close((up.kl - down.kl) / (2 * h), grid * variance, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close((up.reward - down.reward) / (up.kl - down.kl), at.slope, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(at.reward * grid - log_partition(P, R, grid), at.kl)


def test_the_tilt_is_rlhfs_optimum_with_the_inverse_coefficient():
    torch.testing.assert_close(tilt(P, R, 2.5), regularised_optimum(P, R, coefficient=0.4))


def test_budgets_at_and_beyond_the_ends():
    whole = solve_tilt_for_kl(P.expand(4, 4), R, torch.tensor([0.0, 2.302585, 2.5, math.inf]))
    assert whole.beta.tolist() == [0.0, pytest.approx(10.2, abs=1.5), math.inf, math.inf]
    assert whole.log_policy[2].exp().tolist() == [0.0, 0.0, 0.0, 1.0]
    close(whole.kl[2], math.log(10), 1e-12)
    tied = solve_tilt_for_kl(P, torch.tensor([1.0, 2.0, 2.0, 0.0]), 10.0)
    torch.testing.assert_close(tied.log_policy.exp(), torch.tensor([0.0, 0.625, 0.375, 0.0], dtype=torch.float64))
    constant = solve_tilt_for_kl(P, torch.ones(4), 0.3)
    close(constant.kl, 0.0)
    tiny = solve_tilt_for_kl(P, R, 1e-10)
    close(tiny.kl, 1e-10, 1e-15)


def test_one_beta_for_all_prompts():
    source = seeded(3)
    log_p = torch.randn(200, 40, generator=source, dtype=torch.float64).log_softmax(-1)
    r = torch.randn(200, 40, generator=source, dtype=torch.float64) * torch.linspace(0.1, 3, 200).unsqueeze(1)
    shared = solve_tilt_for_kl(log_p, r, 0.7, constraint="average")
    assert shared.beta.unique().numel() == 1
    close(shared.kl.mean(), 0.7, 1e-11)
    apart = solve_tilt_for_kl(log_p, r, 0.7)
    assert shared.reward.mean() > apart.reward.mean()  # what is spent where it buys most
    close(apart.kl.mean(), 0.7, 1e-11)
    assert solve_tilt_for_kl(log_p, r, 99.0, constraint="average").beta.isinf().all()


def test_outcomes_without_mass_and_one_prompt_among_many():
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    r = torch.tensor([[0.0, 1.0, math.inf], [3.0, 1.0, 0.0]], dtype=torch.float64)
    both = solve_tilt_for_kl(log_p, r, 0.1)
    alone = solve_tilt_for_kl(log_p[0, :2], r[0, :2], 0.1)
    torch.testing.assert_close(both.log_policy[0, :2], alone.log_policy)
    assert both.log_policy[0, 2].item() == -math.inf
    close(largest_kl(log_p, r)[0], math.log(2), 1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_the_largest_kl_counts_every_best_outcome(tied):
    """By rows with and without ties, together and alone, and where the best has no mass to speak of."""
    r = torch.tensor([[0.0, 1.0, 2.0, 4.0], [4.0, 1.0, 4.0, 4.0]], dtype=torch.float64)[[0, int(tied)]]
    wanted = [-math.log(0.1), -math.log(0.75) if tied else -math.log(0.1)]
    assert largest_kl(P, r).tolist() == pytest.approx(wanted, abs=1e-12)
    assert [largest_kl(P, row).item() for row in r] == pytest.approx(wanted, abs=1e-12)
    assert largest_kl(P, torch.ones(4)).item() == pytest.approx(0.0, abs=1e-12)
    assert largest_kl(torch.tensor([0.0, -900.0]).double(), torch.tensor([0.0, 1.0])).item() == pytest.approx(900.0)
    for wrong in (math.nan, math.inf, -math.inf):
        broken = r.clone()
        broken[1, 2] = wrong
        with pytest.raises(DataError, match="not finite"):
            largest_kl(P, broken)


def test_mean_of_best_of_n_over_all_subsets():
    rewards = torch.randn(7, generator=seeded(1), dtype=torch.float64)
    for n in (1, 3, 7):
        subsets = [max(chosen) for chosen in itertools.combinations(rewards.tolist(), n)]
        close(best_of_n_mean(rewards, n), sum(subsets) / len(subsets), 1e-12)
    many = best_of_n_mean(torch.randn(2, 4000, generator=seeded(1)), 2000)
    assert bool(many.isfinite().all())


def test_frontiers_from_samples_of_normal_rewards():
    """For normal rewards KL = beta^2 / 2 and E r = beta."""
    source = seeded(2)
    rewards = torch.randn(300, 2000, generator=source)
    first = FrontierEstimator([0.0, 0.5, 1.0, 6.0], sizes=[1, 4]).fit(rewards[:100])
    second = FrontierEstimator([0.0, 0.5, 1.0, 6.0], sizes=[1, 4]).fit(rewards[100:200].numpy())
    joined = first.merge(second).partial_fit(rewards[200:])
    found = joined.predict(generator=source)
    for place, beta in ((0, 0.0), (1, 0.5), (2, 1.0)):
        close(found.reward[place], beta, 0.02)
        close(found.kl[place], beta**2 / 2, 0.02)
        assert found.kl_interval[0][place] <= found.kl[place] <= found.kl_interval[1][place]
    assert found.kl[3].isnan()
    assert found.effective[3] < 20
    whole = FrontierEstimator([0.0, 0.5, 1.0, 6.0], sizes=[1, 4]).fit(rewards)
    torch.testing.assert_close(whole.kl_, joined.kl_)
    bound, best = joined.best_of_n()
    close(best[1], 1.0294, 0.02)  # the mean of the largest of four normals
    close(bound[1], 0.6362943611)


def test_the_estimate_is_the_exact_frontier_of_the_empirical_law():
    rewards = torch.randn(5, 100, generator=seeded(3), dtype=torch.float64)
    estimator = FrontierEstimator([0.3, 0.9]).fit(rewards)
    exact = kl_reward_frontier(torch.full((5, 100), -math.log(100.0)), rewards, torch.tensor([0.3, 0.9]))
    torch.testing.assert_close(estimator.kl_, exact.kl)
    torch.testing.assert_close(estimator.reward_, exact.reward)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tilt(P + 0.1, R, 1.0), DataError, "sum to 1"),
        (lambda: tilt(P, R[:3], 1.0), ShapeError, "both"),
        (lambda: tilt(P, R.clone().fill_(math.nan), 1.0), DataError, "not finite"),
        (lambda: tilt(P, R, math.nan), ConfigError, "not a number"),
        (lambda: tilt(P[:0], R[:0], 1.0), ShapeError, "at least one outcome"),
        (lambda: log_partition(P, R, math.inf), ConfigError, "infinite beta"),
        (lambda: solve_tilt_for_kl(P, R, -0.1), ConfigError, "0 or more"),
        (lambda: solve_tilt_for_kl(P, R, 0.1, constraint="all"), ConfigError, "per_prompt or average"),
        (lambda: alignment_gap(P, R, 0.1, 1.0, beta=1.0, delta=0.1), ConfigError, "both were given"),
        (lambda: alignment_gap(P, R, 5.0, 4.0), ConfigError, "infinite"),
        (lambda: best_of_n_kl(P, R, 0.5), ConfigError, "best of n"),
        (lambda: best_of_n_kl_upper(0.5), ConfigError, "1 or more"),
        (lambda: best_of_n_kl_estimate(torch.tensor(0.0), 4), DataError, "lie in"),
        (lambda: best_of_n_mean(torch.zeros(3), 4), ConfigError, "from 1 to 3"),
        (lambda: best_of_n_mean(torch.tensor([math.nan]), 1), DataError, "NaN"),
        (lambda: FrontierEstimator([]), ConfigError, "at least one"),
        (lambda: FrontierEstimator([1.0]).fit(torch.zeros(3)), ShapeError, "prompts, M"),
        (lambda: FrontierEstimator([1.0]).fit(torch.full((2, 3), math.nan)), DataError, "not finite"),
        (lambda: FrontierEstimator([1.0]).predict(generator=seeded(0)), NotFitted, "fitted"),
        (lambda: FrontierEstimator([1.0]).merge(FrontierEstimator([2.0])), ConfigError, "the same"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("constraint", ["per_prompt", "average"])
def test_blocks_of_prompts_are_solved_as_each_alone(monkeypatch, constraint):
    """Ties, outcomes that never occur, a best one of probability e^-650, budgets of 0 and beyond the end, in one."""
    draw = seeded(3)
    log_p = torch.randn(40, 9, generator=draw, dtype=torch.float64).log_softmax(-1)
    r = torch.randn(40, 9, generator=draw, dtype=torch.float64)
    r[5] = r[5].round()
    r[6] = 1.0
    log_p[7, :3] = -math.inf
    log_p[8, r[8].argmax()] = -650.0
    log_p = log_p.log_softmax(-1)
    delta = 2.0 * torch.rand(40, generator=draw, dtype=torch.float64) if constraint == "per_prompt" else 0.4
    if constraint == "per_prompt":
        delta[9], delta[10], delta[8] = 0.0, 50.0, 40.0
    before = log_p.clone(), r.clone()
    monkeypatch.setattr(tradeoff, "_BLOCK", 9 * 7)
    found = solve_tilt_for_kl(log_p, r, delta, constraint=constraint)
    assert torch.equal(log_p, before[0])
    assert torch.equal(r, before[1])
    for row in range(40):
        if constraint == "per_prompt":
            alone = solve_tilt_for_kl(log_p[row], r[row], delta[row])
            torch.testing.assert_close(found.beta[row], alone.beta, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.log_policy[row], alone.log_policy, rtol=1e-9, atol=1e-9)
        law = tilt(log_p[row], r[row], found.beta[row])
        torch.testing.assert_close(found.log_policy[row], law, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.reward[row], (law.exp() * r[row]).sum(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.kl[row], kl(law, log_p[row]).clamp(min=0.0), rtol=1e-11, atol=1e-13)
    empty = solve_tilt_for_kl(log_p[:0], r[:0], 0.1)
    assert empty.log_policy.shape == (0, 9)
