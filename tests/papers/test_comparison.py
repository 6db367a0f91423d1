"""Comparisons of rooms: the table's means and spreads, what the command says, and the align room's in small."""

import math

import pytest

from kullback import cli
from kullback.core.errors import ConfigError
from kullback.core.runs import Run
from kullback.papers import comparison
from kullback.papers.rooms import align, distill


def test_the_table_has_means_and_spreads_in_the_order_of_the_rows():
    rows = [
        {"task": "t", "method": "b", "x": 1.0, "seed": 0},
        {"task": "t", "method": "a", "x": 5.0, "y": 2.0, "seed": 0},
        {"task": "t", "method": "b", "x": 3.0, "seed": 1},
        {"task": "t", "method": "a", "x": 5.0, "y": None, "seed": 1},
    ]
    first, second = comparison._table(rows, ["x", "y"])
    assert first == {"task": "t", "method": "b", "seeds": 2, "x": 2.0, "x_spread": math.sqrt(2.0)}
    assert (second["x"], second["x_spread"], second["y"], second["y_spread"]) == (5.0, 0.0, 2.0, None)


def test_rooms_without_a_comparison(tmp_path, capsys):
    assert "align" in comparison.compared_rooms()
    with pytest.raises(ConfigError, match="align"):
        comparison.compare_room("kitchen", root=tmp_path)
    for arguments, words in (
        (["--room", "kitchen"], "there is no room"),
        (["--room", "align", "--all"], "or --room"),
        (["--all", "--table"], "--room"),
    ):
        assert cli.execute(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


def test_the_align_room_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(align, "_STEPS", 3)
    monkeypatch.setattr("kullback.jobs._align_methods.method_names", lambda: ["sft", "grpo", "kdrl"])
    run = Run.start(tmp_path / "run", {}, kind="comparison", seed=0)
    rows = align.compare(run)
    assert [row["method"] for row in rows] == ["before", "sft", "grpo", "kdrl"]
    for row in rows:
        assert row["task"] == "sums"
        assert row.keys() - {"task", "method"} <= set(align.COLUMNS)
        assert 0.0 <= row["reward"] <= row["pass_k"] <= 1.0
    assert rows[1]["milliseconds"] > 0.0
    assert rows[0]["divergence"] == pytest.approx(0.0, abs=1e-9)
    align.draw([{**row, "seed": 0} for row in rows], tmp_path / "align.svg")
    assert (tmp_path / "align.svg").read_text().count("<svg") == 1


def test_the_distill_room_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "_STEPS", 60)
    run = Run.start(tmp_path / "run", {}, kind="comparison", seed=0)
    rows = distill._digits(run)
    assert [row["method"] for row in rows] == ["teacher", *distill._losses()]
    for row in rows:
        assert row.keys() - {"task", "method"} <= set(distill.COLUMNS)
        assert 0.3 < row["accuracy"] <= 1.0
    assert rows[0]["accuracy"] == max(row["accuracy"] for row in rows)
    prose = [{"task": "prose", "method": name, "cross_entropy": 5.0} for name in ("teacher", "kl")]
    distill.draw([{**row, "seed": 0} for row in [*rows, *prose]], tmp_path / "distill.svg")
    assert (tmp_path / "distill.svg").stat().st_size > 10_000


def test_the_clock_counts_steps():
    clock = comparison.StepClock()
    assert clock.milliseconds is None
    for step in range(3):
        clock({"kind": "progress", "step": step})
        clock({"kind": "loss", "step": step})
    assert 0.0 <= clock.milliseconds < 1000.0
