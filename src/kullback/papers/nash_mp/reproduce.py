"""Nash mirror prox on random games of 10, 100 and 1000 answers, and a small sampled policy under a judge in circles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align.nash import (
    PreferenceGame,
    exploitability,
    nash_mirror_descent,
    nash_mirror_prox,
    regularised_nash,
    self_play,
)
from kullback.align.nash_policy import NashPolicy
from kullback.align.worlds import RecurrentPolicy, World, draw_sequences
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.divergences import kl
from kullback.figures import figure

__all__ = ["draw", "reproduce"]

SIZES, BETA, QUERIES, EVERY = (10, 100, 1000), 0.01, 1000, 50
DESCENT_ETAS = (0.2, 1.0, 2.0)
WORLD, JUDGE_BETA, STEPS, PROMPTS, GROUP, RATE = World(5, 3), 0.05, 300, 8, 16, 1e-2
MODES = {"nash-mp": "Nash mirror prox", "self-play": "self-play", "ipo": "Online IPO"}


def reproduce(run: Run) -> Report:
    """The exact games, then the policies."""
    rows: list[dict[str, Any]] = []
    ends: dict[str, list[float]] = {}
    for size in SIZES:
        found = _exact(size, run.seed, rows)
        for name, value in found.items():
            ends.setdefault(name, []).append(value)
        run.event("game", size=size, **found)
    kept = {mode: _sampled(mode, run.seed, rows) for mode in MODES}
    start = next(row["exploitability"] for row in rows if row["part"] == "policy")
    metrics = {
        "nash_mp_kl": max(ends["Nash mirror prox"]),
        "self_play_kl": min(ends["self-play"][:2]),
        "nash_md_kl": min(ends["Nash mirror descent"][:2]),
        "exploitability_ratio": kept["nash-mp"] / kept["self-play"],
        "exploitability_kept": kept["nash-mp"] / start,
        "exploitability_ratio_ipo": kept["nash-mp"] / kept["ipo"],
    }
    return Report(metrics=metrics, rows=rows)


def _exact(size: int, seed: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    """KL(pi*, pi) after QUERIES queries of each method, and its course in rows."""
    draw = generator(seed, "game", size)
    logits = 3.0 * torch.randn(size, size, generator=draw, dtype=torch.float64)
    exponential = -torch.rand(size, generator=draw, dtype=torch.float64).log()  # normalised: Dirichlet(1)
    game = PreferenceGame(((logits - logits.T) / 2**0.5).sigmoid(), exponential.log().log_softmax(0), BETA)
    nash = regularised_nash(game)

    def watch(name: str, a_step: int) -> Callable[[int, Tensor], None]:
        def listen(step: int, policy: Tensor) -> None:
            if step * a_step % EVERY == 0:
                point = {"queries": step * a_step, "kl": kl(nash, policy).item()}
                rows.append({"part": "game", "size": size, "method": name, **point})

        return listen

    ends = {
        "Nash mirror prox": nash_mirror_prox(game, QUERIES // 2, listen=watch("Nash mirror prox", 2)),
        "self-play": self_play(game, QUERIES, listen=watch("self-play", 1)),
    }
    found = {name: kl(nash, policy).item() for name, policy in ends.items()}
    descents = {eta: kl(nash, nash_mirror_descent(game, QUERIES, eta=eta)).item() for eta in DESCENT_ETAS}
    best = min(descents, key=lambda eta: descents[eta])
    nash_mirror_descent(game, QUERIES, eta=best, listen=watch("Nash mirror descent", 1))
    return {**found, "Nash mirror descent": descents[best]}


def _preferences() -> Tensor:
    """Of 125 answers [N, N]: the sum of its tokens, modulo 3, is an answer's kind, and each kind beats the next."""
    kinds = WORLD.sequences().sum(1) % 3
    beats = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
    return beats[kinds.unsqueeze(1), kinds]


