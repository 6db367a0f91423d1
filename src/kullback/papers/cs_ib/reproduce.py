"""CS-IB (arXiv 2404.17951) in small: perceptrons with one bottleneck, trained by four objectives, under attack.

Diabetes: 442 patients. Friedman-1: 700 samples with Student-t noise of two degrees of freedom. Inputs and targets are
standardised. All networks of a seed begin alike and see the same batches: squared error (MSE), the same with early
stopping, the variational bottleneck (VIB), and Cauchy-Schwarz with several weights on compression.

A weight means something else in every objective, so the methods are compared at equal compression too, as in the paper:
the weight of each is raised until I(x; t) has fallen by a quarter and by a half, and the errors are read there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.distill.bottleneck import Bottleneck, fgsm, pgd
from kullback.distill.bottleneck_bounds import robustness_bound, smoothed_shift
from kullback.divergences.cauchy_schwarz_samples import cs_qmi_normalized
from kullback.papers.cs_ib.objectives import FAMILIES, Objective, at_ratio, mse, raised

__all__ = ["draw", "reproduce"]

HIDDEN, WIDTH, RATE, EPOCHS, BATCH = (128, 128), 16, 1e-3, 80, 128
ATTACKS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)  # strengths of FGSM
BETAS = (0.0, 0.01, 0.1, 0.5)
VIB_WEIGHT = 1e-2
RATIOS = (0.25, 0.5)  # shares of I(x; t) given up, at which all methods are compared
AT_ZERO = dict.fromkeys(("NIB", "squared NIB", "exponential NIB"), "VIB")  # where they are the same network
METHODS = ("MSE", "MSE, early", "VIB", *(f"CS-IB {beta:g}" for beta in BETAS))


class Table(NamedTuple):
    """Standardised inputs [n, d] and targets [n]: to train on, to stop early by, to test on."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def tables(seed: int) -> dict[str, Table]:
    """Both data sets, split 70 to 30 by the seed; a tenth of all rows is taken from the training part to stop by."""
    from sklearn.datasets import load_diabetes

    rows, disease = load_diabetes(return_X_y=True)
    source = generator(seed, "friedman")
    points = torch.rand(700, 10, generator=source, dtype=torch.float64)
    waves = 10 * torch.sin(math.pi * points[:, 0] * points[:, 1]) + 20 * (points[:, 2] - 0.5).square()
    normal, chi = torch.randn(3, 700, generator=source, dtype=torch.float64).split((1, 2))
    noise = normal[0] / (chi.square().sum(0) / 2).sqrt()
    found = {
        "diabetes": (torch.from_numpy(rows), torch.from_numpy(disease)),
        "friedman": (points, waves + 10 * points[:, 3] + 5 * points[:, 4] + noise),
    }
    return {name: _split(x, y, generator(seed, "split", name)) for name, (x, y) in found.items()}


def _split(x: Tensor, y: Tensor, source: torch.Generator) -> Table:
    order = torch.randperm(len(x), generator=source)
    n, held = int(0.7 * len(x)), len(x) // 10
    train = order[:n]
    x = (x - x[train].mean(0)) / x[train].std(0, correction=0)
    y = (y - y[train].mean()) / y[train].std(correction=0)
    parts = train, train[-held:], order[n:]
    return Table(*((x[rows].float(), y[rows].float()) for rows in parts))


def fit(table: Table, objective: Objective, seed: int, *, stochastic: bool = False, early: bool = False) -> Bottleneck:
    """EPOCHS of Adam; with early, on the rows that are not held out, and back to the epoch that was best on those."""
    x, y = table.train
    if early:
        kept = len(y) - len(table.held_out[1])
        x, y = x[:kept], y[:kept]
    source = generator(seed, "network")
    network = Bottleneck(x.shape[1], hidden=HIDDEN, k=WIDTH, stochastic=stochastic, generator=source)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    batches, noise = generator(seed, "batches"), generator(seed, "noise")
    best, weights = math.inf, network.state_dict()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=batches).split(BATCH):
            optimizer.zero_grad()
            objective(x[rows], y[rows], network(x[rows], noise)).backward()
            optimizer.step()
        if early and (error := rmse(network, *table.held_out)) < best:
            best, weights = error, {name: value.clone() for name, value in network.state_dict().items()}
    if early:
        network.load_state_dict(weights)
    return network


def predicted(network: Bottleneck, x: Tensor) -> Tensor:
    return network(x).prediction.squeeze(1)


@torch.no_grad()
def rmse(network: Bottleneck, x: Tensor, y: Tensor) -> float:
    """The root of the mean squared error in deviations of the target."""
    return (predicted(network, x) - y).square().mean().sqrt().item()


