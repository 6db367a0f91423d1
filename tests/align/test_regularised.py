"""The exact optimum under any f-divergence, and calibration: the card's numbers, optimality conditions, bounds."""

import math

import pytest
import torch

from kullback.align.calibration import ece_gap_bound, preference_ece
from kullback.align.f_dpo import paper_divergence
from kullback.align.regularised import _form, _solve, f_regularised_policy
from kullback.align.worlds import entropy, expected_reward, regularised_optimum
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import f_divergence

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REWARD = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
CARD = [
    ("reverse_kl", 0.5, (0.9186723, 0.0745973, 0.0067304), 0.9119, 0.3052),
    ("forward_kl", 0.5, (0.8408479, 0.1156231, 0.0435290), 0.7973, 0.5316),
    ("jensen_shannon", 0.5, (0.9681578, 0.0293971, 0.0024451), 0.9657, 0.1497),
    ("alpha", 0.3, (0.8925555, 0.0888825, 0.0185620), 0.8740, 0.3906),
    ("alpha", 0.5, (0.8762959, 0.0973608, 0.0263433), 0.8500, 0.4383),
    ("alpha", 0.7, (0.8612401, 0.1051293, 0.0336306), 0.8276, 0.4796),
]
OTHERS = [f_divergence("jeffreys"), f_divergence("skew_kl", alpha=0.1), f_divergence("alpha_divergence", alpha=1.5)]
FAMILY = [paper_divergence(name, alpha=alpha) for name, alpha, *_ in CARD] + OTHERS


@pytest.mark.parametrize(("name", "alpha", "policy", "mean", "spread"), CARD)
def test_optima_of_the_card(name, alpha, policy, mean, spread):
    found = f_regularised_policy(REFERENCE, REWARD, divergence=paper_divergence(name, alpha=alpha), beta=0.5).log_policy
    torch.testing.assert_close(found.exp(), torch.tensor(policy, dtype=torch.float64), atol=5e-8, rtol=0)
    assert expected_reward(found, REWARD).item() == pytest.approx(mean, abs=5e-5)
    assert entropy(found).item() == pytest.approx(spread, abs=6e-5)


