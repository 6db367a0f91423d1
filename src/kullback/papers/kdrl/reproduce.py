"""KDRL on a bandit of 32 contexts with 1296 answers each, of which one is right; success is exact.

The first three seeds take the panel in `language_model` as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.kdrl import BetaSchedule, Kdrl
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.figures import figure
from kullback.papers.kdrl.language_model import MODEL_METHODS, model_curves, model_metrics

__all__ = ["draw", "reproduce"]

CONTEXTS, LENGTH, VOCABULARY, SURE, WRONG = 32, 4, 6, 0.8, 0.25
STEPS, EVERY, GROUP, RATE = 600, 20, 8, 0.03
SUCCESS = 0.9  # to which the steps are counted
MODEL_SEEDS = (0, 1, 2)
BETA, NEVER = 0.1, BetaSchedule(start=0.0)
CONSTANT = BetaSchedule(start=BETA)
ANNEALED = BetaSchedule(kind="linear", start=0.3, end=0.01, delta=0.3 / 400)
METHODS: dict[str, Kdrl] = {
    "GRPO": Kdrl(schedule=NEVER),
    "distillation": Kdrl(schedule=CONSTANT),  # with rewards that are all alike
    "KDRL k2": Kdrl(schedule=CONSTANT),
    "KDRL k3": Kdrl(schedule=CONSTANT, kind="k3"),
    "KDRL k1 reward": Kdrl(schedule=CONSTANT, kind="k1_reward"),
    "KDRL annealed": Kdrl(schedule=ANNEALED),
    "KDRL response mask": Kdrl(schedule=CONSTANT, keep="response"),
    "KDRL group mask": Kdrl(schedule=CONSTANT, keep="group"),
    "KDRL reward shaping": Kdrl(schedule=CONSTANT, shaping="reward"),
    "KDRL exact": Kdrl(schedule=CONSTANT, divergence="exact"),
    "KDRL top-k": Kdrl(schedule=CONSTANT, divergence="top-k", top_k=2),
}


class Bandit(NamedTuple):
    """target [C, L]: the right answers; teacher [C, L, V + 1, V]: log-probabilities given the token before, or V."""

    target: Tensor
    teacher: Tensor


def reproduce(run: Run) -> Report:
    """Every method from the uniform start."""
    world = bandit(run.seed)
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, float]]] = {}
    for name, method in METHODS.items():
        curves[name] = _train(world, method, run.seed, blind=name == "distillation")
        rows += [{"method": name, **point} for point in curves[name]]
        run.event("method", name=name, **curves[name][-1])
    at_200 = {name: next(p["success"] for p in points if p["step"] == 200) for name, points in curves.items()}
    end = {name: points[-1] for name, points in curves.items()}
    slow, fast = (_steps_to(curves[name], SUCCESS) for name in ("GRPO", "KDRL k2"))
    metrics = {
        "steps_grpo_over_kdrl": slow / fast,
        "success_gain_at_200": at_200["KDRL k2"] - at_200["GRPO"],
        "kdrl_greedy": end["KDRL k2"]["greedy"],
        "distillation_greedy": end["distillation"]["greedy"],
        "k2_minus_k3": end["KDRL k2"]["success"] - end["KDRL k3"]["success"],
        "grpo_greedy": end["GRPO"]["greedy"],
        "annealed_success": end["KDRL annealed"]["success"],
        "exact_success": end["KDRL exact"]["success"],
        "top_k_success": end["KDRL top-k"]["success"],
    }
    if run.seed in MODEL_SEEDS:
        model = model_curves(run)
        metrics |= model_metrics(model)
        rows += [{"method": name, **point} for name, points in model.items() for point in points]
    return Report(metrics=metrics, rows=rows)


def _steps_to(points: Sequence[Mapping[str, float]], success: float) -> float:
    """The steps after which this success was first measured, all of them where it never was."""
    return next((point["step"] for point in points if point["success"] >= success), points[-1]["step"])


def bandit(seed: int) -> Bandit:
    """Hidden targets, and a teacher that is sure of its own answer, wrong in one place of a quarter of the contexts."""
    draw = generator(seed, "bandit")
    target = torch.randint(VOCABULARY, (CONTEXTS, LENGTH), generator=draw)
    said = target.clone()
    wrong = torch.randperm(CONTEXTS, generator=draw)[: round(WRONG * CONTEXTS)]
    place = torch.randint(LENGTH, (len(wrong),), generator=draw)
    shift = torch.randint(1, VOCABULARY, (len(wrong),), generator=draw)
    said[wrong, place] = (said[wrong, place] + shift) % VOCABULARY
    law = torch.full((CONTEXTS, LENGTH, VOCABULARY), (1.0 - SURE) / (VOCABULARY - 1), dtype=torch.float64)
    law.scatter_(-1, said.unsqueeze(-1), SURE)
    return Bandit(target, law.log().unsqueeze(2).expand(-1, -1, VOCABULARY + 1, -1))


def _token_log_probs(logits: Tensor, x: Tensor) -> Tensor:
    """Log-probabilities [C, G, L] of answers x [C, G, L] under logits or log-probabilities [C, L, V + 1, V]."""
    return _rows(logits, x).log_softmax(-1).gather(-1, x.unsqueeze(-1)).squeeze(-1)


def _rows(logits: Tensor, x: Tensor) -> Tensor:
    """The logits [C, G, L, V] of each token of the answers."""
    before = torch.cat([torch.full_like(x[..., :1], VOCABULARY), x[..., :-1]], -1)
    contexts, places = torch.arange(CONTEXTS).view(-1, 1, 1), torch.arange(LENGTH)
    return logits[contexts, places, before]


def _sample(logits: Tensor, draw: torch.Generator) -> Tensor:
    """GROUP answers for each context [C, GROUP, L]."""
    law, contexts = logits.softmax(-1), torch.arange(CONTEXTS).unsqueeze(1)
    before = torch.full((CONTEXTS, GROUP), VOCABULARY)
    found = []
    for place in range(LENGTH):
        rows = law[contexts, place, before].view(-1, VOCABULARY)
        before = torch.multinomial(rows, 1, generator=draw).view(CONTEXTS, GROUP)
        found.append(before)
    return torch.stack(found, -1)


def _train(world: Bandit, method: Kdrl, seed: int, *, blind: bool) -> list[dict[str, float]]:
    """The course of success, greedy accuracy and the KL to the teacher; blind: no answer is rewarded."""
    shape = (CONTEXTS, LENGTH, VOCABULARY + 1, VOCABULARY)
    logits = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    points = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            points.append({"step": float(step), **_measure(world, logits.detach())})
        if step == STEPS:
            break
        draw = generator(seed, "answers", step)
        x = _sample(logits.detach(), draw)
        right = (x == world.target.unsqueeze(1)).all(-1).double()
        log_prob = _token_log_probs(logits, x).view(-1, LENGTH)
        batch = method.prepare({
            "rewards": (0.0 * right if blind else right).view(-1), "old_log_prob": log_prob.detach(),
            "completion_mask": torch.ones(CONTEXTS * GROUP, LENGTH, dtype=torch.bool), "step": torch.tensor(step),
            "reference_log_prob": _token_log_probs(world.teacher, x).view(-1, LENGTH),
        }, group=GROUP, generator=draw)  # fmt: skip
        if method.compares is not None:
            laws = method.compares(_rows(world.teacher, x), _rows(logits, x))
            batch["teacher_divergence"] = laws.view(-1, LENGTH)
        loss, _ = method.loss(log_prob, batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return points


def _measure(world: Bandit, logits: Tensor) -> dict[str, float]:
    target = world.target.unsqueeze(1)
    success = _token_log_probs(logits, target).sum(-1).exp().mean().item()
    contexts, before, greedy = torch.arange(CONTEXTS), torch.full((CONTEXTS,), VOCABULARY), torch.ones(CONTEXTS)
    law, gap = logits.log_softmax(-1), torch.zeros(CONTEXTS, dtype=torch.float64)
    reach = torch.zeros(CONTEXTS, VOCABULARY + 1, dtype=torch.float64)
    reach[:, VOCABULARY] = 1.0
    for place in range(LENGTH):
        step = law[contexts, place]  # [C, V + 1, V]
        gap += (reach.unsqueeze(-1) * step.exp() * (step - world.teacher[:, place])).sum((1, 2))
        chosen = step[contexts, before].argmax(-1)
        greedy *= (chosen == world.target[:, place]).float()
        before = chosen
        reach = torch.cat([(reach.unsqueeze(-1) * step.exp()).sum(1), torch.zeros(CONTEXTS, 1)], 1)
    return {"success": success, "greedy": greedy.mean().item(), "divergence": gap.mean().item()}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Success and the KL to the teacher against steps, means over seeds: the bandit, then the language model."""
    with figure(path, columns=4, size=(3.8, 3.4)) as axes:
        for model, (first, second) in ((False, axes[:2]), (True, axes[2:])):
            some = [row for row in rows if row.get("model", False) is model]
            for name in MODEL_METHODS if model else METHODS:
                place = list(METHODS).index(name)
                style: dict[str, Any] = {
                    "color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--", "label": name,
                    "linewidth": 1.3,
                }  # fmt: skip
                for panel, key in ((first, "success"), (second, "divergence")):
                    panel.plot(*_means([row for row in some if row["method"] == name], key), **style)
            which = "language model" if model else "bandit"
            first.set(xlabel="step", ylabel="chance of the right answer", title=which)
            second.set(xlabel="step", ylabel="KL(student, teacher) (nats)", title=which)
        axes[0].legend(edgecolor="none", framealpha=0.9, fontsize=6, loc="lower right")
        axes[2].legend(frameon=False, fontsize=6)


def _means(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps, and the mean over seeds at each."""
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(row["step"], []).append(row[key])
    steps = sorted(found)
    return steps, [sum(found[step]) / len(found[step]) for step in steps]
