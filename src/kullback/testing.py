"""The laws of a divergence as checks that tests, notebooks and users with a divergence of their own share.

Each check takes the divergence D(log_p, log_q), [..., V] to [...], and a torch.Generator from which it draws what it
tries; it returns nothing and raises AssertionError with one sentence about what was expected and what came. A check
tries a few random cases, so it can show that a law does not hold and never prove that it does.

>>> from kullback.divergences import jsd
>>> check_zero_at_equality(jsd, torch.Generator().manual_seed(0))
>>> check_zero_at_equality(lambda log_p, log_q: -(log_p.exp() * log_q).sum(-1), torch.Generator().manual_seed(0))
Traceback (most recent call last):
    ...
AssertionError: a divergence of a distribution from itself is 0, and it is up to ... here
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kullback.core.reduce import masked_mean
from kullback.core.types import Divergence
from kullback.divergences.options import from_logits

__all__ = [
    "check_data_processing",
    "check_exact_zeros",
    "check_finite_at",
    "check_gradient",
    "check_mask_is_slicing",
    "check_non_negative",
    "check_permutation_invariant",
    "check_shape_and_type",
    "check_shift_invariant",
    "check_split_is_whole",
    "check_squared_temperature",
    "check_value",
    "check_zero_at_equality",
]

LogitLoss = Callable[[Divergence, Tensor, Tensor], Tensor]
TemperedLoss = Callable[[Divergence, Tensor, Tensor, float], Tensor]
_REFERENCE = ((0.6, 0.3, 0.1), (0.3, 0.3, 0.4))


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the size of the entry where that is above 1; inf for a NaN or a wrong inf."""
    if found.shape != wanted.shape:
        return math.inf
    difference = (found - wanted).abs() / wanted.abs().clamp(min=1.0)
    difference = difference.masked_fill(found == wanted, 0.0).nan_to_num(nan=math.inf)
    return difference.max().item() if difference.numel() else 0.0


