r"""Sums of Gaussian kernels between two clouds, row by row, in log space and in bounded memory.

    r_i = log sum_j exp(b_j - |u_i - v_j|^2 / 2),    dr_i/du_i = sum_j P_ij v_j - u_i,    dr_i/dv_j = P_ij (u_i - v_j),

where P_ij is the share of j in the sum of row i. Points come divided by their bandwidths, so that kernels of several
variables are one kernel of what is joined. The sums r are in double precision where a device has it, for little is left
of their differences. Backward makes P again instead of keeping it, a few rows at a time; few kernels are kept.

Shapes: u [..., N, d], v [..., M, d], b [..., M]; r [..., N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kullback.core.errors import ConfigError

__all__ = ["log_kernel_rows"]

_ENTRIES = 1 << 20  # kernels held at once on a CPU; on an accelerator 64 times that
_KEPT = 1 << 18  # so many or fewer are kept for backward: 1 MB in float32


def log_kernel_rows(
    u: Tensor, v: Tensor, *, offset: Tensor | None = None, exclude_self: bool = False, chunk: int | None = None
) -> Tensor:
    """log sum_j exp(offset_j - |u_i - v_j|^2 / 2) for every row of u [..., N, d] over those of v [..., M, d]: [..., N].

    offset [..., M]; exclude_self: leave j = i out; chunk: rows at once. Differentiable once in u, v and offset.

    >>> log_kernel_rows(torch.zeros(1, 1), torch.tensor([[0.0], [1.0]])).exp()
    tensor([1.6065], dtype=torch.float64)
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is a number of rows, at least 1, got {chunk}")
    if chunk is None:
        room = _ENTRIES if u.device.type == "cpu" else 64 * _ENTRIES
        chunk = max(room // max(v.shape[:-1].numel(), 1), 1)
    centre = v.detach().mean(-2, keepdim=True)  # distances are as they were, and their products smaller
    rows: Tensor = _KernelRows.apply(u - centre, v - centre, offset, exclude_self, chunk)
    return rows


def _exponents(u: Tensor, v: Tensor, shift: Tensor, begin: int, exclude_self: bool) -> Tensor:
    """offset_j - |u_i - v_j|^2 / 2 of some rows, from shift = offset - |v|^2 / 2 [..., 1, M]."""
    scores = torch.matmul(u, v.mT).add_(shift)
    scores.sub_(u.square().sum(-1, keepdim=True).mul_(0.5))
    if exclude_self:
        scores.diagonal(begin, -2, -1)[..., : u.shape[-2]].fill_(-math.inf)
    return scores


class _KernelRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, offset: Tensor | None, exclude_self: bool, chunk: int) -> Tensor:
        shift = _shift(v, offset)
        parts = []
        for begin in range(0, u.shape[-2], chunk):
            scores = _exponents(u[..., begin : begin + chunk, :], v, shift, begin, exclude_self)
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            total = scores.sub_(top).exp_().sum(-1)
            parts.append(_precise(total).log().add_(top.squeeze(-1)))
        ctx.exclude_self, ctx.chunk = exclude_self, chunk
        ctx.kept = len(parts) == 1 and scores.numel() <= _KEPT and any(ctx.needs_input_grad)
        if ctx.kept:
            ctx.save_for_backward(u, v, scores, total)
            return parts[0]
        rows = torch.cat(parts, -1)
        ctx.save_for_backward(u, v, rows, *([] if offset is None else [offset]))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if ctx.kept:
            u, v, scores, total = ctx.saved_tensors
            return *_of_kept(u, v, scores, total, grad, ctx.needs_input_grad), None, None
        u, v, rows, *offset = ctx.saved_tensors
        shift, (need_u, need_v, need_offset, *_) = _shift(v, *offset), ctx.needs_input_grad
        by_u = torch.empty_like(u) if need_u else None
        by_v = torch.zeros_like(v) if need_v else None
        mass = v.new_zeros(v.shape[:-1])
        for begin in range(0, u.shape[-2], ctx.chunk):
            place = slice(begin, begin + ctx.chunk)
            part, weight = u[..., place, :], grad[..., place].unsqueeze(-1).to(u.dtype)
            scores = _exponents(part, v, shift, begin, ctx.exclude_self)
            own = rows[..., place].nan_to_num(neginf=0.0).unsqueeze(-1).to(u.dtype)
            share = scores.sub_(own).exp_().mul_(weight)
            if by_u is not None:
                by_u[..., place, :] = torch.matmul(share, v) - weight * part
            if by_v is not None:
                by_v += torch.matmul(share.mT, part)
            if need_v or need_offset:
                mass += share.sum(-2)
        if by_v is not None:
            by_v -= mass.unsqueeze(-1) * v
        return by_u, by_v, mass if need_offset else None, None, None


def _of_kept(
    u: Tensor, v: Tensor, scores: Tensor, total: Tensor, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, from kernels [..., N, M] that are relative to the largest of each row, and their sums [..., N]."""
    # the sum is at least 1, or 0 where nothing is left: then all are 0 and no NaN reaches a gradient
    need_u, need_v, need_offset, *_ = needed
    weight = grad.unsqueeze(-1).to(u.dtype)
    share = scores * (weight / total.clamp(min=1.0).unsqueeze(-1))
    by_u = torch.matmul(share, v).sub_(weight * u) if need_u else None
    mass = share.sum(-2) if need_v or need_offset else None
    by_v = torch.matmul(share.mT, u).sub_(mass.unsqueeze(-1) * v) if need_v and mass is not None else None
    return by_u, by_v, mass if need_offset else None


def _precise(total: Tensor) -> Tensor:
    return total.clone() if total.device.type == "mps" else total.double()


def _shift(v: Tensor, offset: Tensor | None = None) -> Tensor:
    shift = v.square().sum(-1).mul_(-0.5)
    return (shift if offset is None else shift + offset).unsqueeze(-2)
