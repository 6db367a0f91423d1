"""RL with and without a KL penalty on 256 strings, all exact; then a small model of real prose that avoids a letter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align.evidence import PriorSampler, log_evidence
from kullback.align.f_dpg import fdpg_loss, target_divergence
from kullback.align.grpo import Grpo
from kullback.align.log_probs import completion_log_probs, sequence_log_probs
from kullback.align.measures import distinct_n
from kullback.align.posterior import PosteriorTarget, collapse_report
from kullback.align.rollouts import Rollouts, sample_rollouts
from kullback.align.worlds import TabularPolicy, World, draw_sequences
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data.corpora import corpus
from kullback.divergences import kl
from kullback.figures import figure
from kullback.models.small import trained_llama

__all__ = ["draw", "reproduce"]

WORLD, BETA, BATCH, STEPS, RATE, EVERY = World(4, 4), 0.5, 128, 2000, 0.02, 100
METHODS = {"RL": "C1", "KL-RL": "C0", "forward KL": "C2"}
PROMPTS, GROUP, LENGTH, TEXT_STEPS, TEXT_RATE, TEXT_BETA = 8, 8, 16, 80, 1e-3, 1.0


def reproduce(run: Run) -> Report:
    """The three methods in the world, the bracket of the evidence, and the prose."""
    target, prior = _world(run.seed)
    exact = target.exact()
    rows: list[dict[str, Any]] = []
    ends, worst = {}, 0.0
    for name in METHODS:
        law, points = _train(name, prior, target, run.seed)
        ends[name] = law
        worst = max(worst, *(point.pop("identity") for point in points))
        rows += [{"part": "world", "method": name, **point} for point in points]
    distance = {name: _total_variation(law, exact.log_posterior) for name, law in ends.items()}
    rows += _evidence(target, run.seed, exact.log_evidence.item())
    prose = _prose(run)
    rows += prose["rows"]
    metrics = {
        "rl_entropy": collapse_report(target.log_prior, ends["RL"]).entropy,
        "prior_entropy": collapse_report(target.log_prior, target.log_prior).entropy,
        "posterior_distance": max(distance["KL-RL"], distance["forward KL"]),
        "objective_gap": (exact.best - target.objective(ends["KL-RL"])).item(),
        "identity_error": worst,
        **prose["metrics"],
    }
    return Report(metrics=metrics, rows=rows)


def _world(seed: int) -> tuple[PosteriorTarget, TabularPolicy]:
    """A random prior over strings of 4 tokens, rewarded for the last token and against repetition."""
    prior = TabularPolicy(WORLD, generator=generator(seed, "prior"), scale=1.0)
    x = WORLD.sequences()
    reward = (x == 3).sum(1).double() - 0.5 * (x[:, 1:] == x[:, :-1]).sum(1)
    return PosteriorTarget(prior.all_log_probs().detach(), reward, BETA), prior


def _total_variation(one: Tensor, other: Tensor) -> float:
    return 0.5 * (one.exp() - other.exp()).abs().sum().item()


def _method(name: str) -> Grpo:
    """Leave-one-out policy gradients, with the KL inside the reward or without."""
    return Grpo(
        beta=BETA if name == "KL-RL" else 0.0, penalty="k1", scale="none", baseline="leave-one-out",
        reduction="seq-mean-token-sum", clip_low=math.inf, clip_high=math.inf,
    )  # fmt: skip


def _train(
    name: str, prior: TabularPolicy, target: PosteriorTarget, seed: int
) -> tuple[Tensor, list[dict[str, float]]]:
    policy = TabularPolicy(WORLD)
    policy.load_state_dict(prior.state_dict())
    optimizer, exact = torch.optim.Adam(policy.parameters(), lr=RATE), target.exact()
    method, points = _method(name), []
    for step in range(STEPS + 1):
        law = policy.all_log_probs()
        if step % EVERY == 0:
            points.append({"step": float(step), **_measure(law.detach(), target)})
        if step == STEPS:
            break
        draw = generator(seed, name, step)
        places = WORLD.index(draw_sequences(WORLD, law.detach(), BATCH, generator=draw))
        if name == "forward KL":
            given = (target.log_unnormalised()[places], law[places], law.detach()[places])
            loss = fdpg_loss(*given, exact.log_evidence, divergence=target_divergence("kl"), baseline=0.0).loss
        else:
            batch: dict[str, Any] = {
                "rewards": target.reward[places], "old_log_prob": law.detach()[places].unsqueeze(1),
                "completion_mask": torch.ones(BATCH, 1, dtype=torch.bool),
                "reference_log_prob": target.log_prior[places].unsqueeze(1),
            }  # fmt: skip
            batch = method.prepare(batch, group=BATCH, generator=draw)
            loss, _ = method.loss(law[places].unsqueeze(1), batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return law.detach(), points


def _measure(law: Tensor, target: PosteriorTarget) -> dict[str, float]:
    """Entropy, distance to the posterior, both bounds of the evidence, and how far the identity is off."""
    exact = target.exact()
    objective = target.objective(law)
    identity = exact.best - target.beta * kl(law, exact.log_posterior)
    upper = exact.log_evidence + kl(exact.log_posterior, law)
    return {
        "entropy": collapse_report(target.log_prior, law).entropy,
        "distance": _total_variation(law, exact.log_posterior),
        "elbo": (objective / target.beta).item(),
        "eubo": upper.item(),
        "identity": (objective - identity).abs().item(),
    }


def _evidence(target: PosteriorTarget, seed: int, exact: float) -> list[dict[str, Any]]:
    """log Z from samples of the prior, by each method."""

    def sample(count: int, draw: torch.Generator) -> Tensor:
        return WORLD.index(draw_sequences(WORLD, target.log_prior, count, generator=draw))

    problem = PriorSampler(sample, lambda x: target.reward[x])
    rows = []
    for method in ("importance", "annealed", "thermodynamic"):
        draw = generator(seed, "evidence", method)
        found = log_evidence(problem, 2000, beta=target.beta, generator=draw, method=method)  # type: ignore[arg-type]
        rows.append({"part": "evidence", "method": method, "error": found.log_evidence - exact})
    return rows


def _prose(run: Run) -> dict[str, Any]:
    """Policy gradients on a model of the standard library's prose, rewarded for each letter e that it leaves out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained_llama(vocabulary=257, hidden=64, layers=2, heads=2, length=64, steps=300, batch=32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer(corpus("prose").validation[0]).input_ids
    prompts = [text[start : start + 16] for start in range(0, 16 * PROMPTS, 16)]
    scored = _Scored(reference, tokenizer, prompts)
    base = scored(reference, generator(run.seed, "base"), group=128)
    rows: list[dict[str, Any]] = []
    ends = {}
    for name in ("RL", "KL-RL"):
        policy = AutoModelForCausalLM.from_pretrained(folder)
        rows += _align_prose(name, policy, scored, run.seed)
        ends[name] = scored(policy, generator(run.seed, "end"), group=128)
    shares = {name: end["distinct"] / base["distinct"] for name, end in ends.items()}
    gap = _resampled(base, ends["KL-RL"])
    run.event("prose", **{f"{name}_{key}": ends[name][key] for name in ends for key in ("reward", "kl", "distinct")})
    metrics = {
        "rl_distinct_share": shares["RL"], "penalised_distinct_share": shares["KL-RL"], "resampling_reward_gap": gap,
        "base_reward": base["reward"], "rl_reward": ends["RL"]["reward"], "kl_rl_reward": ends["KL-RL"]["reward"],
        "kl_rl_divergence": ends["KL-RL"]["kl"],
    }  # fmt: skip
    return {"rows": rows, "metrics": metrics}


