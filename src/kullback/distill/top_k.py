r"""A divergence from a truncated teacher: its K most likely tokens and one bin for all the rest.

Both distributions are brought to K + 1 outcomes, the kept tokens and the tail, and compared there. By data processing
the result never exceeds the full f-divergence; for the forward KL the difference is exactly

    p_tail \* KL(p(.|tail) || q(.|tail))  <=  p_tail \* log(p_K / (p_tail \* min_tail q(.|tail))),

because no tail token is likelier than p_K, the least likely token kept. Tokens drawn from the tail take that loss away
on average: the part of an f-divergence that lies in the tail is the mean over them of p_tail q f(p/q) / p.

Cauchy-Schwarz is no f-divergence, and one bin for the tail is far from it: sum p q over many rare tokens is next to
nothing, and the product of their sums is not. Its two sums with p are taken over the tail too, from the tokens drawn.
So is the sum p^a q^(1-a) of Renyi's divergences, whose logarithm then is consistent as more tokens are drawn, though
not unbiased. `truncated_divergence` chooses between these for a divergence and what a teacher gives.

Shapes: K tokens kept, M tokens drawn, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.types import Divergence, TeacherOutput
from kullback.divergences import F_NAMES, FDivergence, cauchy_schwarz, f_divergence, renyi
from kullback.divergences import f as losses

__all__ = [
    "KnowsTruncation", "coarsen", "keep_top", "normalised", "sample_tail", "sampled_divergence", "top_k_divergence",
    "truncated_cauchy_schwarz", "truncated_divergence", "truncated_renyi", "truncation_bound",
]  # fmt: skip


@runtime_checkable
class KnowsTruncation(Protocol):
    """A divergence that says itself what it is to a truncated teacher."""

    def of_truncated(self, target: TeacherOutput, log_q: Tensor, /) -> Tensor:
        """The divergence [...] of a target with top_ids to log_q [..., V]."""
        ...


def truncated_divergence(divergence: Divergence, target: TeacherOutput, log_q: Tensor) -> Tensor:
    """The divergence [...] between a truncated teacher and log_q [..., V], in nats, by the best that the target allows.

    Of an f-divergence, as an object or by its function, the estimate is unbiased where the teacher drew tokens from its
    tail; that of Renyi's and Cauchy-Schwarz is consistent. Any other, and all of them without drawn tokens, take the
    tail for one outcome, except those that know better themselves (`KnowsTruncation`) and Cauchy-Schwarz. Raises
    ConfigError for a target that is not truncated, ShapeError when a kept token is outside of V.

    >>> from kullback.divergences import kl
    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> ids, top, tail = keep_top(p, 1)
    >>> target = TeacherOutput(top_ids=ids, top_log_probs=top, tail_log_prob=tail)
    >>> truncated_divergence(kl, target, q), kl(p, q)
    (tensor(0.1920), tensor(0.2773))
    """
    if target.top_ids is None or target.top_log_probs is None or target.tail_log_prob is None:
        raise ConfigError("a truncated teacher gives top_ids, top_log_probs and tail_log_prob together")
    if isinstance(divergence, KnowsTruncation):
        return divergence.of_truncated(target, log_q)
    top = target.top_ids, target.top_log_probs, target.tail_log_prob
    function, options = _unbound(divergence)
    if function is cauchy_schwarz:
        return truncated_cauchy_schwarz(*top, log_q, tail_ids=target.tail_ids, tail_log_probs=target.tail_log_probs)
    if target.tail_ids is None or target.tail_log_probs is None:
        return top_k_divergence(divergence, *top, log_q)
    drawn = target.tail_ids, target.tail_log_probs
    if function is renyi:
        return truncated_renyi(*top, *drawn, log_q, **options)
    if isinstance(divergence, FDivergence):
        return sampled_divergence(divergence, *top, *drawn, log_q)
    name = getattr(function, "__name__", "")
    if name in F_NAMES and function is getattr(losses, name):
        return sampled_divergence(f_divergence(name, **options), *top, *drawn, log_q)
    return top_k_divergence(divergence, *top, log_q)


def keep_top(log_p: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `kept` most likely tokens of log_p [..., V]: ids [..., K], log-probabilities [..., K], log tail mass [...].

    Raises ShapeError unless 1 <= kept < V.

    >>> ids, top, tail = keep_top(torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), 2)
    >>> ids.tolist(), tail.exp()
    ([0, 1], tensor(0.2000))
    """
    if not 1 <= kept < log_p.shape[-1]:
        raise ShapeError(f"the tokens kept must be between 1 and {log_p.shape[-1] - 1} of the vocabulary, got {kept}")
    top, ids = log_p.topk(kept, -1)
    return ids, top, _rest(log_p, ids)


