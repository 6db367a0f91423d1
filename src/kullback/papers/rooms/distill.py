"""The distill room on two tasks, each with one teacher, one student, the same data and the same number of steps.

Digits: a network that has seen 1,000 digits teaches a smaller one on 100 of them. Prose: the embedded teacher and
student of `kullback distill` on the standard library's help texts. Methods keep the options they have by themselves.
The divergence to the teacher is KL on digits, and on prose the one that the method itself lowers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.data.arrays import digits
from kullback.diagnose.calibration import ece
from kullback.distill import bdkd_loss, sinkd_loss
from kullback.divergences import from_logits, kl, named
from kullback.divergences.plackett_luce import pld_loss
from kullback.figures import figure
from kullback.papers.comparison import StepClock

__all__ = ["COLUMNS", "SEEDS", "THREADS", "compare", "draw"]

SEEDS, THREADS = (0, 1, 2), 1
COLUMNS = {
    "accuracy": "accuracy", "calibration": "calibration error", "cross_entropy": "cross-entropy",
    "divergence": "divergence to teacher", "milliseconds": "ms a step",
}  # fmt: skip

_TEMPERATURE, _STEPS, _TEXT_STEPS, _TEXT_BATCH = 4.0, 400, 60, 8
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _soft(divergence: Any, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    return _TEMPERATURE**2 * from_logits(divergence, teacher, student, _TEMPERATURE).mean()


def _losses() -> dict[str, Loss]:
    family = {
        "kl": named("kl"), "reverse-kl": named("reverse_kl"), "jsd": named("jsd"),
        "skew-kl": named("skew_kl", alpha=0.1), "total-variation": named("total_variation"),
    }  # fmt: skip
    return {
        "labels alone": lambda teacher, student, labels: cross_entropy(student, labels),
        **{name: partial(_soft, divergence) for name, divergence in family.items()},
        "sinkd": lambda teacher, student, labels: (
            _soft(kl, teacher, student, labels) + 0.8 * sinkd_loss(teacher, student, reduction="mean")
        ),
        "bd-kd": lambda teacher, student, labels: bdkd_loss(teacher, student, labels, temperature=_TEMPERATURE)["loss"],
        "pld": partial(pld_loss, temperature=_TEMPERATURE),
    }


def compare(run: Run) -> list[dict[str, Any]]:
    """Rows of both tasks."""
    return [*_digits(run), *_prose(run)]


def _digits(run: Run) -> list[dict[str, Any]]:
    images, labels = digits()
    order = torch.randperm(len(images), generator=generator(run.seed, "digits"))
    many, few, test = order[:1000], order[:100], order[1000:]
    losses = _losses()
    teacher, _ = _fit(run.seed, 256, images, labels, many, losses["labels alone"], None)
    rows = [{"task": "digits", "method": "teacher", **_measure(teacher, images[test], labels[test])}]
    for name, loss in losses.items():
        student, milliseconds = _fit(run.seed, 32, images, labels, few, loss, teacher)
        found = _measure(student, images[test], labels[test])
        gap = _divergence(teacher, student, images[test])
        rows.append({"task": "digits", "method": name, **found, "divergence": gap, "milliseconds": milliseconds})
        run.event("digits", name=name, **found)
    return rows


def _fit(
    seed: int, hidden: int, images: Tensor, labels: Tensor, rows: Tensor, loss: Loss, teacher: nn.Module | None
) -> tuple[nn.Module, float]:
    """A network of one hidden layer, and milliseconds a step; every student begins alike and sees the same batches."""
    network = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    draw = generator(seed, "network", hidden)
    with torch.no_grad():
        for parameter in network.parameters():
            bound = (64 if parameter.shape[-1] == 64 else hidden) ** -0.5
            parameter.uniform_(-bound, bound, generator=draw)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    batches = rows[torch.randint(len(rows), (_STEPS, 32), generator=generator(seed, "batches", hidden))]
    started = time.perf_counter()
    for batch in batches:
        target = torch.zeros(0) if teacher is None else teacher(images[batch]).detach()
        optimizer.zero_grad()
        loss(target, network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network, 1000 * (time.perf_counter() - started) / _STEPS


@torch.no_grad()
def _measure(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    logits = network(images)
    return {
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "calibration": float(ece(logits.softmax(-1), labels)),
        "cross_entropy": cross_entropy(logits, labels).item(),
    }


@torch.no_grad()
def _divergence(teacher: nn.Module, student: nn.Module, images: Tensor) -> float:
    return from_logits(kl, teacher(images), student(images)).mean().item()


def _prose(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in ("labels alone", "kl", "reverse-kl", "jsd", "skew-kl", "total-variation", "sinkd", "bd-kd", "pld"):
        report, milliseconds = _distil(run, name)
        teacher, _, student = report["rows"]
        if not rows:
            rows.append({"task": "prose", "method": "teacher", "cross_entropy": teacher["cross_entropy"]})
        found = {key: student[key] for key in ("cross_entropy", "divergence") if key in student}
        rows.append({"task": "prose", "method": name, **found, "milliseconds": milliseconds})
        run.event("prose", name=name, **found)
    return rows


def _distil(run: Run, name: str) -> tuple[Mapping[str, Any], float | None]:
    from kullback.jobs import distill as job

    base = job.embedded()
    options: dict[str, Any] = {"alpha": 0.1} if name == "skew-kl" else {}
    objective = job.ObjectiveConfig(name=name, options=options)
    if name == "labels alone":
        objective = job.ObjectiveConfig(cross_entropy=1.0)
    training = replace(
        base.training, steps=_TEXT_STEPS, batch=_TEXT_BATCH, evaluate_every=_TEXT_STEPS, save_every=_TEXT_STEPS
    )
    config = replace(base, objective=objective, training=training, seeds=(run.seed,), baseline=False)
    clock, place = StepClock(), run.path / name.replace(" ", "-")
    done = job.run(config, place, listen=clock, resume=place.exists())
    report: Mapping[str, Any] = json.loads((done.path / "report.json").read_text(encoding="utf-8"))
    return report, clock.milliseconds


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy on digits and cross-entropy on prose of every method, a dot a seed, the teacher as a line."""
    panels = {"digits": ("accuracy", "test accuracy on digits"), "prose": ("cross_entropy", "nats a token on prose")}
    with figure(path, columns=2, size=(5.0, 3.6)) as axes:
        for panel, (task, (key, label)) in zip(axes, panels.items(), strict=True):
            found = [row for row in rows if row["task"] == task and row["method"] != "teacher"]
            methods = list(dict.fromkeys(row["method"] for row in found))
            for place, method in enumerate(methods):
                values = [row[key] for row in found if row["method"] == method]
                panel.plot(values, [-place] * len(values), "o", markersize=4, alpha=0.6, color="C0")
                panel.plot([sum(values) / len(values)], [-place], "|", markersize=14, color="black")
            taught = [row[key] for row in rows if row["task"] == task and row["method"] == "teacher"]
            panel.axvline(sum(taught) / len(taught), color="0.5", linestyle="--", linewidth=1.0)
            panel.set_yticks([-place for place in range(len(methods))], methods)
            panel.set(xlabel=f"{label} (dashed: teacher)")
