"""Ancestral sampling from a masked diffusion model, a step at a time, with the denoiser called only where it must be.

Which masked positions are unmasked does not depend on the symbols, so it is drawn first, and only those positions take
a softmax and a symbol. A sequence in which nothing was unmasked keeps its logits: the next step does not call the
denoiser for it (denoisers that look at t must set cache=False).

Shapes: n sequences, L positions, V symbols.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError
from kullback.models.masked_diffusion import (
    Denoiser,
    LogLinearSchedule,
    Schedule,
    categorical,
    substituted,
    unmask_share,
)

__all__ = ["AncestralSampler", "SamplingInfo", "SamplingState"]


class SamplingState(NamedTuple):
    """z [n, L], partly masked; step: how many were taken; logits [n, L, V] of z where `stale` [n] is false."""

    z: Tensor
    step: int
    logits: Tensor
    stale: Tensor


class SamplingInfo(NamedTuple):
    """evaluated: sequences for which the denoiser was called; unmasked: positions that got a symbol."""

    evaluated: int
    unmasked: int


class AncestralSampler:
    """`init(n, length)`, `step(state)` and `run(n, length)`: from all masks to sequences in `steps` even steps.

    mask_id: the mask's symbol. The last step unmasks all that is left, with a draw ("ancestral") or the likeliest
    symbol ("greedy"). cache: whether logits are kept while a sequence does not change. Raises ConfigError for unknown
    names and without a step.

    >>> uniform = lambda z, t: torch.zeros(*z.shape, 3)
    >>> sampler = AncestralSampler(uniform, steps=4, mask_id=3)
    >>> x = sampler.run(2, 5, generator=torch.Generator().manual_seed(0))
    >>> x.shape, bool((x < 3).all())
    (torch.Size([2, 5]), True)
    """

    def __init__(
        self,
        model: Denoiser,
        *,
        steps: int,
        mask_id: int,
        schedule: Schedule | None = None,
        cache: bool = True,
        noise_removal: Literal["ancestral", "greedy"] = "ancestral",
    ) -> None:
        if steps < 1:
            raise ConfigError(f"sampling takes 1 or more steps, got {steps}")
        if noise_removal not in ("ancestral", "greedy"):
            raise ConfigError(f'noise_removal is "ancestral" or "greedy", not {noise_removal!r}')
        self.model, self.steps, self.mask_id = model, steps, mask_id
        self.cache, self.noise_removal = cache, noise_removal
        self.schedule: Schedule = LogLinearSchedule() if schedule is None else schedule

    def init(
        self, n: int, length: int, *, prompt: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> SamplingState:
        """All masks [n, L]; or prompt [n, L], whose symbols stay and whose masks are to be filled."""
        z = torch.full((n, length), self.mask_id, device=device) if prompt is None else prompt.clone()
        if z.shape != (n, length):
            raise ShapeError(f"the prompt has shape {tuple(z.shape)}: give [{n}, {length}], masks where it is open")
        nothing = torch.zeros(n, length, 0, device=z.device)
        return SamplingState(z, 0, nothing, torch.ones(n, dtype=torch.bool, device=z.device))

    @torch.no_grad()
    def step(self, state: SamplingState, *, generator: torch.Generator) -> tuple[SamplingState, SamplingInfo]:
        """One step; after the last, the state comes back as it is."""
        if state.step >= self.steps:
            return state, SamplingInfo(0, 0)
        t, s = self.times(state.step)
        state, evaluated = self._evaluate(state, t)
        z = self._move(state, t, s, generator)
        changed = (z != state.z).any(-1)
        unmasked = int((z != state.z).sum())
        stale = changed if self.cache else torch.ones_like(changed)
        return SamplingState(z, state.step + 1, state.logits, stale), SamplingInfo(evaluated, unmasked)

    @torch.no_grad()
    def run(
        self,
        n: int,
        length: int,
        *,
        generator: torch.Generator,
        prompt: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Sequences [n, L] after all steps."""
        state = self.init(n, length, prompt=prompt, device=device)
        for _ in range(self.steps):
            state, _ = self.step(state, generator=generator)
        return state.z

    def times(self, step: int) -> tuple[float, float]:
        """From when to when a step goes, the first being step 0."""
        return 1.0 - step / self.steps, 1.0 - (step + 1) / self.steps if step + 1 < self.steps else 0.0

    def _evaluate(self, state: SamplingState, t: float) -> tuple[SamplingState, int]:
        """The state with logits for all its sequences that still have a mask, and for how many they were computed."""
        wanted = state.stale & (state.z == self.mask_id).any(-1)
        rows = torch.nonzero(wanted).squeeze(-1)
        if not len(rows):
            return state, 0
        fresh = self.model(state.z[rows], torch.full((len(rows),), t, device=rows.device))
        if len(rows) == len(state.z):
            return state._replace(logits=fresh), len(rows)
        if not state.logits.shape[-1]:
            logits = fresh.new_zeros(*state.z.shape, fresh.shape[-1])
        else:
            logits = state.logits.clone()
        logits[rows] = fresh
        return state._replace(logits=logits), len(rows)

    def _move(self, state: SamplingState, t: float, s: float, generator: torch.Generator) -> Tensor:
        """The sequences [n, L] of the next state."""
        return self._unmask(state.z, state.logits, t, s, generator)

    def _unmask(self, z: Tensor, logits: Tensor, t: float, s: float, generator: torch.Generator) -> Tensor:
        masked = z == self.mask_id
        chosen = masked
        if s > 0.0:
            share = float(unmask_share(self.schedule, t, s))
            chosen = masked & (torch.rand(z.shape, generator=generator, device=z.device) < share)
        if not bool(chosen.any()):
            return z
        log_p = substituted(logits[chosen].unsqueeze(0), z[chosen].unsqueeze(0), self.mask_id).squeeze(0)
        greedy = s == 0.0 and self.noise_removal == "greedy"
        z = z.clone()
        z[chosen] = log_p.argmax(-1) if greedy else categorical(log_p, generator=generator)
        return z
