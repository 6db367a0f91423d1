"""Moves of samples of a prior, and samples that carry what their next move needs, so that a proposal costs one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = ["PriorSampler", "Proposal", "TokenMove", "Walkers", "suffix_move", "token_move"]

Draw = Callable[[int, torch.Generator], Tensor]
Move = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class PriorSampler:
    """What is known of a problem: sample(n, generator) -> x of the prior, reward(x) -> [n], and where there is one
    move(x, generator) -> x', reversible under the prior; without one proposals are fresh samples.
    """

    sample: Draw
    reward: Callable[[Tensor], Tensor]
    move: Move | None = None

    def rewards(self, x: Tensor) -> Tensor:
        """Rewards [n] in float64. Raises DataError where one is NaN or infinite, or there are too few."""
        found = self.reward(x).detach().double()
        if found.shape != x.shape[:1] or not found.isfinite().all():
            raise DataError(f"the reward gives a finite number for each of {len(x)} samples, got {tuple(found.shape)}")
        return found

    def proposal(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A proposal for each of x."""
        return self.sample(len(x), generator) if self.move is None else self.move(x, generator)


def suffix_move(length: int, regenerate: Callable[[Tensor, int, torch.Generator], Tensor]) -> Move:
    """The move that keeps a random number of first tokens and samples the rest anew from the prior; for x [n, length].

    regenerate(x, kept, generator) gives x with the tokens from `kept` on drawn given those before.
    """
    if length < 1:
        raise ConfigError(f"sequences have a token at least, got {length}")

    def move(x: Tensor, generator: torch.Generator) -> Tensor:
        kept = int(torch.randint(length, (), generator=generator))
        return regenerate(x, kept, generator)

    return move


class Proposal(NamedTuple):
    """x' [n, T], its laws [n, T, V], and log a(x') q(x | x') - log a(x) q(x' | x) [n], for Metropolis and Hastings."""

    x: Tensor
    laws: Tensor
    log_ratio: Tensor


