"""`kullback show`: a paper, what it claims, and what was measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kullback.cli._text import measured, print_json, print_wrapped

if TYPE_CHECKING:
    from kullback.core.cards import Claim, Paper

__all__ = ["show"]


def show(
    slug: Annotated[str, typer.Argument(help="The paper's name, as `kullback papers` lists it.")],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a paper: its claims beside what was measured.

    And what the method is, its import paths, and how to run it.
    """
    from kullback.core.cards import load_paper
    from kullback.papers.results import load_result

    paper = load_paper(slug)
    result = load_result(paper.slug)
    if json_:
        print_json(_content(paper, result))
        return
    _print_head(paper)
    _print_claims(paper, result)
    _print_commands(paper)


def _content(paper: Paper, result: Mapping[str, Any] | None) -> dict[str, Any]:
    from dataclasses import asdict

    from kullback.papers.results import figure_path, paper_command

    figure = figure_path(paper.slug)
    kept = {name: value for name, value in (result or {}).items() if name not in ("rows", "metrics")}
    return {
        **asdict(paper), "slug": paper.name, "url": paper.url, "run": paper_command(paper.slug),
        "measured": kept or None, "figure": None if figure is None else str(figure),
    }  # fmt: skip


def _print_head(paper: Paper) -> None:
    print_wrapped(paper.title)
    authors = "1 author" if paper.authors == 1 else f"{paper.authors} authors"
    typer.echo(f"{paper.name}, no {paper.number} in the room {paper.room}, {paper.status}")
    typer.echo(f"{paper.date}, {authors}, {paper.url}\n")
    print_wrapped(paper.summary)
    typer.echo("\nat scale")
    print_wrapped(paper.scale, indent=2)
    if paper.implements:
        typer.echo("\nimports")
        for path in paper.implements:
            module, _, name = path.rpartition(".")
            typer.echo(f"  from {module} import {name}")


def _print_claims(paper: Paper, result: Mapping[str, Any] | None) -> None:
    typer.echo("\nclaims")
    by_key = {claim["key"]: claim for claim in (result or {}).get("claims", ())}
    for claim in paper.claims:
        found = by_key.get(claim.key)
        typer.echo(f"  {claim.key}: {'not measured' if found is None else found['verdict']}")
        print_wrapped(claim.paper, label="the paper  ", indent=4)
        print_wrapped(claim.ours, label="here       ", indent=4)
        print_wrapped(_measurement(claim, found), label="measured   ", indent=4)
        print_wrapped(claim.deviation, label="deviation  ", indent=4)
    if result is not None:
        where = result["environment"]
        typer.echo("\nmeasured with")
        machine = f"{where['threads']} thread(s) of {where['cpu']}, in {result['seconds']:.0f} s"
        versions = f"kullback {result['version']}, torch {where['torch']}, Python {where['python']}"
        print_wrapped(f"{versions}, {machine}, commit {result['commit'] or 'unknown'}", indent=2)


def _measurement(claim: Claim, found: Mapping[str, Any] | None) -> str:
    asked = "no threshold yet" if claim.threshold is None else f"asked {claim.op} {claim.threshold:g}"
    if claim.threshold_from == "first run":
        asked += ", fixed after a first run"
    over = f"{claim.metric}, {claim.statistic} over seeds {', '.join(map(str, claim.seeds))}"
    if found is None or found["verdict"] == "not attempted":
        return f"nothing yet; {asked} ({over})"
    return f"{measured(found)}, {asked} ({over})"


def _print_commands(paper: Paper) -> None:
    from kullback.papers.results import figure_path, paper_command

    if (figure := figure_path(paper.slug)) is not None:
        typer.echo(f"\nfigure\n  {figure}")
    if paper.status == "planned":
        typer.echo("\nnot in kullback yet: there is nothing to run")
        return
    typer.echo(f"\nrun it\n  {paper_command(paper.slug)}")
    minutes = paper.budget.seconds / 60
    needs = f"; it needs pip install 'kullback[{','.join(paper.needs)}]'" if paper.needs else ""
    print_wrapped(f"at most {minutes:.3g} minutes on {paper.budget.threads} thread(s){needs}", indent=2)
