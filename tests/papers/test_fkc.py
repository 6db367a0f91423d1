"""The reproduction of Feynman-Kac correctors: its measure, its laws, one seed at a reduced size, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.fkc import reproduce as study


def test_shares_of_cells_are_those_of_the_modes_where_these_lie_apart():
    means = torch.tensor([[-20.0, 0.0], [20.0, 5.0], [0.0, -30.0]])
    weights = torch.tensor([0.2, 0.5, 0.3]).log()
    path = study.gaussian_mixture_path(means, 1.5**2, study.SCHEDULE, log_weights=weights)
    last = torch.tensor(study.SCHEDULE.sigma_min)
    shares = study.cell_shares(lambda x: 2.0 * path.log_density(x, last), means, 48.0, 500)
    torch.testing.assert_close(shares, (2.0 * weights).softmax(0), atol=1e-4, rtol=1e-3)


def test_exact_samples_have_the_shares_of_the_law():
    means, log_weights = study.forty_modes(1)
    path = study.gaussian_mixture_path(means, study.DEVIATION**2, study.SCHEDULE, log_weights=log_weights)
    law = lambda x: study.BETA * path.log_density(x, torch.tensor(study.SCHEDULE.sigma_min))  # noqa: E731
    count, shares = 4000, study.cell_shares(law, means, 48.0, 400)
    x = study.exact_samples(law, 1, count, "test")
    occupied = torch.cdist(x, means).argmin(1).bincount(minlength=40) / count
    assert bool(((occupied - shares).abs() <= 6 * (shares * (1 - shares) / count).sqrt() + 1e-3).all())
    untempered = log_weights.exp()  # the shares of q, and not of q^2
    assert bool(((occupied - untempered).abs() > 6 * (untempered / count).sqrt() + 1e-3).any())
    assert law(x).mean() > study.BETA * path.log_density(x + 1.0, torch.tensor(study.SCHEDULE.sigma_min)).mean()


def test_distances_count_weights_in_the_cells_of_the_means():
    means, shares = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([0.5, 0.5])
    samples = torch.tensor([[[1.0, 0.0], [9.0, 0.0], [9.5, 0.0], [12.0, 1.0]]])
    assert study.distances(samples, torch.zeros(1, 4), means, shares).item() == pytest.approx(0.25)
    even = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).log()
    assert study.distances(samples, even, means, shares).item() == pytest.approx(0.0, abs=1e-6)


def test_closed_forms_and_trained_models_at_a_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TRAINING", 100)
    monkeypatch.setattr(study, "TRAINED_STEPS", 20)
    rows = study.trained(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    assert [(row["study"], row["setting"]) for row in rows] == [
        ("trained, annealed", "none"), ("trained, annealed", "systematic"),
        ("trained, multiplied", "none"), ("trained, multiplied", "systematic"),
    ]  # fmt: skip
    assert all(0.0 <= row["distance"] <= 1.0 and "x" not in row for row in rows)


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.fkc").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["occupancy_distance_reduction"] > 0.2
    assert report.metrics["product_mean_error"] < 0.05
    assert report.metrics["guidance_mean_error"] < 0.05
    assert report.metrics["trained_distance_ratio"] < 0.9
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "fkc.svg")
    assert ElementTree.parse(tmp_path / "fkc.svg").getroot().tag.endswith("svg")


def test_modes_differ_by_seed_only():
    first, again, other = study.forty_modes(0), study.forty_modes(0), study.forty_modes(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
