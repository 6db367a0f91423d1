r"""Evidence and posterior samples without a table: the prior is sampled, its samples are weighted, moved, and kept.

    importance      log mean exp(r / b) over samples of the prior; unbiased for Z, low for log Z in the mean
    annealed        sequential Monte Carlo over s from 0 to 1 / b: weigh by exp((s' - s) r), resample where weights have
                    grown unequal, move
    thermodynamic   log Z = integral of E_{p_s} r ds from 0 to 1 / b, along the same path, by Simpson's rule
    rejection       keep x with probability exp((r - r_max) / b): exact
    resampling      importance weights, then multinomial draws (SIR)
    metropolis      a chain of proposals reversible under the prior, accepted with min(1, exp((r' - r) / b))

A move that is reversible under the prior leaves p_s in place when it is so accepted. For sequences `suffix_move` draws
a random suffix anew, which in a far posterior leaves the first tokens where they are, since all that follow them would
have to be good again; `token_move` draws single tokens anew and keeps the others, and goes there.

Shapes: n samples x [n, ...]; rewards [n]; nats. Source: arXiv 2205.11275 and the samplers' own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.fkc import systematic_resample

__all__ = [
    "Evidence",
    "PosteriorSamples",
    "PriorSampler",
    "log_evidence",
    "posterior_sample",
    "suffix_move",
    "token_move",
]

_EVEN = 0.5  # resample when the effective size is below this share of the samples

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


def token_move(log_laws: Callable[[Tensor], Tensor], *, tokens: int = 1) -> Move:
    """The move that draws `tokens` tokens anew, at places of each row's own, and keeps the others; for x [n, T].

    log_laws: from x to log a(. | tokens before) at every place [n, T, V], one forward of a model; a move takes two.
    Proposals come from the laws before the move, and are accepted as Metropolis and Hastings do, by
    a(x') q(x | x') / a(x) q(x' | x): reversible under the prior a. Raises ConfigError, ShapeError.
    """
    if tokens < 1:
        raise ConfigError(f"a move draws a token at least, got {tokens}")

    def move(x: Tensor, generator: torch.Generator) -> Tensor:
        if x.ndim != 2 or x.shape[1] < tokens:
            raise ShapeError(f"x is [n, T] with {tokens} tokens at least, got {tuple(x.shape)}")
        before = log_laws(x)
        places = torch.rand(x.shape, generator=generator, device=x.device).topk(tokens).indices
        chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, places, True)
        drawn = torch.multinomial(before[chosen].exp(), 1, generator=generator).squeeze(1)
        proposed = x.masked_scatter(chosen, drawn)
        after = log_laws(proposed)
        old, new = (laws.gather(2, y.unsqueeze(2)).squeeze(2) for laws, y in ((before, x), (after, proposed)))
        back, forth = (laws.gather(2, y.unsqueeze(2)).squeeze(2) for laws, y in ((after, x), (before, proposed)))
        ratio = (new - old).sum(1) + torch.where(chosen, back - forth, 0.0).sum(1)
        taken = torch.rand(len(x), generator=generator, device=x.device) < ratio.exp()
        return torch.where(taken.unsqueeze(1), proposed, x)

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

    Their calls of the prior are count (1 + moves temperatures), times what a move takes. The standard error takes moves
    to forget where they came from: with too few of them, or with moves that go nowhere, it is too small.
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
    if count < 2:
        raise ConfigError(f"annealing carries two samples at least, got {count}")
    x = problem.sample(count, generator)
    rewards = problem.rewards(x)
    step, value, variance, smallest, taken = 1.0 / (beta * temperatures), 0.0, 0.0, float(count), 0.0
    means, errors = [rewards.mean().item()], [rewards.std().item() / math.sqrt(count)]
    scores = torch.zeros(count, dtype=torch.float64)  # log-weights since the last resampling
    for number in range(1, temperatures + 1):
        scores = scores + step * rewards
        size = _effective_size(scores)
        smallest = min(smallest, size)
        if size < _EVEN * count or number == temperatures:
            value += (scores.logsumexp(0) - math.log(count)).item()
            variance += _error_of_log_mean(scores) ** 2
            places = systematic_resample(scores.unsqueeze(0), generator=generator)[0]
            x, rewards, scores = x[places], rewards[places], torch.zeros_like(scores)
        for _ in range(moves):
            x, rewards, share = _metropolis(problem, x, rewards, number * step, generator)
            taken += share / (moves * temperatures)
        weights = scores.softmax(0)
        mean = weights @ rewards
        means.append(mean.item())
        errors.append((weights.square() @ (rewards - mean).square()).sqrt().item())
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
