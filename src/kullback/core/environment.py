"""Where a result was made: versions, processor, threads and commit, without importing what it reports on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

__all__ = [
    "cache_directory", "commit", "cores", "cpu_name", "environment", "extras", "installed", "memory", "threads",
]  # fmt: skip

_OPTIONAL = re.compile(r"(?P<package>[A-Za-z0-9._-]+)[^;]*;.*extra == ['\"](?P<extra>[^'\"]+)['\"]")
_PACKAGES = ("kullback", "torch", "transformers", "accelerate", "numpy", "scipy", "safetensors")


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages that decide a result, the CPU, threads, and the checkout's commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads(),
        "versions": {name: found for name in _PACKAGES if (found := installed(name))},
        "commit": commit(),
    }


def installed(package: str) -> str | None:
    """The installed version of a package, or None; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """The packages of each extra of kullback, as the installed package declares them."""
    found: dict[str, list[str]] = {}
    try:
        declared = requires("kullback") or []
    except PackageNotFoundError:
        declared = []
    for requirement in declared:
        if (match := _OPTIONAL.fullmatch(requirement)) is not None:
            found.setdefault(match["extra"], []).append(match["package"])
    return found


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_directory() -> Path:
    """Where kullback keeps what it can make again: KULLBACK_CACHE, or kullback/ in the user's cache directory."""
    if place := os.environ.get("KULLBACK_CACHE"):
        return Path(place).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kullback"
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / default) / "kullback"


def memory() -> dict[str, int]:
    """Main memory in bytes: total and free (what could be had without swapping)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return {"total": 1024 * kilobytes["MemTotal"], "free": 1024 * kilobytes["MemAvailable"]}
    except (OSError, KeyError, ValueError, IndexError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return {"total": total, "free": 0}


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int:
    """The threads of a tensor operation: torch's own number once it is imported, what it would take before."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores()


def commit() -> str | None:
    """The commit of kullback's own checkout, "+changes" behind it when files differ; None without a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # A copy inside somebody else's repository has no commit of ours: the file itself must be tracked.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")  # the package
    return f"{head}+changes" if head and changed else head
