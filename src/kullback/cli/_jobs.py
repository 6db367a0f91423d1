"""What the commands that run a job share: a free run directory, and the plan as it is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kullback.cli._text import print_json, print_table

__all__ = ["free_folder", "print_plan"]


def free_folder(root: Path, name: str) -> Path:
    """The first of name-1, name-2, ... in root that is not there yet."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"


def print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    """What a job would do, one line a quantity."""
    if as_json:
        print_json(plan)
        return
    print_table([], [[key.replace("_", " "), f"{value:,}"] for key, value in plan.items()])
