"""Implicit rewards of fine-tuning (arXiv 2507.00018) in small: drift, what SFT learns of the reward, and DPO after it.

A recurrent policy learns an order-2 chain over strings of 5 from 6 tokens and is the base; the expert is its tilt by a
reward. 150 strings of the expert are learned by SFT at three learning rates and by f-SFT at the largest, at one number
of steps; each model then is the reference of DPO on pairs that the base drew. Everything is enumerated. Beside it a
model of prose is fine-tuned on docstrings (see `text`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.f_dpo import FDPOLoss
from kullback.align.implicit import FSFT, matching_divergence
from kullback.align.methods import Method, Preference
from kullback.align.pipeline import PostTrainingPipeline, Stage, TrainStage
from kullback.align.worlds import RecurrentPolicy, World, draw_sequences, entropy, expected_reward, regularised_optimum
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.divergences import kl
from kullback.papers.implicit_reward.text import on_docstrings

__all__ = ["draw", "reproduce"]

WORLD = World(6, 5)
DEMONSTRATIONS, PAIRS = 150, 1000
SHARPNESS = 2.0  # labels are Bernoulli(sigmoid(2 * difference of rewards))
BASE_STEPS, STEPS, CLIP = 250, 120, 10.0
SFT_BATCH, DPO_BATCH, DPO_RATE, DPO_BETA = 32, 64, 5e-4, 0.1
LARGE, SMALL, SMALLEST = 5e-3, 1e-3, 3e-4  # small is the paper's fifth of the large one
BETA = 0.5  # of f-SFT, with c = 0
# name -> divergence and learning rate
RUNS: Mapping[str, tuple[str, float]] = {
    "SFT 5e-3": ("tv", LARGE), "SFT 1e-3": ("tv", SMALL), "SFT 3e-4": ("tv", SMALLEST),
    "chi-squared": ("chi2", LARGE), "Hellinger": ("hellinger", LARGE), "Jensen-Shannon": ("js", LARGE),
}  # fmt: skip
F_SFT = ("chi-squared", "Hellinger", "Jensen-Shannon")


class Setting(NamedTuple):
    """What all runs share: the base with its table [N], rewards and the expert [N], demonstrations, and pairs.

    demonstrations: places [n] of strings; pairs [2, n]: places, the chosen ones first.
    """

    base: RecurrentPolicy
    log_base: Tensor
    reward: Tensor
    log_expert: Tensor
    demonstrations: Tensor
    pairs: Tensor


def optimised(policy: RecurrentPolicy, loss: Callable[[], Tensor], rate: float, steps: int) -> None:
    """Adam with clipped gradients."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()


def chain(source: torch.Generator) -> Tensor:
    """Log-probabilities [N] of strings of a random order-2 chain."""
    first, second, third = (torch.randn(*[6] * order, generator=source).log_softmax(-1) for order in (1, 2, 3))
    x = WORLD.sequences().T
    return first[x[0]] + second[x[0], x[1]] + sum(third[x[i], x[i + 1], x[i + 2]] for i in range(3))


