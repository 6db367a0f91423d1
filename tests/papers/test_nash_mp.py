"""The parts of the Nash reproduction, and one seed in small."""

import numpy as np
import pytest
import torch

from kullback.align.nash import (
    PreferenceGame,
    nash_mirror_descent,
    nash_mirror_prox,
    regularised_nash,
    self_play,
)
from kullback.core.runs import Run
from kullback.divergences import kl
from kullback.papers.nash_mp import reproduce as paper


def test_answers_beat_each_other_in_a_circle():
    preferences = paper._preferences()
    assert preferences.shape == (125, 125)
    torch.testing.assert_close(preferences + preferences.T, torch.ones(125, 125, dtype=torch.float64))
    sums = paper.WORLD.sequences().sum(1) % 3
    rates = [preferences[sums == kind][:, sums == (kind + 1) % 3].unique().tolist() for kind in range(3)]
    assert rates == [[0.9], [0.8], [0.8]]


@pytest.mark.parametrize(
    ("size", "ends"), [(10, (1.396, 1.098, 1.194)), (100, (0.093, 0.181, 0.325))]
)
def test_the_games_of_the_pilot(size, ends):
    """Other draws from the same law: there self-play stays where the card says, 1.10 to 1.40 and 0.09 to 0.32."""
    for seed, end in enumerate(ends):
        draw = np.random.default_rng(seed)
        logits = 3.0 * draw.standard_normal((size, size))
        preferences = torch.from_numpy((logits - logits.T) / 2**0.5).sigmoid()
        game = PreferenceGame(preferences, torch.from_numpy(draw.dirichlet(np.ones(size))).log(), paper.BETA)
        nash = regularised_nash(game)
        assert kl(nash, self_play(game, paper.QUERIES)).item() == pytest.approx(end, abs=1e-3)
        assert kl(nash, nash_mirror_prox(game, paper.QUERIES // 2)).item() <= 2e-9
        descents = [kl(nash, nash_mirror_descent(game, paper.QUERIES, eta=eta)).item() for eta in paper.DESCENT_ETAS]
        assert min(descents) >= 2e-5


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
