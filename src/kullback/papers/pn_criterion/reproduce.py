"""The p-n criterion (arXiv 2105.08947) in small: risks of normal fits to real tables, to first and second order.

The empirical law of a table stands for the truth, which a full Gaussian misses. A sample of n rows with replacement is
fitted; its risk D(g* || fit) against the best Gaussian, in closed form, is averaged over samples and held against the
expansion from the law itself. At the n that the criterion asks for, the error of the best test between the best model
and the fit is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.diagnose import RiskExpansion, estimation_risk, kl_budget, required_n
from kullback.diagnose.exponential_families import gaussian

__all__ = ["draw", "reproduce"]

TABLES: Mapping[str, tuple[int, ...]] = {
    "wine": (0, 1, 2),
    "breast cancer": (0, 1, 4, 21),
    "diabetes": (0, 2, 3, 4, 9),
}
SAMPLES, AT = {40: 1500, 80: 40_000, 160: 1500, 320: 1500}, 80  # by n; the claims are about n = 80
DRAWS = 200_000
DELTA, FITS, POINTS = 0.1, 200, 4000


def table(name: str) -> Tensor:
    """The chosen columns of a bundled table, standardized, [n, d]."""
    from sklearn import datasets

    loaded = getattr(datasets, f"load_{name.replace(' ', '_')}")()
    data = torch.from_numpy(loaded.data)[:, list(TABLES[name])]
    return (data - data.mean(0)) / data.std(0, correction=0)


def fits(data: Tensor, n: int, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means [count, d] and covariances [count, d, d] of samples of n rows with replacement."""
    rows = data[torch.randint(len(data), (count, n), generator=source)]
    mean = rows.mean(1)
    centred = rows - mean.unsqueeze(1)
    return mean, centred.transpose(1, 2) @ centred / n


def risks(data: Tensor, n: int, source: torch.Generator) -> Tensor:
    """D(best || fit) of SAMPLES[n] Gaussian fits to n rows; inf where a covariance is singular."""
    mean, covariance = data.mean(0), torch.cov(data.T, correction=0)
    parts = [fits(data, n, count, source) for count in _parts(SAMPLES[n])]
    means, covariances = (torch.cat(column) for column in zip(*parts, strict=True))
    root, info = torch.linalg.cholesky_ex(covariances)
    gap = torch.linalg.solve_triangular(root, (means - mean).unsqueeze(2), upper=False).square().sum((1, 2))
    ratio = torch.linalg.solve_triangular(root, torch.linalg.cholesky(covariance).expand_as(root), upper=False)
    log_ratio = 2 * root.diagonal(dim1=1, dim2=2).log().sum(1) - torch.logdet(covariance)
    risk = 0.5 * (ratio.square().sum((1, 2)) - data.shape[1] + gap + log_ratio)
    return torch.where(info == 0, risk, math.inf)


def _parts(count: int, size: int = 5000) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def bayes_error(data: Tensor, n: int, source: torch.Generator) -> float:
    """The mean error of the best test between the best Gaussian and a fit, over FITS fits of n rows."""
    best = torch.distributions.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0))
    noise = torch.randn(POINTS, data.shape[1], generator=source, dtype=torch.float64)
    x = best.mean + noise @ best.scale_tril.T
    means, covariances = fits(data, n, FITS, source)
    fitted = torch.distributions.MultivariateNormal(means, covariances)
    log_ratio = fitted.log_prob(x.unsqueeze(1)).T - best.log_prob(x)  # [FITS, POINTS]
    variation = (1.0 - log_ratio.exp()).clamp(min=0.0).mean(1)
    return float((0.5 * (1.0 - variation)).mean())


def expansion(data: Tensor, source: torch.Generator) -> RiskExpansion:
    """To second order, the table being the whole truth."""
    family = gaussian(data.shape[1], quasi=True)
    xi = family.statistics(data)
    draws = family.sample(family.solve(xi.mean(0)), DRAWS, source)
    return estimation_risk(xi, family.statistics(draws), population=True)


