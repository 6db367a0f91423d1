"""Reproductions: one unit of work per paper and seed, then a verdict on each claim, a table and a figure.

Below the root a paper has <slug>/seed-<n>/, a run directory each, and <slug>/<slug>.json and .svg over all seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import kullback
from kullback.core.cards import CARDS, Claim, Paper, load_paper, verdict
from kullback.core.engine import Unit, UnitResult, run_units
from kullback.core.environment import environment, extras, installed
from kullback.core.errors import ConfigError, MissingExtra
from kullback.core.files import atomic_write, finite
from kullback.core.runs import Run
from kullback.core.types import Report

__all__ = ["Outcome", "code_digest", "reproduce_paper"]

Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a paper. content: of the file <slug>.json at `path`; figure: its path, or None where none was drawn.

    errors: of the seeds that failed, a sentence each, the traceback below `path`; complete: whether every seed of the
    card ran to its end, which is what makes it evidence; recorded: the file in results/ that was written, or None.
    """

    paper: Paper
    path: Path
    content: Mapping[str, Any]
    figure: Path | None = None
    errors: Mapping[str, str]
    complete: bool
    recorded: Path | None = None

    @property
    def well(self) -> bool:
        """Whether no seed failed and no claim came out "not met"."""
        return not self.errors and all(claim["verdict"] != "not met" for claim in self.content["claims"])


def reproduce_paper(
    slugs: str | Sequence[str],
    *,
    root: Path,
    seeds: Sequence[int] | None = None,
    workers: int = 1,
    engine: Literal["local", "ray"] = "local",
    on_event: Listener | None = None,
    results: Path | None = None,
    cards: Path = CARDS,
) -> list[Outcome]:
    """Run papers over their cards' seeds, or over `seeds`, in processes of their own, and judge their claims.

    What is done below `root` already is not done again. A seed that fails keeps its traceback and counts as a claim not
    met. results: a directory that takes <slug>.json and <slug>.svg of papers whose seeds are the card's and all ended
    well. on_event: takes the engine's events; cards: the folder of the cards, kullback's own by default.

    Raises ConfigError for an unknown or planned paper, MissingExtra for what a card needs and is not installed.
    """
    papers = [load_paper(slug, cards) for slug in ([slugs] if isinstance(slugs, str) else dict.fromkeys(slugs))]
    _check(papers, seeds)
    wanted = {paper.slug: tuple(sorted(set(seeds or paper.seeds))) for paper in papers}
    options: dict[str, Any] = {"root": root, "workers": workers, "engine": engine, "on_event": on_event}
    ran = _run(papers, {paper.slug: _seed_units(paper, wanted[paper.slug], cards) for paper in papers}, options)
    outcomes = {}
    for paper in papers:
        by_seed = {seed: ran[f"{paper.slug}/seed-{seed}"] for seed in wanted[paper.slug]}
        outcomes[paper.slug] = _gather(paper, by_seed, root / paper.slug)
        shutil.rmtree(root / paper.slug / "figure", ignore_errors=True)  # drawn anew: the seeds may be others
    drawable = [paper for paper in papers if outcomes[paper.slug].content["rows"]]
    figures = _run(drawable, {paper.slug: _figure_units(paper, cards) for paper in drawable}, options)
    return [_finish(outcomes[paper.slug], figures.get(f"{paper.slug}/figure"), results) for paper in papers]


def _run(papers: Sequence[Paper], units: Mapping[str, list[Unit]], options: dict[str, Any]) -> dict[str, UnitResult]:
    """The results by key; papers that want the same number of threads run side by side."""
    found: dict[str, UnitResult] = {}
    for threads in sorted({paper.budget.threads for paper in papers}):
        batch = [unit for paper in papers if paper.budget.threads == threads for unit in units[paper.slug]]
        found |= {result.key: result for result in run_units(batch, threads=threads, **options)}
    return found


def _seed_units(paper: Paper, seeds: Sequence[int], cards: Path) -> list[Unit]:
    return [
        Unit(
            key=f"{paper.slug}/seed-{seed}",
            call=f"{__name__}:_one_seed",
            arguments={"slug": paper.slug, "seed": seed, **_elsewhere(cards)},
        )
        for seed in seeds
    ]


def _figure_units(paper: Paper, cards: Path) -> list[Unit]:
    arguments = {"slug": paper.slug, **_elsewhere(cards)}
    return [Unit(key=f"{paper.slug}/figure", call=f"{__name__}:_figure", arguments=arguments)]


def _elsewhere(cards: Path) -> dict[str, str]:
    return {} if cards == CARDS else {"cards": str(cards.resolve())}