def _logits(generator: torch.Generator, *shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits of two different distributions, float64."""
    target, model = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return target, model


def _pair(generator: torch.Generator, *shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of two different distributions, float64."""
    target, model = _logits(generator, *shape, scale=scale)
    return torch.log_softmax(target, -1), torch.log_softmax(model, -1)


def _gradients(loss: Callable[[Tensor, Tensor], Tensor], target: Tensor, model: Tensor) -> tuple[Tensor, ...]:
    """The gradients of sum loss(log_softmax(target), log_softmax(model)) by both logits, 0 where there is none."""
    inputs = (target.clone().requires_grad_(), model.clone().requires_grad_())
    total = loss(torch.log_softmax(inputs[0], -1), torch.log_softmax(inputs[1], -1)).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def check_value(divergence: Divergence, expected: float, *, tolerance: float = 1e-10) -> None:
    """D((.6, .3, .1) || (.3, .3, .4)) is `expected` in float64, and to 2e-6 in float32.

    A divergence with its arguments exchanged, in bits, averaged over outcomes or with a lost factor is seen here.

    >>> from kullback.divergences import kl
    >>> check_value(kl, 0.2772588722)
    """
    for dtype, allowed in ((torch.float64, tolerance), (torch.float32, 2e-6)):
        log_p, log_q = (torch.tensor(probabilities, dtype=dtype).log() for probabilities in _REFERENCE)
        found = divergence(log_p, log_q).item()
        near = abs(found - expected) <= allowed * max(1.0, abs(expected))
        _require(near, f"the value at the reference pair is {expected:.10g}, and it is {found:.10g} in {dtype}")


def check_zero_at_equality(divergence: Divergence, generator: torch.Generator, *, tolerance: float = 1e-12) -> None:
    """D(p||p) = 0, for flat and for peaked p."""
    for scale in (0.1, 2.0, 20.0):
        log_p, _ = _pair(generator, 16, 9, scale=scale)
        worst = divergence(log_p, log_p.clone()).abs().max().item()
        message = f"a divergence of a distribution from itself is 0, and it is up to {worst:.6g} here"
        _require(worst <= tolerance, message)


def check_non_negative(divergence: Divergence, generator: torch.Generator, *, tolerance: float = 1e-12) -> None:
    """D(p||q) >= 0 near and far from p = q, and > 0 where they clearly differ."""
    for scale in (1e-4, 0.1, 2.0, 20.0):
        log_p, other = _pair(generator, 64, 9, scale=scale)
        base, _ = _pair(generator, 64, 9)
        log_q = torch.log_softmax(base + other, -1)
        for p, q in ((torch.log_softmax(base + log_p, -1), log_q), (log_p, other)):
            least = divergence(p, q).min().item()
            _require(least >= -tolerance, f"a divergence is never negative, and it is {least:.6g} here")
            _require(scale != 2.0 or least > 0.0, f"two different distributions diverge, and the value is {least:.6g}")


def _through(log_p: Tensor, log_channel: Tensor) -> Tensor:
    """The log-probabilities [..., M] of what a channel [V, M] makes of a distribution [..., V]."""
    return torch.logsumexp(log_p.unsqueeze(-1) + log_channel, dim=-2)


def check_data_processing(divergence: Divergence, generator: torch.Generator, *, tolerance: float = 1e-9) -> None:
    """D(pW||qW) <= D(p||q) through a channel W that mixes or merges outcomes; equal where W only splits each in two."""
    log_p, log_q = _pair(generator, 64, 8)
    before = divergence(log_p, log_q)
    scale = 1.0 + before.abs()
    for _ in range(8):
        mixing = torch.log_softmax(2.0 * torch.randn(8, 6, generator=generator, dtype=torch.float64), -1)
        groups = torch.randint(0, 5, (8,), generator=generator)
        merging = torch.nn.functional.one_hot(groups, 5).double().log()
        for name, channel in (("mixes", mixing), ("merges", merging)):
            gain = ((divergence(_through(log_p, channel), _through(log_q, channel)) - before) / scale).max().item()
            _require(gain <= tolerance, f"a channel that {name} outcomes brings no divergence, and it adds {gain:.6g}")
    share = torch.rand(8, generator=generator, dtype=torch.float64)
    parts = torch.stack([share, 1.0 - share]).log()
    split_p, split_q = ((x.unsqueeze(-2) + parts).flatten(-2) for x in (log_p, log_q))
    change = _apart(divergence(split_p, split_q), before)
    _require(change <= tolerance, f"outcomes split in the same shares change no divergence, and it moves {change:.6g}")


def check_permutation_invariant(
    divergence: Divergence, generator: torch.Generator, *, tolerance: float = 1e-12
) -> None:
    """The order of the outcomes, the same for p and q, does not matter; nor does that of the rows."""
    log_p, log_q = _pair(generator, 16, 9)
    value = divergence(log_p, log_q)
    order = torch.randperm(9, generator=generator)
    change = _apart(divergence(log_p[:, order], log_q[:, order]), value)
    _require(change <= tolerance, f"the order of the outcomes does not matter, and the value moves {change:.6g}")
    order = torch.randperm(16, generator=generator)
    change = _apart(divergence(log_p[order], log_q[order]), value[order])
    _require(change <= tolerance, f"the order of the rows does not matter, and it changes their values by {change:.6g}")


def check_shift_invariant(
    divergence: Divergence, generator: torch.Generator, *, loss: LogitLoss = from_logits, tolerance: float = 1e-9
) -> None:
    """loss(D, target + c, model + c') = loss(D, target, model) for logits; the gradients by them sum to 0 over V."""
    target, model = _logits(generator, 16, 9)
    shifts = 5.0 * torch.randn(2, 16, 1, generator=generator, dtype=torch.float64)
    inputs = (target.requires_grad_(), model.requires_grad_())
    value = loss(divergence, *inputs)
    change = _apart(loss(divergence, target + shifts[0], model + shifts[1]), value)
    _require(change <= tolerance, f"a constant added to all logits changes nothing, and the value moves {change:.6g}")
    for gradient in torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True):
        total = gradient.sum(-1).abs().max().item()
        _require(total <= tolerance, f"the gradients by the logits of a row sum to 0, and their sum is {total:.6g}")


def _at_temperature(divergence: Divergence, target: Tensor, model: Tensor, temperature: float) -> Tensor:
    return temperature**2 * from_logits(divergence, target, model, temperature)


def check_squared_temperature(
    divergence: Divergence, generator: torch.Generator, *, loss: TemperedLoss = _at_temperature
) -> None:
    """T^2 D at temperature T keeps its size as T grows, for any D with a second derivative at p = q."""
    target, model = _logits(generator, 16, 9, scale=1.0)
    one, other = (loss(divergence, target, model, temperature).mean().item() for temperature in (200.0, 400.0))
    ratio = other / one if one else math.nan
    message = f"a loss with its factor T^2 is as large at twice T, and it is {ratio:.4g} times as large"
    _require(abs(ratio - 1.0) < 0.05, message)


def check_gradient(divergence: Divergence, generator: torch.Generator) -> None:
    """The gradients by both logits, behind log_softmax, are those of finite differences in float64."""
    for scale in (0.5, 2.0):
        inputs = tuple(logits.requires_grad_() for logits in _logits(generator, 4, 5, scale=scale))
        weight = torch.rand(4, generator=generator, dtype=torch.float64)

        def weighted(target: Tensor, model: Tensor, weight: Tensor = weight) -> Tensor:
            return weight * divergence(torch.log_softmax(target, -1), torch.log_softmax(model, -1))

        try:
            torch.autograd.gradcheck(weighted, inputs, rtol=1e-5, atol=1e-8)
        except RuntimeError as error:
            raise AssertionError(f"the gradient is not that of finite differences: {error}") from error


