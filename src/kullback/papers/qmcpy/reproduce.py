"""QMCPy (arXiv 2502.14256) in small: rates of randomized points, kernel systems in n log n, adaptive cubature.

Rates: the root mean square error of the mean over 64 randomizations, for a smooth function of one variable and one of
two, from 16 to 4096 points. Kernels: products and solves over lattices and nets beside the dense matrix, up to 1024
points, and the time of the fast route up to 2^17. Cubature: Keister's integral in three dimensions, to 1e-3.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.sample.qmc import (
    DigitalNetB2,
    FastGram,
    Halton,
    Independent,
    KernelDSI,
    KernelDSIAdaptive,
    KernelSI,
    Lattice,
    PointSet,
    ProductKernel,
    baker,
    integrate,
    normal_quantile,
)

__all__ = ["draw", "reproduce"]

RANDOMIZATIONS, LEVELS = 64, range(4, 13)
KEISTER = 2.168309102165481
RIDGE, DENSE, TIMED = 1e-3, (64, 256, 1024), (1 << 11, 1 << 13, 1 << 15, 1 << 17)
METHODS: Mapping[str, Callable[..., PointSet]] = {
    "independent": Independent,
    "lattice": Lattice,
    "lattice, baker": Lattice,
    "net, shift": partial(DigitalNetB2, randomize="ds"),
    "net, scrambled": DigitalNetB2,
    "net, nested": partial(DigitalNetB2, randomize="nus"),
    "net of order 2": partial(DigitalNetB2, alpha=2),
    "net of order 3": partial(DigitalNetB2, alpha=3),
    "Halton": Halton,
}
KERNELS: Mapping[str, Callable[[], ProductKernel]] = {
    "SI 1": lambda: KernelSI(3, alpha=1, weights=0.3),
    "SI 2": lambda: KernelSI(3, alpha=2, weights=0.3),
    "DSI 1": lambda: KernelDSI(3, alpha=1, weights=0.3),
    "DSI 2": lambda: KernelDSI(3, alpha=2, weights=0.3),
    "DSI 4": lambda: KernelDSI(3, alpha=4, weights=0.3),
    "DSI adaptive": lambda: KernelDSIAdaptive(3, alpha=1.5, weights=0.3),
}
CUBATURE: Mapping[str, tuple[str, Callable[..., PointSet], float, dict[str, Any]]] = {
    "net, coefficients": ("net", DigitalNetB2, 1e-3, {}),
    "lattice, coefficients": ("lattice", Lattice, 1e-3, {}),
    "lattice, Bayes": ("bayes", Lattice, 1e-3, {"n_min": 256}),
    "net, Bayes": ("bayes", DigitalNetB2, 1e-3, {"n_min": 256, "alpha": 1}),
    "net, replications": ("replications", partial(DigitalNetB2, replications=16), 1e-3, {}),
    "independent, limit theorem": ("clt", Independent, 1e-2, {}),
}


def one_variable(x: Tensor) -> Tensor:
    """x e^x - 1, whose integral is 0."""
    return (x * x.exp()).squeeze(-1) - 1.0


def two_variables(x: Tensor) -> Tensor:
    """exp(x + y) - (e - 1)^2, whose integral is 0."""
    return x.exp().prod(-1) - (math.e - 1.0) ** 2


def keister(x: Tensor) -> Tensor:
    """pi^(d/2) cos |z| at z = the normal quantiles of x over root 2."""
    return math.pi ** (x.shape[-1] / 2) * torch.cos((normal_quantile(x) / math.sqrt(2.0)).norm(dim=-1))


def rates(seed: int) -> list[dict[str, Any]]:
    """One row a method, dimension and number of points."""
    rows = []
    for function, dimensions in ((one_variable, 1), (two_variables, 2)):
        for name, make in METHODS.items():
            source = generator(seed, "rates", name, dimensions)
            x = make(dimensions, replications=RANDOMIZATIONS, generator=source).points(1 << LEVELS[-1])
            values = function(baker(x) if name == "lattice, baker" else x)
            for level in LEVELS:
                error = values[:, : 1 << level].mean(1).square().mean().sqrt().item()
                case = {"study": "rates", "method": name, "dimensions": dimensions}
                rows.append({**case, "n": 1 << level, "rmse": error})
    return rows


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of log y over log x."""
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).unbind(-1)
    return ((x * y).sum() / (x * x).sum()).item()


