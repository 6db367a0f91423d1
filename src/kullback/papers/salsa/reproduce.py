"""SALSA on 7776 strings: two models fine-tuned from one ancestor, their soup, and policy gradients toward each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align.grpo import Grpo
from kullback.align.soup import geometric_soup, soup_gain, soup_state_dict
from kullback.align.worlds import (
    RecurrentPolicy,
    World,
    draw_sequences,
    expected_reward,
    regularised_optimum,
)
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.divergences import kl
from kullback.figures import figure

__all__ = ["draw", "reproduce"]

WORLD, WIDTH, BETA = World(6, 5), 48, 1.0
BASE_STEPS, TUNED_STEPS, DEMONSTRATIONS, TUNED_RATE = 200, 200, 240, 3e-3
STEPS, BATCH, RATE = 400, 192, 1e-3
ALPHAS = tuple(place / 10 for place in range(11))
GRPO = Grpo(
    beta=BETA, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
    clip_low=math.inf, clip_high=math.inf,
)  # fmt: skip


def reproduce(run: Run) -> Report:
    """Both settings of data, then alignment with the parent and with the soup as reference."""
    base, expert, reward = _world(run.seed)
    rows: list[dict[str, Any]] = []
    margins: dict[str, list[float]] = {"kl": [], "reward": [], "distance": [], "gain": []}
    for setting in ("same", "halves"):
        parents = _parents(base, expert, setting, run.seed)
        soup = _soup(parents, [0.5, 0.5])
        laws = {name: _law(model) for name, model in zip("AB", parents, strict=True)} | {"soup": _law(soup)}
        distance = {name: kl(expert, law).item() for name, law in laws.items()}
        value = {name: expected_reward(law, reward).item() for name, law in laws.items()}
        margins["kl"].append(min(distance["A"], distance["B"]) - distance["soup"])
        margins["reward"].append(value["soup"] - 0.5 * (value["A"] + value["B"]))
        rows += _line(parents, expert, reward, setting)
        for role, start in zip("AB", parents, strict=True):
            ends = {}
            for reference in (role, "soup"):
                end = _align(start, laws[reference], reward, generator(run.seed, setting, role, reference))
                optimum = regularised_optimum(laws[reference], reward, coefficient=BETA)
                ends[reference] = expected_reward(end, reward).item()
                margins["distance"].append(abs(ends[reference] - expected_reward(optimum, reward).item()))
                kls = {"kl_start": kl(end, laws[role]).item(), "kl_reference": kl(end, laws[reference]).item()}
                name = "parent" if reference == role else "soup"
                row = {"part": "aligned", "setting": setting, "role": role, "reference": name}
                rows.append({**row, "reward": ends[reference], **kls})
            margins["gain"].append(ends["soup"] - ends[role])
        exact = soup_gain(laws["A"], laws["B"], reward, beta=BETA).item()
        linear = kl(geometric_soup([laws["A"], laws["B"]]), laws["soup"]).item()
        rows.append({"part": "setting", "setting": setting, "soup_gain": exact, "linearisation": linear})
        run.event("setting", name=setting, soup_gain=exact, linearisation=linear, **_latest(margins))
    rows += _three(base, expert, run.seed)
    metrics = {
        "expert_kl_margin": min(margins["kl"]),
        "soup_reward_margin": min(margins["reward"]),
        "optimum_distance": max(margins["distance"]),
        "salsa_reward_gain": sum(margins["gain"]) / len(margins["gain"]),
    }
    return Report(metrics=metrics, rows=rows)


def _latest(margins: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The latest of each."""
    return {name: values[-1] for name, values in margins.items()}


def _world(seed: int) -> tuple[RecurrentPolicy, Tensor, Tensor]:
    """A base fitted to a chain of second order, the expert's law, and the reward that tilts the base to it."""
    draw, size = generator(seed, "world"), WORLD.vocabulary
    x = WORLD.sequences()
    logits = torch.randn(size + 1, size + 1, size, generator=draw)
    padded = torch.cat([torch.full((len(x), 2), size), x], 1)
    chain = sum(logits.log_softmax(-1)[padded[:, t], padded[:, t + 1], padded[:, t + 2]] for t in range(WORLD.length))
    base = RecurrentPolicy(WORLD, generator=generator(seed, "base"), width=WIDTH)
    law = torch.as_tensor(chain).log_softmax(-1)
    _fit(base, lambda step: draw_sequences(WORLD, law, 128, generator=generator(seed, "text", step)), BASE_STEPS, 5e-3)
    one, two = torch.randn(size, generator=draw), torch.randn(size, size, generator=draw)
    reward = one[x].sum(1) + two[x[:, :-1], x[:, 1:]].sum(1)
    start = _law(base)
    mean = expected_reward(start, reward)
    reward = (reward - mean) / expected_reward(start, (reward - mean).square()).sqrt()
    return base, (start + reward).log_softmax(-1), reward


def _law(model: RecurrentPolicy) -> Tensor:
    with torch.no_grad():
        return model.all_log_probs()


