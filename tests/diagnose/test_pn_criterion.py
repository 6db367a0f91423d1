"""The risk of a maximum-likelihood fit against exact risks, enumeration, simulation and its own tensor form."""

import math
import warnings

import pytest
import torch
from torch.special import digamma

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.diagnose.exponential_families import (
    Family,
    bernoulli,
    categorical,
    exponential,
    gamma,
    gaussian,
    ising,
    natural_parameter,
    poisson,
    polynomial,
)
from kullback.diagnose.pn_criterion import PNCriterion, kl_budget, max_dimension, pn_criterion, required_n, tic
from kullback.diagnose.risk_expansion import (
    RiskExpansion,
    estimation_risk,
    estimation_risk_psi,
    first_order_risk,
    risk_from_cumulants,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def psi_of_n(x):
    return digamma(torch.tensor(x, dtype=torch.float64)).item()


def normal_risk(d, n):
    """The exact risk of a full normal fit, well specified."""
    digammas = sum(psi_of_n((n - i) / 2) for i in range(1, d + 1))
    return 0.5 * (digammas + d * math.log(2 / n) + (1 + 1 / n) * d * n / (n - d - 2) - d)


def limit(exact, a, n):
    """b from exact risks by Richardson in 1/n."""
    one, two = ((exact(m) - a / m) * m * m for m in (n, 2 * n))
    return 2 * two - one


def test_exponential_law():
    found = estimation_risk_psi(exponential().psi, tensor(-1.0))
    assert (found.a, found.b) == (pytest.approx(0.5, abs=1e-12), pytest.approx(11 / 12, abs=1e-12))
    exact = lambda n: psi_of_n(n) - math.log(n) + 1 / (n - 1)  # noqa: E731
    assert limit(exact, 0.5, 2000) == pytest.approx(11 / 12, abs=1e-3)
    assert found.risk(50) == pytest.approx(exact(50), rel=1e-3)


@pytest.mark.parametrize(("d", "b"), [(1, 61 / 12), (2, 16.9167), (3, None)])
def test_normal_law_of_mean_and_covariance(d, b):
    family = gaussian(d)
    theta = family.solve(family.statistics(torch.cat([torch.eye(d), -torch.eye(d)]).double() * math.sqrt(d)).mean(0))
    found = estimation_risk_psi(family.psi, theta)
    p = d + d * (d + 1) // 2
    assert found.a == pytest.approx(p / 2, abs=1e-9)
    assert found.b == pytest.approx(limit(lambda n: normal_risk(d, n), p / 2, 20_000), rel=1e-4)
    if b is not None:
        assert found.b == pytest.approx(b, abs=1e-4)
    if d == 1:
        assert normal_risk(1, 20) == pytest.approx(0.0652235, abs=1e-7)
        assert found.risk(20) == pytest.approx(0.0627083, abs=1e-7)
        assert normal_risk(1, 200) == pytest.approx(0.00512924, abs=1e-8)
        assert found.risk(200) == pytest.approx(0.00512708, abs=1e-8)


def test_categorical_law():
    mass = tensor(0.5, 0.2, 0.3)
    family = categorical(3)
    found = estimation_risk_psi(family.psi, family.solve(mass[:2]))
    expected = 5 / 12 * float((1 / mass).sum()) - 3 / 2 + 1 / 12
    assert found.b == pytest.approx(expected, abs=1e-9)
    assert found.b == pytest.approx(2.888889, abs=1e-6)
    assert family.finite_from == math.inf


def test_misspecified_exponential_law(generator):
    """Gamma(2, mean 1) data, exactly: C = 1/2, K3 = 1/2."""
    found = risk_from_cumulants(tensor([1.0]), tensor([[2.0]]), tensor([[[6.0]]]), tensor([0.5]), tensor([[0.5]]))
    assert (found.a, found.b) == (pytest.approx(0.25), pytest.approx(0.2291667, abs=1e-7))
    exact = lambda n: psi_of_n(2 * n) - math.log(2 * n) + 2 * n / (2 * n - 1) - 1  # noqa: E731
    assert exact(10) == pytest.approx(0.0274233, abs=1e-7)
    assert found.risk(10) == pytest.approx(0.0272917, abs=1e-7)
    assert limit(exact, 0.25, 2000) == pytest.approx(found.b, abs=1e-3)
    x = gamma().sample(tensor(1.0, -2.0), 200_000, generator)
    model = exponential().sample(tensor(-1.0), 200_000, generator)
    sampled = estimation_risk(x, model)
    assert sampled.a == pytest.approx(0.25, abs=6 * sampled.se_a)
    assert sampled.b == pytest.approx(0.2291667, abs=6 * sampled.se_b)
    assert 0 < sampled.se_b < 0.05
    # the well-specified formula is far off
    assert abs(estimation_risk_psi(exponential().psi, tensor(-1.0)).b - sampled.b) > 20 * sampled.se_b


def test_mean_of_a_normal_law_has_no_second_order(generator):
    covariance = tensor([2.0, 0.3], [0.3, 1.0])
    family = gaussian(2, part="mean", known=covariance)
    data = torch.empty(500, 2, dtype=torch.float64).exponential_(generator=generator)
    found = estimation_risk_psi(family.psi, family.solve(data.mean(0)), family.statistics(data))
    assert found.b == pytest.approx(0.0, abs=1e-10)
    spread = torch.cov(data.T)
    assert found.a == pytest.approx(0.5 * torch.linalg.solve(covariance, spread).trace().item(), rel=1e-10)


def einsum_form(data, model, population):
    """The naive twin: all cumulants as arrays, squares of means with their bias."""
    z, y = model - model.mean(0), data - data.mean(0)
    m, n = len(z), len(y)
    metric = z.T @ z / m
    third = torch.einsum("na,nb,nc->abc", z, z, z) / m
    fourth = torch.einsum("na,nb,nc,nd->abcd", z, z, z, z) / m
    for one, other in (("ab", "cd"), ("ac", "bd"), ("ad", "bc")):
        fourth = fourth - torch.einsum(f"{one},{other}->abcd", metric, metric)
    spread = y.T @ y / (n if population else n - 1)
    skew = torch.einsum("na,nb,nc->abc", y, y, y) / n * (1 if population else n * n / ((n - 1) * (n - 2)))
    return metric, third, fourth, spread, skew


@pytest.mark.parametrize("population", [True, False])
def test_tensor_free_form_equals_einsum_form(population, generator):
    data = torch.randn(60, 3, generator=generator, dtype=torch.float64).exp()
    model = torch.randn(900, 3, generator=generator, dtype=torch.float64) + 0.3 * torch.randn(
        900, 1, generator=generator, dtype=torch.float64
    ).square()
    cumulants = einsum_form(data, model, population)
    naive = risk_from_cumulants(*cumulants)
    found = estimation_risk(data, model, population=population, method="tensor")
    assert found.a == pytest.approx(naive.a, rel=1e-10)
    # the naive form counts each draw against itself in the two squares: take that out as well
    root = torch.linalg.cholesky(cumulants[0])
    z = torch.linalg.solve_triangular(root, (model - model.mean(0)).T, upper=False).T
    half = torch.linalg.solve_triangular(root, cumulants[3], upper=False)
    spread = torch.linalg.solve_triangular(root, half.T, upper=False)
    own = (((z @ spread) * z).sum(1).square() * z.square().sum(1)).mean().item()
    third = torch.einsum("na,nb,nc->abc", z, z, z) / 900
    squares = torch.einsum("ije,kle,ij,kl->", third, third, spread, spread).item()
    squares += 2 * torch.einsum("ike,jle,ij,kl->", third, third, spread, spread).item()
    corrected = naive.b + 0.375 * ((900 * squares - 3 * own) / 899 - squares)
    assert found.b == pytest.approx(corrected, rel=1e-10)


def test_affine_changes_of_the_statistics_change_nothing(generator):
    data = torch.randn(200, 4, generator=generator, dtype=torch.float64).exp()
    model = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)
    one, other = estimation_risk(data, model), estimation_risk(data @ matrix + 5, model @ matrix - 2)
    for name in ("a", "b", "se_a", "se_b"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-8)


