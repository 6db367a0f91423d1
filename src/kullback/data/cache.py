"""What is costly to make and can be made again: built once, keyed by its whole configuration, checked on every use."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from kullback.core.environment import cache_directory
from kullback.core.errors import ConfigError
from kullback.core.files import atomic_directory, atomic_write, clear_partial, writing

__all__ = ["cached"]

_MANIFEST = "manifest.json"
_SMALL = 1 << 26  # bytes up to which a file's content is checked on every use, and not its size alone


def cached(kind: str, config: Any, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills for this configuration, from the cache where it is there and sound.

    kind: names the builder, and the folder in `core.environment.cache_directory` that its entries lie in; config: a
    dataclass or what JSON can hold, all that the result depends on; build: fills the folder it is given. Of processes
    that ask at once one builds and the others wait. An entry that is not what was built is built again, and a failed
    build leaves none. Raises ConfigError for a configuration that JSON cannot hold, CheckpointError when the cache
    cannot be written.

    >>> import tempfile, unittest.mock
    >>> with tempfile.TemporaryDirectory() as cache, unittest.mock.patch.dict("os.environ", KULLBACK_CACHE=cache):
    ...     for _ in range(2):
    ...         place = cached("squares", {"of": 3}, lambda folder: print((folder / "nine").write_text("9")))
    ...     (place / "nine").read_text()
    1
    '9'
    """
    content = _canonical(config)
    # A folder of its own for each entry: what a killed build left in it is nobody else's work in progress.
    home = cache_directory() / kind / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = home / "entry"
    if _is_sound(folder, content):
        return folder
    with _locked(home / "lock"):
        if _is_sound(folder, content):  # another process has built it while this one waited
            return folder
        _clear(folder)
        with atomic_directory(folder) as place:
            build(place)
            atomic_write(place / _MANIFEST, _manifest(place, content))
    return folder


def _canonical(config: Any) -> str:
    plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    try:
        return json.dumps(plain, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a cache is keyed by what JSON can hold, and this configuration is not ({error})") from error


def _manifest(folder: Path, content: str) -> str:
    files = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in _files(folder)}
    return json.dumps({"config": json.loads(content), "files": files}, indent=2) + "\n"


def _is_sound(folder: Path, content: str) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        known = {folder / name: mark for name, mark in manifest["files"].items()}
        found = {path for path in _files(folder) if path.name != _MANIFEST}
        return (
            manifest["config"] == json.loads(content)
            and found == set(known)
            and all(_fingerprint(path) == mark for path, mark in known.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _SMALL:
        return {"bytes": size}
    with open(path, "rb") as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _clear(folder: Path) -> None:
    with writing(folder):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        clear_partial(folder.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock goes with the process that holds it, however that ends; the file stays, since one who waits may hold it.
    from filelock import FileLock

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
