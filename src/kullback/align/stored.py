"""The reference's log-probabilities of given completions, computed once and kept on disk: no second model in training.

A folder holds, for each row that differs, a digest of its tokens (prompt and completion, without padding) and float32
log-probabilities of those inside its mask; so rows are found again in any order, batch and padding. Sums in half
precision would not do: near -300 their step is 0.25, and f-SFT and DPO compare differences of less than that.

Shapes: B rows of a prompt and T completion tokens, as `_hf.collate_completions` makes them; log-probabilities [B, T].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import DataError, ShapeError
from kullback.core.files import atomic_directory

__all__ = ["StoredReference", "store_reference"]

_VERSION = 1
_DIGEST = 16  # bytes: among 10^9 rows two alike have a chance of 10^-21


def store_reference(
    reference: Callable[[Tensor, Tensor, Tensor], Tensor], batches: Iterable[Mapping[str, Tensor]], folder: Path
) -> Path:
    """Ask the reference for every row of the batches and keep what it says in a new folder, which is returned.

    reference: such as `_hf.frozen_reference` of a model, with dropout off and in full precision; batches: with
    input_ids, attention_mask and completion_mask, of one shard of the data or of all; they are streamed. The folder
    appears whole or not at all. Raises DataError for log-probabilities that are no finite numbers and for no rows,
    ShapeError, CheckpointError where the folder cannot be written.
    """
    keys: dict[bytes, int] = {}
    with atomic_directory(Path(folder)) as new:
        with open(new / "values.f32", "wb") as file:
            for batch in batches:
                given = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
                found = reference(*given).detach().float().cpu()
                for key, values in zip(_keys(*given), _rows(found, given[2]), strict=True):
                    if key in keys:
                        continue
                    if not np.isfinite(values).all():
                        raise DataError("the reference's log-probabilities are not all finite: a token has no mass")
                    keys[key] = len(values)
                    file.write(values.tobytes())
        if not keys:
            raise DataError("no completion was given to be stored: look at the data set")
        np.save(new / "keys.npy", np.array(list(keys), dtype=f"S{_DIGEST}"))
        np.save(new / "lengths.npy", np.array(list(keys.values()), dtype=np.int64))
        told = {"version": _VERSION, "temperature": getattr(reference, "temperature", None), "rows": len(keys)}
        (new / "stored.json").write_text(json.dumps(told))
    return Path(folder)


class StoredReference:
    """A reference (see `_hf.Reference`) that looks up what `store_reference` has kept, in one folder or several shards.

    Called with a batch it gives log-probabilities [B, T], 0 outside the mask, and DataError for rows that were not
    stored. temperature: that of the reference. Raises DataError for folders that are damaged or whose temperatures
    differ.
    """

    def __init__(self, *folders: Path | str) -> None:
        shards = [_Shard(Path(folder)) for folder in folders]
        if not shards:
            raise DataError("a stored reference is read from a folder, and none was named")
        temperatures = {shard.temperature for shard in shards}
        if len(temperatures) > 1:
            raise DataError(f"the shards were stored at the temperatures {temperatures}: store them again at one")
        self._shards = shards
        self.temperature = 1.0 if shards[0].temperature is None else shards[0].temperature

    def __len__(self) -> int:
        return sum(len(shard.keys) for shard in self._shards)

    @torch.no_grad()
    def __call__(self, ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        rows = completion_mask.bool().cpu()
        found, missing = torch.zeros(rows.shape), 0
        for row, (key, mask) in enumerate(zip(_keys(ids, attention_mask, completion_mask), rows, strict=True)):
            values = next((v for shard in self._shards if (v := shard.find(key)) is not None), None)
            if values is None:
                missing += 1
            else:
                found[row, mask] = torch.from_numpy(values.copy())
        if missing:
            raise DataError(
                f"{missing} of {len(rows)} completions are not among the {len(self)} stored ones: store the reference "
                "for this data set, with its tokenizer and its limits of length"
            )
        return found.to(ids.device)


class _Shard:
    """One folder: sorted digests, and where the values of each lie in the file, which is mapped and not read."""

    def __init__(self, folder: Path) -> None:
        try:
            told = json.loads((folder / "stored.json").read_text())
            keys, lengths = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("keys", "lengths"))
            self.values = np.memmap(folder / "values.f32", dtype=np.float32, mode="r") if lengths.any() else _NOTHING
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no reference's log-probabilities ({error}): store them there") from error
        if told.get("version") != _VERSION or len(keys) != told["rows"] or lengths.sum() != len(self.values):
            raise DataError(f"{folder} is of another version or damaged: remove it and store the reference again")
        ends = lengths.cumsum()
        order = keys.argsort()
        self.temperature: float | None = told["temperature"]
        self.keys, self.begins, self.ends = keys[order], (ends - lengths)[order], ends[order]

    def find(self, key: bytes) -> np.ndarray | None:
        """The values of a row, None where it is not here."""
        wanted = np.array(key, dtype=self.keys.dtype)
        place = int(self.keys.searchsorted(wanted))
        if place == len(self.keys) or self.keys[place] != wanted:
            return None
        return self.values[self.begins[place] : self.ends[place]]


_NOTHING = np.zeros(0, dtype=np.float32)


def _keys(ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Iterator[bytes]:
    """A digest of each row's tokens and of which of them are counted, whatever the padding."""
    length = completion_mask.shape[-1]
    if ids.shape != attention_mask.shape or ids.ndim != 2 or completion_mask.shape != (len(ids), length):
        shapes = f"{tuple(ids.shape)}, {tuple(attention_mask.shape)} and {tuple(completion_mask.shape)}"
        raise ShapeError(f"ids and attention_mask are [B, L + T], completion_mask [B, T], got {shapes}")
    held = attention_mask.bool().cpu().numpy()
    counted = np.zeros_like(held)
    counted[:, held.shape[1] - length :] = completion_mask.bool().cpu().numpy()
    for row, real, mask in zip(ids.cpu().numpy().astype(np.int64), held, counted, strict=True):
        digest = hashlib.blake2b(row[real].tobytes(), digest_size=_DIGEST)
        digest.update(mask[real].tobytes())
        yield digest.digest()


def _rows(log_probs: Tensor, mask: Tensor) -> Iterator[np.ndarray]:
    """The values inside the mask of each row."""
    if log_probs.shape != mask.shape:
        raise ShapeError(f"the reference gave {tuple(log_probs.shape)} for a mask of {tuple(mask.shape)}")
    for values, held in zip(log_probs, mask.bool().cpu(), strict=True):
        yield values[held].numpy()
