"""The universality lens (arXiv 2506.07661) in small: regret follows the weight of the target, not the class's size.

Functions: networks on 5 binary inputs, drawn from a prior and merged into distinct Boolean functions, are the class of
an exact mixture; labels are a target function's, flipped with probability 0.1, for targets of falling weight and three
widths. Digits: a Langevin ensemble beside plain SGD over widths, with wrong and with clean training labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data.arrays import digits
from kullback.diagnose import GaussianPrior, SGLDEnsemble
from kullback.diagnose.universality import merge_functions

__all__ = ["draw", "reproduce"]

WIDTHS, NETWORKS, FLIP = (8, 32, 128), 60_000, 0.1
LEVELS = (0.0, 7.0, 8.0, 9.0, 10.0, 11.0)  # -log weight of the targets, from the simplest one on
REPEATS, SAMPLES, GRID, AT = 12, 128, (0, 16, 32, 64, 128), 16
HIDDEN, TRAIN, WRONG = (16, 64, 256, 512), 300, 0.2
STEPS, BURN_IN, THIN, BATCH = 5000, 1500, 25, 50
FITTED, LONGEST = 0.01, 30_000  # SGD runs until its training loss is this, or so many steps

Row = dict[str, Any]


def functions(width: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct Boolean functions [K, 32] of 5-width-1 tanh networks from the prior, and their log-weights [K]."""
    inputs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
    outputs = []
    for count in [3000] * (NETWORKS // 3000):
        first = math.sqrt(2 / 5) * torch.randn(count, 5, width, generator=source)
        bias = 0.3 * torch.randn(count, 1, width, generator=source)
        last = torch.randn(count, width, 1, generator=source)
        outputs.append(((inputs @ first + bias).tanh() @ last).squeeze(2) > 0)
    return merge_functions(torch.cat(outputs))


def targets(log_w: Tensor, source: torch.Generator) -> Tensor:
    """For each of LEVELS a function [6] of that -log weight or the nearest there is, at random among equals."""
    chosen = []
    for level in LEVELS:
        gap = (-log_w - level).abs() if level else -log_w
        equal = (gap == gap.amin()).nonzero().flatten()
        chosen.append(int(equal[torch.randint(len(equal), (), generator=source)]))
    return torch.tensor(chosen)


def regrets(table: Tensor, log_w: Tensor, chosen: Tensor, source: torch.Generator) -> Tensor:
    """R_s after 0, ..., SAMPLES samples, [SAMPLES + 1, targets, REPEATS], of the exact mixture over table [K, N].

    All data sets at once: what `BayesMixture` does for one, with weights in place of their logarithms.
    """
    size = (len(chosen), REPEATS)
    ones = table.double()
    weights = log_w.exp().unsqueeze(1).repeat(1, size[0] * REPEATS)
    nature = (FLIP + (1 - 2 * FLIP) * ones[chosen]).repeat_interleave(REPEATS, 0).T  # P(1 | x), [N, runs]
    found = []
    for _ in range(SAMPLES + 1):
        mixture = FLIP + (1 - 2 * FLIP) * (ones.T @ weights)
        loss = nature * (nature / mixture).log() + (1 - nature) * ((1 - nature) / (1 - mixture)).log()
        found.append(loss.mean(0).view(size))
        x = torch.randint(table.shape[1], (weights.shape[1],), generator=source)
        y = torch.rand(weights.shape[1], generator=source) < nature[x, torch.arange(weights.shape[1])]
        weights *= torch.where(table[:, x] == y, 1 - FLIP, FLIP)
        weights /= weights.sum(0)
    return torch.stack(found)


def mixture_study(run: Run) -> list[Row]:
    """A row for each width and target."""
    rows = []
    for width in WIDTHS:
        table, log_w = functions(width, generator(run.seed, "networks", width))
        chosen = targets(log_w, generator(run.seed, "targets", width))
        found = regrets(table, log_w, chosen, generator(run.seed, "samples", width))
        total = found[:SAMPLES].sum(0)  # [targets, REPEATS]: of the predictions of samples 1 to SAMPLES
        for index, target in enumerate(chosen.tolist()):
            row: Row = {"study": "mixture", "width": width, "rank": index, "log_weight": -float(log_w[target])}
            row |= {f"regret_{n}": float(found[n, index].mean()) for n in GRID}
            row |= {f"total_{n}": float(found[:n, index].sum(0).mean()) for n in GRID}
            row["total"], row["error"] = float(total[index].mean()), float(total[index].std()) / math.sqrt(REPEATS)
            rows.append(row | {"functions": len(table)})
        run.event("mixture", width=width, functions=len(table))
    return rows


def shuffled_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, the same with WRONG of them wrong, and images and labels held out."""
    images, labels = digits()
    source = generator(seed, "digits")
    order = torch.randperm(len(images), generator=source)
    train, held_out = order[:TRAIN], order[TRAIN:]
    wrong = torch.rand(TRAIN, generator=source) < WRONG
    noisy = torch.where(wrong, (labels[train] + torch.randint(1, 10, (TRAIN,), generator=source)) % 10, labels[train])
    return images[train], labels[train], noisy, images[held_out], labels[held_out]


def network(width: int, source: torch.Generator) -> nn.Sequential:
    """64-width-10 with ReLU, uniform weights of the inverse root of the inputs."""
    first, last = nn.Linear(64, width), nn.Linear(width, 10)
    with torch.no_grad():
        for layer in (first, last):
            for weight in layer.parameters():
                weight.copy_((2 * torch.rand(weight.shape, generator=source) - 1) / math.sqrt(layer.in_features))
    return nn.Sequential(first, nn.ReLU(), last)


def by_sgd(model: nn.Module, images: Tensor, labels: Tensor, source: torch.Generator) -> float:
    """Momentum SGD until the training loss is FITTED; returns it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss, steps = math.inf, 0
    while loss > FITTED and steps < LONGEST:
        for rows in torch.randperm(len(images), generator=source).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            steps += 1
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(model(images), labels))
    return loss