@pytest.mark.parametrize("divergence", FAMILY, ids=lambda d: d.name)
@pytest.mark.parametrize("beta", [0.05, 0.5, 20.0])
def test_conditions_of_the_optimum(divergence, beta, generator):
    log_p = (2 * torch.randn(1000, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    reward = torch.randn(1000, 50, generator=generator, dtype=torch.float64)
    policy, multiplier = f_regularised_policy(log_p, reward, divergence=divergence, beta=beta)
    assert (policy.exp().sum(-1) - 1).abs().max() < 1e-12
    rest = reward - beta * divergence.link(policy - log_p) - multiplier.unsqueeze(-1)
    dropped = policy == -math.inf
    assert not (dropped.any() and divergence.keeps_support)
    assert (rest[dropped] <= 0).all()
    rest = rest.masked_fill(dropped, 0.0)
    assert rest.abs().max() < 1e-9 * max(1.0, beta)
    if divergence.name == "reverse_kl":
        torch.testing.assert_close(policy, regularised_optimum(log_p, reward, coefficient=beta), rtol=1e-9, atol=1e-9)


def test_no_other_policy_has_a_larger_value(generator):
    log_p = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    for divergence in FAMILY:
        best = f_regularised_policy(log_p, reward, divergence=divergence, beta=0.3).log_policy

        def value(policy, divergence=divergence):
            return expected_reward(policy, reward) - 0.3 * divergence(log_p.expand_as(policy), policy)

        around = best + 0.01 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
        assert (value(around.log_softmax(-1)) < value(best)).all()
        swapped = f_regularised_policy(log_p, reward, divergence=divergence.dual(), beta=0.3).log_policy
        assert value(swapped) < value(best) - 1e-6 or divergence.dual().name == divergence.name


def closed_family():
    """Divergences whose optimum is a root of a sum of powers, with the form that is to be recognised."""
    yield f_divergence("reverse_kl").scaled(3.0), (3.0, math.inf, 0.0)
    yield f_divergence("kl"), (1.0, 1.0, 0.0)
    yield f_divergence("squared_hellinger"), (0.25, 2.0, 0.0)
    yield f_divergence("alpha_divergence", alpha=0.3), (1.0, 1 / 0.3, 0.0)
    yield f_divergence("alpha_divergence", alpha=1.5).scaled(0.2), (0.2, 1 / 1.5, 0.0)
    yield f_divergence("jsd").normalised(), (2.0, 1.0, 0.5)
    yield f_divergence("generalized_jsd", beta=0.9), (0.1, 1.0, 0.1)
    yield f_divergence("generalized_jsd", beta=1e-3, normalised=True), (1 / 1e-3, 1.0, 0.999)


@pytest.mark.parametrize(("divergence", "form"), list(closed_family()), ids=lambda d: getattr(d, "name", ""))
def test_sums_of_powers_agree_with_the_secant_method(divergence, form, generator):
    assert _form(divergence) == pytest.approx(form, rel=1e-11)
    scale = torch.tensor([0.1, 1.0, 2.0, 4.0], dtype=torch.float64).repeat(25).view(-1, 1)
    log_p = (scale * torch.randn(100, 30, generator=generator, dtype=torch.float64)).log_softmax(-1)
    reward = torch.randn(100, 30, generator=generator, dtype=torch.float64)
    for beta in (0.02, 0.5, 20.0):
        policy, multiplier = f_regularised_policy(log_p, reward, divergence=divergence, beta=beta)
        twin, twin_multiplier = _solve(divergence, log_p, reward / beta, 1e-12)
        torch.testing.assert_close(multiplier, beta * twin_multiplier, rtol=1e-10, atol=1e-10)
        # Entries of tiny mass lie near the end of the domain, where neither keeps all digits of the logarithm.
        torch.testing.assert_close(policy.exp(), twin.exp(), rtol=1e-7, atol=1e-12)
        assert (policy.exp().sum(-1) - 1).abs().max() < 1e-12
        reversed_policy = f_regularised_policy(log_p, -reward, divergence=divergence, beta=beta).log_policy
        assert (reversed_policy.exp() - twin.exp()).abs().max() > 1e-4


@pytest.mark.parametrize(("divergence", "form"), list(closed_family())[1:], ids=lambda d: getattr(d, "name", ""))
@pytest.mark.parametrize("solve", ["powers", "secant"])
def test_sharp_references_against_eighty_digits(divergence, form, solve, generator):
    """References of e^-60, where m in float64 does not tell the mass of the outcome that bounds it."""
    mpmath = pytest.importorskip("mpmath")
    log_p = (20 * torch.randn(6, 12, generator=generator, dtype=torch.float64)).log_softmax(-1)
    reward = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    if solve == "powers":
        policy = f_regularised_policy(log_p, reward, divergence=divergence, beta=0.5).log_policy
    else:
        policy, _ = _solve(divergence, log_p, reward / 0.5, 1e-12)
    with mpmath.workdps(80):
        scale, order, share = (mpmath.mpf(number) for number in _form(divergence))
        for row, rewards, found in zip(log_p.tolist(), reward.tolist(), policy, strict=True):
            mass, y = [mpmath.exp(value) for value in row], [2 * mpmath.mpf(value) for value in rewards]

            def part(i, m, mass=mass, y=y):
                if not share:
                    return mass[i] * (1 - (y[i] - m) / (scale * order)) ** -order
                e = mpmath.exp((y[i] - m) / scale)
                return mass[i] * (1 - share) * e / (1 - share * e)

            def link(p):
                return scale * (-mpmath.log(share + (1 - share) * p) if share else order * (1 - p ** (1 / order)))

            low, high = max(y[i] - link(mass[i]) for i in range(12)), max(y)
            for _ in range(270):
                middle = (low + high) / 2
                low, high = (middle, high) if sum(part(i, middle) for i in range(12)) > 1 else (low, middle)
            exact = torch.tensor([float(mpmath.log(part(i, low))) for i in range(12)], dtype=torch.float64)
            torch.testing.assert_close(found.exp(), exact.exp(), rtol=0, atol=2e-9 if solve == "secant" else 1e-12)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 if solve == "secant" else 1e-10)


def test_other_links_are_not_taken_for_powers():
    others = [*OTHERS[:2], f_divergence("skew_reverse_kl", alpha=0.3), f_divergence("neyman")]
    assert all(_form(divergence) is None for divergence in others)
    assert _form(f_divergence("alpha_divergence", alpha=0.01)) is None  # would lose digits


def test_references_beyond_what_powers_hold(generator):
    """Log-probabilities of -2000, which exp makes 0, and a reward that alone lifts such an outcome to mass."""
    log_p = torch.tensor([[0.0, -2000.0, -1.0], [0.0, -2000.0, -400.0]], dtype=torch.float64).log_softmax(-1)
    reward = torch.tensor([[0.0, 3000.0, -1.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    for divergence, _ in closed_family():
        policy, multiplier = f_regularised_policy(log_p, reward, divergence=divergence, beta=1.0)
        assert (policy.exp().sum(-1) - 1).abs().max() < 1e-12
        rest = reward - divergence.link(policy - log_p) - multiplier.unsqueeze(-1)
        assert rest[policy > -30].abs().max() < 1e-8


def test_outcomes_without_mass_and_chi_squared():
    reference = torch.cat([REFERENCE, torch.tensor([-math.inf], dtype=torch.float64)])
    reward = torch.cat([REWARD, torch.tensor([math.nan], dtype=torch.float64)])
    for divergence in FAMILY:
        found = f_regularised_policy(reference, reward, divergence=divergence, beta=0.5).log_policy
        plain = f_regularised_policy(REFERENCE, REWARD, divergence=divergence, beta=0.5).log_policy
        torch.testing.assert_close(found[:3], plain)
        assert found[3] == -math.inf
    chi = f_regularised_policy(REFERENCE, REWARD, divergence=f_divergence("neyman"), beta=0.2)
    ratio = (1 + (REWARD - chi.multiplier) / 0.4).clamp(min=0.0)  # u = 1 + y / 2 where that is positive
    torch.testing.assert_close(chi.log_policy.exp(), REFERENCE.exp() * ratio)
    assert chi.log_policy[2] == -math.inf


def test_no_problems_have_no_optima():
    for divergence in FAMILY:
        found = f_regularised_policy(torch.zeros(0, 3), torch.zeros(0, 3), divergence=divergence, beta=1.0)
        assert found.log_policy.shape == (0, 3)
        assert found.multiplier.shape == (0,)


def test_what_is_refused():
    kl = paper_divergence("forward_kl")
    with pytest.raises(ConfigError, match="beta"):
        f_regularised_policy(REFERENCE, REWARD, divergence=kl, beta=-1.0)
    with pytest.raises(ConfigError, match="inverse"):
        f_regularised_policy(REFERENCE, REWARD, divergence=f_divergence("total_variation"), beta=1.0)
    with pytest.raises(ShapeError, match="entry for each outcome"):
        f_regularised_policy(REFERENCE, REWARD[:2], divergence=kl, beta=1.0)
    for reference, reward in (
        (REFERENCE, torch.tensor([0.0, math.nan, 1.0])), (REFERENCE, torch.tensor([0.0, math.inf, 1.0])),
        (torch.tensor([0.0, math.nan, 0.0]), REWARD), (torch.full((3,), -math.inf), REWARD),
    ):  # fmt: skip
        with pytest.raises(DataError, match="1 rows"):
            f_regularised_policy(reference, reward, divergence=kl, beta=1.0)


def test_calibrated_scores_have_a_small_error(generator):
    margin = 2 * torch.randn(100_000, generator=generator)
    probability = torch.sigmoid(margin)
    label = torch.rand(100_000, generator=generator) < probability
    assert preference_ece(probability, label) < 0.01
    assert preference_ece(torch.sigmoid(3 * margin), label) > 0.05
    assert preference_ece(probability, ~label) > 0.2
    assert preference_ece(torch.ones(4), torch.tensor([1, 1, 1, 0])).item() == pytest.approx(0.25)


@pytest.mark.parametrize("divergence", [d for d in FAMILY if "1.5" not in d.name], ids=lambda d: d.name)
def test_bound_of_the_calibration_gap(divergence, generator):
    scale = 4 * torch.rand(3, 5000, 1, generator=generator, dtype=torch.float64)
    truth, one, other = (scale * torch.randn(3, 5000, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    error = [(truth.exp() - policy.exp()).abs().sum(-1) for policy in (one, other)]
    bound = ece_gap_bound(divergence(other, one), divergence)
    assert (error[0] - error[1] <= bound + 1e-9).all()
    variation = (one.exp() - other.exp()).abs().sum(-1)
    assert 0.9 < (variation / bound).max() <= 1.0 + 1e-9  # near the truth of the inequality, so a smaller one fails
    near = (one + 1e-3 * other).log_softmax(-1)
    ratio = (near.exp() - one.exp()).abs().sum(-1) / ece_gap_bound(divergence(one, near), divergence)
    assert ratio.max() <= 1.0 + 1e-6


def test_refusals_of_calibration():
    with pytest.raises(ConfigError, match="no bound"):
        ece_gap_bound(0.1, f_divergence("alpha_divergence", alpha=2.5))
    with pytest.raises(ConfigError, match="no bound"):
        ece_gap_bound(0.1, f_divergence("total_variation"))
    with pytest.raises(DataError, match="never negative"):
        ece_gap_bound(-0.1, f_divergence("kl"))
    with pytest.raises(DataError, match="probabilities"):
        preference_ece(torch.tensor([1.1]), torch.tensor([1]))
    with pytest.raises(DataError, match="labels"):
        preference_ece(torch.tensor([0.5]), torch.tensor([2]))
    with pytest.raises(ShapeError, match="n > 0"):
        preference_ece(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ConfigError, match="bins"):
        preference_ece(torch.tensor([0.5]), torch.tensor([1]), bins=0)
