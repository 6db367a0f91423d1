"""Cauchy-Schwarz from samples and in closed form: matrix twins, quadrature, limits, laws, and wrong estimators."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import cauchy_schwarz_samples as cs
from kullback.divergences import kernel_rows
from kullback.divergences.kernel_rows import log_kernel_rows

closed = import_module("kullback.divergences.cauchy_schwarz")  # a function of the room has the module's name

F64 = torch.float64


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def gram(a, b, sigma):
    """Kernels [N, M] by differences."""
    return (-(a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1) / (2 * sigma**2)).exp()


@pytest.fixture
def draws(generator):
    """x [9, 3], y and yhat [9, 2], t [9, 4]."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    x, y = normal(9, 3), normal(9, 2)
    return x, y, y + 0.5 * normal(9, 2), normal(9, 4)


# --- twins by matrices


def naive_samples(x, z, *, sigma):
    return gram(x, x, sigma).mean().log() + gram(z, z, sigma).mean().log() - 2 * gram(x, z, sigma).mean().log()


def naive_conditional(x, y, yhat, *, sigma_x, sigma_y, denominator="square of the sum", transposed=False):
    k, own, other = gram(x, x, sigma_x), gram(y, y, sigma_y), gram(yhat, yhat, sigma_y)
    cross = gram(y, yhat, sigma_y) if transposed else gram(yhat, y, sigma_y)
    if denominator == "symmetric":
        weight = 1 / torch.outer(k.sum(1), k.sum(1))
    elif denominator == "sum of the squares":  # as released
        weight = 1 / k.square().sum(1, keepdim=True)
    else:
        weight = 1 / k.sum(1, keepdim=True).square()
    own, other, cross = ((weight * k * gram).sum().log() for gram in (own, other, cross))
    return own + other - 2 * cross


def naive_qmi(x, t, *, sigma_x, sigma_t, shuffled=False):
    k, q, n = gram(x, x, sigma_x), gram(t, t, sigma_t), len(x)
    one = torch.ones(n, dtype=F64)
    joint = torch.trace(k.roll(1, 0) @ q) if shuffled else torch.trace(k @ q)
    across = one @ k @ q @ one
    return (joint / n**2).log() + ((one @ k @ one) * (one @ q @ one) / n**4).log() - 2 * (across / n**3).log()