def preferred(log_base: Tensor, reward: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Places [2, count] of pairs that the base drew, the one that wins under Bradley-Terry first."""
    places = WORLD.index(draw_sequences(WORLD, log_base, 2 * count, generator=source)).view(2, count)
    wins = torch.rand(count, generator=source) < torch.sigmoid(SHARPNESS * (reward[places[0]] - reward[places[1]]))
    return torch.where(wins, places, places.flip(0))


def setting(seed: int) -> Setting:
    """The base, the reward with mean 0 and deviation 1 under it, the expert, demonstrations and pairs of a seed."""
    source = generator(seed, "world")
    law = chain(source)
    base = RecurrentPolicy(WORLD, generator=generator(seed, "base"))
    with torch.no_grad():  # as embeddings usually begin
        embedding = base.get_parameter("embedding")
        embedding.copy_(torch.randn(embedding.shape, generator=generator(seed, "embedding")))

    def likelihood() -> Tensor:
        return -base.log_probs(draw_sequences(WORLD, law, 128, generator=source)).mean()

    optimised(base, likelihood, 1e-2, BASE_STEPS)
    with torch.no_grad():
        log_base = base.all_log_probs()
    x = WORLD.sequences().T
    single, double = torch.randn(6, generator=source), torch.randn(6, 6, generator=source)
    score = single[x].sum(0) + sum(double[one, two] for one, two in pairwise(x))
    score = score - expected_reward(log_base, score)
    reward = score / expected_reward(log_base, score.square()).sqrt()
    log_expert = regularised_optimum(log_base, reward, coefficient=1.0)
    shown = WORLD.index(draw_sequences(WORLD, log_expert, DEMONSTRATIONS, generator=source))
    return Setting(base, log_base, reward, log_expert, shown, preferred(log_base, reward, PAIRS, source))


def pipeline(name: str) -> PostTrainingPipeline:
    """(f-)SFT at the large rate over a divisor, and DPO from where it ends."""
    divergence, rate = RUNS[name]
    method: Method = FSFT(divergence=matching_divergence(divergence), beta=BETA)  # type: ignore[arg-type]
    return PostTrainingPipeline(
        sft=Stage(name="sft", method=method, learning_rate=LARGE, steps=STEPS), lr_divisor=LARGE / rate,
        preference=Stage(
            name="dpo", method=Preference(options=FDPOLoss(beta=DPO_BETA)), learning_rate=DPO_RATE, steps=STEPS
        ),
    )  # fmt: skip


def training(here: Setting, seed: int) -> TrainStage:
    """How a stage trains in this world: on demonstrations, or on pairs, the chosen ones first."""
    strings = WORLD.sequences()

    def train(model: RecurrentPolicy, reference: RecurrentPolicy, stage: Stage) -> None:
        source = generator(seed, "demonstrations" if stage.name == "sft" else "pairs")
        with torch.no_grad():
            known = reference.all_log_probs()

        def loss() -> Tensor:
            if stage.name == "sft":
                places = here.demonstrations[torch.randint(DEMONSTRATIONS, (SFT_BATCH,), generator=source)]
            else:
                places = here.pairs[:, torch.randint(PAIRS, (DPO_BATCH,), generator=source)].flatten()
            batch = {"completion_mask": torch.ones(len(places), 1), "reference_log_prob": known[places].unsqueeze(1)}
            log_probs = model.log_probs(strings[places]).unsqueeze(1)
            return stage.method.loss(log_probs, batch, count=stage.method.count(batch))[0]

        optimised(model, loss, stage.learning_rate, stage.steps)

    return train


def measured(here: Setting, table: Tensor) -> dict[str, float]:
    """Exact reward, entropy, drift from the base and distance from the expert."""
    found = {
        "reward": expected_reward(table, here.reward), "entropy": entropy(table),
        "drift": kl(table, here.log_base), "expert_kl": kl(here.log_expert, table),
    }  # fmt: skip
    return {name: value.item() for name, value in found.items()}


def ordered_rightly(here: Setting, table: Tensor) -> float:
    """The implicit reward's accuracy on all pairs that the base draws, by their probabilities; no pair was trained on.

    By the reward itself and not by noisy labels: the question is what SFT has learned of it.
    """
    mass, learned, right, compared = here.log_base.exp(), table - here.log_base, 0.0, 0.0
    for rows in torch.arange(WORLD.size).split(243):
        # Strings of the same neighbours in another order have one reward, up to rounding.
        better = (here.reward[rows].unsqueeze(1) - here.reward > 1e-4).to(mass.dtype)
        margin = (learned[rows].unsqueeze(1) - learned).sign_().add_(1.0).mul_(0.5)
        right += (mass[rows] @ (better * margin @ mass)).item()
        compared += (mass[rows] @ (better @ mass)).item()
    return right / compared


def both_stages(here: Setting, name: str, seed: int) -> dict[str, Any]:
    """One row: the model after SFT, how its implicit reward orders other pairs, and the model after DPO."""
    found = pipeline(name).run(copy.deepcopy(here.base), training(here, seed))
    with torch.no_grad():
        table, after = found.tuned.all_log_probs(), found.final.all_log_probs()
    accuracy = ordered_rightly(here, table)
    divergence, rate = RUNS[name]
    row = {"study": "world", "method": name, "divergence": divergence, "rate": rate, "accuracy": accuracy}
    return row | measured(here, table) | {f"after_{key}": value for key, value in measured(here, after).items()}


def reproduce(run: Run) -> Report:
    """One seed: six ways of fine-tuning, each followed by the same DPO."""
    here = setting(run.seed)
    rows = []
    for name in RUNS:
        rows.append(both_stages(here, name, run.seed))
        run.event("trained", **rows[-1])
    at = {row["method"]: row for row in rows}
    large, small = at["SFT 5e-3"], at["SFT 1e-3"]
    kept = [at[name] for name in F_SFT]
    metrics = {
        "post_dpo_gain": small["after_reward"] - large["after_reward"],
        "post_sft_gain": small["reward"] - large["reward"],
        "implicit_accuracy_gain": small["accuracy"] - large["accuracy"],
        "drift_reduction_min": min(1.0 - row["drift"] / large["drift"] for row in kept),
        "expert_kl_reduction_min": min(1.0 - row["expert_kl"] / large["expert_kl"] for row in kept),
        "f_sft_post_dpo_gain": max(row["after_reward"] for row in kept) - large["after_reward"],
    }
    text = on_docstrings(run)
    drifts = {row["method"]: row["drift"] for row in text}
    metrics |= {
        "text_small_rate_drift_reduction": 1.0 - drifts["SFT, rate / 5"] / drifts["SFT"],
        "text_f_sft_drift_reduction": 1.0 - max(drifts[name] for name in F_SFT) / drifts["SFT"],
    }
    return Report(metrics=metrics, rows=[*rows, *text])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward before and after DPO with the drift as the size, drift, accuracy of the implicit reward, and real text."""
    from kullback.figures import figure

    world = [row for row in rows if row["study"] == "world"]
    with figure(path, columns=4, size=(3.5, 3.4)) as (rewards, drifts, accuracies, text):
        for index, name in enumerate(RUNS):
            own = [row for row in world if row["method"] == name]
            style: dict[str, Any] = {"color": f"C{index}", "alpha": 0.75, "label": name}
            sizes = [40.0 * row["drift"] for row in own]
            before, after = ([row[key] for row in own] for key in ("reward", "after_reward"))
            rewards.scatter(before, after, s=sizes, edgecolors="none", **style)
            drifts.barh(name, sum(row["drift"] for row in own) / len(own), color=f"C{index}")
            drifts.barh(name, sum(row["after_drift"] for row in own) / len(own), fill=False, edgecolor="0.3")
        drifts.invert_yaxis()
        plain = [row for row in world if row["divergence"] == "tv"]
        for seed in sorted({row["seed"] for row in rows}):
            own = sorted((row for row in plain if row["seed"] == seed), key=lambda row: row["rate"])
            values = [row["accuracy"] for row in own]
            accuracies.semilogx([row["rate"] for row in own], values, "o-", label=f"seed {seed}")
        accuracies.set_xticks([SMALLEST, SMALL, LARGE], ["3e-4", "1e-3", "5e-3"])
        accuracies.minorticks_off()
        accuracies.legend(frameon=False)
        rewards.legend(frameon=False, fontsize=7, markerscale=0.6)
        rewards.set(xlabel="reward after SFT", ylabel="reward after DPO", title="size: drift after SFT")
        drifts.set(xlabel="KL(policy || base) (nats)", title="after SFT; frames: after DPO")
        accuracies.set(xlabel="learning rate of SFT", ylabel="accuracy of the implicit reward", title="all pairs")
        _draw_text(text, [row for row in rows if row["study"] == "text"])


def _draw_text(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Loss on docstrings not seen against the drift, means over seeds, the rates joined by a line."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    points = {}
    for name in names:
        own = [row for row in rows if row["method"] == name]
        points[name] = [sum(row[key] for row in own) / len(own) for key in ("drift", "nats")]
    rates = [name for name in names if name == "base" or name.startswith("SFT")]
    line = sorted(points[name] for name in rates)
    axes.plot(*zip(*line, strict=True), "-", color="0.7", zorder=0)
    for name in names:
        color, marker = ("0.3", "o") if name in rates else (f"C{3 + names.index(name) - len(rates)}", "D")
        axes.plot(*points[name], marker, color=color, markersize=5)
        place = {"SFT, rate / 10": (-36, -3), "Hellinger": (5, -8), "chi-squared": (5, -8)}.get(name, (5, 3))
        axes.annotate(name.removeprefix("SFT, "), points[name], place, textcoords="offset points", fontsize=7)
    axes.set(xlabel="drift, nats a byte", ylabel="nats a byte", title="docstrings not seen; base of prose")
    axes.margins(x=0.2, y=0.1)
