"""Margins, KLoM and attributions: the card's numbers, peers, closed forms, and what must not move them."""

import math

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.diagnose.attribution import (
    TRAKFeatures,
    fit_datamodels,
    logistic_influence,
    predict_without,
    ridge_without,
)
from kullback.diagnose.unlearning import klom, klom_floor, klom_report, margin, ulira


def normals(models, points, name, shift=0.0):
    return torch.randn(models, points, generator=generator(0, name, models), dtype=torch.float64) + shift


def test_the_margin_is_the_log_odds_of_the_label():
    logits = torch.randn(5, 7, generator=generator(0, "logits"), dtype=torch.float64)
    labels = torch.arange(5)
    p = logits.softmax(-1)[torch.arange(5), labels]
    torch.testing.assert_close(margin(logits, labels), p.log() - (1 - p).log())
    torch.testing.assert_close(margin(logits + 3.0, labels), margin(logits, labels))
    both = torch.stack([logits, 2 * logits])
    torch.testing.assert_close(margin(both, labels)[1], margin(2 * logits, labels))


def test_klom_of_equal_and_of_disjoint_samples():
    a = normals(50, 4, "a")
    assert klom(a, a).abs().max().item() == 0.0
    assert klom(torch.zeros(3, 1), torch.ones(3, 1)).item() == pytest.approx(11.5129, abs=1e-4)
    torch.testing.assert_close(klom(a, normals(50, 4, "b")), klom(a.flip(0), normals(50, 4, "b")))
    values = [klom(a, normals(50, 4, "b", shift)).mean().item() for shift in (0.0, 1.0, 3.0)]
    assert values == sorted(values)
    assert not torch.allclose(klom(a, normals(50, 4, "b", 1.0)), klom(normals(50, 4, "b", 1.0), a)), "order matters"
    swapped = klom(a, normals(50, 4, "b", 1.0), direction="oracle||unlearned")
    torch.testing.assert_close(swapped, klom(normals(50, 4, "b", 1.0), a))


@pytest.mark.parametrize(
    ("models", "floor", "one", "three"),
    [(60, 0.66, 1.66, 7.0), (100, 0.33, 1.17, 6.6), (200, 0.145, 0.82, 5.9), (1000, 0.024, 0.56, 5.0)],
)
def test_the_floor_of_the_card(models, floor, one, three):
    a = normals(models, 400, "a")
    for shift, expected in ((0.0, floor), (1.0, one), (3.0, three)):
        found = klom(a, normals(models, 400, "b", shift)).mean().item()
        assert found == pytest.approx(expected, rel=0.12, abs=0.02)


def by_numpy(a, b, bins=20, eps=1e-5):
    found = []
    for x, y in zip(a.T.numpy(), b.T.numpy(), strict=True):
        edges = np.linspace(min(x.min(), y.min()), max(x.max(), y.max()), bins + 1)
        p, q = (np.histogram(z, edges)[0] / len(z) for z in (x, y))
        q = np.where(q > 0, q, eps)
        found.append(sum(i * math.log(i / j) for i, j in zip(p, q, strict=True) if i > 0))
    return torch.tensor(found, dtype=torch.float64)


def test_klom_against_numpy_and_the_dropped_maximum():
    a, b = normals(40, 30, "a"), normals(50, 30, "b", 0.5)
    torch.testing.assert_close(klom(a, b), by_numpy(a, b), atol=1e-9, rtol=0)
    dropped = klom(a, b, include_max=False)
    assert not torch.allclose(dropped, klom(a, b))
    assert klom(200 * a, 200 * b).isfinite().all(), "margins are clipped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("include_max", [True, False])
def test_the_compiled_loops_are_their_twin(dtype, include_max):
    pytest.importorskip("numba")
    a, b = normals(40, 600, "a").to(dtype), normals(50, 600, "b", 0.5).to(dtype)
    a[:, 3], b[:, 3] = 1.0, 1.0  # no spread at all
    a[0, 4], b[0, 5] = math.inf, -1e9
    for direction in ("unlearned||oracle", "oracle||unlearned"):
        found, twin = (
            klom(a, b, direction=direction, include_max=include_max, clip=3.0, compiled=compiled)
            for compiled in (True, False)
        )
        torch.testing.assert_close(found, twin, atol=1e-12, rtol=0)
    assert not torch.allclose(klom(a, b, include_max=not include_max), klom(a, b, include_max=include_max))
    torch.testing.assert_close(klom(a.T.contiguous().T, b), klom(a, b, compiled=False))
    with pytest.raises(DataError, match="1 margins are NaN"):
        klom(torch.where(a == a[7, 7], math.nan, a), b)
    assert klom(a[:, :0], b[:, :0]).shape == (0,)


def test_reports_and_floors():
    oracle = normals(120, 50, "a")
    floor = klom_floor(oracle, generator=generator(1, "halves"))
    assert floor.mean().item() == pytest.approx(0.66, abs=0.15)
    sets = {"forget": torch.arange(5), "retain": torch.arange(5, 50)}
    found = klom_report(normals(60, 50, "b"), oracle, sets)
    assert found["forget"].mean <= found["forget"].percentile_95 <= found["forget"].percentile_99
    told = ulira(normals(60, 50, "in", 4.0), normals(60, 50, "out"), normals(60, 50, "u", 4.0))
    hidden = ulira(normals(60, 50, "in", 4.0), normals(60, 50, "out"), normals(60, 50, "u"))
    assert told.mean() > 0.95
    assert hidden.mean().item() == pytest.approx(0.5, abs=0.05)
    one = ulira(normals(60, 50, "in", 4.0), normals(60, 50, "out"), normals(60, 50, "u", 4.0)[:1])
    assert one.mean() > 0.9, "the cheap form, on a single unlearned model"
    assert ulira(normals(60, 50, "in", 4.0), normals(60, 50, "out"), normals(60, 50, "u")[:1]).mean() < 0.6
    with pytest.raises(ShapeError, match="one model at least"):
        ulira(normals(60, 50, "in", 4.0), normals(60, 50, "out"), normals(60, 50, "u")[:0])


