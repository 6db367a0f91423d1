"""KDRL on a language model, a task like the bandit's: 32 sums of numbers below 5000, of four digits nearly all.

The model that adds has hardly seen such numbers: a few steps on the right answers leave a student that seldom succeeds.
Its teacher has learnt what it says from demonstrations in which every digit is another one with a chance of 0.2, and of
a quarter of the sums it says one digit wrong. Training and measurement are the align job's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.data.examples import Example
from kullback.models.adder import trained_adder
from kullback.papers.sums import align, write_examples

__all__ = ["MODEL_METHODS", "model_curves", "model_metrics"]

SUMS, LIMIT, COPIES, WRONG, NOISE = 32, 5000, 10, 4, 0.2  # one in WRONG is taught wrong
STUDENT, TEACHER, STEPS, EVERY, GROUP, RATE, SAMPLES = 15, 300, 100, 20, 8, 2e-3, 16
BETA = 0.1
MODEL_METHODS: dict[str, dict[str, bool | float | str]] = {
    "GRPO": {"beta": 0.0},
    "distillation": {"beta": BETA, "reinforced": False},
    "KDRL k2": {"beta": BETA},
    "KDRL k3": {"beta": BETA, "kind": "k3"},
    "KDRL annealed": {"beta": 0.3, "beta_end": 0.01, "schedule": "linear", "delta": 0.3 / 67},
    "KDRL response mask": {"beta": BETA, "keep": "response"},
    "KDRL group mask": {"beta": BETA, "keep": "group"},
    "KDRL exact": {"beta": BETA, "divergence": "exact"},
    "KDRL top-k": {"beta": BETA, "divergence": "top-k", "top_k": 4},
}


def model_curves(run: Run) -> dict[str, list[dict[str, Any]]]:
    """A row for each measurement of each method: success, the share of right samples, and the KL to the teacher."""
    right, lessons = sums(run.seed)
    examples = write_examples(run.path / "sums.jsonl", right)
    taught = write_examples(run.path / "lessons.jsonl", lessons)
    given: dict[str, Any] = {"length": 5, "prompts": SUMS, "samples": SAMPLES}
    student = align(
        run, "student", model=trained_adder(), examples=examples, method="sft", steps=STUDENT, batch=SUMS, rate=3e-3,
        **given,
    ).model  # fmt: skip
    teacher = align(
        run, "teacher", model=student, examples=taught, method="sft", steps=TEACHER, batch=128, rate=3e-3, **given
    ).model
    found = {}
    for name, options in MODEL_METHODS.items():
        found[name] = _curve(run, name, student, examples, teacher, options, given)
        run.event("aligned", name=name, **found[name][-1])
    return found


def _curve(
    run: Run, name: str, student: Path, examples: Path, teacher: Path, options: Mapping[str, Any], given: dict[str, Any]
) -> list[dict[str, Any]]:
    done = align(
        run, name.replace(" ", "-"), model=student, examples=examples, method="kdrl", options=options,
        reference=[teacher], steps=STEPS, batch=SUMS, group=GROUP, rate=RATE, every=EVERY, **given,
    )  # fmt: skip
    return [
        {"model": True, "step": row["step"], "success": row["reward"], "divergence": row["divergence"]}
        for row in done.curve
    ]


def sums(seed: int) -> tuple[list[Example], list[Example]]:
    """The sums with their right answers, and the teacher's demonstrations: COPIES of each."""
    draw = generator(seed, "sums")
    right, lessons = [], []
    for number in range(SUMS):
        a, b = torch.randint(LIMIT, (2,), generator=draw).tolist()
        answer = said = str(a + b)
        if number % WRONG == WRONG - 1:
            said = _other_digit(answer, int(torch.randint(len(answer), (), generator=draw)), draw)
        prompt, others = f"{a}+{b}=", {"answer": answer}
        right.append(Example(prompt=prompt, completion=answer, others=others))
        lessons += [Example(prompt=prompt, completion=_noisy(said, draw), others=others) for _ in range(COPIES)]
    return right, lessons


def _noisy(text: str, draw: torch.Generator) -> str:
    for place in range(len(text)):
        if torch.rand((), generator=draw).item() < NOISE:
            text = _other_digit(text, place, draw)
    return text


def _other_digit(text: str, place: int, draw: torch.Generator) -> str:
    step = int(torch.randint(1, 10, (), generator=draw))
    return f"{text[:place]}{(int(text[place]) + step) % 10}{text[place + 1 :]}"


def model_metrics(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """What KDRL gains over the reward alone and over the teacher alone, and what schedule, masks and laws gain it."""
    end = {name: rows[-1]["success"] for name, rows in found.items()}
    return {
        "model_start": found["GRPO"][0]["success"],
        "model_gain_over_grpo": end["KDRL k2"] - end["GRPO"],
        "model_gain_over_distillation": end["KDRL k2"] - end["distillation"],
        "model_annealed_gain": end["KDRL annealed"] - end["KDRL k2"],
        "model_k2_minus_k3": end["KDRL k2"] - end["KDRL k3"],
        "model_masked_gain": min(end["KDRL response mask"], end["KDRL group mask"]) - end["KDRL k2"],
        "model_exact_gain": end["KDRL exact"] - end["KDRL k2"],
        "model_top_k_gain": end["KDRL top-k"] - end["KDRL k2"],
        **{f"model_{name.lower().replace(' ', '_').replace('-', '_')}": success for name, success in end.items()},
    }
