"""Texts as blocks of tokens: tokenised once as they stream by, kept in a flat file, read through a memory map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kullback.core.errors import ConfigError, DataError
from kullback.core.files import atomic_directory

__all__ = ["PackedTokens", "load_packed", "pack"]

_INDEX, _TOKENS = "index.json", "tokens.bin"
_FORMAT = 1
_WIDTHS = {"uint16": 2, "uint32": 4}
_BATCH = 1 << 18  # characters tokenised at once: enough for every core, little enough for any memory
_CHECKED = 1 << 26  # bytes up to which the content is checked whenever it is opened, and not the size alone


class PackedTokens(Dataset):
    """The blocks of a folder that `pack` wrote: block i is {"input_ids": int64 [T]}, read from disk when asked for.

    tokens: all tokens in the file; length: T; documents: how many were packed. The last tokens that fill no block
    belong to none. Raises DataError when the folder is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.tokens, self.length, self.documents = index["tokens"], index["length"], index["documents"]
        self._ids = _open(self.folder / _TOKENS, index)

    def __len__(self) -> int:
        return int(self.tokens // self.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(len(self))[index] * self.length
        return {"input_ids": torch.from_numpy(self._ids[start : start + self.length].astype(np.int64))}

    def __reduce__(self) -> tuple[type[PackedTokens], tuple[Path]]:
        # A memory map would travel to a worker with all that it maps.
        return PackedTokens, (self.folder,)


def pack(documents: Iterable[str], tokenizer: Any, length: int, folder: Path) -> PackedTokens:
    """Tokenise the documents, an end token after each, into `folder`, to be read in blocks of `length` tokens.

    Documents are taken as they come, and no more of them is held than is tokenised at once. The folder is there whole
    or not at all. Raises ConfigError for a length below 1, DataError for a tokenizer without an end token, and
    CheckpointError when the folder cannot be written.
    """
    if length < 1:
        raise ConfigError(f"a block has 1 token or more, got length={length}")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token to part the documents with: set its eos_token")
    kind = "uint16" if max(len(tokenizer), tokenizer.eos_token_id + 1) <= 1 << 16 else "uint32"
    tokens, count, digest = 0, 0, hashlib.sha256()
    with atomic_directory(Path(folder)) as place:
        with open(place / _TOKENS, "wb") as file:
            for batch in _batches(documents):
                ids = _tokenised(batch, tokenizer).astype(np.dtype(kind).newbyteorder("<"))
                tokens, count = tokens + len(ids), count + len(batch)
                content = ids.tobytes()
                digest.update(content)
                file.write(content)
        index = {
            "format": _FORMAT, "dtype": kind, "tokens": tokens, "length": length, "documents": count,
            "sha256": digest.hexdigest(),
        }  # fmt: skip
        (place / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return PackedTokens(folder)


def load_packed(folder: Path) -> PackedTokens:
    """The blocks that `pack` wrote into `folder`. Raises DataError when it is missing or damaged."""
    return PackedTokens(folder)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenised(batch: list[str], tokenizer: Any) -> np.ndarray:
    # verbose=False: a document longer than the model's context is what packing is for, and no reason to warn.
    rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.asarray(part, dtype=np.uint32) for row in rows for part in (row, end)])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        sound = index["format"] == _FORMAT and index["dtype"] in _WIDTHS and isinstance(index["sha256"], str)
        numbers = [index[key] for key in ("length", "tokens", "documents")]
        sound = sound and all(type(number) is int for number in numbers) and index["length"] > 0
    except OSError as error:
        raise DataError(f"{folder} holds no packed tokens ({error.strerror}: {_INDEX}): pack the text first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove {folder} and pack the text again") from error
    if not sound:
        raise DataError(f"{path} is damaged or of another version: remove {folder} and pack the text again")
    return dict(index)


def _open(path: Path, index: dict[str, Any]) -> np.ndarray:
    expected = index["tokens"] * _WIDTHS[index["dtype"]]
    found = path.stat().st_size if path.is_file() else 0
    if found != expected or not path.is_file():
        raise DataError(f"{path} has {found} bytes and its index says {expected}: remove its folder and pack again")
    if not expected:  # nothing can be mapped
        return np.empty(0, dtype=np.uint16)
    ids = np.memmap(path, dtype=np.dtype(index["dtype"]).newbyteorder("<"), mode="r")
    if expected <= _CHECKED and hashlib.sha256(ids.data).hexdigest() != index["sha256"]:
        raise DataError(f"{path} has changed since it was packed: remove its folder and pack the text again")
    return ids
