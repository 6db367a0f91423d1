"""Swarms of samples carried from the prior to the posterior in one batch, and what they say together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.align._moves import PriorSampler, Walkers
from kullback.core.errors import ConfigError
from kullback.sample.fkc import systematic_resample

__all__ = ["Path", "Schedule", "anneal", "effective_size", "error_of_log_mean", "jackknife_log_mean", "next_inverse"]

_EVEN = 0.5  # resample when the effective size is below this share of the samples


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of 1 / b from 0 on: `temperatures` equal ones, or with `adaptive` such that each step's conditional
    effective size is that share of the samples; after each so many `moves`, of which every state stays a sample with
    `recycle`. Raises ConfigError.
    """

    temperatures: int
    moves: int
    adaptive: float | None = None
    recycle: bool = False

    def __post_init__(self) -> None:
        if self.temperatures < 1 or self.moves < 0:
            raise ConfigError(f"temperatures are 1 or more, moves 0 or more: {self.temperatures}, {self.moves}")
        if self.adaptive is not None and not 0.0 < self.adaptive < 1.0:
            raise ConfigError(f"adaptive is a share of the samples, between 0 and 1, got {self.adaptive}")

    def next(self, number: int, now: Tensor, beta: float, scores: Tensor, rewards: Tensor) -> Tensor:
        """Each swarm's inverse temperature [S] at step `number`, from 1 on, after `now` [S]; scores, rewards [S, n]."""
        if self.adaptive is not None:
            return next_inverse(scores, rewards, now=now, last=1.0 / beta, share=self.adaptive)
        return torch.full_like(now, 1.0 / beta if number == self.temperatures else number / (beta * self.temperatures))


class Path(NamedTuple):
    """Of one swarm: the samples at the end, log Z with its error inside the swarm, the smallest effective size, the
    share of moves taken, the calls of the prior; and by step the inverse temperatures and the mean rewards, their
    errors, variances.
    """

    x: Tensor
    log_evidence: float
    error: float
    effective_size: float
    acceptance: float
    calls: int
    inverses: list[float]
    means: list[float]
    errors: list[float]
    variances: list[float]


def next_inverse(scores: Tensor, rewards: Tensor, *, now: float | Tensor, last: float, share: float) -> Tensor:
    """The s in (now, last] at which n (sum W w)^2 / sum W w^2 is share n, by bisection; last where it stays above.

    W: weights exp(scores) [..., n] carried until now [...], normalised; w = exp((s - now) r).
    """
    logs = scores.log_softmax(-1)
    start = torch.as_tensor(now, dtype=logs.dtype, device=logs.device).expand(logs.shape[:-1])

    def kept(inverse: Tensor) -> Tensor:
        steps = (inverse - start).unsqueeze(-1) * rewards
        return (2.0 * (logs + steps).logsumexp(-1) - (logs + 2.0 * steps).logsumexp(-1)).exp()

    low, high = start, torch.full_like(start, last)
    near = kept(high) >= share
    for _ in range(0 if bool(near.all()) else 60):
        middle = 0.5 * (low + high)
        above = kept(middle) >= share
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(near, last, high)


@dataclass
class _Record:
    """What one swarm has met until now."""

    value: float = 0.0
    variance: float = 0.0
    smallest: float = math.inf
    taken: float = 0.0
    steps: int = 0
    calls: int = 0
    history: list[tuple[float, float, float, float]] = field(default_factory=list)

    def path(self, x: Tensor) -> Path:
        inverses, means, errors, variances = (list(part) for part in zip(*self.history, strict=True))
        share, error = self.taken / max(self.steps, 1), math.sqrt(self.variance)
        return Path(
            x, self.value, error, self.smallest, share, self.calls, inverses, means, errors, variances
        )  # fmt: skip