def check_twin(estimator, twin, *inputs):
    """Values and gradients by every input are those of the twin."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    found, wanted = estimator(*inputs), twin(*inputs)
    close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        close(one, other)


WIDTHS = {"sigma_x": 1.5, "sigma_y": 0.8}


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_equal_matrices(draws, chunk):
    x, y, yhat, t = draws
    estimator = partial(cs.cs_divergence_samples, sigma=0.7, chunk=chunk)
    check_twin(estimator, partial(naive_samples, sigma=0.7), y, yhat[:5])
    for symmetric, denominator in ((True, "symmetric"), (False, "square of the sum")):
        check_twin(
            partial(cs.conditional_cs, symmetric=symmetric, chunk=chunk, **WIDTHS),
            partial(naive_conditional, denominator=denominator, **WIDTHS),
            x, y, yhat,
        )  # fmt: skip
    widths = {"sigma_x": 1.5, "sigma_t": 2.0}
    check_twin(partial(cs.cs_qmi, chunk=chunk, **widths), partial(naive_qmi, **widths), x, t)
    close(cs.cs_qmi(x, t, gram=gram(x, x, 1.5), **widths), naive_qmi(x, t, **widths))


@pytest.mark.parametrize("wrong", [{"denominator": "sum of the squares"}, {"transposed": True}])
def test_the_twin_rejects_what_was_released_and_what_is_transposed(draws, wrong):
    estimator = partial(cs.conditional_cs, symmetric=False, **WIDTHS)
    with pytest.raises(AssertionError):
        check_twin(estimator, partial(naive_conditional, **WIDTHS, **wrong), *draws[:3])


def test_the_twin_rejects_shuffled_pairs(draws):
    widths = {"sigma_x": 1.5, "sigma_t": 2.0}
    with pytest.raises(AssertionError):
        check_twin(partial(cs.cs_qmi, **widths), partial(naive_qmi, shuffled=True, **widths), draws[0], draws[3])


def test_gradients_are_those_of_differences(draws):
    x, y, yhat, t = (value[:5].clone().requires_grad_() for value in draws)
    assert torch.autograd.gradcheck(partial(cs.cs_divergence_samples, sigma=0.7), (y, yhat))
    assert torch.autograd.gradcheck(partial(cs.cs_divergence_samples, sigma=0.7, unbiased_diag=True), (y, yhat))
    for symmetric in (True, False):
        assert torch.autograd.gradcheck(partial(cs.conditional_cs, symmetric=symmetric, **WIDTHS), (x, y, yhat))
    assert torch.autograd.gradcheck(partial(cs.cs_qmi, sigma_x=1.0, sigma_t=2.0), (x, t))
    assert torch.autograd.gradcheck(partial(cs.cs_qmi_normalized, sigma_x=1.0, sigma_t=2.0), (x, t))
    offset = torch.linspace(-1, 1, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, v, b: log_kernel_rows(u, v, offset=b, chunk=2), (y, yhat, offset))


def test_kernels_that_are_kept_have_the_gradient_of_those_made_again(draws, monkeypatch):
    x, y, yhat, _ = draws
    y, yhat, b = (v.clone().requires_grad_() for v in (y, yhat, x[:, 0]))
    weight = torch.linspace(-1, 2, len(y), dtype=F64)
    found = []
    for entries in (1 << 18, 0):
        monkeypatch.setattr(kernel_rows, "_KEPT", entries)
        for left_out in (False, True):
            rows = log_kernel_rows(y, yhat, offset=b, exclude_self=left_out)
            found.append(torch.autograd.grad((weight * rows).sum(), (y, yhat, b)))
    for kept, again in zip(found[:2], found[2:], strict=True):
        for one, other in zip(kept, again, strict=True):
            close(one, other)
    assert not torch.allclose(found[0][0], found[1][0])


def test_kernels_are_those_of_scikit_learn(draws):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, _, _, _ = draws
    wanted = torch.tensor(pairwise.rbf_kernel(x.numpy(), x[:4].numpy(), gamma=1 / (2 * 1.3**2)))
    close(log_kernel_rows(x / 1.3, x[:4] / 1.3).exp(), wanted.sum(1), 1e-12)


# --- closed forms


def test_closed_forms_of_the_card():
    one, zero = torch.eye(1, dtype=F64), torch.zeros(1, dtype=F64)
    assert closed.cs_gaussian(zero, one, zero + 1, one).item() == pytest.approx(0.5, abs=1e-12)
    assert closed.cs_gaussian(zero, one, zero, 4 * one).item() == pytest.approx(0.2231435513, abs=1e-10)
    for r, value in ((0.5, 0.0793025151), (0.9, 0.6040921591), (0.0, 0.0)):
        r = torch.tensor(r, dtype=F64)
        assert closed.cs_qmi_gaussian(r).item() == pytest.approx(value, abs=1e-10)
        joint = torch.eye(2, dtype=F64) + r * (1 - torch.eye(2, dtype=F64))
        apart = closed.cs_gaussian(zero.expand(2), joint, zero.expand(2), torch.eye(2, dtype=F64))
        close(apart, closed.cs_qmi_gaussian(r))
    p, q = torch.tensor([0.6, 0.3, 0.1], dtype=F64), torch.tensor([0.3, 0.3, 0.4], dtype=F64)
    assert closed.cs_divergence(p, 7 * q).item() == pytest.approx(0.4870275121, abs=1e-10)
    close(closed.cs_divergence(p.log() + 3, q.log(), from_logits=True), closed.cs_divergence(p, q))
    with pytest.raises(DataError, match="from_logits"):
        closed.cs_divergence(p.log(), q)


def test_mixtures_by_quadrature():
    at = torch.linspace(-15, 15, 20001, dtype=F64)

    def density(weights, means, variances):
        normal = (-(at.unsqueeze(1) - means.squeeze(1)).square() / (2 * variances.flatten())).exp()
        return (weights * normal / (2 * math.pi * variances.flatten()).sqrt()).sum(1)

    parts = [
        (torch.tensor(w, dtype=F64), torch.tensor(m, dtype=F64).unsqueeze(1), torch.tensor(s, dtype=F64).view(-1, 1, 1))
        for w, m, s in (([0.2, 0.8], [-2.0, 1.0], [0.5, 2.0]), ([0.5, 0.3, 0.2], [0.0, 3.0, -1.0], [1.0, 0.3, 0.2]))
    ]
    p, q = (density(*part) for part in parts)
    pp, qq, pq = (torch.trapezoid(f, at).log() for f in (p * p, q * q, p * q))
    close(closed.cs_gmm(*parts[0], *parts[1]), pp + qq - 2 * pq, 1e-9)


def test_kl_at_equal_covariances_and_on_either_side_of_it_elsewhere(generator):
    means = torch.randn(2, 500, 3, generator=generator, dtype=F64)
    roots = torch.randn(2, 500, 3, 3, generator=generator, dtype=F64)
    covs = roots @ roots.mT + 0.1 * torch.eye(3, dtype=F64)
    p, q, same = (MultivariateNormal(means[m], covs[c]) for m, c in ((0, 0), (1, 1), (1, 0)))
    close(closed.cs_gaussian(means[0], covs[0], means[1], covs[0]), kl_divergence(p, same), 1e-8)
    distance = closed.cs_gaussian(means[0], covs[0], means[1], covs[1])
    assert distance.min() >= 0
    least = torch.minimum(kl_divergence(p, q), kl_divergence(q, p))
    assert 0.5 < (distance < least).double().mean() < 0.99, "below KL mostly, and not always"
    close(distance, closed.cs_gaussian(means[1], covs[1], means[0], covs[0]))
    narrow = torch.full((1, 1), 0.01, dtype=F64), torch.ones(1, 1, dtype=F64)
    three = torch.tensor([3.0], dtype=F64)
    above = closed.cs_gaussian(0 * three, narrow[0], three, narrow[1])
    assert above > kl_divergence(MultivariateNormal(0 * three, narrow[0]), MultivariateNormal(three, narrow[1]))


# --- limits and laws


def test_many_samples_of_normals_have_the_value_of_normals_smoothed_by_half_the_bandwidth(generator):
    """Six standard errors, from twenty batches; sigma^2 in the place of its half is outside of them."""
    r, sigma = 0.8, 0.7
    values = []
    for _ in range(20):
        x, noise = torch.randn(2, 1000, generator=generator, dtype=F64)
        pairs = x, r * x + math.sqrt(1 - r * r) * noise
        values.append(cs.cs_qmi(*pairs, sigma_x=sigma, sigma_t=sigma))
    values = torch.stack(values)
    error = 6 * values.std() / math.sqrt(20) + 3e-3  # the bias of a thousand points
    assert abs(values.mean() - closed.cs_qmi_gaussian(r / (1 + sigma**2 / 2))) < error
    assert abs(values.mean() - closed.cs_qmi_gaussian(r / (1 + sigma**2))) > error


def test_one_minus_two_log_cosine_of_mean_features(draws, generator):
    _, y, yhat, _ = draws
    frequencies = torch.randn(200_000, 2, generator=generator, dtype=F64)
    means = [cs.fourier_features(z, frequencies, sigma=1.5).mean(0) for z in (y, yhat)]
    close(cs.cs_divergence_features(*means), cs.cs_divergence_samples(y, yhat, sigma=1.5), 2e-3)
    with pytest.raises(DataError, match="far apart"):
        cs.cs_divergence_features(means[0], -means[0])


def test_divergences_of_samples_are_symmetric_and_zero_for_the_same(draws):
    x, y, yhat, t = draws
    between = partial(cs.cs_divergence_samples, sigma=0.6)
    close(between(y, y.flip(0)), torch.zeros((), dtype=F64))
    close(between(y, yhat), between(yhat, y))
    for symmetric in (True, False):
        close(cs.conditional_cs(x, y, y, symmetric=symmetric, **WIDTHS), torch.zeros((), dtype=F64))
    close(cs.conditional_cs(x, y, yhat, **WIDTHS), cs.conditional_cs(x, yhat, y, **WIDTHS))
    one_sided = cs.conditional_cs(x, y, yhat, symmetric=False, **WIDTHS)
    assert abs(one_sided - cs.conditional_cs(x, yhat, y, symmetric=False, **WIDTHS)) > 1e-6
    order = torch.tensor([3, 1, 8, 0, 2, 7, 4, 6, 5])
    close(cs.cs_qmi(x[order], t[order], sigma_x=1.0, sigma_t=1.0), cs.cs_qmi(x, t, sigma_x=1.0, sigma_t=1.0))
    close(cs.cs_qmi(x, 0 * t, sigma_x=1.0, sigma_t=1.0), torch.zeros((), dtype=F64))
    close(cs.cs_qmi_normalized(x, 0 * t, sigma_x=1.0, sigma_t=1.0), torch.zeros((), dtype=F64))
    close(cs.cs_qmi_normalized(x, x, sigma_x=1.0, sigma_t=1.0), torch.ones((), dtype=F64))


def test_nonnegative_on_a_thousand_draws(generator):
    """In one batch; the paper's conditional form is negative in some, the symmetric one in none."""
    x, y, yhat = (torch.randn(1000, 6, d, generator=generator, dtype=F64) for d in (2, 1, 1))
    yhat = y + 0.05 * yhat
    assert cs.cs_divergence_samples(y, yhat, sigma=0.5).min() >= -1e-12
    assert cs.cs_qmi(x, y, sigma_x=1.0, sigma_t=1.0).min() >= -1e-12
    values = {kind: cs.conditional_cs(x, y, yhat, sigma_x=1.0, sigma_y=1.0, symmetric=kind) for kind in (True, False)}
    assert values[True].min() > 0
    assert values[False].min() < 0
    assert cs.cs_divergence_samples(y, yhat, sigma=0.5, unbiased_diag=True).min() < 0
    close(values[True][7], cs.conditional_cs(x[7], y[7], yhat[7], sigma_x=1.0, sigma_y=1.0))


