"""What is too long and cut: prompts and completions of the data, and completions that are drawn and do not end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kullback.align.rollouts import Rollouts
    from kullback.jobs._align_data import Examples
    from kullback.jobs.align import ExampleConfig

__all__ = ["CutRollouts", "Cuts", "lengths_over", "said_of_examples", "said_of_rollouts"]

_IN_A_ROW = 5
_MANY = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """The tokens that the prompts and the completions which are cut had before.

    alike: pairs whose sides are the same after it.
    """

    prompts: tuple[int, ...] = ()
    completions: tuple[int, ...] = ()
    alike: int = 0


def lengths_over(rows: Iterable[Sequence[int]], limit: int) -> tuple[int, ...]:
    """The lengths of the rows that have more tokens than the limit.

    >>> lengths_over([[1], [1, 2, 3]], 2)
    (3,)
    """
    return tuple(len(row) for row in rows if len(row) > limit)


def said_of_examples(parts: Sequence[Examples], config: ExampleConfig) -> list[str]:
    """What was cut of the examples, a sentence on prompts and one on completions; none where nothing was."""
    prompts, completions = ([*chain(*(getattr(part.cuts, n) for part in parts))] for n in ("prompts", "completions"))
    said = []
    if prompts:
        said.append(
            f"{len(prompts)} of {sum(map(len, parts))} prompts have over data.prompt_length = {config.prompt_length} "
            f"tokens and lose their beginning (the longest has {max(prompts)}); a reward sees them whole"
        )
    if completions:
        total = sum(len(side) for part in parts for side in part.completions)
        alike = sum(part.cuts.alike for part in parts)
        pairs = "1 pair has" if alike == 1 else f"{alike} pairs have"
        said.append(
            f"{len(completions)} of {total} completions have over data.length = {config.length} tokens, the end token "
            f"among them, and are cut there (the longest has {max(completions)})"
            + (f"; {pairs} nothing left that tells the sides apart" if alike else "")
        )
    return said


class CutRollouts:
    """Says so, once, when over a quarter of the completions of five batches in a row have not ended at the limit."""

    def __init__(self, length: int, tell: Callable[[str], None]) -> None:
        self.length, self.tell, self.told = length, tell, False
        self.shares: deque[float] = deque(maxlen=_IN_A_ROW)

    def __call__(self, rollouts: Rollouts) -> None:
        self.shares.append(1.0 - rollouts.finished.double().mean().item())
        if not self.told and len(self.shares) == _IN_A_ROW and min(self.shares) > _MANY:
            self.told = True
            self.tell(
                f"{fmean(self.shares):.0%} of the completions of {_IN_A_ROW} batches in a row have not ended at "
                f"data.length = {self.length} tokens and are rewarded as they are there: give them more room, or a "
                "reward that wants an end"
            )


def said_of_rollouts(
    events: Mapping[str, Sequence[Mapping[str, Any]]], finished: float | None, length: int
) -> list[str]:
    """How many of the completions that were drawn had not ended, in training and in the last validation."""
    shares = {(name, e["step"]): e["metric/cut"] for name, told in events.items() for e in told if "metric/cut" in e}
    found = {"in training": fmean(shares.values())} if shares else {}
    if finished is not None:
        found["for the last validation"] = 1.0 - finished
    if not any(found.values()):
        return []
    parts = " and ".join(f"{share:.1%} of those drawn {where}" for where, share in found.items())
    return [f"completions that had not ended at data.length = {length} tokens and were cut there: {parts}"]
