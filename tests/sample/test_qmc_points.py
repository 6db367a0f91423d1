"""Low-discrepancy points: equality with peers, exact values, scrambles, and the variance that theory gives."""

import math
import warnings

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.sample import qmc
from kullback.sample.qmc import (
    DigitalNet,
    DigitalNetB2,
    Faure,
    Halton,
    Independent,
    Lattice,
    Sobol,
    bits,
    direction_numbers,
)
from kullback.sample.qmc.digits import digit_count, matrix_scramble, nested_digits
from kullback.sample.qmc.generating_vectors import construct_vector, korobov_vector, squared_error, stored_vector
from kullback.sample.qmc.nets import linear_scramble


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(bits, "_kernels", lambda name: None)


@pytest.fixture(autouse=True)
def _origin_without_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the first point is the origin")
        yield


# --- exact points ---


@pytest.mark.parametrize("dimensions", [1, 3, 100, 1000])
def test_sobol_in_gray_order_is_scipys(dimensions):
    engine = pytest.importorskip("scipy.stats").qmc.Sobol(dimensions, scramble=False, bits=32)
    ours = Sobol(dimensions, randomize=None, order="gray").points(300).numpy()
    assert (ours == engine.random_base2(9)[:300]).all()


def test_sobol_lattice_and_faure_are_qmcpys():
    qmcpy = pytest.importorskip("qmcpy")
    for order, name in (("natural", "RADICAL INVERSE"), ("gray", "GRAY")):
        theirs = qmcpy.DigitalNetB2(7, randomize=False, order=name)(256, warn=False)
        assert (Sobol(7, randomize=None, order=order).points(256).numpy() == theirs).all()
    lattice = qmcpy.Lattice(9, randomize=False)
    vector = lattice.gen_vec[0].astype(np.int64)
    for order in ("natural", "gray", "linear"):
        theirs = qmcpy.Lattice(9, randomize=False, order=order.upper())(256, warn=False)
        assert (Lattice(9, randomize=None, order=order, vector=vector).points(256).numpy() == theirs).all()
    theirs = qmcpy.Faure(6, randomize=False)(343, warn=False)
    assert np.abs(Faure(6, randomize=None).points(343).numpy() - theirs).max() <= 2**-52


def test_halton_is_scipys_to_a_rounding():
    # peers add digit by digit in floating point; here a point is the quotient of two exact integers
    engine = pytest.importorskip("scipy.stats").qmc.Halton(20, scramble=False)
    ours = Halton(20, randomize=None).points(1000).numpy()
    assert np.abs(ours - engine.random(1000)).max() <= 2**-52
    assert Halton(3, randomize=None).points(5, 6).tolist() == [[5 / 8, 7 / 9, 1 / 25]]


def test_interlaced_points_of_order_two():
    expected = [[0, 0, 0], [0.75, 0.75, 0.75], [0.4375, 0.9375, 0.1875], [0.6875, 0.1875, 0.9375]]
    assert DigitalNetB2(3, randomize=None, alpha=2).points(4).tolist() == expected
    # woven from neighbouring dimensions, not from j and j + d
    plain = Sobol(6, randomize=None).points(4, as_bits=True)
    assert torch.equal(bits.to_unit(bits.interlace(plain, 2, 63, 63)), torch.tensor(expected, dtype=torch.float64))
    wrong = bits.interlace(plain[:, [0, 3, 1, 4, 2, 5]], 2, 63, 63)
    assert bits.to_unit(wrong).tolist() != expected


def test_a_net_in_base_three_and_its_order_two():
    matrices = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 2, 1]], [[2, 0, 0], [1, 2, 0], [0, 2, 2]]])
    points = DigitalNet(3, matrices, randomize=None).points(9)
    assert (points * 9).round().tolist() == [[0, 0], [3, 6], [6, 3], [1, 5], [4, 2], [7, 8], [2, 7], [5, 4], [8, 1]]
    woven = DigitalNet(3, matrices, randomize=None, alpha=2).points(9).squeeze(-1)
    assert (woven * 81).round().tolist() == [0, 45, 63, 14, 32, 77, 25, 43, 61]


