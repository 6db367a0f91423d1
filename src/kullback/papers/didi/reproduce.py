"""DiDi-Instruct (arXiv 2509.25035) in small: sequences of a Markov chain, whose likelihood and bigrams are known.

A masked diffusion model of a chain of 12 symbols is trained, and distilled with data as the reference. Teacher, student
and student with reward-guided sampling (RGAS) are compared by the likelihood of their samples under the true chain, the
distance of their bigrams from the true ones, and the entropy within sequences, at different numbers of steps. Short
runs without the intermediate state, its score, or the coupled times stand beside a short run of the whole method. The
same comparison is made on letters of real prose, with a transformer as teacher and a judge that counts: see `text`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.distill.didi_sampler import RGASampler
from kullback.distill.didi_trainer import DiDiSettings, DiDiTrainer
from kullback.models.denoisers import FlatDenoiser, TokenDiscriminator, TransformerDenoiser, WindowDenoiser
from kullback.models.masked_diffusion import LogLinearSchedule, mdm_loss
from kullback.models.masked_diffusion_sampling import AncestralSampler
from kullback.papers.didi.text import LETTERS, prose, windows

__all__ = ["draw", "reproduce"]

SYMBOLS, LENGTH, SPREAD = 12, 16, 2.2
TEACHER_STEPS, TEACHER_RATE, BATCH = 3000, 1e-3, 128
STEPS, SHORT, SAMPLES = 900, 200, 4000
TEXT_TEACHER_STEPS, TEXT_TEACHER_RATE, TEXT_BATCH = 600, 5e-3, 64
TEXT_SAMPLES = 2000
# All of a group share a tau, whose rewards are then of one kind. The student's first step is held near the teacher's:
# its symbols are independent of each other, and the reverse divergence would else have it prefer some.
SETTINGS: Mapping[str, Any] = {
    "batch": BATCH, "group": 32, "normalise": "group", "tau_shared": True, "learning_rate": 1e-4,
    "discriminator_rate": 5e-3, "warmup": 0, "discriminator_first": 100, "kl": (50.0, 5.0), "entropy": 0.0, "ema": 0.99,
    "beta": (2.0, 2.0),
}  # fmt: skip
# What differs on text: with 27 symbols there is more for the discriminator to learn before its word counts.
TEXT_SETTINGS: Mapping[str, Any] = {
    "batch": TEXT_BATCH, "iterations": 600, "discriminator_first": 300, "learning_rate": 3e-4, "width": 64,
    "kl": (1.0, 0.1),
}  # fmt: skip
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "whole method": {},
    "one step, no state between": {"trajectory": "one_step"},
    "score without the state": {"trajectory": "direct_score"},
    "times not coupled": {"coupled": False},
}


Draw = Callable[[int, torch.Generator], Tensor]


class Chain(NamedTuple):
    """A stationary chain: start [V] and transitions [V, V]."""

    start: Tensor
    step: Tensor

    @classmethod
    def random(cls, source: torch.Generator) -> Chain:
        step = (SPREAD * torch.randn(SYMBOLS, SYMBOLS, generator=source)).softmax(-1)
        start = torch.full((SYMBOLS,), 1.0 / SYMBOLS)
        for _ in range(500):
            start = start @ step
        return cls(start, step)

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        """Sequences [n, LENGTH]."""
        x = torch.empty(n, LENGTH, dtype=torch.long)
        x[:, 0] = torch.multinomial(self.start, n, replacement=True, generator=source)
        cumulative = self.step.cumsum(-1)
        for place in range(1, LENGTH):
            draws = torch.rand(n, 1, generator=source)
            x[:, place] = (draws > cumulative[x[:, place - 1]]).sum(-1).clamp(max=SYMBOLS - 1)
        return x

    def measured(self, x: Tensor) -> dict[str, float]:
        """Negative log-likelihood a symbol, total variation of the bigrams, mean entropy within sequences."""
        log_likelihood = self.start.log()[x[:, 0]] + self.step.log()[x[:, :-1], x[:, 1:]].sum(-1)
        pairs = torch.bincount((x[:, :-1] * SYMBOLS + x[:, 1:]).flatten(), minlength=SYMBOLS**2).float()
        truth = (self.start.unsqueeze(-1) * self.step).flatten()
        shares = torch.nn.functional.one_hot(x, SYMBOLS).float().mean(1)
        return {
            "nll": -log_likelihood.mean().item() / LENGTH,
            "bigram_distance": 0.5 * (pairs / pairs.sum() - truth).abs().sum().item(),
            "entropy": -torch.special.xlogy(shares, shares).sum(-1).mean().item(),
        }


def trained_teacher(seed: int, chain: Chain) -> FlatDenoiser:
    """A denoiser trained on fresh sequences of the chain."""
    model = FlatDenoiser(SYMBOLS, LENGTH, generator=generator(seed, "teacher"))
    return trained(model, chain.draw, TEACHER_STEPS, TEACHER_RATE, generator(seed, "teacher batches"))


def trained(model: Any, draw: Draw, steps: int, rate: float, source: torch.Generator, batch: int = BATCH) -> Any:
    """The denoiser after so many steps on the bound, on `batch` sequences each."""
    optimizer = torch.optim.Adam(model.parameters(), rate, foreach=True)
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 100) * cosine
        x = draw(batch, source)
        loss = mdm_loss(model, x, schedule=LogLinearSchedule(), mask_id=model.symbols, generator=source).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def untaught_discriminator(seed: int, symbols: int, width: int = 32) -> TokenDiscriminator:
    """What the student is judged by: windows, alike in all places, are right after fifty steps as often as a copy of
    the chain's teacher, which sees all places apart, is after six hundred.
    """
    backbone = WindowDenoiser(symbols, width=width, generator=generator(seed, "discriminator"))
    return TokenDiscriminator(backbone, trained=None, spectral=False, generator=generator(seed, "discriminator head"))


def distilled(seed: int, teacher: Any, draw: Draw, steps: int, *, width: int = 32, **changed: Any) -> DiDiTrainer:
    """A student after so many steps, judged by windows of that width."""
    source = generator(seed, "distillation")
    settings = DiDiSettings(**{**SETTINGS, **changed})
    discriminator = untaught_discriminator(seed, teacher.symbols, width)
    trainer = DiDiTrainer(
        teacher, discriminator, mask_id=teacher.symbols, length=teacher.length, settings=settings, generator=source
    )

    def batches() -> Iterator[Tensor]:
        while True:
            yield draw(settings.batch, source)

    return trainer.fit(steps, batches())


def reproduce(run: Run) -> Report:
    """One seed: a chain, its teacher, the student, the short runs, and the same on real text."""
    seed = run.seed
    chain = Chain.random(generator(seed, "chain"))
    teacher = trained_teacher(seed, chain)
    rows = _compared(seed, "steps", teacher, chain.draw, chain.measured, {"iterations": STEPS})
    run.event("chain", **rows[-1])
    for name, changed in ABLATIONS.items():
        short = distilled(seed, teacher, chain.draw, SHORT, **{**changed, "iterations": SHORT})
        x = AncestralSampler(short.ema, steps=8, mask_id=SYMBOLS).run(
            SAMPLES, LENGTH, generator=generator(seed, "samples", 8)
        )
        rows.append({"study": "ablation", "who": name, "steps": 8, **chain.measured(x)})
    run.event("ablations")
    rows += _text(seed)
    run.event("text", **rows[-1])
    return Report(metrics=_metrics(rows), rows=rows)


def _text(seed: int) -> list[dict[str, Any]]:
    """Letters of real prose: the teacher is a transformer."""
    text = prose()

    def draw(n: int, source: torch.Generator) -> Tensor:
        return windows(text.train, n, LENGTH, source)

    model = TransformerDenoiser(len(LETTERS), LENGTH, generator=generator(seed, "text teacher"))
    teacher = trained(model, draw, TEXT_TEACHER_STEPS, TEXT_TEACHER_RATE, generator(seed, "text batches"), TEXT_BATCH)
    rows = _compared(seed, "text", teacher, draw, text.judge.measured, TEXT_SETTINGS)
    unseen = text.judge.measured(windows(text.held_out, SAMPLES, LENGTH, generator(seed, "held out")))
    return rows + [{"study": "text", "who": "unseen text", "steps": steps, **unseen} for steps in (1, 64)]


def _compared(
    seed: int,
    study: str,
    teacher: Any,
    draw: Draw,
    measured: Callable[[Tensor], dict[str, float]],
    changed: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Rows of data, teacher, its student distilled under changed settings, and the student guided, by steps."""
    rows: list[dict[str, Any]] = []
    samples, counts = (SAMPLES, (1, 2, 4, 8, 16, 32)) if study == "steps" else (TEXT_SAMPLES, (1, 4, 8, 16))
    guides = {"student, re-ranked": (0.0, 0.0), "student, RGAS": (30.0, 40.0)} if study == "steps" else {}

    def note(who: str, taken: int, sampler: AncestralSampler) -> None:
        x = sampler.run(samples, LENGTH, generator=generator(seed, "samples", taken))
        rows.append({"study": study, "who": who, "steps": taken, **measured(x)})

    truth = measured(draw(20_000, generator(seed, "truth")))
    options: dict[str, Any] = {"mask_id": teacher.symbols}
    rows += [{"study": study, "who": "data", "steps": taken, **truth} for taken in (1, 64)]
    for taken in (*counts, 64):
        note("teacher", taken, AncestralSampler(teacher, steps=taken, **options))
    trainer = distilled(seed, teacher, draw, changed["iterations"], **changed)
    discriminator = trainer.discriminator.eval()
    for taken in counts:
        note("student", taken, AncestralSampler(trainer.ema, steps=taken, **options))
        if taken in (4, 8, 16):
            for who, h in guides.items():
                note(who, taken, RGASampler(trainer.ema, discriminator, h=h, steps=taken, **options))
    return rows


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {(row["study"], row["who"], row["steps"]): row for row in rows}

    def of(who: str, steps: int) -> Mapping[str, Any]:
        return found["steps", who, steps]

    student, teacher = of("student", 16), of("teacher", 16)
    text = {
        "text_nll_minus_teacher_64": found["text", "student", 16]["nll"] - found["text", "teacher", 64]["nll"],
        "text_bigram_distance_minus_teacher": found["text", "student", 16]["bigram_distance"]
        - found["text", "teacher", 16]["bigram_distance"],
        "text_entropy_relative_change": abs(
            found["text", "student", 16]["entropy"] / found["text", "teacher", 16]["entropy"] - 1.0
        ),
    }
    enough = [n for study, who, n in found if (study, who) == ("steps", "student")]
    enough = [n for n in enough if of("student", n)["nll"] <= of("teacher", 64)["nll"]]
    return text | {
        "steps_as_likely_as_teacher_64": float(min(enough, default=64)),
        "nll_minus_teacher_64": student["nll"] - of("teacher", 64)["nll"],
        "nll_minus_teacher_16": student["nll"] - teacher["nll"],
        "nll_minus_teacher_8": of("student", 8)["nll"] - of("teacher", 8)["nll"],
        "bigram_distance_minus_teacher": student["bigram_distance"] - teacher["bigram_distance"],
        "entropy_relative_change": abs(student["entropy"] / teacher["entropy"] - 1.0),
        "reranked_minus_teacher_64": of("student, re-ranked", 16)["nll"] - of("teacher", 64)["nll"],
        "reranked_bigram_minus_teacher": of("student, re-ranked", 16)["bigram_distance"] - teacher["bigram_distance"],
        "rgas_bigram_minus_teacher": of("student, RGAS", 16)["bigram_distance"] - teacher["bigram_distance"],
    }