def sample_tail(log_p: Tensor, ids: Tensor, drawn: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [..., M] drawn from log_p [..., V] outside of ids [..., K], with replacement, and their log-probabilities.

    >>> log_p = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> sample_tail(log_p, torch.tensor([0, 1]), 2, torch.Generator().manual_seed(0))[0]
    tensor([2, 2])
    """
    rest = log_p.scatter(-1, ids, -math.inf).softmax(-1)
    picked = torch.multinomial(rest.flatten(0, -2) if rest.ndim > 1 else rest, drawn, True, generator=generator)
    picked = picked.reshape(*log_p.shape[:-1], drawn)
    return picked, log_p.gather(-1, picked)


def coarsen(log_q: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [..., V] over the outcomes ids [..., K] and the tail: [..., K + 1].

    >>> coarsen(torch.tensor([0.5, 0.3, 0.1, 0.1]).log(), torch.tensor([1])).exp()
    tensor([0.3000, 0.7000])
    """
    return torch.cat([log_q.gather(-1, ids), _rest(log_q, ids).unsqueeze(-1)], -1)


def top_k_divergence(
    divergence: Divergence, ids: Tensor, top_log_probs: Tensor, tail_log_prob: Tensor, log_q: Tensor
) -> Tensor:
    """The divergence [...] between a truncated teacher and log_q [..., V], in nats, on the K + 1 outcomes.

    ids and top_log_probs are [..., K], tail_log_prob is [...]. Raises ShapeError when a kept token is outside of V.

    >>> from kullback.divergences import kl
    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> top_k_divergence(kl, *keep_top(p, 2), q), kl(p, q)
    (tensor(0.2773), tensor(0.2773))
    """
    _check_tokens(ids, log_q)
    log_p = torch.cat([top_log_probs, tail_log_prob.unsqueeze(-1)], -1)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)  # what was stored in half precision sums to 1 again
    return divergence(log_p.to(log_q.dtype), coarsen(log_q, ids))


def sampled_divergence(
    divergence: FDivergence,
    ids: Tensor,
    top_log_probs: Tensor,
    tail_log_prob: Tensor,
    tail_ids: Tensor,
    tail_log_probs: Tensor,
    log_q: Tensor,
) -> Tensor:
    """An unbiased estimate [...] of the whole f-divergence to log_q [..., V], in nats: exact on the kept tokens.

    tail_ids and tail_log_probs [..., M] come from `sample_tail`, the others are those of `top_k_divergence`. Estimate
    and gradient are unbiased over the draws.

    >>> from kullback.divergences import f_divergence
    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> kept, drawn = keep_top(p, 2), (torch.tensor([2]), p[[2]])
    >>> sampled_divergence(f_divergence("kl"), *kept, *drawn, q), f_divergence("kl")(p, q)
    (tensor(0.2773), tensor(0.2773))
    """
    _check_tokens(ids, log_q)
    _check_tokens(tail_ids, log_q)
    top, tail, drawn = normalised(top_log_probs, tail_log_prob, tail_log_probs, log_q.dtype)
    inside = _terms(divergence, top, log_q.gather(-1, ids)).sum(-1)
    outside = _terms(divergence, drawn, log_q.gather(-1, tail_ids)) * (tail - drawn).exp()
    return inside + outside.mean(-1)


