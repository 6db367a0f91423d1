"""State of a computation on disk, equal to the bit when it comes back: tensors as safetensors, all else as JSON.

`<name>.safetensors` holds the tensors and `<name>.json` the structure around them, with the sizes and hashes by which
damage is found. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import CheckpointError
from kullback.core.files import atomic_write, writing

__all__ = ["load_state", "save_state"]

_FORMAT = 1


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write a nested state as `folder/name.safetensors` and `folder/name.json`.

    The state is made of dictionaries (keys: strings, integers), lists, tuples, strings, numbers, booleans, None,
    tensors and numpy arrays. A tensor that occurs twice is stored once and comes back as one; strides are kept where
    the tensor fills its memory. Raises CheckpointError for anything else, and when it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(Path(folder), "state", {0: (float("-inf"), torch.ones(2)), "step": 3})
    ...     load_state(Path(folder), "state")
    {0: (-inf, tensor([1., 1.])), 'step': 3}
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _encode(state, name, tensors, {})
    data = folder / f"{name}.safetensors"
    partial = folder / f".partial-{name}.safetensors.tmp"
    with writing(data):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial)
            # Tensors without their description are no state: the old one goes first, the new one comes last.
            (folder / f"{name}.json").unlink(missing_ok=True)
            partial.replace(data)
        finally:
            partial.unlink(missing_ok=True)
        body = {"format": _FORMAT, "tensors": _seal(data), "state": tree}
    atomic_write(folder / f"{name}.json", json.dumps({"sha256": _hash(body), **body}, allow_nan=False))


def load_state(folder: Path, name: str) -> Any:
    """Read back what `save_state` wrote, tensors on the CPU.

    Raises CheckpointError when it is missing, damaged (sizes and hashes are checked) or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    data, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    try:
        body = json.loads(description.read_text())
        claimed = body.pop("sha256")
        if body["format"] != _FORMAT:
            raise CheckpointError(f"{description} has format {body['format']} and this version reads {_FORMAT}")
        if _hash(body) == claimed and _seal(data) == body["tensors"]:
            # Cloned, because the file's memory map is aligned to 8 bytes only, and some kernels then round otherwise.
            tensors = {key: tensor.clone() for key, tensor in load_file(data).items()}
            return _decode(body["state"], tensors)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing: the checkpoint is not whole, use an earlier one") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{description} is damaged ({error}): use an earlier checkpoint") from error
    raise CheckpointError(f"{description} is damaged (it is not what was written): use an earlier checkpoint")


def _encode(value: Any, where: str, tensors: dict[str, Tensor], seen: dict[Any, Any]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        # As text: JSON has no bound on integers, but its parsers do.
        return value if abs(value) < 2**53 else {"int": hex(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        return _encode_tensor(value.detach(), where, tensors, seen)
    if isinstance(value, np.ndarray):
        return {"array": _encode_tensor(_from_numpy(value, where), where, tensors, seen)}
    if isinstance(value, Mapping):
        pairs = [(_key(key, where), _encode(entry, f"{where}.{key}", tensors, seen)) for key, entry in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        entries = [_encode(entry, f"{where}[{index}]", tensors, seen) for index, entry in enumerate(value)]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    kind = type(value).__name__
    raise CheckpointError(f"{where} is a {kind}: a state holds numbers, text, tensors, lists and mappings")


def _key(key: Any, where: str) -> int | str:
    if isinstance(key, (int, str)) and not isinstance(key, bool):
        return key
    raise CheckpointError(f"{where} has the key {key!r}: keys are strings or integers")


def _from_numpy(array: np.ndarray, where: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except TypeError as error:
        raise CheckpointError(f"{where} is an array of {array.dtype}: only numbers can be kept") from error


def _encode_tensor(tensor: Tensor, where: str, tensors: dict[str, Tensor], seen: dict[Any, Any]) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise CheckpointError(f"{where} is a tensor of kind {kind}: only dense real ones can be kept")
    identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    if tensor.numel() and identity in seen:
        return dict(seen[identity])
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order).is_contiguous() and not tensor.is_contiguous()
    key = str(len(tensors))
    # A copy of its own for each: safetensors refuses memory that two tensors share.
    tensors[key] = (tensor.permute(order) if dense else tensor).cpu().clone(memory_format=torch.contiguous_format)
    seen[identity] = {"tensor": key, **({"order": order} if dense else {})}
    return dict(seen[identity])


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _decode(entry, tensors) for key, entry in value["dict"]}
    if "tuple" in value:
        return tuple(_decode(entry, tensors) for entry in value["tuple"])
    if "int" in value:
        return int(value["int"], 16)
    if "float" in value:
        return struct.unpack(">d", bytes.fromhex(value["float"]))[0]
    if "array" in value:
        return _decode(value["array"], tensors).numpy()
    tensor = tensors[value["tensor"]]
    if "order" not in value:
        return tensor
    order = value["order"]
    return tensor.permute([order.index(axis) for axis in range(len(order))])


def _seal(data: Path) -> dict[str, Any]:
    """What tells whether the tensors' file is the one that was written."""
    with data.open("rb") as file:
        return {"bytes": data.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