def _mean(found: list[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in found) / len(found)


def _curves(axis: Any, rows: list[Mapping[str, Any]], key: str, title: str) -> None:
    """Means over seeds against steps, a line for each of those compared."""
    for index, who in enumerate(dict.fromkeys(row["who"] for row in rows)):
        own = [row for row in rows if row["who"] == who]
        steps = sorted({row["steps"] for row in own})
        style: dict[str, Any] = {"marker": "o", "color": f"C{index - 1}"}
        if who in ("data", "unseen text"):
            style = {"color": "black", "linestyle": "--" if who == "data" else ":"}
        axis.plot(steps, [_mean([r for r in own if r["steps"] == n], key) for n in steps], label=who, ms=4, **style)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="steps", title=title)
    axis.title.set_fontsize(8)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Likelihood, bigrams and entropy against steps, means over seeds; the short runs without a part; and text."""
    from kullback.figures import figure

    curves = [row for row in rows if row["study"] == "steps"]
    text = [row for row in rows if row["study"] == "text"]
    with figure(path, columns=5, size=(3.5, 3.3)) as axes:
        _curves(axes[0], curves, "nll", "-log likelihood, true chain (nats a symbol)")
        _curves(axes[1], curves, "bigram_distance", "chain: total variation of bigrams to the true law")
        _curves(axes[2], curves, "entropy", "chain: entropy within sequences (nats)")
        _curves(axes[4], text, "nll", "text: -log likelihood by 4-grams (nats a letter)")
        axes[1].legend(fontsize=7, frameon=False)
        axes[4].legend(fontsize=7, frameon=False)
        names = list(dict.fromkeys(row["who"] for row in rows if row["study"] == "ablation"))
        teacher = {row["seed"]: row["nll"] for row in curves if row["who"] == "teacher" and row["steps"] == 8}
        for index, name in enumerate(names):
            found = [row for row in rows if row["who"] == name]
            gains = [teacher[row["seed"]] - row["nll"] for row in found]
            axes[3].barh(name.replace(", ", ",\n"), sum(gains) / len(gains), color=f"C{index}", alpha=0.5)
            axes[3].plot(gains, [index] * len(gains), "k.", markersize=4)
        axes[3].invert_yaxis()
        axes[3].locator_params(axis="x", nbins=4)
        axes[3].set_title(f"chain: gain at 8 steps after {SHORT} of training (nats)", fontsize=8)
