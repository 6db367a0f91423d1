"""f-DPO (arXiv 2309.16240) in small: reward, diversity and calibration under six divergences, all exactly enumerated.

A recurrent policy learns an order-2 chain over strings of 5 from 6 tokens and is the reference; pairs of its strings
are labelled by a Bradley-Terry model of a known reward. f-DPO then trains from the same pairs under each divergence and
beta. f-PPO pays f of the ratio as a penalty on its own samples; it sees as many strings, and its reward was learned
from the same pairs by the same network: it is the implicit reward of DPO at beta = 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.align.calibration import preference_ece
from kullback.align.f_dpo import FDPOLoss, fppo_penalty, paper_divergence
from kullback.align.worlds import RecurrentPolicy, World, draw_sequences, entropy, expected_reward
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.divergences import FDivergence, kl

__all__ = ["draw", "reproduce"]

WORLD = World(6, 5)
PAIRS, HELD_OUT, SHARPNESS = 3000, 20_000, 2.0
STEPS, BATCH, RATE, CLIP = 250, 64, 1e-3, 10.0
BETAS, CLAIMED = (0.03, 0.1, 0.3, 1.0), 0.1
CURVES = ("reverse KL", "alpha 0.5", "forward KL", "JS")  # the others are trained at one beta only
ORDER = ("reverse KL", "alpha 0.3", "alpha 0.5", "alpha 0.7", "forward KL")
DIVERGENCES: Mapping[str, FDivergence] = {
    "reverse KL": paper_divergence("reverse_kl"),
    **{f"alpha {a}": paper_divergence("alpha", alpha=a) for a in (0.3, 0.5, 0.7)},
    "forward KL": paper_divergence("forward_kl"),
    "JS": paper_divergence("jensen_shannon"),
    "JS, matched": paper_divergence("jensen_shannon").normalised(),
}


class Setting(NamedTuple):
    """What all methods share: a reference with its table [N], rewards [N], and pairs [2, n, T], chosen ones first."""

    reference: RecurrentPolicy
    log_reference: Tensor
    reward: Tensor
    pairs: Tensor
    held_out: Tensor


def train(policy: RecurrentPolicy, loss: Callable[[], Tensor], rate: float, steps: int = STEPS) -> None:
    """Adam with clipped gradients."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()


def chain(source: torch.Generator) -> Tensor:
    """Log-probabilities [N] of strings of a random order-2 chain."""
    first = torch.randn(6, generator=source).log_softmax(-1)
    second = torch.randn(6, 6, generator=source).log_softmax(-1)
    third = torch.randn(6, 6, 6, generator=source).log_softmax(-1)
    x = WORLD.sequences().T
    total = first[x[0]] + second[x[0], x[1]]
    return total + sum(third[x[i], x[i + 1], x[i + 2]] for i in range(3))


