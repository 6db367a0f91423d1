"""Figures for runs: matplotlib is imported inside, nothing is shown, and the same numbers give the same file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["figure"]


@contextmanager
def figure(path: Path, *, columns: int = 1, size: tuple[float, float] = (5.0, 3.4)) -> Iterator[Any]:
    """A matplotlib figure that is saved as SVG at `path` on leaving; yields its axes (a list when columns > 1).

    size: inches of one panel.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    options: Any = {"svg.hashsalt": path.stem, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0}
    with matplotlib.rc_context(options):
        canvas = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots(1, columns)
        yield list(axes) if columns > 1 else axes
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format="svg", metadata={"Date": None})
