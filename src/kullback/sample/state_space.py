"""State-space models: X_0 ~ chi, X_t | x_{t-1} ~ m_t(x_{t-1}, .), Y_t | x_t ~ g_t(x_t), in batches of chains.

A model is any object with the five methods of `StateSpaceModel`. Three are given: additive Gaussian noise around any
function (`BootstrapModel`; the function may be a network), linear Gaussian and finite. `time` is always that of the
newer state, so that m_t leads from t - 1 to t.

Shapes: R chains, N particles, d dimensions of the state, p of the observation, S states of a finite model. Densities
broadcast: x [R, ..., d] and x_next [R, ..., d] give [R, ...]. Parameters are shared, [d] or [d, d], or one for each
chain, [R, d] or [R, d, d]. Observations come in a shape that broadcasts against the states: [1, 1, p] or [R, 1, p].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.sample.draws import Generators, draw_index, normal, uniform

__all__ = [
    "AdditiveStatistic", "BootstrapModel", "FiniteModel", "LinearGaussianModel", "LinearGaussianProposal",
    "Proposal", "StateSpaceModel", "log_joint",
]  # fmt: skip

_LOG_TWO_PI = math.log(2.0 * math.pi)


class StateSpaceModel(Protocol):
    """What particle methods ask of a model.

    Optional methods, found by name, make backward draws fast: `log_trans_sup(time)`, an upper bound of log m_t (a
    number or [R]), allows rejection; `whitened_mean(x, time)` and `whitened(x_next, time)`, for which
    log m_t(x, x_next) = log_trans_sup(time) - |whitened_mean - whitened|^2 / 2, allow compiled loops.
    """

    def sample_init(self, shape: tuple[int, int], *, generator: Generators) -> Tensor: ...
    def log_init(self, x: Tensor) -> Tensor: ...
    def sample_trans(self, x: Tensor, time: int, *, generator: Generators) -> Tensor: ...
    def log_trans(self, x: Tensor, x_next: Tensor, time: int) -> Tensor: ...
    def log_obs(self, x: Tensor, observation: Tensor, time: int) -> Tensor: ...


class Proposal(Protocol):
    """How to move particles other than by the model, with the observation at hand."""

    def sample_init(self, shape: tuple[int, int], observation: Tensor, *, generator: Generators) -> Tensor: ...
    def log_init(self, x: Tensor, observation: Tensor) -> Tensor: ...
    def sample_trans(self, x: Tensor, observation: Tensor, time: int, *, generator: Generators) -> Tensor: ...
    def log_trans(self, x: Tensor, x_next: Tensor, observation: Tensor, time: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class AdditiveStatistic:
    """h(x_{0:t}) = initial(x_0, y_0) + sum_s pair(x_{s-1}, x_s, y_s, s), with values [..., K].

    pair(x, x_next, observation, time) is given broadcastable states [R, ..., d] and an observation that broadcasts
    against them, and returns [R, ..., K]; initial(x, observation) likewise, zero when left out.
    """

    pair: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    initial: Callable[[Tensor, Tensor], Tensor] | None = None


def log_joint(model: StateSpaceModel, path: Tensor, observations: Sequence[Tensor]) -> Tensor:
    """log p(x_{0:T}, y_{0:T}) of paths [R, ..., T + 1, d]: [R, ...]; observations: one for each time, broadcastable.

    An observation with NaN is missing and adds nothing.
    """
    states = path.unbind(-2)
    total = model.log_init(states[0]) + observed_log_density(model, states[0], observations[0], 0)
    for time in range(1, len(states)):
        total = total + model.log_trans(states[time - 1], states[time], time)
        total = total + observed_log_density(model, states[time], observations[time], time)
    return total


def observed_log_density(model: StateSpaceModel, x: Tensor, observation: Tensor, time: int) -> Tensor:
    """log g_t, or zero where the observation is missing (NaN)."""
    missing = observation.isnan()
    if not missing.any():
        return model.log_obs(x, observation, time)
    value = model.log_obs(x, observation.masked_fill(missing, 0.0), time)
    return torch.where(missing.any(-1), 0.0, value)


@dataclass(frozen=True)
class BootstrapModel:
    """X_0 = initial_mean + initial_scale e, X_t = mean(X_{t-1}, t) + scale e, and any density of the observation.

    mean(x [R, ..., d], time) -> [R, ..., d]: a function or a module; scales [d] or [R, d]: standard deviations;
    log_observation(x, y, time) -> [R, ...]. Raises ConfigError for a scale that is not positive.

    >>> volatility = BootstrapModel(
    ...     initial_mean=torch.zeros(1), initial_scale=torch.ones(1), mean=lambda x, time: 0.9 * x,
    ...     scale=torch.tensor([0.4]), log_observation=lambda x, y, time: (-x - y**2 * (-x).exp()).sum(-1) / 2)
    >>> volatility.sample_init((2, 3), generator=torch.Generator()).shape
    torch.Size([2, 3, 1])
    """

    initial_mean: Tensor
    initial_scale: Tensor
    mean: Callable[[Tensor, int], Tensor]
    scale: Tensor
    log_observation: Callable[[Tensor, Tensor, int], Tensor]

    def __post_init__(self) -> None:
        if not (bool((self.scale > 0).all()) and bool((self.initial_scale > 0).all())):
            raise ConfigError("scales are standard deviations and must be positive: a transition needs a density")

    def sample_init(self, shape: tuple[int, int], *, generator: Generators) -> Tensor:
        noise = normal((*shape, self.initial_mean.shape[-1]), generator, dtype=self.scale.dtype)
        return _spread(self.initial_mean, noise) + _spread(self.initial_scale, noise) * noise

    def log_init(self, x: Tensor) -> Tensor:
        z = (x - _spread(self.initial_mean, x)) / _spread(self.initial_scale, x)
        return _log_normal(z) - _spread(self.initial_scale.log(), x).sum(-1)

    def sample_trans(self, x: Tensor, time: int, *, generator: Generators) -> Tensor:
        noise = normal(x.shape, generator, dtype=self.scale.dtype)
        return self.mean(x, time) + _spread(self.scale, x) * noise

    def log_trans(self, x: Tensor, x_next: Tensor, time: int) -> Tensor:
        z = (x_next - self.mean(x, time)) / _spread(self.scale, x)
        return _log_normal(z) - _spread(self.scale.log(), z).sum(-1)

    def log_obs(self, x: Tensor, observation: Tensor, time: int) -> Tensor:
        return self.log_observation(x, observation, time)

    def log_trans_sup(self, time: int) -> Tensor:
        return -self.scale.log().sum(-1) - 0.5 * self.scale.shape[-1] * _LOG_TWO_PI

    def whitened_mean(self, x: Tensor, time: int) -> Tensor:
        return self.mean(x, time) / _spread(self.scale, x)

    def whitened(self, x_next: Tensor, time: int) -> Tensor:
        return x_next / _spread(self.scale, x_next)


@dataclass(frozen=True)
class LinearGaussianModel:
    """X_0 ~ N(initial_mean, initial_covariance), X_t = A X_{t-1} + N(0, Q), Y_t = C X_t + N(0, V).

    transition A [d, d], transition_covariance Q [d, d], observation C [p, d], observation_covariance V [p, p]; each
    with a leading [R] where chains differ. Raises ConfigError for a covariance that is not positive definite.
    """

    transition: Tensor
    transition_covariance: Tensor
    observation: Tensor
    observation_covariance: Tensor
    initial_mean: Tensor
    initial_covariance: Tensor

    @classmethod
    def scalar(
        cls, coefficient: float | Tensor, transition_scale: float | Tensor, observation_scale: float | Tensor
    ) -> LinearGaussianModel:
        """A stationary autoregression in noise; numbers, or tensors [R] with a value for each chain.

        >>> LinearGaussianModel.scalar(0.0, 2.0, 1.0).initial_covariance
        tensor([[4.]], dtype=torch.float64)
        """
        given = [torch.as_tensor(value, dtype=torch.float64) for value in (coefficient, transition_scale)]
        noise = torch.as_tensor(observation_scale, dtype=torch.float64)
        matrix, scale, noise = (value[..., None, None] for value in (*given, noise))
        stationary = scale**2 / (1 - matrix**2)
        if not (bool((stationary > 0).all()) and bool(stationary.isfinite().all())):
            raise ConfigError("a stationary autoregression has a coefficient in (-1, 1) and a positive scale")
        one = torch.ones(1, 1, dtype=torch.float64, device=matrix.device)
        return cls(matrix, scale**2, one, noise**2, torch.zeros_like(stationary[..., 0]), stationary)

    @cached_property
    def _transition_root(self) -> Tensor:
        return _root(self.transition_covariance, "transition_covariance")

    @cached_property
    def _observation_root(self) -> Tensor:
        return _root(self.observation_covariance, "observation_covariance")

    @cached_property
    def _initial_root(self) -> Tensor:
        return _root(self.initial_covariance, "initial_covariance")

    @cached_property
    def _whitening(self) -> Tensor:
        return _inverse_root(self._transition_root)

    @cached_property
    def _whitened_transition(self) -> Tensor:
        return self._whitening @ self.transition

    @cached_property
    def _observation_whitening(self) -> Tensor:
        return _inverse_root(self._observation_root)

    @cached_property
    def _observation_peak(self) -> Tensor:
        return -_log_det(self._observation_root) - 0.5 * self.observation.shape[-2] * _LOG_TWO_PI

    @cached_property
    def _whitened_observation(self) -> Tensor:
        return self._observation_whitening @ self.observation

    def sample_init(self, shape: tuple[int, int], *, generator: Generators) -> Tensor:
        noise = normal((*shape, self.initial_mean.shape[-1]), generator, dtype=self.transition.dtype)
        return _spread(self.initial_mean, noise) + apply(self._initial_root, noise)

    def log_init(self, x: Tensor) -> Tensor:
        z = apply(_inverse_root(self._initial_root), x - _spread(self.initial_mean, x))
        return _log_normal(z) - _per_chain(_log_det(self._initial_root), z)

    def sample_trans(self, x: Tensor, time: int, *, generator: Generators) -> Tensor:
        noise = normal(x.shape, generator, dtype=self.transition.dtype)
        return apply(self.transition, x) + apply(self._transition_root, noise)

    def log_trans(self, x: Tensor, x_next: Tensor, time: int) -> Tensor:
        z = self.whitened(x_next, time) - self.whitened_mean(x, time)
        return _log_normal(z) - _per_chain(_log_det(self._transition_root), z)

    def log_obs(self, x: Tensor, observation: Tensor, time: int) -> Tensor:
        z = apply(self._observation_whitening, observation) - apply(self._whitened_observation, x)
        return _per_chain(self._observation_peak, z) - 0.5 * z.square().sum(-1)

    def log_trans_sup(self, time: int) -> Tensor:
        return -_log_det(self._transition_root) - 0.5 * self.transition.shape[-1] * _LOG_TWO_PI

    def whitened_mean(self, x: Tensor, time: int) -> Tensor:
        return apply(self._whitened_transition, x)

    def whitened(self, x_next: Tensor, time: int) -> Tensor:
        return apply(self._whitening, x_next)


class LinearGaussianProposal:
    """The locally optimal proposal of a linear Gaussian model: the law of X_t given x_{t-1} and y_t."""

    def __init__(self, model: LinearGaussianModel) -> None:
        self.model = model
        self._trans = _conditioned(model, model.transition_covariance)
        self._init = _conditioned(model, model.initial_covariance)

    def sample_init(self, shape: tuple[int, int], observation: Tensor, *, generator: Generators) -> Tensor:
        noise = normal((*shape, self.model.initial_mean.shape[-1]), generator, dtype=self.model.transition.dtype)
        return self._mean(_spread(self.model.initial_mean, noise), observation, self._init[0]) + apply(
            self._init[1], noise
        )

    def log_init(self, x: Tensor, observation: Tensor) -> Tensor:
        mean = self._mean(_spread(self.model.initial_mean, x), observation, self._init[0])
        return _log_gaussian(x - mean, self._init[1])

    def sample_trans(self, x: Tensor, observation: Tensor, time: int, *, generator: Generators) -> Tensor:
        noise = normal(x.shape, generator, dtype=self.model.transition.dtype)
        mean = self._mean(apply(self.model.transition, x), observation, self._trans[0])
        return mean + apply(self._trans[1], noise)

    def log_trans(self, x: Tensor, x_next: Tensor, observation: Tensor, time: int) -> Tensor:
        mean = self._mean(apply(self.model.transition, x), observation, self._trans[0])
        return _log_gaussian(x_next - mean, self._trans[1])

    def _mean(self, predicted: Tensor, observation: Tensor, gain: Tensor) -> Tensor:
        # A missing observation moves nothing; the proposal is then narrower than the model, and the weights say so.
        residual = observation - apply(self.model.observation, predicted)
        return predicted + apply(gain, residual.nan_to_num(nan=0.0))


@dataclass(frozen=True)
class FiniteModel:
    """A hidden Markov chain on S states; particles are the numbers of states, as floating-point [R, N, 1].

    log_initial [S], log_transition [S, S] (rows: from); log_emission(observation [..., p], time) -> [..., S].
    """

    log_initial: Tensor
    log_transition: Tensor
    log_emission: Callable[[Tensor, int], Tensor]

    def __post_init__(self) -> None:
        states = self.log_initial.shape[-1]
        if self.log_initial.ndim != 1 or self.log_transition.shape != (states, states):
            shapes = f"{tuple(self.log_initial.shape)} and {tuple(self.log_transition.shape)}"
            raise ShapeError(f"log_initial is [S] and log_transition [S, S], got {shapes}")

    def sample_init(self, shape: tuple[int, int], *, generator: Generators) -> Tensor:
        draws = uniform(shape, generator)
        return draw_index(self.log_initial.expand(shape[0], -1), draws).to(draws.dtype).unsqueeze(-1)

    def log_init(self, x: Tensor) -> Tensor:
        return self.log_initial[_state(x)]

    def sample_trans(self, x: Tensor, time: int, *, generator: Generators) -> Tensor:
        draws = uniform(x.shape, generator)
        return draw_index(self.log_transition[_state(x)], draws).to(x.dtype)

    def log_trans(self, x: Tensor, x_next: Tensor, time: int) -> Tensor:
        return self.log_transition[_state(x), _state(x_next)]

    def log_obs(self, x: Tensor, observation: Tensor, time: int) -> Tensor:
        table, state = self.log_emission(observation, time), _state(x)
        return table.expand(*state.shape, table.shape[-1]).gather(-1, state.unsqueeze(-1)).squeeze(-1)

    def log_trans_sup(self, time: int) -> Tensor:
        return self.log_transition.max()


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [m, d] or [R, m, d] on vectors x [R, ..., d]: [R, ..., m]."""
    if matrix.shape[-1] == matrix.shape[-2] == 1:
        return x * (matrix if matrix.ndim == 2 else matrix.view(-1, *[1] * (x.ndim - 1)))
    if matrix.ndim == 2:
        return x @ matrix.mT
    chains = max(len(matrix), len(x))
    flat = x.expand(chains, *x.shape[1:]).reshape(chains, -1, x.shape[-1])
    return (flat @ matrix.mT).reshape(chains, *x.shape[1:-1], matrix.shape[-2])


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [d], or one for each chain [R, d], in a shape that broadcasts against x [R, ..., d]."""
    return vector if vector.ndim == 1 else vector.reshape(vector.shape[0], *[1] * (x.ndim - 2), vector.shape[-1])


def _per_chain(value: Tensor, z: Tensor) -> Tensor:
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (z.ndim - 2))


def _root(covariance: Tensor, name: str) -> Tensor:
    if covariance.shape[-2:] == (1, 1):
        if not bool((covariance > 0).all()):
            raise ConfigError(f"{name} must be positive definite")
        return covariance.sqrt()
    root, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        raise ConfigError(f"{name} must be positive definite: add a little noise to every direction")
    return root


def _inverse_root(root: Tensor) -> Tensor:
    if root.shape[-2:] == (1, 1):
        return 1.0 / root
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)


def _log_det(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * _LOG_TWO_PI)


def _log_gaussian(x: Tensor, root: Tensor) -> Tensor:
    z = apply(_inverse_root(root), x)
    return _log_normal(z) - _per_chain(_log_det(root), z)


def _conditioned(model: LinearGaussianModel, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The gain, and the root of the covariance of the state given its observation."""
    seen = model.observation @ covariance
    spread = seen @ model.observation.mT + model.observation_covariance
    gain = torch.linalg.solve(spread, seen).mT
    left = covariance - gain @ seen
    return gain, _root((left + left.mT) / 2, "the covariance of the proposal")


def _state(x: Tensor) -> Tensor:
    return x[..., 0].long()
