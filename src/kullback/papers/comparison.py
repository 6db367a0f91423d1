"""The methods of a room side by side: one unit of work per seed, then a table of means with their spread, and a figure.

A room's module `kullback.papers.rooms.<room>` has SEEDS, THREADS, COLUMNS (metric -> title), `compare(run) -> rows` for
run.seed, each row with its task and method, and `draw(rows, path)`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import kullback
from kullback.core.engine import Unit, run_units
from kullback.core.environment import environment
from kullback.core.errors import ConfigError
from kullback.core.files import atomic_write, finite
from kullback.core.runs import Run

__all__ = ["Comparison", "StepClock", "compare_room", "compared_rooms"]

Listener = Callable[[Mapping[str, Any]], None]
_FOLDER = Path(__file__).parent / "rooms"


class StepClock:
    """A job's listener that keeps when each step ended."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "progress":
            self._times.append(time.perf_counter())

    @property
    def milliseconds(self) -> float | None:
        """The median from one step to the next; None of less than two steps."""
        gaps = [later - earlier for earlier, later in pairwise(self._times)]
        return 1000 * statistics.median(gaps) if gaps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of a room's comparison. content: of the JSON file at `path`, its table one line a task and method.

    errors: of the seeds that failed; recorded: the file in results/rooms/ that was written, or None.
    """

    room: str
    path: Path
    content: Mapping[str, Any]
    errors: Mapping[str, str]
    recorded: Path | None = None


def compared_rooms() -> list[str]:
    """The rooms that have a comparison."""
    return sorted(path.stem for path in _FOLDER.glob("[a-z]*.py"))


def compare_room(
    room: str,
    *,
    root: Path,
    seeds: Sequence[int] | None = None,
    workers: int = 1,
    engine: Literal["local", "ray"] = "local",
    on_event: Listener | None = None,
    results: Path | None = None,
) -> Comparison:
    """Run the comparison of a room over its seeds, or over `seeds`, in processes of their own.

    What is done below `root` already is not done again. results: a directory that takes rooms/<room>.json and .svg when
    the seeds are the room's own and all ended well. Raises ConfigError for a room that has no comparison.
    """
    if room not in compared_rooms():
        raise ConfigError(f"there is no comparison of {room!r}: there are those of {', '.join(compared_rooms())}")
    module = import_module(f"kullback.papers.rooms.{room}")
    wanted = tuple(dict.fromkeys(seeds or module.SEEDS))
    units = [
        Unit(key=f"{room}/seed-{seed}", call=f"{__name__}:_one_seed", arguments={"room": room, "seed": seed})
        for seed in wanted
    ]
    place = root / "rooms"
    ran = run_units(units, root=place, threads=module.THREADS, workers=workers, engine=engine, on_event=on_event)
    done = {seed: result.result["rows"] for seed, result in zip(wanted, ran, strict=True) if result.status == "done"}
    rows = [{**row, "seed": seed} for seed, found in done.items() for row in found]
    here = environment()
    content = finite({
        "room": room, "version": kullback.__version__, "commit": here["commit"], "seeds": list(wanted),
        "environment": {"cpu": here["cpu"], "torch": here["versions"].get("torch"), "threads": module.THREADS},
        "seconds": round(sum(r.seconds for r in ran), 1), "columns": dict(module.COLUMNS),
        "table": _table(rows, list(module.COLUMNS)), "rows": rows,
    })  # fmt: skip
    path = place / room / f"{room}.json"
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if rows:
        module.draw(content["rows"], path.with_suffix(".svg"))
    errors = {r.key: r.error for r in ran if r.status == "failed"}
    outcome = Comparison(room=room, path=path, content=content, errors=errors)
    if results is None or errors or wanted != tuple(module.SEEDS):
        return outcome
    for ending in (".json", ".svg"):
        atomic_write(results / "rooms" / f"{room}{ending}", path.with_suffix(ending).read_bytes())
    return replace(outcome, recorded=results / "rooms" / f"{room}.json")


def _one_seed(folder: Path, *, room: str, seed: int) -> dict[str, Any]:
    """A unit: the room's comparison at one seed."""
    module = import_module(f"kullback.papers.rooms.{room}")
    run = Run.start(folder, {"room": room}, kind="comparison", seed=seed, resume=True)
    rows = [dict(row) for row in module.compare(run)]
    run.report({"rows": rows})
    return {"rows": rows}


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """One line a task and method, in the order of the rows: the mean of each column, its deviation over seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    table = []
    for (task, method), group in groups.items():
        line: dict[str, Any] = {"task": task, "method": method, "seeds": len(group)}
        for column in columns:
            values = [row[column] for row in group if row.get(column) is not None]
            if values:
                line[column] = statistics.fmean(values)
                line[f"{column}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(line)
    return table
