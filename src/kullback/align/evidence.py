r"""Evidence and posterior samples without a table: the prior is sampled, its samples are weighted, moved, and kept.

    importance      log mean exp(r / b) over samples of the prior; unbiased for Z, low for log Z in the mean
    annealed        sequential Monte Carlo over s from 0 to 1 / b: weigh by exp((s' - s) r), resample, move
    thermodynamic   log Z = integral of E_{p_s} r ds from 0 to 1 / b, along the same path, by Simpson's rule
    rejection       keep x with probability exp((r - r_max) / b): exact
    resampling      importance weights, then multinomial draws (SIR)
    metropolis      a chain of proposals reversible under the prior, accepted with min(1, exp((r' - r) / b))

A move that is reversible under the prior, such as sampling a random suffix anew, leaves p_s in place when it is so
accepted. Shapes: n samples x [n, ...]; rewards [n]; nats. Source: arXiv 2205.11275 and the samplers' own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError

__all__ = ["Evidence", "PosteriorSamples", "PriorSampler", "log_evidence", "posterior_sample", "suffix_move"]

Draw = Callable[[int, torch.Generator], Tensor]
Move = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class PriorSampler:
    """What is known of a problem: sample(n, generator) -> x of the prior, reward(x) -> [n], and where there is one
    move(x, generator) -> x', reversible under the prior; without one proposals are fresh samples.
    """

    sample: Draw
    reward: Callable[[Tensor], Tensor]
    move: Move | None = None

    def rewards(self, x: Tensor) -> Tensor:
        """Rewards [n] in float64. Raises DataError where one is NaN or infinite, or there are too few."""
        found = self.reward(x).detach().double()
        if found.shape != x.shape[:1] or not found.isfinite().all():
            raise DataError(f"the reward gives a finite number for each of {len(x)} samples, got {tuple(found.shape)}")
        return found

    def proposal(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A proposal for each of x."""
        return self.sample(len(x), generator) if self.move is None else self.move(x, generator)


class Evidence(NamedTuple):
    """log_evidence with its standard error, and the effective sample size of the weights behind it (the smallest)."""

    log_evidence: float
    standard_error: float
    effective_size: float


class PosteriorSamples(NamedTuple):
    """x [m, ...], their log_weights [m] (equal but for "importance"), the acceptance rate, the effective size."""

    x: Tensor
    log_weights: Tensor
    acceptance: float
    effective_size: float


def suffix_move(length: int, regenerate: Callable[[Tensor, int, torch.Generator], Tensor]) -> Move:
    """The move that keeps a random number of first tokens and samples the rest anew from the prior; for x [n, length].

    regenerate(x, kept, generator) gives x with the tokens from `kept` on drawn given those before.
    """
    if length < 1:
        raise ConfigError(f"sequences have a token at least, got {length}")

    def move(x: Tensor, generator: torch.Generator) -> Tensor:
        kept = int(torch.randint(length, (), generator=generator))
        return regenerate(x, kept, generator)

    return move


