"""Many runs of a policy on an environment, and the regret they pay.

Pseudo-regret, for coins and Gaussian arms: sum over rounds of best mean - mean of the arm pulled. For a table of
rewards, which an adversary may have written: the reward of the best fixed arm up to then - the rewards received.
Policies by name run compiled (numba, some 10^7 rounds a second); policies as objects run round by round.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Policy
from kullback.stream.bandits._policy import Floats, floats, stream_states, uniform
from kullback.stream.bandits.adversarial import exp3_rate
from kullback.stream.bandits.experts import hedge_rate
from kullback.stream.bandits.stochastic import explore_first_pulls, kl_ucb_budgets

__all__ = ["Bernoulli", "Gaussian", "RegretResult", "RewardTable", "exact_regret", "fooling_table", "simulate"]


@dataclass(frozen=True, slots=True)
class Bernoulli:
    """Arms that pay 1 with probability `means` [K], or [runs, K] for other means in every run, and else 0."""

    means: Any


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Arms that pay N(mean, deviation^2); means [K] or [runs, K]. The rewards leave [0, 1]."""

    means: Any
    deviation: float = 1.0


@dataclass(frozen=True, slots=True)
class RewardTable:
    """Rewards [T, K] in [0, 1], fixed beforehand: row t - 1 holds what each arm pays in round t."""

    rewards: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretResult:
    """The regret of several runs.

    final [runs]: at the horizon; mean and error: their mean and its standard error; steps [C]: rounds at which
    curves [runs, C] hold the regret so far; pulls [runs, K]: how often each arm was pulled.
    """

    final: Tensor
    steps: Tensor
    curves: Tensor
    pulls: Tensor

    @property
    def mean(self) -> float:
        """The mean regret at the horizon."""
        return self.final.mean().item()

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for a single run."""
        return self.final.std().item() / math.sqrt(len(self.final)) if len(self.final) > 1 else math.nan

    @property
    def curve(self) -> Tensor:
        """The mean regret [C] at `steps`."""
        return self.curves.mean(0)


def simulate(
    policy: str | Callable[[], Policy],
    environment: Bernoulli | Gaussian | RewardTable,
    horizon: int,
    *,
    runs: int = 1,
    generator: torch.Generator,
    points: int = 100,
    workers: int = 1,
    **options: Any,
) -> RegretResult:
    """Play `horizon` rounds `runs` times over.

    policy: a name (`SCHEDULES` lists them) with its options, or a function that makes a policy object. points: at how
    many rounds, evenly spaced, the regret is noted. workers: threads among which compiled runs are divided; the
    result is the same. Raises ConfigError for unknown names or options, MissingExtra without numba for a named policy.

    >>> source = torch.Generator().manual_seed(0)
    >>> result = simulate("ucb1", Bernoulli([0.2, 0.8]), 1000, runs=20, generator=source)
    >>> 10 < result.mean < 40, tuple(result.curves.shape)
    (True, (20, 100))
    """
    if not (horizon >= 1 and runs >= 1 and points >= 1 and workers >= 1):
        raise ConfigError(f"horizon, runs, points and workers are at least 1: {horizon}, {runs}, {points}, {workers}")
    truths, deviation, table = _arrays(environment, horizon, runs)
    steps = np.unique(np.linspace(horizon / min(points, horizon), horizon, min(points, horizon)).astype(np.int64))
    seeds = stream_states(runs, generator)
    curves, pulls = np.zeros((runs, len(steps))), np.zeros((runs, truths.shape[1]), dtype=np.int64)
    if callable(policy):
        if options:
            raise ConfigError(f"{', '.join(options)} would do nothing: options go with the name of a policy")
        for run in range(runs):
            source = torch.Generator().manual_seed(int(seeds[run]) >> 1)
            _play(policy(), truths[run % len(truths)], deviation, table, steps, source, curves[run], pulls[run])
    else:
        kind, numbers, schedule, first = _named(policy, truths.shape[1], horizon, options)
        given = None if deviation < 0.0 else table

        def part(rows: slice) -> None:
            truth = truths if len(truths) == 1 else truths[rows]
            world, out = (truth, deviation, given, steps), (seeds[rows], curves[rows], pulls[rows])
            _run_compiled(kind, numbers, schedule, first, world, out)

        size = math.ceil(runs / workers)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(part, [slice(start, start + size) for start in range(0, runs, size)]))
    noted, counted = torch.from_numpy(curves), torch.from_numpy(pulls)
    return RegretResult(final=noted[:, -1], steps=torch.from_numpy(steps), curves=noted, pulls=counted)


def _run_compiled(kind: int, numbers: Floats, schedule: Floats, first: bool, world: Any, out: Any) -> None:
    """The runs of a policy by its compiled loop; world and out: what it reads of the world, and fills."""
    from kullback.stream.bandits._compiled import BETA, GAUSSIAN, KL_UCB, UCB_V, run_many
    from kullback.stream.bandits._compiled_kl import run_kl_ucb
    from kullback.stream.bandits._compiled_thompson import run_thompson
    from kullback.stream.bandits._compiled_weighted import run_weighted

    if kind <= UCB_V:
        run_many(*(kind, numbers, schedule, *world, first, *out))
    elif kind == KL_UCB:
        run_kl_ucb(*(schedule, *world, first, *out))
    elif kind in (BETA, GAUSSIAN):
        run_thompson(*(kind, numbers, *world, *out))
    else:
        run_weighted(*(kind, numbers, schedule, *world, *out))


def _arrays(environment: Any, horizon: int, runs: int) -> tuple[Floats, float, Floats]:
    """Means [1 or runs, K], the deviation (-1 for coins), and the table of rewards [T or 0, K]."""
    if isinstance(environment, RewardTable):
        table = floats(environment.rewards)
        if table.ndim != 2 or table.shape[1] == 0 or len(table) < horizon:
            raise ShapeError(f"rewards are a table [{horizon} rounds or more, K], and have shape {table.shape}")
        if not (table.min() >= 0.0 and table.max() <= 1.0):
            raise DataError("the rewards of a table lie in [0, 1]")
        return np.zeros((1, table.shape[1])), 0.0, table
    means = np.atleast_2d(floats(environment.means))
    if means.ndim != 2 or means.size == 0 or len(means) not in (1, runs):
        raise ShapeError(f"means have shape [K] or [{runs} runs, K], and came as {means.shape}")
    coins = isinstance(environment, Bernoulli)
    if not np.isfinite(means).all() or (coins and not (means.min() >= 0.0 and means.max() <= 1.0)):
        raise DataError("means are finite, and those of coins lie in [0, 1]")
    deviation = -1.0 if coins else float(environment.deviation)
    if not coins and not deviation >= 0.0:
        raise DataError(f"the deviation of Gaussian arms is not negative, and is {deviation}")
    return means, deviation, np.zeros((0, means.shape[1]))


def _play(
    policy: Any,
    truth: Floats,
    deviation: float,
    table: Floats,
    steps: Any,
    source: torch.Generator,
    curve: Floats,
    pulls: Any,
) -> None:
    """One run of a policy object; a policy that has `observe` in place of `update` sees the costs of all arms."""
    best, regret, place = float(truth.max()), 0.0, 0
    sums, arms = np.zeros(len(truth)), range(len(truth))

    def reward(arm: int, moment: int) -> float:
        if len(table):
            return float(table[moment, arm])
        if deviation < 0.0:
            return 1.0 if uniform(source) < truth[arm] else 0.0
        return float(truth[arm]) + deviation * torch.randn((), generator=source, dtype=torch.float64).item()

    for moment in range(int(steps[-1])):
        arm = policy.pull(None, generator=source)
        if hasattr(policy, "observe"):
            received = [reward(other, moment) for other in arms]
            policy.observe(1.0 - np.array(received))
            gained = received[arm]
        else:
            gained = reward(arm, moment)
            policy.update(arm, gained, None)
        pulls[arm] += 1
        if len(table):
            sums += table[moment]
            regret -= gained
        else:
            regret += best - float(truth[arm])
        if moment + 1 == steps[place]:
            curve[place] = regret + (float(sums.max()) if len(table) else 0.0)
            place += 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """A compiled policy: its kind, its options with their defaults, and (options, K, T) -> numbers, schedule."""

    kind: str
    defaults: Mapping[str, Any]
    build: Callable[[Mapping[str, Any], int, int], tuple[Sequence[float], Any]]


def _log_times(horizon: int, anytime: bool) -> Floats:
    """log t for t = 0..T, at least log 2, or log T alone."""
    return np.log(np.maximum(np.arange(horizon + 1), 2.0)) if anytime else np.log([max(horizon, 2)])


def _epsilons(value: float | None, arms: int, horizon: int) -> Any:
    if value is not None:
        return [value]
    moments = np.maximum(np.arange(horizon + 1), 1.0)
    return np.where(moments > 1, np.minimum(1.0, (arms * np.log(moments) / moments) ** (1.0 / 3.0)), 1.0)


def _exp3_plan(build: Callable[[Mapping[str, Any], int, int], Any]) -> Callable[..., tuple[Sequence[float], Any]]:
    """The numbers of an Exp3 object, which knows its own constants."""

    def plan(options: Mapping[str, Any], arms: int, horizon: int) -> tuple[Sequence[float], Any]:
        made = build(options, arms, horizon)
        return [made.rate, made.mixing, made.implicit, made.bonus, made.share], [0.0]

    return plan


def _exp3(options: Mapping[str, Any], arms: int, horizon: int) -> Any:
    from kullback.stream.bandits.adversarial import Exp3

    return Exp3(arms, **{**options, "rate": options["rate"] or exp3_rate(arms, horizon)})


def _exp3_ix(options: Mapping[str, Any], arms: int, horizon: int) -> Any:
    from kullback.stream.bandits.adversarial import Exp3IX

    return Exp3IX(arms, rate=options["rate"] or exp3_rate(arms, horizon))


def _exp3_p(options: Mapping[str, Any], arms: int, horizon: int) -> Any:
    from kullback.stream.bandits.adversarial import Exp3P

    return Exp3P(arms, horizon=horizon, **options)


def _exp3_s(options: Mapping[str, Any], arms: int, horizon: int) -> Any:
    from kullback.stream.bandits.adversarial import Exp3S

    return Exp3S(arms, horizon=horizon, **options)


SCHEDULES: Mapping[str, _Plan] = {
    "explore_first": _Plan(
        "explore_first", {"pulls": None}, lambda o, K, T: ([o["pulls"] or explore_first_pulls(K, T), -1.0], [0.0])
    ),
    "epsilon_greedy": _Plan("epsilon_greedy", {"epsilon": None}, lambda o, K, T: ([], _epsilons(o["epsilon"], K, T))),
    "successive_elimination": _Plan(
        "successive_elimination",
        {"exploration": 2.0},
        lambda o, K, T: ([], [math.sqrt(o["exploration"] * math.log(max(T, 2)))]),
    ),
    "ucb1": _Plan(
        "ucb1",
        {"exploration": 2.0, "anytime": False, "ties": "random"},
        lambda o, K, T: ([], np.sqrt(o["exploration"] * _log_times(T, o["anytime"]))),
    ),
    "ucb_v": _Plan(
        "ucb_v",
        {"exploration": 1.2, "bias": 1.0, "anytime": False, "ties": "random"},
        lambda o, K, T: ([o["bias"]], o["exploration"] * _log_times(T, o["anytime"])),
    ),
    "kl_ucb": _Plan(
        "kl_ucb",
        {"factor": 3.0, "ties": "random"},
        lambda o, K, T: ([], kl_ucb_budgets(T, o["factor"])),
    ),
    "thompson_beta": _Plan("thompson_beta", {"prior": (1.0, 1.0)}, lambda o, K, T: (o["prior"], [0.0])),
    "thompson_gaussian": _Plan(
        "thompson_gaussian",
        {"mean": 0.0, "deviation": 1.0, "noise": 1.0},
        lambda o, K, T: ([o["mean"], o["deviation"] ** -2, o["noise"] ** -2], [0.0]),
    ),
    "exp3": _Plan("exp3", {"rate": None, "mixing": 0.0}, _exp3_plan(_exp3)),
    "exp3_ix": _Plan("exp3", {"rate": None}, _exp3_plan(_exp3_ix)),
    "exp3_p": _Plan("exp3", {"confidence": 0.05}, _exp3_plan(_exp3_p)),
    "exp3_s": _Plan("exp3", {"switches": 1}, _exp3_plan(_exp3_s)),
    "tsallis_inf": _Plan("tsallis_inf", {}, lambda o, K, T: ([], 2.0 / np.sqrt(np.maximum(np.arange(T + 1), 1.0)))),
    "hedge": _Plan("hedge", {"rate": None}, lambda o, K, T: ([], [o["rate"] or hedge_rate(K, T)])),
}


def _named(name: str, arms: int, horizon: int, given: Mapping[str, Any]) -> tuple[int, Floats, Floats, bool]:
    """The kind, numbers, schedule and way with ties of a policy by name."""
    if name not in SCHEDULES:
        raise ConfigError(f"no compiled policy is called {name!r}: there are {', '.join(SCHEDULES)}")
    plan = SCHEDULES[name]
    unknown = set(given) - set(plan.defaults)
    if unknown:
        takes = ", ".join(plan.defaults) or "no options"
        raise ConfigError(f"{name} takes {takes}, and got {', '.join(sorted(unknown))}")
    options = {**plan.defaults, **given}
    if options.get("ties", "random") not in ("random", "first"):
        raise ConfigError(f'ties are broken "random" or "first", not {options["ties"]!r}')
    from kullback.stream.bandits._compiled import KINDS

    numbers, schedule = plan.build(options, arms, horizon)
    padded = np.zeros(8)
    padded[: len(numbers)] = numbers
    return KINDS.index(plan.kind), padded, floats(schedule), options.get("ties") == "first"


def exact_regret(policy: Any, means: Sequence[float], horizon: int) -> float:
    """The expected pseudo-regret of a policy on coins, by enumeration of arms and rewards: exponential in `horizon`.

    policy: an object with `probabilities()`; it is left as it was.
    """
    top, total = max(means), 0.0
    if horizon == 0:
        return 0.0
    for arm, chance in enumerate(policy.probabilities()):
        if chance <= 0.0:
            continue
        total += float(chance) * (top - means[arm])
        for reward, likelihood in ((1.0, means[arm]), (0.0, 1.0 - means[arm])):
            if likelihood > 0.0 and horizon > 1:
                after = copy.deepcopy(policy)
                after.update(arm, reward, None)
                total += float(chance) * likelihood * exact_regret(after, means, horizon - 1)
    return total


def fooling_table(policy: Policy, arms: int, horizon: int) -> RewardTable:
    """The rewards that a deterministic policy fares worst on: 0 for the arm it is about to pull, 1 for all others.

    It earns nothing, while some arm earns at least horizon (1 - 1/arms). Ties must be broken without chance.
    """
    source = torch.Generator().manual_seed(0)
    table = np.ones((horizon, arms))
    for row in table:
        arm = policy.pull(None, generator=source)
        row[arm] = 0.0
        policy.update(arm, 0.0, None)
    return RewardTable(table)