def _some(generator: torch.Generator, *shape: int) -> Tensor:
    """A random mask with both kinds in it, and most of its true entries in the first part."""
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    mask[2:, 1:] = False
    return mask


def check_mask_is_slicing(
    divergence: Divergence,
    generator: torch.Generator,
    *,
    mean: Callable[..., Tensor] = masked_mean,
    tolerance: float = 1e-12,
) -> None:
    """mean(D(p, q), mask) is the mean over the rows kept, and so is its gradient, whatever the other rows hold."""
    target, model = _logits(generator, 4, 5, 9)
    mask = _some(generator, 4, 5)
    ruined = (~mask).unsqueeze(-1) & (torch.arange(9) < 4)  # in these rows p and q share no outcome
    target, model = target.masked_fill(ruined, -math.inf), model.masked_fill(ruined.flip(-1), -math.inf)
    target[..., 4], model[..., 4] = -math.inf, -math.inf
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(model, -1)
    found, wanted = mean(divergence(log_p, log_q), mask), divergence(log_p[mask], log_q[mask]).mean()
    change = _apart(found, wanted)
    _require(change <= tolerance, f"a masked mean is the mean over the rows kept, and it is off by {change:.6g}")
    masked = _gradients(lambda p, q: mean(divergence(p, q), mask), target, model)
    sliced = _gradients(lambda p, q: divergence(p[mask], q[mask]).mean(), target, model)
    change = max(_apart(found, wanted) for found, wanted in zip(masked, sliced))
    _require(change <= tolerance, f"no gradient reaches what is masked, and the gradients are off by {change:.6g}")


def check_split_is_whole(
    divergence: Divergence,
    generator: torch.Generator,
    *,
    mean: Callable[..., Tensor] = masked_mean,
    tolerance: float = 1e-12,
) -> None:
    """With the global count, means over the parts of a batch add up to that of the batch; so do the gradients."""
    target, model = _logits(generator, 4, 5, 9)
    mask = _some(generator, 4, 5)
    count = mask.sum()

    def in_parts(log_p: Tensor, log_q: Tensor) -> Tensor:
        parts = (slice(0, 2), slice(2, 4))
        return sum((mean(divergence(log_p[i], log_q[i]), mask[i], count=count) for i in parts), torch.zeros(()))

    def at_once(log_p: Tensor, log_q: Tensor) -> Tensor:
        return mean(divergence(log_p, log_q), mask)

    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(model, -1)
    change = _apart(in_parts(log_p, log_q), at_once(log_p, log_q))
    _require(change <= tolerance, f"the parts of a batch add up to the batch, and they are off by {change:.6g}")
    both = zip(_gradients(in_parts, target, model), _gradients(at_once, target, model))
    change = max(_apart(found, wanted) for found, wanted in both)
    _require(change <= tolerance, f"the gradients of the parts add up to the batch's, and are off by {change:.6g}")


