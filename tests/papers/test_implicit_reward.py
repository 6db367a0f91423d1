"""The reproduction of implicit rewards: its parts, one seed, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.align.worlds import expected_reward
from kullback.core.runs import Run
from kullback.divergences import kl
from kullback.papers.implicit_reward import reproduce as study


def test_the_expert_is_the_tilted_base_and_sft_goes_towards_it(monkeypatch):
    monkeypatch.setattr(study, "BASE_STEPS", 20)
    monkeypatch.setattr(study, "STEPS", 40)
    here = study.setting(1)
    assert expected_reward(here.log_base, here.reward).item() == pytest.approx(0.0, abs=1e-4)
    tilt = here.log_expert - here.log_base - here.reward
    assert (tilt - tilt[0]).abs().max() < 1e-4
    found = study.pipeline("SFT 1e-3").run(here.base, study.training(here, 1))
    tuned = found.tuned
    with torch.no_grad():
        assert kl(here.log_expert, tuned.all_log_probs()) < kl(here.log_expert, here.log_base)
    first, second = here.reward[here.pairs]
    assert (first > second).float().mean() > 0.6


@pytest.mark.slow  # half a minute
@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.implicit_reward").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["text_small_rate_drift_reduction"] > 0.2
    assert report.metrics["post_sft_gain"] < 0.0
    assert report.metrics["implicit_accuracy_gain"] > 0.03
    assert report.metrics["drift_reduction_min"] > 0.15
    at = {row["method"]: row for row in report.rows}
    assert at["SFT 5e-3"]["drift"] > at["SFT 1e-3"]["drift"] > at["SFT 3e-4"]["drift"]
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "implicit_reward.svg")
    assert ElementTree.parse(tmp_path / "implicit_reward.svg").getroot().tag.endswith("svg")


def test_pairs_are_ordered_rightly_as_counted(monkeypatch):
    """Against draws of pairs; and the reward itself orders all, its opposite none, the base half of them."""
    monkeypatch.setattr(study, "BASE_STEPS", 5)
    here = study.setting(0)
    source = torch.Generator().manual_seed(0)
    table = (here.log_base + 0.3 * here.reward + 0.5 * torch.randn(len(here.reward), generator=source)).log_softmax(0)
    one, other = torch.multinomial(here.log_base.exp(), 40_000, replacement=True, generator=source).view(2, -1)
    apart = (here.reward[one] - here.reward[other]).abs() > 1e-4
    one, other = one[apart], other[apart]
    learned = table - here.log_base
    agreed = ((learned[one] > learned[other]) == (here.reward[one] > here.reward[other])).float()
    error = 6 * (agreed.std() / len(agreed) ** 0.5).item()
    assert study.ordered_rightly(here, table) == pytest.approx(agreed.mean().item(), abs=error)
    for tilt, wanted in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)):
        share = study.ordered_rightly(here, here.log_base + tilt * here.reward)
        assert share == pytest.approx(wanted, abs=5e-3)
