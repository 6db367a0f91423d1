"""Difficulty filtering on a language model: the small one that adds learns its sums by GRPO, on all groups or filtered.

Its demonstrations were right with a chance of each sum's own, so that it solves some sums nearly always and others
seldom. Training and measurement are the align job's, with its option `sampling.filter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from kullback.core.runs import Run
from kullback.data.arithmetic import sum_examples
from kullback.models.adder import trained_adder
from kullback.papers.sums import align, write_examples

__all__ = ["model_curves", "model_metrics"]

MODES = ("plain", "balanced", "nonzero")
BATCH, GROUP, UPDATES, EVERY, SAMPLES = 16, 8, 150, 10, 8


def model_curves(run: Run) -> dict[str, list[dict[str, Any]]]:
    """A row for each measurement of each mode: update, pass rate over all sums, prompts drawn so far, and the KL."""
    examples = write_examples(run.path / "sums.jsonl", sum_examples())
    found = {}
    for mode in MODES:
        done = align(
            run, mode, model=trained_adder(), examples=examples, method="grpo", steps=UPDATES, batch=BATCH, group=GROUP,
            every=EVERY, prompts=400, samples=SAMPLES, filtering="" if mode == "plain" else mode,
        )  # fmt: skip
        found[mode] = [
            {
                "model": True, "mode": mode, "update": row["step"], "pass_rate": row["reward"],
                "drawn": row.get("drawn", BATCH * row["step"]), "divergence": row["divergence"],
            }
            for row in done.curve
        ]  # fmt: skip
        run.event("aligned", mode=mode, pass_rate=found[mode][-1]["pass_rate"], drawn=found[mode][-1]["drawn"])
    return found


def model_metrics(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Updates to the best of plain GRPO over those that it needed, and gains at the end; prompts drawn on the way."""
    best = max(found["plain"][1:], key=lambda row: row["pass_rate"])
    metrics = {"model_plain_pass_rate": found["plain"][-1]["pass_rate"]}
    for mode in MODES[1:]:
        last = found[mode][-1]
        metrics |= {
            f"model_{mode}_updates_ratio": reached(found[mode], "update", best["pass_rate"]) / best["update"],
            f"model_{mode}_drawn_ratio": reached(found[mode], "drawn", best["pass_rate"]) / best["drawn"],
            f"model_{mode}_gain": last["pass_rate"] - found["plain"][-1]["pass_rate"],
        }
    return metrics


def reached(rows: Sequence[Mapping[str, Any]], key: str, level: float) -> float:
    """Where a curve first comes to a pass rate, between two measurements by a straight line; infinity where never."""
    for before, after in pairwise(rows):
        if before["pass_rate"] < level <= after["pass_rate"]:
            share = (level - before["pass_rate"]) / (after["pass_rate"] - before["pass_rate"])
            return float(before[key] + share * (after[key] - before[key]))
    return float("inf")
