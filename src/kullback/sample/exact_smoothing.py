"""Exact smoothing where it can be had: Kalman filter and Rauch-Tung-Striebel smoother, and finite hidden Markov models.

Both are differentiable in the model's parameters, take missing observations (NaN), and draw exact paths.

Shapes: R chains (or problems), T + 1 times, d dimensions of the state, p of the observation, S states.
Source: Kalman 1960; Rauch, Tung and Striebel 1965; Baum et al. 1970; de Jong 1989 for lag-one covariances.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.draws import Generators, draw_index, normal, uniform
from kullback.sample.state_space import FiniteModel, LinearGaussianModel

__all__ = ["HMMSmoothed", "KalmanSmoothed", "hmm_paths", "hmm_smoother", "kalman_paths", "kalman_smoother"]


class KalmanSmoothed(NamedTuple):
    """Moments given all observations, with those of the filter that led to them.

    mean [R, T+1, d], covariance [R, T+1, d, d], lag_covariance [R, T, d, d]: Cov(X_{t-1}, X_t) (rows: the older
    state); filtered_mean and filtered_covariance likewise; log_likelihood [R] in nats.
    """

    mean: Tensor
    covariance: Tensor
    lag_covariance: Tensor
    filtered_mean: Tensor
    filtered_covariance: Tensor
    log_likelihood: Tensor


class HMMSmoothed(NamedTuple):
    """marginal [R, T+1, S], pair [R, T, S, S] (rows: the older state), log_filtered [R, T+1, S], log_likelihood [R]."""

    marginal: Tensor
    pair: Tensor
    log_filtered: Tensor
    log_likelihood: Tensor


def sequence_rows(observations: Tensor) -> list[Tensor]:
    """Observations [T+1, p] or [R, T+1, p] as a list over time of [1, 1, p] or [R, 1, p]."""
    if observations.ndim not in (2, 3) or 0 in observations.shape:
        shape = tuple(observations.shape)
        raise ShapeError(
            f"observations are [T+1, p], or [R, T+1, p] with data for each chain, and not empty, got {shape}"
        )
    batch = observations if observations.ndim == 3 else observations.unsqueeze(0)
    return [row.unsqueeze(1) for row in batch.unbind(1)]


def kalman_smoother(model: LinearGaussianModel, observations: Tensor) -> KalmanSmoothed:
    """Smoothed moments and likelihood of observations [T+1, p] or [R, T+1, p]; R is 1 where nothing differs by chain.

    An observation of which an entry is NaN is missing as a whole. Raises ShapeError for other shapes.

    >>> model = LinearGaussianModel.scalar(0.6, 0.8, 1.0)
    >>> kalman_smoother(model, torch.tensor([[1.0], [float("nan")]]).double()).mean.squeeze()
    tensor([0.5000, 0.3000], dtype=torch.float64)
    """
    chains = _chains(model, observations)
    mean = model.initial_mean.expand(chains, -1)
    covariance = model.initial_covariance.expand(chains, -1, -1)
    log_likelihood = mean.new_zeros(chains)
    means, covariances = [], []
    for time, row in enumerate(sequence_rows(observations)):
        if time:
            mean = (model.transition @ mean.unsqueeze(-1)).squeeze(-1)
            covariance = model.transition @ covariance @ model.transition.mT + model.transition_covariance
        mean, covariance, increment = _update(model, mean, covariance, row.squeeze(1))
        log_likelihood = log_likelihood + increment
        means.append(mean)
        covariances.append(covariance)
    filtered_mean, filtered_covariance = torch.stack(means, 1), torch.stack(covariances, 1)
    lags = []
    for time in range(len(means) - 2, -1, -1):
        gain, predicted = _gain(model, filtered_covariance[:, time])
        forecast = (model.transition @ filtered_mean[:, time].unsqueeze(-1)).squeeze(-1)
        lags.append(gain @ covariances[time + 1])
        correction = (gain @ (means[time + 1] - forecast).unsqueeze(-1)).squeeze(-1)
        means[time] = filtered_mean[:, time] + correction
        covariances[time] = filtered_covariance[:, time] + gain @ (covariances[time + 1] - predicted) @ gain.mT
    lag = torch.stack(lags[::-1], 1) if lags else filtered_covariance[:, :0]
    return KalmanSmoothed(
        torch.stack(means, 1), torch.stack(covariances, 1), lag, filtered_mean, filtered_covariance, log_likelihood
    )


def _chains(model: LinearGaussianModel, observations: Tensor) -> int:
    sizes = {len(row) for row in sequence_rows(observations)[:1]}
    sizes |= {
        len(value) for name, value in vars(model).items() if name[0] != "_" and value.ndim > 1 + ("mean" not in name)
    }
    sizes -= {1}
    if len(sizes) > 1:
        raise ShapeError(f"parameters and observations are for different numbers of chains: {sorted(sizes)}")
    return sizes.pop() if sizes else 1


def _update(model: LinearGaussianModel, mean: Tensor, covariance: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    missing = y.isnan().any(-1)
    y = y.masked_fill(missing.unsqueeze(-1), 0.0)
    residual = y - (model.observation @ mean.unsqueeze(-1)).squeeze(-1)
    seen = model.observation @ covariance
    spread = seen @ model.observation.mT + model.observation_covariance
    root = torch.linalg.cholesky(spread)
    gain = torch.cholesky_solve(seen, root).mT
    white = torch.linalg.solve_triangular(root, residual.unsqueeze(-1), upper=False).squeeze(-1)
    square = white.square().sum(-1) + y.shape[-1] * math.log(2.0 * math.pi)
    log_density = -0.5 * square - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # Joseph's form keeps the covariance positive definite.
    rest = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) - gain @ model.observation
    updated = rest @ covariance @ rest.mT + gain @ model.observation_covariance @ gain.mT
    flag = missing.unsqueeze(-1)
    return (
        torch.where(flag, mean, mean + (gain @ residual.unsqueeze(-1)).squeeze(-1)),
        torch.where(flag.unsqueeze(-1), covariance, updated),
        torch.where(missing, 0.0, log_density),
    )


def _gain(model: LinearGaussianModel, filtered: Tensor) -> tuple[Tensor, Tensor]:
    """The smoother's gain and the covariance of the forecast."""
    cross = model.transition @ filtered
    predicted = cross @ model.transition.mT + model.transition_covariance
    return torch.linalg.solve(predicted, cross).mT, predicted


