"""Experts as batched products: equal to loops, bounded cosine logits, and errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kullback.core.errors import ConfigError, ShapeError
from kullback.models.experts import CosineHead, ExpertLinear, Experts, MultiExpert


def test_expert_linear_is_a_loop_over_linear_layers(generator):
    layer = ExpertLinear(3, 4, 2, generator=generator).double()
    shared = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    own = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    for k in range(3):
        assert torch.allclose(layer(shared)[k], functional.linear(shared, layer.weight[k], layer.bias[k, 0]))
        assert torch.allclose(layer(own)[k], functional.linear(own[k], layer.weight[k], layer.bias[k, 0]))
    shaped = torch.randn(3, 2, 7, 4, generator=generator, dtype=torch.float64)
    assert torch.allclose(layer(shaped)[1, 1], functional.linear(shaped[1, 1], layer.weight[1], layer.bias[1, 0]))
    for deep in shaped[:2], shaped:  # rows of a shared [b, 2, 7, 4], also where b happens to be the number of experts
        layer.shared = False
        if len(deep) != 3:
            with pytest.raises(ShapeError, match="shared=True"):
                layer(deep)
        layer.shared = True
        assert torch.allclose(layer(deep)[2, 1], functional.linear(deep[1], layer.weight[2], layer.bias[2, 0]))
    assert layer.weight.abs().max() <= 0.5
    with pytest.raises(ShapeError, match="4 features"):
        layer(own[..., :3])


@pytest.mark.parametrize("experts", [None, 3])
def test_cosine_logits_are_bounded_and_blind_to_lengths(generator, experts):
    head = CosineHead(6, 4, experts=experts, scale=20.0, generator=generator).double()
    features = torch.randn(*([3] if experts else []), 9, 6, generator=generator, dtype=torch.float64)
    logits = head(features)
    assert logits.shape == (*features.shape[:-1], 4)
    assert logits.abs().max() <= 20.0
    assert torch.allclose(head(7.0 * features), logits)
    head.weight.data.mul_(torch.rand(4, 1, generator=generator, dtype=torch.float64) + 0.5)
    assert torch.allclose(head(features), logits)
    aligned = head(head.weight.detach())
    assert torch.allclose(torch.diagonal(aligned, dim1=-2, dim2=-1), torch.tensor(20.0, dtype=torch.float64))
    single = CosineHead(6, 4, scale=20.0, generator=generator).double()
    if experts:
        single.weight.data.copy_(head.weight[1])
        assert torch.allclose(single(features[1]), logits[1])


def test_a_scale_is_learnt_only_when_asked(generator):
    fixed, free = (CosineHead(3, 2, learn_scale=learn, generator=generator) for learn in (False, True))
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]
    assert sorted(name for name, _ in free.named_parameters()) == ["scale", "weight"]
    assert "scale" in fixed.state_dict()
    with pytest.raises(ConfigError, match="scale"):
        CosineHead(3, 2, scale=0.0, generator=generator)
    with pytest.raises(ShapeError, match="3 features"):
        fixed(torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="2 experts"):
        CosineHead(3, 2, experts=2, generator=generator)(torch.zeros(4, 3))


def test_the_whole_averages_plain_logits_of_any_experts(generator):
    def branch(index):
        layer = nn.utils.skip_init(nn.Linear, 5, 7)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
        return layer

    branches, heads = Experts(branch, 3), CosineHead(7, 4, experts=3, generator=generator)
    model = MultiExpert(nn.Tanh(), branches, heads)
    inputs = torch.randn(6, 5, generator=generator)
    found = model(inputs)
    assert torch.equal(found["output"], found["logits"].mean(0))
    for index, member in enumerate(branches.members):
        assert torch.allclose(found["features"][index], member(inputs.tanh()))
    found["output"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ConfigError, match="at least one expert"):
        Experts(branch, 0)
