"""The run directory, the truth about a run: what was asked, where it ran, what happened, what came out.

run.toml (kind, seed, configuration), env.json, events.jsonl, report.json, figures/ and ckpt/step-00000123/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kullback.core.config import changes, read_toml, to_dict, to_toml
from kullback.core.environment import environment
from kullback.core.errors import CheckpointError, ConfigError
from kullback.core.files import atomic_directory, atomic_write, clear_partial, writing

__all__ = ["Run", "StopSignals", "stop_signals"]

_STEP = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
# What may lie in a directory in which no run has begun: the engine's own files, and what a killed start left.
_NOT_A_RUN = {"env.json", "unit.json", "traceback.txt", "log.txt"}


class Run:
    """A run directory that is open for appending; make one with `Run.start` or `Run.open`.

    path: the directory; kind: the job; seed: of its randomness; config: the resolved configuration as plain data.
    """

    def __init__(self, path: Path, *, kind: str, seed: int, config: dict[str, Any]) -> None:
        self.path, self.kind, self.seed, self.config = path, kind, seed, config
        self._whole = False

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, kind={self.kind!r}, seed={self.seed})"

    @classmethod
    def start(cls, path: Path, config: Any, *, kind: str, seed: int = 0, resume: bool = False) -> Run:
        """Begin a run in `path`, or go on with the one that is there when `resume` is set.

        Raises CheckpointError for a directory that is in use and not resumed, that holds something else, whose run has
        another kind, seed or configuration (it says what changed), or that cannot be written.
        """
        path = Path(path)
        run = cls(path, kind=kind, seed=seed, config=to_dict(config))
        if (path / "run.toml").is_file():
            if not resume:
                raise CheckpointError(f"{path} already holds a run: resume it (--resume) or choose another directory")
            run._refuse_changes(cls.open(path))
            run._go_on()
        else:
            run._begin()
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in `path`, to read or to append to. Raises CheckpointError when there is none."""
        path = Path(path)
        if not (path / "run.toml").is_file():
            raise CheckpointError(f"{path} is not a run directory: it has no run.toml")
        try:
            content = read_toml(path / "run.toml")
            return cls(path, kind=content["kind"], seed=content["seed"], config=content["config"])
        except (ConfigError, KeyError) as error:
            raise CheckpointError(f"{path / 'run.toml'} is damaged ({error}): the run cannot be opened") from error

    def environment(self) -> dict[str, Any]:
        """Where the run last began or went on, from env.json; empty when that file is lost."""
        try:
            content: dict[str, Any] = json.loads((self.path / "env.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl: the kind, the time (seconds since 1970) and the values.

        Raises CheckpointError when it cannot be written.
        """
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, default=_json_value) + "\n"
        log = self.path / "events.jsonl"
        with writing(log):
            if not self._whole:
                _repair(log)
            self._whole = False
            # In one call, so that lines of two processes cannot mix.
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                data = line.encode()
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)
            self._whole = True

    def events(self) -> Iterator[dict[str, Any]]:
        """The events in order; a last line that a killed process left half-written is passed over.

        Raises CheckpointError for damage anywhere else.
        """
        log = self.path / "events.jsonl"
        if not log.exists():
            return
        with log.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        return
                    raise CheckpointError(f"line {number} of {log} is damaged: {error}") from error

    def report(self, content: Mapping[str, Any]) -> None:
        """Write report.json, which says that the run is finished."""
        atomic_write(self.path / "report.json", json.dumps(content, indent=2, default=_json_value) + "\n")

    def figure(self, name: str) -> Path:
        """The path figures/<name>.svg, its folder made."""
        with writing(self.path / "figures"):
            (self.path / "figures").mkdir(exist_ok=True)
        return self.path / "figures" / f"{name}.svg"

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A temporary directory to fill, which becomes ckpt/step-<step> when the block ends well."""
        with atomic_directory(self.path / "ckpt" / f"step-{step:08d}") as place:
            yield place
            sizes = {str(file.relative_to(place)): file.stat().st_size for file in place.rglob("*") if file.is_file()}
            (place / _MANIFEST).write_text(json.dumps({"step": step, "bytes": sizes}, indent=2))

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first: those whose files have the sizes they were written with."""
        folder = self.path / "ckpt"
        found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
        return sorted(filter(_complete, found), key=lambda path: int(path.name.removeprefix("step-")))

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(reversed(self.checkpoints()), None)

    def prune_checkpoints(self, keep: int) -> list[Path]:
        """Remove all complete checkpoints but the newest `keep`, and return the removed paths."""
        if keep < 0:
            raise ConfigError(f"keep is a number of checkpoints, at least 0, got {keep}")
        complete = self.checkpoints()
        old = complete[: max(len(complete) - keep, 0)]
        for path in old:
            with writing(path):
                # Renamed first: a removal that is cut short leaves no half checkpoint under its name.
                away = path.with_name(f".partial-{path.name}.tmp")
                path.rename(away)
                shutil.rmtree(away)
        return old

    def _refuse_changes(self, before: Run) -> None:
        old = {"kind": before.kind, "seed": before.seed, **before.config}
        new = {"kind": self.kind, "seed": self.seed, **self.config}
        if found := changes(old, new):
            raise CheckpointError(
                f"{self.path} was started with another configuration ({'; '.join(found)}): "
                "resume with the same one or choose another directory"
            )

    def _begin(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file: choose a directory")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            clear_partial(self.path)
            foreign = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _NOT_A_RUN)
        if foreign:
            raise CheckpointError(f"{self.path} holds no run but has {foreign[0]}: choose another directory")
        atomic_write(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
        # Last, since it is what makes the directory a run.
        atomic_write(self.path / "run.toml", to_toml({"kind": self.kind, "seed": self.seed, "config": self.config}))
        self.event("start")

    def _go_on(self) -> None:
        clear_partial(self.path)
        clear_partial(self.path / "ckpt")
        atomic_write(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
        self.event("resume")


@dataclass
class StopSignals:
    """Whether SIGINT or SIGTERM has come: look at `requested` between steps, save, and return."""

    requested: bool = False


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Within the block the first SIGINT or SIGTERM sets `requested`; a second SIGINT raises KeyboardInterrupt.

    Outside of the main thread, where Python delivers no signals, `requested` stays false.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / _MANIFEST).read_text())["bytes"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _repair(log: Path) -> None:
    """Cut a torn last line off, so that the next one starts on a line of its own."""
    with suppress(FileNotFoundError), log.open("rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        end = content_end
        while end > 0:
            start = max(end - 4096, 0)
            file.seek(start)
            if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + newline + 1
                break
            end = start
        if end != content_end:
            file.truncate(end)


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return value.tolist()
    raise ConfigError(f"an event or report holds a {type(value).__name__}, which JSON cannot keep")
