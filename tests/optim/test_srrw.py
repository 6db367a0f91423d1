"""Self-repellent walks: their kernel, their limits by theory and by simulation, and what drives an optimizer."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.optim.chains import Chain, base_chain, independent_chain
from kullback.optim.srrw import SRRW, srrw_kernel, start_walk, stationary_of, walk, walk_by_steps
from kullback.optim.srrw_simulation import GeneralizedLinear, MeanOf, simulate, step_sizes
from kullback.optim.srrw_theory import chain_spectrum, optimization_covariance, sampling_covariance

KINDS = ("mh", "srw", "max_degree", "lazy", "lazy_srw", "lazy_max_degree")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def graph(nodes=20, share=0.18, seed=3):
    """A ring with chords."""
    index = torch.arange(nodes)
    chords = torch.rand(nodes, nodes, generator=seeded(seed)) < share
    chords[index, (index + 1) % nodes] = True
    return (chords | chords.T).double()


def law(nodes=20, seed=4):
    return 0.5 + torch.rand(nodes, generator=seeded(seed), dtype=torch.float64)


def histories(count, nodes=20, seed=5):
    return torch.rand(count, nodes, generator=seeded(seed), dtype=torch.float64) + 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_base_chains_are_stochastic_and_reversible(kind):
    adjacency = graph()
    chain = base_chain(adjacency, None if kind.endswith("srw") else law(), kind)
    matrix, mu = chain.matrix(), chain.target
    torch.testing.assert_close(matrix.sum(1), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.unsqueeze(1) * matrix, (mu.unsqueeze(1) * matrix).T, rtol=0, atol=1e-15)
    torch.testing.assert_close(mu, adjacency.fill_diagonal_(0).sum(1) / adjacency.sum() if kind.endswith("srw") else mu)
    if kind.startswith("lazy"):
        plain = base_chain(adjacency, None if kind.endswith("srw") else law(), kind[5:] or "mh").matrix()
        torch.testing.assert_close(matrix, 0.5 * (torch.eye(20, dtype=torch.float64) + plain))
    assert chain.width == int((matrix > 0).sum(1).max())
    near, probabilities = chain.row(3)
    torch.testing.assert_close(matrix[3, near], probabilities)


def test_metropolis_and_hastings_by_hand():
    path = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    matrix = base_chain(path, torch.tensor([1.0, 2.0, 1.0])).matrix()
    expected = torch.tensor([[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(
        base_chain(path).matrix(), torch.tensor([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 5.0, 60.0])
def test_kernel_is_reversible_for_its_law_and_scale_free(alpha):
    chain, x = base_chain(graph(), law()), histories(30)
    kernel, pi = srrw_kernel(chain, x, alpha), stationary_of(chain, x, alpha)
    torch.testing.assert_close((pi.unsqueeze(-2) @ kernel).squeeze(-2), pi, rtol=0, atol=1e-12)
    flow = pi.unsqueeze(-1) * kernel
    torch.testing.assert_close(flow, flow.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(srrw_kernel(chain, 1e9 * x, alpha), kernel, rtol=0, atol=1e-12)
    torch.testing.assert_close(srrw_kernel(chain, chain.target, alpha), chain.matrix(), rtol=0, atol=1e-14)
    torch.testing.assert_close(stationary_of(chain, chain.target, alpha), chain.target, rtol=0, atol=1e-14)
    weights = (x / chain.target) ** -alpha
    plain = chain.matrix() * weights.unsqueeze(-2)
    torch.testing.assert_close(kernel, plain / plain.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)
    swapped = (plain / plain.sum(-1, keepdim=True)).mT  # a kernel by columns is not one
    assert (swapped.sum(-1) - 1.0).abs().max() > 0.01 or alpha == 0.0


def test_the_law_has_the_derivative_of_the_theory():
    chain, alpha, step = base_chain(graph(), law()), 3.0, 1e-5
    mu, one = chain.target, torch.ones(20, dtype=torch.float64)
    slope = 2 * alpha * torch.outer(mu, one) - alpha * chain.matrix().T - alpha * torch.eye(20, dtype=torch.float64)
    directions = histories(5)
    directions = directions - directions.mean(1, keepdim=True)
    for direction in directions:
        above, below = (stationary_of(chain, mu + sign * step * mu.min() * direction, alpha) for sign in (1, -1))
        found = (above - below) / (2 * step * mu.min())
        torch.testing.assert_close(found, slope @ direction, rtol=0, atol=1e-6)
        assert (found - (slope - alpha * torch.eye(20)) @ direction).abs().max() > 0.1


OPTIONS = [
    {}, {"a": 1.0}, {"a": 0.51}, {"weight_power": 0.0}, {"weight_power": 2.5}, {"warm_up": 300}, {"cap": 3.0},
    {"tokens": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 20.0, 200.0])
def test_the_compiled_walk_is_the_dense_formula_step_by_step(alpha, options):
    rule = SRRW(base_chain(graph(), law()), alpha, **options)
    begin = start_walk(rule, runs=3, generator=seeded(1))
    slow, expected = walk(rule, begin, 1500, generator=seeded(2), compiled=False)
    fast, found = walk(rule, begin, 1500, generator=seeded(2))
    assert torch.equal(found, expected)
    assert torch.equal(fast.node, slow.node)
    torch.testing.assert_close(fast.history, slow.history, rtol=1e-11, atol=1e-14)
    source = seeded(2)
    middle, first = walk(rule, begin, 701, generator=source)
    _, second = walk(rule, middle, 799, generator=source)
    assert torch.equal(torch.cat([first, second], 1), expected)


def dense(rule, uniforms):
    """One run straight from the equations."""
    x, node, visited = rule.chain.target.clone(), 0, []
    for visit, number in enumerate(uniforms.tolist(), start=1):
        row = srrw_kernel(rule.chain, x, rule.alpha)[node]
        near = rule.chain.row(node)[0]
        node = int(near[int((row[near].cumsum(0) <= number).sum().clamp(max=len(near) - 1))])
        gamma = (visit + 1) ** -rule.a
        x = (1 - gamma) * x
        x[node] += gamma
        visited.append(node)
    return visited


def test_ten_thousand_steps_as_from_the_equations():
    rule, source = SRRW(base_chain(graph(), law()), 4.0, 0.8), seeded(7)
    uniforms = torch.rand(10_000, 1, generator=seeded(7), dtype=torch.float64)
    _, found = walk(rule, start_walk(rule, start=0), 10_000, generator=source)
    assert found[0].tolist() == dense(rule, uniforms[:, 0])
    assert found[0].tolist() != dense(replace(rule, alpha=3.9), uniforms[:, 0])


def test_alpha_zero_is_the_base_chain():
    chain = base_chain(graph(), law())
    rule = SRRW(chain, 0.0, 1.0)
    state, nodes = walk(rule, start_walk(rule, start=0), 20_000, generator=seeded(8))
    uniforms, node = torch.rand(20_000, generator=seeded(8), dtype=torch.float64), 0
    cumulative = chain.matrix().cumsum(1)
    for number, found in zip(uniforms.tolist(), nodes[0].tolist(), strict=True):
        node = int((cumulative[node] <= number).sum())
        assert node == found
    counts = nodes[0].bincount(minlength=20) + chain.target
    torch.testing.assert_close(state.history[0], counts / counts.sum(), rtol=1e-12, atol=0)


def test_weighted_histories():
    chain = base_chain(graph(), law())
    for power in (0.0, 1.0, 2.5):
        rule = SRRW(chain, 2.0, weight_power=power)
        weights = torch.arange(1, 20_001, dtype=torch.float64) ** power
        torch.testing.assert_close(rule.steps(0, 19_999), (weights / weights.cumsum(0))[1:], rtol=1e-9, atol=0)
        torch.testing.assert_close(rule.steps(700, 5), rule.steps(0, 705)[700:], rtol=1e-12, atol=0)
    state, nodes = walk(rule, start_walk(rule, start=0), 200, generator=seeded(1))
    visits = torch.zeros(20, dtype=torch.float64).index_add(0, nodes[0], weights[1:201])
    torch.testing.assert_close(state.history[0], (visits + chain.target) / weights[:201].sum(), rtol=1e-9, atol=1e-12)


def test_covariances_of_independent_draws():
    mu = law(7)
    chain = independent_chain(mu)
    mu = chain.target
    plain, alpha = torch.diag(mu) - torch.outer(mu, mu), 3.0
    torch.testing.assert_close(sampling_covariance(chain, alpha, 1.0), plain / (2 * alpha + 1))
    torch.testing.assert_close(sampling_covariance(chain, alpha, 0.8), plain / (2 * alpha + 2))
    torch.testing.assert_close(sampling_covariance(chain, alpha, weight_power=0.0), plain / (2 * alpha + 1))
    force = histories(1, 7)[0].unsqueeze(1)
    force = force - mu @ force
    square, one = force.T @ plain @ force, -torch.eye(1, dtype=torch.float64)
    found = optimization_covariance(chain, force, one, alpha, 0.8, 1.0)
    torch.testing.assert_close(found, square / (alpha + 1) ** 2)
    torch.testing.assert_close(optimization_covariance(chain, force, one, alpha, 0.8, 0.9), 0.5 * found)
    torch.testing.assert_close(optimization_covariance(chain, force, one, alpha, 0.8, 0.6), 0.5 * square)


def test_the_mean_with_equal_steps_is_that_of_the_visits():
    chain, values = base_chain(graph(), law()), histories(3).T.contiguous()
    rule = SRRW(chain, 6.0, 1.0)
    begin = torch.full((20,), 0.05, dtype=torch.float64)
    ends = simulate(
        rule, MeanOf(values), begin @ values, 500, b=1.0, runs=4, history=begin, start=2, generator=seeded(3)
    )
    torch.testing.assert_close(ends.theta[-1], ends.state.history @ values, rtol=1e-10, atol=1e-12)
    force = values - chain.target @ values
    found = optimization_covariance(chain, force, -torch.eye(3, dtype=torch.float64), 6.0, 1.0, 1.0)
    torch.testing.assert_close(found, force.T @ sampling_covariance(chain, 6.0, 1.0) @ force)


def positive(matrix):
    return torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min().item() > -1e-12


def test_covariances_fall_with_alpha_in_the_loewner_order():
    chain = base_chain(graph(), law())
    data = GeneralizedLinear(histories(4).T.contiguous(), torch.arange(20.0, dtype=torch.float64) % 2, 0.2)
    best = data.optimum(chain.target)
    force, drift = data.at(best), data.jacobian(best, chain.target)
    ladder = (0.0, 0.5, 2.0, 10.0, 100.0)
    for case in ((0.7, 0.9), (0.8, 0.8), (1.0, 1.0), (0.9, 0.6)):
        if case == (1.0, 1.0):
            force, drift = 9 * force, 9 * drift  # a rate at which J + I / 2 is stable
        steps = [optimization_covariance(chain, force, drift, alpha, *case) for alpha in ladder]
        if case == (0.9, 0.6):
            assert all(torch.equal(step, steps[0]) for step in steps)
        else:
            assert all(positive(before - after) for before, after in pairwise(steps))
            assert not positive(steps[1] - steps[0])
    for case, order in (((0.7, 0.9), 2), ((0.8, 0.8), 1)):
        ends = [optimization_covariance(chain, force, drift, alpha, *case).trace().item() for alpha in (1e4, 1e5)]
        assert math.log10(ends[0] / ends[1]) == pytest.approx(order, abs=0.01)
    cases = ((0.7, 0.8), (0.8, 0.8), (0.9, 0.8))
    between = [optimization_covariance(chain, force, drift, 5.0, *case) for case in cases]
    assert positive(between[1] - between[0])
    assert positive(between[2] - between[1])
    samples = [sampling_covariance(chain, alpha, 1.0) for alpha in ladder]
    assert all(positive(before - after) for before, after in pairwise(samples))


def test_the_spectrum_gives_the_chain_back():
    chain = base_chain(graph(), law())
    values, vectors = chain_spectrum(chain)
    mu = chain.target
    rebuilt = (vectors * values) @ (vectors / mu.unsqueeze(1)).T + torch.outer(mu, torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(rebuilt, chain.matrix().T, rtol=0, atol=1e-12)


def check_spread(alpha, a, *, steps, runs, tolerance):
    """The simulated trace of the sampling covariance within a share of the theory's."""
    chain = base_chain(graph())
    rule = SRRW(chain, alpha, a)
    state, _ = walk(rule, start_walk(rule, runs=runs, generator=seeded(11)), steps, generator=seeded(12))
    found = (state.history - chain.target).square().sum(1).mean().item() * (steps + 1) ** a
    expected = sampling_covariance(chain, alpha, a).trace().item()
    assert found == pytest.approx(expected, rel=tolerance)
    return found


