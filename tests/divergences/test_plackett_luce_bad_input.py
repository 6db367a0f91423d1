"""Rankings: what is wrong with scores, picks, weights and options is said, and the edges of what is right."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.distill import PLDLoss, pld_objective
from kullback.divergences import plackett_luce as pl

T = torch.tensor([[1.0, 0.5, -1.0, 0.0], [0.0, 2.0, 1.0, -1.0], [0.3, 0.1, 0.2, 0.0]])
S, Y, ORDER = T.flip(-1), torch.tensor([0, 1, 2]), torch.tensor([[1, 0, 2, 3]]).expand(3, -1)
ONES, TOP, PICKS = torch.ones(4), T.log_softmax(-1)[:, :2], ORDER[:, :2]
REST = torch.full((3,), -1.0)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (DataError, "NaN", lambda: pl.pld_loss(T * math.nan, S, Y)),
        (DataError, "-inf alone", lambda: pl.pld_loss(T - math.inf, S, Y)),
        (ConfigError, "positive and finite", lambda: pl.pld_loss(T, S, Y, temperature=math.inf)),
        (ConfigError, "positive and finite", lambda: pl.pld_loss(T, S, Y, temperature=math.nan)),
        (ConfigError, "counts the picks", lambda: pl.pld_loss(T, S, Y, topk=2.5)),
        (ShapeError, "entries", lambda: pl.pld_loss(T, S, Y, weights=torch.tensor(1.0))),
        (ShapeError, "broadcast", lambda: pl.pld_loss(T, S, Y, weights=torch.ones(2, 4))),
        (DataError, "nonnegative", lambda: pl.pld_loss(T, S, Y, weights=ONES * math.nan)),
        (ShapeError, "class indices", lambda: pl.pld_loss(T, S, Y > 0)),
        (DataError, "indices in 0..3", lambda: pl.listwise_loss(S, ORDER + 1, ONES)),
        (DataError, "indices in 0..3", lambda: pl.listwise_loss(S, ORDER - 1, ONES)),
        (ShapeError, "class indices", lambda: pl.listwise_loss(S, ORDER.float(), ONES)),
        (ShapeError, "broadcast", lambda: pl.listwise_loss(S, ORDER, ONES[:3])),
        (ShapeError, "broadcast", lambda: pl.listwise_loss(S, ORDER, torch.ones(2, 3, 4))),
        (DataError, "nonnegative", lambda: pl.listwise_loss(S, ORDER, -ONES)),
        (DataError, "nonnegative", lambda: pl.listwise_loss(S, ORDER, ONES * math.nan)),
        (ShapeError, "1 <= K", lambda: pl.listwise_loss(S, ORDER[:, :0], ONES[:0])),
        (ShapeError, "whole ranking", lambda: pl.pl_log_prob(S, ORDER[:, :2])),
        (DataError, "picked again", lambda: pl.pl_log_prob(S, 0 * ORDER)),
        (DataError, "picked again", lambda: pl.pl_topk_log_prob(S, ORDER[:, [0, 0]])),
        (ShapeError, "ranks are integers", lambda: pl.pl_tied_log_prob(S, ORDER.float())),
        (ShapeError, "ranks are integers", lambda: pl.pl_tied_log_prob(S, ORDER[0])),
        (ShapeError, "at least one class", lambda: pl.pl_tied_log_prob(S[:, :0], ORDER[:, :0])),
        (ConfigError, "at least 1", lambda: pl.pl_sample(S, 0, torch.Generator())),
        (DataError, "NaN", lambda: pl.pl_sample(S * math.nan, 1, torch.Generator())),
        (DataError, "inf", lambda: pl.pl_sample(S + math.inf, 1, torch.Generator())),
        (ShapeError, "at least one class", lambda: pl.pl_sample(S[:, :0], 1, torch.Generator())),
        (ShapeError, "at least one class", lambda: pl.pl_sample(torch.tensor(1.0), 1, torch.Generator())),
        (DataError, "log-probabilities", lambda: pl.ranking_of_top(PICKS, TOP * math.nan, REST, REST, Y, classes=4)),
        (DataError, "log-probabilities", lambda: pl.ranking_of_top(ORDER[:, :2], TOP.exp(), REST, REST, Y, classes=4)),
        (DataError, "indices in 0..3", lambda: pl.ranking_of_top(ORDER[:, :2] + 9, TOP, REST, REST, Y, classes=4)),
    ],
)  # fmt: skip
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("build", [PLDLoss, pld_objective])
@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigError, "positive and finite", {"temperature": 0.0}),
        (ConfigError, "positive and finite", {"temperature": math.nan}),
        (ConfigError, "weights are", {"weights": "rising"}),
        (ConfigError, "counts the picks", {"topk": 0}),
    ],
)
def test_options_are_looked_at_before_a_run(build, error, words, options):
    with pytest.raises(error, match=words):
        build(**options)


def test_what_a_module_is_told_too_late_or_in_another_shape():
    with pytest.raises(DataError, match="nonnegative"):
        PLDLoss(weights=-ONES)
    with pytest.raises(ShapeError, match="one a row"):
        PLDLoss().ranking(T, Y[:2])
    with pytest.raises(DataError, match="labels must lie in"):
        PLDLoss()(T, S, Y + 5)
    with pytest.raises(ShapeError, match="1 <= K <= V"):
        PLDLoss().of_ranking(PLDLoss().ranking(T, Y), S[:, :3], Y)


def test_no_rows_are_zero_and_labels_may_be_of_any_whole_type():
    assert pl.pld_loss(T[:0], S[:0], Y[:0]) == 0.0
    assert pl.pld_loss(T[:0], S[:0], Y[:0], reduction="none").shape == (0,)
    assert PLDLoss().ranking(T, Y * 0 - 100).weights.eq(0).all()
    wanted = pl.pld_loss(T, S, Y)
    for dtype in (torch.int16, torch.int32, torch.uint8):
        assert pl.pld_loss(T, S, Y.to(dtype)) == wanted
    marked = torch.tensor([0, 1, 255], dtype=torch.uint8)
    torch.testing.assert_close(pl.pld_loss(T, S, marked, ignore_index=255), pl.pld_loss(T[:2], S[:2], Y[:2]))


def test_scores_without_worth_and_without_a_number():
    assert pl.pld_loss(T, S * math.nan, Y).isnan()
    assert pl.pld_loss(T, S.index_fill(1, torch.tensor([2]), -math.inf), Y) == math.inf
    scores = torch.tensor([0.0, -math.inf, -math.inf])
    assert pl.pl_log_prob(scores, torch.tensor([0, 1, 2])) == -math.inf
    assert pl.pl_tied_log_prob(scores, torch.tensor([0, 1, 1])) == -math.inf
    drawn = pl.pl_sample(torch.tensor([0.0, -math.inf, 1.0]), 50, torch.Generator().manual_seed(0))
    assert drawn[:, 2].eq(1).all()
    half = pl.pl_tied_log_prob(S.half(), ORDER)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pl.pl_tied_log_prob(S, ORDER), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["teacher", "position_teacher", "uniform", "position"])
def test_weights_taken_in_blocks_are_those_of_all_rows_at_once(generator, monkeypatch, kind):
    teacher = 3 * torch.randn(2, 9, 7, generator=generator)
    labels = torch.randint(7, (2, 9), generator=generator)
    order = pl.teacher_optimal_permutation(teacher, labels, 4)
    wanted = pl.rank_weights((teacher / 2.0).log_softmax(-1), order, kind)
    for block in (1, 15, 10**6):
        monkeypatch.setattr(pl, "_BLOCK", block)
        found = pl.ranking_of(teacher, labels, temperature=2.0, weights=kind, topk=4)
        assert torch.equal(found.order.long(), order)
        torch.testing.assert_close(found.weights, wanted)
