"""What every point set in the unit cube obeys, law by law, and for each law a wrong set that it rejects.

A set is made by (dimensions, replications, generator); the table says in which bases its projections are balanced.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.sample.qmc import DigitalNetB2, Faure, Halton, Independent, Lattice, PointSet, bits


@dataclass(frozen=True)
class Row:
    """A set, and the base b in which the first b^m points are balanced in each dimension, if they are."""

    make: Callable
    base: int | None = None
    of_dimension: Callable | None = None
    balanced: bool = True


def net(randomize, **options):
    return Row(partial(DigitalNetB2, randomize=randomize, **options), base=2)


def halton(randomize):
    return Row(partial(Halton, randomize=randomize), of_dimension=lambda j: (2, 3, 5, 7)[j])


TABLE = {
    "lattice, natural": Row(partial(Lattice, order="natural")),
    "lattice, gray": Row(partial(Lattice, order="gray")),
    **{f"net, {name}": net(name) for name in ("ds", "lms ds", "nus")},
    "net, gray": net("lms ds", order="gray"),
    # dimensions 3 and 4 of Sobol' points, say, make no net with t = 0, nor does what is woven from them
    **{f"net of order 2, {n}": replace(net(n, alpha=2), balanced=False) for n in ("ds", "lms ds", "nus")},
    **{f"halton, {name}": halton(name) for name in ("ds", "dp", "lms ds", "lms dp", "nus", "qrng")},
    **{f"faure, {name}": Row(partial(Faure, randomize=name), base=5) for name in ("ds", "lms dp", "nus")},
    "faure of order 2": Row(partial(Faure, randomize="lms ds", alpha=2), balanced=False),
    "independent": Row(Independent, balanced=False),
}
DIMENSIONS = 4


def made(row, generator, replications=3):
    return row.make(DIMENSIONS, replications=replications, generator=generator)


def law_inside_the_cube(row, generator):
    for dtype in (torch.float64, torch.float32):
        points = made(row, generator).points(600, dtype=dtype)
        assert points.dtype == dtype
        assert points.shape == (3, 600, DIMENSIONS)
        assert 0.0 <= points.min() < 0.05
        assert 0.95 < points.max() < 1.0


def law_single_precision_rounds_the_same_points(row, generator):
    points = made(row, generator)
    gap = points.points(300).float() - points.points(300, dtype=torch.float32)
    assert gap.abs().max() <= 2.0**-23


def law_same_generator_same_points(row, generator):
    state = generator.get_state()
    first = made(row, generator).points(64)
    other = made(row, generator).points(64)
    again = made(row, generator.set_state(state)).points(64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def law_blocks_are_parts_of_the_whole(row, generator):
    points = made(row, generator)
    whole = points.points(700)
    for start, stop in ((0, 1), (1, 2), (0, 256), (255, 257), (300, 700)):
        assert torch.equal(points.points(start, stop), whole[:, start:stop])
    parts = [points.next(count) for count in (3, 61, 200)]
    assert torch.equal(torch.cat(parts, 1), whole[:, :264])
    points.reset()
    assert torch.equal(points.next(5), whole[:, :5])


def law_replications_are_independent_and_uniform(row, generator):
    count = 600
    first = row.make(2, replications=count, generator=generator).points(3, 4).squeeze(1)
    error = (1.0 / (12 * count)) ** 0.5
    assert (first.mean(0) - 0.5).abs().max() < 6 * error
    assert (first.var(0) - 1.0 / 12).abs().max() < 6 * (1.0 / (180 * count)) ** 0.5
    # neighbours in the list of replications, and the two dimensions, do not correlate
    centred = first - 0.5
    for product in (centred[1:, 0] * centred[:-1, 0], centred[:, 0] * centred[:, 1]):
        assert product.mean().abs() < 6 * (1.0 / 144 / count) ** 0.5


def law_projections_are_balanced(row, generator):
    points = made(row, generator).points(625)
    for j in range(DIMENSIONS):
        base = row.base or (row.of_dimension(j) if row.of_dimension else None)
        if base is None:  # a lattice: equal distances
            column = points[:, :256, j].sort(1).values
            assert (column.diff(dim=1) - 1.0 / 256).abs().max() < 1e-12
            continue
        for power in range(1, 9):
            size = base**power
            if size > 625:
                break
            # a scrambled point may lie a rounding below the border of its cell
            cells = ((points[:, :size, j] + 2.0**-53) * size).floor().long()
            assert all(len(row.unique()) == size for row in cells)


def law_compiled_and_plain_code_agree(row, generator):
    points = made(row, generator)
    fast = points.points(37, 437), points.points(500, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "_kernels", lambda name: None)
        plain = points.points(37, 437), points.points(500, dtype=torch.float32)
    assert torch.equal(fast[0], plain[0])
    assert torch.equal(fast[1], plain[1])


def law_says_what_is_wrong(row, generator):
    points = made(row, generator)
    for start, stop in ((5, 5), (-1, 3), (3, 2)):
        with pytest.raises(ConfigError, match="are none"):
            points.points(start, stop)
    with pytest.raises(ConfigError, match="were asked for"):
        points.points(points.source.limit, points.source.limit + 1)
    with pytest.raises(ConfigError, match="float64 or float32"):
        points.points(4, dtype=torch.float16)
    with pytest.raises(ConfigError):
        row.make(0, generator=generator)
    with pytest.raises(ConfigError, match="replications"):
        row.make(2, replications=0, generator=generator)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize(
    ("name", "law"),
    [(name, law) for name, row in TABLE.items() for law in LAWS if row.balanced or law != "projections_are_balanced"],
)
def test_law(name, law, generator):
    LAWS[law](TABLE[name], generator)


@dataclass(frozen=True)
class Wrong:
    """A source whose points are changed by a function of the points and the first index."""

    source: object
    change: Callable

    def __getattr__(self, name):
        return getattr(self.source, name)

    def unit(self, first, count, dtype, device):
        return self.change(self.source.unit(first, count, dtype, device), first)


def spoiled(change, base=TABLE["net, lms ds"], **options):
    """The row of a set whose points are changed."""

    def make(dimensions, **keywords):
        points = base.make(dimensions, **{**keywords, **options})
        return PointSet(Wrong(points.source, change), dimensions, points.replications, points.randomize, points.order)

    return replace(base, make=make)


def unseeded(points, first):
    return torch.rand_like(points)


WRONG = [
    ("inside_the_cube", spoiled(lambda x, first: x.clamp(max=0.9999) / 0.9999)),
    ("single_precision_rounds_the_same_points", spoiled(lambda x, first: x if x.dtype == torch.float64 else 1 - x)),
    ("same_generator_same_points", spoiled(lambda x, first: torch.rand(x.shape, dtype=x.dtype))),
    ("blocks_are_parts_of_the_whole", spoiled(lambda x, first: x.roll(1, 1))),
    ("replications_are_independent_and_uniform", spoiled(lambda x, first: x[:1].expand_as(x))),
    ("replications_are_independent_and_uniform", spoiled(lambda x, first: x**2)),
    ("replications_are_independent_and_uniform", spoiled(lambda x, first: x[..., :1].expand_as(x))),
    ("projections_are_balanced", Row(Independent, base=2)),
    ("projections_are_balanced", replace(TABLE["halton, dp"], of_dimension=None, base=2)),
    (
        "compiled_and_plain_code_agree",
        spoiled(lambda x, first: x if bits.compiled() is not None else x + 2.0**-53),
    ),
    ("says_what_is_wrong", Row(lambda dimensions, replications=1, generator=None: Independent(
        max(1, dimensions), replications=max(1, replications), generator=generator))),
]  # fmt: skip


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    with torch.random.fork_rng(), pytest.raises((AssertionError, pytest.fail.Exception)):
        LAWS[law](wrong, generator)


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)
