"""The parts of the SALSA reproduction, and one seed in small."""

import pytest
import torch

from kullback.align.worlds import World, expected_reward
from kullback.core.runs import Run
from kullback.divergences import kl
from kullback.papers.salsa import reproduce as paper


@pytest.fixture
def small(monkeypatch):
    for name, value in {"WORLD": World(3, 3), "BASE_STEPS": 60, "TUNED_STEPS": 30, "STEPS": 150}.items():
        monkeypatch.setattr(paper, name, value)


def test_the_world_and_alignment_in_it(small):
    base, expert, reward = paper._world(0)
    law = paper._law(base)
    assert expected_reward(law, reward).item() == pytest.approx(0.0, abs=1e-5)
    assert expected_reward(law, reward.square()).item() == pytest.approx(1.0, abs=1e-4)
    end = paper._align(base, law, reward, torch.Generator().manual_seed(0))
    assert kl(expert, end).item() < 0.3 * kl(expert, law).item(), "from the base with the base as reference: the expert"


def test_parents_have_data_of_their_own(small):
    base, expert, _ = paper._world(0)
    a, b = paper._parents(base, expert, "halves", 0)
    assert kl(paper._law(a), paper._law(b)).item() > 0.001
    same = paper._soup([a, b], [1.0, 0.0])
    torch.testing.assert_close(paper._law(same), paper._law(a))


@pytest.mark.reproduce
def test_one_seed_in_small(small, tmp_path):
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    assert report.metrics["optimum_distance"] < 0.2
    assert sum(row["part"] == "aligned" for row in report.rows) == 8
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
