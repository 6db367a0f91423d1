"""Actions that are sets of atoms, with a cost for each (chapter 7 of the book): semi-bandits and perturbed leaders.

An action is a row of zeros and ones over d atoms, and costs the sum of its atoms' costs.

    semi-bandit Hedge   Hedge over actions on fake costs c_t(e) 1{e in S_t} / Pr(e in S_t), with a share of exploration
                        that is spread over actions which together hold every atom
    perturbed leader    a_t = M(v_0 + sum of costs so far): only needs an oracle M(v) = argmin v . a. With |a . v| and
                        |v|_1 at most U, v_0 uniform on [0, 1/e]^d and e = root(d/T)/U, regret <= 2 U root(dT)
    with semi-bandit feedback the inverse of Pr(e in S_t) is the number of fresh draws until e is in one, at most `cap`

Oracles: top-m, shortest path in a directed acyclic graph, spanning tree, assignment.
Sources: Slivkins (arXiv 1904.07272), chapter 7; Kalai and Vempala 2005; Neu and Bartok 2013 (geometric resampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream.bandits._policy import Floats, Saved, floats, vector
from kullback.stream.bandits._policy import draw as draw_arm

__all__ = ["FPL", "SemiBanditHedge", "assignment", "covering_actions", "shortest_path", "spanning_tree", "top_m"]

Oracle = Callable[[Floats], Floats]


def top_m(atoms: int, m: int) -> Oracle:
    """The oracle for sets of exactly m atoms: the m of least cost."""
    if not 1 <= m <= atoms:
        raise ConfigError(f"m lies in 1..{atoms}, the number of atoms, and is {m}")

    def oracle(costs: Floats) -> Floats:
        action = np.zeros(atoms)
        action[np.argsort(vector("costs", costs, atoms), kind="stable")[:m]] = 1.0
        return action

    return oracle


def shortest_path(edges: Sequence[tuple[int, int]], source: int, target: int) -> Oracle:
    """The oracle for paths: atoms are edges (tail, head) of a graph whose nodes are numbered so that tail < head.

    Costs may be negative. Raises DataError when no path leads from source to target.
    """
    if not all(tail < head for tail, head in edges):
        raise ConfigError("edges go from a lower number to a higher one: number the nodes in topological order")
    order = sorted(range(len(edges)), key=lambda edge: edges[edge][0])

    def oracle(costs: Floats) -> Floats:
        values = vector("costs", costs, len(edges))
        distance, via = {source: 0.0}, {}
        for edge in order:
            tail, head = edges[edge]
            if tail in distance and distance[tail] + values[edge] < distance.get(head, math.inf):
                distance[head], via[head] = distance[tail] + float(values[edge]), edge
        if target not in distance:
            raise DataError(f"no path leads from node {source} to node {target}")
        action, node = np.zeros(len(edges)), target
        while node != source:
            action[via[node]] = 1.0
            node = edges[via[node]][0]
        return action

    return oracle


def spanning_tree(edges: Sequence[tuple[int, int]]) -> Oracle:
    """The oracle for spanning trees of a connected graph: atoms are edges (node, node); Kruskal's algorithm."""
    nodes = {node for edge in edges for node in edge}

    def oracle(costs: Floats) -> Floats:
        parent = {node: node for node in nodes}

        def root(node: int) -> int:
            while parent[node] != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        action = np.zeros(len(edges))
        for edge in np.argsort(vector("costs", costs, len(edges)), kind="stable").tolist():
            one, other = root(edges[edge][0]), root(edges[edge][1])
            if one != other:
                parent[one] = other
                action[edge] = 1.0
        if action.sum() != len(nodes) - 1:
            raise DataError("the graph is not connected: it has no spanning tree")
        return action

    return oracle


def assignment(size: int) -> Oracle:
    """The oracle for perfect matchings of size x size: atom i * size + j matches row i with column j."""

    def oracle(costs: Floats) -> Floats:
        rows, columns = linear_sum_assignment(vector("costs", costs, size * size).reshape(size, size))
        action = np.zeros((size, size))
        action[rows, columns] = 1.0
        return action.reshape(-1)

    return oracle


def covering_actions(actions: Floats) -> Any:
    """Numbers of actions that together hold every atom, chosen greedily; DataError for an atom that is in none."""
    missing = np.flatnonzero(actions.sum(axis=0) == 0)
    if len(missing):
        raise DataError(f"atoms {missing.tolist()} are in no action: leave them out")
    chosen, left = [], np.ones(actions.shape[1], dtype=np.bool_)
    while left.any():
        chosen.append(int((actions * left).sum(axis=1).argmax()))
        left &= actions[chosen[-1]] == 0
    return np.array(chosen)


