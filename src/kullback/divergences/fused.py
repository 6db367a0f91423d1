"""The one autograd function behind the divergences: the value and its closed-form gradients in the same pass.

A divergence D(p||q) = sum_i d(p_i, q_i) is given by a kernel that returns D and, where wanted, dD/dlog p and dD/dlog q.
The gradients are those on normalised distributions, that is, exact behind log_softmax: a kernel may leave out any
multiple of p from dD/dlog p and of q from dD/dlog q, which log_softmax projects away.

Shapes: log_p and log_q [..., V] normalised log-probabilities in nats; values [...].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ShapeError

__all__ = ["Kernel", "Terms", "carry_nan", "check_pair", "fused", "log_ratio"]


class Terms(NamedTuple):
    """The value [...] and, each None unless asked for, its gradients [..., V] by log_p and log_q."""

    value: Tensor
    grad_p: Tensor | None
    grad_q: Tensor | None


@dataclass(frozen=True)
class Kernel:
    """`terms(log_p, log_q, need_p, need_q)`, whose gradients are still to be multiplied by scale_p and scale_q."""

    terms: Callable[[Tensor, Tensor, bool, bool], Terms]
    scale_p: float = 1.0
    scale_q: float = 1.0


def check_pair(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in their common floating type, halves widened to float32; ShapeError when they do not match.

    >>> p, q = check_pair(torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 5))
    >>> p.dtype, q.dtype
    (torch.float32, torch.float32)
    """
    if log_p.ndim == 0 or log_q.ndim == 0:
        raise ShapeError("a divergence takes log-probabilities [..., V] and got a scalar: keep the outcome dimension")
    if log_p.shape[-1] == 0:
        raise ShapeError("a divergence needs an outcome at least: the last dimension is empty")
    if log_p.shape[-1] != log_q.shape[-1]:
        raise ShapeError(
            f"log_p has {log_p.shape[-1]} outcomes and log_q has {log_q.shape[-1]}: cut both to the shared vocabulary "
            "before log_softmax if one is padded; different tokenisers cannot be compared token by token"
        )
    if log_p.shape != log_q.shape:
        raise ShapeError(
            f"log_p has shape {tuple(log_p.shape)} and log_q has {tuple(log_q.shape)}: give both the same shape, "
            "with expand() where one distribution meets many"
        )
    dtype = torch.promote_types(torch.promote_types(log_p.dtype, log_q.dtype), torch.float32)
    return log_p.to(dtype), log_q.to(dtype)


def log_ratio(log_p: Tensor, log_q: Tensor, *, bounded: bool = False) -> Tensor:
    """A fresh tensor log p - log q with 0 where both are -inf; `bounded` clamps it to where its exp is a normal number.

    The clamp changes nothing that is multiplied by p or q and grows no faster than the ratio: beyond it the smaller of
    the two probabilities is below the smallest normal number. A NaN also becomes 0: see `carry_nan`.
    """
    ratio = (log_p - log_q).nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    if bounded:
        limit = 80.0 if ratio.dtype == torch.float32 else 700.0
        ratio.clamp_(-limit, limit)
    return ratio


def carry_nan(value: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The value [...], NaN in the rows in which an input holds a NaN that a kernel's clean-up may have removed."""
    return value + 0.0 * (log_p.amax(-1) + log_q.amax(-1))


_BLOCK = 2**17  # elements a thread takes at a time on a CPU, so that what a kernel holds stays in the cache


def _evaluate(kernel: Kernel, log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> Terms:
    """The kernel's terms, on a CPU a block of rows at a time: the same numbers with less memory, in less time."""
    if torch.compiler.is_compiling() or log_p.device.type != "cpu":
        return kernel.terms(log_p, log_q, need_p, need_q)
    outcomes = log_p.shape[-1]
    step = max(_BLOCK * torch.get_num_threads() // max(outcomes, 1), 1)
    if log_p.numel() <= step * outcomes:
        return kernel.terms(log_p, log_q, need_p, need_q)
    rows_p, rows_q = log_p.reshape(-1, outcomes), log_q.reshape(-1, outcomes)
    value = rows_p.new_empty(len(rows_p))
    grad_p = rows_p.new_empty(rows_p.shape) if need_p else None
    grad_q = rows_q.new_empty(rows_q.shape) if need_q else None
    for begin in range(0, len(rows_p), step):
        rows = slice(begin, begin + step)
        for whole, part in zip((value, grad_p, grad_q), kernel.terms(rows_p[rows], rows_q[rows], need_p, need_q)):
            if whole is not None and part is not None:
                whole[rows] = part
    gradients = (None if grad is None else grad.view(log_p.shape) for grad in (grad_p, grad_q))
    return Terms(value.view(log_p.shape[:-1]), *gradients)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(kernel: Kernel, log_p: Tensor, log_q: Tensor, need_p: bool, need_q: bool) -> tuple[Any, ...]:
        return tuple(_evaluate(kernel, log_p, log_q, need_p, need_q))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        gradients = [g for g in output[1:] if g is not None]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.scales = [s if g is not None else None for s, g in zip((inputs[0].scale_p, inputs[0].scale_q), output[1:])]
        ctx.save_for_backward(*gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kernel: Kernel, *inputs: Any) -> tuple[Any, ...]:
        """A mapped dimension is one more dimension of rows."""
        log_p, log_q = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(inputs[:2], in_dims[1:3])
        )
        outputs = _Fused.apply(kernel, log_p, log_q, *inputs[2:])
        return outputs, tuple(None if x is None else 0 for x in outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        if torch.is_grad_enabled() and grad.requires_grad:
            raise RuntimeError(
                "this divergence has closed-form first derivatives only: for a second derivative (create_graph=True) "
                "take f_divergence(name).definition, which autograd can differentiate any number of times"
            )
        saved = iter(ctx.saved_tensors)
        by_p, by_q = (None if s is None else next(saved) * (grad * s).unsqueeze(-1) for s in ctx.scales)
        return None, by_p, by_q, None, None


def fused(kernel: Kernel, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Apply a kernel: the value [...] in the inputs' type (float32 at least), differentiable once in both inputs."""
    log_p, log_q = check_pair(log_p, log_q)
    recording = torch.is_grad_enabled()
    need_p, need_q = recording and log_p.requires_grad, recording and log_q.requires_grad
    value: Tensor = _Fused.apply(kernel, log_p, log_q, need_p, need_q)[0]
    return value
