"""The reproduction of the kernel density regimes: its parts, one seed at a reduced size, and its figure."""

import math
import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.kde_regimes import reproduce as study


def test_ratios_have_mean_one_where_a_mean_exists():
    ratios = study.log_ratios(10, 500, [1.5, 2.5], stream(0, "x"), 300).exp()
    for values in ratios:
        assert values.mean().item() == pytest.approx(1.0, abs=6 * values.std().item() / math.sqrt(300))
    assert torch.equal(ratios, study.log_ratios(10, 500, [1.5, 2.5], stream(0, "x"), 300).exp())


def test_optimum_is_where_the_likelihood_is_largest(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "HELD_OUT", 500)
    run = Run.start(tmp_path / "run", {}, kind="reproduce", seed=1)
    row = study.optimum(run, 5, 300)
    source = stream(1, "optimum", 5)
    points, held_out = torch.randn(300, 5, generator=source), torch.randn(500, 5, generator=source)
    grid = torch.linspace(0.4, 1.0, 121).tolist()
    best = max(grid, key=lambda h: study.HighDimKDE(h).fit(points).score(held_out))
    assert row["h"] == pytest.approx(best, abs=0.006)


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "DATA_SETS", 600)
    monkeypatch.setattr(study, "CASES", ((20, 2981),))
    monkeypatch.setattr(study, "REPLICATES", 500)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.kde_regimes").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["largest_p_near_glass"] < 1e-3
    assert report.metrics["smallest_p_above"] > 1e-3
    assert report.metrics["participation_error"] < 0.08
    assert report.metrics["optimum_to_glass"] < 1.0
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "kde.svg")
    assert ElementTree.parse(tmp_path / "kde.svg").getroot().tag.endswith("svg")
