"""Islands that exchange particles: what is kept exactly, and that targets are still reached."""

import sys
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.sample.fkc import FKCState, fkc, fkc_sampler, log_normalizer
from kullback.sample.fkc_islands import Migration

sys.path.insert(0, str(Path(__file__).parent))
from _fkc_targets import GAUSSIANS, SCHEDULE, check_gaussian, seeded


def state_of(islands=3, count=8, step=4):
    weights = torch.randn(islands, count, generator=seeded(1), dtype=torch.float64)
    weights = weights - log_normalizer(weights).unsqueeze(1)
    log_z, start = torch.randn(2, islands, generator=seeded(2), dtype=torch.float64).unbind(0)
    numbers = torch.arange(islands * count).view(islands, count)
    origins = torch.arange(count).repeat(islands, 1)
    return FKCState(step, numbers.double().unsqueeze(2), weights, log_z, start, origins, 0.1 * numbers.double())


def first_of(origins):
    """Origins [R, K] as numbers of all first particles, those of the first island first."""
    islands, count = origins.shape
    island = (torch.arange(islands).unsqueeze(1) - origins // count) % islands
    return island * count + origins % count


def carried(state):
    """Particles with the weights by which all islands together count them."""
    logs = state.log_weights + (state.log_z + state.log_z_start).unsqueeze(1)
    order = state.particles.flatten().argsort()
    return logs.flatten()[order], first_of(state.origins).flatten()[order], state.error.flatten()[order]


def check_kept(before, after):
    for one, other in zip(carried(before), carried(after), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_normalizer(after.log_weights), torch.zeros(len(after.log_z)).double())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_every_particle_keeps_the_weight_that_it_has_among_all(share):
    before, rule = state_of(), Migration(4, share)
    after = rule(before)
    check_kept(before, after)
    again = rule(rule(after)._replace(step=8))  # and around the ring
    check_kept(before, again)
    moved = before.particles != after.particles
    assert int(moved.sum()) == 3 * max(1, round(share * 8))
    wrong = after._replace(log_weights=before.log_weights, log_z=before.log_z)
    with pytest.raises(AssertionError):
        check_kept(before, wrong)  # particles that leave the mass of their island behind


def test_all_leave_in_turn():
    rule, left = Migration(3, 0.25), set()
    for step in range(3, 37, 3):
        left |= set(rule.places(8, step).tolist())
    assert left == set(range(8))


@pytest.mark.parametrize(
    "options", [{}, {"resample": "birth_death", "steps": 200}, {"ess_threshold": 0.5, "particles": 500}], ids=str
)
def test_targets_are_reached_with_exchange(options):
    check_gaussian(*GAUSSIANS["guidance"], migration=Migration(5, 0.2), **options)
    if "resample" not in options:  # births and deaths in steps of this size are off for the product, alone as well
        check_gaussian(*GAUSSIANS["product"], migration=Migration(5, 0.2), **options)


def test_particles_come_from_other_islands():
    target = GAUSSIANS["product"][0]
    mixed = fkc_sampler(
        target, SCHEDULE, 60, 40, num_swarms=4, generator=seeded(1), migration=Migration(2, 0.3), ess_threshold=0.05
    )
    assert all(len((row // 60).unique()) > 1 for row in first_of(mixed.origins))
    apart = fkc_sampler(target, SCHEDULE, 60, 40, num_swarms=4, generator=seeded(1), ess_threshold=0.05)
    assert int(apart.origins.max()) < 60
    assert (first_of(apart.origins) // 60).tolist() == [[island] * 60 for island in range(4)]


def test_what_is_refused():
    target = GAUSSIANS["product"][0]
    for options in ({"every": 0}, {"share": 0.0}, {"share": 0.6}):
        with pytest.raises(ConfigError, match="share in"):
            Migration(**options)
    with pytest.raises(ConfigError, match="do nothing"):
        fkc(target, SCHEDULE, num_particles=9, num_steps=5, resample="none", migration=Migration())
    with pytest.raises(ConfigError, match="num_swarms"):
        fkc_sampler(target, SCHEDULE, 9, 5, migration=Migration(2), generator=seeded(0))
