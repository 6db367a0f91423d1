"""Units of work for the engine's tests; each runs in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kullback.core.files import atomic_write
from kullback.core.runs import Run, stop_signals


def square(folder: Path, *, number: int) -> dict[str, Any]:
    """The square, and a mark in the directory for every time that it ran."""
    with (folder / "ran").open("a") as marks:
        marks.write("x")
    return {"square": number**2, "threads": os.environ["OMP_NUM_THREADS"]}


def fail(folder: Path, *, way: str) -> Any:
    """End badly in one of the ways there are."""
    if way == "raise":
        raise ValueError("no such luck")
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "segfault":
        os.write(1, b"a last word")
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "exit":
        sys.exit("enough")
    return object() if way == "no mapping" else {"value": object()}


def once(folder: Path, *, number: int) -> dict[str, int]:
    """Fail the first time."""
    if not (folder / "tried").exists():
        (folder / "tried").touch()
        raise RuntimeError("the first time")
    return {"number": number}


def count(folder: Path, *, to: int) -> dict[str, int]:
    """A run that is killed after its second step, and goes on from its checkpoint when it is run again."""
    run = Run.start(folder, {"to": to}, kind="count", resume=True)
    latest = run.latest_checkpoint()
    begun = 0 if latest is None else int((latest / "step").read_text())
    for step in range(begun + 1, to + 1):
        with run.checkpoint(step) as place:
            (place / "step").write_text(str(step))
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"begun": begun, "ended": to}


def wait(folder: Path, *, seconds: float) -> dict[str, Any]:
    """Say who runs, wait, and stop when asked to."""
    atomic_write(folder / "pid", str(os.getpid()))
    start = time.monotonic()
    with stop_signals() as stop:
        while time.monotonic() - start < seconds:
            time.sleep(0.02)
            if stop.requested:
                atomic_write(folder / "saved", "yes")
                raise KeyboardInterrupt
    return {"waited": seconds}


def wait_with_child(folder: Path) -> dict[str, Any]:
    """Wait for a process of its own that would go on for long."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    atomic_write(folder / "child", str(child.pid))
    atomic_write(folder / "pid", str(os.getpid()))
    child.wait()
    return {}
