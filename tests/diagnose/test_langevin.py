"""Langevin dynamics against Gaussian posteriors, exact evidence and scikit-learn's manners of an ensemble."""

import copy
import math

import pytest
import torch
from torch import nn

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.core.rng import generator as stream
from kullback.diagnose.langevin import SGLD, GaussianPrior, SGLDEnsemble, beta_grid, log_weight_ti, wbic
from kullback.diagnose.universality import exp_bound


def chains(precision, mean, epsilon, steps, count, *, seed=0, **options):
    """The last states of `count` chains in parallel on N(mean, 1 / precision), as one parameter."""
    state = nn.Parameter(torch.full((count,), mean, dtype=torch.float64))
    n, prior = 10, 0.5  # the likelihood has precision - prior, so that data and prior are both at work
    weight = (precision - prior) / n
    chain = SGLD([state], n_data=n, lr=epsilon, std=prior**-0.5, generator=stream(seed, "chains"), **options)
    likely = mean * precision / (precision - prior)
    for _ in range(steps):
        chain.zero_grad()
        (0.5 * weight * (state - likely).square()).sum().backward()
        chain.step()
    return state.detach()


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_a_constant_step_has_the_variance_it_should(epsilon):
    precision, count = 3.0, 40_000
    states = chains(precision, 2.0, epsilon, 60, count)
    expected = 1 / (precision * (1 - epsilon * precision / 4))
    assert states.mean().item() == pytest.approx(2.0, abs=6 * math.sqrt(expected / count))
    assert states.var().item() == pytest.approx(expected, rel=6 * math.sqrt(2 / count))
    # a missing half in the drift, or n for the batch: another variance
    assert abs(expected - 1 / (2 * precision * (1 - epsilon * precision / 2))) > 0.1 * expected


def test_small_steps_reach_the_posterior():
    found = {e: chains(3.0, -1.0, e, int(8 / e), 200_000) for e in (0.05, 0.1)}
    extrapolated = 2 * found[0.05].var() - found[0.1].var()
    assert extrapolated.item() == pytest.approx(1 / 3, rel=0.02)
    assert (2 * found[0.05].mean() - found[0.1].mean()).item() == pytest.approx(-1.0, rel=0.02)
    assert abs(3 * found[0.1].var().item() - 1) > 0.05  # the bias that the extrapolation takes away


def test_temperature_and_decaying_steps():
    cold = chains(3.0, 0.0, 0.02, 600, 20_000, beta=4.0)
    assert cold.var().item() == pytest.approx(1 / (4 * 2.5 + 0.5), rel=0.1)
    prior = chains(3.0, 0.0, 0.05, 800, 20_000, beta=0.0)
    assert prior.var().item() == pytest.approx(2.0, rel=0.06)
    shrinking = chains(3.0, 0.0, 0.5, 400, 20_000, gamma=1.0, decay=20.0)
    assert shrinking.var().item() == pytest.approx(1 / 3, rel=0.06)
    weight = nn.Parameter(torch.zeros(1))
    chain = SGLD([weight], n_data=1, lr=0.2, gamma=0.5, decay=10, generator=stream(0, "x"))
    sizes = []
    for _ in range(31):
        sizes.append(chain.step_size())
        weight.grad = torch.zeros(1)
        chain.step()
    assert sizes[0] == 0.2
    assert sizes[30] == pytest.approx(0.2 * 4**-0.5)


def test_preconditioning_evens_out_scales():
    scales = torch.tensor([100.0, 1.0], dtype=torch.float64)
    state = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64).repeat(4000, 1))
    chain = SGLD([state], n_data=1, lr=1e-2, std=1e3, precondition=True, generator=stream(0, "p"))
    for _ in range(400):
        chain.zero_grad()
        (0.5 * scales * state.square()).sum().backward()
        chain.step()
    spread = state.detach().var(0) * scales
    assert spread[0] / spread[1] == pytest.approx(1.0, abs=0.5)


def test_the_same_seed_gives_the_same_chain_and_global_states_stay():
    before = torch.random.get_rng_state()
    assert torch.equal(chains(3.0, 1.0, 0.1, 20, 5, seed=3), chains(3.0, 1.0, 0.1, 20, 5, seed=3))
    assert not torch.equal(chains(3.0, 1.0, 0.1, 20, 5, seed=3), chains(3.0, 1.0, 0.1, 20, 5, seed=4))
    assert torch.equal(before, torch.random.get_rng_state())


def linear_model(generator, n=40):
    """Gaussian regression with a Gaussian prior: posterior at beta and evidence in closed form."""
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64) + 0.7 * torch.randn(n, generator=generator).double()
    noise, prior = 0.5, 2.0

    def posterior(beta):
        precision = beta / noise * x.T @ x + torch.eye(3) / prior
        return torch.linalg.solve(precision, beta / noise * x.T @ y), torch.linalg.inv(precision)

    def energy(theta):
        return 0.5 * (y - theta @ x.T).square().sum(-1) / noise + 0.5 * n * math.log(2 * math.pi * noise)

    covariance = noise * torch.eye(n) + prior * x @ x.T
    evidence = -torch.distributions.MultivariateNormal(torch.zeros(n).double(), covariance).log_prob(y)
    return posterior, energy, float(evidence)


