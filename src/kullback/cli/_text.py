"""What the commands that read print: columns of plain text, wrapped sentences, and JSON."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from kullback.core.files import finite

__all__ = ["measured", "print_json", "print_table", "print_wrapped"]


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, cut: bool = False) -> None:
    """Columns of plain text, the last one ragged; `cut` shortens lines to the width of the terminal, if it is one."""
    lines = [titles, *rows] if titles else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    limit = shutil.get_terminal_size().columns if cut and sys.stdout.isatty() else None
    for line in lines:
        text = "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        typer.echo(text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…")


def print_wrapped(text: str, *, label: str = "", indent: int = 0) -> None:
    """A paragraph in lines of at most 100 characters, hanging behind its label."""
    head = " " * indent + label
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    filled = textwrap.wrap(
        " ".join(text.split()), width, initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    typer.echo("\n".join(filled))


def print_json(content: Any) -> None:
    """JSON, in which null stands for what is not a number or infinite."""
    typer.echo(json.dumps(finite(content), indent=2))


def measured(claim: Mapping[str, Any]) -> str:
    """What a result says of a claim, in four digits, with the standard deviation where there are several seeds.

    >>> measured({"value": 0.8201, "spread": 0.0282, "per_seed": {"0": 0.80021, "1": 0.84009}})
    '0.8201 ± 0.0282'
    >>> measured({"value": 1.0, "spread": 0.0, "per_seed": {"0": 1.0}}), measured({"value": None})
    ('1', 'not finite')
    """
    if claim["value"] is None:
        return "not finite"
    several = len(claim["per_seed"]) > 1 and claim["spread"] is not None
    return f"{claim['value']:.4g}" + (f" ± {claim['spread']:.3g}" if several else "")