def normalised(
    top: Tensor, tail: Tensor, drawn: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """top [..., K], tail [..., 1] and drawn [..., M] so that kept tokens and tail add up to 1, which halves do not."""
    tail = tail.unsqueeze(-1)
    total = torch.logaddexp(top.logsumexp(-1, keepdim=True), tail)
    top, tail = (top - total).to(dtype), (tail - total).to(dtype)
    return top, tail, tail[..., :0] if drawn is None else (drawn - total).to(dtype)


def truncated_renyi(
    ids: Tensor,
    top_log_probs: Tensor,
    tail_log_prob: Tensor,
    tail_ids: Tensor,
    tail_log_probs: Tensor,
    log_q: Tensor,
    *,
    alpha: float,
) -> Tensor:
    """Renyi's log(sum p^a q^(1-a)) / (a - 1) [...] to log_q [..., V], in nats, with the tail from the tokens drawn.

    The sum is unbiased over the draws: exact on the kept tokens, and in the tail the mean of p_tail (p/q)^(a-1). Its
    logarithm is not, by about half the sum's relative variance, which falls as more tokens are drawn: on average the
    value is low for a > 1 and high for a < 1. alpha=1 is KL, unbiased. Arguments as in `sampled_divergence`.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> truncated_renyi(*keep_top(p, 2), torch.tensor([2]), p[[2]], q, alpha=2.0), renyi(p, q, alpha=2.0)
    (tensor(0.4220), tensor(0.4220))
    """
    if alpha == 1.0:
        return sampled_divergence(
            f_divergence("kl"), ids, top_log_probs, tail_log_prob, tail_ids, tail_log_probs, log_q
        )
    _check_tokens(ids, log_q)
    _check_tokens(tail_ids, log_q)
    top, tail, drawn = normalised(top_log_probs, tail_log_prob, tail_log_probs, log_q.dtype)
    mass = torch.cat([top, (tail - math.log(tail_ids.shape[-1])).expand_as(drawn)], -1)
    own = torch.cat([top, drawn], -1)
    absent = torch.isneginf(own) | torch.isneginf(mass)
    tilt = (alpha - 1.0) * (own.masked_fill(absent, 0.0) - log_q.gather(-1, torch.cat([ids, tail_ids], -1)))
    if abs(alpha - 1.0) < 0.05:  # a - 1 is too small to divide rounding errors by
        excess = mass.exp() * tilt.masked_fill(absent, 0.0).expm1()
        return excess.sum(-1).log1p() / (alpha - 1.0)
    return (mass + tilt).masked_fill(absent, -math.inf).logsumexp(-1) / (alpha - 1.0)


def truncated_cauchy_schwarz(
    ids: Tensor,
    top_log_probs: Tensor,
    tail_log_prob: Tensor,
    log_q: Tensor,
    *,
    tail_ids: Tensor | None = None,
    tail_log_probs: Tensor | None = None,
) -> Tensor:
    """log sum p^2 + log sum q^2 - 2 log sum p q [...] of a truncated teacher and log_q [..., V], in nats.

    What lies in the tail of sum p q and sum p^2 is the mean over the drawn tokens [..., M] of p_tail q and p_tail p,
    unbiased; without them p counts as uniform there. sum q^2 is whole. Exact where all tokens but one are kept; else
    the value may be below 0. Arguments as in `sampled_divergence`.

    >>> from kullback.divergences import cauchy_schwarz
    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> truncated_cauchy_schwarz(*keep_top(p, 2), q), cauchy_schwarz(p, q)
    (tensor(0.4870), tensor(0.4870))
    """
    _check_tokens(ids, log_q)
    top, tail, drawn = normalised(top_log_probs, tail_log_prob, tail_log_probs, log_q.dtype)
    if tail_ids is None or tail_log_probs is None:
        rest = math.log(max(log_q.shape[-1] - ids.shape[-1], 1))
        own, other = tail - rest, _rest(log_q, ids).unsqueeze(-1) - rest
    else:
        _check_tokens(tail_ids, log_q)
        rest = math.log(tail_ids.shape[-1])
        own, other = drawn - rest, log_q.gather(-1, tail_ids) - rest
    cross = torch.cat([top + log_q.gather(-1, ids), tail + other], -1).logsumexp(-1)
    return torch.cat([2.0 * top, tail + own], -1).logsumexp(-1) + (2.0 * log_q).logsumexp(-1) - 2.0 * cross


def _unbound(divergence: Divergence) -> tuple[Any, dict[str, Any]]:
    """A function and the options that `partial` bound to it."""
    if isinstance(divergence, partial) and not divergence.args:
        return divergence.func, dict(divergence.keywords)
    return divergence, {}


def _terms(divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """q f(p/q) - f(0) (q - p): over all outcomes the same sum, and over p no larger than it need be where p << q.

    For KL it is p log(p/q), whose estimate has the gradient of the drawn distribution and no other noise.
    """
    terms = divergence.terms(log_p, log_q)
    at_zero = float(divergence.f(log_p.new_tensor(-math.inf)))
    return terms - at_zero * (log_q.exp() - log_p.exp()) if math.isfinite(at_zero) else terms


def _check_tokens(ids: Tensor, log_q: Tensor) -> None:
    if ids.numel() and int(ids.max()) >= log_q.shape[-1]:
        raise ShapeError(
            f"the teacher kept token {int(ids.max())} and the student has {log_q.shape[-1]} tokens: "
            "give a student with the teacher's tokenizer"
        )


def truncation_bound(top_log_probs: Tensor, tail_log_prob: Tensor, vocabulary: int, *, ratio: float = 1.0) -> Tensor:
    """A bound [...], in nats, on what truncation takes from KL(teacher || student).

    It holds for every student that gives each tail token at least 1 / (ratio (V - K)) of its tail mass; ratio = 1 is a
    student that is uniform over the tail.
    """
    rest = vocabulary - top_log_probs.shape[-1]
    spread = top_log_probs[..., -1] - tail_log_prob + math.log(rest)
    return tail_log_prob.exp() * (spread.clamp(min=0) + math.log(ratio))


def _rest(log_q: Tensor, ids: Tensor) -> Tensor:
    # Summed over the tail itself: 1 - sum of the kept loses every digit once the student is sure of them.
    return log_q.scatter(-1, ids, -math.inf).logsumexp(-1)
