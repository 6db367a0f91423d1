"""The reproduction of CS-IB: its parts, one seed against the card, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.distill.bottleneck import Bottleneck
from kullback.papers.cs_ib import reproduce as study

pytest.importorskip("sklearn")


def test_tables_are_standardised_by_what_is_trained_on():
    before = torch.random.get_rng_state()
    first, again, other = study.tables(1), study.tables(1), study.tables(2)
    for name, rows, columns in (("diabetes", 442, 10), ("friedman", 700, 10)):
        x, y = first[name].train
        assert x.shape == (int(0.7 * rows), columns)
        assert len(first[name].test[1]) == rows - len(x)
        assert len(first[name].held_out[1]) == rows // 10
        torch.testing.assert_close(x.mean(0), torch.zeros(columns), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.std(correction=0), torch.ones(()))
        assert torch.equal(first[name].held_out[0], x[-(rows // 10) :])
        assert torch.equal(x, again[name].train[0])
        assert not torch.equal(x, other[name].train[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_variational_term_is_zero_at_the_standard_normal(generator):
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, generator=generator)
    network = Bottleneck(3, hidden=(4, 4), k=2, stochastic=True, generator=stream(0, "network"))
    out = network(x)
    plain = out._replace(mean=torch.zeros(6, 2), log_variance=torch.zeros(6, 2))
    assert study.vib(x, y, plain) == study.mse(x, y, out)
    normal = torch.distributions.Normal(out.mean, (0.5 * out.log_variance).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(study.vib(x, y, out), study.mse(x, y, out) + study.VIB_WEIGHT * kl)


def test_early_stopping_ends_where_the_held_out_error_was_lowest(monkeypatch):
    monkeypatch.setattr(study, "EPOCHS", 6)
    table = study.tables(0)["diabetes"]
    seen = []
    measure = study.rmse

    def listening(network, x, y):
        seen.append(measure(network, x, y))
        return seen[-1]

    monkeypatch.setattr(study, "rmse", listening)
    network = study.fit(table, study.mse, 0, early=True)
    assert measure(network, *table.held_out) == pytest.approx(min(seen))
    assert len(seen) == 6


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.cs_ib").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["rmse_ratio_mse"] < 1.0
    assert len(report.rows) == 2 * len(study.METHODS)
    for row in report.rows:
        errors = [row[f"fgsm {eps:g}"] for eps in study.ATTACKS]
        assert errors == sorted(errors), "a stronger attack does more harm"
        assert 0 < row["compression"] <= 1
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "cs_ib.svg")
    assert ElementTree.parse(tmp_path / "cs_ib.svg").getroot().tag.endswith("svg")
