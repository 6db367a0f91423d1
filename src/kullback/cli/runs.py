"""`kullback runs`: what ran, with what, and what came out of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kullback.cli._text import print_json, print_table

__all__ = ["runs"]

runs = typer.Typer(help="List, show, compare and prune run directories.", rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@runs.command("ls")
def list_runs(
    root: Annotated[Path, typer.Argument(help="The directory below which to look.")] = Path("runs"),
    json_: _Json = False,
) -> None:
    """List the runs below a directory, oldest first."""
    from kullback.core.index import RunIndex

    rows = RunIndex(root).rows()
    if json_:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no runs below {root}")
        return
    print_table(["run", "kind", "seed", "status", "started", "step", "checkpoints"], [_cells(row) for row in rows])


@runs.command("show")
def show_run(run: Annotated[Path, typer.Argument(help="A run directory.")], json_: _Json = False) -> None:
    """Show the configuration, environment, metrics and files of a run."""
    content = _content(run)
    if json_:
        print_json(content)
        return
    typer.echo(content["path"])
    for title in ("run", "config", "environment", "metrics"):
        if content[title]:
            typer.echo(f"\n{title}")
            print_table([], [[key, _value(value)] for key, value in sorted(content[title].items())])
    typer.echo("\nfiles")
    for name in content["files"]:
        typer.echo(f"  {run / name}")


@runs.command("diff")
def compare_runs(
    first: Annotated[Path, typer.Argument(help="A run directory.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    json_: _Json = False,
) -> None:
    """Show how two runs differ in configuration and metrics."""
    one, two = _content(first), _content(second)
    found = {title: _differences(one[title], two[title]) for title in ("run", "config", "environment", "metrics")}
    if json_:
        print_json(found)
        return
    if not any(found.values()):
        typer.echo("no difference")
    for title, entries in found.items():
        if entries:
            typer.echo(title)
            print_table([], [[key, _value(values[0]), "->", _value(values[1])] for key, values in entries.items()])


@runs.command("prune")
def prune_runs(
    root: Annotated[Path, typer.Argument(help="A run directory, or one that holds several.")],
    keep: Annotated[int, typer.Option(help="Newest checkpoints to keep in each run.", min=0)] = 1,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would be freed.")] = False,
    json_: _Json = False,
) -> None:
    """Remove old checkpoints."""
    from kullback.core.index import RunIndex
    from kullback.core.runs import Run

    found = [(Run.open(root / row["path"]), row) for row in RunIndex(root).rows() if row["status"] != "damaged"]
    old = [(run, path) for run, _ in found for path in run.checkpoints()[: -keep or None]]
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for _, path in old]
    if yes:
        for run, _ in found:
            run.prune_checkpoints(keep)
    if json_:
        paths = [str(path) for _, path in old]
        print_json({"checkpoints": paths, "bytes": sum(sizes), "removed": yes})
        return
    for (_, path), size in zip(old, sizes):
        typer.echo(f"{_size(size):>10}  {path}")
    what = f"{len(old)} checkpoint{'' if len(old) == 1 else 's'}, {_size(sum(sizes))}"
    typer.echo(f"removed {what}" if yes else f"would remove {what}" + (" (--yes does it)" if old else ""))


def _content(path: Path) -> dict[str, Any]:
    from kullback.core.config import flat
    from kullback.core.index import describe_run
    from kullback.core.runs import Run

    run, row = Run.open(path), describe_run(path)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and _is_output(file, path))
    return {
        "path": str(path), "run": {key: row[key] for key in ("kind", "seed", "status", "step")},
        "config": flat(run.config), "environment": flat(run.environment()), "metrics": row["metrics"], "files": files,
    }  # fmt: skip


def _is_output(file: Path, root: Path) -> bool:
    parts = file.relative_to(root).parts
    return parts[0] != "ckpt" and not any(part.startswith(".") for part in parts)


def _differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, list[Any]]:
    keys = [*one, *(key for key in two if key not in one)]
    pairs = {key: [one.get(key), two.get(key)] for key in keys}
    # Compared as text, in which what is not a number equals itself.
    return {key: pair for key, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])}


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _cells(row: dict[str, Any]) -> list[str]:
    step = "-" if row["step"] is None else str(row["step"])
    seed, kept = str(row["seed"]), f"{row['checkpoints']}, {_size(row['bytes'])}"
    return [row["path"], row["kind"], seed, row["status"], _date(row["started"]), step, kept]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