def information(network: Bottleneck, table: Table, seed: int) -> float:
    """I(x; t) on the training rows, normalised, of a representation with its noise."""
    x = table.train[0]
    with torch.no_grad():
        t = network(x, generator(seed, "information")).representation
    return cs_qmi_normalized(x, t, sigma_x=math.sqrt(x.shape[1]), sigma_t=math.sqrt(t.shape[1])).item()


def measured(network: Bottleneck, table: Table, seed: int) -> dict[str, Any]:
    """Errors on the test rows, clean and attacked, and where the training rows lie in the information plane.

    shift: the most that FGSM moves the prediction smoothed over the training rows; bound: what it cannot exceed.
    """
    x, y = table.test
    model = partial(predicted, network)
    errors = {f"fgsm {eps:g}": rmse(network, fgsm(model, x, y, eps=eps), y) for eps in ATTACKS}
    errors["pgd 0.3"] = rmse(network, pgd(model, x, y, eps=0.3, alpha=0.05, steps=5), y)
    with torch.no_grad():
        seen, t = table.train[0], network(table.train[0]).representation
        widths = math.sqrt(seen.shape[1]), math.sqrt(t.shape[1])
        # an attack of 0.3 in each coordinate is this long
        bound = robustness_bound(
            seen, t, model(seen), radius=0.3 * widths[0], sigma_x=widths[0], sigma_t=widths[1]
        ).item()
    moved = fgsm(model, x, y, eps=0.3)
    shift = smoothed_shift(seen, model(seen), x, moved, sigma_x=widths[0]).max().item()
    relevance = -math.log2(rmse(network, *table.test))  # half the logarithm of variance over squared error
    compression = information(network, table, seed)
    return {"compression": compression, "relevance": relevance, "bound": bound, "shift": shift, **errors}


def network_of(table: Table, seed: int) -> Callable[[str, float], Bottleneck]:
    """The network of a family at a weight, trained once."""

    @cache
    def trained(name: str, weight: float) -> Bottleneck:
        return fit(table, FAMILIES[name].at(weight), seed, stochastic=FAMILIES[name].stochastic)

    return lambda name, weight: trained(AT_ZERO.get(name, name) if weight == 0.0 else name, weight)


def equally_compressed(table: Table, seed: int, network: Callable[[str, float], Bottleneck]) -> list[dict[str, Any]]:
    """Rows of all families: the weights that were tried, and the errors where a share of I(x; t) is given up."""
    x, y = table.test

    def measure(name: str, weight: float) -> tuple[float, tuple[float, ...]]:
        found = network(name, weight)
        attacked = fgsm(partial(predicted, found), x, y, eps=0.3)
        return information(found, table, seed), (rmse(found, x, y), rmse(found, attacked, y))

    rows: list[dict[str, Any]] = []
    for name, family in FAMILIES.items():
        points = raised(family.first, partial(measure, name), max(RATIOS))
        tried = [(point.weight, point.ratio, point.errors) for point in points]
        for weight, ratio, errors in tried + [(None, ratio, at_ratio(points, ratio)) for ratio in RATIOS]:
            rows.append({"family": name, "weight": weight, "ratio": ratio, "clean": errors[0], "attacked": errors[1]})
    return rows


def reproduce(run: Run) -> Report:
    """One seed: both tables, a network for each method and weight."""
    rows: list[dict[str, Any]] = []
    for name, table in tables(run.seed).items():
        network = network_of(table, run.seed)
        fits: dict[str, Bottleneck] = {
            "MSE": fit(table, mse, run.seed),
            "MSE, early": fit(table, mse, run.seed, early=True),
            "VIB": network("VIB", VIB_WEIGHT),
            **{f"CS-IB {beta:g}": network("CS-IB", beta) for beta in BETAS},
        }
        rows += [{"data": name, "method": method, **measured(net, table, run.seed)} for method, net in fits.items()]
        rows += [{"data": name, **row} for row in equally_compressed(table, run.seed, network)]
        run.event(name, **{row["method"]: row["fgsm 0"] for row in rows if row["data"] == name and "method" in row})
    return Report(metrics={**at_given_weights(rows), **at_equal_compression(rows)}, rows=rows)


