"""Independent letters: numbers worked out by hand, enumeration of all sequences, and the limit of best of n."""

import math

import pytest
import torch

from kullback.align.memoryless import MemorylessAlignment, renyi_cross_entropy, reward_rate_function
from kullback.align.tradeoff import best_of_n_kl_upper
from kullback.align.worlds import World, best_of_n_law
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl, renyi

P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
LETTERS = MemorylessAlignment(P, Q)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(value, wanted, tolerance=6e-11):
    assert float(value) == pytest.approx(wanted, abs=tolerance)


def test_tilts_and_mean_rates():
    close(LETTERS.beta(0.1), 1.1866943554)
    close(LETTERS.mean_rate(0.1), -1.1404177880)
    close(LETTERS.beta(0.2), 1.6698663003)
    close(LETTERS.mean_rate(0.2), -1.0703561516)
    wanted = torch.tensor([0.24824437, 0.29314300, 0.45861263], dtype=torch.float64)
    torch.testing.assert_close(LETTERS.letters(0.2), wanted, atol=6e-9, rtol=0)
    close(LETTERS.largest_delta, -math.log(0.2), 1e-12)
    assert LETTERS.beta(2.0) == math.inf


def check_cumulants(cumulant):
    for rho, wanted in ((0.5, -1.0354742676), (1.0, -1.0026711555), (2.0, -0.9453509705)):
        close(cumulant(rho, 0.2), wanted)
        direct = (LETTERS.letters(0.2) * Q**rho).sum().log() / rho
        close(cumulant(rho, 0.2), direct.item(), 1e-12)


def test_cumulants_are_renyi_cross_entropies_and_those_of_sequences():
    check_cumulants(LETTERS.cumulant_rate)
    close(LETTERS.cumulant_rate(0.0, 0.2), LETTERS.mean_rate(0.2), 1e-12)
    close(LETTERS.cumulant_rate(1e-9, 0.2), LETTERS.mean_rate(0.2), 1e-9)
    sequences = World(3, 6).sequences()
    law, reward = LETTERS.letters(0.2).log()[sequences].sum(1), Q.log()[sequences].sum(1)
    for rho in (-0.7, 0.5, 2.0):
        close(LETTERS.cumulant_rate(rho, 0.2), ((law + rho * reward).logsumexp(0) / (6 * rho)).item(), 1e-12)
    with pytest.raises(AssertionError):
        check_cumulants(lambda rho, delta: LETTERS.cumulant_rate(rho - 1.0, delta))  # the order taken for rho


def test_cross_entropy_is_entropy_plus_divergence_and_a_renyi_entropy():
    log_p, log_q = P.log(), Q.log()
    close(renyi_cross_entropy(log_p, log_q, order=1.0), (kl(log_p, log_q) - (P * log_p).sum()).item(), 1e-12)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    for order in (0.4, 0.999, 1.001, 2.0, 5.0):
        entropy = renyi_cross_entropy(log_p, log_p, order=order)
        # H_a(p||p) = log K - R_a(p||uniform)
        close(entropy, math.log(3) - renyi(log_p, uniform, alpha=order).item(), 1e-10)
    masked = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert renyi_cross_entropy(masked, torch.tensor([0.5, 0.5, 0.0]).double().log(), order=3.0).isfinite()


def test_rates_of_large_deviations():
    found = LETTERS.rate_function(-1.0, 0.2)
    close(found.tau, 2.1813544307)
    close(found.rate, 0.0177458071)
    close(LETTERS.rate_function(-1.0).rate, 0.3352311736)
    close(LETTERS.rate_function(LETTERS.mean_rate(0.2), 0.2).rate, 0.0, 1e-12)
    # J is the KL between two tilts
    beta = LETTERS.beta(0.2)
    logs = torch.stack([P.log() + b * Q.log() for b in (found.tau.item(), beta)]).log_softmax(-1)
    close(found.rate, kl(logs[0], logs[1]).item(), 1e-12)
    t = torch.linspace(math.log(0.2) + 1e-3, math.log(0.5) - 1e-3, 201, dtype=torch.float64)
    rate = reward_rate_function(P.log(), Q.log(), t, beta=beta).rate
    assert bool((rate.diff().diff() > 0).all())
    # Legendre: sup over slopes of s t - log E exp(s r)
    slopes = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    law = LETTERS.letters(0.2).log()
    dual = (slopes * -0.9 - (law + slopes.unsqueeze(1) * Q.log()).logsumexp(1)).max()
    close(LETTERS.rate_function(-0.9, 0.2).rate, dual.item(), 1e-5)


def test_probabilities_of_the_tail_decay_at_the_rate():
    """-log P(r/m >= t) / m comes down to J(t) with a gap of (log m) / 2m and less."""
    rate = LETTERS.rate_function(-1.0).rate.item()
    gaps = []
    for m in (50, 200, 800):
        log_mass, reward = LETTERS.levels(m)
        gaps.append(-log_mass[reward >= -1.0 * m - 1e-9].logsumexp(0).item() / m - rate)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < math.log(800) / 800