def test_pairs_and_arrays_estimate_the_same(generator):
    family = gaussian(2)
    data = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    data[:, 1] = data[:, 0].square() + 0.5 * data[:, 1]
    model = family.statistics(family.sample(family.solve(family.statistics(data).mean(0)), 60_000, generator))
    xi = family.statistics(data)
    by_array = estimation_risk(xi, model, population=True, method="tensor")
    by_pairs = estimation_risk(xi, model, population=True, method="pairs")
    assert by_array.a == pytest.approx(by_pairs.a, rel=1e-12)
    assert by_array.b == pytest.approx(by_pairs.b, abs=6 * math.hypot(by_array.se_b, by_pairs.se_b))
    exact = estimation_risk_psi(family.psi, family.solve(xi.mean(0)), xi)
    sample = estimation_risk(xi, model)
    assert sample.b == pytest.approx(exact.b, abs=6 * by_array.se_b)


def test_standard_errors_are_those_of_repeated_samples(generator):
    model = exponential().sample(tensor(-1.0), 50_000, generator)
    draws = [estimation_risk(gamma().sample(tensor(1.0, -2.0), 400, generator), model) for _ in range(150)]
    for name in ("a", "b"):
        values = torch.tensor([getattr(one, name) for one in draws])
        claimed = torch.tensor([getattr(one, f"se_{name}") for one in draws]).median()
        assert claimed.item() == pytest.approx(values.std().item(), rel=0.3)


