"""PLD (arXiv 2506.12542) in small: classifiers distilled by rankings, by knowledge distillation, and from labels alone.

50 classes lie around 10 centres, so that a teacher knows which classes are alike. All students of a seed begin alike,
see the same batches, and are trained side by side, as one network with a leading dimension. Rankings are sorted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.distill.dkd import dkd_loss, standardised
from kullback.divergences.plackett_luce import listwise_loss, pld_loss, ranking_of

__all__ = ["draw", "reproduce"]

CENTRES, CLASSES, DIMENSIONS, FEATURES = 10, 50, 32, 64
TRAIN, VALIDATION, TEST = 2000, 2000, 4000
EPOCHS, BATCH, DROPOUT, TEACHER_RATE, STUDENT_RATE = 40, 128, 0.3, 1e-3, 3e-3
TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 4.0)  # of PLD's weights, as in the paper
KD_TEMPERATURES, KD_WEIGHTS = (2.0, 4.0), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


class Labelled(NamedTuple):
    """Inputs [n, FEATURES] and labels [n]."""

    inputs: Tensor
    labels: Tensor


class KD(NamedTuple):
    """Knowledge distillation: (1 - weight) T^2 KL at temperature T + weight cross-entropy."""

    temperature: float
    weight: float


STANDARDISED = ("PLD, standardised teacher", "PLD, both standardised")
RANKED = (
    "CE", "ListMLE", "p-ListMLE", "p-ListMLE, teacher", *(f"PLD {temperature:g}" for temperature in TEMPERATURES),
    *STANDARDISED,
)  # fmt: skip
SMOOTHING, DKD_BETAS = 0.1, (0.5, 1.0, 2.0, 8.0)
SINGLE = ("DIST", "CE, smoothed")
DIST = (0.1, 0.45, 0.45)  # the paper's weights of cross-entropy and of the relations in a row and in a column
TUNED = [KD(temperature, weight) for temperature in KD_TEMPERATURES for weight in KD_WEIGHTS]
COPIES = len(RANKED) + len(SINGLE) + len(DKD_BETAS) + len(TUNED)  # students, in this order


def world(seed: int) -> list[Labelled]:
    """Points to train on, to tune on and to test on: classes around centres, seen through random tanh features."""
    source = generator(seed, "world")
    centres = 1.2 * torch.randn(CENTRES, DIMENSIONS, generator=source)
    classes = centres.repeat_interleave(CLASSES // CENTRES, 0)
    classes = classes + 0.6 * torch.randn(CLASSES, DIMENSIONS, generator=source)
    mixing = torch.randn(DIMENSIONS, FEATURES, generator=source) / math.sqrt(DIMENSIONS)
    sets = []
    for size in (TRAIN, VALIDATION, TEST):
        labels = torch.randint(CLASSES, (size,), generator=source)
        points = classes[labels] + 1.3 * torch.randn(size, DIMENSIONS, generator=source)
        sets.append(Labelled(torch.tanh(points @ mixing), labels))
    return sets


def layers(widths: Sequence[int], copies: int, source: torch.Generator) -> list[Tensor]:
    """Weights [copies, inside, outside] and biases [copies, 1, outside] of equal perceptrons."""
    found = []
    for inside, outside in pairwise(widths):
        for shape in ((inside, outside), (1, outside)):
            start = (2 * torch.rand(shape, generator=source) - 1) / math.sqrt(inside)
            found.append(start.repeat(copies, 1, 1).requires_grad_())
    return found


def forward(parameters: Sequence[Tensor], inputs: Tensor, dropout: torch.Generator | None = None) -> Tensor:
    """Logits [copies, n, CLASSES]; hidden units are dropped by the generator where there is one."""
    hidden = inputs.expand(len(parameters[0]), -1, -1)
    for index in range(0, len(parameters), 2):
        hidden = torch.baddbmm(parameters[index + 1], hidden, parameters[index])
        if index + 2 == len(parameters):
            break
        hidden = torch.relu(hidden)
        if dropout is not None:
            hidden = hidden * (torch.rand(hidden.shape, generator=dropout) >= DROPOUT) / (1 - DROPOUT)
    return hidden


def train(
    parameters: list[Tensor],
    inputs: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    source: torch.Generator,
    rate: float,
    dropout: torch.Generator | None = None,
    held_out: Labelled | None = None,
) -> None:
    """EPOCHS passes of Adam over random batches; loss(rows of the batch, logits) is a sum over the copies.

    held_out: end with the weights of the epoch whose cross-entropy on these points was the lowest.
    """
    best, kept = math.inf, [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs), generator=source).split(BATCH):
            optimizer.zero_grad()
            loss(rows, forward(parameters, inputs[rows], dropout)).backward()
            optimizer.step()
        if held_out is None:
            continue
        with torch.no_grad():
            found = torch.nn.functional.cross_entropy(forward(parameters, held_out.inputs)[0], held_out.labels).item()
            if found < best:
                best, kept = found, [parameter.clone() for parameter in parameters]
    if held_out is not None:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


def accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """Per cent of right answers of each copy."""
    return [100 * value for value in (logits.argmax(-1) == labels).double().mean(-1).tolist()]


def dist_loss(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """DIST (arXiv 2205.10536) of logits [n, V]: how far rows and columns of probabilities are from correlating."""

    def apart(p: Tensor, q: Tensor) -> Tensor:
        return 1.0 - torch.cosine_similarity(p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True), -1).mean()

    p, q = teacher.softmax(-1), student.softmax(-1)
    parts = (torch.nn.functional.cross_entropy(student, labels), apart(p, q), apart(p.T, q.T))
    return sum((weight * part for weight, part in zip(DIST, parts, strict=True)), torch.zeros(()))


def rankings_of(taught: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's order [n, V], which all of RANKED share, and the weights [len(RANKED), n, V] of each."""
    found = [
        ranking_of(taught, labels, weights=kind)  # type: ignore[arg-type]
        for kind in ("ce", torch.ones(CLASSES), "position", "position_teacher")
    ]
    found += [ranking_of(taught, labels, temperature=temperature) for temperature in TEMPERATURES]
    found += [ranking_of(standardised(taught), labels)] * len(STANDARDISED)
    return found[0].order, torch.stack([ranking.weights for ranking in found])