def points_for(kernel: ProductKernel, seed: int, *names: str) -> PointSet:
    """The lattice or net that diagonalises a kernel."""
    make = Lattice if kernel.group == "lattice" else DigitalNetB2
    return make(kernel.dimensions, generator=generator(seed, "kernels", *names))


def fast_error(seed: int) -> float:
    """The largest difference to the dense product or solve, relative to its largest entry."""
    worst = 0.0
    for name, make in KERNELS.items():
        kernel = make()
        points = points_for(kernel, seed, name)
        for count in DENSE:
            y = torch.randn(count, dtype=torch.float64, generator=generator(seed, "y", name, count))
            x, gram = points.points(count), FastGram(kernel, points, count, nugget=RIDGE)
            dense = kernel.matrix(x, x) + RIDGE * torch.eye(count, dtype=torch.float64)
            for fast, exact in ((gram.matmul(y), dense @ y), (gram.solve(y), torch.linalg.solve(dense, y))):
                worst = max(worst, ((fast - exact).abs().max() / exact.abs().max()).item())
    return worst


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of a call."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def times(seed: int) -> list[dict[str, Any]]:
    """Seconds to set up and solve, by the fast route and, as far as it goes, by the dense one."""
    rows = []
    for name in ("SI 2", "DSI 2"):
        kernel = KERNELS[name]()
        points = points_for(kernel, seed, "time", name)
        for count in (256, 512, *TIMED):
            y = torch.randn(count, dtype=torch.float64, generator=generator(seed, "y", count))

            def fast(n: int = count, y: Tensor = y, k: ProductKernel = kernel, p: PointSet = points) -> Tensor:
                return FastGram(k, p, n, nugget=RIDGE).solve(y)

            def dense(n: int = count, y: Tensor = y, k: ProductKernel = kernel, p: PointSet = points) -> Tensor:
                x = p.points(n)
                return torch.linalg.solve(k.matrix(x, x) + RIDGE * torch.eye(n, dtype=torch.float64), y)

            case = {"study": "time", "method": name, "n": count}
            rows.append({**case, "route": "fast", "seconds": seconds(fast)})
            if count <= TIMED[0]:
                rows.append({**case, "route": "dense", "seconds": seconds(dense, 1)})
    return rows


def cubature(seed: int) -> list[dict[str, Any]]:
    """One row a method and step: points, the bound, and at the last step the true error."""
    rows = []
    for name, (method, make, tolerance, options) in CUBATURE.items():
        points = make(3, generator=generator(seed, "cubature", name))
        result = integrate(keister, points, method, abs_tol=tolerance, **options)  # type: ignore[arg-type]
        for step in result.history:
            rows.append({"study": "cubature", "method": name, "n": step["n"], "bound": step["half_width"]})
        rows[-1] |= {"error": abs(result.value.item() - KEISTER), "tolerance": tolerance}
    return rows