def log_evidence(
    problem: PriorSampler,
    count: int,
    *,
    beta: float,
    generator: torch.Generator,
    method: Literal["importance", "annealed", "thermodynamic"] = "importance",
    temperatures: int = 16,
    moves: int = 2,
) -> Evidence:
    """log Z from `count` samples; annealed and thermodynamic take as many at each temperature, with `moves` each.

    Warns when the effective size is below a hundredth of the samples. Raises ConfigError, DataError.
    """
    _check(count, beta, temperatures, moves)
    if method == "importance":
        scores = problem.rewards(problem.sample(count, generator)) / beta
        size = _effective_size(scores)
        value = (scores.logsumexp(0) - math.log(count)).item()
        found = Evidence(value, _error_of_log_mean(scores), size)
    elif method in ("annealed", "thermodynamic"):
        if method == "thermodynamic" and temperatures % 2:
            raise ConfigError(f"Simpson's rule takes an even number of temperatures, got {temperatures}")
        path = _anneal(problem, count, beta, generator, temperatures, moves)
        found = path.evidence if method == "annealed" else _thermodynamic(path, beta)
    else:
        raise ConfigError(f"method is importance, annealed or thermodynamic, not {method!r}")
    if found.effective_size < 0.01 * count:
        warnings.warn(
            f"the evidence rests on {found.effective_size:.1f} of {count} samples: take method='annealed', or more",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def posterior_sample(
    problem: PriorSampler,
    count: int,
    *,
    beta: float,
    generator: torch.Generator,
    method: Literal["rejection", "resampling", "metropolis", "annealed"] = "resampling",
    largest_reward: float | None = None,
    steps: int = 100,
    temperatures: int = 16,
    moves: int = 2,
) -> PosteriorSamples:
    """Samples of p*: of `count` drawn those kept ("rejection", exact), or as many as drawn.

    largest_reward: a bound of the reward, for rejection; steps: of the `count` chains of "metropolis". Raises
    ConfigError for rejection without a bound, DataError for a reward above it.
    """
    _check(count, beta, temperatures, moves)
    if method == "annealed":
        path = _anneal(problem, count, beta, generator, temperatures, moves)
        zeros = torch.zeros(count, dtype=torch.float64)
        return PosteriorSamples(path.x, zeros, path.acceptance, path.evidence.effective_size)
    x = problem.sample(count, generator)
    rewards = problem.rewards(x)
    if method == "rejection":
        return _rejection(x, rewards, beta, largest_reward, generator)
    if method == "resampling":
        scores = rewards / beta
        places = torch.multinomial(scores.softmax(0), count, replacement=True, generator=generator)
        zeros = torch.zeros(count, dtype=torch.float64)
        return PosteriorSamples(x[places], zeros, 1.0, _effective_size(scores))
    if method != "metropolis":
        raise ConfigError(f"method is rejection, resampling, metropolis or annealed, not {method!r}")
    taken = 0.0
    for _ in range(steps):
        x, rewards, share = _metropolis(problem, x, rewards, 1.0 / beta, generator)
        taken += share / steps
    return PosteriorSamples(x, torch.zeros(count, dtype=torch.float64), taken, float(count))


def _rejection(
    x: Tensor, rewards: Tensor, beta: float, largest: float | None, generator: torch.Generator
) -> PosteriorSamples:
    if largest is None or not math.isfinite(largest):
        raise ConfigError("rejection needs a bound of the reward: give largest_reward, or take another method")
    if (rewards > largest).any():
        raise DataError(f"a reward of {rewards.max():g} is above the bound {largest:g}: rejection would not be exact")
    chance = ((rewards - largest) / beta).exp()
    kept = torch.rand(len(x), generator=generator, dtype=torch.float64) < chance
    zeros = torch.zeros(int(kept.sum()), dtype=torch.float64)
    return PosteriorSamples(x[kept], zeros, kept.double().mean().item(), float(kept.sum()))


class _Path(NamedTuple):
    x: Tensor
    evidence: Evidence
    acceptance: float
    means: list[float]
    errors: list[float]


def _anneal(
    problem: PriorSampler, count: int, beta: float, generator: torch.Generator, temperatures: int, moves: int
) -> _Path:
    """Samples carried from the prior to the posterior in equal steps of 1 / b."""
    x = problem.sample(count, generator)
    rewards = problem.rewards(x)
    step, value, variance, smallest, taken = 1.0 / (beta * temperatures), 0.0, 0.0, float(count), 0.0
    means, errors = [rewards.mean().item()], [rewards.std().item() / math.sqrt(count)]
    for number in range(1, temperatures + 1):
        scores = step * rewards
        value += (scores.logsumexp(0) - math.log(count)).item()
        variance += _error_of_log_mean(scores) ** 2
        smallest = min(smallest, _effective_size(scores))
        places = _systematic(scores.softmax(0), generator)
        x, rewards = x[places], rewards[places]
        for _ in range(moves):
            x, rewards, share = _metropolis(problem, x, rewards, number * step, generator)
            taken += share / (moves * temperatures)
        means.append(rewards.mean().item())
        errors.append(rewards.std().item() / math.sqrt(count))
    return _Path(x, Evidence(value, math.sqrt(variance), smallest), taken, means, errors)


def _thermodynamic(path: _Path, beta: float) -> Evidence:
    """Simpson's rule over the mean rewards along the path."""
    count = len(path.means) - 1
    weights = [1.0 if place in (0, count) else 4.0 if place % 2 else 2.0 for place in range(count + 1)]
    scale = 1.0 / (3.0 * beta * count)
    value = scale * sum(weight * mean for weight, mean in zip(weights, path.means, strict=True))
    error = scale * math.sqrt(sum((w * e) ** 2 for w, e in zip(weights, path.errors, strict=True)))
    return Evidence(value, error, path.evidence.effective_size)


def _metropolis(
    problem: PriorSampler, x: Tensor, rewards: Tensor, inverse: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    proposed = problem.proposal(x, generator)
    found = problem.rewards(proposed)
    chance = (inverse * (found - rewards)).clamp(max=0.0).exp()
    taken = torch.rand(len(x), generator=generator, dtype=torch.float64) < chance
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.where(taken.view(shape), proposed, x), torch.where(taken, found, rewards), taken.double().mean().item()


def _systematic(shares: Tensor, generator: torch.Generator) -> Tensor:
    """One place for each sample, in proportion to shares [n], with evenly spaced quantiles."""
    count = len(shares)
    shift = torch.rand((), generator=generator, dtype=torch.float64)
    quantiles = (torch.arange(count, dtype=torch.float64) + shift) / count
    return torch.searchsorted(shares.cumsum(0), quantiles).clamp(max=count - 1)


def _effective_size(scores: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights exp(scores)."""
    return (2.0 * scores.logsumexp(0) - (2.0 * scores).logsumexp(0)).exp().item()


def _error_of_log_mean(scores: Tensor) -> float:
    """The standard error of log mean exp(scores), to first order."""
    if len(scores) < 2:
        return math.inf
    weights = (scores - scores.max()).exp()
    return (weights.std() / weights.mean()).item() / math.sqrt(len(scores))


def _check(count: int, beta: float, temperatures: int, moves: int) -> None:
    if count < 1 or temperatures < 1 or moves < 0:
        raise ConfigError(f"count and temperatures are 1 or more, moves 0 or more: {count}, {temperatures}, {moves}")
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