def test_twins_give_conditional_cumulants(generator):
    """A Poisson regression with an intercept and two covariates, whose conditional cumulants are its means."""
    covariates = torch.cat([torch.ones(40, 1), torch.randn(40, 2, generator=generator)], dim=1).double()
    theta = tensor(0.5, 0.4, -0.3)
    psi = lambda t: (covariates @ t).exp().mean()  # noqa: E731
    exact = estimation_risk_psi(psi, theta)
    rates = (covariates @ theta).exp()
    rows = torch.arange(40).repeat(8_000)
    counts = [torch.poisson(rates[rows], generator=generator) for _ in range(3)]
    scores = [(drawn - rates[rows]).unsqueeze(1) * covariates[rows] for drawn in counts]
    found = estimation_risk(scores[0], scores[1], twins=scores[2], population=True)
    assert found.a == pytest.approx(exact.a, abs=0.02)
    assert found.b == pytest.approx(exact.b, abs=6 * found.se_b + 0.1)
    marginal = estimation_risk(scores[0], scores[1], population=True)
    assert abs(marginal.b - exact.b) > 6 * found.se_b + 0.1  # without twins the covariates pass for noise


@pytest.mark.parametrize(
    ("family", "theta"),
    [
        (exponential(), tensor(-0.7)),
        (gamma(), tensor(1.5, -2.0)),
        (gamma(), tensor(-0.4, -1.0)),
        (poisson(), tensor(0.4)),
        (categorical(4), tensor(0.3, -0.5, 1.0)),
        (bernoulli(), tensor(0.8)),
        (gaussian(2), None),
        (gaussian(2, quasi=True), None),
        (gaussian(2, part="covariance", known=tensor(1.0, -1.0)), None),
        (gaussian(2, part="mean"), tensor(0.5, -1.0)),
        (polynomial(3), tensor(1.0, -0.8, 0.5)),
        (polynomial(2, 2), tensor(0.5, -1.0, 0.3, 0.4, -0.2)),
        (ising(4), tensor(0.1, -0.2, 0.3, 0.0, 0.4, -0.3, 0.2, 0.1, 0.0, 0.3)),
    ],
)
def test_families_agree_with_themselves(family, theta, generator):
    if theta is None:
        some = torch.randn(50, 2, generator=generator, dtype=torch.float64) + 0.5
        theta = family.solve(family.statistics(some).mean(0))
    mean = torch.func.grad(family.psi)(theta)
    torch.testing.assert_close(family.solve(mean), theta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(natural_parameter(family.psi, mean, theta + 0.05), theta, rtol=1e-4, atol=1e-5)
    xi = family.statistics(family.sample(theta, 60_000, generator))
    error = xi.std(0) / math.sqrt(len(xi))
    assert bool(((xi.mean(0) - mean).abs() < 6 * error + 1e-9).all())
    metric = torch.func.jacrev(torch.func.grad(family.psi))(theta)
    torch.testing.assert_close(torch.cov(xi.T).reshape(metric.shape), metric, rtol=0.1, atol=0.05)


def test_densities_are_normalised(generator):
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    family, theta = polynomial(3), tensor(1.0, -0.8, 0.5)
    density = (family.statistics(grid) @ theta - family.psi(theta)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-6)
    criterion = PNCriterion(gaussian(2, part="mean", known=tensor([2.0, 0.3], [0.3, 1.0])), draws=2000)
    data = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    criterion.fit(data)
    law = torch.distributions.MultivariateNormal(data.mean(0), tensor([2.0, 0.3], [0.3, 1.0]))
    assert criterion.score(data) == pytest.approx(law.log_prob(data).mean().item(), rel=1e-10)
    both = PNCriterion(gaussian(2), draws=2000).fit(data)
    law = torch.distributions.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0))
    assert both.score(data) == pytest.approx(law.log_prob(data).mean().item(), rel=1e-10)
    counts = tensor(0.0, 3.0, 1.0, 2.0)
    with pytest.warns(UserWarning, match="infinite"):
        fitted = PNCriterion(poisson(), exact=True).fit(counts)
    assert fitted.score(counts) == pytest.approx(torch.distributions.Poisson(1.5).log_prob(counts).mean().item())