def test_visits_spread_as_the_theory_says():
    for alpha in (0.0, 2.0):
        check_spread(alpha, 1.0, steps=4000, runs=1500, tolerance=0.10)
    with pytest.raises(AssertionError):
        check_spread(2.0, 0.7, steps=300, runs=500, tolerance=0.01)


@pytest.mark.slow
def test_visits_spread_within_five_percent():
    for alpha in (0.0, 1.0, 2.0):
        check_spread(alpha, 1.0, steps=20_000, runs=2000, tolerance=0.05)


@pytest.mark.slow
def test_an_optimizer_spreads_as_the_theory_says():
    chain, values = base_chain(graph()), histories(3).T.contiguous()
    field = MeanOf(values)
    best = field.optimum(chain.target)
    for alpha, a, b, tolerance in ((0.0, 0.7, 1.0, 0.1), (1.0, 0.7, 1.0, 0.15), (2.0, 0.8, 0.8, 0.12)):
        ends = simulate(
            SRRW(chain, alpha, a), field, best, 20_000, b=b, runs=1000, generator=seeded(13)
        ).theta[-1]
        found = (ends - best).square().sum(1).mean().item() * 20_001**b
        drift = -torch.eye(3, dtype=torch.float64)
        expected = optimization_covariance(chain, values - best, drift, alpha, a, b).trace().item()
        assert found == pytest.approx(expected, rel=tolerance), (alpha, a, b)


