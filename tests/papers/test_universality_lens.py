"""The reproduction of the universality lens: its parts, one seed of reduced size, and its figure."""

import math
import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.diagnose import BayesMixture
from kullback.papers.universality_lens import reproduce as study


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "NETWORKS", 30_000)
    monkeypatch.setattr(study, "WIDTHS", (8, 32))


def test_functions_and_targets(small):
    table, log_w = study.functions(8, generator(0, "networks"))
    assert table.shape == (len(log_w), 32)
    assert float(log_w.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)
    chosen = study.targets(log_w, generator(0, "targets"))
    assert float(log_w[chosen[0]]) == float(log_w.max())
    assert -float(log_w[chosen[2]]) == pytest.approx(8.0, abs=0.3)


def test_the_regrets_of_the_first_two_samples_by_enumeration(monkeypatch):
    """What all data sets at once find on average, against BayesMixture over every data set of one and two samples."""
    table = torch.tensor([[0, 0], [0, 1], [1, 1]], dtype=torch.bool)
    log_w = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    ones = study.FLIP + (1 - 2 * study.FLIP) * table.double()
    laws = torch.stack([1 - ones, ones], dim=2).log()
    expected = [BayesMixture(log_w, laws).regret(laws[1]), 0.0, 0.0]
    for x in range(2):
        for y in range(2):
            first = math.exp(laws[1, x, y]) / 2
            expected[1] += first * BayesMixture(log_w, laws).update([x], [y]).regret(laws[1])
            for then in range(2):
                for label in range(2):
                    both = BayesMixture(log_w, laws).update([x, then], [y, label])
                    expected[2] += first * math.exp(laws[1, then, label]) / 2 * both.regret(laws[1])
    monkeypatch.setattr(study, "SAMPLES", 2)
    monkeypatch.setattr(study, "REPEATS", 20_000)
    found = study.regrets(table, log_w, torch.tensor([1]), generator(0, "samples"))[:, 0]
    errors = (found.std(1) / math.sqrt(20_000)).tolist()
    assert float(found[0, 0]) == pytest.approx(expected[0])
    for n in (1, 2):
        assert float(found[n].mean()) == pytest.approx(expected[n], abs=6 * errors[n])
        assert abs(float(found[n].mean()) - expected[n - 1]) > 6 * errors[n]  # a shift by one sample would show


def test_wrong_labels_are_as_many_as_they_should_be():
    images, clean, noisy, held_images, held_labels = study.shuffled_digits(0)
    assert images.shape == (study.TRAIN, 64)
    assert len(held_images) == len(held_labels) == 1797 - study.TRAIN
    wrong = float((clean != noisy).double().mean())
    assert wrong == pytest.approx(study.WRONG, abs=6 * math.sqrt(0.16 / study.TRAIN))


@pytest.mark.reproduce
def test_one_seed_and_its_figure(small, tmp_path, monkeypatch):
    for name, value in {"HIDDEN": (16, 64), "STEPS": 1500, "BURN_IN": 700, "FITTED": 0.2}.items():
        monkeypatch.setattr(study, name, value)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    card = tomllib.loads(resources.files("kullback.papers.universality_lens").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["regret_excess_in_errors"] <= 3.0
    assert report.metrics["regret_width_change"] <= 0.3
    study.draw([{**row, "seed": 1} for row in report.rows], tmp_path / "lens.svg")
    assert ElementTree.parse(tmp_path / "lens.svg").getroot().tag.endswith("svg")
