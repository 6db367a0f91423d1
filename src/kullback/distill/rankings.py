"""A teacher's rankings on disk, ranked once and read in every later epoch: the teacher is run over the samples once.

A folder holds the picks (int16 or int32), their weights (float32) and the labels of all samples in the order in which
they came, in flat files that are read through a memory map: for N samples and K picks 6 to 8 N K bytes and 8 N more.
With topk picks of V classes that is little; a full ranking takes about as much as the teacher's logits.

Shapes: K picks of V classes, [K] a sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kullback.core.errors import DataError, ShapeError
from kullback.core.files import atomic_directory
from kullback.distill.pld import PLDLoss
from kullback.divergences.plackett_luce import Ranking

__all__ = ["KeptRankings", "WithRankings", "write_rankings"]

_INDEX, _FORMAT = "rankings.json", 1
_FILES = {"order": ("<i2", "<i4"), "weights": ("<f4",), "labels": ("<i8",)}


class KeptRankings(Dataset):
    """The rankings of a folder that `write_rankings` wrote: item i is the Ranking [K] of the i-th sample.

    Places [n], in any order, give [n, K], which `PLDLoss.of_ranking` takes. labels: those ranked for, int64 [N];
    classes: V; picks: K. Raises DataError when the folder is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.classes, self.picks, self.samples = index["classes"], index["picks"], index["samples"]
        self._parts = {name: _open(self.folder, name, index) for name in _FILES}

    def __len__(self) -> int:
        return int(self.samples)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> Ranking:
        where = index if isinstance(index, int) else np.asarray(index)
        order, weights = (torch.from_numpy(np.array(self._parts[name][where])) for name in ("order", "weights"))
        return Ranking(order, weights)

    @property
    def labels(self) -> Tensor:
        """The labels of all samples, int64 [N]."""
        return torch.from_numpy(np.array(self._parts["labels"])[:, 0])

    def __reduce__(self) -> tuple[type[KeptRankings], tuple[Path]]:
        # A memory map would travel to a worker with all that it maps.
        return KeptRankings, (self.folder,)


def write_rankings(batches: Iterable[tuple[Tensor, Tensor]], loss: PLDLoss, folder: Path) -> KeptRankings:
    """Rank batches of a teacher's logits [n, V] and labels [n] as this loss does, into `folder`.

    They are taken as they come, one at a time. The folder is there whole or not at all. Raises ShapeError for another
    number of classes than before, DataError where there is no batch, what `PLDLoss.ranking` raises, and CheckpointError
    when the folder cannot be written.
    """
    classes = picks = samples = 0
    kind = "<i2"
    with atomic_directory(Path(folder)) as place:
        files = {name: open(place / f"{name}.bin", "wb") for name in _FILES}  # noqa: SIM115
        try:
            for logits, labels in batches:
                if logits.ndim != 2 or (samples and logits.shape[-1] != classes):
                    wanted = f"[n, {classes or 'V'}]"
                    raise ShapeError(f"rankings are kept of logits {wanted}, got {tuple(logits.shape)}")
                order, weights = (part.cpu().numpy() for part in loss.ranking(logits, labels))
                classes, picks, samples = logits.shape[-1], order.shape[-1], samples + len(order)
                kind = "<i2" if order.dtype == np.int16 else "<i4"
                content = {"order": order.astype(kind), "weights": weights.astype("<f4")}
                content["labels"] = labels.cpu().numpy().astype("<i8")
                for name, file in files.items():
                    file.write(content[name].tobytes())
        finally:
            for file in files.values():
                file.close()
        if not samples:
            raise DataError("no batch of a teacher's logits came: there is nothing to rank")
        index = {"format": _FORMAT, "classes": classes, "picks": picks, "samples": samples, "order": kind}
        (place / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return KeptRankings(folder)


class WithRankings(Dataset):
    """A dataset whose items are mappings with `labels`, with `order` and `weights` [K] added: what `PLDTrainer` reads.

    Item i gets the i-th ranking. Give the Trainer teacher=None and remove_unused_columns=False. Raises DataError when
    there are not as many rankings as items, and for an item with another label than the one ranked for.
    """

    def __init__(self, dataset: Any, rankings: KeptRankings) -> None:
        if len(dataset) != len(rankings):
            raise DataError(f"{len(rankings)} rankings do not belong to {len(dataset)} samples: rank these samples")
        self.dataset, self.rankings = dataset, rankings
        self._labels = rankings.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: Mapping[str, Any] = self.dataset[index]
        if int(item["labels"]) != int(self._labels[index]):
            raise DataError(
                f"sample {index} has label {int(item['labels'])} and was ranked for {int(self._labels[index])}: the "
                "samples come in another order than when they were ranked"
            )
        order, weights = self.rankings[index]
        return {**item, "order": order, "weights": weights}


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        numbers = [index[key] for key in ("classes", "picks", "samples")]
        sound = index["format"] == _FORMAT and index["order"] in _FILES["order"]
        sound = sound and all(type(number) is int and number > 0 for number in numbers)
    except OSError as error:
        raise DataError(f"{folder} holds no rankings ({error.strerror}: {_INDEX}): write them first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove {folder} and rank again") from error
    if not sound:
        raise DataError(f"{path} is damaged or of another version: remove {folder} and rank again")
    return dict(index)


def _open(folder: Path, name: str, index: Mapping[str, Any]) -> np.ndarray:
    path, kind = folder / f"{name}.bin", np.dtype(index["order"] if name == "order" else _FILES[name][0])
    shape = (index["samples"], 1 if name == "labels" else index["picks"])
    expected, found = shape[0] * shape[1] * kind.itemsize, path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise DataError(f"{path} has {found} bytes and its index says {expected}: remove its folder and rank again")
    return np.memmap(path, dtype=kind, mode="r", shape=shape)