def test_pythagoras(generator):
    """D(g || fit) = D(g || g*) + D(g* || fit), for a discrete g and any fit."""
    support = torch.arange(6, dtype=torch.float64)
    truth = tensor(0.3, 0.05, 0.25, 0.1, 0.1, 0.2)
    table = torch.stack([support, support.square()], dim=1)
    psi = lambda theta: (table @ theta).logsumexp(0)  # noqa: E731
    log_law = lambda theta: table @ theta - psi(theta)  # noqa: E731
    best = natural_parameter(psi, truth @ table, torch.zeros(2))
    drawn = support[torch.multinomial(truth, 40, replacement=True, generator=generator)]
    fit = natural_parameter(psi, torch.stack([drawn, drawn.square()], 1).mean(0), torch.zeros(2))
    kl = lambda p, log_q: (p * (p.log() - log_q)).sum().item()  # noqa: E731
    parts = kl(truth, log_law(best)) + kl(log_law(best).exp(), log_law(fit))
    assert kl(truth, log_law(fit)) == pytest.approx(parts, abs=1e-10)
    reverse = kl(log_law(fit).exp(), log_law(best))
    assert abs(reverse - kl(log_law(best).exp(), log_law(fit))) > 1e-5  # the order of the arguments counts


def test_expansion_predicts_simulated_risk_of_a_misspecified_fit(generator):
    """A normal fitted to a skewed discrete truth: enumeration is out of reach, 80,000 fits are not."""
    atoms, mass = tensor(-1.0, 0.0, 1.0, 4.0), tensor(0.3, 0.3, 0.3, 0.1)
    family = gaussian(1)
    xi = family.statistics(atoms)
    draws = family.sample(family.solve(mass @ xi), 400_000, generator)
    found = estimation_risk(xi, family.statistics(draws), weights=mass)
    n = 120
    x = atoms[torch.multinomial(mass, 80_000 * n, replacement=True, generator=generator)].view(-1, n)
    m, v = x.mean(1), x.var(1, correction=0)
    best_m = (mass @ atoms).item()
    best_v = (mass @ (atoms - best_m).square()).item()
    risk = 0.5 * ((v / best_v).log() + (best_v + (best_m - m).square()) / v - 1)
    error = risk.std().item() / math.sqrt(len(risk))
    margin = 6 * math.hypot(error, found.standard_error(n)) + 300 / n**3  # a third order of that size was seen
    assert found.risk(n) == pytest.approx(risk.mean().item(), abs=margin)
    assert found.a / n < risk.mean().item() - margin  # the first order alone is rejected


