"""What a finished distill job leaves: the table, the curves, samples and the model directory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.core.files import atomic_write
from kullback.core.rng import generator
from kullback.distill._hf import LiveTeacher
from kullback.distill.measure import measure, measure_truncated
from kullback.distill.on_policy import sample_continuations
from kullback.figures import figure
from kullback.jobs._report import curves_csv, evaluations, keep_model, mean_row, part_events, part_reports, spread

if TYPE_CHECKING:
    from kullback.jobs._distillation import Distillation

__all__ = ["write_report"]

_TITLES = {"distilled": "distilled from the teacher", "baseline": "cross-entropy alone"}


def write_report(work: Distillation) -> None:
    """Write model/, report.json, samples.jsonl, curves.csv and figures/curves.svg of a job whose parts are done."""
    out = work.out
    names = [part.name for part in work.parts]
    reports = part_reports(out, names)
    keep_model(out, names[0])
    rows = [
        _row("teacher", [_teacher(work)]),
        _row("student before", [reports[part.name]["before"] for part in work.parts if part.role == "distilled"]),
    ]
    for role in dict.fromkeys(part.role for part in work.parts):
        rows.append(_row(_TITLES[role], [reports[part.name]["after"] for part in work.parts if part.role == role]))
    curves = part_events(out, names)
    atomic_write(out / "curves.csv", curves_csv(curves))
    validation = {name: evaluations(events, "cross_entropy") for name, events in curves.items()}
    _draw(work.run.figure("curves"), validation, rows[0].get("cross_entropy"))
    samples = _samples(work)
    atomic_write(out / "samples.jsonl", "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    report: dict[str, Any] = {"rows": rows, "divergence": _called(work.divergence), "parts": reports}
    if work.config.baseline:
        report["gain"] = _gain(work, reports)
    report["written"] = ["model", "report.json", "samples.jsonl", "curves.csv", "figures/curves.svg"]
    work.run.report(report)


def _gain(work: Distillation, reports: Mapping[Any, Any]) -> dict[str, Any]:
    """By how much distillation beats cross-entropy alone, in validation nats a token, seed by seed."""
    after = {(part.role, part.seed): reports[part.name]["after"]["cross_entropy"] for part in work.parts}
    gains = [after["baseline", seed] - after["distilled", seed] for seed in work.config.seeds]
    return {
        "mean": statistics.fmean(gains),
        "spread": spread(gains),
        "wins": sum(g > 0 for g in gains),
        "of": len(gains),
    }


def _row(name: str, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return mean_row("student", name, found, ("cross_entropy", "perplexity", "divergence"))


def _teacher(work: Distillation) -> dict[str, float]:
    if isinstance(work.teacher, LiveTeacher):
        return measure(work.teacher.model, work.texts.validation, vocabulary=work.vocabulary)
    # of a tempered distribution the text's probability says nothing about the teacher
    return measure_truncated(work.teacher, work.texts.validation) if work.config.objective.temperature == 1 else {}


def _called(divergence: Any) -> str:
    """The name of a divergence with its options."""
    if isinstance(divergence, partial):
        options = ", ".join(f"{key}={value:g}" for key, value in divergence.keywords.items())
        return f"{divergence.func.__name__}({options})"
    return str(getattr(divergence, "name", getattr(divergence, "__name__", type(divergence).__name__)))


def _samples(work: Distillation, count: int = 4) -> list[dict[str, str]]:
    """Continuations of validation prompts by the student before and after, and by a live teacher."""
    from kullback.jobs._models import load_model

    blocks = work.texts.validation[:count]
    if not blocks:
        return []
    import torch

    prompt = torch.stack([block["input_ids"] for block in blocks])[:, : max(work.config.data.length // 4, 1)]
    models = {"before": work.student(work.config.seeds[0]), "after": load_model(work.out / "model", role="student")}
    if isinstance(work.teacher, LiveTeacher):
        models["teacher"] = work.teacher.model.cpu()
    texts = {}
    for name, model in models.items():
        draw = generator(work.config.seeds[0], "report samples")
        tokens = sample_continuations(
            model,
            prompt,
            length=work.config.data.length,
            generator=draw,
            temperature=0.7,
            vocabulary=len(work.tokenizer),
        )
        texts[name] = work.tokenizer.batch_decode(tokens[:, prompt.shape[1] :])
    prompts = work.tokenizer.batch_decode(prompt)
    return [{"prompt": text, **{name: texts[name][i] for name in texts}} for i, text in enumerate(prompts)]


def _draw(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], teacher: float | None) -> None:
    """Validation loss against steps, one line a part, one colour a role; the teacher's as a level."""
    with figure(path) as axes:
        for name, points in curves.items():
            role = name.rsplit("-", 1)[0]
            style = {"color": {"distilled": "C0", "baseline": "C1"}.get(role, "C2"), "linewidth": 1.4}
            label = _TITLES[role] if name == next(key for key in curves if key.startswith(role)) else None
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=2.5, **style)
        if teacher is not None:
            axes.axhline(teacher, color="0.5", linestyle="--", linewidth=1.0, label="teacher")
        axes.set(xlabel="step", ylabel="validation cross-entropy (nats a token)")
        axes.legend(frameon=False)
