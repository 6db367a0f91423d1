"""Networks as scores: the forms of their output, guidance in one call, and a small denoiser that learns a score."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.denoisers import Denoiser, guided_scores, network_score, train_denoiser
from kullback.sample.fkc_paths import VE, VP, gaussian_mixture_path


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", [VE(), VP()], ids=["VE", "VP"])
@pytest.mark.parametrize("output", ["denoised", "noise", "velocity"])
def test_scores_of_exact_networks_are_the_exact_score(schedule, output):
    """The posterior mean of x_0 and of the noise under a Gaussian of variance v."""
    variance, level = 0.7, torch.tensor(0.4, dtype=torch.float64)
    scale, noise = schedule.scale_and_noise(0.4)
    total = scale**2 * variance + noise**2
    x = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    denoised, predicted = x * scale * variance / total, x * noise / total
    # v = a e - s x_0, which gives x_0 = a x - s v where a^2 + s^2 = 1
    found = {"denoised": denoised, "noise": predicted, "velocity": scale * predicted - noise * denoised}[output]
    score = network_score(lambda x, level: found, schedule, output=output)(x, level)
    exact = gaussian_mixture_path(torch.zeros(1, 3, dtype=torch.float64), variance, schedule).score(x, level)
    if output != "velocity" or isinstance(schedule, VP):
        torch.testing.assert_close(score, exact)


def test_half_precision_networks_and_wrong_shapes():
    score = network_score(lambda x, level: x.bfloat16(), VE())
    assert score(torch.ones(2, 1), torch.tensor(1.0)).dtype == torch.float32
    with pytest.raises(ShapeError, match="shape that it takes"):
        network_score(lambda x, level: x[:1], VE())(torch.ones(2, 1), torch.tensor(1.0))
    with pytest.raises(ConfigError, match="denoised"):
        network_score(lambda x, level: x, VE(), output="score")


def test_guidance_takes_one_call_of_twice_the_batch():
    calls = []

    def network(x, level, condition):
        calls.append(len(x))
        return x * condition

    scores = guided_scores(network, VE(), torch.tensor([2.0]), torch.tensor([0.5]))
    x = torch.ones(3, 1)
    null, conditional = scores(x, torch.tensor(1.0))
    assert calls == [6]
    assert null.flatten().tolist() == [-0.5] * 3
    assert conditional.flatten().tolist() == [1.0] * 3


def test_a_small_denoiser_learns_a_known_score():
    schedule = VE(0.05, 10.0)
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    exact = gaussian_mixture_path(means, 0.25, schedule)
    data = means[torch.randint(2, (5000,), generator=seeded(1))] + 0.5 * torch.randn(5000, 2, generator=seeded(2))
    network = Denoiser(2, spread=data.std().item(), generator=seeded(0), width=48)

    def error():
        score, found = network_score(network, schedule), []
        for level in (0.3, 1.0, 4.0):
            x = data[:1000] + level * torch.randn(1000, 2, generator=seeded(3))
            with torch.no_grad():
                wrong = score(x, torch.tensor(level)) - exact.score(x, torch.tensor(level))
            found.append(wrong.square().mean() / exact.score(x, torch.tensor(level)).square().mean())
        return max(found)

    before = error()
    losses = train_denoiser(network, data, steps=400, generator=seeded(4), batch=256)
    assert len(losses) == 400
    assert sum(losses[-50:]) < sum(losses[:50])
    assert error() < min(0.12, 0.5 * before)


def test_training_is_a_function_of_its_generators():
    data = torch.randn(100, 2, generator=seeded(1))
    before = torch.random.get_rng_state()

    def weights(seed):
        network = Denoiser(2, spread=1.0, generator=seeded(seed), width=8)
        train_denoiser(network, data, steps=3, generator=seeded(2))
        return torch.cat([p.flatten() for p in network.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_data_are_refused():
    network = Denoiser(2, spread=1.0, generator=seeded(0), width=8)
    with pytest.raises(DataError, match="finite rows"):
        train_denoiser(network, torch.full((3, 2), math.nan), steps=1, generator=seeded(0))
    with pytest.raises(ConfigError, match="spread"):
        Denoiser(2, spread=0.0, generator=seeded(0))
