"""Transforms, kernels and Gram matrices over lattices and nets: closed forms, sums, dense twins and peers."""

import math
import warnings

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, NotFitted, ShapeError
from kullback.sample.qmc import (
    FastGP,
    FastGram,
    KernelCombined,
    KernelDSI,
    KernelDSIAdaptive,
    KernelMultiTask,
    KernelSI,
    Lattice,
    RadialKernel,
    Sobol,
    bit_reversed,
    bits,
    fftbr,
    fwht,
    ifftbr,
    omega_fftbr,
    omega_fwht,
    transforms,
)
from kullback.sample.qmc.shapes import AdaptiveWalsh, Bernoulli, Walsh, bernoulli_polynomial


@pytest.fixture(params=[True, False], ids=["numba", "plain"])
def numba(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(bits, "_kernels", lambda name: None)


def normal(*shape, generator):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def near(one, other, tolerance=1e-12):
    one, other = one.detach(), other.detach()
    scale = max(1.0, float(other.abs().max()))
    assert float((one - other).abs().max()) <= tolerance * scale


# --- transforms ---


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4, 7, 13, 18])
def test_walsh_hadamard_against_the_matrix_and_itself(levels, numba, generator):
    x = normal(2, 1 << levels, generator=generator)
    image = fwht(x)
    near(fwht(image), x)
    index = torch.arange(min(1 << levels, 64))
    row = index[-1]
    signs = torch.tensor([(-1.0) ** int(k & row).bit_count() for k in torch.arange(1 << min(levels, 13))]).double()
    if levels <= 13:
        near(image[:, row], x @ signs / math.sqrt(1 << levels))
    single = fwht(x.float())
    assert single.dtype == torch.float32
    near(single.double(), image, 1e-5)


@pytest.mark.parametrize("levels", [0, 1, 5, 18])
def test_bit_reversed_fourier_against_its_definition(levels, numba, generator):
    x = normal(3, 1 << levels, generator=generator)
    order = bits.reverse_bits(torch.arange(1 << levels), levels)
    assert torch.equal(bit_reversed(x), x[:, order])
    assert torch.equal(bit_reversed(bit_reversed(x)), x)
    near(fftbr(x), torch.fft.fft(x[:, order], norm="ortho"))
    near(ifftbr(fftbr(x)).real, x)
    near(fftbr(ifftbr(x.to(torch.complex128))), x.to(torch.complex128))


def test_transforms_equal_qmcpys(generator):
    qmcpy = pytest.importorskip("qmcpy")
    x = normal(2, 3, 64, generator=generator).numpy()
    for ours, theirs in ((fwht, qmcpy.fwht), (fftbr, qmcpy.fftbr), (ifftbr, qmcpy.ifftbr)):
        assert np.abs(ours(x) - theirs(x)).max() < 1e-13


def test_doubling_equals_the_transform_of_all(generator):
    first, second = normal(2, 3, 32, generator=generator)
    both = torch.cat([first, second], -1)
    for transform, omega in ((fwht, omega_fwht(5)), (fftbr, omega_fftbr(5))):
        old, new = transform(first), omega * transform(second)
        near(torch.cat([old + new, old - new], -1) / math.sqrt(2), transform(both))
    wrong = fftbr(second)  # without the factors
    assert (torch.cat([fftbr(first) + wrong, fftbr(first) - wrong], -1) / math.sqrt(2) - fftbr(both)).abs().max() > 0.1


