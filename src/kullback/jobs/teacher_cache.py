"""The job behind `kullback teacher-cache`: a teacher's distributions over a text, stored once for many trainings."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.core.errors import CheckpointError, ConfigError
from kullback.jobs._training import Listener
from kullback.jobs.distill import TextConfig

if TYPE_CHECKING:
    from kullback.distill.teachers import CacheSummary

__all__ = ["TeacherCacheConfig", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCacheConfig:
    """teacher: a model directory, empty for the embedded one; data: the text, packed as `kullback distill` will; kept:
    tokens kept at each position; drawn: tokens drawn from the rest, by `seed`, so that no mass is lost on average;
    temperature: the one that training will use; batch: sequences the teacher reads at once.
    """

    teacher: str = ""
    data: TextConfig = field(default_factory=TextConfig)
    kept: int = 32
    drawn: int = 8
    seed: int = 0
    temperature: float = 1.0
    batch: int = 8


def run(config: TeacherCacheConfig, out: Path, *, listen: Listener | None = None) -> CacheSummary:
    """Write the cache folder `out`, whole or not at all, and say what it holds.

    Raises ConfigError or DataError for input that cannot work, and CheckpointError when `out` is there already.
    """
    from kullback.jobs._models import without_bars

    listen = listen or (lambda event: None)
    if out.exists():
        raise CheckpointError(f"{out} is there already: choose another folder for the cache, or remove it")
    if not 0 < config.temperature < math.inf:
        raise ConfigError(f"temperature must be positive and finite, got {config.temperature}")
    if config.data.length < 2:
        raise ConfigError(f"data.length must be at least 2 tokens, got {config.data.length}")
    if config.batch < 1:
        raise ConfigError(f"batch is a number of sequences, at least 1, got {config.batch}")
    if config.drawn < 0:
        raise ConfigError(f"drawn is a number of tokens, at least 0, got {config.drawn}")
    with without_bars():
        return _write(config, out, listen)


def _write(config: TeacherCacheConfig, out: Path, listen: Listener) -> CacheSummary:
    from torch.utils.data import ConcatDataset

    from kullback.data.packing import load_packed
    from kullback.distill._hf import LiveTeacher
    from kullback.distill.teachers import teacher_logits, write_teacher_cache
    from kullback.jobs._models import check_length, load_model, load_tokenizer
    from kullback.jobs._texts import pack_texts

    folder = config.teacher or str(_embedded_teacher(listen))
    model, tokenizer = load_model(folder, role="teacher"), load_tokenizer(folder, role="teacher")
    check_length(model, config.data.length, role="teacher")
    with tempfile.TemporaryDirectory(prefix="kullback-") as scratch:
        pack_texts(config.data, tokenizer, Path(scratch), listen)
        blocks: Any = ConcatDataset([load_packed(Path(scratch) / split) for split in ("train", "validation")])
        listen(
            {"kind": "part", "text": f"asking the teacher about {len(blocks)} blocks of {config.data.length} tokens"}
        )
        return write_teacher_cache(
            teacher_logits(LiveTeacher(model)),
            blocks,
            out,
            kept=config.kept,
            drawn=config.drawn,
            seed=config.seed,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            temperature=config.temperature,
            batch=config.batch,
            tokenizer=tokenizer,
            progress=lambda done, of: listen({"kind": "progress", "unit": "block", "step": done, "steps": of}),
        )


def _embedded_teacher(listen: Listener) -> Path:
    from kullback.models.small import trained_llama

    listen({"kind": "stage", "text": "the embedded teacher (trained once, then kept in the cache)"})
    return trained_llama(listen=listen)
