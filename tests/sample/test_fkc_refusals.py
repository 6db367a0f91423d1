"""What Feynman-Kac correctors refuse, and what they say."""

import math
import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.fkc import Stabilisers, fkc, fkc_sampler, systematic_resample
from kullback.sample.fkc_paths import VE, VP, DiffusionPath, gaussian_mixture_path, steps_of
from kullback.sample.fkc_targets import Annealed, LearnedEnergy, ProductOfExperts, RewardTilted

sys.path.insert(0, str(Path(__file__).parent))
from _fkc_targets import GAUSSIANS, SCHEDULE, mixture, normal, seeded


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Annealed(normal(0.0, 1.0), 0.0), "inverse temperature"),
        (lambda: Annealed(normal(0.0, 1.0), 2.0, 0.6), "a lies between"),
        (lambda: ProductOfExperts(()), "at least one"),
        (lambda: ProductOfExperts((normal(0.0, 1.0),), (1.0, 2.0)), "one power for all"),
        (lambda: ProductOfExperts((normal(0.0, 1.0),), noise=-1.0), "noise is zeta"),
        (lambda: Annealed(DiffusionPath(lambda x, t: -x, (1,)), lambda share: 1.0 + share), "log_density"),
        (lambda: DiffusionPath(lambda x, t: -x, (1,), variance=-1.0), "variance"),
        (lambda: LearnedEnergy(lambda x, t: x, lambda x, t: x, (100,)), "generator"),
        (lambda: VE(2.0, 1.0), "sigma_max"),
        (lambda: VP(0.0), "beta_min"),
        (lambda: VP(time_min=0.0), "time_min"),
        (lambda: fkc(GAUSSIANS["product"][0], SCHEDULE, num_particles=1, num_steps=5), "num_particles"),
        (lambda: fkc(GAUSSIANS["product"][0], SCHEDULE, num_particles=9, num_steps=0), "num_steps"),
        (lambda: fkc(GAUSSIANS["product"][0], SCHEDULE, num_particles=9, num_steps=5, window=(0.5, 0.5)), "window"),
        (lambda: fkc(GAUSSIANS["product"][0], SCHEDULE, num_particles=9, num_steps=5, resample="best"), "systematic"),
        (
            lambda: fkc(GAUSSIANS["product"][0], SCHEDULE, num_particles=9, num_steps=5, resample="none", every=2),
            "leave them out",
        ),
        (lambda: systematic_resample(torch.zeros(3, 1), generator=seeded(0)), "K >= 2"),
        (lambda: Stabilisers(clamp=0.0), "clamp"),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ShapeError, match="one shape"):
        ProductOfExperts((normal(0.0, 1.0), mixture(SCHEDULE)))
    with pytest.raises(ShapeError, match="means"):
        gaussian_mixture_path(torch.zeros(0, 2), 1.0, SCHEDULE)


def test_scores_that_are_not_numbers_say_where():
    def score(x, level):
        found = -x / (1 + level**2)
        return torch.where(torch.arange(len(x)).unsqueeze(1) == 7, math.nan, found) if level < 1 else found

    broken = DiffusionPath(score, (1,), variance=1.0)
    with pytest.raises(DataError, match="particle 2 of swarm 1 is not finite at level"):
        fkc_sampler(Annealed(broken, 2.0), SCHEDULE, 5, 20, num_swarms=2, generator=seeded(1))
    with pytest.raises(DataError, match="no particle has a weight"):
        systematic_resample(torch.full((1, 4), -math.inf), generator=seeded(0))
    nowhere = lambda shape, *, generator: (torch.zeros(shape), torch.full(shape[:2], -math.inf))  # noqa: E731
    with pytest.raises(DataError, match="no particle has a finite weight"):
        fkc_sampler(GAUSSIANS["product"][0], SCHEDULE, 5, 20, init=nowhere, generator=seeded(1))


def test_what_keeps_no_graph_is_refused():
    x, step = torch.zeros(4, 1, dtype=torch.float64), steps_of(SCHEDULE, 10)[4]
    with pytest.raises(ConfigError, match="reward or log-density is differentiable"):
        RewardTilted(normal(0.0, 1.0), lambda x, level: torch.ones(len(x)), 1.0).evaluate(x, step)
    with pytest.raises(ConfigError, match="drive is differentiable"):
        LearnedEnergy(normal(0.0, 1.0).log_density, lambda x, level: torch.ones_like(x), (1,)).evaluate(x, step)


def test_experts_that_make_no_distribution_at_high_noise_are_refused():
    wide, narrow = normal(0.0, 400.0), normal(0.0, 1.0)
    with pytest.raises(ConfigError, match="no distribution"):
        fkc_sampler(ProductOfExperts((narrow, wide), (-1.5, 2.0)), SCHEDULE, 10, 10, generator=seeded(1))
