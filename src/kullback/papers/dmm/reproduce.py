"""Unlearning two coherent sets of digits: by datamodel matching, by an oracle's outputs, and by five older ways.

"DMM" has the shifts as datamodels of 200, 400 and 700 models predict them; "calibrated" those of 700, and "TRAK" those
of projected gradients, scaled by what was seen of models retrained without like sets of the other digits. Of two points
for each set, a forgotten and a retained one, the margins of all models are kept for histograms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align.unlearn import (
    ForgetProblem,
    datamodel_matching,
    gradient_ascent,
    gradient_descent,
    gradient_descent_ascent,
    scrub,
)
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data.arrays import digits
from kullback.diagnose.attribution import (
    TRAKFeatures,
    calibrated_scale,
    ensemble_scores,
    fit_datamodels,
    predict_without,
)
from kullback.diagnose.unlearning import klom, margin
from kullback.figures import figure
from kullback.models.ensemble import EnsembleMLP, train_ensemble

__all__ = ["draw", "reproduce"]

POINTS, VALIDATION, FORGET, SIZES = 300, 300, 15, (64, 32, 10)
MODELS, SUBSETS, CHUNK, PENALTY = 60, (200, 400, 700), 100, 50.0
MATCHING: dict[str, Any] = {
    "epochs": 150, "learning_rate": 2e-3, "batch_size": 10_000, "forget_multiplier": 3, "retain_multiplier": 100,
}  # fmt: skip
DIGITS = (8, 3)  # whose most isolated example and its nearest neighbours are forgotten
REPEATS = 12  # retrained models for each like set of another digit, to calibrate
MEMBERS, PROJECTED = 10, 512  # models and dimensions of TRAK
CURVE = (15, 50)  # steps at which the matchings are judged besides
SHOWN = ("nothing", "calibrated", "oracle")  # whose margins are kept beside those of retrained models


def reproduce(run: Run) -> Report:
    """Both forget sets with all methods; the datamodels are those of one set of trained subsets."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=generator(run.seed, "digits"))
    train, held = order[:POINTS], order[POINTS : POINTS + VALIDATION]
    data = (images[train], labels[train], images[held], labels[held])
    original = _trained(data, MODELS, None, run.seed, "original")
    attributions = _attributions(data, original, run.seed)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {"dmm": [], "oracle": [], "retain": [], "validation": [], "ordered": []}
    for digit in DIGITS:
        problem = ForgetProblem(data[0], data[1], _neighbours(data[0], data[1], digit))
        found, kept = _compare(data, problem, original, attributions, run.seed)
        rows += [{"digit": digit, "method": name, **values} for name, values in found.items()]
        rows += [{"digit": digit, **row} for row in kept]
        best = min(v["forget"] for name, v in found.items() if name.split(" ")[0] in _BASELINES)
        matched, nothing = found["calibrated"], found["nothing"]
        ratios["dmm"].append(matched["forget"] / best)
        ratios["oracle"].append(found["oracle"]["forget"] / best)
        for name in ("retain", "validation"):
            ratios[name].append(matched[name] - nothing[name])
        steps = [found[f"DMM {count}"]["forget"] for count in SUBSETS]
        ratios["ordered"] += [float(after < before) for before, after in pairwise(steps)]
        run.event("forgotten", digit=digit, ratio=ratios["dmm"][-1])
    metrics = {
        "dmm_over_best_baseline": max(ratios["dmm"]),
        "retain_change": max(ratios["retain"]),
        "validation_change": max(ratios["validation"]),
        "oracle_over_best_baseline": max(ratios["oracle"]),
        "ordered_share": sum(ratios["ordered"]) / len(ratios["ordered"]),
    }
    return Report(metrics=metrics, rows=rows)


_BASELINES = ("nothing", "descent", "ascent", "both", "SCRUB")
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def _trained(data: Data, count: int, weights: Tensor | None, seed: int, name: str) -> EnsembleMLP:
    ensemble = EnsembleMLP(count, SIZES, generator=generator(seed, name))
    return train_ensemble(ensemble, data[0], data[1], weights=weights)


def _neighbours(images: Tensor, labels: Tensor, digit: int) -> Tensor:
    """The example of a digit that is farthest from its kind, with those nearest to it."""
    mine = (labels == digit).nonzero().squeeze(1)
    distance = torch.cdist(images[mine], images[mine])
    isolated = distance.topk(6, largest=False).values[:, 1:].mean(1).argmax()
    return mine[distance[isolated].topk(min(FORGET, len(mine)), largest=False).indices]


def _outputs(ensemble: torch.nn.Module, images: Tensor) -> Tensor:
    """Logits [models, n, C] less their mean over classes, which no softmax can tell."""
    with torch.no_grad():
        logits: Tensor = ensemble(images)
    return logits - logits.mean(-1, keepdim=True)