def test_two_nodes_alternate():
    chain = base_chain(torch.tensor([[0, 1], [1, 0]]))
    rule = SRRW(chain, 5.0, 1.0)
    _, nodes = walk(rule, start_walk(rule, start=0), 50, generator=seeded(0))
    assert nodes[0].tolist() == 25 * [1, 0]
    assert sampling_covariance(chain, 5.0, 1.0).abs().max() < 1e-15
    assert sampling_covariance(chain, 0.0, 1.0).abs().max() < 1e-15


FIELDS = {
    "mean": MeanOf(histories(3).T.contiguous()),
    "logistic": GeneralizedLinear(histories(3).T.contiguous(), torch.arange(20.0, dtype=torch.float64) % 2, 0.3),
    "identity": GeneralizedLinear(histories(3).T.contiguous(), law(), 0.0, "identity"),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "options", [{}, {"tokens": 3}, {"tokens": 3, "private": True}, {"radius": 0.3}], ids=str
)
def test_compiled_recursions_are_their_twins(name, options):
    options = dict(options)
    rule = SRRW(base_chain(graph(), law()), 5.0, tokens=options.pop("tokens", 1))
    ends = [
        simulate(
            rule, FIELDS[name], torch.ones(3), [1, 40, 200], runs=3, lr=0.7, compiled=compiled, generator=seeded(5),
            **options,
        )
        for compiled in (None, False)
    ]  # fmt: skip
    torch.testing.assert_close(ends[0].theta, ends[1].theta, rtol=1e-11, atol=1e-13)
    if "radius" in options:
        assert ends[0].theta.norm(dim=-1).max() <= 0.3 + 1e-12
    plain = simulate(
        rule, lambda theta, nodes: FIELDS[name](theta, nodes), torch.ones(3), [1, 40, 200], runs=3, lr=0.7,
        generator=seeded(5), **options,
    )  # fmt: skip
    torch.testing.assert_close(plain.theta, ends[0].theta, rtol=1e-11, atol=1e-13)


