"""Feynman-Kac correctors against Gaussians in closed form and Fokker-Planck residuals; wrong weights are told apart."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.fkc import (
    Stabilisers,
    birth_death_step,
    fkc,
    fkc_sampler,
    log_normalizer,
    systematic_resample,
)
from kullback.sample.fkc_paths import EDM, VE, VP, DiffusionPath, Step, gaussian_mixture_path, steps_of
from kullback.sample.fkc_targets import (
    Annealed,
    GeometricMean,
    LearnedEnergy,
    ProductOfExperts,
    RewardTilted,
    Target,
    _squares,
)

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


def mixture(schedule, shift=0.0):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.2], [0.3, 1.2]], dtype=torch.float64) + shift
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    return gaussian_mixture_path(means, torch.tensor([0.3, 0.5, 0.8]), schedule, log_weights=weights)


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


# --- resampling ---


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-30, 5) | st.just(-math.inf), min_size=2, max_size=12).filter(lambda x: max(x) > -math.inf),
    seed=st.integers(0, 2**31),
)
def test_systematic_counts_are_the_floor_or_the_ceiling(logs, seed):
    log_weights = torch.tensor([logs], dtype=torch.float64)
    counts = systematic_resample(log_weights, generator=seeded(seed))[0].bincount(minlength=len(logs))
    wanted = len(logs) * log_weights.softmax(1)[0]
    assert counts.sum() == len(logs)
    assert bool((counts >= (wanted - 1e-9).floor()).all())
    assert bool((counts <= (wanted + 1e-9).ceil()).all())


@pytest.mark.parametrize("size", [2, 17, 1000])
def test_the_compiled_loop_is_the_tensors_twin(size):
    pytest.importorskip("numba")
    logs = 3.0 * torch.randn(50, size, generator=seeded(1), dtype=torch.float64)
    logs[:, ::3] = -math.inf
    for single in (logs, logs.float()):
        ours, twin = (systematic_resample(single, generator=seeded(2), compiled=flag) for flag in (None, False))
        assert torch.equal(ours, twin)
    for bad in (math.nan, math.inf):
        logs[3, 1] = bad
        for flag in (None, False):
            with pytest.raises(DataError, match="not a number"):
                systematic_resample(logs, generator=seeded(2), compiled=flag)


def test_systematic_counts_have_their_means():
    weights = torch.tensor([0.05, 0.3, 0.0, 0.15, 0.5], dtype=torch.float64)
    rows = systematic_resample(weights.log().expand(10_000, 5), generator=seeded(1))
    counts = torch.zeros(10_000, 5).scatter_add_(1, rows, torch.ones(10_000, 5))
    error = 6 * counts.std(0) / 100 + 1e-9
    assert bool(((counts.mean(0) - 5 * weights).abs() <= error).all())
    assert bool((rows.diff(dim=1) >= 0).all())


def test_systematic_resampling_beside_a_peer():
    particles = pytest.importorskip("particles")
    weights = torch.rand(1000, generator=seeded(2), dtype=torch.float64)
    weights = weights / weights.sum()
    number = torch.rand(1, 1, generator=seeded(3), dtype=torch.float64).item()
    peer = particles.resampling.inverse_cdf((number + torch.arange(1000).numpy()) / 1000, weights.numpy())
    ours = systematic_resample(weights.log().unsqueeze(0), generator=seeded(3))[0]
    assert ours.tolist() == peer.tolist()


def test_the_floor_of_a_share_keeps_light_particles():
    log_weights = torch.tensor([[0.0, -50.0, -50.0, -50.0]])
    drawn = [systematic_resample(log_weights, generator=seeded(s), floor=0.2)[0].unique().numel() for s in range(5)]
    assert min(drawn) >= 2
    assert systematic_resample(log_weights, generator=seeded(0)).unique().numel() == 1


def test_births_and_deaths_follow_their_rates():
    increments = torch.tensor([0.0, 0.3, 0.9, 0.4], dtype=torch.float64)
    taken = birth_death_step(increments.expand(20_000, 4), generator=seeded(1))
    excess = increments - increments.mean()
    dies = 1 - excess.clamp(max=0).exp()
    births = excess.clamp(min=0) / excess.clamp(min=0).sum()
    wanted = torch.diag(1 - dies) + dies.unsqueeze(1) * births
    found = torch.nn.functional.one_hot(taken, 4).double().mean(0)
    assert bool(((found - wanted).abs() <= 6 * (wanted * (1 - wanted) / 20_000).sqrt() + 1e-12).all())
    still = birth_death_step(torch.tensor([[0.0] * 5, [9.0] + [-9.0] * 4, [0.0] * 5]), generator=seeded(1))
    assert still.tolist() == [[0, 1, 2, 3, 4], [0] * 5, [0, 1, 2, 3, 4]]


# --- the sampler's accounts ---


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


# --- schedules ---


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


# --- what is refused ---


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


