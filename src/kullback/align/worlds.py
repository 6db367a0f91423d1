"""Exact worlds: all V^T sequences at once, so that policies, rewards, divergences and optima are exact tensors.

A policy over a world is its log-probabilities [..., N] over the N = V^T sequences in lexicographic order; with autograd
they give the exact gradient of anything. Closed forms, with p the reference, r the reward:

    max E_q r - c KL(q||p)    at q = p exp(r / c) / Z,  with the value c log Z;
    best of n draws of p      has M_j = F_j^n - F_(j-1)^n on the j-th reward level, shared out in proportion to p.

Shapes: log-probabilities and rewards [..., N], in nats; sequences [B, T] of token ids. Everything in the input's type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = [
    "ExactPolicy",
    "RecurrentPolicy",
    "TabularPolicy",
    "World",
    "best_of_n_law",
    "draw_sequences",
    "entropy",
    "expected_reward",
    "regularised_optimum",
    "regularised_value",
]

_LARGEST = 5_000_000


@dataclass(frozen=True, slots=True)
class World:
    """All sequences of `length` tokens from `vocabulary` many; ConfigError for none or for more than five million.

    >>> World(2, 3).sequences()[5]
    tensor([1, 0, 1])
    """

    vocabulary: int
    length: int

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.length < 1 or self.vocabulary**self.length > _LARGEST:
            size = f"{self.vocabulary} tokens and length {self.length}"
            raise ConfigError(f"a world enumerates 1 to {_LARGEST} sequences, which {size} do not give: take fewer")

    @property
    def size(self) -> int:
        """N = V^T."""
        return self.vocabulary**self.length

    def sequences(self) -> Tensor:
        """Token ids [N, T] in lexicographic order."""
        weights = self.vocabulary ** torch.arange(self.length - 1, -1, -1)
        return torch.arange(self.size).unsqueeze(1) // weights % self.vocabulary

    def index(self, sequences: Tensor) -> Tensor:
        """The places [...] of sequences [..., T] in the enumeration; ShapeError for another length or token."""
        if sequences.shape[-1] != self.length or ((sequences < 0) | (sequences >= self.vocabulary)).any():
            raise ShapeError(
                f"sequences have shape {tuple(sequences.shape)}: this world has {self.length} tokens "
                f"from 0 to {self.vocabulary - 1} in each"
            )
        weights = self.vocabulary ** torch.arange(self.length - 1, -1, -1, device=sequences.device)
        return (sequences * weights).sum(-1)


class ExactPolicy(Protocol):
    """What gives exact log-probabilities, over the whole world [N] and of single sequences [B, T] to [B]."""

    world: World

    def all_log_probs(self) -> Tensor: ...
    def log_probs(self, sequences: Tensor) -> Tensor: ...


class TabularPolicy(nn.Module):
    """A table of next-token logits for every prefix: any distribution over the world, as an autoregressive model.

    The parameters start at `scale` times standard normals, so that scale = 0 is the uniform distribution.
    """

    def __init__(
        self,
        world: World,
        *,
        generator: torch.Generator | None = None,
        scale: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if scale and generator is None:
            raise ConfigError("a random table needs a generator: kullback.core.rng.generator(seed, name), or scale=0")
        self.world = world
        shapes = [(world.vocabulary**place, world.vocabulary) for place in range(world.length)]
        self.logits = nn.ParameterList(
            scale * torch.randn(shape, generator=generator, dtype=dtype) if scale else torch.zeros(shape, dtype=dtype)
            for shape in shapes
        )

    def all_log_probs(self) -> Tensor:
        """Log-probabilities [N]."""
        whole = self.logits[0].new_zeros(1)
        for table in self.logits:
            whole = (whole.unsqueeze(1) + table.log_softmax(-1)).flatten()
        return whole

    def log_probs(self, sequences: Tensor) -> Tensor:
        """Log-probabilities of sequences [..., T]: [...]."""
        return self.all_log_probs()[self.world.index(sequences)]


class RecurrentPolicy(nn.Module):
    """A gated recurrent language model of a few thousand parameters; over the world it visits every prefix only once.

    width: of the embedding and of the state. Parameters start uniform in +-1/sqrt(width).
    """

    def __init__(
        self, world: World, *, generator: torch.Generator, width: int = 48, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.world, self.width = world, width
        # The last row of the embedding is the token that begins a sequence.
        shapes = {
            "embedding": (world.vocabulary + 1, width), "into": (3 * width, width), "again": (3 * width, width),
            "into_bias": (3 * width,), "again_bias": (3 * width,), "head": (world.vocabulary, width),
            "head_bias": (world.vocabulary,),
        }  # fmt: skip
        for name, shape in shapes.items():
            drawn = torch.rand(shape, generator=generator, dtype=dtype)
            self.register_parameter(name, nn.Parameter((2 * drawn - 1) / math.sqrt(width)))

    def _step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The next state [B, width] and log-probabilities [B, V] after tokens [B]."""
        new, old = (
            nn.functional.linear(x, self.get_parameter(weight), self.get_parameter(f"{weight}_bias")).chunk(3, -1)
            for x, weight in ((self.get_parameter("embedding")[tokens], "into"), (state, "again"))
        )
        reset, update = torch.sigmoid(new[0] + old[0]), torch.sigmoid(new[1] + old[1])
        candidate = torch.tanh(new[2] + reset * old[2])
        state = candidate + update * (state - candidate)
        return state, nn.functional.linear(state, self.get_parameter("head"), self.get_parameter("head_bias"))

    def all_log_probs(self) -> Tensor:
        """Log-probabilities [N]."""
        vocabulary = self.world.vocabulary
        bias = self.get_parameter("head_bias")
        whole, state = bias.new_zeros(1), bias.new_zeros(1, self.width)
        tokens = torch.full((1,), vocabulary)
        for _ in range(self.world.length):
            state, logits = self._step(tokens, state)
            whole = (whole.unsqueeze(1) + logits.log_softmax(-1)).flatten()
            tokens = torch.arange(vocabulary).repeat(len(state))
            state = state.repeat_interleave(vocabulary, dim=0)
        return whole

    def log_probs(self, sequences: Tensor) -> Tensor:
        """Log-probabilities of sequences [B, T]: [B]."""
        self.world.index(sequences)
        state = self.get_parameter("head_bias").new_zeros(len(sequences), self.width)
        tokens = torch.full_like(sequences[:, 0], self.world.vocabulary)
        whole = state.new_zeros(len(sequences))
        for place in range(self.world.length):
            state, logits = self._step(tokens, state)
            tokens = sequences[:, place]
            whole = whole + logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        return whole


