"""The parts of the f-DPG reproduction: its chain, its policy, and one seed in small."""

import pytest
import torch

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.papers.f_dpg import reproduce as paper


def test_the_base_is_a_law_of_second_order_and_the_fit_has_its_marginals():
    base = paper._second_order(generator(0, "base"))
    assert base.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
    fit = paper._first_order(paper._best_fit(base), paper.WORLD.sequences())
    assert fit.logsumexp(0).item() == pytest.approx(0.0, abs=1e-12)
    cubes = [law.exp().view((5,) * 5) for law in (base, fit)]
    for first in range(4):
        others = [place for place in range(5) if place not in (first, first + 1)]
        torch.testing.assert_close(cubes[0].sum(others), cubes[1].sum(others), atol=1e-12, rtol=1e-10)
    assert not torch.allclose(cubes[0], cubes[1], atol=1e-4), "it cannot be represented"


def test_the_optimum_is_one():
    base = paper._second_order(generator(0, "base"))
    x = paper.WORLD.sequences()
    target = base + (x[:, 0] == x[:, -1]).double()
    tables = paper._optimum(paper._best_fit(base), target)
    js = paper.target_divergence("js")
    best = js(target.log_softmax(0), paper._first_order(tables, x)).item()
    draw = generator(1, "nearby")
    for _ in range(20):
        moved = [t + 0.05 * torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in tables]
        assert js(target.log_softmax(0), paper._first_order(moved, x)).item() > best


@pytest.mark.reproduce
def test_one_seed_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "STEPS", 60)
    monkeypatch.setattr(paper, "TEXT_STEPS", 10)
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    assert report.metrics["js_alignment"] > report.metrics["base_alignment"]
    assert 0.0 < report.metrics["prose_before"] < 1.0
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000
