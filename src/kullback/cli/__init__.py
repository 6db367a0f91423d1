"""The command line: one file a command, its function of the same name; what is heavy is imported inside the function.

Exit codes: 0 done, 1 a claim was not met, 2 usage or bad input (one line on standard error), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from kullback import __version__
from kullback.core.errors import KullbackError

__all__ = ["application", "execute", "main"]

# In the order of the help. A command is a module of this package and its function, or Typer group, of the same name.
_COMMANDS = (
    "distill",
    "align",
    "teacher_cache",
    "papers",
    "show",
    "reproduce",
    "runs",
    "doctor",
)

# The base of typer's usage errors, which it exports under no name of its own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main() -> NoReturn:
    """Run the command line on the arguments of the process, and exit with its code."""
    # Threads that wait for each other sleep: spinning, they take the very core that the other waits for wherever
    # anything else runs beside them, and a step can take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(execute())


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (those of the process by default) and return the exit code."""
    command = typer.main.get_command(application())
    try:
        status = command.main(
            args=None if arguments is None else list(arguments), prog_name="kullback", standalone_mode=False
        )
    except KullbackError as error:
        return _fail(str(error), error.exit_code)
    except _UsageError as error:
        return _fail(_usage_sentence(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    return status if isinstance(status, int) else 0


def application() -> typer.Typer:
    """The Typer application with all its commands."""
    app = typer.Typer(
        help="kullback brings one distribution to another.",
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_begin)
    for name in _COMMANDS:
        command = getattr(import_module(f"kullback.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name.replace("_", "-"), callback=_help, invoke_without_command=True)
        else:
            app.command(name.replace("_", "-"))(command)
    return app


def _begin(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    _help(context)


def _help(context: typer.Context) -> None:
    """A group without a command says what it has."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _fail(message: str, code: int) -> int:
    typer.echo(f"error: {' '.join(message.splitlines())}", err=True)
    return code


def _usage_sentence(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "kullback"
    if option := getattr(error, "option_name", None):
        near = sorted(getattr(error, "possibilities", None) or [])
        return f"no such option {option}: " + (f"did you mean {' or '.join(near)}?" if near else f"see {where} --help")
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return f"{text[:1].lower()}{text[1:].rstrip('.')} (see {where} --help)"
