"""Orders of visits to hold a self-repellent walk against: one that does not turn back, and epochs in random order.

A chain P that is reversible for mu is kept from going back to the node i that it came from: at j it draws k from P_j;
if that is i, it takes another neighbour l of j instead, drawn evenly, with probability

    min(1, (P_jl / P_ji)^2),

and otherwise turns back. The visits still follow mu, and no mean over them varies more than that of P in the limit.
For a simple random walk this is the walk that turns back at dead ends only. It remembers one node, and not where it has
been, so that the self-repellent rule does not apply to it.

Shapes: R runs, n visits, N nodes.
Source: Neal 2004; for Metropolis and Hastings, Lee, Xu and Eun 2012, arXiv 1204.4140.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.optim.chains import Chain
from kullback.optim.srrw import loops

__all__ = ["EdgeState", "non_backtracking", "non_backtracking_by_steps", "shuffled_visits"]

_BLOCK = 1 << 19  # triples of uniform numbers that are held at a time


class EdgeState(NamedTuple):
    """node [R], where runs are, and before [R], the last other node that they came from, or -1."""

    node: Tensor
    before: Tensor


def non_backtracking(
    chain: Chain,
    visits: int,
    *,
    runs: int = 1,
    start: int | None = None,
    state: EdgeState | None = None,
    compiled: bool | None = None,
    generator: torch.Generator,
) -> tuple[EdgeState, Tensor]:
    """R walks that do not turn back where they need not, and the nodes visited: int64 [R, visits].

    start: a node for all, None draws from the target; or the state of an earlier call, from which a walk goes on as if
    it had not been cut. compiled: as for `walk`. Raises ConfigError for counts or a start out of range.

    >>> from kullback.optim.chains import base_chain
    >>> ring = base_chain(torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]), kind="srw")
    >>> _, nodes = non_backtracking(ring, 9, start=0, generator=torch.Generator().manual_seed(0))
    >>> len(set(nodes[0, ::4].tolist()))
    1
    """
    if visits < 0 or runs < 1:
        raise ConfigError(f"visits is 0 or more and runs 1 or more, not {visits} and {runs}")
    if state is None:
        if start is None:
            node = torch.multinomial(chain.target, runs, replacement=True, generator=generator)
        elif 0 <= start < chain.nodes:
            node = torch.full((runs,), start)
        else:
            raise ConfigError(f"start is a node from 0 to {chain.nodes - 1}, not {start}")
        state = EdgeState(node, torch.full_like(node, -1))
    module, parts, done = loops(compiled), [], 0
    while done < visits:
        count = min(max(1, _BLOCK // len(state.node)), visits - done)
        uniforms = torch.rand(count, len(state.node), 3, generator=generator, dtype=torch.float64)
        if module is None:
            state, nodes = non_backtracking_by_steps(chain, state, uniforms)
        else:
            state, nodes = EdgeState(*(part.clone() for part in state)), torch.empty(count, len(state.node)).long()
            arrays = (x.numpy() for x in (chain.starts, chain.neighbours, chain.probabilities, *state, uniforms, nodes))
            module.non_backtracking(*arrays)
        parts.append(nodes.T)
        done += count
    return state, torch.cat(parts, 1) if parts else torch.empty(len(state.node), 0, dtype=torch.int64)


def non_backtracking_by_steps(chain: Chain, state: EdgeState, uniforms: Tensor) -> tuple[EdgeState, Tensor]:
    """The naive twin: the visits [n, R] that uniform numbers [n, R, 3] give, one after another."""
    node, before = state.node.tolist(), state.before.tolist()
    visited = []
    for numbers in uniforms.tolist():
        for run, (first, second, third) in enumerate(numbers):
            here, last = node[run], before[run]
            near, shares = chain.row(here)
            other = int(near[min(int((shares.cumsum(0) <= first * shares.sum()).sum()), len(near) - 1)])
            if other == last:
                others = [k for k, place in enumerate(near.tolist()) if place not in (here, last)]
                if others:
                    chosen = others[min(int(second * len(others)), len(others) - 1)]
                    back = shares[near == last].item()
                    if third < (shares[chosen].item() / back) ** 2:
                        other = int(near[chosen])
            if other != here:
                node[run], before[run] = other, here
        visited.append(list(node))
    return EdgeState(torch.tensor(node), torch.tensor(before)), torch.tensor(visited)


def shuffled_visits(nodes: int, visits: int, *, runs: int = 1, generator: torch.Generator) -> Tensor:
    """Epochs of all nodes, each in a fresh random order: int64 [runs, visits].

    >>> shuffled_visits(3, 6, generator=torch.Generator().manual_seed(0)).view(2, 3).sort(1).values
    tensor([[0, 1, 2],
            [0, 1, 2]])
    """
    if nodes < 1 or visits < 0 or runs < 1:
        raise ConfigError(f"nodes and runs are positive and visits not negative, not {nodes}, {runs} and {visits}")
    epochs = -(-visits // nodes)
    order = torch.rand(runs, epochs, nodes, generator=generator, dtype=torch.float64).argsort(2)
    return order.flatten(1)[:, :visits]
