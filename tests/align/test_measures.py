"""Measures of completions: enumerated sample sets, closed forms, exact worlds."""

import itertools
import math

import pytest
import torch

from kullback.align.measures import (
    coverage_at_k,
    distinct_n,
    mean_pass_at_k,
    pass_at_k,
    sampled_divergence,
    self_similarity,
    token_entropy,
)
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream


@pytest.mark.parametrize(("n", "k"), [(6, 1), (6, 3), (6, 6), (7, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n, k):
    for c in range(n + 1):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        exact = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, torch.tensor(c), k).item() == pytest.approx(exact, abs=1e-14)
        if 0 < c < n and 1 < k < n:
            assert abs(1 - (1 - c / n) ** k - exact) > 1e-3, "the plug-in estimate is another number"


def test_pass_at_k_of_the_card_and_of_many_samples():
    assert pass_at_k(16, torch.tensor([3, 0, 16]), 8).tolist() == pytest.approx([0.9, 0.0, 1.0], abs=1e-15)
    exact = 1 - math.comb(4000, 3000) / math.comb(5000, 3000)
    assert pass_at_k(5000, torch.tensor(1000), 3000).item() == exact
    assert pass_at_k(5000, torch.tensor(1), 1).item() == pytest.approx(1 / 5000, rel=1e-12)


def test_pass_at_k_is_unbiased_and_its_interval_covers():
    draws = stream(1)
    truth = torch.rand(400, generator=draws, dtype=torch.float64)
    covered, errors = 0, []
    for _ in range(60):
        p = truth[torch.randint(400, (80,), generator=draws)]
        correct = torch.bernoulli(p.unsqueeze(1).expand(-1, 8), generator=draws).sum(1)
        found = mean_pass_at_k(8, correct, 4)
        exact = float((1 - (1 - truth) ** 4).mean())
        covered += found.low <= exact <= found.high
        errors.append((found.mean - exact) / found.standard_error)
    assert 50 <= covered <= 60
    assert abs(sum(errors) / len(errors)) < 6 / math.sqrt(60)
    assert mean_pass_at_k(8, torch.tensor([8, 8]), 4)[2:] == (1.0, 1.0)


def test_coverage_over_all_answers():
    log_probs = torch.randn(5, 12, generator=stream(2), dtype=torch.float64).log_softmax(-1)
    correct = torch.rand(5, 12, generator=stream(3)) < 0.4
    correct[:, 0] = True
    for k in (1, 7, 64):
        exact = [(1 - (1 - row[held].exp()) ** k).mean() for row, held in zip(log_probs, correct, strict=True)]
        assert torch.allclose(coverage_at_k(log_probs, correct, k), torch.stack(exact), atol=1e-13)
    one = torch.tensor([0.0, -math.inf])
    assert coverage_at_k(one, torch.tensor([True, False]), 3) == 1.0
    assert coverage_at_k(one, torch.tensor([True, True]), 3) == 0.5
    rare = torch.tensor([-40.0, 0.0], dtype=torch.float64)
    assert coverage_at_k(rare, torch.tensor([True, False]), 100).item() == pytest.approx(100 * math.exp(-40))


def test_diversity_of_known_texts():
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 9], [4, 5, 6, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    assert distinct_n(ids, mask, 1) == 6 / 9
    assert distinct_n(ids, mask, 2) == 4 / 6
    assert distinct_n(ids, mask, 4) == 0.0
    assert self_similarity(ids, mask) == pytest.approx(1 / 3)
    assert self_similarity(ids[:2], mask[:2]) == 1.0
    assert self_similarity(ids[:2], torch.ones(2, 4)) == pytest.approx(2 / 4)
    assert self_similarity(ids, mask, n=4) == 1.0
    with pytest.raises(ShapeError):
        self_similarity(ids[:1], mask[:1])


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_divergence_from_samples(unit, estimator):
    """Independent tokens of the same two laws, and lengths of their own: KL a token is known, so a sequence's is."""
    policy, reference = torch.tensor([0.6, 0.4]).double().log(), torch.tensor([0.3, 0.7]).double().log()
    exact = float((policy.exp() * (policy - reference)).sum())
    draws, z = stream(4), []
    for _ in range(30):
        ids = torch.multinomial(policy.exp(), 300 * 6, replacement=True, generator=draws).reshape(300, 6)
        lengths = torch.randint(1, 7, (300,), generator=draws)
        mask = torch.arange(6) < lengths[:, None]
        found = sampled_divergence(
            policy[ids].masked_fill(~mask, math.nan), reference[ids], mask, unit=unit, estimator=estimator
        )
        z.append((found.mean - exact * (3.5 if unit == "sequence" else 1.0)) / found.standard_error)
        assert found.low < found.mean < found.high
    z = torch.tensor(z)
    assert abs(z.mean()) < 6 / math.sqrt(30)
    assert 0.5 < z.std() < 1.6


def test_entropy_under_a_mask():
    entropy = torch.tensor([[1.0, math.nan], [3.0, 5.0]])
    assert token_entropy(entropy, torch.tensor([[1, 0], [1, 1]])) == 3.0
    assert token_entropy(entropy, torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ConfigError, lambda: pass_at_k(4, torch.tensor(1), 5)),
        (ConfigError, lambda: pass_at_k(4, torch.tensor(1), 0)),
        (DataError, lambda: pass_at_k(4, torch.tensor(5), 2)),
        (DataError, lambda: pass_at_k(4, torch.tensor(0.5), 2)),
        (ConfigError, lambda: mean_pass_at_k(4, torch.tensor([1]), 2, level=1.0)),
        (ShapeError, lambda: mean_pass_at_k(4, torch.zeros(0), 2)),
        (ConfigError, lambda: coverage_at_k(torch.zeros(1), torch.ones(1), 0)),
        (DataError, lambda: coverage_at_k(torch.zeros(1), torch.zeros(1), 1)),
        (ConfigError, lambda: distinct_n(torch.ones(1, 1), torch.ones(1, 1), 0)),
        (ShapeError, lambda: distinct_n(torch.ones(1, 1), torch.ones(1, 2))),
        (ConfigError, lambda: sampled_divergence(*[torch.ones(2, 2)] * 3, unit="word")),
        (ShapeError, lambda: token_entropy(torch.ones(1, 1), torch.ones(1, 2))),
    ],
)
def test_what_is_refused(error, call):
    with pytest.raises(error):
        call()
