"""Configurations: (nested) frozen dataclasses in, TOML out, with errors that name the key and the nearest known one.

A value None stands for "not given": TOML has no word for it, so it is left out there and read back as the default.
"""

import difflib
import hashlib
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from kullback.core.errors import ConfigError, KullbackError

__all__ = ["changes", "digest", "flat", "load", "read_toml", "to_dict", "to_toml"]

T = TypeVar("T")
_MISSING = "(not set)"


def load(cls: type[T], source: Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> T:
    """The dataclass `cls` from a TOML file or a mapping, then `a.b=c` overrides; what is not named keeps its default.

    The right side of an override is TOML; a bare word is a string, and `none` unsets an optional value. Types are
    strict: an integer is taken for a float, nothing else is converted. Raises ConfigError for an unknown key (it names
    the nearest), a missing one, and a value of the wrong type.

    >>> from dataclasses import dataclass, field
    >>> @dataclass(frozen=True)
    ... class Training:
    ...     steps: int = 10
    ...     rate: float = 0.1
    >>> @dataclass(frozen=True)
    ... class Job:
    ...     data: str
    ...     training: Training = field(default_factory=Training)
    >>> load(Job, {"data": "here"}, ["training.rate=1e-3"])
    Job(data='here', training=Training(steps=10, rate=0.001))
    >>> load(Job, {"data": "here"}, ["training.step=5"])
    Traceback (most recent call last):
        ...
    kullback.core.errors.ConfigError: unknown key training.step: did you mean training.steps?
    """
    data = read_toml(source) if isinstance(source, Path) else _plain(dict(source or {}), "")
    for override in overrides:
        _override(cls, data, override)
    _check_keys(cls, cls, data, "")
    return _validate(cls, data)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, dataclass or mapping, as plain data: tables, lists, strings, numbers, booleans and None.

    Raises ConfigError for a value that TOML could not hold.
    """
    if not (is_dataclass(config) and not isinstance(config, type)) and not isinstance(config, Mapping):
        raise ConfigError(f"a configuration is a dataclass or a mapping, got {type(config).__name__}")
    return _plain(config, "")


def to_toml(config: Any) -> str:
    """A configuration as TOML, None left out; `load` reads it back as an equal object."""
    import tomli_w

    return tomli_w.dumps(_without_none(to_dict(config)))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, one sentence a key, in the order of the keys.

    >>> changes({"training": {"rate": 0.1, "steps": 5}}, {"training": {"rate": 0.2, "steps": 5}, "seed": 1})
    ['seed: (not set) -> 1', 'training.rate: 0.1 -> 0.2']
    """
    before, after = flat(old), flat(new)
    return [
        f"{key}: {_show(before, key)} -> {_show(after, key)}"
        for key in sorted({*before, *after})
        if key not in before or key not in after or _canonical(before[key]) != _canonical(after[key])
    ]


def flat(config: Any) -> dict[str, Any]:
    """The values of a configuration under the dotted names that overrides use, None left out.

    >>> flat({"training": {"rate": 0.1, "betas": (0.9, 0.95)}, "seed": None})
    {'training.rate': 0.1, 'training.betas': [0.9, 0.95]}
    """
    return dict(_leaves(to_dict(config), ""))


def digest(config: Any) -> str:
    """The SHA-256 of a configuration, in hexadecimal: equal for equal content, whatever the order of its keys.

    >>> digest({"a": 1, "b": None}) == digest({"a": 1.0})
    True
    """
    return hashlib.sha256(_canonical(_without_none(to_dict(config))).encode()).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ConfigError when it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: name a TOML file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _plain(value: Any, where: str) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}".lstrip(".")) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where or 'the configuration'} holds a {type(value).__name__}, which TOML cannot keep")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        if any(entry is None for entry in value):
            raise ConfigError("a list of a configuration holds None, which TOML cannot: leave the entry out")
        return [_without_none(entry) for entry in value]
    return value


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{where}.{key}".lstrip("."))
    elif value is not None:
        yield where, value


def _canonical(value: Any) -> str:
    return json.dumps(_numbers(value), sort_keys=True, separators=(",", ":"))


