"""Entropic optimal transport by Sinkhorn's algorithm: plans, costs, and the Sinkhorn divergence over a vocabulary.

    min over P with P 1 = a, P^T 1 = b of  <P, C> + eps KL(P || a b^T)

has the optimum P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), which Sinkhorn's algorithm reaches by
f = -eps log sum_j b_j exp((g_j - C_ij) / eps) and the like for g, in turn.

An iteration scales a kernel K = exp((f + g - C) / eps) by two matrix-vector products and takes no exponential. When a
scaling leaves the range in which the entries of K that underflowed are negligible, it moves into f and g by a step in
the log domain and K is formed anew, so that the results are those of the log domain at every eps.

Shapes: cost C [..., M, N]; log-weights log_a [..., M] and log_b [..., N], normalised, in nats (-inf for a weight of 0),
uniform where none are given; leading dimensions broadcast. Costs, eps and results share one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences.fused import check_pair

__all__ = ["Plan", "sinkhorn_cost", "sinkhorn_divergence", "sinkhorn_plan"]

_SMALL = 96  # columns up to which powers of a matrix cost less than the calls of an iteration

Mode = Literal["sharp", "entropic", "debiased"]
Gradient = Literal["envelope", "unroll"]


class Plan(NamedTuple):
    """A transport plan [..., M, N], its potentials f [..., M] and g [..., N], and the violation of its row sums.

    error [...]: sum_i |sum_j P_ij - a_i| for a plan of unit mass; the column sums are exact.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    error: Tensor


@dataclass(frozen=True, slots=True)
class _Options:
    eps: float
    n_iters: int
    tol: float | None
    scaling: float | None

    def __post_init__(self) -> None:
        if not 0.0 < self.eps < math.inf:
            raise ConfigError(f"eps must be positive and finite and is {self.eps}: it is the entropy's weight")
        if isinstance(self.n_iters, float) or self.n_iters < 1:
            raise ConfigError(f"n_iters must be a whole number of at least 1 and is {self.n_iters}")
        if self.tol is not None and not self.tol > 0.0:
            raise ConfigError(f"tol must be positive and is {self.tol}: None runs all iterations")
        if self.scaling is not None and not 0.0 < self.scaling < 1.0:
            raise ConfigError(f"scaling must lie in (0, 1) and is {self.scaling}: None starts at eps itself")


class _Scaled(NamedTuple):
    """P = left_i K_ij right_j with left = a / above and right = b / col, K the kernel of f and g.

    row = K right, by which the next iteration divides, so that left row are the sums of P's rows.
    """

    kernel: Tensor
    f: Tensor
    g: Tensor
    left: Tensor
    right: Tensor
    above: Tensor
    col: Tensor
    row: Tensor

    def plan(self) -> Tensor:
        return self.left.unsqueeze(-1) * self.kernel * self.right.unsqueeze(-2)

    def potentials(self, eps: float) -> tuple[Tensor, Tensor]:
        return self.f - eps * self.above.log(), self.g - eps * self.col.log()

    def error(self, a: Tensor) -> Tensor:
        return (self.left * self.row - a).abs().sum(-1)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [..., M, N] times x [..., N]; a matrix that all x share makes it a single product."""
    if x.ndim == 1 and matrix.ndim == 2:
        return torch.mv(matrix, x)
    return (x.unsqueeze(-2) @ matrix.mT).squeeze(-2)


def _log_step(cost: Tensor, log_a: Tensor, log_b: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One iteration in the log domain, differentiable: f from g, then g from f."""
    f = -eps * torch.logsumexp(log_b.unsqueeze(-2) + (g.unsqueeze(-2) - cost) / eps, dim=-1)
    g = -eps * torch.logsumexp(log_a.unsqueeze(-1) + (f.unsqueeze(-1) - cost) / eps, dim=-2)
    return f, g


def _annealed(cost: Tensor, log_a: Tensor, log_b: Tensor, options: _Options) -> Tensor:
    """g after one step at each of the entropies  max C, max C scaling, max C scaling^2, ...  above eps."""
    g = torch.zeros_like(log_b)
    if options.scaling is None:
        return g
    eps = float(cost.detach().max())
    while eps > options.eps:
        _, g = _log_step(cost, log_a, log_b, g, eps)
        eps *= options.scaling
    return g


