"""Walks that do not turn back: their law, their variance beside the chain's, and their twins."""

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.optim.chains import base_chain
from kullback.optim.srrw_simulation import MeanOf, follow
from kullback.optim.visit_orders import EdgeState, non_backtracking, non_backtracking_by_steps, shuffled_visits

NODES = 9


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def graph():
    """A ring with chords and a node that only one edge leads to."""
    adjacency = torch.zeros(NODES, NODES)
    for node in range(NODES - 1):
        adjacency[node, (node + 1) % (NODES - 1)] = 1.0
    for one, other in ((0, 3), (0, 5), (2, 6), (4, NODES - 1)):
        adjacency[one, other] = 1.0
    return adjacency + adjacency.T


def law():
    return 0.5 + torch.rand(NODES, generator=seeded(4), dtype=torch.float64)


CHAINS = {
    "mh": lambda: base_chain(graph()), "mh, target": lambda: base_chain(graph(), law()),
    "srw": lambda: base_chain(graph(), kind="srw"), "lazy": lambda: base_chain(graph(), law(), "lazy"),
    "max_degree": lambda: base_chain(graph(), law(), "max_degree"),
}  # fmt: skip


def pairs_of(chain):
    matrix = chain.matrix()
    return [(i, j) for i in range(NODES) for j in range(NODES) if i != j and matrix[i, j] > 0]


def edge_matrix(chain, accept):
    """The walk as a chain on pairs (from, at), written out from its rule."""
    matrix, pairs = chain.matrix(), pairs_of(chain)
    place, found = {pair: k for k, pair in enumerate(pairs)}, torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for (i, j), row in place.items():
        others = [k for k in range(NODES) if k not in (i, j) and matrix[j, k] > 0]
        found[row, row] += matrix[j, j]
        turning = matrix[j, i].item()
        for k in others:
            instead = matrix[j, i] * accept(matrix[j, k] / matrix[j, i]) / len(others)
            found[row, place[j, k]] += matrix[j, k] + instead
            turning -= instead.item()
        found[row, place[j, i]] += turning
    return found


