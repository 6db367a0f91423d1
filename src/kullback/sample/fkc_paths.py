"""Noising paths of diffusion models: the schedules VE, VP and EDM, and what is known of a model along one of them.

Sampling runs from noise to data, with the clock v, whose increments are h = (integral of sigma_t^2 over a step) > 0. In
this clock every schedule is linear with a constant growth k (0 for VE and EDM, 1/2 for VP), and a model's marginals q_v
obey

    dx = (k x + score(x)) dv + dW,    score = grad log q_v.

A level is what scores are conditioned on: the standard deviation of the noise for VE and EDM, the time in (0, 1] for
VP, 1 being noise. Grids are uniform in the logarithm of the signal-to-noise ratio (VE, VP), or Karras' (EDM).

Source: Skreta et al. 2025 (arXiv 2503.02819); Song et al. 2021 for VE and VP, Karras et al. 2022 for EDM.
Shapes: N particles of any shape [N, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["EDM", "VE", "VP", "DiffusionPath", "Schedule", "Step", "gaussian_mixture_path", "steps_of"]


class Schedule(Protocol):
    """Levels of a noising path, with its clock; `growth` is k of the module's equation."""

    @property
    def growth(self) -> float: ...
    def levels(self, count: int) -> list[float]: ...
    def clock(self, level: float) -> float: ...
    def log_snr(self, level: float) -> float: ...
    def scale_and_noise(self, level: float) -> tuple[float, float]: ...


class Step(NamedTuple):
    """From one level to the next: the clock's increment h, the schedule's growth k, and the share of the way done."""

    level: float
    next_level: float
    h: float
    growth: float
    progress: float
    next_progress: float


def _check_sigmas(smallest: float, largest: float) -> None:
    if not 0.0 < smallest < largest < math.inf:
        raise ConfigError(f"noise falls from sigma_max to sigma_min > 0, got sigma_max={largest}, sigma_min={smallest}")


@dataclass(frozen=True, slots=True)
class VE:
    """x_0 plus noise of standard deviation sigma, on a grid uniform in log sigma; a level is sigma.

    >>> [round(level, 3) for level in VE(0.01, 10.0).levels(3)]
    [10.0, 1.0, 0.1, 0.01]
    """

    sigma_min: float = 0.01
    sigma_max: float = 80.0
    growth: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_sigmas(self.sigma_min, self.sigma_max)

    def levels(self, count: int) -> list[float]:
        """count + 1 levels, noise first."""
        ratio = math.log(self.sigma_min / self.sigma_max) / count
        return [self.sigma_max * math.exp(ratio * index) for index in range(count)] + [self.sigma_min]

    def clock(self, level: float) -> float:
        """v up to a constant; it grows as noise falls."""
        return -(level**2)

    def log_snr(self, level: float) -> float:
        """log of signal over noise, in nats of variance."""
        return -2.0 * math.log(level)

    def scale_and_noise(self, level: float) -> tuple[float, float]:
        """The factor of x_0 and the standard deviation of the noise."""
        return 1.0, level


@dataclass(frozen=True, slots=True)
class EDM(VE):
    """VE on the grid of Karras et al., uniform in sigma^(1/rho).

    >>> [round(level, 3) for level in EDM(0.002, 80.0).levels(2)]
    [80.0, 2.515, 0.002]
    """

    sigma_min: float = 0.002
    rho: float = 7.0

    def __post_init__(self) -> None:
        VE.__post_init__(self)  # slots make a new class, which super() without arguments would not find
        if not self.rho > 0.0:
            raise ConfigError(f"rho is the positive exponent of the grid, not {self.rho}")

    def levels(self, count: int) -> list[float]:
        """count + 1 levels, noise first."""
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        inner = [(first + index / count * (last - first)) ** self.rho for index in range(1, count)]
        return [self.sigma_max, *inner, self.sigma_min]


@dataclass(frozen=True, slots=True)
class VP:
    """alpha x_0 plus noise of variance 1 - alpha^2, with alpha^2 = exp(-B(t)), B' = beta_min + t (beta_max - beta_min).

    A level is t, from 1 to time_min; the grid is uniform in log[alpha^2 / (1 - alpha^2)].

    >>> [round(level, 3) for level in VP().levels(2)]
    [1.0, 0.305, 0.001]
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 1e-3
    growth: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max < math.inf:
            raise ConfigError(f"0 < beta_min <= beta_max is needed, got {self.beta_min} and {self.beta_max}")
        if not 0.0 < self.time_min < 1.0:
            raise ConfigError(f"time_min lies in (0, 1), where the path ends short of the data, not {self.time_min}")

    def _total(self, level: float) -> float:
        return self.beta_min * level + 0.5 * (self.beta_max - self.beta_min) * level**2

    def levels(self, count: int) -> list[float]:
        """count + 1 levels, noise first."""
        first, last = self.log_snr(1.0), self.log_snr(self.time_min)
        inner = (math.log1p(math.exp(-first - index / count * (last - first))) for index in range(1, count))
        slope = self.beta_max - self.beta_min  # the root below keeps its digits, and slope = 0 as well
        roots = (2 * total / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * total)) for total in inner)
        return [1.0, *roots, self.time_min]

    def clock(self, level: float) -> float:
        """v up to a constant; it grows as noise falls."""
        return -self._total(level)

    def log_snr(self, level: float) -> float:
        """log of signal over noise, in nats of variance."""
        return -math.log(math.expm1(self._total(level)))

    def scale_and_noise(self, level: float) -> tuple[float, float]:
        """The factor of x_0 and the standard deviation of the noise."""
        total = self._total(level)
        return math.exp(-0.5 * total), math.sqrt(-math.expm1(-total))


def steps_of(schedule: Schedule, count: int) -> list[Step]:
    """The steps of a schedule's grid; progress is linear in the log signal-to-noise ratio, from 0 to 1."""
    if count < 1:
        raise ConfigError(f"num_steps is {count}: at least one step is needed")
    levels = schedule.levels(count)
    first, last = schedule.log_snr(levels[0]), schedule.log_snr(levels[-1])
    progress = [(schedule.log_snr(level) - first) / (last - first) for level in levels]
    clocks = [schedule.clock(level) for level in levels]
    return [
        Step(levels[n], levels[n + 1], clocks[n + 1] - clocks[n], schedule.growth, progress[n], progress[n + 1])
        for n in range(count)
    ]


