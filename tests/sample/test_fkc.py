"""Feynman-Kac correctors: Gaussians in closed form, with wrong weights told apart, and the sampler's accounts."""

import math
import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.sample.fkc import Stabilisers, fkc, fkc_sampler, log_normalizer
from kullback.sample.fkc_paths import EDM, VE, VP, DiffusionPath, gaussian_mixture_path, steps_of
from kullback.sample.fkc_targets import Annealed, ProductOfExperts, _squares

sys.path.insert(0, str(Path(__file__).parent))
from _fkc_targets import GAUSSIANS, SCHEDULE, Wrong, check_gaussian, moments, normal, seeded


@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussians_have_their_mean_variance_and_normaliser(name):
    check_gaussian(*GAUSSIANS[name])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"resample": "birth_death", "steps": 200}, "guidance"),
        ({"ess_threshold": 0.5}, "guidance"),
        ({"every": 7}, "guidance"),
        ({"resample": "none", "particles": 20_000, "swarms": 4}, "guidance"),
        ({"heun": False, "steps": 400}, "product"),
    ],
)
def test_every_way_of_choosing_particles_agrees(options, name):
    check_gaussian(*GAUSSIANS[name], **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda found, x, step: 0.0 * found.rate,
        lambda found, x, step: -found.rate,  # the sign of a decreasing grid
        lambda found, x, step: 2.0 * found.rate,  # sigma^2 for sigma^2 / 2
        lambda found, x, step: 0.5 * _squares(found.gradient),  # the experts' own squares forgotten
    ],
)
def test_wrong_weights_are_told_from_the_right_ones(change):
    target, *known = GAUSSIANS["product"]
    with pytest.raises(AssertionError):
        check_gaussian(Wrong(target, change), *known)


def test_without_weights_annealing_ends_where_theory_says():
    for a, scale in ((0.0, 1.0), (0.25, 1.0), (0.5, 1.0)):
        eta, noise = 2.0 - a, (2.0 - 2.0 * a) / 2.0
        found, errors = moments(Annealed(normal(0.0, 1.0), 2.0, a), weighted=False, resample="none", steps=200)
        assert found[1] == pytest.approx(scale * noise / (2.0 * eta - 1.0), abs=errors[1] + 0.005)


def test_normaliser_of_annealing_since_the_start():
    result = fkc_sampler(GAUSSIANS["annealed"][0], SCHEDULE, 4000, 200, num_swarms=8, generator=seeded(1), heun=True)
    exact = 0.5 * math.log((1 + 10**2) / (1 + 0.01**2))
    assert exact == pytest.approx(2.3075, abs=1e-4)
    assert result.log_z.mean().item() == pytest.approx(exact, abs=6 * result.log_z.std().item() / 8**0.5 + 0.01)


def test_vp_counts_the_growth_in_the_normaliser_and_agrees_with_ve():
    schedule = VP()
    known = GAUSSIANS["product"]
    experts = (normal(-1.0, 1.0, schedule), normal(2.0, 0.25, schedule))
    check_gaussian(ProductOfExperts(experts), *known[1:], schedule=schedule, steps=150)
    no_growth = Wrong(ProductOfExperts(experts), lambda found, x, step: found.rate + step.growth)
    with pytest.raises(AssertionError):
        check_gaussian(no_growth, *known[1:], schedule=schedule, steps=150)


def test_two_schedules_give_samples_of_one_law():
    """Energy distance of two samples, against its distribution under permutations."""
    clouds = []
    for schedule in (VE(0.01, 40.0), VP(), EDM(0.01, 40.0)):
        means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
        path = gaussian_mixture_path(means, torch.tensor([0.5, 1.0]), schedule)
        result = fkc_sampler(Annealed(path, 1.5), schedule, 8000, 150, generator=seeded(4), heun=True)
        chosen = torch.randperm(8000, generator=seeded(5))[:300]
        clouds.append(result.samples[0, chosen])
    for other in clouds[1:]:
        both = torch.cat([clouds[0], other])
        distance = torch.cdist(both, both)

        def energy(order, distance=distance):
            first, second = order[:300], order[300:]
            cross = distance[first][:, second].mean()
            return 2 * cross - distance[first][:, first].mean() - distance[second][:, second].mean()

        null = torch.stack([energy(torch.randperm(600, generator=seeded(seed))) for seed in range(200)])
        assert energy(torch.arange(600)) < null.mean() + 6 * null.std()


