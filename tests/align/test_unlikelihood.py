"""Unlikelihood: naive loops over candidates, gradients, repetitions."""

import math

import pytest
import torch

from kullback.align.unlikelihood import repeated_tokens, unlikelihood_loss
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator

IDS = torch.tensor([[1, 2, 3, 1, 2, 3, 4], [0, 0, 0, 0, 4, 1, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()


def logits():
    return torch.randn(2, 7, 5, generator=generator(0, "l"), dtype=torch.float32)


def naive(probs, candidates, n):
    found = 0.0
    for row in range(2):
        text = IDS[row][MASK[row]].tolist()
        for place, token in enumerate(text):
            if candidates == "tokens":
                those = set(text[:place]) - {token}
            else:
                grams = [(start, tuple(text[start : start + n])) for start in range(len(text) - n + 1)]
                covers = [(s, g) for s, g in grams if s <= place < s + n]
                again = any(g == other for s, g in covers for earlier, other in grams if earlier < s)
                those = {token} if again else set()
            found += sum(-math.log1p(-probs[row, place, c].item()) for c in those)
    return found / int(MASK.sum())


@pytest.mark.parametrize(("candidates", "n"), [("tokens", 4), ("sequences", 2), ("sequences", 3)])
def test_it_is_the_sum_over_candidates(candidates, n):
    found = unlikelihood_loss(logits(), IDS, MASK, candidates=candidates, n=n)
    assert found.item() == pytest.approx(naive(logits().softmax(-1), candidates, n), rel=1e-5)
    assert found.item() > 0.0
    unmasked = unlikelihood_loss(logits(), IDS, candidates=candidates, n=n)
    assert abs(found - unmasked) > 1e-4, "padding is not counted"


def test_it_takes_mass_from_repetitions_and_from_nothing_else():
    x = logits().requires_grad_()
    unlikelihood_loss(x, IDS, MASK, candidates="sequences", n=3).backward()
    repeated = repeated_tokens(IDS, MASK, n=3)
    assert repeated.int().tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]]
    own = x.grad.gather(2, IDS.unsqueeze(2)).squeeze(2)
    assert (own[repeated] > 0).all(), "a step down the gradient makes them less likely"
    assert (x.grad[~repeated] == 0).all()


def test_a_certain_repetition_is_finite():
    sure = torch.zeros(1, 3, 4).index_fill_(2, torch.tensor([1]), 200.0).requires_grad_()
    loss = unlikelihood_loss(sure, torch.ones(1, 3, dtype=torch.long), candidates="sequences", n=1)
    loss.backward()
    assert math.isfinite(loss.item())
    assert sure.grad.isfinite().all()


def test_bad_input():
    with pytest.raises(ShapeError, match="logits"):
        unlikelihood_loss(logits(), IDS[:, :3])
    with pytest.raises(DataError, match="from 0 to 4"):
        unlikelihood_loss(logits(), IDS + 1)
    with pytest.raises(DataError, match="NaN"):
        unlikelihood_loss(logits() * math.nan, IDS)
    with pytest.raises(ConfigError, match="candidates"):
        unlikelihood_loss(logits(), IDS, candidates="all")
    with pytest.raises(ConfigError, match="n-grams"):
        repeated_tokens(IDS, MASK, n=0)
    assert not repeated_tokens(IDS, MASK, n=8).any()
