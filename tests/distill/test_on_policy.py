"""Sampling on policy: the right distribution, from the generator alone."""

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.core.rng import generator as stream
from kullback.distill.on_policy import sample_continuations
from kullback.models.small import small_llama


@pytest.fixture(scope="module")
def model():
    model = small_llama(7, hidden=16, layers=2, heads=2, length=8, generator=stream(0)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # fresh heads are close to uniform, where no temperature shows
    return model


def test_frequencies_follow_the_model(model):
    prompt = torch.tensor([[1, 2]]).expand(6000, 2)
    sampled = sample_continuations(model, prompt, length=4, generator=stream(1, "draw"), temperature=1.3)
    assert torch.equal(sampled[:, :2], prompt)
    with torch.no_grad():
        first = torch.softmax(model(prompt[:1]).logits[0, -1] / 1.3, -1)
        step = torch.cat([prompt[:1].expand(7, 2), torch.arange(7)[:, None]], 1)
        second = first @ torch.softmax(model(step).logits[:, -1] / 1.3, -1)
    for column, expected in ((2, first), (3, second)):
        found = torch.bincount(sampled[:, column], minlength=7) / 6000
        error = 6 * (expected * (1 - expected) / 6000).sqrt()
        assert ((found - expected).abs() < error).all()
    wrong = torch.softmax(model(prompt[:1]).logits[0, -1].detach() * 1.3, -1)
    found = torch.bincount(sampled[:, 2], minlength=7) / 6000
    assert ((found - wrong).abs() > 6 * (wrong * (1 - wrong) / 6000).sqrt()).any(), "a wrong temperature would be seen"


def test_the_generator_decides_alone_and_the_mode_is_kept(model):
    prompt = torch.tensor([[3], [4]])
    model.train()
    before = torch.random.get_rng_state()
    a = sample_continuations(model, prompt, length=6, generator=stream(2))
    b = sample_continuations(model, prompt, length=6, generator=stream(2))
    c = sample_continuations(model, prompt, length=6, generator=stream(3))
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    model.eval()


def test_a_padded_head_is_never_sampled_from(model):
    sampled = sample_continuations(
        model, torch.ones(200, 1, dtype=torch.long), length=5, generator=stream(4), vocabulary=3
    )
    assert sampled.max() < 3


@pytest.mark.parametrize(("length", "temperature", "message"), [(1, 1.0, "length"), (4, 0.0, "temperature")])
def test_bad_requests(model, length, temperature, message):
    with pytest.raises(ConfigError, match=message):
        sample_continuations(
            model, torch.ones(1, 2, dtype=torch.long), length=length, generator=stream(0), temperature=temperature
        )
