"""Trained scores: networks of any of the usual outputs as scores, both of guidance in one call, and a small network.

    denoiser D        score = (a D(x) - x) / s^2           x = a x_0 + s noise, (a, s) = schedule.scale_and_noise(level)
    noise predictor e score = -e(x) / s
    velocity v        D = a x - s v, for schedules with a^2 + s^2 = 1

The small network is a denoiser with the preconditioning of Karras et al. 2022, fitted by denoising score matching,
E |D(x_0 + s noise) - x_0|^2 / c_out^2 with log s normal.

Source: Vincent 2011 for score matching; Karras et al. 2022; Salimans and Ho 2022 for v.
Shapes: N particles [N, *shape].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.fkc_paths import Schedule

__all__ = ["Denoiser", "guided_scores", "network_score", "train_denoiser"]

Output = Literal["denoised", "noise", "velocity"]
Score = Callable[[Tensor, Tensor], Tensor]


def network_score(network: Score, schedule: Schedule, *, output: Output = "denoised") -> Score:
    """The score of a network that takes (x, level) and gives the denoised x, the noise, or the velocity.

    Networks may compute in half precision; the score comes in the type of x. Raises ConfigError for another output.

    >>> from kullback.sample.fkc_paths import VE
    >>> score = network_score(lambda x, level: 0.5 * x, VE())
    >>> score(torch.tensor([[1.0]]), torch.tensor(1.0))
    tensor([[-0.5000]])
    """
    if output not in get_args(Output):
        raise ConfigError(f"a network's output is one of {', '.join(get_args(Output))}, not {output!r}")

    def score(x: Tensor, level: Tensor) -> Tensor:
        return _as_score(network(x, level), x, schedule, float(level), output)

    return score


def _as_score(found: Tensor, x: Tensor, schedule: Schedule, level: float, output: Output) -> Tensor:
    scale, noise = schedule.scale_and_noise(level)
    found = found.to(x.dtype)
    if found.shape != x.shape:
        raise ShapeError(f"a network gives the shape that it takes, {tuple(x.shape)}, and gave {tuple(found.shape)}")
    if output == "noise":
        return found / -noise
    denoised = scale * x - noise * found if output == "velocity" else found
    return torch.sub(denoised, x, alpha=1.0 / scale).mul_(scale / noise**2)


def guided_scores(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: Schedule,
    condition: Tensor,
    null: Tensor,
    *,
    output: Output = "denoised",
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Unconditional and conditional score by one call on a batch of 2 N, as `joint` of a GeometricMean.

    network: (x [2 N, *shape], level, conditions [2 N, ...]); condition and null: [...] for all particles.
    """

    def scores(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([null, condition]).repeat_interleave(len(x), dim=0)
        twice = torch.cat([x, x])
        first, second = _as_score(network(twice, level, both), twice, schedule, float(level), output).chunk(2)
        return first, second

    return scores


class Denoiser(nn.Module):
    """A multilayer perceptron that denoises vectors [N, d] at the noise of a VE or EDM level.

    spread: the standard deviation of the data. layers: hidden ones, of `width`.
    """

    def __init__(
        self, d: int, *, spread: float, generator: torch.Generator, width: int = 128, layers: int = 3
    ) -> None:
        super().__init__()
        if not spread > 0.0:
            raise ConfigError(f"spread is the positive standard deviation of the data, not {spread}")
        self.spread = spread
        sizes = [d + 16, *[width] * layers, d]
        # skip_init: the usual start would draw from the global generator
        linear = [nn.utils.skip_init(nn.Linear, a, b, device=generator.device) for a, b in pairwise(sizes)]
        with torch.no_grad():
            for layer in linear:
                layer.weight.normal_(0.0, 1.0 / math.sqrt(layer.in_features), generator=generator)
                layer.bias.zero_()
            linear[-1].weight.mul_(0.1)
        self.linear = nn.ModuleList(linear)
        self.register_buffer("frequencies", torch.logspace(-1, 0.7, 8, device=generator.device))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Denoised x [N, d]; level: one for all, or [N]."""
        sigma = torch.as_tensor(level, dtype=x.dtype, device=x.device).reshape(-1, 1)
        total = sigma.square() + self.spread**2
        skip, out = self.spread**2 / total, sigma * self.spread / total.sqrt()
        angles = (0.25 * sigma.log() * self.frequencies.to(x.dtype)).expand(len(x), -1)  # type: ignore[operator]
        hidden = torch.cat([x / total.sqrt(), angles.sin(), angles.cos()], dim=1)
        for layer in self.linear[:-1]:
            hidden = nn.functional.silu(layer(hidden))
        return skip * x + out * self.linear[-1](hidden)


def train_denoiser(
    network: Denoiser,
    data: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    batch: int = 512,
    learning_rate: float = 2e-3,
    log_sigma: tuple[float, float] = (-0.5, 1.5),
) -> list[float]:
    """Fits a denoiser to data [n, d] by Adam with a cosine schedule and an average of the last weights; the losses.

    log_sigma: mean and standard deviation of log noise in training. Raises DataError for data that are not finite.
    """
    if data.ndim != 2 or len(data) == 0 or not bool(data.isfinite().all()):
        raise DataError(f"data to denoise are finite rows [n, d], got {tuple(data.shape)}")
    parameters = list(network.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(data), (batch,), generator=generator, device=data.device)
        log_noise = torch.randn(batch, 1, generator=generator, device=data.device, dtype=data.dtype)
        sigma = (log_sigma[0] + log_sigma[1] * log_noise).exp()
        clean = data[rows]
        noise = torch.randn(clean.shape, generator=generator, device=data.device, dtype=data.dtype)
        scale = (sigma.square() + network.spread**2) / (sigma * network.spread).square()
        loss = (scale * (network(clean + sigma * noise, sigma) - clean).square()).mean()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        keep = min(0.995, (1.0 + step) / (10.0 + step))
        torch._foreach_mul_(averages, keep)
        torch._foreach_add_(averages, [parameter.detach() for parameter in parameters], alpha=1.0 - keep)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return torch.stack(losses).tolist() if losses else []
