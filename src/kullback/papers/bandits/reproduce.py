"""Slivkins' book on bandits (arXiv 1904.07272) in small: regrets beside their bounds, chapter by chapter.

Stochastic: ten coins, one of 0.6 and nine of 0.5, 20,000 rounds. Growth: horizons from 2^10 to 2^17, at a fixed gap and
at the gap root(K/T). Adversarial: a sequence that charges the arm that UCB1 is about to play. Lipschitz: coins of mean
0.9 - |x - peak|, cut at 0. Knapsacks: ten prices, linear demand, a supply of a quarter of the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.stream.bandits import UCB1, Bernoulli, lai_robbins_constant
from kullback.stream.bandits.knapsacks import pricing, simulate_knapsack
from kullback.stream.bandits.lipschitz import UniformDiscretization, grid, zooming_regret
from kullback.stream.bandits.simulate import fooling_table, simulate
from kullback.stream.bandits.stochastic import explore_first_pulls

__all__ = ["draw", "reproduce"]

ARMS, HORIZON, RUNS = 10, 20_000, 10
MEANS = [0.6] + 9 * [0.5]
HORIZONS = tuple(2**power for power in range(10, 18))
PEAKS, CELLS, LIPSCHITZ_HORIZONS = 40, 4096, (20_000, 100_000, 1_000_000)
KNAPSACK_HORIZONS, KNAPSACK_RUNS = (5_000, 10_000, 20_000, 50_000), 20
# The exponent of the horizon in the regret; 0 for log T, where the regret is divided by log T before the fit.
GROWTH = {
    ("explore_first", "fixed"): 2 / 3,
    ("ucb1", "fixed"): 0.0,
    ("thompson_beta", "fixed"): 0.0,
    ("ucb1", "worst"): 0.5,
    ("thompson_beta", "worst"): 0.5,
}
Row = dict[str, Any]


def bounds(arms: int, horizon: int) -> dict[str, float]:
    """What the regret of each policy may be at most, for MEANS; Thompson sampling's is for means from its prior."""
    log, gap = math.log(horizon), 0.1
    pulls = explore_first_pulls(arms, horizon)
    return {
        "explore_first": arms * pulls + 2.0 * math.sqrt(2.0 * log / pulls) * horizon,
        "epsilon_greedy": horizon ** (2 / 3) * (arms * log) ** (1 / 3),
        "successive_elimination": (arms - 1) * (32.0 * log / gap + gap),
        "ucb1": (arms - 1) * (8.0 * log / gap + gap),
        "thompson_beta": math.sqrt(0.5 * arms * horizon * math.log(arms)),
        "exp3": math.sqrt(2.0 * horizon * arms * math.log(arms)),
        "tsallis_inf": 4.0 * math.sqrt(arms * horizon) + 1.0,
        "hedge": math.sqrt(0.5 * horizon * math.log(arms)),
    }


def stochastic(seed: int) -> tuple[int, list[Row]]:
    """How many mean regrets exceed their bounds, and the regrets as they grow."""
    rows, violations = [], 0
    for name, bound in bounds(ARMS, HORIZON).items():
        source = generator(seed, "stochastic", name)
        result = simulate(name, Bernoulli(MEANS), HORIZON, runs=RUNS, generator=source, points=40)
        judged = result.mean
        if name == "thompson_beta":
            drawn = torch.rand(RUNS, ARMS, generator=source, dtype=torch.float64)
            judged = simulate(name, Bernoulli(drawn), HORIZON, runs=RUNS, generator=source).mean
        violations += judged > bound
        kept = {"study": "stochastic", "policy": name, "bound": bound, "judged": judged}
        points = zip(result.steps.tolist(), result.curve.tolist(), strict=True)
        rows += [{**kept, "round": step, "regret": regret} for step, regret in points]
    return violations, rows


def exponent(values: Sequence[float]) -> float:
    """The slope of log values in log horizons."""
    return float(np.polyfit(np.log(HORIZONS), np.log(values), 1)[0])


