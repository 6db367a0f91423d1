"""CS-IB: its loss against its written definition, the network's noise, attacks, and scikit-learn's own checks."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kullback.core.errors import ConfigError
from kullback.core.rng import generator as stream
from kullback.distill.bottleneck import Bottleneck, CSIBLoss, bandwidth_of, fgsm, pgd
from kullback.distill.bottleneck_regressor import CSIBRegressor

F64 = torch.float64


@pytest.fixture
def batch(generator):
    """x [20, 4], y [20], yhat [20] and t [20, 3]."""
    x, t = torch.randn(20, 4, generator=generator, dtype=F64), torch.randn(20, 3, generator=generator, dtype=F64)
    y, noise = torch.randn(2, 20, generator=generator, dtype=F64)
    return x, y, y + 0.3 * noise, t


def gram(a, sigma, b=None):
    a, b = (a, a if b is None else b) if a.ndim > 1 else (a.unsqueeze(1), (a if b is None else b).unsqueeze(1))
    return (-(a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1) / (2 * sigma**2)).exp()


def definition(x, y, yhat, t, beta, *, symmetric=True):
    """Both terms from whole matrices, with the root of the dimensions as bandwidths of x and t."""
    k, q, n = gram(x, 2.0), gram(t, math.sqrt(3.0)), len(x)
    d = k.sum(1, keepdim=True)
    weight = k / (d * d.T) if symmetric else k / d.square()
    own, other, cross = gram(y, 1.0), gram(yhat, 1.0), gram(yhat, 1.0, y)
    prediction = (weight * own).sum().log() + (weight * other).sum().log() - 2 * (weight * cross).sum().log()

    def information(a, b):
        joint, apart = (a * b).sum() / n**2, a.sum() * b.sum() / n**4
        return joint.log() + apart.log() - 2 * (a.sum(1) @ b.sum(0) / n**3).log()

    return prediction + beta * information(k, q) / (information(k, k) * information(q, q)).sqrt()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_is_its_definition(batch, symmetric):
    x, y, yhat, t = batch
    yhat, t = yhat.requires_grad_(), t.requires_grad_()
    found = CSIBLoss(beta=0.3, symmetric=symmetric)(x, y, yhat, t)
    wanted = definition(x, y, yhat, t, 0.3, symmetric=symmetric)
    torch.testing.assert_close(found["loss"], wanted)
    torch.testing.assert_close(found["loss"], found["prediction"] + 0.3 * found["compression"])
    slopes = (torch.autograd.grad(value, (yhat, t)) for value in (found["loss"], wanted))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
    for wrong in (definition(x, yhat, yhat, t, 0.3), definition(x, y, yhat, t, 0.0), definition(t, y, yhat, x, 0.3)):
        assert abs(wrong - found["loss"]) > 1e-3
    column = CSIBLoss(beta=0.3, symmetric=symmetric)(x, y.unsqueeze(1), yhat.unsqueeze(1), t)
    torch.testing.assert_close(column["loss"], found["loss"])


def test_no_compression_is_computed_at_weight_zero(batch):
    x, y, yhat, t = batch
    found = CSIBLoss(beta=0.0)(x, y, yhat, t * math.nan)
    assert found["compression"] == 0
    assert found["loss"] == found["prediction"]
    assert CSIBLoss(beta=0.1)(x, y, y, x)["compression"].item() == pytest.approx(1.0)
    assert "beta=0.1, sigma_x=sqrt_d, sigma_y=1.0" in repr(CSIBLoss(beta=0.1))


def test_bandwidths(batch):
    x = batch[0]
    assert bandwidth_of(x, "sqrt_d") == 2.0
    assert bandwidth_of(x, "median") == pytest.approx(torch.pdist(x).median().item())
    assert bandwidth_of(x, 3) == 3.0
    for wrong in (0.0, -1.0, "mean"):
        with pytest.raises(ConfigError, match="bandwidth"):
            bandwidth_of(x, wrong)
    with pytest.raises(ConfigError, match="beta"):
        CSIBLoss(beta=-1.0)


def test_noise_comes_from_the_generator_alone(batch):
    x = batch[0].float()
    network = Bottleneck(4, 2, hidden=(8, 8), k=3, stochastic=True, generator=stream(0, "weights"))
    again = Bottleneck(4, 2, hidden=(8, 8), k=3, stochastic=True, generator=stream(0, "weights"))
    one, other = (model(x, stream(1, "noise")) for model in (network, again))
    assert torch.equal(one.prediction, other.prediction)
    assert one.prediction.shape == (20, 2)
    plain = network(x)
    assert torch.equal(plain.representation, plain.mean)
    spread = (one.representation - one.mean) / (0.5 * one.log_variance).exp()
    torch.testing.assert_close(spread, torch.randn(spread.shape, generator=stream(1, "noise")), rtol=1e-4, atol=1e-4)
    steady = Bottleneck(4, hidden=(8, 8), k=3, generator=stream(0, "weights"))
    assert steady(x).log_variance is None
    assert torch.equal(steady(x, stream(1, "noise")).prediction, steady(x).prediction)


# --- attacks


def test_fgsm_on_a_line_is_the_sign_of_its_slope(batch):
    x, y, _, _ = batch
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64, requires_grad=True)
    moved = fgsm(lambda rows: rows @ slope, x, y, eps=0.1)
    wanted = x + 0.1 * torch.sign((x @ slope - y).unsqueeze(1) * slope)
    torch.testing.assert_close(moved, wanted.detach())
    before, after = F.mse_loss(x @ slope, y), F.mse_loss(moved @ slope, y)
    torch.testing.assert_close(after, ((x @ slope - y).abs() + 0.1 * slope.abs().sum()).square().mean())
    assert after > before
    assert slope.grad is None
    assert not moved.requires_grad
    other = fgsm(lambda rows: rows @ slope, x, y, eps=0.1, loss=lambda a, b: -F.mse_loss(a, b))
    assert F.mse_loss(other @ slope, y) < before


def test_pgd_stays_in_the_ball_and_in_the_range(batch):
    x, y, _, _ = batch
    network = Bottleneck(4, hidden=(8, 8), k=3, generator=stream(0, "weights")).double()

    def model(rows):
        return network(rows).prediction.squeeze(1)

    risks = []
    for steps in (1, 2, 5, 10):
        moved = pgd(model, x, y, eps=0.3, alpha=0.1, steps=steps)
        assert (moved - x).abs().max() <= min(0.3, 0.1 * steps) + 1e-12
        risks.append(F.mse_loss(model(moved), y).item())
    assert F.mse_loss(model(x), y) < risks[0] < risks[1] < min(risks[2:]), "more steps do more harm, up to the ball"
    assert pgd(model, x, y, eps=5.0, alpha=5.0, steps=1, clamp=(-1.0, 1.0)).abs().max() <= 1.0
    for wrong in ({"eps": -1.0, "alpha": 0.1, "steps": 1}, {"eps": 1.0, "alpha": 0.1, "steps": 0}):
        with pytest.raises(ConfigError, match="steps a count"):
            pgd(model, x, y, **wrong)


# --- the estimator


def waves(n=120):
    inputs = np.linspace(-2, 2, n).reshape(-1, 1)
    return inputs, np.sin(2 * inputs[:, 0]) * 40 + 1000


def test_it_learns_a_wave_whatever_its_units():
    X, y = waves()
    fitted = CSIBRegressor(beta=1e-3, sigma_x=0.3, hidden=(32, 32), k=8, lr=5e-3, epochs=150).fit(X, y)
    assert fitted.score(X, y) > 0.97
    assert fitted.predict(X).shape == (120,)
    scaled = CSIBRegressor(beta=1e-3, sigma_x=0.3, hidden=(32, 32), k=8, lr=5e-3, epochs=150).fit(1e4 * X, y / 7)
    np.testing.assert_allclose(scaled.predict(1e4 * X) * 7, fitted.predict(X), atol=4)
    assert len(fitted.loss_curve_) == 150
    assert fitted.loss_curve_[-1] < 0.2 * fitted.loss_curve_[0]
    plane = fitted.information_plane_
    assert [point["epoch"] for point in plane] == list(range(15, 151, 15))
    assert plane[-1]["relevance"] > plane[0]["relevance"] > 0
    assert all(0 < point["compression"] <= 1 for point in plane)
    assert plane[0]["proxy"] == pytest.approx(math.sqrt(plane[0]["compression"] / 120))


def test_a_heavy_weight_compresses():
    X, y = waves()
    light, heavy = (
        CSIBRegressor(beta=beta, sigma_x=0.3, hidden=(32, 32), k=8, lr=5e-3, epochs=60).fit(X, y).information_plane_[-1]
        for beta in (0.0, 3.0)
    )
    assert heavy["compression"] < 0.5 * light["compression"]
    assert heavy["relevance"] < light["relevance"]


def test_several_targets_noise_and_seeds():
    X, y = waves(60)
    both = np.stack([y, -y], axis=1)
    options = {"hidden": (16,), "k": 4, "lr": 5e-3, "epochs": 20, "batch": 25, "stochastic": True, "decay": 0.6}
    before = torch.random.get_rng_state()
    one, same, other = (CSIBRegressor(random_state=seed, **options).fit(X, both) for seed in (0, 0, 1))
    assert one.predict(X).shape == (60, 2)
    np.testing.assert_array_equal(one.predict(X), same.predict(X))
    assert np.abs(one.predict(X) - other.predict(X)).max() > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_numbers():
    X, y = waves(10)
    numbers = {"epochs": 0}, {"batch": 1}, {"lr": 0.0}, {"k": 0}, {"hidden": ()}, {"beta": -1.0}
    for wrong in (*numbers, {"sigma_x": "wide"}):
        with pytest.raises(ConfigError):
            CSIBRegressor(**wrong).fit(X, y)


@pytest.mark.slow
def test_scikit_learn_finds_nothing_wrong():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    small = CSIBRegressor(epochs=40, k=8, hidden=(32, 32), lr=5e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checks.check_estimator(small, on_skip=None, on_fail=None)
    failed = [(one["check_name"], one["exception"]) for one in found if one["status"] == "failed"]
    assert not failed
    assert len(found) > 30