def ensemble_study(run: Run) -> list[Row]:
    """A row for each kind of labels and width: clean test losses of SGD and of the ensemble."""
    images, clean, noisy, held_images, held_labels = shuffled_digits(run.seed)
    rows = []
    for kind, labels in (("wrong", noisy), ("clean", clean)):
        for width in HIDDEN:
            model = network(width, generator(run.seed, "start", width))
            prior = GaussianPrior(1.0, {"0.weight": math.sqrt(8 / 64), "2.weight": math.sqrt(100 / width)})
            options: dict[str, Any] = {"steps": STEPS, "burn_in": BURN_IN, "thin": THIN, "batch": BATCH}
            ensemble = SGLDEnsemble(model, prior, lr=2e-4, gamma=0.33, decay=500, seed=run.seed, **options)
            ensemble.fit(images, labels)
            trained = by_sgd(model, images, labels, generator(run.seed, "batches", width))
            with torch.no_grad():
                plain = float(nn.functional.cross_entropy(model(held_images), held_labels))
            row: Row = {"study": "digits", "labels": kind, "width": width, "sgd_train": trained, "sgd": plain}
            rows.append(row | {"ensemble": -ensemble.score(held_images, held_labels)})
        run.event("digits", labels=kind)
    return rows


def reproduce(run: Run) -> Report:
    """One seed: both studies."""
    mixed = mixture_study(run)
    trained = ensemble_study(run)
    regret = f"regret_{AT}"
    simple = [row[regret] for row in mixed if row["rank"] == 0]
    rare = [row[regret] for row in mixed if row["log_weight"] >= 10.0]
    of_width = [sum(row[regret] for row in mixed if row["width"] == width) / len(LEVELS) for width in WIDTHS]
    wrong, clean = ([row for row in trained if row["labels"] == kind] for kind in ("wrong", "clean"))
    wide = [row["ensemble"] for row in wrong if row["width"] >= 64]
    metrics = {
        "rare_to_simple_regret": (sum(rare) / len(rare)) / (sum(simple) / len(simple)),
        "regret_width_change": max(of_width) / min(of_width) - 1.0,
        "regret_excess_in_errors": max((row["total"] - row["log_weight"]) / row["error"] for row in mixed),
        "ensemble_to_sgd_loss": max(row["ensemble"] / row["sgd"] for row in wrong),
        "ensemble_width_ratio": max(wide) / min(wide),
        "clean_ensemble_to_sgd_loss": max(row["ensemble"] / row["sgd"] for row in clean),
    }
    return Report(metrics=metrics, rows=[*mixed, *trained])


def mean_of(rows: Sequence[Mapping[str, Any]], name: str, **chosen: object) -> float:
    """The mean of a column over the rows that have all the chosen values."""
    values = [row[name] for row in rows if all(row.get(key) == value for key, value in chosen.items())]
    return float(sum(values) / len(values))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Regret against samples and against weight, and test losses against width."""
    from kullback.figures import figure

    ranks = range(len(LEVELS))
    with figure(path, columns=3, size=(3.6, 3.3)) as (growing, weighed, trained):
        for rank in ranks:
            of_rank = {"study": "mixture", "rank": rank}
            weight, color = mean_of(rows, "log_weight", **of_rank), f"C{rank}"
            totals = [mean_of(rows, f"total_{n}", **of_rank) for n in GRID]
            growing.plot(GRID, totals, "o-", color=color, markersize=3, label=f"{weight:.1f}")
            growing.axhline(weight, color=color, linestyle="--", linewidth=0.8)
        growing.set(xlabel="samples", title="cumulative regret and -log weight, nats", ylim=(0, None))
        growing.legend(title="-log weight", frameon=False, fontsize=7, title_fontsize=7, ncols=2, loc="lower right")
        for width, mark in zip(WIDTHS, "osD", strict=False):
            of_width = [{"study": "mixture", "rank": rank, "width": width} for rank in ranks]
            weights = [mean_of(rows, "log_weight", **chosen) for chosen in of_width]
            found = [mean_of(rows, f"regret_{AT}", **chosen) for chosen in of_width]
            weighed.plot(weights, found, f"{mark}-", markersize=4, linewidth=0.8, label=f"width {width}")
        weighed.set(xlabel="-log weight of the target", title=f"regret after {AT} samples, nats", ylim=(0, None))
        weighed.legend(frameon=False, fontsize=8, loc="lower right")
        for kind, color in (("wrong", "C3"), ("clean", "C0")):
            name = f"{WRONG:.0%} wrong labels" if kind == "wrong" else "clean labels"
            for learner, style, label in (("sgd", "s--", "SGD"), ("ensemble", "o-", "Langevin ensemble")):
                losses = [mean_of(rows, learner, study="digits", labels=kind, width=width) for width in HIDDEN]
                trained.plot(HIDDEN, losses, style, color=color, markersize=4, label=f"{label}, {name}")
        trained.set(xscale="log", yscale="log", ylim=(0.16, 7.0), xlabel="width", title="digits: test loss, nats")
        trained.set_xticks(HIDDEN, [str(width) for width in HIDDEN])
        trained.set_yticks([0.2, 0.5, 1.0, 2.0, 5.0], ["0.2", "0.5", "1", "2", "5"])
        trained.minorticks_off()
        trained.legend(frameon=False, fontsize=7)
