"""How members of an ensemble, or models of several runs, differ: divergence between them, disagreement, variance.

Shapes: log-probabilities [R, ..., C] of R members or runs, normalised; results [...], one number a sample.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = ["disagreement", "geometric_mean", "mean_pairwise_kl", "prediction_variance"]


def _check(log_p: Tensor) -> None:
    if log_p.ndim < 2 or log_p.shape[0] < 1:
        raise ShapeError(f"log-probabilities of members have shape [R, ..., C], got {tuple(log_p.shape)}")
    if bool((log_p.detach().logsumexp(-1).abs() > 1e-2).any()):
        raise DataError("members give log-probabilities, which add up to 1: take log_softmax of logits first")


def geometric_mean(log_p: Tensor) -> Tensor:
    """The log of the normalised geometric mean [..., C] of members [R, ..., C]: the centre of KL(centre || member)."""
    _check(log_p)
    return torch.log_softmax(log_p.mean(0), -1)


def prediction_variance(log_p: Tensor, loss: Literal["kl", "01"] = "kl") -> Tensor:
    """The variance of predictions over runs, for each sample; DataError for what is not normalised, as logits are not.

    "kl": the mean over runs of KL(centre || run), with the geometric mean as centre: for any target y, the mean of
    KL(y || run) is KL(y || centre) plus this. "01": the share of runs that do not predict the commonest class.

    >>> runs = torch.tensor([[[0.8, 0.2]], [[0.2, 0.8]]]).log()
    >>> prediction_variance(runs), prediction_variance(runs, "01")
    (tensor([0.2231]), tensor([0.5000]))
    """
    _check(log_p)
    if loss == "kl":
        centre = geometric_mean(log_p)
        return kl(centre.expand_as(log_p), log_p).mean(0)
    if loss != "01":
        raise ConfigError(f'loss is "kl" or "01", not {loss!r}')
    votes = torch.nn.functional.one_hot(log_p.argmax(-1), log_p.shape[-1]).sum(0)
    return 1.0 - votes.amax(-1).to(log_p.dtype) / len(log_p)


def mean_pairwise_kl(log_p: Tensor) -> Tensor:
    """The mean of KL(i || j) over ordered pairs of different members, for each sample; 0 for a lone member.

    >>> mean_pairwise_kl(torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]).log())
    tensor([0.4394])
    """
    _check(log_p)
    pairs = [kl(one, other) for i, one in enumerate(log_p) for j, other in enumerate(log_p) if i != j]
    return torch.stack(pairs).mean(0) if pairs else log_p.new_zeros(log_p.shape[1:-1])


def disagreement(log_p: Tensor) -> Tensor:
    """The share of pairs of different members that predict different classes, for each sample; 0 for a lone member.

    >>> disagreement(torch.tensor([[[0.6, 0.4]], [[0.9, 0.1]], [[0.2, 0.8]]]).log())
    tensor([0.6667])
    """
    _check(log_p)
    members = len(log_p)
    votes = torch.nn.functional.one_hot(log_p.argmax(-1), log_p.shape[-1]).sum(0).to(log_p.dtype)
    agreeing = (votes * (votes - 1)).sum(-1)
    return 1.0 - agreeing / (members * (members - 1)) if members > 1 else torch.zeros_like(agreeing)
