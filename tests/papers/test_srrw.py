"""The reproduction of self-repellent token algorithms: its parts, one seed at a reduced size, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.papers.srrw import reproduce as study


def test_the_graph_is_a_ring_with_chords():
    chain = study.graph(stream(0, "x"))
    edges = (chain.matrix() > 0).fill_diagonal_(False)
    assert int(edges.sum()) == 2 * (study.NODES + study.CHORDS)
    index = torch.arange(study.NODES)
    assert bool(edges[index, (index + 1) % study.NODES].all())
    torch.testing.assert_close(chain.target, torch.full((100,), 0.01, dtype=torch.float64))


def test_samples_are_of_length_one_and_of_both_kinds():
    field = study.samples(stream(0, "x"))
    torch.testing.assert_close(field.features.norm(dim=1), torch.ones(100, dtype=torch.float64))
    assert 20 < int(field.labels.sum()) < 80
    uniform = torch.full((100,), 0.01, dtype=torch.float64)
    best = field.optimum(uniform)
    loss = lambda theta: (  # noqa: E731
        torch.nn.functional.binary_cross_entropy_with_logits(field.features @ theta, field.labels)
        + 0.5 * study.RIDGE * theta.square().sum()
    )
    for direction in torch.eye(7, dtype=torch.float64):
        assert loss(best) < min(loss(best + 1e-3 * direction), loss(best - 1e-3 * direction))
    best.requires_grad_()
    (slope,) = torch.autograd.grad(loss(best), best)
    assert slope.abs().max() < 1e-12


def test_metrics_are_gains_over_the_base_chain():
    final = {(case, alpha): 1.0 / (1.0 + alpha) for case in study.CASES for alpha in study.ALPHAS}
    final |= {("faster", alpha): 1.0 / (1.0 + alpha) ** 2 for alpha in study.ALPHAS}
    early = {key: value if key[1] else 2.0 * value for key, value in final.items()}
    assert study.metrics(final, early) == pytest.approx(
        {
            "gain_at_5": 36.0, "gain_at_20": 441.0, "gain_ratio_min": 6.0, "gain_slow_case_max": 21.0,
            "gain_slow_case_late_over_early": 0.5,
        }
    )  # fmt: skip


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STEPS", 5000)
    monkeypatch.setattr(study, "RUNS", 30)
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=2))
    card = tomllib.loads(resources.files("kullback.papers.srrw").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["gain_at_5"] > 6
    assert report.metrics["gain_ratio_min"] > 1
    assert report.metrics["gain_slow_case_max"] < 10
    for row in report.rows:  # the base chain has come to the theory's limit
        if row["step"] == 5000 and row["alpha"] == 0.0:
            assert row["mse"] == pytest.approx(row["theory"], rel=0.7)
    study.draw([{**row, "seed": 2} for row in report.rows], tmp_path / "srrw.svg")
    assert ElementTree.parse(tmp_path / "srrw.svg").getroot().tag.endswith("svg")
