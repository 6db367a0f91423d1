"""The cards of the papers: what each claims, what is claimed here, and how a measurement is judged.

A card is data, papers/<slug>/card.toml. It is read without importing the paper's code, torch or anything else heavy.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kullback.core.config import load, read_toml
from kullback.core.errors import ConfigError

__all__ = [
    "CARDS", "Budget", "Claim", "Paper", "Verdict", "find", "load_paper", "papers", "resolve", "slugs", "verdict",
]  # fmt: skip

CARDS = Path(__file__).resolve().parent.parent / "papers"  # as data: core imports no room above it

Room = Literal[
    "distill", "align", "decode", "diagnose", "models", "compress", "optim", "sample", "stream", "recommend",
    "programs", "divergences", "data",
]  # fmt: skip


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


_STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "mean": _mean, "median": statistics.median, "min": min, "max": max,
}  # fmt: skip
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a reproduction may take, all its seeds one after the other: seconds, on so many threads."""

    seconds: float
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement that can come out false: `statistic` of `metric` over `seeds`, compared by `op` with `threshold`.

    paper: what the paper reports; ours: what is claimed here; deviation: how the two differ, always said. statistic:
    "every" asks it of each seed. threshold_from: "card" (written before any run), "first run" (fixed after one), or
    "open", which has no threshold yet and is only measured.
    """

    key: str
    paper: str
    ours: str
    metric: str
    op: Literal[">=", "<=", ">", "<"]
    threshold: float | None = None
    statistic: Literal["mean", "median", "min", "max", "every"]
    seeds: tuple[int, ...]
    threshold_from: Literal["card", "first run", "open"]
    deviation: str

    def __post_init__(self) -> None:
        for name in ("key", "paper", "ours", "metric", "deviation"):
            if not getattr(self, name).strip():
                raise ConfigError(f"the claim {self.key or '?'} has an empty {name}: write a sentence there")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"the claim {self.key} needs a list of different seeds, got {list(self.seeds)}")
        if self.threshold is None and self.threshold_from != "open":
            raise ConfigError(f'the claim {self.key} has no threshold: give one, or say threshold_from = "open"')
        if self.threshold is not None and (self.threshold_from == "open" or not math.isfinite(self.threshold)):
            why = "is open" if self.threshold_from == "open" else "needs a finite one"
            raise ConfigError(f"the claim {self.key} has the threshold {self.threshold} but {why}: settle which")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A published method as kullback has it; see the fields of card.toml, which are these.

    date: "YYYY-MM"; authors: their number; implements: import paths; needs: extras that the reproduction imports.
    """

    number: int
    slug: str
    title: str
    arxiv: str
    date: str
    authors: int
    room: Room
    status: Literal["planned", "ready"]
    implements: tuple[str, ...]
    summary: str
    scale: str
    budget: Budget
    needs: tuple[str, ...]
    claims: tuple[Claim, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.slug):
            raise ConfigError(f"slug is lower-case letters, digits and underscores, got {self.slug!r}")
        if not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv) or not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", self.date):
            raise ConfigError(f"arxiv is like 2402.17110 and date like 2024-02, got {self.arxiv!r} and {self.date!r}")
        for name in ("title", "summary", "scale"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty: write a sentence there")
        if min(self.number, self.authors, self.budget.threads) < 1 or not self.budget.seconds > 0:
            raise ConfigError("number, authors, budget.seconds and budget.threads are positive")
        if not self.claims or len({claim.key for claim in self.claims}) != len(self.claims):
            raise ConfigError("a card needs at least one claim, and no two with the same key")
        if self.status == "ready" and not self.implements:
            raise ConfigError('status is "ready" but implements is empty: name what it implements')

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that its claims are about, in order."""
        return tuple(sorted({seed for claim in self.claims for seed in claim.seeds}))

    @property
    def name(self) -> str:
        """The slug as the command line writes it, with hyphens."""
        return self.slug.replace("_", "-")

    @property
    def url(self) -> str:
        """The paper's page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}"


class Verdict(NamedTuple):
    """value: the claim's statistic (for "every" the worst seed), NaN when nothing was measured; spread: the standard
    deviation over the seeds, 0 for one; verdict: the judgement, "open" where the card has no threshold yet."""

    value: float
    spread: float
    verdict: Literal["met", "not met", "not attempted", "open"]


def slugs(folder: Path = CARDS) -> list[str]:
    """The slugs of all cards, in alphabetical order."""
    return sorted(path.parent.name for path in folder.glob("*/card.toml"))


def load_paper(slug: str, folder: Path = CARDS) -> Paper:
    """The card of a paper, its slug written with hyphens or underscores.

    Raises ConfigError for a slug that is unknown (it names the nearest) and for a card that is not as it should be.

    >>> load_paper("sinkd").arxiv
    '2402.17110'
    """
    name = slug.replace("-", "_")
    path = folder / name / "card.toml"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        known = slugs(folder)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        near = near or [other for other in known if name and name in other][:1]
        hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see `kullback papers`"
        raise ConfigError(f"no paper is called {slug!r}: {hint}")
    try:
        paper = load(Paper, read_toml(path))
        if paper.slug != name:
            raise ConfigError(f"slug is {paper.slug!r}, but its folder is {name!r}")
        if paper.status == "ready" and not path.with_name("reproduce.py").is_file():
            raise ConfigError('status is "ready" but there is no reproduce.py beside the card')
    except ConfigError as error:
        text = str(error).removeprefix(f"{path} ")
        raise ConfigError(f"{path.parent.name}/card.toml: {text}") from None
    return paper


def papers(folder: Path = CARDS) -> tuple[Paper, ...]:
    """All cards by number. Raises ConfigError for the first that is not as it should be."""
    return tuple(sorted((load_paper(slug, folder) for slug in slugs(folder)), key=lambda paper: paper.number))


def find(query: str, among: Iterable[Paper] | None = None) -> tuple[Paper, ...]:
    """The papers in which every word of the query occurs, the best first: a word counts for more in slug or title.

    >>> [paper.slug for paper in find("sinkhorn distance knowledge")][:1]
    ['sinkd']
    """
    words = query.lower().split()
    scored = []
    for paper in papers() if among is None else among:
        fields = _fields(paper)
        scores = [max((weight for text, weight in fields if word in text), default=0) for word in words]
        if all(scores):
            scored.append((-sum(scores), paper.number, paper))
    return tuple(paper for *_, paper in sorted(scored, key=lambda entry: entry[:2]))


def _fields(paper: Paper) -> list[tuple[str, int]]:
    claims = " ".join(f"{claim.paper} {claim.ours}" for claim in paper.claims)
    texts = [(f"{paper.slug} {paper.name} {paper.number}", 8), (paper.title, 5), (f"{paper.room} {paper.arxiv}", 4)]
    texts += [(paper.summary, 2), (" ".join(paper.implements), 2), (claims, 1)]
    return [(text.lower(), weight) for text, weight in texts]


def verdict(claim: Claim, per_seed: Mapping[int, float]) -> Verdict:
    """Judge a claim by the metric's value at each seed; seeds that the claim does not name are left out.

    What is not a number meets nothing. No value at all is a claim that was not attempted.
    """
    values = [float(value) for seed, value in sorted(per_seed.items()) if seed in claim.seeds]
    if not values:
        return Verdict(math.nan, math.nan, "not attempted")
    broken = any(map(math.isnan, values))
    finite = all(map(math.isfinite, values))
    spread = math.nan if not finite else statistics.stdev(values) if len(values) > 1 else 0.0
    name: str = claim.statistic
    if name == "every":
        name = "min" if claim.op in (">=", ">") else "max"
    value = math.nan if broken else _STATISTICS[name](values)
    if claim.threshold is None:
        return Verdict(value, spread, "open")
    return Verdict(value, spread, "met" if _COMPARE[claim.op](value, claim.threshold) else "not met")


def resolve(path: str) -> Any:
    """The object at an import path such as kullback.distill.sinkd.SinkhornKD, imported.

    Raises ConfigError when there is none.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # something that the module needs
            continue
        for name in parts[length:]:
            if not hasattr(found, name):
                raise ConfigError(f"{path} cannot be imported: {'.'.join(parts[:length])} has no {name}")
            found = getattr(found, name)
        return found
    raise ConfigError(f"{path} cannot be imported: there is no module {parts[0]}")
