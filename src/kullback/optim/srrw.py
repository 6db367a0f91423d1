"""Self-repellent random walks: a walk on a graph that shuns nodes it has visited more than their share.

    K_ij[x] = P_ij (x_j / mu_j)^-alpha / sum_k P_ik (x_k / mu_k)^-alpha
    X_{n+1} ~ K[x_n](X_n, .),    x_{n+1} = x_n + gamma_{n+1} (delta_{X_{n+1}} - x_n),    gamma_n = (n + 1)^-a

with a base chain P that is reversible with respect to the target mu. The visits still follow mu in the limit, with a
covariance of order 1 / alpha; alpha = 0 is the base chain. a = 1: x is the share of visits, with one visit spread over
x_0; or weights omega_n = (n + 1)^p of visit n, gamma_n = omega_n / sum of those so far.

M tokens may share one history: visit k is that of token k mod M. Shapes: R runs, N nodes, n visits.
Source: Doshi, Hu and Eun 2023, arXiv 2305.05097; Hu, Doshi and Eun 2024, arXiv 2401.09665.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Kernel
from kullback.optim.chains import Chain

__all__ = ["SRRW", "WalkInfo", "WalkState", "srrw", "srrw_kernel", "start_walk", "stationary_of", "walk"]

_BLOCK = 1 << 21  # uniform numbers that are held at a time
_SPREAD = 200.0  # the logarithm that kept weights may fall by before they are computed anew


def check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha >= 0.0):
        raise ConfigError(f"alpha is a finite number, 0 for the base chain or positive, not {alpha}")


def _checked_history(x: Tensor, nodes: int) -> Tensor:
    history = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if history.shape[-1:] != (nodes,):
        raise ShapeError(f"a history has a value for each of {nodes} nodes, [..., {nodes}], not {tuple(history.shape)}")
    if not bool((history.isfinite() & (history > 0)).all()):
        raise DataError("a history is positive at every node: one without visits would have an infinite weight")
    return history


def _log_weights(chain: Chain, x: Tensor, alpha: float) -> Tensor:
    """log (x_j / mu_j)^-alpha, less its largest value: [..., N]."""
    check_alpha(alpha)
    weights = -alpha * (_checked_history(x, chain.nodes).log() - chain.target.log())
    return weights - weights.amax(-1, keepdim=True)


def srrw_kernel(chain: Chain, x: Tensor, alpha: float) -> Tensor:
    """The transition matrix K[x] as a dense matrix [..., N, N] for histories x [..., N], which need not sum to 1.

    >>> chain = Chain.of(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([1.0, 1.0]))
    >>> srrw_kernel(chain, torch.tensor([0.25, 0.75]), 1.0)[0]
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    return (chain.matrix().log() + _log_weights(chain, x, alpha).unsqueeze(-2)).softmax(-1)


def stationary_of(chain: Chain, x: Tensor, alpha: float) -> Tensor:
    """The law that K[x] is reversible for, pi_i proportional to mu_i w_i sum_j P_ij w_j, w = (x / mu)^-alpha: [..., N].

    At x = mu it is mu, and its derivative there is 2 alpha mu 1' - alpha P' - alpha I.
    """
    weights = _log_weights(chain, x, alpha)
    sums = (chain.matrix().log() + weights.unsqueeze(-2)).logsumexp(-1)
    return (chain.target.log() + weights + sums).softmax(-1)


@dataclass(frozen=True, eq=False)
class SRRW:
    """The rule of a self-repellent walk.

    alpha: strength, 0 or more; a in (1/2, 1]: the exponent of the history's steps; weight_power p >= 0 replaces it by
    weighted visits. warm_up: visits over which alpha grows linearly from 0. cap > 1: x_j / mu_j counts as no more than
    cap and no less than 1 / cap. tokens: walkers that share the history. Raises ConfigError for values out of range.
    """

    chain: Chain
    alpha: float
    a: float = 0.8
    weight_power: float | None = None
    warm_up: int = 0
    cap: float | None = None
    tokens: int = 1

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_exponent("a", self.a)
        if self.weight_power is not None and not (0.0 <= self.weight_power < math.inf):
            raise ConfigError(f"weight_power is 0 or positive, not {self.weight_power}")
        if self.cap is not None and not self.cap > 1.0:
            raise ConfigError(f"cap is larger than 1, or None for no cap, not {self.cap}")
        if self.warm_up < 0 or self.tokens < 1:
            raise ConfigError(f"warm_up is 0 or more and tokens 1 or more, not {self.warm_up} and {self.tokens}")

    def steps(self, first: int, count: int) -> Tensor:
        """gamma of the visits first + 1 to first + count: float64."""
        numbers = torch.arange(first + 2, first + count + 2, dtype=torch.float64)
        if self.weight_power is None:
            return numbers**-self.a
        return numbers**self.weight_power / _power_sums(first + 1, count, self.weight_power)

    def strengths(self, first: int, count: int) -> Tensor:
        """alpha of those visits: float64."""
        share = torch.arange(first, first + count, dtype=torch.float64) / max(self.warm_up, 1)
        return self.alpha * (share.clamp(max=1.0) if self.warm_up else torch.ones_like(share))


