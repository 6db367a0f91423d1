"""The reproduction of DPH-RL: its world, exact laws, one short seed, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.align.log_probs import completion_log_probs, sequence_log_probs
from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.dph_rl import reproduce as study


def test_the_world_is_that_of_the_card():
    given = study.world()
    assert given.prompts.shape == (35, 2)
    assert given.correct.shape == (35, 216)
    assert (given.correct.sum(1) >= study.FEWEST).all()
    answers = study.digits_of(torch.arange(216))
    assert answers[37].tolist() == [1, 0, 1]
    for row in (0, 15, 30):
        task, value = given.tasks[row].item(), given.prompts[row, 1].item() - 9
        a, b, c = answers[given.correct[row]].T
        found = {0: a + b + c, 1: torch.stack([a, b, c]).amax(0) + torch.stack([a, b, c]).amin(0),
                 2: 2 * (a - c).abs() + b}[task]  # fmt: skip
        assert (found == value).all()


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(study, "PRETRAINING", 60)
    monkeypatch.setattr(study, "STEPS", 4)
    return study.world()


def test_the_law_of_all_answers_is_the_models(short):
    model = study.pretrained(0, short)
    laws = study.answer_log_probs(model, short.prompts)
    assert torch.allclose(laws.logsumexp(1), torch.zeros(35), atol=1e-5)
    ids = torch.cat([short.prompts[[20]].expand(216, -1), study.digits_of(torch.arange(216))], 1)
    mask = torch.ones(216, 3, dtype=torch.bool)
    with torch.no_grad():
        found = completion_log_probs(model, ids, torch.ones_like(ids), mask, vocabulary=study.BASE).log_probs
    assert torch.allclose(sequence_log_probs(found, mask), laws[20], atol=1e-5)


def test_rewards_are_the_worlds(short):
    model = study.pretrained(0, short)
    found, rewards = study.Riddles(short)(model, [3, 30], group=40, generator=stream(0))
    for row in range(80):
        place = sum(int(digit) * 6 ** (2 - at) for at, digit in enumerate(found.completion_ids[row]))
        assert rewards[row] == short.correct[found.prompt_index[row], place]


def test_a_short_seed_and_its_figure(short, tmp_path, monkeypatch):
    split = study.Partition(torch.arange(4), torch.arange(4, 21))
    made = study.RehearsalBuffer()
    found, _ = study.Riddles(short)(study.pretrained(1, short), [0, 1], group=4, generator=stream(1))
    made.add(found, torch.ones(8))
    monkeypatch.setattr(study, "rehearse", lambda *a, **k: (split, made))
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    card = tomllib.loads(resources.files("kullback.papers.dph_rl").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert len(report.rows) == 8 * 3
    study.draw([{**row, "seed": 1} for row in report.rows], tmp_path / "dph_rl.svg")
    assert ElementTree.parse(tmp_path / "dph_rl.svg").getroot().tag.endswith("svg")


@pytest.mark.slow  # half a minute
@pytest.mark.reproduce
def test_one_seed_against_the_card(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    assert report.metrics["grpo_coverage_kept"] <= 0.45
    assert report.metrics["dph_coverage_kept"] >= 0.8
    assert report.metrics["dph_pass1_gap"] <= 0.1
