"""What all bandit policies share: their state as data, checks of rewards, draws from a generator, broken ties.

The states are small arrays that change one entry at a time, so they are numpy's; `state_dict` gives them as tensors.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "Floats", "RewardScale", "Saved", "best", "check_arms", "draw", "floats", "restricted", "stream_states", "tie_law",
    "uniform", "vector",
]  # fmt: skip

Floats = NDArray[np.float64]
Arms = Sequence[int]


class Saved:
    """A state that goes out as tensors and numbers and comes back: the attributes named in `_saved`.

    Arrays are loaded in place where their shapes agree, so that views of them stay views.
    """

    _saved: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: tensors, numbers and nested dicts."""
        return {name: _outward(getattr(self, name)) for name in self._saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave. Raises DataError when its names are not those expected here."""
        if set(state) != set(self._saved):
            raise DataError(f"the state of {type(self).__name__} has {sorted(self._saved)}, and got {sorted(state)}")
        for name, value in state.items():
            setattr(self, name, _inward(getattr(self, name), value))


def _outward(value: Any) -> Any:
    if isinstance(value, Saved):
        return value.state_dict()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


def _inward(current: Any, value: Any) -> Any:
    if isinstance(current, Saved):
        current.load_state_dict(value)
        return current
    if isinstance(current, Tensor):
        return value.to(current).clone()
    if isinstance(current, np.ndarray):
        array = np.asarray(value, dtype=current.dtype)
        if array.shape != current.shape:
            return array.copy()
        current[...] = array
        return current
    return list(value) if isinstance(value, list) else value


class RewardScale:
    """Takes rewards of a range (low, high) to [0, 1] and refuses those outside, NaN among them, with a DataError."""

    def __init__(self, reward_range: tuple[float, float] = (0.0, 1.0)) -> None:
        self.low, high = reward_range
        self.width = high - self.low
        if not (math.isfinite(self.low) and math.isfinite(high) and self.width > 0.0):
            raise ConfigError(f"reward_range is (low, high) with low < high, both finite, and is {reward_range}")

    def __call__(self, reward: float) -> float:
        value = (reward - self.low) / self.width
        if not 0.0 <= value <= 1.0:
            high = self.low + self.width
            raise DataError(f"a reward lies in [{self.low}, {high}] and is {reward}: set reward_range to its range")
        return value


def check_arms(arms: int) -> int:
    """The number of arms; ConfigError unless it is a whole number of at least 1."""
    if isinstance(arms, bool) or not isinstance(arms, int | np.integer) or arms < 1:
        raise ConfigError(f"arms is the number of arms, at least 1, and is {arms!r}")
    return int(arms)


def floats(values: Any) -> Floats:
    """A float64 copy of numbers, sequences, arrays or tensors."""
    return np.array(values.detach().cpu().numpy() if isinstance(values, Tensor) else values, dtype=np.float64)


def vector(name: str, values: Any, length: int | None = None) -> Floats:
    """A one-dimensional float64 copy without NaN; ShapeError or DataError says what `name` should have been."""
    array = floats(values)
    if array.ndim != 1 or len(array) == 0 or (length is not None and len(array) != length):
        wanted = "a vector that is not empty" if length is None else f"a vector of {length}"
        raise ShapeError(f"{name} is {wanted}, and has shape {array.shape}")
    if np.isnan(array).any():
        raise DataError(f"{name} has NaN in it: every entry must be a number")
    return array


def restricted(values: Floats, arms: Arms | None, empty: float) -> Floats:
    """The values with `empty` at all arms that are not allowed; DataError for an empty set or an unknown arm."""
    if arms is None:
        return values
    chosen = np.fromiter(arms, dtype=np.int64)
    if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= len(values):
        raise DataError(f"arms is a set of at least one number in 0..{len(values) - 1}, and is {list(chosen)}")
    masked = np.full_like(values, empty)
    masked[chosen] = values[chosen]
    return masked


class _Scratch(threading.local):
    """A number that is drawn into: making a tensor takes longer than the draw."""

    def __init__(self) -> None:
        self.number = torch.empty((), dtype=torch.float64)


_SCRATCH = _Scratch()


def uniform(generator: torch.Generator) -> float:
    """One number of [0, 1) from the generator."""
    return _SCRATCH.number.uniform_(generator=generator).item()


def stream_states(count: int, generator: torch.Generator) -> NDArray[np.uint64]:
    """States [count] for the random streams of compiled loops, from the generator."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).numpy().view(np.uint64)


def best(index: Floats, generator: torch.Generator | None) -> int:
    """The arm of the largest index; ties are broken by the generator, or by the lowest number when it is None."""
    top = int(index.argmax())
    if generator is None:
        return top
    ties = index == index[top]
    count = np.count_nonzero(ties)
    if count == 1:
        return top
    return int(np.flatnonzero(ties)[int(uniform(generator) * count)])


def tie_law(index: Floats) -> Floats:
    """The law of `best`: equal probabilities on all arms of the largest index."""
    ties = (index == index.max()).astype(np.float64)
    return ties / ties.sum()


def draw(weights: Floats, generator: torch.Generator) -> int:
    """An arm with probability proportional to its weight; one of weight 0 is never drawn."""
    cumulated = np.add.accumulate(weights).tolist()  # a list is searched faster than an array
    arm = bisect_right(cumulated, uniform(generator) * cumulated[-1])
    return arm if arm < len(weights) else int(np.flatnonzero(weights)[-1])
