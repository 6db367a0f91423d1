"""The reproduction of online difficulty filtering: its world, one short training of each mode, the card, the figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.runs import Run
from kullback.data.arithmetic import sum_examples
from kullback.models.adder import trained_adder
from kullback.papers.difficulty_filtering import language_model
from kullback.papers.difficulty_filtering import reproduce as study


def test_the_world_is_extreme_and_has_a_rule():
    given = study.world(0)
    start = study.pass_rate(torch.zeros(study.FEATURES), given, slice(None))
    assert 0.3 < start.mean() < 0.6
    assert ((start < 0.05) | (start > 0.95)).double().mean() > 0.7, "most prompts are solved always or never"
    law = study.log_policy(torch.randn(study.FEATURES, generator=torch.Generator().manual_seed(1)), given, slice(0, 9))
    assert torch.allclose(law.logsumexp(1), torch.zeros(9), atol=1e-6)
    assert not torch.equal(given.right, study.world(1).right)


def rows(rates, drawn=16):
    return [
        {"mode": "m", "update": at, "drawn": drawn * at, "pass_rate": rate, "solved": [0] * 9}
        for at, rate in enumerate(rates, start=1)
    ]


def test_metrics_count_updates_to_the_best_of_plain():
    found = {
        "plain": rows([0.1, 0.2, 0.5, 0.4]), "balanced": rows([0.2, 0.5, 0.6, 0.6], 100),
        "nonzero": rows([0.1, 0.1, 0.1, 0.1]), "balanced, tracked": rows([0.5, 0.5, 0.5, 0.7]),
        "offline": rows([0.3] * 4), "easy to hard": rows([0.2] * 4),
    }  # fmt: skip
    got = study.metrics(found)
    assert got["updates_ratio"] == pytest.approx(2 / 3)
    assert got["pass_rate_gain"] == pytest.approx(0.2)
    assert got["nonzero_updates_ratio"] == float("inf")
    assert (got["plain_drawn"], got["balanced_drawn"]) == (64, 400)


def test_a_curriculum_goes_from_easy_to_hard():
    given, weight = study.world(0), torch.zeros(study.FEATURES)
    start = study.pass_rate(weight, given, slice(0, study.PROMPTS))
    found = [
        torch.tensor([start[prompt] for prompt, _ in batch.groups]).mean()
        for batch, _ in zip(study.batches(weight, given, "easy to hard", 0), range(study.UPDATES), strict=False)
    ]
    assert found[0] > 0.9
    assert found[-1] < 0.1
    once = next(study.batches(weight, given, "offline", 0))
    assert len(once.groups) == study.BATCH
    assert all(0.01 < start[prompt] < 0.99 for prompt, _ in once.groups)


def test_rows_are_thinned_and_batches_summed():
    given = [{**row, "solved": [at, 0, 0, 0, 0, 0, 0, 0, 1]} for at, row in enumerate(rows([0.1] * 12))]
    found = study.thinned(given)
    assert [row["update"] for row in found] == [5, 10, 12]
    assert [row["solved"][0] for row in found] == [10, 35, 21]
    assert [row["solved"][8] for row in found] == [5, 5, 2]


def curve(rates, each=16):
    return [{"update": 10 * at, "pass_rate": rate, "drawn": 10 * at * each} for at, rate in enumerate(rates)]


def test_metrics_of_the_model_are_taken_between_measurements():
    found = {"plain": curve([0.2, 0.4, 0.5]), "balanced": curve([0.2, 0.6, 0.8], 32), "nonzero": curve([0.2, 0.3, 0.4])}
    got = language_model.model_metrics(found)
    assert got["model_balanced_updates_ratio"] == pytest.approx(7.5 / 20)
    assert got["model_balanced_drawn_ratio"] == pytest.approx(2 * 7.5 / 20)
    assert got["model_balanced_gain"] == pytest.approx(0.3)
    assert got["model_nonzero_updates_ratio"] == float("inf")


def test_a_short_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "UPDATES", 6)
    monkeypatch.setattr(language_model, "UPDATES", 2)
    monkeypatch.setattr(language_model, "EVERY", 1)
    monkeypatch.setattr(language_model, "SAMPLES", 2)
    monkeypatch.setattr(language_model, "trained_adder", lambda: trained_adder(limit=4, hidden=32, layers=1, steps=40))
    monkeypatch.setattr(language_model, "sum_examples", lambda: sum_examples(4))
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "cache"))
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.difficulty_filtering").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["plain_drawn"] == 6 * study.BATCH
    for row in report.rows:
        if row["mode"].startswith("balanced") and "model" not in row:
            assert sum(row["solved"]) == sum(row["solved"][2:7]), "two to six of eight are right in what is trained on"
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")


@pytest.mark.reproduce
@pytest.mark.slow
def test_one_seed_against_the_card(tmp_path, monkeypatch):
    """Of the linear policy: the language model's panel takes a minute and more."""
    monkeypatch.setattr(study, "model_curves", lambda run: dict.fromkeys(language_model.MODES, curve([0.1, 0.2])))
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    assert report.metrics["updates_ratio"] <= 0.8
    assert report.metrics["pass_rate_gain"] >= 0.03
    assert report.metrics["tracked_drawn"] < report.metrics["balanced_drawn"] / 1.5
