"""The reproduction of MCMI: its parts, one seed of reduced size against the card's claims, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.distill.mcmi_teacher import measured
from kullback.models.perceptron import perceptron
from kullback.papers.mcmi import reproduce as study


def test_digits_are_split_without_overlap_and_by_the_seed():
    data = study.digits(0)
    assert len(data.inputs) == 1000
    assert len(data.test_inputs) == 797
    assert torch.equal(data.inputs, study.digits(0).inputs)
    assert not torch.equal(data.inputs, study.digits(1).inputs)


def test_a_temperature_spreads_the_outputs_and_moves_no_decision(generator):
    data = study.digits(0)
    model = perceptron(64, 16, study.CLASSES, generator=stream(0, "x"))
    plain, warm = (
        measured(one, [(data.inputs, data.labels)], study.CLASSES) for one in (model, study.Tempered(model, 0.5))
    )
    assert warm.accuracy == plain.accuracy
    assert warm.cmi > plain.cmi


def test_the_control_goes_on_from_the_same_teacher(monkeypatch):
    monkeypatch.setattr(study, "SATURATED", 2)
    monkeypatch.setattr(study, "FINE", 1)
    monkeypatch.setattr(study, "LAMBDAS", (0.0, 0.25))
    data = study.digits(0)
    found = study.teachers(0, data, (1,))
    assert list(found) == ["1 epochs", "2 epochs", "weight 0", "weight 0.25", "weight 0, temperature 2"]
    again = study.teachers(0, data, (1,))
    for name in found:
        assert torch.equal(found[name](data.inputs[:5]), again[name](data.inputs[:5]))
    assert not torch.equal(found["weight 0"](data.inputs[:5]), found["weight 0.25"](data.inputs[:5]))


def test_noise_is_of_each_image_and_a_series_has_every_share(monkeypatch):
    data = study.digits(0)
    harder = study.noisy(0, data)
    apart = harder.inputs - data.inputs
    assert apart.std().item() == pytest.approx(study.NOISE, rel=0.02)
    assert torch.equal(harder.inputs, study.noisy(0, data).inputs)
    assert torch.equal(harder.labels, data.labels)
    monkeypatch.setattr(study, "SERIES", ("weight 0", "weight 0.25"))
    monkeypatch.setattr(study, "FRACTIONS", (0.05, 1.0))
    monkeypatch.setattr(study, "STEPS", 64)
    found = {name: perceptron(64, 16, study.CLASSES, generator=stream(0, name)) for name in study.SERIES}
    rows = study.series(0, found, data, "digits")
    assert [(row["fraction"], row["teacher"]) for row in rows] == [(f, n) for f in (0.05, 1.0) for n in found]
    assert all(0.0 <= row["student_accuracy"] <= 100.0 for row in rows)
    assert rows[0]["student_accuracy"] != rows[1]["student_accuracy"]


@pytest.mark.reproduce
@pytest.mark.slow
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STEPS", 60)  # of the students of shares, whose gains are not judged here
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.mcmi").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["information_ratio"] >= 2.0
    assert report.metrics["omitted_class_gain"] >= 5.0
    assert {f"noisy_gain_{part}_percent" for part in (5, 10, 25, 50, 75, 100)} <= set(report.metrics)
    assert report.metrics["temperature_gain"] > report.metrics["omitted_class_gain"]
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "mcmi.svg")
    assert ElementTree.parse(tmp_path / "mcmi.svg").getroot().tag.endswith("svg")
