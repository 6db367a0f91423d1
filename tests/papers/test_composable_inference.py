"""The reproduction of composable inference: its programs, one seed of reduced size, and its figure."""

import tomllib
from fractions import Fraction
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.papers.composable_inference import reproduce as study
from kullback.sample import LinearGaussianModel, kalman_smoother
from kullback.sample.compose import meaning, validate


def test_programs_have_the_masses_that_they_should():
    masses = {name: sum(meaning(code).values()) for name, (code, _) in study.PROGRAMS.items()}
    assert masses["coin"] == 2
    assert masses["branching"] == 1
    assert masses["geometric"] == Fraction(15, 16)
    assert sum(meaning(study.joint()).values()) == sum(
        sum(meaning(study.of_two(stays)).values()) for stays in (False, True)
    ) / 2


def test_wrong_variants_differ_and_valid_ones_do_not():
    code, grid = study.PROGRAMS["coin"]
    for method in study.VALID.values():
        assert validate(method, code, grid=grid).max_abs_diff == 0
    assert not validate(study.WRONG["copies of weight one"], code).equal


def test_the_linear_model_is_the_kalman_filters():
    data = study.simulated(generator(0, "data"))
    assert data.shape == (study.LENGTH,)
    model = LinearGaussianModel.scalar(study.COEFFICIENT, study.SCALE, 1.0)
    exact = float(kalman_smoother(model, data.unsqueeze(1)).log_likelihood)
    theta = torch.tensor([study.COEFFICIENT, 0.2], dtype=torch.float64)
    found = study.evidence_of_coefficients(data, theta)
    assert float(found[0]) == pytest.approx(exact)
    assert float(found[1]) < exact


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    for name, value in {"CHAINS": 30, "MOVED_CHAINS": 10, "PMMH_CHAINS": 5, "CHAIN_STEPS": 40}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "PROGRAMS", {name: study.PROGRAMS[name] for name in ("coin", "geometric")})
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.composable_inference").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["exact_share"] == 1.0
    assert report.metrics["smallest_gap_of_wrong"] > 0.01
    assert report.metrics["evidence_error_in_standard_errors"] < 4.0
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "pieces.svg")
    assert ElementTree.parse(tmp_path / "pieces.svg").getroot().tag.endswith("svg")
