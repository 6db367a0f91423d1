"""The reproduction of f-DPO: its world, one seed at one beta, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.align.worlds import expected_reward
from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.f_dpo import reproduce as study


def test_the_chain_is_a_law_of_order_two():
    table = study.chain(stream(0, "x")).view(6, 6, 6, 6, 6)
    assert table.flatten().logsumexp(0).item() == pytest.approx(0.0, abs=1e-5)
    last = table.log_softmax(-1)
    torch.testing.assert_close(last, last[:1, :1].expand_as(last))  # two tokens before it say all
    assert (last - last[:, :, :1]).abs().max() > 0.1


def test_the_preferred_one_of_a_pair_comes_first(monkeypatch):
    monkeypatch.setattr(study, "STEPS", 5)
    here = study.setting(1)
    assert expected_reward(here.log_reference, here.reward).item() == pytest.approx(0.0, abs=1e-4)
    first, second = here.reward[study.WORLD.index(here.held_out)]
    wins = torch.sigmoid(study.SHARPNESS * (first - second).abs())
    share = ((first > second).float().mean(), wins.mean())
    assert share[0].item() == pytest.approx(share[1].item(), abs=6 * 0.5 / study.HELD_OUT**0.5)


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BETAS", (0.1, 1.0))
    monkeypatch.setattr(study, "CURVES", ("reverse KL", "forward KL"))
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.f_dpo").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["reward_order_violations"] == report.metrics["entropy_order_violations"] == 0
    assert report.metrics["forward_reference_kl"] < 2.5 < 12.0 < report.metrics["reverse_reference_kl"]
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "f_dpo.svg")
    assert ElementTree.parse(tmp_path / "f_dpo.svg").getroot().tag.endswith("svg")
