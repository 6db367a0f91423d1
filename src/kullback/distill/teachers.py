"""Teachers that are not in memory: a folder of truncated distributions, or a server.

Shapes: B batch, T positions, K tokens kept. A live model is `kullback.distill._hf.LiveTeacher`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError
from kullback.core.files import atomic_directory
from kullback.core.rng import generator as stream
from kullback.core.types import Teacher, TeacherOutput
from kullback.distill.top_k import keep_top, sample_tail, truncation_bound

__all__ = [
    "Blocks", "CacheSummary", "CachedTeacher",
    "is_teacher_cache", "sequence_key", "teacher_logits", "write_teacher_cache",
]  # fmt: skip

_INDEX = "teacher-cache.json"
_FORMAT = 3  # 1 had no label_log_probs, 1 and 2 no entropy


class Blocks(Protocol):
    """A dataset of token sequences, each {"input_ids": [T]}."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSummary:
    """What a teacher cache holds and costs.

    kept, drawn: tokens at each position that are the most likely, and that are drawn from the rest; bytes_per_token:
    stored bytes by position; tail_mass: mean probability that the kept tokens leave; kl_bound: mean bound, in nats, on
    what truncation takes from KL(teacher || student) for a student uniform over the tail, and kl_bound_1000 for one
    whose tail tokens fall to a thousandth of that. Drawn tokens give it back on average.
    """

    vocabulary: int
    kept: int
    drawn: int
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
    drawn: int = 0,
    temperature: float = 1.0,
    batch: int = 8,
    shard: int = 1024,
    seed: int = 0,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> CacheSummary:
    """Store the `kept` most likely tokens of softmax(logits / temperature) at every position of `blocks`, how probable
    the token is that comes next, and the entropy of softmax(logits).

    teacher: ids [B, T] -> logits [B, T, V]; blocks: items with input_ids [T], all of one length; shard: sequences a
    file; tokenizer: kept with the cache, so that a student of another one is refused; progress: called with the
    sequences done and all; drawn: tokens drawn from the rest at each position, from the stream of `seed`. The folder
    appears whole or not at all. Raises DataError when there is nothing to store or
    the teacher's logits are not finite.
    """
    if not len(blocks):
        raise DataError("there is no block of text to ask the teacher about: give more text, or shorter blocks")
    length = len(blocks[0]["input_ids"])
    keys: list[str] = []
    tally = _Tally()
    draw = stream(seed, "tails of a teacher cache")
    with atomic_directory(folder) as place:
        for number, start in enumerate(range(0, len(blocks), shard)):
            rows: list[dict[str, Tensor]] = []
            for low in range(start, min(start + shard, len(blocks)), batch):
                high = min(low + batch, start + shard, len(blocks))
                ids = torch.stack([blocks[index]["input_ids"] for index in range(low, high)])
                rows.append(_truncated(teacher(ids), ids, kept, vocabulary, temperature, drawn, draw))
                keys += [sequence_key(row) for row in ids]
                if progress is not None:
                    progress(high, len(blocks))
            tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            stored = _write_shard(place / f"shard-{number:05d}.safetensors", tensors)
            tally.add(tensors, stored, vocabulary)
        summary = tally.summary(
            vocabulary=vocabulary, kept=kept, drawn=drawn, length=length, sequences=len(blocks), temperature=temperature
        )
        index = {"format": _FORMAT, "shard": shard, "summary": asdict(summary), "keys": keys}
        (place / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(place / "tokenizer")
    return summary


class CachedTeacher:
    """A teacher read from a cache: only the sequences that were stored, at the temperature that they were stored at.

    has_labels: whether it says how probable the next token is, which caches of the first format do not; has_entropy:
    whether it gives the entropy of the whole distribution, which those of the first two do not. Raises DataError for a
    damaged cache or a sequence that is not in it, ConfigError for another temperature.
    """

    def __init__(self, folder: Path, *, temperature: float = 1.0) -> None:
        folder = Path(folder).expanduser()
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.summary = CacheSummary(**index["summary"])
            self._shard, self._rows = int(index["shard"]), {key: row for row, key in enumerate(index["keys"])}
            version = int(index["format"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a readable teacher cache: write it again with teacher-cache") from error
        if not 1 <= version <= _FORMAT:
            raise DataError(f"{folder} is a teacher cache of format {version}, and this version reads up to {_FORMAT}")
        self.has_labels, self.has_entropy = version >= 2, version >= 3
        self._tensors = {"ids", "log_probs", "tail"} | ({"label_log_probs"} if self.has_labels else set())
        self._tensors |= {"entropy"} if self.has_entropy else set()
        self._tensors |= {"drawn_ids", "drawn_log_probs"} if self.summary.drawn else set()
        if temperature != self.summary.temperature:
            raise ConfigError(
                f"the cache was written at temperature {self.summary.temperature} and the objective asks for "
                f"{temperature}: a truncated distribution cannot be tempered, so write the cache at that temperature"
            )
        self.folder, self.vocabulary = folder, self.summary.vocabulary
        self._files: dict[int, Any] = {}

    @property
    def kept(self) -> int:
        """Tokens kept at each position."""
        return self.summary.kept

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherOutput:
        """The stored distributions for ids [B, T]: the K tokens kept, the mass of the rest, the M drawn from it, the
        next token's probability and the whole entropy.
        """
        picked = [self._row(sequence) for sequence in ids.cpu()]
        found = {name: torch.stack([row[name] for row in picked]).to(ids.device) for name in picked[0]}
        out = TeacherOutput(
            top_ids=found["ids"].long(), top_log_probs=found["log_probs"].float(), tail_log_prob=found["tail"].float()
        )
        if self.has_labels:
            out = out._replace(label_log_probs=found["label_log_probs"].float())
        if self.has_entropy:
            out = out._replace(entropy=found["entropy"].float())
        if not self.summary.drawn:
            return out
        return out._replace(tail_ids=found["drawn_ids"].long(), tail_log_probs=found["drawn_log_probs"].float())

    def _row(self, sequence: Tensor) -> dict[str, Tensor]:
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
        found = {name: file.get_slice(name)[offset] for name in file.keys()}  # noqa: SIM118 - it has no iterator
        if self._tensors - found.keys():
            raise DataError(f"shard {shard} of the teacher cache {self.folder} is damaged: write it again")
        return {name: x.view(torch.uint16).int() if x.dtype == torch.int16 else x for name, x in found.items()}


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


def _truncated(
    logits: Tensor, ids: Tensor, kept: int, vocabulary: int, temperature: float, drawn: int, draw: torch.Generator
) -> dict[str, Tensor]:
    logits = logits[..., :vocabulary].float()
    log_p = torch.log_softmax(logits / temperature, -1)
    if not torch.isfinite(log_p.max()):
        raise DataError("the teacher's logits are not finite: its weights are damaged, or bfloat16 overflowed")
    entropy = torch.special.entr(log_p.exp() if temperature == 1.0 else logits.softmax(-1)).sum(-1)
    top_ids, top, tail = keep_top(log_p, kept)
    following = ids.roll(-1, -1).clamp(max=vocabulary - 1)  # what follows the last token is never compared with a label
    label = log_p.gather(-1, following.unsqueeze(-1)).squeeze(-1)
    stored = {
        "ids": _small(top_ids, vocabulary), "log_probs": top.half(), "tail": tail.half(),
        "label_log_probs": label.half(), "entropy": entropy,  # whole digits: BD-KD compares it with another
    }  # fmt: skip
    if drawn:
        picked, log_probs = sample_tail(log_p, top_ids, drawn, draw)
        stored |= {"drawn_ids": _small(picked, vocabulary), "drawn_log_probs": log_probs.half()}
    return stored


def _small(ids: Tensor, vocabulary: int) -> Tensor:
    """Token ids in two bytes where they fit; safetensors has no unsigned ones in old versions."""
    return torch.from_numpy(ids.numpy().astype(np.uint16).view(np.int16)) if vocabulary <= 1 << 16 else ids.int()


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> int:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path.stat().st_size


class _Tally:
    """Means over all positions, and the share below each per mille of tail mass, in bounded memory."""

    def __init__(self) -> None:
        self.positions, self.bytes, self.mass, self.bound = 0, 0, 0.0, 0.0
        self.below = np.zeros(1000, dtype=np.int64)

    def add(self, tensors: dict[str, Tensor], stored: int, vocabulary: int) -> None:
        top, tail = tensors["log_probs"].float(), tensors["tail"].float()
        mass = tail.exp().clamp(max=1.0)
        self.positions, self.bytes = self.positions + tail.numel(), self.bytes + stored
        self.mass += float(mass.double().sum())
        self.bound += float(truncation_bound(top, tail, vocabulary).double().sum())
        self.below += np.histogram(mass.numpy(), bins=1000, range=(0.0, 1.0))[0]

    def summary(self, **known: Any) -> CacheSummary:
        mass, bound = self.mass / self.positions, self.bound / self.positions
        reached = int(np.searchsorted(np.cumsum(self.below), 0.99 * self.positions)) + 1
        return CacheSummary(
            bytes_per_token=self.bytes / self.positions,
            tail_mass=mass,
            tail_mass_99=reached / 1000,
            kl_bound=bound,
            kl_bound_1000=bound + mass * math.log(1000.0),
            **known,
        )
