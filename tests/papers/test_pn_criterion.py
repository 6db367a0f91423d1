"""The reproduction of the p-n criterion: its parts, one seed at a reduced size, and its figure."""

import math
import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.pn_criterion import reproduce as study


def test_risk_is_the_divergence_from_best_to_fit(monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", {30: 5})
    data = study.table("wine")
    found = study.risks(data, 30, stream(0, "x"))
    means, covariances = study.fits(data, 30, 5, stream(0, "x"))
    normal = torch.distributions.MultivariateNormal
    best = normal(data.mean(0).expand(5, 3), torch.cov(data.T, correction=0).expand(5, 3, 3))
    expected = torch.distributions.kl_divergence(best, normal(means, covariances))
    torch.testing.assert_close(found, expected)
    reverse = torch.distributions.kl_divergence(normal(means, covariances), best)
    assert (found - reverse).abs().min() > 1e-4


def test_singular_fits_have_infinite_risk(monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", {2: 4})
    assert bool(torch.isinf(study.risks(study.table("wine"), 2, stream(0, "x"))).all())


def test_bayes_error_of_large_and_small_samples(monkeypatch):
    monkeypatch.setattr(study, "FITS", 20)
    data = study.table("wine")
    many, few = (study.bayes_error(data, n, stream(0, "x")) for n in (20_000, 12))
    assert few < 0.4 < 0.49 < many <= 0.5


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", {40: 300, 80: 4000, 160: 300, 320: 300})
    monkeypatch.setattr(study, "DRAWS", 40_000)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.pn_criterion").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["second_order_relative_error"] < 0.08
    assert report.metrics["first_order_shortfall"] > 0.06
    assert report.metrics["bayes_error_margin"] > 0.0
    for row in report.rows:
        assert math.isfinite(row["p"])
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "pn.svg")
    assert ElementTree.parse(tmp_path / "pn.svg").getroot().tag.endswith("svg")
