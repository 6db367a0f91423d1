"""The align room on one task: a small model that adds and is often wrong, every method with the same budget.

Each method takes as many steps, on as many completions or pairs, as the others; the sums that it is measured on are
those that it is trained on, since a pair or a completion says nothing about another sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kullback.core.runs import Run
from kullback.data.arithmetic import sum_examples
from kullback.figures import figure
from kullback.models.adder import trained_adder
from kullback.papers.comparison import StepClock
from kullback.papers.sums import Aligned, align, write_examples

__all__ = ["COLUMNS", "SEEDS", "THREADS", "compare", "draw"]

SEEDS, THREADS = (0, 1, 2), 1
COLUMNS = {
    "reward": "reward (pass@1)", "pass_k": "pass@16", "divergence": "KL to reference", "entropy": "entropy",
    "distinct": "distinct-2", "milliseconds": "ms a step",
}  # fmt: skip

_TASK = "sums"
_COMPLETIONS, _GROUP, _STEPS = 256, 8, 60
_OPTIONS: dict[str, dict[str, Any]] = {"grpo": {"beta": 0.02}, "dr-grpo": {"length": 4}}


def compare(run: Run) -> list[dict[str, Any]]:
    """A row for the model as it starts out, and one for each method."""
    from kullback.jobs._align_methods import method_names

    rows: list[dict[str, Any]] = []
    for name in method_names():
        clock = StepClock()
        done = _aligned(run, name, name, _STEPS, _references(run, name), clock)
        before, after = done.curve[0], done.curve[-1]
        if not rows:
            rows.append({"task": _TASK, "method": "before", **_numbers(before)})
        rows.append({"task": _TASK, "method": name, **_numbers(after), "milliseconds": clock.milliseconds})
        run.event("method", name=name, reward=after["reward"])
    return rows


def _references(run: Run, name: str) -> list[Path]:
    """What a method needs beside the model: parents of a soup, which learnt a little apart, or a teacher."""
    wanted = {"salsa": {"parent-a": _STEPS // 6, "parent-b": _STEPS // 6}, "kdrl": {"teacher": _STEPS}}.get(name, {})
    return [
        _aligned(run, "sft", folder, max(steps, 1), [], None, seed=place).model
        for place, (folder, steps) in enumerate(wanted.items())
    ]


def _aligned(
    run: Run, name: str, folder: str, steps: int, reference: Sequence[Path], listen: StepClock | None,
    seed: int | None = None,
) -> Aligned:  # fmt: skip
    from kullback.jobs._align_methods import chosen_method
    from kullback.jobs.align import MethodConfig

    options = _OPTIONS.get(name, {})
    kind = chosen_method(MethodConfig(name=name, options=options)).kind
    a_prompt = {"online": _GROUP, "pair": 2, "completion": 1}[kind]
    return align(
        run, folder, model=trained_adder(), examples=write_examples(run.path / "sums.jsonl", sum_examples()),
        method=name, options=options, reference=reference, steps=steps, batch=_COMPLETIONS // a_prompt, group=_GROUP,
        seed=seed, listen=listen,
    )  # fmt: skip


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {column: row[column] for column in COLUMNS if column in row}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What each method gains against how far it goes from the reference, and what it keeps of variety."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = {"divergence": "KL to the reference (nats)", "pass_k": "pass@16"}
    with figure(path, columns=2, size=(5.2, 3.8)) as axes:
        for panel, (key, label) in zip(axes, panels.items(), strict=True):
            for place, method in enumerate(methods):
                found = [row for row in rows if row["method"] == method]
                x, y = ([row[name] for row in found] for name in (key, "reward"))
                style: dict[str, Any] = {"marker": "o" if place < 10 else "s", "color": f"C{place % 10}"}
                if method == "before":
                    style = {"marker": "*", "color": "black"}
                panel.plot(x, y, linestyle="none", markersize=5, label=method, **style)
            panel.set(xlabel=label, ylabel="reward (pass@1)")
        axes[1].legend(frameon=False, fontsize=7, ncols=2)
