"""BD-KD (arXiv 2212.12965) in small: two networks that learn noisy digits together, and how sure they are.

A student of 64 hidden units and a teacher of two layers of 256, both from scratch, on 500 noisy images of which 30%
have a wrong label: alone, and with every loss of online distillation. A second panel has 300 images and no wrong label.
Temperature scaling, fitted on held-out images, is the line that online distillation hopes to need no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data import arrays
from kullback.diagnose.calibration import ece, fit_temperature, nll, reliability
from kullback.distill.bd_kd import Mode
from kullback.distill.online import OnlineDistiller, OnlineLoss
from kullback.models.perceptron import perceptron

__all__ = ["draw", "reproduce"]

NOISE, EPOCHS, BATCH, VALIDATION, BINS = 0.1, 50, 50, 200, 15
TEMPERATURE, DELTA = 4.0, 2.0
# Training images, share of wrong labels, and hidden units of the student.
SETTINGS: Mapping[str, tuple[int, float, int]] = {"noisy": (500, 0.3, 64), "clean": (300, 0.0, 64)}
# None: the student alone.
METHODS: Mapping[str, Mode | None] = {
    "alone": None, "DML": "dml", "Jeffreys": "jeffreys", "BD-KD": "bdkd", "inverse": "bdkd_inverse",
}  # fmt: skip


def digits(seed: int, train: int, wrong: float) -> dict[str, Tensor]:
    """Images with noise and labels for training, some of them wrong; for validation and for the test all are right."""
    images, labels = arrays.digits()
    draws = generator(seed, "digits", train)
    inputs = images + NOISE * torch.randn(images.shape, generator=draws)
    order = torch.randperm(len(inputs), generator=draws)
    first, second, third = order[:train], order[train : train + VALIDATION], order[train + VALIDATION :]
    given = labels[first].clone()
    flipped = torch.rand(train, generator=draws) < wrong
    given[flipped] = (given[flipped] + torch.randint(1, 10, (int(flipped.sum()),), generator=draws)) % 10
    return {
        "inputs": inputs[first], "labels": given, "validation": inputs[second], "validation_labels": labels[second],
        "test": inputs[third], "test_labels": labels[third],
    }  # fmt: skip


def train(
    networks: Sequence[nn.Module], rates: Sequence[float], data: Mapping[str, Tensor], mode: Mode | None, seed: int
) -> list[float]:
    """EPOCHS passes; the share of images with the larger weight on reverse KL in each, 0 without a teacher."""
    optimizers = [torch.optim.Adam(net.parameters(), lr=rate) for net, rate in zip(networks, rates, strict=True)]
    batches, shares = generator(seed, "batches"), []
    distiller = None
    if mode is not None:
        loss = OnlineLoss(mode=mode, temperature=TEMPERATURE, delta=DELTA)
        distiller = OnlineDistiller(networks, optimizers, loss=loss)
    for _ in range(EPOCHS):
        share = 0.0
        for rows in torch.randperm(len(data["inputs"]), generator=batches).split(BATCH):
            inputs, labels = data["inputs"][rows], data["labels"][rows]
            if distiller is not None:
                share += distiller.step(inputs, labels)[-1]["reverse_share"] * len(rows)
                continue
            for net, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs), labels).backward()
                optimizer.step()
        shares.append(share / len(data["inputs"]))
    return shares


@torch.no_grad()
def measured(net: nn.Module, data: Mapping[str, Tensor]) -> dict[str, Any]:
    """Accuracy and calibration errors in per cent on the test images, also with a fitted temperature, and the bins."""
    logits, labels = net(data["test"]), data["test_labels"]
    temperature = fit_temperature(net(data["validation"]), data["validation_labels"])
    bins = reliability(logits.softmax(-1), labels, bins=BINS)
    return {
        "accuracy": 100 * (logits.argmax(-1) == labels).double().mean().item(),
        "ece": 100 * ece(logits.softmax(-1), labels, bins=BINS),
        "scaled_ece": 100 * ece((logits / temperature).softmax(-1), labels, bins=BINS),
        "nll": nll(logits, labels),
        "samples": bins.samples.tolist(),
        "confidence": bins.confidence.tolist(),
        "bin_accuracy": bins.accuracy.tolist(),
    }


def study(seed: int, setting: str) -> list[dict[str, Any]]:
    """One row for each method and network of a setting."""
    images, wrong, hidden = SETTINGS[setting]
    data, rows = digits(seed, images, wrong), []
    for method, mode in METHODS.items():
        teacher = perceptron(64, 256, 256, 10, generator=generator(seed, "teacher"))
        student = perceptron(64, hidden, 10, generator=generator(seed, "student"))
        shares = train([teacher, student], [1e-3, 3e-3], data, mode, seed)
        for role, net in (("teacher", teacher), ("student", student)):
            row = {"setting": setting, "method": method, "network": role, **measured(net, data)}
            rows.append({**row, "reverse_share": shares} if method == "BD-KD" and role == "student" else row)
    return rows


def reproduce(run: Run) -> Report:
    """One seed: both settings, every method, the student set against the same student alone."""
    rows, metrics = [], {}
    for setting in SETTINGS:
        found = study(run.seed, setting)
        rows += found
        students = {row["method"]: row for row in found if row["network"] == "student"}
        teachers = {row["method"]: row for row in found if row["network"] == "teacher"}
        prefix = "" if setting == "noisy" else "clean_"
        alone, ours = students["alone"], students["BD-KD"]
        metrics[prefix + "ece_reduction"] = alone["ece"] - ours["ece"]
        metrics[prefix + "accuracy_gain"] = ours["accuracy"] - alone["accuracy"]
        metrics[prefix + "teacher_ece_reduction"] = teachers["alone"]["ece"] - teachers["BD-KD"]["ece"]
        for method in ("DML", "Jeffreys", "inverse"):
            metrics[f"{prefix}ece_of_{method.lower()}_above_ours"] = students[method]["ece"] - ours["ece"]
        metrics[prefix + "ece_above_scaled"] = ours["ece"] - alone["scaled_ece"]
        run.event("setting", name=setting, **{name: row["ece"] for name, row in students.items()})
    return Report(metrics=metrics, rows=rows)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reliability of the students, their calibration errors in both settings, and the gate over the epochs."""
    from kullback.figures import figure

    students = [row for row in rows if row["network"] == "student"]
    with figure(path, columns=4, size=(3.4, 3.2)) as (diagram, noisy, clean, gate):
        diagram.plot([0, 100], [0, 100], color="0.8", linestyle="--")
        for color, method in (("0.4", "alone"), ("C0", "BD-KD")):
            parts = [row for row in students if row["method"] == method and row["setting"] == "noisy"]
            samples, said, true = (
                torch.tensor([row[name] for row in parts]) for name in ("samples", "confidence", "bin_accuracy")
            )
            kept = samples.sum(0) >= 20
            weight = samples[:, kept] / samples[:, kept].sum(0)
            points = [100 * (weight * part[:, kept]).sum(0) for part in (said, true)]
            diagram.plot(*points, ".-", color=color, label=method)
        diagram.set(xlabel="confidence (%)", ylabel="accuracy (%)", title="30% wrong labels: reliability")
        diagram.legend(frameon=False)
        for axes, setting, title in ((noisy, "noisy", "30% wrong labels"), (clean, "clean", "correct labels")):
            for place, role in enumerate(("student", "teacher")):
                for index, method in enumerate(METHODS):
                    found = (rows, method, role, setting)
                    values = torch.tensor(_values(*found, "ece"))
                    at = index + 0.15 * (2 * place - 1)
                    axes.plot([at] * len(values), values, ".", color="0.75", zorder=0)
                    spread = values.std(correction=0)
                    label = role if index == 0 else None
                    axes.errorbar(at, values.mean(), yerr=spread, fmt="so"[place], color=f"C{place}", label=label)
            scaled = torch.tensor(_values(rows, "alone", "student", setting, "scaled_ece")).mean()
            axes.axhline(scaled, color="0.6", linestyle=":", label="student alone, scaled")
            axes.set_xticks(range(len(METHODS)), METHODS, rotation=30)
            axes.set(ylabel="ECE (%)", title=title, ylim=(0, None))
        clean.legend(frameon=False, fontsize=8)
        for color, setting in (("C2", "noisy"), ("C3", "clean")):
            gated = [row for row in students if row["method"] == "BD-KD" and row["setting"] == setting]
            traces = torch.tensor([row["reverse_share"] for row in gated])
            for trace in traces:
                gate.plot(100 * trace, color=color, alpha=0.25, linewidth=0.8)
            gate.plot(100 * traces.mean(0), color=color, label={"noisy": "30% wrong", "clean": "correct"}[setting])
        gate.set(xlabel="epoch", ylim=(0, 100), ylabel="share of images (%)", title="where reverse KL weighs more")
        gate.legend(frameon=False, title="labels")


def _values(rows: Sequence[Mapping[str, Any]], method: str, role: str, setting: str, name: str) -> list[float]:
    key = (method, role, setting)
    return [row[name] for row in rows if (row["method"], row["network"], row["setting"]) == key]
