"""f-DPG on 3125 strings: a first-order policy is brought to a target that it cannot represent, all measured exactly.

A second part does the same to a small language model on real prose: its continuations are to hold a given word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align.f_dpg import FDpg, PartitionEstimator, RunningBaseline, fdpg_loss, target_divergence
from kullback.align.log_probs import completion_log_probs
from kullback.align.rollouts import sample_rollouts
from kullback.align.worlds import World, draw_sequences, entropy
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data.corpora import corpus
from kullback.figures import figure
from kullback.models.small import trained_llama

__all__ = ["draw", "reproduce"]

WORLD = World(5, 5)
METHODS = ("kl", "reverse_kl", "js", "total_variation")
TITLES = {"kl": "forward KL", "reverse_kl": "reverse KL", "js": "Jensen-Shannon", "total_variation": "total variation"}
BETA, BATCH, STEPS, RATE = 0.1, 256, 1500, 0.03
WORD, PROMPTS, TEXT_STEPS = "module", 8, 60


def reproduce(run: Run) -> Report:
    """Every divergence from the same start; then the prose, with Jensen-Shannon."""
    x = WORLD.sequences()
    base = _second_order(generator(run.seed, "base"))
    wanted = ((x == 0).any(1) & (x[:, 0] == x[:, -1])).double()
    log_target, start = base + wanted / BETA, _best_fit(base)
    rows: list[dict[str, Any]] = [{"method": "base", **_measures(_first_order(start, x), log_target, wanted)}]
    found: dict[str, dict[str, float]] = {}
    for name in METHODS:
        tables = _train(name, start, log_target, run.seed)
        found[name] = _measures(_first_order(tables, x), log_target, wanted)
        rows.append({"method": name, **found[name]})
        run.event("method", name=name, **found[name])
        if name == "js":
            optimum = _measures(_first_order(_optimum(tables, log_target), x), log_target, wanted)
    text = _prose(run)
    rows += [{"method": "prose", **point} for point in text]
    js, reverse = found["js"], found["reverse_kl"]
    metrics = {
        "js_alignment": js["alignment"],
        "forward_alignment": found["kl"]["alignment"],
        "js_entropy_margin": js["entropy"] - reverse["entropy"],
        "js_total_variation_margin": reverse["total_variation"] - js["total_variation"],
        "optimum_distance": js["js"] - optimum["js"],
        "base_alignment": (base.exp() * wanted).sum().item(),
        "prose_before": text[0]["alignment"],
        "prose_after": text[-1]["alignment"],
    }
    return Report(metrics=metrics, rows=rows)


def _measures(log_policy: Tensor, log_target: Tensor, wanted: Tensor) -> dict[str, float]:
    """The alignment E b, the entropy, and each divergence from the target, all exact, of a policy [N]."""
    found = {"alignment": (log_policy.exp() * wanted).sum().item(), "entropy": entropy(log_policy).item()}
    log_p = log_target.log_softmax(0)
    return found | {name: target_divergence(name)(log_p, log_policy).item() for name in METHODS}


def _second_order(draw: torch.Generator) -> Tensor:
    """A random chain in which a token depends on the two before it: log-probabilities [N] of all strings."""
    size, x = WORLD.vocabulary, WORLD.sequences()
    logits = 0.7 * torch.randn(size + 1, size + 1, size, generator=draw, dtype=torch.float64)
    log_step = logits.log_softmax(-1)
    before = torch.full((len(x), 2), size)
    whole = torch.zeros(len(x), dtype=torch.float64)
    for place in range(WORLD.length):
        whole = whole + log_step[before[:, 0], before[:, 1], x[:, place]]
        before = torch.stack([before[:, 1], x[:, place]], 1)
    return whole


def _first_order(tables: Sequence[Tensor], x: Tensor) -> Tensor:
    """Log-probabilities [n] of strings x [n, T] under logits: [V] of the first token, then [V, V] for each place."""
    whole = tables[0].log_softmax(-1)[x[:, 0]]
    for place, table in enumerate(tables[1:], start=1):
        whole = whole + table.log_softmax(-1)[x[:, place - 1], x[:, place]]
    return whole


def _best_fit(log_law: Tensor) -> list[Tensor]:
    """The first-order tables nearest to a law [N] in forward KL: its own first and second marginals."""
    cube = log_law.exp().view((WORLD.vocabulary,) * WORLD.length)
    places = range(WORLD.length)
    tables = [cube.sum([p for p in places if p != 0]).log()]
    for place in places[1:]:
        tables.append(cube.sum([p for p in places if p not in (place - 1, place)]).log())
    return tables


def _train(name: str, start: Sequence[Tensor], log_target: Tensor, seed: int) -> list[Tensor]:
    """Online f-DPG with a running Z and a windowed baseline."""
    tables = [table.clone().requires_grad_() for table in start]
    optimizer = torch.optim.Adam(tables, lr=RATE)
    partition, running, divergence = PartitionEstimator(), RunningBaseline(), target_divergence(name)
    everything = WORLD.sequences()
    for step in range(STEPS):
        with torch.no_grad():
            law = _first_order(tables, everything)
        x = draw_sequences(WORLD, law, BATCH, generator=generator(seed, name, step))
        scores, log_policy = log_target[WORLD.index(x)], _first_order(tables, x)
        partition.update(scores, log_policy)
        output = fdpg_loss(
            scores, log_policy, log_policy.detach(), partition.log_partition(),
            divergence=divergence, baseline=running.value,
        )  # fmt: skip
        running.update(output.pseudo_reward)
        optimizer.zero_grad()
        output.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [table.detach() for table in tables]


def _optimum(start: Sequence[Tensor], log_target: Tensor) -> list[Tensor]:
    """The tables of least Jensen-Shannon divergence by L-BFGS on the enumerated objective, from where f-DPG ended."""
    tables = [table.clone().requires_grad_() for table in start]
    optimizer = torch.optim.LBFGS(
        tables, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    log_p, divergence, everything = log_target.log_softmax(0), target_divergence("js"), WORLD.sequences()

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = divergence(log_p, _first_order(tables, everything))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)
    return [table.detach() for table in tables]


def _prose(run: Run) -> list[dict[str, float]]:
    """The share of continuations of real prose that hold WORD, while a small model is brought to those that do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained_llama(vocabulary=512, hidden=64, layers=2, heads=2, length=64, steps=300, batch=32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    text = tokenizer(corpus("prose").validation[0]).input_ids
    prompts = [text[start : start + 8] for start in range(0, 8 * PROMPTS, 8)]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    method, points, recent = FDpg(target="constraint"), [], []
    for step in range(TEXT_STEPS):
        draw = generator(run.seed, "prose", step)
        with torch.no_grad():
            found = sample_rollouts(policy, prompts, group=8, length=24, generator=draw, decode=tokenizer.decode)
            given = (found.ids, found.attention_mask, found.completion_mask)
            batch = method.prepare({
                "completion_mask": found.completion_mask, "old_log_prob": found.log_probs,
                "reference_log_prob": completion_log_probs(reference, *given).log_probs,
                "rewards": torch.tensor([float(WORD in text) for text in found.texts or ()]),
                "prompt_index": found.prompt_index,
            }, group=8, generator=draw)  # fmt: skip
        loss, metrics = method.loss(completion_log_probs(policy, *given).log_probs, batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        recent.append((metrics["reward"].item(), metrics["divergence"].item()))
        if (step + 1) % 10 == 0:
            alignment, divergence = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            points.append({"step": step + 1.0, "alignment": alignment, "divergence": divergence})
            recent = []
    return points


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Alignment against entropy, from the base to where each divergence ends; the divergences; the prose."""
    with figure(path, columns=3, size=(4.0, 3.4)) as axes:
        _draw_ends(rows, axes[0])
        for place, name in enumerate(METHODS):
            ends = [row for row in rows if row["method"] == name]
            for offset, measure in enumerate(METHODS[1:]):
                values = [row[measure] for row in ends]
                at = place + 0.2 * (offset - 1)
                label = None if place else TITLES[measure]
                axes[1].plot([at] * len(values), values, ".", color=f"C{offset + 4}", label=label)
        axes[1].set_xticks(range(len(METHODS)), [TITLES[name].replace(" ", "\n") for name in METHODS], fontsize=7)
        axes[1].set(ylabel="divergence from the target", yscale="log")
        axes[1].legend(frameon=False, fontsize=7)
        for seed in sorted({row["seed"] for row in rows}):
            points = [row for row in rows if row["method"] == "prose" and row["seed"] == seed]
            axes[2].plot([p["step"] for p in points], [p["alignment"] for p in points], marker="o", markersize=2.5)
        axes[2].set(xlabel="step", ylabel=f"continuations with {WORD.strip()!r}", ylim=(0, 1))


def _draw_ends(rows: Sequence[Mapping[str, Any]], axes: Any) -> None:
    bases = {row["seed"]: row for row in rows if row["method"] == "base"}
    for place, name in enumerate(METHODS):
        for number, row in enumerate(row for row in rows if row["method"] == name):
            base = bases[row["seed"]]
            ends = ((row["alignment"], row["entropy"]), (base["alignment"], base["entropy"]))
            arrow = {"arrowstyle": "->", "color": f"C{place}", "alpha": 0.35}
            axes.annotate("", *ends, arrowprops=arrow)
            axes.plot(*ends[0], "o", color=f"C{place}", markersize=5, label=TITLES[name] if not number else None)
    for number, base in enumerate(bases.values()):
        axes.plot(base["alignment"], base["entropy"], "k*", label="base" if not number else None)
    axes.set(xlabel="alignment", ylabel="entropy (nats)")
    axes.legend(frameon=False, fontsize=7)
