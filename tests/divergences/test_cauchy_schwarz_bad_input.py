"""Cauchy-Schwarz, samples and closed forms: what is wrong with an input is said, and what is right stays."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import cauchy_schwarz_samples as cs

closed = import_module("kullback.divergences.cauchy_schwarz")  # a function of the room has the module's name
ROWS, COLUMN = torch.arange(8.0).reshape(4, 2), torch.arange(4.0)
HOLED, ENDLESS = ROWS.masked_fill(ROWS == 3.0, math.nan), ROWS.masked_fill(ROWS == 3.0, math.inf)
ONES = torch.ones(4, 4)
ESTIMATORS = {
    "samples": lambda x, t, sigma=1.0: cs.cs_divergence_samples(x, t, sigma=sigma),
    "conditional": lambda x, t, sigma=1.0: cs.conditional_cs(x, t, t, sigma_x=1.0, sigma_y=sigma),
    "information": lambda x, t, sigma=1.0: cs.cs_qmi(x, t, sigma_x=1.0, sigma_t=sigma),
    "normalised": lambda x, t, sigma=1.0: cs.cs_qmi_normalized(x, t, sigma_x=1.0, sigma_t=sigma),
    "features": lambda x, t, sigma=1.0: cs.fourier_features(t, torch.ones(5, 2), sigma=sigma),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("error", "words", "t", "sigma"),
    [
        (DataError, "NaN", HOLED, 1.0),
        (DataError, "NaN", ENDLESS, 1.0),
        (DataError, "at least one", ROWS[:0], 1.0),
        (ShapeError, "real numbers", ROWS.to(torch.complex64), 1.0),
        (ShapeError, "row", torch.tensor(1.0), 1.0),
        (ConfigError, "length above 0", ROWS, 0.0),
        (ConfigError, "length above 0", ROWS, -1.0),
        (ConfigError, "length above 0", ROWS, math.nan),
        (ConfigError, "length above 0", ROWS, math.inf),
        (ConfigError, "a number", ROWS, "median"),
        (ShapeError, "bandwidths broadcast", ROWS, torch.ones(3)),
        (ShapeError, "bandwidths broadcast", ROWS, torch.ones(2, 4, 2)),
    ],
)
def test_what_no_estimator_takes(name, error, words, t, sigma):
    x = t if t.ndim > 1 and len(t) == 0 else ROWS
    with pytest.raises(error, match=words):
        ESTIMATORS[name](x, t, sigma)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_bandwidth_for_each_column_is_that_of_scaled_columns(name):
    widths = torch.tensor([1.0, 3.0])
    left = (ROWS + 1.0, ROWS / widths + 1.0 / widths) if name == "samples" else (ROWS, ROWS)
    found, wanted = ESTIMATORS[name](left[0], ROWS, widths), ESTIMATORS[name](left[1], ROWS / widths)
    torch.testing.assert_close(found, wanted)


def test_one_sample_and_constant_ones_are_no_error():
    one = ROWS[:1]
    assert cs.cs_divergence_samples(one, one + 1.0, sigma=1.0).item() == pytest.approx(2.0)  # |x - z|^2 / sigma^2
    assert cs.conditional_cs(one, one, one + 1.0, sigma_x=1.0, sigma_y=1.0).item() == pytest.approx(2.0)
    assert cs.cs_qmi(one, one, sigma_x=1.0, sigma_t=1.0) == 0.0
    assert cs.cs_qmi_normalized(one, one, sigma_x=1.0, sigma_t=1.0) == 0.0
    constant = torch.ones(4, 1, requires_grad=True)
    for yhat in (constant, COLUMN.clone().requires_grad_()):
        value = cs.conditional_cs(ROWS, torch.ones(4), yhat, sigma_x=1.0, sigma_y=1.0)
        (slope,) = torch.autograd.grad(value, yhat)
        assert value.isfinite()
        assert slope.isfinite().all()
        assert (value > 0) == (yhat is not constant)


@pytest.mark.parametrize("gram", [-ONES, ONES * math.nan, ONES * 0, ONES.tril(), ONES * math.inf])
def test_a_gram_that_holds_no_kernels(gram):
    with pytest.raises(DataError, match="gram holds kernels"):
        cs.cs_qmi(ROWS, ROWS, sigma_x=1.0, sigma_t=1.0, gram=gram)


MEAN, COV = torch.zeros(2), torch.eye(2)
SLANTED = torch.tensor([[1.0, 0.9], [0.0, 1.0]])  # of which a Cholesky factor sees one triangle
MIXTURE = torch.ones(2) / 2, torch.zeros(2, 1), torch.ones(2, 1, 1)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ShapeError, "no outcomes", lambda: closed.cs_divergence(torch.ones(0), torch.ones(0))),
        (ShapeError, "outcomes", lambda: closed.cs_divergence(torch.ones(3), torch.ones(4))),
        (DataError, "0 or more", lambda: closed.cs_divergence(torch.tensor([1.0, math.nan]), torch.ones(2))),
        (DataError, "0 or more", lambda: closed.cs_divergence(torch.tensor([1.0, -1.0]), torch.ones(2))),
        (DataError, "finite", lambda: closed.cs_divergence(torch.tensor([1.0, math.inf]), torch.ones(2))),
        (DataError, "above 0", lambda: closed.cs_divergence(torch.zeros(2), torch.ones(2))),
        (ShapeError, "one space", lambda: closed.cs_gaussian(MEAN, COV, torch.zeros(3), torch.eye(3))),
        (ShapeError, "covariances", lambda: closed.cs_gaussian(MEAN, torch.eye(3), MEAN, COV)),
        (DataError, "positive definite", lambda: closed.cs_gaussian(MEAN, -0.5 * COV, MEAN, COV)),
        (DataError, "symmetric", lambda: closed.cs_gaussian(MEAN, SLANTED, MEAN, COV)),
        (DataError, "finite", lambda: closed.cs_gaussian(MEAN * math.nan, COV, MEAN, COV)),
        (ShapeError, "a mixture has", lambda: closed.cs_gmm(torch.ones(3), *MIXTURE[1:], *MIXTURE)),
        (ShapeError, "one space", lambda: closed.cs_gmm(*MIXTURE, torch.ones(1), torch.zeros(1, 2), COV.unsqueeze(0))),
        (DataError, "not all 0", lambda: closed.cs_gmm(torch.tensor([1.0, -1.0]), *MIXTURE[1:], *MIXTURE)),
        (DataError, "not all 0", lambda: closed.cs_gmm(*(part[:0] for part in MIXTURE), *MIXTURE)),
        (ConfigError, "between -1 and 1", lambda: closed.cs_qmi_gaussian(1.5)),
        (ConfigError, "between -1 and 1", lambda: closed.cs_qmi_gaussian(math.nan)),
        (ShapeError, "draws", lambda: cs.fourier_features(ROWS, torch.ones(3, 3), sigma=1.0)),
        (ShapeError, "at least one", lambda: cs.fourier_features(ROWS, torch.ones(0, 2), sigma=1.0)),
        (ShapeError, "both means", lambda: cs.cs_divergence_features(torch.ones(3), torch.ones(4))),
        (DataError, "NaN", lambda: cs.cs_divergence_features(torch.tensor([1.0, math.nan]), torch.ones(2))),
        (DataError, "NaN", lambda: cs.median_bandwidth(HOLED)),
        (ConfigError, "finite", lambda: cs.median_bandwidth(ROWS, math.inf)),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_a_correlation_of_one_is_infinite_information():
    assert closed.cs_qmi_gaussian(1.0) == math.inf
    half = partial(closed.cs_gmm, *MIXTURE)
    torch.testing.assert_close(half(*MIXTURE), torch.tensor(0.0))
    torch.testing.assert_close(half(torch.tensor([1.0, 0.0]), *MIXTURE[1:]), torch.tensor(0.0))  # a weight of 0 is fine
