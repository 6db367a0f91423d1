"""DiDi-Instruct (arXiv 2509.25035) in small: sequences of a Markov chain, whose likelihood and bigrams are known.

A masked diffusion model of a chain of 12 symbols is trained, and distilled with data as the reference. Teacher, student
and student with reward-guided sampling (RGAS) are compared by the likelihood of their samples under the true chain, the
distance of their bigrams from the true ones, and the entropy within sequences, at different numbers of steps. Short
runs without the intermediate state, its score, or the coupled times stand beside a short run of the whole method.
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
from kullback.models.denoisers import FlatDenoiser, TokenDiscriminator
from kullback.models.masked_diffusion import LogLinearSchedule, mdm_loss
from kullback.models.masked_diffusion_sampling import AncestralSampler

__all__ = ["draw", "reproduce"]

SYMBOLS, LENGTH, SPREAD = 12, 16, 2.2
TEACHER_STEPS, TEACHER_RATE, BATCH = 3000, 1e-3, 128
STEPS, SHORT, SAMPLES = 900, 150, 4000
# The student's first step is held close to the teacher's: its symbols are independent of each other, and the reverse
# divergence would else make it choose a single mode.
SETTINGS: Mapping[str, Any] = {
    "batch": BATCH, "group": 4, "normalise": "batch", "learning_rate": 1e-4, "discriminator_rate": 1e-3, "warmup": 0,
    "iterations": STEPS, "discriminator_first": 100, "kl": (20.0, 2.0), "kl_beta": 1.0, "entropy": 0.0, "ema": 0.99,
    "beta": (2.0, 2.0), "omega_clip": (0.1, 2.0),
}  # fmt: skip
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "whole method": {},
    "one step, no state between": {"trajectory": "one_step"},
    "score without the state": {"trajectory": "direct_score"},
    "times not coupled": {"coupled": False},
}


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
    optimizer = torch.optim.Adam(model.parameters(), TEACHER_RATE, foreach=True)
    source = generator(seed, "teacher batches")
    for step in range(TEACHER_STEPS):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / TEACHER_STEPS)
        optimizer.param_groups[0]["lr"] = TEACHER_RATE * min(1.0, (step + 1) / 100) * cosine
        x = chain.draw(BATCH, source)
        loss = mdm_loss(model, x, schedule=LogLinearSchedule(), mask_id=SYMBOLS, generator=source).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def distilled(seed: int, chain: Chain, teacher: FlatDenoiser, steps: int, **changed: Any) -> DiDiTrainer:
    """A student after so many of STEPS steps."""
    source = generator(seed, "distillation")
    discriminator = TokenDiscriminator(teacher, spectral=False, generator=generator(seed, "discriminator"))
    trainer = DiDiTrainer(
        teacher, discriminator, mask_id=SYMBOLS, length=LENGTH, settings=DiDiSettings(**{**SETTINGS, **changed}),
        generator=source,
    )  # fmt: skip

    def batches() -> Iterator[Tensor]:
        while True:
            yield chain.draw(BATCH, source)

    return trainer.fit(steps, batches())


def reproduce(run: Run) -> Report:
    """One seed: a chain, its teacher, the student, and the short runs."""
    seed = run.seed
    chain = Chain.random(generator(seed, "chain"))
    rows: list[dict[str, Any]] = []

    def note(study: str, who: str, steps: int, sampler: AncestralSampler) -> None:
        x = sampler.run(SAMPLES, LENGTH, generator=generator(seed, "samples", steps))
        rows.append({"study": study, "who": who, "steps": steps, **chain.measured(x)})

    def plain(model: Callable[[Tensor, Tensor], Tensor], steps: int) -> AncestralSampler:
        return AncestralSampler(model, steps=steps, mask_id=SYMBOLS)

    truth = chain.measured(chain.draw(20_000, generator(seed, "truth")))
    teacher = trained_teacher(seed, chain)
    for steps in (1, 2, 4, 8, 16, 32, 64):
        rows.append({"study": "steps", "who": "data", "steps": steps, **truth})
        note("steps", "teacher", steps, plain(teacher, steps))
    run.event("teacher", **rows[-1])
    trainer = distilled(seed, chain, teacher, STEPS)
    discriminator = trainer.discriminator.eval()
    for steps in (1, 2, 4, 8, 16, 32):
        note("steps", "student", steps, plain(trainer.ema, steps))
        if steps >= 4:
            guided = RGASampler(trainer.ema, discriminator, h=(0.0, 0.0), steps=steps, mask_id=SYMBOLS)
            note("steps", "student, re-ranked", steps, guided)
            guided = RGASampler(trainer.ema, discriminator, steps=steps, mask_id=SYMBOLS)
            note("steps", "student, RGAS", steps, guided)
    run.event("student", **rows[-1])
    for name, changed in ABLATIONS.items():
        short = distilled(seed, chain, teacher, SHORT, **{**changed, "discriminator_first": 50})
        note("ablation", name, 8, plain(short.ema, 8))
    run.event("ablations")
    return Report(metrics=_metrics(rows), rows=rows)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {(row["study"], row["who"], row["steps"]): row for row in rows}

    def of(who: str, steps: int) -> Mapping[str, Any]:
        return found["steps", who, steps]

    student, teacher = of("student", 16), of("teacher", 16)
    return {
        "nll_minus_teacher_64": student["nll"] - of("teacher", 64)["nll"],
        "nll_minus_teacher_16": student["nll"] - teacher["nll"],
        "nll_minus_teacher_8": of("student", 8)["nll"] - of("teacher", 8)["nll"],
        "bigram_distance_minus_teacher": student["bigram_distance"] - teacher["bigram_distance"],
        "entropy_relative_change": abs(student["entropy"] / teacher["entropy"] - 1.0),
        "reranked_minus_teacher_64": of("student, re-ranked", 16)["nll"] - of("teacher", 64)["nll"],
        "reranked_bigram_minus_teacher": of("student, re-ranked", 16)["bigram_distance"] - teacher["bigram_distance"],
        "rgas_bigram_minus_teacher": of("student, RGAS", 16)["bigram_distance"] - teacher["bigram_distance"],
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Likelihood, bigrams and entropy against steps, means over seeds; and the short runs without a part."""
    from kullback.figures import figure

    def mean(found: list[Mapping[str, Any]], key: str) -> float:
        return sum(row[key] for row in found) / len(found)

    curves = [row for row in rows if row["study"] == "steps"]
    titles = {
        "nll": "-log likelihood, true chain (nats a symbol)",
        "bigram_distance": "total variation of bigrams to the true law",
        "entropy": "entropy within sequences (nats)",
    }
    with figure(path, columns=4, size=(3.7, 3.3)) as axes:
        for index, who in enumerate(dict.fromkeys(row["who"] for row in curves)):
            style: dict[str, Any] = {"color": "black", "linestyle": "--"} if who == "data" else {"marker": "o"}
            style.setdefault("color", f"C{index - 1}")
            for axis, key in zip(axes, titles):
                steps = sorted({row["steps"] for row in curves if row["who"] == who})
                values = [mean([r for r in curves if r["who"] == who and r["steps"] == n], key) for n in steps]
                axis.plot(steps, values, label=who, markersize=4, **style)
        for axis, title in zip(axes, titles.values()):
            axis.set_xscale("log", base=2)
            axis.set(xlabel="steps", title=title)
            axis.title.set_fontsize(8)
        axes[1].legend(fontsize=7, frameon=False)
        names = list(dict.fromkeys(row["who"] for row in rows if row["study"] == "ablation"))
        teacher = {row["seed"]: row["nll"] for row in curves if row["who"] == "teacher" and row["steps"] == 8}
        for index, name in enumerate(names):
            found = [row for row in rows if row["who"] == name]
            gains = [teacher[row["seed"]] - row["nll"] for row in found]
            axes[3].barh(name.replace(", ", ",\n"), sum(gains) / len(gains), color=f"C{index}", alpha=0.5)
            axes[3].plot(gains, [index] * len(gains), "k.", markersize=4)
        axes[3].invert_yaxis()
        axes[3].locator_params(axis="x", nbins=4)
        axes[3].set_title(f"gain at 8 steps after {SHORT} of training (nats)", fontsize=8)
