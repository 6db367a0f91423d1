"""The parts of the KDRL reproduction, and one seed in small."""

import math

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.kdrl import reproduce as paper


def test_the_teacher_is_wrong_at_one_place_of_a_quarter():
    world = paper.bandit(0)
    said = world.teacher[:, :, 0].argmax(-1)
    wrong = (said != world.target).sum(1)
    assert sorted(wrong.tolist()) == [0] * 24 + [1] * 8
    torch.testing.assert_close(world.teacher.exp().sum(-1), torch.ones(32, 4, 7, dtype=torch.float64))


def test_measures_of_the_uniform_student_and_of_the_teacher():
    world = paper.bandit(0)
    uniform = paper._measure(world, torch.zeros(32, 4, 7, 6, dtype=torch.float64))
    assert uniform["success"] == pytest.approx(6.0**-4)
    per_token = -math.log(6.0) - world.teacher[0, 0, 0].mean().item()
    assert uniform["divergence"] == pytest.approx(4 * per_token, rel=1e-6)
    teacher = paper._measure(world, world.teacher)
    assert teacher["divergence"] == pytest.approx(0.0, abs=1e-12)
    assert teacher["greedy"] == 0.75
    assert teacher["success"] == pytest.approx((24 * 0.8**4 + 8 * 0.8**3 * 0.04) / 32)


@pytest.mark.reproduce
def test_one_seed_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "STEPS", 200)
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    assert report.metrics["success_gain_at_200"] > 0.3
    assert report.metrics["distillation_greedy"] == 0.75
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
