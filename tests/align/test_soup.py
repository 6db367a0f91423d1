"""Soups and SALSA: the card's numbers, averages of models in memory and on disk, and where alignment to one ends."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kullback.align.grpo import Grpo
from kullback.align.soup import (
    geometric_soup,
    linear_connectivity,
    soft_value,
    soup,
    soup_gain,
    soup_state_dict,
)
from kullback.align.worlds import regularised_optimum
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.divergences import kl
from kullback.models.small import small_llama

A, B, TARGET = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3), (0.3, 0.3, 0.4)))
REWARD = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)


def test_the_soup_of_tables():
    mixed = geometric_soup([A, B])
    assert mixed.exp().tolist() == pytest.approx([0.3334065115, 0.4083379151, 0.2582555733], abs=1e-10)
    found = [kl(TARGET, x).item() for x in (A, B, mixed)]
    assert found == pytest.approx([0.1240111851, 0.0834646743, 0.0508381613], abs=1e-10)
    chernoff = (0.5 * (A + B)).logsumexp(0).item()
    assert found[2] == pytest.approx(0.5 * (found[0] + found[1]) + chernoff, abs=1e-12)
    logits = soup_state_dict([{"x": A - A.mean()}, {"x": B - B.mean()}])["x"]
    torch.testing.assert_close(logits.softmax(0), mixed.exp())


def test_soft_values_and_the_gain():
    values = [soft_value(x, REWARD, beta=0.5).item() for x in (A, B, geometric_soup([A, B]))]
    assert values == pytest.approx([1.3511554835, 1.4550124656, 1.4157875860], abs=1e-9)
    gain = soup_gain(A, B, REWARD, beta=0.5).item()
    assert gain == pytest.approx(0.5 * (0.0528997684 - 0.0274925455), abs=1e-9)
    assert values[2] == pytest.approx(0.5 * (values[0] + values[1]) + gain, abs=1e-12)
    places = torch.multinomial(B.exp(), 100_000, replacement=True, generator=generator(0, "x"))
    sampled = soft_value(A[places], REWARD[places], beta=0.5, log_proposal=B[places]).item()
    assert sampled == pytest.approx(values[0], abs=0.02)
    given = (A[places], B[places], REWARD[places])
    assert soup_gain(*given, beta=0.5, log_proposal=B[places]).item() == pytest.approx(gain, abs=0.004)
    assert soup_gain(*given, beta=0.5, log_proposal=A[places]).item() != pytest.approx(gain, abs=0.004)


def test_policy_gradients_end_at_the_tilted_soup_wherever_they_start():
    reference = geometric_soup([A, B])
    optimum = regularised_optimum(reference, REWARD, coefficient=0.5)
    for start in (A, B):
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def objective(logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            policy = logits.log_softmax(0)
            value = -(policy.exp() * REWARD).sum() + 0.5 * kl(policy, reference)
            value.backward()
            return value

        optimizer.step(objective)
        assert 0.5 * (logits.detach().softmax(0) - optimum.exp()).abs().sum().item() < 1e-4


def test_the_method_with_k1_in_the_reward_has_that_gradient():
    """Leave-one-out with k1 in the reward, over all answers of the policy, as the room's method computes it."""
    reference, logits = geometric_soup([A, B]), A.clone().requires_grad_()
    policy = logits.log_softmax(0)
    value = (policy.exp() * REWARD).sum() - 0.5 * kl(policy, reference)
    exact = torch.autograd.grad(value, logits, retain_graph=True)[0]
    method = Grpo(
        beta=0.5, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
        clip_low=math.inf, clip_high=math.inf,
    )  # fmt: skip
    x = torch.multinomial(policy.exp().detach(), 400_000, replacement=True, generator=generator(1, "y"))
    column = torch.ones(len(x), 1, dtype=torch.float64)
    batch = {
        "completion_mask": column.bool(), "rewards": REWARD[x], "old_log_prob": column * policy.detach()[x, None],
        "reference_log_prob": column * reference[x, None],
    }  # fmt: skip
    batch = method.prepare(batch, group=4, generator=generator(0))
    loss, _ = method.loss(policy[x, None], batch, count=method.count(batch))
    found = -torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(found, exact, atol=6 * 2.0 / len(x) ** 0.5, rtol=0)
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