def _numbers(value: Any) -> Any:
    """1.0 and 1 are the same value of a float option."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _show(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else _MISSING


# --- overrides ---


def _override(cls: type, data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"an override is written key=value, as in training.steps=100, got {override!r}")
    table, hint = data, cast(Any, cls)
    for depth, key in enumerate(path):
        _check_keys(cls, hint, {key: None}, ".".join(path[:depth]))
        hint = _entry_type(hint, key)
        if depth < len(path) - 1:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{'.'.join(path[: depth + 1])} is a value, not a table: {name} cannot be set")
    table[path[-1]] = _override_value(text.strip(), hint)


def _override_value(text: str, hint: Any) -> Any:
    alternatives = set(_alternatives(hint))
    if text == "none" and type(None) in alternatives:
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    # 2024 is a fine name for a folder, and true for a file.
    textual = alternatives - {type(None)} <= {str, Path}
    return text if textual and not isinstance(value, str) else value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _entry_type(hint: Any, key: str) -> Any:
    """The type of the entry `key` of a table of type `hint`."""
    for option in _alternatives(hint):
        if is_dataclass(option) and isinstance(option, type):
            return _field_types(option).get(key, Any)
        if isinstance(get_origin(option), type) and issubclass(get_origin(option) or object, Mapping):
            return get_args(option)[1]
    return Any


# --- keys ---


@cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _check_keys(root: type, hint: Any, value: Any, where: str) -> None:
    """Refuse keys that no dataclass of the tree knows; types are checked later."""
    if isinstance(value, dict):
        for option in _alternatives(hint):
            if is_dataclass(option) and isinstance(option, type):
                _check_table(root, option, value, where)
            elif isinstance(get_origin(option), type) and issubclass(get_origin(option) or object, Mapping):
                for key, entry in value.items():
                    _check_keys(root, get_args(option)[1], entry, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for option in _alternatives(hint):
            if get_origin(option) in (list, tuple, Sequence) and get_args(option):
                for index, entry in enumerate(value):
                    _check_keys(root, get_args(option)[0], entry, f"{where}[{index}]")


def _check_table(root: type, cls: type, table: dict[str, Any], where: str) -> None:
    known = _field_types(cls)
    for key, entry in table.items():
        if key not in known:
            _unknown(root, cls, f"{where}.{key}".lstrip("."))
        _check_keys(root, known[key], entry, f"{where}.{key}".lstrip("."))


def _unknown(root: type, cls: type, path: str) -> NoReturn:
    where, _, key = path.rpartition(".")
    siblings = list(_field_types(cls))
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        raise ConfigError(f"unknown key {path}: did you mean {f'{where}.{near[0]}'.lstrip('.')}?")
    elsewhere = {full.rpartition(".")[2]: full for full in _paths(root, "")}
    near = difflib.get_close_matches(key, list(elsewhere), n=1)
    if near:
        raise ConfigError(f"unknown key {path}: did you mean {elsewhere[near[0]]}?")
    raise ConfigError(f"unknown key {path}: the keys of {where or 'the configuration'} are {', '.join(siblings)}")


def _paths(cls: type, where: str) -> Iterator[str]:
    for name, hint in _field_types(cls).items():
        path = f"{where}.{name}".lstrip(".")
        yield path
        for option in _alternatives(hint):
            if is_dataclass(option) and isinstance(option, type) and option is not cls:
                yield from _paths(option, path)


# --- types ---


@cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _validate(cls: type[T], data: dict[str, Any]) -> T:
    from pydantic import ValidationError

    try:
        # As JSON: there a list is right for a tuple and a string for a path, and all else is strict.
        text = json.dumps(_plain(_without_none(data), ""))
        return cast(T, _adapter(cast(Any, cls)).validate_json(text, strict=True))
    except ValidationError as error:
        found = error.errors(include_url=False)
        cause = found[0].get("ctx", {}).get("error")
        if isinstance(cause, KullbackError):
            raise cause from None
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConfigError(_sentence(found[0], data) + more) from None


def _sentence(error: Any, data: Any) -> str:
    names: list[str] = []
    for part in error["loc"]:
        # The location also names the branch of a union that was tried; only what leads through the data is a key.
        inside = (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int))
        if inside or error["type"] == "missing":
            names.append(f"[{part}]" if isinstance(part, int) else f".{part}")
            data = data[part] if inside else None
    key = "".join(names).lstrip(".")
    if error["type"] == "missing":
        return f"{key} is required and was not given"
    expected = error["msg"].replace("Input should be ", "").replace("Value error, ", "")
    return f"{key}: expected {expected}, got {json.dumps(error['input'], ensure_ascii=False, default=str)}"
