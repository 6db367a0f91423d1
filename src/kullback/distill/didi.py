"""DiDi-Instruct: a masked diffusion model distilled into a student of few steps by a policy gradient.

With q_t the law of the student's sequences masked to level t and p_t that of the reference's, the student minimises

    IKL = int_0^1 omega(t) KL(q_t || p_t) dt,   grad IKL = E[omega(t) / pi(t) R(z_t, t) grad log q(x)],   t ~ pi,

where x comes from the student, z_t is x masked to t, and R = log q_t(z_t) - log p_t(z_t). A discriminator between
masked sequences of both gives R: its logit is -R at its optimum, so the student ascends the logit. What is here: the
student's two steps through an intermediate state and their log-probability, the discriminator's loss, its logits as a
reward normalised in groups, and the regularisers; `didi_trainer` joins them.
Source: Zheng et al. 2025 (arXiv 2509.25035); defaults as in their released code.

Shapes: b sequences, L positions, V symbols; the groups are G sequences in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.reduce import masked_mean
from kullback.distill.sinkd import gather_rows
from kullback.models.masked_diffusion import Schedule, categorical, logits_at, unmask_share, without_mask

__all__ = [
    "Trajectory", "beta_density", "corrected_log_odds", "density_ratio_reward", "discriminator_accuracy",
    "discriminator_loss", "grouped_advantages", "ikl_surrogate", "matching_kl", "mean_entropy", "sample_times",
    "time_weights", "two_step_trajectory",
]  # fmt: skip

Denoiser = Callable[[Tensor, Tensor], Tensor]
TrajectoryKind = Literal["two_step", "one_step", "direct_score"]


def sample_times(
    n: int,
    *,
    beta: tuple[float, float] = (1.0, 1.0),
    clip: tuple[float, float] = (0.02, 0.98),
    generator: torch.Generator,
) -> Tensor:
    """Intermediate times [n], Beta(a, b) and then clipped, in float64; (1, 1) is uniform."""
    a, b = beta
    low, high = clip
    if min(a, b) <= 0.0 or not 0.0 < low <= high < 1.0:
        raise ConfigError(f"beta has two positive numbers and clip two in (0, 1) in order, got {beta} and {clip}")
    if beta == (1.0, 1.0):
        draws = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
    else:
        shape = torch.tensor([a, b], dtype=torch.float64, device=generator.device).expand(n, 2).contiguous()
        gammas = torch._standard_gamma(shape, generator=generator)
        draws = gammas[:, 0] / gammas.sum(-1)
    return draws.clamp(low, high)


def beta_density(t: Tensor, beta: tuple[float, float]) -> Tensor:
    """The density of Beta(a, b) at t [...], positive inside (0, 1)."""
    a, b = beta
    constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return (constant + (a - 1.0) * t.log() + (b - 1.0) * (1.0 - t).log()).exp()


def time_weights(
    t: Tensor,
    schedule: Schedule,
    *,
    clip: tuple[float, float] = (0.1, 10.0),
    beta: tuple[float, float] | None = None,
) -> Tensor:
    """omega(t) = -alpha' / (1 - alpha) [...], clipped; over the density of Beta(a, b) where beta is given."""
    weights = schedule.weight(t).clamp(*clip)
    return weights if beta is None else weights / beta_density(t, beta)


class Trajectory(NamedTuple):
    """The student's way from all masks over z to x, [b, L] both, and log q of it, [b], differentiable.

    first, second: log-probabilities of the symbols at the masked positions before each step, [m, V], differentiable;
    `start` [b, L] is where it began, and the masked positions of start and of z are the rows of first and second.
    """

    start: Tensor
    z: Tensor
    x: Tensor
    log_prob: Tensor
    first: Tensor
    second: Tensor


