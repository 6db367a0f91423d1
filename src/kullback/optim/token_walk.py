"""What all walks of tokens over several owners of nodes have in common: counts, the next node, and what a step does.

A token carries the parameters and what its update rule keeps, as the rows of one tensor [k, d]; the node that it visits
adds its gradient g:

    sgd         theta <- theta - e_n g
    momentum    u <- m u + g,                                     theta <- theta - e_n u
    adam        u, v: running means of g and g^2 without bias,    theta <- theta - e_n u / (sqrt v + epsilon)

with e_n = lr (n + 1)^-b. Since the scale of a history does not matter to the rule, a node counts visits as
y_j += gamma_n / s_n with s_n = (1 - gamma_1) ... (1 - gamma_n), which a visit's number alone gives; counts are kept in
logarithms.

Shapes: N nodes, d parameters, M tokens. Source: Hu, Doshi and Eun 2024, arXiv 2401.09665; Kingma and Ba 2015 for Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.optim.srrw import SRRW
from kullback.optim.srrw_simulation import step_sizes

__all__ = [
    "TokenResult", "TokenUpdate", "UpdateRule", "check_walk", "counted", "log_increments", "next_node", "token_uniform",
]  # fmt: skip

UpdateRule: TypeAlias = Literal["sgd", "momentum", "adam"]
_ROWS = {"sgd": 1, "momentum": 2, "adam": 3}


class TokenResult(NamedTuple):
    """What is known at the end, in each process of `walk_tokens` and to the caller of `walk_actors`.

    theta [M, d], parameters of each token; their mean is what the method returns. log_counts: token -> node -> log y of
    the nodes owned here, under token 0 where the history is shared. visited: (token, visit, node) of visits made here.
    """

    theta: Tensor
    log_counts: Mapping[int, Mapping[int, float]]
    visited: Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class TokenUpdate:
    """How a token's parameters follow gradients: base, lr and b of the module; radius of the ball that holds theta.

    Raises ConfigError for options out of range.

    >>> payload = TokenUpdate().payload(torch.ones(2))
    >>> TokenUpdate(lr=1.0, b=1.0).apply_(payload, lambda theta, node: theta, node=0, visit=1)
    >>> payload
    tensor([[0.5000, 0.5000]])
    """

    base: UpdateRule = "sgd"
    lr: float = 1.0
    b: float = 0.9
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    radius: float | None = None

    def __post_init__(self) -> None:
        step_sizes(0, 1, self.b)  # refuses a b out of range
        if self.base not in get_args(UpdateRule):
            raise ConfigError(f"base is one of {', '.join(get_args(UpdateRule))}, not {self.base!r}")
        if not all(0.0 <= share < 1.0 for share in (self.momentum, *self.betas)) or not self.epsilon > 0.0:
            raise ConfigError(
                f"momentum and betas lie in [0, 1) and epsilon is positive, not {self.momentum}, {self.betas} and "
                f"{self.epsilon}"
            )
        if not self.lr > 0.0 or (self.radius is not None and not self.radius > 0.0):
            raise ConfigError(f"lr and radius are positive (no radius: None), not {self.lr} and {self.radius}")

    def payload(self, theta: Tensor) -> Tensor:
        """What a token carries where it starts, [k, d] for theta [d]: the parameters above zeros."""
        if theta.ndim != 1 or not theta.is_floating_point():
            raise ShapeError(f"theta is a vector [d] of floating point, not {theta.dtype} {tuple(theta.shape)}")
        rows = theta.new_zeros(_ROWS[self.base], len(theta))
        rows[0] = theta.detach()
        return rows

    def apply_(self, payload: Tensor, gradient: Callable[[Tensor, int], Tensor], node: int, visit: int) -> None:
        """A visit, the first of which is 1, of a node: the payload moves in place.

        Raises DataError for a gradient of another shape than theta's, or one that is not finite.
        """
        theta = payload[0]
        slope = gradient(theta, node).detach()
        if slope.shape != theta.shape or not bool(slope.isfinite().all()):
            raise DataError(
                f"the gradient at node {node}, visit {visit}, is {tuple(slope.shape)} or not finite; expected "
                f"{tuple(theta.shape)}: lower lr, or give a radius"
            )
        size = self.lr * (visit + 1) ** -self.b
        if self.base == "momentum":
            slope = payload[1].mul_(self.momentum).add_(slope)
        elif self.base == "adam":
            first, second = self.betas
            payload[1].lerp_(slope, 1.0 - first)
            payload[2].mul_(second).addcmul_(slope, slope, value=1.0 - second)
            spread = (payload[2] / (1.0 - second**visit)).sqrt_().add_(self.epsilon)
            slope = payload[1] / spread.mul_(1.0 - first**visit)
        theta.sub_(slope, alpha=size)
        if self.radius is not None:
            theta.mul_((self.radius / theta.norm()).clamp(max=1.0))


def check_walk(
    rule: SRRW, steps: int, owners: Sequence[int], starts: Sequence[int], places: int, history: Tensor | None
) -> list[float]:
    """The logarithms of the first counts [N]; raises ConfigError and DataError for arguments that do not fit."""
    nodes = rule.chain.nodes
    if len(owners) != nodes or not all(0 <= owner < places for owner in owners):
        raise ConfigError(f"owners names a process from 0 to {places - 1} for each of {nodes} nodes")
    if not starts or not all(0 <= node < nodes for node in starts):
        raise ConfigError(f"starts names a node from 0 to {nodes - 1} for every token, and got {list(starts)}")
    if rule.cap is not None or rule.warm_up:
        raise ConfigError("a cap or a warm-up needs the scale of the history, which no process knows: leave them out")
    if rule.tokens != 1:
        raise ConfigError("here the number of tokens is that of their starts: leave the rule's tokens at 1")
    if steps < 1:
        raise ConfigError(f"steps is {steps}: a token makes at least one visit")
    x = rule.chain.target if history is None else history
    if x.shape != (nodes,) or not bool((x.isfinite() & (x > 0)).all()):
        raise DataError(f"history is positive at each of {nodes} nodes")
    logs: list[float] = (x / x.sum()).to(torch.float64).log().tolist()
    return logs


def log_increments(rule: SRRW, visits: int) -> list[float]:
    """log (gamma_n / s_n) of the visits 1 to `visits`."""
    gammas = rule.steps(0, visits)
    increments: list[float] = (gammas.log() - torch.log1p(-gammas).cumsum(0)).tolist()
    return increments


def counted(log_count: float, log_increment: float) -> float:
    """The logarithm of a count after a visit."""
    high, low = max(log_count, log_increment), min(log_count, log_increment)
    return high + math.log1p(math.exp(low - high))


def next_node(rule: SRRW, node: int, log_counts: Mapping[int, float], number: float) -> int:
    """Where a token at a node goes, given the counts of the node's neighbours and a uniform number."""
    near, probabilities = rule.chain.row(node)
    counts = torch.tensor([log_counts[other] for other in near.tolist()], dtype=torch.float64)
    logits = probabilities.log() - rule.alpha * (counts - rule.chain.target[near].log())
    cumulative = (logits - logits.max()).exp().cumsum(0)
    chosen = int((cumulative <= number * cumulative[-1]).sum().clamp(max=len(near) - 1))
    return int(near[chosen])


def token_uniform(seed: int, token: int, visit: int) -> float:
    """The uniform number in [0, 1) that chooses a token's node at a visit, the first of which is 1.

    >>> token_uniform(0, 0, 1) == token_uniform(0, 0, 1) != token_uniform(0, 1, 1)
    True
    """
    return torch.rand((), generator=stream(seed, "token", token, visit), dtype=torch.float64).item()
