"""The theory of kernel density estimates against closed forms, limits, simulation and scipy."""

import math

import numpy as np
import pytest
import torch

from kullback.core.errors import DataError, ShapeError
from kullback.diagnose.kde_regimes import knn_order_statistics, participation_ratio
from kullback.diagnose.kde_theory import (
    GAUSSIAN,
    LAPLACE,
    GaussianSpectrumTheory,
    expected_largest_share,
    expected_participation,
    h_clt,
    h_glass,
    h_kl,
    regime,
    student,
    tail_index,
)
from kullback.diagnose.quadratic_forms import SquaredDistance

ALPHAS = torch.tensor([0.1, 0.2, 0.4, 0.6, 1.0, 2.0], dtype=torch.float64)
H_GLASS = [1.3708, 1.0457, 0.7454, 0.5769, 0.3721, 0.1354]
H_CLT = [1.9386, 1.4788, 1.0541, 0.8159, 0.5262, 0.1914]
H_KL = [1.0386, 0.8917, 0.6962, 0.5587, 0.3693, 0.1353]


def isotropic(d):
    return GaussianSpectrumTheory(torch.ones(d))


def close(one, other, tolerance):
    one, other = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_table_of_isotropic_data():
    theory = isotropic(50)
    for method, values in ((theory.h_glass, H_GLASS), (theory.h_clt, H_CLT), (theory.h_kl, H_KL)):
        close(method(50 * ALPHAS, log_n=True), torch.tensor(values), 6e-5)
    n = math.exp(0.4 * 20)
    close([f(n, 20) for f in (h_glass, h_clt, h_kl)], [0.7454, 1.0541, 0.6962], 6e-5)


def test_any_spectrum_orders_its_bandwidths(generator):
    for _ in range(20):
        d = int(torch.randint(5, 200, (), generator=generator))
        theory = GaussianSpectrumTheory(10 * torch.rand(d, generator=generator, dtype=torch.float64).square() + 1e-3)
        n = float(10 ** (1 + 8 * torch.rand((), generator=generator).double()))
        close(theory.h_clt(n), math.sqrt(2) * theory.h_glass(n), 1e-12)
        assert theory.h_kl(n) < theory.h_glass(n)
        assert theory.h_kl(n, finite=True) < theory.h_glass(n, finite=True)
        close(theory.rate(theory.h_glass(n).square().reciprocal()), math.log(n) / d, 1e-10)
        close(theory.tail_index(theory.h_clt(n), n), 2.0, 1e-10)


