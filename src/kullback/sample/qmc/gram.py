"""Gram matrices over lattices and nets in n log n: products, solves and determinants, and Gaussian processes on them.

For a lattice in natural order with KernelSI, or a net in natural order with KernelDSI, K = V* diag(l) V with V = fftbr
or fwht, and the eigenvalues are l = sqrt(n) V k_1, with k_1 the first column. So K y = V*(l . V y), K^-1 y likewise,
log det K = sum log l, and y' K^-1 y = sum |V y|^2 / l, differentiable in the kernel's parameters. When the points
double, one transform of the old size updates the eigenvalues.
Between T tasks the blocks are each diagonal, so that there is one T x T matrix a frequency in place of l.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, NotFitted, ShapeError
from kullback.sample.qmc.kernels import KernelMultiTask, ProductKernel
from kullback.sample.qmc.point_set import PointSet, power_of_two
from kullback.sample.qmc.transforms import fftbr, fwht, ifftbr, omega_fftbr

__all__ = ["FastGP", "FastGram"]


class FastGram:
    """The matrix K + nugget I over the first `count` points of a set, a power of 2, held by its n eigenvalues.

    Right-hand sides have shape [..., n], or [..., T, n] for KernelMultiTask. The nugget keeps solves of smooth kernels
    in reach: their condition passes 1e8 at a thousand points.
    Raises ConfigError where kernel, points, order and randomization do not belong together, or for another count.

    >>> from kullback.sample.qmc import DigitalNetB2, KernelDSI
    >>> net = DigitalNetB2(1, generator=torch.Generator().manual_seed(0))
    >>> gram = FastGram(KernelDSI(1), net, 8)
    >>> y = torch.arange(8, dtype=torch.float64)
    >>> torch.allclose(gram.matmul(gram.solve(y)), y)
    True
    """

    def __init__(
        self, kernel: ProductKernel | KernelMultiTask, points: PointSet, count: int, *, nugget: float = 0.0
    ) -> None:
        _check(kernel, points)
        power_of_two(count, "the number of points of a fast Gram matrix")
        self.kernel, self.points, self.count, self.nugget = kernel, points, count, nugget
        self.column = self._column(0, count)
        self._raw = self.transform(self.column) * math.sqrt(count)

    def _column(self, start: int, stop: int) -> Tensor:
        """Entries of the first column without the kernel's mean: [n], or [T, T, n] between tasks."""
        first, rest = self.points.points(0, 1), self.points.points(start, stop)
        if isinstance(self.kernel, KernelMultiTask):
            return self.kernel(rest, first).permute(1, 2, 0)
        return self.kernel.without_mean(rest, first)

    @property
    def multiple(self) -> bool:
        """Whether there are tasks."""
        return isinstance(self.kernel, KernelMultiTask)

    @property
    def eigenvalues(self) -> Tensor:
        """Real and positive, [n], with the nugget; between tasks Hermitian matrices [n, T, T]."""
        if isinstance(self.kernel, KernelMultiTask):
            blocks = self._raw.permute(2, 0, 1)
            return blocks + self.nugget * torch.eye(self.kernel.tasks, dtype=blocks.dtype)
        raw = self._raw.real if self._raw.is_complex() else self._raw
        # the mean is a multiple of the matrix of ones: it adds to the first eigenvalue only
        mean = torch.zeros_like(raw)
        mean[0] = self.count
        return raw + mean * self.kernel.scale + self.nugget

    def transform(self, y: Tensor) -> Tensor:
        """V y over the last axis."""
        return fftbr(y) if self.kernel.group == "lattice" else fwht(y)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """V* y over the last axis, real."""
        return ifftbr(y).real if self.kernel.group == "lattice" else fwht(y)

    def matmul(self, y: Tensor) -> Tensor:
        """(K + nugget I) y, in n log n."""
        image = self.transform(self._checked(y))
        if self.multiple:
            return self.inverse_transform(torch.einsum("nts,...sn->...tn", self.eigenvalues.to(image.dtype), image))
        return self.inverse_transform(image * self.eigenvalues)

    def solve(self, y: Tensor) -> Tensor:
        """(K + nugget I)^-1 y, in n log n."""
        image = self.transform(self._checked(y))
        if self.multiple:
            found = torch.linalg.solve(self.eigenvalues.to(image.dtype), image.movedim(-1, -2).unsqueeze(-1))
            return self.inverse_transform(found.squeeze(-1).movedim(-2, -1))
        return self.inverse_transform(image / self.eigenvalues)

    def quadratic(self, y: Tensor) -> Tensor:
        """y' (K + nugget I)^-1 y, [...]."""
        if self.multiple:
            return (y * self.solve(y)).sum((-1, -2))
        image = self.transform(self._checked(y))
        return ((image * image.conj()).real / self.eigenvalues).sum(-1)

    def logdet(self) -> Tensor:
        """log det (K + nugget I)."""
        if self.multiple:
            return torch.linalg.slogdet(self.eigenvalues).logabsdet.sum()
        return self.eigenvalues.log().sum()

    def extend(self) -> FastGram:
        """The matrix over twice as many points, from one transform of the present size."""
        result = object.__new__(FastGram)
        result.kernel, result.points, result.nugget = self.kernel, self.points, self.nugget
        result.count = 2 * self.count
        added = self._column(self.count, 2 * self.count)
        result.column = torch.cat([self.column, added], -1)
        second = self.transform(added) * math.sqrt(self.count)
        if self.kernel.group == "lattice":
            second = second * omega_fftbr(self.count.bit_length() - 1)
        result._raw = torch.cat([self._raw + second, self._raw - second], -1)
        return result

    def _checked(self, y: Tensor) -> Tensor:
        tail = (self.kernel.tasks, self.count) if isinstance(self.kernel, KernelMultiTask) else (self.count,)
        if tuple(y.shape[-len(tail) :]) != tail:
            raise ShapeError(f"a right-hand side has shape [..., {', '.join(map(str, tail))}], got {tuple(y.shape)}")
        return y


