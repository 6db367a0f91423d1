"""A student trained from a cache of its teacher's 32 most likely tokens and 8 drawn from the rest, beside the same
student with the teacher live.

Writes teacher_cache.json: training loss and final validation loss of both, bytes a token, and seconds a step.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.jobs import distill as job
from kullback.jobs import teacher_cache
from kullback.jobs._models import load_tokenizer
from kullback.models.small import small_llama, trained_llama

KEPT, DRAWN, SEEDS = 32, 8, (0, 1, 2)


def main() -> None:
    """Three seeds of the embedded default, live and from the cache, and what the cache costs."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        teacher = trained_llama()
        summary = teacher_cache.run(teacher_cache.TeacherCacheConfig(kept=KEPT, drawn=DRAWN), root / "cache")
        rows = []
        for seed in SEEDS:
            live = train(root, "live", teacher, seed)
            cached = train(root, "cached", root / "cache", seed)
            rows.append({"seed": seed, "live": live, "cached": cached})
            print(json.dumps(rows[-1]))
    ratios = {
        name: [row["cached"][name] / row["live"][name] for row in rows]
        for name in ("training_loss", "validation_cross_entropy", "validation_divergence", "seconds_a_step")
    }
    found = {
        "environment": environment(),
        "kept": KEPT,
        "drawn": DRAWN,
        "bytes_per_token": summary.bytes_per_token,
        "bytes_per_token_of_whole_logits": 4 * summary.vocabulary,
        "tail_mass": summary.tail_mass,
        "kl_bound": summary.kl_bound,
        "seeds": rows,
        "cached_over_live": {name: {"median": statistics.median(v), "all": v} for name, v in ratios.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def train(root: Path, name: str, teacher: Path, seed: int) -> dict[str, float]:
    """One student; its divergence to the teacher is that which its own teacher can see."""
    student = root / f"student-{seed}"
    if not student.exists():
        tokenizer = load_tokenizer(trained_llama(), role="teacher")
        tokenizer.save_pretrained(student)
        draw = generator(seed, "student")
        small_llama(len(tokenizer), hidden=96, layers=2, heads=4, length=128, generator=draw).save_pretrained(student)
    settings = job.embedded()
    training = replace(settings.training, save_every=1000)
    config = replace(
        settings, teacher=str(teacher), student=str(student), seeds=(seed,), baseline=False, training=training
    )
    started = time.monotonic()
    run = job.run(config, root / f"{name}-{seed}")
    part = next((run.path / "parts").iterdir())
    events = [json.loads(line) for line in (part / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    last = [event for event in events if event["kind"] == "evaluation"][-1]
    return {
        "training_loss": statistics.fmean(event["loss"] for event in steps[-3:]),
        "validation_cross_entropy": last["cross_entropy"],
        "validation_divergence": last["divergence"],
        "seconds": time.monotonic() - started,
        "seconds_a_step": (steps[-1]["time"] - steps[0]["time"]) / (steps[-1]["step"] - steps[0]["step"]),
    }


if __name__ == "__main__":
    main()
