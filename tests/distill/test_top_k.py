"""Truncated teachers: exact on what is kept, bounded on what is not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.core.errors import ShapeError
from kullback.distill.top_k import (
    coarsen,
    keep_top,
    sample_tail,
    sampled_divergence,
    top_k_divergence,
    truncated_cauchy_schwarz,
    truncation_bound,
)
from kullback.divergences import F_NAMES, cauchy_schwarz, f_divergence, jsd, kl, reverse_kl, total_variation


def _pair(seed: int, vocabulary: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, vocabulary, generator=draw, dtype=torch.float64) * scale
    return tuple(logits.log_softmax(-1))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(3, 40), data=st.data())
def test_coarse_divergence_is_below_the_full_one_and_within_the_bound(seed, vocabulary, data):
    kept = data.draw(st.integers(1, vocabulary - 1))
    log_p, log_q = _pair(seed, vocabulary)
    top = keep_top(log_p, kept)
    for divergence in (kl, reverse_kl, jsd, total_variation):
        assert (top_k_divergence(divergence, *top, log_q) <= divergence(log_p, log_q) + 1e-12).all()
    ids, log_probs, tail = top
    lost = kl(log_p, log_q) - top_k_divergence(kl, *top, log_q)
    conditional = log_q.scatter(-1, ids, -math.inf).log_softmax(-1)
    smallest = conditional.masked_fill(torch.isinf(conditional), math.inf).min(-1).values
    for row in range(len(lost)):
        ratio = max(1.0, math.exp(-smallest[row]) / (vocabulary - kept))
        bound = truncation_bound(log_probs[row], tail[row], vocabulary, ratio=ratio)
        assert lost[row] <= bound + 1e-12


def test_the_loss_of_truncation_is_the_tail_s_own_divergence():
    log_p, log_q = _pair(3, 12)
    ids, log_probs, tail = keep_top(log_p, 4)
    lost = kl(log_p, log_q) - top_k_divergence(kl, ids, log_probs, tail, log_q)
    inside = torch.ones_like(log_p).scatter(-1, ids, 0.0).bool()
    p_tail = log_p[inside].view(5, 8).log_softmax(-1)
    q_tail = log_q[inside].view(5, 8).log_softmax(-1)
    torch.testing.assert_close(lost, tail.exp() * kl(p_tail, q_tail))


def test_all_but_one_token_kept_is_exact():
    log_p, log_q = _pair(4, 9)
    torch.testing.assert_close(top_k_divergence(kl, *keep_top(log_p, 8), log_q), kl(log_p, log_q))


def test_a_sure_student_keeps_its_tail_s_digits():
    log_q = torch.tensor([60.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    tail = coarsen(log_q, torch.tensor([0]))[-1]
    expected = log_q[1:].logsumexp(0)
    torch.testing.assert_close(tail, expected)
    naive = torch.log1p(-log_q[:1].exp().sum())
    assert not torch.isfinite(naive), "the wrong way loses the tail, so this test can tell"


def test_gradient_is_that_of_the_coarse_problem():
    log_p, logits = _pair(5, 7)
    logits = logits.clone().requires_grad_()
    top = keep_top(log_p, 3)
    assert torch.autograd.gradcheck(lambda z: top_k_divergence(kl, *top, z.log_softmax(-1)), logits)


@pytest.mark.parametrize("kept", [0, 7, 9])
def test_impossible_numbers_of_kept_tokens(kept):
    with pytest.raises(ShapeError, match="between 1 and 6"):
        keep_top(torch.zeros(7).log_softmax(-1), kept)


def test_a_token_outside_the_student_s_vocabulary():
    top = keep_top(torch.randn(9, generator=torch.Generator().manual_seed(0)).sort().values.log_softmax(-1), 2)
    with pytest.raises(ShapeError, match="student has 5 tokens"):
        top_k_divergence(kl, *top, torch.zeros(5).log_softmax(-1))


def _members():
    options = {"alpha_divergence": {"alpha": 1.5}, "generalized_jsd": {"beta": 0.2}, "skew_kl": {"alpha": 0.1},
               "skew_reverse_kl": {"alpha": 0.1}}  # fmt: skip
    return {name: f_divergence(name, **options.get(name, {})) for name in F_NAMES}


@pytest.mark.parametrize("name", F_NAMES)
def test_drawn_tokens_give_the_whole_divergence_and_gradient_on_average(name):
    divergence = _members()[name]
    log_p, logits = _pair(6, 9)
    logits = logits.clone().requires_grad_()
    kept = keep_top(log_p, 4)
    expected = divergence(log_p, logits.log_softmax(-1)).sum()
    average = 0.0
    for rank in range(4, 9):  # every token that could be drawn, by its chance of it
        token = log_p.argsort(-1, descending=True)[:, rank : rank + 1]
        chance = (log_p.gather(-1, token).squeeze(-1) - kept[2]).exp()
        drawn = (token, log_p.gather(-1, token))
        average = average + (chance * sampled_divergence(divergence, *kept, *drawn, logits.log_softmax(-1))).sum()
    torch.testing.assert_close(average, expected)
    found, wanted = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (average, expected))
    torch.testing.assert_close(found, wanted)
    coarse = top_k_divergence(divergence, *kept, logits.log_softmax(-1)).sum()
    assert abs(coarse - expected) > 1e-3, "without them it would not: the check can tell"


def _slope(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0].flatten()


def test_cauchy_schwarz_keeps_its_gradient_where_one_bin_for_the_tail_does_not():
    log_p, logits = _pair(8, 400, scale=3.0)
    logits = logits.clone().requires_grad_()
    log_q, kept = logits.log_softmax(-1), keep_top(log_p, 20)
    tail_ids, tail_log_probs = sample_tail(log_p, kept[0], 8, torch.Generator().manual_seed(2))
    assert 0.05 < kept[2].exp().mean() < 0.4
    wanted = _slope(cauchy_schwarz(log_p, log_q), logits)
    for drawn, least in ({}, 0.95), ({"tail_ids": tail_ids, "tail_log_probs": tail_log_probs}, 0.85):
        found = truncated_cauchy_schwarz(*kept, log_q, **drawn)
        assert torch.cosine_similarity(_slope(found, logits), wanted, 0) > least
        torch.testing.assert_close(found, cauchy_schwarz(log_p, log_q), rtol=0.1, atol=0.0)
    coarse = _slope(top_k_divergence(cauchy_schwarz, *kept, log_q), logits)
    assert torch.cosine_similarity(coarse, wanted, 0) < 0.5


def test_cauchy_schwarz_is_exact_with_all_tokens_but_one_and_its_sums_are_unbiased():
    log_p, log_q = _pair(9, 9)
    whole = cauchy_schwarz(log_p, log_q)
    torch.testing.assert_close(truncated_cauchy_schwarz(*keep_top(log_p, 8), log_q), whole)
    kept, square_q, cross, square_p = keep_top(log_p, 4), (2 * log_q).logsumexp(-1), 0.0, 0.0
    for rank in range(4, 9):  # every token that could be drawn, by its chance of it
        token = log_p.argsort(-1, descending=True)[:, rank : rank + 1]
        chance = (log_p.gather(-1, token).squeeze(-1) - kept[2]).exp()
        drawn = {"tail_ids": token, "tail_log_probs": log_p.gather(-1, token)}
        alike = truncated_cauchy_schwarz(*kept, log_p, **drawn)  # log sum p^2 in the estimate and whole, less the cross
        of_pair = truncated_cauchy_schwarz(*kept, log_q, **drawn)
        own = torch.cat([2 * kept[1], kept[2].unsqueeze(-1) + drawn["tail_log_probs"]], -1).logsumexp(-1)
        square_p, cross = square_p + chance * own.exp(), cross + chance * ((own + square_q - of_pair) / 2).exp()
        torch.testing.assert_close(alike, (2 * log_p).logsumexp(-1) - own)
    torch.testing.assert_close(square_p, (2 * log_p).exp().sum(-1))
    torch.testing.assert_close(cross, (log_p + log_q).exp().sum(-1))


def test_tokens_are_drawn_from_the_tail_alone_and_in_proportion():
    log_p, _ = _pair(7, 12)
    ids, _, tail = keep_top(log_p, 5)
    picked, log_probs = sample_tail(log_p, ids, 4000, torch.Generator().manual_seed(1))
    assert not (picked.unsqueeze(-1) == ids.unsqueeze(-2)).any()
    torch.testing.assert_close(log_probs, log_p.gather(-1, picked))
    chance = (log_p - tail.unsqueeze(-1)).exp().scatter(-1, ids, 0.0)
    share = torch.stack([torch.bincount(row, minlength=12) for row in picked]) / 4000
    assert ((share - chance).abs() <= 6 * (chance * (1 - chance) / 4000).sqrt()).all()
    again = sample_tail(log_p, ids, 4000, torch.Generator().manual_seed(1))[0]
    assert torch.equal(picked, again)