def code_digest() -> str:
    """Twelve hexadecimal digits that stand for the package's source: a run of other code is another run."""
    folder = Path(kullback.__file__).resolve().parent
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def _check(papers: Sequence[Paper], seeds: Sequence[int] | None) -> None:
    if not papers:
        raise ConfigError("there is no paper to reproduce: name one, as in `kullback reproduce sinkd`")
    if seeds is not None and (not seeds or min(seeds) < 0):
        raise ConfigError(f"seeds are numbers from 0 on, at least one, got {list(seeds)}")
    for paper in papers:
        if paper.status == "planned":
            raise ConfigError(f"{paper.name} is planned: its method is not in kullback yet, so there is nothing to run")
    offered = extras()
    for paper in papers:
        for extra in paper.needs:
            if extra not in offered:
                known = ", ".join(sorted(offered))
                raise ConfigError(f"{paper.name} needs the extra {extra}, but those of kullback are {known}")
            if missing := [package for package in offered[extra] if installed(package) is None]:
                raise MissingExtra(missing[0], extra=extra)


# --- in the unit's process ---


def _module(slug: str, cards: str | None) -> Any:
    import kullback.papers

    if cards is not None:
        kullback.papers.__path__.append(cards)
    return import_module(f"kullback.papers.{slug}.reproduce")


def _one_seed(folder: Path, *, slug: str, seed: int, cards: str | None = None) -> dict[str, Any]:
    """A unit: the paper's reproduction at one seed, its report kept in the run directory."""
    module = _module(slug, cards)
    run = Run.start(folder, {"paper": slug}, kind="reproduce", seed=seed, resume=True)
    report = module.reproduce(run)
    if not isinstance(report, Report):
        raise ConfigError(f"the reproduction of {slug} returned a {type(report).__name__}: it returns a Report")
    metrics = {name: float(value) for name, value in report.metrics.items()}
    run.report({"metrics": metrics, "rows": [dict(row) for row in report.rows]})
    here = environment()
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    where = {"python": here["python"], "torch": here["versions"].get("torch"), "threads": here["threads"]}
    return {**found, "commit": here["commit"], "environment": {**where, "cpu": here["cpu"]}}


def _figure(folder: Path, *, slug: str, cards: str | None = None) -> dict[str, Any]:
    """A unit: the paper's figure from the rows of all seeds, where its reproduction has a `draw`."""
    draw = getattr(_module(slug, cards), "draw", None)
    if draw is None:
        return {"drawn": False}
    draw(json.loads((folder.parent / f"{slug}.json").read_text(encoding="utf-8"))["rows"], folder / f"{slug}.svg")
    return {"drawn": True}


# --- what came of it ---


def _gather(paper: Paper, ran: Mapping[int, UnitResult], folder: Path) -> Outcome:
    done = {seed: result.result for seed, result in ran.items() if result.status == "done"}
    metrics = {seed: result["metrics"] for seed, result in done.items()}
    whole = tuple(ran) == paper.seeds
    claims = paper.claims if whole else tuple(replace(claim, seeds=tuple(ran)) for claim in paper.claims)
    first: Mapping[str, Any] = next(iter(done.values()), {})
    content = {
        "slug": paper.slug,
        "number": paper.number,
        "version": kullback.__version__,
        "commit": ", ".join(sorted({str(result["commit"]) for result in done.values()})) or None,
        "environment": first.get("environment", {}),
        "seconds": round(sum(result.seconds for result in ran.values()), 1),
        "seeds": list(ran),
        "claims": [_judge(claim, metrics, ran) for claim in claims],
        "metrics": {str(seed): values for seed, values in metrics.items()},
        "rows": [{**row, "seed": seed} for seed, result in done.items() for row in result["rows"]],
    }
    content = finite(content)
    path = folder / f"{paper.slug}.json"
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    errors = {result.key: result.error for result in ran.values() if result.status == "failed"}
    return Outcome(paper=paper, path=path, content=content, errors=errors, complete=whole and not errors)


def _judge(claim: Claim, metrics: Mapping[int, Mapping[str, float]], ran: Mapping[int, UnitResult]) -> dict[str, Any]:
    attempted = any(claim.metric in values for values in metrics.values())
    # A seed that failed, or kept the number to itself, is not a number.
    per_seed = {seed: metrics.get(seed, {}).get(claim.metric, math.nan) for seed in ran if seed in claim.seeds}
    failed = len(metrics) < len(ran)
    found = verdict(claim, per_seed if attempted or failed else {})
    return {
        "key": claim.key, "metric": claim.metric, "op": claim.op, "threshold": claim.threshold,
        "statistic": claim.statistic, "value": found.value, "spread": found.spread,
        "per_seed": {str(seed): value for seed, value in per_seed.items()}, "verdict": found.verdict,
    }  # fmt: skip


def _finish(outcome: Outcome, drawn: UnitResult | None, results: Path | None) -> Outcome:
    slug, figure = outcome.paper.slug, None
    errors = dict(outcome.errors)
    if drawn is not None and drawn.status == "failed":
        errors[drawn.key] = drawn.error
    elif drawn is not None and drawn.result["drawn"]:
        figure = outcome.path.with_suffix(".svg")
        atomic_write(figure, (drawn.path / f"{slug}.svg").read_bytes())
    recorded = None
    if results is not None and outcome.complete:
        recorded = results / f"{slug}.json"
        atomic_write(recorded, outcome.path.read_bytes())
        if figure is not None:
            atomic_write(recorded.with_suffix(".svg"), figure.read_bytes())
    return replace(outcome, figure=figure, errors=errors, recorded=recorded)
