"""CS-IB's loss, network, attacks, bounds and regressor: wrong inputs are named, degenerate ones have their limits."""

import math

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.distill import bottleneck_bounds as bounds
from kullback.distill.bottleneck import Bottleneck, CSIBLoss, bandwidth_of, fgsm, pgd
from kullback.distill.bottleneck_regressor import CSIBRegressor

ROWS, Y = torch.arange(8.0).reshape(4, 2) / 4, torch.arange(4.0) / 4
HOLED = ROWS.masked_fill(ROWS == 0.75, math.nan)
WIDTHS = {"sigma_x": 1.0, "sigma_t": 1.0}


def total(rows):
    return rows.sum(1)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (DataError, "y holds NaN", lambda: CSIBLoss()(ROWS, HOLED, ROWS, ROWS)),
        (DataError, "yhat holds NaN", lambda: CSIBLoss()(ROWS, ROWS, HOLED, ROWS)),
        (DataError, "t holds NaN", lambda: CSIBLoss()(ROWS, Y, Y, HOLED)),
        (DataError, "no samples", lambda: CSIBLoss()(ROWS[:0], Y[:0], Y[:0], ROWS[:0])),
        (ShapeError, "row a sample", lambda: CSIBLoss()(ROWS, Y, Y[:3], ROWS)),
        (ShapeError, "pairs", lambda: CSIBLoss()(ROWS, Y, Y, ROWS[:3])),
        (DataError, "give a bandwidth", lambda: CSIBLoss(sigma_y="median")(ROWS, Y * 0, Y, ROWS)),
        (ConfigError, "weight of compression", lambda: CSIBLoss(beta=math.nan)),
        (ConfigError, "weight of compression", lambda: CSIBLoss(beta=math.inf)),
        (ConfigError, "a bandwidth is", lambda: CSIBLoss(sigma_x=0.0)),
        (ConfigError, "a bandwidth is", lambda: CSIBLoss(sigma_t="mean")),
        (ConfigError, "a bandwidth is", lambda: bandwidth_of(ROWS, None)),
        (ConfigError, "a bandwidth is", lambda: bandwidth_of(ROWS, math.inf)),
        (ConfigError, "widths are at least 1", lambda: Bottleneck(2, k=0, generator=stream(0, "weights"))),
        (ConfigError, "one of them hidden", lambda: Bottleneck(2, hidden=(), generator=stream(0, "weights"))),
        (ShapeError, "takes rows", lambda: Bottleneck(3, generator=stream(0, "weights"))(ROWS)),
        (ConfigError, "lengths", lambda: fgsm(total, ROWS, Y, eps=math.nan)),
        (ConfigError, "lengths", lambda: fgsm(total, ROWS, Y, eps=math.inf)),
        (DataError, "finite inputs", lambda: fgsm(total, HOLED, Y, eps=0.1)),
        (DataError, "floating type", lambda: fgsm(total, ROWS.long(), Y, eps=0.1)),
        (ShapeError, "squeeze a column", lambda: fgsm(lambda rows: rows.sum(1, keepdim=True), ROWS, Y, eps=0.1)),
        (ShapeError, "a scalar", lambda: fgsm(total, ROWS, Y, eps=0.1, loss=lambda a, b: (a - b).square())),
        (ConfigError, "clamp", lambda: pgd(total, ROWS, Y, eps=0.1, alpha=0.1, steps=1, clamp=(1.0, 0.0))),
        (ConfigError, "a number", lambda: bounds.generalisation_proxy(math.nan, 4)),
        (ShapeError, "pairs", lambda: bounds.independence_criterion(ROWS, ROWS[:3], **WIDTHS)),
        (ConfigError, "length", lambda: bounds.independence_criterion(ROWS, ROWS, sigma_x=0.0, sigma_t=1.0)),
        (DataError, "holds NaN", lambda: bounds.robustness_bound(ROWS, HOLED, Y, radius=1.0, **WIDTHS)),
        (DataError, "are finite", lambda: bounds.robustness_bound(ROWS, ROWS, Y * math.nan, radius=1.0, **WIDTHS)),
        (ConfigError, "length", lambda: bounds.robustness_bound(ROWS, ROWS, Y, radius=math.inf, **WIDTHS)),
        (ConfigError, "length", lambda: bounds.robustness_bound(ROWS, ROWS, Y, radius=1.0, sigma_x=1.0, sigma_t=0.0)),
        (ConfigError, "length", lambda: bounds.smoothed_shift(ROWS, Y, ROWS, ROWS, sigma_x=0.0)),
        (DataError, "NaN", lambda: bounds.smoothed_shift(ROWS, Y, HOLED, ROWS, sigma_x=1.0)),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_an_attack_on_nothing_is_nothing():
    assert fgsm(total, ROWS[:0], Y[:0], eps=0.1).shape == (0, 2)


