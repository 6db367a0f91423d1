"""The reproduction of BD-KD: its parts, one seed against the card's claims, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.models.perceptron import perceptron
from kullback.papers.bd_kd import reproduce as study


def test_labels_are_wrong_in_training_alone_and_as_often_as_said():
    noisy, clean = study.digits(0, 500, 0.3), study.digits(0, 500, 0.0)
    assert torch.equal(noisy["inputs"], clean["inputs"])
    assert torch.equal(noisy["test_labels"], clean["test_labels"])
    share = (noisy["labels"] != clean["labels"]).double().mean().item()
    assert share == pytest.approx(0.3, abs=6 * (0.21 / 500) ** 0.5)
    assert len(noisy["inputs"]) + len(noisy["validation"]) + len(noisy["test"]) == 1797
    assert not torch.equal(noisy["inputs"], study.digits(1, 500, 0.3)["inputs"])


def test_alone_the_student_is_the_same_whatever_stands_beside_it(monkeypatch):
    monkeypatch.setattr(study, "EPOCHS", 1)
    data = study.digits(0, 100, 0.3)
    found = []
    for width, mode in ((8, None), (16, None), (16, "bdkd")):
        teacher = perceptron(64, width, 10, generator=stream(0, "teacher"))
        student = perceptron(64, 4, 10, generator=stream(0, "student"))
        shares = study.train([teacher, student], [1e-3, 3e-3], data, mode, seed=0)
        found.append(torch.nn.utils.parameters_to_vector(student.parameters()).detach())
        assert shares == [0.0] or (mode is not None and len(shares) == 1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_measures_of_a_sure_and_wrong_network():
    data = study.digits(0, 300, 0.0)

    class Sure(torch.nn.Module):
        def forward(self, inputs):
            logits = torch.zeros(len(inputs), 10)
            logits[:, 3] = 8.0
            return logits

    found = study.measured(Sure(), data)
    share = 100 * (data["test_labels"] == 3).double().mean().item()
    assert found["accuracy"] == pytest.approx(share)
    assert found["ece"] == pytest.approx(100 - share, abs=0.4)
    assert found["scaled_ece"] < 5.0
    assert sum(found["samples"]) == len(data["test"])


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.bd_kd").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["ece_reduction"] >= 1.0
    assert report.metrics["accuracy_gain"] >= -1.0
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "bd_kd.svg")
    assert ElementTree.parse(tmp_path / "bd_kd.svg").getroot().tag.endswith("svg")