def check_gaps(letters):
    for m, reward, spent, gap in (
        (20, -1.116903, 0.150801, 0.028529), (80, -1.086368, 0.187489, 0.014226), (320, -1.075577, 0.196874, 0.005593),
    ):  # fmt: skip
        found = letters.bon_gap(m, 0.2)
        close(found.reward, reward, 6e-7)
        close(found.kl, spent, 6e-7)
        close(found.kl_gap, gap, 6e-7)
        assert found.kl <= found.kl_upper


def test_gaps_of_best_of_n():
    check_gaps(LETTERS)
    with pytest.raises(AssertionError):
        check_gaps(MemorylessAlignment(P, Q.sqrt()))  # half the reward


def test_types_equal_sequences_one_by_one():
    sequences = World(3, 6).sequences()
    log_p, reward = P.log()[sequences].sum(1), Q.log()[sequences].sum(1)
    direct = best_of_n_law(log_p, reward, 5.0, tie_tolerance=1e-10)
    log_mass, levels = LETTERS.levels(6)
    by_types = best_of_n_law(log_mass, levels, 5.0, tie_tolerance=1e-10)
    close((by_types.exp() @ levels).item(), (direct.exp() @ reward).item(), 1e-12)
    close(kl(by_types, log_mass).item(), kl(direct, log_p).item(), 1e-12)
    found = LETTERS.bon_gap(6, math.log(5.0) / 6)
    close(6 * found.reward, (direct.exp() @ reward).item(), 1e-12)
    optimum = torch.log_softmax(log_p + LETTERS.beta(math.log(5.0) / 6) * reward, 0)
    close(6 * found.kl_gap, kl(direct, optimum).item(), 1e-11)


def test_lattice_levels_are_those_of_types():
    lattice = MemorylessAlignment(torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([1.0, 2.0, 4.0, 16.0]))
    places = lattice._lattice()
    assert places.tolist() == [0, 1, 2, 4]
    log_mass, reward = lattice._lattice_levels(60, places)
    types, rewards = lattice._type_levels(60)
    for level in (0, 7, 100, 200, 240):
        wanted = types[(rewards - level * math.log(2.0)).abs() < 1e-6].logsumexp(0)
        close(log_mass[(reward - level * math.log(2.0)).abs() < 1e-6], wanted.item(), 1e-9)
    assert len(reward) == 240  # 239 is out of reach
    close(log_mass.logsumexp(0).item(), 0.0, 1e-10)


def test_many_letters_on_a_lattice_take_the_levels_and_others_are_refused():
    source = seeded(1)
    p = torch.rand(9, generator=source, dtype=torch.float64)
    lattice = MemorylessAlignment(p / p.sum(), (0.3 * torch.arange(9).double()).exp())
    found = [lattice.bon_gap(m, 0.3 * lattice.largest_delta) for m in (40, 80, 160)]
    assert found[0].kl_gap > found[1].kl_gap > found[2].kl_gap > 0
    assert found[0].reward_gap > found[1].reward_gap > found[2].reward_gap > 0
    rough = MemorylessAlignment(p / p.sum(), torch.rand(9, generator=source, dtype=torch.float64))
    with pytest.raises(ConfigError, match="types"):
        rough.bon_gap(160, 0.1)


def test_letters_without_mass_are_left_out():
    wider = MemorylessAlignment(torch.tensor([0.5, 0.0, 0.3, 0.2]), torch.tensor([0.2, 0.0, 0.3, 0.5]))
    close(wider.beta(0.2), LETTERS.beta(0.2), 1e-6)
    close(wider.bon_gap(20, 0.2).kl_gap, LETTERS.bon_gap(20, 0.2).kl_gap, 1e-6)


def test_best_of_n_by_sampling():
    m, n, groups = 10, 8, 20_000
    drawn = torch.multinomial(P, groups * n * m, replacement=True, generator=seeded(4)).view(groups, n, m)
    best = Q.log()[drawn].sum(-1).amax(1)
    found = LETTERS.bon_gap(m, math.log(n) / m)
    close(m * found.reward, best.mean().item(), 6 * best.std().item() / groups**0.5)
    close(m * found.kl_upper, best_of_n_kl_upper(n).item(), 1e-12)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MemorylessAlignment(P, Q[:2]), ShapeError, "same K"),
        (lambda: MemorylessAlignment(0.9 * P, Q), DataError, "sums to"),
        (lambda: MemorylessAlignment(P, torch.tensor([0.0, 0.5, 0.5])), DataError, "positive and finite"),
        (lambda: LETTERS.rate_function(-0.1, 0.2), ConfigError, "strictly between"),
        (lambda: LETTERS.rate_function(-1.0, 5.0), ConfigError, "constant"),
        (lambda: LETTERS.bon_gap(20, 5.0), ConfigError, "largest KL"),
        (lambda: LETTERS.bon_gap(2000, 1.0), ConfigError, "beyond float64"),
        (lambda: LETTERS.bon_gap(0, 0.1), ConfigError, "number of letters"),
        (lambda: renyi_cross_entropy(P.log(), Q.log(), order=math.inf), ConfigError, "finite"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
