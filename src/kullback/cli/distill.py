"""`kullback distill`: a teacher's distribution brought into a student."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kullback.cli._jobs import free_folder, print_plan
from kullback.cli._text import print_json, print_table

if TYPE_CHECKING:
    from kullback.jobs.distill import DistillConfig

__all__ = ["distill"]


def distill(
    teacher: Annotated[str, typer.Option(help="Model directory, teacher cache, or server address.")] = "",
    student: Annotated[str, typer.Option(help="Model directory to train.")] = "",
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, or a folder of them.")] = "",
    objective: Annotated[str, typer.Option(help="A divergence by name, sinkd, pld or bd-kd.")] = "",
    config: Annotated[Path | None, typer.Option(help="A TOML file with the whole configuration.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, any key of the configuration.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/distill-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run directory.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Distil a teacher into a student. With no options: a small embedded pair, on the standard library's prose."""
    from kullback.cli._progress import Progress
    from kullback.core.errors import ConfigError
    from kullback.jobs import distill as job

    named = [name for name, value in (("--teacher", teacher), ("--student", student), ("--data", data)) if value]
    if resume is not None and (named or objective or config or set_ or out):
        raise ConfigError("--resume goes on under the configuration of the run: give no other option with it")
    if resume is not None:
        with Progress(quiet=json_) as progress:
            run = job.resume(resume, listen=progress)
    else:
        settings = _settings(config, set_ or [], teacher, student, data, objective)
        if dry_run:
            print_plan(job.plan(settings), as_json=json_)
            return
        with Progress(quiet=json_) as progress:
            run = job.run(settings, out or free_folder(Path("runs"), "distill"), listen=progress)
    if int(os.environ.get("RANK", "0")) == 0:  # under accelerate launch the first process speaks
        _show_report(run.path, as_json=json_)


def _settings(
    config: Path | None, overrides: list[str], teacher: str, student: str, data: str, objective: str
) -> DistillConfig:
    from kullback.core.config import load, to_dict
    from kullback.jobs.distill import DistillConfig, embedded

    flags = [("teacher", teacher), ("student", student), ("data.train", data), ("objective.name", objective)]
    given = [f"{key}={json.dumps(value)}" for key, value in flags if value]
    source: Any = config
    if config is None:
        source = to_dict(DistillConfig() if teacher or student else embedded())
    return load(DistillConfig, source, [*given, *overrides])


def _show_report(folder: Path, *, as_json: bool) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if as_json:
        print_json({"run": str(folder), **report})
        return
    columns = ["cross_entropy", "perplexity", "divergence"]
    titles = ["student", "seeds", "cross-entropy", "perplexity", "divergence to teacher"]
    rows = [[row["student"], str(row["seeds"]), *(_cell(row, column) for column in columns)] for row in report["rows"]]
    print_table(titles, rows)
    typer.echo("Validation text, nats a token; ± is the standard deviation over seeds.")
    if "divergence" in report:
        typer.echo(f"The divergence is {report['divergence']}.")
    if "gain" in report:
        gain = report["gain"]
        spread = "" if gain["spread"] is None else f" ± {gain['spread']:.3f}"
        typer.echo(
            f"Distilled beats cross-entropy alone in {gain['wins']} of {gain['of']} seeds, "
            f"by {gain['mean']:.3f}{spread} nats a token."
        )
    for name in report["written"]:
        typer.echo(f"  {folder / name}")


def _cell(row: dict[str, Any], column: str) -> str:
    if column not in row:
        return "-"
    spread = row.get(f"{column}_spread")
    return f"{row[column]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