def models(tmp_path, shards=False):
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "length": 16}
    found = []
    for name in ("a", "b"):
        model = small_llama(260, **sizes, generator=generator(2, name))
        model.save_pretrained(tmp_path / name, **({"max_shard_size": "20KB"} if shards else {}))
        found.append(model)
    return found


@pytest.mark.parametrize("shards", [False, True])
def test_directories_are_averaged_shard_by_shard(shards, tmp_path):
    a, b = models(tmp_path, shards)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == (1 if not shards else pytest.approx(5, abs=4))
    place = soup([tmp_path / "a", tmp_path / "b"], [0.25, 0.75], save_to=tmp_path / "soup")
    found = AutoModelForCausalLM.from_pretrained(place).state_dict()
    expected = soup_state_dict([a.state_dict(), b.state_dict()], [0.25, 0.75])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6)
    swapped = soup([tmp_path / "b", tmp_path / "a"], [0.75, 0.25], save_to=tmp_path / "swapped")
    same = AutoModelForCausalLM.from_pretrained(swapped).state_dict()
    assert all(torch.allclose(same[name], found[name], atol=1e-7) for name in found)


def test_averaging_in_bf16_does_not_lose_the_difference():
    a, b = torch.tensor([1.0]).bfloat16(), torch.tensor([1.015625]).bfloat16()
    exact = soup_state_dict([{"x": a}, {"x": b}])["x"]
    assert exact.dtype == torch.bfloat16
    assert exact.float().item() == pytest.approx(1.0078125)
    many = [torch.tensor([256.0 + k]).bfloat16() for k in range(0, 200, 2)]
    naive = sum(x * torch.tensor(1 / 100).bfloat16() for x in many)
    kept = soup_state_dict([{"x": x} for x in many])["x"]
    mean = sum(x.float() for x in many) / 100
    assert (kept.float() - mean).abs() <= 1.0, "half of what bf16 can tell apart here"
    assert (naive.float() - mean).abs() > (kept.float() - mean).abs()


def test_tied_weights_and_whole_numbers():
    tied = torch.randn(3, generator=generator(3, "w"))
    first = {"a": tied, "b": tied, "steps": torch.tensor(3)}
    found = soup_state_dict([first, first])
    assert found["a"] is found["b"]
    torch.testing.assert_close(found["a"], tied)
    with pytest.raises(ShapeError, match="whole numbers"):
        soup_state_dict([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}])


def test_the_line_between_two_models():
    a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        a.weight.fill_(-1.0)
        b.weight.fill_(1.0)
    hill = linear_connectivity(a, b, lambda model: 1.0 + (1.0 - model.weight.item() ** 2))
    assert hill.barrier == pytest.approx(1.0)
    assert not hill.connected
    assert a.weight.item() == -1.0, "the models are left as they were"
    valley = linear_connectivity(a, b, lambda model: 1.0 + model.weight.item() ** 2)
    assert valley.barrier == pytest.approx(0.0)
    assert valley.connected


def test_bad_input(tmp_path):
    models(tmp_path)
    other = small_llama(260, hidden=8, layers=2, heads=2, length=16, generator=generator(4))
    other.save_pretrained(tmp_path / "other")
    deeper = small_llama(260, hidden=16, layers=3, heads=2, length=16, generator=generator(4))
    deeper.save_pretrained(tmp_path / "deeper")
    for wrong in ("other", "deeper"):
        with pytest.raises(ShapeError, match="one architecture"):
            soup([tmp_path / "a", tmp_path / wrong], save_to=tmp_path / "soup")
        assert not (tmp_path / "soup").exists()
    with pytest.raises(DataError, match="there already"):
        soup([tmp_path / "a", tmp_path / "b"], save_to=tmp_path / "other")
    with pytest.raises(DataError, match="safetensors"):
        soup([tmp_path, tmp_path / "b"], save_to=tmp_path / "soup")
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0]):
        with pytest.raises(ConfigError, match="sum to 1"):
            soup([tmp_path / "a", tmp_path / "b"], weights, save_to=tmp_path / "soup")
    with pytest.raises(ConfigError, match="beta"):
        soft_value(A, REWARD, beta=0.0)
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "a" / "model.safetensors"), "model.safetensors")}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert soup([tmp_path / "a"], save_to=tmp_path / "copy").is_dir()
