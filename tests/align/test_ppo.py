"""PPO's parts against sums written out, and the limits in which they are something simpler."""

import math

import pytest
import torch

from kullback.align.ppo import clipped_value_loss, generalised_advantages, shaped_rewards
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator
from kullback.divergences import kl, kl_sampled

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()


def drawn(name, count=1):
    draw = generator(0, name)
    return [torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_rewards_of_tokens_sum_to_the_completion():
    reference, policy = drawn("log-probs", 2)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = shaped_rewards(reference, policy, rewards, MASK, beta=0.3)
    gap = torch.where(MASK, policy - reference, 0.0).sum(1)
    torch.testing.assert_close(found.sum(1), rewards - 0.3 * gap)
    assert (found[~MASK] == 0).all()
    assert found[1, 0].item() == pytest.approx(-2.0 - 0.3 * (policy - reference)[1, 0].item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rewards_of_tokens_see_nothing_outside_the_mask(dtype):
    """NaN, infinities and -0.0 there become 0; masks with holes, of any kind, in any layout; rows without a token."""
    draw = generator(1, "holes")
    mask = torch.rand(9, 40, generator=draw) < 0.4
    mask[3], mask[4], mask[5] = False, torch.arange(40) == 0, torch.arange(40) == 39
    reference, policy = (torch.randn(9, 40, generator=draw).to(dtype) for _ in range(2))
    rewards = torch.arange(1.0, 10.0)
    rewards[3] = math.nan
    expected = torch.zeros(9, 40, dtype=dtype)
    for row, place in mask.nonzero().tolist():
        expected[row, place] = (reference[row, place] - policy[row, place]) * 0.3
    for row in (0, 1, 2, 4, 5, 6, 7, 8):
        expected[row, int(mask[row].nonzero().max())] += rewards[row].to(dtype)
    dirty = reference.clone()
    dirty[~mask] = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype).repeat(99)[: int((~mask).sum())]
    for form in (mask, mask.long(), mask.T.contiguous().T):
        found = shaped_rewards(dirty, policy, rewards, form, beta=0.3)
        torch.testing.assert_close(found, expected)
        assert not found[~mask].signbit().any()
    careless = (dirty - policy) * -0.3 * mask
    assert careless.isnan().any(), "a product with the mask would keep them"
    longer = torch.zeros(1, 40_000)
    found = shaped_rewards(longer, longer, torch.ones(1), torch.arange(40_000).unsqueeze(0) < 39_000, beta=0.3)
    assert found.nonzero().tolist() == [[0, 38_999]]


def test_only_k1_in_the_reward_descends_the_divergence():
    """What else is found there: k3 has the gradient of the difference of both KLs, the KL of a token's law has none."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logits = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    law = logits.log_softmax(-1)
    backward, forward = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (
        kl(law, reference), kl(reference, law)
    ))  # fmt: skip
    fixed, column = law.detach(), torch.ones(3, 1)
    ratio = reference - fixed

    def descended(values):
        """The gradient that a policy gradient over all three tokens descends, values being taken off the reward."""
        return torch.autograd.grad((fixed.exp() * values * law).sum(), logits, retain_graph=True)[0]

    given = (reference.unsqueeze(1), fixed.unsqueeze(1), torch.zeros(3))
    k1 = -shaped_rewards(*given, column, beta=1.0).squeeze(1)
    torch.testing.assert_close(descended(k1), backward)
    k3 = kl_sampled(reference, fixed, value="k3", gradient="none")
    torch.testing.assert_close(k3, ratio.exp() - 1.0 - ratio)
    assert (k3 >= 0.0).all()
    assert (fixed.exp() @ k3).item() == pytest.approx(kl(fixed, reference).item(), abs=1e-12)
    torch.testing.assert_close(descended(k3), backward - forward)
    assert descended(kl(fixed, reference).expand(3)).abs().max() < 1e-12


@pytest.mark.parametrize(("gamma", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_advantages_are_the_sum_that_defines_them(gamma, trace):
    rewards, values = drawn("rewards", 2)
    found, returns = generalised_advantages(rewards, values, MASK, gamma=gamma, trace=trace)
    for row in range(3):
        length = int(MASK[row].sum())
        for t in range(4):
            exact = 0.0
            for k in range(t, length):
                following = values[row, k + 1].item() if k + 1 < length else 0.0
                surprise = rewards[row, k].item() + gamma * following - values[row, k].item()
                exact += (gamma * trace) ** (k - t) * surprise
            assert found[row, t].item() == pytest.approx(exact if t < length else 0.0, abs=1e-12)
    torch.testing.assert_close(returns, torch.where(MASK, found + values, 0.0))


def test_padding_and_what_stands_in_it_change_nothing():
    rewards, values = drawn("rewards", 2)
    found, _ = generalised_advantages(rewards, values, MASK)
    rewards[~MASK], values[~MASK] = math.nan, math.nan
    again, _ = generalised_advantages(rewards, values, MASK)
    assert torch.equal(found, again)
    short, _ = generalised_advantages(rewards[:, :3], values[:, :3], MASK[:, :3])
    torch.testing.assert_close(short[:2], found[:2, :3])


def test_the_critic_gains_nothing_beyond_the_clip():
    values = torch.tensor([[0.5]], requires_grad=True)
    one = torch.ones(1, 1)
    beyond = clipped_value_loss(values, torch.zeros(1, 1), 2 * one, one, clip=0.2)
    assert beyond.item() == pytest.approx(0.5 * 1.8**2)
    assert torch.autograd.grad(beyond, values)[0].item() == 0.0
    free = clipped_value_loss(values, torch.zeros(1, 1), 2 * one, one, clip=math.inf)
    assert free.item() == pytest.approx(0.5 * 1.5**2)
    assert torch.autograd.grad(free, values)[0].item() == pytest.approx(-1.5)


def test_bad_input():
    one = torch.ones(1, 2)
    with pytest.raises(ShapeError, match="alike"):
        generalised_advantages(one, torch.ones(1, 3), one)
    with pytest.raises(ShapeError, match="one a completion"):
        shaped_rewards(one, one, torch.ones(2), one, beta=0.1)
    with pytest.raises(ConfigError, match="trace"):
        generalised_advantages(one, one, one, trace=1.5)
    with pytest.raises(ConfigError, match="clip"):
        clipped_value_loss(one, one, one, one, clip=0.0)