def test_transforms_have_gradients_and_keep_strides(generator):
    x = normal(3, 8, generator=generator).requires_grad_()
    z = torch.complex(normal(8, generator=generator), normal(8, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(fwht, x)
    assert torch.autograd.gradgradcheck(fwht, x)
    assert torch.autograd.gradcheck(lambda y: fftbr(y).abs().square(), x)
    assert torch.autograd.gradcheck(lambda y: ifftbr(y).real, z)
    assert torch.autograd.gradcheck(bit_reversed, x)
    strided = normal(8, 3, generator=generator).mT
    for transform in (fwht, fftbr, ifftbr, bit_reversed):
        near(transform(strided), transform(strided.contiguous()))
    near(fwht(z.detach()).real, fwht(z.detach().real))
    assert fwht(torch.arange(4)).dtype == torch.float32
    assert fwht(np.arange(4)).dtype == np.float64


@pytest.mark.parametrize("transform", [fwht, fftbr, ifftbr, bit_reversed])
def test_transforms_refuse_other_lengths(transform):
    for shape in ((6,), (0,), (2, 12)):
        with pytest.raises(ShapeError, match="power of 2"):
            transform(torch.ones(shape))
        with pytest.raises(ShapeError, match="power of 2"):
            transform(np.ones(shape))


# --- kernels ---


def mu(index, alpha):
    """The sum of the alpha largest positions of ones, counted from 1."""
    places = [place + 1 for place in range(index.bit_length()) if index >> place & 1]
    return sum(sorted(places, reverse=True)[:alpha])


def walsh_sum(u, coefficient, digits=12):
    """sum_k c_k wal_k(u) over k < 2^digits, from the definition."""
    own = [int(u * 2 ** (digit + 1)) & 1 for digit in range(digits)]
    total = 0.0
    for k in range(1 << digits):
        sign = sum(own[place] for place in range(digits) if k >> place & 1)
        total += coefficient(k) * (-1) ** sign
    return total


@pytest.mark.parametrize("alpha", [1, 2, 3, 4])
def test_walsh_closed_forms_against_sums(alpha):
    shape = Walsh(1, alpha)
    for u in (0.0, 0.5, 0.25, 0.75, 0.40625, 3 / 1024):
        value = shape(torch.tensor([u], dtype=torch.float64)).item()
        if alpha == 1:
            expected = walsh_sum(u, lambda k: 2 * 4.0 ** -mu(k, 1) if k else 0.0)
        else:
            expected = walsh_sum(u, lambda k: 2.0 ** -mu(k, alpha)) - 1.0
        # what lies beyond 2^12 terms
        assert value == pytest.approx(expected, abs=2.5e-3 if alpha == 2 else 1.2e-3)
        other = walsh_sum(u, lambda k: 2.0 ** -mu(k, 2 if alpha == 1 else alpha - 1)) - 1.0
        if u == 0.0:
            assert abs(other - value) > 3e-3


@pytest.mark.parametrize(
    ("alpha", "u", "value"),
    [(1, 0.5, -0.5), (1, 0.0, 1.0), (2, 0.5, -0.25), (2, 0.0, 1.5), (3, 0.5, -0.2083333), (4, 0.5, -0.2053571),
     (3, 0.0, 43 / 18 - 1), (4, 0.0, 701 / 294 - 1)],
)  # fmt: skip
def test_walsh_values(alpha, u, value):
    assert Walsh(1, alpha)(torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(value, abs=1e-7)


def test_adaptive_walsh_against_its_sum():
    for alpha in (0.6, 1.0, 2.3):
        for u in (0.0, 0.5, 0.3125):
            value = AdaptiveWalsh(1, alpha)(torch.tensor([u], dtype=torch.float64)).item()
            power = -(alpha + 1)
            expected = walsh_sum(u, lambda k, p=power: 2.0 ** (p * (mu(k, 1) - 1)) if k else 0.0)
            assert value == pytest.approx(expected, abs=2 * 2.0 ** (-12 * alpha) / (1 - 2.0**-alpha))


@pytest.mark.parametrize("alpha", [1, 2, 3, 4, 5])
def test_bernoulli_kernels_are_cosine_series(alpha):
    x = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64)
    frequencies = torch.arange(1, 20_001, dtype=torch.float64)
    series = 2 * (torch.cos(2 * math.pi * frequencies * x[:, None]) / frequencies ** (2 * alpha)).sum(-1)
    near(Bernoulli(1, alpha)(x[:, None]).squeeze(-1), series, 2e-4 if alpha == 1 else 1e-9)


def test_bernoulli_polynomials():
    x = torch.linspace(0, 1, 7, dtype=torch.float64)
    near(bernoulli_polynomial(4, x), x**4 - 2 * x**3 + x**2 - 1 / 30)
    near(bernoulli_polynomial(3, x), x**3 - 1.5 * x**2 + 0.5 * x)


KERNELS = {
    **{f"si {alpha}": lambda alpha=alpha: KernelSI(2, alpha=alpha, weights=[0.5, 0.2]) for alpha in range(1, 6)},
    **{f"dsi {alpha}": lambda alpha=alpha: KernelDSI(2, alpha=alpha, weights=[0.5, 0.2]) for alpha in range(1, 5)},
    "si, two orders": lambda: KernelSI(2, alpha=[1, 3], scale=2.0, weights=0.3),
    "dsi, two orders": lambda: KernelDSI(2, alpha=[1, 3], scale=2.0, weights=0.3),
    "adaptive": lambda: KernelDSIAdaptive(2, alpha=[0.7, 1.6], weights=0.3),
    "combined, lattice": lambda: KernelCombined(2, "lattice", weights=0.3),
    "combined, net": lambda: KernelCombined(2, "net", weights=0.3),
}


def points_of(kernel, generator):
    return (Lattice if kernel.group == "lattice" else Sobol)(kernel.dimensions, generator=generator)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_symmetric_positive_and_have_their_mean(name, generator):
    kernel = KERNELS[name]()
    x = torch.rand(40, 2, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        matrix = kernel.matrix(x, x)
        near(matrix, matrix.mT)
        assert torch.linalg.eigvalsh(matrix)[0] > -1e-9
        near(kernel.without_mean(x, x[:1]), kernel(x, x[:1]) - kernel.scale)
        # the average over a fine net or lattice is the integral, for every second argument
        grid = points_of(kernel, generator).points(1 << 14)
        tolerance = 2e-2 if name == "adaptive" else 1e-3
        near(kernel(grid.unsqueeze(1), grid[:3]).mean(0), kernel.scale.expand(3), tolerance)


def test_kernels_equal_qmcpys(generator):
    qmcpy = pytest.importorskip("qmcpy")
    x, z = torch.rand(2, 12, 3, dtype=torch.float64, generator=generator)
    weights, options = [0.5, 0.3, 0.1], {"scale": 2.0}
    dense = (x.numpy()[:, None], z.numpy()[None])
    for alpha in (1, 2, 3, 4, 5, [1, 2, 3]):
        theirs = qmcpy.KernelShiftInvar(3, alpha=alpha, lengthscales=weights, **options)(*dense)
        ours = KernelSI(3, alpha=alpha, weights=weights, **options).matrix(x, z).detach().numpy()
        assert np.abs(ours - theirs).max() < 1e-12
    for alpha in (2, 3, 4):  # the peer leaves terms of the sum out at alpha = 4
        theirs = qmcpy.KernelDigShiftInvar(3, t=53, alpha=alpha, lengthscales=weights, **options)(*dense)
        ours = KernelDSI(3, alpha=alpha, weights=weights, **options).matrix(x, z).detach().numpy()
        assert np.abs(ours - theirs).max() < (1e-12 if alpha < 4 else 1e-8)


def test_derivative_kernels_are_derivatives(generator):
    kernel = KernelSI(2, alpha=3, scale=0.8, weights=[0.4, 0.6])
    x, z = torch.rand(2, 5, 2, dtype=torch.float64, generator=generator).unbind()
    x.requires_grad_(), z.requires_grad_()
    value = kernel(x, z)
    by_x0 = torch.autograd.grad(value.sum(), x, create_graph=True)[0][:, 0]
    by_x0_z1 = torch.autograd.grad(by_x0.sum(), z, create_graph=True)[0][:, 1]
    by_x0_z1_z1 = torch.autograd.grad(by_x0_z1.sum(), z)[0][:, 1]
    near(kernel.derivative(x, z, (1, 0), (0, 0)), by_x0, 1e-10)
    near(kernel.derivative(x, z, (1, 0), (0, 1)), by_x0_z1, 1e-10)
    near(kernel.derivative(x, z, (1, 0), (0, 2)), by_x0_z1_z1, 1e-10)
    with pytest.raises(ConfigError, match="up to order 4"):
        kernel.derivative(x, z, (3, 0), (2, 0))
    with pytest.raises(ConfigError, match="Walsh"):
        KernelDSI(2).derivative(x, z, (1, 0), (0, 0))


@pytest.mark.parametrize("name", RadialKernel.NAMES)
def test_radial_kernels(name, generator):
    from scipy.spatial.distance import cdist

    kernel = RadialKernel(2, name, scale=1.5, lengths=[0.5, 2.0], alpha=0.7)
    x = torch.rand(6, 2, dtype=torch.float64, generator=generator)
    r = torch.from_numpy(cdist((x / torch.tensor([0.5, 2.0])).numpy(), (x / torch.tensor([0.5, 2.0])).numpy()))
    expected = {
        "gaussian": torch.exp(-(r**2) / 2),
        "rational quadratic": (1 + r**2 / 1.4) ** -0.7,
        "matern 1/2": torch.exp(-r),
        "matern 3/2": (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r),
        "matern 5/2": (1 + math.sqrt(5) * r + 5 / 3 * r**2) * torch.exp(-math.sqrt(5) * r),
    }[name]
    near(kernel.matrix(x, x).detach(), 1.5 * expected)
    kernel.matrix(x, x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in kernel.parameters() if p.grad is not None)


# --- Gram matrices ---


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("count", [1, 2, 64, 1024])
def test_fast_gram_equals_the_dense_matrix(name, count, generator):
    kernel = KERNELS[name]()
    points = points_of(kernel, generator)
    y = normal(3, count, generator=generator)
    with torch.no_grad():
        gram = FastGram(kernel, points, count, nugget=1e-3)
        x = points.points(count)
        dense = kernel.matrix(x, x) + 1e-3 * torch.eye(count, dtype=torch.float64)
        near(gram.matmul(y), y @ dense, 1e-8)
        near(gram.solve(y), torch.linalg.solve(dense, y.mT).mT, 1e-8)
        assert abs((gram.logdet() - torch.linalg.slogdet(dense)[1]).item()) < 1e-7 * count
        near(gram.quadratic(y), (y * torch.linalg.solve(dense, y.mT).mT).sum(-1), 1e-8)
        assert (gram.eigenvalues > 0).all()
        if count > 1:
            half = FastGram(kernel, points, count // 2, nugget=1e-3).extend()
            near(half.eigenvalues, gram.eigenvalues, 1e-12)
            near(half.matmul(y), gram.matmul(y), 1e-12)


def product_by_transform(kernel, points, y):
    """Of the matrix over the points and y, whether or not the points allow it; and what it should be."""
    x = points.points(len(y))
    with torch.no_grad():
        column, root = kernel(x, x[:1]), math.sqrt(len(y))
        if kernel.group == "lattice":
            return ifftbr(fftbr(y) * fftbr(column) * root).real, kernel.matrix(x, x) @ y
        return fwht(fwht(y) * fwht(column) * root), kernel.matrix(x, x) @ y


def test_points_without_the_group_are_refused_and_would_be_wrong(generator):
    y = normal(64, generator=generator)
    for kernel, points in (
        (KernelSI(2), Lattice(2, order="gray", generator=generator)),
        (KernelSI(2), Lattice(2, order="linear", generator=generator)),
        (KernelDSI(2), Sobol(2, randomize="nus", generator=generator)),
    ):
        with pytest.raises(ConfigError, match=r"natural|nested"):
            FastGram(kernel, points, 64)
        product, exact = product_by_transform(kernel, points, y)
        assert (product - exact).abs().max() > 1e-2


def test_the_gray_order_of_a_net_is_a_group_too(generator):
    # unlike that of a lattice: the Gray code of i XOR j is that of i XOR that of j
    points, y = Sobol(2, order="gray", generator=generator), normal(64, generator=generator)
    near(*product_by_transform(KernelDSI(2), points, y), 1e-10)
    gram = FastGram(KernelDSI(2), points, 32).extend()
    near(gram.matmul(y), product_by_transform(KernelDSI(2), points, y)[1], 1e-10)


def test_first_eigenvalue_keeps_its_digits(generator):
    # with tiny weights, l_0 - n is far below the rounding of n
    kernel, points = KernelSI(2, weights=1e-13), Lattice(2, generator=generator)
    gram = FastGram(kernel, points, 16)
    with torch.no_grad():
        x = points.points(16)
        exact = (KernelSI(2, weights=1e-3).without_mean(x, x[:1]).sum() * 1e-10).item()
        assert gram._raw[0].real.item() == pytest.approx(exact, rel=1e-2)
        naive = (kernel(x, x[:1]) - 1.0).sum().item()
    assert abs(naive - exact) > 0.05 * abs(exact)


def test_marginal_likelihood_has_gradients_in_the_kernel(generator):
    kernel, points = KernelSI(2, weights=[0.3, 0.5], scale=1.4), Lattice(2, generator=generator)
    y = normal(32, generator=generator)

    def fast(log_scale, log_weights):
        values = {"kernel.log_scale": log_scale, "kernel.log_weights": log_weights}
        return torch.func.functional_call(Likelihood(kernel, points, y), values)

    inputs = [p.detach().clone().requires_grad_() for p in (kernel.log_scale, kernel.log_weights)]
    assert torch.autograd.gradcheck(fast, inputs)


class Likelihood(torch.nn.Module):
    def __init__(self, kernel, points, y):
        super().__init__()
        self.kernel, self.points, self.y = kernel, points, y

    def forward(self):
        gram = FastGram(self.kernel, self.points, len(self.y), nugget=1e-2)
        return gram.quadratic(self.y) + gram.logdet()


@pytest.mark.parametrize("kind", ["lattice", "net", "derivatives"])
def test_tasks_share_the_fast_matrix(kind, generator):
    if kind == "net":
        base, points = KernelDSI(2, weights=0.4), Sobol(2, generator=generator)
    else:
        base, points = KernelSI(2, alpha=3, weights=0.4), Lattice(2, generator=generator)
    derivatives = [(0, 0), (1, 0), (0, 1)] if kind == "derivatives" else None
    factor = torch.ones(3, 1) if kind == "derivatives" else torch.tensor([[1.0, 0.2], [0.5, -0.3], [-0.4, 0.9]])
    kernel = KernelMultiTask(base, 3, factor=factor, diagonal=0.1, derivatives=derivatives)
    y = normal(2, 3, 32, generator=generator)
    with torch.no_grad():
        gram = FastGram(kernel, points, 32, nugget=1e-2)
        x = points.points(32)
        dense = kernel.matrix(x, x) + 1e-2 * torch.eye(96, dtype=torch.float64)
        near(dense, dense.mT, 1e-10)
        near(gram.matmul(y).flatten(1), y.flatten(1) @ dense, 1e-9)
        near(gram.solve(y).flatten(1), torch.linalg.solve(dense, y.flatten(1).mT).mT, 1e-8)
        assert gram.logdet().item() == pytest.approx(torch.linalg.slogdet(dense)[1].item(), rel=1e-8)
        near(FastGram(kernel, points, 16, nugget=1e-2).extend().eigenvalues, gram.eigenvalues, 1e-12)
        near(gram.quadratic(y), (y * gram.solve(y)).sum((1, 2)))


def test_gaussian_process_interpolates_and_learns(generator):
    def function(x):
        return torch.sin(2 * math.pi * x[:, 0]) * torch.cos(2 * math.pi * x[:, 1]) + 3.0

    points = Lattice(2, generator=generator)
    y = function(points.points(256))
    process = FastGP(KernelSI(2, alpha=2), points)
    with pytest.raises(NotFitted):
        process.predict(points.points(2))
    before = process.loss(y).item()
    process.fit(y, steps=30)
    assert process.loss(y).item() < before - 10
    test = torch.rand(300, 2, dtype=torch.float64, generator=generator)
    mean, variance = process.predict(test, variance=True)
    assert (mean - function(test)).abs().max() < 0.01
    at_data, at_data_variance = process.predict(points.points(256), variance=True)
    assert (at_data - y).abs().max() < 1e-4
    assert at_data_variance.mean() < variance.mean()
    assert process.predict(test)[1] is None
    # dense twin of the mean and the variance
    with torch.no_grad():
        x, kernel = points.points(256), process.kernel
        matrix = kernel.matrix(x, x) + 1e-8 * torch.eye(256, dtype=torch.float64)
        cross = kernel.matrix(test, x)
        near(mean, y.mean() + cross @ torch.linalg.solve(matrix, y - y.mean()), 1e-5)
        dense = kernel(test, test) - (cross * torch.linalg.solve(matrix, cross.mT).mT).sum(-1)
        near(variance, dense.clamp(min=0), 1e-5)


def test_gaussian_process_learns_its_noise(generator):
    points = Sobol(1, generator=generator)
    x = points.points(512)
    y = torch.sin(6 * x[:, 0]) + 0.1 * normal(512, generator=generator)
    process = FastGP(KernelDSI(1), points, noise=1e-4, learn_noise=True).fit(y)
    assert 0.07**2 < process.log_noise.exp().item() < 0.14**2


def test_bad_input(generator):
    lattice, net = Lattice(2, generator=generator), Sobol(2, generator=generator)
    for call, words in (
        (lambda: FastGram(KernelSI(2), net, 8), "goes with a Lattice"),
        (lambda: FastGram(KernelDSI(2), lattice, 8), "goes with a DigitalNetB2"),
        (lambda: FastGram(KernelSI(3), lattice, 8), "3 dimensions"),
        (lambda: FastGram(KernelSI(2), lattice, 12), "power of 2"),
        (lambda: FastGram(KernelSI(2), Lattice(2, replications=2, generator=generator), 8), "replications"),
        (lambda: KernelSI(2, alpha=6), "1 to 5"),
        (lambda: KernelDSI(2, alpha=[1, 2, 3]), "1 to 4"),
        (lambda: KernelSI(2, weights=-1.0), "positive"),
        (lambda: KernelDSIAdaptive(2, alpha=0.0), "positive"),
        (lambda: KernelCombined(2, "grid"), "lattice"),
        (lambda: KernelCombined(2, "net", mixture=torch.ones(2, 3)), "positive"),
        (lambda: RadialKernel(2, "cauchy"), "radial kernel is one of"),
        (lambda: FastGP(KernelSI(2), lattice, noise=0.0), "positive"),
        (lambda: FastGP(KernelSI(2), lattice).fit(torch.full((8,), math.nan)), "not finite"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    gram = FastGram(KernelSI(2), lattice, 8)
    for call, words in (
        (lambda: gram.matmul(torch.ones(7)), "8"),
        (lambda: KernelSI(2)(torch.ones(3), torch.ones(3)), "2"),
        (lambda: KernelMultiTask(KernelSI(2), 2, factor=torch.ones(3, 1)), "row for each task"),
        (lambda: KernelMultiTask(KernelSI(2), 2, derivatives=[(0, 0)]), "2 rows"),
        (lambda: FastGP(KernelSI(2), lattice).fit(torch.ones(8, 1)), "one value"),
    ):
        with pytest.raises(ShapeError, match=words):
            call()


def test_products_of_small_hadamard_matrices_are_the_transform(generator):
    x = normal(2, 1 << 11, generator=generator)
    near(transforms._walsh_by_products(x, 11), fwht(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fwht(torch.ones(1)).item() == 1.0