def test_a_wide_kernel_of_x_leaves_the_unconditional_divergence(draws):
    x, y, yhat, _ = draws
    for symmetric in (True, False):
        wide = cs.conditional_cs(x, y, yhat, sigma_x=1e6, sigma_y=0.8, symmetric=symmetric)
        close(wide, cs.cs_divergence_samples(y, yhat, sigma=0.8))


def test_bits_are_nats_by_log_two(draws):
    x, y, yhat, t = draws
    for estimator in (
        partial(cs.cs_divergence_samples, y, yhat, sigma=1.0),
        partial(cs.conditional_cs, x, y, yhat, **WIDTHS),
        partial(cs.cs_qmi, x, t, sigma_x=1.0, sigma_t=1.0),
    ):
        close(estimator(log_base="2") * math.log(2), estimator())


def test_one_column_may_be_flat_and_is_not_squared_error(draws):
    """In the released script flat targets contract to the sum of squares; here they mean one column."""
    x, y, yhat, _ = draws
    flat = cs.conditional_cs(x, y[:, 0], yhat[:, 0], **WIDTHS)
    close(flat, cs.conditional_cs(x, y[:, :1], yhat[:, :1], **WIDTHS))
    assert abs(flat - (y[:, 0] - yhat[:, 0]).square().sum() / math.log(2)) > 0.1