@dataclass(frozen=True, slots=True)
class DiffusionPath:
    """A diffusion model: its score, and what else is known of its marginals q.

    score: from particles [N, *shape] and a level (0-dim tensor) to grad log q [N, *shape]; of a denoiser D it is
    (D - x) / sigma^2, of a noise predictor -e / sigma. log_density: to log q [N], with its constant; where all models
    of a target have one, the first particles are weighted exactly. mean and variance (numbers or [*shape]): of the
    data, for the Gaussian from which particles start. Raises ConfigError for a variance below 0.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    log_density: Callable[[Tensor, Tensor], Tensor] | None = None
    mean: float | Tensor = 0.0
    variance: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if bool((torch.as_tensor(self.variance) < 0).any()):
            raise ConfigError(f"the variance of the data is not negative, got {self.variance}")

    def start(self, schedule: Schedule, level: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian that stands for q at a level, float64, numbers or [*shape]."""
        scale, noise = schedule.scale_and_noise(level)
        mean = torch.as_tensor(self.mean, dtype=torch.float64)
        variance = torch.as_tensor(self.variance, dtype=torch.float64)
        return scale * mean, scale**2 * variance + noise**2


def gaussian_mixture_path(
    means: Tensor, variances: Tensor | float, schedule: Schedule, *, log_weights: Tensor | None = None
) -> DiffusionPath:
    """The exact path of a mixture of isotropic Gaussians: means [M, d], variances [M] or one, log_weights [M] or equal.

    The score takes two products and a softmax over [M, N]; the log-density is normalised.

    >>> path = gaussian_mixture_path(torch.zeros(1, 2), 1.0, VE())
    >>> path.score(torch.ones(1, 2), torch.tensor(1.0))
    tensor([[-0.5000, -0.5000]])
    """
    if means.ndim != 2 or len(means) == 0:
        raise ShapeError(f"means are [M, d] with at least one component, got {tuple(means.shape)}")
    count, d = means.shape
    spread = torch.as_tensor(variances, dtype=means.dtype, device=means.device).expand(count)
    shares = means.new_zeros(count) if log_weights is None else log_weights.to(means)
    if shares.shape != (count,) or not bool((spread > 0).all()):
        raise ShapeError(f"{count} components need as many log-weights and variances above 0")
    shares = shares.log_softmax(0)
    centre = shares.exp() @ means
    scatter = (shares.exp() @ (spread.unsqueeze(1) + (means - centre).square())).detach()

    def parts(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Of each component: log of its share of the density [M, N], and its precision with precision times centre."""
        scale, noise = schedule.scale_and_noise(float(level))
        precision = 1.0 / (scale**2 * spread + noise**2)
        pulls = torch.cat([(precision * scale).unsqueeze(1) * means, precision.unsqueeze(1)], dim=1)
        constant = shares + 0.5 * d * (precision / (2 * math.pi)).log() - 0.5 * scale * (pulls[:, :d] * means).sum(1)
        known = torch.cat([x.T, x.square().sum(1).mul_(-0.5).unsqueeze(0)])
        return torch.addmm(constant.unsqueeze(1), pulls, known), pulls

    def score(x: Tensor, level: Tensor) -> Tensor:
        logits, pulls = parts(x, level)
        pull = pulls.T @ logits.softmax(0)
        return torch.addcmul(pull[:d].T, x, pull[d:].T, value=-1.0)

    def log_density(x: Tensor, level: Tensor) -> Tensor:
        return parts(x, level)[0].logsumexp(0)

    return DiffusionPath(score, (d,), log_density, mean=centre, variance=scatter)


def shared_shape(paths: Sequence[DiffusionPath]) -> tuple[int, ...]:
    """The shape of a particle, on which all paths agree; ConfigError for no path, ShapeError for two shapes."""
    if not paths:
        raise ConfigError("a target takes at least one DiffusionPath, and got none")
    shapes = {tuple(path.shape) for path in paths}
    if len(shapes) > 1:
        raise ShapeError(f"models of one target have particles of one shape, got {sorted(shapes)}")
    return shapes.pop()
