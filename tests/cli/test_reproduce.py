"""`kullback reproduce` on made-up papers."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from kullback import cli
from kullback.core import cards
from kullback.papers import results, runner

sys.path.insert(0, str(Path(__file__).parents[1] / "papers"))
from _cards import CLAIM, DRAW, REPRODUCE, write_paper


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own, with two papers that are ready and one that is planned."""
    folder = tmp_path / "cards"
    write_paper(folder, "good_one", REPRODUCE + DRAW)
    write_paper(folder, "missed", number=71, claims=[{**CLAIM, "threshold": 9.0}])
    write_paper(folder, "planned", number=72, status="planned", implements=[])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "reproduce_paper", partial(runner.reproduce_paper, cards=folder))
    monkeypatch.setattr(cards, "papers", partial(cards.papers, folder))
    monkeypatch.setattr(results, "checkout", lambda: tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.execute(["reproduce", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_one_paper(place, capsys):
    code, out, err = run(capsys, "good-one")
    assert code == 0
    head, line, _, last = out.splitlines()
    assert head.split() == ["paper", "claim", "measured", "asked", "verdict"]
    assert line.split() == ["good-one", "gains", "1.5", "±", "0.707", "mean", ">=", "1", "met"]
    assert last == f"good-one: {place / 'results' / 'good_one.json'}, {place / 'results' / 'good_one.svg'}"
    assert "good-one seed 0: done in" in err
    (root,) = (place / "runs").iterdir()
    assert root.name == f"reproduce-{runner.code_digest()}"
    assert "good-one seed 1: done before" in run(capsys, "good-one")[2]


def test_a_claim_that_is_not_met_exits_with_1(place, capsys):
    code, out, _ = run(capsys, "missed", "--out", "there")
    assert code == 1
    assert out.splitlines()[1].split()[-2:] == ["not", "met"]
    assert (place / "there" / "missed" / "seed-1" / "report.json").exists()
    assert (place / "results" / "missed.json").exists()


def test_all_that_is_ready(place, capsys):
    code, out, _ = run(capsys, "--all", "--json", "--workers", "2")
    assert code == 1
    rows = json.loads(out)
    assert [(row["slug"], row["well"]) for row in rows] == [("good-one", True), ("missed", False)]
    assert rows[0]["claims"][0]["value"] == 1.5
    assert rows[0]["recorded"] == str(place / "results" / "good_one.json")


def test_some_seeds_are_not_recorded(place, capsys):
    code, out, _ = run(capsys, "good-one", "--seeds", "1, 5")
    assert code == 0
    assert "not recorded among the results, as the seeds are not those of the card" in out
    assert not (place / "results").exists()


def test_an_installed_package_records_nothing(place, capsys, monkeypatch):
    monkeypatch.setattr(results, "checkout", lambda: None)
    code, out, _ = run(capsys, "good-one", "--out", "there")
    assert (code, out.splitlines()[-1]) == (0, "good-one: there/good_one/good_one.json, there/good_one/good_one.svg")


def test_a_seed_that_fails_is_said_and_exits_with_1(place, capsys):
    write_paper(place / "cards", "bad", "def reproduce(run):\n    raise ValueError('no luck')\n")
    code, out, err = run(capsys, "bad", "good-one", "--out", "there")
    assert code == 1
    assert "bad seed-0 failed: ValueError: no luck (see there/bad/seed-0/traceback.txt)" in out
    assert "not recorded among the results, as a seed failed" in out
    assert "bad seed 0: failed: ValueError: no luck" in err
    assert (place / "results" / "good_one.json").exists()
    assert not (place / "results" / "bad.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name the papers to reproduce"),
        (["good-one", "--all"], "name the papers to reproduce"),
        (["god-one"], "did you mean good-one?"),
        (["planned"], "planned is planned"),
        (["good-one", "--seeds", "one"], "--seeds takes numbers"),
        (["good-one", "--seeds", "1,,2"], "--seeds takes numbers"),
        (["good-one", "--engine", "rya"], "engine must be local or ray"),
        (["good-one", "--workers", "0"], "--workers"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(place, capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert not (place / "runs").exists()


def test_an_interrupt_says_where_it_goes_on(place, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "reproduce_paper", stop)
    code, out, err = run(capsys, "good-one", "--out", "there")
    assert (code, out) == (130, "")
    assert err == "error: stopped; seeds that are done stay in there, and the same command goes on\n"
