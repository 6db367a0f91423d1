"""Asymptotics of alignment (arXiv 2404.01730) in small: best of exp(m delta) against the KL optimum, a policy on it.

Letters: a random pair over three symbols at half the largest KL; the gaps of best of n a letter at 10 to 320 letters,
exactly by types, with one confirmation by sampling. Model: a small recurrent language model over 7776 sequences with a
reward learned from comparisons; its exact frontier, best of 2 to 16, and REINFORCE with a KL penalty, judged by its KL
and mean reward alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align.memoryless import MemorylessAlignment
from kullback.align.tradeoff import (
    alignment_gap,
    best_of_n_kl,
    best_of_n_kl_upper,
    kl_reward_frontier,
    solve_tilt_for_kl,
)
from kullback.align.worlds import RecurrentPolicy, World, best_of_n_law, draw_sequences, expected_reward
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.divergences import kl

__all__ = ["draw", "reproduce"]

LETTERS, GROUPS = (10, 20, 40, 80, 160, 320), 20_000
WORLD, SIZES, COMPARISONS = World(6, 5), (2, 4, 8, 16), 3000
COEFFICIENT, STEPS, BATCH = 0.6, 400, 1024


def dirichlet(seed: int, name: str) -> Tensor:
    """A draw of Dirichlet(2, 2, 2): sums of two exponentials, normalised."""
    uniform = torch.rand(2, 3, generator=generator(seed, name), dtype=torch.float64)
    parts = -torch.log1p(-uniform).sum(0)
    return parts / parts.sum()


def letters(run: Run) -> list[dict[str, Any]]:
    """One row a number of letters: both gaps of best of exp(m delta), its KL and the bound."""
    world = MemorylessAlignment(dirichlet(run.seed, "p"), dirichlet(run.seed, "q"))
    delta, rows = 0.5 * world.largest_delta, []
    for m in LETTERS:
        gap = world.bon_gap(m, delta)
        rows.append({"study": "letters", "delta": delta, **gap._asdict()})
    run.event("letters", delta=delta, **{f"m={row['letters']}": row["kl_gap"] for row in rows})
    return rows


def confirmed(run: Run) -> dict[str, Any]:
    """The mean reward of best of 8 over ten letters, sampled and exact, and how many standard errors lie between."""
    p, q = dirichlet(run.seed, "p"), dirichlet(run.seed, "q")
    drawn = torch.multinomial(p, GROUPS * 80, replacement=True, generator=generator(run.seed, "sampled"))
    best = q.log()[drawn].view(GROUPS, 8, 10).sum(-1).amax(1)
    exact = 10 * MemorylessAlignment(p, q).bon_gap(10, math.log(8) / 10).reward
    sampled, error = best.mean().item(), best.std().item() / math.sqrt(GROUPS)
    return {"study": "sampled", "sampled": sampled, "exact": exact, "standard_errors": abs(sampled - exact) / error}


def learned_reward(seed: int, sequences: Tensor) -> Tensor:
    """A reward [N] of single tokens and of neighbours, fitted to comparisons under a hidden one of that form."""
    source = generator(seed, "reward")
    one_hot = torch.nn.functional.one_hot(sequences, WORLD.vocabulary).double()
    pairs = torch.einsum("nta,ntb->nab", one_hot[:, :-1], one_hot[:, 1:]).flatten(1)
    features = torch.cat([one_hot.flatten(1), pairs], 1)
    hidden = features @ torch.randn(features.shape[1], generator=source, dtype=torch.float64)
    hidden = (hidden - hidden.mean()) / hidden.std()
    first, second = torch.randint(WORLD.size, (2, COMPARISONS), generator=source)
    wins = torch.rand(COMPARISONS, generator=source, dtype=torch.float64) < (hidden[first] - hidden[second]).sigmoid()
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")
    difference = (features[first] - features[second]) * torch.where(wins, 1.0, -1.0).unsqueeze(1)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.softplus(-(difference @ weights)).mean() + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    found = (features @ weights).detach()
    return found - found.mean()


def reinforced(run: Run, reference: RecurrentPolicy, reward: Tensor) -> list[tuple[float, float]]:
    """KL and mean reward of a policy along REINFORCE with the penalty in its reward, exactly, from start to end."""
    policy = RecurrentPolicy(WORLD, generator=generator(run.seed, "unused"))
    policy.load_state_dict(reference.state_dict())
    log_reference = reference.all_log_probs().detach()
    optimiser = torch.optim.Adam(policy.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    source, path = generator(run.seed, "rollouts"), []
    for step in range(STEPS + 1):
        whole = policy.all_log_probs()
        if step % 20 == 0:
            law = whole.detach().double().log_softmax(-1)
            path.append((kl(law, log_reference.double()).item(), expected_reward(law, reward).item()))
        drawn = WORLD.index(draw_sequences(WORLD, whole, BATCH, generator=source))
        log_probs = whole[drawn]
        value = reward[drawn] - COEFFICIENT * (log_probs.detach() - log_reference[drawn])
        # The others' mean as a baseline leaves the gradient unbiased.
        advantage = (value - value.mean()) * BATCH / (BATCH - 1)
        optimiser.zero_grad()
        (-(advantage * log_probs).mean()).backward()
        optimiser.step()
        if step < STEPS:
            schedule.step()
    return path


def model(run: Run) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The frontier, best of n and the trained policy of the small language model; the policy's gap."""
    reference = RecurrentPolicy(WORLD, generator=generator(run.seed, "reference"))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(3.0)  # far from uniform
    log_p = reference.all_log_probs().detach().double().log_softmax(-1)
    reward = learned_reward(run.seed, WORLD.sequences())
    frontier = kl_reward_frontier(log_p, reward, torch.linspace(0.0, 6.0, 61))
    rows = [
        {"study": "frontier", "kl": spent, "reward": earned}
        for spent, earned in zip(frontier.kl.tolist(), frontier.reward.tolist(), strict=True)
    ]
    for n in SIZES:
        law = best_of_n_law(log_p, reward, n)
        spent, earned = best_of_n_kl(log_p, reward, n).item(), expected_reward(law, reward).item()
        upper, best = best_of_n_kl_upper(n).item(), solve_tilt_for_kl(log_p, reward, spent).reward.item()
        rows.append({"study": "best of n", "n": n, "kl": spent, "reward": earned, "kl_upper": upper, "optimum": best})
    path = reinforced(run, reference, reward)
    rows += [{"study": "reinforce", "step": 20 * i, "kl": a, "reward": b} for i, (a, b) in enumerate(path)]
    spent, earned = path[-1]
    gap = alignment_gap(log_p, reward, spent, earned).item()
    to_optimum = alignment_gap(log_p, reward, spent, earned, beta=1.0 / COEFFICIENT).item()
    run.event("reinforce", kl=spent, reward=earned, gap=gap, gap_to_its_optimum=to_optimum)
    return rows, {"policy_alignment_gap": gap, "policy_gap_to_its_optimum": to_optimum}