def test_energy_and_rate_are_derivatives(generator):
    theory = GaussianSpectrumTheory(torch.rand(30, generator=generator) + 0.1, torch.rand(30, generator=generator))
    b = torch.linspace(0.05, 8.0, 40, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(theory.phi(b).sum(), b, create_graph=True)
    close(theory.energy(b), -slope, 1e-12)
    (second,) = torch.autograd.grad(slope.sum(), b)
    (of_rate,) = torch.autograd.grad(theory.rate(b).sum(), b)
    close(of_rate, b * second, 1e-10)
    assert bool((of_rate >= 0).all())


def test_phi_is_the_gaussian_integral(generator):
    values, query = torch.rand(3, generator=generator).double() + 0.2, torch.rand(3, generator=generator).double()
    theory = GaussianSpectrumTheory(values, query.square())
    y = values.sqrt() * torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    weights = torch.exp(-0.7 * (query - y).square().sum(1) / 2)
    error = weights.std() / math.sqrt(len(weights))
    assert (weights.mean() - (3 * theory.phi(0.7)).exp()).abs() < 6 * error


def test_limits_of_few_and_many_points():
    spectrum = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    theory = GaussianSpectrumTheory(spectrum)
    few = 1e-6
    expected = (3 * spectrum.square().mean() / (4 * few)) ** 0.25
    close(GaussianSpectrumTheory(spectrum.repeat(250_000)).h_glass(1e6 * few, log_n=True), expected, 2e-3)
    close(isotropic(10).h_glass(10 * 2.0, log_n=True), math.exp(-2), 1e-3)
    close(theory.rate(1e-5), 0.75 * 1e-10 * spectrum.square().mean(), 1e-13)


def test_regimes_and_their_densities():
    n, d = 2981, 20
    assert [regime(h, n, d) for h in (0.6, 0.9, 1.2)] == ["condensed", "heavy-tailed", "gaussian"]
    close(tail_index(0.9, n, d), (0.9 / h_glass(n, d)) ** 2, 1e-12)
    theory = isotropic(d)
    h = theory.h_glass(n)
    close(theory.log_density(h * (1 - 1e-9), n), theory.log_density(h * (1 + 1e-9), n), 1e-7)
    grid = torch.linspace(0.3, 2.5, 4401, dtype=torch.float64)
    best = grid[theory.log_density(grid, n).argmax()]
    close(best, theory.h_kl(n), 1e-3)
    fluctuation = theory.log_fluctuation(grid, n)
    assert bool((fluctuation.diff() <= 1e-12).all())
    close(theory.log_fluctuation(h * 0.9, n), 0.0, 0.0)
    # jumps of the two branches at their common border are of lower order in d
    close(theory.log_fluctuation(h * math.sqrt(2) * (1 - 1e-9), n), theory.log_fluctuation(h * 1.4142136, n), 1e-5)


def test_collapse_is_the_glass_bandwidth_of_noisy_queries(generator):
    spectrum = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
    h = GaussianSpectrumTheory(spectrum).h_collapse(1e8)
    close(GaussianSpectrumTheory(spectrum, spectrum + h.square()).h_glass(1e8), h, 1e-9)
    close(isotropic(10).h_collapse(10 * 0.3, log_n=True), (math.exp(0.6) - 1) ** -0.5, 1e-10)
    assert isotropic(10).h_collapse(1e4) > isotropic(10).h_glass(1e4)


def test_laws_of_distance_match_scipy_and_go_where_it_cannot():
    stats = pytest.importorskip("scipy.stats")
    for d, delta in ((1, 1.0), (3, 7.0), (20, 20.0), (100, 60.0)):
        law = SquaredDistance(torch.ones(d), torch.full((d,), delta / d, dtype=torch.float64))
        levels = torch.tensor([0.05, 0.2, 0.5, 0.9, 1.3, 2.0, 3.0], dtype=torch.float64) * (d + delta)
        cdf = stats.ncx2.cdf(levels.numpy(), d, delta)
        good = cdf > 1e-250
        np.testing.assert_allclose(law.log_cdf(levels).exp().numpy()[good], cdf[good], rtol=2e-10)
        ratio = stats.ncx2.pdf(levels.numpy(), d, delta) / cdf
        np.testing.assert_allclose(law.log_slope(levels).numpy()[good][:5], ratio[good][:5], rtol=2e-10)
    # Poisson mixture of incomplete gamma functions, in logarithms, at a level of about e^-1000
    d, level = 2000, 600.0
    j = np.arange(6000)
    term = stats.poisson.logpmf(j, d / 2) + _log_gammainc(d / 2 + j, level / 2)
    expected = np.logaddexp.reduce(term)
    assert expected < -1000
    close(SquaredDistance(torch.ones(d)).log_cdf(torch.tensor(level)), expected, 1e-11)


def _log_gammainc(a, x):
    """log P(a, x) by its series, for x < a: no underflow."""
    from scipy.special import gammaln

    ratio = x / (a[:, None] + 1 + np.arange(400))
    series = 1 + np.cumprod(ratio, axis=1).sum(1)
    return a * np.log(x) - x - gammaln(a + 1) + np.log(series)


def test_law_of_a_weighted_sum(generator):
    values, query = torch.tensor([3.0, 1.0, 0.2, 0.0]), torch.tensor([0.3, 2.0, 1.0, 0.5])
    law = SquaredDistance(values, query)
    y = values.sqrt() * torch.randn(400_000, 4, generator=generator)
    r = (y - query.sqrt()).square().sum(1).double()
    for level in (0.7, 2.0, 6.0, 20.0):
        p = law.log_cdf(torch.tensor(level)).exp().item()
        assert (r <= level).double().mean().item() == pytest.approx(p, abs=6 * math.sqrt(p * (1 - p) / len(r)) + 1e-9)
    assert law.log_cdf(torch.tensor([0.4, -1.0, math.inf])).tolist() == [-math.inf, -math.inf, 0.0]
    levels = torch.tensor([-12.0, -6.0, -3.0, -0.5, -1e-4], dtype=torch.float64)
    close(law.log_cdf(law.quantile(levels)), levels, 2e-6)
    assert law.quantile(torch.tensor([0.0, -math.inf])).tolist() == [math.inf, 0.0]


def test_finite_numbers_of_the_card():
    theory = isotropic(30)
    n = 8103
    close(theory.h_glass(n, finite=True), 0.9576, 6e-5)
    close(theory.h_glass(math.exp(9)), 0.8677, 6e-5)
    large = isotropic(400)
    close(large.h_kl(100.0, finite=True, log_n=True), 0.8432, 1e-4)
    close(large.h_kl(100.0, log_n=True), 0.8344, 6e-5)


@pytest.mark.parametrize(("share", "expected", "error"), [(0.6, 0.64, 0.02), (0.8, 0.36, 0.02)])
def test_condensation_at_four_hundred_dimensions(share, expected, error, generator):
    theory = isotropic(400)
    h = share * theory.h_glass(100.0, log_n=True)
    squared = knn_order_statistics(100.0, theory.distances, size=3000, k=300, generator=generator)
    shares = participation_ratio(-0.5 * squared / h.square())
    own = 1 - float(theory.tail_index(h, 100.0, finite=True, log_n=True))
    assert shares.mean().item() == pytest.approx(own, abs=6 * shares.std().item() / math.sqrt(len(shares)) + 0.005)
    assert own == pytest.approx(expected, abs=error)
    nearest = (squared[:, 0] / 400).sqrt().mean().item()
    assert nearest == pytest.approx(0.8432, abs=3e-3)
    assert abs(nearest - 0.8344) > 5e-3  # the asymptotic value is not the one seen


def test_condensation_at_thirty_dimensions(generator):
    theory, n = isotropic(30), 8103
    squared = knn_order_statistics(math.log(n), theory.distances, size=2000, k=1000, generator=generator)
    asymptotic = theory.h_glass(math.exp(9))
    shares = participation_ratio(-0.5 * squared / (0.6 * asymptotic) ** 2)
    assert 1 - (0.6 * asymptotic / 0.9576) ** 2 == pytest.approx(0.704, abs=1e-3)
    error = shares.std().item() / math.sqrt(len(shares))
    assert shares.mean().item() == pytest.approx(0.704, abs=6 * error)
    assert shares.mean().item() > 0.64 + 6 * error  # the asymptotic value is rejected


@pytest.mark.parametrize("mu", [0.3, 0.6])
def test_poisson_dirichlet_moments(mu, generator):
    log_gamma = torch.empty(20_000, 400, dtype=torch.float64).exponential_(generator=generator).cumsum(1).log()
    shares = (-log_gamma / mu).softmax(1)
    for q in (2.0, 3.0, 2.5):
        found = shares.pow(q).sum(1)
        assert found.mean().item() == pytest.approx(
            expected_participation(mu, q), abs=6 * found.std().item() / math.sqrt(len(found)) + 4e-3
        )
    assert expected_participation(mu) == pytest.approx(1 - mu)
    largest = shares[:, 0]
    error = 6 * largest.std().item() / math.sqrt(len(largest)) + 6e-3  # 400 shares of infinitely many
    assert largest.mean().item() == pytest.approx(expected_largest_share(mu), abs=error)


@pytest.mark.parametrize("kernel", [GAUSSIAN, LAPLACE, student(1.0)], ids=["gaussian", "laplace", "student"])
def test_other_kernels_condense_where_theory_says(kernel, generator):
    theory, log_n = isotropic(400), 100.0
    glass, clt, best = theory.kernel_bandwidths(log_n, kernel, finite=True, log_n=True)
    close(theory.tail_index(glass, log_n, finite=True, log_n=True, kernel=kernel), 1.0, 1e-9)
    close(theory.tail_index(clt, log_n, finite=True, log_n=True, kernel=kernel), 2.0, 1e-9)
    assert best < glass < clt
    grid = glass * torch.linspace(0.3, 1.0, 701, dtype=torch.float64)
    index = theory.tail_index(grid, log_n, finite=True, log_n=True, kernel=kernel)
    h, mu = grid[(index - 0.5).abs().argmin()], 0.5
    squared = knn_order_statistics(log_n, theory.distances, size=2000, k=200, generator=generator)
    shares = participation_ratio(-400 * kernel.energy(squared / (400 * h.square())))
    assert shares.mean().item() == pytest.approx(1 - mu, abs=6 * shares.std().item() / math.sqrt(2000) + 0.01)
    h_grid = best * torch.linspace(0.8, 1.2, 401, dtype=torch.float64)
    level = 2 * theory.energy(theory.critical(log_n, log_n=True))
    loss = kernel.energy(level / h_grid.square()) + h_grid.log()
    asymptotic = theory.kernel_bandwidths(log_n, kernel, log_n=True)[2]
    close(h_grid[loss.argmin()], asymptotic, 2e-3)


def test_bad_input():
    with pytest.raises(ShapeError, match="one entry a dimension"):
        GaussianSpectrumTheory(torch.ones(3), torch.ones(4))
    with pytest.raises(DataError, match="no positive eigenvalue"):
        GaussianSpectrumTheory(torch.zeros(3))
    with pytest.raises(DataError, match="negative"):
        GaussianSpectrumTheory(torch.tensor([1.0, -0.5]))
    with pytest.raises(DataError, match="finite"):
        GaussianSpectrumTheory(torch.tensor([1.0, math.nan]))
    with pytest.warns(UserWarning, match="1 eigenvalues are zero"):
        assert GaussianSpectrumTheory(torch.tensor([1.0, 2.0, 0.0])).dimension == 2
    theory = isotropic(5)
    for call, message in [
        (lambda: theory.tail_index(0.0, 100), "positive"),
        (lambda: theory.regime(-1.0, 100), "positive"),
        (lambda: theory.h_glass(1.0), "2 or more"),
        (lambda: theory.h_glass(math.inf), "log_n"),
        (lambda: theory.h_glass(1e6, log_n=True), "out of reach"),
        (lambda: h_glass(100, 5, eigenvalues=torch.ones(4)), "fit"),
        (lambda: expected_participation(1.2), "0 < mu < 1"),
        (lambda: expected_largest_share(0.0), "0 < mu < 1"),
        (lambda: student(0.0), "freedom"),
        (lambda: theory.phi(-1.0), "not negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(DataError, match="finite"):
        SquaredDistance(torch.tensor([1.0, math.inf]))
    with pytest.raises(ShapeError, match="one entry"):
        SquaredDistance(torch.ones(2, 2))
