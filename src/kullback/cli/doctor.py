"""`kullback doctor`: what this machine and installation can do."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["doctor"]


def doctor(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, this machine, the cache and optional packages."""
    found = _examine()
    if json_:
        typer.echo(json.dumps(found, indent=2))
        return
    where = found["environment"]
    memory, disk, cache = found["memory"], found["disk"], found["cache"]
    lines = {
        "python": where["python"],
        **where["versions"],
        "commit": where["commit"] or "not a checkout",
        "platform": where["platform"],
        "processor": f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads a tensor operation",
        "memory": f"{_gigabytes(memory['free'])} free of {_gigabytes(memory['total'])}",
        "disk": f"{_gigabytes(disk['free'])} free of {_gigabytes(disk['total'])} at the cache",
        "cache": cache["path"] + ("" if cache["writable"] else ", which cannot be written: set KULLBACK_CACHE"),
    }
    for name, value in lines.items():
        typer.echo(f"{name:<14}{value}")
    for row in found["extras"]:
        typer.echo(f"{row['package']:<14}{row['version'] or 'not installed: ' + row['install']}")


def _examine() -> dict[str, Any]:
    from kullback.core.environment import cache_directory, environment, memory

    cache = cache_directory()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    disk = shutil.disk_usage(place)
    return {
        "environment": environment(),
        "memory": memory(),
        "disk": {"free": disk.free, "total": disk.total},
        "cache": {"path": str(cache), "writable": _writable(place)},
        "extras": _extras(),
    }


def _extras() -> list[dict[str, Any]]:
    """A row for each optional package, those that only kullback's own tests need left out."""
    from kullback.core.environment import extras, installed

    rows = []
    for extra, packages in sorted(extras().items()):
        install = f"pip install 'kullback[{extra}]'"
        rows += [
            {"extra": extra, "package": package, "version": installed(package), "install": install}
            for package in sorted(packages)
            if extra != "test"
        ]
    return rows


def _writable(folder: Path) -> bool:
    """By trying: permission bits say nothing of read-only mounts, nor to root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
