"""Reversible Markov chains on graphs, the base of walks over nodes, as compressed sparse rows.

    P_ij = min(1 / d_i, mu_j / (mu_i d_j))        "mh": Metropolis and Hastings, any target mu
    P_ij = 1 / d_i                                "srw": the simple random walk, mu proportional to degrees d
    P_ij = min(1, mu_j / mu_i) / max d            "max_degree"

for edges i ~ j; what a row lacks to 1 stays at its node. "lazy" before a name (alone: of "mh") is (I + P) / 2.

Shapes: N nodes, E entries of P that are not zero: starts [N + 1], neighbours and probabilities [E], target [N].
Source: Metropolis et al. 1953; Hastings 1970.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["Chain", "base_chain", "independent_chain"]

_TOLERANCE = 1e-8
_KINDS = ("mh", "srw", "max_degree")


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain P that is reversible with respect to a positive target mu: mu_i P_ij = mu_j P_ji.

    starts [N + 1], neighbours [E] (int64) and probabilities [E] (float64) are the rows of P; target [N] sums to 1.
    Make one with `base_chain`, `independent_chain` or `Chain.of`, which check it.
    """

    starts: Tensor
    neighbours: Tensor
    probabilities: Tensor
    target: Tensor

    @classmethod
    def of(cls, transition: Any, target: Tensor) -> Chain:
        """The chain of a matrix P [N, N], a tensor or a sparse array of scipy, with its target mu [N], scaled to sum 1.

        Raises DataError when P is not stochastic, not reversible (the worst pair is named) or not connected, or when
        mu is not positive; ShapeError for shapes that do not fit.

        >>> Chain.of(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([1.0, 2.0])).nodes
        2
        """
        matrix = _sparse(transition)
        mu = _positive(target, matrix.shape[0], "the target")
        if matrix.nnz and not (np.isfinite(matrix.data).all() and matrix.data.min() >= 0.0):
            raise DataError("a transition matrix has finite entries, none negative: check P")
        off = np.abs(matrix.sum(axis=1) - 1.0)
        if off.max() > _TOLERANCE:
            row = int(off.argmax())
            raise DataError(f"row {row} of the transition matrix sums to {1.0 + off[row]:.9g} or so and not to 1")
        flow = matrix.multiply(mu[:, None]).tocsr()
        difference = abs(flow - flow.T).tocoo()
        if difference.nnz and difference.data.max() > _TOLERANCE:
            worst = int(difference.data.argmax())
            i, j = int(difference.row[worst]), int(difference.col[worst])
            raise DataError(
                f"the chain is not reversible: mu_i P_ij and mu_j P_ji differ by {difference.data[worst]:.3g} for "
                f"nodes {i} and {j}; make it with base_chain, or give the target that it is reversible for"
            )
        _check_connected(matrix)
        return cls(
            torch.from_numpy(matrix.indptr.astype(np.int64)), torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data), torch.from_numpy(mu),
        )  # fmt: skip

    @property
    def nodes(self) -> int:
        return len(self.target)

    @property
    def width(self) -> int:
        """The largest number of nodes that one node leads to."""
        return int(self.starts.diff().max())

    def row(self, node: int) -> tuple[Tensor, Tensor]:
        """The nodes that a node leads to, and their probabilities."""
        span = slice(int(self.starts[node]), int(self.starts[node + 1]))
        return self.neighbours[span], self.probabilities[span]

    def matrix(self) -> Tensor:
        """P as a dense matrix [N, N]."""
        rows = torch.repeat_interleave(torch.arange(self.nodes), self.starts.diff())
        dense = torch.zeros(self.nodes, self.nodes, dtype=torch.float64)
        dense[rows, self.neighbours] = self.probabilities
        return dense