def test_base_two_digital_net_is_the_same_as_the_general_one():
    matrices = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [0, 1, 1]]])
    columns = (matrices * torch.tensor([4, 2, 1])).sum(-1)
    general = DigitalNet(2, matrices, randomize=None).points(8)
    assert torch.equal(general, DigitalNetB2(2, randomize=None, matrices=columns, digits=3).points(8))
    reversed_digits = bits.reverse_bits(columns, 3)
    other = DigitalNetB2(2, randomize=None, matrices=reversed_digits, digits=3, most_significant_first=False)
    assert torch.equal(general, other.points(8))


def test_natural_order_needs_no_gray_code_and_linear_order_is_multiples():
    vector = [1, 3]
    linear = Lattice(2, randomize=None, vector=vector, order="linear").points(8)
    assert torch.equal(linear, torch.arange(8)[:, None] * torch.tensor(vector) / 8.0 % 1.0)
    natural = Lattice(2, randomize=None, vector=vector).points(8)
    assert torch.equal(natural, linear[bits.reverse_bits(torch.arange(8), 3)])
    gray = Lattice(2, randomize=None, vector=vector, order="gray").points(8)
    assert torch.equal(gray, natural[torch.arange(8) ^ (torch.arange(8) >> 1)])


# --- scrambles ---


def test_matrix_scramble_multiplies_by_a_unit_lower_triangle(generator):
    digits, width = 6, 9
    columns = torch.randint(1 << digits, (2, 5), generator=generator)
    state = generator.get_state()
    scrambled = linear_scramble(columns, digits, width, 3, generator)
    # the columns of L are what the scramble makes of the columns of the identity
    identity = (1 << torch.arange(digits - 1, -1, -1)).expand(2, -1)
    left = linear_scramble(identity, digits, width, 3, generator.set_state(state))
    places = torch.arange(width - 1, -1, -1)
    dense = (left.unsqueeze(-1) >> places) & 1  # [R, d, column, row]
    assert all(dense[..., k, k].all() and not dense[..., k, :k].any() for k in range(digits))
    vector = (columns.unsqueeze(-1) >> torch.arange(digits - 1, -1, -1)) & 1
    product = torch.einsum("rdkt,dmk->rdmt", dense.double(), vector.double()).long() % 2
    assert torch.equal((product << places).sum(-1), scrambled)


def test_matrix_scramble_in_other_bases_keeps_leading_digits_apart(generator):
    bases = torch.tensor([3, 7])
    columns = torch.eye(5, dtype=torch.int64).expand(2, 5, 5)
    scrambled = matrix_scramble(columns, bases, 4, generator)
    assert scrambled.shape == (4, 2, 5, 5)
    for k in range(5):
        assert not scrambled[:, :, k, :k].any()
        assert (scrambled[:, :, k, k] > 0).all()
    assert (scrambled < bases[:, None, None]).all()


def common_digits(first, second, width):
    """How many leading binary digits two integers share."""
    return width - torch.frexp((first ^ second).double()).exponent


@pytest.mark.parametrize("numba", [True, False])
def test_nested_scrambling_keeps_the_common_digits_of_every_pair(generator, numba, monkeypatch):
    if not numba:
        monkeypatch.setattr(bits, "_kernels", lambda name: None)
    values = bits.random_bits(1, 200, 2, width=40, generator=generator)
    values[:, 100:] = values[:, :100] ^ (1 << torch.arange(100) % 40)[:, None]
    keys = bits.random_bits(1, 2, generator=generator)
    scrambled = bits.scramble_nested(values, keys, 40)
    before = common_digits(values[:, :100], values[:, 100:], 40)
    assert torch.equal(before, common_digits(scrambled[:, :100], scrambled[:, 100:], 40))
    assert torch.equal(before.flatten()[::2].sort().values, (39 - torch.arange(100) % 40).sort().values)
    # a digital shift keeps them too, but it turns all nodes of a level alike, which nested scrambling does not
    level = 12
    flips = ((values ^ scrambled) >> (39 - level)) & 1
    assert 0.2 < flips.double().mean() < 0.8
    # digits that are cut off are zero
    assert not (bits.scramble_nested(values, keys, 40, 21) & ((1 << 19) - 1)).any()
    assert torch.equal(bits.scramble_nested(values, keys, 40, 21) >> 19, scrambled >> 19)


