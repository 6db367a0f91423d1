"""Teachers that are not in memory: a folder of truncated distributions, or a server.

Shapes: B batch, T positions, K tokens kept. A live model is `kullback.distill._hf.LiveTeacher`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError
from kullback.core.files import atomic_directory
from kullback.core.types import Teacher, TeacherOutput
from kullback.distill.top_k import keep_top, truncation_bound

__all__ = [
    "Blocks", "CacheSummary", "CachedTeacher",
    "is_teacher_cache", "sequence_key", "teacher_logits", "write_teacher_cache",
]  # fmt: skip

_INDEX = "teacher-cache.json"


class Blocks(Protocol):
    """A dataset of token sequences, each {"input_ids": [T]}."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSummary:
    """What a teacher cache holds and costs.

    bytes_per_token: stored bytes by position; tail_mass: mean probability that the kept tokens leave; kl_bound: mean
    bound, in nats, on what truncation takes from KL(teacher || student) for a student uniform over the tail, and
    kl_bound_1000 for one whose tail tokens fall to a thousandth of that.
    """

    vocabulary: int
    kept: int
    length: int
    sequences: int
    temperature: float
    bytes_per_token: float
    tail_mass: float
    tail_mass_99: float
    kl_bound: float
    kl_bound_1000: float


def is_teacher_cache(folder: str | Path) -> bool:
    """Whether `folder` was written by `write_teacher_cache`."""
    return (Path(folder).expanduser() / _INDEX).is_file()


