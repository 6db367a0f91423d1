"""The panel of real text: a byte-level model of prose, fine-tuned on docstrings; how far it drifts at which rate."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kullback.align.implicit import FSFT, drift_report, matching_divergence
from kullback.align.log_probs import completion_log_probs
from kullback.align.methods import Method, Supervised
from kullback.align.rollouts import sample_rollouts
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.data.corpora import corpus
from kullback.models.small import trained_llama

__all__ = ["on_docstrings"]

PROMPT, LENGTH, STEPS, BATCH = 16, 48, 60, 16
MODULES, HELD_OUT, SAMPLES = 60, 128, 128
LARGE = 3e-3
BETA = 0.05  # about one over the log-ratio of 48 bytes
# name -> divergence and learning rate, at one number of steps
RUNS: Mapping[str, tuple[str, float]] = {
    "SFT": ("tv", LARGE), "SFT, rate / 5": ("tv", LARGE / 5),
    "SFT, rate / 10": ("tv", LARGE / 10), "chi-squared": ("chi2", LARGE), "Hellinger": ("hellinger", LARGE),
    "Jensen-Shannon": ("js", LARGE),
}  # fmt: skip


def _docstrings(modules: Sequence[str]) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in modules:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def _windows(modules: Sequence[str], tokenizer: Any) -> Tensor:
    """Windows [n, PROMPT + LENGTH] of the docstrings of modules, each from the start of one that is long enough."""
    size = PROMPT + LENGTH
    found = [tokenizer(text).input_ids[:size] for text in _docstrings(modules)]
    return torch.tensor([ids for ids in found if len(ids) == size])


def _log_probs(model: Any, ids: Tensor) -> Tensor:
    return completion_log_probs(model, ids, torch.ones_like(ids), torch.ones(len(ids), LENGTH).bool()).log_probs


def _tuned(policy: Any, base: Any, method: Method, rate: float, shown: Tensor, seed: int) -> None:
    """Fine-tuning on the windows shown, in place."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    draw = generator(seed, "docstrings")
    for _ in range(STEPS):
        ids = shown[torch.randint(len(shown), (BATCH,), generator=draw)]
        with torch.no_grad():
            known = _log_probs(base, ids)
        batch = {"completion_mask": torch.ones(BATCH, LENGTH).bool(), "reference_log_prob": known}
        optimizer.zero_grad()
        loss, _ = method.loss(_log_probs(policy, ids), batch, count=method.count(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _measured(policy: Any, base: Any, unseen: Tensor, seed: int) -> dict[str, float]:
    """Nats a byte on docstrings not seen, and the drift of what the policy writes after their first bytes."""
    rows = torch.arange(SAMPLES) % len(unseen)
    drawn = sample_rollouts(
        policy, unseen[rows, :PROMPT].tolist(), group=1, length=LENGTH, generator=generator(seed, "samples")
    )
    known = completion_log_probs(base, drawn.ids, drawn.attention_mask, drawn.completion_mask).log_probs
    report = drift_report(known, drawn.log_probs, drawn.completion_mask)
    nats = -_log_probs(policy, unseen).mean().item()
    return {"nats": nats, "drift": report["kl_token"], "entropy": report["entropy"]}


def on_docstrings(run: Run) -> list[dict[str, Any]]:
    """One row a way of fine-tuning: the loss on docstrings not seen and the drift, both in nats a byte."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained_llama(vocabulary=257, hidden=64, layers=2, heads=2, length=64, steps=300, batch=32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    code = corpus("code")
    shown, unseen = _windows(code.train[:MODULES], tokenizer), _windows(code.validation[:MODULES], tokenizer)[:HELD_OUT]
    rows = [{"study": "text", "method": "base", "rate": 0.0, **_measured(base, base, unseen, run.seed)}]
    for name, (divergence, rate) in RUNS.items():
        policy = AutoModelForCausalLM.from_pretrained(folder)
        method: Method = Supervised()
        if divergence != "tv":
            method = FSFT(divergence=matching_divergence(divergence), beta=BETA)  # type: ignore[arg-type]
        _tuned(policy, base, method, rate, shown, run.seed)
        rows.append({"study": "text", "method": name, "rate": rate, **_measured(policy.eval(), base, unseen, run.seed)})
        run.event("text", **rows[-1])
    return rows