def _sampled(mode: str, seed: int, rows: list[dict[str, Any]]) -> float:
    """The exploitability at the end of a recurrent policy that is trained from samples, with its course in rows."""
    policy = RecurrentPolicy(WORLD, generator=generator(seed, "policy"), width=24, dtype=torch.float64)
    log_reference = policy.all_log_probs().detach()
    game = PreferenceGame(_preferences(), log_reference, JUDGE_BETA)
    anchor = deepcopy(policy)
    method = NashPolicy(beta=JUDGE_BETA, mode=mode, preferences="bradley-terry" if mode == "ipo" else "given")  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(policy.parameters(), lr=RATE)
    value = float("nan")
    for step in range(STEPS + 1):
        with torch.no_grad():
            law = policy.all_log_probs()
            value = exploitability(game, law).item()
        if step % 10 == 0:
            rows.append({"part": "policy", "method": mode, "step": step, "exploitability": value})
        if step == STEPS:
            break
        x = draw_sequences(WORLD, law, PROMPTS * GROUP, generator=generator(seed, mode, step))
        batch = _batch(game, x, law, anchor, method)
        prepared = method.prepare(batch, group=GROUP, generator=generator(seed, mode, step))
        if mode == "ipo":
            prepared["preferences"] = _pairs(game, x)
        loss, _ = method.loss(policy.log_probs(x).unsqueeze(1), prepared, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for held, parameter in zip(anchor.parameters(), policy.parameters(), strict=True):
                held.lerp_(parameter, 1.0 - method.decay)
    return value


def _pairs(game: PreferenceGame, x: Tensor) -> Tensor:
    """What the judge says of every two answers of a group: [B, GROUP]."""
    places = WORLD.index(x).view(PROMPTS, GROUP)
    return game.preferences[places.unsqueeze(2), places.unsqueeze(1)].reshape(-1, GROUP)


def _batch(game: PreferenceGame, x: Tensor, law: Tensor, anchor: RecurrentPolicy, method: NashPolicy) -> dict[str, Any]:
    places, rates = WORLD.index(x), _pairs(game, x)
    own = rates.view(PROMPTS, GROUP, GROUP).diagonal(dim1=1, dim2=2).reshape(-1)
    batch: dict[str, Any] = {
        "rewards": (rates.sum(1) - own) / (GROUP - 1),
        "completion_mask": torch.ones(len(x), 1, dtype=torch.bool),
        "old_log_prob": law[places].unsqueeze(1),
        "reference_log_prob": game.log_reference[places].unsqueeze(1),
    }
    if method.anchor_decay is not None:
        with torch.no_grad():
            batch["anchor_log_prob"] = anchor.log_probs(x).unsqueeze(1)
    return batch


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL to the equilibrium against queries with the proven line, and how far the sampled policies can be exploited."""
    colors = {"Nash mirror prox": "C0", "self-play": "C1", "Nash mirror descent": "C2", "Online IPO": "C4"}
    with figure(path, columns=2, size=(5.0, 3.6)) as axes:
        styles = dict(zip(SIZES, ("-", "--", ":"), strict=True))
        games = [row for row in rows if row["part"] == "game" and row["seed"] == rows[0]["seed"]]
        for size in SIZES:
            for name in ("Nash mirror prox", "self-play", "Nash mirror descent"):
                found = [(r["queries"], max(r["kl"], 1e-17)) for r in games if (r["size"], r["method"]) == (size, name)]
                label = name if size == SIZES[0] else None
                axes[0].plot(*zip(*found, strict=True), styles[size], color=colors[name], label=label, linewidth=1.2)
        line = [(1 + 2 * BETA) ** (-queries / 2) for queries in range(0, QUERIES + 1, EVERY)]
        axes[0].plot(range(0, QUERIES + 1, EVERY), line, color="0.6", linewidth=1.0, label="proven, from KL = 1")
        axes[0].set(xlabel="queries (10 –, 100 - -, 1000 ··· answers)", ylabel="KL to the equilibrium", yscale="log")
        for mode, title in MODES.items():
            for seed in sorted({row["seed"] for row in rows}):
                found = [
                    (r["step"], r["exploitability"]) for r in rows
                    if r["part"] == "policy" and r["method"] == mode and r["seed"] == seed
                ]  # fmt: skip
                label = title if seed == rows[0]["seed"] else None
                axes[1].plot(*zip(*found, strict=True), color=colors[title], label=label, linewidth=1.2)
        axes[1].set(xlabel="step", ylabel="exploitability of the sampled policy", yscale="log")
        for panel in axes:
            panel.legend(frameon=False, fontsize=7)
