r"""Posterior samples of sequences written token by token, with a guess of what each beginning is still worth (twists).

A twist psi_t(x_1..t) is any positive guess of E_a [exp(r / b) | x_1..t], with psi_0 = 1 and psi_T = exp(r / b) itself.
Tokens are drawn by q(v | x) = a(v | x) psi_t(x v) / sum, and each sequence is weighted by

    w_t = sum_v a(v | x_1..t-1) psi_t(x_1..t-1 v) / psi_{t-1}(x_1..t-1)

and resampled where weights have grown unequal: Z is unbiased for any twist, without error for the exact one, and the
one of importance sampling for psi = 1 (but for the last token, which is always drawn with its reward in sight). Where
twists of all next tokens cannot be had, `sees_next=False` draws from a itself and weighs by psi_t / psi_{t-1}.

Shapes: n sequences of T tokens, x [n, t] those until now; nats. Source: arXiv 2205.11275; arXiv 2404.17546.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.align._annealing import effective_size, error_of_log_mean, jackknife_log_mean
from kullback.align.evidence import Evidence
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.fkc import systematic_resample

__all__ = ["TwistedSamples", "twisted_smc"]

Law = Callable[[Tensor], Tensor]


class TwistedSamples(NamedTuple):
    """x [n, T] of the posterior, equally weighted; the evidence; and the swarm of each, [n]."""

    x: Tensor
    evidence: Evidence
    swarm: Tensor


def twisted_smc(
    next_laws: Law,
    log_twists: Law,
    count: int,
    length: int,
    *,
    generator: torch.Generator,
    sees_next: bool = True,
    resample: float = 0.5,
    swarms: int = 4,
) -> TwistedSamples:
    """`count` sequences of `length` tokens in so many independent swarms, and log Z with the error between them.

    next_laws: from x [n, t] to log a(. | x) [n, V], one call of the model; x is [n, 0] at first. log_twists: log psi of
    x with each token after it [n, V], at t = length - 1 the rewards over b; or with sees_next=False of x itself [n].
    resample: below this share of the effective size. Raises ConfigError, ShapeError, DataError.

    >>> law = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    >>> reward = torch.tensor([0.0, 2.0], dtype=torch.float64)
    >>> def twists(x):  # exact: the reward of each token, and what the tokens after it are worth on average
    ...     return x.sum(1, keepdim=True) * 2.0 + reward + (2 - x.shape[1]) * (law + reward).logsumexp(0)
    >>> draw = torch.Generator().manual_seed(0)
    >>> found = twisted_smc(lambda x: law.expand(len(x), 2), twists, 8, 3, generator=draw)
    >>> round(found.evidence.log_evidence - 3 * (law + reward).logsumexp(0).item(), 6)
    0.0
    """
    if swarms < 1 or count % swarms or count < 2 * swarms or length < 1:
        raise ConfigError(f"swarms share {count} samples evenly, two each at least, of a token or more, got {swarms}")
    if not 0.0 <= resample <= 1.0:
        raise ConfigError(f"resample is a share of the samples, in [0, 1], got {resample}")
    step = _looking if sees_next else _blind
    size = count // swarms
    x = torch.zeros(count, 0, dtype=torch.long, device=generator.device)
    before = torch.zeros(count, dtype=torch.float64, device=generator.device)  # log psi of the sequences until now
    scores = torch.zeros(swarms, size, dtype=torch.float64, device=generator.device)
    value, inside, smallest = scores.new_zeros(swarms), scores.new_zeros(swarms), scores.new_full((swarms,), size)
    for place in range(length):
        token, gained, after = step(next_laws, log_twists, x, generator)
        scores = scores + (gained - before).view(swarms, size)
        x, before = torch.cat([x, token.unsqueeze(1)], 1), after
        left = effective_size(scores)
        smallest = smallest.minimum(left)
        uneven = (left < resample * size) | (place == length - 1)
        if bool(uneven.any()):
            value[uneven] += scores[uneven].logsumexp(1) - math.log(size)
            inside[uneven] += error_of_log_mean(scores[uneven]).square()
            places = torch.arange(count, device=x.device).view(swarms, size)
            chosen = systematic_resample(scores[uneven], generator=generator).to(x.device)
            places[uneven] = places[uneven].gather(1, chosen)
            x, before = x[places.flatten()], before[places.flatten()]
            scores[uneven] = 0.0
    found, between = jackknife_log_mean(value.cpu())
    error = (value.softmax(0) * inside.sqrt()).norm().item()
    evidence = Evidence(found, error if swarms == 1 else max(error, between), smallest.sum().item(), count * length)
    return TwistedSamples(x, evidence, torch.arange(swarms, device=x.device).repeat_interleave(size))


def _looking(next_laws: Law, log_twists: Law, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, the log of sum a psi, log psi of what they make), drawn with twists of all next tokens."""
    laws, twists = next_laws(x).detach().double(), log_twists(x).detach().double()
    if laws.ndim != 2 or laws.shape != twists.shape or len(laws) != len(x):
        raise ShapeError(f"laws and twists are [{len(x)}, V], got {tuple(laws.shape)} and {tuple(twists.shape)}")
    _check(twists)
    joint = laws + twists
    token = torch.multinomial(joint.softmax(1), 1, generator=generator)
    return token.squeeze(1), joint.logsumexp(1), twists.gather(1, token).squeeze(1)


def _blind(next_laws: Law, log_twists: Law, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same, drawn from the prior and weighted afterwards."""
    laws = next_laws(x).detach().double()
    token = torch.multinomial(laws.softmax(1), 1, generator=generator)
    after = log_twists(torch.cat([x, token], 1)).detach().double()
    if after.shape != x.shape[:1]:
        raise ShapeError(f"twists of sequences are one each, [{len(x)}], got {tuple(after.shape)}")
    _check(after)
    return token.squeeze(1), after, after


def _check(twists: Tensor) -> None:
    if not twists.isfinite().all():
        raise DataError(f"{int((~twists.isfinite()).sum())} log-twists are NaN or infinite: psi is positive")