def growth(seed: int) -> tuple[float, list[Row]]:
    """The largest difference between an exponent of the horizon and the theory's, and the regrets."""
    rows, worst = [], 0.0
    for (name, gap), theory in GROWTH.items():
        regrets = []
        for horizon in HORIZONS:
            means = [0.9] + 9 * [0.5] if gap == "fixed" else [0.5 + math.sqrt(ARMS / horizon)] + 9 * [0.5]
            source = generator(seed, "growth", name, gap, horizon)
            regrets.append(simulate(name, Bernoulli(means), horizon, runs=2 * RUNS, generator=source, points=1).mean)
        logarithmic = theory == 0.0
        fitted = exponent([r / math.log(T) if logarithmic else r for r, T in zip(regrets, HORIZONS, strict=True)])
        worst = max(worst, abs(fitted - theory))
        kept = {"study": "growth", "policy": name, "gap": gap, "exponent": fitted, "theory": theory}
        rows += [{**kept, "round": T, "regret": regret} for T, regret in zip(HORIZONS, regrets, strict=True)]
    return worst, rows


def adversarial(seed: int) -> tuple[float, float, list[Row]]:
    """UCB1's regret over the horizon, Exp3's over its bound, on the sequence made against UCB1; and their growth."""
    table, rows, final = fooling_table(UCB1(ARMS, horizon=HORIZON, ties="first"), ARMS, HORIZON), [], {}
    bound = bounds(ARMS, HORIZON)["exp3"]
    for name in ("ucb1", "exp3", "tsallis_inf"):
        options: dict[str, Any] = {"ties": "first"} if name == "ucb1" else {}
        source = generator(seed, "adversarial", name)
        result = simulate(name, table, HORIZON, runs=RUNS, generator=source, points=40, **options)
        final[name] = result.mean
        points = zip(result.steps.tolist(), result.curve.tolist(), strict=True)
        kept = {"study": "adversarial", "policy": name, "bound": bound}
        rows += [{**kept, "round": step, "regret": regret} for step, regret in points]
    return final["ucb1"] / HORIZON, final["exp3"] / bound, rows


def lipschitz(seed: int) -> list[Row]:
    """Mean regrets of a uniform mesh and of zooming over peaks, at every horizon, with the smaller radius in both."""
    peaks = torch.rand(PEAKS, generator=generator(seed, "peaks"), dtype=torch.float64).numpy()
    rows = []
    for horizon in LIPSCHITZ_HORIZONS:
        uniform, zooming = [], []
        for place, peak in enumerate(peaks):
            source = generator(seed, "lipschitz", horizon, place)
            mesh = UniformDiscretization(horizon=horizon).points[:, 0]
            means = np.maximum(0.9 - np.abs(mesh - peak), 0.0)
            result = simulate("ucb1", Bernoulli(means), horizon, exploration=0.5, generator=source, points=1)
            uniform.append(result.mean + (0.9 - means.max()) * horizon)
            truth = np.maximum(0.9 - np.abs(grid(CELLS)[:, 0] - peak), 0.0)
            regret, _ = zooming_regret(truth, horizon, exploration=0.5, generator=source)
            zooming.append(float(regret[-1]) + (0.9 - truth.max()) * horizon)
        mesh_pays, zooming_pays = float(np.mean(uniform)), float(np.mean(zooming))
        kept = {"uniform": mesh_pays, "zooming": zooming_pays, "ratio": mesh_pays / zooming_pays}
        rows.append({"study": "lipschitz", "round": horizon, **kept})
    return rows


def knapsacks(seed: int) -> list[Row]:
    """The share of the linear program's value that each policy earns, at every horizon."""
    prices, rows = np.arange(1, 11) / 10, []
    for horizon in KNAPSACK_HORIZONS:
        instance = pricing(prices, 1.0 - prices, supply=horizon / 4, horizon=horizon)
        for name in ("primal_dual", "ucb1"):
            source = generator(seed, "knapsacks", name, horizon)
            earned = simulate_knapsack(name, instance, runs=KNAPSACK_RUNS, exploration=0.5, generator=source)
            share = float(earned.mean()) / instance.value()
            rows.append({"study": "knapsacks", "policy": name, "round": horizon, "share": share})
    return rows


def reproduce(run: Run) -> Report:
    """One seed of the five studies."""
    violations, first = stochastic(run.seed)
    run.event("stochastic", violations=violations)
    difference, second = growth(run.seed)
    run.event("growth", difference=difference)
    fooled, stands, third = adversarial(run.seed)
    run.event("adversarial", ucb1=fooled, exp3=stands)
    fourth = lipschitz(run.seed)
    ratios = {row["round"]: row["ratio"] for row in fourth}
    run.event("lipschitz", **{str(horizon): ratio for horizon, ratio in ratios.items()})
    fifth = knapsacks(run.seed)
    shares = {row["policy"]: row["share"] for row in fifth if row["round"] == KNAPSACK_HORIZONS[-1]}
    metrics = {
        "growth_exponent_error": difference,
        "bound_violations": float(violations),
        "ucb_adversarial_share": fooled,
        "exp3_to_bound": stands,
        "zooming_ratio": ratios[LIPSCHITZ_HORIZONS[-1]],
        "zooming_ratio_growth": ratios[LIPSCHITZ_HORIZONS[-1]] - ratios[LIPSCHITZ_HORIZONS[0]],
        "primal_dual_share": shares["primal_dual"],
        "budget_blind_share": shares["ucb1"],
    }
    return Report(metrics=metrics, rows=first + second + third + fourth + fifth)


