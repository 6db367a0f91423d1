"""The reproduction of CS-IB: its parts, one seed against the card, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.distill.bottleneck import Bottleneck, CSIBLoss
from kullback.papers.cs_ib import objectives
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


@pytest.fixture
def batch(generator):
    """x [6, 3], y [6] and what a noisy network says of them."""
    x, y = torch.randn(6, 3, generator=generator), torch.randn(6, generator=generator)
    network = Bottleneck(3, hidden=(4, 4), k=2, stochastic=True, generator=stream(0, "network"))
    return x, y, network(x, stream(0, "noise"))


def test_the_variational_term_is_zero_at_the_standard_normal(batch):
    x, y, out = batch
    plain = out._replace(mean=torch.zeros(6, 2), log_variance=torch.zeros(6, 2))
    assert objectives.vib(x, y, plain, weight=3.0) == objectives.mse(x, y, out)
    normal = torch.distributions.Normal(out.mean, (0.5 * out.log_variance).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(objectives.vib(x, y, out, weight=3.0), objectives.mse(x, y, out) + 3.0 * kl)


def test_the_bound_on_information_is_its_definition_and_lies_between_its_limits(batch):
    _, _, out = batch
    mean, log_variance = 4 * out.mean, 5 * out.log_variance
    normal = torch.distributions.Normal(mean.unsqueeze(1), (0.5 * log_variance).exp().unsqueeze(1))
    other = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(normal, other).sum(-1)
    found = objectives.pairwise_bound(mean, log_variance)
    torch.testing.assert_close(found, -(-kl).exp().mean(1).log().mean())
    assert abs(found + (-kl.T).exp().mean(1).log().mean()) > 1e-5, "divergences the other way round are something else"
    torch.testing.assert_close(objectives.pairwise_bound(mean[:1].expand(6, 2), log_variance * 0), torch.zeros(()))
    far = objectives.pairwise_bound(100 * torch.arange(12.0).view(6, 2), torch.zeros(6, 2))
    torch.testing.assert_close(far, torch.tensor(6.0).log())


def test_every_family_adds_its_term_to_its_error(batch):
    x, y, out = batch
    error, bound = objectives.mse(x, y, out), objectives.pairwise_bound(out.mean, out.log_variance)
    k, q = (torch.exp(-torch.cdist(a, a).square() / (2 * a.shape[1])) for a in (x, out.representation))
    centre = torch.eye(6) - 1 / 6
    wanted = {
        "VIB": objectives.vib(x, y, out, weight=0.5), "NIB": error + 0.5 * bound,
        "squared NIB": error + 0.5 * bound**2, "exponential NIB": error + 0.5 * bound.exp(),
        "HSIC": error + 0.5 * (k @ centre @ q @ centre).trace() / 36,
        **dict.fromkeys(
            ("CS-IB", "CS-IB, noise"), CSIBLoss(beta=0.5)(x, y, out.prediction, out.representation)["loss"]
        ),
    }  # fmt: skip
    assert set(wanted) == set(objectives.FAMILIES)
    for name, family in objectives.FAMILIES.items():
        torch.testing.assert_close(family.at(0.5)(x, y, out), wanted[name])
        zero = family.at(0.0)(x, y, out)
        assert name.startswith("CS-IB") or zero == error
    with pytest.raises(RuntimeError, match="variance"):
        objectives.FAMILIES["NIB"].at(0.5)(x, y, out._replace(log_variance=None))


def test_weights_rise_to_the_ratio_and_errors_are_read_between_them():
    """Information 1 / (1 + w) at weight w is a ratio of w / (1 + w), and an error of its square is known."""
    tried = []

    def measure(weight):
        tried.append(weight)
        return 1 / (1 + weight), (weight**2, -weight)

    points = objectives.raised(0.01, measure, 0.5)
    assert sorted(tried) == [point.weight for point in points]
    assert tried[:6] == [0.0, 0.01, 0.0316, 0.1, 0.316, 1.0], "up to the first weight that reaches it"
    assert len(tried) == 7, "from a ratio of 0.24 to one of 0.5 is far: one weight in between"
    assert points[-1].ratio == 0.5
    assert objectives.at_ratio(points, 0.5) == (1.0, -1.0)
    below, above = points[-2], points[-1]
    middle = (below.ratio + above.ratio) / 2
    assert objectives.at_ratio(points, middle)[1] == pytest.approx((below.errors[1] + above.errors[1]) / 2)
    assert objectives.at_ratio(points, middle)[1] != pytest.approx(-middle / (1 - middle), rel=1e-3), "not the curve"
    with pytest.raises(RuntimeError, match="did not reach"):
        objectives.raised(1.0, lambda weight: (1.0, (0.0,)), 0.5)
    with pytest.raises(RuntimeError, match="no two weights"):
        objectives.at_ratio(points[:2], 0.5)


def test_information_is_that_of_a_noisy_representation():
    table = study.tables(0)["diabetes"]
    network = Bottleneck(10, hidden=(4, 4), k=2, stochastic=True, generator=stream(0, "network"))
    found = []
    for bias in (-20.0, 0.0):
        with torch.no_grad():
            network.log_variance[0].weight.zero_()
            network.log_variance[0].bias.fill_(bias)
        found.append(study.information(network, table, 0))
    assert found[1] < 0.5 * found[0]
    assert study.information(network, table, 0) == found[1]


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
@pytest.mark.slow
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    card = tomllib.loads(resources.files("kullback.papers.cs_ib").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["rmse_ratio_mse"] < 1.0
    rows = [row for row in report.rows if "method" in row]
    assert len(rows) == 2 * len(study.METHODS)
    for row in rows:
        errors = [row[f"fgsm {eps:g}"] for eps in study.ATTACKS]
        assert errors == sorted(errors), "a stronger attack does more harm"
        assert 0 < row["compression"] <= 1
    for data in ("diabetes", "friedman"):
        for name in objectives.FAMILIES:
            own = [row for row in report.rows if row["data"] == data and row.get("family") == name]
            assert {row["ratio"] for row in own if row["weight"] is None} == set(study.RATIOS)
            assert max(row["ratio"] for row in own) >= 0.5
    study.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "cs_ib.svg")
    assert ElementTree.parse(tmp_path / "cs_ib.svg").getroot().tag.endswith("svg")