def test_budgets_and_sample_sizes():
    assert kl_budget(0.1) == pytest.approx(0.08)
    expansion = RiskExpansion(a=1.0, b=61 / 12, p=2)
    assert required_n(expansion, 0.1) == 17
    assert expansion.risk(17) == pytest.approx(0.0764, abs=1e-4)
    assert expansion.risk(16) == pytest.approx(0.0824, abs=1e-4)
    for delta in (0.05, 0.2, 0.44, 0.45, 0.49):
        pinsker, huber = kl_budget(delta, bound="pinsker"), kl_budget(delta, bound="bh")
        assert kl_budget(delta) == max(pinsker, huber)
        assert (pinsker > huber) == (delta < 0.446)
    # Pinsker's budget is enough: two unit normals at that KL
    shift = math.sqrt(2 * kl_budget(0.1))
    error = torch.special.ndtr(tensor(-shift / 2)).item()
    assert error >= 0.4
    below = RiskExpansion(a=1.0, b=-50.0, p=3)
    assert below.required_n(0.01) == 4
    assert not below.valid(4)
    assert RiskExpansion(a=4.5, b=10.0, p=9, finite_from=40).required_n(5.0) == 40
    assert RiskExpansion(a=1.0, b=0.0, p=2, finite_from=10).risk(9) == math.inf


def test_criterion_and_nested_models():
    nested = [RiskExpansion(a=p / 2, b=0.4 * p**2, p=p) for p in range(1, 30)]
    result = pn_criterion(nested[4], 50, 0.1)
    assert result.accepted == (result.risk <= result.budget)
    assert result.p_over_2n == pytest.approx(0.05)
    assert result.ratio == pytest.approx(nested[4].b / 50 / nested[4].a)
    largest = max_dimension(nested, 100, 0.1)
    assert pn_criterion(nested[largest - 1], 100, 0.1).accepted
    assert not pn_criterion(nested[largest], 100, 0.1).accepted
    assert max_dimension(nested, 2, 0.1) == 0


def test_first_order_of_any_model_and_takeuchi(generator):
    metric, spread = tensor([2.0, 0.5], [0.5, 1.0]), tensor([1.0, 0.2], [0.2, 3.0])
    a = first_order_risk(metric, metric, spread).a
    assert a == pytest.approx(0.5 * torch.linalg.solve(metric, spread).trace().item())
    x = torch.randn(80, 1, generator=generator, dtype=torch.float64).exp()
    criterion = PNCriterion(gaussian(1), exact=True).fit(x)
    xi = gaussian(1).statistics(x)
    curvature = torch.func.jacrev(torch.func.grad(gaussian(1).psi))(criterion.theta_)
    log_likelihood = torch.full((80,), criterion.score(x), dtype=torch.float64)
    assert criterion.tic_ == pytest.approx(tic(log_likelihood, curvature, torch.cov(xi.T)), rel=1e-9)
    # AIC where the model holds
    assert tic(log_likelihood, metric, metric) == pytest.approx(-2 * 80 * criterion.score(x) + 4)


def test_estimator_modes(generator):
    x = torch.empty(200, 1, dtype=torch.float64).exponential_(generator=generator)
    family = exponential()
    exact = PNCriterion(family, exact=True).fit(x)
    sampled = PNCriterion(family, draws=200_000).fit(x)
    assert sampled.expansion_.a == pytest.approx(exact.expansion_.a, rel=0.03)
    assert sampled.expansion_.b == pytest.approx(exact.expansion_.b, abs=0.1)
    assert exact.expansion_.finite_from == 2
    well = PNCriterion(family, well_specified=True, draws=400_000).fit(x)
    assert well.expansion_.a == 0.5
    assert well.expansion_.b == pytest.approx(11 / 12, abs=0.1)
    first = PNCriterion(family, order=1).fit(x)
    assert (first.expansion_.order, first.expansion_.b) == (1, 0.0)
    boot = PNCriterion(family, exact=True, bootstrap=100).fit(x)
    assert boot.expansion_.se_a == pytest.approx(sampled.expansion_.se_a, rel=0.35)
    assert exact.n_star_ == exact.expansion_.required_n(0.08)
    assert exact.accepted_ == exact.result_.accepted
    again = sampled.sample(5, generator=generator)
    assert again.shape == (5, 1)
    own = Family("own", family.statistics, family.solve, family.sample)
    silent = PNCriterion(own, draws=2000).fit(x)
    with pytest.raises(ConfigError, match="Psi"):
        silent.score(x)