def labelled(reference: Tensor, reward: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Pairs [2, count, T] of strings of the reference, the preferred one first."""
    strings = draw_sequences(WORLD, reference, 2 * count, generator=source).view(2, count, -1)
    one, other = reward[WORLD.index(strings)]
    first_wins = torch.rand(count, generator=source) < torch.sigmoid(SHARPNESS * (one - other))
    return torch.where(first_wins.view(1, -1, 1), strings, strings.flip(0))


def setting(seed: int) -> Setting:
    """The reference, the reward with mean 0 and deviation 1 under it, and the pairs of a seed."""
    source = generator(seed, "world")
    law = chain(source)
    reference = RecurrentPolicy(WORLD, generator=generator(seed, "reference"))

    def likelihood() -> Tensor:
        return -reference.log_probs(draw_sequences(WORLD, law, 2 * BATCH, generator=source)).mean()

    train(reference, likelihood, rate=1e-2)
    with torch.no_grad():
        log_reference = reference.all_log_probs()
    x = WORLD.sequences().T
    single, double = torch.randn(6, generator=source), torch.randn(6, 6, generator=source)
    score = single[x].sum(0) + sum(double[one, two] for one, two in pairwise(x))
    mean = expected_reward(log_reference, score)
    reward = (score - mean) / expected_reward(log_reference, (score - mean).square()).sqrt()
    pairs = labelled(log_reference, reward, PAIRS, source)
    return Setting(reference, log_reference, reward, pairs, labelled(log_reference, reward, HELD_OUT, source))


def measured(here: Setting, policy: RecurrentPolicy) -> dict[str, float]:
    """Exact reward, entropy and divergences of a policy."""
    with torch.no_grad():
        table = policy.all_log_probs()
    found = {
        "reward": expected_reward(table, here.reward), "entropy": entropy(table),
        "reference_kl": kl(here.log_reference, table), "policy_kl": kl(table, here.log_reference),
    }  # fmt: skip
    return {name: value.item() for name, value in found.items()}


def preferred(here: Setting, options: FDPOLoss, seed: int) -> tuple[dict[str, float], Tensor]:
    """f-DPO on the pairs: measures of the policy, with its calibration on other pairs; and its table [N]."""
    policy, source = copy.deepcopy(here.reference), generator(seed, "batches")
    known = here.log_reference[WORLD.index(here.pairs)]

    def loss() -> Tensor:
        rows = torch.randint(PAIRS, (BATCH,), generator=source)
        both = policy.log_probs(here.pairs[:, rows].flatten(0, 1)).view(2, -1)
        return options(*known[:, rows], *both).loss.mean()

    train(policy, loss, RATE)
    with torch.no_grad():
        table = policy.all_log_probs()
    places = WORLD.index(here.held_out)
    output = options(*here.log_reference[places], *table[places])
    flip = torch.rand(HELD_OUT, generator=source) < 0.5
    margin = (output.chosen_reward - output.rejected_reward) * torch.where(flip, -1.0, 1.0)
    return measured(here, policy) | {"ece": preference_ece(torch.sigmoid(margin), ~flip).item()}, table


def penalised(
    here: Setting, learned: Tensor, divergence: FDivergence, beta: float, seed: int
) -> dict[str, float]:
    """f-PPO as a policy gradient: learned reward [N] and penalty of own samples, less the mean of the others."""
    policy, source = copy.deepcopy(here.reference), generator(seed, "samples")

    def loss() -> Tensor:
        with torch.no_grad():
            table = policy.all_log_probs()
        strings = draw_sequences(WORLD, table, 2 * BATCH, generator=source)
        places = WORLD.index(strings)
        gained = learned[places]
        gained = gained + fppo_penalty(here.log_reference[places], table[places], divergence=divergence, beta=beta)
        advantage = (gained - gained.mean()) * len(gained) / (len(gained) - 1)
        return -(advantage * policy.log_probs(strings)).mean()

    train(policy, loss, RATE)
    return measured(here, policy)


def reproduce(run: Run) -> Report:
    """One seed: every divergence at every beta from the same pairs, and f-PPO under reverse KL."""
    here = setting(run.seed)
    rows: list[dict[str, Any]] = [{"method": "reference", "beta": 0.0, **measured(here, here.reference)}]
    tables: dict[tuple[str, float], Tensor] = {}
    for name, divergence in DIVERGENCES.items():
        for beta in BETAS if name in CURVES else (CLAIMED,):
            found, tables[name, beta] = preferred(here, FDPOLoss(divergence=divergence, beta=beta), run.seed)
            rows.append({"method": name, "beta": beta, **found})
            run.event("trained", divergence=name, beta=beta, **found)
    learned = tables["reverse KL", 1.0] - here.log_reference
    for beta in BETAS:
        found = penalised(here, learned, DIVERGENCES["reverse KL"], beta, run.seed)
        rows.append({"method": "f-PPO", "beta": beta, **found})
    at = {row["method"]: row for row in rows if row["beta"] == CLAIMED}
    path = [at[name] for name in ORDER]
    metrics = {
        "reward_order_violations": float(sum(b["reward"] >= a["reward"] for a, b in pairwise(path))),
        "entropy_order_violations": float(sum(b["entropy"] <= a["entropy"] for a, b in pairwise(path))),
        "forward_reference_kl": at["forward KL"]["reference_kl"],
        "reverse_reference_kl": at["reverse KL"]["reference_kl"],
        "js_entropy_difference": at["JS"]["entropy"] - at["reverse KL"]["entropy"],
        "js_reward_difference": at["JS"]["reward"] - at["reverse KL"]["reward"],
    }
    return Report(metrics=metrics, rows=rows)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward against entropy and against the divergence, and the calibration error; curves run over beta."""
    from kullback.figures import figure

    def means(method: str, key: str) -> list[float]:
        betas = sorted({row["beta"] for row in rows if row["method"] == method})
        found = [[row[key] for row in rows if row["method"] == method and row["beta"] == beta] for beta in betas]
        return [sum(values) / len(values) for values in found]

    with figure(path, columns=3, size=(3.8, 3.4)) as (diversity, frontier, calibration):
        for index, name in enumerate([*DIVERGENCES, "f-PPO"]):
            style: dict[str, Any] = {"color": f"C{index}", "marker": "o" if name in CURVES else "D", "markersize": 4}
            if name == "f-PPO":
                style |= {"color": "0.3", "linestyle": "--", "marker": "s"}
            else:
                betas = BETAS if name in CURVES else (CLAIMED,)
                calibration.semilogx(betas, means(name, "ece"), **style)
            diversity.plot(means(name, "entropy"), means(name, "reward"), label=name, **style)
            frontier.plot(means(name, "policy_kl"), means(name, "reward"), **style)
        start = means("reference", "entropy"), means("reference", "reward")
        diversity.plot(*start, "k*", markersize=8, label="reference")
        diversity.set(xlabel="entropy (nats)", ylabel="reward", title="beta from 0.03 to 1, diamonds at 0.1")
        diversity.legend(frameon=False, fontsize=7.5)
        frontier.set(xlabel="KL(policy || reference) (nats)", ylabel="reward", title="divergence spent")
        calibration.set(xlabel="beta", ylabel="calibration error", title="held-out preferences")
        calibration.set_xticks(BETAS, [str(beta) for beta in BETAS])
        calibration.minorticks_off()
