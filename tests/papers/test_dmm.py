"""The parts of the unlearning reproduction, and one forget set in small."""

import pytest
import torch

from kullback.core.runs import Run
from kullback.papers.dmm import reproduce as paper

pytest.importorskip("sklearn")


@pytest.fixture
def data():
    images, labels = paper.digits()
    return images[:300], labels[:300], images[300:600], labels[300:600]


def test_a_coherent_set_is_of_one_digit(data):
    found = paper._neighbours(data[0], data[1], 8)
    assert len(found) == paper.FORGET == len(set(found.tolist()))
    assert (data[1][found] == 8).all()
    spread = torch.cdist(data[0][found], data[0][found]).mean()
    others = (data[1] == 8).nonzero().squeeze(1)
    assert spread <= 1.1 * torch.cdist(data[0][others], data[0][others]).mean()


def test_outputs_have_no_mean_over_classes(data):
    model = paper._trained(data, 2, None, 0, "test")
    assert paper._outputs(model, data[0]).mean(-1).abs().max() < 1e-5
    assert paper._margins(model, data).shape == (2, 600)


def test_the_sets_to_calibrate_on_are_of_other_digits(data, monkeypatch):
    monkeypatch.setattr(paper, "REPEATS", 1)
    masks, outputs = paper._held_out(data, 0)
    assert masks.shape == (8, 300)
    assert outputs.shape == (8, 300, 10)
    assert (masks == 0).sum(1).tolist() == [paper.FORGET] * 8
    assert not (set(data[1][(masks == 0).any(0)].tolist()) & set(paper.DIGITS))


def test_margins_are_kept_at_the_median_point_of_each_set(data):
    problem = paper.ForgetProblem(data[0], data[1], torch.tensor([4, 9, 2]))
    same = torch.linspace(-1.0, 1.0, 40).unsqueeze(1).expand(40, 600)
    moved = same.clone()
    moved[:, 4] += 0.7
    moved[:, 9] += 5.0
    rows = paper._kept({"retrained": same, "nothing": moved}, problem)
    forgotten, retained = rows[1], rows[3]
    assert (forgotten["point"], forgotten["set"], retained["set"]) == (4, "forgotten", "retained")
    assert forgotten["margins"] == pytest.approx(moved[:, 4].tolist(), abs=1e-3)
    assert retained["point"] not in (4, 9, 2)


@pytest.mark.reproduce
def test_one_seed_in_small(tmp_path, monkeypatch):
    for name, value in {"MODELS": 6, "SUBSETS": (20, 40), "CHUNK": 20, "DIGITS": (8,), "REPEATS": 1}.items():
        monkeypatch.setattr(paper, name, value)
    monkeypatch.setitem(paper.MATCHING, "epochs", 30)
    monkeypatch.setattr(paper, "CURVE", (10,))
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    kept = [row for row in report.rows if "margins" in row]
    assert [row["set"] for row in kept] == 4 * ["forgotten"] + 4 * ["retained"]
    assert {row["margins_of"] for row in kept} == {"retrained", *paper.SHOWN}
    assert all(len(row["margins"]) == 6 for row in kept)
    by_name = {row["method"]: row for row in report.rows if "method" in row}
    assert {"nothing", "floor", "oracle", "DMM 20", "DMM 40", "TRAK", "calibrated"} < by_name.keys()
    assert by_name["oracle"]["forget"] < by_name["nothing"]["forget"]
    curve = [by_name[name] for name in ("nothing", "oracle after 10", "oracle")]
    assert [row["steps"] for row in curve] == [0, 10, 30]
    assert curve[0]["forget"] > curve[1]["forget"] > curve[2]["forget"]
    monkeypatch.setattr(paper, "DIGITS", (8, 8))
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