def two_step_trajectory(
    model: Denoiser,
    start: Tensor,
    tau: Tensor,
    *,
    schedule: Schedule,
    mask_id: int,
    generator: torch.Generator,
    kind: TrajectoryKind = "two_step",
    remask: float = 0.0,
) -> Trajectory:
    """Draw z at time tau [b] and x at time 0 from the student, from start [b, L] at time 1: all masks, or a prompt.

    log_prob is the sum of log p of each symbol where it was unmasked, log q(z) + log q(x | z): the factors of the
    schedule hold no weight of the student. Draws are constants. kind: "one_step" unmasks all at once (z is start);
    "direct_score" draws in two steps and scores x as though in one, which is wrong and there to be compared with.
    remask: the share of z's new symbols that become masks again; they leave the score, too.
    """
    if kind not in ("two_step", "one_step", "direct_score"):
        raise ConfigError(f'kind is "two_step", "one_step" or "direct_score", not {kind!r}')
    masked = start == mask_id
    if bool(masked.all()):  # all sequences begin alike, and the student is asked once
        one = logits_at(model, start[:1], torch.ones(1, device=start.device), masked[:1])
        first = without_mask(one, mask_id).log_softmax(-1).repeat(len(start), 1)
    else:
        logits = logits_at(model, start, torch.ones(len(start), device=start.device), masked)
        first = without_mask(logits, mask_id).log_softmax(-1)
    symbols = torch.full_like(start, mask_id)
    with torch.no_grad():
        symbols[masked] = categorical(first, generator=generator)
        if kind == "one_step":
            z, new = start, torch.zeros_like(masked)
        else:
            share = unmask_share(schedule, torch.ones_like(tau), tau).to(torch.float32).unsqueeze(-1) * (1.0 - remask)
            new = masked & (torch.rand(start.shape, generator=generator, device=start.device) < share)
            z = torch.where(new, symbols, start)
    if kind == "one_step":
        x = torch.where(masked, symbols, start)
        return Trajectory(start, z, x, _score(first, symbols, masked, masked), first, first)
    open_ = z == mask_id
    second = without_mask(logits_at(model, z, tau.to(torch.float32), open_), mask_id).log_softmax(-1)
    with torch.no_grad():
        x = z.clone()
        x[open_] = categorical(second, generator=generator)
    if kind == "direct_score":
        log_prob = _score(first, x, masked, masked)
    else:
        log_prob = _score(first, z, masked, new) + _score(second, x, open_, open_)
    return Trajectory(start, z, x, log_prob, first, second)


def _score(log_p: Tensor, symbols: Tensor, rows: Tensor, counted: Tensor) -> Tensor:
    """Sums [b] of log p(symbol) over the positions `counted`, from log_p at the positions `rows` [b, L], in order."""
    chosen = symbols[rows].clamp(max=log_p.shape[-1] - 1).unsqueeze(-1)
    values = torch.where(counted[rows], log_p.gather(-1, chosen).squeeze(-1), 0.0)
    return log_p.new_zeros(len(symbols)).index_add(0, torch.nonzero(rows)[:, 0], values)


def discriminator_loss(
    real: Tensor, fake: Tensor, real_masked: Tensor, fake_masked: Tensor, *, smoothing: float = 0.1
) -> Tensor:
    """Binary cross-entropy of logits [b, L] at masked positions, half from each side.

    The labels are 1 - smoothing for the reference's sequences and smoothing for the student's.
    Raises ConfigError for smoothing outside [0, 1/2), ShapeError where logits and masks differ.
    """
    if not 0.0 <= smoothing < 0.5:
        raise ConfigError(f"smoothing is in [0, 1/2) and is {smoothing}: from 1/2 on the labels say nothing")
    halves = []
    for logits, masked, label in ((real, real_masked, 1.0 - smoothing), (fake, fake_masked, smoothing)):
        if logits.shape != masked.shape:
            raise ShapeError(f"logits and masks are one a position, got {tuple(logits.shape)}, {tuple(masked.shape)}")
        target = torch.full_like(logits, label)
        halves.append(
            masked_mean(functional.binary_cross_entropy_with_logits(logits, target, reduction="none"), masked)
        )
    return 0.5 * (halves[0] + halves[1])


@torch.no_grad()
def discriminator_accuracy(real: Tensor, fake: Tensor, real_masked: Tensor, fake_masked: Tensor) -> Tensor:
    """The mean of both sides' shares of masked positions on the right side of 0."""
    sides = masked_mean((real > 0).float(), real_masked), masked_mean((fake <= 0).float(), fake_masked)
    return 0.5 * (sides[0] + sides[1])


