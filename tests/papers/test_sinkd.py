"""The reproduction of SinKD: its parts, one seed against the card's claims, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.sinkd import reproduce as study


def test_members_vanish_at_the_target_or_are_smallest_there():
    target = study.normal(torch.tensor(study.TARGET))
    assert target.logsumexp(-1).item() == pytest.approx(0.0, abs=1e-6)
    around = study.normal(torch.linspace(study.TARGET - 5, study.TARGET + 5, 11))
    for name, divergence in study.members().items():
        values = divergence(target.expand_as(around), around)
        assert values.argmin().item() == 5, name


def test_starts_on_the_target_are_recovered_and_a_flat_loss_recovers_no_other():
    starts = torch.tensor([study.TARGET, study.TARGET - 30.0])
    assert study.recovered(study.members()["KL"], starts) == 1.0
    assert study.recovered(lambda log_p, log_q: 0.0 * log_q.sum(-1), starts) == 0.5


def test_a_seed_gives_the_same_digits_and_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    inputs = study.digits(3)[0]
    assert torch.equal(inputs, study.digits(3)[0])
    assert not torch.equal(inputs, study.digits(4)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.sinkd").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["sinkhorn_recovered"] >= 0.95
    assert report.metrics["js_tv_recovered"] <= 0.75
    assert report.metrics["distance_ratio"] <= 1.0
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "sinkd.svg")
    assert ElementTree.parse(tmp_path / "sinkd.svg").getroot().tag.endswith("svg")
