"""`kullback show`: the card, what was measured, and how to run it."""

import json
from pathlib import Path

import pytest

from kullback import cli
from kullback.core.cards import load_paper
from kullback.papers import results


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = cli.execute(["show", *arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_all_of_the_card_is_there(capsys):
    paper = load_paper("sinkd")
    text = " ".join(run(capsys, "sinkd").split())
    for part in (paper.title, paper.url, paper.summary, paper.scale, "7 authors", "pip install 'kullback[sklearn]'"):
        assert " ".join(part.split()) in text
    for claim in paper.claims:
        for part in (claim.key, claim.paper, claim.ours, claim.deviation, claim.metric):
            assert " ".join(part.split()) in text
    assert "from kullback.distill.sinkd import sinkd_loss" in text
    assert "kullback reproduce sinkd" in text
    assert "overlap_sinkhorn: met" in text
    assert "results/sinkd.svg" in text


def test_lines_are_no_longer_than_a_page_is_wide(capsys):
    lines = [line for line in run(capsys, "sinkd").splitlines() if "/sinkd.svg" not in line]
    assert max(map(len, lines)) <= 100


def test_json_is_the_card_with_what_was_measured(capsys):
    content = json.loads(run(capsys, "sinkd", "--json"))
    assert (content["slug"], content["number"], content["run"]) == ("sinkd", 1, "kullback reproduce sinkd")
    assert [claim["key"] for claim in content["claims"]] == [claim["key"] for claim in content["measured"]["claims"]]
    assert content["budget"] == {"seconds": 120.0, "threads": 1}
    assert "rows" not in content["measured"]
    assert content["figure"].endswith("sinkd.svg")


def write(folder: Path, *claims: dict) -> None:
    content = {"version": "9", "commit": None, "seconds": 3.0, "claims": list(claims)}
    content["environment"] = {"python": "3", "torch": "9.9", "threads": 2, "cpu": "a processor"}
    (folder / "sinkd.json").write_text(json.dumps(content))


def test_what_was_not_met_or_not_finite_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "results_directory", lambda: tmp_path)
    measured = {"value": 0.5, "spread": 0.25, "verdict": "not met", "per_seed": {"0": 0.25, "1": 0.75}}
    broken = {"value": None, "spread": None, "verdict": "not met", "per_seed": {"0": None}}
    write(tmp_path, {"key": "overlap_sinkhorn", **measured}, {"key": "overlap_js_tv", **broken})
    text = run(capsys, "sinkd")
    assert "overlap_sinkhorn: not met" in text
    assert "0.5 ± 0.25, asked >= 0.95" in text
    assert "not finite, asked <= 0.75" in text
    assert "digits_distance: not measured" in text
    assert "commit unknown" in " ".join(text.split())
    assert "figure" not in text


def test_without_results(capsys, monkeypatch):
    monkeypatch.setattr(results, "results_directory", lambda: None)
    assert "digits_distance: not measured" in run(capsys, "sinkd")
    content = json.loads(run(capsys, "sinkd", "--json"))
    assert (content["measured"], content["figure"]) == (None, None)


@pytest.mark.parametrize("text", ["{", '{"claims": 3}', '{"claims": [{"key": "a"}]}', "[]"])
def test_a_damaged_result_is_one_sentence(capsys, monkeypatch, tmp_path, text):
    monkeypatch.setattr(results, "results_directory", lambda: tmp_path)
    (tmp_path / "sinkd.json").write_text(text)
    assert cli.execute(["show", "sinkd"]) == 2
    err = capsys.readouterr().err
    assert "sinkd.json is damaged" in err
    assert "run `kullback reproduce sinkd` again" in err
    assert err.count("\n") == 1


def test_an_unknown_paper_is_answered_with_the_nearest(capsys):
    assert cli.execute(["show", "snikd"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: no paper is called 'snikd': did you mean sinkd?\n")


def test_hyphens_and_underscores(capsys):
    assert run(capsys, "bd-kd") == run(capsys, "bd_kd")
