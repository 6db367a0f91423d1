"""The parts of the Nash reproduction, and one seed in small."""

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.nash_mp import reproduce as paper


def test_answers_beat_each_other_in_a_circle():
    preferences = paper._preferences()
    assert preferences.shape == (125, 125)
    torch.testing.assert_close(preferences + preferences.T, torch.ones(125, 125, dtype=torch.float64))
    sums = paper.WORLD.sequences().sum(1) % 3
    rates = [preferences[sums == kind][:, sums == (kind + 1) % 3].unique().tolist() for kind in range(3)]
    assert rates == [[0.9], [0.8], [0.8]]


@pytest.mark.reproduce
def test_one_seed_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "SIZES", (10, 20))
    monkeypatch.setattr(paper, "STEPS", 20)
    monkeypatch.setattr(paper, "QUERIES", 200)
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    assert report.metrics["nash_mp_kl"] < 0.1
    assert {row["method"] for row in report.rows if row["part"] == "policy"} == set(paper.MODES)
    monkeypatch.setattr(paper, "SIZES", (10, 20, 20))
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
