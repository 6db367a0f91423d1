"""Directories of adapters, as peft writes them: the model that one adapts, and whether several adapt the same one."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kullback.core.errors import ConfigError, DataError

__all__ = ["adapter_base", "adapter_settings", "check_one_base"]

_SETTINGS = "adapter_config.json"
_WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json; DataError where it is damaged."""
    try:
        found = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / _SETTINGS} cannot be read ({error}): save the adapter again") from error
    if not isinstance(found, dict):
        raise DataError(f"{folder / _SETTINGS} has no settings in it: save the adapter again")
    return found


def adapter_base(folder: str | Path) -> Path | None:
    """The directory of the model that an adapter's directory adapts; None for a directory that holds a whole model.

    Its name is looked for as it stands, and beside the adapter. Raises DataError when it is not there.
    """
    path = Path(folder).expanduser()
    if not (path / _SETTINGS).is_file() or any(file for kind in _WHOLE for file in path.glob(kind)):
        return None
    name = adapter_settings(path).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        for place in (Path(name).expanduser(), path / name, path.parent / name):
            if place.is_dir():
                return place
    raise DataError(
        f"{path} holds an adapter of {name!r}, and that is no directory here: download the model that it adapts and "
        f"write its folder into {_SETTINGS} as base_model_name_or_path"
    )


def check_one_base(folders: Sequence[str | Path]) -> None:
    """Raise ConfigError when adapters among the folders adapt different models; one model in two places is the same.

    Whole models beside adapters are taken as they are.
    """
    bases = [base for base in map(adapter_base, folders) if base is not None]
    for base in bases[1:]:
        if not _same(bases[0], base):
            raise ConfigError(
                f"these are adapters of different models, {bases[0]} and {base}: only adapters of one model have an "
                "average"
            )


def _same(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    files = [sorted(path.name for kind in _WHOLE for path in place.glob(kind)) for place in (one, other)]
    return bool(files[0]) and files[0] == files[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in files[0]
    )  # fmt: skip