def reproduce(run: Run) -> Report:
    """One seed: rates of every method, fast against dense kernel systems, and six adaptive rules."""
    table = rates(run.seed)
    slopes = {}
    for dimensions in (1, 2):
        for name in METHODS:
            chosen = [row for row in table if row["method"] == name and row["dimensions"] == dimensions]
            slopes[name, dimensions] = slope([(row["n"], row["rmse"]) for row in chosen])
    run.event("rates", **{f"{name} d={d}": round(value, 2) for (name, d), value in slopes.items()})
    with torch.no_grad():
        error, timed = fast_error(run.seed), times(run.seed)
    large = [(r["n"], r["seconds"]) for r in timed if r["route"] == "fast" and r["n"] >= TIMED[0]]
    run.event("kernels", error=error, exponent=slope(large))
    adaptive = cubature(run.seed)
    ends = [row for row in adaptive if "error" in row]
    run.event("cubature", **{row["method"]: row["n"] for row in ends})
    metrics = {
        "order_two_slope": slopes["net of order 2", 1],
        "order_three_slope": slopes["net of order 3", 1],
        "scrambled_slope": slopes["net, scrambled", 1],
        "order_two_slope_in_two_dimensions": slopes["net of order 2", 2],
        "fast_gram_error": error,
        "time_exponent": slope(large),
        "cubature_within_tolerance": sum(row["error"] <= row["tolerance"] for row in ends) / len(ends),
    }
    return Report(metrics=metrics, rows=table + timed + adaptive)


def _mean_curve(rows: Sequence[Mapping[str, Any]], value: str) -> list[tuple[float, float]]:
    """The geometric mean over seeds at each n."""
    by_count: dict[float, list[float]] = {}
    for row in rows:
        by_count.setdefault(row["n"], []).append(math.log(max(row[value], 1e-300)))
    return [(count, math.exp(statistics.fmean(logs))) for count, logs in sorted(by_count.items())]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Points before and after scrambling, errors by method, times by route, and bounds by adaptive rule."""
    from kullback.figures import figure

    with figure(path, columns=4, size=(3.8, 3.6)) as (points_axes, rates_axes, time_axes, cubature_axes):
        first = DigitalNetB2(2, randomize=None).points(64, as_bits=True).double() * 2.0**-63
        second = DigitalNetB2(2, randomize="nus", generator=generator(0, "figure")).points(64)
        for x, color, label in ((first, "0.6", "Sobol'"), (second, "C1", "nested scrambling")):
            points_axes.plot(*x.unbind(-1), ".", label=label, markersize=5, color=color)
        ticks = [k / 8 for k in range(9)]
        points_axes.set(xticks=ticks, yticks=ticks, xticklabels=[], yticklabels=[], title="64 points: one in each cell")
        points_axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        points_axes.grid(linewidth=0.4)
        points_axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False, fontsize=7)
        for name in METHODS:
            chosen = [r for r in rows if r["study"] == "rates" and r["method"] == name and r["dimensions"] == 1]
            dashes = "--" if name == "lattice" else "-"  # it and shifted nets lie on each other
            rates_axes.loglog(*zip(*_mean_curve(chosen, "rmse")), dashes, label=name, linewidth=1.3, base=2)
        rates_axes.set_yscale("log", base=10)
        rates_axes.set(xlabel="points", title="root mean square error, x exp(x)")
        rates_axes.legend(frameon=False, fontsize=6.5, loc="lower left")
        for index, name in enumerate(("SI 2", "DSI 2")):
            for route, style in (("fast", "-"), ("dense", ":")):
                chosen = [r for r in rows if r["study"] == "time" and r["method"] == name and r["route"] == route]
                curve = _mean_curve(chosen, "seconds")
                time_axes.loglog(*zip(*curve), style, marker=".", color=f"C{index}", label=f"{name}, {route}")
        time_axes.set(xlabel="points", title="seconds to set up and solve")
        time_axes.legend(frameon=False, fontsize=7)
        for index, name in enumerate(CUBATURE):
            chosen = [r for r in rows if r["study"] == "cubature" and r["method"] == name]
            ends = [r for r in chosen if r.get("error") is not None]
            cubature_axes.loglog(*zip(*_mean_curve(chosen, "bound")), ".-", color=f"C{index}", label=name, markersize=4)
            cubature_axes.plot([r["n"] for r in ends], [r["error"] for r in ends], "x", color=f"C{index}")
        cubature_axes.set(xlabel="points", title="Keister's integral: bounds, last errors (x)")
        cubature_axes.legend(frameon=False, fontsize=6.5)
