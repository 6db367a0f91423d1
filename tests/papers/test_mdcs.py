"""The reproduction of MDCS: its mixture, its parts, and one reduced study with its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.papers.mdcs import reproduce as study


def test_the_mixture_is_long_tailed_in_training_and_balanced_in_the_test():
    rows, labels, test_rows, test_labels, counts = study.mixture(0)
    assert torch.equal(torch.bincount(labels), counts)
    assert (counts[0], counts[-1]) == (200, 4)
    assert torch.bincount(test_labels).tolist() == [60] * 30
    assert rows.shape == (len(labels), 64)
    assert rows.abs().max() <= 1.0
    again = study.mixture(0)
    assert torch.equal(rows, again[0])
    assert torch.equal(test_rows, again[2])
    assert not torch.equal(rows, study.mixture(1)[0])


def test_accuracies_by_class_and_group():
    labels = torch.arange(30).repeat_interleave(2)
    predicted = labels.clone()
    predicted[1] = 5  # one of the two samples of class 0
    accuracy = study.by_class(predicted, labels)
    assert accuracy.tolist() == [50.0] + [100.0] * 29
    counts = torch.tensor([200] + [50] * 19 + [5] * 10)
    assert study.summary(accuracy, counts) == {
        "all": pytest.approx(accuracy.mean().item()), "many": 50.0, "medium": 100.0, "few": 100.0,
    }  # fmt: skip


@pytest.mark.reproduce
def test_a_shorter_study_and_its_figure(tmp_path, monkeypatch):
    """A quarter of the epochs and two runs: experts lean as lam says, and rare classes gain over cross-entropy."""
    monkeypatch.setattr(study, "REPEATS", 2)
    table, found = study.study(0, epochs=10)
    assert set(found) == set(study.METHODS)
    ours = found["MDCS"]
    assert ours["many_0"] > ours["many_2"] + 10.0
    assert ours["few_2"] > ours["few_0"] + 10.0
    assert ours["few"] > found["cross-entropy"]["few"] + 5.0
    assert ours["diversity"] > 2.0 * found["balanced + consistency"]["diversity"]
    study.draw([{**row, "seed": 0} for row in table], tmp_path / "mdcs.svg")
    assert ElementTree.parse(tmp_path / "mdcs.svg").getroot().tag.endswith("svg")


def test_the_card_asks_for_what_the_study_measures():
    card = tomllib.loads(resources.files("kullback.papers.mdcs").joinpath("card.toml").read_text())
    text = resources.files("kullback.papers.mdcs").joinpath("reproduce.py").read_text()
    assert all(f'"{claim["metric"]}":' in text for claim in card["claims"])
