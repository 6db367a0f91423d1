"""Cubature to a tolerance by every method, the changes of variable, and the measures and copulas."""

import math
import warnings

import pytest
import torch
from scipy import stats

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample import qmc
from kullback.sample.qmc import (
    Control,
    Halton,
    Independent,
    Lattice,
    Sobol,
    expectation,
    integrate,
    periodized,
)
from kullback.sample.qmc.cone import _doubled, _sorted_levels
from kullback.sample.qmc.cubature import Tolerance
from kullback.sample.qmc.periodic import PERIODIC
from kullback.sample.qmc.sampling import _berry_esseen, _points_needed

KEISTER = 2.168309102165481


def keister(points):
    """pi^(d/2) E cos |z| with z normal of variance 1/2."""
    normal = qmc.normal_quantile(points) / math.sqrt(2)
    return math.pi ** (points.shape[-1] / 2) * torch.cos(normal.norm(dim=-1))


def net(generator, dimensions=3, **options):
    return Sobol(dimensions, generator=generator, **options)


def lattice(generator, dimensions=3):
    return Lattice(dimensions, generator=generator)


def independent(generator, dimensions=3):
    return Independent(dimensions, generator=generator)


METHODS = {
    "net": ("net", net, 1e-3, {}),
    "net, nus": ("net", lambda g: net(g, randomize="nus"), 1e-3, {}),
    "lattice": ("lattice", lattice, 1e-3, {}),
    "lattice, c2 sin": ("lattice", lattice, 1e-3, {"periodize": "c2 sin"}),
    "bayes, lattice": ("bayes", lattice, 1e-3, {}),
    "bayes, lattice, full": ("bayes", lattice, 1e-3, {"criterion": "full"}),
    "bayes, lattice, gcv": ("bayes", lattice, 1e-3, {"criterion": "gcv"}),
    "bayes, net": ("bayes", net, 1e-3, {"alpha": 1}),
    "replications, net": ("replications", lambda g: net(g, replications=16), 1e-3, {}),
    "replications, halton": ("replications", lambda g: Halton(3, replications=16, generator=g), 1e-3, {}),
    "clt": ("clt", independent, 2e-2, {}),
    "guaranteed": ("guaranteed", independent, 2e-2, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_keister_within_the_tolerance(name, generator):
    method, points, tolerance, options = METHODS[name]
    result = integrate(keister, points(generator), method, abs_tol=tolerance, **options)
    assert result.converged
    assert result.flags == ()
    assert abs(result.value.item() - KEISTER) < tolerance
    assert result.lo < result.value < result.hi
    assert result.hi - result.lo <= 2 * tolerance * (1 + 1e-9)
    assert 1024 <= result.n <= 1 << 20
    assert result.history[-1]["n"] == result.n
    assert result.seconds > 0.0


def test_keister_takes_the_points_that_the_theory_asks_for(generator):
    needed = {
        name: integrate(keister, METHODS[name][1](generator), METHODS[name][0], abs_tol=1e-3).n
        for name in ("net", "lattice", "bayes, lattice")
    }
    assert needed["net"] in (8192, 16384, 32768)
    assert needed["lattice"] in (8192, 16384, 32768)
    assert needed["bayes, lattice"] <= 4096
    assert integrate(keister, independent(generator), "clt", abs_tol=1e-2).n > 300_000


@pytest.mark.parametrize("method", ["net", "lattice", "bayes", "replications"])
def test_outputs_of_any_shape_and_relative_tolerances(method, generator):
    def powers(x):
        return torch.stack([x[:, :2] ** k for k in (1, 2, 3)], -1) * torch.tensor([-1.0, 10.0, 100.0])

    points = {
        "net": net(generator), "lattice": lattice(generator), "bayes": lattice(generator),
        "replications": net(generator, replications=8),
    }[method]  # fmt: skip
    exact = torch.tensor([-1 / 2, 10 / 3, 25.0], dtype=torch.float64).expand(2, 3)
    result = integrate(powers, points, method, abs_tol=0.0, rel_tol=1e-4)
    assert result.value.shape == (2, 3)
    assert ((result.value - exact).abs() <= 1e-4 * exact.abs()).all()  # a negative one among them
    strict = integrate(powers, points, method, abs_tol=1e-3, rel_tol=1e-4, tolerance="both", n_max=1 << 20)
    assert ((strict.hi - strict.lo) / 2 <= 1.01e-3).all()


def test_tolerance_of_a_ratio():
    either, both = Tolerance(0.1, 0.01), Tolerance(0.1, 0.01, both=True)
    value = torch.tensor([1.0, 100.0])
    assert either.at(value).tolist() == pytest.approx([0.1, 1.0])
    assert both.at(value).tolist() == pytest.approx([0.01, 0.1])
    lo, hi = torch.tensor(99.0), torch.tensor(101.0)
    assert either.met(lo, hi)
    assert not both.met(lo, hi)
    assert either.centre(lo, hi).item() == pytest.approx(100 - 0.01)


def polynomials(x):
    first, second = x[:, 0], x[:, 1]
    return torch.stack([first + 2 * first**2 + 3 * first**3, 2 * second + 3 * second**2 + 4 * second**3], -1)


CONTROL = Control(
    lambda x: torch.cat([x[:, :2], x[:, :2] ** 2], -1), torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3], dtype=torch.float64)
)
POLYNOMIALS = torch.tensor([23 / 12, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(("method", "make", "tolerance"), [("net", net, 1e-6), ("lattice", lattice, 1e-6),
                                                           ("clt", independent, 1e-2)])  # fmt: skip
def test_control_variates_save_points(method, make, tolerance, generator):
    plain = integrate(polynomials, make(generator), method, abs_tol=tolerance)
    helped = integrate(polynomials, make(generator), method, abs_tol=tolerance, control=CONTROL)
    for result in (plain, helped):
        assert ((result.value - POLYNOMIALS).abs() < tolerance).all()
    assert helped.n <= plain.n / 2
    if method != "clt":
        again = integrate(polynomials, make(generator), method, abs_tol=tolerance, control=CONTROL, update_control=True)
        assert ((again.value - POLYNOMIALS).abs() < tolerance).all()
    biased = Control(CONTROL.function, CONTROL.means + 0.1)
    wrong = integrate(polynomials, make(generator), method, abs_tol=tolerance, control=biased)
    assert (wrong.value - POLYNOMIALS).abs().max() > 0.05


def test_orderings_put_larger_coefficients_first(generator):
    sizes = torch.rand(1, 64, dtype=torch.float64, generator=generator)
    order = _sorted_levels(torch.arange(64).expand(1, -1), sizes, 1)
    assert torch.equal(order.sort().values, torch.arange(64).expand(1, -1))
    assert torch.equal(order[0, :2], torch.arange(2))
    # the first of each level stays, as in the published algorithm; all others give way to larger partners
    placed = sizes[0, order[0]]
    assert (placed[1:32] >= placed[33:]).all()
    assert placed[1:32].sum() > sizes[0, 1:32].sum()
    sorted_already = _sorted_levels(torch.arange(64).expand(1, -1), sizes.sort(descending=True).values, 1)
    assert torch.equal(sorted_already[0], torch.arange(64))


def test_coefficients_double(generator):
    values = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    for is_lattice in (True, False):
        transform = qmc.fftbr if is_lattice else qmc.fwht
        half = transform(values[:, :32]) / 32**0.5
        both = _doubled(half, values[:, 32:], is_lattice)
        assert (both - transform(values) / 8.0).abs().max() < 1e-14


def test_functions_outside_the_cone_are_flagged(generator):
    def hidden(x):  # two equal Walsh functions, of indices 96 and 2^12 + 96, which are one until 2^13 points
        digits = (x[:, 0] * 2**13).long()
        parity = (digits >> 6 ^ digits >> 7) & 1
        return x[:, 0] ** 3 + (1.0 - 2.0 * parity) * (1 - digits & 1)

    flagged = integrate(hidden, net(generator, 1, randomize="ds"), "net", abs_tol=1e-6, check_cone=True, n_max=1 << 20)
    fine = integrate(lambda x: x.exp().prod(-1), net(generator, 2), "net", abs_tol=1e-6, check_cone=True)
    assert any("cone" in flag for flag in flagged.flags)
    assert fine.flags == ()


@pytest.mark.parametrize("name", PERIODIC)
def test_changes_of_variable_keep_the_integral(name):
    change, derivative = PERIODIC[name]
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(change(x).sum(), x)
    if name != "baker":  # which folds: every point is met twice at slope 2
        assert (slope - derivative(x)).abs().max() < 1e-12
    grid = (torch.arange(4000, dtype=torch.float64).unsqueeze(-1) + 0.5) / 4000
    value = periodized(lambda y: y.exp().squeeze(-1), name)(grid).mean()
    assert value.item() == pytest.approx(math.e - 1.0, abs=1e-6)
    if name not in ("none", "c0"):
        ends = periodized(lambda y: y.exp().squeeze(-1), name)(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
        assert (ends[0] - ends[1]).abs() < 1e-9
    several = periodized(lambda y: torch.stack([y.sum(-1), y.prod(-1)], -1), name)(grid.expand(-1, 2))
    assert several.shape == (4000, 2)


def test_periodizing_is_what_makes_lattices_fast(generator):
    def smooth(x):
        return x.exp().prod(-1)

    exact = (math.e - 1) ** 2

    def rmse(name):
        points = Lattice(2, replications=32, generator=generator).points(512)
        means = periodized(smooth, name)(points.flatten(0, 1)).view(32, -1).mean(1)
        return (means - exact).square().mean().sqrt().item()

    assert rmse("baker") < rmse("none") / 20
    assert rmse("c1 sin") < rmse("none") / 20


# --- sampling with guarantees, levels ---


def test_points_needed_by_chebyshev_and_berry_esseen():
    for ratio, chance, kurtosis in ((0.1, 0.005, 2.0), (0.01, 0.01, 5.0), (0.5, 0.2, 3.0)):
        count = _points_needed(ratio, chance, kurtosis)
        assert count <= math.ceil(1.0 / (chance * ratio**2))
        central = (stats.norm.ppf(1 - chance / 2) / ratio) ** 2
        assert count >= central  # no bound can ask for less than the limit theorem
        if count < math.ceil(1.0 / (chance * ratio**2)):
            assert _berry_esseen(math.sqrt(count), ratio, kurtosis) <= chance / 2
    assert _points_needed(0.01, 0.01, 5.0) < 2 * (stats.norm.ppf(0.995) / 0.01) ** 2


def test_clt_intervals_cover():
    covered = 0
    for seed in range(60):
        points = Independent(1, generator=torch.Generator().manual_seed(seed))
        result = integrate(lambda x: x[:, 0] ** 4, points, "clt", abs_tol=0.02, level=0.9, inflate=1.0, n_min=512)
        covered += abs(result.value.item() - 0.2) < 0.02
    assert 44 <= covered <= 60  # 54 expected, six standard errors are 14


def euler(points, level):
    """Discounted call on a geometric Brownian motion by 2^level Euler steps, minus that by half as many."""

    def payoff(normal, step):
        price = torch.ones(len(normal), dtype=normal.dtype)
        for column in normal.unbind(1):
            price = price * (1 + 0.05 * step + 0.2 * math.sqrt(step) * column)
        return math.exp(-0.05) * (price - 1).clamp(min=0)

    normal = qmc.normal_quantile(points)
    fine = payoff(normal, 2.0**-level)
    if level == 0:
        return fine
    return fine - payoff((normal[:, ::2] + normal[:, 1::2]) / math.sqrt(2), 2.0 ** (1 - level))


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_multilevel_prices_an_option(low_discrepancy, generator):
    def points(level):
        if low_discrepancy:
            return Sobol(2**level, replications=16, generator=generator)
        return Independent(2**level, generator=generator)

    upper = (0.05 + 0.02) / 0.2
    exact = stats.norm.cdf(upper) - math.exp(-0.05) * stats.norm.cdf(upper - 0.2)
    result = integrate(euler, points, "mlmc", abs_tol=2e-3)
    assert result.converged
    assert abs(result.value.item() - exact) < 2e-3
    assert (result.hi - result.lo) / 2 < 2e-3
    assert result.history[-1]["levels"] >= 3
    assert result.n < 200_000


# --- measures ---


def test_measures_have_their_moments():
    points = Sobol(3, generator=torch.Generator().manual_seed(1)).points(1 << 15)
    covariance = torch.tensor([[1.0, 0.5, 0.2], [0.5, 2.0, -0.3], [0.2, -0.3, 0.5]], dtype=torch.float64)
    mean = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    for factor in ("pca", "cholesky"):
        x = qmc.Gaussian(mean, covariance, factor)(points)
        assert (x.mean(0) - mean).abs().max() < 1e-3
        assert (x.mT.cov() - covariance).abs().max() < 5e-3
    path = qmc.BrownianMotion([0.5, 1.0, 2.0], drift=0.3, start=1.0, diffusion=2.0)(points)
    assert (path.mean(0) - torch.tensor([1.15, 1.3, 1.6])).abs().max() < 1e-3
    assert (path.mT.cov() - 2 * torch.tensor([[0.5, 0.5, 0.5], [0.5, 1, 1], [0.5, 1, 2]])).abs().max() < 1e-2
    box = qmc.Uniform(torch.tensor([0.0, 1, 2]), torch.tensor([1.0, 3, 5]))(points)
    assert (box.mean(0) - torch.tensor([0.5, 2.0, 3.5])).abs().max() < 1e-3


def test_univariate_measures_are_scipys():
    u = torch.linspace(0.001, 0.999, 41, dtype=torch.float64).unsqueeze(-1)
    cases = (
        (qmc.StudentT(3.5, 1.0, 2.0), stats.t(3.5, 1.0, 2.0)),
        (qmc.JohnsonSU(0.5, 1.5, 2.0, 3.0), stats.johnsonsu(0.5, 1.5, 2.0, 3.0)),
        (qmc.Gaussian(1.0, 4.0), stats.norm(1.0, 2.0)),
        (qmc.Marginals([stats.gamma(2.5)]), stats.gamma(2.5)),
    )
    for ours, theirs in cases:
        assert (ours(u) - torch.from_numpy(theirs.ppf(u.numpy()))).abs().max() < 1e-9
        assert torch.equal(ours.weight(u), torch.ones(41, dtype=torch.float64))
    x = qmc.Kumaraswamy(2.0, 3.5)(u)
    assert (1 - (1 - x**2) ** 3.5 - u).abs().max() < 1e-12
    assert torch.isfinite(qmc.Gaussian()(torch.tensor([[0.0, 1.0]]))).all()


def test_lebesgue_measure_weighs_volume_and_density(generator):
    through = qmc.Gaussian(torch.zeros(2), torch.tensor([[2.0, 0.4], [0.4, 1.0]]))
    integrand = expectation(lambda x: torch.exp(-x.square().sum(-1)), qmc.Lebesgue(through))
    result = integrate(integrand, net(generator, 2), "net", abs_tol=1e-3)
    assert result.value.item() == pytest.approx(math.pi, abs=1e-3)
    box = qmc.Lebesgue(qmc.Uniform(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 3.0])))
    product = expectation(lambda x: torch.stack([x.prod(-1), x[:, 0]], -1), box)
    value = integrate(product, net(generator, 2), "net", abs_tol=1e-3).value
    assert value.tolist() == pytest.approx([9.0, 6.0], abs=1e-3)
    x = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    theirs = stats.multivariate_normal([0, 0], [[2.0, 0.4], [0.4, 1.0]]).logpdf(x.numpy())
    assert (through.log_density(x) - torch.from_numpy(theirs)).abs().max() < 1e-7


CORRELATION = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
COPULAS = {
    # Kendall's tau, in closed form
    "gaussian": (qmc.GaussianCopula(CORRELATION), 2, 2 / math.pi * math.asin(0.6)),
    "student": (qmc.StudentCopula(CORRELATION, 4.0), 3, 2 / math.pi * math.asin(0.6)),
    "clayton": (qmc.ClaytonCopula(2.0), 2, 0.5),
    "frank": (qmc.FrankCopula(5.0), 2, 1 - 4 / 5 * (1 - 0.7771)),  # with the Debye function D_1(5) = 0.3231...
}


@pytest.mark.parametrize("name", COPULAS)
def test_copulas_have_uniform_margins_and_their_rank_correlation(name, generator):
    copula, dimensions, tau = COPULAS[name]
    if name == "frank":
        grid = torch.linspace(1e-9, 5.0, 20_001, dtype=torch.float64)
        debye = torch.trapezoid(grid / torch.expm1(grid), grid).item() / 5.0
        tau = 1 - 4 / 5 * (1 - debye)
    uniform = copula(Sobol(dimensions, generator=generator).points(1 << 12))
    assert uniform.shape == (1 << 12, 2)
    for column in uniform.unbind(-1):
        assert stats.kstest(column.numpy(), "uniform").statistic < 0.02
    assert stats.kendalltau(*uniform.unbind(-1)).statistic == pytest.approx(tau, abs=0.02)
    with_margins = type(copula)(*[getattr(copula, n) for n in copula.__slots__[:-1]], [stats.expon()])
    samples = with_margins(Sobol(dimensions, generator=generator).points(1 << 12))
    assert samples.mean(0).tolist() == pytest.approx([1.0, 1.0], abs=0.02)


def test_clayton_in_three_dimensions_is_exchangeable(generator):
    uniform = qmc.ClaytonCopula(2.0)(Sobol(3, generator=generator).points(1 << 12))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        tau = stats.kendalltau(uniform[:, first], uniform[:, second]).statistic
        assert tau == pytest.approx(0.5, abs=0.02)


# --- errors ---


BAD = {
    "a method": (lambda g: integrate(keister, net(g), "simpson"), "method is one of"),
    "points for net": (lambda g: integrate(keister, lattice(g), "net"), "kind net"),
    "points for clt": (lambda g: integrate(keister, net(g), "clt"), "Independent"),
    "one randomization": (lambda g: integrate(keister, net(g), "replications"), "two or more"),
    "replications for net": (lambda g: integrate(keister, net(g, replications=2), "net"), "without replications"),
    "gray order": (lambda g: integrate(keister, net(g, order="gray"), "net"), "natural"),
    "plain points": (lambda g: integrate(keister, Sobol(3, randomize=None), "net"), "origin"),
    "a set for mlmc": (lambda g: integrate(keister, net(g), "mlmc"), "function of the level"),
    "a function for net": (lambda g: integrate(keister, lambda level: net(g), "net"), "is a set"),
    "no tolerance": (lambda g: integrate(keister, net(g), "net", abs_tol=0.0), "one of them positive"),
    "a negative tolerance": (lambda g: integrate(keister, net(g), "net", abs_tol=-1.0), "not negative"),
    "both and one": (lambda g: integrate(keister, net(g), "net", tolerance="both"), "both"),
    "a tolerance": (lambda g: integrate(keister, net(g), "net", tolerance="any"), "either"),
    "counts": (lambda g: integrate(keister, net(g), "net", n_min=64, n_max=32), "n_min"),
    "a count": (lambda g: integrate(keister, net(g), "net", n_min=1000), "power of 2"),
    "too few": (lambda g: integrate(keister, net(g), "net", n_min=16), "at least 64"),
    "a change for nets": (lambda g: integrate(keister, net(g), "net", periodize="baker"), "for lattices"),
    "an unknown change": (lambda g: integrate(keister, lattice(g), "lattice", periodize="c9"), "periodize is one of"),
    "a criterion": (lambda g: integrate(keister, lattice(g), "bayes", criterion="aic"), "criterion"),
    "nested bayes": (lambda g: integrate(keister, net(g, randomize="nus"), "bayes"), "nested"),
    "a level": (lambda g: integrate(keister, independent(g), "clt", level=1.0), "level"),
    "relative and guaranteed": (
        lambda g: integrate(keister, independent(g), "guaranteed", rel_tol=0.1),
        "absolute",
    ),
    "no room": (lambda g: integrate(keister, independent(g), "guaranteed", inflate=1.0), "inflate"),
    "a covariance": (
        lambda g: qmc.Gaussian(0.0, -torch.eye(2), "cholesky")(torch.rand(3, 2, generator=g)),
        "positive definite",
    ),
    "times": (lambda g: qmc.BrownianMotion([1.0, 0.5])(torch.rand(3, 2, generator=g)), "increasing"),
    "theta": (lambda g: qmc.ClaytonCopula(0.0)(torch.rand(3, 2, generator=g)), "positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, generator):
    call, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        call(generator)


def test_bad_integrands(generator):
    with pytest.raises(ShapeError, match="n = 1024"):
        integrate(lambda x: x.sum(), net(generator), "net")
    with pytest.raises(DataError, match="not finite"):
        integrate(lambda x: torch.full((len(x),), math.nan), net(generator), "net")
    with pytest.raises(ShapeError, match="covariance"):
        qmc.Gaussian(0.0, torch.eye(3))(torch.rand(4, 2, generator=generator))
    with pytest.raises(ShapeError, match="2 distributions for 3"):
        qmc.Marginals([stats.norm(), stats.norm()])(torch.rand(4, 3, generator=generator))


def test_reaching_the_limit_warns_and_says_so(generator):
    with pytest.warns(UserWarning, match="do not meet the tolerance"):
        result = integrate(keister, net(generator), "net", abs_tol=1e-9, n_max=2048)
    assert not result.converged
    assert result.n == 2048
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert integrate(keister, net(generator), "net", abs_tol=1.0).converged
