"""Targets in closed form for Feynman-Kac correctors, the check of them, and a target with a wrong rate."""

import math
from dataclasses import dataclass

import pytest
import torch

from kullback.sample.fkc import fkc_sampler
from kullback.sample.fkc_paths import VE, gaussian_mixture_path
from kullback.sample.fkc_targets import Annealed, GeometricMean, ProductOfExperts, RewardTilted, Target

SCHEDULE = VE(0.01, 10.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(mean, variance, schedule=SCHEDULE):
    return gaussian_mixture_path(torch.tensor([[mean]], dtype=torch.float64), variance, schedule)


def moments(target, *, schedule=SCHEDULE, particles=2000, swarms=16, steps=100, weighted=True, **options):
    """Mean, variance and log Z over independent swarms, and six standard errors of each."""
    options = {"heun": True, **options}
    result = fkc_sampler(target, schedule, particles, steps, num_swarms=swarms, generator=seeded(3), **options)
    weights = result.log_weights.softmax(1) if weighted else torch.full_like(result.log_weights, 1 / particles)
    x = result.samples[..., 0]
    mean = (weights * x).sum(1)
    variance = (weights * (x - mean.unsqueeze(1)).square()).sum(1)
    found = torch.stack([mean, variance, result.log_z + result.log_z_start])
    return found.mean(1).tolist(), (6 * found.std(1) / math.sqrt(swarms)).tolist()


# name -> target, mean, variance, log of the integral of its density
GAUSSIANS = {
    "annealed": (Annealed(normal(0.0, 1.0), 2.0), 0.0, 0.5, -0.5 * math.log(4 * math.pi)),
    "tempered noise": (Annealed(normal(0.0, 1.0), 2.0, 0.5), 0.0, 0.5, -0.5 * math.log(4 * math.pi)),
    "heated": (Annealed(normal(1.0, 1.0), 0.5), 1.0, 2.0, 0.25 * math.log(2 * math.pi) + 0.5 * math.log(2)),
    "product": (
        ProductOfExperts((normal(-1.0, 1.0), normal(2.0, 0.25))),
        1.4, 0.2, -0.5 * math.log(2 * math.pi * 1.25) - 3.6,
    ),
    "product, twice the noise": (
        ProductOfExperts((normal(-1.0, 1.0), normal(1.0, 0.5)), noise=2.0),
        1 / 3, 1 / 3, -0.5 * math.log(2 * math.pi * 1.5) - 4 / 3,
    ),
    "guidance": (GeometricMean(normal(0.0, 1.0), normal(1.0, 0.5), 2.0), 4 / 3, 1 / 3, None),
    "guidance by half": (GeometricMean(normal(0.0, 1.0), normal(1.0, 0.5), 0.5), 2 / 3, 2 / 3, None),
    "reward": (RewardTilted(normal(0.0, 1.0), lambda x, level: x[:, 0], 1.5), 1.5, 1.0, 1.125),
    "reward of the level": (
        RewardTilted(normal(0.0, 1.0), lambda x, level: x[:, 0] / (1.0 + level), 1.5, by_level=True),
        1.5 / 1.01, 1.0, 0.5 * (1.5 / 1.01) ** 2,
    ),
    "reward of a product": (
        RewardTilted(ProductOfExperts((normal(-1.0, 1.0), normal(1.0, 0.5))), lambda x, level: x[:, 0], 1.0),
        2 / 3, 1 / 3, -0.5 * math.log(2 * math.pi * 1.5) - 4 / 3 + 1 / 3 + 1 / 6,
    ),
    "annealed along the way": (
        Annealed(normal(0.0, 1.0), lambda share: 1.0 + share), 0.0, 0.5, -0.5 * math.log(4 * math.pi),
    ),
}  # fmt: skip


def check_gaussian(target, mean, variance, log_z, **options):
    found, errors = moments(target, **options)
    # The sampler stops at noise 0.01, and steps of its grid leave a bias of order h^2.
    assert found[0] == pytest.approx(mean, abs=errors[0] + 0.01)
    assert found[1] == pytest.approx(variance, abs=errors[1] + 0.02 * variance)
    if log_z is not None:
        assert found[2] == pytest.approx(log_z, abs=errors[2] + 0.02)


@dataclass(frozen=True)
class Wrong:
    """A target whose rate is changed."""

    inner: Target
    change: object

    @property
    def shape(self):
        return self.inner.shape

    def evaluate(self, x, step, *, end=False):
        found = self.inner.evaluate(x, step, end=end)
        return found._replace(rate=self.change(found, x, step))

    def start(self, schedule, step):
        return self.inner.start(schedule, step)

    def log_start(self, x, step):
        return self.inner.log_start(x, step)


def mixture(schedule, shift=0.0):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.2], [0.3, 1.2]], dtype=torch.float64) + shift
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    return gaussian_mixture_path(means, torch.tensor([0.3, 0.5, 0.8]), schedule, log_weights=weights)
