"""Long-tailed labels: class counts that fall off, a sample that has them, and accuracy by how frequent a class is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["long_tail_counts", "make_long_tail", "many_medium_few"]


def long_tail_counts(
    largest: int, classes: int, ratio: float, kind: Literal["exponential", "step"] = "exponential"
) -> Tensor:
    """Samples for each class, int64 [classes], from `largest` down to largest / ratio, rounded, at least 1.

    "exponential": largest ratio^(-c / (classes - 1)), as in CIFAR-LT; "step": the first half of the classes, rounded
    up, has `largest` samples each and the others largest / ratio. Raises ConfigError for fewer than two classes and for
    a ratio below 1.

    >>> long_tail_counts(500, 5, 100)
    tensor([500, 158,  50,  16,   5])
    >>> long_tail_counts(500, 5, 100, "step")
    tensor([500, 500, 500,   5,   5])
    """
    if classes < 2 or largest < 1 or not 1.0 <= ratio < math.inf:
        raise ConfigError(
            f"a long tail has two classes or more, a largest count of at least 1 and a ratio of at least 1: got "
            f"{classes}, {largest} and {ratio}"
        )
    place = torch.arange(classes, dtype=torch.float64) / (classes - 1)
    if kind == "step":
        place = (torch.arange(classes) >= (classes + 1) // 2).double()
    elif kind != "exponential":
        raise ConfigError(f'kind is "exponential" or "step", not {kind!r}')
    return (largest * ratio**-place).round().long().clamp(min=1)


def make_long_tail(
    labels: Tensor | Sequence[int], counts: Tensor | Sequence[int], generator: torch.Generator
) -> Tensor:
    """The places, in random order, of counts[c] samples of each class c among labels [n], drawn without replacement.

    Classes beyond those of counts are left out. Raises ShapeError for other shapes than [n] and [C], and DataError for
    what is not a whole number, a negative count, and a class with too few samples.

    >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> kept = make_long_tail(labels, torch.tensor([3, 1]), torch.Generator().manual_seed(0))
    >>> labels[kept].sort().values
    tensor([0, 0, 0, 1])
    """
    labels, counts = torch.as_tensor(labels), torch.as_tensor(counts)
    if labels.ndim != 1 or counts.ndim != 1:
        raise ShapeError(f"labels [n] and counts [C] are vectors, got {tuple(labels.shape)} and {tuple(counts.shape)}")
    if labels.is_floating_point() or counts.is_floating_point() or bool((counts < 0).any()):
        raise DataError("labels and counts are whole numbers, and counts are at least 0: round them first")
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for index, wanted in enumerate(counts.tolist()):
        own = order[labels[order] == index]
        if len(own) < wanted:
            raise DataError(f"class {index} has {len(own)} samples and {wanted} were asked for: lower the counts")
        chosen.append(own[:wanted])
    kept = torch.cat(chosen)
    return kept[torch.randperm(len(kept), generator=generator)]


def many_medium_few(counts: Tensor, accuracy: Tensor, *, thresholds: tuple[int, int] = (100, 20)) -> dict[str, float]:
    """The mean of accuracy [C] over classes with many, a medium number of, or few training samples (counts [C]).

    thresholds (h, l): many is more than h, few is less than l. A group without classes is left out. Report with it how
    many test samples a class has: with five, the noise exceeds what methods differ by. Raises DataError for what is not
    finite, as the accuracy of a class without test samples.

    >>> many_medium_few(torch.tensor([200, 100, 20, 5]), torch.tensor([0.75, 0.75, 0.25, 0.0]))
    {'many': 0.75, 'medium': 0.5, 'few': 0.0}
    """
    high, low = thresholds
    if counts.shape != accuracy.shape or counts.ndim != 1:
        raise ShapeError(f"counts and accuracy are [C] both, got {tuple(counts.shape)} and {tuple(accuracy.shape)}")
    if high < low:
        raise ConfigError(f"thresholds are (more than this is many, less than this is few), got {thresholds}")
    if not bool((counts >= 0).all()) or not bool((counts.isfinite() & accuracy.isfinite()).all()):
        raise DataError(
            "counts are at least 0 and accuracies are finite: leave a class out that has no test sample, since it has "
            "no accuracy"
        )
    groups = {"many": counts > high, "medium": (counts <= high) & (counts >= low), "few": counts < low}
    return {name: accuracy[group].double().mean().item() for name, group in groups.items() if bool(group.any())}
