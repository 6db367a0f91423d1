"""`kullback teacher-cache`: a teacher's top-K distributions over a text, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kullback.cli._text import print_json

__all__ = ["teacher_cache"]


def teacher_cache(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    teacher: Annotated[str, typer.Option(help="Model directory.")] = "",
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, or a folder of them.")] = "",
    kept: Annotated[int | None, typer.Option(help="Tokens kept at each position; 32 by default.")] = None,
    drawn: Annotated[int | None, typer.Option(help="Tokens drawn from the rest; 8 by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with the whole configuration.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, any key of the configuration.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Store a teacher's top-K log-probabilities, so that training needs no teacher in memory."""
    from dataclasses import asdict

    from kullback.cli._progress import Progress
    from kullback.core.config import load
    from kullback.jobs.teacher_cache import TeacherCacheConfig, run

    flags = [("teacher", teacher), ("data.train", data)]
    given = [f"{key}={json.dumps(value)}" for key, value in flags if value]
    given += [f"{key}={value}" for key, value in (("kept", kept), ("drawn", drawn)) if value is not None]
    settings = load(TeacherCacheConfig, config, [*given, *(set_ or [])])
    with Progress(quiet=json_) as progress:
        summary = run(settings, out, listen=progress)
    if json_:
        print_json({"cache": str(out), **asdict(summary)})
        return
    typer.echo(
        f"{out}: {summary.sequences} blocks of {summary.length} tokens, the top {summary.kept} of {summary.vocabulary} "
        f"and {summary.drawn} drawn from the rest"
    )
    typer.echo(f"  {summary.bytes_per_token:.1f} bytes a token; whole logits take {4 * summary.vocabulary}")
    typer.echo(f"  tail mass {summary.tail_mass:.2%} on average, {summary.tail_mass_99:.2%} at the 99th percentile")
    typer.echo(
        f"  truncation takes at most {summary.kl_bound:.4f} nats a token from KL(teacher, student) when the student is "
        f"uniform over the tail, {summary.kl_bound_1000:.4f} when its tail tokens fall to a thousandth of that"
        + ("; the drawn tokens give it back on average" if summary.drawn else "")
    )
