"""Online difficulty filtering (arXiv 2504.03380) in small: prompts far too easy or too hard, and a shared policy.

Each of a prompt's 12 answers has 24 features, and the right one scores highest under a hidden linear rule; an offset of
the prompt's own on its logit, normal with deviation 8, makes most prompts solved always or never at first. One linear
policy learns from 0/1 rewards by GRPO, on batches as they come or filtered. The pass rate on test prompts is exact.
A second panel is in `language_model`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.difficulty import (
    PassRateTracker,
    best_pass_rate,
    difficulty_filter,
    kl_to_optimum,
    offline_prompts,
    variance_bound,
)
from kullback.align.difficulty_sampler import FilteredBatch, OnlineDifficultySampler, StarvationWarning
from kullback.align.policy_gradient import clipped_policy_loss, grouped_advantages
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.papers.difficulty_filtering.language_model import MODES as MODEL_MODES
from kullback.papers.difficulty_filtering.language_model import model_curves, model_metrics

__all__ = ["draw", "reproduce"]

PROMPTS, ANSWERS, FEATURES = 200, 12, 24  # prompts to train on, and as many to test
DEVIATION, LIFT = 8.0, 1.5
BATCH, GROUP, UPDATES, RATE = 16, 8, 150, 0.15
MODES = ("plain", "balanced", "nonzero", "balanced, tracked", "offline", "easy to hard")
EVERY = 5  # updates between the points of the figure
TILT = 2.0  # 1 / beta of the drawn bound


class World(NamedTuple):
    """features [N, 12, 24], the right answers [N] and the offsets [N] of their logits; first those to train on."""

    features: Tensor
    right: Tensor
    offset: Tensor


def world(seed: int) -> World:
    """Prompts to train on, and behind them as many to test."""
    draws = generator(seed, "world")
    features = torch.randn(2 * PROMPTS, ANSWERS, FEATURES, generator=draws)
    rule = torch.randn(FEATURES, generator=draws)
    offset = LIFT + DEVIATION * torch.randn(2 * PROMPTS, generator=draws)
    return World(features, (features @ rule).argmax(1), offset)


def log_policy(weight: Tensor, given: World, rows: Tensor | slice) -> Tensor:
    """Log-probabilities [K, 12] of the answers to some prompts under weights [24]."""
    logits = given.features[rows] @ weight
    own = torch.nn.functional.one_hot(given.right[rows], ANSWERS) * given.offset[rows].unsqueeze(1)
    return (logits + own).log_softmax(1)


def pass_rate(weight: Tensor, given: World, rows: slice) -> Tensor:
    """The exact chance [K] of a right answer."""
    with torch.no_grad():
        return log_policy(weight, given, rows).gather(1, given.right[rows].unsqueeze(1)).squeeze(1).exp()


def train(given: World, mode: str, seed: int) -> list[dict[str, Any]]:
    """UPDATES steps of GRPO; a row after each: test pass rate, prompts drawn so far, right answers in the batch."""
    weight = torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=RATE)
    test, rows, drawn = slice(PROMPTS, None), [], 0
    for update, batch in zip(range(1, UPDATES + 1), batches(weight, given, mode, seed), strict=False):
        step(optimizer, weight, given, batch)
        drawn += batch.draws
        reached = float(pass_rate(weight, given, test).mean())
        solved = batch.rewards.sum(1).long().bincount(minlength=GROUP + 1).tolist()
        rows.append({"mode": mode, "update": update, "drawn": drawn, "pass_rate": reached, "solved": solved})
    return rows


def batches(weight: Tensor, given: World, mode: str, seed: int) -> Iterator[FilteredBatch]:
    """Batches of a mode, from the weights as they then stand: filtered while training, once before it, or sorted."""
    tracker = PassRateTracker(PROMPTS, forgetting=0.5) if mode == "balanced, tracked" else None
    filters = {"balanced": "balanced", "balanced, tracked": "balanced", "nonzero": "nonzero"}
    keep = difficulty_filter(filters.get(mode, "plain"))  # type: ignore[arg-type]
    chosen = torch.arange(PROMPTS)
    if mode in ("offline", "easy to hard"):
        first = torch.stack([rollout(weight, given, prompt, seed)[1] for prompt in range(PROMPTS)])
        once = difficulty_filter("balanced" if mode == "offline" else "plain")
        chosen = offline_prompts(first, keep=once, easy_first=mode == "easy to hard")

    def rolled(number: int, source: int, version: int) -> tuple[tuple[int, Tensor], Tensor]:
        if mode == "easy to hard":  # the window of a batch moves from the easy end to the hard one
            number = min(version * (PROMPTS - BATCH) // UPDATES + number, PROMPTS - 1)
        answers, rewards = rollout(weight, given, int(chosen[number]), source)
        return (int(chosen[number]), answers), rewards

    count = BATCH if mode == "easy to hard" else len(chosen)
    with warnings.catch_warnings(), OnlineDifficultySampler(
        count, rolled, keep, batch_size=BATCH, max_in_flight=1, max_draws=PROMPTS, tracker=tracker, seed=seed
    ) as sampler:
        warnings.simplefilter("ignore", StarvationWarning)  # towards the end there is little left to learn
        yield from sampler


def rollout(weight: Tensor, given: World, prompt: int, seed: int) -> tuple[Tensor, Tensor]:
    """GROUP answers to a prompt and their rewards."""
    with torch.no_grad():
        law = log_policy(weight, given, torch.tensor([prompt])).exp()
    found = torch.multinomial(law[0], GROUP, replacement=True, generator=generator(seed, "answers", prompt))
    return found, (found == given.right[prompt]).float()


def step(optimizer: torch.optim.Optimizer, weight: Tensor, given: World, batch: FilteredBatch) -> None:
    """One update on the kept groups; a short batch counts for less."""
    if not len(batch.prompts):
        return
    prompts, answers = zip(*batch.groups, strict=True)
    log_prob = log_policy(weight, given, torch.tensor(prompts)).gather(1, torch.stack(answers)).reshape(-1, 1)
    advantages = grouped_advantages(batch.rewards).reshape(-1)
    loss = batch.scale * clipped_policy_loss(log_prob, log_prob.detach(), advantages, torch.ones_like(log_prob))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def reproduce(run: Run) -> Report:
    """One seed: the same world and first policy for every mode."""
    given = world(run.seed)
    found = {}
    for mode in MODES:
        found[mode] = train(given, mode, run.seed)
        run.event("trained", mode=mode, pass_rate=found[mode][-1]["pass_rate"], drawn=found[mode][-1]["drawn"])
    rows = [row for rows in found.values() for row in thinned(rows)]
    curves = model_curves(run)
    rows += [row for some in curves.values() for row in some]
    return Report(metrics=metrics(found) | model_metrics(curves), rows=rows)


def thinned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every fifth row, for the figure; what the batches between held is summed."""
    parts = [rows[start : start + EVERY] for start in range(0, len(rows), EVERY)]
    sums = [[sum(row["solved"][k] for row in part) for k in range(GROUP + 1)] for part in parts]
    return [{**part[-1], "solved": solved} for part, solved in zip(parts, sums, strict=True)]