def energy_moments(posterior, energy, beta):
    """Two values, many times over, with the exact mean and deviation of a quadratic energy at a temperature.

    The energy is its value at the mean, plus a gradient term and a Hessian term H of a N(0, C) that do not correlate.
    """
    mean, covariance = posterior(beta)
    with torch.enable_grad():
        at = mean.clone().requires_grad_()
        (slope,) = torch.autograd.grad(energy(at), at)
        curved = torch.autograd.functional.hessian(energy, mean) @ covariance
    middle = float(energy(mean)) + 0.5 * float(curved.trace())
    deviation = math.sqrt(float(slope @ covariance @ slope) + 0.5 * float((curved @ curved).trace()))
    return torch.tensor([middle - deviation, middle + deviation], dtype=torch.float64).repeat(500)


def test_thermodynamic_integration_of_a_linear_model(generator):
    posterior, energy, evidence = linear_model(generator)

    def integral(count, **options):
        moments = lambda beta: energy_moments(posterior, energy, beta)  # noqa: E731
        return log_weight_ti(lambda energies: energies, moments, beta_grid(count), **options).value

    assert integral(30) == pytest.approx(evidence, abs=2e-3)  # of 50 nats; the error falls as K^-4
    assert integral(60) == pytest.approx(evidence, abs=2e-4)
    assert integral(30, correct=False) == pytest.approx(evidence, abs=0.2)
    assert abs(integral(30, correct=False) - evidence) > 0.02

    def draws(beta):
        mean, covariance = posterior(beta)
        noise = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
        return mean + noise @ torch.linalg.cholesky(covariance).T

    found = log_weight_ti(energy, draws, beta_grid(30))
    assert found.value == pytest.approx(evidence, abs=6 * found.se + 0.02)
    assert found.se < 0.2
    assert found.curve.shape == (30, 3)
    assert bool((found.curve[:, 1].diff() < 3 * found.curve[1:, 2]).all())  # the energy falls with beta
    rough = log_weight_ti(energy, draws, beta_grid(30), correct=False)
    assert abs(rough.value - evidence) > abs(found.value - evidence) - 6 * found.se


