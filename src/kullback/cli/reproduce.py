"""`kullback reproduce`: run papers over their seeds, and say which of their claims are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from kullback.cli._text import measured, print_json, print_table

if TYPE_CHECKING:
    from kullback.papers.runner import Outcome

__all__ = ["reproduce"]


def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG", help="Papers, by their names.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All papers whose method is here.")] = False,
    room: Annotated[str, typer.Option(help="The papers of a room.")] = "",
    table: Annotated[bool, typer.Option("--table", help="With --room: its methods side by side.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds, as in 0,1; the card's by default.")] = "",
    workers: Annotated[int, typer.Option(help="Seeds that run at the same time.", min=1)] = 1,
    engine: Annotated[str, typer.Option(help="Where they run: local or ray.")] = "local",
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; what is done there is kept.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Run papers and judge their claims.

    Exits with 1 when a claim is not met. What is recorded goes to results/ of the checkout, where there is one.
    """
    from kullback.cli._progress import Progress
    from kullback.core.errors import ConfigError, Interrupted
    from kullback.papers import runner
    from kullback.papers.results import checkout

    if [bool(slugs), all_, bool(room)].count(True) != 1:
        raise ConfigError("name the papers to reproduce, as in `kullback reproduce sinkd`, or give --all or --room")
    if table and not room:
        raise ConfigError("--table compares the methods of a room: name it with --room")
    root = Path("runs") / f"reproduce-{runner.code_digest()}" if out is None else out
    home = checkout()
    options: dict[str, Any] = {
        "root": root, "seeds": _seeds(seeds), "workers": workers, "engine": cast(Literal["local", "ray"], engine),
        "results": None if home is None else home / "results",
    }  # fmt: skip
    try:
        with Progress(quiet=json_) as progress:
            options["on_event"] = _Listener(progress)
            if table:
                return _compare(room, options, as_json=json_)
            outcomes = runner.reproduce_paper(_chosen(slugs, room), **options)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; seeds that are done stay in {root}, and the same command goes on") from None
    if json_:
        print_json([_content(outcome) for outcome in outcomes])
    else:
        _print(outcomes)
    return 0 if all(outcome.well for outcome in outcomes) else 1


def _chosen(slugs: list[str] | None, room: str) -> list[str]:
    """The papers named, or those that are ready: all, or of a room."""
    from kullback.core.cards import papers
    from kullback.core.errors import ConfigError

    if slugs:
        return slugs
    known = {paper.room for paper in papers()}
    if room and room not in known:
        raise ConfigError(f"there is no room {room!r}: there are {', '.join(sorted(known))}")
    found = [paper.slug for paper in papers() if paper.status == "ready" and room in ("", paper.room)]
    if not found:
        raise ConfigError(f"no paper of the room {room} is ready: `kullback papers` lists what is")
    return found


def _compare(room: str, options: dict[str, Any], *, as_json: bool) -> int:
    """Run the comparison of a room and print its table, one part a task."""
    from kullback.papers.comparison import compare_room

    found = compare_room(room, **options)
    if as_json:
        print_json({**found.content, "errors": dict(found.errors), "path": str(found.path)})
        return 1 if found.errors else 0
    columns = found.content["columns"]
    for task in dict.fromkeys(line["task"] for line in found.content["table"]):
        lines = [line for line in found.content["table"] if line["task"] == task]
        shown = [column for column in columns if any(column in line for line in lines)]
        cells = [[line["method"], *(_mean(line, column) for column in shown)] for line in lines]
        print_table([task, *(columns[column] for column in shown)], cells)
        typer.echo()
    typer.echo(f"± is the standard deviation over {len(found.content['seeds'])} seeds.")
    for key, error in found.errors.items():
        typer.echo(f"{key.replace('/', ' ')} failed: {error}")
    where = found.recorded or found.path
    typer.echo(f"{where}, {where.with_suffix('.svg')}")
    return 1 if found.errors else 0


def _mean(line: Mapping[str, Any], column: str) -> str:
    if column not in line:
        return "-"
    spread = line[f"{column}_spread"]
    return f"{line[column]:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _seeds(text: str) -> list[int] | None:
    from kullback.core.errors import ConfigError

    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds takes numbers with commas between them, as in 0,1, got {text!r}")
    return [int(part) for part in parts]


class _Listener:
    """Says what the engine does, one line for each unit that ends."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def __call__(self, event: Mapping[str, Any]) -> None:
        paper, _, part = event["key"].partition("/")
        name = f"{paper.replace('_', '-')} {part.replace('-', ' ')}"
        what = {
            "skipped": "done before",
            "started": "running",
            "done": f"done in {event.get('seconds', 0.0):.1f} s",
            "failed": f"failed: {event.get('error', '')}",
        }[event["kind"]]
        self.progress({"kind": "note", "text": f"{name}: {what}"})


def _content(outcome: Outcome) -> dict[str, Any]:
    kept = {name: value for name, value in outcome.content.items() if name != "rows"}
    return {
        **kept, "slug": outcome.paper.name, "errors": dict(outcome.errors), "complete": outcome.complete,
        "well": outcome.well, "path": str(outcome.path),
        "figure": None if outcome.figure is None else str(outcome.figure),
        "recorded": None if outcome.recorded is None else str(outcome.recorded),
    }  # fmt: skip


def _print(outcomes: Sequence[Outcome]) -> None:
    rows = []
    for outcome in outcomes:
        for claim in outcome.content["claims"]:
            value = "-" if claim["verdict"] == "not attempted" else measured(claim)
            asked = "-" if claim["threshold"] is None else f"{claim['statistic']} {claim['op']} {claim['threshold']:g}"
            rows.append([outcome.paper.name, claim["key"], value, asked, claim["verdict"]])
    print_table(["paper", "claim", "measured", "asked", "verdict"], rows)
    typer.echo()
    for outcome in outcomes:
        for key, error in outcome.errors.items():
            trace = outcome.path.parent.parent / key / "traceback.txt"
            typer.echo(f"{key.replace('/', ' ')} failed: {error} (see {trace})")
        typer.echo(f"{outcome.paper.name}: {_where(outcome)}")


def _where(outcome: Outcome) -> str:
    if outcome.recorded is not None:
        return f"{outcome.recorded}" + (f", {outcome.recorded.with_suffix('.svg')}" if outcome.figure else "")
    written = f"{outcome.path}" + (f", {outcome.figure}" if outcome.figure else "")
    if outcome.complete:
        return written
    why = "a seed failed" if outcome.errors else "the seeds are not those of the card"
    return f"{written}; not recorded among the results, as {why}"
