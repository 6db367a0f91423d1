"""An index over the run directories below a root: an SQLite file that is only a cache, and says nothing of its own.

Each answer looks at every run directory (a few stat calls) and reads again those that are not as the index knew them; a
deleted, stale or damaged index is therefore made anew, and never wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kullback.core.errors import CheckpointError, DataError
from kullback.core.runs import Run

__all__ = ["RunIndex", "describe_run"]

_NAME = ".runs.sqlite"
_SCHEMA = "CREATE TABLE runs (path TEXT PRIMARY KEY, signature TEXT NOT NULL, row TEXT NOT NULL, seal TEXT NOT NULL)"
_WATCHED = ("run.toml", "report.json", "events.jsonl", "ckpt")


class RunIndex:
    """The runs below `root`, however deep. Raises DataError when the root is no directory."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a directory: name one that holds runs")
        self.path = self.root / _NAME

    def rows(self) -> list[dict[str, Any]]:
        """The `describe_run` of each run and its path below the root, by the time of its start."""
        known = self._read()
        found: dict[str, tuple[str, str]] = {}
        for path in _run_directories(self.root):
            name, signature = path.relative_to(self.root).as_posix(), _signature(path)
            before = known.get(name)
            row = before[1] if before and before[0] == signature else json.dumps(describe_run(path))
            found[name] = (signature, row)
        if found != known and not (self.root / "run.toml").exists():  # a run directory holds the run alone
            self._write(found)
        rows = [{"path": name, **json.loads(row)} for name, (_, row) in found.items()]
        return sorted(rows, key=lambda row: (row["started"], row["path"]))

    def _read(self) -> dict[str, tuple[str, str]]:
        """What the index file holds, less the entries whose bytes have changed; nothing when it is no database."""
        try:
            with closing(sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro&immutable=1", uri=True)) as connection:
                found = connection.execute("SELECT path, signature, row, seal FROM runs").fetchall()
            return {path: (mark, row) for path, mark, row, seal in found if seal == _seal(path, mark, row)}
        except (sqlite3.Error, TypeError, AttributeError, UnicodeDecodeError):
            return {}

    def _write(self, rows: Mapping[str, tuple[str, str]]) -> None:
        """Replace the file as a whole: readers and other writers never meet a half of it. A root that cannot be written
        goes without an index."""
        with suppress(OSError, sqlite3.Error):
            handle, name = tempfile.mkstemp(prefix=f".partial-{_NAME}-", suffix=".tmp", dir=self.root)
            os.close(handle)
            try:
                with closing(sqlite3.connect(name)) as connection, connection:
                    connection.execute(_SCHEMA)
                    entries = [(path, *entry, _seal(path, *entry)) for path, entry in rows.items()]
                    connection.executemany("INSERT INTO runs VALUES (?, ?, ?, ?)", entries)
                os.replace(name, self.path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)


def _run_directories(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("ckpt", "figures"))
        if "run.toml" in files:
            yield Path(folder)


def _signature(path: Path) -> str:
    def mark(name: str) -> str:
        try:
            found = (path / name).stat()
        except OSError:
            return "-"
        return f"{found.st_mtime_ns}:{found.st_size}:{found.st_ino}"

    return " ".join(mark(name) for name in _WATCHED)


def _seal(path: str, signature: str, row: str) -> str:
    return hashlib.sha256("\x1f".join((path, signature, row)).encode()).hexdigest()


def describe_run(path: Path) -> dict[str, Any]:
    """A run in short: kind, seed, status, started, updated, step, checkpoints, bytes, config, metrics.

    status: "done" with a report, "unfinished" without, "damaged" when it cannot be read; started, updated: seconds
    since 1970; step: of the latest checkpoint, or None; checkpoints: their number, and bytes their size; metrics: the
    numbers of report.json, nested names joined with dots.
    """
    updated = max((path / name).stat().st_mtime for name in _WATCHED if (path / name).exists())
    row: dict[str, Any] = {
        "kind": "?", "seed": 0, "status": "damaged", "started": updated, "updated": updated, "step": None,
        "checkpoints": 0, "bytes": 0, "config": {}, "metrics": {},
    }  # fmt: skip
    try:
        run = Run.open(path)
        row |= {"kind": run.kind, "seed": run.seed, "config": run.config}
        row["started"] = next((event["time"] for event in run.events()), (path / "run.toml").stat().st_mtime)
        complete = run.checkpoints()
        if complete:
            row["step"] = int(complete[-1].name.removeprefix("step-"))
            files = [file for folder in complete for file in folder.rglob("*") if file.is_file()]
            row |= {"checkpoints": len(complete), "bytes": sum(file.stat().st_size for file in files)}
        report = path / "report.json"
        row["metrics"] = dict(_numbers(json.loads(report.read_text(encoding="utf-8")))) if report.exists() else {}
        row["status"] = "done" if report.exists() else "unfinished"
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        pass
    return row


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(entry, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, value
