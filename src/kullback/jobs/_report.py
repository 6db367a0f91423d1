"""What the reports of training jobs share: means over seeds, the curves as a table, the first part's model."""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kullback.core.files import atomic_directory
from kullback.core.runs import Run

__all__ = ["curves_csv", "evaluations", "keep_model", "mean_row", "part_events", "part_reports", "spread"]

_FIRST = ("part", "kind", "step", "loss", "learning_rate", "gradient_norm")
_UNTOLD = {"time"}


def part_reports(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """The report of each part."""
    return {n: json.loads((out / "parts" / n / "report.json").read_text(encoding="utf-8")) for n in names}


def part_events(out: Path, names: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The events of each part."""
    return {name: list(Run.open(out / "parts" / name).events()) for name in names}


def keep_model(out: Path, name: str) -> None:
    """The model of the part `name` as that of the job, in model/."""
    if not (out / "model").exists():
        with atomic_directory(out / "model") as place:
            shutil.copytree(out / "parts" / name / "model", place, dirs_exist_ok=True)


def mean_row(title: str, name: str, found: Sequence[Mapping[str, float]], keys: Sequence[str]) -> dict[str, Any]:
    """{title: name, "seeds": n} with the mean of each key over those that have it, and its spread as key_spread."""
    row: dict[str, Any] = {title: name, "seeds": len(found)}
    for key in keys:
        values = [metrics[key] for metrics in found if key in metrics]
        if values:
            row[key], row[f"{key}_spread"] = statistics.fmean(values), spread(values)
    return row


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def evaluations(events: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation that has the key; of a step that was repeated after a kill, the last."""
    found = {e["step"]: e[key] for e in events if e["kind"] == "evaluation" and key in e}
    return sorted(found.items())


def curves_csv(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line for each recorded step of each part; a step that was repeated after a kill counts once."""
    told = [e for events in curves.values() for e in events if e["kind"] in ("step", "evaluation")]
    others = dict.fromkeys(key for event in told for key in event if key not in (*_FIRST, *_UNTOLD))
    text = io.StringIO()
    table = csv.DictWriter(text, [*_FIRST, *others], extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for name, events in curves.items():
        lines = {(e["kind"], e["step"]): e for e in events if e["kind"] in ("step", "evaluation")}
        for (_, _), event in sorted(lines.items(), key=lambda item: item[0][1]):
            table.writerow({"part": name, **event})
    return text.getvalue()
