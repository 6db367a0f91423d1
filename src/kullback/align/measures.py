"""How good and how varied the completions of a policy are: pass@k, coverage, diversity, divergence and entropy.

Shapes: P prompts, n samples of each; B sequences of T tokens; log-probabilities and divergences in nats.
Sources: the unbiased pass@k of arXiv 2107.03374; distinct-n of arXiv 1510.03055; coverage of arXiv 2509.07430.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl_sampled

__all__ = [
    "Estimate",
    "coverage_at_k",
    "distinct_n",
    "mean_pass_at_k",
    "pass_at_k",
    "sampled_divergence",
    "self_similarity",
    "token_entropy",
]


class Estimate(NamedTuple):
    """A mean over independent units, its standard error, and the ends of a confidence interval."""

    mean: float
    standard_error: float
    low: float
    high: float


def pass_at_k(samples: int, correct: Tensor, k: int) -> Tensor:
    """The chance that k of n drawn answers, without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k); float64.

    samples: n; correct [...]: c, the correct ones of them. Unbiased for 1 - (1-p)^k. Raises ConfigError for k over n or
    below 1, DataError for counts outside 0 to n.

    >>> pass_at_k(16, torch.tensor([0, 3, 16]), 8)
    tensor([0.0000, 0.9000, 1.0000], dtype=torch.float64)
    """
    if not 1 <= k <= samples:
        raise ConfigError(f"pass@k takes a k from 1 to the number of samples, got k = {k} of {samples}: draw more")
    count = torch.as_tensor(correct)
    if ((count < 0) | (count > samples)).any() or (count.is_floating_point() and (count != count.round()).any()):
        raise DataError(f"counts of correct answers are whole numbers from 0 to {samples}")
    place = torch.arange(k, dtype=torch.float64, device=count.device)
    factors = ((samples - count.double().unsqueeze(-1) - place) / (samples - place)).clamp(min=0.0)
    return 1.0 - factors.prod(-1)


def mean_pass_at_k(samples: int, correct: Tensor, k: int, *, level: float = 0.95) -> Estimate:
    """pass@k averaged over prompts [P], with its standard error over prompts and a normal interval cut to 0 and 1."""
    values = pass_at_k(samples, correct, k).flatten()
    found = _estimate(values, level)
    return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))


def coverage_at_k(log_probs: Tensor, correct: Tensor, k: int) -> Tensor:
    """The share of all correct answers that k draws are expected to find: the mean over them of 1 - (1-pi(a))^k.

    log_probs [..., N] of all answers, correct [..., N] bool; to [...]. DataError where no answer is correct.

    >>> coverage_at_k(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([True, True, False]), 2)
    tensor(0.5938)
    """
    if k < 1:
        raise ConfigError(f"k is 1 or more, got {k}")
    held = correct.bool().expand_as(log_probs)
    if not held.any(-1).all():
        raise DataError("coverage is a mean over the correct answers, and for some prompt there is none")
    # log(1 - pi) from the side that keeps its digits
    missed = torch.log1p(-log_probs.exp().clamp(max=1.0))
    found = -torch.expm1(k * missed)
    return torch.where(held, found, 0.0).sum(-1) / held.sum(-1)


def distinct_n(ids: Tensor, mask: Tensor, n: int = 2) -> float:
    """Different n-grams over all n-grams of sequences [B, T]: 1 where none repeats, 0 where there is none at all.

    >>> distinct_n(torch.tensor([[1, 2, 1, 2]]), torch.ones(1, 4), 2)  # 12, 21, 12
    0.6666666666666666
    """
    found = [gram for row in _grams(ids, mask, n) for gram in row]
    return len(set(found)) / len(found) if found else 0.0


def self_similarity(ids: Tensor, mask: Tensor, *, n: int = 2) -> float:
    """The mean over pairs of sequences [B, T] of the overlap of their sets of n-grams, common over all; 1 if alike.

    Of a group's completions it says how much they repeat one another. Sequences that both have no n-gram count as
    alike. ShapeError for fewer than two sequences.

    >>> self_similarity(torch.tensor([[1, 2, 3], [1, 2, 4]]), torch.ones(2, 3))
    0.3333333333333333
    """
    sets = [set(row) for row in _grams(ids, mask, n)]
    if len(sets) < 2:
        raise ShapeError(f"similarity is between sequences, and there is only {len(sets)}")
    pairs = [(a, b) for place, a in enumerate(sets) for b in sets[:place]]
    overlaps = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    return sum(overlaps) / len(overlaps)


def _grams(ids: Tensor, mask: Tensor, n: int) -> list[list[tuple[int, ...]]]:
    if n < 1:
        raise ConfigError(f"n-grams have 1 token or more, not {n}")
    if mask.shape != ids.shape or ids.ndim != 2:
        raise ShapeError(f"ids and mask are [B, T] alike, got {tuple(ids.shape)} and {tuple(mask.shape)}")
    rows = [row[held].tolist() for row, held in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
    return [list(zip(*(row[place:] for place in range(n)), strict=False)) for row in rows]


@torch.no_grad()
def sampled_divergence(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    *,
    estimator: str = "k3",
    unit: str = "sequence",
    level: float = 0.95,
) -> Estimate:
    """KL(policy||reference) from sequences that the policy drew, [B, T] each, with a standard error over sequences.

    unit: nats a "sequence", each token's estimate summed, or nats a "token", the ratio of the sums. Raises ConfigError
    for other names and ShapeError for fewer than two sequences.
    """
    if unit not in ("sequence", "token"):
        raise ConfigError(f'unit is "sequence" or "token", not {unit!r}')
    held = mask.bool()
    values = kl_sampled(
        torch.where(held, reference_log_prob, 0.0).double(),
        torch.where(held, log_prob, 0.0).double(),
        value=estimator,
        gradient="none",
    )
    sums = values.sum(-1)
    if unit == "sequence":
        return _estimate(sums, level)
    lengths = held.sum(-1).double()
    mean = sums.sum() / lengths.sum().clamp(min=1.0)
    # the ratio of two means, to first order: its errors are those of the residuals
    residuals = (sums - mean * lengths) / lengths.mean().clamp(min=1e-300)
    found = _estimate(residuals, level)
    shift = float(mean) - found.mean
    return Estimate(float(mean), found.standard_error, found.low + shift, found.high + shift)


def token_entropy(entropy: Tensor, mask: Tensor) -> float:
    """The mean entropy a token, nats, from [B, T] and the mask; 0 where nothing counts."""
    if mask.shape != entropy.shape:
        raise ShapeError(f"entropy and mask are alike, got {tuple(entropy.shape)} and {tuple(mask.shape)}")
    held = mask.bool()
    return float(torch.where(held, entropy, 0.0).sum() / held.sum().clamp(min=1))


def _estimate(values: Tensor, level: float) -> Estimate:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"the level of an interval is between 0 and 1, got {level}")
    if values.numel() < 1:
        raise ShapeError("a mean takes a value at least, and there is none")
    mean = float(values.mean())
    error = float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else math.inf
    width = NormalDist().inv_cdf(0.5 + level / 2) * error
    return Estimate(mean, error, mean - width, mean + width)
