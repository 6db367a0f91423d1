"""MCMI (arXiv 2401.08732) in small: digits, a teacher trained to saturation, and students that never see a class.

The teacher is fine-tuned with the conditional mutual information at several weights; weight 0 is the matched control,
as many epochs on cross-entropy alone. Beside them stand teachers stopped early, and the control at a higher
temperature, which spread their outputs without the term. Each teacher distils one student for each class left out, and
one on few examples of all. Then shares of the data, from few shots to the full set: on digits, where students of a
quarter are nearly as good as their teachers, and on noisy ones, where teachers of other noise are right 5 times in 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data import arrays
from kullback.distill.mcmi_teacher import (
    Datasets,
    MCMISettings,
    balanced_subset,
    finetune_teacher,
    kd_loss,
    measured,
    zero_shot_distill,
)
from kullback.models.perceptron import perceptron

__all__ = ["draw", "reproduce"]

TRAIN, FEW, CLASSES = 1000, 0.1, 10
FRACTIONS, STEPS, NOISE = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0), 800, 0.3
SERIES = ("10 epochs", "weight 0", "weight 0.15", "weight 0.25", "weight 0.4", "weight 0, temperature 2")
LAMBDAS = (0.0, 0.15, 0.25, 0.4)
STOPPED = (5, 10, 25)  # epochs of the teachers stopped early
SATURATED, FINE = 60, 20
OMITTED = (3, 5, 8)
# Weight decay would spread the outputs of the control as well; here nothing but the term does.
ADAM: Mapping[str, Any] = {"optimizer": "adam", "weight_decay": 0.0, "cosine": False}


def digits(seed: int) -> Datasets:
    """Digits to train on and to test on, split at random."""
    images, labels = arrays.digits()
    order = torch.randperm(len(images), generator=generator(seed, "digits"))
    train, held_out = order[:TRAIN], order[TRAIN:]
    return Datasets(images[train], labels[train], images[held_out], labels[held_out])


def noisy(seed: int, data: Datasets) -> Datasets:
    """The same images with noise of their own in every pixel."""
    source = generator(seed, "noise")
    return data._replace(**{
        name: images + NOISE * torch.randn(images.shape, generator=source)
        for name, images in (("inputs", data.inputs), ("test_inputs", data.test_inputs))
    })  # fmt: skip


class Tempered(nn.Module):
    """A model whose logits are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs) / self.temperature


def teachers(seed: int, data: Datasets, stops: Sequence[int]) -> dict[str, nn.Module]:
    """By name: stopped early, saturated, and from that one on fine-tuned at each weight."""
    found: dict[str, nn.Module] = {}
    model: nn.Module = perceptron(64, 256, 256, CLASSES, generator=generator(seed, "teacher"))
    done, batches = 0, generator(seed, "teacher batches")
    for epochs in (*stops, SATURATED):
        # Adam begins anew at each stop: the path is the same for all who pass it.
        settings = MCMISettings(lam=0.0, epochs=epochs - done, learning_rate=1e-3, **ADAM)
        model = finetune_teacher(model, data.inputs, data.labels, settings, generator=batches)
        found[f"{epochs} epochs"], done = model, epochs
    for weight in LAMBDAS:
        settings = MCMISettings(lam=weight, epochs=FINE, learning_rate=5e-4, **ADAM)
        found[f"weight {weight:g}"] = finetune_teacher(
            model, data.inputs, data.labels, settings, generator=generator(seed, "fine-tuning")
        )
    found["weight 0, temperature 2"] = Tempered(found["weight 0"], 2.0)
    return found


def students(seed: int, found: Mapping[str, nn.Module], data: Datasets) -> list[dict[str, Any]]:
    """A row for each teacher: its measures, and those of its students in per cent."""

    def distilled(place: str, seen: Datasets, omit: Sequence[int], epochs: int) -> Tensor:
        fresh = perceptron(64, 32, CLASSES, generator=generator(seed, "student"))
        return zero_shot_distill(
            list(found.values()), fresh, seen, omit=omit, kd=partial(kd_loss, alpha=0.9, temperature=4.0),
            epochs=epochs, batch=32, learning_rate=3e-3, generator=generator(seed, "student batches", place),
        )  # fmt: skip

    share = torch.bincount(data.test_labels, minlength=CLASSES).double() / len(data.test_labels)
    omitted = {digit: 100 * distilled(f"without {digit}", data, [digit], 40) for digit in OMITTED}
    few = balanced_subset(data.labels, FEW, generator=generator(seed, "few"))
    shots = 100 * distilled("few", data._replace(inputs=data.inputs[few], labels=data.labels[few]), [], 200)
    rows = []
    for index, (name, teacher) in enumerate(found.items()):
        meter = measured(teacher, [(data.inputs, data.labels)], CLASSES, separation=True)
        row = {f"omitted_{digit}": float(accuracies[index, digit]) for digit, accuracies in omitted.items()}
        rows.append({
            "teacher": name,
            "cmi": meter.cmi,
            "separation": meter.separation,
            "teacher_accuracy": 100 * measured(teacher, [(data.test_inputs, data.test_labels)], CLASSES).accuracy,
            "omitted": sum(row.values()) / len(OMITTED),
            "overall": sum(float(accuracies[index] @ share) for accuracies in omitted.values()) / len(OMITTED),
            "few_shot": float(shots[index] @ share),
            **row,
        })  # fmt: skip
    return rows