def _check(kernel: ProductKernel | KernelMultiTask, points: PointSet) -> None:
    base = kernel.base if isinstance(kernel, KernelMultiTask) else kernel
    if base.group != points.kind:
        wanted = {"lattice": "a Lattice", "net": "a DigitalNetB2"}[base.group]
        raise ConfigError(f"this kernel goes with {wanted}, not with points of kind {points.kind!r}")
    # the Gray code of i XOR j is that of i XOR that of j, so that nets keep their group in that order, unlike lattices
    if points.order != "natural" and not (points.kind == "net" and points.order == "gray"):
        raise ConfigError(f'the transforms need points in order="natural", not {points.order!r}')
    if points.randomize == "nus":
        raise ConfigError("nested scrambling leaves no group of points: take lms ds, which does")
    if points.replications is not None:
        raise ConfigError("one matrix belongs to one set of points: leave replications out")
    if base.dimensions != points.dimensions:
        raise ConfigError(f"the kernel has {base.dimensions} dimensions and the points {points.dimensions}")


class FastGP:
    """Gaussian process regression on the first n = 2^m points of a lattice or net, in n log n a step.

    `fit` maximises the marginal likelihood over the kernel's parameters and, where learned, the noise; `predict` gives
    mean and variance at any points. noise: variance of the observations, also what keeps the solve stable.
    """

    def __init__(
        self, kernel: ProductKernel, points: PointSet, *, noise: float = 1e-8, learn_noise: bool = False
    ) -> None:
        if not noise > 0.0:
            raise ConfigError(f"noise is a positive variance and is {noise}: a small one keeps solves stable")
        _check(kernel, points)
        self.kernel, self.points, self.learn_noise = kernel, points, learn_noise
        self.log_noise = torch.tensor(math.log(noise), dtype=torch.float64, requires_grad=learn_noise)
        self.gram: FastGram | None = None

    def loss(self, y: Tensor) -> Tensor:
        """Minus the log marginal likelihood of values y [n] at the first n points, about their mean."""
        gram = FastGram(self.kernel, self.points, len(y), nugget=0.0)
        eigenvalues = gram.eigenvalues + self.log_noise.exp()
        image = gram.transform(y - y.mean())
        square = (image * image.conj()).real
        return 0.5 * ((square / eigenvalues).sum() + eigenvalues.log().sum() + len(y) * math.log(2.0 * math.pi))

    def fit(self, y: Tensor, *, steps: int = 50) -> FastGP:
        """Fit to values y [n] at the first n points, by at most `steps` steps of L-BFGS; returns itself.

        Raises ShapeError for y of another shape, ConfigError for values that are not finite.
        """
        if y.ndim != 1:
            raise ShapeError(f"y is one value for each point, [n], and has shape {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            raise ConfigError("y has values that are not finite: leave such points out of the function's domain")
        y = y.detach().to(torch.float64)
        parameters: list[Tensor] = [p for p in self.kernel.parameters() if p.requires_grad]
        parameters += [self.log_noise] if self.learn_noise else []
        if parameters and steps:
            optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

            def closure() -> Any:
                optimizer.zero_grad()
                value = self.loss(y)
                value.backward()
                return value

            optimizer.step(closure)
        with torch.no_grad():
            self.gram = FastGram(self.kernel, self.points, len(y), nugget=float(self.log_noise.detach().exp()))
            self.mean = y.mean()
            self.coefficients = self.gram.solve(y - self.mean)
        return self

    def predict(self, x: Tensor, *, variance: bool = False, chunk: int = 1024) -> tuple[Tensor, Tensor | None]:
        """Posterior mean [m] at x [m, d], and its variance [m] where asked for; raises NotFitted before `fit`."""
        if self.gram is None:
            raise NotFitted("predict needs a fit first: FastGP(kernel, points).fit(y)")
        means, variances = [], []
        data = self.points.points(self.gram.count)
        with torch.no_grad():
            for part in x.to(torch.float64).split(chunk):
                cross = self.kernel.matrix(part, data)
                means.append(self.mean + cross @ self.coefficients)
                if variance:
                    variances.append((self.kernel(part, part) - self.gram.quadratic(cross)).clamp(min=0.0))
        return torch.cat(means), torch.cat(variances) if variance else None