def occupied(matrix, pairs):
    """The stationary law of nodes."""
    size = len(matrix)
    system = torch.cat([matrix.T - torch.eye(size, dtype=torch.float64), torch.ones(1, size, dtype=torch.float64)])
    right = torch.cat([torch.zeros(size, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    edges = torch.linalg.lstsq(system, right.unsqueeze(1)).solution[:, 0]
    return edges, torch.zeros(NODES, dtype=torch.float64).index_add(0, torch.tensor([j for _, j in pairs]), edges)


def asymptotic_variance(matrix, stationary, values):
    """n times the variance of the mean of values along the chain, in the limit."""
    centred = values - stationary @ values
    size = len(matrix)
    solved = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrix + stationary.expand(size, -1), centred)
    return (stationary * (2 * centred * solved - centred.square())).sum().item()


@pytest.mark.parametrize("name", CHAINS)
def test_its_law_is_the_target_and_it_varies_less(name):
    chain = CHAINS[name]()
    pairs = pairs_of(chain)
    matrix = edge_matrix(chain, lambda ratio: min(1.0, ratio.item() ** 2))
    edges, nodes = occupied(matrix, pairs)
    torch.testing.assert_close(nodes, chain.target, rtol=0, atol=1e-10)
    for seed in range(5):
        f = torch.randn(NODES, generator=seeded(seed), dtype=torch.float64)
        on_edges = f[torch.tensor([j for _, j in pairs])]
        plain = asymptotic_variance(chain.matrix(), chain.target, f)
        assert asymptotic_variance(matrix, edges, on_edges) < plain + 1e-9
    if name != "srw":  # where all neighbours are alike, any rule does
        for wrong in (lambda ratio: 1.0, lambda ratio: min(1.0, ratio.item())):
            assert (occupied(edge_matrix(chain, wrong), pairs)[1] - chain.target).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["mh, target", "srw"])
def test_it_moves_by_that_rule(name):
    chain = CHAINS[name]()
    pairs, runs = pairs_of(chain), 4000
    matrix = edge_matrix(chain, lambda ratio: min(1.0, ratio.item() ** 2))
    place = {pair: k for k, pair in enumerate(pairs)}
    for i, j in pairs[::3]:
        begin = EdgeState(torch.full((runs,), j), torch.full((runs,), i))
        state, nodes = non_backtracking(chain, 1, state=begin, generator=seeded(1))
        assert torch.equal(state.node, nodes[:, 0])
        ends = [place[pair] for pair in zip(state.before.tolist(), state.node.tolist(), strict=True)]
        share = torch.tensor(ends).bincount(minlength=len(pairs)) / runs
        row = matrix[place[i, j]]
        assert bool(((share - row).abs() <= 6 * (row * (1 - row) / runs).sqrt() + 1e-9).all())


def test_simple_walks_turn_back_at_dead_ends_only():
    _, nodes = non_backtracking(CHAINS["srw"](), 5000, runs=2, start=0, generator=seeded(2))
    turned = nodes[:, 2:] == nodes[:, :-2]
    assert bool((nodes[:, 1:-1][turned] == NODES - 1).all())
    assert int(turned.sum()) > 50


@pytest.mark.parametrize("name", CHAINS)
def test_compiled_walks_are_their_twins_and_go_on(name):
    pytest.importorskip("numba")
    chain = CHAINS[name]()
    ends = [non_backtracking(chain, 300, runs=3, compiled=flag, generator=seeded(3)) for flag in (None, False)]
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][0].before, ends[1][0].before)
    source = seeded(3)
    middle, first = non_backtracking(chain, 120, runs=3, generator=source)
    _, second = non_backtracking(chain, 180, state=middle, generator=source)
    assert torch.equal(torch.cat([first, second], 1), ends[0][1])
    uniforms = torch.zeros(1, 1, 3, dtype=torch.float64)
    _, none = non_backtracking_by_steps(chain, EdgeState(torch.tensor([0]), torch.tensor([-1])), uniforms)
    assert none.item() == int(chain.row(0)[0][0])


def test_orders_drive_an_optimizer():
    values = torch.randn(NODES, 2, generator=seeded(5), dtype=torch.float64)
    nodes = shuffled_visits(NODES, 3 * NODES + 2, runs=4, generator=seeded(6))
    for epoch in nodes[:, : 3 * NODES].view(4, 3, NODES).flatten(0, 1):
        assert epoch.sort().values.tolist() == list(range(NODES))
    assert not torch.equal(nodes[0, :NODES], nodes[1, :NODES])
    ends = follow(MeanOf(values), torch.zeros(2), nodes, b=1.0, lr=1.0)
    expected = torch.stack([values[row].sum(0) for row in nodes]) / (nodes.shape[1] + 1)
    torch.testing.assert_close(ends, expected)  # steps 1 / (n + 1) from 0: the mean, with a zero among the values
    half = follow(MeanOf(values), torch.zeros(2), nodes[:, :11], b=1.0)
    torch.testing.assert_close(follow(MeanOf(values), half, nodes[:, 11:], first=11, b=1.0, compiled=False), expected)


def test_what_is_refused():
    chain = CHAINS["mh"]()
    for options in ({"visits": -1}, {"visits": 1, "runs": 0}, {"visits": 1, "start": NODES}):
        with pytest.raises(ConfigError):
            non_backtracking(chain, generator=seeded(0), **options)
    with pytest.raises(ConfigError, match="nodes and runs"):
        shuffled_visits(0, 3, generator=seeded(0))
    with pytest.raises(ShapeError, match="nodes are"):
        follow(MeanOf(torch.zeros(3, 2)), torch.zeros(3, 2), torch.zeros(4, 5).long())