def test_far_samples_stay_finite_in_single_precision():
    x = torch.linspace(0, 1, 8).unsqueeze(1)
    z = (x + 1000.0).requires_grad_()
    value = cs.cs_divergence_samples(x, z, sigma=1.0)
    assert value.item() == pytest.approx(999.0**2, rel=2e-3)
    (gradient,) = torch.autograd.grad(value, z)
    assert gradient.isfinite().all()
    assert gradient.sum() > 0
    assert not gram(x, z, 1.0).mean().log().isfinite(), "a mean of kernels underflows"


def test_single_precision_agrees(generator):
    x, t = torch.randn(400, 32, generator=generator, dtype=F64), torch.randn(400, 16, generator=generator, dtype=F64)
    y, yhat = torch.randn(2, 400, generator=generator, dtype=F64)
    for estimator, inputs in (
        (partial(cs.conditional_cs, sigma_x=32**0.5, sigma_y=1.0), (x, y, yhat)),
        (partial(cs.cs_qmi, sigma_x=32**0.5, sigma_t=4.0), (x, t)),
        (partial(cs.cs_divergence_samples, sigma=4.0), (x[:200], x[200:] + 0.3)),
    ):
        exact, single = estimator(*inputs), estimator(*(value.float() for value in inputs))
        assert single.dtype == torch.float32
        assert abs(single - exact) <= 1e-5 * abs(exact), "of the value, small as it is, and not of its summands"
        assert estimator(*(value.bfloat16() for value in inputs)).dtype == torch.float32