def kalman_paths(model: LinearGaussianModel, observations: Tensor, count: int, *, generator: Generators) -> Tensor:
    """Exact draws of X_{0:T} given observations: [R, count, T+1, d]; [count, T+1, d] for one chain."""
    smoothed = kalman_smoother(model, observations)
    problems, times, width = smoothed.mean.shape
    single = problems == 1
    noise = normal((problems, count, times, width), generator, dtype=smoothed.mean.dtype)
    path = [_gaussian(smoothed.mean[:, -1:], smoothed.covariance[:, -1], noise[:, :, -1])]
    for time in range(times - 2, -1, -1):
        filtered = smoothed.filtered_covariance[:, time]
        gain, predicted = _gain(model, filtered)
        forecast = (model.transition @ smoothed.filtered_mean[:, time].unsqueeze(-1)).squeeze(-1)
        mean = smoothed.filtered_mean[:, time].unsqueeze(1) + (path[-1] - forecast.unsqueeze(1)) @ gain.mT
        path.append(_gaussian(mean, filtered - gain @ predicted @ gain.mT, noise[:, :, time]))
    drawn = torch.stack(path[::-1], dim=2)
    return drawn.squeeze(0) if single else drawn


def _gaussian(mean: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    return mean + noise @ torch.linalg.cholesky((covariance + covariance.mT) / 2).mT


def hmm_smoother(model: FiniteModel, observations: Tensor) -> HMMSmoothed:
    """Forward-backward on observations [T+1, p] or [R, T+1, p], in logarithms.

    Raises DataError when the observations are impossible under the model, ShapeError for other shapes.

    >>> model = FiniteModel(torch.tensor([0.5, 0.5]).log(), torch.eye(2).log(),
    ...                     lambda y, time: torch.cat([1 - y, y], dim=-1).log())
    >>> hmm_smoother(model, torch.tensor([[0.5], [0.8]])).marginal[0, 0]
    tensor([0.2000, 0.8000])
    """
    emissions = [_emission(model, row, time) for time, row in enumerate(sequence_rows(observations))]
    forward = [model.log_initial + emissions[0]]
    for emission in emissions[1:]:
        forward.append((forward[-1].unsqueeze(-1) + model.log_transition).logsumexp(-2) + emission)
    log_likelihood = forward[-1].logsumexp(-1)
    if not bool(log_likelihood.isfinite().all()):
        raise DataError("the observations have probability zero, or a density is not a number: check log_emission")
    later = torch.zeros_like(forward[-1])
    marginals, pairs = [forward[-1]], []
    for time in range(len(emissions) - 1, 0, -1):
        onward = model.log_transition + (emissions[time] + later).unsqueeze(-2)
        pairs.append(forward[time - 1].unsqueeze(-1) + onward)
        later = onward.logsumexp(-1)
        marginals.append(forward[time - 1] + later)
    total = log_likelihood[:, None, None]
    marginal = (torch.stack(marginals[::-1], 1) - total).exp()
    states = len(model.log_initial)
    pair = (
        (torch.stack(pairs[::-1], 1) - total.unsqueeze(-1)).exp()
        if pairs
        else marginal.new_zeros(len(marginal), 0, states, states)
    )
    return HMMSmoothed(marginal, pair, torch.stack(forward, 1).log_softmax(-1), log_likelihood)


def _emission(model: FiniteModel, row: Tensor, time: int) -> Tensor:
    """log g_t of every state: [R, S]."""
    missing = row.isnan()
    table = model.log_emission(row.masked_fill(missing, 0.0), time).squeeze(1)
    if table.ndim != 2 or table.shape[-1] != len(model.log_initial):
        raise ShapeError(f"log_emission returns [..., S] for observations [..., p], got {tuple(table.shape)}")
    return torch.where(missing.any(-1), 0.0, table)


def hmm_paths(model: FiniteModel, observations: Tensor, count: int, *, generator: Generators) -> Tensor:
    """Exact draws of the states given observations: int64 [R, count, T+1]; [count, T+1] for one chain."""
    if count < 1:
        raise ConfigError(f"count is {count}: draw at least one path")
    log_filtered = hmm_smoother(model, observations).log_filtered
    problems, times, _ = log_filtered.shape
    numbers = uniform((problems, count, times), generator)
    path = [draw_index(log_filtered[:, -1], numbers[..., -1])]
    for time in range(times - 2, -1, -1):
        logits = log_filtered[:, time].unsqueeze(1) + model.log_transition.T[path[-1]]
        path.append(draw_index(logits, numbers[..., time : time + 1]).squeeze(-1))
    drawn = torch.stack(path[::-1], dim=2)
    return drawn.squeeze(0) if problems == 1 else drawn