def test_ridge_datamodels_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = generator(2, "masks")
    for models, points in ((30, 12), (10, 25)):
        masks = (torch.rand(models, points, generator=draw) < 0.5).double()
        outputs = torch.randn(models, 2, 3, generator=draw, dtype=torch.float64)
        beta, intercept = fit_datamodels(masks, outputs, penalty=2.0)
        peer = linear_model.Ridge(alpha=2.0).fit(masks.numpy(), outputs.flatten(1).numpy())
        torch.testing.assert_close(beta.flatten(1), torch.as_tensor(peer.coef_.T), atol=1e-9, rtol=0)
        torch.testing.assert_close(intercept.flatten(), torch.as_tensor(peer.intercept_), atol=1e-9, rtol=0)
    sparse, _ = fit_datamodels(masks, outputs, penalty=0.3, method="lasso")
    assert (sparse == 0).double().mean() > 0.3


def test_predictions_take_off_what_the_forgotten_added():
    beta = torch.arange(12.0).view(3, 2, 2)
    base = torch.zeros(5, 2, 2)
    torch.testing.assert_close(predict_without(beta, base, [0, 2]), -(beta[0] + beta[2]).expand(5, 2, 2))
    torch.testing.assert_close(predict_without(beta, base, [1], scale=0.5), -0.5 * beta[1].expand(5, 2, 2))
    assert torch.equal(predict_without(beta, base, []), base)


def test_leaving_out_of_ridge_is_exact_and_first_order_in_the_set():
    draw = generator(3, "ridge")
    x, noise = torch.randn(200, 8, generator=draw, dtype=torch.float64), torch.randn(200, generator=draw).double()
    y = x @ torch.arange(8.0).double() + noise
    errors = []
    for size in (2, 4, 8):
        forget = torch.arange(size)
        _, without = ridge_without(x, y, forget, penalty=0.5)
        kept = torch.arange(size, 200)
        retrained = torch.linalg.solve(x[kept].T @ x[kept] + 0.5 * torch.eye(8).double(), x[kept].T @ y[kept])
        torch.testing.assert_close(without, retrained, atol=1e-10, rtol=0)
        whole, _ = ridge_without(x, y, forget, penalty=0.5)
        singles = sum(whole - ridge_without(x, y, [place], penalty=0.5)[1] for place in range(size))
        errors.append((whole - singles - retrained).norm().item() / size**2)
    assert max(errors) < 10 * min(errors) + 1e-3, "the error of adding up grows as the square of the set"


def test_trak_without_projection_is_the_influence_of_logistic_regression():
    draw = generator(4, "logistic")
    x = torch.randn(80, 5, generator=draw, dtype=torch.float64)
    y = (torch.rand(80, generator=draw) < (x[:, 0] - x[:, 1]).sigmoid()).long()
    penalty, w = 0.7, torch.zeros(5, dtype=torch.float64)
    for _ in range(50):
        p = (x @ w).sigmoid()
        hessian = (x * (p * (1 - p)).unsqueeze(1)).T @ x + penalty * torch.eye(5).double()
        w = w - torch.linalg.solve(hessian, x.T @ (p - y) + penalty * w)
    test = torch.randn(6, 5, generator=draw, dtype=torch.float64)
    exact = logistic_influence(x, y, w, test, penalty=penalty)

    class Logistic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(w.clone())

        def forward(self, inputs):
            odds = inputs @ self.w
            return torch.stack([torch.zeros_like(odds), odds], -1)

    trak = TRAKFeatures(Logistic(), dimensions=None, generator=generator(0), penalty=penalty, chunk=7)
    found = trak.scores((x, y), (test, torch.ones(6, dtype=torch.long)))
    torch.testing.assert_close(found, exact, atol=1e-10, rtol=0)
    assert not torch.allclose(trak.scores((x, y), (test, torch.ones(6, dtype=torch.long)), weighted=False), exact)
    errors = []
    for place in range(5):
        kept = torch.arange(80) != place
        again = w.clone()
        for _ in range(50):
            p = (x[kept] @ again).sigmoid()
            hessian = (x[kept] * (p * (1 - p)).unsqueeze(1)).T @ x[kept] + penalty * torch.eye(5).double()
            again = again - torch.linalg.solve(hessian, x[kept].T @ (p - y[kept]) + penalty * again)
        errors.append(((test @ (w - again)) - exact[place]).abs().max() / exact[place].abs().max())
    assert max(errors) < 0.3
    projected = TRAKFeatures(Logistic(), dimensions=3, generator=generator(1))
    assert projected.features(x, y).shape == (80, 3)


def test_bad_input():
    a = normals(5, 3, "a")
    with pytest.raises(ShapeError, match="two models"):
        klom(a[:1], a)
    with pytest.raises(ShapeError, match="same points"):
        klom(a, a[:, :2])
    with pytest.raises(DataError, match="NaN"):
        klom(a * math.nan, a)
    with pytest.raises(ConfigError, match="bins"):
        klom(a, a, bins=1)
    with pytest.raises(ShapeError, match="masks"):
        fit_datamodels(torch.ones(3, 2), torch.ones(4, 1, 1))
    with pytest.raises(ConfigError, match="method"):
        fit_datamodels(torch.ones(3, 2), torch.ones(3, 1, 1), method="tree")
    with pytest.raises(ShapeError, match="outputs"):
        predict_without(torch.ones(3, 2, 2), torch.ones(3, 2), [0])
