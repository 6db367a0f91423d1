"""DPH-RL (arXiv 2509.07430) in small: riddles of arithmetic whose 216 possible answers are enumerated exactly.

A prompt names a task and a value n, an answer is three digits a b c in base 6: a + b + c = n, max + min = n, or
2 |a - c| + b = n. A small transformer learns from demonstrations that are correct at a rate of each prompt's own, and
is then trained with verified rewards on the first two tasks. Coverage at 64 is the share of a prompt's correct answers
that 64 draws are expected to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.dph import Dph
from kullback.align.grpo import Grpo
from kullback.align.log_probs import completion_log_probs
from kullback.align.measures import coverage_at_k
from kullback.align.methods import OnlineMethod
from kullback.align.rehearsal import Partition, RehearsalBuffer, rehearse
from kullback.align.rollouts import Rollouts, sample_rollouts
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.models.small import small_llama

__all__ = ["draw", "reproduce"]

BASE, LENGTH, LARGEST = 6, 3, 15
FEWEST = 6  # correct answers that a prompt has, so that there is a variety to lose
PRETRAINING, DEMONSTRATIONS, PRETRAINING_RATE = 400, 128, 2e-3
STEPS, PROMPTS, GROUP, RATE = 150, 12, 8, 2e-3
KEPT, SAMPLES = 32, 64
PARTS = ("mastered", "exploring", "third task")


class World(NamedTuple):
    """prompts [P, 2] of token ids, tasks [P], and which of the 216 answers are correct [P, 216]."""

    prompts: Tensor
    tasks: Tensor
    correct: Tensor


def world() -> World:
    """All prompts with enough correct answers; tokens are the digits, three tasks, and the values."""
    digits = torch.cartesian_prod(*[torch.arange(BASE)] * LENGTH)
    a, b, c = digits.T
    values = (a + b + c, digits.amax(1) + digits.amin(1), 2 * (a - c).abs() + b)
    prompts, correct = [], []
    for task, found in enumerate(values):
        for value in range(LARGEST + 1):
            if int((found == value).sum()) >= FEWEST:
                prompts.append((BASE + task, BASE + len(values) + value))
                correct.append(found == value)
    tokens = torch.tensor(prompts)
    return World(tokens, tokens[:, 0] - BASE, torch.stack(correct))


def answer_log_probs(model: Any, prompts: Tensor) -> Tensor:
    """Log-probabilities [P, 216] of all answers, in lexicographic order."""
    starts = torch.cartesian_prod(*[torch.arange(BASE)] * (LENGTH - 1))
    ids = torch.cat([prompts.repeat_interleave(len(starts), 0), starts.repeat(len(prompts), 1)], 1)
    with torch.no_grad():
        steps = model(input_ids=ids).logits[:, 1:, :BASE].log_softmax(-1).view(len(prompts), BASE, BASE, LENGTH, BASE)
    first, second, third = steps[:, 0, 0, 0], steps[:, :, 0, 1], steps[:, :, :, 2]
    return (first[:, :, None, None] + second[:, :, :, None] + third).reshape(len(prompts), -1)


def pretrained(seed: int, given: World) -> Any:
    """A model after demonstrations, of which a share of each prompt's own is correct, evenly spread over prompts."""
    model = small_llama(
        BASE + 3 + LARGEST + 1, hidden=48, layers=2, heads=4, length=2 + LENGTH, generator=generator(seed, "model")
    )
    draws = generator(seed, "demonstrations")
    rates = torch.rand(len(given.prompts), generator=draws)
    correct = given.correct.double() / given.correct.sum(1, keepdim=True)
    wrong = (~given.correct).double() / (~given.correct).sum(1, keepdim=True)
    law = rates.unsqueeze(1) * correct + (1.0 - rates).unsqueeze(1) * wrong
    optimizer = torch.optim.Adam(model.parameters(), lr=PRETRAINING_RATE)
    for _ in range(PRETRAINING):
        rows = torch.randint(len(given.prompts), (DEMONSTRATIONS,), generator=draws)
        found = torch.multinomial(law[rows], 1, generator=draws).squeeze(1)
        ids = torch.cat([given.prompts[rows], digits_of(found)], 1)
        logits = model(input_ids=ids).logits[:, 1:-1, :BASE]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def digits_of(place: Tensor) -> Tensor:
    """The three digits [..., 3] of answers by their place in lexicographic order."""
    return place.unsqueeze(-1) // BASE ** torch.arange(LENGTH - 1, -1, -1) % BASE


