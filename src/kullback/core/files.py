"""Files and directories that appear whole or not at all: write beside the target, fsync, rename."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kullback.core.errors import CheckpointError, KullbackError

__all__ = ["atomic_directory", "atomic_write", "clear_partial", "finite", "writing"]

_STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip
_FULL = "No space left on device"
_PREFIX, _SUFFIX = ".partial-", ".tmp"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the storage within the block (no space, no permission) into a CheckpointError on `path`."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in _STORAGE
        # Libraries that write from compiled code have errors of their own for a full disk.
        if isinstance(error, KullbackError) or (not known and _FULL not in str(error)):
            raise
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) and known else _FULL
        raise CheckpointError(f"cannot write {path} ({reason}): free some space or choose another place") from error


def atomic_write(path: Path, data: str | bytes) -> None:
    """Replace the file `path` by `data`, text as UTF-8; its folder is made where it is missing.

    A reader sees the old content or the new one, never a part. Raises CheckpointError when it cannot be written, and
    leaves the old content.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder) / "deep" / "note.txt", "all of it")
    ...     (Path(folder) / "deep" / "note.txt").read_text()
    'all of it'
    """
    content = data.encode() if isinstance(data, str) else data
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{path.name}-", suffix=_SUFFIX, dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes the file private; a result is as readable as any other file of the user.
            Path(name).chmod(0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        _sync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling directory to fill, which becomes `path` when the block ends well and else vanishes.

    An existing `path` is replaced. Raises CheckpointError when it cannot be written.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_directory(Path(folder) / "model") as place:
    ...         _ = (place / "weights").write_text("1 2 3")
    ...     sorted(entry.name for entry in Path(folder).rglob("*"))
    ['model', 'weights']
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{path.name}-", suffix=_SUFFIX, dir=path.parent))
        try:
            place.chmod(0o777 & ~_umask())
            yield place
            for entry in [*place.rglob("*"), place]:
                _sync(entry)
            _move_into_place(place, path)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        _sync(path.parent)


def clear_partial(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`."""
    for entry in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()


def _move_into_place(place: Path, path: Path) -> None:
    if not path.exists():
        os.rename(place, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{path.name}-", suffix=_SUFFIX, dir=path.parent))
    os.rename(path, old / "old")
    os.rename(place, path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def finite(value: Any) -> Any:
    """Plain data in which None stands for numbers that are infinite or none, for which JSON has no word.

    >>> finite({"loss": float("nan"), "steps": (1, 2.5)})
    {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
