"""Made-up papers with reproductions of a few lines, written into a folder for the tests of what runs and shows them."""

from pathlib import Path
from typing import Any

from kullback.core.config import to_toml

CLAIM: dict[str, Any] = {
    "key": "gains", "paper": "It gains 3%.", "ours": "It gains at least 1%.", "metric": "gain", "op": ">=",
    "threshold": 1.0, "statistic": "mean", "seeds": [0, 1], "threshold_from": "card", "deviation": "Small models.",
}  # fmt: skip
CARD: dict[str, Any] = {
    "number": 70, "title": "Made Up: A Method", "arxiv": "2401.00001", "date": "2024-01", "authors": 2,
    "room": "distill", "status": "ready", "implements": ["kullback.core.cards.Paper"],
    "summary": "Does one thing. Use it there.", "scale": "One process.", "budget": {"seconds": 10, "threads": 1},
    "needs": [], "claims": [CLAIM],
}  # fmt: skip
REPRODUCE = """
from kullback.core.types import Report

def reproduce(run):
    run.event("began")
    with (run.path / "ran").open("a") as marks:
        marks.write("x")
    return Report(metrics={"gain": 1.0 + run.seed, "other": 2.0}, rows=[{"step": 1, "loss": 0.5}])
"""
DRAW = """
def draw(rows, path):
    path.write_text(f"<svg>{[row['seed'] for row in rows]}</svg>")
"""


def write_paper(folder: Path, slug: str, code: str = REPRODUCE, **changed: Any) -> None:
    """A paper's folder with a card, changed where it is said, and the code of its reproduction."""
    place = folder / slug
    place.mkdir(parents=True, exist_ok=True)
    (place / "card.toml").write_text(to_toml({**CARD, "slug": slug, **changed}))
    (place / "reproduce.py").write_text(code)
