"""Unlearning two coherent sets of digits: by datamodel matching, by an oracle's outputs, and by five older ways."""

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
from kullback.diagnose.attribution import fit_datamodels, predict_without
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


def reproduce(run: Run) -> Report:
    """Both forget sets with all methods; the datamodels are those of one set of trained subsets."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=generator(run.seed, "digits"))
    train, held = order[:POINTS], order[POINTS : POINTS + VALIDATION]
    data = (images[train], labels[train], images[held], labels[held])
    masks, outputs = _subsets(data, run.seed)
    original = _trained(data, MODELS, None, run.seed, "original")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {"dmm": [], "oracle": [], "retain": [], "validation": [], "ordered": []}
    for digit in DIGITS:
        problem = ForgetProblem(data[0], data[1], _neighbours(data[0], data[1], digit))
        found = _compare(data, problem, original, masks, outputs, run.seed)
        rows += [{"digit": digit, "method": name, **values} for name, values in found.items()]
        best = min(v["forget"] for name, v in found.items() if name.split(" ")[0] in _BASELINES)
        matched, nothing = found[f"DMM {SUBSETS[-1]}"], found["nothing"]
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


def _compare(
    data: Data, problem: ForgetProblem, original: EnsembleMLP, masks: Tensor, outputs: Tensor, seed: int
) -> dict[str, dict[str, float]]:
    weights = torch.ones(MODELS, POINTS)
    weights[:, problem.forget] = 0.0
    oracles = [_trained(data, MODELS, weights, seed, f"oracle {name}") for name in ("a", "b", "c")]
    true = _margins(oracles[0], data)

    def judged(model: torch.nn.Module) -> dict[str, float]:
        values = klom(_margins(model, data), true)
        sets = {"forget": problem.forget, "retain": problem.retain}
        sets["validation"] = torch.arange(POINTS, POINTS + VALIDATION)
        return {name: values[points].mean().item() for name, points in sets.items()}

    found = {"nothing": judged(original), "floor": judged(oracles[1])}
    for name, model in _baselines(original, problem, seed).items():
        found[name] = judged(model)
    draw = generator(seed, "matching")
    with torch.no_grad():
        own = original(data[0])
    # The mean over classes is the model's own: no softmax sees it, and matching another's would be work for nothing.
    seen = _outputs(oracles[2], data[0]) + own.mean(-1, keepdim=True)
    found["oracle"] = judged(datamodel_matching(original, problem, seen, generator=draw, **MATCHING))
    for count in SUBSETS:
        beta, _ = fit_datamodels(masks[:count], outputs[:count], penalty=PENALTY)
        targets = predict_without(beta, own, problem.forget)
        found[f"DMM {count}"] = judged(datamodel_matching(original, problem, targets, generator=draw, **MATCHING))
    return found


def _margins(model: torch.nn.Module, data: Data) -> Tensor:
    """[models, training and validation points]."""
    with torch.no_grad():
        logits = model(torch.cat([data[0], data[2]]))
    return margin(logits, torch.cat([data[1], data[3]]))


def _baselines(original: EnsembleMLP, problem: ForgetProblem, seed: int) -> dict[str, torch.nn.Module]:
    """Every older way over its grid."""
    options: dict[str, Any] = {"generator": generator(seed, "baselines"), "batch_size": 10_000}
    found: dict[str, torch.nn.Module] = {}
    for epochs in (50, 200):
        found[f"descent {epochs}"] = gradient_descent(original, problem, epochs=epochs, learning_rate=2e-3, **options)
    for epochs in (1, 5, 20):
        found[f"ascent {epochs}"] = gradient_ascent(original, problem, epochs=epochs, learning_rate=2e-3, **options)
    for epochs in (10, 50):
        found[f"both {epochs}"] = gradient_descent_ascent(
            original, problem, epochs=epochs, learning_rate=2e-3, ascent=0.1, **options
        )
    for epochs in (5, 20):
        found[f"SCRUB {epochs}"] = scrub(original, problem, epochs=epochs, learning_rate=2e-3, **options)
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KLoM on forget and on retained points of every method, a panel a forget set; a dot a seed."""
    with figure(path, columns=len(DIGITS), size=(5.2, 3.8)) as axes:
        for panel, digit in zip(axes, DIGITS, strict=True):
            mine = [row for row in rows if row["digit"] == digit]
            for place, name in enumerate(dict.fromkeys(row["method"].split(" ")[0] for row in mine)):
                found = [row for row in mine if row["method"].split(" ")[0] == name]
                marker = "*" if name in ("DMM", "oracle", "floor") else "o"
                x, y = ([row[key] for row in found] for key in ("forget", "retain"))
                panel.plot(x, y, marker, color=f"C{place}", label=name, alpha=0.7, markersize=6)
            panel.set(xlabel=f"KLoM on the forgotten {digit}s (nats)", ylabel="KLoM on retained points (nats)")
        axes[0].legend(frameon=False, fontsize=7)
