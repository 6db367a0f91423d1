"""What a finished align job leaves: the table, the curves, samples and the model directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.core.files import atomic_write
from kullback.figures import figure
from kullback.jobs._align_cuts import said_of_rollouts
from kullback.jobs._align_validation import METRICS
from kullback.jobs._models import load_model
from kullback.jobs._report import curves_csv, evaluations, keep_model, mean_row, part_events, part_reports

if TYPE_CHECKING:
    from kullback.jobs._alignment import Alignment

__all__ = ["write_report"]

_SAMPLES = 16


def write_report(work: Alignment) -> None:
    """Write model/, report.json, samples.jsonl, curves.csv and figures/curves.svg of a job whose parts are done."""
    out, names = work.out, [part.name for part in work.parts]
    reports = part_reports(out, names)
    keep_model(out, names[0])
    rows = [
        mean_row("policy", title, [reports[name][when] for name in names], METRICS)
        for title, when in (("before", "before"), (f"after {work.config.method.name}", "after"))
    ]
    curves = part_events(out, names)
    atomic_write(out / "curves.csv", curves_csv(curves))
    _draw(work.run.figure("curves"), curves)
    atomic_write(out / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in _samples(work)))
    written = ["model", "report.json", "samples.jsonl", "curves.csv", "figures/curves.svg"]
    notes = work.notes + said_of_rollouts(curves, rows[-1].get("finished"), work.config.data.length)
    work.run.report(
        {"rows": rows, "parts": reports, "k": work.config.sampling.validation, "notes": notes, "written": written}
    )


def _samples(work: Alignment) -> list[dict[str, Any]]:
    """A completion of each of the first validation prompts before and after, with its reward where there is one."""
    before = work.validation.texts(work.policy(work.config.seeds[0]), _SAMPLES)
    after = work.validation.texts(load_model(work.out / "model", role="model"), _SAMPLES)
    rewarded = work.reward is not None
    return [
        {"prompt": old["prompt"], "before": old["completion"], "after": new["completion"]}
        | ({"reward_before": old["reward"], "reward_after": new["reward"]} if rewarded else {})
        for old, new in zip(before, after, strict=True)
    ]


def _draw(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """What is gained, and how far the policy has gone for it: a panel each, one line a seed."""
    first = next(iter(curves.values()))
    gained = next((key for key in ("reward", "accuracy", "loss") if evaluations(first, key)), None)
    panels = {gained: f"validation {gained}", "divergence": "KL to the reference (nats a completion)"}
    with figure(path, columns=2) as axes:
        for panel, (key, label) in zip(axes, panels.items(), strict=True):
            for place, (name, events) in enumerate(curves.items()):
                found = evaluations(events, key) if key else []
                style = {"color": f"C{place}", "marker": "o", "markersize": 2.5, "linewidth": 1.4}
                panel.plot(*zip(*found, strict=True), label=name.replace("aligned-", "seed "), **style)
            panel.set(xlabel="step", ylabel=label)
        if len(curves) > 1:
            axes[0].legend(frameon=False)