def metrics(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """The card's: updates to plain GRPO's best over those it needed itself, and the gain at the end; and the costs."""
    best = max(found["plain"], key=lambda row: row["pass_rate"])

    def until(mode: str, key: str) -> float:
        return next((float(row[key]) for row in found[mode] if row["pass_rate"] >= best["pass_rate"]), float("inf"))

    last = {mode: rows[-1] for mode, rows in found.items()}
    plain = last["plain"]["pass_rate"]
    return {
        "updates_ratio": until("balanced", "update") / best["update"],
        "pass_rate_gain": last["balanced"]["pass_rate"] - plain,
        "nonzero_updates_ratio": until("nonzero", "update") / best["update"],
        "nonzero_pass_rate_gain": last["nonzero"]["pass_rate"] - plain,
        "tracked_pass_rate_gain": last["balanced, tracked"]["pass_rate"] - plain,
        "offline_pass_rate_gain": last["offline"]["pass_rate"] - plain,
        "easy_to_hard_pass_rate_gain": last["easy to hard"]["pass_rate"] - plain,
        "plain_pass_rate": plain,
        "plain_drawn": float(last["plain"]["drawn"]),
        "balanced_drawn": float(last["balanced"]["drawn"]),
        "nonzero_drawn": float(last["nonzero"]["drawn"]),
        "tracked_drawn": float(last["balanced, tracked"]["drawn"]),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Pass rate by updates and by prompts drawn, of the policy and of the model, rates in batches, and the bound."""
    from kullback.figures import figure

    small = [row for row in rows if not row.get("model")]
    with figure(path, columns=5, size=(3.2, 3.0)) as axes:
        for number, mode in enumerate(MODES):
            updates, means = averaged(small, mode)
            axes[0].plot(updates, means["pass_rate"], color=f"C{number}")
            axes[1].plot(means["drawn"], means["pass_rate"], color=f"C{number}", label=mode)
            if mode in ("plain", "balanced"):
                late = [row["solved"] for row in small if row["mode"] == mode]
                counts = [sum(solved[k] for solved in late) for k in range(GROUP + 1)]
                places = [k + 0.4 * (mode == "balanced") - 0.2 for k in range(GROUP + 1)]
                axes[2].bar(places, [c / sum(counts) for c in counts], width=0.4, color=f"C{number}", label=mode)
        for mode in MODEL_MODES:
            updates, means = averaged([row for row in rows if row.get("model")], mode)
            axes[3].plot(updates, means["pass_rate"], color=f"C{MODES.index(mode)}", label=mode)
        axes[0].set(xlabel="updates", ylabel="exact pass rate, test prompts", title="linear policy")
        axes[1].legend(frameon=False, fontsize=7, loc="upper left")
        axes[1].set(xlabel="prompts rolled out", xscale="log", title="linear policy")
        axes[2].set(xlabel=f"right answers of {GROUP}", ylabel="share of the groups trained on", title="linear policy")
        axes[2].legend(frameon=False, fontsize=7)
        axes[3].set(xlabel="updates", ylabel="pass rate, all sums", title="language model")
        axes[3].legend(frameon=False, fontsize=7)
        grid = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
        axes[4].plot(grid, kl_to_optimum(grid, 1 / TILT), label="KL(pi_0||pi*), exact")
        axes[4].plot(grid, variance_bound(grid, 1 / TILT), "--", label="p (1 - p) / 2 beta²")
        axes[4].axvline(best_pass_rate(1 / TILT), color="0.7", linewidth=0.8)
        axes[4].set(xlabel="pass rate p", ylabel="nats", title=f"beta = {1 / TILT:g}")
        axes[4].legend(frameon=False, fontsize=7)


def averaged(rows: Sequence[Mapping[str, Any]], mode: str) -> tuple[list[int], dict[str, list[float]]]:
    """The updates of a mode, and means over seeds of the pass rate and of the prompts drawn."""
    updates: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["mode"] == mode:
            updates.setdefault(row["update"], []).append(row)
    names = ("pass_rate", "drawn")
    return list(updates), {n: [sum(row[n] for row in some) / len(some) for some in updates.values()] for n in names}