def check_exponent(name: str, value: float) -> None:
    if not 0.5 < value <= 1.0:
        raise ConfigError(f"{name} lies in (1/2, 1], so that steps are summable in square and not in sum, not {value}")


def _power_sums(first: int, count: int, power: float) -> Tensor:
    """The sums of k^p over k = 1 .. n for n = first + 1 .. first + count; beyond 32 terms by Euler and Maclaurin."""
    base = 32
    small = torch.arange(1, base + 1, dtype=torch.float64) ** power
    last = torch.arange(first + 1, first + count + 1, dtype=torch.float64)

    def smooth(n: Tensor) -> Tensor:
        series = n ** (power + 1) / (power + 1) + n**power / 2
        for factor, order in ((1 / 12, 1), (-1 / 720, 3)):
            slope = math.prod(power - k for k in range(order))
            series = series + factor * slope * n ** (power - order)
        return series

    start = torch.tensor(float(base), dtype=torch.float64)
    large = small.sum() + smooth(last) - smooth(start)
    return torch.where(last <= base, small.cumsum(0)[last.clamp(max=base).long() - 1], large)


class WalkState(NamedTuple):
    """node [R, M] int64, where the tokens are; history [R, N] float64, which sums to 1; visits made so far."""

    node: Tensor
    history: Tensor
    visits: int


class WalkInfo(NamedTuple):
    """node [R]: where the token that moved has come to."""

    node: Tensor


