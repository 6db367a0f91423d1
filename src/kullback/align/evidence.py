r"""Evidence and posterior samples without a table: the prior is sampled, its samples are weighted, moved, and kept.

    importance      log mean exp(r / b) over samples of the prior; unbiased for Z, low for log Z in the mean
    annealed        sequential Monte Carlo over s from 0 to 1 / b: weigh by exp((s' - s) r), resample where weights have
                    grown unequal, move
    thermodynamic   log Z = integral of E_{p_s} r ds from 0 to 1 / b, along the same path: by Simpson's rule over equal
                    steps, by the trapezoids h (m + m') / 2 - h^2 (v' - v) / 12 over adaptive ones, m and v the mean and
                    the variance of r, since v is the slope of m
    rejection       keep x with probability exp((r - r_max) / b): exact
    resampling      importance weights, then multinomial draws (SIR)
    metropolis      a chain of proposals reversible under the prior, accepted with min(1, exp((r' - r) / b))

A move that is reversible under the prior leaves p_s in place when it is so accepted. For sequences `suffix_move` draws
a random suffix anew, which in a far posterior leaves the first tokens where they are, since all that follow them would
have to be good again; `token_move` draws single tokens anew and keeps the others, and goes there, for one call of the
model a proposal. Where the reward is known for beginnings too, `twisted_smc` in `align.twisted` needs no moves.

`from_policy` puts a trained policy in the prior's place, whose samples are nearer to the posterior, for all of these.

An estimate from one swarm knows nothing of samples that all missed the same place. So several independent swarms are
run, Z is averaged over them, and the standard error comes from how far they are apart.

Shapes: n samples x [n, ...]; rewards [n]; nats. Source: arXiv 2205.11275 and the samplers' own; adaptive steps: Zhou,
Johansen and Aston (2016); samples from all states of the moves: Dau and Chopin (2022).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align._annealing import Path, Schedule, anneal, effective_size, error_of_log_mean, jackknife_log_mean
from kullback.align._moves import PriorSampler, TokenMove, Walkers, suffix_move, token_move
from kullback.core.errors import ConfigError, DataError

__all__ = [
    "Evidence",
    "PosteriorSamples",
    "PriorSampler",
    "TokenMove",
    "from_policy",
    "log_evidence",
    "posterior_sample",
    "suffix_move",
    "token_move",
]


class Evidence(NamedTuple):
    """log_evidence with its standard error; the effective sample size of the weights behind it (the smallest, summed
    over swarms); and the calls of the prior: how many samples it drew or scored.
    """

    log_evidence: float
    standard_error: float
    effective_size: float
    calls: int


class PosteriorSamples(NamedTuple):
    """x [m, ...], their log_weights [m] (equal but for "importance"), the acceptance rate, the effective size."""

    x: Tensor
    log_weights: Tensor
    acceptance: float
    effective_size: float


def from_policy(
    sample: Callable[[int, torch.Generator], Tensor],
    reward: Callable[[Tensor], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    log_policy: Callable[[Tensor], Tensor],
    *,
    beta: float,
) -> PriorSampler:
    """The same posterior and evidence from samples of a policy: r + b (log a - log pi) as reward, pi as prior.

    sample: of the policy; reward, log_prior and log_policy: from x to [n]. Weights exp(r / b) a / pi are all Z for the
    posterior itself, and "importance" is then without error. Take the same beta for what follows. Proposals are fresh
    samples of the policy, as of an independence sampler. Raises ConfigError; DataError for a log-probability that is
    not finite, since a policy must be able to say what the prior says.
    """
    _check(1, beta)

    def corrected(x: Tensor) -> Tensor:
        return reward(x).double() + beta * (log_prior(x).double() - log_policy(x).double())

    return PriorSampler(sample, corrected)


def log_evidence(
    problem: PriorSampler,
    count: int,
    *,
    beta: float,
    generator: torch.Generator,
    method: Literal["importance", "annealed", "thermodynamic"] = "importance",
    temperatures: int = 16,
    moves: int = 2,
    adaptive: float | None = None,
    recycle: bool = False,
    swarms: int = 4,
    at_once: int | None = None,
) -> Evidence:
    """log Z from `count` samples; annealed and thermodynamic carry as many, in so many independent swarms.

    temperatures: equal steps of 1 / b, each followed by `moves`; adaptive: instead of them, steps of which each has
    that conditional effective size, as a share of a swarm (0.9 is careful, 0.5 quick), as many as it takes. Adaptive
    steps depend on the samples, and Z is then not quite unbiased. recycle: every state that the moves pass through is
    one of the samples (waste-free), so that count / (1 + moves) of them go on at each temperature; best with many moves
    and few temperatures. at_once: swarms that share a batch, all by default; fewer take less memory. A move of one's
    own may make one choice for all its rows, and then has one swarm at a time, since swarms would not be independent.
    The standard error is that between swarms, or that inside of them where it is larger. Of one swarm it is the one
    inside, which takes moves to forget where they came from: with too few of them, or moves that go nowhere, it is too
    small. Warns when the effective size is below a hundredth of the samples. Raises ConfigError, DataError.
    """
    _check(count, beta)
    schedule = Schedule(temperatures, moves, adaptive, recycle)
    if method == "importance":
        scores = problem.rewards(problem.sample(count, generator)) / beta
        value = (scores.logsumexp(0) - math.log(count)).item()
        found = Evidence(value, error_of_log_mean(scores).item(), effective_size(scores).item(), count)
    elif method in ("annealed", "thermodynamic"):
        if method == "thermodynamic" and adaptive is None and temperatures % 2:
            raise ConfigError(f"Simpson's rule takes an even number of temperatures, got {temperatures}")
        if swarms < 1 or count % swarms or count < 2 * swarms:
            raise ConfigError(f"swarms share {count} samples evenly, two each at least, got {swarms} swarms")
        paths = _anneal_all(problem, count // swarms, beta, generator, schedule, swarms, at_once)
        found = _together(paths) if method == "annealed" else _thermodynamic(paths, equal=adaptive is None)
    else:
        raise ConfigError(f"method is importance, annealed or thermodynamic, not {method!r}")
    _warn("the evidence rests", found.effective_size, count)
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
    adaptive: float | None = None,
    recycle: bool = False,
) -> PosteriorSamples:
    """Samples of p*: of `count` drawn those kept ("rejection", exact), or as many as drawn.

    largest_reward: a bound of the reward, for rejection; steps: of the `count` chains of "metropolis"; temperatures,
    moves, adaptive and recycle: of "annealed", see `log_evidence`. Raises ConfigError for rejection without a bound,
    DataError for a reward above it. Warns where "resampling" rests on less than a hundredth of the samples.
    """
    _check(count, beta)
    zeros = torch.zeros(count, dtype=torch.float64)
    if method == "annealed":
        path = anneal(problem, count, beta, generator, Schedule(temperatures, moves, adaptive, recycle))[0]
        return PosteriorSamples(path.x, zeros, path.acceptance, path.effective_size)
    if method == "metropolis":
        chains = Walkers(problem, count, generator)
        taken = sum(chains.step(1.0 / beta, generator).double().mean().item() for _ in range(steps))
        return PosteriorSamples(chains.x, zeros, taken / max(steps, 1), float(count))
    x = problem.sample(count, generator)
    rewards = problem.rewards(x)
    if method == "rejection":
        return _rejection(x, rewards, beta, largest_reward, generator)
    if method != "resampling":
        raise ConfigError(f"method is rejection, resampling, metropolis or annealed, not {method!r}")
    scores = rewards / beta
    places = torch.multinomial(scores.softmax(0), count, replacement=True, generator=generator)
    size = effective_size(scores).item()
    _warn("the samples rest", size, count)
    return PosteriorSamples(x[places], zeros, 1.0, size)


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


def _anneal_all(
    problem: PriorSampler,
    count: int,
    beta: float,
    generator: torch.Generator,
    schedule: Schedule,
    swarms: int,
    at_once: int | None,
) -> list[Path]:
    """All swarms, so many in a batch."""
    rows_alone = problem.move is None or isinstance(problem.move, TokenMove)
    size = at_once if at_once is not None else swarms if rows_alone else 1
    if size < 1:
        raise ConfigError(f"at_once is a number of swarms from 1, got {at_once}")
    paths: list[Path] = []
    while len(paths) < swarms:
        together = min(size, swarms - len(paths))
        paths += anneal(problem, count, beta, generator, schedule, swarms=together)
    return paths


def _together(paths: list[Path]) -> Evidence:
    """Z in the mean over swarms."""
    values = torch.tensor([path.log_evidence for path in paths], dtype=torch.float64)
    inside = torch.tensor([path.error for path in paths], dtype=torch.float64)
    value, between = jackknife_log_mean(values)
    return _evidence(paths, value, between, (values.softmax(0) * inside).norm().item())


def _thermodynamic(paths: list[Path], *, equal: bool) -> Evidence:
    """The integral of the mean rewards along each path, in the mean over swarms."""
    values, inside = [], []
    for path in paths:
        s, means, errors, variances = (
            torch.tensor(x, dtype=torch.float64) for x in (path.inverses, path.means, path.errors, path.variances)
        )
        steps, count = s.diff(), len(means) - 1
        weights = torch.zeros_like(means)
        if equal:
            weights[:] = 2.0
            weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
            weights *= s[-1] / (3.0 * count)
        else:
            weights[1:] += 0.5 * steps
            weights[:-1] += 0.5 * steps
        bend = 0.0 if equal else (steps.square() * variances.diff()).sum().item() / 12.0
        values.append((weights @ means).item() - bend)
        inside.append((weights * errors).norm().item())
    found = torch.tensor(values, dtype=torch.float64)
    count = len(paths)
    between = found.std().item() / math.sqrt(count) if count > 1 else math.inf
    return _evidence(paths, found.mean().item(), between, math.hypot(*inside) / count)


def _evidence(paths: list[Path], value: float, between: float, inside: float) -> Evidence:
    error = inside if len(paths) == 1 else max(between, inside)
    return Evidence(value, error, sum(path.effective_size for path in paths), sum(path.calls for path in paths))


def _warn(what: str, size: float, count: int) -> None:
    if size < 0.01 * count:
        text = f"{what} on {size:.1f} of {count} samples: take method='annealed', or more"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _check(count: int, beta: float) -> None:
    if count < 1:
        raise ConfigError(f"count is 1 or more, got {count}")
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
