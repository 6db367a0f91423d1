"""The digits: their shape, range and order, and what is said where scikit-learn is missing."""

import sys

import pytest
import torch

from kullback.core.errors import MissingExtra
from kullback.data.arrays import digits


def test_digits():
    images, labels = digits()
    assert images.shape == (1797, 64)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"kullback\[sklearn\]"):
        digits()
