"""The table of all papers in the README: `python -m kullback.papers.table README.md` writes it from cards and results.

It stands between the lines `<!-- papers -->` and `<!-- /papers -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kullback.core.cards import Paper, papers
from kullback.core.errors import ConfigError, DataError, KullbackError
from kullback.core.files import atomic_write
from kullback.papers.results import load_result, standing

__all__ = ["rewrite", "stale", "table"]

_BEGIN, _END = "<!-- papers -->", "<!-- /papers -->"
_BLOCK = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)


def table(among: Iterable[Paper] | None = None, results: Path | None = None) -> str:
    """The papers as a Markdown table: number, name linked to arXiv, room, what it does, and the claims met here.

    results: the directory of the results, by default where they are found.
    """
    every = list(papers() if among is None else among)
    lines = ["| | method | room | what it does | claims met |", "|--:|---|---|---|---|"]
    ready = 0
    for paper in every:
        state = standing(paper, load_result(paper.slug, results))
        ready += paper.status == "ready"
        cells = [str(paper.number), f"[{paper.name}]({paper.url})", paper.room, _phrase(paper), state]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = f"Of {len(every)} methods {ready} can be used now, the others are planned"
    head += "; `kullback show NAME` says what each claims. \"+1\" is a claim that is measured and has no threshold."
    return "\n".join([head, "", *lines])


def stale(path: Path) -> bool:
    """Whether the table in the file is not the one that cards and results give now.

    Raises DataError when the file cannot be read or has no place for it.
    """
    text = _read(path)
    return _renewed(text) != text


def rewrite(path: Path) -> bool:
    """Put the table into its place in the file; returns whether that changed anything. Raises as `stale` does."""
    text = _read(path)
    renewed = _renewed(text)
    if renewed != text:
        atomic_write(path, renewed)
    return renewed != text


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(_BLOCK.findall(text)) != 1 or text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise DataError(f"{path} has no place for the table: put the lines {_BEGIN} and {_END} where it is to be")
    return text


def _renewed(text: str) -> str:
    block = f"{_BEGIN}\n{table()}\n{_END}"
    return _BLOCK.sub(lambda match: block, text)


def _phrase(paper: Paper) -> str:
    """The first sentence of the summary, without its full stop."""
    text = " ".join(paper.summary.split())
    return re.split(r"(?<=[^.][^.])\.(?= [A-Z])", text)[0].removesuffix(".")


def main(arguments: Sequence[str]) -> int:
    """Rewrite the table in each file that is named."""
    try:
        if not arguments:
            raise ConfigError("name the files with the table, as in `python -m kullback.papers.table README.md`")
        for name in arguments:
            rewrite(Path(name))
    except KullbackError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
