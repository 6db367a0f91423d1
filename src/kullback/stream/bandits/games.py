"""Regret minimisers that play each other (chapter 9 of the book).

Zero-sum on M (rows maximise): x and y the average plays of T rounds, R_1 and R_2 the regrets of the two sides,

    max_i (M y)_i - min_j (x M)_j = (R_1 + R_2) / T,

which certifies how far x and y are from minimax, and between whose two ends the value lies. With more players or other
payoffs the empirical joint play is a coarse correlated equilibrium up to the largest regret / T.
Source: Slivkins (arXiv 1904.07272), chapter 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream.bandits._policy import Floats, floats

__all__ = ["BestResponse", "ZeroSum", "coarse_correlated_gap", "play_general", "play_zero_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSum:
    """What came of a zero-sum game: average plays [rows] and [columns], the ends of the value, the regrets."""

    row: Tensor
    column: Tensor
    lower: float
    upper: float
    row_regret: float
    column_regret: float
    rounds: int

    @property
    def certificate(self) -> float:
        """upper - lower: each average play is within this of minimax."""
        return self.upper - self.lower


class BestResponse:
    """A side that knows the other's average play so far and answers it best: the adversary of the minimax theorem.

    costs: for each own action (rows) its cost against each of the other side's actions (columns).
    """

    def __init__(self, costs: Any) -> None:
        self.costs = floats(costs)
        self.total = np.zeros(len(self.costs))

    def probabilities(self, context: Any = None) -> Floats:
        """All on the action of least cost so far; the lowest where several are."""
        return np.eye(len(self.total))[int(self.total.argmin())]

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The action of least cost so far."""
        return int(self.total.argmin())

    def observe(self, costs: Any) -> None:
        """Add up the costs of all actions."""
        self.total += costs


def _teach(learner: Any, action: int, costs: Floats) -> None:
    """Full feedback to those that take it, else the reward of the action alone."""
    if hasattr(learner, "observe"):
        learner.observe(costs)
    else:
        learner.update(action, 1.0 - float(costs[action]), None)


def play_zero_sum(
    payoffs: Any, row: Any, column: Any, rounds: int, *, mixed: bool = False, generator: torch.Generator
) -> ZeroSum:
    """Let two learners play a matrix game [rows, columns] with payoffs in [0, 1] to the row player.

    Learners: policies, or with full feedback `observe(costs)` (Hedge, BestResponse); the cost of rows is 1 - payoff.
    mixed: they play their laws (`probabilities`) in place of draws, for learners with full feedback: no chance is left.
    Raises DataError for payoffs outside [0, 1].
    """
    matrix = floats(payoffs)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ShapeError(f"payoffs are a matrix [rows, columns], and have shape {matrix.shape}")
    if not (matrix.min() >= 0.0 and matrix.max() <= 1.0):
        raise DataError("payoffs lie in [0, 1]: shift and scale the matrix, which changes no play")
    if rounds < 1:
        raise ConfigError(f"rounds are at least 1, and are {rounds}")
    if mixed and not (hasattr(row, "observe") and hasattr(column, "observe")):
        raise ConfigError("mixed play needs learners with full feedback, such as Hedge: leave mixed out")
    rows, columns, earned = np.zeros(len(matrix)), np.zeros(matrix.shape[1]), 0.0
    for _ in range(rounds):
        i = j = 0
        if mixed:
            x, y = row.probabilities(), column.probabilities()
        else:
            i, j = row.pull(None, generator=generator), column.pull(None, generator=generator)
            x, y = np.eye(len(rows))[i], np.eye(len(columns))[j]
        against_column, against_row = matrix @ y, x @ matrix
        _teach(row, i, 1.0 - against_column)
        _teach(column, j, against_row)
        rows, columns, earned = rows + x, columns + y, earned + float(x @ against_column)
    upper, lower = float((matrix @ columns).max()), float((rows @ matrix).min())
    return ZeroSum(
        row=torch.from_numpy(rows / rounds),
        column=torch.from_numpy(columns / rounds),
        lower=lower / rounds,
        upper=upper / rounds,
        row_regret=upper - earned,
        column_regret=earned - lower,
        rounds=rounds,
    )


def play_general(payoffs: Sequence[Any], learners: Sequence[Any], rounds: int, *, generator: torch.Generator) -> Tensor:
    """The empirical joint play, a tensor with one axis a player, of learners in a game of any number of players.

    payoffs: for each player a tensor over all joint actions, in [0, 1].
    """
    tables = [floats(table) for table in payoffs]
    if len(tables) != len(learners) or any(table.shape != tables[0].shape for table in tables):
        raise ShapeError(f"{len(learners)} players need as many payoff tensors of one shape, and got {len(tables)}")
    if tables[0].ndim != len(learners) or not all(t.min() >= 0.0 and t.max() <= 1.0 for t in tables):
        raise DataError("payoff tensors have one axis a player and entries in [0, 1]")
    joint = np.zeros(tables[0].shape)
    for _ in range(rounds):
        actions = [learner.pull(None, generator=generator) for learner in learners]
        joint[tuple(actions)] += 1.0
        for player, learner in enumerate(learners):
            place: list[Any] = list(actions)
            place[player] = slice(None)
            _teach(learner, actions[player], 1.0 - tables[player][tuple(place)])
    return torch.from_numpy(joint / max(rounds, 1))


def coarse_correlated_gap(payoffs: Sequence[Any], joint: Any) -> float:
    """What the player that gains most would gain by leaving the joint play for one fixed action; <= 0 in equilibrium.

    payoffs: one tensor over all joint actions a player; joint: a distribution over them.

    >>> prisoners = torch.tensor([[0.6, 0.0], [1.0, 0.2]])
    >>> round(coarse_correlated_gap([prisoners, prisoners.T], [[1.0, 0.0], [0.0, 0.0]]), 6)
    0.4
    """
    law = floats(joint)
    if not np.isclose(law.sum(), 1.0) or law.min() < 0.0:
        raise DataError("joint is a distribution over joint actions: entries >= 0 that sum to 1")
    gaps = []
    for player, payoff in enumerate(payoffs):
        table = floats(payoff)
        if table.shape != law.shape:
            raise ShapeError(f"payoffs have shape {table.shape} and the joint play {law.shape}: they must agree")
        others = law.sum(axis=player, keepdims=True)
        axes = tuple(axis for axis in range(law.ndim) if axis != player)
        gaps.append(float((table * others).sum(axis=axes).max() - (table * law).sum()))
    return max(gaps)