def start_walk(
    rule: SRRW,
    *,
    runs: int = 1,
    start: int | Tensor | None = None,
    history: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WalkState:
    """R walks before their first visit.

    start: a node for all, or int64 [R, M] or [M]; None draws from the target, for which a generator is needed.
    history [N] or [R, N]: positive, by default the target. Raises ConfigError and DataError where these do not fit.
    """
    nodes, shape = rule.chain.nodes, (runs, rule.tokens)
    if runs < 1:
        raise ConfigError(f"runs is {runs}: walk at least once")
    if start is None:
        if generator is None:
            raise ConfigError("a walk needs a start, or a generator that draws it from the target")
        node = torch.multinomial(rule.chain.target, runs * rule.tokens, replacement=True, generator=generator)
        node = node.reshape(shape)
    else:
        node = torch.as_tensor(start, dtype=torch.int64).expand(shape).contiguous()
        if bool(((node < 0) | (node >= nodes)).any()):
            raise ConfigError(f"start names a node outside of 0 to {nodes - 1}")
    x = _checked_history(rule.chain.target if history is None else history, nodes)
    return WalkState(node, (x / x.sum(-1, keepdim=True)).expand(runs, nodes).contiguous(), 0)


def walk(
    rule: SRRW,
    state: WalkState,
    visits: int,
    *,
    generator: torch.Generator,
    compiled: bool | None = None,
) -> tuple[WalkState, Tensor]:
    """The next visits of all runs, and the nodes visited: int64 [R, visits]. The state given is left as it is.

    Cut into parts, a walk stays the same. compiled: None takes numba where it is installed, whose loops touch the
    neighbours of the current node and no other; True insists (MissingExtra without it).
    """
    if visits < 0:
        raise ConfigError(f"visits is {visits}: a walk cannot go back")
    runs, parts = state.node.shape[0], []
    move = _mover(compiled)
    last, block = state.visits + visits, max(1, _BLOCK // runs)
    while state.visits < last:
        # the loops need to know in each block whether alpha still grows
        warming = rule.warm_up - state.visits
        count = min(block, last - state.visits, warming if warming > 0 else block)
        uniforms = torch.rand(count, runs, generator=generator, dtype=torch.float64).T.contiguous()
        state, nodes = move(rule, state, uniforms)
        parts.append(nodes)
    return state, torch.cat(parts, 1) if parts else torch.empty(runs, 0, dtype=torch.int64)


def srrw(chain: Chain, alpha: float, a: float = 0.8, **options: float | int | None) -> Kernel:
    """The walk as a kernel: init(runs=1, start=None, history=None, generator) and step(state, generator) by one visit.

    options: those of `SRRW`.
    """
    rule = SRRW(chain, alpha, a, **options)  # type: ignore[arg-type]

    def step(state: WalkState, *, generator: torch.Generator) -> tuple[WalkState, WalkInfo]:
        state, nodes = walk(rule, state, 1, generator=generator)
        return state, WalkInfo(nodes[:, 0])

    def init(**start: int | Tensor | torch.Generator | None) -> WalkState:
        return start_walk(rule, **start)  # type: ignore[arg-type]

    return Kernel(init, step)


@cache
def _numba() -> ModuleType | None:
    try:
        from kullback.optim import _srrw_numba
    except ImportError:
        return None
    return _srrw_numba


def loops(compiled: bool | None) -> ModuleType | None:
    """The compiled loops, or None where they are not wanted or not there."""
    module = None if compiled is False else _numba()
    if compiled and module is None:
        from kullback.core.errors import MissingExtra

        raise MissingExtra("numba", extra="numba")
    return module


def _mover(compiled: bool | None) -> Callable[[SRRW, WalkState, Tensor], tuple[WalkState, Tensor]]:
    return walk_by_steps if loops(compiled) is None else _walk_compiled


def walk_by_steps(rule: SRRW, state: WalkState, uniforms: Tensor) -> tuple[WalkState, Tensor]:
    """The naive twin: the visits that uniform numbers [R, n] give, each with the whole history brought up to date."""
    chain, tokens = rule.chain, rule.tokens
    table, log_base = _padded(chain)
    log_mu = chain.target.log()
    history, places = state.history.clone(), state.node.clone()
    gammas, alphas = (part(state.visits, uniforms.shape[1]).tolist() for part in (rule.steps, rule.strengths))
    runs, visited = torch.arange(len(history)), torch.empty(uniforms.shape, dtype=torch.int64)
    for index in range(uniforms.shape[1]):
        token = (state.visits + index) % tokens
        near = table[places[:, token]]
        ratio = history.gather(1, near).log() - log_mu[near]
        if rule.cap is not None:
            ratio = ratio.clamp(-math.log(rule.cap), math.log(rule.cap))
        logits = log_base[places[:, token]] - alphas[index] * ratio
        cumulative = (logits - logits.amax(1, keepdim=True)).exp().cumsum(1)
        chosen = (cumulative <= uniforms[:, index : index + 1] * cumulative[:, -1:]).sum(1)
        node = near[runs, chosen.clamp(max=near.shape[1] - 1)]
        history *= 1.0 - gammas[index]
        history[runs, node] += gammas[index]
        places[:, token], visited[:, index] = node, node
    return WalkState(places, history, state.visits + uniforms.shape[1]), visited


def _padded(chain: Chain) -> tuple[Tensor, Tensor]:
    """Neighbours [N, width] and the logarithms of their probabilities, -inf where a row is shorter."""
    counts, width = chain.starts.diff(), chain.width
    columns = torch.arange(width)
    places = (chain.starts[:-1, None] + columns).clamp(max=len(chain.neighbours) - 1)
    inside = columns < counts[:, None]
    log_base = torch.where(inside, chain.probabilities[places].log(), -math.inf)
    return torch.where(inside, chain.neighbours[places], chain.neighbours[chain.starts[:-1], None]), log_base


def _walk_compiled(rule: SRRW, state: WalkState, uniforms: Tensor) -> tuple[WalkState, Tensor]:
    module = _numba()
    if module is None:
        return walk_by_steps(rule, state, uniforms)
    chain, count = rule.chain, uniforms.shape[1]
    gammas, alphas = rule.steps(state.visits, count).numpy(), rule.strengths(state.visits, count).numpy()
    fresh, log_scales = _scales(gammas, rule.alpha)
    history, places = state.history.clone(), state.node.clone()
    visited = torch.empty(uniforms.shape, dtype=torch.int64)
    direct = rule.cap is not None or (rule.warm_up > state.visits)
    module.walk(
        chain.starts.numpy(), chain.neighbours.numpy(), chain.probabilities.numpy(), chain.target.log().numpy(),
        history.numpy(), places.numpy(), state.visits, uniforms.numpy(),
        gammas * np.exp(-log_scales), log_scales, fresh, alphas,
        math.inf if rule.cap is None else math.log(rule.cap), direct, visited.numpy(),
    )  # fmt: skip
    history /= history.sum(1, keepdim=True)
    return WalkState(places, history, state.visits + count), visited


def _scales(gammas: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Where histories are normalised anew, and the logarithm of the scale s, x = s y, after each visit.

    s is the product of 1 - gamma since the last time: all runs have the same.
    """
    limit = _SPREAD / max(alpha, 1.0)
    logs = np.log1p(-gammas)
    total = np.concatenate([[0.0], np.cumsum(logs)])
    fresh, scales, begin = np.zeros(len(gammas), np.bool_), np.empty(len(gammas)), 0
    while begin < len(gammas):
        # the scale falls with every visit: the first one at which it has fallen by more than the limit
        end = max(begin + 1, int(np.searchsorted(-total[1:], limit - total[begin], side="right")))
        end = min(end, len(gammas))
        fresh[begin] = True
        scales[begin:end] = total[begin + 1 : end + 1] - total[begin]
        begin = end
    return fresh, scales