def draw_sequences(world: World, log_policy: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """count independent sequences [count, T] of a policy [N], with replacement.

    By the inverse of the distribution function, which has no limit on N.
    """
    if log_policy.shape != (world.size,):
        raise ShapeError(f"the policy has shape {tuple(log_policy.shape)} and the world {world.size} sequences")
    cumulative = log_policy.detach().double().exp().cumsum(0)
    where = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    place = torch.searchsorted(cumulative, where, right=True).clamp(max=world.size - 1)
    return world.sequences()[place]


def expected_reward(log_policy: Tensor, reward: Tensor) -> Tensor:
    """E r under the policy, [..., N] to [...]."""
    return (log_policy.exp() * reward).sum(-1)


def entropy(log_policy: Tensor) -> Tensor:
    """-sum q log q in nats, [..., N] to [...]; a probability of exactly 0 adds nothing.

    >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
    tensor(0.6931)
    """
    return -(log_policy.exp() * log_policy.clamp(min=torch.finfo(log_policy.dtype).min)).sum(-1)


def regularised_value(log_reference: Tensor, log_policy: Tensor, reward: Tensor, *, coefficient: float) -> Tensor:
    """E r - c KL(policy||reference), [..., N] to [...]: what RLHF maximises."""
    penalty = kl(log_policy, log_reference.expand_as(log_policy))
    return expected_reward(log_policy, reward) - coefficient * penalty


def _check_coefficient(coefficient: float) -> None:
    if not (coefficient > 0.0 and math.isfinite(coefficient)):
        raise ConfigError(f"the coefficient of the KL is positive and finite, not {coefficient}")


def regularised_optimum(log_reference: Tensor, reward: Tensor, *, coefficient: float) -> Tensor:
    """The policy that maximises `regularised_value`, p exp(r / c) / Z: log-probabilities [..., N].

    Raises ConfigError for a coefficient that is not positive, DataError for a reward that is NaN.

    >>> regularised_optimum(torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([1.0, 0.0, -1.0]), coefficient=0.5).exp()
    tensor([0.9187, 0.0746, 0.0067])
    """
    _check_coefficient(coefficient)
    if reward.isnan().any():
        raise DataError(f"{int(reward.isnan().sum())} rewards are NaN: score them again or leave them out")
    return (log_reference + reward / coefficient).log_softmax(-1)


def _level_masses(log_p: Tensor, ordered: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """log of the mass of the level of each place, and of the distribution function up to that level and above it."""
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[..., 1:] = ordered[..., 1:] - ordered[..., :-1] > tolerance
    level = begins.long().cumsum(-1) - 1
    largest = torch.full_like(log_p, -math.inf).scatter_reduce(-1, level, log_p, "amax")
    largest = largest.clamp(min=torch.finfo(log_p.dtype).min)
    total = torch.zeros_like(log_p).scatter_add(-1, level, (log_p - largest.gather(-1, level)).exp())
    mass = total.log() + largest  # one entry a level, then -inf
    below = mass.logcumsumexp(-1)
    above = mass.flip(-1).logcumsumexp(-1).flip(-1).roll(-1, -1)
    above[..., -1] = -math.inf
    return tuple(x.gather(-1, level) for x in (mass, below, above))  # type: ignore[return-value]


def best_of_n_law(log_reference: Tensor, reward: Tensor, n: float, *, tie_tolerance: float = 0.0) -> Tensor:
    """The law of the best of n independent draws of the reference, log-probabilities [..., N]; ties share alike.

    n is real, 1 or more, and may be huge: survival probabilities are summed from the top. Rewards that differ by no
    more than tie_tolerance from their neighbour are one level. Raises ConfigError for n below 1, DataError for NaN.

    >>> best_of_n_law(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), torch.tensor([0.0, 1.0, 2.0, 4.0]), 4).exp()
    tensor([0.0625, 0.2539, 0.3397, 0.3439])
    """
    if not (n >= 1.0 and math.isfinite(n)) or tie_tolerance < 0.0:
        raise ConfigError(f"best of n takes a finite n from 1 and a tolerance from 0, got {n} and {tie_tolerance}")
    if reward.isnan().any():
        raise DataError(f"{int(reward.isnan().sum())} rewards are NaN: score them again or leave them out")
    log_p, reward = torch.broadcast_tensors(log_reference, reward)
    ordered, order = reward.sort(-1)
    sorted_p = log_p.gather(-1, order)
    mass, below, above = _level_masses(sorted_p, ordered, tie_tolerance)
    # F from the side that keeps its digits: from below where it is small, from the survival where it is near 1
    log_f = torch.where(below < -0.7, below, torch.log1p(-above.exp().clamp(max=0.6)))
    part = (mass - log_f).clamp(max=0.0)  # P_j / F_j, whose complement to the n-th power is (F_(j-1) / F_j)^n
    gained = torch.log(-torch.expm1(n * torch.log1p(-part.exp())))
    gained = torch.where(part < -600.0, math.log(n) + part, gained)
    law = (sorted_p - mass + n * log_f + gained).masked_fill(sorted_p == -math.inf, -math.inf)
    return torch.empty_like(law).scatter(-1, order, law)
