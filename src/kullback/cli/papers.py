"""`kullback papers`: the catalogue of methods, and how many of each one's claims are met here."""

from __future__ import annotations

from typing import Annotated

import typer

from kullback.cli._text import print_json, print_table

__all__ = ["papers"]


def papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words that a paper must contain, all of them.")] = None,
    room: Annotated[str, typer.Option(help="Only the papers of this room.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the papers, those that fit a query best first."""
    from kullback.core import cards
    from kullback.core.errors import ConfigError
    from kullback.papers.results import load_result, standing, tally

    every = cards.papers()
    rooms = sorted({paper.room for paper in every})
    if room and room not in rooms:
        raise ConfigError(f"no paper is in the room {room!r}: the rooms are {', '.join(rooms)}")
    found = [paper for paper in cards.find(" ".join(query or ()), every) if room in ("", paper.room)]
    results = {paper.slug: load_result(paper.slug) for paper in found}
    if json_:
        content = []
        for paper in found:
            met, total = tally(paper, results[paper.slug])
            content.append({
                "number": paper.number, "slug": paper.name, "title": paper.title, "room": paper.room,
                "status": paper.status, "arxiv": paper.arxiv, "claims": total,
                "met": None if results[paper.slug] is None else met,
            })  # fmt: skip
        print_json(content)
        return
    if not found:
        typer.echo("no paper has all of these words")
        return
    rows = []
    for paper in found:
        state = standing(paper, results[paper.slug])
        claims = "-" if state == "planned" else state
        rows.append([str(paper.number), paper.name, paper.room, paper.status, claims, paper.title])
    print_table(["no", "paper", "room", "status", "claims met", "title"], rows, cut=True)
