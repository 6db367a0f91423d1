"""`kullback align`: a language model brought toward what a reward or preferences ask for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kullback.cli._jobs import free_folder, print_plan
from kullback.cli._text import print_json, print_table

if TYPE_CHECKING:
    from kullback.jobs.align import AlignConfig

__all__ = ["align"]


def align(
    model: Annotated[str, typer.Option(help="Model directory to align.")] = "",
    reference: Annotated[list[str] | None, typer.Option(help="Reference model; several are averaged.")] = None,
    data: Annotated[str, typer.Option(help="JSONL or Parquet: prompts, completions or pairs.")] = "",
    method: Annotated[str, typer.Option(help="A method by name, as grpo or f-dpo.")] = "",
    reward: Annotated[str, typer.Option(help="exact, regex, arithmetic, module:function, or a model.")] = "",
    config: Annotated[Path | None, typer.Option(help="A TOML file with the whole configuration.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, any key of the configuration.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/align-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run directory.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Align a language model. With no options: a small model that adds and is often wrong learns to be right."""
    from kullback.cli._progress import Progress
    from kullback.core.errors import ConfigError
    from kullback.core.runs import Run

    named = model or reference or data or method or reward
    if resume is not None and (named or config or set_ or out):
        raise ConfigError("--resume goes on under the configuration of the run: give no other option with it")
    if resume is None:
        _check_paths([("model", model), *(("reference", place) for place in reference or [])], data, out)
    else:
        Run.open(resume)
    from kullback.jobs import align as job

    if resume is not None:
        with Progress(quiet=json_) as progress:
            run = job.resume(resume, listen=progress)
    else:
        flags = {"model": model, "data.train": data, "method.name": method, "reward.name": reward}
        settings = _settings(config, set_ or [], flags, reference or [])
        if dry_run:
            print_plan(job.plan(settings), as_json=json_)
            return
        with Progress(quiet=json_) as progress:
            run = job.run(settings, out or free_folder(Path("runs"), "align"), listen=progress)
    if int(os.environ.get("RANK", "0")) == 0:  # under accelerate launch the first process speaks
        _show_report(run.path, as_json=json_)


def _check_paths(models: list[tuple[str, str]], data: str, out: Path | None) -> None:
    """Say what is not there, or is there already, before the seconds that it takes to load what reads it."""
    from kullback.core.errors import CheckpointError, DataError

    for role, place in models:
        served = role == "reference" and place.startswith(("http://", "https://"))
        if place and not served and not Path(place).expanduser().is_dir():
            raise DataError(f"{role} {place} is not a directory: download the model first and name its folder")
    if data and not Path(data).expanduser().exists():
        raise DataError(f"{data} does not exist: name a file of JSONL or Parquet, or a folder of them")
    if out is not None and (out / "run.toml").is_file():
        raise CheckpointError(f"{out} already holds a run: resume it (--resume) or choose another directory")


def _settings(
    config: Path | None, overrides: list[str], flags: dict[str, str], reference: list[str]
) -> AlignConfig:
    from kullback.core.config import load, to_dict
    from kullback.jobs.align import AlignConfig, embedded

    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value]
    if reference:
        given.append(f"reference={json.dumps(reference)}")
    source: Any = config
    if config is None:
        source = to_dict(AlignConfig() if flags["model"] else embedded())
    return load(AlignConfig, source, [*given, *overrides])


def _show_report(folder: Path, *, as_json: bool) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if as_json:
        print_json({"run": str(folder), **report})
        return
    titles = {
        "reward": "reward", "pass_1": "pass@1", "pass_k": f"pass@{report['k']}", "accuracy": "accuracy", "loss": "loss",
        "divergence": "KL to reference", "entropy": "entropy", "distinct": "distinct-2",
    }  # fmt: skip
    shown = [key for key in titles if any(key in row for row in report["rows"])]
    rows = [
        [row["policy"], str(row["seeds"]), *(_cell(row, key) for key in shown)] for row in report["rows"]
    ]
    print_table(["policy", "seeds", *(titles[key] for key in shown)], rows)
    typer.echo(
        "Validation prompts; KL in nats a completion, entropy in nats a token; [95% interval over prompts], or ± the "
        "standard error; over seeds ± is the standard deviation."
    )
    for note in report.get("notes", []):
        typer.echo(f"  note: {note}.")
    for name in report["written"]:
        typer.echo(f"  {folder / name}")


def _cell(row: dict[str, Any], key: str) -> str:
    """The mean, and how sure it is: over seeds where there are several, else over prompts."""
    if key not in row:
        return "-"
    text = f"{row[key]:.3f}"
    if row.get(f"{key}_spread") is not None:
        return f"{text} ± {row[f'{key}_spread']:.3f}"
    if f"{key}_low" in row:
        return f"{text} [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"
    return f"{text} ± {row[f'{key}_error']:.3f}" if f"{key}_error" in row else text
