"""Long-tailed counts, samples and splits."""

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.data.long_tail import long_tail_counts, make_long_tail, many_medium_few


def test_the_counts_of_the_card():
    counts = long_tail_counts(500, 100, 100)
    assert (counts[0], counts[-1]) == (500, 5)
    assert (counts.diff() <= 0).all()
    exact = 500 * 100 ** (-torch.arange(100).double() / 99)
    assert (counts - exact).abs().max() <= 0.5
    assert long_tail_counts(500, 10, 1).tolist() == [500] * 10
    assert long_tail_counts(10, 3, 1e6).tolist() == [10, 1, 1]
    steps = long_tail_counts(200, 10, 50, "step")
    assert steps.tolist() == [200] * 5 + [4] * 5


def test_a_sample_has_the_counts_and_no_row_twice(generator):
    labels = torch.randint(0, 4, (400,), generator=generator)
    counts = torch.tensor([60, 30, 10, 2])
    kept = make_long_tail(labels, counts, generator)
    assert torch.equal(torch.bincount(labels[kept]), counts)
    assert len(kept.unique()) == len(kept) == 102
    assert labels[kept][:20].unique().numel() > 1  # in random order
    with pytest.raises(DataError, match="class 1 has"):
        make_long_tail(labels, torch.tensor([1, 399]), generator)
    with pytest.raises(ShapeError, match="vectors"):
        make_long_tail(labels[None], counts, generator)


def test_groups_by_frequency():
    counts = torch.tensor([101, 100, 20, 19])
    accuracy = torch.tensor([0.5, 0.25, 0.75, 0.125])
    assert many_medium_few(counts, accuracy) == {"many": 0.5, "medium": 0.5, "few": 0.125}
    assert many_medium_few(counts, accuracy, thresholds=(1000, 0)) == {"medium": accuracy.mean().item()}
    with pytest.raises(ShapeError, match="both"):
        many_medium_few(counts, accuracy[:2])
    with pytest.raises(ConfigError, match="thresholds"):
        many_medium_few(counts, accuracy, thresholds=(20, 100))


@pytest.mark.parametrize("wrong", [(0, 10, 2.0), (5, 1, 2.0), (5, 10, 0.5), (5, 10, 2.0, "linear")])
def test_errors_say_what_to_do(wrong):
    with pytest.raises(ConfigError):
        long_tail_counts(*wrong)