def write_teacher_cache(
    teacher: Callable[[Tensor], Tensor],
    blocks: Blocks,
    folder: Path,
    *,
    kept: int,
    vocabulary: int,
    temperature: float = 1.0,
    batch: int = 8,
    shard: int = 1024,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> CacheSummary:
    """Store the `kept` most likely tokens of softmax(logits / temperature) at every position of `blocks`.

    teacher: ids [B, T] -> logits [B, T, V]; blocks: items with input_ids [T], all of one length; shard: sequences a
    file; tokenizer: kept with the cache, so that a student of another one is refused; progress: called with the
    sequences done and all. The folder appears whole or not at all. Raises DataError when there is nothing to store or
    the teacher's logits are not finite.
    """
    if not len(blocks):
        raise DataError("there is no block of text to ask the teacher about: give more text, or shorter blocks")
    length = len(blocks[0]["input_ids"])
    tails, bounds, keys, stored = [], [], [], 0
    with atomic_directory(folder) as place:
        for number, start in enumerate(range(0, len(blocks), shard)):
            rows: list[dict[str, Tensor]] = []
            for low in range(start, min(start + shard, len(blocks)), batch):
                high = min(low + batch, start + shard, len(blocks))
                ids = torch.stack([blocks[index]["input_ids"] for index in range(low, high)])
                rows.append(_truncated(teacher(ids), kept, vocabulary, temperature))
                keys += [sequence_key(row) for row in ids]
                if progress is not None:
                    progress(high, len(blocks))
            tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            stored += _write_shard(place / f"shard-{number:05d}.safetensors", tensors)
            top, tail = tensors["log_probs"].float(), tensors["tail"].float()
            tails.append(tail.exp().flatten())
            bounds.append(truncation_bound(top, tail, vocabulary).flatten())
        summary = _summary(
            torch.cat(tails), torch.cat(bounds), stored, kept, vocabulary, length, len(blocks), temperature
        )
        index = {"format": 1, "shard": shard, "summary": asdict(summary), "keys": keys}
        (place / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(place / "tokenizer")
    return summary


class CachedTeacher:
    """A teacher read from a cache: only the sequences that were stored, at the temperature that they were stored at.

    Raises DataError for a damaged cache or a sequence that is not in it, ConfigError for another temperature.
    """

    def __init__(self, folder: Path, *, temperature: float = 1.0) -> None:
        folder = Path(folder).expanduser()
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.summary = CacheSummary(**index["summary"])
            self._shard, self._rows = int(index["shard"]), {key: row for row, key in enumerate(index["keys"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a readable teacher cache: write it again with teacher-cache") from error
        if temperature != self.summary.temperature:
            raise ConfigError(
                f"the cache was written at temperature {self.summary.temperature} and the objective asks for "
                f"{temperature}: a truncated distribution cannot be tempered, so write the cache at that temperature"
            )
        self.folder, self.vocabulary = folder, self.summary.vocabulary
        self._files: dict[int, Any] = {}

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherOutput:
        """The stored distributions for ids [B, T]: top_ids and top_log_probs [B, T, K], tail_log_prob [B, T]."""
        picked = [self._row(sequence) for sequence in ids.cpu()]
        top, log_probs, tail = (torch.stack(column).to(ids.device) for column in zip(*picked, strict=True))
        return TeacherOutput(top_ids=top.long(), top_log_probs=log_probs.float(), tail_log_prob=tail.float())

    def _row(self, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = self._rows.get(sequence_key(sequence))
        if row is None:
            raise DataError(
                f"a sequence of {len(sequence)} tokens is not in the teacher cache {self.folder}: train on the text, "
                "the tokenizer and the block length that it was written with (on-policy steps need a live teacher)"
            )
        shard, offset = divmod(row, self._shard)
        if shard not in self._files:
            from safetensors import SafetensorError, safe_open

            try:
                self._files[shard] = safe_open(self.folder / f"shard-{shard:05d}.safetensors", "pt")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"shard {shard} of the teacher cache {self.folder} is damaged: write it again"
                ) from error
        file = self._files[shard]
        ids, log_probs, tail = (file.get_slice(name)[offset] for name in ("ids", "log_probs", "tail"))
        return ids.view(torch.uint16).int() if ids.dtype == torch.int16 else ids, log_probs, tail


def sequence_key(ids: Tensor) -> str:
    """What a sequence of token ids is found by in a cache."""
    return hashlib.blake2b(ids.to(torch.int64).contiguous().numpy().tobytes(), digest_size=12).hexdigest()


def teacher_logits(teacher: Teacher) -> Callable[[Tensor], Tensor]:
    """The whole logits [B, T, V] of a live teacher, for writing a cache.

    Raises ConfigError for a teacher that is truncated already.
    """

    def logits(ids: Tensor) -> Tensor:
        out = teacher(ids, torch.ones_like(ids))
        if out.logits is not None:
            return out.logits
        if out.hidden is None or out.weight is None:
            raise ConfigError("a cache is written from a live teacher: name its model directory")
        return torch.nn.functional.linear(out.hidden, out.weight, out.bias)

    return logits


def _truncated(logits: Tensor, kept: int, vocabulary: int, temperature: float) -> dict[str, Tensor]:
    log_p = torch.log_softmax(logits[..., :vocabulary].float() / temperature, -1)
    if not torch.isfinite(log_p.max()):
        raise DataError("the teacher's logits are not finite: its weights are damaged, or bfloat16 overflowed")
    ids, top, tail = keep_top(log_p, kept)
    small = vocabulary <= 1 << 16
    stored = torch.from_numpy(ids.numpy().astype(np.uint16).view(np.int16)) if small else ids.int()
    return {"ids": stored, "log_probs": top.half(), "tail": tail.half()}


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> int:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path.stat().st_size


def _summary(
    tail: Tensor,
    bound: Tensor,
    stored: int,
    kept: int,
    vocabulary: int,
    length: int,
    sequences: int,
    temperature: float,
) -> CacheSummary:
    mass = float(tail.mean())
    return CacheSummary(
        vocabulary=vocabulary, kept=kept, length=length, sequences=sequences, temperature=temperature,
        bytes_per_token=stored / (sequences * length),
        tail_mass=mass,
        tail_mass_99=float(np.quantile(tail.numpy(), 0.99)),
        kl_bound=float(bound.mean()),
        kl_bound_1000=float(bound.mean()) + mass * float(np.log(1000.0)),
    )  # fmt: skip
