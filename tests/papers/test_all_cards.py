"""Every card and every result: complete, resolvable, and saying the same."""

import json
import math
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from kullback.core.cards import CARDS, Claim, Paper, load_paper, papers, resolve, slugs, verdict
from kullback.core.types import Report

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "results").glob("*.json"))
READY = [slug for slug in slugs() if 'status = "ready"' in (CARDS / slug / "card.toml").read_text()]


@pytest.mark.parametrize("slug", slugs())
def test_every_card_loads(slug):
    paper = load_paper(slug)
    assert "\n" not in paper.summary.strip(), "lines of a summary end with a backslash"


def test_the_63_are_there():
    assert sorted(paper.number for paper in papers()) == list(range(1, 64))
    assert len({paper.arxiv for paper in papers()}) == 63


@pytest.mark.parametrize("slug", slugs())
def test_every_import_path_resolves(slug):
    for path in load_paper(slug).implements:
        assert resolve(path) is not None


@pytest.mark.parametrize("slug", READY)
def test_every_reproduction_is_a_function_of_one_run(slug):
    module = import_module(f"kullback.papers.{slug}.reproduce")
    assert module.reproduce.__annotations__["return"] in ("Report", Report)
    assert module.reproduce.__code__.co_varnames[: module.reproduce.__code__.co_argcount] == ("run",)


def test_every_extra_that_a_ready_card_needs_is_offered():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for slug in READY:
        assert set(load_paper(slug).needs) <= set(extras), slug


def differences(paper: Paper, content: dict) -> list[str]:
    """What a result says otherwise than its card: claims, thresholds, seeds, or a verdict that does not follow."""
    found = []
    if (content["number"], content["slug"], tuple(content["seeds"])) != (paper.number, paper.slug, paper.seeds):
        found.append("number, slug or seeds")
    if [claim["key"] for claim in content["claims"]] != [claim.key for claim in paper.claims]:
        return [*found, "claims"]
    for claim, stored in zip(paper.claims, content["claims"], strict=True):
        for name in ("metric", "op", "threshold", "statistic"):
            if stored[name] != getattr(claim, name):
                found.append(f"{claim.key}.{name}")
        if stored["per_seed"] and tuple(sorted(map(int, stored["per_seed"]))) != tuple(sorted(claim.seeds)):
            found.append(f"{claim.key}.seeds")
        if not follows(claim, stored):
            found.append(f"{claim.key}.verdict")
    return found


def follows(claim: Claim, stored: dict) -> bool:
    """Whether value and verdict are what the stored numbers of the seeds give; null stands for what is not finite."""
    values = {int(seed): float("nan") if value is None else value for seed, value in stored["per_seed"].items()}
    value, _, word = verdict(claim, values)
    if stored["value"] is None:
        return word == stored["verdict"] and not math.isfinite(value)
    return word == stored["verdict"] and math.isclose(value, stored["value"], rel_tol=1e-12)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_what_its_card_says(path):
    assert differences(load_paper(path.stem), json.loads(path.read_text())) == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_holds_the_numbers_that_its_claims_are_judged_by(path):
    content = json.loads(path.read_text())
    for claim in content["claims"]:
        for seed, value in claim["per_seed"].items():
            assert content["metrics"][seed].get(claim["metric"]) == value
    assert {row["seed"] for row in content["rows"]} <= set(content["seeds"])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda content: content["claims"][0].update(threshold=0.5), "overlap_sinkhorn.threshold"),
        (lambda content: content["claims"][0].update(verdict="not met"), "overlap_sinkhorn.verdict"),
        (lambda content: content["claims"][1]["per_seed"].update({"0": 9.0}), "overlap_js_tv.verdict"),
        (lambda content: content["claims"][1]["per_seed"].pop("0"), "overlap_js_tv.seeds"),
        (lambda content: content["claims"].pop(), "claims"),
        (lambda content: content["seeds"].append(7), "number, slug or seeds"),
    ],
)
def test_a_result_that_was_tampered_with_is_seen(change, name):
    content = json.loads((ROOT / "results" / "sinkd.json").read_text())
    change(content)
    assert name in differences(load_paper("sinkd"), content)