def _subsets(data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """Masks [M, n] of random halves, and the outputs [M, n, C] of a model trained on each."""
    masks, outputs = [], []
    for start in range(0, SUBSETS[-1], CHUNK):
        chosen = torch.rand(CHUNK, POINTS, generator=generator(seed, "halves", start)).argsort(1) < POINTS // 2
        masks.append(chosen.float())
        outputs.append(_outputs(_trained(data, CHUNK, masks[-1], seed, f"subset {start}"), data[0]))
    return torch.cat(masks), torch.cat(outputs)


def _attributions(data: Data, original: EnsembleMLP, seed: int) -> dict[str, tuple[Tensor, tuple[float, float]]]:
    """For each attribution, beta [n, n, C] and the scales of its shifts on forgotten and on all other points."""
    masks, outputs = _subsets(data, seed)
    found: dict[str, tuple[Tensor, tuple[float, float]]] = {}
    for count in SUBSETS:
        beta, _ = fit_datamodels(masks[:count], outputs[:count], penalty=PENALTY)
        found[f"DMM {count}"] = beta, (1.0, 1.0)
    members = [
        TRAKFeatures(original.member(i), dimensions=PROJECTED, penalty=1.0, generator=generator(seed, "trak", i))
        for i in range(min(MEMBERS, MODELS))
    ]
    held, seen = _held_out(data, seed)
    base = _outputs(original, data[0]).mean(0)
    for name, fitted in (("calibrated", beta), ("TRAK", ensemble_scores(members, data[:2], data[0]))):
        out, kept = (calibrated_scale(fitted, held, seen, base, where=held == there) for there in (0, 1))
        found[name] = fitted, (out, kept)
    return found


def _held_out(data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """Masks and outputs of models retrained without sets chosen as those to be forgotten are, but of other digits."""
    others = [_neighbours(data[0], data[1], digit) for digit in range(10) if digit not in DIGITS]
    masks = torch.ones(REPEATS * len(others), POINTS)
    for place in range(len(masks)):
        masks[place, others[place % len(others)]] = 0.0
    return masks, _outputs(_trained(data, len(masks), masks, seed, "calibration"), data[0])


def _compare(
    data: Data, problem: ForgetProblem, original: EnsembleMLP,
    attributions: Mapping[str, tuple[Tensor, tuple[float, float]]], seed: int,
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:  # fmt: skip
    """KLoM of every method, and rows of the margins at two points."""
    weights = torch.ones(MODELS, POINTS)
    weights[:, problem.forget] = 0.0
    oracles = [_trained(data, MODELS, weights, seed, f"oracle {name}") for name in ("a", "b", "c")]
    true = _margins(oracles[0], data)

    seen = {"retrained": true}

    def judged(model: torch.nn.Module, steps: int, name: str = "") -> dict[str, float]:
        margins = _margins(model, data)
        if name in SHOWN:
            seen[name] = margins
        values = klom(margins, true)
        sets = {"forget": problem.forget, "retain": problem.retain}
        sets["validation"] = torch.arange(POINTS, POINTS + VALIDATION)
        return {"steps": steps, **{name: values[points].mean().item() for name, points in sets.items()}}

    found = {"nothing": judged(original, 0, "nothing"), "floor": judged(oracles[1], 0)}
    for name, (model, steps) in _baselines(original, problem, seed).items():
        found[name] = judged(model, steps)
    draw = generator(seed, "matching")

    def matched(targets: Tensor, steps: int, name: str = "") -> dict[str, float]:
        options = {**MATCHING, "epochs": steps}
        return judged(datamodel_matching(original, problem, targets, generator=draw, **options), steps, name)

    with torch.no_grad():
        own = original(data[0])
    # The mean over classes is the model's own: no softmax sees it, and matching another's would be work for nothing.
    targets = {"oracle": _outputs(oracles[2], data[0]) + own.mean(-1, keepdim=True)}
    for name, (beta, (forgotten, kept)) in attributions.items():
        scale = torch.full((POINTS, 1), kept)
        scale[problem.forget] = forgotten
        targets[name] = predict_without(beta, own, problem.forget, scale=scale)
    for name, wanted in targets.items():
        found[name] = matched(wanted, MATCHING["epochs"], name)
    for steps in CURVE:
        for name in ("oracle", "calibrated"):
            found[f"{name} after {steps}"] = matched(targets[name], steps)
    return found, _kept(seen, problem)


def _kept(seen: Mapping[str, Tensor], problem: ForgetProblem) -> list[dict[str, Any]]:
    """All models' margins at the point of either set that is its median by KLoM of the untouched models."""
    values = klom(seen["nothing"], seen["retrained"])
    rows: list[dict[str, Any]] = []
    for name, points in (("forgotten", problem.forget), ("retained", problem.retain)):
        point = int(points[values[points].argsort()[len(points) // 2]])
        for method, margins in seen.items():
            numbers = [round(value, 3) for value in margins[:, point].tolist()]
            rows.append({"point": point, "set": name, "margins_of": method, "margins": numbers})
    return rows


def _margins(model: torch.nn.Module, data: Data) -> Tensor:
    """[models, training and validation points]."""
    with torch.no_grad():
        logits = model(torch.cat([data[0], data[2]]))
    return margin(logits, torch.cat([data[1], data[3]]))


def _baselines(original: EnsembleMLP, problem: ForgetProblem, seed: int) -> dict[str, tuple[torch.nn.Module, int]]:
    """Every older way over its grid, with the steps that it took."""
    options: dict[str, Any] = {"generator": generator(seed, "baselines"), "batch_size": 10_000, "learning_rate": 2e-3}
    found: dict[str, tuple[torch.nn.Module, int]] = {}
    for epochs in (50, 200):
        found[f"descent {epochs}"] = gradient_descent(original, problem, epochs=epochs, **options), epochs
    for epochs in (1, 5, 20):
        found[f"ascent {epochs}"] = gradient_ascent(original, problem, epochs=epochs, **options), epochs
    for epochs in (10, 50):
        model = gradient_descent_ascent(original, problem, epochs=epochs, ascent=0.1, **options)
        found[f"both {epochs}"] = model, epochs
    for epochs in (5, 20):
        found[f"SCRUB {epochs}"] = scrub(original, problem, epochs=epochs, **options), epochs + 3
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KLoM on forgotten and on retained points, a panel a forget set; against steps; and margins at single points."""
    kept = [row for row in rows if "margins" in row]
    rows = [row for row in rows if "margins" not in row]
    names = list(dict.fromkeys(row["method"].split(" ")[0] for row in rows))
    with figure(path, columns=len(DIGITS) + 3, size=(3.7, 3.8)) as axes:
        for panel, digit in zip(axes, DIGITS, strict=False):
            for place, name in enumerate(names):
                mine = [row for row in rows if row["digit"] == digit and "after" not in row["method"]]
                found = [row for row in mine if row["method"].split(" ")[0] == name]
                marker = "*" if name in ("DMM", "calibrated", "TRAK", "oracle", "floor") else "o"
                x, y = ([row[key] for row in found] for key in ("forget", "retain"))
                panel.plot(x, y, marker, color=f"C{place}", label=name, alpha=0.7, markersize=6)
            panel.set(xlabel=f"KLoM on the forgotten {digit}s (nats)", ylabel="KLoM on retained points (nats)")
        axes[0].legend(frameon=False, fontsize=7)
        _steps(axes[len(DIGITS)], rows, names)
        for panel, name in zip(axes[-2:], ("forgotten", "retained")):
            _histograms(panel, [row for row in kept if row["set"] == name], names)
            panel.set(xlabel=f"margin at a {name} point", ylabel="models")


def _histograms(panel: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """The margins of the first seed's models for the first forget set, in bins that all methods share."""
    mine = [row for row in rows if (row["seed"], row["digit"]) == (rows[0]["seed"], rows[0]["digit"])]
    everything = torch.tensor([row["margins"] for row in mine]).flatten()
    edges = torch.linspace(everything.min().item(), everything.max().item(), 26).tolist()
    for row in mine:
        name = row["margins_of"]
        if name == "retrained":
            panel.hist(row["margins"], edges, color="0.8", label=name)
        else:
            color = f"C{names.index(name)}"
            panel.hist(row["margins"], edges, histtype="step", color=color, linewidth=1.4, label=name)
    panel.legend(frameon=False, fontsize=7)


def _steps(panel: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Means over forget sets and seeds, from the untouched model on; the colours are those of the other panels."""
    for place, name in enumerate(names):
        mine = [row for row in rows if row["method"] == "nothing" or row["method"].split(" ")[0] == name]
        steps = sorted({row["steps"] for row in mine})
        for key, style in (("forget", "-"), ("retain", ":")):
            found = [[row[key] for row in mine if row["steps"] == count] for count in steps]
            if len(steps) > 2:
                means = [sum(values) / len(values) for values in found]
                panel.plot(steps, means, style, marker=".", color=f"C{place}", label=name if style == "-" else None)
    panel.set_xscale("symlog", linthresh=1.0)
    panel.set(xlabel="steps", ylabel="KLoM: forgotten (full), retained (dotted), nats", xlim=(0, None), ylim=(0, None))
    panel.legend(frameon=False, fontsize=7)