def _unrolled(cost: Tensor, log_a: Tensor, log_b: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """f and g by plain iterations in the log domain, which autograd can follow: the naive twin of `_solve`."""
    g = _annealed(cost, log_a, log_b, options)
    for _ in range(options.n_iters):
        f, g = _log_step(cost, log_a, log_b, g, options.eps)
        if options.tol is not None:
            row = _plan(cost, log_a, log_b, f, g, options.eps).detach().sum(-1)
            if bool(((row - log_a.exp()).abs().sum(-1) <= options.tol).all()):
                break
    return f, g


def _plan(cost: Tensor, log_a: Tensor, log_b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    return (log_a.unsqueeze(-1) + log_b.unsqueeze(-2) + (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps).exp()


def _fresh(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> _Scaled:
    """The kernel of f and g, all scalings 1; entries too small to matter are 0, for denormal numbers are slow.

    Entries are large only between two weights that are smaller still, and bounded so that they never meet a weight of 0
    as infinities.
    """
    tiny = torch.finfo(cost.dtype).tiny
    kernel = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost).div_(eps).exp_().clamp_(max=tiny**-0.5)
    kernel = torch.nn.functional.threshold(kernel, tiny**0.75, 0.0, inplace=True)
    return _Scaled(kernel, f, g, a, b, torch.ones_like(a), torch.ones_like(b), _product(kernel, b))


def _iterate(now: _Scaled, a: Tensor, b: Tensor, count: int) -> _Scaled:
    kernel, f, g, left, right, above, col, row = now
    transposed = kernel.mT
    for _ in range(count):
        above, left = row, a / row
        col = _product(transposed, left)
        right = b / col
        row = _product(kernel, right)
    return _Scaled(kernel, f, g, left, right, above, col, row)


def _in_range(now: _Scaled) -> bool:
    """Whether the scalings are such that the entries of K that underflowed are negligible still; false for NaN."""
    scales = torch.cat((now.above, now.col), dim=-1)
    if scales.numel() == 0:
        return True
    low, high = torch.aminmax(scales)
    bound = torch.finfo(scales.dtype).tiny ** -0.25
    return low.item() > 1.0 / bound and high.item() < bound


@torch.no_grad()
def _solve(
    cost: Tensor, log_a: Tensor, log_b: Tensor, options: _Options, start: Tensor | None = None
) -> tuple[_Scaled, int]:
    """The scaled kernel after n_iters iterations, or fewer with tol, from g = start or 0; and how many they were.

    Blocks of scalings, and where one leaves the range, a step in the log domain in its place and shorter blocks.
    """
    eps, a, b = options.eps, log_a.exp(), log_b.exp()
    longest = 32 if options.tol is None else 8
    if start is None:
        # From g = 0 the first kernel depends on the cost alone: many weights may share it.
        start = cost.new_zeros(cost.shape[-1]) if options.scaling is None else _annealed(cost, log_a, log_b, options)
    now = _fresh(cost, a, b, (cost - start.unsqueeze(-2)).amin(-1), start, eps)
    done, block = 0, longest
    while done < options.n_iters:
        block = min(block, options.n_iters - done)
        tried = _iterate(now, a, b, block)
        if _in_range(tried):
            now, done, block = tried, done + block, min(2 * block, longest)
        else:
            f, g = _log_step(cost, log_a, log_b, now.potentials(eps)[1], eps)
            now, done, block = _fresh(cost, a, b, f, g, eps), done + 1, 1
        if options.tol is not None and bool((now.error(a) <= options.tol).all()):
            break
    return now, done


class _WithGradients(torch.autograd.Function):
    """value [...] with given derivatives by cost [..., M, N], log_a [..., M], log_b [..., N], None where not needed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.shapes = [t.shape for t in tensors[:3] if t is not None]
        ctx.save_for_backward(*tensors[3:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'gradient="envelope" has first derivatives only: for a second one (create_graph=True) take "unroll"'
            )
        gradients: list[Tensor | None] = []
        for shape, by, dimensions in zip(ctx.shapes, ctx.saved_tensors, (2, 1, 1)):
            spread = grad.reshape(grad.shape + (1,) * dimensions)
            gradients.append(None if by is None else (spread * by).sum_to_size(shape))
        return None, *gradients, None, None, None


def _with_gradients(
    value: Tensor, inputs: tuple[Tensor, Tensor, Tensor], derivatives: Sequence[Callable[[], Tensor]]
) -> Tensor:
    needed = [t.requires_grad and torch.is_grad_enabled() for t in inputs]
    if not any(needed):
        return value
    with torch.no_grad():
        by = [derivative() if need else None for derivative, need in zip(derivatives, needed)]
    return _WithGradients.apply(value, *inputs, *by)


def _entropic(cost: Tensor, log_a: Tensor, log_b: Tensor, options: _Options, gradient: Gradient) -> Tensor:
    """The dual value <a, f> + <b, g>; its derivatives at fixed f and g are P, f and g."""
    if gradient == "unroll":
        f, g = _unrolled(cost, log_a, log_b, options)
        return (log_a.exp() * f).sum(-1) + (log_b.exp() * g).sum(-1)
    scaled, _ = _solve(cost, log_a, log_b, options)
    f, g = scaled.potentials(options.eps)
    by_a, by_b = log_a.detach().exp() * f, log_b.detach().exp() * g
    value = by_a.sum(-1) + by_b.sum(-1)
    return _with_gradients(value, (cost, log_a, log_b), (scaled.plan, lambda: by_a, lambda: by_b))


def _sharp(cost: Tensor, log_a: Tensor, log_b: Tensor, options: _Options, gradient: Gradient) -> Tensor:
    """<P, C>, with the derivatives that the implicit function theorem gives at the optimum.

    Moving C by dC moves P by P (df + dg - dC) / eps with df + dg such that the marginals stay, so that d<P, C> is
    <P (1 + (u + v - C) / eps), dC> + <u, da> + <v, db>, where u_i + v_j is the best fit to C_ij in L2(P).
    """
    if gradient == "unroll":
        f, g = _unrolled(cost, log_a, log_b, options)
        return (_plan(cost, log_a, log_b, f, g, options.eps) * cost).sum((-2, -1))
    scaled, iterations = _solve(cost, log_a, log_b, options)
    weighted = scaled.kernel * cost.detach()
    row_cost = scaled.left * _product(weighted, scaled.right)
    fit = cache(lambda: _additive_fit(scaled, weighted, row_cost, iterations))

    def by_cost() -> Tensor:
        u, v = fit()
        return (u.unsqueeze(-1) + v.unsqueeze(-2)).sub_(cost).div_(options.eps).add_(1.0).mul_(scaled.plan())

    derivatives = (by_cost, lambda: log_a.exp() * fit()[0], lambda: log_b.exp() * fit()[1])
    return _with_gradients(row_cost.sum(-1), (cost, log_a, log_b), derivatives)


def _additive_fit(scaled: _Scaled, weighted: Tensor, row_cost: Tensor, n_iters: int) -> tuple[Tensor, Tensor]:
    """u [..., M] and v [..., N], the best u_i + v_j to C_ij in L2(P), by means over rows and columns of P in turn.

    They converge as fast as Sinkhorn's iterations; for x = left u and y = right v a step is one product.
    weighted = K C elementwise; row_cost_i = sum_j P_ij C_ij.
    """
    kernel, _, _, left, right, _, col, row = scaled
    transposed = kernel.mT
    x_mean, x_scale = row_cost / row, left / row
    y_mean, y_scale = right * _product(weighted.mT, left) / col, right / col
    if kernel.ndim == 2 and x_mean.ndim == y_mean.ndim == 1 and kernel.shape[-1] <= _SMALL:
        step = (y_scale.unsqueeze(-1) * transposed * x_scale) @ kernel
        y = _affine_power(step, y_mean - y_scale * _product(transposed, x_mean), n_iters)
        x = torch.addcmul(x_mean, x_scale, _product(kernel, y), value=-1)
    else:
        y = torch.zeros_like(y_mean)
        for _ in range(n_iters):
            x = torch.addcmul(x_mean, x_scale, _product(kernel, y), value=-1)
            y = torch.addcmul(y_mean, y_scale, _product(transposed, x), value=-1)
    tiny = torch.finfo(left.dtype).tiny
    return x / left.clamp(min=tiny), y / right.clamp(min=tiny)


def _affine_power(step: Tensor, shift: Tensor, count: int) -> Tensor:
    """y after at least `count` steps y <- step y + shift from 0, by doubling: a small problem is all overhead."""
    y = shift
    for _ in range(max(count - 1, 0).bit_length()):
        y = y + step @ y
        step = step @ step
    return y


def _problem(cost: Tensor, log_a: Tensor | None, log_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cost and log-weights in one floating type, halves widened to float32, uniform where none are given."""
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ShapeError(f"a cost has shape [..., M, N] with at least one row and column, got {tuple(cost.shape)}")
    weights = (log_a, log_b)
    dtype = torch.float32
    for tensor in (cost, *(w for w in weights if w is not None)):
        dtype = torch.promote_types(dtype, tensor.dtype)
    cost, full = cost.to(dtype), []
    for name, weight, size in zip(("log_a", "log_b"), weights, cost.shape[-2:]):
        if weight is None:
            weight = cost.new_full((size,), -math.log(size))
        if weight.ndim == 0 or weight.shape[-1] != size:
            found = f"{name} has shape {tuple(weight.shape)} and the cost {tuple(cost.shape)}"
            raise ShapeError(f"{found}: give {size} log-weights")
        if bool(weight.isnan().any()):
            raise DataError(f"{name} has NaN entries: give normalised log-probabilities")
        full.append(weight.to(dtype))
    try:
        torch.broadcast_shapes(cost.shape[:-2], full[0].shape[:-1], full[1].shape[:-1])
    except RuntimeError:
        shapes = [tuple(t.shape) for t in (cost, *full)]
        raise ShapeError(f"cost, log_a and log_b have shapes {shapes}: make their leading dimensions match") from None
    if not math.isfinite(float(cost.detach().sum())):
        raise DataError("the cost has NaN or infinite entries: check the points or logits that it was made from")
    return cost, full[0], full[1]


def sinkhorn_plan(
    cost: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    eps: float,
    n_iters: int = 20,
    tol: float | None = None,
    mass: Literal["unit", "rows"] = "unit",
    start: Tensor | None = None,
    scaling: float | None = None,
) -> Plan:
    """The entropic transport plan for cost [..., M, N] between weights exp(log_a) [..., M] and exp(log_b) [..., N].

    tol: stop when the row sums of every problem are off by no more in total. mass="rows": multiply a plan between
    uniform weights by M, so that its rows sum to 1. start: a g [..., N] to begin with, as that of an earlier plan.
    scaling in (0, 1): begin with a large eps and multiply it down, which small eps need. The plan carries no gradient.
    Raises ShapeError for shapes that do not match, ConfigError for options out of range, DataError for NaN.
    Source: Cuturi 2013 (arXiv 1306.0895); scalings stabilised as by Schmitzer 2019 (arXiv 1610.06519).

    >>> plan = sinkhorn_plan(torch.tensor([[0.0, 1.0], [1.0, 0.2]]), eps=0.5, n_iters=50, mass="rows")
    >>> plan.plan
    tensor([[0.8581, 0.1419],
            [0.1419, 0.8581]])
    """
    if mass not in ("unit", "rows"):
        raise ConfigError(f'mass is "unit" or "rows", not {mass!r}')
    if mass == "rows" and not (log_a is None and log_b is None):
        raise ConfigError('mass="rows" is for uniform weights: leave log_a and log_b out, or multiply the plan')
    options = _Options(eps, n_iters, tol, scaling)
    if start is not None and scaling is not None:
        raise ConfigError("start and scaling exclude each other: a start is already near the end of the scaling")
    cost, log_a, log_b = _problem(cost.detach(), log_a, log_b)
    if start is not None and start.shape[-1:] != cost.shape[-1:]:
        raise ShapeError(f"start has shape {tuple(start.shape)}: give a g of {cost.shape[-1]} entries for this cost")
    with torch.autocast(cost.device.type, enabled=False):
        scaled, _ = _solve(cost, log_a, log_b, options, start)
    plan, error = scaled.plan(), scaled.error(log_a.exp())
    return Plan(plan * cost.shape[-2] if mass == "rows" else plan, *scaled.potentials(eps), error)


def sinkhorn_cost(
    cost: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    eps: float,
    n_iters: int = 20,
    tol: float | None = None,
    scaling: float | None = None,
    mode: Mode = "sharp",
    gradient: Gradient = "envelope",
    self_costs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The transport cost of the plan P of unit mass for cost [..., M, N]; returns [...], in the cost's unit.

    mode: "sharp" is <P, C>; "entropic" OT = <P, C> + eps KL(P || a b^T), as its dual value, a lower bound until the
    iterations have converged; "debiased" OT(a, b) - OT(a, a)/2 - OT(b, b)/2, which needs self_costs = (cost within the
    rows [..., M, M], within the columns [..., N, N]), is never negative and zero for equal clouds alone.
    gradient: "envelope" takes it from the last plan, in O(M N) memory, exact where the iterations have converged (P for
    the entropic modes, see the module for the sharp one), and only once; "unroll" follows autograd through all
    iterations, in O(n_iters M N) memory. Other options and errors as `sinkhorn_plan`.

    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.2]])
    >>> 2 * sinkhorn_cost(cost, eps=0.5, n_iters=50)
    tensor(0.4553)
    """
    if mode not in ("sharp", "entropic", "debiased"):
        raise ConfigError(f'mode is "sharp", "entropic" or "debiased", not {mode!r}')
    if gradient not in ("envelope", "unroll"):
        raise ConfigError(f'gradient is "envelope" or "unroll", not {gradient!r}')
    if (mode == "debiased") != (self_costs is not None):
        raise ConfigError('self_costs, the costs within either cloud, go with mode="debiased": give both or neither')
    options = _Options(eps, n_iters, tol, scaling)
    cost, log_a, log_b = _problem(cost, log_a, log_b)
    with torch.autocast(cost.device.type, enabled=False):
        if mode == "sharp":
            return _sharp(cost, log_a, log_b, options, gradient)
        value = _entropic(cost, log_a, log_b, options, gradient)
        for own, weight in zip(self_costs or (), (log_a, log_b)):
            value = value - 0.5 * _entropic(*_problem(own, weight, weight), options, gradient)
        return value


def sinkhorn_divergence(
    log_p: Tensor,
    log_q: Tensor,
    *,
    cost: Tensor | None = None,
    eps: float = 0.1,
    n_iters: int = 100,
    tol: float | None = None,
    scaling: float | None = None,
    mode: Mode = "debiased",
    gradient: Gradient = "envelope",
) -> Tensor:
    """Transport between two distributions over one vocabulary; log_p, log_q [..., V] to [...], in the cost's unit.

    cost: symmetric ground cost between outcomes, [V, V] for all or [..., V, V]; by default 1 between any two, for which
    the divergence tends to total variation as eps -> 0. It takes V^2 numbers: for large vocabularies compare batches
    (`kullback.distill.sinkd`). Modes, gradients and errors as `sinkhorn_cost`; only "debiased" is 0 at p = q.
    Source: Genevay et al. 2018 (arXiv 1706.00292), Feydy et al. 2019 (arXiv 1810.08278).

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> sinkhorn_divergence(p, q, eps=0.001, scaling=0.5), sinkhorn_divergence(p, p)
    (tensor(0.2997), tensor(0.))
    """
    log_p, log_q = check_pair(log_p, log_q)
    if cost is None:
        cost = 1.0 - torch.eye(log_p.shape[-1], dtype=log_p.dtype, device=log_p.device)
    own = (cost, cost) if mode == "debiased" else None
    return sinkhorn_cost(
        cost, log_p, log_q,
        eps=eps, n_iters=n_iters, tol=tol, scaling=scaling, mode=mode, gradient=gradient, self_costs=own,
    )  # fmt: skip
