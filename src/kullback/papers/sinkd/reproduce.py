"""SinKD (arXiv 2402.17110) in small: divergences at little overlap, and a classifier distilled with and without it.

Overlap: a discretised normal on 64 bins learns its location by gradient descent from 20 random starts, under each
divergence. Digits: a small network is distilled from a large one on few, noisy images, with cross-entropy alone, with
knowledge distillation (KD), and with KD + SinKD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Divergence, Report
from kullback.data import arrays
from kullback.distill.sinkd import SinkhornKD, sinkd_loss
from kullback.divergences import jsd, kl, reverse_kl, squared_hellinger, total_variation
from kullback.divergences.pairwise import pairwise_cost
from kullback.divergences.sinkhorn import sinkhorn_divergence
from kullback.models.perceptron import perceptron

__all__ = ["draw", "reproduce"]

BINS, SIGMA, TARGET, STARTS, STEPS = 64, 1.5, 48.0, 20, 300
TRAIN, NOISE, EPOCHS, BATCH = 400, 0.2, 80, 32
# Weights of SinKD per sample, beside KD; None trains on cross-entropy alone.
STUDENTS: Mapping[str, float | None] = {"CE": None, "KD": 0.0, "KD + SinKD 0.8": 0.8, "KD + SinKD 3": 3.0}


def clamped_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL from probabilities that are kept above 1e-7, as one finds it in code that leaves log space."""
    p, q = log_p.exp().clamp(min=1e-7), log_q.exp().clamp(min=1e-7)
    return (p * (p.log() - q.log())).sum(-1)


def members() -> dict[str, Divergence]:
    """The divergences of the overlap study; Sinkhorn's ground cost is the squared distance, 1 from end to end."""
    place = torch.linspace(0.0, 1.0, BINS).unsqueeze(-1)
    cost = pairwise_cost(place, place, "squared")
    return {
        "Sinkhorn": partial(sinkhorn_divergence, cost=cost, eps=0.05, n_iters=20, mode="sharp"),
        "KL": kl,
        "reverse KL": reverse_kl,
        "JS": jsd,
        "total variation": total_variation,
        "squared Hellinger": squared_hellinger,
        "clamped KL": clamped_kl,
    }


def normal(location: Tensor) -> Tensor:
    """Log-probabilities [..., BINS] of the discretised normal at each location [...]."""
    return (-(torch.arange(BINS) - location.unsqueeze(-1)).square() / (2 * SIGMA**2)).log_softmax(-1)