NAMES = {
    "explore_first": "explore-first", "epsilon_greedy": "ε-greedy", "successive_elimination": "elimination",
    "ucb1": "UCB1", "thompson_beta": "Thompson", "exp3": "Exp3", "tsallis_inf": "Tsallis-INF", "hedge": "Hedge",
}  # fmt: skip
COLORS = {name: f"C{place}" for place, name in enumerate(NAMES)}


def averaged(rows: Sequence[Mapping[str, Any]], value: str, **chosen: Any) -> tuple[list[int], list[float]]:
    """Rounds and mean values over the seeds of the rows that have what is chosen."""
    found = [row for row in rows if all(row.get(name) == wanted for name, wanted in chosen.items())]
    rounds = sorted({row["round"] for row in found})
    return rounds, [float(np.mean([row[value] for row in found if row["round"] == moment])) for moment in rounds]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a study: means over the seeds; what bounds a policy has its colour."""
    from kullback.figures import figure

    with figure(path, columns=5, size=(3.5, 3.4)) as (coins, growing, fooled, zoomed, sold):
        for name, label in NAMES.items():
            coins.loglog(*averaged(rows, "regret", study="stochastic", policy=name), color=COLORS[name], label=label)
            bound = averaged(rows, "bound", study="stochastic", policy=name)[1][0]
            coins.plot([HORIZON * 1.2], [bound], "_", color=COLORS[name], markersize=9, markeredgewidth=2)
        rounds = np.geomspace(500, HORIZON, 30)
        coins.plot(rounds, lai_robbins_constant(MEANS) * np.log(rounds), "k:", linewidth=1.0, label="Lai-Robbins")
        coins.set(xlabel="round", title="ten coins: regret (dashes: bounds)", xlim=(400, HORIZON * 1.4), ylim=(20, 8e4))
        for name, gap in GROWTH:
            chosen = {"study": "growth", "policy": name, "gap": gap}
            power, theory = (averaged(rows, value, **chosen)[1][0] for value in ("exponent", "theory"))
            label = f"{NAMES[name]}, {gap}: {'log T · ' if theory == 0 else ''}T^{power:.2f}"
            style = "o-" if gap == "fixed" else "s--"
            growing.loglog(*averaged(rows, "regret", **chosen), style, color=COLORS[name], markersize=3, label=label)
        growing.set(xlabel="horizon", title="growth, at a fixed and at the worst gap")
        for name in ("ucb1", "exp3", "tsallis_inf"):
            points = averaged(rows, "regret", study="adversarial", policy=name)
            fooled.plot(*points, color=COLORS[name], label=NAMES[name])
        bound = averaged(rows, "bound", study="adversarial", policy="exp3")[1][0]
        fooled.axhline(bound, color=COLORS["exp3"], linestyle="--", linewidth=1.0)
        fooled.set_yscale("symlog", linthresh=100)
        fooled.set(xlabel="round", title="regret on a sequence made against UCB1")
        ratio = averaged(rows, "ratio", study="lipschitz")[1][-1]
        for name, mark, label in (("uniform", "s-", f"uniform mesh, {ratio:.2f} times"), ("zooming", "o-", "zooming")):
            zoomed.loglog(*averaged(rows, name, study="lipschitz"), mark, markersize=4, label=label)
        zoomed.set(xlabel="horizon", title="a continuum of arms: regret")
        for name, label in (("primal_dual", "primal-dual"), ("ucb1", "UCB1, budget-blind")):
            points = averaged(rows, "share", study="knapsacks", policy=name)
            color = "C0" if name == "primal_dual" else COLORS[name]
            sold.plot(*points, "o-", markersize=4, color=color, label=label)
        sold.set(xlabel="horizon", title="limited supply: share of the program", ylim=(0.4, 1.0))
        for axes in (coins, growing, fooled, zoomed, sold):
            axes.tick_params(which="minor", labelbottom=False, labelleft=False)
            axes.legend(frameon=False, fontsize=7)