class Riddles:
    """Draws answers to prompts by their numbers, and says which are correct."""

    def __init__(self, given: World) -> None:
        self.given = given

    def __call__(
        self, model: Any, numbers: Sequence[int], *, group: int, generator: torch.Generator
    ) -> tuple[Rollouts, Tensor]:
        found = sample_rollouts(
            model, self.given.prompts[list(numbers)], group=group, length=LENGTH, generator=generator, vocabulary=BASE,
            prompt_index=numbers,
        )  # fmt: skip
        place = (found.completion_ids * BASE ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
        return found, self.given.correct[found.prompt_index, place].float()


def methods(buffer: RehearsalBuffer) -> dict[str, OnlineMethod]:
    """GRPO without and with a KL to the first policy, and DPH-RL with forward KL (F), Jensen-Shannon (JS), neither."""
    rows = PROMPTS * GROUP
    return {
        "GRPO": Grpo(clip_high=0.28, dual_clip=3.0),
        "GRPO + k3": Grpo(clip_high=0.28, dual_clip=3.0, beta=0.1, penalty="k3"),
        "GRPO + k2": Grpo(clip_high=0.28, dual_clip=3.0, beta=0.1, penalty="k2"),
        "no rehearsal": Dph(buffer=buffer, eta=0.0),
        "DPH-F 0.1": Dph(buffer=buffer, divergence="forward_kl", eta=0.1, rehearsed=rows),
        "DPH-F": Dph(buffer=buffer, divergence="forward_kl", eta=1.0, rehearsed=rows),
        "DPH-JS": Dph(buffer=buffer, divergence="js", eta=0.4, rehearsed=rows),
    }


def train(model: Any, method: OnlineMethod, first: Any, source: Riddles, numbers: Tensor, seed: int) -> None:
    """STEPS updates of the method on prompts of these numbers; `first` is the policy before them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    draws = generator(seed, "training")
    for _ in range(STEPS):
        chosen = numbers[torch.randperm(len(numbers), generator=draws)[:PROMPTS]].tolist()
        found, rewards = source(model, chosen, group=GROUP, generator=draws)
        batch: dict[str, Any] = {
            "input_ids": found.ids, "attention_mask": found.attention_mask, "completion_mask": found.completion_mask,
            "old_log_prob": found.log_probs, "prompt_index": found.prompt_index, "rewards": rewards,
        }  # fmt: skip
        if method.needs_reference:
            batch["reference_log_prob"] = log_probs(first, batch).detach()
        batch = method.prepare(batch, group=GROUP, generator=draws)
        loss, _ = method.loss(log_probs(model, batch), batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def log_probs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities [B, 3] of a batch's answers."""
    given = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    return completion_log_probs(model, *given, vocabulary=BASE).log_probs


def measured(model: Any, given: World, split: Partition) -> dict[str, dict[str, float]]:
    """Pass@1, Pass@64 and coverage at 64, exact, of each part of the prompts."""
    laws = answer_log_probs(model, given.prompts).double()
    coverage = coverage_at_k(laws, given.correct, SAMPLES)
    rate = torch.where(given.correct, laws.exp(), 0.0).sum(1)
    passed = 1.0 - (1.0 - rate) ** SAMPLES
    rows = dict(zip(PARTS, (split.mastered, split.exploring, (given.tasks == 2).nonzero().squeeze(1)), strict=True))
    return {
        part: {
            "pass_1": float(rate[held].mean()),
            "pass_64": float(passed[held].mean()),
            "coverage": float(coverage[held].mean()),
        }
        for part, held in rows.items()
    }


def reproduce(run: Run) -> Report:
    """One seed: a first policy, its partition and buffer, and every method from the same start."""
    given = world()
    first = pretrained(run.seed, given)
    source = Riddles(given)
    trained_on = (given.tasks < 2).nonzero().squeeze(1).tolist()
    split, buffer = rehearse(source, first, trained_on, generator=generator(run.seed, "first stage"), kept=KEPT)
    found = {"base": measured(first, given, split)}
    run.event("base", mastered=len(split.mastered), exploring=len(split.exploring), buffer=len(buffer))
    weights = {name: part.clone() for name, part in first.state_dict().items()}
    for name, method in methods(buffer).items():
        model = pretrained_copy(weights)
        # Without rehearsal, mastered prompts are trained on as all others are.
        numbers = split.exploring if isinstance(method, Dph) else torch.tensor(trained_on)
        train(model, method, first, source, numbers, run.seed)
        found[name] = measured(model, given, split)
        run.event("trained", method=name, **found[name])
    rows = [{"method": name, "part": part, **values} for name, at in found.items() for part, values in at.items()]
    return Report(metrics=metrics(found), rows=rows)


def pretrained_copy(weights: Mapping[str, Tensor]) -> Any:
    """A model with these weights."""
    model = small_llama(
        BASE + 3 + LARGEST + 1, hidden=48, layers=2, heads=4, length=2 + LENGTH, generator=generator(0, "copy")
    )
    model.load_state_dict(weights)
    return model


def metrics(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """The card's: coverage kept of the base model's, and Pass@1 below GRPO's."""
    base = found["base"]["mastered"]["coverage"]
    kept = {name: at["mastered"]["coverage"] / base for name, at in found.items()}
    dph = ("DPH-F", "DPH-JS")
    gap = max(found["GRPO"]["exploring"]["pass_1"] - found[name]["exploring"]["pass_1"] for name in dph)
    outside = {name: at["third task"]["pass_64"] - found["base"]["third task"]["pass_64"] for name, at in found.items()}
    return {
        "grpo_coverage_kept": kept["GRPO"],
        "dph_coverage_kept": min(kept[name] for name in dph),
        "dph_pass1_gap": gap,
        "out_of_domain_gain": outside["DPH-F"],
        "grpo_out_of_domain_gain": outside["GRPO"],
        "k3_coverage_kept": kept["GRPO + k3"],
        "k2_coverage_kept": kept["GRPO + k2"],
        "dph_f_small_coverage_kept": kept["DPH-F 0.1"],
        "no_rehearsal_coverage_kept": kept["no rehearsal"],
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Pass@1 against coverage on each part of the prompts, the mean over seeds, with an arrow from the base model."""
    from kullback.figures import figure

    with figure(path, columns=len(PARTS), size=(3.6, 3.4)) as axes:
        for axis, part in zip(axes, PARTS, strict=True):
            held: dict[str, list[Mapping[str, Any]]] = {}
            for row in rows:
                if row["part"] == part:
                    held.setdefault(row["method"], []).append(row)
            place = {
                name: tuple(sum(row[key] for row in some) / len(some) for key in ("pass_1", "coverage"))
                for name, some in held.items()
            }
            for number, (name, at) in enumerate(place.items()):
                axis.plot(*at, "o" if number else "*", color=f"C{number}", label=name, markersize=6 if number else 11)
                if number:
                    arrow = {"arrowstyle": "->", "color": f"C{number}", "lw": 0.8}
                    axis.annotate("", at, place["base"], arrowprops=arrow)
            axis.set(xlabel="Pass@1", title=part, xlim=(-0.03, 1.05), ylim=(0.0, 1.0))
        axes[0].set_ylabel("coverage of correct answers by 64 draws")
        axes[0].legend(frameon=False, fontsize=7, loc="lower left")
