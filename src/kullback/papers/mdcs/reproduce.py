"""MDCS (arXiv 2308.09922) in small: 30 long-tailed classes, ensembles of three experts, and what each part adds.

The classes are a mixture of normals in 6 groups of 5, in 16 dimensions, seen through a random map to 64 features.
Training has 200 samples of the most frequent class and 4 of the rarest, the test 60 of each. Every model has one shared
layer and three experts with cosine heads, trained on two noisy views of each sample; they differ in lam and alpha.
Models of five further seeds of the training, on the same data, tell how much predictions vary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data.long_tail import long_tail_counts, many_medium_few
from kullback.diagnose.ensembles import disagreement, mean_pairwise_kl, prediction_variance
from kullback.distill.mdcs import LAM
from kullback.distill.mdcs_classifier import MDCSClassifier, fit_together

__all__ = ["draw", "reproduce"]

GROUPS, CLASSES, LATENT, FEATURES = 6, 30, 16, 64
LARGEST, RATIO, TEST, REPEATS = 200, 50, 60, 6
ALPHA, EPOCHS = 0.6, 40
SETTINGS: Mapping[str, Any] = {"warm_epochs": 10, "hidden": 64, "width": 32, "scale": 16.0}
# lam and alpha of each ensemble.
METHODS: Mapping[str, tuple[tuple[float, ...], float]] = {
    "cross-entropy": ((0.0, 0.0, 0.0), 0.0),
    "balanced": ((1.0, 1.0, 1.0), 0.0),
    "diversity": (LAM, 0.0),
    "balanced + consistency": ((1.0, 1.0, 1.0), ALPHA),
    "MDCS": (LAM, ALPHA),
}
VARIED = ("diversity", "MDCS")  # trained with further seeds


def mixture(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training rows and labels, test rows and labels, and the training counts, from the most frequent class down."""
    draw = generator(seed, "mixture")
    groups = 1.2 * torch.randn(GROUPS, LATENT, generator=draw)
    own = 0.8 * torch.randn(CLASSES, LATENT, generator=draw)
    shuffled = torch.randperm(CLASSES, generator=draw)  # so that groups hold frequent and rare classes
    centres = groups[shuffled % GROUPS] + own
    mapping = torch.randn(LATENT, FEATURES, generator=draw) / LATENT**0.5
    counts = long_tail_counts(LARGEST, CLASSES, RATIO)

    def sample(numbers: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.repeat_interleave(torch.arange(CLASSES), numbers)
        latent = centres[labels] + torch.randn(len(labels), LATENT, generator=draw)
        return (latent @ mapping).tanh(), labels

    return *sample(counts), *sample(torch.full((CLASSES,), TEST)), counts


def train(seed: int, rows: Tensor, labels: Tensor, epochs: int) -> dict[str, list[MDCSClassifier]]:
    """The ensembles of each method, all trained at once: one, or REPEATS with further seeds of the training."""
    members = {
        method: [
            MDCSClassifier(lam=lam, alpha=alpha, seed=seed + 1000 * repeat, epochs=epochs, **SETTINGS)
            for repeat in range(REPEATS if method in VARIED else 1)
        ]
        for method, (lam, alpha) in METHODS.items()
    }
    fit_together([member for several in members.values() for member in several], rows, labels)
    return members


def by_class(predicted: Tensor, labels: Tensor) -> Tensor:
    """Accuracy [CLASSES] in per cent."""
    right = 100.0 * (predicted == labels).double()
    return torch.stack([right[labels == index].mean() for index in range(CLASSES)])


def summary(accuracy: Tensor, counts: Tensor) -> dict[str, float]:
    return {"all": accuracy.mean().item(), **many_medium_few(counts, accuracy)}


def study(seed: int, epochs: int = EPOCHS) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows for the figure, and for each method its accuracies, those of its experts, and how it varies."""
    rows, labels, test_rows, test_labels, counts = mixture(seed)
    table, found = [], {}
    for method, several in train(seed, rows, labels, epochs).items():
        logits = torch.stack([member.expert_logits(test_rows) for member in several])
        accuracy = by_class(logits[0].mean(0).argmax(-1), test_labels)
        found[method] = summary(accuracy, counts)
        found[method]["diversity"] = mean_pairwise_kl(logits[0].log_softmax(-1)).mean().item()
        if method in VARIED:
            runs = logits.mean(1).log_softmax(-1)
            found[method]["disagreement"] = 100 * disagreement(runs).mean().item()
            found[method]["variance"] = prediction_variance(runs).mean().item()
        table.append({"method": method, "expert": "mean", "by_class": accuracy.tolist(), **found[method]})
        for index, expert in enumerate(logits[0]):
            accuracy = by_class(expert.argmax(-1), test_labels)
            parts = summary(accuracy, counts)
            found[method] |= {f"{name}_{index}": value for name, value in parts.items()}
            table.append({"method": method, "expert": str(index + 1), "by_class": accuracy.tolist(), **parts})
    return table, found


def reproduce(run: Run) -> Report:
    """One seed: all ensembles on one draw of the mixture, and the further runs of two of them."""
    table, found = study(run.seed)
    ours, plain, diverse = found["MDCS"], found["cross-entropy"], found["diversity"]
    balanced = found["balanced + consistency"]
    steps = [ours[f"many_{k}"] - ours[f"many_{k + 1}"] for k in range(2)]
    steps += [ours[f"few_{k + 1}"] - ours[f"few_{k}"] for k in range(2)]
    metrics = {
        "gain_over_ce": ours["all"] - plain["all"],
        "gain_over_ce_few": ours["few"] - plain["few"],
        "gain_over_balanced_with_consistency": ours["all"] - balanced["all"],
        "many_fall": ours["many_0"] - ours["many_2"],
        "few_rise": ours["few_2"] - ours["few_0"],
        "ordered_share": sum(step > 0 for step in steps) / len(steps),
        "disagreement_fall": diverse["disagreement"] - ours["disagreement"],
        "variance_fall": diverse["variance"] - ours["variance"],
        "gain_over_diversity_only": ours["all"] - diverse["all"],
        "accuracy": ours["all"],
    }
    run.event("accuracies", **{name: parts["all"] for name, parts in found.items()})
    return Report(metrics=metrics, rows=table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy of every class by frequency for the experts and their mean, methods by group, and what varies."""
    from kullback.figures import figure

    with figure(path, columns=3, size=(4.2, 3.4)) as (classes, groups, varying):
        for color, (expert, label) in enumerate(
            (("1", "expert 1, λ = −0.5"), ("2", "expert 2, λ = 1"), ("3", "expert 3, λ = 2.5"), ("mean", "mean"))
        ):
            lines = torch.tensor(_column(rows, "MDCS", expert, "by_class")).mean(0)
            smooth = torch.stack([lines[max(0, c - 1) : c + 2].mean() for c in range(CLASSES)])
            style = {"color": "black", "linewidth": 2.0} if expert == "mean" else {"color": f"C{color}"}
            classes.plot(range(1, CLASSES + 1), smooth, label=label, **style)
        classes.set(xlabel="class, the most frequent first", ylabel="accuracy (%)", title="MDCS, mean of three classes")
        classes.legend(frameon=False, fontsize=8)
        names = ("all", "many", "medium", "few")
        for index, method in enumerate(METHODS):
            values = [torch.tensor(_column(rows, method, "mean", name)) for name in names]
            places = [place + 0.15 * (index - 2) for place in range(len(names))]
            means, spreads = [v.mean() for v in values], [v.std(correction=0) for v in values]
            groups.errorbar(places, means, yerr=spreads, fmt="o", markersize=4, color=f"C{index}", label=method)
        groups.set_xticks(range(len(names)), names)
        groups.set(xlabel="training samples of a class", title="mean and deviation of seeds")
        groups.legend(frameon=False, fontsize=8)
        for index, method in enumerate(VARIED):
            values = _column(rows, method, "mean", "disagreement")
            varying.plot([index] * len(values), values, "o", color=f"C{list(METHODS).index(method)}")
        pairs = zip(*(_column(rows, method, "mean", "disagreement") for method in VARIED), strict=True)
        for pair in pairs:
            varying.plot([0, 1], pair, color="0.8", zorder=0)
        varying.set_xticks([0, 1], ["diversity alone", "with consistency"])
        varying.set(xlim=(-0.4, 1.4), ylabel="samples (%)", title="where two runs disagree")


def _column(rows: Sequence[Mapping[str, Any]], method: str, expert: str, name: str) -> list[Any]:
    return [row[name] for row in rows if (row["method"], row["expert"]) == (method, expert)]