# --- the regressor

SMALL = {"epochs": 2, "hidden": (4,), "k": 2}


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigError, "lr > 0", {"lr": math.nan}),
        (ConfigError, "decay", {"decay": -1.0}),
        (ConfigError, "decay", {"decay": math.nan}),
        (ConfigError, "random_state", {"random_state": None}),
        (ConfigError, "random_state", {"random_state": -1}),
        (ConfigError, "a bandwidth is", {"sigma_y": 0.0}),
        (ConfigError, "a bandwidth is", {"sigma_x": -1.0}),
    ],
)
def test_options_of_the_regressor(error, words, options):
    with pytest.raises(error, match=words):
        CSIBRegressor(**{**SMALL, **options}).fit(ROWS.numpy(), Y.numpy())


def test_tables_of_the_regressor():
    table, targets = ROWS.numpy(), Y.numpy()
    for wrong, words in (((table[:1], targets[:1]), "1 sample"), ((table[:0], targets[:0]), "0 sample"),
                         ((HOLED.numpy(), targets), "NaN"), ((table, targets * np.nan), "NaN"),
                         ((table, targets[:3]), "inconsistent")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            CSIBRegressor(**SMALL).fit(*wrong)
    with pytest.raises(ValueError, match="expecting 2 features"):
        CSIBRegressor(**SMALL).fit(table, targets).predict(np.ones((2, 3)))


def test_constant_columns_and_targets():
    X = np.linspace(-1, 1, 40).reshape(-1, 1)
    steady = CSIBRegressor(epochs=60, k=4, hidden=(16, 16)).fit(X, np.full(40, 7.0))
    np.testing.assert_allclose(steady.predict(X), 7.0, atol=0.1)
    assert all(point["relevance"] == 0.0 for point in steady.information_plane_), "nothing is to be known of a constant"
    blind = CSIBRegressor(**SMALL).fit(np.ones((40, 1)), X[:, 0])
    assert np.ptp(blind.predict(np.ones((40, 1)))) == 0.0
    assert blind.information_plane_[-1]["compression"] == pytest.approx(0.0, abs=1e-6)


def test_the_information_plane_of_a_noisy_encoder_is_measured_with_its_noise():
    """Means alone would not lose what the noise takes: the encoder's variance would say nothing."""
    X = np.linspace(-1, 1, 60).reshape(-1, 1)
    fitted = CSIBRegressor(epochs=5, k=4, hidden=(8,), stochastic=True).fit(X, X[:, 0])
    x = torch.tensor((X - fitted._center) / fitted._scale)
    z = torch.tensor((X - fitted._target_center) / fitted._target_scale)
    found = []
    for bias in (-10.0, 3.0):
        with torch.no_grad():
            fitted.network_.log_variance[0].weight.zero_()
            fitted.network_.log_variance[0].bias.fill_(bias)
        found.append(fitted._information(x, z, CSIBLoss())["compression"])
    assert found[1] < 0.7 * found[0]