def test_large_pairwise_law_is_fitted_by_sampling(generator):
    d = 13
    family = ising(d, sweeps=10, draws=1500)
    theta = torch.zeros(d + d * (d - 1) // 2, dtype=torch.float64)
    theta[:d] = 0.3
    theta[d : d + 6] = 0.25
    data = family.sample(theta, 4000, generator)
    xi = family.statistics(data)
    found = family.solve(xi.mean(0))
    again = family.statistics(family.sample(found, 8000, generator)).mean(0)
    assert (again - xi.mean(0)).abs().max() < 0.08
    assert (found - theta).abs().max() < 0.15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        criterion = PNCriterion(family, draws=20_000).fit(data)
    assert criterion.expansion_.a == pytest.approx(len(theta) / 2, rel=0.1)


def test_bad_input(generator):
    data = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    expansion = RiskExpansion(a=1.0, b=1.0, p=2)
    twice = torch.stack([data[:, 0], data[:, 1], 2 * data[:, 0] - data[:, 1]], dim=1)
    for call, error, message in [
        (lambda: kl_budget(0.5), ConfigError, "delta"),
        (lambda: kl_budget(0.0), ConfigError, "delta"),
        (lambda: kl_budget(0.1, bound="tv"), ConfigError, "bound"),
        (lambda: expansion.risk(0), ConfigError, "1 or more"),
        (lambda: expansion.required_n(0.0), ConfigError, "positive"),
        (lambda: estimation_risk(data, data[:, :1]), ShapeError, "shapes"),
        (lambda: estimation_risk(data * math.nan, data), DataError, "finite"),
        (lambda: estimation_risk(data[:2], data), DataError, "n > p"),
        (lambda: estimation_risk(data, data[:5]), DataError, "few"),
        (lambda: estimation_risk(data, data, weights=torch.ones(3)), ShapeError, "weights"),
        (lambda: estimation_risk(data, data, weights=-torch.ones(50)), DataError, "negative"),
        (lambda: estimation_risk(data, data, twins=data[:3]), ShapeError, "twins"),
        (lambda: estimation_risk(data, data, method="fast"), ConfigError, "method"),
        (lambda: estimation_risk(twice, twice), DataError, "xi_0"),
        (lambda: estimation_risk_psi(lambda t: t.sum(), torch.zeros(13)), ConfigError, "12"),
        (lambda: first_order_risk(torch.eye(2), torch.eye(3), torch.eye(2)), ShapeError, "shape"),
        (lambda: PNCriterion(exponential(), draws=10).fit(data[:, :1].exp()), ConfigError, "draws"),
        (lambda: PNCriterion(exponential()).fit(data[:, :1]), DataError, "positive"),
        (lambda: PNCriterion(gaussian(2)).fit(data[:5]), DataError, "do not carry"),
        (lambda: PNCriterion(gaussian(2)).fit(data[:, :1].repeat(1, 2)), DataError, "singular"),
        (lambda: PNCriterion(exponential()).score(data), NotFitted, "fit"),
        (lambda: PNCriterion(ising(13), exact=True).fit(data), ConfigError, "out of reach"),
        (lambda: PNCriterion(categorical(3)).fit(tensor(0, 1, 0, 1, 1)), DataError, "no sample"),
        (lambda: PNCriterion(bernoulli()).fit(tensor(1, 1, 1)), DataError, "no sample"),
        (lambda: PNCriterion(ising(2)).fit(torch.ones(9, 2)), DataError, "never changes"),
        (lambda: PNCriterion(poisson()).fit(tensor(0, 0, 0)), DataError, "zero"),
        (lambda: PNCriterion(poisson()).fit(tensor(0.5, 1, 2)), DataError, "counts"),
        (lambda: PNCriterion(gamma()).fit(torch.ones(9)), DataError, "differ"),
        (lambda: PNCriterion(polynomial(2)).fit(tensor(0.1, 1.2, 0.5)), DataError, "unit cube"),
        (lambda: categorical(1), ConfigError, "two cells"),
        (lambda: gaussian(2, part="all"), ConfigError, "part"),
        (lambda: gaussian(2, known=torch.eye(2)), ConfigError, "known"),
        (lambda: polynomial(0), ConfigError, "degree"),
        (lambda: ising(1), ConfigError, "two variables"),
    ]:
        with pytest.raises(error, match=message):
            call()