class _Scored:
    """Completions of the prompts by a policy, with their rewards and log-ratios."""

    def __init__(self, reference: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.reference, self.tokenizer, self.prompts = reference, tokenizer, prompts

    def rollouts(self, policy: Any, draw: torch.Generator, group: int) -> tuple[Rollouts, Tensor]:
        found = sample_rollouts(
            policy, self.prompts, group=group, length=LENGTH, generator=draw, decode=self.tokenizer.decode
        )
        return found, torch.tensor([-float(text.lower().count("e")) for text in found.texts or ()])

    @torch.no_grad()
    def __call__(self, policy: Any, draw: torch.Generator, *, group: int) -> dict[str, Any]:
        found, rewards = self.rollouts(policy, draw, group)
        given = (found.ids, found.attention_mask, found.completion_mask)
        reference = completion_log_probs(self.reference, *given).log_probs
        gap = sequence_log_probs(found.log_probs - reference, found.completion_mask)
        return {
            "reward": rewards.mean().item(), "kl": gap.mean().item(), "rewards": rewards.view(-1, group),
            "distinct": distinct_n(found.completion_ids, found.completion_mask, 3),
        }  # fmt: skip


def _align_prose(name: str, policy: Any, scored: _Scored, seed: int) -> list[dict[str, Any]]:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=TEXT_RATE, weight_decay=0.0)
    method = _method(name) if name == "RL" else Grpo(
        beta=TEXT_BETA, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
        clip_low=math.inf, clip_high=math.inf,
    )  # fmt: skip
    rows = []
    for step in range(TEXT_STEPS):
        draw = generator(seed, "prose", name, step)
        found, rewards = scored.rollouts(policy, draw, GROUP)
        given = (found.ids, found.attention_mask, found.completion_mask)
        batch: dict[str, Any] = {
            "rewards": rewards, "completion_mask": found.completion_mask, "old_log_prob": found.log_probs,
        }  # fmt: skip
        if name == "KL-RL":
            with torch.no_grad():
                batch["reference_log_prob"] = completion_log_probs(scored.reference, *given).log_probs
        batch = method.prepare(batch, group=GROUP, generator=draw)
        loss, _ = method.loss(completion_log_probs(policy, *given).log_probs, batch, count=method.count(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            distinct = distinct_n(found.completion_ids, found.completion_mask, 3)
            rows.append({
                "part": "prose", "method": name, "step": float(step + 1), "reward": rewards.mean().item(),
                "distinct": distinct,
            })  # fmt: skip
    return rows


def _resampled(base: Mapping[str, Any], trained: Mapping[str, Any]) -> float:
    """By what share of its gain in reward a trained policy is ahead of resampling the base's samples at the same KL.

    Each prompt's samples are weighted by exp(r / b); b is found by bisection, the KL is that of the weights.
    """
    rewards = base["rewards"].double()
    low, high = 0.0, 50.0
    for _ in range(60):
        inverse = 0.5 * (low + high)
        weights = (inverse * rewards).softmax(1)
        spent = (weights * (weights * rewards.shape[1]).clamp(min=1e-300).log()).sum(1).mean().item()
        low, high = (inverse, high) if spent < trained["kl"] else (low, inverse)
    reached = (weights * rewards).sum(1).mean().item()
    return (trained["reward"] - reached) / max(abs(trained["reward"] - base["reward"]), 1e-9)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Entropy and distance in the world, the bracket of the evidence, and variety in the prose."""
    first = rows[0]["seed"]
    with figure(path, columns=4, size=(3.4, 3.2)) as axes:
        for place, (key, label) in enumerate({"entropy": "entropy (nats)", "distance": "TV to the posterior"}.items()):
            for name, color in METHODS.items():
                for seed in sorted({row["seed"] for row in rows}):
                    found = [r for r in rows if (r["part"], r["method"], r["seed"]) == ("world", name, seed)]
                    title = name if seed == first else None
                    axes[place].plot([r["step"] for r in found], [r[key] for r in found], color=color, label=title)
            axes[place].set(xlabel="step", ylabel=label)
        axes[1].set_yscale("log")
        axes[0].legend(frameon=False, fontsize=7)
        found = [r for r in rows if (r["part"], r["method"], r["seed"]) == ("world", "KL-RL", first)]
        for key, color in (("elbo", "C0"), ("eubo", "C3")):
            axes[2].plot([r["step"] for r in found], [r[key] for r in found], color=color, label=key.upper())
        axes[2].set(xlabel="step", ylabel="bounds of log Z, KL-RL")
        axes[2].legend(frameon=False, fontsize=7)
        for name in ("RL", "KL-RL"):
            for seed in sorted({row["seed"] for row in rows}):
                found = [r for r in rows if (r["part"], r["method"], r["seed"]) == ("prose", name, seed)]
                axes[3].plot([r["step"] for r in found], [r["distinct"] for r in found], color=METHODS[name])
        axes[3].set(xlabel="step", ylabel="distinct trigrams, prose", ylim=(0, 1))
