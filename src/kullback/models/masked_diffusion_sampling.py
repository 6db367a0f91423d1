"""Ancestral sampling from a masked diffusion model, a step at a time, with the denoiser called only where it must be.

At which step a position is unmasked does not depend on the symbols, so it is drawn for all positions at the start. A
step then calls the denoiser for the sequences that get a symbol in it, and only the positions that get one take a
softmax and a draw (and the denoiser's last layer, where it has a method `at`). The law is that of the textbooks'
sampler, which calls the denoiser for every sequence at each step, also where the denoiser looks at the time.

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
    draw_index,
    finest,
    logits_at,
    unmask_share,
    without_mask,
)

__all__ = ["AncestralSampler", "SamplingInfo", "SamplingState"]


class SamplingState(NamedTuple):
    """z [n, L], partly masked; step: how many were taken; due [n, L]: the step in which a position gets its symbol.

    due [n, 0] is drawn by the next step.
    """

    z: Tensor
    step: int
    due: Tensor


class SamplingInfo(NamedTuple):
    """evaluated: sequences for which the denoiser was called; unmasked: positions that got a symbol."""

    evaluated: int
    unmasked: int


class AncestralSampler:
    """`init(n, length)`, `step(state)` and `run(n, length)`: from all masks to sequences in `steps` even steps.

    mask_id: the mask's symbol. The last step unmasks all that is left, with a draw ("ancestral") or the likeliest
    symbol ("greedy"). cache: whether a sequence that gets no symbol in a step is spared the denoiser; without it the
    same sequences come at the price of the textbooks' sampler. Raises ConfigError for unknown names and without a step.

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
        return SamplingState(z, 0, z.new_empty(n, 0))

    @torch.no_grad()
    def step(self, state: SamplingState, *, generator: torch.Generator) -> tuple[SamplingState, SamplingInfo]:
        """One step; after the last, the state comes back as it is."""
        if state.step >= self.steps:
            return state, SamplingInfo(0, 0)
        if not state.due.shape[1] and state.z.shape[1]:
            state = state._replace(due=self._drawn_steps(state, generator))
        z, info = self._move(state, generator)
        return SamplingState(z, state.step + 1, state.due), info

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

    def _drawn_steps(self, state: SamplingState, generator: torch.Generator) -> Tensor:
        """For each masked position [n, L] the step in which it is unmasked, given the steps taken; -1 for the others.

        By the end of a step to time s that has happened with probability (alpha_s - alpha_t) / (1 - alpha_t), t being
        now, and by the end of the last step for certain.
        """
        t = self.times(state.step)[0]
        ends = torch.tensor([self.times(step)[1] for step in range(state.step, self.steps - 1)], dtype=torch.float64)
        dtype = finest(state.z.device)
        passed = unmask_share(self.schedule, t, ends).to(dtype).to(state.z.device)
        uniform = torch.rand(state.z.shape, generator=generator, device=state.z.device, dtype=dtype)
        drawn = torch.searchsorted(passed, uniform, right=True) + state.step
        return drawn.masked_fill_(state.z != self.mask_id, -1)

    def _move(self, state: SamplingState, generator: torch.Generator) -> tuple[Tensor, SamplingInfo]:
        """The sequences [n, L] of the next state, and what it took."""
        chosen = state.due == state.step
        logits, evaluated = self._logits(state.z, chosen, self.times(state.step)[0])
        if logits is None:
            return state.z, SamplingInfo(evaluated, 0)
        z = state.z.clone()
        z[chosen] = self._symbols(logits, state.step, generator)
        return z, SamplingInfo(evaluated, len(logits))

    def _logits(self, z: Tensor, chosen: Tensor, t: float) -> tuple[Tensor | None, int]:
        """Logits [m, V] of the chosen positions of z, None without one; and for how many sequences it was called."""
        rows = chosen.any(-1)
        count = int(rows.sum())
        called = count if self.cache else len(z)
        if not called:
            return None, 0
        time = torch.full((called,), t, device=z.device)
        if called < len(z):
            z, chosen = z[rows], chosen[rows]
        logits = logits_at(self.model, z, time, chosen)
        return logits if count else None, called

    def _symbols(self, logits: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Symbols [m] from logits [m, V] of masked positions."""
        logits = without_mask(logits, self.mask_id)
        if step + 1 == self.steps and self.noise_removal == "greedy":
            return logits.argmax(-1)
        return draw_index(logits.softmax(-1), generator=generator)