class _Swarms:
    """The swarms of `count` samples that are still on their way, in one batch, each at an inverse temperature of its
    own; the paths of those that have come to the end.
    """

    def __init__(self, problem: PriorSampler, count: int, swarms: int, generator: torch.Generator) -> None:
        self.walkers = Walkers(problem, swarms * count, generator)
        self.count, self.generator = count, generator
        self.open = list(range(swarms))
        self.records = [_Record(smallest=float(count), calls=count) for _ in range(swarms)]
        self.paths: dict[int, Path] = {}
        self.inverse = torch.zeros(swarms, dtype=torch.float64, device=self.walkers.rewards.device)
        self.note(torch.zeros_like(self.rewards))

    @property
    def rewards(self) -> Tensor:
        """[S, n]."""
        return self.walkers.rewards.view(len(self.open), -1)

    def note(self, scores: Tensor) -> None:
        """Writes down where each swarm is: the moments of its rewards under weights exp(scores)."""
        found = torch.stack([self.inverse, *_moments(scores, self.rewards)], 1).tolist()
        for number, values in zip(self.open, found, strict=True):
            self.records[number].history.append(tuple(values))

    def weigh(self, scores: Tensor, which: Tensor) -> None:
        """Adds the log of the mean weight [S, n] of the swarms `which` [S] to their evidence."""
        values = (scores.logsumexp(1) - math.log(scores.shape[1])).tolist()
        errors, sizes = error_of_log_mean(scores).tolist(), effective_size(scores).tolist()
        for place, (number, chosen) in enumerate(zip(self.open, which.tolist(), strict=True)):
            record = self.records[number]
            record.smallest = min(record.smallest, sizes[place])
            if chosen:
                record.value += values[place]
                record.variance += errors[place] ** 2

    def keep(self, places: Tensor) -> None:
        """Goes on with the samples at places [S, m] of each swarm's own."""
        begin = torch.arange(len(places), device=places.device).unsqueeze(1) * self.rewards.shape[1]
        self.walkers.keep((places + begin).flatten())

    def step(self) -> None:
        """A move of all, each at its swarm's temperature."""
        rows = self.rewards.shape[1]
        taken = self.walkers.step(self.inverse.repeat_interleave(rows), self.generator)
        shares = taken.view(-1, rows).double().mean(1).tolist()
        calls = self.walkers.asked.view(-1, rows).sum(1).tolist()
        for number, share, asked in zip(self.open, shares, calls, strict=True):
            record = self.records[number]
            record.taken, record.steps, record.calls = record.taken + share, record.steps + 1, record.calls + asked

    def end(self, ended: Tensor) -> Tensor:
        """Takes the swarms `ended` [S] out of the batch; the places of the others, [S']."""
        for place, rows in enumerate(self.walkers.x.view(len(self.open), self.count, *self.walkers.x.shape[1:])):
            if ended[place]:
                self.paths[self.open[place]] = self.records[self.open[place]].path(rows)
        left = (~ended).nonzero().squeeze(1)
        places = torch.arange(len(self.walkers.x), device=left.device).view(len(self.open), -1)[left]
        self.walkers.keep(places.flatten())
        self.open, self.inverse = [self.open[place] for place in left.tolist()], self.inverse[left]
        return left


def anneal(
    problem: PriorSampler, count: int, beta: float, generator: torch.Generator, schedule: Schedule, *, swarms: int = 1
) -> list[Path]:
    """Independent swarms of `count` samples from 1 / b = 0 on, in one batch; each is resampled at the end, and before
    where its weights are unequal.
    """
    if count < 2:
        raise ConfigError(f"annealing carries two samples in a swarm at least, got {count}")
    if schedule.recycle:
        return _recycled(problem, count, beta, generator, schedule, swarms)
    found = _Swarms(problem, count, swarms, generator)
    scores, number = torch.zeros_like(found.rewards), 0  # log-weights since the last resampling
    while found.open:
        number += 1
        inverse = schedule.next(number, found.inverse, beta, scores, found.rewards)
        scores = scores + (inverse - found.inverse).unsqueeze(1) * found.rewards
        found.inverse, ended = inverse, inverse >= 1.0 / beta
        uneven = ended | (effective_size(scores) < _EVEN * count)
        found.weigh(scores, uneven)
        if bool(uneven.any()):
            places = torch.arange(count, device=scores.device).repeat(len(scores), 1)
            places[uneven] = systematic_resample(scores[uneven], generator=generator).to(places.device)
            found.keep(places)
            scores[uneven] = 0.0
        for _ in range(schedule.moves):
            found.step()
        found.note(scores)
        if bool(ended.any()):
            scores = scores[found.end(ended)]
    return [found.paths[place] for place in range(swarms)]


