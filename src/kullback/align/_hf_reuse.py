"""Completions that serve for several steps: the prompts come as often, and each step has its rows of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kullback.core.rng import generator

__all__ = ["RepeatedPrompts", "rows_of_use"]


class RepeatedPrompts(Sampler[int]):
    """Numbers of prompts in an order of their own each epoch, those of every step `repeats` times.

    a_step: prompts that a step takes in all processes; what is left of the prompts at an epoch's end is left out.

    >>> torch.tensor(list(RepeatedPrompts(5, a_step=2, repeats=2, seed=0))).view(2, 2, 2).unique(dim=1).shape
    torch.Size([2, 1, 2])
    """

    def __init__(self, prompts: int, *, a_step: int, repeats: int, seed: int) -> None:
        self.prompts, self.a_step = prompts, min(a_step, prompts)
        self.repeats, self.seed, self.epoch = repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.prompts // self.a_step * self.a_step * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.prompts, generator=generator(self.seed, "prompts", self.epoch)).tolist()
        for start in range(0, self.prompts // self.a_step * self.a_step, self.a_step):
            for _ in range(self.repeats):
                yield from order[start : start + self.a_step]


def rows_of_use(batch: Mapping[str, Any], use: int, parts: int, *, seed: tuple[int, ...]) -> dict[str, Any]:
    """The rows of a batch at its use number `use`, when each epoch over it is cut into `parts`, in a new order each."""
    rows = len(batch["input_ids"])
    order = torch.randperm(rows, generator=generator(seed[0], "mini-batches", *seed[1:], use // parts))
    chosen = order[use % parts :: parts].to(batch["input_ids"].device)
    return {
        name: part[chosen] if isinstance(part, Tensor) and part.shape[:1] == (rows,) else part
        for name, part in batch.items()
    }
