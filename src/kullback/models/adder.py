"""A small model that adds numbers and is often wrong: what `kullback align` starts from when no model is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.rng import generator as stream
from kullback.data.arithmetic import sum_demonstrations
from kullback.data.cache import cached
from kullback.data.tokenizer import train_byte_bpe
from kullback.models.small import small_llama

__all__ = ["trained_adder"]

Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    limit: int
    copies: int
    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    torch: str
    recipe: int = 1


def trained_adder(
    *,
    limit: int = 20,
    copies: int = 16,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    steps: int = 500,
    batch: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    listen: Listener | None = None,
) -> Path:
    """The directory of a small model trained on `sum_demonstrations`: made once, then taken from the cache.

    limit: numbers added are below it; the default, 0.2 million weights, takes seconds. listen: called with events of
    kind progress. Raises ConfigError for sizes that do not fit, CheckpointError when the cache cannot be written.
    """
    config = _Training(
        limit=limit, copies=copies, hidden=hidden, layers=layers, heads=heads, steps=steps, batch=batch,
        learning_rate=learning_rate, seed=seed, torch=torch.__version__,
    )  # fmt: skip
    return cached("adder", config, lambda folder: _build(config, folder, listen or (lambda event: None)))


def _build(config: _Training, folder: Path, listen: Listener) -> None:
    tokenizer = train_byte_bpe([], 257)
    demonstrations = sum_demonstrations(config.limit, copies=config.copies, seed=config.seed)
    rows = [tokenizer(prompt).input_ids for prompt, _ in demonstrations]
    answers = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for _, answer in demonstrations]
    length = max(len(row) + len(answer) for row, answer in zip(rows, answers, strict=True))
    ids = torch.full((len(rows), length), tokenizer.eos_token_id)
    labels = torch.full((len(rows), length), -100)
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        whole = torch.tensor([*row, *answer])
        ids[index, : len(whole)] = whole
        labels[index, len(row) : len(whole)] = whole[len(row) :]
    model = small_llama(
        len(tokenizer), hidden=config.hidden, layers=config.layers, heads=config.heads, length=max(32, length),
        generator=stream(config.seed, "adder"),
    )  # fmt: skip
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    _train(model, ids, labels, config, listen)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def _train(model: nn.Module, ids: Tensor, labels: Tensor, config: _Training, listen: Listener) -> None:
    draw, started = stream(config.seed, "batches"), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps)
    model.train()
    for step in range(config.steps):
        chosen = torch.randint(len(ids), (config.batch,), generator=draw)
        logits = model(input_ids=ids[chosen]).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[chosen, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        rate = (step + 1) / (time.monotonic() - started)
        listen({"kind": "progress", "step": step + 1, "steps": config.steps, "steps_a_second": rate})
    model.eval()
