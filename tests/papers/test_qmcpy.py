"""The reproduction of QMCPy: its parts, one seed against the card's claims, and its figure."""

import math
import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.qmcpy import reproduce as study
from kullback.sample.qmc import KernelDSI, Lattice


def test_integrands_have_the_integrals_they_are_centred_by():
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert abs(study.one_variable(grid[:, None]).mean().item()) < 1e-6
    pairs = torch.cartesian_prod(grid[::4] - 1 / 4000 + 1 / 1000, grid[::4] - 1 / 4000 + 1 / 1000)
    assert abs(study.two_variables(pairs).mean().item()) < 1e-5
    # Keister's integral in one dimension is root pi times exp(-1/4)
    assert study.keister(grid[:, None]).mean().item() == pytest.approx(math.sqrt(math.pi) * math.exp(-0.25), abs=1e-3)


def test_slope_is_the_exponent_of_a_power():
    assert study.slope([(n, 3.0 * n**-2.5) for n in (4, 8, 32, 128)]) == pytest.approx(-2.5)


def test_points_match_their_kernels():
    assert study.points_for(study.KERNELS["SI 2"](), 0).kind == "lattice"
    assert study.points_for(study.KERNELS["DSI 4"](), 0).kind == "net"


def test_a_wrong_product_would_be_seen(monkeypatch):
    monkeypatch.setattr(study, "DENSE", (64,))
    monkeypatch.setattr(study, "KERNELS", {"DSI 2": study.KERNELS["DSI 2"]})
    with torch.no_grad():
        assert study.fast_error(0) < 1e-10
        monkeypatch.setattr(study, "RIDGE", 1e-3)
        original = study.FastGram

        def other_kernel(kernel, points, count, nugget):
            return original(KernelDSI(3, alpha=3, weights=0.3), points, count, nugget=nugget)

        monkeypatch.setattr(study, "FastGram", other_kernel)
        assert study.fast_error(0) > 1e-3


def test_rates_on_few_points(monkeypatch):
    monkeypatch.setattr(study, "LEVELS", range(3, 7))
    monkeypatch.setattr(study, "METHODS", {"lattice": Lattice})
    rows = study.rates(0)
    assert [row["n"] for row in rows] == [8, 16, 32, 64] * 2
    chosen = [(row["n"], row["rmse"]) for row in rows if row["dimensions"] == 1]
    assert study.slope(chosen) == pytest.approx(-1.0, abs=0.15)


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.qmcpy").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["order_two_slope"] <= -2.2
    assert report.metrics["fast_gram_error"] <= 1e-8
    assert report.metrics["cubature_within_tolerance"] == 1.0
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "qmcpy.svg")
    assert ElementTree.parse(tmp_path / "qmcpy.svg").getroot().tag.endswith("svg")
