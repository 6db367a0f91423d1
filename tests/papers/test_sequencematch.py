"""The parts of the SequenceMatch reproduction, and one seed in small."""

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.sequencematch import reproduce as paper


def test_the_text_is_words():
    text, starts, words = paper._text()
    assert len(text) > 100_000
    assert (text[starts - 1] == 0).all()
    assert {"the", "function", "object"} <= words
    assert int(text.max()) < paper.BEGIN


def test_a_model_by_likelihood_never_deletes():
    model = paper._model(0)
    model.without_backspace = True
    actions = paper._sample(model, 3, 10, torch.Generator().manual_seed(0))
    assert actions.shape == (3, 10)
    assert (actions < len(paper.LETTERS)).all()
    model.without_backspace = False
    noisy = paper._sample(model, 50, 10, torch.Generator().manual_seed(0))
    assert (noisy == paper.BACKSPACE).any()
    assert not (noisy == paper.BEGIN).any()


@pytest.mark.reproduce
def test_one_seed_in_small(tmp_path, monkeypatch):
    small = {"PRETRAINED": 60, "TUNED": 30, "SAMPLES": 20, "NOISES": (0.0, 0.1), "ALPHAS": (1.0, 10.0)}
    for name, value in small.items():
        monkeypatch.setattr(paper, name, value)
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    by_method = {(row["method"], row["noise"]): row for row in report.rows if row["part"] == "prose"}
    assert report.metrics["bandit_entropy_fall"] > 0.0
    assert by_method["mle", 0.1]["backspaces"] == 0.0
    assert by_method["cloning", 0.1]["backspaces"] > 0.0
    assert by_method["least_squares", 0.1]["backspaces"] > 0.0
    assert by_method["unlikelihood", 0.1]["backspaces"] == by_method["contrastive", 0.1]["backspaces"] == 0.0
    assert {method for method, _ in by_method} == set(paper.DRAWN)
    assert 0.0 < by_method["contrastive", 0.0]["distinct"] <= 1.0
    assert 0.0 <= by_method["sequencematch", 0.1]["valid"] <= 1.0
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
