"""How far a student is from the text and from its teacher: cross-entropy, perplexity, divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kullback.core.types import Divergence, Teacher
from kullback.distill.objective import Objective
from kullback.divergences import kl
from kullback.models.heads import has_plain_head, replaced_head

__all__ = ["measure", "measure_truncated"]


@torch.no_grad()
def measure(
    model: Any,
    blocks: Sequence[dict[str, Tensor]],
    teacher: Teacher | None = None,
    *,
    divergence: Divergence = kl,
    temperature: float = 1.0,
    batch: int = 8,
    vocabulary: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Mean cross-entropy (nats a token), its perplexity and, with a teacher, the mean divergence (nats a token).

    temperature: of both distributions that the divergence compares. blocks: items with input_ids [T] and, where not all
    count, labels [T] that are -100 there; model: a causal language model or its DDP or FSDP wrapper; reduce: sums a
    tensor over processes that each hold as many blocks of their own.
    """
    hard = Objective(divergence=divergence, cross_entropy=1.0)
    soft = Objective(divergence=divergence, temperature=temperature)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    try:
        for start in range(0, len(blocks), batch):
            items = [blocks[index] for index in range(start, min(start + batch, len(blocks)))]
            ids = torch.stack([item["input_ids"] for item in items]).to(device)
            labels = torch.stack([item.get("labels", item["input_ids"]) for item in items]).to(device)
            totals += _batch_totals(model, ids, labels, teacher, (hard, soft), vocabulary)
    finally:
        model.train(training)
    tokens, cross_entropy, distance = (totals if reduce is None else reduce(totals)).tolist()
    found = {"cross_entropy": cross_entropy / max(tokens, 1)}
    found["perplexity"] = math.exp(min(found["cross_entropy"], 700.0))
    if teacher is not None:
        found["divergence"] = distance / max(tokens, 1)
    return found


def measure_truncated(teacher: Teacher, blocks: Sequence[dict[str, Tensor]], *, batch: int = 8) -> dict[str, float]:
    """Cross-entropy (nats a token) and perplexity of a truncated teacher that says how probable the next tokens are.

    Empty for one that does not say. blocks: as those of `measure`.
    """
    tokens, total = 0, 0.0
    for start in range(0, len(blocks), batch):
        items = [blocks[index] for index in range(start, min(start + batch, len(blocks)))]
        ids = torch.stack([item["input_ids"] for item in items])
        counted = torch.stack([item.get("labels", item["input_ids"]) for item in items])[:, 1:] != -100
        said = teacher(ids, torch.ones_like(ids)).label_log_probs
        if said is None:
            return {}
        tokens, total = tokens + int(counted.sum()), total - float(said[:, :-1].cpu().double()[counted].sum())
    cross_entropy = total / max(tokens, 1)
    return {"cross_entropy": cross_entropy, "perplexity": math.exp(min(cross_entropy, 700.0))}


def _batch_totals(
    model: Any, ids: Tensor, labels: Tensor, teacher: Teacher | None, terms: tuple[Objective, ...], size: int | None
) -> Tensor:
    mask = torch.ones_like(ids)
    target = None if teacher is None else teacher(ids, mask)
    parts = terms if teacher is not None else terms[:1]

    def sums(student: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return torch.stack([part.loss(target, student, labels, weight=weight, bias=bias, count=1) for part in parts])

    bare = getattr(model, "module", model)
    if has_plain_head(bare):
        head = bare.get_output_embeddings()
        bias = None if head.bias is None else head.bias[:size]
        with replaced_head(bare, lambda hidden: sums(hidden, head.weight[:size], bias)):
            found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    else:
        found = sums(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., :size])
    tokens = int((labels[:, 1:] != -100).sum())
    return torch.tensor([tokens, *found.tolist(), *[0.0] * (2 - len(parts))], dtype=torch.float64, device=ids.device)
