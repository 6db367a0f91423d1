"""Many runs of stochastic approximation driven by walking tokens.

    theta_{n+1} = theta_n + lr beta_{n+1} mean_m H(theta_n, X^m_{n+1}),    beta_n = (n + 1)^-b

where tokens m walk by `SRRW` and H(theta, i) is minus the gradient of the loss at node i; for b above the history's a
the history settles first, and the noise is lowest. The walk knows nothing of theta, so that it is made first, and any
field follows it; the fields below run as compiled loops.

Shapes: N nodes, d parameters, R runs, M tokens, n steps, K recorded steps.
Source: Hu, Doshi and Eun 2024, arXiv 2401.09665.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.optim.srrw import SRRW, WalkState, check_exponent, loops, start_walk, walk

__all__ = ["Field", "GeneralizedLinear", "MeanOf", "Simulation", "follow", "simulate", "step_sizes"]

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # theta [R, d], nodes [R] -> H [R, d]

_BLOCK = 1 << 21  # visits that are held at a time


def step_sizes(first: int, count: int, b: float, lr: float = 1.0) -> Tensor:
    """lr beta of the steps first + 1 to first + count: float64.

    >>> step_sizes(0, 2, 1.0)
    tensor([0.5000, 0.3333], dtype=torch.float64)
    """
    check_exponent("b", b)
    return lr * torch.arange(first + 2, first + count + 2, dtype=torch.float64) ** -b


@dataclass(frozen=True, eq=False)
class MeanOf:
    """H(theta, i) = f_i - theta, whose optimum is the mean of f under the target; values f: [N, d]."""

    values: Tensor

    def __call__(self, theta: Tensor, nodes: Tensor) -> Tensor:
        return self.values[nodes] - theta

    def optimum(self, target: Tensor) -> Tensor:
        return target @ self.values

    def arrays(self) -> tuple[int, Tensor, Tensor, float]:
        return 2, self.values, torch.zeros(len(self.values), dtype=torch.float64), 0.0


@dataclass(frozen=True, eq=False)
class GeneralizedLinear:
    """H(theta, i) = (y_i - link(x_i' theta)) x_i - ridge theta: one sample at every node.

    features x [N, d] and labels y [N], float64; link: "logistic" (labels in [0, 1]) or "identity" (least squares).
    """

    features: Tensor
    labels: Tensor
    ridge: float = 0.0
    link: str = "logistic"

    def __post_init__(self) -> None:
        if self.link not in ("logistic", "identity"):
            raise ConfigError(f"link is logistic or identity, not {self.link!r}")
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            shapes = f"{tuple(self.features.shape)} and {tuple(self.labels.shape)}"
            raise ShapeError(f"features are [N, d] and labels [N], not {shapes}")
        if not bool(self.features.isfinite().all() and self.labels.isfinite().all()):
            raise DataError("features and labels must be finite")

    def _means(self, scores: Tensor) -> Tensor:
        return scores.sigmoid() if self.link == "logistic" else scores

    def __call__(self, theta: Tensor, nodes: Tensor) -> Tensor:
        rows = self.features[nodes]
        residual = self.labels[nodes] - self._means((rows * theta).sum(-1))
        return residual.unsqueeze(-1) * rows - self.ridge * theta

    def at(self, theta: Tensor) -> Tensor:
        """H(theta, i) of every node: [N, d]."""
        return self(theta.expand(len(self.labels), -1), torch.arange(len(self.labels)))

    def jacobian(self, theta: Tensor, target: Tensor) -> Tensor:
        """The derivative of the mean field under the target [N]: [d, d], minus the Hessian of the mean loss."""
        means = self._means(self.features @ theta)
        slope = means * (1.0 - means) if self.link == "logistic" else torch.ones_like(means)
        curvature = (self.features.T * (target * slope)) @ self.features
        return -curvature - self.ridge * torch.eye(len(theta), dtype=torch.float64)

    def optimum(self, target: Tensor, steps: int = 100) -> Tensor:
        """The root of the mean field under the target [N], by Newton's method. Raises DataError where there is none."""
        theta = torch.zeros(self.features.shape[1], dtype=torch.float64)
        for _ in range(steps):
            force, slope = target @ self.at(theta), self.jacobian(theta, target)
            if torch.linalg.eigvalsh(slope)[-1] > -1e-10:
                break
            if force.abs().max() < 1e-14 * max(1.0, self.features.abs().max().item()):
                return theta
            move = torch.linalg.solve(slope, -force)
            theta = theta + move * min(1.0, 10.0 / max(move.norm().item(), 1e-300))
        if not force.abs().max() < 1e-9 or torch.linalg.eigvalsh(slope)[-1] > -1e-10:
            raise DataError("Newton finds no optimum: the mean loss has none, or a flat one; add a ridge")
        return theta

    def arrays(self) -> tuple[int, Tensor, Tensor, float]:
        return int(self.link == "identity"), self.features, self.labels, self.ridge


class Simulation(NamedTuple):
    """steps [K]; theta [K, R, d] after each of them; the walks' state at the end."""

    steps: Tensor
    theta: Tensor
    state: WalkState


def simulate(
    rule: SRRW,
    field: Field,
    theta: Tensor,
    steps: int | Sequence[int],
    *,
    b: float = 0.9,
    lr: float = 1.0,
    runs: int = 1,
    private: bool = False,
    radius: float | None = None,
    start: int | Tensor | None = None,
    history: Tensor | None = None,
    compiled: bool | None = None,
    generator: torch.Generator,
) -> Simulation:
    """R independent runs from theta [d], up to the last of `steps`, with theta kept after each of them.

    private: the rule's tokens keep a history each, and share theta alone. radius: theta is brought back to the ball of
    that radius after each step. start and history: as for `start_walk`. Raises ConfigError for options out of range.
    """
    marks = [steps] if isinstance(steps, int) else list(steps)
    if not marks or marks[0] < 1 or any(one >= other for one, other in pairwise(marks)):
        raise ConfigError(f"steps is a positive number or a rising list of them, not {steps}")
    if radius is not None and not radius > 0.0:
        raise ConfigError(f"radius is positive, or None for no ball, not {radius}")
    tokens, alone = rule.tokens, private and rule.tokens > 1
    moving = replace(rule, tokens=1) if alone else rule
    state = start_walk(
        moving, runs=runs * tokens if alone else runs, start=start, history=history, generator=generator
    )
    point = torch.as_tensor(theta, dtype=torch.float64).expand(runs, -1).clone()
    kept, done, block = [], 0, max(1, _BLOCK // (runs * tokens))
    for mark in marks:
        while done < mark:
            count = min(block, mark - done)
            visits = count if alone else count * tokens
            state, nodes = walk(moving, state, visits, generator=generator, compiled=compiled)
            if alone:
                nodes = nodes.reshape(runs, tokens, count).transpose(1, 2)
            nodes = nodes.reshape(runs, count, tokens).contiguous()
            _descend(field, point, nodes, step_sizes(done, count, b, lr), radius, compiled)
            done += count
        kept.append(point.clone())
    return Simulation(torch.tensor(marks), torch.stack(kept), state)


def follow(
    field: Field,
    theta: Tensor,
    nodes: Tensor,
    *,
    first: int = 0,
    b: float = 0.9,
    lr: float = 1.0,
    radius: float | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """Where theta [d] or [R, d] comes to along visits that are given, [R, n], in whatever order: [R, d].

    first: steps that were made before, which the sizes go on from. Everything else: as for `simulate`.
    """
    if nodes.ndim != 2 or theta.shape[-1:] == () or (theta.ndim == 2 and len(theta) != len(nodes)):
        raise ShapeError(f"nodes are [R, n] and theta [d] or [R, d], not {tuple(nodes.shape)} and {tuple(theta.shape)}")
    point = torch.as_tensor(theta, dtype=torch.float64).expand(len(nodes), -1).clone()
    _descend(field, point, nodes.unsqueeze(2).contiguous(), step_sizes(first, nodes.shape[1], b, lr), radius, compiled)
    return point


def _descend(
    field: Field, theta: Tensor, nodes: Tensor, sizes: Tensor, radius: float | None, compiled: bool | None
) -> None:
    """theta [R, d] moved in place along the visits [R, n, M]."""
    module = loops(compiled) if isinstance(field, (MeanOf, GeneralizedLinear)) else None
    if module is not None and isinstance(field, (MeanOf, GeneralizedLinear)):
        kind, features, labels, ridge = field.arrays()
        arrays = (features.to(torch.float64).contiguous().numpy(), labels.to(torch.float64).contiguous().numpy())
        ball = float("inf") if radius is None else radius
        module.descend(kind, *arrays, ridge, theta.numpy(), nodes.numpy(), sizes.numpy(), ball)
        return
    for step, size in enumerate(sizes.tolist()):
        forces = [field(theta, nodes[:, step, token]) for token in range(nodes.shape[2])]
        theta += size * torch.stack(forces).mean(0)
        if radius is not None:
            theta *= (radius / theta.norm(dim=1, keepdim=True)).clamp(max=1.0)
