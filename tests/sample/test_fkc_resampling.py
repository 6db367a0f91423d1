"""Choosing particles: systematic resampling, births and deaths."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.core.errors import DataError
from kullback.sample.fkc import birth_death_step, log_normalizer, systematic_resample

sys.path.insert(0, str(Path(__file__).parent))
from _fkc_targets import seeded


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-30, 5) | st.just(-math.inf), min_size=2, max_size=12).filter(lambda x: max(x) > -math.inf),
    seed=st.integers(0, 2**31),
)
def test_systematic_counts_are_the_floor_or_the_ceiling(logs, seed):
    log_weights = torch.tensor([logs], dtype=torch.float64)
    counts = systematic_resample(log_weights, generator=seeded(seed))[0].bincount(minlength=len(logs))
    wanted = len(logs) * log_weights.softmax(1)[0]
    assert counts.sum() == len(logs)
    assert bool((counts >= (wanted - 1e-9).floor()).all())
    assert bool((counts <= (wanted + 1e-9).ceil()).all())


@pytest.mark.parametrize("size", [2, 17, 1000])
def test_the_compiled_loop_is_the_tensors_twin(size):
    pytest.importorskip("numba")
    logs = 3.0 * torch.randn(50, size, generator=seeded(1), dtype=torch.float64)
    logs[:, ::3] = -math.inf
    for single in (logs, logs.float()):
        ours, twin = (systematic_resample(single, generator=seeded(2), compiled=flag) for flag in (None, False))
        assert torch.equal(ours, twin)
    for bad in (math.nan, math.inf):
        logs[3, 1] = bad
        for flag in (None, False):
            with pytest.raises(DataError, match="not a number"):
                systematic_resample(logs, generator=seeded(2), compiled=flag)


def test_systematic_counts_have_their_means():
    weights = torch.tensor([0.05, 0.3, 0.0, 0.15, 0.5], dtype=torch.float64)
    rows = systematic_resample(weights.log().expand(10_000, 5), generator=seeded(1))
    counts = torch.zeros(10_000, 5).scatter_add_(1, rows, torch.ones(10_000, 5))
    error = 6 * counts.std(0) / 100 + 1e-9
    assert bool(((counts.mean(0) - 5 * weights).abs() <= error).all())
    assert bool((rows.diff(dim=1) >= 0).all())


def test_systematic_resampling_beside_a_peer():
    particles = pytest.importorskip("particles")
    weights = torch.rand(1000, generator=seeded(2), dtype=torch.float64)
    weights = weights / weights.sum()
    number = torch.rand(1, 1, generator=seeded(3), dtype=torch.float64).item()
    peer = particles.resampling.inverse_cdf((number + torch.arange(1000).numpy()) / 1000, weights.numpy())
    ours = systematic_resample(weights.log().unsqueeze(0), generator=seeded(3))[0]
    assert ours.tolist() == peer.tolist()


def test_the_floor_of_a_share_keeps_light_particles():
    log_weights = torch.tensor([[0.0, -50.0, -50.0, -50.0]])
    drawn = [systematic_resample(log_weights, generator=seeded(s), floor=0.2)[0].unique().numel() for s in range(5)]
    assert min(drawn) >= 2
    assert systematic_resample(log_weights, generator=seeded(0)).unique().numel() == 1


def test_births_and_deaths_follow_their_rates():
    increments = torch.tensor([0.0, 0.3, 0.9, 0.4], dtype=torch.float64)
    taken = birth_death_step(increments.expand(20_000, 4), generator=seeded(1))
    excess = increments - increments.mean()
    dies = 1 - excess.clamp(max=0).exp()
    births = excess.clamp(min=0) / excess.clamp(min=0).sum()
    wanted = torch.diag(1 - dies) + dies.unsqueeze(1) * births
    found = torch.nn.functional.one_hot(taken, 4).double().mean(0)
    assert bool(((found - wanted).abs() <= 6 * (wanted * (1 - wanted) / 20_000).sqrt() + 1e-12).all())
    still = birth_death_step(torch.tensor([[0.0] * 5, [9.0] + [-9.0] * 4, [0.0] * 5]), generator=seeded(1))
    assert still.tolist() == [[0, 1, 2, 3, 4], [0] * 5, [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_mean_weights_are_those_of_logsumexp(dtype):
    logs = 20.0 * torch.randn(6, 300, generator=seeded(1), dtype=dtype)
    logs[1, :] = -math.inf
    logs[2, 1:] = -math.inf
    logs[3] = 4.0
    expected = logs.logsumexp(-1) - math.log(300)
    torch.testing.assert_close(log_normalizer(logs), expected)
    logs[4, 7] = math.nan
    assert log_normalizer(logs)[4].isnan()
    leaf = torch.randn(2, 5, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(log_normalizer, (leaf,))
    (slope,) = torch.autograd.grad(log_normalizer(leaf).sum(), leaf)
    torch.testing.assert_close(slope, leaf.softmax(-1))
