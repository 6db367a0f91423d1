"""A judge of pairs that is asked once about each pair, and remembered across batches.

A policy of short answers, or one that is sure of some, gives the same pairs again and again over the epochs, and a
judge is often a language model: what it said of (prompt, first, second) is kept, the pairs used longest ago forgotten.
The order in which the two are shown is part of what is asked, unless the judge is declared not to mind it.

Source: arXiv 2505.19731 and the practice of judging both orders.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kullback.core.errors import ConfigError, RewardError

__all__ = ["Judge", "RememberedJudge"]

# (prompts, firsts, seconds) -> the chances that the first is preferred
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], Any]
_Pair = tuple[str, str, str]


class RememberedJudge:
    """A judge as any other, of (prompts, firsts, seconds), that asks the one within only about what it does not know.

    size: pairs that are remembered between calls, 0 for a judge that learns or draws; within a call none is asked
    twice. symmetric: P(second over first) = 1 - P(first over second) holds for this judge, so that one order, that of
    the texts' letters, is asked and serves both; by default where the judge has an attribute `symmetric` that is true.
    asked, known: pairs that the judge was asked about and those it was not. Raises ConfigError for a size below 0 and
    RewardError for answers that are not a chance for each pair, of which none is remembered.

    >>> judge = RememberedJudge(lambda prompts, a, b: [float(len(x) > len(y)) for x, y in zip(a, b)])
    >>> judge(["p", "p"], ["long", "a"], ["a", "long"]), judge(["p"], ["long"], ["a"])
    ([1.0, 0.0], [1.0])
    >>> judge.asked, judge.known
    (2, 1)
    """

    def __init__(self, judge: Judge, *, size: int = 65536, symmetric: bool | None = None) -> None:
        if size < 0:
            raise ConfigError(f"size is a number of pairs, 0 to remember none, got {size}")
        self.judge, self.size = judge, size
        self.symmetric = bool(getattr(judge, "symmetric", False)) if symmetric is None else symmetric
        self.asked, self.known = 0, 0
        self._said: OrderedDict[_Pair, float] = OrderedDict()
        self._lock = threading.Lock()  # a call that took too long may be left behind and end beside the next one
        self.__name__ = str(getattr(judge, "__name__", type(judge).__name__))

    def __len__(self) -> int:
        return len(self._said)

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """The chances [N] that the first is preferred."""
        pairs = [self._pair(*row) for row in zip(prompts, firsts, seconds, strict=True)]
        # What this call needs is taken out at once: the memory may be smaller than the call.
        with self._lock:
            said = {pair: self._said[pair] for pair, _ in pairs if pair in self._said}
        unknown = list(dict.fromkeys(pair for pair, _ in pairs if pair not in said))
        if unknown:
            said.update(zip(unknown, self._ask(unknown), strict=True))
        with self._lock:
            self.asked, self.known = self.asked + len(unknown), self.known + len(pairs) - len(unknown)
            for pair, _ in pairs:
                self._said[pair] = said[pair]
                self._said.move_to_end(pair)
            while len(self._said) > self.size:
                self._said.popitem(last=False)
        return [1.0 - said[pair] if turned else said[pair] for pair, turned in pairs]

    def _pair(self, prompt: str, first: str, second: str) -> tuple[_Pair, bool]:
        """What is asked, and whether it is asked the other way round."""
        if self.symmetric and second < first:
            return (prompt, second, first), True
        return (prompt, first, second), False

    def _ask(self, pairs: Sequence[_Pair]) -> list[float]:
        prompts, firsts, seconds = (list(column) for column in zip(*pairs, strict=True))
        found = torch.as_tensor(self.judge(prompts, firsts, seconds), dtype=torch.float32)
        if found.shape != (len(pairs),) or not ((found >= 0) & (found <= 1)).all():
            got = f"{tuple(found.shape)} values, first {found.flatten()[:4].tolist()}"
            raise RewardError(f"a judge gives a chance in [0, 1] for each of {len(pairs)} pairs, got {got}")
        chances: list[float] = found.tolist()
        return chances
