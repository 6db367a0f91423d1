"""The tensors of model directories, read one by one, an adapter's added to those of the model that it adapts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.models.adapters import adapter_base, adapter_settings

__all__ = ["AdaptedShards", "ModelShards", "Shards", "open_shards"]

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


class Shards(Protocol):
    """files: the names of the tensors in each file; folder: where all else of the model lies."""

    folder: Path
    files: dict[str, list[str]]

    def __iter__(self) -> Iterator[str]: ...
    def read(self, name: str) -> tuple[Tensor, torch.dtype]: ...


def open_shards(folder: Path) -> Shards:
    """The tensors of a model directory, or of an adapter's merged into its model; DataError for another one."""
    base = adapter_base(folder)
    return ModelShards(folder) if base is None else AdaptedShards(folder, base)


class ModelShards:
    """The tensors of a model directory with safetensors. DataError for one without."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.files: dict[str, list[str]] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                self.files.setdefault(file, []).append(name)
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", "pt") as file:
                self.files["model.safetensors"] = list(file.keys())
        else:
            raise DataError(f"{folder} has no model.safetensors: name a directory made by save_pretrained")
        self._place = {name: file for file, names in self.files.items() for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def read(self, name: str) -> tuple[Tensor, torch.dtype]:
        """The tensor, and the type that it is kept in."""
        from safetensors import safe_open

        # Opened for each tensor, so that the pages of those before do not stay in memory.
        with safe_open(self.folder / self._place[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor, tensor.dtype


class _Low(NamedTuple):
    """One adapted tensor: the names of its factors, and what their product is multiplied by."""

    down: str
    up: str
    scale: float


class AdaptedShards:
    """The tensors of a model with a LoRA adapter merged in: W + scale B A, in float32, one by one.

    Raises ConfigError for an adapter that is more than low-rank products, ShapeError for one of another model.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        from safetensors import safe_open

        self.adapter, self.base = folder / "adapter_model.safetensors", ModelShards(base)
        self.folder, self.files = base, self.base.files
        if not self.adapter.is_file():
            raise DataError(f"{folder} has no adapter_model.safetensors: save the adapter again")
        self.settings = adapter_settings(folder)
        with safe_open(self.adapter, "pt") as file:
            names = list(file.keys())
            self._low = self._factors(names, {name: file.get_slice(name).get_shape() for name in names})
        known = set(self.base)
        for name in self._low:
            if name not in known:
                raise ShapeError(f"{folder} adapts {name}, which {base} does not hold: give the adapter its own model")

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def read(self, name: str) -> tuple[Tensor, torch.dtype]:
        """The tensor with its adapter, and the type in which it is kept without."""
        from safetensors import safe_open

        whole, kept = self.base.read(name)
        low = self._low.get(name)
        if low is None:
            return whole, kept
        with safe_open(self.adapter, "pt") as file:
            change = file.get_tensor(low.up).float() @ file.get_tensor(low.down).float()
        change = change.T if self.settings.get("fan_in_fan_out") else change
        if change.shape != whole.shape:
            shapes = f"{tuple(change.shape)} and {tuple(whole.shape)}"
            raise ShapeError(f"the adapter of {name} and the tensor have shapes {shapes}: it is of another model")
        wide = whole.to(torch.promote_types(whole.dtype, torch.float32))
        return wide.add(change.to(wide.dtype), alpha=low.scale), kept

    def _factors(self, names: list[str], shapes: dict[str, list[int]]) -> dict[str, _Low]:
        found: dict[str, dict[str, str]] = {}
        for name in names:
            part = _PART.fullmatch(name)
            if part is None or self.settings.get("peft_type") != "LORA" or self.settings.get("use_dora"):
                raise ConfigError(
                    f"{self.adapter.parent} is more than low-rank products (it holds {name}): merge it into its model "
                    "first, with peft's merge_and_unload, and name the merged model"
                )
            found.setdefault(part["module"].removeprefix(_PREFIX), {})[part["part"]] = name
        return {
            f"{module}.weight": _Low(parts["A"], parts["B"], self._scale(module, shapes[parts["A"]][0]))
            for module, parts in found.items()
        }

    def _scale(self, module: str, rank: int) -> float:
        """alpha over the rank, or over its root; the settings may name another alpha for some modules."""
        alpha: Any = self.settings["lora_alpha"]
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        return float(alpha / (rank**0.5 if self.settings.get("use_rslora") else rank))
