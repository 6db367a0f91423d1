"""How a job is watched from a terminal: one bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import typer

__all__ = ["Progress"]


class Progress:
    """A listener for a job's events, and the bar that shows them. Use it as a context manager."""

    def __init__(self, *, quiet: bool = False, every: float = 10.0) -> None:
        from rich.console import Console

        self.console, self.quiet, self.every = Console(stderr=True, highlight=False), quiet, every
        self.bar: Any = None
        self.task: Any = None
        self.text, self.loss, self.said = "", "", 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Bar(*columns, TextColumn("{task.fields[loss]}"), console=self.console)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of a job: stage, part, note, progress, loss, evaluation or saved."""
        if self.quiet:
            return
        kind = event["kind"]
        if kind in ("stage", "part", "note"):
            self._begin(str(event["text"]), kind)
        elif kind == "loss":
            self.loss = f"loss {event['loss']:.4f}"
        elif kind == "evaluation" and "cross_entropy" in event:
            self._line(f"  step {event['step']}: validation cross-entropy {event['cross_entropy']:.4f}")
        elif kind == "progress":
            rate, unit = float(event.get("steps_a_second", 0.0)), str(event.get("unit", "step"))
            self._advance(int(event["step"]), int(event["steps"]), rate, unit)

    def _begin(self, text: str, kind: str) -> None:
        self.loss, self.said = "", time.monotonic()
        self._line(text)
        if kind != "note":
            self.text = text
            if self.bar is not None and self.task is not None:
                self.bar.remove_task(self.task)
                self.task = None

    def _advance(self, step: int, steps: int, rate: float, unit: str) -> None:
        if self.bar is not None:
            if self.task is None:
                self.task = self.bar.add_task(self.text.split(":")[0], total=steps, loss="")
            self.bar.update(self.task, completed=step, total=steps, loss=self.loss)
        elif time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            left = f"{(steps - step) / rate:.0f} s left" if rate > 0 else ""
            self._line("  " + ", ".join(part for part in (f"{unit} {step} of {steps}", self.loss, left) if part))

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False)
        else:
            typer.echo(text, err=True)

