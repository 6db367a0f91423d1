"""Learning: Fisher's identity, every form of the score against the Kalman likelihood, and where the learners arrive."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kullback.core.errors import ConfigError
from kullback.sample.exact_smoothing import kalman_paths, kalman_smoother, sequence_rows
from kullback.sample.ppg import path_statistic, ppg, ppg_rollout
from kullback.sample.score_ascent import score_ascent, score_statistic, stochastic_em
from kullback.sample.state_space import AdditiveStatistic, BootstrapModel, LinearGaussianModel, log_joint

sys.path.insert(0, str(Path(__file__).parent))
from _smoothing import simulate, within_six

TRUTH = LinearGaussianModel.scalar(0.9, 0.5, 0.7)


def model_of(parameters):
    return LinearGaussianModel.scalar(parameters["coefficient"], parameters["log_scale"].exp(), 0.7)


def doubles(**values):
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}


def exact_score(parameters, y):
    """The gradient of the Kalman log-likelihood, in the order of the mapping."""
    likelihood = kalman_smoother(model_of(parameters), y).log_likelihood.sum()
    return torch.stack(torch.autograd.grad(likelihood, list(parameters.values())))


def test_fisher_identity(generator):
    y, parameters = simulate(TRUTH, 12, generator), doubles(coefficient=0.6, log_scale=-0.4)
    coefficient, log_scale = parameters.values()
    exact = kalman_smoother(model_of(parameters), y)
    mean, second = exact.mean[0, :, 0].detach(), (exact.covariance[0, :, 0, 0] + exact.mean[0, :, 0] ** 2).detach()
    cross = (exact.lag_covariance[0, :, 0, 0] + exact.mean[0, :-1, 0] * exact.mean[0, 1:, 0]).detach()
    assert mean.shape == (12,)
    # E[log p(x, y) | y] with the expectation held, by moments; its gradient is the score.
    moves = second[1:] - 2 * coefficient * cross + coefficient**2 * second[:-1]
    complete = -0.5 * moves.sum() * (-2 * log_scale).exp() - 12 * log_scale
    complete = (
        complete - 0.5 * second[0] * (1 - coefficient**2) * (-2 * log_scale).exp() + 0.5 * (1 - coefficient**2).log()
    )
    score = torch.stack(torch.autograd.grad(complete, list(parameters.values())))
    torch.testing.assert_close(score, exact_score(parameters, y), rtol=0, atol=1e-8)


@pytest.mark.parametrize("missing", [False, True])
def test_the_carried_statistic_is_the_gradient_of_the_joint_density(missing, generator):
    y, parameters = simulate(TRUTH, 6, generator), doubles(coefficient=0.6, log_scale=-0.4)
    if missing:
        y[2] = torch.nan
    path = torch.randn(1, 6, 1, generator=generator, dtype=torch.float64)
    carried = path_statistic(score_statistic(model_of, parameters), path, y)
    joint = log_joint(model_of(parameters), path.unsqueeze(1), sequence_rows(y)).sum()
    along = torch.stack(torch.autograd.grad(joint, list(parameters.values())))
    torch.testing.assert_close(carried[0], along, rtol=0, atol=1e-10)


def test_the_score_by_paths_from_exact_draws_and_by_sweeps(generator):
    y, parameters = simulate(TRUTH, 21, generator), doubles(coefficient=0.6, log_scale=-0.4)
    exact, statistic = exact_score(parameters, y), score_statistic(model_of, parameters)
    fixed = model_of({name: value.detach() for name, value in parameters.items()})
    with torch.no_grad():
        paths = kalman_paths(fixed, y, 4000, generator=generator)
    assert within_six(path_statistic(statistic, paths, y), exact)
    kernel = ppg(fixed, statistic, y, num_particles=20)
    rollout = ppg_rollout(kernel, 3, 1, generator=generator, state=kernel.init(paths[:600], generator=generator))
    assert within_six(rollout.mean, exact)
    assert not within_six(rollout.mean, exact_score(doubles(coefficient=0.65, log_scale=-0.4), y))


class Recorder(torch.optim.SGD):
    """Gradient ascent that keeps every gradient and moves nothing."""

    def __init__(self, tensors):
        super().__init__(tensors, lr=0.0, maximize=True)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


@pytest.mark.parametrize("options", [{}, {"gradient": "paths"}, {"method": "climbing"}], ids=str)
def test_every_way_to_a_gradient_has_the_score_as_its_mean(options, generator):
    y, chains, gradients = simulate(TRUTH, 11, generator), 2000, []
    single = doubles(coefficient=0.6, log_scale=-0.4)
    held = kalman_paths(model_of(single), y, chains, generator=generator).detach()
    for per_chain in (True, False):
        values = {
            name: value.detach().repeat(chains) if per_chain else value.detach() for name, value in single.items()
        }
        values = {name: value.clone().requires_grad_() for name, value in values.items()}
        optimizer = Recorder(values.values())
        score_ascent(
            model_of, values, y, optimizer,
            num_particles=10, num_steps=1, num_sweeps=2, burn_in=1, path=held, per_chain=per_chain,
            generator=torch.Generator().manual_seed(4), **options,
        )  # fmt: skip
        gradients.append(torch.stack(optimizer.seen[0], -1))
    assert within_six(gradients[0], exact_score(single, y))
    assert not within_six(gradients[0], exact_score(doubles(coefficient=0.65, log_scale=-0.4), y))
    # Shared parameters get the mean over the chains.
    torch.testing.assert_close(gradients[1], gradients[0].mean(0), rtol=1e-9, atol=1e-9)


def test_a_closed_form_statistic_gives_the_same_gradients(generator):
    y = simulate(TRUTH, 8, generator)

    def closed(parameters):
        coefficient = parameters["coefficient"]
        return AdditiveStatistic(
            lambda x, x_next, y, time: (x_next - coefficient * x) * x / 0.25,
            lambda x, y: coefficient * x.square() / 0.25 - coefficient / (1 - coefficient**2),
        )

    def one_parameter(parameters):
        return LinearGaussianModel.scalar(parameters["coefficient"], 0.5, 0.7)

    gradients = []
    for statistic_of in (closed, None):
        values = {"coefficient": torch.tensor(0.6, dtype=torch.float64)}
        optimizer = Recorder(values.values())
        score_ascent(
            one_parameter, values, y, optimizer, num_particles=10, num_steps=3, chains=4, statistic_of=statistic_of,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        gradients.append(torch.tensor([step[0] for step in optimizer.seen]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)


def free(parameters):
    """A coefficient that may take any value: the law of the first state does not depend on it."""
    fixed = {
        "transition_covariance": 0.25,
        "observation": 1.0,
        "observation_covariance": 0.49,
        "initial_covariance": 1.0,
    }
    matrices = {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in fixed.items()}
    coefficient = parameters["coefficient"][..., None, None]
    return LinearGaussianModel(transition=coefficient, initial_mean=torch.zeros(1, dtype=torch.float64), **matrices)


def maximum(y):
    """The coefficient of largest likelihood, on a fine grid."""
    grid = torch.linspace(0.5, 1.1, 601, dtype=torch.float64)
    return grid[kalman_smoother(free({"coefficient": grid}), y).log_likelihood.argmax()]


@pytest.mark.slow
def test_ascent_with_ppg_arrives_at_the_maximum_and_with_paris_beside_it(generator):
    y = simulate(TRUTH, 41, generator)
    best = maximum(y)
    ends = {method: late_coefficients(method, y, generator).mean() for method in ("ppg", "paris")}
    assert abs(ends["ppg"] - best) < 0.01
    assert abs(ends["paris"] - best) > 3 * abs(ends["ppg"] - best)


def late_coefficients(method, y, generator):
    """The coefficients of thirty learners, averaged over their last steps."""
    values = {"coefficient": torch.full((30,), 0.5, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.SGD(values.values(), lr=0.5 / 41, maximize=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -0.6)
    seen = []
    score_ascent(
        free, values, y, optimizer,
        num_particles=4, num_steps=100, num_sweeps=2 if method == "ppg" else 1, chains=30, per_chain=True,
        method=method, scheduler=scheduler, generator=generator,
        listen=lambda step, p: seen.append(p["coefficient"].detach().clone()),
    )  # fmt: skip
    return torch.stack(seen[70:]).mean(0)


def test_stochastic_em_climbs_to_the_maximum(generator):
    y = simulate(TRUTH, 41, generator)

    def moments(x, x_next, y, time):
        return torch.cat([x * x_next, x.square() + 0 * x_next], -1)

    def maximize(mean):
        return {"coefficient": mean[:, 0].mean() / mean[:, 1].mean()}

    start = {"coefficient": torch.tensor(0.0, dtype=torch.float64)}
    learned = stochastic_em(
        free, maximize, moments, start, y, num_particles=10, num_steps=40, chains=30, generator=generator
    )
    assert abs(learned.parameters["coefficient"] - maximum(y)) < 0.02
    assert learned.path.shape == (30, 41, 1)


def test_a_network_as_transition_learns_from_its_paths(generator):
    truth = LinearGaussianModel.scalar(0.9, 0.5, 0.5)
    y = torch.stack([simulate(truth, 15, generator) for _ in range(16)])
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    model = BootstrapModel(
        initial_mean=torch.zeros(1, dtype=torch.float64),
        initial_scale=torch.ones(1, dtype=torch.float64),
        mean=lambda x, time: network(x),
        scale=torch.full((1,), 0.5, dtype=torch.float64),
        log_observation=lambda x, y, time: -2 * (y - x).square().sum(-1),
    )
    parameters = dict(network.named_parameters())
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).unsqueeze(-1)
    before = (network(x) - 0.9 * x).square().mean().item()
    learned = score_ascent(
        lambda _: model, parameters, y, torch.optim.Adam(network.parameters(), lr=0.03, maximize=True),
        num_particles=8, num_steps=60, gradient="paths", generator=generator,
    )  # fmt: skip
    assert (network(x) - 0.9 * x).square().mean().item() < 0.3 * before
    assert learned.path.shape == (16, 15, 1)


def test_bad_options(generator):
    y, values = simulate(TRUTH, 4, generator), doubles(coefficient=0.6, log_scale=-0.4)
    climber = torch.optim.SGD(values.values(), lr=0.1, maximize=True)

    def ascend(optimizer=climber, **options):
        score_ascent(
            model_of, values, y, optimizer, generator=generator, **{"num_particles": 4, "num_steps": 1, **options}
        )

    for options, message in (
        ({"optimizer": torch.optim.SGD(values.values(), lr=0.1)}, "maximize=True"),
        ({"method": "mle"}, "method is one of"),
        ({"gradient": "both"}, "gradient is one of"),
        ({"method": "climbing", "gradient": "paths"}, "climbing always"),
        ({"method": "paris", "num_sweeps": 2, "burn_in": 1}, "no chain to burn in"),
        ({"burn_in": 1}, "burn_in is less"),
        ({"gradient": "paths", "statistic_of": lambda p: None}, "leave it out"),
        ({"statistic_of": lambda p: lambda x, x_next, y, time: x * x_next}, "1 entries and the parameters 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            ascend(**options)
    with pytest.raises(ConfigError, match=r"step_size\(0\)"):
        stochastic_em(
            model_of, lambda s: values, lambda x, n, y, t: x * n, values, y,
            num_particles=4, num_steps=1, step_size=lambda step: 0.5, generator=generator,
        )  # fmt: skip