def corrected_log_odds(logits: Tensor, smoothing: float) -> Tensor:
    """log p_t / q_t from the logits [...] of a discriminator that learnt labels smoothed by e.

    Its optimum says sigmoid = (1 - e) P + e (1 - P) with P = p_t / (p_t + q_t), so P = (sigmoid - e) / (1 - 2e); logits
    beyond what smoothed labels reach become plus or minus infinity.

    >>> corrected_log_odds(torch.tensor([0.0, 1.0]), 0.1)
    tensor([0.0000, 1.3178])
    """
    if not 0.0 <= smoothing < 0.5:
        raise ConfigError(f"smoothing is in [0, 1/2) and is {smoothing}")
    if smoothing == 0.0:
        return logits
    up, down = torch.sigmoid(logits) - smoothing, torch.sigmoid(-logits) - smoothing
    return up.clamp(min=0.0).log() - down.clamp(min=0.0).log()


def density_ratio_reward(logits: Tensor, masked: Tensor, *, clip: float = 8.0, smoothing: float = 0.0) -> Tensor:
    """The mean of clipped logits over the masked positions of each sequence, [b, L] to [b]; 0 where none is masked.

    It stands for log p_t / q_t = -R, as high as the reference is likelier. smoothing: corrects for that of the labels.
    """
    if logits.shape != masked.shape:
        raise ShapeError(f"logits and mask are one a position, got {tuple(logits.shape)} and {tuple(masked.shape)}")
    values = torch.where(masked, corrected_log_odds(logits, smoothing).clamp(-clip, clip), 0.0)
    return values.sum(-1) / masked.sum(-1).clamp(min=1)


def grouped_advantages(
    rewards: Tensor,
    group: int = 4,
    *,
    clip: float = 3.0,
    over: Literal["group", "batch"] = "group",
    eps: float = 1e-8,
) -> Tensor:
    """Rewards [b] less the mean of their group of `group` in a row, over its deviation, clipped to [-clip, clip].

    over="batch": mean and deviation of all rewards, those of other processes among them. Raises ShapeError where the
    batch is not made of whole groups.

    >>> grouped_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    if over == "batch":
        everything = gather_rows(rewards.unsqueeze(-1))
        return ((rewards - everything.mean()) / (everything.std() + eps)).clamp(-clip, clip)
    if over != "group":
        raise ConfigError(f'over is "group" or "batch", not {over!r}')
    if group < 2 or len(rewards) % group:
        raise ShapeError(f"a batch is whole groups of 2 or more, got {len(rewards)} rewards for groups of {group}")
    parts = rewards.view(-1, group)
    normal = (parts - parts.mean(-1, keepdim=True)) / (parts.std(-1, keepdim=True) + eps)
    return normal.clamp(-clip, clip).view(-1)


def ikl_surrogate(log_prob: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """-mean(omega x advantage x log q), a scalar from [b] each: its gradient estimates that of the integral KL.

    advantages stand for -R up to a constant, and are constants themselves.
    """
    return -(weights.to(log_prob).detach() * advantages.to(log_prob).detach() * log_prob).mean()


def matching_kl(teacher: Tensor, student: Tensor, *, mix: float = 0.0) -> Tensor:
    """Mean over rows of (1 - mix) KL(teacher||student) + mix KL(student||teacher), log-probabilities [m, V]; a scalar.

    mix: 0 is forward, 1 reverse, 1/2 half of Jeffreys' divergence. Columns that both give nothing count for nothing.
    """
    if not 0.0 <= mix <= 1.0:
        raise ConfigError(f"mix is the share of the reverse divergence in [0, 1] and is {mix}")
    dead = (teacher == -torch.inf) & (student == -torch.inf)
    teacher, student = teacher.masked_fill(dead, -1e4), student.masked_fill(dead, -1e4)
    weight = (1.0 - mix) * teacher.exp() - mix * student.exp()
    return (weight * (teacher - student)).sum(-1).mean() if len(teacher) else student.sum()


def mean_entropy(log_p: Tensor) -> Tensor:
    """Mean entropy of rows of log-probabilities [m, V], a scalar in nats."""
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
    return -(log_p.exp() * finite).sum(-1).mean() if len(log_p) else log_p.sum()