def test_nodes_of_the_scrambling_tree_flip_fairly_and_independently():
    count = 6000
    keys = bits.random_bits(count, 1, generator=stream(3, "keys"))
    values = torch.arange(8).expand(count, 8).unsqueeze(-1)
    scrambled = bits.scramble_nested(values, keys, 3).squeeze(-1)
    flips = scrambled ^ values.squeeze(-1)
    top, middle = flips >> 2 & 1, flips >> 1 & 1
    low = flips & 1
    assert (top == top[:, :1]).all()
    nodes = torch.stack([top[:, 0], middle[:, 0], middle[:, 4], low[:, 0], low[:, 2], low[:, 4], low[:, 6]], 1)
    assert torch.equal(middle, nodes[:, [1, 1, 1, 1, 2, 2, 2, 2]])
    assert torch.equal(low, nodes[:, [3, 3, 4, 4, 5, 5, 6, 6]])
    centred = nodes.double() - 0.5
    error = 0.25 / math.sqrt(count)
    products = centred.mT @ centred / count
    assert (centred.mean(0).abs() < 12 * error).all()
    assert ((products - 0.25 * torch.eye(7)).abs() < 6 * error).all()


def test_nested_permutations_are_uniform_in_base_three():
    keys = bits.random_bits(900, generator=stream(4, "keys"))
    digits = torch.tensor([[a, b] for a in range(3) for b in range(3)])
    scrambled = torch.stack([nested_digits(digits, key, 3) for key in keys])
    assert (scrambled[:, :3, 0] == scrambled[:, :1, 0]).all()  # one permutation for the first digit
    first = scrambled[:, [0, 3, 6], 0]
    assert torch.equal(first.sort(1).values, torch.arange(3).expand(900, 3))
    kinds = first @ torch.tensor([9, 3, 1])
    counts = kinds.unique(return_counts=True)[1].double()
    assert len(counts) == 6
    assert (counts - 150).abs().max() < 6 * math.sqrt(900 / 6 * 5 / 6)
    for start in (0, 3, 6):
        assert torch.equal(scrambled[:, start : start + 3, 1].sort(1).values, torch.arange(3).expand(900, 3))
    # the second digit's permutation differs between nodes
    assert not torch.equal(scrambled[:, :3, 1], scrambled[:, 3:6, 1])