def at_given_weights(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CS-IB with a weight of 0.01 beside the others."""

    def error(data: str, method: str, attack: str) -> float:
        (found,) = (row[attack] for row in rows if row["data"] == data and row.get("method") == method)
        return float(found)

    ours, clean, attack = "CS-IB 0.01", "fgsm 0", "fgsm 0.3"
    return {
        "rmse_ratio_mse": error("diabetes", ours, clean) / error("diabetes", "MSE", clean),
        "rmse_ratio_mse_early": error("diabetes", ours, clean) / error("diabetes", "MSE, early", clean),
        "rmse_minus_vib": error("diabetes", ours, clean) - error("diabetes", "VIB", clean),
        "attacked_ratio_mse_diabetes": error("diabetes", ours, attack) / error("diabetes", "MSE", attack),
        "attacked_ratio_mse_friedman": error("friedman", ours, attack) / error("friedman", "MSE", attack),
        "attacked_ratio_vib_diabetes": error("diabetes", ours, attack) / error("diabetes", "VIB", attack),
        "shift_over_bound": max(row["shift"] / row["bound"] for row in rows if "method" in row),
        "attacked_ratio_early_diabetes": error("diabetes", ours, attack) / error("diabetes", "MSE, early", attack),
    }


def at_equal_compression(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CS-IB less its peers where both have given up the same share of I(x; t).

    With noise it is beside VIB and the best of the four bounds, in each seed; without, beside the HSIC bottleneck.
    """
    at = {
        (row["data"], row["ratio"], row["family"]): row
        for row in rows
        if "family" in row and (row["weight"] is None or row["weight"] == 0.0)
    }
    metrics = {}
    for data in ("diabetes", "friedman"):
        for ratio in (0.0, *RATIOS):
            place = f"{data}_{100 * ratio:.0f}"
            found = {name: at[data, ratio, name] for name in FAMILIES}
            noisy = found["CS-IB, noise"]
            for key, prefix in (("clean", "equal"), ("attacked", "equal_attacked")):
                best = min(found[name][key] for name in ("VIB", *AT_ZERO))
                metrics[f"{prefix}_over_vib_{place}"] = noisy[key] - found["VIB"][key]
                metrics[f"{prefix}_over_best_{place}"] = noisy[key] - best
                metrics[f"{prefix}_over_hsic_{place}"] = found["CS-IB"][key] - found["HSIC"][key]
    return metrics


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Error against the strength of the attack, the information plane of diabetes, and error against compression."""
    from kullback.figures import figure

    def values(data: str, method: str, key: str) -> Tensor:
        return torch.tensor([row[key] for row in rows if row["data"] == data and row.get("method") == method])

    with figure(path, columns=5, size=(3.5, 3.6)) as (diabetes, friedman, plane, *compressed):
        for axes, data in ((diabetes, "diabetes"), (friedman, "friedman")):
            for color, method in enumerate(METHODS):
                means = [values(data, method, f"fgsm {eps:g}").mean().item() for eps in ATTACKS]
                style = "--" if method.startswith("MSE") else "-"
                axes.plot(ATTACKS, means, style, marker="o", markersize=3, color=f"C{color}", label=method)
            axes.set(xlabel="strength of FGSM (deviations of an input)", title=f"{data}: mean over seeds")
        diabetes.set_ylabel("test RMSE (deviations of the target)")
        for color, method in enumerate(METHODS):
            at = [values("diabetes", method, key) for key in ("compression", "relevance")]
            plane.plot(*at, ".", color=f"C{color}", alpha=0.4)
            plane.plot(at[0].mean(), at[1].mean(), "s", color=f"C{color}", label=method)
        plane.set(xlabel="I(x; t), normalised", ylabel="I(y; t) on test rows (bits)")
        plane.set_title("diabetes: information plane")
        plane.legend(frameon=False, fontsize=7)
        for axes, data in zip(compressed, ("diabetes", "friedman"), strict=True):
            _compressed(axes, data, rows)


def _compressed(axes: Any, data: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Clean (solid) and attacked (dotted) errors at shares of I(x; t) given up, less those of VIB with weight 0."""
    at = {
        (row["family"], row["ratio"], row["seed"]): row
        for row in rows
        if row["data"] == data and "family" in row and row["weight"] in (None, 0.0)
    }
    seeds, ratios = sorted({seed for _, _, seed in at}), (0.0, *RATIOS)
    for index, name in enumerate(FAMILIES):
        for key, style in (("clean", "-"), ("attacked", ":")):
            found = [
                torch.tensor([at[name, ratio, seed][key] - at["VIB", 0.0, seed][key] for seed in seeds])
                for ratio in ratios
            ]
            label = name if key == "clean" else None
            means, spread = ([value.item() for value in values] for values in (
                [errors.mean() for errors in found], [errors.std(correction=0) for errors in found]))  # fmt: skip
            axes.plot(ratios, means, style, marker="o", markersize=3, color=f"C{index}", label=label)
            if name == "CS-IB, noise":
                axes.errorbar(ratios, means, spread, color=f"C{index}", linestyle="none", capsize=3)
    axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="share of I(x; t) given up", title=f"{data}: clean (-) and attacked (:)", xticks=ratios)
    axes.set_ylabel("RMSE less that of VIB at 0")
    if data == "friedman":
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
