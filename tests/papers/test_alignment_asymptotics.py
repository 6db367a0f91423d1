"""The reproduction of the asymptotics of alignment: its parts, one seed at a reduced size, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.alignment_asymptotics import reproduce as study


def test_pairs_are_distributions_of_their_seed():
    p, q, again = study.dirichlet(0, "p"), study.dirichlet(0, "q"), study.dirichlet(0, "p")
    assert torch.equal(p, again)
    assert not torch.equal(p, q)
    drawn = torch.stack([study.dirichlet(seed, "p") for seed in range(2000)])
    # Dirichlet(2, 2, 2) has mean 1/3 and variance 1/3 * 2/3 / 7
    assert bool(((drawn.mean(0) - 1 / 3).abs() < 6 * (2 / 63 / 2000) ** 0.5).all())
    assert drawn.var(0).mean().item() == pytest.approx(2 / 63, rel=0.1)


def test_the_learned_reward_agrees_with_comparisons():
    reward = study.learned_reward(1, study.WORLD.sequences())
    assert reward.shape == (7776,)
    assert reward.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert 0.5 < reward.std().item() < 2.0


def test_metrics_of_gaps_count_what_rises():
    rows = [{"letters": m, "reward_gap": 1.0 / m, "kl_gap": 1.0 / m} for m in study.LETTERS]
    assert study.gap_metrics(rows)["gap_order_violations"] == 0
    assert study.gap_metrics(rows)["gap_ratio"] == pytest.approx(1 / 16)
    rows[3]["kl_gap"] = 1.0
    rows[5]["reward_gap"] = -0.1
    assert study.gap_metrics(rows)["gap_order_violations"] == 2


def test_one_seed_at_a_reduced_size_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STEPS", 20)
    monkeypatch.setattr(study, "GROUPS", 2000)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.alignment_asymptotics").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["gap_ratio"] < 0.25
    assert report.metrics["gap_order_violations"] == report.metrics["kl_bound_violations"] == 0
    assert report.metrics["sampled_error"] < 6
    path = [row for row in report.rows if row["study"] == "reinforce"]
    assert path[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert path[-1]["reward"] > path[0]["reward"]
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "asymptotics.svg")
    assert ElementTree.parse(tmp_path / "asymptotics.svg").getroot().tag.endswith("svg")