VARIANCES = {
    # of the mean of x over n points: strata move together, or each by itself
    "lattice": (lambda g, r: Lattice(1, replications=r, generator=g), 2),
    "net, ds": (lambda g, r: Sobol(1, randomize="ds", replications=r, generator=g), 2),
    "net, lms ds": (lambda g, r: Sobol(1, randomize="lms ds", replications=r, generator=g), 3),
    "net, nus": (lambda g, r: Sobol(1, randomize="nus", replications=r, generator=g), 3),
    "halton, nus": (lambda g, r: Halton(1, randomize="nus", replications=r, generator=g), 3),
    "independent": (lambda g, r: Independent(1, replications=r, generator=g), 1),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_variance_of_a_linear_function_is_what_theory_gives(name, generator):
    make, power = VARIANCES[name]
    replications, count = 3000, 16
    means = make(generator, replications).points(count).mean((1, 2))
    exact = 1.0 / (12 * count**power)
    assert abs((means.var() / exact).item() - 1.0) < 6 * math.sqrt(2.0 / replications)
    assert abs(means.mean().item() - 0.5) < 6 * math.sqrt(exact / replications)


def test_scrambled_nets_of_higher_order_converge_faster():
    def rmse(alpha, count):
        points = DigitalNetB2(1, alpha=alpha, replications=200, generator=stream(0, "order", alpha)).points(count)
        return (points * points.exp() - 1.0).mean((1, 2)).square().mean().sqrt().item()

    plain, second = (math.log2(rmse(a, 16) / rmse(a, 256)) / 4 for a in (1, 2))
    assert 1.3 < plain < 1.9
    assert second > 2.2


# --- generating vectors ---


def test_squared_error_of_one_dimension_is_two_zeta():
    for levels in (3, 6, 10):
        exact = 2.0 * math.pi**2 / 6 / 4**levels
        assert squared_error(torch.tensor([1]), torch.tensor([1.0]), levels) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("levels", [3, 5, 8])
def test_component_by_component_is_greedy(levels):
    weights = 1.0 / torch.arange(1, 5, dtype=torch.float64) ** 2
    vector = construct_vector(4, lowest=levels, highest=levels)
    for j in range(1, 4):
        tried = [
            squared_error(torch.cat([vector[:j], torch.tensor([z])]), weights, levels) for z in range(1, 1 << levels, 2)
        ]
        assert squared_error(vector[: j + 1], weights, levels) <= min(tried) * (1 + 1e-9)


def test_embedded_vectors_are_good_at_every_level():
    weights = 1.0 / torch.arange(1, 5, dtype=torch.float64) ** 2
    embedded = construct_vector(4, lowest=4, highest=9)
    for levels in range(4, 10):
        best = construct_vector(4, lowest=levels, highest=levels)
        assert squared_error(embedded, weights, levels) < 1.6 * squared_error(best, weights, levels)
    random = 1 + 2 * torch.randint(256, (4,), generator=stream(0, "vector"))
    worst = max(
        squared_error(random, weights, levels) / squared_error(embedded, weights, levels) for levels in (6, 8, 9)
    )
    assert worst > 1.6


def test_stored_vector_is_odd_distinct_and_beats_a_random_one():
    vector, limit = stored_vector(100)
    assert limit == 1 << 20
    assert (vector % 2 == 1).all()
    assert len(vector.unique()) == 100
    weights = 1.0 / torch.arange(1, 11, dtype=torch.float64) ** 2
    random = 1 + 2 * torch.randint(1 << 15, (10,), generator=stream(0, "vector"))
    assert squared_error(vector[:10], weights, 12) < 0.6 * squared_error(random, weights, 12)


@pytest.mark.slow
def test_stored_vector_is_what_the_construction_gives():
    assert torch.equal(construct_vector(3, lowest=5, highest=20), stored_vector(3)[0])


# --- interfaces and errors ---


def test_bits_are_the_points(generator):
    points = Sobol(3, alpha=2, replications=2, generator=generator)
    integers = points.points(100, as_bits=True)
    assert integers.dtype == torch.int64
    assert torch.equal(points.points(100), (integers >> 10).double() * 2.0**-53)
    narrow = Sobol(3, width=40, generator=generator)
    assert (narrow.points(64, as_bits=True) < 1 << 40).all()
    assert torch.equal(bits.from_unit(narrow.points(64), 40), narrow.points(64, as_bits=True))


def test_no_point_rounds_to_one():
    top = torch.tensor([(1 << 63) - 1])
    assert bits.to_unit(top).item() == 1 - 2.0**-53
    assert bits.to_unit(top, dtype=torch.float32).item() == 1 - 2.0**-24
    assert top.double().item() * 2.0**-63 == 1.0  # the plain conversion, which does
    assert all(base ** digit_count(base) <= 1 << 53 < base ** (digit_count(base) + 1) for base in (2, 3, 5, 7, 541))


def test_scipy_engine(generator):
    engine_of = pytest.importorskip("kullback.sample.qmc.engine").Engine
    points = Sobol(3, generator=generator)
    engine = engine_of(points)
    both = np.concatenate([engine.random(10), engine.fast_forward(2).random(4)])
    whole = points.points(16).numpy()
    assert (both == np.delete(whole, [10, 11], 0)).all()
    assert (engine.reset().random(5) == whole[:5]).all()
    assert engine.integers(0, u_bounds=5, n=7).shape == (7, 3)
    with pytest.raises(ConfigError, match="replications"):
        engine_of(Sobol(2, replications=2, generator=generator))


def test_everything_works_without_numba(without_numba, generator):
    assert Sobol(2, generator=generator).points(8).shape == (8, 2)
    assert Halton(2, randomize="nus", generator=generator).points(8).shape == (8, 2)
    assert torch.allclose(qmc.fwht(torch.eye(8)) @ qmc.fwht(torch.eye(8)), torch.eye(8), atol=1e-6)


def test_unrandomized_points_warn_of_the_origin():
    plain = Sobol(2, randomize=None)
    with pytest.warns(UserWarning, match="origin"):
        plain.points(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.points(1, 3)


BAD = {
    "an unknown randomization": (lambda g: Sobol(2, randomize="owen", generator=g), "randomize is one of"),
    "no generator": (lambda g: Sobol(2), "needs a generator"),
    "equal replications": (lambda g: Sobol(2, randomize=None, replications=3), "all be the same"),
    "an order": (lambda g: Sobol(2, order="linear", generator=g), "order is"),
    "order zero": (lambda g: Sobol(2, alpha=0, generator=g), "at least 1"),
    "too many dimensions": (lambda g: Sobol(21_202, randomize=None), "21201"),
    "order times dimensions": (lambda g: Sobol(10_601, alpha=2, randomize=None), "21201"),
    "too few digits": (lambda g: Sobol(2, width=31, generator=g), "32"),
    "too many digits": (lambda g: Sobol(2, width=64, generator=g), "63"),
    "negative matrices": (lambda g: Sobol(1, matrices=torch.tensor([[-1]]), generator=g), "integers"),
    "linear blocks": (lambda g: Lattice(2, order="linear", generator=g).points(4, 8), "no blocks"),
    "a linear count": (lambda g: Lattice(2, order="linear", generator=g).points(6), "power of 2"),
    "bits of a lattice": (lambda g: Lattice(2, generator=g).points(4, as_bits=True), "binary digits"),
    "bits of halton": (lambda g: Halton(2, generator=g).points(4, as_bits=True), "binary digits"),
    "a lattice too wide": (lambda g: Lattice(513, generator=g), "construct_vector"),
    "an even vector entry": (lambda g: Lattice(1, vector=[0], generator=g), "positive"),
    "a shift for a net": (lambda g: Lattice(2, randomize="lms", generator=g), "none, shift"),
    "digits beyond the base": (lambda g: DigitalNet(2, torch.full((1, 2, 2), 2), generator=g), "below its base"),
    "two bases woven": (
        lambda g: DigitalNet([2, 3], torch.ones(2, 2, 2, dtype=torch.int64), alpha=2, generator=g),
        "one base",
    ),
    "a net's last point": (lambda g: DigitalNet(2, torch.eye(3).long()[None], generator=g).points(9), "8 points"),
    "an even multiplier": (lambda g: korobov_vector(3, 4), "odd"),
    "levels": (lambda g: construct_vector(2, lowest=6, highest=5), "lowest first"),
    "no generator for independent points": (lambda g: Independent(2, generator=None), "generator"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, generator):
    call, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        call(generator)


def test_bad_shapes_and_a_missing_table(generator, monkeypatch):
    with pytest.raises(ShapeError, match=r"\[3, m\]"):
        Sobol(3, matrices=torch.ones(2, 4, dtype=torch.int64), generator=generator)
    with pytest.raises(ShapeError, match="vector has 3"):
        Lattice(3, vector=[1, 2], generator=generator)
    with pytest.raises(ShapeError, match="alpha d, m, t"):
        DigitalNet(2, torch.ones(2, 2), generator=generator)
    monkeypatch.setattr(direction_numbers, "find_spec", lambda name: None)
    direction_numbers._direction_numbers.cache_clear()
    with pytest.raises(DataError, match="matrices of your own"):
        direction_numbers.sobol_matrices(2)
    direction_numbers._direction_numbers.cache_clear()