def _deep(generator: torch.Generator, depth: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of rows in which the model, the target, both or by turns each give outcomes a log-probability of depth."""
    target, model = _logits(generator, 4, 6, scale=1.0)
    model[0, 0] = target[1, 0] = target[2, 0] = model[2, 0] = depth
    target[3, :3], model[3, 3:] = depth, depth
    return target.to(dtype), model.to(dtype)


def check_finite_at(
    divergence: Divergence,
    generator: torch.Generator,
    *,
    log_probability: float = -1e4,
    tail: Literal["grows", "bounded", "overflows"] = "bounded",
) -> None:
    """Value and gradient are finite where a log-probability is -1e4, in float32 and float64.

    tail: what becomes of the value of two distributions that put their mass where the other has that log-probability,
    when it doubles: it "grows" in proportion (KL; what clamps probabilities does not), it is at its bound ("bounded",
    JSD), or it is beyond the numbers of the type ("overflows", chi-squared; then only NaN is ruled out).
    """
    state = generator.get_state()
    for dtype in (torch.float32, torch.float64):
        values = []
        for depth in (log_probability, 2.0 * log_probability):
            generator.set_state(state)  # the same rows each time
            target, model = _deep(generator, depth, dtype)
            value = divergence(torch.log_softmax(target, -1), torch.log_softmax(model, -1))
            values.append(value[3].item())
            where = f"where a log-probability is {depth:g} in {dtype}"
            _require(not bool(value.isnan().any()), f"the value is a number {where}, and it is NaN")
            if tail == "overflows":
                continue
            _require(bool(value.isfinite().all()), f"the value is finite {where}, and it is {value.tolist()}")
            finite = all(bool(x.isfinite().all()) for x in _gradients(divergence, target, model))
            _require(finite, f"the gradient is finite {where}, and it is not")
        if tail != "overflows":
            ratio, wanted = values[1] / values[0], 2.0 if tail == "grows" else 1.0
            message = f"twice the log-probability multiplies the value by {wanted:g}, and it does by {ratio:.4g}"
            _require(abs(ratio - wanted) < 1e-2, message)


def check_exact_zeros(
    divergence: Divergence,
    generator: torch.Generator,
    *,
    infinite_at_model_zero: bool = False,
    infinite_at_target_zero: bool = False,
    tolerance: float = 1e-5,
) -> None:
    """Log-probabilities of -inf: on both sides they count for nothing; on one side the value is inf, or the limit.

    infinite_at_model_zero: whether D is infinite where q = 0 < p, as KL is; infinite_at_target_zero: where p = 0 < q.
    """
    for dtype in (torch.float32, torch.float64):
        target, model = (x.to(dtype) for x in _logits(generator, 8, 6, scale=1.0))
        nothing = torch.full((8, 3), -math.inf, dtype=dtype)
        padded_target, padded_model = torch.cat([target, nothing], -1), torch.cat([model, nothing], -1)
        wanted = divergence(torch.log_softmax(target, -1), torch.log_softmax(model, -1))
        found = divergence(torch.log_softmax(padded_target, -1), torch.log_softmax(padded_model, -1))
        change = _apart(found, wanted)
        _require(change <= tolerance, f"outcomes that neither side has count for nothing, and they add {change:.6g}")
        pairs = zip(_gradients(divergence, padded_target, padded_model), _gradients(divergence, target, model))
        change = max(_apart(x, torch.cat([y, torch.zeros_like(nothing)], -1)) for x, y in pairs)
        _require(change <= tolerance, f"outcomes that neither side has get no gradient, and it is off by {change:.6g}")
        hole = torch.arange(6) == 0
        for side, infinite in (("model", infinite_at_model_zero), ("target", infinite_at_target_zero)):
            _check_one_sided_zero(divergence, target, model, hole, side, infinite, tolerance)


def _check_one_sided_zero(
    divergence: Divergence, target: Tensor, model: Tensor, hole: Tensor, side: str, infinite: bool, tolerance: float
) -> None:
    def at(logit: float) -> tuple[Tensor, Tensor]:
        if side == "model":
            return target, model.masked_fill(hole, logit)
        return target.masked_fill(hole, logit), model

    def value(logit: float) -> Tensor:
        log_p, log_q = (torch.log_softmax(x, -1) for x in at(logit))
        return divergence(log_p, log_q)

    found = value(-math.inf)
    if infinite:
        right = bool((found == math.inf).all())
        _require(right, f"the value is inf where only the {side} has an exact zero, and it is {found.tolist()}")
        return
    change = _apart(found, value(-1e4))
    _require(change <= tolerance, f"an exact zero of the {side} is a limit, and the value there is off by {change:.6g}")
    finite = all(bool(x.isfinite().all()) for x in _gradients(divergence, *at(-math.inf)))
    _require(finite, f"the gradient is finite where only the {side} has an exact zero, and it is not")


def check_shape_and_type(divergence: Divergence, generator: torch.Generator) -> None:
    """[..., V] to [...]; float32 agrees with float64, halves come back as float32, and strides do not matter."""
    log_p, log_q = _pair(generator, 3, 4, 9)
    value = divergence(log_p, log_q)
    _require(value.shape == (3, 4), f"[3, 4, V] becomes [3, 4], and the result has shape {tuple(value.shape)}")
    _require(value.dtype == torch.float64, f"float64 stays float64, and the result is {value.dtype}")
    one_row = divergence(log_p[1, 2], log_q[1, 2])
    _require(_apart(one_row, value[1, 2]) <= 1e-12, "a row has the same value alone as among others, and it has not")
    strided = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (log_p, log_q))
    _require(_apart(divergence(*strided), value) <= 1e-12, "the strides of the inputs do not matter, and they do")
    single = divergence(log_p.float(), log_q.float())
    _require(single.dtype == torch.float32, f"float32 stays float32, and the result is {single.dtype}")
    change = _apart(single.double(), value)
    _require(change <= 1e-4, f"float32 agrees with float64, and it is off by {change:.6g}")
    half = divergence(log_p.bfloat16(), log_q.bfloat16())
    _require(half.dtype == torch.float32, f"halves are computed in float32, and the result is {half.dtype}")
    rounded = divergence(log_p.bfloat16().float(), log_q.bfloat16().float())
    _require(_apart(half, rounded) == 0.0, "a half has the value of the same number as float32, and it has not")
