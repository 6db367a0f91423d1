"""A swarm of samples carried from the prior to the posterior, and what several swarms say together."""

from __future__ import annotations

import math
from dataclasses import dataclass
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

    def next(self, number: int, now: float, beta: float, scores: Tensor, rewards: Tensor) -> float:
        """The inverse temperature of step `number`, from 1 on, after `now`."""
        if self.adaptive is not None:
            return next_inverse(scores, rewards, now=now, last=1.0 / beta, share=self.adaptive)
        return 1.0 / beta if number == self.temperatures else number / (beta * self.temperatures)


class Path(NamedTuple):
    """The samples at the end, log Z with its error inside the swarm, the smallest effective size, the share of moves
    taken, the calls of the prior; and by step the inverse temperatures and the mean rewards, their errors, variances.
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


def next_inverse(scores: Tensor, rewards: Tensor, *, now: float, last: float, share: float) -> float:
    """The s in (now, last] at which n (sum W w)^2 / sum W w^2 is share n, by bisection; last where it stays above.

    W: weights exp(scores) [n] carried until now, normalised; w = exp((s - now) r).
    """
    logs = scores.log_softmax(0)

    def kept(inverse: float) -> float:
        steps = (inverse - now) * rewards
        return (2.0 * (logs + steps).logsumexp(0) - (logs + 2.0 * steps).logsumexp(0)).exp().item()

    if kept(last) >= share:
        return last
    low, high = now, last
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) >= share else (low, middle)
    return high


def anneal(problem: PriorSampler, count: int, beta: float, generator: torch.Generator, schedule: Schedule) -> Path:
    """One swarm of `count` samples from 1 / b = 0 on; resampled at the end, and before where weights are unequal."""
    if count < 2:
        raise ConfigError(f"annealing carries two samples in a swarm at least, got {count}")
    if schedule.recycle:
        return _recycled(problem, count, beta, generator, schedule)
    swarm = Walkers(problem, count, generator)
    scores = torch.zeros_like(swarm.rewards)  # log-weights since the last resampling
    inverses, last, number = [0.0], 1.0 / beta, 0
    value, variance, smallest, taken = 0.0, 0.0, float(count), 0.0
    moments = [_moments(scores, swarm.rewards)]
    while inverses[-1] < last:
        number += 1
        inverse = schedule.next(number, inverses[-1], beta, scores, swarm.rewards)
        scores = scores + (inverse - inverses[-1]) * swarm.rewards
        inverses.append(inverse)
        size = effective_size(scores)
        smallest = min(smallest, size)
        if size < _EVEN * count or inverse >= last:
            value += (scores.logsumexp(0) - math.log(count)).item()
            variance += error_of_log_mean(scores) ** 2
            swarm.keep(systematic_resample(scores.unsqueeze(0), generator=generator)[0])
            scores = torch.zeros_like(scores)
        for _ in range(schedule.moves):
            taken += swarm.step(inverse, generator)
        moments.append(_moments(scores, swarm.rewards))
    means, errors, variances = (list(part) for part in zip(*moments, strict=True))
    share = taken / max(schedule.moves * number, 1)
    return Path(
        swarm.x, value, math.sqrt(variance), smallest, share, swarm.calls, inverses, means, errors, variances
    )  # fmt: skip


def _recycled(
    problem: PriorSampler, count: int, beta: float, generator: torch.Generator, schedule: Schedule
) -> Path:
    """As `anneal`, but a few of the samples go on at each step, and all that they pass through are the next samples."""
    rows = count // (schedule.moves + 1)
    if not schedule.moves or rows < 1 or rows * (schedule.moves + 1) != count:
        raise ConfigError(f"recycling takes samples in multiples of 1 + moves, got {count} and {schedule.moves} moves")
    swarm = Walkers(problem, count, generator)
    even = torch.zeros_like(swarm.rewards)
    inverses, last, number, value, variance, smallest, taken = [0.0], 1.0 / beta, 0, 0.0, 0.0, float(count), 0.0
    moments = [_moments(even, swarm.rewards)]
    while inverses[-1] < last:
        number += 1
        inverses.append(schedule.next(number, inverses[-1], beta, even, swarm.rewards))
        scores = (inverses[-1] - inverses[-2]) * swarm.rewards
        value += (scores.logsumexp(0) - math.log(count)).item()
        variance += error_of_log_mean(scores) ** 2
        smallest = min(smallest, effective_size(scores))
        moments.append(_moments(scores, swarm.rewards))
        places = systematic_resample(scores.unsqueeze(0), generator=generator)[0]
        if inverses[-1] >= last:
            swarm.laws = None
            swarm.keep(places)
            break
        # Of a systematic sample in order each (moves + 1)-th, from a random one on, is a systematic one of fewer.
        first = int(torch.randint(schedule.moves + 1, (), generator=generator, device=generator.device))
        swarm.laws = None  # those of the last move, not of what was passed through
        swarm.keep(places[first :: schedule.moves + 1])
        passed = [(swarm.x, swarm.rewards)]
        for _ in range(schedule.moves):
            taken += swarm.step(inverses[-1], generator)
            passed.append((swarm.x, swarm.rewards))
        swarm.x, swarm.rewards = (torch.cat(part) for part in zip(*passed, strict=True))
    means, errors, variances = (list(part) for part in zip(*moments, strict=True))
    share = taken / max(schedule.moves * (number - 1), 1)
    return Path(
        swarm.x, value, math.sqrt(variance), smallest, share, swarm.calls, inverses, means, errors, variances
    )  # fmt: skip


def _moments(scores: Tensor, rewards: Tensor) -> tuple[float, float, float]:
    """The mean of the rewards under weights exp(scores), its standard error, and their variance."""
    weights = scores.softmax(0)
    mean = weights @ rewards
    squares = (rewards - mean).square()
    return mean.item(), (weights.square() @ squares).sqrt().item(), (weights @ squares).item()


def effective_size(scores: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights exp(scores) [n]."""
    return (2.0 * scores.logsumexp(0) - (2.0 * scores).logsumexp(0)).exp().item()


def error_of_log_mean(scores: Tensor) -> float:
    """The standard error of log mean exp(scores [n]), to first order."""
    if len(scores) < 2:
        return math.inf
    weights = (scores - scores.max()).exp()
    return (weights.std() / weights.mean()).item() / math.sqrt(len(scores))


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