def series(seed: int, found: Mapping[str, nn.Module], data: Datasets, place: str) -> list[dict[str, Any]]:
    """Students of each share of the data, after as many steps each, in per cent; the images are the same for all."""
    several = [found[name] for name in SERIES]
    share = torch.bincount(data.test_labels, minlength=CLASSES).double() / len(data.test_labels)
    rows: list[dict[str, Any]] = []
    for fraction in FRACTIONS:
        chosen = balanced_subset(data.labels, fraction, generator=generator(seed, "share", round(100 * fraction)))
        epochs = math.ceil(STEPS / math.ceil(len(chosen) / 32))
        right = zero_shot_distill(
            several, perceptron(64, 32, CLASSES, generator=generator(seed, "student")),
            data._replace(inputs=data.inputs[chosen], labels=data.labels[chosen]), omit=[], epochs=epochs, batch=32,
            learning_rate=3e-3, generator=generator(seed, "share batches", round(100 * fraction)),
        )  # fmt: skip
        for name, accuracies in zip(SERIES, right, strict=True):
            own = {"series": place, "fraction": fraction, "teacher": name}
            rows.append({**own, "student_accuracy": 100 * float(accuracies @ share)})
    return rows


def reproduce(run: Run) -> Report:
    """One seed: all teachers, and the students of each."""
    data = digits(run.seed)
    found = teachers(run.seed, data, STOPPED)
    run.event("teachers", count=len(found))
    rows = students(run.seed, found, data)
    by_name = {row["teacher"]: row for row in rows}
    harder = noisy(run.seed, data)
    shares = series(run.seed, found, data, "digits")
    shares += series(run.seed, teachers(run.seed, harder, (10,)), harder, "noisy digits")
    control, ours = by_name["weight 0"], by_name["weight 0.25"]
    metrics = {
        "information_ratio": ours["cmi"] / control["cmi"],
        "teacher_accuracy_gain": ours["teacher_accuracy"] - control["teacher_accuracy"],
        "omitted_class_gain": ours["omitted"] - control["omitted"],
        "overall_gain": ours["overall"] - control["overall"],
        "few_shot_gain": ours["few_shot"] - control["few_shot"],
        "early_stopping_gain": max(by_name[f"{n} epochs"]["omitted"] for n in STOPPED) - control["omitted"],
        "temperature_gain": by_name["weight 0, temperature 2"]["omitted"] - control["omitted"],
    }
    for place, short in (("digits", ""), ("noisy digits", "noisy_")):
        at = {(row["fraction"], row["teacher"]): row["student_accuracy"] for row in shares if row["series"] == place}
        for fraction in FRACTIONS:
            gain = at[fraction, "weight 0.25"] - at[fraction, "weight 0"]
            metrics[f"{short}gain_{round(100 * fraction)}_percent"] = gain
    return Report(metrics=metrics, rows=rows + shares)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Information against the accuracy on the omitted class, on few examples and of the teacher; shares of the data."""
    from kullback.figures import figure

    measured_rows = [row for row in rows if "series" not in row]
    names = list(dict.fromkeys(row["teacher"] for row in measured_rows))
    panels = {
        "omitted": "student on the class left out (%)",
        "few_shot": "student of 100 examples (%)",
        "teacher_accuracy": "teacher, held out (%)",
    }
    with figure(path, columns=5, size=(3.7, 3.4)) as axes:
        for index, name in enumerate(names):
            found = [row for row in measured_rows if row["teacher"] == name]
            style = {"color": f"C{index}", "marker": "o" if name.startswith("weight") else "^"}
            for axis, key in zip(axes, panels):
                information, values = [row["cmi"] for row in found], [row[key] for row in found]
                axis.plot(information, values, linestyle="", alpha=0.25, markersize=4, **style)
                middle = sum(information) / len(found), sum(values) / len(found)
                axis.plot(*middle, linestyle="", markersize=8, label=name, **style)
        for axis, title in zip(axes, panels.values()):
            axis.set(xscale="log", xlabel="I(X; Yhat | Y) on the training data (nats)", title=title)
        axes[0].legend(fontsize=7, frameon=False)
        for axis, place in zip(axes[3:], ("digits", "noisy digits")):
            _gains(axis, [row for row in rows if row.get("series") == place], names)
            axis.set(xlabel="share of the data (%)", title=f"{place}: gain over weight 0 (points)")


def _gains(axis: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Mean over seeds of each teacher's students less those of the control, with two standard errors."""
    at = {(row["seed"], row["fraction"], row["teacher"]): row["student_accuracy"] for row in rows}
    seeds = sorted({seed for seed, _, _ in at})
    for index, name in enumerate(name for name in SERIES if name != "weight 0"):
        gains = torch.tensor(
            [[at[seed, part, name] - at[seed, part, "weight 0"] for part in FRACTIONS] for seed in seeds]
        )
        wide = 2.0 * gains.std(0, correction=min(1, len(seeds) - 1)) / math.sqrt(len(seeds))
        place = [100 * part * 1.03 ** (index - 2) for part in FRACTIONS]  # side by side
        color = f"C{names.index(name)}"
        axis.errorbar(place, gains.mean(0).tolist(), wide.tolist(), marker=".", color=color, label=name, elinewidth=0.8)
    axis.axhline(0.0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xticks=[100 * part for part in FRACTIONS])
    axis.set_xticklabels([f"{100 * part:g}" for part in FRACTIONS])
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False)
