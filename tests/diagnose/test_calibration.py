"""Calibration errors: the card's numbers, brute force over samples, scikit-learn's curve, and a fitted temperature."""

import math

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.diagnose.calibration import (
    adaptive_ece,
    brier,
    classwise_ece,
    ece,
    fit_temperature,
    mce,
    nll,
    reliability,
)

SURE, RIGHT = torch.tensor([0.9, 0.9, 0.6, 0.6], dtype=torch.float64), torch.tensor([True, False, True, False])


def sample(generator, number=500, classes=4, scale=2.0):
    logits = scale * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((0.5 * logits).softmax(-1), 1, generator=generator).squeeze(-1)
    return logits, labels


def brute_force(confidence, correct, bins):
    """A loop over bins and samples, as the definition reads."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0.0)]
        if inside:
            gap = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(gap)
    return total


def test_the_number_of_the_card():
    assert ece(SURE, RIGHT) == pytest.approx(0.25, abs=1e-12)
    assert ece(SURE, RIGHT, bins=1) == pytest.approx(0.25, abs=1e-12)
    assert mce(SURE, RIGHT) == pytest.approx(0.4, abs=1e-12)
    assert ece(SURE, RIGHT, norm="l2") == pytest.approx(math.sqrt((0.4**2 + 0.1**2) / 2), abs=1e-12)


def test_a_perfect_predictor_has_none_and_a_constant_one_its_gap():
    certain = torch.eye(3, dtype=torch.float64)
    for error in (ece, mce, adaptive_ece, classwise_ece):
        assert error(certain, torch.arange(3)) == 0.0
    right = torch.arange(10) < 3
    assert ece(torch.full((10,), 0.8, dtype=torch.float64), right) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("bins", [1, 2, 7, 15])
def test_bins_equal_a_loop(generator, bins):
    logits, labels = sample(generator)
    confidence, predicted = logits.softmax(-1).max(-1)
    found = ece(logits.softmax(-1), labels, bins=bins)
    assert found == pytest.approx(brute_force(confidence.tolist(), (predicted == labels).tolist(), bins), abs=1e-12)
    assert ece(confidence, predicted == labels, bins=bins) == pytest.approx(found, abs=1e-15)
    assert ece(logits.softmax(-1).view(20, 25, 4), labels.view(20, 25), bins=bins) == found


def test_edges_belong_to_the_bin_below_and_zero_to_the_first():
    edges = torch.arange(16).double() / 15
    for dtype in (torch.float32, torch.float64):
        counts = reliability(edges.to(dtype), torch.ones(16, dtype=torch.bool)).samples
        assert counts.tolist() == [2.0] + [1.0] * 14


def test_scikit_learn_agrees(generator):
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    logits, labels = sample(generator, classes=2)
    score = logits.softmax(-1)[:, 1]
    true, said = curve(labels.numpy(), score.numpy(), n_bins=10)
    found = reliability(score, labels == 1, bins=10)
    kept = found.samples > 0
    np.testing.assert_allclose(found.accuracy[kept], true, atol=1e-12)
    np.testing.assert_allclose(found.confidence[kept], said, atol=1e-12)


def test_equal_mass_bins_hold_as_many_samples(generator):
    logits, labels = sample(generator, number=300)
    found = reliability(logits.softmax(-1), labels, bins=15, equal_mass=True)
    assert found.samples.tolist() == [20.0] * 15
    assert (found.confidence.diff() > 0).all()
    assert adaptive_ece(logits.softmax(-1), labels, bins=1) == pytest.approx(ece(logits.softmax(-1), labels, bins=1))
    shares = reliability(SURE[:3], RIGHT[:3], bins=2, equal_mass=True).samples
    assert shares.tolist() == [2.0, 1.0]


def test_classwise_is_a_mean_over_binary_problems(generator):
    logits, labels = sample(generator)
    p = logits.softmax(-1)
    columns = [brute_force(p[:, c].tolist(), (labels == c).tolist(), 15) for c in range(4)]
    assert classwise_ece(p, labels) == pytest.approx(sum(columns) / 4, abs=1e-12)


def test_scores(generator):
    logits, labels = sample(generator)
    p = logits.softmax(-1)
    target = torch.nn.functional.one_hot(labels, 4)
    assert brier(p, labels) == pytest.approx((p - target).square().sum(-1).mean().item(), abs=1e-12)
    assert nll(logits, labels) == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-12)
    assert brier(torch.eye(2), torch.tensor([1, 0])) == 2.0


def test_the_fitted_temperature_is_where_the_likelihood_is_largest(generator):
    logits, labels = sample(generator, number=4000)
    best = fit_temperature(logits, labels)
    assert best == pytest.approx(2.0, rel=0.1)  # the labels were drawn at that temperature
    at_best = nll(logits / best, labels)
    assert all(nll(logits / (best * factor), labels) > at_best for factor in (0.99, 1.01))
    assert ece(logits.div(best).softmax(-1), labels) < 0.5 * ece(logits.softmax(-1), labels)
    assert fit_temperature(7.0 * logits, labels) == pytest.approx(7.0 * best, rel=1e-9)


def test_a_temperature_at_the_ends():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 1e-2
    assert fit_temperature(logits, torch.tensor([1, 0])) == 1e2
    holed = torch.tensor([[1.0, 0.0, -math.inf]]).repeat(3, 1)
    assert fit_temperature(holed, torch.tensor([0, 0, 1])) == pytest.approx(1 / math.log(2.0))


def test_the_oracle_bites(generator):
    """Right-open bins, a sum without weights and squared gaps differ from the definition on the same samples."""
    logits, labels = sample(generator)
    confidence, predicted = logits.softmax(-1).max(-1)
    found = reliability(confidence, predicted == labels)
    gaps = (found.accuracy - found.confidence).abs()
    wanted = brute_force(confidence.tolist(), (predicted == labels).tolist(), 15)
    assert gaps.mean().item() != pytest.approx(wanted, rel=0.01)
    assert ece(confidence, predicted == labels, norm="l2") != pytest.approx(wanted, rel=0.01)
    on_edges = torch.tensor([0.2, 0.4], dtype=torch.float64)
    right_open = torch.bucketize(on_edges, torch.arange(1, 15).double() / 15, right=True)
    assert reliability(on_edges, torch.tensor([True, True])).samples[right_open].sum() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ece(torch.tensor([1.2]), torch.tensor([True])), DataError, "in \\[0, 1\\]"),
        (lambda: ece(torch.tensor([math.nan]), torch.tensor([True])), DataError, "NaN"),
        (lambda: ece(torch.zeros(0), torch.zeros(0, dtype=torch.bool)), DataError, "there are none"),
        (lambda: ece(torch.tensor([[0.2, 0.2]]), torch.tensor([0])), DataError, "sum to 1"),
        (lambda: ece(torch.tensor([[0.5, 0.5]]), torch.tensor([2])), DataError, "from 0 to 1"),
        (lambda: ece(torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1])), ShapeError, "labels"),
        (lambda: ece(SURE, RIGHT, bins=0), ConfigError, "at least one bin"),
        (lambda: ece(SURE, RIGHT, norm="l3"), ConfigError, "norm is"),
        (lambda: nll(torch.tensor([[math.nan, 0.0]]), torch.tensor([0])), DataError, "NaN"),
        (lambda: fit_temperature(torch.zeros(1, 2), torch.tensor([0]), lowest=2.0, highest=1.0), ConfigError, "lowest"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
