r"""Nash learning from preferences, exact: the equilibrium of a game between two policies, and the ways to reach it.

    P_b(pi > mu) = P(pi > mu) - b KL(pi, ref) + b KL(mu, ref)      what a player is paid, P(y > y') + P(y' > y) = 1
    pi* = ref exp(P(. > pi*) / b) / Z                              the equilibrium, the same for both; value 1/2
    prox(mu, nu) = argmax_pi P(pi > mu) - b KL(pi, ref) - (b / eta) KL(pi, nu)
                 = nu^(1/(1+eta)) ref^(eta/(1+eta)) exp(eta P(. > mu) / (b (1 + eta))) / Z

| method             | iteration                                                      | queries |
|--------------------|----------------------------------------------------------------|---------|
| Nash mirror prox   | h = prox(pi, pi); pi <- prox(h, pi)                            | 2       |
| Nash prox          | pi <- prox(pi', pi) with pi' by `inner` such steps, x <- prox(x, pi) | inner |
| self-play          | pi <- prox(pi, pi), which may run in circles                   | 1       |
| Nash mirror descent| m = pi^(1 - eta b) ref^(eta b); pi <- m exp(eta P(. > m)) / Z  | 1       |

With eta <= 2 b Nash mirror prox has KL(pi*, pi_K) <= (1 + eta)^-K KL(pi*, pi_0), whatever the number of answers.
Here KL(a, b) = sum a log(a / b). Shapes: games over Y answers, batched [..., Y]; log-probabilities in nats.
Sources: arXiv 2505.19731 (both of its versions); Nash mirror descent 2312.00886.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = [
    "PreferenceGame",
    "exploitability",
    "nash_mirror_descent",
    "nash_mirror_prox",
    "nash_prox",
    "proximal_step",
    "regularised_nash",
    "self_play",
    "span_seminorm",
]

Listen = Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True)
class PreferenceGame:
    """Preferences [..., Y, Y], the chance that the row is preferred to the column; log_reference [..., Y]; beta.

    Raises ShapeError, DataError for preferences outside [0, 1], for ones that do not add up to 1 with their opposite (a
    judge that minds the order: average both orders) and for a reference with zeros, ConfigError for beta <= 0.
    """

    preferences: Tensor
    log_reference: Tensor
    beta: float

    def __post_init__(self) -> None:
        p, reference = self.preferences, self.log_reference
        square = p.ndim >= 2 and p.numel() > 0 and p.shape[-1] == p.shape[-2]
        if not square or _together(p.shape[:-1], reference.shape) is None:
            shapes = f"{tuple(p.shape)} and {tuple(reference.shape)}"
            raise ShapeError(f"preferences are [..., Y, Y] and log_reference [..., Y], got {shapes}")
        if not ((p >= 0) & (p <= 1)).all():
            raise DataError("preferences are probabilities, and some lie outside [0, 1] or are NaN")
        gap = (p + p.mT - 1.0).abs().max().item()
        if gap > 1e-6:
            raise DataError(f"P(y > y') + P(y' > y) is off 1 by {gap:.2g}: average the judge over both orders")
        if not reference.isfinite().all():
            raise DataError("the reference gives some answer no probability: leave it out of the game")
        if not (self.beta > 0.0 and math.isfinite(self.beta)):
            raise ConfigError(f"beta is positive and finite, not {self.beta}")

    def beats(self, log_opponent: Tensor) -> Tensor:
        """P(y > mu) of every answer y [..., Y] against a policy mu [..., Y]; ShapeError for other answers."""
        if _together(self.preferences.shape[:-1], log_opponent.shape) is None:
            size = self.preferences.shape[-1]
            raise ShapeError(f"policies of this game are [..., {size}], got {tuple(log_opponent.shape)}")
        return (self.preferences @ log_opponent.exp().unsqueeze(-1)).squeeze(-1)

    def payoff(self, log_policy: Tensor, log_opponent: Tensor) -> Tensor:
        """P_b(pi > mu) [...], what the first player is paid; 1/2 against itself."""
        won = (log_policy.exp() * self.beats(log_opponent)).sum(-1)
        gap = kl(log_policy, self._reference(log_policy)) - kl(log_opponent, self._reference(log_opponent))
        return won - self.beta * gap

    def _reference(self, like: Tensor) -> Tensor:
        return self.log_reference.log_softmax(-1).expand_as(like)


def _together(first: torch.Size, second: torch.Size) -> torch.Size | None:
    """The common shape of [..., Y] and [..., Y], None where there is none."""
    if first[-1:] != second[-1:]:
        return None
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError:
        return None


def proximal_step(game: PreferenceGame, log_opponent: Tensor, log_anchor: Tensor, *, eta: float) -> Tensor:
    """prox(mu, nu): the best answer to the opponent mu that stays near the anchor nu; [..., Y] to [..., Y].

    Raises ConfigError for a step eta that is not positive, ShapeError.

    >>> game = PreferenceGame(torch.tensor([[0.5, 0.9], [0.1, 0.5]]), torch.tensor([0.5, 0.5]).log(), 1.0)
    >>> proximal_step(game, game.log_reference, game.log_reference, eta=2.0).exp()
    tensor([0.5663, 0.4337])
    """
    if not 0.0 < eta < math.inf:
        raise ConfigError(f"eta is positive and finite, got {eta}")
    logits = log_anchor + eta * game.log_reference + (eta / game.beta) * game.beats(log_opponent)
    return (logits / (1.0 + eta)).log_softmax(-1)


def nash_mirror_prox(
    game: PreferenceGame,
    iterations: int,
    *,
    eta: float | None = None,
    start: Tensor | None = None,
    listen: Listen | None = None,
    unsafe: bool = False,
) -> Tensor:
    """The policy [..., Y] after so many iterations of two queries each, from the reference or from start.

    eta: 2 beta by default, the largest for which the rate is proven; more only with unsafe=True. listen: called with
    the number of iterations done and the policy. Raises ConfigError.

    >>> game = PreferenceGame(torch.tensor([[0.5, 0.9], [0.1, 0.5]]), torch.tensor([0.5, 0.5]).log(), 0.1)
    >>> exploitability(game, nash_mirror_prox(game, 200)).item() < 1e-6
    True
    """
    return nash_prox(game, iterations, inner=2, eta=eta, start=start, listen=listen, unsafe=unsafe)


def nash_prox(
    game: PreferenceGame,
    iterations: int,
    *,
    inner: int = 2,
    eta: float | None = None,
    start: Tensor | None = None,
    listen: Listen | None = None,
    unsafe: bool = False,
) -> Tensor:
    """The proximal point method, each step solved by `inner` iterations of self-play near the last policy.

    inner = 1 is self-play, 2 Nash mirror prox, more the implicit step prox(pi', pi) = pi' itself. Otherwise as there.
    """
    if iterations < 0 or inner < 1:
        raise ConfigError(f"iterations are 0 or more and inner 1 or more, got {iterations} and {inner}")
    step = 2.0 * game.beta if eta is None else eta
    if not 0.0 < step < math.inf or (step > 2.0 * game.beta * (1.0 + 1e-12) and not unsafe):
        raise ConfigError(
            f"eta lies in (0, {2.0 * game.beta:g}], twice beta, for the rate to hold, got {eta}: unsafe=True takes more"
        )
    policy = _start(game, start)
    for number in range(iterations):
        inside = policy
        for _ in range(inner):
            inside = proximal_step(game, inside, policy, eta=step)
        policy = inside
        if listen is not None:
            listen(number + 1, policy)
    return policy


def self_play(
    game: PreferenceGame,
    iterations: int,
    *,
    eta: float | None = None,
    start: Tensor | None = None,
    listen: Listen | None = None,
) -> Tensor:
    """pi <- prox(pi, pi), a query an iteration: mirror descent against oneself, which need not converge."""
    return nash_prox(game, iterations, inner=1, eta=eta, start=start, listen=listen, unsafe=True)


def nash_mirror_descent(
    game: PreferenceGame,
    iterations: int,
    *,
    eta: float,
    start: Tensor | None = None,
    listen: Listen | None = None,
) -> Tensor:
    """Nash-MD: against the geometric mixture with the reference, which is the anchor too; a query an iteration.

    eta beta must lie in (0, 1). Raises ConfigError.
    """
    share = eta * game.beta
    if not 0.0 < share < 1.0 or iterations < 0:
        raise ConfigError(f"eta beta lies in (0, 1) and iterations are 0 or more, got {share:g} and {iterations}")
    policy, reference = _start(game, start), game.log_reference
    for number in range(iterations):
        mixture = ((1.0 - share) * policy + share * reference).log_softmax(-1)
        policy = (mixture + eta * game.beats(mixture)).log_softmax(-1)
        if listen is not None:
            listen(number + 1, policy)
    return policy


def _start(game: PreferenceGame, start: Tensor | None) -> Tensor:
    shape = game.preferences.shape[:-1]
    first = game.log_reference if start is None else start
    if _together(shape, first.shape) is None or not first.isfinite().all():
        raise DataError(f"a policy to start from is [..., {shape[-1]}] and gives every answer some probability")
    return first.log_softmax(-1).expand(torch.broadcast_shapes(shape, first.shape)).clone()


def exploitability(game: PreferenceGame, log_policy: Tensor) -> Tensor:
    """How much the best answer to a policy [..., Y] is paid over 1/2: [...], 0 at the equilibrium and there alone.

    Raises ShapeError, and DataError unless log_policy holds log-probabilities, which a log_softmax makes.
    """
    beats = game.beats(log_policy)
    if not (log_policy.logsumexp(-1).abs() < 1e-2).all():
        raise DataError("a policy is given by log-probabilities, whose exponentials add up to 1: take its log_softmax")
    reference = game._reference(log_policy)
    best = game.beta * (reference + beats / game.beta).logsumexp(-1)
    return (best + game.beta * kl(log_policy, reference) - 0.5).clamp(min=0.0)


def span_seminorm(first: Tensor, second: Tensor) -> Tensor:
    """max - min of log a - log b, [..., Y] to [...]: 0 where both are one. Raises ShapeError, DataError for NaN.

    >>> span_seminorm(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log())
    tensor(1.3863)
    """
    if not first.ndim or _together(first.shape, second.shape) is None:
        raise ShapeError(f"two policies are [..., Y] alike, got {tuple(first.shape)} and {tuple(second.shape)}")
    gap = first - second
    if gap.isnan().any():
        raise DataError("a policy is NaN, or both give some answer no probability: leave such answers out")
    return gap.amax(-1) - gap.amin(-1)


def regularised_nash(game: PreferenceGame, *, tolerance: float = 1e-12, most: int = 100) -> Tensor:
    """The equilibrium [..., Y], in float64: Nash mirror prox to come near, then Newton on the fixed point of its logs.

    With P = 1/2 + a skew matrix the Jacobian I - P (diag pi - pi pi^T) / b is never singular. tolerance: of the largest
    residual of log pi = log ref + P pi / b + const. Raises DataError when it is not reached in `most` Newton steps.
    """
    if not tolerance >= 0.0 or most < 1:
        raise ConfigError(f"tolerance is 0 or more and most 1 or more, got {tolerance} and {most}")
    exact = PreferenceGame(game.preferences.double(), game.log_reference.double(), game.beta)
    logits = nash_mirror_prox(exact, min(2000, 50 + round(2.0 / game.beta)))
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)

    def residual(at: Tensor) -> Tensor:
        gap = at - exact.log_reference - exact.beats(at.log_softmax(-1)) / exact.beta
        return gap - gap.mean(-1, keepdim=True)

    gap = residual(logits)
    for _ in range(most):
        if gap.abs().max() <= tolerance:
            return logits.log_softmax(-1)
        policy = logits.softmax(-1)
        spread = torch.diag_embed(policy) - policy.unsqueeze(-1) * policy.unsqueeze(-2)
        step = torch.linalg.solve(identity - exact.preferences @ spread / exact.beta, gap.unsqueeze(-1)).squeeze(-1)
        size, length = gap.norm(dim=-1, keepdim=True), torch.ones_like(gap[..., :1])
        for _ in range(40):
            tried = residual(logits - length * step)
            worse = tried.norm(dim=-1, keepdim=True) > (1.0 - 1e-4 * length) * size
            worse &= size > tolerance
            if not worse.any():
                break
            length = torch.where(worse, 0.5 * length, length)
        logits = logits - length * step
        gap = residual(logits)
    if gap.abs().max() <= max(tolerance, 1e-9):
        return logits.log_softmax(-1)
    raise DataError(f"no equilibrium within {most} Newton steps (residual {gap.abs().max():.1e}): beta is too small")