def base_chain(adjacency: Any, target: Tensor | None = None, kind: str = "mh") -> Chain:
    """The chain of `kind` on an undirected graph.

    adjacency [N, N]: a tensor or a sparse array of scipy, symmetric; entries that are not zero are edges, and those on
    the diagonal are left out. target [N]: positive, by default uniform; for "srw" it is the law of the degrees.
    Raises ConfigError for an unknown kind or a target that "srw" cannot have, DataError for a graph that is directed or
    not connected.

    >>> base_chain(torch.tensor([[0, 1, 1], [1, 0, 0], [1, 0, 0]])).matrix()[1]
    tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    lazy = kind.startswith("lazy")
    name = (kind.removeprefix("lazy").removeprefix("_") or "mh") if lazy else kind
    if name not in _KINDS:
        raise ConfigError(f"kind is one of {', '.join(_KINDS)}, or lazy before one of them, not {kind!r}")
    edges = _edges(adjacency)
    nodes, degrees = edges.shape[0], np.diff(edges.indptr).astype(np.float64)
    if name == "srw" and target is not None:
        raise ConfigError("a simple random walk has the law of the degrees as its target: leave target out, or take mh")
    mu = degrees if name == "srw" else np.ones(nodes) if target is None else _positive(target, nodes, "the target")
    rows, columns = np.repeat(np.arange(nodes), np.diff(edges.indptr)), edges.indices
    ratio = mu[columns] / mu[rows]
    if name == "mh":
        values = np.minimum(1.0 / degrees[rows], ratio / degrees[columns])
    elif name == "max_degree":
        values = np.minimum(1.0, ratio) / degrees.max()
    else:
        values = 1.0 / degrees[rows]
    if lazy:
        values = 0.5 * values
    staying = 1.0 - np.bincount(rows, values, nodes)
    staying[staying < 1e-12] = 0.0  # rounding is not a reason to stay
    return _assembled(rows, columns, values, staying, mu / mu.sum())


def _assembled(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, staying: np.ndarray, mu: np.ndarray) -> Chain:
    from scipy.sparse import coo_array

    kept = np.flatnonzero(staying)
    entries = np.concatenate([values, staying[kept]])
    places = (np.concatenate([rows, kept]), np.concatenate([columns, kept]))
    return Chain.of(coo_array((entries, places), shape=(len(mu), len(mu))), torch.from_numpy(mu))


def independent_chain(target: Tensor) -> Chain:
    """P = 1 mu': every node is drawn from the target, whatever came before; N^2 entries.

    >>> independent_chain(torch.tensor([1.0, 3.0])).matrix()
    tensor([[0.2500, 0.7500],
            [0.2500, 0.7500]], dtype=torch.float64)
    """
    mu = torch.from_numpy(_positive(target, len(target), "the target"))
    return Chain.of(mu.expand(len(mu), -1), mu)


def _sparse(matrix: Any) -> Any:
    """The matrix as a sparse array of float64 by rows, in order and without zeros."""
    from scipy.sparse import csr_array, issparse

    content = matrix if issparse(matrix) else torch.as_tensor(matrix).detach().to("cpu", torch.float64).numpy()
    if content.ndim != 2 or content.shape[0] != content.shape[1] or content.shape[0] == 0:
        raise ShapeError(f"a matrix over nodes is square, [N, N] with N of at least 1, and got {content.shape}")
    rows = csr_array(content, dtype=np.float64, copy=True)
    rows.sum_duplicates()
    rows.eliminate_zeros()
    rows.sort_indices()
    return rows


def _edges(adjacency: Any) -> Any:
    edges = _sparse(adjacency)
    edges.data[:] = 1.0
    edges.setdiag(0.0)
    edges.eliminate_zeros()
    one_way = (edges - edges.T).tocoo()
    one_way.eliminate_zeros()
    if one_way.nnz:
        i, j = int(one_way.row[0]), int(one_way.col[0])
        raise DataError(f"the graph is directed: nodes {i} and {j} have an edge one way only; make it symmetric")
    _check_connected(edges)
    if edges.nnz == 0:
        raise DataError("a graph of one node has no edges to walk on")
    return edges


def _check_connected(matrix: Any) -> None:
    from scipy.sparse.csgraph import connected_components

    count, labels = connected_components(matrix, directed=False)
    if count > 1:
        other = int(np.flatnonzero(labels != labels[0])[0])
        raise DataError(f"the graph falls into {count} parts: no path leads from node 0 to node {other}; connect them")


def _positive(values: Tensor, nodes: int, what: str) -> np.ndarray:
    """A positive law over nodes, scaled to sum 1."""
    law = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    if law.shape != (nodes,):
        raise ShapeError(f"{what} has a value for each of {nodes} nodes, [{nodes}], and got {law.shape}")
    if not (np.isfinite(law).all() and law.min() > 0.0):
        raise DataError(f"{what} must be positive and finite at every node, and is {law.min():.3g} at its lowest")
    return law / law.sum()
