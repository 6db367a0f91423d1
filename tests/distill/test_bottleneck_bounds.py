"""The bound on smoothed shifts: HSIC by brute force, random attacks, its limits, and wrong bounds that they break."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.distill import bottleneck_bounds as bounds
from kullback.divergences.cauchy_schwarz_samples import cs_qmi

F64 = torch.float64
WIDTHS = {"sigma_x": 1.4, "sigma_t": 0.9}


@pytest.fixture
def sample(generator):
    x = torch.randn(40, 3, generator=generator, dtype=F64)
    t = torch.tanh(x @ torch.randn(3, 2, generator=generator, dtype=F64))
    return x, t, t.sum(1) + 0.5 * t[:, 0].square()


def gram(a, sigma):
    return (-(a.unsqueeze(1) - a).square().sum(-1) / (2 * sigma**2)).exp()


def hsic(x, t):
    k, q, n = gram(x, WIDTHS["sigma_x"]), gram(t, WIDTHS["sigma_t"]), len(x)
    centre = torch.eye(n, dtype=F64) - 1 / n
    return (k @ centre @ q @ centre).trace() / n**2


def test_the_criterion_is_hsic_and_grows_with_the_information(sample, generator):
    x, t, _ = sample
    found = bounds.independence_criterion(x, t, **WIDTHS)
    torch.testing.assert_close(found, hsic(x, t), rtol=1e-10, atol=0)
    shuffled = t[torch.randperm(40, generator=generator)]
    assert cs_qmi(x, shuffled, **WIDTHS) < cs_qmi(x, t, **WIDTHS)
    assert bounds.independence_criterion(x, shuffled, **WIDTHS) < found
    assert bounds.independence_criterion(x, torch.ones_like(t), **WIDTHS).abs() < 1e-14


def worst(x, h, radius, generator, count=400):
    """The largest shift over random points, and the steepest direction at each of them."""
    at = 1.5 * torch.randn(count, x.shape[1], generator=generator, dtype=F64)
    step = torch.randn(count, x.shape[1], generator=generator, dtype=F64)
    live = at.clone().requires_grad_()
    smooth = ((-torch.cdist(live, x).square() / (2 * WIDTHS["sigma_x"] ** 2)).exp() @ (h - h.mean())).sum()
    (slope,) = torch.autograd.grad(smooth, live)
    moved = [at + radius * d / d.norm(dim=1, keepdim=True) for d in (step, slope, -slope)]
    return max(bounds.smoothed_shift(x, h, at, to, sigma_x=WIDTHS["sigma_x"]).max().item() for to in moved)


@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_no_attack_exceeds_the_bound(sample, generator, radius):
    x, t, h = sample
    found = worst(x, h, radius, generator)
    bound = bounds.robustness_bound(x, t, h, radius=radius, **WIDTHS).item()
    assert found <= bound < 60 * found
    rough = h + 0.3 * torch.randn(40, generator=generator, dtype=F64)  # not a function of t in the kernel's space
    assert worst(x, rough, radius, generator) <= bounds.robustness_bound(x, t, rough, radius=radius, **WIDTHS).item()


def test_what_it_leaves_cannot_be_left_out(sample, generator):
    """A prediction that t does not explain: without the residual the bound would be broken."""
    x, t, _ = sample
    h = torch.sin(2 * x[:, 0])
    constant = torch.ones_like(t)
    assert bounds.independence_criterion(x, constant, **WIDTHS) < 1e-14
    found = worst(x, h, 0.5, generator)
    assert found > 0.01
    assert found <= bounds.robustness_bound(x, constant, h, radius=0.5, **WIDTHS).item()


def test_it_is_linear_in_small_radii_and_levels_off(sample):
    x, t, h = sample

    def at(radius):
        return bounds.robustness_bound(x, t, h, radius=radius, **WIDTHS).item()

    assert at(0.0) == 0.0
    assert at(2e-3) / at(1e-3) == pytest.approx(2.0, rel=1e-5)
    assert at(1e4) == pytest.approx(at(1e-4) * math.sqrt(2) * WIDTHS["sigma_x"] / 1e-4, rel=1e-5)
    assert bounds.robustness_bound(x, t, 3 * h + 5, radius=1.0, **WIDTHS).item() == pytest.approx(3 * at(1.0))
    assert bounds.robustness_bound(x, t, torch.ones(40), radius=1.0, **WIDTHS).item() == pytest.approx(0.0, abs=1e-12)


def test_the_proxy_and_bad_input(sample):
    x, t, h = sample
    assert bounds.generalisation_proxy(0.09, 900) == pytest.approx(0.01)
    assert bounds.generalisation_proxy(-1e-9, 5) == 0.0
    for error, match, call in (
        (ConfigError, "one or more", lambda: bounds.generalisation_proxy(0.1, 0)),
        (ConfigError, "length", lambda: bounds.robustness_bound(x, t, h, radius=-1.0, **WIDTHS)),
        (ConfigError, "positive", lambda: bounds.robustness_bound(x, t, h, radius=1.0, ridges=(), **WIDTHS)),
        (ShapeError, "one prediction", lambda: bounds.robustness_bound(x, t, h[:-1], radius=1.0, **WIDTHS)),
        (ShapeError, "row for each", lambda: bounds.robustness_bound(x, t[:-1], h, radius=1.0, **WIDTHS)),
        (ShapeError, "points", lambda: bounds.smoothed_shift(x, h, x[:, :2], x[:, :2], sigma_x=1.0)),
    ):
        with pytest.raises(error, match=match):
            call()
