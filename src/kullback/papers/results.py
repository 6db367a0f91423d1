"""What was measured: results/<slug>.json as `kullback reproduce` wrote it, the evidence behind every verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kullback
from kullback.core.cards import Paper
from kullback.core.errors import DataError

__all__ = ["checkout", "figure_path", "load_result", "paper_command", "results_directory", "standing", "tally"]


def checkout() -> Path | None:
    """The root of the repository that kullback runs from, or None for an installed package."""
    root = Path(kullback.__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "kullback").is_dir() else None


def results_directory() -> Path | None:
    """Where results are read from: the checkout's results/, else those that the package was built with, else None."""
    root = checkout()
    places = [Path(kullback.__file__).resolve().parent / "results"]
    if root is not None:
        places.insert(0, root / "results")
    return next((place for place in places if place.is_dir()), None)


def load_result(slug: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The result of a paper, None when it was not measured.

    folder: where to look instead of `results_directory()`. Raises DataError for a file that is damaged.
    """
    folder = results_directory() if folder is None else folder
    path = None if folder is None else folder / f"{slug}.json"
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for claim in content["claims"]:
            claim["key"], claim["verdict"], claim["value"], claim["spread"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"run `{paper_command(slug)}` again"
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error
    found: dict[str, Any] = content
    return found


def figure_path(slug: str) -> Path | None:
    """The figure beside the result of a paper, or None."""
    folder = results_directory()
    path = None if folder is None else folder / f"{slug}.svg"
    return path if path is not None and path.is_file() else None


def paper_command(slug: str) -> str:
    """The command that measures a paper."""
    return f"kullback reproduce {slug.replace('_', '-')}"


def tally(paper: Paper, result: Mapping[str, Any] | None) -> tuple[int, int]:
    """How many of the card's claims the result says are met, and how many have a threshold to meet."""
    verdicts = {claim["key"]: claim["verdict"] for claim in (result or {}).get("claims", ())}
    judged = [claim.key for claim in paper.claims if claim.threshold is not None]
    return sum(verdicts.get(key) == "met" for key in judged), len(judged)


def standing(paper: Paper, result: Mapping[str, Any] | None) -> str:
    """A paper's state in short: "planned", "not run", or the claims met as "4/5", and "+1" for one only measured."""
    if result is None:
        return "planned" if paper.status == "planned" else "not run"
    met, judged = tally(paper, result)
    measured = len(paper.claims) - judged
    return f"{met}/{judged}" + (f" +{measured}" if measured else "")
