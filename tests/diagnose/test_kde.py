"""Kernel density estimates and their regimes against scikit-learn, naive sums, exact moments and simulation."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.diagnose import (
    GaussianSpectrumTheory,
    HighDimKDE,
    KDERegimes,
    collapse_step,
    condensation,
    knn_order_statistics,
    participation_ratio,
)
from kullback.diagnose.kde import hill_tail_index, log_sum_quantiles, power_tail_index
from kullback.diagnose.kernel_sums import Points, nearest_distances


def normal(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("d", [1, 2, 7, 20])
def test_density_equals_scikit_learn(d, generator):
    neighbors = pytest.importorskip("sklearn.neighbors")
    points, queries = normal(generator, 1500, d) + 3, normal(generator, 300, d) + 3
    ours = HighDimKDE(0.6).fit(points)
    # in one leaf: the bounds of its tree cancel, and in 20 dimensions cost it up to two nats where density is low
    theirs = neighbors.KernelDensity(bandwidth=0.6, rtol=0, atol=0, leaf_size=1500).fit(points.numpy())
    expected = torch.from_numpy(theirs.score_samples(queries))
    torch.testing.assert_close(ours.score_samples(queries), expected, atol=1e-10, rtol=0)
    assert ours.score(queries) == pytest.approx(theirs.score(queries), rel=1e-10)


def test_rules_of_thumb_equal_scikit_learn_at_unit_variance(generator):
    neighbors = pytest.importorskip("sklearn.neighbors")
    points = normal(generator, 400, 5)
    points = (points - points.mean(0)) / points.std(0)
    for rule in ("scott", "silverman"):
        theirs = neighbors.KernelDensity(bandwidth=rule).fit(points.numpy())
        assert HighDimKDE(rule).fit(points).bandwidth_ == pytest.approx(theirs.bandwidth_, rel=1e-12)
        assert HighDimKDE(rule).fit(3 * points).bandwidth_ == pytest.approx(3 * theirs.bandwidth_, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 1023, 1024, 1025, 3000])
def test_passes_equal_naive_sums(count, generator):
    points, queries = normal(generator, count, 6), normal(generator, 131, 6)
    logits = -torch.cdist(queries, points).square() / (2 * 0.49)
    for single, tolerance in ((False, 1e-11), (True, 2e-5)):
        laid = Points.of(points, single=single)
        k = min(count, 7)
        found = laid.sums(laid.centred(queries), 0.7, squares=True, nearest=k)
        torch.testing.assert_close(found.log_sum, logits.logsumexp(1), rtol=0, atol=tolerance)
        torch.testing.assert_close(found.log_sum_squares, (2 * logits).logsumexp(1), rtol=0, atol=2 * tolerance)
        torch.testing.assert_close(found.squared, nearest_distances(queries, points, k), rtol=0, atol=tolerance)


def test_nearest_points_in_every_order_of_the_points(generator):
    points, queries = normal(generator, 9000, 3), normal(generator, 5, 3)
    expected = nearest_distances(queries, points, 100)
    outward = points.norm(dim=1).argsort()
    for order in (outward, outward.flip(0), torch.arange(9000)):
        laid = Points.of(points[order], single=False)
        found = laid.sums(laid.centred(queries), 1.0, nearest=100)
        torch.testing.assert_close(found.squared, expected, rtol=0, atol=1e-12)
        assert bool((points[order][found.points[:, 0]] == points[(torch.cdist(queries, points)).argmin(1)]).all())


def test_a_sample_unlike_the_rest_is_noticed(generator):
    near, far = 0.1 * normal(generator, 1000, 3), normal(generator, 7000, 3) + 50
    points = torch.empty(8000, 3, dtype=torch.float64)
    points[::8], points[torch.arange(8000) % 8 != 0] = near, far  # the sampled eighth has all near points
    laid = Points.of(points, single=False)
    found = laid.sums(laid.centred(near[:4]), 1.0, nearest=120)
    torch.testing.assert_close(found.squared, nearest_distances(near[:4], points, 120), rtol=0, atol=1e-10)


def test_a_point_leaves_itself_out(generator):
    points = normal(generator, 700, 4)
    laid = Points.of(points, single=False)
    chosen = torch.tensor([0, 5, 699])
    found = laid.sums(laid.rows[chosen], 0.5, squares=True, nearest=3, exclude=chosen)
    logits = -torch.cdist(points[chosen], points).square() / 0.5
    logits[torch.arange(3), chosen] = -math.inf
    torch.testing.assert_close(found.log_sum, logits.logsumexp(1), rtol=0, atol=1e-10)
    assert bool((found.squared[:, 0] > 0).all())
    naive = laid.sums(laid.rows[chosen], 0.5, nearest=3)
    assert bool((naive.squared[:, 0] == 0).all())


def test_near_duplicates_keep_their_distance(generator):
    points = normal(generator, 500, 10) + 1000
    points[1] = points[0] + 1e-7
    laid = Points.of(points, single=False)
    found = laid.sums(laid.centred(points[:1]), 1.0, nearest=2)
    assert found.squared[0, 1].item() == pytest.approx(10 * 1e-14, rel=1e-3)


def test_the_estimate_is_right_in_the_mean(generator):
    spectrum = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    x, h = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64), 0.7
    values = torch.stack([
        HighDimKDE(h).fit(spectrum.sqrt() * normal(generator, 100, 3)).score_samples(x).exp() for _ in range(400)
    ])
    smooth = spectrum + h * h
    exact = (-0.5 * (x.square() / smooth).sum() - 0.5 * (2 * math.pi * smooth).log().sum()).exp()
    assert values.mean().item() == pytest.approx(exact.item(), abs=6 * values.std().item() / 20)


def test_scaling_shifts_the_log_density(generator):
    points, queries = normal(generator, 200, 30), normal(generator, 10, 30)
    one = HighDimKDE(0.9).fit(points).score_samples(queries)
    other = HighDimKDE(0.9 * 7).fit(7 * points).score_samples(7 * queries)
    torch.testing.assert_close(other, one - 30 * math.log(7), rtol=0, atol=1e-9)


def test_no_underflow_in_a_thousand_dimensions(generator):
    points = normal(generator, 50, 1000, dtype=torch.float32)
    log_density = HighDimKDE(0.3).fit(points).score_samples(points[:3] + 5)
    assert bool(torch.isfinite(log_density).all())
    assert log_density.max() < -1e5


def test_bandwidth_rules(generator):
    points = normal(generator, 2981, 20)
    kl, best = (HighDimKDE(rule).fit(points).bandwidth_ for rule in ("kl", "likelihood"))
    assert kl == pytest.approx(0.75, abs=0.02)
    assert best == pytest.approx(0.825, abs=0.015)
    held_out = normal(generator, 2000, 20)
    score = {h: HighDimKDE(h).fit(points).score(held_out) for h in (0.9 * best, best, 1.1 * best)}
    assert max(score, key=score.get) == best
    assert HighDimKDE("silverman").fit(points).bandwidth_ == pytest.approx(0.667, abs=0.002)


def test_draws_follow_the_estimate(generator):
    points = torch.tensor([[-5.0, 0.0], [5.0, 1.0]])
    drawn = HighDimKDE(0.5).fit(points).sample(40_000, generator=generator)
    right = drawn[:, 0] > 0
    assert right.double().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 200)
    assert drawn[right].std(0).sub(0.5).abs().max() < 6 * 0.5 / math.sqrt(2 * 19_000)
    assert drawn[right].mean(0).sub(torch.tensor([5.0, 1.0])).abs().max() < 6 * 0.5 / math.sqrt(19_000)


@pytest.mark.parametrize("multiple", [0.6, 1.1, 1.3, 1.8, 2.5])
def test_intervals_cover_in_every_regime_and_normal_ones_do_not(multiple, generator):
    d, n, repeats = 20, 2000, 120
    h = multiple * float(GaussianSpectrumTheory(torch.ones(d)).h_glass(n, finite=True))
    query = torch.ones(1, d, dtype=torch.float64)
    log_density, ends, normals = [], [], []
    for _ in range(repeats):
        model = HighDimKDE(h).fit(normal(generator, n, d))
        low, high, _ = model.interval(query, 0.9)
        found = model.points_.sums(model.points_.centred(query), h, squares=True)
        log_density.append(model.score_samples(query))
        ends.append(torch.cat([low, high]))
        normals.append(1.645 * (0.5 * (found.log_sum_squares - 2 * found.log_sum)).exp())
    log_density, ends, normals = torch.cat(log_density), torch.stack(ends), torch.cat(normals)
    typical = log_density.median()
    covered = ((ends[:, 0] <= typical) & (typical <= ends[:, 1])).double().mean().item()
    assert 0.9 - 6 * math.sqrt(0.09 / repeats) < covered
    by_normal = ((log_density - typical).abs() <= normals).double().mean().item()
    assert (by_normal < 0.82) == (multiple < 1.2)


def test_the_law_of_the_sum_becomes_stable(generator):
    stats = pytest.importorskip("scipy.stats")
    mu, k, n = 1.5, 400, 10**7
    # l = -r^2 / (2 h^2) far from zero: the power law becomes an exponential one
    gaps = torch.log(k / torch.arange(1, k + 1, dtype=torch.float64)) / mu
    top = (gaps - 3000.0).unsqueeze(0)
    weights = (k / torch.arange(1, n + 1, dtype=torch.float64)).pow(1 / mu)
    log_sum, log_squares = weights.sum().log() - 3000, weights.square().sum().log() - 6000
    found = log_sum_quantiles(top, log_sum.reshape(1), log_squares.reshape(1), n, (0.05, 0.25, 0.75, 0.95))[0]
    scale = k ** (1 / mu) * (math.gamma(1 - mu) * math.cos(math.pi * mu / 2)) ** (1 / mu)
    law = stats.levy_stable(mu, 1)
    quantiles = torch.tensor([law.ppf(p) for p in (0.5, 0.05, 0.25, 0.75, 0.95)])
    expected = torch.log((weights.sum() + scale * quantiles[1:]) / (weights.sum() + scale * quantiles[0]))
    torch.testing.assert_close(found, expected, rtol=0.12, atol=0.0)


def test_slopes_of_poisson_processes(generator):
    steps = torch.empty(20_000, 30, dtype=torch.float64).exponential_(generator=generator).cumsum(1)
    hill = hill_tail_index(-steps.log() / 0.7)
    assert (1 / hill).mean().item() == pytest.approx(1 / 0.7, abs=6 * (1 / hill).std().item() / math.sqrt(20_000))
    squared = (steps / 1000).pow(1 / 9.0)  # P(r^2 <= s) = s^9, one point expected at 1000^(-1/9)
    mu, m = power_tail_index(-squared / (2 * 0.25))
    assert m.mean().item() == pytest.approx(9.0, abs=6 * m.std().item() / math.sqrt(20_000))
    assert mu.median().item() == pytest.approx(0.25 * 2 * 9 * 1000 ** (1 / 9), rel=0.05)


@pytest.mark.parametrize(("d", "n"), [(20, 2981), (30, 8103)])
def test_diagnosis_of_gaussian_data(d, n, generator):
    points = normal(generator, n, d)
    exact = float(GaussianSpectrumTheory(torch.ones(d)).h_glass(n, finite=True))
    fitted = KDERegimes().fit(points)
    for multiple, name in ((0.6, "condensed"), (1.2, "heavy-tailed"), (2.2, "gaussian")):
        found = fitted.diagnose(multiple * exact)
        assert found.regime == name
        assert found.h_glass == pytest.approx(exact, rel=0.07)
        assert found.gaussian_h_glass == pytest.approx(exact, rel=0.02)
        assert found.h_clt == pytest.approx(math.sqrt(2) * found.h_glass)
        assert found.mu_ci[0] < found.mu < found.mu_ci[1]
        assert found.n_eff == pytest.approx(1 / found.participation)
        assert f"{found.h_glass:.4g}" in found.message or name == "gaussian"
    coarse = KDERegimes(k=int(math.sqrt(n)), slope="exponential").fit(points).diagnose(exact)
    assert coarse.h_glass > 1.15 * exact  # the bias that the power law removes


def test_a_training_point_is_its_own_neighbour(generator):
    points = normal(generator, 400, 30)
    honest, trivial = (KDERegimes(leave_one_out=out).fit(points).diagnose(0.4) for out in (True, False))
    assert trivial.participation > 0.999 > honest.participation


def test_a_few_typical_queries_stand_for_the_spread_of_all(generator):
    points = normal(generator, 1500, 20)
    made = KDERegimes(n_queries=1500).fit(points)
    for h in (0.6, 0.9, 1.2):
        everything = torch.arange(1500)
        found = made.points_.sums(made.points_.rows, h, squares=True, nearest=made.k_, exclude=everything)
        top = -0.5 * found.squared / h**2
        ends = log_sum_quantiles(top[:200], found.log_sum[:200], found.log_sum_squares[:200], 1500, (0.1587, 0.8413))
        exact = 0.5 * (ends[:, 1] - ends[:, 0])
        assert made.diagnose(h).stderr_log == pytest.approx(exact.median().item(), rel=0.15)
        assert exact.std() > 0.15 * exact.median(), "it is not the same for every query"


def test_diagnosis_scales_with_the_data(generator):
    points = normal(generator, 500, 10)
    one, other = KDERegimes().fit(points).diagnose(0.5), KDERegimes().fit(4 * points).diagnose(2.0)
    for name in ("mu", "participation", "stderr_log"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9)
    assert other.h_glass == pytest.approx(4 * one.h_glass, rel=1e-9)


def test_order_statistics_are_those_of_drawn_points(generator):
    theory = GaussianSpectrumTheory(torch.tensor([2.0, 1.0, 0.5, 0.1]))
    query = theory.eigenvalues.sqrt()
    simulated = knn_order_statistics(math.log(50), theory.distances, size=4000, k=3, generator=generator)
    clouds = theory.eigenvalues.sqrt() * normal(generator, 4000, 50, 4)
    drawn = (clouds - query).square().sum(2).sort(1).values[:, :3]
    for j in range(3):  # Poisson(50) points beside 50
        one, other = simulated[:, j].log(), drawn[:, j].log()
        error = math.sqrt((one.var() + other.var()).item() / 4000)
        assert one.mean().item() == pytest.approx(other.mean().item(), abs=6 * error + 0.02)
    by_function = knn_order_statistics(3.0, lambda log_p: log_p.exp(), size=2, k=2, generator=generator)
    assert bool((by_function.diff(dim=1) > 0).all())


def test_condensation_of_logits(generator):
    energies = normal(generator, 200, 5000)
    cold, hot = (condensation(beta * energies) for beta in (8.0, 1.0))
    assert cold.mu.median() < 1 < hot.mu.median()
    assert cold.participation.mean() > 0.2 > 10 * hot.participation.mean()
    at_threshold = condensation(8.0 * energies / cold.temperature.unsqueeze(1)).mu
    torch.testing.assert_close(at_threshold, torch.ones_like(at_threshold))
    mask = torch.zeros(200, 5000, dtype=torch.bool)
    mask[:, :300] = True
    masked, cut = condensation(energies, k=10, mask=mask), condensation(energies[:, :300], k=10)
    torch.testing.assert_close(masked, cut)
    probabilities = (8.0 * energies).softmax(1).log()
    torch.testing.assert_close(condensation(probabilities).mu, cold.mu)
    assert participation_ratio(torch.zeros(4)).item() == pytest.approx(0.25)
    assert participation_ratio(torch.tensor([0.0, -1e9]), q=3).item() == pytest.approx(1.0)


def test_collapse_of_a_diffusion():
    ratio = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1])
    assert collapse_step(ratio, 0.7) == 3
    assert collapse_step(ratio, 0.01) is None


def test_bad_input(generator):
    points = normal(generator, 40, 3)
    fitted = HighDimKDE(0.5).fit(points)
    for call, error, message in [
        (lambda: HighDimKDE(0.0).fit(points), ConfigError, "positive"),
        (lambda: HighDimKDE(-1.0).fit(points), ConfigError, "positive"),
        (lambda: HighDimKDE("scot").fit(points), ConfigError, "scott"),
        (lambda: HighDimKDE(precision="half").fit(points), ConfigError, "precision"),
        (lambda: HighDimKDE(queries=0).fit(points), ConfigError, "queries"),
        (lambda: HighDimKDE(0.5).fit(points[:1]), ConfigError, "two points"),
        (lambda: HighDimKDE().fit(torch.ones(9, 3)), ConfigError, "the same"),
        (lambda: HighDimKDE().fit(torch.arange(3.0).repeat_interleave(2).unsqueeze(1)), ConfigError, "copy"),
        (lambda: HighDimKDE().score(points), NotFitted, "fit"),
        (lambda: fitted.score(points * math.nan), DataError, "finite"),
        (lambda: fitted.interval(points, 1.0), ConfigError, "level"),
        (lambda: HighDimKDE(0.5).fit(points[:6]).interval(points), ConfigError, "8 points"),
        (lambda: KDERegimes().fit(points[:3]), ConfigError, "four points"),
        (lambda: KDERegimes(k=2).fit(points), ConfigError, "k is from 3"),
        (lambda: KDERegimes(k=40).fit(points), ConfigError, "k is from 3"),
        (lambda: KDERegimes(slope="log").fit(points), ConfigError, "slope"),
        (lambda: KDERegimes(n_queries=0).fit(points), ConfigError, "n_queries"),
        (lambda: KDERegimes().fit(torch.ones(9, 3)), DataError, "the same"),
        (lambda: KDERegimes().fit(points).diagnose(0.0), ConfigError, "positive"),
        (lambda: KDERegimes().diagnose(1.0), NotFitted, "fit"),
        (lambda: condensation(torch.zeros(3), k=4), ConfigError, "k is from 2"),
        (lambda: condensation(torch.full((9,), math.nan)), DataError, "NaN"),
        (lambda: condensation(torch.zeros(9), mask=torch.ones(8)), ShapeError, "mask"),
        (lambda: condensation(torch.zeros(9), mask=torch.zeros(9)), ShapeError, "fewer"),
        (lambda: participation_ratio(torch.zeros(())), ShapeError, "shape"),
        (lambda: participation_ratio(torch.zeros(2), q=0.0), ConfigError, "power"),
        (lambda: knn_order_statistics(3.0, lambda p: p, size=0, k=1, generator=generator), ConfigError, "size"),
        (lambda: fitted.points_.sums(points, 1.0, nearest=41), ConfigError, "fewer"),
    ]:
        with pytest.raises(error, match=message):
            call()
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 4)
    with pytest.raises(DataError, match="one distance"):
        KDERegimes(k=3, slope="exponential").fit(grid).diagnose(0.5)
