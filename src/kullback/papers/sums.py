"""Sums for a small language model: what the language-model panels of several papers of the align room share.

A panel says what is learnt, from which model and by which method; the align job trains and measures, as it does for a
user's own model, and its run directory below the paper's is read back as a curve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kullback.core.files import atomic_write
from kullback.core.runs import Run
from kullback.data.examples import Example

__all__ = ["Aligned", "align", "write_examples"]

MEASURES = ("reward", "pass_k", "divergence", "entropy", "distinct")


class Aligned(NamedTuple):
    """What came of an alignment: a row for each measurement, with its step, and the directory of the policy.

    A row has reward, the share of right completions; pass_k; divergence, the KL to the reference in nats a completion;
    entropy in nats a token; distinct; and, where prompts were filtered, drawn: those rolled out until then.
    """

    curve: list[dict[str, float]]
    folder: Path

    @property
    def model(self) -> Path:
        """The directory of the policy as it was at the end."""
        return self.folder / "model"


def write_examples(path: Path, examples: Iterable[Example]) -> Path:
    """The examples as a JSONL file, written once; returns its path."""
    if not path.exists():
        atomic_write(path, "".join(json.dumps(_record(example)) + "\n" for example in examples))
    return path


def _record(example: Example) -> dict[str, Any]:
    texts = {name: getattr(example, name) for name in ("prompt", "completion", "chosen", "rejected")}
    return {**{name: text for name, text in texts.items() if text is not None}, **example.others}


def align(
    run: Run,
    folder: str,
    *,
    model: Path,
    examples: Path,
    method: str,
    options: Mapping[str, bool | float | str] | None = None,
    reference: Sequence[Path] = (),
    filtering: str = "",
    steps: int,
    batch: int,
    rate: float = 1e-3,
    group: int = 8,
    every: int | None = None,
    length: int = 4,
    prompts: int = 100,
    samples: int = 16,
    seed: int | None = None,
    listen: Callable[[Mapping[str, Any]], None] | None = None,
) -> Aligned:
    """Align the model with the examples, below the run's directory; what is there already is not done again.

    batch: prompts or pairs a step; filtering: the difficulty of the groups that are trained on; every: steps between
    measurements, `steps` by default, on `samples` completions of each of so many `prompts` of the examples themselves;
    length: tokens of a completion at most, with the one that ends it; seed: that of the run by default.
    """
    from kullback.jobs import align as job

    base, between = job.embedded(), every or steps
    data = replace(
        base.data, train=str(examples), validation=str(examples), validation_prompts=prompts, length=length
    )
    training = replace(
        base.training, steps=steps, batch=batch, learning_rate=rate, evaluate_every=between, save_every=steps
    )
    config = replace(
        base, model=str(model), reference=tuple(map(str, reference)), data=data, training=training,
        method=job.MethodConfig(name=method, options=dict(options or {})),
        sampling=replace(base.sampling, group=group, validation=samples, filter=filtering),
        seeds=(run.seed if seed is None else seed,),
    )  # fmt: skip
    place = run.path / folder
    done = job.run(config, place, listen=listen, resume=place.exists())
    return Aligned(_curve(Run.open(next((done.path / "parts").iterdir()))), done.path)


def _curve(part: Run) -> list[dict[str, float]]:
    """The measurements of a training in order; of a step that was repeated after a kill, the last."""
    rows: dict[int, dict[str, float]] = {}
    drawn = 0
    for event in part.events():
        if event["kind"] == "groups":
            drawn += event["drawn"]
        elif event["kind"] == "evaluation":
            found = {name: event[name] for name in MEASURES if name in event}
            rows[event["step"]] = {"step": event["step"], **found} | ({"drawn": drawn} if drawn else {})
    return [rows[step] for step in sorted(rows)]
