"""The reproduction of DiDi-Instruct: its chain, its measures, one seed of reduced size, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.didi import reproduce as study


def test_the_chain_is_stationary_and_its_samples_measure_as_themselves():
    chain = study.Chain.random(stream(1, "chain"))
    torch.testing.assert_close(chain.start @ chain.step, chain.start)
    x = chain.draw(20_000, stream(1, "x"))
    assert x.shape == (20_000, study.LENGTH)
    first, last = (torch.bincount(x[:, place], minlength=study.SYMBOLS) / 20_000 for place in (0, -1))
    error = 6 * (chain.start * (1 - chain.start) / 20_000).sqrt()
    assert ((first - chain.start).abs() < error).all()
    assert ((last - chain.start).abs() < error).all()
    found = chain.measured(x)
    start, step = chain.start, chain.step
    rate = -(start.unsqueeze(-1) * step * step.log()).sum().item()
    initial = -(start * start.log()).sum().item()
    assert found["nll"] == pytest.approx((initial + (study.LENGTH - 1) * rate) / study.LENGTH, abs=0.01)
    assert found["bigram_distance"] < 0.02


def test_symbols_without_order_are_unlikely_and_far():
    chain = study.Chain.random(stream(1, "chain"))
    x = chain.draw(4000, stream(1, "x"))
    mixed = x[:, torch.randperm(study.LENGTH, generator=stream(0, "order"))]
    true, shuffled = chain.measured(x), chain.measured(mixed)
    assert shuffled["nll"] > true["nll"] + 0.3
    assert shuffled["bigram_distance"] > true["bigram_distance"] + 0.1
    assert shuffled["entropy"] == pytest.approx(true["entropy"], abs=1e-5)


def test_every_ablation_is_a_setting_of_its_own():
    made = [study.DiDiSettings(**{**study.SETTINGS, **changed}) for changed in study.ABLATIONS.values()]
    assert len(set(made)) == 4


@pytest.mark.reproduce
def test_one_seed_of_reduced_size_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TEACHER_STEPS", 300)
    monkeypatch.setattr(study, "STEPS", 60)
    monkeypatch.setattr(study, "SHORT", 55)
    monkeypatch.setattr(study, "SAMPLES", 500)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    card = tomllib.loads(resources.files("kullback.papers.didi").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    teacher = {row["steps"]: row["nll"] for row in report.rows if row["who"] == "teacher"}
    assert teacher[1] > teacher[4] > teacher[16]
    assert report.metrics["entropy_relative_change"] < 0.2
    study.draw([{**row, "seed": 1} for row in report.rows], tmp_path / "didi.svg")
    assert ElementTree.parse(tmp_path / "didi.svg").getroot().tag.endswith("svg")