@dataclass(frozen=True, slots=True)
class TokenMove:
    """See `token_move`. A call is a move reversible under the prior, for two calls of the model; `propose` takes the
    laws that an earlier call has given, and makes one; `choose` lets the reward choose before the model is called.
    """

    log_laws: Callable[[Tensor], Tensor]
    tokens: int = 1
    tries: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"a move draws a token at least, got {self.tokens}")
        if self.tries < 1 or (self.tries > 1 and self.tokens > 1):
            raise ConfigError(f"tries are 1 or more, and more only of single tokens: {self.tries} and {self.tokens}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x', moved or not."""
        found = self.propose(x, self.laws(x), generator)
        taken = torch.rand(len(x), generator=generator, device=x.device) < found.log_ratio.exp()
        return torch.where(taken.unsqueeze(1), found.x, x)

    def laws(self, x: Tensor) -> Tensor:
        """log a(. | tokens before) [n, T, V] of x [n, T], one call of the model. Raises ShapeError."""
        if x.ndim != 2 or x.shape[1] < self.tokens:
            raise ShapeError(f"x is [n, T] with {self.tokens} tokens at least, got {tuple(x.shape)}")
        found = self.log_laws(x).detach()
        if found.shape[:2] != x.shape or found.ndim != 3:
            raise ShapeError(f"laws are [n, T, V] for x {tuple(x.shape)}, got {tuple(found.shape)}")
        return found

    def propose(self, x: Tensor, laws: Tensor, generator: torch.Generator) -> Proposal:
        """Other tokens at places of each row's own, drawn from `laws` of x, which are the model's at x."""
        places = torch.rand(x.shape, generator=generator, device=x.device).topk(self.tokens).indices
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        held, before = x[rows, places], laws[rows, places]
        open_ = before.scatter(2, held.unsqueeze(2), -torch.inf)  # the token that stands there is not drawn again
        alone = open_.amax(2) == -torch.inf  # unless it is the only one
        chances = torch.where(alone.unsqueeze(2), before, open_).softmax(2)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(held)
        proposed = x.scatter(1, places, drawn)
        after = self.laws(proposed)
        forth = _log_chance(before, held, drawn)
        back = _log_chance(after[rows, places], drawn, held)
        gained = _log_probs(after, proposed).sum(1) - _log_probs(laws, x).sum(1)
        return Proposal(proposed, after, gained + (back - forth).sum(1))

    def choose(
        self, x: Tensor, rewards: Tensor, laws: Tensor, inverse: Tensor, problem: PriorSampler, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x', its rewards [n], the places [n, 1] that may differ): at each row's place so many tokens are drawn from
        its law, and one of them or the one that stands there is taken, by exp(inverse r).
        """
        place = torch.randint(x.shape[1], (len(x), 1), generator=draw, device=x.device)
        law = laws.take_along_dim(place.unsqueeze(2), 1).squeeze(1).softmax(1)
        drawn = torch.multinomial(law, self.tries, replacement=True, generator=draw)
        where = place.unsqueeze(1).expand(-1, self.tries, -1)
        others = x.unsqueeze(1).expand(-1, self.tries, -1).scatter(2, where, drawn.unsqueeze(2))
        found = problem.rewards(others.flatten(0, 1)).view(len(x), -1)
        known = torch.cat([rewards.unsqueeze(1), found], 1)
        taken = torch.multinomial((inverse.unsqueeze(1) * known).softmax(1), 1, generator=draw)
        tokens = torch.cat([x.gather(1, place), drawn], 1)
        return x.scatter(1, place, tokens.gather(1, taken)), known.gather(1, taken).squeeze(1), place


def _log_probs(laws: Tensor, x: Tensor) -> Tensor:
    return laws.gather(2, x.unsqueeze(2)).squeeze(2)


def _log_chance(laws: Tensor, held: Tensor, drawn: Tensor) -> Tensor:
    """The log-probability [n, k] that `drawn` replaces `held` under laws [n, k, V], which never draw the same again."""
    rest = laws.scatter(2, held.unsqueeze(2), -torch.inf).logsumexp(2)
    moved = torch.where(rest == -torch.inf, -torch.inf, _log_probs(laws, drawn) - rest)
    stayed = torch.where(rest == -torch.inf, 0.0, -torch.inf)
    return torch.where(held == drawn, stayed.to(moved.dtype), moved)


def token_move(log_laws: Callable[[Tensor], Tensor], *, tokens: int = 1, tries: int = 1) -> TokenMove:
    """The move that draws `tokens` other tokens, at places of each row's own, and keeps the rest; for x [n, T].

    log_laws: from x to log a(. | tokens before) at every place [n, T, V], one forward of a model. Proposals come from
    the laws before the move, but for the token that stands there, and are accepted as Metropolis and Hastings do, by
    a(x') q(x | x') / a(x) q(x' | x). The samplers here keep each sample's laws [n, T, V] from its last move, in memory,
    and so make one call a proposal.
    tries: tokens that the reward has seen at a place before the model is called, where a reward costs little beside it:
    so many are drawn from the law there, one of them or the old one is taken by exp(s r), and what is left to accept is
    how likely the model finds the tokens after it. Where the old one is taken, no call is made.
    Raises ConfigError, ShapeError.
    """
    return TokenMove(log_laws, tokens, tries)


class Walkers:
    """Samples x [n, ...] with their rewards [n], and the laws of the last move where the move can use them again.

    calls: how many samples the prior has drawn or scored until now; asked [n]: how many of each row, in the last step.
    """

    def __init__(self, problem: PriorSampler, count: int, generator: torch.Generator) -> None:
        self.problem = problem
        self.x = problem.sample(count, generator)
        self.rewards = problem.rewards(self.x)
        self.laws: Tensor | None = None
        self.calls = count
        self.asked = torch.ones(count, dtype=torch.long, device=self.x.device)

    def keep(self, places: Tensor) -> None:
        """Go on with the samples at places [n]."""
        self.x, self.rewards = self.x[places], self.rewards[places]
        self.laws = None if self.laws is None else self.laws[places]

    def step(self, inverse: float | Tensor, generator: torch.Generator) -> Tensor:
        """A move that leaves a exp(inverse r) in place, inverse one or [n]; which proposals were taken, [n] bool."""
        move, scale = self.problem.move, torch.as_tensor(inverse, dtype=torch.float64, device=self.x.device)
        self.asked = torch.zeros(len(self.x), dtype=torch.long, device=self.x.device)
        if isinstance(move, TokenMove):
            if self.laws is None:
                self.laws = move.laws(self.x)
                self.asked += 1
            taken = self._by_tokens(move, self.laws, scale.expand(len(self.x)), generator)
        else:
            proposed, self.asked = self.problem.proposal(self.x, generator), self.asked + 1
            found = self.problem.rewards(proposed)
            taken = self._taken(scale * (found - self.rewards), generator)
            self.x, self.rewards = _where(taken, proposed, self.x), _where(taken, found, self.rewards)
        self.calls += int(self.asked.sum())
        return taken

    def _by_tokens(self, move: TokenMove, held: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        if move.tries > 1:
            return self._by_tries(move, held, scale, generator)
        proposed, laws, log_ratio = move.propose(self.x, held, generator)
        found = self.problem.rewards(proposed)
        taken = self._taken(log_ratio.double() + scale * (found - self.rewards), generator)
        self.asked += 1
        self.laws = _where(taken, laws, held)
        self.x, self.rewards = _where(taken, proposed, self.x), _where(taken, found, self.rewards)
        return taken

    def _by_tries(self, move: TokenMove, held: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        proposed, found, place = move.choose(self.x, self.rewards, held, scale, self.problem, generator)
        rows = (proposed != self.x).any(1).nonzero().squeeze(1)
        taken = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        if not len(rows):
            return taken
        laws = move.laws(proposed[rows])
        gained = _log_probs(laws, proposed[rows]) - _log_probs(held[rows], self.x[rows])
        after = torch.arange(self.x.shape[1], device=self.x.device) > place[rows]
        kept = self._taken(torch.where(after, gained, 0.0).sum(1).double(), generator)
        self.asked[rows] += 1
        taken[rows] = kept
        self.laws = held.clone()
        self.laws[rows[kept]] = laws[kept]
        self.x, self.rewards = _where(taken, proposed, self.x), _where(taken, found, self.rewards)
        return taken

    def _taken(self, log_chance: Tensor, generator: torch.Generator) -> Tensor:
        chance = log_chance.clamp(max=0.0).exp()
        return torch.rand(len(chance), generator=generator, dtype=torch.float64, device=chance.device) < chance


def _where(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of new where taken [n], else of old."""
    return torch.where(taken.view(-1, *[1] * (new.ndim - 1)), new, old)
