"""Units of work, each in a process of its own: a crash takes no other down, and a sweep resumes with what is missing.

A unit's directory root/<key> has unit.json (what was asked and, at the end, what came), log.txt (its output) and, when
it failed, traceback.txt; the rest is the unit's own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from kullback.core.config import changes
from kullback.core.errors import CheckpointError, ConfigError, Interrupted, MissingExtra
from kullback.core.files import atomic_write, writing
from kullback.core.runs import stop_signals

__all__ = ["Unit", "UnitResult", "run_units"]

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_GRACE = 20.0  # seconds that a unit has to save its state when the sweep is stopped
Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One piece of a sweep: `call`, as "module:function", runs as function(directory, **arguments).

    key: its name and directory below the sweep's root; arguments: what JSON can hold. The function returns a mapping
    that JSON can hold, and goes on from what it finds in its directory when it was cut short before.
    """

    key: str
    call: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """What became of a unit. status: "done", with the result, or "failed", with the error in a sentence; in seconds.

    path: the unit's directory; skipped: whether it was done before this call.
    """

    key: str
    status: Literal["done", "failed"]
    path: Path
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    skipped: bool = False


def run_units(
    units: Sequence[Unit],
    *,
    root: Path,
    workers: int = 1,
    engine: Literal["local", "ray"] = "local",
    threads: int = 1,
    on_event: Listener | None = None,
) -> list[UnitResult]:
    """Run the units that are not done yet, at most `workers` at a time, and return all results in the units' order.

    threads: of each unit's tensor operations; engine: "local" processes, or "ray" for a cluster that shares the file
    system with this machine; on_event: takes {"kind": "skipped" | "started" | "done" | "failed", "key": ..., ...}.
    A first SIGINT or SIGTERM asks the running units to save and stop, and raises KeyboardInterrupt; what is done stays.

    With "ray" the cluster of RAY_ADDRESS is used, one of this machine without it. Raises ConfigError for keys, calls or
    arguments that cannot work, CheckpointError for a unit that was begun with other arguments or a root that cannot be
    written, MissingExtra without ray.
    """
    if workers < 1 or threads < 1:
        raise ConfigError(f"workers and threads must be at least 1, got {workers} and {threads}")
    _check(units)
    emit = on_event or (lambda event: None)
    results: dict[str, UnitResult] = {}
    waiting = []
    for unit in units:
        if (before := _finished(unit, root)) is not None:
            results[unit.key] = before
            emit({"kind": "skipped", "key": unit.key})
        else:
            waiting.append(unit)
    if waiting:
        # The engine is opened first: where it cannot be, nothing is written.
        pool = _open(engine, workers=workers, threads=threads)
        try:
            _drain(waiting, pool, root, workers, results, emit)
        finally:
            pool.close()
    return [results[unit.key] for unit in units]


def _drain(
    waiting: list[Unit], pool: _Pool, root: Path, workers: int, results: dict[str, UnitResult], emit: Listener
) -> None:
    running: dict[Path, Unit] = {}
    with stop_signals() as stop:
        while waiting or running:
            if stop.requested:
                raise KeyboardInterrupt
            while waiting and len(running) < workers:
                unit = waiting.pop(0)
                running[_prepare(unit, root)] = unit
                pool.start(root / unit.key)
                emit({"kind": "started", "key": unit.key})
            for folder, code in pool.ended():
                unit = running.pop(folder)
                result = results[unit.key] = _result(unit, folder, code)
                emit({"kind": result.status, "key": unit.key, "seconds": result.seconds, "error": result.error})


# --- a unit's directory ---


def _check(units: Sequence[Unit]) -> None:
    keys = [unit.key for unit in units]
    for unit in units:
        if not _KEY.fullmatch(unit.key):
            raise ConfigError(f"unit key {unit.key!r} is not a path of letters, digits, '.', '_' and '-'")
        if not re.fullmatch(r"[\w.]+:\w+", unit.call):
            raise ConfigError(f'unit {unit.key} has the call {unit.call!r}: write it "module:function"')
        try:
            json.dumps(dict(unit.arguments))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the arguments of unit {unit.key} cannot be written as JSON: {error}") from error
    if doubled := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"two units have the key {doubled[0]}: give each its own")
    for key in keys:
        if inner := [other for other in keys if other.startswith(f"{key}/")]:
            raise ConfigError(f"unit {inner[0]} lies inside the directory of unit {key}: give them separate keys")


