"""Masked diffusion over sequences: schedules, the training bound, the law of a step, and exact laws by enumeration.

A sequence x is masked to level t: each symbol stays with probability alpha_t, else it becomes the mask m,
independently. A denoiser gives p(x_l | z_t) for the masked positions of z_t; from t to s < t a masked position

    stays m with (1 - alpha_s) / (1 - alpha_t), becomes v with (alpha_s - alpha_t) / (1 - alpha_t) p(v | z_t),

and what is unmasked stays. The bound on -log p(x) is E_t [-alpha'_t / (1 - alpha_t) sum_masked -log p(x_l | z_t)].
Source: Sahoo et al. 2024 (arXiv 2406.07524), as in DiDi-Instruct (arXiv 2509.25035).

Shapes: b sequences, L positions, V symbols; the mask is the symbol `mask_id`, V itself where the denoiser has no column
for it. A denoiser is called with z [b, L] and t [b], and gives logits [b, L, V] (or with a column for the mask, which
is ignored). Nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "CosineSchedule", "LogLinearSchedule", "MDMLoss", "Schedule", "categorical", "corrupt", "draw_index", "finest",
    "logits_at", "mdm_exact_distribution", "mdm_loss", "mdm_posterior", "substituted", "transition_logprob",
    "unmask_share", "without_mask",
]  # fmt: skip

Denoiser = Callable[[Tensor, Tensor], Tensor]
_EARLIEST = 1e-3  # the weight of the bound, about 1/t, is unbounded at 0
_BLOCK = 64  # columns of a row of weights that are summed as one
_STATES = 5_000  # of an enumeration: its matrix has the square of that


class Schedule(Protocol):
    """How much is unmasked at time t in [0, 1]: alpha falls from 1 to about 0."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def dalpha(self, t: Tensor) -> Tensor: ...
    def weight(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LogLinearSchedule:
    """alpha_t = 1 - (1 - eps) t, with the weight 1/t; eps = 0 is the linear schedule, alpha_1 = 0.

    >>> schedule = LogLinearSchedule()
    >>> schedule.alpha(torch.tensor([0.0, 0.5])), schedule.weight(torch.tensor(0.5))
    (tensor([1.0000, 0.5005]), tensor(2.))
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < 1.0:
            raise ConfigError(f"eps is the share that is unmasked at the end, in [0, 1), and is {self.eps}")

    def alpha(self, t: Tensor) -> Tensor:
        """The share [...] that is unmasked at t [...]."""
        return 1.0 - (1.0 - self.eps) * t

    def dalpha(self, t: Tensor) -> Tensor:
        """The derivative of alpha by t."""
        return torch.full_like(t, self.eps - 1.0)

    def weight(self, t: Tensor) -> Tensor:
        """-alpha' / (1 - alpha)."""
        return 1.0 / t


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """alpha_t = 1 - sin(pi t / 2)^2 = cos(pi t / 2)^2: slow at both ends."""

    def alpha(self, t: Tensor) -> Tensor:
        """The share [...] that is unmasked at t [...]."""
        return torch.cos(0.5 * math.pi * t).square()

    def dalpha(self, t: Tensor) -> Tensor:
        """The derivative of alpha by t."""
        return -0.5 * math.pi * torch.sin(math.pi * t)

    def weight(self, t: Tensor) -> Tensor:
        """-alpha' / (1 - alpha)."""
        return math.pi / torch.tan(0.5 * math.pi * t)


def _check_sequences(x: Tensor, name: str) -> None:
    if x.ndim != 2 or x.is_floating_point():
        raise ShapeError(f"{name} is whole numbers [b, L], got {tuple(x.shape)} of {x.dtype}")


def substituted(logits: Tensor, z: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities p(x_l | z) [b, L, V] from logits: never the mask, and what is unmasked is copied.

    Float32 at least. Raises ShapeError where logits and z do not match.

    >>> substituted(torch.zeros(1, 2, 2), torch.tensor([[2, 1]]), 2).exp()
    tensor([[[0.5000, 0.5000],
             [0.0000, 1.0000]]])
    """
    _check_sequences(z, "z")
    if logits.shape[:-1] != z.shape:
        raise ShapeError(f"logits have shape {tuple(logits.shape)} for sequences {tuple(z.shape)}: [b, L, V] is needed")
    log_p = torch.log_softmax(without_mask(logits, mask_id), dim=-1)
    copied = z.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
    known = torch.full_like(log_p, -torch.inf).scatter(-1, copied, 0.0)
    return torch.where((z == mask_id).unsqueeze(-1), log_p, known)


def without_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Logits [..., V] in float32 at least, with nothing for the mask where it has a column."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id >= wide.shape[-1]:
        return wide
    column = torch.arange(wide.shape[-1], device=wide.device) == mask_id
    return wide.masked_fill(column, -torch.inf)


def categorical(log_p: Tensor, *, generator: torch.Generator) -> Tensor:
    """One index for each row of log-probabilities [..., V], as `draw_index` draws it; rows need not be normalised.

    Raises ConfigError where a row gives all its columns nothing, or holds NaN.
    """
    return draw_index(log_p.to(torch.promote_types(log_p.dtype, torch.float32)).exp(), generator=generator)


def draw_index(weights: Tensor, *, generator: torch.Generator) -> Tensor:
    """One index [...] for each row of weights [..., V] of 0 or more, by inversion of their sums up to each column.

    Uniform numbers and sums are as fine as the device has them: with coarser ones what is rare is never drawn, which
    fakes a lower temperature. Long rows are summed in blocks, and only the block that is hit column by column.
    Raises ConfigError where a row sums to nothing, or holds NaN.

    >>> draw_index(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), generator=torch.Generator().manual_seed(0))
    tensor([1, 2])
    """
    rows = weights.reshape(-1, weights.shape[-1])
    start = rows.new_zeros(len(rows), 1, dtype=torch.long)
    if rows.shape[-1] > 2 * _BLOCK:
        padded = -rows.shape[-1] % _BLOCK
        whole = torch.nn.functional.pad(rows, (0, padded)) if padded else rows
        blocks = whole.view(len(rows), -1, _BLOCK)
        start = _inverted(blocks.sum(-1), generator)
        rows = blocks.gather(1, start.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1)
    return (start * _BLOCK + _inverted(rows, generator)).view(weights.shape[:-1])


def finest(device: torch.device) -> torch.dtype:
    """The finest floating point numbers of a device: double precision, but for those of Apple, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _inverted(rows: Tensor, generator: torch.Generator) -> Tensor:
    """The first column [m, 1] whose sum of weights [m, V] passes a uniform share of all."""
    dtype = finest(rows.device)
    sums = rows.cumsum(-1, dtype=dtype)
    total = sums[:, -1:]
    if len(rows) and not (float(total.min()) > 0.0 and float(total.max()) < math.inf):
        raise ConfigError("weights are 0 or more and not all 0 in a row, and are no numbers, or nothing, in one here")
    uniform = torch.rand(len(rows), 1, generator=generator, device=rows.device, dtype=dtype)
    # The product is rounded, and must stay below the total.
    below = 1.0 - 4.0 * torch.finfo(dtype).eps
    return torch.searchsorted(sums, uniform.mul_(below).mul_(total), right=True)


def logits_at(model: Denoiser, z: Tensor, t: Tensor, places: Tensor) -> Tensor:
    """Logits [m, V] of the positions `places` [b, L] that are true, in order, for z [b, L] and t [b].

    A denoiser with a method `at(z, t, places)` is asked for these alone, and may spare the rest its last layer.
    """
    at = getattr(model, "at", None)
    return model(z, t)[places] if at is None else at(z, t, places)


def corrupt(
    x: Tensor, alpha: Tensor | float, mask_id: int, *, generator: torch.Generator, keep: Tensor | None = None
) -> Tensor:
    """x [b, L] with each symbol masked with probability 1 - alpha [b]; those of keep [b, L], a prompt, never are.

    Raises DataError where x holds a mask already.
    """
    _check_sequences(x, "x")
    if bool((x == mask_id).any()):
        raise DataError(f"x holds the mask {mask_id} already: give whole sequences, with a mask that is no symbol")
    share = torch.as_tensor(alpha, dtype=torch.float32, device=x.device).expand(len(x)).unsqueeze(-1)
    masked = torch.rand(x.shape, generator=generator, device=x.device) >= share
    return x.masked_fill(masked if keep is None else masked & ~keep.bool(), mask_id)


class MDMLoss(NamedTuple):
    """loss: scalar, the bound a token; nll_bound: one unbiased estimate a sequence [b] of its bound on -log p(x)."""

    loss: Tensor
    nll_bound: Tensor


def mdm_loss(
    model: Denoiser,
    x: Tensor,
    *,
    schedule: Schedule,
    mask_id: int,
    generator: torch.Generator,
    antithetic: bool = True,
    attention_mask: Tensor | None = None,
    keep: Tensor | None = None,
) -> MDMLoss:
    """The weighted cross-entropy of the masked symbols of x [b, L], at a random time each: what a denoiser trains on.

    antithetic: times evenly spread over the batch. attention_mask [b, L]: symbols that count, not padding. keep [b, L]:
    a prompt, which is never masked and does not count. Raises DataError where x holds the mask.
    """
    _check_sequences(x, "x")
    t = torch.rand(len(x), generator=generator, device=x.device)
    if antithetic:
        t = (t[:1] / len(x) + torch.arange(len(x), device=x.device) / len(x)) % 1.0
    t = _EARLIEST + (1.0 - _EARLIEST) * t
    z = corrupt(x, schedule.alpha(t), mask_id, generator=generator, keep=keep)
    counts = torch.ones_like(x, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if keep is not None:
        counts = counts & ~keep.bool()
    wanted = (z == mask_id) & counts
    logits = without_mask(logits_at(model, z, t, wanted), mask_id)
    loss = torch.nn.functional.cross_entropy(logits, x[wanted], reduction="none")
    weights = schedule.weight(t).to(loss.dtype)
    rows = torch.nonzero(wanted)[:, 0]
    bound = loss.new_zeros(len(x)).index_add(0, rows, loss * weights[rows])
    return MDMLoss(bound.sum() / counts.sum().clamp(min=1), bound)


def unmask_share(schedule: Schedule, t: Tensor | float, s: Tensor | float) -> Tensor:
    """The probability (alpha_s - alpha_t) / (1 - alpha_t) that a masked position is unmasked from t to s < t.

    Raises ConfigError where s is not before t.
    """
    t, s = torch.as_tensor(t, dtype=torch.float64), torch.as_tensor(s, dtype=torch.float64)
    if not bool((t > s).all()) or bool((s < 0).any()) or bool((t > 1).any()):
        raise ConfigError(f"a step goes from t to an earlier s, 0 <= s < t <= 1, got t = {t} and s = {s}")
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    return ((alpha_s - alpha_t) / (1.0 - alpha_t)).clamp(0.0, 1.0)


def mdm_posterior(
    logits: Tensor, z: Tensor, t: Tensor | float, s: Tensor | float, *, schedule: Schedule, mask_id: int
) -> Tensor:
    """Log-probabilities [b, L, V + 1] of the next state from t to s, with the mask in its column `mask_id`.

    t, s: numbers or [b]. Raises ConfigError where s is not before t, ShapeError where logits and z do not match.

    >>> linear = LogLinearSchedule(0.0)
    >>> mdm_posterior(torch.zeros(1, 1, 2), torch.tensor([[2]]), 1.0, 0.5, schedule=linear, mask_id=2).exp()
    tensor([[[0.2500, 0.2500, 0.5000]]])
    """
    log_p = substituted(logits, z, mask_id)
    share = unmask_share(schedule, t, s).to(log_p).expand(len(z)).view(-1, 1, 1)
    if mask_id >= log_p.shape[-1]:
        gap = log_p.new_full((*z.shape, mask_id + 1 - log_p.shape[-1]), -torch.inf)
        log_p = torch.cat([log_p, gap], dim=-1)
    masked = (z == mask_id).unsqueeze(-1)
    moved = torch.where(masked, share.log() + log_p, log_p)
    column = torch.arange(log_p.shape[-1], device=z.device) == mask_id
    return torch.where(masked & column, (1.0 - share).log(), moved)


def transition_logprob(
    logits: Tensor,
    z: Tensor,
    z_next: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    *,
    schedule: Schedule,
    mask_id: int,
    changed_only: bool = False,
) -> Tensor:
    """log p(z_s = z_next | z_t = z) [b]; -inf where an unmasked symbol changed.

    changed_only: the sum of log p(v | z) over the newly unmasked, without the factors of the schedule, which no weight
    of the denoiser moves: its gradient is the same.
    """
    _check_sequences(z_next, "z_next")
    if changed_only:
        log_p = substituted(logits, z, mask_id)
        new = (z == mask_id) & (z_next != mask_id)
        chosen = z_next.clamp(max=log_p.shape[-1] - 1).unsqueeze(-1)
        return torch.where(new, log_p.gather(-1, chosen).squeeze(-1), 0.0).sum(-1)
    log_p = mdm_posterior(logits, z, t, s, schedule=schedule, mask_id=mask_id)
    return log_p.gather(-1, z_next.unsqueeze(-1)).squeeze(-1).sum(-1)


@torch.no_grad()
def mdm_exact_distribution(
    model: Denoiser, symbols: int, length: int, steps: int, *, schedule: Schedule | None = None
) -> Tensor:
    """The law of what ancestral sampling in `steps` even steps gives, [V] * L, float64, by enumeration of all states.

    The mask is symbol V, and what is masked after the last step is unmasked there, as the samplers do. The schedule is
    linear by default. Raises ConfigError beyond 5,000 states (V + 1)^L or without a step.
    """
    states = (symbols + 1) ** length
    if steps < 1 or states > _STATES:
        raise ConfigError(f"an enumeration takes 1 or more steps and {_STATES} states, got {steps} and {states}")
    schedule = LogLinearSchedule(0.0) if schedule is None else schedule
    grid = torch.cartesian_prod(*[torch.arange(symbols + 1)] * length).view(states, length)
    law = torch.zeros(states, dtype=torch.float64)
    law[-1] = 1.0
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for t, s in pairwise(times):
        reached = torch.nonzero(law).squeeze(-1)
        z = grid[reached]
        logits = model(z, torch.full((len(z),), t)).double()
        if s == 0.0:
            log_p = substituted(logits, z, symbols)
            log_p = torch.cat([log_p, torch.full_like(log_p[..., :1], -torch.inf)], dim=-1)
        else:
            log_p = mdm_posterior(logits, z, t, s, schedule=schedule, mask_id=symbols)
        following = law[reached].unsqueeze(-1)
        for place in range(length):
            following = (following.unsqueeze(-1) * log_p[:, place].exp().unsqueeze(1)).flatten(1)
        law = following.sum(0)
    return law.view([symbols + 1] * length)[tuple([slice(0, symbols)] * length)].clone()