def _recycled(
    problem: PriorSampler, count: int, beta: float, generator: torch.Generator, schedule: Schedule, swarms: int
) -> list[Path]:
    """As `anneal`, but a few of the samples go on at each step, and all that they pass through are the next samples."""
    parts = schedule.moves + 1
    if parts < 2 or count % parts:
        raise ConfigError(f"recycling takes samples in multiples of 1 + moves, got {count} and {schedule.moves} moves")
    found, number = _Swarms(problem, count, swarms, generator), 0
    while found.open:
        number += 1
        inverse = schedule.next(number, found.inverse, beta, torch.zeros_like(found.rewards), found.rewards)
        scores = (inverse - found.inverse).unsqueeze(1) * found.rewards
        found.inverse, ended = inverse, inverse >= 1.0 / beta
        found.weigh(scores, torch.ones_like(ended))
        found.note(scores)
        places = systematic_resample(scores, generator=generator).to(scores.device)
        if bool(ended.any()):
            places = _ended(found, places, ended)
        if not found.open:
            break
        # Of a systematic sample in order each (moves + 1)-th, from a random one on, is a systematic one of fewer.
        first = torch.randint(parts, (len(places), 1), generator=generator, device=generator.device).to(places.device)
        found.walkers.laws = None  # those of the last move, not of what was passed through
        found.keep(places.gather(1, first + torch.arange(0, count, parts, device=places.device)))
        passed = [(found.walkers.x, found.walkers.rewards)]
        for _ in range(schedule.moves):
            found.step()
            passed.append((found.walkers.x, found.walkers.rewards))
        whole = (_side_by_side(part, len(found.open)) for part in zip(*passed, strict=True))
        found.walkers.x, found.walkers.rewards = whole
    return [found.paths[place] for place in range(swarms)]


def _ended(found: _Swarms, places: Tensor, ended: Tensor) -> Tensor:
    """Resamples the swarms that have ended and takes them out; the places [S', n] of the others."""
    found.walkers.laws = None
    whole = torch.arange(places.shape[1], device=places.device).expand_as(places)
    found.keep(torch.where(ended.unsqueeze(1), places, whole))
    return places[found.end(ended)]


def _side_by_side(parts: tuple[Tensor, ...], swarms: int) -> Tensor:
    """Parts [S m, ...] of the same swarms as one [S k m, ...], each swarm's together."""
    return torch.cat([part.view(swarms, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)


def _moments(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of the rewards [S, n] under weights exp(scores), its standard error, and their variance, [S] each."""
    weights = scores.softmax(1)
    mean = torch.linalg.vecdot(weights, rewards)
    squares = (rewards - mean.unsqueeze(1)).square()
    return mean, torch.linalg.vecdot(weights.square(), squares).sqrt(), torch.linalg.vecdot(weights, squares)


def effective_size(scores: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of weights exp(scores), [..., n] to [...]."""
    return (2.0 * scores.logsumexp(-1) - (2.0 * scores).logsumexp(-1)).exp()


def error_of_log_mean(scores: Tensor) -> Tensor:
    """The standard error of log mean exp(scores [..., n]), to first order; inf for one alone."""
    if scores.shape[-1] < 2:
        return torch.full_like(scores[..., 0], math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.std(-1) / weights.mean(-1) / math.sqrt(scores.shape[-1])


def jackknife_log_mean(values: Tensor) -> tuple[float, float]:
    """log mean exp of values [R] and its standard error by leaving each out in turn.

    Where one value outweighs all others, the error is how far the mean falls without it, and not at most 1 as to first
    order.
    """
    count = len(values)
    whole = (values.logsumexp(0) - math.log(count)).item()
    if count < 2:
        return whole, math.inf
    without = values.expand(count, count).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    left = without.logsumexp(1) - math.log(count - 1)
    return whole, math.sqrt((count - 1) / count * (left - left.mean()).square().sum().item())
