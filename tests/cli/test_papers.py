"""`kullback papers`: the table, the query, rooms and JSON."""

import json

import pytest

from kullback import cli
from kullback.core.cards import papers


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = cli.execute(["papers", *arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_all_papers_in_the_order_of_their_numbers(capsys):
    head, *lines = run(capsys).splitlines()
    assert head.split() == ["no", "paper", "room", "status", "claims", "met", "title"]
    assert [line.split()[:4] for line in lines] == [
        [str(paper.number), paper.name, paper.room, paper.status] for paper in papers()
    ]
    sinkd = next(line for line in lines if " sinkd " in line)
    assert sinkd.split()[3:6] == ["ready", "5/5", "SinKD:"]


def test_a_query_wants_all_words(capsys):
    _, first, *_ = run(capsys, "sinkhorn", "distance").splitlines()
    assert first.split()[1] == "sinkd"
    assert run(capsys, "Sinkhorn distance").splitlines()[1] == first  # quoted, as one argument
    assert run(capsys, "sinkhorn", "no-such-word") == "no paper has all of these words\n"


def test_a_room(capsys):
    rows = json.loads(run(capsys, "--room", "distill", "--json"))
    assert {row["room"] for row in rows} == {"distill"}
    assert "sinkd" in [row["slug"] for row in rows]


def test_json(capsys):
    rows = json.loads(run(capsys, "--json"))
    assert len(rows) == len(papers())
    assert rows[0] == {
        "number": 1, "slug": "sinkd", "title": papers()[0].title, "room": "distill", "status": "ready",
        "arxiv": "2402.17110", "claims": 5, "met": 5,
    }  # fmt: skip
    assert json.loads(run(capsys, "no-such-word", "--json")) == []


def test_a_paper_that_was_not_measured_has_no_number(capsys, monkeypatch):
    from kullback.papers import results

    monkeypatch.setattr(results, "results_directory", lambda: None)
    assert "not run" in run(capsys, "sinkd")
    assert json.loads(run(capsys, "2402.17110", "--json"))[0]["met"] is None


def test_long_titles_are_cut_on_a_terminal_only(capsys, monkeypatch):
    whole = run(capsys).splitlines()
    assert max(map(len, whole)) > 80
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    cut = run(capsys).splitlines()
    assert max(map(len, cut)) == 80
    assert len(cut) == len(whole)


def test_an_unknown_room_is_one_sentence(capsys):
    assert cli.execute(["papers", "--room", "kitchen"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "the rooms are" in err