def _fit(model: RecurrentPolicy, batch: Any, steps: int, rate: float) -> None:
    """Maximum likelihood on batch(step), strings [n, T]."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        loss = -model.log_probs(batch(step)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _parents(
    base: RecurrentPolicy, expert: Tensor, setting: str, seed: int, names: str = "AB"
) -> list[RecurrentPolicy]:
    """Models fine-tuned on the expert's demonstrations: all of them each, or a share of its own."""
    shown = draw_sequences(WORLD, expert, DEMONSTRATIONS, generator=generator(seed, "demonstrations"))
    found = []
    for place, name in enumerate(names):
        mine = shown if setting == "same" else shown[place :: len(names)]
        model = deepcopy(base)

        def batch(step: int, mine: Tensor = mine, name: str = name) -> Tensor:
            order = torch.randint(len(mine), (32,), generator=generator(seed, setting, name, step))
            return mine[order]

        _fit(model, batch, TUNED_STEPS, TUNED_RATE)
        found.append(model)
    return found


def _soup(parents: Sequence[RecurrentPolicy], weights: Sequence[float]) -> RecurrentPolicy:
    mixed = deepcopy(parents[0])
    mixed.load_state_dict(soup_state_dict([parent.state_dict() for parent in parents], weights))
    return mixed


def _line(parents: Sequence[RecurrentPolicy], expert: Tensor, reward: Tensor, setting: str) -> list[dict[str, Any]]:
    """Along the line from A (alpha = 1) to B (alpha = 0): how far the expert is, and the reward."""
    rows = []
    for alpha in ALPHAS:
        law = _law(_soup(parents, [alpha, 1.0 - alpha]))
        measured = {"kl": kl(expert, law).item(), "reward": expected_reward(law, reward).item()}
        rows.append({"part": "line", "setting": setting, "alpha": alpha, **measured})
    return rows


def _three(base: RecurrentPolicy, expert: Tensor, seed: int) -> list[dict[str, Any]]:
    """Soups of three parents with data of their own, over the simplex."""
    parents = _parents(base, expert, "thirds", seed, names="ABC")
    rows = []
    for first in range(5):
        for second in range(5 - first):
            weights = [first / 4, second / 4, (4 - first - second) / 4]
            far = kl(expert, _law(_soup(parents, weights))).item()
            rows.append({"part": "three", "first": weights[0], "second": weights[1], "kl": far})
    return rows


def _align(start: RecurrentPolicy, reference: Tensor, reward: Tensor, seeds: torch.Generator) -> Tensor:
    """Leave-one-out policy gradients on E R - beta KL(policy, reference); the law at the end."""
    policy = deepcopy(start)
    optimizer = torch.optim.Adam(policy.parameters(), lr=RATE)
    for _ in range(STEPS):
        law = _law(policy)
        x = draw_sequences(WORLD, law, BATCH, generator=seeds)
        places = WORLD.index(x)
        batch = {
            "rewards": reward[places], "completion_mask": torch.ones(len(x), 1, dtype=torch.bool),
            "old_log_prob": law[places].unsqueeze(1), "reference_log_prob": reference[places].unsqueeze(1),
        }  # fmt: skip
        batch = GRPO.prepare(batch, group=BATCH, generator=seeds)
        loss, _ = GRPO.loss(policy.log_probs(x).unsqueeze(1), batch, count=GRPO.count(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _law(policy)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Along the line between the parents; where alignment ends; the soups of three."""
    seeds = sorted({row["seed"] for row in rows})
    with figure(path, columns=3, size=(4.0, 3.4)) as axes:
        for seed in seeds:
            for color, setting in zip(("C0", "C1"), ("same", "halves"), strict=True):
                line = [r for r in rows if r["part"] == "line" and (r["seed"], r["setting"]) == (seed, setting)]
                label = f"{setting} data" if seed == seeds[0] else None
                axes[0].plot([r["alpha"] for r in line], [r["kl"] for r in line], color=color, label=label)
        axes[0].set(xlabel="share of the first parent", ylabel="KL(expert, mixed) (nats)")
        axes[0].legend(frameon=False)
        for color, reference in zip(("C2", "C3"), ("parent", "soup"), strict=True):
            found = [r for r in rows if r["part"] == "aligned" and r["reference"] == reference]
            x, y = ([r[name] for r in found] for name in ("kl_start", "reward"))
            axes[1].plot(x, y, "o", color=color, markersize=4, label=f"reference: {reference}")
        axes[1].set(xlabel="KL to where the policy began (nats)", ylabel="reward after alignment")
        axes[1].legend(frameon=False)
        three = [r for r in rows if r["part"] == "three" and r["seed"] == seeds[0]]
        x = [r["second"] + 0.5 * (1.0 - r["first"] - r["second"]) for r in three]
        y = [(1.0 - r["first"] - r["second"]) * 0.75**0.5 for r in three]
        dots = axes[2].scatter(x, y, c=[r["kl"] for r in three], s=160, cmap="viridis_r")
        axes[2].figure.colorbar(dots, ax=axes[2], label="KL(expert, soup of three) (nats)")
        for name, place in zip("ABC", ((-0.09, -0.02), (1.06, -0.02), (0.56, 0.85)), strict=True):
            axes[2].text(*place, name)
        axes[2].set_axis_off()
