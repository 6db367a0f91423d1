"""Real text for the study of DiDi-Instruct: letters of the prose corpus, and a judge of samples that no model trained.

A text is its lower-case letters with one space between words: 27 symbols. The judge counts what follows up to three
letters in one part of the corpus, and smooths each order by the one below it as Witten and Bell do. Samples are
measured by their negative log-likelihood a letter under it, which stands for the paper's generative perplexity, by the
distance of their bigrams from the text's, and by the entropy within sequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.data.corpora import corpus

__all__ = ["LETTERS", "Judge", "Text", "letters", "prose", "windows"]

LETTERS = "abcdefghijklmnopqrstuvwxyz "
ORDER = 4


def letters(documents: Iterable[str]) -> Tensor:
    """The documents as one row of symbols.

    >>> letters(["Ab, c!", "d"])
    tensor([ 0,  1, 26,  2, 26,  3])
    """
    words = " ".join(re.findall("[a-z]+", " ".join(documents).lower()))
    table = {letter: index for index, letter in enumerate(LETTERS)}
    return torch.tensor([table[letter] for letter in words])


def windows(text: Tensor, n: int, length: int, source: torch.Generator) -> Tensor:
    """Sequences [n, length] that begin anywhere in a text."""
    starts = torch.randint(len(text) - length + 1, (n, 1), generator=source)
    return text[starts + torch.arange(length)]


class Judge(NamedTuple):
    """log p of a letter after none to three others, each [27] * order; and the bigrams [27, 27] of a text."""

    tables: tuple[Tensor, ...]
    bigrams: Tensor

    @classmethod
    def counted(cls, text: Tensor) -> Judge:
        """The counts of a text; each order's are mixed with the order below by the number of kinds that followed."""
        below = torch.full((len(LETTERS),), 1.0 / len(LETTERS), dtype=torch.float64)
        tables: list[Tensor] = []
        for order in range(1, ORDER + 1):
            counts = _counts(text, order)
            kinds = (counts > 0).sum(-1, keepdim=True)
            below = (counts + kinds * below) / (counts.sum(-1, keepdim=True) + kinds).clamp(min=1)
            # A context that was never seen has neither counts nor kinds: there the order below stands.
            seen = kinds > 0
            below = torch.where(seen, below, tables[-1].exp().expand_as(below) if tables else below)
            tables.append(below.log())
        bigrams = _counts(text, 2)
        return cls(tuple(tables), bigrams / bigrams.sum())

    def measured(self, x: Tensor) -> dict[str, float]:
        """Negative log-likelihood a letter, total variation of the bigrams, mean entropy within sequences."""
        symbols, length = len(LETTERS), x.shape[1]
        total = torch.zeros(len(x), dtype=torch.float64)
        for place in range(length):
            table = self.tables[min(place, ORDER - 1)]
            total += table[tuple(x[:, max(0, place - ORDER + 1) : place + 1].T)]
        pairs = torch.bincount((x[:, :-1] * symbols + x[:, 1:]).flatten(), minlength=symbols**2).double()
        shares = torch.nn.functional.one_hot(x, symbols).double().mean(1)
        return {
            "nll": -total.mean().item() / length,
            "bigram_distance": 0.5 * (pairs / pairs.sum() - self.bigrams.flatten()).abs().sum().item(),
            "entropy": -torch.special.xlogy(shares, shares).sum(-1).mean().item(),
        }


def _counts(text: Tensor, order: int) -> Tensor:
    symbols, code = len(LETTERS), torch.zeros(len(text) - order + 1, dtype=torch.long)
    for place in range(order):
        code = code * symbols + text[place : len(text) - order + 1 + place]
    return torch.bincount(code, minlength=symbols**order).view([symbols] * order).double()


class Text(NamedTuple):
    """A text to learn from, one that was held out, and the judge, which counted the first."""

    train: Tensor
    held_out: Tensor
    judge: Judge


def prose() -> Text:
    """The corpus of prose: its training split to learn from and to count, its other splits held out."""
    found = corpus("prose")
    train, held_out = letters(found.train), letters([*found.validation, *found.test])
    return Text(train, held_out, Judge.counted(train))
