"""Reproductions of made-up papers: what is judged, kept, drawn, recorded and refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kullback.core.errors import CheckpointError, ConfigError, MissingExtra
from kullback.papers import runner
from kullback.papers.runner import Outcome, code_digest, reproduce_paper

sys.path.insert(0, str(Path(__file__).parent))
from _cards import CLAIM, DRAW, REPRODUCE, write_paper

FAILS = f"{REPRODUCE}\nbefore = reproduce\ndef reproduce(run):\n    return before(run) if run.seed != 1 else 1 / 0\n"


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    folder = tmp_path / "cards"
    write_paper(folder, "alpha", REPRODUCE + DRAW)
    return folder


def run(cards: Path, *slugs: str, **options: Any) -> list[Outcome]:
    place = cards.parent
    return reproduce_paper(slugs, root=place / "runs", results=place / "results", cards=cards, **options)


def test_a_paper_runs_over_its_seeds_and_is_recorded(cards):
    (outcome,) = run(cards, "alpha")
    content = outcome.content
    assert (outcome.well, outcome.complete, dict(outcome.errors)) == (True, True, {})
    assert (content["slug"], content["number"], content["seeds"]) == ("alpha", 70, [0, 1])
    (claim,) = content["claims"]
    assert (claim["value"], claim["verdict"], claim["per_seed"]) == (1.5, "met", {"0": 1.0, "1": 2.0})
    assert claim["spread"] == pytest.approx(0.5**0.5)
    assert content["metrics"] == {"0": {"gain": 1.0, "other": 2.0}, "1": {"gain": 2.0, "other": 2.0}}
    assert content["rows"] == [{"step": 1, "loss": 0.5, "seed": 0}, {"step": 1, "loss": 0.5, "seed": 1}]
    assert set(content["environment"]) == {"python", "torch", "threads", "cpu"}
    assert content["environment"]["threads"] == 1
    assert outcome.recorded == cards.parent / "results" / "alpha.json"
    assert json.loads(outcome.recorded.read_text()) == content
    assert outcome.recorded.with_suffix(".svg").read_text() == "<svg>[0, 1]</svg>"


def test_the_file_has_the_fields_of_those_in_results(cards):
    (outcome,) = run(cards, "alpha")
    stored = json.loads((Path(__file__).parents[2] / "results" / "sinkd.json").read_text())
    assert list(outcome.content) == list(stored)
    assert list(outcome.content["claims"][0]) == list(stored["claims"][0])
    assert list(outcome.content["environment"]) == list(stored["environment"])


def test_what_is_done_is_not_done_again_and_gives_the_same_file(cards):
    (first,) = run(cards, "alpha")
    before = first.path.read_bytes()
    events: list[str] = []
    (second,) = run(cards, "alpha", on_event=lambda event: events.append(f"{event['kind']} {event['key']}"))
    assert second.path.read_bytes() == before
    assert events[:2] == ["skipped alpha/seed-0", "skipped alpha/seed-1"]
    assert (first.path.parent / "seed-0" / "ran").read_text() == "x"


def test_only_missing_seeds_run_when_a_sweep_goes_on(cards):
    run(cards, "alpha", seeds=[1])
    (outcome,) = run(cards, "alpha")
    assert [len((outcome.path.parent / f"seed-{seed}" / "ran").read_text()) for seed in (0, 1)] == [1, 1]
    assert outcome.recorded is not None
    assert outcome.recorded.with_suffix(".svg").read_text() == "<svg>[0, 1]</svg>"


def test_other_seeds_than_the_cards_stay_in_the_run(cards):
    (outcome,) = run(cards, "alpha", seeds=[7, 0])
    assert (outcome.complete, outcome.recorded, outcome.well) == (False, None, True)
    assert outcome.content["seeds"] == [0, 7]
    assert outcome.content["claims"][0]["per_seed"] == {"0": 1.0, "7": 8.0}
    assert outcome.figure is not None
    assert not (cards.parent / "results").exists()


def test_a_seed_that_fails_keeps_its_traceback_and_takes_no_other_down(cards):
    write_paper(cards, "beta", FAILS)
    beta, alpha = run(cards, "beta", "alpha", workers=2)
    assert alpha.well
    assert alpha.recorded
    assert (beta.well, beta.complete, beta.recorded) == (False, False, None)
    assert "ZeroDivisionError" in beta.errors["beta/seed-1"]
    assert "1 / 0" in (beta.path.parent / "seed-1" / "traceback.txt").read_text()
    (claim,) = beta.content["claims"]
    assert (claim["verdict"], claim["value"], claim["per_seed"]) == ("not met", None, {"0": 1.0, "1": None})
    assert json.loads(beta.path.read_text())["claims"] == [claim]


def test_a_paper_of_which_every_seed_fails(cards):
    write_paper(cards, "beta", "def reproduce(run):\n    raise ValueError('no data')\n")
    (beta,) = run(cards, "beta")
    assert list(beta.errors) == ["beta/seed-0", "beta/seed-1"]
    assert beta.content["claims"][0]["verdict"] == "not met"
    assert beta.figure is None


def test_not_met_not_a_number_not_attempted_and_open(cards):
    changes: list[dict[str, Any]] = [
        {"key": "met"},
        {"key": "missed", "threshold": 9.0},
        {"key": "nan", "metric": "broken"},
        {"key": "sometimes", "metric": "sometimes"},
        {"key": "absent", "metric": "absent"},
        {"key": "open", "threshold_from": "open"},
    ]
    claims = [{**CLAIM, **change} for change in changes]
    del claims[-1]["threshold"]
    extra = '{"broken": float("nan"), **({"sometimes": 5.0} if run.seed else {}), '
    write_paper(cards, "beta", REPRODUCE.replace("metrics={", f"metrics={extra}"), claims=claims)
    (beta,) = run(cards, "beta")
    found = {claim["key"]: claim["verdict"] for claim in beta.content["claims"]}
    assert found == {
        "met": "met", "missed": "not met", "nan": "not met", "sometimes": "not met",
        "absent": "not attempted", "open": "open",
    }  # fmt: skip
    assert (beta.well, beta.complete) == (False, True)
    assert beta.recorded is not None  # a claim that is not met is evidence as well
    assert json.loads(beta.recorded.read_text())["claims"][2]["value"] is None


def test_a_claim_is_judged_over_its_own_seeds(cards):
    claims = [{**CLAIM, "seeds": [1, 2]}, {**CLAIM, "key": "other", "seeds": [0]}]
    write_paper(cards, "beta", claims=claims)
    (beta,) = run(cards, "beta")
    assert [claim["value"] for claim in beta.content["claims"]] == [2.5, 1.0]
    assert beta.content["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def reproduce(run):\n    return {}\n", "returned a dict: it returns a Report"),
        ("import no_such_module_of_ours\n", "no_such_module_of_ours"),
    ],
)
def test_a_reproduction_that_cannot_be_one(cards, code, sentence):
    write_paper(cards, "beta", code)
    (beta,) = run(cards, "beta", seeds=[0])
    assert sentence in beta.errors["beta/seed-0"]


def test_a_figure_that_fails_is_said_and_takes_nothing_down(cards):
    write_paper(cards, "beta", REPRODUCE + "def draw(rows, path):\n    raise ValueError('no axes')\n")
    (beta,) = run(cards, "beta")
    assert "no axes" in beta.errors["beta/figure"]
    assert (beta.well, beta.figure) == (False, None)
    assert beta.recorded is not None
    assert not beta.recorded.with_suffix(".svg").exists()


def test_threads_are_those_of_the_card(cards):
    code = "import os" + REPRODUCE.replace("1.0 + run.seed", 'os.environ["OMP_NUM_THREADS"]')
    write_paper(cards, "beta", code, budget={"seconds": 9, "threads": 2})
    alpha, beta = run(cards, "alpha", "beta", seeds=[0])
    assert beta.content["claims"][0]["value"] == 2.0
    assert alpha.content["environment"]["threads"] == 1


def test_what_cannot_run_is_refused_before_anything_runs(cards, monkeypatch):
    write_paper(cards, "planned", status="planned", implements=[])
    write_paper(cards, "needy", needs=["sklearn"])
    write_paper(cards, "wrong", needs=["no-such-extra"])
    monkeypatch.setattr(runner, "installed", lambda package: None if package == "scikit-learn" else "1.0")
    for slug, error, sentence in [
        ("planned", ConfigError, "planned is planned: its method is not in kullback yet"),
        ("alpah", ConfigError, "did you mean alpha"),
        ("needy", MissingExtra, "scikit-learn is needed here and is not installed: pip install 'kullback[sklearn]'"),
        ("wrong", ConfigError, "wrong needs the extra no-such-extra"),
    ]:
        with pytest.raises(error) as caught:
            run(cards, "alpha", slug)
        assert sentence in str(caught.value)
    for seeds in ([], [-1]):
        with pytest.raises(ConfigError, match="seeds are numbers"):
            run(cards, "alpha", seeds=seeds)
    with pytest.raises(ConfigError, match="no paper to reproduce"):
        run(cards)
    assert not (cards.parent / "runs").exists()


def test_a_directory_of_another_run_is_refused(cards):
    place = cards.parent / "runs" / "alpha" / "seed-0"
    place.mkdir(parents=True)
    (place / "unit.json").write_text(json.dumps({"call": "other:thing", "arguments": {}, "status": "done"}))
    with pytest.raises(CheckpointError, match="other arguments"):
        run(cards, "alpha")


def test_the_digest_of_the_code_changes_with_the_code(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("a = 1")
    (tmp_path / "card.toml").write_text("number = 1")
    monkeypatch.setattr(runner.kullback, "__file__", str(tmp_path / "__init__.py"))
    first = code_digest()
    (tmp_path / "card.toml").write_text("number = 2")
    assert code_digest() == first
    (tmp_path / "one.py").write_text("a = 2")
    assert code_digest() != first