def recovered(divergence: Divergence, starts: Tensor) -> float:
    """The share of starts from which gradient descent ends within one bin of the target."""
    location = starts.clone().requires_grad_()
    optimizer = torch.optim.Adam([location], lr=0.5)
    target = normal(torch.full_like(starts, TARGET))
    for _ in range(STEPS):
        optimizer.zero_grad()
        divergence(target, normal(location)).sum().backward()
        optimizer.step()
    return ((location.detach() - TARGET).abs() <= 1.0).double().mean().item()


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy digits: inputs and labels to train on, and those held out."""
    images, labels = arrays.digits()
    noise = generator(seed, "digits")
    inputs = images + NOISE * torch.randn(images.shape, generator=noise)
    order = torch.randperm(len(inputs), generator=noise)
    train, held_out = order[:TRAIN], order[TRAIN:]
    return inputs[train], labels[train], inputs[held_out], labels[held_out]


def train(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor, Tensor], Tensor], source: torch.Generator) -> None:
    """EPOCHS passes of Adam over random batches; loss(rows of the batch, the model's logits)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs), generator=source).split(BATCH):
            optimizer.zero_grad()
            loss(rows, model(inputs[rows])).backward()
            optimizer.step()


def distilled(seed: int) -> list[dict[str, Any]]:
    """One row a student: its accuracy in per cent and its debiased Sinkhorn distance to the teacher, held out."""
    inputs, labels, held_inputs, held_labels = digits(seed)

    def hard(rows: Tensor, logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels[rows])

    def soft(rows: Tensor, logits: Tensor, *, weight: float) -> Tensor:
        transport = partial(sinkd_loss, reduction="mean")
        return SinkhornKD(alpha=0.9, weight=weight, transport=transport)(taught[rows], logits, labels[rows])["loss"]

    teacher = perceptron(64, 256, 256, 10, generator=generator(seed, "teacher"))
    train(teacher, inputs, hard, generator(seed, "teacher batches"))
    with torch.no_grad():
        taught, held_taught = teacher(inputs), teacher(held_inputs)
    table = []
    for name, weight in STUDENTS.items():
        student = perceptron(64, 16, 10, generator=generator(seed, "student"))
        loss = hard if weight is None else partial(soft, weight=weight)
        train(student, inputs, loss, generator(seed, "student batches"))
        with torch.no_grad():
            logits = student(held_inputs)
            accuracy = 100 * (logits.argmax(-1) == held_labels).double().mean().item()
            distance = sinkd_loss(held_taught, logits, estimator="debiased", n_iters=100, reduction="mean").item()
        table.append({"study": "digits", "method": name, "accuracy": accuracy, "distance": distance})
    return table


def reproduce(run: Run) -> Report:
    """One seed: STARTS random starts under every divergence, and one teacher with its students."""
    starts = (BINS - 1) * torch.rand(STARTS, generator=generator(run.seed, "starts"))
    share = {name: recovered(divergence, starts) for name, divergence in members().items()}
    run.event("overlap", **share)
    students = distilled(run.seed)
    by_name = {row["method"]: row for row in students}
    plain, ours = by_name["KD"], by_name["KD + SinKD 0.8"]
    metrics = {
        "sinkhorn_recovered": share["Sinkhorn"],
        "kl_recovered": share["KL"],
        "js_tv_recovered": max(share["JS"], share["total variation"]),
        "clamped_kl_recovered": share["clamped KL"],
        "accuracy_gain": ours["accuracy"] - plain["accuracy"],
        "distance_ratio": ours["distance"] / plain["distance"],
    }
    overlap = [{"study": "overlap", "method": name, "recovered": value} for name, value in share.items()]
    return Report(metrics=metrics, rows=overlap + students)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and gradient against separation for every divergence, the recovered starts, and the students' accuracy."""
    from kullback.figures import figure

    separation = torch.linspace(0.0, 40.0, 161, dtype=torch.float64)
    with figure(path, columns=4, size=(3.6, 3.2)) as (loss_axes, gradient_axes, starts_axes, digits_axes):
        for index, (name, divergence) in enumerate(members().items()):
            location = (TARGET - separation).requires_grad_()
            loss = divergence(normal(torch.full_like(separation, TARGET)), normal(location))
            (slope,) = torch.autograd.grad(loss.sum(), location)
            loss, slope = loss.detach(), slope.abs()
            style: dict[str, Any] = {"color": f"C{index}"}
            if name in ("Sinkhorn", "reverse KL"):  # these and KL lie on each other
                style |= {"linewidth": 5.0, "alpha": 0.4} if name == "Sinkhorn" else {"linestyle": "--"}
            loss_axes.plot(separation, loss / loss.max(), **style)
            gradient_axes.semilogy(separation[1:], slope[1:] / slope.max(), **style)
            shares = [100 * row["recovered"] for row in rows if row["method"] == name]
            starts_axes.barh(name, sum(shares) / len(shares), color=f"C{index}")
        for name in STUDENTS:
            label, values = name.replace("KD + ", "KD +\n"), [row["accuracy"] for row in rows if row["method"] == name]
            digits_axes.plot([label] * len(values), values, ".", color="0.6")
            mean, deviation = torch.tensor(values).mean(), torch.tensor(values).std(correction=0)
            digits_axes.errorbar(label, mean, yerr=deviation, fmt="s", color="C0", capsize=4)
        loss_axes.set(xlabel="separation (bins)", title="loss / its largest value")
        gradient_axes.set(xlabel="separation (bins)", title="gradient / its largest value", ylim=(1e-6, 2.0))
        starts_axes.invert_yaxis()
        starts_axes.set(xlabel="starts that reach the target (%)", title="overlap study, colours as on the left")
        digits_axes.set(ylabel="held-out accuracy (%)", title="digits: seeds, mean and deviation")
