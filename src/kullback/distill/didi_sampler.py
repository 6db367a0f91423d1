"""Reward-guided ancestral sampling (RGAS): a discriminator steers the student's few steps.

In the first part of the steps the log-probabilities of the symbols are tilted along the discriminator's gradient, log p
+ h g with h rising from one value to another; in the rest, several candidates for the next state are drawn, and one is
kept by the softmax of the discriminator's scores on them.
Source: Zheng et al. 2025 (arXiv 2509.25035); the tilt's clip and the schedule of h as in their released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.models.masked_diffusion import categorical, substituted, unmask_share, without_mask
from kullback.models.masked_diffusion_sampling import AncestralSampler, SamplingInfo, SamplingState

__all__ = ["RGASampler"]


class RGASampler(AncestralSampler):
    """An `AncestralSampler` that tilts its first steps and re-ranks its last ones by a discriminator.

    discriminator(z, t): logits [n, L] of z [n, L], or of weights [n, L, V + 1] over the symbols and the mask V. h: the
    tilt's strength at the first and the last tilted step. candidates: M, how many next states are drawn when
    re-ranking. rerank_ratio: the share of the steps that re-rank, the last ones. rerank_scale: a factor on the scores.
    tilt: "input_grad", the gradient of the masked positions' logits by log p, fed as expected embeddings, clipped to
    [-1, 1]; or "token_value", what each symbol in each place would add to them, centred and clipped likewise, which
    takes a call for each place and symbol. scored: whether a candidate's score sums the logits at "all" positions, as
    released, or at "masked" ones, for which the discriminator was trained. h = 0 with one candidate is plain sampling.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        discriminator: Callable[[Tensor, Tensor], Tensor],
        *,
        h: tuple[float, float] = (30.0, 40.0),
        candidates: int = 4,
        rerank_ratio: float = 0.5,
        rerank_scale: float = 1.0,
        tilt: Literal["input_grad", "token_value"] = "input_grad",
        scored: Literal["all", "masked"] = "all",
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if candidates < 1 or not 0.0 <= rerank_ratio <= 1.0:
            raise ConfigError(f"candidates is 1 or more and rerank_ratio in [0, 1], got {candidates}, {rerank_ratio}")
        if tilt not in ("input_grad", "token_value"):
            raise ConfigError(f'tilt is "input_grad" or "token_value", not {tilt!r}')
        if scored not in ("all", "masked"):
            raise ConfigError(f'scored is "all" or "masked", not {scored!r}')
        self.discriminator, self.h, self.candidates = discriminator, h, candidates
        self.rerank_scale, self.tilt, self.scored = rerank_scale, tilt, scored
        self.tilted_steps = int(self.steps * (1.0 - rerank_ratio))

    def strength(self, step: int) -> float:
        """h at a step: from one end to the other over the tilted steps, and 0 after them."""
        if step >= self.tilted_steps:
            return 0.0
        return self.h[0] + (self.h[1] - self.h[0]) * step / max(1, self.tilted_steps - 1)

    def _move(self, state: SamplingState, generator: torch.Generator) -> tuple[Tensor, SamplingInfo]:
        tilted = state.step < self.tilted_steps
        strength = self.strength(state.step)
        if (tilted and strength == 0.0) or (not tilted and self.candidates == 1):
            return super()._move(state, generator)
        move = self._tilted_move if tilted else self._reranked_move
        z, evaluated = move(state, generator)
        return z, SamplingInfo(evaluated, int((z != state.z).sum()))

    def _tilted_move(self, state: SamplingState, generator: torch.Generator) -> tuple[Tensor, int]:
        """The next sequences [n, L] by the tilted law, and for how many the denoiser was called."""
        chosen, t = state.due == state.step, self.times(state.step)[0]
        # A tilt looks at all masked positions of a sequence that gets a symbol.
        open_ = (state.z == self.mask_id) & chosen.any(-1, keepdim=True)
        logits, evaluated = self._logits(state.z, open_, t)
        if logits is None:
            return state.z, evaluated
        z = state.z.clone()
        tilted = self._tilted(z, logits, open_, t, self.strength(state.step))
        z[chosen] = self._symbols(tilted[chosen[open_]], state.step, generator)
        return z, evaluated

    def _reranked_move(self, state: SamplingState, generator: torch.Generator) -> tuple[Tensor, int]:
        """Of several next states, which also differ in where they unmask, the one kept by the score [n, L]."""
        t, s = self.times(state.step)
        chosen = (state.z == self.mask_id).unsqueeze(1).repeat(1, self.candidates, 1)
        if s > 0.0:
            share = float(unmask_share(self.schedule, t, s))
            chosen &= torch.rand(chosen.shape, generator=generator, device=chosen.device) < share
        open_ = chosen.any(1)
        logits, evaluated = self._logits(state.z, open_, t)
        if logits is None:
            return state.z, evaluated
        rows = open_.any(-1)
        several, chosen = state.z[rows].unsqueeze(1).repeat(1, self.candidates, 1), chosen[rows]
        place = (open_.view(-1).cumsum(0) - 1).view_as(open_)[rows].unsqueeze(1).expand_as(chosen)
        several[chosen] = self._symbols(logits[place[chosen]], state.step, generator)
        time = torch.full((several[..., 0].numel(),), s, device=place.device)
        scores = self.discriminator(several.flatten(0, 1), time)
        scores = scores.view_as(several)
        if self.scored == "masked":
            scores = scores.masked_fill(several != self.mask_id, 0.0)
        log_p = torch.log_softmax(self.rerank_scale * scores.sum(-1), dim=-1)
        kept = categorical(log_p, generator=generator)
        z = state.z.clone()
        z[rows] = several[torch.arange(len(kept), device=kept.device), kept]
        return z, evaluated

    def _tilted(self, z: Tensor, logits: Tensor, open_: Tensor, t: float, strength: float) -> Tensor:
        """Logits [m, V] = log p + h g at the positions open_, from their logits; sequences without one stay out."""
        rows = open_.any(-1)
        z, open_ = z[rows], open_[rows]
        log_p = without_mask(logits, self.mask_id).log_softmax(-1)
        everywhere = log_p.new_zeros(*z.shape, log_p.shape[-1])
        everywhere[open_] = log_p
        everywhere = substituted(everywhere, z, self.mask_id)
        by = self._gradient if self.tilt == "input_grad" else self._token_values
        return log_p + strength * by(z, everywhere, open_, t)[open_].clamp(-1.0, 1.0)

    def _gradient(self, z: Tensor, log_p: Tensor, masked: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            variable = log_p.detach().clone().requires_grad_()
            weights = torch.cat([variable.softmax(-1), torch.zeros_like(variable[..., :1])], dim=-1)
            scores = self.discriminator(weights, torch.full((len(z),), t, device=z.device))
            (slope,) = torch.autograd.grad(scores[masked].sum(), variable)
        return slope

    def _token_values(self, z: Tensor, log_p: Tensor, masked: Tensor, t: float) -> Tensor:
        symbols = log_p.shape[-1]
        values = torch.zeros_like(log_p)
        for row, place in torch.nonzero(masked).tolist():
            trial = z[row].repeat(symbols, 1)
            trial[:, place] = torch.arange(symbols, device=z.device)
            scores = self.discriminator(trial, torch.full((symbols,), t, device=z.device))
            values[row, place] = scores.masked_fill(~masked[row], 0.0).sum(-1)
        return values - (log_p.exp() * values).sum(-1, keepdim=True)
