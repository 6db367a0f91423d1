"""Policies on a continuum of arms, [0, 1]^d, whose means are Lipschitz: |mean(x) - mean(y)| <= L D(x, y) (chapter 4).

    fixed discretisation   a policy on a mesh of width e = (log T / (T L^2))^(1/(d+2)): regret of order T^((d+1)/(d+2))
    zooming                r(x) = root(exploration log T / (n(x) + 1)); when some arm is in no ball B(x, r(x)/L) of an
                           active one, it becomes active; plays the active arm of the largest mean + 2 r

Zooming adapts to the instance: order T^((z+1)/(z+2)) with the zooming dimension z <= d. Its arms come as it goes along:
`pull` returns the number of an active arm, `points` where it lies. Whether all is covered is looked up on a grid.
Source: Slivkins (arXiv 1904.07272), chapter 4; the radius has exploration 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kullback.core.errors import ConfigError, DataError
from kullback.core.types import Policy
from kullback.stream.bandits._policy import Floats, RewardScale, Saved, stream_states, uniform, vector
from kullback.stream.bandits.stochastic import UCB1

__all__ = ["UniformDiscretization", "Zooming", "grid", "largest_difference", "mesh_size", "zooming_regret"]

Metric = Callable[[Floats, Floats], Floats]


def mesh_size(horizon: int, *, lipschitz: float = 1.0, dimension: int = 1) -> int:
    """The number of cells on each axis, 1/e rounded up, with e = (log T / (T L^2))^(1/(d+2)).

    >>> mesh_size(20_000)
    13
    """
    if not (horizon >= 1 and lipschitz > 0.0 and dimension >= 1):
        raise ConfigError(f"horizon, dimension >= 1 and lipschitz > 0, and got {horizon}, {dimension}, {lipschitz}")
    log = math.log(max(horizon, 2))
    return max(1, math.ceil((horizon * lipschitz**2 / log) ** (1.0 / (dimension + 2))))


def grid(cells: int, dimension: int = 1) -> Floats:
    """The centres [cells^dimension, dimension] of equal cells of the unit cube."""
    axis = (np.arange(cells) + 0.5) / cells
    return np.stack(np.meshgrid(*[axis] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)


def largest_difference(x: Floats, points: Floats) -> Floats:
    """The metric of the largest coordinate: x [d] and points [n, d] to [n]."""
    return np.abs(points - x).max(axis=-1)


class UniformDiscretization:
    """A bandit policy on the centres of equal cells, as many as `mesh_size` says or `cells` on each axis.

    policy: takes the number of arms to a policy, by default UCB1 with the horizon. `points` [K, d] are the arms.
    """

    def __init__(
        self,
        *,
        horizon: int,
        lipschitz: float = 1.0,
        dimension: int = 1,
        cells: int | None = None,
        policy: Callable[[int], Policy] | None = None,
    ) -> None:
        count = mesh_size(horizon, lipschitz=lipschitz, dimension=dimension) if cells is None else cells
        if count < 1:
            raise ConfigError(f"cells on each axis are at least 1, and are {cells}")
        self.points = grid(count, dimension)
        self.policy: Any = policy(len(self.points)) if policy else UCB1(len(self.points), horizon=horizon)

    def reset(self) -> None:
        """Forget everything."""
        self.policy.reset()

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The number of the next arm, which lies at `points` of it."""
        return self.policy.pull(context, generator=generator)

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Count the reward of an arm."""
        self.policy.update(arm, reward, context)

    def state_dict(self) -> dict[str, Any]:
        """The policy's state."""
        return self.policy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` gave."""
        self.policy.load_state_dict(state)


class Zooming(Saved):
    """The zooming algorithm on [0, 1]^d: arms become active where the confidence balls of the others leave room.

    metric: (x [d], points [n, d]) to distances [n], by default the largest difference of coordinates; resolution: cells
    on each axis of the grid on which coverage is looked up, which are also the candidates for activation.

    >>> source, policy = torch.Generator().manual_seed(0), Zooming(horizon=4000, exploration=0.5)
    >>> for _ in range(4000):
    ...     arm = policy.pull(generator=source)
    ...     policy.update(arm, 1.0 - abs(policy.points[arm, 0] - 0.7))
    >>> best = policy.counts.argmax()
    >>> bool(abs(policy.points[best, 0] - 0.7) < 0.1), len(policy.points) < 40
    (True, True)
    """

    _saved = ("points", "counts", "means", "radii", "cover")

    def __init__(
        self,
        *,
        horizon: int,
        lipschitz: float = 1.0,
        dimension: int = 1,
        exploration: float = 2.0,
        metric: Metric = largest_difference,
        resolution: int | None = None,
        reward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not (horizon >= 1 and lipschitz > 0.0 and dimension >= 1 and exploration > 0.0):
            given = f"{horizon}, {lipschitz}, {dimension}, {exploration}"
            raise ConfigError(f"horizon, lipschitz, dimension and exploration are positive, and are {given}")
        self.dimension, self.lipschitz, self.metric = dimension, lipschitz, metric
        self.scale = RewardScale(reward_range)
        self.root_log = math.sqrt(exploration * math.log(max(horizon, 2)))
        count = resolution or max(16, round(4096 ** (1.0 / dimension)))
        self.candidates = grid(count, dimension)
        self.reset()

    def reset(self) -> None:
        """Forget everything: no arm is active."""
        self.points = np.zeros((0, self.dimension))
        self.counts, self.means, self.radii = np.zeros(0), np.zeros(0), np.zeros(0)
        self.cover = np.zeros(len(self.candidates), dtype=np.int64)

    def _covers(self, arm: int, radius: float) -> Any:
        return self.lipschitz * self.metric(self.points[arm], self.candidates) <= radius

    def _activate(self, generator: torch.Generator) -> int:
        free = np.flatnonzero(self.cover == 0)
        point = self.candidates[free[int(uniform(generator) * len(free))]]
        self.points = np.concatenate([self.points, point[None]])
        self.counts, self.means = np.append(self.counts, 0.0), np.append(self.means, 0.0)
        self.radii = np.append(self.radii, self.root_log)
        self.cover += self._covers(len(self.points) - 1, self.root_log)
        return len(self.points) - 1

    def pull(self, context: Any = None, *, generator: torch.Generator) -> int:
        """The number of the next arm, a new one where something is not covered; it lies at `points` of it."""
        if self.cover.min() == 0:
            return self._activate(generator)
        return int((self.means + 2.0 * self.radii).argmax())

    def update(self, arm: int, reward: float, context: Any = None, *, probability: float | None = None) -> None:
        """Count the reward of an active arm, whose ball shrinks."""
        if not 0 <= arm < len(self.points):
            raise DataError(f"arm {arm} is not active: {len(self.points)} arms are")
        self.counts[arm] += 1.0
        self.means[arm] += (self.scale(reward) - self.means[arm]) / self.counts[arm]
        before, after = self.radii[arm], self.root_log / math.sqrt(self.counts[arm] + 1.0)
        self.radii[arm] = after
        self.cover -= self._covers(arm, before) & ~self._covers(arm, after)


def zooming_regret(
    means: Any,
    horizon: int,
    *,
    lipschitz: float = 1.0,
    exploration: float = 2.0,
    steps: Any = None,
    generator: torch.Generator,
) -> tuple[Floats, int]:
    """The pseudo-regret of one run of zooming on [0, 1], compiled, and how many arms were active in the end.

    means [cells]: of coins at the centres of a fine grid; steps: rounds, rising up to the horizon, at which the regret
    is noted, by default the horizon. `Zooming` is the naive twin. Raises MissingExtra without numba.
    """
    from kullback.stream.bandits._compiled_worlds import run_zooming

    truth = vector("means", means)
    if not (truth.min() >= 0.0 and truth.max() <= 1.0):
        raise DataError("the means of coins lie in [0, 1]")
    rounds = np.array([horizon] if steps is None else steps, dtype=np.int64)
    if horizon < 1 or not (np.diff(rounds) > 0).all() or rounds[0] < 1 or rounds[-1] != horizon:
        raise ConfigError(f"steps rise from at least 1 to the horizon, {horizon}, and are {rounds.tolist()}")
    if not (lipschitz > 0.0 and exploration > 0.0):
        raise ConfigError(f"lipschitz and exploration are positive, and are {lipschitz} and {exploration}")
    curve, root_log = np.zeros(len(rounds)), math.sqrt(exploration * math.log(max(horizon, 2)))
    active = run_zooming(truth, truth.max(), root_log, lipschitz, rounds, stream_states(1, generator)[0], curve)
    return curve, int(active)
