"""The reproduction of the bandit book: its parts, one seed of reduced size against the claims, and its figure."""

import math
import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest

from kullback.core.runs import Run

pytest.importorskip("numba")

from kullback.papers.bandits import reproduce as study


def test_bounds_are_the_cards():
    bounds = study.bounds(10, 20_000)
    assert bounds["exp3"] == pytest.approx(959.7, abs=0.05)
    assert bounds["hedge"] == pytest.approx(151.7, abs=0.05)
    assert bounds["ucb1"] == pytest.approx(9 * (80 * math.log(20_000) + 0.1))


def test_exponent_is_the_slope():
    assert study.exponent([3.0 * horizon**0.6 for horizon in study.HORIZONS]) == pytest.approx(0.6)


def test_the_sequence_fools_ucb1_and_not_exp3(monkeypatch):
    monkeypatch.setattr(study, "HORIZON", 2000)
    fooled, stands, rows = study.adversarial(0)
    assert fooled >= 0.9
    assert stands <= 1.0
    assert {row["policy"] for row in rows} == {"ucb1", "exp3", "tsallis_inf"}


def test_a_bound_that_is_too_low_counts_as_violated(monkeypatch):
    monkeypatch.setattr(study, "HORIZON", 1000)
    assert study.stochastic(0)[0] == 0
    monkeypatch.setattr(study, "bounds", lambda arms, horizon: {"ucb1": 1.0, "exp3": 1e9, "hedge": 1.0})
    assert study.stochastic(0)[0] == 2


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PEAKS", 10)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.bandits").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["growth_exponent_error"] <= 0.15
    assert report.metrics["bound_violations"] == 0
    assert report.metrics["primal_dual_share"] >= 0.83
    assert report.metrics["budget_blind_share"] <= 0.65
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "bandits.svg")
    assert ElementTree.parse(tmp_path / "bandits.svg").getroot().tag.endswith("svg")