def test_fields_have_their_derivatives_and_optima():
    mu = base_chain(graph(), law()).target
    for name in ("logistic", "identity"):
        field = FIELDS[name]
        theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(lambda point, field=field: mu @ field.at(point), theta)
        torch.testing.assert_close(field.jacobian(theta, mu), slope)
        assert (mu @ field.at(field.optimum(mu))).abs().max() < 1e-12
    lost = GeneralizedLinear(torch.ones(20, 1, dtype=torch.float64), torch.ones(20, dtype=torch.float64))
    with pytest.raises(DataError, match="ridge"):
        lost.optimum(mu)


def test_shared_and_private_histories_both_reach_the_mean():
    chain, field = base_chain(graph(), law()), FIELDS["mean"]
    best = field.optimum(chain.target)
    errors = {}
    for name, tokens, private in (("one", 1, False), ("shared", 4, False), ("private", 4, True)):
        rule = SRRW(chain, 5.0, 0.7, tokens=tokens)
        ends = simulate(rule, field, best, 2000, b=0.9, runs=100, private=private, generator=seeded(2)).theta[-1]
        errors[name] = (ends - best).square().sum(1).mean().item()
    assert errors["shared"] < 0.5 * errors["one"]
    assert errors["private"] < 0.5 * errors["one"]


