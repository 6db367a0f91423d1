"""What the tests of particle smoothing share: models, exact values, and the six-standard-error rule."""

import torch
from torch import Tensor

from kullback.sample.exact_smoothing import hmm_smoother, kalman_smoother
from kullback.sample.state_space import FiniteModel, LinearGaussianModel


def product(x, x_next, observation, time):
    """The sum over coordinates of x_{t-1} x_t."""
    return (x * x_next).sum(-1, keepdim=True)


def within_six(values: Tensor, exact: Tensor | float) -> bool:
    """Whether the mean over the first dimension is within six standard errors of `exact`, in every entry."""
    error = values.std(0) / len(values) ** 0.5
    return bool(((values.mean(0) - exact).abs() <= 6 * error).all())


def simulate(model: LinearGaussianModel, times: int, generator: torch.Generator) -> Tensor:
    """Observations [times, p] of a linear Gaussian model without a chain dimension."""
    x = model.sample_init((1, 1), generator=generator)
    root = torch.linalg.cholesky(model.observation_covariance)
    rows = []
    for time in range(times):
        if time:
            x = model.sample_trans(x, time, generator=generator)
        noise = torch.randn(len(root), generator=generator, dtype=torch.float64)
        rows.append(model.observation @ x[0, 0] + root @ noise)
    return torch.stack(rows)


def spatial() -> LinearGaussianModel:
    """Three coupled states seen through two sums of them."""
    as_double = {"dtype": torch.float64}
    return LinearGaussianModel(
        transition=torch.tensor([[0.8, 0.2, 0.0], [-0.1, 0.7, 0.1], [0.0, 0.3, 0.6]], **as_double),
        transition_covariance=torch.tensor([[0.5, 0.1, 0.0], [0.1, 0.4, 0.05], [0.0, 0.05, 0.6]], **as_double),
        observation=torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], **as_double),
        observation_covariance=torch.tensor([[0.7, 0.1], [0.1, 0.9]], **as_double),
        initial_mean=torch.tensor([0.3, -0.2, 0.1], **as_double),
        initial_covariance=torch.tensor([[1.0, 0.2, 0.1], [0.2, 1.1, 0.0], [0.1, 0.0, 0.9]], **as_double),
    )


def exact_product(model: LinearGaussianModel, observations: Tensor) -> Tensor:
    """E[sum_t x_{t-1} . x_t | y], from the smoother's moments: [R]."""
    smoothed = kalman_smoother(model, observations)
    lag = smoothed.lag_covariance.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    return (smoothed.mean[:, :-1] * smoothed.mean[:, 1:]).sum((-2, -1)) + lag


def weather() -> FiniteModel:
    """Three states and an observation whose noise is normal around each state's level."""
    log_transition = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.05, 0.25, 0.7]], dtype=torch.float64).log()
    levels = torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64)
    return FiniteModel(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(),
        log_transition,
        lambda y, time: -0.5 * (y - levels).square(),
    )


def exact_finite_product(model: FiniteModel, observations: Tensor) -> Tensor:
    """E[sum_t x_{t-1} x_t | y] of a finite model whose states count 0, 1, ...: [R]."""
    states = torch.arange(len(model.log_initial), dtype=torch.float64)
    return (hmm_smoother(model, observations).pair * torch.outer(states, states)).sum((-3, -2, -1))
