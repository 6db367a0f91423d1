"""Small Llama-style language models: fresh from a configuration, or trained on the spot and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError
from kullback.core.rng import generator as stream
from kullback.data.cache import cached
from kullback.data.corpora import Corpus
from kullback.data.corpora import corpus as corpus_of
from kullback.data.tokenizer import train_byte_bpe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["small_llama", "trained_llama"]

_MEASURED = 256  # blocks of the validation split, evenly spread, that the cross-entropy is taken on at most

Listener = Callable[[Mapping[str, Any]], None]


def small_llama(
    vocabulary: int, *, hidden: int, layers: int, heads: int, length: int, generator: torch.Generator
) -> LlamaForCausalLM:
    """A causal language model with fresh weights, all drawn from `generator`; input and output embeddings are not tied.

    vocabulary: tokens; hidden: width, shared among `heads` attention heads; length: positions. The feed-forward width
    is 8/3 of hidden, rounded up to a multiple of 16. Weights are normal: of deviation 1 in the embedding, 0.02 in the
    head, and 1 / sqrt(inputs) elsewhere, those that write to the residual stream divided by sqrt(2 layers); scales of
    norms are 1. It has no end token: set `config.eos_token_id` for generation that ends. Raises ConfigError for sizes
    that do not fit.

    >>> model = small_llama(300, hidden=16, layers=1, heads=2, length=8, generator=torch.Generator().manual_seed(0))
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 300])
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocabulary": vocabulary, "hidden": hidden, "layers": layers, "heads": heads, "length": length}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")
    if hidden % (2 * heads):
        raise ConfigError(f"hidden must be a multiple of 2 x heads for rotary positions, got {hidden} and {heads}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 48) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    # The layers draw weights of their own as they are made: from a copy of the global state, and they are not kept.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _deviation(name, parameter, layers), generator=generator)
    return model


def _deviation(name: str, weight: Tensor, layers: int) -> float:
    # An embedding as large as what the layers add to it is what makes a small model learn fast from little text.
    if "embed_tokens" in name:
        return 1.0
    if "lm_head" in name:
        return 0.02
    writes = "o_proj" in name or "down_proj" in name
    return float((weight.shape[1] * (2 * layers if writes else 1)) ** -0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """All that a trained model depends on; `text` is the digest of its corpus, `torch` the version that computes it."""

    corpus: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    length: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    text: str
    torch: str
    recipe: int = 1


def trained_llama(
    *,
    corpus: Literal["prose", "code"] = "prose",
    vocabulary: int = 2048,
    hidden: int = 256,
    layers: int = 4,
    heads: int = 4,
    length: int = 128,
    steps: int = 250,
    batch: int = 8,
    learning_rate: float = 3e-3,
    seed: int = 0,
    listen: Listener | None = None,
) -> Path:
    """The directory of a small model trained on a corpus, with its tokenizer: made once, then taken from the cache.

    Trained on the train split with AdamW, a warm-up and a cosine, on `steps` batches of random windows of `length`
    tokens; the default, 4.2 million weights, takes about a minute on two cores. `training.json` beside the weights has
    the configuration and the cross-entropy on the validation split, in nats per token. The same configuration gives the
    same weights on one machine with one number of threads. listen: called with events of kind progress, loss and
    evaluation. Raises ConfigError for sizes that do not fit, CheckpointError when the cache cannot be written.
    """
    if min(steps, batch) < 1 or length < 2 or not learning_rate > 0.0:
        raise ConfigError(
            f"training needs steps, batch >= 1, length >= 2, learning_rate > 0: got {steps}, {batch}, {length}, "
            f"{learning_rate}"
        )
    texts = corpus_of(corpus)
    config = _Training(
        corpus=corpus, vocabulary=vocabulary, hidden=hidden, layers=layers, heads=heads, length=length, steps=steps,
        batch=batch, learning_rate=learning_rate, seed=seed, text=_digest(texts), torch=torch.__version__,
    )  # fmt: skip
    return cached("llama", config, lambda folder: _build(config, texts, folder, listen or (lambda event: None)))


def _digest(texts: Corpus) -> str:
    parts = ["\0".join(documents) for documents in (texts.train, texts.validation)]
    return hashlib.sha256("\0\0".join(parts).encode()).hexdigest()[:16]


def _build(config: _Training, texts: Corpus, folder: Path, listen: Listener) -> None:
    tokenizer = train_byte_bpe(texts.train, config.vocabulary)
    model = small_llama(
        len(tokenizer), hidden=config.hidden, layers=config.layers, heads=config.heads, length=config.length,
        generator=stream(config.seed, "model"),
    )  # fmt: skip
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    train, validation = (_ids(documents, tokenizer) for documents in (texts.train, texts.validation))
    if (tokens := min(len(train), len(validation))) < config.length:
        raise ConfigError(f"length is {config.length} and the corpus has {tokens} tokens in a split: lower it")
    _train(model, train, config, listen)
    loss = _cross_entropy(model, validation, config.length)
    listen({"kind": "evaluation", "step": config.steps, "cross_entropy": loss})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {**asdict(config), "validation_cross_entropy": loss, "parameters": model.num_parameters()}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _ids(documents: Iterable[str], tokenizer: Any) -> Tensor:
    return torch.tensor([token for text in documents for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)])


def _train(model: nn.Module, ids: Tensor, config: _Training, listen: Listener) -> None:
    draw, started = stream(config.seed, "windows"), time.monotonic()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        starts = torch.randint(len(ids) - config.length + 1, (config.batch,), generator=draw)
        loss = _loss(model, torch.stack([ids[start : start + config.length] for start in starts.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        listen({"kind": "loss", "step": step + 1, "loss": loss.item()})
        rate = (step + 1) / (time.monotonic() - started)
        listen({"kind": "progress", "step": step + 1, "steps": config.steps, "steps_a_second": rate})
    model.eval()


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rate: up over the first tenth, at most 20 steps, then a cosine down to a tenth."""
    warm = min((step + 1) / max(1, min(20, steps // 10)), 1.0)
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean cross-entropy [] of the tokens ids [B, T] but the first, each given those before it."""
    logits = model(input_ids=ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def _cross_entropy(model: nn.Module, ids: Tensor, length: int) -> float:
    blocks = ids[: len(ids) // length * length].view(-1, length)
    blocks = blocks[:: -(-len(blocks) // _MEASURED)]
    losses = [_loss(model, part).item() * len(part) for part in blocks.split(16)]
    return sum(losses) / len(blocks)