BAD_CHAINS = [
    (torch.tensor([[0.5, 0.4], [0.5, 0.5]]), torch.ones(2), DataError, "row 0"),
    (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), torch.ones(2), DataError, "negative"),
    (torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.ones(2), DataError, "nodes 0 and 1"),
    (torch.eye(2), torch.ones(2), DataError, "parts"),
    (torch.full((2, 2), 0.5), torch.tensor([1.0, 0.0]), DataError, "positive"),
    (torch.full((2, 2), 0.5), torch.ones(3), ShapeError, "each of 2 nodes"),
    (torch.full((2, 3), 0.5), torch.ones(2), ShapeError, "square"),
    (torch.full((2, 2), math.nan), torch.ones(2), DataError, "finite"),
]


@pytest.mark.parametrize(("matrix", "mu", "kind", "words"), BAD_CHAINS)
def test_bad_chains_are_refused(matrix, mu, kind, words):
    with pytest.raises(kind, match=words):
        Chain.of(matrix, mu)


def test_bad_graphs_are_refused():
    with pytest.raises(DataError, match="directed"):
        base_chain(torch.tensor([[0, 1], [0, 0]]))
    with pytest.raises(DataError, match="no path leads from node 0 to node 2"):
        base_chain(torch.block_diag(1 - torch.eye(2), 1 - torch.eye(2)))
    with pytest.raises(DataError, match="one node"):
        base_chain(torch.ones(1, 1))
    with pytest.raises(ConfigError, match="leave target out"):
        base_chain(graph(), law(), "srw")
    with pytest.raises(ConfigError, match="kind is one of"):
        base_chain(graph(), kind="gibbs")


def test_bad_options_are_refused():
    chain = base_chain(graph())
    wrong = [
        ({"alpha": -1.0}, "alpha"), ({"alpha": math.nan}, "alpha"), ({"a": 0.5}, "1/2"), ({"a": 1.1}, "1/2"),
        ({"cap": 1.0}, "cap"), ({"warm_up": -1}, "warm_up"), ({"tokens": 0}, "tokens"),
        ({"weight_power": -1.0}, "power"),
    ]  # fmt: skip
    for options, words in wrong:
        with pytest.raises(ConfigError, match=words):
            SRRW(chain, **{"alpha": 1.0, **options})
    rule = SRRW(chain, 1.0)
    with pytest.raises(ConfigError, match="generator"):
        start_walk(rule)
    with pytest.raises(ConfigError, match="outside"):
        start_walk(rule, start=20)
    with pytest.raises(DataError, match="infinite weight"):
        start_walk(rule, start=0, history=torch.zeros(20))
    with pytest.raises(ShapeError, match="each of 20 nodes"):
        srrw_kernel(chain, torch.ones(19), 1.0)
    with pytest.raises(ConfigError, match="rising"):
        simulate(rule, FIELDS["mean"], torch.zeros(3), [5, 5], generator=seeded(0))
    with pytest.raises(ConfigError, match="radius"):
        simulate(rule, FIELDS["mean"], torch.zeros(3), 5, radius=0.0, generator=seeded(0))
    with pytest.raises(ConfigError, match="b lies in"):
        step_sizes(0, 3, 0.4)
    with pytest.raises(DataError, match="mean field"):
        optimization_covariance(chain, torch.ones(20, 1), -torch.eye(1), 1.0, 0.8, 0.9)
    zero_mean = torch.linspace(-1, 1, 20).unsqueeze(1)
    with pytest.raises(DataError, match="negative"):
        optimization_covariance(chain, zero_mean, -0.4 * torch.eye(1), 1.0, 0.8, 1.0)
    with pytest.raises(ShapeError, match="jacobian"):
        optimization_covariance(chain, zero_mean, -torch.eye(2), 1.0, 0.8, 1.0)


def test_a_strong_walk_from_a_skewed_history_stays_finite():
    rule = SRRW(base_chain(graph()), 500.0, 0.6)
    skewed = torch.full((20,), 1e-12, dtype=torch.float64)
    skewed[3] = 1.0
    begin = start_walk(rule, start=3, history=skewed)
    fast, found = walk(rule, begin, 3000, generator=seeded(1))
    slow, expected = walk_by_steps(rule, begin, torch.rand(3000, 1, generator=seeded(1), dtype=torch.float64).T)
    assert torch.equal(found, expected)
    assert bool(fast.history.isfinite().all())
    torch.testing.assert_close(fast.history, slow.history, rtol=1e-9, atol=1e-15)
