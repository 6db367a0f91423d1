"""Targets of Feynman-Kac correctors: Fokker-Planck residuals, weights that vanish, divergences, and schedules."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.sample.fkc import fkc_sampler
from kullback.sample.fkc_paths import EDM, VE, VP, DiffusionPath, Step, steps_of
from kullback.sample.fkc_targets import Annealed, GeometricMean, LearnedEnergy, ProductOfExperts, RewardTilted

sys.path.insert(0, str(Path(__file__).parent))
from _fkc_targets import SCHEDULE, Wrong, check_gaussian, mixture, normal, seeded


def residual_targets(schedule):
    """Targets beside the logarithms of their densities, as functions of x and the level."""
    one, two = mixture(schedule), mixture(schedule, 0.7)
    power = lambda share: 1.0 + 0.5 * share  # noqa: E731

    def progress(level):
        first, last = (schedule.log_snr(end) for end in (schedule.levels(1)[0], schedule.levels(1)[1]))
        return (schedule.log_snr(level) - first) / (last - first)

    reward = lambda x, level: (x[:, 0] * x[:, 1]).sin()  # noqa: E731
    tilted = lambda x, t: one.log_density(x, t) + 1.3 * progress(float(t)) * reward(x, t)  # noqa: E731
    product = lambda x, t: 0.7 * one.log_density(x, t) - 0.2 * two.log_density(x, t)  # noqa: E731
    score = one.score
    bent = lambda x, t: 0.5 * score(x, t) + torch.stack([-x[:, 1], x[:, 0].sin()], 1)  # noqa: E731
    return {
        "annealed": (Annealed(one, 2.0), lambda x, t: 2.0 * one.log_density(x, t)),
        "annealed, a = 0.3": (Annealed(one, 2.0, 0.3), lambda x, t: 2.0 * one.log_density(x, t)),
        "tempered noise, heated": (Annealed(one, 0.4, 0.5), lambda x, t: 0.4 * one.log_density(x, t)),
        "along the way": (Annealed(one, power), lambda x, t: power(progress(float(t))) * one.log_density(x, t)),
        "guidance": (
            GeometricMean(one, two, 2.5),
            lambda x, t: -1.5 * one.log_density(x, t) + 2.5 * two.log_density(x, t),
        ),
        "product": (ProductOfExperts((one, two)), lambda x, t: one.log_density(x, t) + two.log_density(x, t)),
        "powers, noise 3": (ProductOfExperts((one, two), (0.7, -0.2), noise=3.0), product),
        "reward": (RewardTilted(one, reward, 1.3), tilted),
        "energy": (LearnedEnergy(one.log_density, bent, (2,)), one.log_density),
    }


@pytest.mark.parametrize("schedule", [VE(0.1, 5.0), VP()], ids=["VE", "VP"])
@pytest.mark.parametrize("name", list(residual_targets(VE())))
def test_fokker_planck_is_solved_up_to_a_constant(name, schedule):
    """d_v log p + div drift + <drift, grad log p> - zeta^2 / 2 (laplacian + |grad log p|^2) - rate, over 20 points."""
    target, log_p = residual_targets(schedule)[name]
    x = torch.randn(20, 2, generator=seeded(2), dtype=torch.float64)
    level = schedule.levels(2)[1]
    assert fokker_planck_spread(target, log_p, schedule, x, level) < 2e-6


def fokker_planck_spread(target, log_p, schedule, x, level):
    first, last = (schedule.log_snr(end) for end in (schedule.levels(1)[0], schedule.levels(1)[1]))
    progress = lambda at: (schedule.log_snr(at) - first) / (last - first)  # noqa: E731
    delta = 1e-5 * level
    # Differences in the level stand for derivatives, centred; the step of the target is the same one.
    step = Step(
        level, level - delta, schedule.clock(level - delta) - schedule.clock(level), schedule.growth,
        progress(level), progress(level - delta),
    )  # fmt: skip
    back = Step(
        level + delta, level, schedule.clock(level) - schedule.clock(level + delta), schedule.growth,
        progress(level + delta), progress(level),
    )  # fmt: skip
    at = lambda t: torch.tensor(t, dtype=torch.float64)  # noqa: E731

    def drift(y):
        found = target.evaluate(y, step)
        base = found.gradient if found.drift is None else found.drift
        return schedule.growth * y + base + 0.5 * (found.noise - 1.0) * found.gradient

    gradient, laplacian, divergence = [], [], []
    for point in x:
        of = lambda y: log_p(y.unsqueeze(0), at(level))[0]  # noqa: E731
        gradient.append(torch.autograd.functional.jacobian(of, point))
        laplacian.append(torch.autograd.functional.hessian(of, point).trace())
        h = 1e-5
        shifts = torch.eye(2, dtype=torch.float64) * h
        up, down = drift(point + shifts), drift(point - shifts)
        divergence.append(((up - down) / (2 * h)).trace())
    gradient, laplacian, divergence = torch.stack(gradient), torch.stack(laplacian), torch.stack(divergence)
    forward, backward = target.evaluate(x, step), target.evaluate(x, back, end=True)
    rate, noise = 0.5 * (forward.rate + backward.rate), forward.noise
    time = (log_p(x, at(level - delta)) - log_p(x, at(level + delta))) / (step.h + back.h)
    flow = divergence + (drift(x) * gradient).sum(1) - 0.5 * noise * (laplacian + gradient.square().sum(1))
    residual = time + flow - rate
    return ((residual - residual.mean()).abs().max() / rate.abs().max().clamp(min=1.0)).item()


def test_the_residual_tells_a_wrong_rate():
    schedule = VE(0.1, 5.0)
    x = torch.randn(20, 2, generator=seeded(2), dtype=torch.float64)
    for name, (target, log_p) in residual_targets(schedule).items():
        wrong = Wrong(target, lambda found, x, step: 1.01 * found.rate)
        assert fokker_planck_spread(wrong, log_p, schedule, x, schedule.levels(2)[1]) > 1e-4, name


def test_nothing_to_correct_has_no_weight():
    one, two = mixture(SCHEDULE), mixture(SCHEDULE, 0.7)
    x, step = torch.randn(50, 2, generator=seeded(1), dtype=torch.float64), steps_of(SCHEDULE, 10)[4]
    constant = RewardTilted(one, lambda x, level: 1.0 + 0.0 * x[:, 0], 1.0, profile=lambda share: 1.0)
    targets = [Annealed(one, 1.0), GeometricMean(one, two, 0.0), GeometricMean(one, two, 1.0), ProductOfExperts((one,))]
    for target in [*targets, constant]:
        torch.testing.assert_close(target.evaluate(x, step).rate, torch.zeros(50, dtype=torch.float64), atol=0, rtol=0)
    result = fkc_sampler(Annealed(one, 1.0), SCHEDULE, 50, 10, generator=seeded(1))
    assert result.log_z.item() == pytest.approx(0.0, abs=1e-12)
    assert result.unique_origins.item() >= 49  # systematic resampling of even weights, as far as start weights are even


def test_equal_variances_make_guidance_weights_even():
    target = GeometricMean(normal(0.0, 0.5), normal(1.0, 0.5), 3.0)
    x, step = torch.randn(50, 1, generator=seeded(1), dtype=torch.float64), steps_of(SCHEDULE, 10)[4]
    rate = target.evaluate(x, step).rate
    assert rate.std().item() < 1e-12 * rate.mean().item()


def test_short_cases_of_the_rate_equal_the_general_one():
    one, two = mixture(SCHEDULE), mixture(SCHEDULE, 0.7)
    x, step = torch.randn(50, 2, generator=seeded(1), dtype=torch.float64), steps_of(VP(), 10)[4]
    spare = DiffusionPath(lambda x, level: torch.zeros_like(x), (2,))
    for paths, powers in (((one,), (2.0,)), ((one, two), (-1.0, 2.0))):
        short = ProductOfExperts(paths, powers).evaluate(x, step)
        general = ProductOfExperts((*paths, spare, spare), (*powers, 0.5, -0.5)).evaluate(x, step)
        torch.testing.assert_close(short.rate, general.rate)
        torch.testing.assert_close(short.gradient, general.gradient)


def test_both_scores_from_one_call():
    one, two = mixture(SCHEDULE), mixture(SCHEDULE, 0.7)
    joint = GeometricMean(one, two, 2.0, joint=lambda x, level: (one.score(x, level), two.score(x, level)))
    x, step = torch.randn(50, 2, generator=seeded(1), dtype=torch.float64), steps_of(SCHEDULE, 10)[4]
    apart = GeometricMean(one, two, 2.0).evaluate(x, step)
    assert torch.equal(joint.evaluate(x, step).rate, apart.rate)
    with pytest.raises(ConfigError, match="gave 1"):
        replace(joint, joint=lambda x, level: (x,)).evaluate(x, step)


def test_estimated_divergence_is_unbiased_and_says_its_variance():
    path = mixture(SCHEDULE)
    mixing = torch.tensor([[0.5, 2.0], [-1.0, 0.3]], dtype=torch.float64)
    energy = LearnedEnergy(path.log_density, lambda x, t: (x @ mixing.T).sin(), (2,))
    x, step = torch.randn(1, 2, generator=seeded(1), dtype=torch.float64).expand(4000, 2), steps_of(SCHEDULE, 10)[4]
    exact = energy.evaluate(x[:1].contiguous(), step)
    assert exact.error is None
    estimated = replace(energy, divergence="hutchinson", probes=3, generator=seeded(2)).evaluate(x.contiguous(), step)
    spread = estimated.rate.var()
    assert estimated.rate.mean().item() == pytest.approx(exact.rate.item(), abs=6 * (spread / 4000).sqrt().item())
    assert estimated.error.mean().item() == pytest.approx(spread.item(), rel=0.2)


def test_a_learned_energy_with_a_field_that_is_no_gradient_is_exact():
    path = normal(0.5, 0.5)
    # the density known only up to a constant and too wide: the weights make up for a field that drives elsewhere
    energy = LearnedEnergy(
        lambda x, t: path.log_density(x, t) + 3.0, lambda x, t: 0.6 * path.score(x, t), (1,), mean=0.5, variance=0.5
    )
    check_gaussian(energy, 0.5, 0.5, 3.0)
    estimated = replace(energy, divergence="hutchinson", probes=1, generator=seeded(8))
    check_gaussian(estimated, 0.5, 0.5, 3.0)


@pytest.mark.parametrize("schedule", [VE(0.02, 30.0), EDM(0.02, 30.0), VP(0.1, 12.0), VP(0.5, 0.5)])
def test_schedules_have_rising_clocks_and_exact_marginals(schedule):
    levels, steps = schedule.levels(7), steps_of(schedule, 7)
    assert len(levels) == 8
    assert all(step.h > 0 for step in steps)
    assert (steps[0].progress, steps[-1].next_progress) == (0.0, 1.0)
    if not isinstance(schedule, EDM):
        share = [step.next_progress - step.progress for step in steps]
        assert share == pytest.approx([1 / 7] * 7, abs=1e-9)
    for step in steps:
        # Noising backwards over a step: x -> e^(-k h) (x + noise of variance (e^(2 k h) - 1) / 2k)
        (scale, noise), (next_scale, next_noise) = (schedule.scale_and_noise(t) for t in step[:2])
        shrink = math.exp(-step.growth * step.h)
        added = step.h if not step.growth else -math.expm1(-2 * step.growth * step.h) / (2 * step.growth)
        assert scale == pytest.approx(next_scale * shrink, rel=1e-9)
        assert noise**2 == pytest.approx((next_noise * shrink) ** 2 + added, rel=1e-9)


def test_mixture_paths_are_their_own_derivatives():
    for schedule in (VE(), VP()):
        path, level = mixture(schedule), torch.tensor(0.6, dtype=torch.float64)
        x = torch.randn(10, 2, generator=seeded(1), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(path.log_density(x, level).sum(), x)
        torch.testing.assert_close(path.score(x, level), gradient)
    line = torch.linspace(-40, 40, 400, dtype=torch.float64)
    mass = mixture(VE()).log_density(torch.cartesian_prod(line, line), torch.tensor(2.0)).exp().sum()
    assert mass.item() * (line[1] - line[0]).item() ** 2 == pytest.approx(1.0, abs=1e-6)