def as_trained(logits: Tensor) -> Tensor:
    """Logits [copies, n, V] of all students, of which the last of RANKED has its standardised."""
    place = len(RANKED) - 1
    return torch.cat([logits[:place], standardised(logits[place : place + 1]), logits[place + 1 :]])


def losses_of(taught: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum over all students of their losses: those of RANKED, of SINGLE, of DKD and of TUNED."""
    order, by_rank = rankings_of(taught, labels)
    heat = torch.tensor([kd.temperature for kd in TUNED]).view(-1, 1, 1)
    share = torch.tensor([kd.weight for kd in TUNED]).unsqueeze(-1)
    targets = {temperature: (taught / temperature).softmax(-1) for temperature in KD_TEMPERATURES}

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        sizes = (len(RANKED), 1, 1, len(DKD_BETAS), len(TUNED))
        ranked, (related,), (smooth,), decoupled, tuned = as_trained(logits).split(sizes)
        teacher, own = taught[rows], labels[rows]
        total = listwise_loss(ranked, order[rows].expand(len(RANKED), -1, -1), by_rank[:, rows]).mean(-1).sum()
        total = total + dist_loss(teacher, related, own)
        total = total + torch.nn.functional.cross_entropy(smooth, own, label_smoothing=SMOOTHING)
        for beta, copy in zip(DKD_BETAS, decoupled, strict=True):
            total = total + dkd_loss(teacher, copy, own, beta=beta) + torch.nn.functional.cross_entropy(copy, own)
        soft = torch.stack([targets[kd.temperature][rows] for kd in TUNED])
        distance = (soft * (soft.log() - (tuned / heat).log_softmax(-1))).sum(-1)
        hard = -tuned.log_softmax(-1).gather(-1, own.expand(len(TUNED), -1).unsqueeze(-1)).squeeze(-1)
        return total + ((1 - share) * heat.squeeze(-1) ** 2 * distance + share * hard).mean(-1).sum()

    return loss


def reproduce(run: Run) -> Report:
    """One seed: a teacher, and a student for each loss."""
    training, validation, test = world(run.seed)
    teacher = layers((FEATURES, 256, 256, CLASSES), 1, generator(run.seed, "teacher"))

    def from_labels(rows: Tensor, logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0], training.labels[rows])

    draws, drops = generator(run.seed, "teacher batches"), generator(run.seed, "dropout")
    train(teacher, training.inputs, from_labels, draws, TEACHER_RATE, drops, validation)
    with torch.no_grad():
        taught, right = forward(teacher, training.inputs)[0], forward(teacher, test.inputs)
    run.event("teacher", accuracy=accuracy(right, test.labels)[0])
    students = layers((FEATURES, 32, CLASSES), COPIES, generator(run.seed, "student"))
    draws = generator(run.seed, "student batches")
    train(students, training.inputs, losses_of(taught, training.labels), draws, STUDENT_RATE)
    with torch.no_grad():
        tuning = accuracy(forward(students, validation.inputs), validation.labels)
        logits = as_trained(forward(students, test.inputs))
    found = [
        {"accuracy": value, "divergence": distance}
        for value, distance in zip(accuracy(logits, test.labels), divergences(right, logits), strict=True)
    ]
    rows = [{"method": "teacher", "accuracy": accuracy(right, test.labels)[0]}]
    rows += [{"method": name, **one} for name, one in zip((*RANKED, *SINGLE), found, strict=False)]
    begin, ends = len(RANKED) + len(SINGLE), COPIES - len(TUNED)
    best, best_kd = (max(span, key=tuning.__getitem__) for span in (range(begin, ends), range(ends, COPIES)))
    rows += [
        {"method": "DKD", "beta": beta, **found[place], "tuned": place == best}
        for place, beta in enumerate(DKD_BETAS, begin)
    ]
    rows += [
        {"method": "KD", "temperature": kd.temperature, "weight": kd.weight, **found[place], "tuned": place == best_kd}
        for place, kd in enumerate(TUNED, ends)
    ]
    others = {name: found[place] for place, name in enumerate((*RANKED, *SINGLE))}
    others |= {"tuned DKD": found[best], "tuned KD": found[best_kd]}
    return Report(metrics=comparisons(others, found[ends + TUNED.index(KD(2.0, 0.1))]), rows=rows)


def divergences(teacher: Tensor, students: Tensor) -> list[float]:
    """The mean KL(teacher, student) in nats of each copy, from logits [1, n, V] and [copies, n, V]."""
    log_p = teacher.log_softmax(-1)
    values: list[float] = (log_p.exp() * (log_p - students.log_softmax(-1))).sum(-1).double().mean(-1).tolist()
    return values


def comparisons(found: Mapping[str, Mapping[str, float]], plain: Mapping[str, float]) -> dict[str, float]:
    """PLD at temperature 1 beside the others; plain: the KD of the paper, not tuned."""
    pld = found["PLD 1"]
    names = {
        "cross_entropy": "CE", "listmle": "ListMLE", "tuned_kd": "tuned KD", "dist": "DIST", "tuned_dkd": "tuned DKD",
        "position_listmle": "p-ListMLE", "label_smoothing": "CE, smoothed", "standardised_teacher": STANDARDISED[0],
        "standardised_both": STANDARDISED[1],
    }  # fmt: skip
    metrics = {f"gain_over_{key}": pld["accuracy"] - found[name]["accuracy"] for key, name in names.items()}
    metrics["gain_over_plain_kd"] = pld["accuracy"] - plain["accuracy"]
    return metrics | {
        "divergence": pld["divergence"],
        "nearer_than_dist": found["DIST"]["divergence"] - pld["divergence"],
        "farther_than_kd": pld["divergence"] - plain["divergence"],
    }


def surface(size: int = 41) -> tuple[Tensor, Tensor, Tensor]:
    """A random slice through the logits of 10 classes: coordinates [size] and the losses PLD and KL [size, size]."""
    source = generator(0, "surface")
    teacher, first, second = torch.randn(3, 10, generator=source, dtype=torch.float64)
    teacher, label = 2 * teacher, torch.tensor(0)
    at = torch.linspace(-6.0, 6.0, size, dtype=torch.float64)
    logits = at.view(-1, 1, 1) * second + at.view(1, -1, 1) * first
    labels = label.expand(size, size)
    pld = pld_loss(teacher.expand_as(logits), logits, labels, reduction="none")
    log_p = teacher.log_softmax(-1)
    return at, pld, (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


_NEAR: dict[str, dict[str, Any]] = {
    "CE": {"method": "CE"}, "smoothed": {"method": "CE, smoothed"}, "ListMLE": {"method": "ListMLE"},
    "DIST": {"method": "DIST"}, "KD": {"method": "KD", "tuned": True}, "DKD": {"method": "DKD", "tuned": True},
    "PLD 1": {"method": "PLD 1"}, "PLD 2": {"method": "PLD 2"}, "PLD, std. t": {"method": STANDARDISED[0]},
    "PLD, std. t, s": {"method": STANDARDISED[1]},
}  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against PLD's temperature, KD's weight and the divergence; PLD and KL on a slice of the logits."""
    from kullback.figures import figure

    base = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "CE"}

    def chosen_rows(**wanted: Any) -> list[Mapping[str, Any]]:
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def gain(**wanted: Any) -> tuple[float, float]:
        chosen = chosen_rows(**wanted)
        found = torch.tensor([row["accuracy"] - base[row["seed"]] for row in chosen], dtype=torch.float64)
        return found.mean().item(), found.std(correction=0).item()

    with figure(path, columns=5, size=(3.3, 3.2)) as (heat_axes, weight_axes, near_axes, pld_axes, kl_axes):
        means, spreads = zip(*(gain(method=f"PLD {temperature:g}") for temperature in TEMPERATURES), strict=True)
        heat_axes.errorbar(TEMPERATURES, means, spreads, marker="o", capsize=3, label="PLD")
        for color, name in (("C2", "ListMLE"), ("C5", "p-ListMLE"), ("C1", "DIST"), ("0.4", "teacher")):
            heat_axes.axhline(gain(method=name)[0], color=color, linestyle="--", label=name)
        weight_axes.axhline(gain(method="PLD 1")[0], color="C0", label="PLD at temperature 1: no weight")
        for color, temperature in zip(("C3", "C4"), KD_TEMPERATURES, strict=True):
            points = [gain(method="KD", temperature=temperature, weight=weight) for weight in KD_WEIGHTS]
            means, spreads = zip(*points, strict=True)
            label = f"KD, T = {temperature:g}"
            weight_axes.errorbar(KD_WEIGHTS, means, spreads, marker="o", capsize=3, color=color, label=label)
        for place, (name, wanted) in enumerate(_NEAR.items()):
            near = [row["divergence"] for row in chosen_rows(**wanted)]
            near_axes.plot(sum(near) / len(near), gain(**wanted)[0], "os^Dv"[place % 5], color=f"C{place}", label=name)
        near_axes.set(xlabel="KL from teacher to student (nats)", xscale="log", title="nearer is not always better")
        at, pld, kl = surface()
        for axes, values, title in ((pld_axes, pld, "PLD"), (kl_axes, kl, "KL to the teacher")):
            axes.contourf(at, at, values, levels=12, cmap="viridis")
            low = divmod(int(values.argmin()), len(at))
            axes.plot(at[low[1]], at[low[0]], "w*", markersize=9)
            axes.set(title=f"{title} on a slice of logits", xlabel="first direction", ylabel="second direction")
        heat_axes.set(xlabel="temperature of PLD's weights", ylabel="test accuracy above cross-entropy (points)")
        weight_axes.set(xlabel="weight of cross-entropy in KD", title="mean and deviation over seeds")
        heat_axes.set(title="the same seed's student from labels is 0")
        for axes in (heat_axes, weight_axes, near_axes):
            axes.set(ylim=(-1.6, 6.0))
            axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
            axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=1 if axes is weight_axes else 2)
