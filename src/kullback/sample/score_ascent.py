"""Learning the parameters of state-space models: score ascent, Markovian score climbing and stochastic EM.

By Fisher's identity the score is a smoothed additive statistic,

    grad log p_theta(y_{0:T}) = E[ grad log chi g_0 + sum_t grad log m_t(X_{t-1}, X_t) g_t(X_t) | y_{0:T} ],

which PPG estimates from a few sweeps whose held path is kept from one parameter to the next: as the parameters settle
the bias of the start is forgotten, while that of PaRIS stays and moves the fixed point. No derivative goes through the
sampling. Source: Cardoso et al. 2023 (arXiv 2301.00900), section on learning; Naesseth, Lindsten and Blei 2020 for
Markovian score climbing; Delyon, Lavielle and Moulines 1999 for stochastic approximation EM.

Shapes: R chains, T + 1 times, P coordinates of all parameters together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.backward import BackwardMethod
from kullback.sample.draws import Generators
from kullback.sample.exact_smoothing import sequence_rows
from kullback.sample.paris import Pair, Smoother, as_statistic, weighted_mean
from kullback.sample.ppg import History, backward_paths, draw_last, forward_pass, initial_path, ppg, ppg_rollout, trace
from kullback.sample.state_space import AdditiveStatistic, StateSpaceModel, log_joint, observed_log_density

__all__ = ["Learned", "score_ascent", "score_statistic", "stochastic_em"]

Parameters: TypeAlias = Mapping[str, Tensor]
ModelOf: TypeAlias = Callable[[Parameters], StateSpaceModel]
Method: TypeAlias = Literal["ppg", "paris", "climbing"]
Gradient: TypeAlias = Literal["carried", "paths"]


class Learned(NamedTuple):
    """Final parameters, and the held path [R, T+1, d] to go on from (None with plain PaRIS)."""

    parameters: dict[str, Tensor]
    path: Tensor | None


def score_statistic(model_of: ModelOf, parameters: Parameters, *, per_chain: bool = False) -> AdditiveStatistic:
    """The additive statistic whose smoothed mean is the score of `parameters`: values [..., P].

    model_of(parameters) builds the model by operations that torch differentiates. per_chain: the first dimension of
    each parameter is that of the chains, and P counts the others. Coordinates in the order of the mapping.
    """
    frozen = {name: value.detach() for name, value in parameters.items()}
    directions = _directions(frozen, per_chain)

    def derivative(log_density: Callable[[StateSpaceModel], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaves = {name: value.clone().requires_grad_() for name, value in frozen.items()}
            return _along(log_density(model_of(leaves)), list(leaves.values()), directions)

    def pair(x: Tensor, x_next: Tensor, observation: Tensor, time: int) -> Tensor:
        return derivative(
            lambda model: model.log_trans(x, x_next, time) + observed_log_density(model, x_next, observation, time)
        )

    def initial(x: Tensor, observation: Tensor) -> Tensor:
        return derivative(lambda model: model.log_init(x) + observed_log_density(model, x, observation, 0))

    return AdditiveStatistic(pair, initial)


def _along(values: Tensor, leaves: list[Tensor], directions: list[list[Tensor]]) -> Tensor:
    """Derivatives of every entry of `values` along each direction: [..., P].

    A backward derivative is linear in the weights of the entries, and its derivative by them is the forward one.
    """
    if not values.requires_grad:  # a density in which no parameter occurs
        return values.new_zeros(*values.shape, len(directions))
    weights = torch.ones_like(values, requires_grad=True)
    slopes = torch.autograd.grad(values, leaves, weights, create_graph=True, materialize_grads=True)
    parts = []
    for direction in directions:
        total = torch.stack([(slope * part).sum() for slope, part in zip(slopes, direction)]).sum()
        used = total.requires_grad  # not where this parameter does not occur
        parts.append(torch.autograd.grad(total, weights, retain_graph=True)[0] if used else torch.zeros_like(values))
    return torch.stack(parts, dim=-1)


def _directions(parameters: Parameters, per_chain: bool) -> list[list[Tensor]]:
    """The coordinate directions of all parameters together, the same for every chain where they have their own."""
    directions = []
    for name, value in parameters.items():
        size = value[0].numel() if per_chain else value.numel()
        for index in range(size):
            direction = {other: torch.zeros_like(tensor) for other, tensor in parameters.items()}
            direction[name].view(len(value) if per_chain else 1, size)[:, index] = 1.0
            directions.append(list(direction.values()))
    return directions


def score_ascent(
    model_of: ModelOf,
    parameters: Parameters,
    observations: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    num_particles: int,
    num_steps: int,
    num_sweeps: int = 1,
    burn_in: int = 0,
    num_backward: int = 2,
    method: Method = "ppg",
    gradient: Gradient = "carried",
    statistic_of: Callable[[Parameters], AdditiveStatistic | Pair] | None = None,
    backward: BackwardMethod = "auto",
    per_chain: bool = False,
    scheduler: Any = None,
    path: Tensor | None = None,
    chains: int | None = None,
    generator: Generators,
    listen: Callable[[int, Parameters], None] | None = None,
) -> Learned:
    """Climb log p_theta(y) by `num_steps` steps of a torch optimizer over the tensors in `parameters`, in place.

    Each step runs num_sweeps sweeps at the current parameters from the path of the step before, and averages those
    after burn_in. The gradient is that of the mean over chains or sequences; per_chain: parameters [R, ...] of R
    learners side by side, each with its own. scheduler: anything with step(). listen(step, parameters): after each.
    method: "ppg"; "paris", plain and biased; "climbing", the score of the one path drawn (Markovian score climbing).
    gradient: "carried" takes P forward derivatives along with the particles, for few parameters; "paths" takes one
    backward derivative along the N backward paths, for many: then model_of may return a module whose parameters they
    are. statistic_of(parameters): the score's statistic where it is known in closed form.
    Raises ConfigError for options that do not fit, and what the smoothers raise.
    """
    _check(optimizer, method, gradient, num_sweeps, burn_in, statistic_of)
    rows = sequence_rows(observations)
    learner = _Learner(model_of, parameters, rows, num_particles, num_backward, backward, per_chain, statistic_of)
    single = method == "climbing"
    path = initial_path(learner.smoother(False), rows, path, chains, generator) if method != "paris" else None
    count = len(path) if path is not None else (chains or len(rows[0]))
    for step in range(num_steps):
        optimizer.zero_grad()
        for sweep in range(num_sweeps):
            carried = gradient == "carried" and not single
            smoother = learner.smoother(carried)
            with torch.no_grad():
                history = forward_pass(smoother, rows, count, generator, frozen=path)
                if path is not None:
                    path = backward_paths(smoother, history, draw_last(history, generator), generator).squeeze(1)
            if sweep >= burn_in:
                share = 1.0 / (num_sweeps - burn_in)
                learner.accumulate(history, path if single else None, carried, share)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if listen is not None:
            listen(step, parameters)
    return Learned({name: value.detach() for name, value in parameters.items()}, path)


def _check(optimizer, method: str, gradient: str, num_sweeps: int, burn_in: int, statistic_of: Any) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"method is one of {', '.join(get_args(Method))}, not {method!r}")
    if gradient not in get_args(Gradient):
        raise ConfigError(f"gradient is one of {', '.join(get_args(Gradient))}, not {gradient!r}")
    if method == "climbing" and gradient == "paths":
        raise ConfigError('climbing always takes the derivative along its one path: leave gradient="carried" out')
    if statistic_of is not None and (gradient == "paths" or method == "climbing"):
        raise ConfigError(
            "statistic_of is carried with the particles, and here derivatives go along paths: leave it out"
        )
    if not 0 <= burn_in < num_sweeps:
        raise ConfigError(f"burn_in is less than num_sweeps and not negative, got {burn_in} of {num_sweeps}")
    if method == "paris" and burn_in:
        raise ConfigError("plain PaRIS has no chain to burn in: set burn_in=0")
    if not optimizer.defaults.get("maximize", False):
        raise ConfigError("score ascent climbs the likelihood: build the optimizer with maximize=True")


class _Learner:
    """What one step of score ascent needs, whatever the method."""

    def __init__(self, model_of, parameters, rows, num_particles, num_backward, backward, per_chain, statistic_of):
        self.model_of, self.parameters, self.rows = model_of, parameters, rows
        self.num_particles, self.num_backward, self.backward = num_particles, num_backward, backward
        self.per_chain = per_chain
        self.statistic_of = statistic_of or partial(score_statistic, model_of, per_chain=per_chain)

    def smoother(self, carried: bool) -> Smoother:
        """A smoother at the current parameters; without statistics, one backward draw is enough for a path."""
        statistic = as_statistic(self.statistic_of(self.parameters) if carried else _nothing)
        draws = self.num_backward if carried else 1
        return Smoother(self.model_of(self.parameters), statistic, self.num_particles, draws, self.backward)

    def accumulate(self, history: History, path: Tensor | None, carried: bool, share: float) -> None:
        """Add `share` of a sweep's score to the gradients of the parameters."""
        if carried:
            score = weighted_mean(history.log_weights[-1], history.statistic)
            self._add(share * (score if self.per_chain else score.mean(0)))
            return
        if path is None:
            chains, size = history.log_weights[-1].shape
            last = torch.arange(size, device=history.log_weights[-1].device).expand(chains, -1)
            pointers = [index for index in history.indices if index is not None]
            paths, weights = trace(history.particles, pointers, last), history.log_weights[-1].exp()
        else:
            paths, weights = path.unsqueeze(1), torch.ones(len(path), 1, dtype=path.dtype, device=path.device)
        value = (weights * log_joint(self.model_of(self.parameters), paths, self.rows)).sum(1)
        (share * (value.sum() if self.per_chain else value.mean())).backward()

    def _add(self, score: Tensor) -> None:
        """A score [R, P] or [P], cut up over the parameters."""
        sizes = [value.numel() // (len(value) if self.per_chain else 1) for value in self.parameters.values()]
        if sum(sizes) != score.shape[-1]:
            raise ConfigError(
                f"the statistic has {score.shape[-1]} entries and the parameters {sum(sizes)} coordinates"
            )
        for value, part in zip(self.parameters.values(), score.split(sizes, dim=-1)):
            part = part.reshape(value.shape).to(value.dtype)
            value.grad = part.clone() if value.grad is None else value.grad + part


def _nothing(x: Tensor, x_next: Tensor, observation: Tensor, time: int) -> Tensor:
    return x.new_zeros(1, 1, 1, 1)


def stochastic_em(
    model_of: ModelOf,
    maximize: Callable[[Tensor], Parameters],
    statistic: AdditiveStatistic | Pair,
    parameters: Parameters,
    observations: Tensor,
    *,
    num_particles: int,
    num_steps: int,
    num_sweeps: int = 1,
    num_backward: int = 2,
    step_size: Callable[[int], float] = lambda step: (step + 1) ** -0.6,
    path: Tensor | None = None,
    chains: int | None = None,
    generator: Generators,
    listen: Callable[[int, Parameters], None] | None = None,
) -> Learned:
    """EM with PPG for the E-step, and stochastic approximation of the expected statistics S [R, K].

    S moves by step_size(step) towards the estimate of each step, and maximize(S) gives the next parameters in closed
    form. The first step size must be 1, since there is nothing to average with before it; ConfigError if it is not.
    """
    if step_size(0) != 1.0:
        raise ConfigError(f"step_size(0) is 1, as there are no earlier statistics to keep, and not {step_size(0)}")
    mean: Tensor | None = None
    for step in range(num_steps):
        kernel = ppg(
            model_of(parameters), statistic, observations, num_particles=num_particles, num_backward=num_backward
        )
        state = kernel.init(path, generator=generator, chains=chains)
        rollout = ppg_rollout(kernel, num_sweeps, generator=generator, state=state)
        path, rate = rollout.state.path, step_size(step)
        mean = rollout.mean if mean is None else mean + rate * (rollout.mean - mean)
        parameters = maximize(mean)
        if listen is not None:
            listen(step, parameters)
    return Learned(dict(parameters), path)
