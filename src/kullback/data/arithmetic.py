"""Sums with a known answer: the task that `kullback align` has at hand, with demonstrations that are often wrong."""

from __future__ import annotations

import torch

from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.data.examples import Example

__all__ = ["sum_demonstrations", "sum_examples"]

_MISTAKES = (-10, -2, -1, 1, 2, 10)


def sum_examples(limit: int = 20, *, seed: int = 0) -> list[Example]:
    """A prompt "a+b=" for each pair of numbers below limit: the sum is chosen and the `answer`, a mistake is rejected.

    >>> example = sum_examples(3)[5]
    >>> example.prompt, example.chosen, example.others
    ('1+2=', '3', {'answer': '3'})
    """
    if limit < 2:
        raise ConfigError(f"limit must be 2 or more, got {limit}")
    draw = generator(seed, "mistakes")
    found = []
    for a in range(limit):
        for b in range(limit):
            right = str(a + b)
            found.append(
                Example(prompt=f"{a}+{b}=", chosen=right, rejected=_mistake(a + b, draw), others={"answer": right})
            )
    return found


def sum_demonstrations(limit: int = 20, *, copies: int = 16, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer) `copies` times for each pair of numbers; a prompt has its own share of right answers in (0, 1).

    So a model trained on them knows some sums and is unsure of others, as models are before they are aligned.
    """
    draw = generator(seed, "demonstrations")
    pairs = []
    for a in range(limit):
        for b in range(limit):
            share = torch.rand((), generator=draw).item()
            for _ in range(copies):
                right = torch.rand((), generator=draw).item() < share
                pairs.append((f"{a}+{b}=", str(a + b) if right else _mistake(a + b, draw)))
    return pairs


def _mistake(value: int, draw: torch.Generator) -> str:
    choices = [value + step for step in _MISTAKES if value + step >= 0]
    return str(choices[int(torch.randint(len(choices), (), generator=draw))])
