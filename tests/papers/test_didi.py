"""The reproduction of DiDi-Instruct: its chain, its measures, one seed of reduced size, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.distill.didi import discriminator_accuracy, discriminator_loss
from kullback.models.denoisers import FlatDenoiser, TokenDiscriminator
from kullback.models.masked_diffusion import corrupt
from kullback.papers.didi import reproduce as study
from kullback.papers.didi.text import Judge, letters, prose, windows


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


def accuracy(discriminator, chain, steps=60):
    """After so many steps, of telling the chain's sequences from the same symbols out of order, both half masked."""
    source = stream(0, "accuracy")

    def masked(n):
        real = chain.draw(n, source)
        fake = real[:, torch.randperm(study.LENGTH, generator=source)]
        return [corrupt(x, 0.5, study.SYMBOLS, generator=source) for x in (real, fake)]

    learning = [value for value in discriminator.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learning, study.SETTINGS["discriminator_rate"], weight_decay=0.0)
    for _ in range(steps):
        sides = masked(128)
        scores = discriminator(torch.cat(sides)).split(128)
        loss = discriminator_loss(*scores, *[side == study.SYMBOLS for side in sides])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sides = masked(2000)
    with torch.no_grad():
        found = discriminator_accuracy(*[discriminator(side) for side in sides], *[s == study.SYMBOLS for s in sides])
    return found.item()


def test_the_discriminator_learns_in_the_steps_before_the_student_moves():
    """A reward is as good as its judge: a copy of a perceptron over all places is right by chance and teaches noise."""
    chain = study.Chain.random(stream(1, "chain"))
    assert accuracy(study.untaught_discriminator(1, study.SYMBOLS), chain) > 0.7
    flat = FlatDenoiser(study.SYMBOLS, study.LENGTH, generator=stream(1, "flat"))
    apart = TokenDiscriminator(flat, spectral=False, generator=stream(1, "head"))
    assert accuracy(apart, chain) < 0.6


def test_the_judge_of_text_counts_as_witten_and_bell_do():
    text = letters(["abab abb"])  # a-b-a-b-_-a-b-b
    judge = Judge.counted(text)
    for table in judge.tables:
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(table.shape[:-1], dtype=torch.float64))
    one = torch.full((27,), 1 / 27, dtype=torch.float64)
    one = (torch.bincount(text, minlength=27) + 3 * one) / (len(text) + 3)
    torch.testing.assert_close(judge.tables[0].exp(), one)
    # After b came a, _ and b once each: three kinds in three.
    after_b = torch.zeros(27, dtype=torch.float64)
    after_b[[0, 26, 1]] = 1.0
    torch.testing.assert_close(judge.tables[1][1].exp(), (after_b + 3 * one) / 6)
    torch.testing.assert_close(judge.tables[1][5].exp(), one)  # f was never seen
    torch.testing.assert_close(judge.tables[2][5, 1], judge.tables[1][1])
    x = text[:5].unsqueeze(0)
    by_hand = [judge.tables[0][0], judge.tables[1][0, 1], judge.tables[2][0, 1, 0], judge.tables[3][0, 1, 0, 1],
               judge.tables[3][1, 0, 1, 26]]  # fmt: skip
    assert judge.measured(x)["nll"] == pytest.approx(-sum(by_hand).item() / 5)


def test_real_text_is_likelier_and_nearer_than_its_letters_without_order():
    text = prose()
    real = windows(text.held_out, 2000, study.LENGTH, stream(0, "windows"))
    loose = text.train[torch.randint(len(text.train), real.shape, generator=stream(0, "letters"))]
    true, mixed = text.judge.measured(real), text.judge.measured(loose)
    assert true["nll"] < 1.7 < 4.5 < mixed["nll"]
    assert true["bigram_distance"] < 0.1 < 0.25 < mixed["bigram_distance"]


@pytest.mark.reproduce
def test_one_seed_of_reduced_size_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TEACHER_STEPS", 300)
    monkeypatch.setattr(study, "STEPS", 30)
    monkeypatch.setattr(study, "SHORT", 12)
    monkeypatch.setattr(study, "SETTINGS", {**study.SETTINGS, "discriminator_first": 10})
    monkeypatch.setattr(study, "SAMPLES", 400)
    monkeypatch.setattr(study, "TEXT_SAMPLES", 50)
    monkeypatch.setattr(study, "TEXT_TEACHER_STEPS", 20)
    monkeypatch.setattr(study, "TEXT_SETTINGS", {**study.TEXT_SETTINGS, "iterations": 20, "discriminator_first": 10})
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=1))
    card = tomllib.loads(resources.files("kullback.papers.didi").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    teacher = {row["steps"]: row["nll"] for row in report.rows if row["who"] == "teacher" and row["study"] == "steps"}
    assert teacher[1] > teacher[4] > teacher[16]
    assert report.metrics["entropy_relative_change"] < 0.2
    study.draw([{**row, "seed": 1} for row in report.rows], tmp_path / "didi.svg")
    assert ElementTree.parse(tmp_path / "didi.svg").getroot().tag.endswith("svg")