def test_bandwidths(generator):
    x = torch.randn(60, 3, generator=generator)
    exact = torch.pdist(x).median().item()
    assert cs.median_bandwidth(x) == pytest.approx(exact, rel=1e-6)
    assert cs.median_bandwidth(x, 2.0) == pytest.approx(2 * exact, rel=1e-6)
    many = torch.randn(2000, 3, generator=generator).sort(0).values
    assert cs.median_bandwidth(many) == pytest.approx(torch.pdist(many).median().item(), rel=0.05)
    with pytest.raises(DataError, match="coincide"):
        cs.median_bandwidth(torch.zeros(5, 2))
    with pytest.raises(DataError, match="n >= 2"):
        cs.median_bandwidth(torch.zeros(1, 2))


ROWS, COLUMN = torch.zeros(4, 2), torch.zeros(4)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ShapeError, lambda: cs.cs_divergence_samples(ROWS, torch.zeros(4, 3), sigma=1.0)),
        (ShapeError, lambda: cs.conditional_cs(ROWS, COLUMN, ROWS, sigma_x=1.0, sigma_y=1.0)),
        (ShapeError, lambda: cs.conditional_cs(ROWS[:3], COLUMN, COLUMN, sigma_x=1.0, sigma_y=1.0)),
        (ShapeError, lambda: cs.cs_qmi(ROWS, torch.zeros(5, 2), sigma_x=1.0, sigma_t=1.0)),
        (ShapeError, lambda: cs.cs_qmi(ROWS, ROWS, sigma_x=1.0, sigma_t=1.0, gram=torch.ones(3, 3))),
        (ShapeError, lambda: cs.cs_divergence_samples(torch.tensor(1.0), ROWS, sigma=1.0)),
        (DataError, lambda: cs.cs_divergence_samples(ROWS[:0], ROWS, sigma=1.0)),
        (DataError, lambda: cs.cs_divergence_samples(ROWS[:1], ROWS, sigma=1.0, unbiased_diag=True)),
        (ConfigError, lambda: cs.cs_divergence_samples(ROWS, ROWS, sigma=0.0)),
        (ConfigError, lambda: cs.cs_divergence_samples(ROWS, ROWS, sigma=1.0, log_base="10")),
        (ConfigError, lambda: cs.cs_divergence_samples(ROWS, ROWS, sigma=1.0, chunk=0)),
        (ConfigError, lambda: cs.median_bandwidth(ROWS, scale=0.0)),
    ],
)
def test_bad_input(error, call):
    with pytest.raises(error):
        call()
