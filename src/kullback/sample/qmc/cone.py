"""Cubature from the decay of the Walsh or Fourier coefficients of the samples.

With y~ the coefficients of n = 2^m samples, ordered so that their sizes fall level by level, the error is at most
    5 2^-m sum_{k = 2^(m-lag-1)}^{2^(m-lag)-1} |y~_k|
for functions whose coefficients decay, in sums over levels, without long gaps: a cone, which is checked where asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.sample.qmc.cubature import Control, CubatureResult, Integrand, Tolerance, doubling, evaluate
from kullback.sample.qmc.periodic import periodized
from kullback.sample.qmc.point_set import PointSet
from kullback.sample.qmc.transforms import fftbr, fwht, omega_fftbr, omega_fwht

__all__ = ["integrate_by_coefficients"]


def _default_fudge(level: int) -> float:
    return 5.0 * 2.0**-level


def _sorted_levels(order: Tensor, sizes: Tensor, lowest: int) -> Tensor:
    """The ordering [P, n] after swaps, from the top level down to `lowest`, that put larger coefficients first.

    Entry l of each half is exchanged with its partner in the other half where that is larger; the same exchange is
    made in every block, since partners are aliased together.
    """
    count = order.shape[-1]
    for level in range(count.bit_length() - 2, lowest - 1, -1):
        blocks = order.unflatten(-1, (-1, 2, 1 << level))
        first, second = blocks[:, 0, 0], blocks[:, 0, 1]
        flip = sizes.gather(-1, second) > sizes.gather(-1, first)
        flip[:, 0] = False
        swap = flip[:, None, None]
        order = torch.where(swap, blocks.flip(2), blocks).flatten(1)
    return order


def _coefficients(values: Tensor, lattice: bool) -> Tensor:
    """Of samples [P, n]: the transform divided by root n, whose first entry is the mean."""
    return (fftbr(values) if lattice else fwht(values)) / values.shape[-1] ** 0.5


def _doubled(old: Tensor, values: Tensor, lattice: bool) -> Tensor:
    """The coefficients of twice as many samples, from those of the first half and the values of the second."""
    level = old.shape[-1].bit_length() - 1
    turned = _coefficients(values, lattice) * (omega_fftbr(level) if lattice else omega_fwht(level))
    return torch.cat([old + turned, old - turned], -1) / 2


def _control_weights(order: Tensor, image: Tensor, control_image: Tensor, lowest: int) -> Tensor:
    """The weights [P, c] of control variates that make the coefficients beyond 2^lowest smallest."""
    tail = order[:, 1 << lowest :]
    target = image.gather(-1, tail)
    design = torch.stack([row[:, chosen].mT for row, chosen in zip([control_image] * len(tail), tail)])
    if target.is_complex():
        target, design = torch.view_as_real(target).flatten(1), torch.cat([design.real, design.imag], 1)
        # as pairs above, as halves below: put the target in the order of the design
        target = target.unflatten(-1, (-1, 2)).mT.flatten(1)
    return torch.linalg.lstsq(design, target.unsqueeze(-1)).solution.squeeze(-1)


class _Cone:
    """What the sums of coefficients over a level must lie between, from all sample sizes so far.

    A level's sum is seen at every size, each time with less aliasing; a lower bound from one size above an upper bound
    from another contradicts the decay that the error bound takes for granted.
    """

    FIRST = 6

    def __init__(self, fudge: Callable[[int], float], lag: int) -> None:
        self.fudge, self.lag = fudge, lag
        self.bounds: dict[int, tuple[Tensor, Tensor]] = {}

    def violated(self, order: Tensor, sizes: Tensor) -> bool:
        """Whether the coefficients of a new sample size contradict those before."""
        top = order.shape[-1].bit_length() - 1
        found = False
        for level in range(self.FIRST, top + 1):
            gap = top - level
            growth = self.fudge(gap) / ((1.0 + self.fudge(self.lag)) * 2.0**-self.lag) * 2.0**-gap
            total = sizes.gather(-1, order[:, 1 << (level - 1) : 1 << level]).sum(-1)
            low = total / (1.0 + growth)
            high = total / (1.0 - growth) if growth < 1.0 else torch.full_like(total, torch.inf)
            if level in self.bounds:
                low, high = torch.maximum(low, self.bounds[level][0]), torch.minimum(high, self.bounds[level][1])
            self.bounds[level] = low, high
            found = found or bool((low > high * (1.0 + 1e-9)).any())
        return found


class _Coefficients:
    """The coefficients of the samples so far, net of control variates, and the order that sorts them."""

    def __init__(self, lattice: bool, lag: int, update_control: bool) -> None:
        self.lattice, self.lag, self.update_control = lattice, lag, update_control
        self.plain = self.image = self.extra = self.order = torch.empty(0)
        self.weights = torch.empty(0)

    @property
    def lowest(self) -> int:
        """The level whose coefficients the bound sums."""
        return self.plain.shape[-1].bit_length() - 2 - self.lag

    def add(self, values: Tensor, controls: Tensor | None) -> None:
        """Samples [P, n] of the integrand and [c, n] of centred control variates: the first, or as many again."""
        first = self.plain.numel() == 0
        self.plain = _coefficients(values, self.lattice) if first else _doubled(self.plain, values, self.lattice)
        count = self.plain.shape[-1]
        fresh = torch.arange(count).expand(len(values), -1)
        self.image = self.plain
        if controls is not None:
            extra = _coefficients(controls, self.lattice) if first else _doubled(self.extra, controls, self.lattice)
            self.extra = extra
            if first or self.update_control:
                order = _sorted_levels(fresh, self.plain.abs(), 1)
                self.weights = _control_weights(order, self.plain, extra, self.lowest)
            self.image = self.plain - (self.weights.to(extra.dtype).unsqueeze(-1) * extra).sum(-2)
        if first:
            self.order = _sorted_levels(fresh, self.image.abs(), 1)
        else:
            order = torch.cat([self.order, count // 2 + self.order], -1)
            self.order = _sorted_levels(order, self.image.abs(), self.lowest + 1)

    @property
    def mean(self) -> Tensor:
        return self.image[:, 0].real if self.lattice else self.image[:, 0]

    def sum_of_level(self) -> Tensor:
        """sum |y~_k| over the level that the bound takes, [P]."""
        chosen = self.order[:, 1 << self.lowest : 2 << self.lowest]
        return self.image.gather(-1, chosen).abs().sum(-1)


def integrate_by_coefficients(
    function: Integrand,
    points: PointSet,
    tolerance: Tolerance,
    *,
    n_min: int,
    n_max: int,
    fudge: Callable[[int], float] = _default_fudge,
    lag: int = 4,
    check_cone: bool = False,
    periodize: str | None = None,
    control: Control | None = None,
    update_control: bool = False,
) -> CubatureResult:
    """The adaptive rule for a net or a lattice; see `integrate`.

    fudge: of m, the factor of the bound; lag: how many levels lie between the coefficients that are summed and the
    top; check_cone: flags a function outside the cone (a strict test, which harmless ones may fail); periodize: for
    lattices, "baker" by default, a name of PERIODIC. control: control variates, whose weights are found at first, or
    at each step with update_control.
    """
    lattice = points.kind == "lattice"
    if periodize is not None and not lattice:
        raise ConfigError("periodize is for lattices: nets do not ask for periodic functions")
    if n_min < 1 << (lag + 2):
        raise ConfigError(f"n_min is at least {1 << (lag + 2)} here, to have coefficients to sum, and is {n_min}")
    change = (periodize or "baker") if lattice else "none"
    integrand = periodized(function, change)
    samples, cone = _Coefficients(lattice, lag, update_control), _Cone(fudge, lag)
    history: list[dict[str, float]] = []
    flags: set[str] = set()
    for start, stop in doubling(n_min, n_max):
        block = points.points(start, stop)
        values, added = evaluate(integrand, block), None
        if control is not None:
            added = evaluate(periodized(control.function, change), block).reshape(len(block), -1).mT
            added = added - control.means.to(torch.float64).unsqueeze(-1)
        samples.add(values.reshape(len(values), -1).mT, added)
        half = fudge(stop.bit_length() - 1) * samples.sum_of_level()
        if check_cone and cone.violated(samples.order, samples.image.abs()):
            flags.add("the coefficients do not decay as the bound supposes: the integrand lies outside the cone")
        lo, hi = ((samples.mean + sign * half).reshape(values.shape[1:]) for sign in (-1.0, 1.0))
        history.append({"n": stop, "half_width": float(half.max())})
        converged = bool(tolerance.met(lo, hi).all())
        if converged:
            break
    value = tolerance.centre(lo, hi)
    return CubatureResult(value, lo, hi, stop, 0.0, converged, tuple(sorted(flags)), tuple(history))