class SemiBanditHedge(Saved):
    """Hedge over a list of actions [N, d] when the costs of the played action's atoms are seen.

    Give horizon for rate root(2 ln N / (T d)) and mixing min(1/2, that rate x the number of covering actions), or both
    of rate and mixing. Atom costs lie in [0, 1].
    """

    _saved = ("log_weights",)

    def __init__(
        self, actions: Any, *, horizon: int | None = None, rate: float | None = None, mixing: float | None = None
    ) -> None:
        self.actions = floats(actions)
        if self.actions.ndim != 2 or self.actions.size == 0 or not np.isin(self.actions, (0.0, 1.0)).all():
            raise ShapeError(f"actions are a table [N, d] of zeros and ones, and have shape {self.actions.shape}")
        self.covering = covering_actions(self.actions)
        if horizon is not None:
            count, atoms = self.actions.shape
            rate = math.sqrt(2.0 * math.log(max(count, 2)) / (horizon * atoms)) if rate is None else rate
            mixing = min(0.5, rate * len(self.covering)) if mixing is None else mixing
        if rate is None or mixing is None or not (rate > 0.0 and 0.0 <= mixing <= 1.0):
            raise ConfigError(f"horizon, or rate > 0 with mixing in [0, 1], is needed: {horizon}, {rate}, {mixing}")
        self.rate, self.mixing = rate, mixing
        self.log_weights = np.zeros(len(self.actions))

    def reset(self) -> None:
        """Forget everything."""
        self.log_weights[:] = 0.0

    def probabilities(self, context: Any = None) -> Floats:
        """The law [N] of the next action."""
        law = np.exp(self.log_weights)
        law *= (1.0 - self.mixing) / law.sum()
        law[self.covering] += self.mixing / len(self.covering)
        return law

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The number of the next action."""
        return draw_arm(self.probabilities(), generator)

    def update(self, arm: int, costs: Any, context: Any = None) -> None:
        """Learn the costs [d] of the atoms of action `arm`; the entries of other atoms are not looked at."""
        seen = self.actions[arm] > 0
        values = np.where(seen, floats(costs), 0.0)
        if values.shape != seen.shape or not (values.min() >= 0.0 and values.max() <= 1.0):
            raise DataError(f"costs of the action's atoms are {len(seen)} numbers, in [0, 1] where it has an atom")
        included = self.probabilities() @ self.actions
        self.log_weights -= self.rate * (self.actions @ (values / included))
        self.log_weights -= self.log_weights.max()


class FPL(Saved):
    """Follow the perturbed leader over whatever actions an oracle chooses from.

    oracle: costs [d] to the action [d] that minimises their product; horizon and bound U set the size of the noise
    v_0, or `noise`, its scale, does: uniform on [0, noise], or minus an exponential number of that mean. cap: of the
    draws for semi-bandit feedback, by default root(d T). Drawn afresh each round, which an adaptive adversary asks for.
    """

    _saved = ("costs",)

    def __init__(
        self,
        oracle: Oracle,
        atoms: int,
        *,
        horizon: int | None = None,
        bound: float = 1.0,
        noise: float | None = None,
        perturbation: str = "uniform",
        cap: int | None = None,
    ) -> None:
        if (horizon is None) == (noise is None):
            raise ConfigError("either horizon or noise sets the perturbation: give one of the two")
        if perturbation not in ("uniform", "exponential"):
            raise ConfigError(f'perturbation is "uniform" or "exponential", not {perturbation!r}')
        size = bound * math.sqrt((horizon or 0) / atoms) if noise is None else noise
        if not (size > 0.0 and atoms >= 1 and (cap is None or cap >= 1)):
            raise ConfigError(f"atoms and cap are at least 1 and the noise positive: {atoms}, {cap}, {size}")
        self.oracle, self.atoms, self.noise, self.perturbation = oracle, atoms, size, perturbation
        self.cap = cap or (max(1, math.ceil(math.sqrt(atoms * horizon))) if horizon else 1000)
        self.costs = np.zeros(atoms)

    def reset(self) -> None:
        """Forget everything."""
        self.costs[:] = 0.0

    def play(self, *, generator: torch.Generator) -> Floats:
        """The next action [d]."""
        draws = torch.empty(self.atoms, dtype=torch.float64)
        if self.perturbation == "uniform":
            return self.oracle(self.costs + self.noise * draws.uniform_(generator=generator).numpy())
        return self.oracle(self.costs - self.noise * draws.exponential_(generator=generator).numpy())

    def observe(self, costs: Any) -> None:
        """Full feedback: the costs [d] of all atoms."""
        self.costs += vector("costs", costs, self.atoms)

    def update(self, action: Any, costs: Any, *, generator: torch.Generator) -> None:
        """Semi-bandit feedback: the costs of the played action's atoms; entries of others are not looked at.

        Each is multiplied by the number of fresh draws until its atom is in one, whose mean is 1 / Pr(atom), up to cap.
        """
        waiting = np.asarray(action) > 0
        if waiting.shape != (self.atoms,):
            raise ShapeError(f"an action has {self.atoms} entries, and came with shape {waiting.shape}")
        values = vector("costs", np.where(waiting, floats(costs), 0.0), self.atoms)
        draws = np.zeros(self.atoms)
        for _ in range(self.cap):
            if not waiting.any():
                break
            draws += waiting
            waiting = waiting & (self.play(generator=generator) == 0)
        self.costs += values * draws