def _read(folder: Path) -> dict[str, Any]:
    """The content of unit.json; one that is missing or damaged is one that was not done."""
    try:
        content = json.loads((folder / "unit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _asked(unit: Unit) -> dict[str, Any]:
    return {"key": unit.key, "call": unit.call, "arguments": json.loads(json.dumps(dict(unit.arguments)))}


def _finished(unit: Unit, root: Path) -> UnitResult | None:
    content = _read(root / unit.key)
    if content:
        old = {name: content.get(name) for name in ("call", "arguments")}
        if found := changes(old, {name: value for name, value in _asked(unit).items() if name != "key"}):
            raise CheckpointError(
                f"{root / unit.key} was begun with other arguments ({'; '.join(found)}): "
                "remove it or choose another directory"
            )
    if content.get("status") != "done":
        return None
    result, seconds = content["result"], content["seconds"]
    return UnitResult(key=unit.key, status="done", path=root / unit.key, result=result, seconds=seconds, skipped=True)


def _prepare(unit: Unit, root: Path) -> Path:
    folder = root / unit.key
    atomic_write(folder / "unit.json", json.dumps({**_asked(unit), "status": "running"}, indent=2))
    with writing(folder):
        (folder / "traceback.txt").unlink(missing_ok=True)
    return folder


def _result(unit: Unit, folder: Path, code: int) -> UnitResult:
    content = _read(folder)
    if content.get("status") in ("done", "failed"):
        return UnitResult(
            key=unit.key, status=content["status"], path=folder, result=content.get("result", {}),
            error=content.get("error", ""), seconds=content["seconds"],
        )  # fmt: skip
    # It had no time to say anything: killed, out of memory, or a crash of compiled code.
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    tail = _tail(folder / "log.txt")
    with suppress(CheckpointError):
        atomic_write(folder / "traceback.txt", f"The process {cause}; the end of its output:\n{tail}\n")
    last = f": {tail.splitlines()[-1]}" if tail and code > 0 else ""
    return UnitResult(key=unit.key, status="failed", path=folder, error=f"the process {cause}{last}")


def _tail(log: Path, count: int = 4000) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - count, 0))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


# --- the engines ---


class _Pool(Protocol):
    """start(folder) begins the unit of that directory; ended() waits a moment and yields those that are over."""

    def start(self, folder: Path) -> None: ...
    def ended(self) -> list[tuple[Path, int]]: ...
    def close(self) -> None: ...


def _open(engine: str, *, workers: int, threads: int) -> _Pool:
    if engine == "local":
        return _Local(threads)
    if engine == "ray":
        return _Ray(workers, threads)
    raise ConfigError(f"engine must be local or ray, got {engine!r}")


class _Local:
    """Processes of this machine."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.processes: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path) -> None:
        self.processes[folder] = _launch(folder, self.threads)

    def ended(self) -> list[tuple[Path, int]]:
        time.sleep(0.02)
        over = [(folder, code) for folder, process in self.processes.items() if (code := process.poll()) is not None]
        for folder, _ in over:
            _finish(self.processes.pop(folder))
        return over

    def close(self) -> None:
        _stop(list(self.processes.values()))


class _Ray:
    """Tasks of a Ray cluster, each of which launches the unit's process on its node."""

    def __init__(self, workers: int, threads: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("ray", extra="ray") from error
        self.ray, self.threads = ray, threads
        self.own = not ray.is_initialized()
        if self.own:
            here: dict[str, Any] = {"address": "local", "num_cpus": workers * threads, "include_dashboard": False}
            ray.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else here))
        self.task = ray.remote(num_cpus=threads, max_retries=0)(_run_here)
        self.tasks: dict[Any, Path] = {}

    def start(self, folder: Path) -> None:
        self.tasks[self.task.remote(str(folder.absolute()), self.threads)] = folder

    def ended(self) -> list[tuple[Path, int]]:
        ready, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=0.2)
        return [(self.tasks.pop(task), self._code(task)) for task in ready]

    def _code(self, task: Any) -> int:
        try:
            return int(self.ray.get(task))
        except self.ray.exceptions.RayError:  # the node or its worker is gone
            return -int(signal.SIGKILL)

    def close(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task)
        if self.tasks:
            _, late = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=_GRACE)
            for task in late:
                # The worker dies, and with it the pipe by which the unit's process knows that it is wanted.
                self.ray.cancel(task, force=True)
        if self.own:
            self.ray.shutdown()


def _run_here(folder: str, threads: int) -> int:
    # Ray cancels by SIGINT, which a worker ignores where the driver was started in a shell's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = _launch(Path(folder), threads)
    try:
        # A plain wait would not notice it.
        while (code := process.poll()) is None:
            time.sleep(0.05)
        return code
    finally:
        _stop([process])


def _launch(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "kullback.core.engine", str(folder)]
    with writing(folder), (folder / "log.txt").open("ab") as log:
        # A session of its own: Ctrl-C reaches the sweep, which then stops its units in order.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to save and stop, then insist."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.0))
        _finish(process)


def _finish(process: subprocess.Popen[bytes]) -> None:
    """Let go of a process, and of all that it started."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


# --- inside the unit's process ---


def _watch_parent() -> None:
    """The sweep holds the other end of standard input and writes nothing: its end is the sweep's end."""

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main(folder: Path) -> int:
    # Blocked signals are inherited, from Ray's workers for one.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    _watch_parent()
    content = _read(folder)
    module, _, name = content["call"].partition(":")
    started = time.monotonic()
    try:
        result = getattr(import_module(module), name)(folder, **content["arguments"])
        if not isinstance(result, Mapping):
            raise ConfigError(f"{content['call']} returned a {type(result).__name__}: a unit returns a mapping")
        outcome = {"status": "done", "result": json.loads(json.dumps(dict(result)))}
    except (KeyboardInterrupt, Interrupted):
        return 130
    except Exception as error:
        text = " ".join(str(error).split())
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {text}"}
        atomic_write(folder / "traceback.txt", traceback.format_exc())
    seconds = round(time.monotonic() - started, 6)
    atomic_write(folder / "unit.json", json.dumps({**content, **outcome, "seconds": seconds}, indent=2) + "\n")
    return 0 if outcome["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