def test_the_rule_is_exact_to_a_thousandth_for_exact_energies(generator):
    """With D regular the exponential bound is known: one coin, uniform prior, energy n D on a fine grid."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    n, theta = 50, 0.3
    d = theta * (theta / grid).log() + (1 - theta) * ((1 - theta) / (1 - grid)).log()
    exact = exp_bound(d, n, log_w=torch.full_like(d, -math.log(len(d)))).value

    def moments(beta):
        share = (-beta * n * d).softmax(0)
        mean = float((share * n * d).sum())
        deviation = math.sqrt(float((share * (n * d - mean).square()).sum()))
        return torch.tensor([mean - deviation, mean + deviation], dtype=torch.float64).repeat(500)

    found = log_weight_ti(lambda energies: energies, moments, beta_grid(30))
    assert found.value == pytest.approx(exact, abs=1e-3)
    plain = log_weight_ti(lambda energies: energies, moments, beta_grid(30), correct=False)
    assert abs(plain.value - exact) > 1e-3


def test_a_useless_parameter_costs_nothing(generator):
    posterior, energy, evidence = linear_model(generator)

    def draws(beta):
        mean, covariance = posterior(beta)
        noise = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
        useless = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
        return torch.cat([mean + noise @ torch.linalg.cholesky(covariance).T, useless], dim=1)

    found = log_weight_ti(lambda theta: energy(theta[:, :3]), draws, beta_grid(30))
    assert found.value == pytest.approx(evidence, abs=6 * found.se + 0.02)
    n = 40
    assert found.se * 6 < 0.5 * math.log(n)  # what BIC would charge for it


def test_wbic_to_leading_order(generator):
    posterior, energy, evidence = linear_model(generator, n=400)
    mean, covariance = posterior(1 / math.log(400))
    noise = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    found = wbic(energy(mean + noise @ torch.linalg.cholesky(covariance).T))
    assert found == pytest.approx(evidence, abs=6.0)
    best = float(energy(posterior(1.0)[0]))
    assert abs(found - evidence) < abs(best - evidence)


def blobs(generator, n=200):
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + torch.randn(n, 2, generator=generator), labels


def network(source):
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    GaussianPrior(0.7).sample_(model, source)
    return model


def test_ensemble_predicts_with_mean_probabilities(generator):
    data, labels = blobs(generator)
    model = network(generator)
    weights = copy.deepcopy(model.state_dict())
    ensemble = SGLDEnsemble(model, lr=2e-3, steps=600, burn_in=300, thin=30).fit(data, labels)
    assert ensemble.n_members_ == 10
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    members = []
    for index in range(10):
        twin = copy.deepcopy(model)
        twin.load_state_dict({name: stack[index] for name, stack in ensemble.members_.items()})
        members.append(twin(data).detach().log_softmax(-1))
    expected = torch.stack(members).logsumexp(0) - math.log(10)
    torch.testing.assert_close(ensemble.predict_log_proba(data), expected, atol=1e-5, rtol=0)
    of_logits = ensemble.outputs(data).mean(0).log_softmax(-1)
    assert (of_logits - expected).abs().max() > 1e-3
    for chunk in (1, 3, 64):
        torch.testing.assert_close(ensemble.outputs(data, chunk=chunk), ensemble.outputs(data), atol=1e-5, rtol=1e-5)
    assert ensemble.score(data, labels) > -0.6
    assert ensemble.losses_[-50:].mean() < ensemble.losses_[:5].mean()
    same = {name: stack[:1].expand(4, *stack.shape[1:]).clone() for name, stack in ensemble.members_.items()}
    ensemble.members_, ensemble.n_members_ = same, 4
    torch.testing.assert_close(ensemble.predict_log_proba(data), members[0], atol=1e-6, rtol=1e-6)


def test_a_loader_and_arrays_both_fit(generator):
    data, labels = blobs(generator)
    batches = list(zip(data.split(50), labels.split(50), strict=True))
    model = network(generator)
    options = {"lr": 1e-3, "steps": 40, "burn_in": 0, "thin": 10}
    by_loader = SGLDEnsemble(model, n_data=200, **options).fit(batches)
    assert by_loader.n_members_ == 4
    with pytest.raises(ConfigError, match="n_data"):
        SGLDEnsemble(model, **options).fit(batches)
    with pytest.raises(DataError, match="loader"):
        SGLDEnsemble(model, n_data=200, **options).fit(iter(batches))


def test_ensemble_of_a_gaussian_regression_is_the_posterior(generator):
    x = torch.randn(30, 1, generator=generator)
    y = 0.8 * x + 0.5 * torch.randn(30, 1, generator=generator)
    model = nn.Linear(1, 1, bias=False)
    loss = lambda out, label: 2.0 * (out - label).square().mean()  # noqa: E731 - variance 1/4
    ensemble = SGLDEnsemble(model, loss=loss, lr=2e-3, gamma=0.0, steps=12_000, burn_in=500, thin=5, batch=30)
    slopes = ensemble.fit(x, y).members_["weight"].flatten()
    precision = 4 * float(x.square().sum()) + 1
    assert slopes.mean().item() == pytest.approx(4 * float((x * y).sum()) / precision, abs=0.02)
    assert slopes.var().item() == pytest.approx(1 / precision, rel=0.2)


def test_priors(generator):
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 2))
    prior = GaussianPrior(1.0, {"0.weight": 0.05, "2.weight": 2.0})
    prior.sample_(model, generator)
    assert model[0].weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert model[2].weight.std().item() == pytest.approx(2.0, rel=0.15)
    assert prior.deviations(model.named_parameters()) == [0.05, 1.0, 2.0, 1.0]
    with pytest.raises(ConfigError, match=r"'3\.weight'"):
        GaussianPrior(1.0, {"3.weight": 1.0}).deviations(model.named_parameters())


def test_bad_input(generator):
    data, labels = blobs(generator)
    model = network(generator)
    weights = list(model.parameters())
    source = stream(0, "x")
    for call, error, message in [
        (lambda: SGLD(weights, n_data=1, lr=0.0, generator=source), ConfigError, "positive"),
        (lambda: SGLD(weights, n_data=0, lr=1.0, generator=source), ConfigError, "positive"),
        (lambda: SGLD(weights, n_data=1, lr=1.0, memory=1.0, generator=source), ConfigError, "memory"),
        (lambda: SGLD(weights, n_data=1, lr=1.0, std=[1.0], generator=source), ConfigError, "std"),
        (lambda: GaussianPrior(0.0), ConfigError, "positive"),
        (lambda: SGLDEnsemble(model, steps=10, burn_in=10).fit(data, labels), ConfigError, "no member"),
        (lambda: SGLDEnsemble(model, thin=0).fit(data, labels), ConfigError, "thin"),
        (lambda: SGLDEnsemble(nn.BatchNorm1d(2)).fit(data, labels), ConfigError, "batch normalisation"),
        (lambda: SGLDEnsemble(model).fit(data, labels[:3]), ShapeError, "as many"),
        (lambda: SGLDEnsemble(model).fit(data * math.nan, labels), DataError, "finite"),
        (lambda: SGLDEnsemble(model).predict_proba(data), NotFitted, "fit"),
        (lambda: beta_grid(1), ConfigError, "count"),
        (lambda: log_weight_ti(len, len, torch.tensor([0.0, 0.5])), ConfigError, "from 0 to 1"),
        (lambda: log_weight_ti(lambda t: t, lambda b: torch.zeros(1), beta_grid(3)), DataError, "energies"),
        (lambda: wbic(torch.zeros(2, 2)), ShapeError, "shape"),
    ]:
        with pytest.raises(error, match=message):
            call()
    wild = SGLDEnsemble(model, lr=1e8, steps=60, burn_in=0, thin=10)
    with pytest.raises(DataError, match="diverged"):
        wild.fit(data, labels)
