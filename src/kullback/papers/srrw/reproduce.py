"""How far a self-repellent token lowers the error of an optimizer, by its strength and by the order of step sizes.

A ring of 100 nodes with 150 chords, Metropolis and Hastings with a uniform target, one sample of the breast cancer data
at every node (six features and a constant), L2-regularised logistic regression. Mean squared error of the parameters
along 30,000 steps, for a = 0.8 of the history and three exponents b of the optimizer's steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import MissingExtra
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.optim.chains import Chain, base_chain
from kullback.optim.srrw import SRRW
from kullback.optim.srrw_simulation import GeneralizedLinear, simulate
from kullback.optim.srrw_theory import optimization_covariance

__all__ = ["draw", "reproduce"]

NODES, CHORDS, FEATURES, RIDGE = 100, 150, 6, 1.0
STEPS, RUNS, POINTS = 30_000, 70, 24
ALPHAS = (0.0, 1.0, 5.0, 10.0, 20.0)
A = 0.8
CASES = {"faster": 0.9, "equal": 0.8, "slower": 0.501}  # b: how the optimizer's step decays beside the history's


def graph(source: torch.Generator) -> Chain:
    """A ring with chords, and the chain on it."""
    index = torch.arange(NODES)
    adjacency = torch.zeros(NODES, NODES)
    adjacency[index, (index + 1) % NODES] = 1.0
    pairs = torch.combinations(index)
    distance = pairs[:, 1] - pairs[:, 0]
    pairs = pairs[(distance > 1) & (distance < NODES - 1)]
    chosen = pairs[torch.randperm(len(pairs), generator=source)[:CHORDS]]
    adjacency[chosen[:, 0], chosen[:, 1]] = 1.0
    return base_chain(adjacency + adjacency.T)


def samples(source: torch.Generator) -> GeneralizedLinear:
    """A sample for every node: standardised features and a constant, each row of length 1."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise MissingExtra("scikit-learn", extra="sklearn") from error
    features, labels = (torch.from_numpy(array).to(torch.float64) for array in load_breast_cancer(return_X_y=True))
    features = features[:, :FEATURES]
    features = (features - features.mean(0)) / features.std(0)
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    chosen = torch.randperm(len(rows), generator=source)[:NODES]
    return GeneralizedLinear(torch.nn.functional.normalize(rows[chosen], dim=1), labels[chosen], RIDGE)


def marks() -> list[int]:
    """The steps at which errors are kept: evenly spaced in logarithms, with a tenth of the way among them."""
    spaced = torch.logspace(1, math.log10(STEPS), POINTS).round().int().tolist()
    return sorted({*spaced, STEPS // 10, STEPS})


def errors(chain: Chain, field: GeneralizedLinear, best: Tensor, case: str, alpha: float, seed: int) -> Tensor:
    """The mean squared error at each of the marks."""
    source = generator(seed, "srrw", case, str(alpha))
    theta = torch.zeros(len(best), dtype=torch.float64)
    found = simulate(SRRW(chain, alpha, A), field, theta, marks(), b=CASES[case], runs=RUNS, generator=source)
    return (found.theta - best).square().sum(-1).mean(-1)


def reproduce(run: Run) -> Report:
    """One seed: RUNS walks for each case and strength, on one graph with one set of samples."""
    chain, field = graph(generator(0, "srrw", "graph")), samples(generator(0, "srrw", "samples"))
    best = field.optimum(chain.target)
    force, drift = field.at(best), field.jacobian(best, chain.target)
    rows: list[dict[str, Any]] = []
    final: dict[tuple[str, float], float] = {}
    early: dict[tuple[str, float], float] = {}
    for case, b in CASES.items():
        for alpha in ALPHAS:
            mse = errors(chain, field, best, case, alpha, run.seed)
            spread = optimization_covariance(chain, force, drift, alpha, A, b).trace().item()
            final[case, alpha], early[case, alpha] = mse[-1].item(), mse[marks().index(STEPS // 10)].item()
            theory = spread * (STEPS + 1) ** -b
            run.event("errors", case=case, alpha=alpha, mse=final[case, alpha], theory=theory)
            kept = {"case": case, "alpha": alpha, "theory": theory}
            rows += [{**kept, "step": step, "mse": value} for step, value in zip(marks(), mse.tolist(), strict=True)]
    return Report(metrics=metrics(final, early), rows=rows)


def metrics(final: Mapping[tuple[str, float], float], early: Mapping[tuple[str, float], float]) -> dict[str, float]:
    """Gains: the error of the base chain over that of the self-repellent walk."""

    def gain(case: str, alpha: float, values: Mapping[tuple[str, float], float] = final) -> float:
        return values[case, 0.0] / values[case, alpha]

    strong, last = [alpha for alpha in ALPHAS if alpha >= 5.0], ALPHAS[-1]
    return {
        "gain_at_5": gain("faster", 5.0),
        "gain_at_20": gain("faster", 20.0),
        "gain_ratio_min": min(gain("faster", alpha) / gain("equal", alpha) for alpha in strong),
        "gain_slow_case_max": max(gain("slower", alpha) for alpha in ALPHAS[1:]),
        "gain_slow_case_late_over_early": gain("slower", last) / gain("slower", last, early),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The error along the walk in the three cases, and at its end over alpha beside the theory's limits."""
    from kullback.figures import figure

    titles = {"faster": "faster than the history's", "equal": "as fast", "slower": "more slowly"}
    with figure(path, columns=4, size=(3.2, 3.2)) as panels:
        for axes, case in zip(panels, CASES):
            for index, alpha in enumerate(ALPHAS):
                chosen = [row for row in rows if (row["case"], row["alpha"]) == (case, alpha)]
                steps = sorted({row["step"] for row in chosen})
                means = [mean(row["mse"] for row in chosen if row["step"] == step) for step in steps]
                axes.loglog(steps, means, color=shade(index), linewidth=1.2, label=f"α = {alpha:g}")
            axes.set(xlabel="step", title=f"optimizer's step decays\n{titles[case]}, b = {CASES[case]:g}")
            axes.set_ylim(1e-7, 0.3)
        panels[0].set_ylabel("mean squared error")
        panels[0].legend(frameon=False, fontsize=7.5)
        for index, case in enumerate(CASES):
            last = [row for row in rows if row["case"] == case and row["step"] == STEPS]
            ends = [mean(row["mse"] for row in last if row["alpha"] == alpha) for alpha in ALPHAS]
            limits = [mean(row["theory"] for row in last if row["alpha"] == alpha) for alpha in ALPHAS]
            shifted = [1.0 + alpha for alpha in ALPHAS]
            panels[3].loglog(shifted, ends, "o-", color=f"C{index}", linewidth=1.2, label=f"b = {CASES[case]:g}")
            panels[3].loglog(shifted, limits, "--", color=f"C{index}", linewidth=0.9)
        panels[3].set(xlabel="1 + α", title=f"after {STEPS:,} steps;\ndashed: the limit's covariance")
        panels[3].legend(frameon=False, fontsize=7.5)


def mean(values: Any) -> float:
    held = list(values)
    return sum(held) / len(held)


def shade(index: int) -> str:
    """Darker with alpha."""
    return ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")[index]