def test_islands_are_those_of_separate_runs():
    target = GAUSSIANS["product"][0]
    both = fkc_sampler(target, SCHEDULE, 50, 20, num_swarms=2, generator=[seeded(1), seeded(2)])
    alone = fkc_sampler(target, SCHEDULE, 50, 20, num_swarms=1, generator=[seeded(2)])
    torch.testing.assert_close(both.samples[1], alone.samples[0])
    torch.testing.assert_close(both.log_z[1], alone.log_z[0])
    assert both.ess.shape == (20, 2)


def test_origins_and_weights_go_with_their_particles():
    """Particles that never move are where their origins began."""

    def init(shape, *, generator):
        return torch.arange(shape[1], dtype=torch.float64).view(1, -1, 1).expand(shape).clone(), None

    class Frozen:
        shape = (1,)

        def evaluate(self, x, step, *, end=False):
            from kullback.sample.fkc_targets import Evaluation

            return Evaluation(torch.zeros_like(x), None, x[:, 0] / step.h / 40.0, 0.0)

    result = fkc_sampler(Frozen(), SCHEDULE, 40, 5, init=init, generator=seeded(1))
    assert result.samples[0, :, 0].tolist() == result.origins[0].tolist()
    assert 1 < result.unique_origins.item() < 40
    late = fkc_sampler(Frozen(), SCHEDULE, 40, 5, init=init, generator=seeded(1), ess_threshold=0.01)
    expected = late.samples[0, :, 0] * 5 / 40.0
    torch.testing.assert_close(late.log_weights[0], expected - log_normalizer(expected))
    assert late.log_z.item() == pytest.approx(log_normalizer(expected).item())
    equal = late.resampled(generator=seeded(2))
    assert equal.mean() > late.samples.mean()


def test_window_leaves_out_what_it_says():
    target = GAUSSIANS["guidance"][0]
    steps = steps_of(SCHEDULE, 20)
    kernel = fkc(target, SCHEDULE, num_particles=30, num_steps=20, window=(0.25, 0.75))
    source = seeded(1)
    state = kernel.init(generator=source)
    for step in steps:
        state, info = kernel.step(state, generator=source)
        inside = step.next_progress > 0.25 and step.progress < 0.75
        assert (info.log_increment.item() != 0.0) == inside
    with pytest.raises(ConfigError, match="all 20 steps"):
        kernel.step(state, generator=source)


def test_stabilisers_do_what_they_say_and_are_reported():
    increments = torch.tensor([[0.0, 10.0, 1.0, 1.0]])
    assert Stabilisers(clamp=2.0)(increments).tolist() == [[1.0, 5.0, 1.0, 1.0]]
    assert Stabilisers(quantile=0.5)(increments).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    target = GAUSSIANS["product"][0]
    clipped = fkc_sampler(target, SCHEDULE, 100, 20, clip=Stabilisers(clamp=0.1, floor=1e-6), generator=seeded(1))
    assert clipped.clipped.item() > 0.05
    assert fkc_sampler(target, SCHEDULE, 100, 20, generator=seeded(1)).clipped.item() == 0.0


def test_single_precision_keeps_its_type():
    path = gaussian_mixture_path(torch.zeros(1, 3), 1.0, SCHEDULE)
    result = fkc_sampler(Annealed(path, 2.0), SCHEDULE, 64, 10, dtype=torch.float32, generator=seeded(1))
    assert result.samples.dtype == result.log_weights.dtype == torch.float32
    half = DiffusionPath(lambda x, level: path.score(x, level).bfloat16(), (3,))
    rough = fkc_sampler(Annealed(half, 2.0), SCHEDULE, 64, 10, dtype=torch.float32, generator=seeded(1))
    assert rough.samples.dtype == torch.float32