def study(run: Run, name: str) -> list[dict[str, Any]]:
    """Rows of one table: a size each, and one of the criterion."""
    data = table(name)
    found = expansion(data, generator(run.seed, name, "draws"))
    common = {"table": name, "p": found.p}
    rows: list[dict[str, Any]] = []
    for n in SAMPLES:
        risk = risks(data, n, generator(run.seed, name, "samples", n))
        row = {**common, "study": "risk", "n": n, "simulated": float(risk.mean())}
        row["error"] = float(risk.std()) / math.sqrt(SAMPLES[n])
        rows.append(row | {"second": found.risk(n), "first": found.a / n, "half_p": 0.5 * found.p / n})
    n_star = required_n(found, DELTA)
    error = bayes_error(data, n_star, generator(run.seed, name, "bayes"))
    law = {"a": found.a, "b": found.b, "se_b": found.se_b, "n_star": n_star, "bayes_error": error}
    return [*rows, {**common, "study": "criterion", **law}]


def reproduce(run: Run) -> Report:
    """One seed: the three tables."""
    rows: list[dict[str, Any]] = []
    for name in TABLES:
        rows += study(run, name)
        run.event("table", **{key: value for key, value in rows[-1].items() if key != "study"})
    at = [row for row in rows if row["study"] == "risk" and row["n"] == AT]
    metrics = {
        "second_order_relative_error": max(abs(row["second"] / row["simulated"] - 1.0) for row in at),
        "first_order_shortfall": min(1.0 - row["first"] / row["simulated"] for row in at),
        "bayes_error_margin": min(row["bayes_error"] for row in rows if row["study"] == "criterion") - (0.5 - DELTA),
    }
    return Report(metrics=metrics, rows=rows)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The risk against n for each table, with both orders, the budgets of three deltas and the n asked for."""
    from kullback.figures import figure

    with figure(path, columns=len(TABLES), size=(3.6, 3.3)) as panels:
        for axes, name in zip(panels, TABLES, strict=True):
            own = [row for row in rows if row["table"] == name]
            law = [row for row in own if row["study"] == "criterion"]
            a, b, p = (sum(row[key] for row in law) / len(law) for key in ("a", "b", "p"))
            n = torch.logspace(math.log10(30), math.log10(400), 60, dtype=torch.float64)
            axes.plot(n, a / n + b / n.square(), color="C0", label="second order")
            axes.plot(n, a / n, "--", color="C1", label="first order")
            axes.plot(n, 0.5 * p / n, ":", color="0.5", label="p / 2n")
            for size in SAMPLES:
                values = [row["simulated"] for row in own if row.get("n") == size]
                errors = [row["error"] for row in own if row.get("n") == size]
                mean = sum(values) / len(values)
                label = "simulated" if size == AT else None
                axes.errorbar(size, mean, yerr=2 * max(errors), fmt="k.", capsize=2, label=label)
            for delta in (0.05, 0.1, 0.15):
                axes.axhline(kl_budget(delta), color="C2", linewidth=0.8, alpha=0.7)
                place: dict[str, Any] = {"x": 395, "ha": "right"} if delta == 0.15 else {"x": 28, "ha": "left"}
                axes.text(y=kl_budget(delta) * 1.05, s=f"$\\delta$ = {delta}", color="C2", fontsize=7, **place)
            n_star = RiskExpansion(a=a, b=b, p=round(p)).required_n(kl_budget(DELTA))
            axes.axvline(n_star, color="C3", linewidth=0.8)
            axes.text(n_star * 1.03, 0.0085, f"n* = {n_star}", color="C3", fontsize=8)
            axes.set(xscale="log", yscale="log", ylim=(0.008, 1.0), title=f"{name}, p = {round(p)}", xlabel="n")
            axes.set_xticks(list(SAMPLES), [str(size) for size in SAMPLES])
            axes.minorticks_off()
        panels[0].set(ylabel="E D(best || fit), nats")
        panels[0].legend(frameon=False, fontsize=8, loc="upper right")
