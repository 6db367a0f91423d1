"""Small sets of numbers that come with installed packages."""

from __future__ import annotations

import torch
from torch import Tensor

from kullback.core.errors import MissingExtra

__all__ = ["digits"]


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits that come with scikit-learn: images [1797, 64], float32 in 0..1, and labels, int64.

    Each image has 8 x 8 pixels, row by row. Raises MissingExtra without scikit-learn. Source: the test part of Alpaydin
    and Kaynak's optical recognition set, 1998.

    >>> images, labels = digits()
    >>> images.shape, float(images.max()), labels[:4]
    (torch.Size([1797, 64]), 1.0, tensor([0, 1, 2, 3]))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", extra="sklearn") from error
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)