def gap_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ratios, order and rate of the two gaps, and how often the bound of the KL is passed."""
    at = {row["letters"]: row for row in rows}
    names = ("reward_gap", "kl_gap")
    late = [m for m in LETTERS if m >= 20]
    risen = sum(at[b][name] >= at[a][name] for name in names for a, b in pairwise(late))
    scaled = {(m, name): at[m][name] * m / math.log(m) for m in LETTERS for name in names}
    factors = [scaled[80, name] / scaled[320, name] for name in names]
    return {
        "gap_ratio": max(at[320][name] / at[20][name] for name in names),
        "gap_order_violations": risen + sum(row[name] <= 0.0 for row in rows for name in names),
        "gap_rate_factor": max(max(factor, 1.0 / factor) for factor in factors),
    }


def reproduce(run: Run) -> Report:
    """One seed: gaps by number of letters, their confirmation, and the small model."""
    rows = letters(run)
    check = confirmed(run)
    of_model, gaps = model(run)
    best = [row for row in of_model if row["study"] == "best of n"]
    passed = sum(row["kl"] > row["kl_upper"] + 1e-12 for row in [*rows, *best])
    metrics = {**gap_metrics(rows), "kl_bound_violations": passed, **gaps, "sampled_error": check["standard_errors"]}
    return Report(metrics=metrics, rows=[*rows, check, *of_model])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward against KL of the small model at one seed, and both gaps against the number of letters."""
    from kullback.figures import figure

    with figure(path, columns=2, size=(4.4, 3.4)) as (plane, gaps):
        first = [row for row in rows if row["seed"] == rows[0]["seed"]]
        styles = {"frontier": ("-", "optimum"), "best of n": ("o", "best of n"), "reinforce": (".:", "REINFORCE")}
        for index, (study, (style, label)) in enumerate(styles.items()):
            chosen = [row for row in first if row["study"] == study]
            points = [row["kl"] for row in chosen], [row["reward"] for row in chosen]
            plane.plot(*points, style, color=f"C{index}", label=label, markersize=5)
            for row in chosen if study == "best of n" else ():
                at = (row["kl"], row["reward"])
                plane.annotate(f"{row['n']}", at, (3, -9), textcoords="offset points", fontsize=7)
        plane.set(xlabel="KL to the reference, nats", ylabel="mean reward", xlim=(0, 3))
        plane.set_title("a model of 7776 sequences", fontsize=9)
        plane.legend(frameon=False, fontsize=8)
        for seed in sorted({row["seed"] for row in rows}):
            chosen = [row for row in rows if row["study"] == "letters" and row["seed"] == seed]
            m = [row["letters"] for row in chosen]
            for name, style, label in (("reward_gap", "o-", "reward"), ("kl_gap", "s--", "KL")):
                shown = f"{label}, pair {seed}"
                gaps.loglog(m, [row[name] for row in chosen], style, color=f"C{seed}", label=shown, markersize=4)
        ends = (20, 320)
        rate = [0.35 * math.log(m) / m for m in ends]
        gaps.loglog(ends, rate, color="0.8", label="(log m) / m", linewidth=4, zorder=0)
        gaps.set(xlabel="letters m", ylim=(1e-5, None))
        gaps.set_title("gap a letter of best of exp(m delta)", fontsize=9)
        gaps.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")
