"""The reproduction of PaRIS particle Gibbs: its parts, one seed at a reduced size, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.paris import reproduce as study
from kullback.sample.exact_smoothing import kalman_paths, kalman_smoother
from kullback.sample.ppg import path_statistic
from kullback.sample.state_space import LinearGaussianModel


def test_the_exact_values_are_those_of_the_kalman_smoother():
    model = LinearGaussianModel.scalar(0.9, 0.6, 1.0)
    observations = study.observed(model, 12, stream(0, "x"))
    paths = kalman_paths(model, observations, 20_000, generator=stream(1, "x"))
    values = path_statistic(study.product, paths, observations)
    exact = study.smoothed_product(model, observations)
    assert values.mean().item() == pytest.approx(exact, abs=6 * values.std().item() / 20_000**0.5)
    row = study.error_row("x", values, exact + 1.0, sweep=3)
    assert row["bias"] == pytest.approx(values.mean().item() - exact - 1.0)
    assert row["rmse"] ** 2 == pytest.approx(row["bias"] ** 2 + 20_000 * row["error"] ** 2, rel=1e-3)


def on_paths(statistic):
    """The statistic of pairs [R, N, M, d] for states [R, 1, d]."""
    return lambda *given: statistic(*given).squeeze(1)


def test_the_score_in_closed_form_is_the_derivative_of_the_likelihood_at_its_maximum():
    truth = study.autoregression({"coefficient": torch.tensor([0.9], dtype=torch.float64)})
    observations = study.observed(truth, 60, stream(2, "x"))
    best = study.most_likely(observations)
    values = {"coefficient": torch.tensor([best, 0.7], dtype=torch.float64, requires_grad=True)}
    likelihood = kalman_smoother(study.autoregression(values), observations).log_likelihood
    (slopes,) = torch.autograd.grad(likelihood.sum(), values["coefficient"])
    assert abs(slopes[0]) < 0.01 < abs(slopes[1])
    for index in (0, 1):
        fixed = {"coefficient": values["coefficient"].detach()[index : index + 1]}
        paths = kalman_paths(study.autoregression(fixed), observations, 20_000, generator=stream(3, "x"))
        scores = path_statistic(on_paths(study.score(fixed)), paths, observations)
        assert scores.mean().item() == pytest.approx(slopes[index].item(), abs=6 * scores.std().item() / 20_000**0.5)


def test_traced_ancestors_meet_and_backward_draws_do_not():
    traced, drawn, mean, deviation = study.genealogies()
    assert len(traced[:, 0].unique()) == 1 < len(drawn[:, 0].unique())
    assert traced.shape == drawn.shape == (25, len(mean))
    assert torch.equal(traced[:, -1], drawn[:, -1])
    assert ((drawn - mean).abs() < 5 * deviation).all()


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "REPLICATES", 100)
    monkeypatch.setattr(study, "LEARNING_TIMES", 60)
    monkeypatch.setattr(study, "STEPS", 50)
    monkeypatch.setattr(study, "AVERAGED", 10)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.paris").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["bias_ratio_after_4_sweeps"] < 0.5
    assert report.metrics["rmse_ratio"] > 0.8
    assert report.metrics["learning_bias_ratio"] < 1.0
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "paris.svg")
    assert ElementTree.parse(tmp_path / "paris.svg").getroot().tag.endswith("svg")
