"""The optimizer that walking tokens drive, and the order of data that a walk gives."""

import json
from collections import Counter
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load, save
from torch.utils.data import DataLoader

from kullback.core.errors import CheckpointError, ConfigError, DataError
from kullback.optim.chains import base_chain, independent_chain
from kullback.optim.srrw import SRRW, start_walk, walk
from kullback.optim.srrw_simulation import MeanOf, simulate
from kullback.optim.token_optimizer import SASRRW, TokenSampler

NODES = 10


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ring(nodes=NODES):
    index = torch.arange(nodes)
    adjacency = torch.zeros(nodes, nodes)
    adjacency[index, (index + 1) % nodes] = 1.0
    adjacency[0, nodes // 2] = 1.0
    return base_chain(adjacency + adjacency.T)


VALUES = torch.randn(NODES, 3, generator=seeded(9), dtype=torch.float64)


def losses(weights):
    """Of the node alone: half the squared distance of all weights, put together, to the node's values."""
    return lambda node: 0.5 * (torch.cat([w.flatten() for w in weights]) - VALUES[node]).square().sum()


def made(**options):
    weights = [torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(1, 1, dtype=torch.float64)]
    weights[1].requires_grad_()
    rule = SRRW(ring(), options.pop("alpha", 5.0), options.pop("a", 0.7), tokens=options.pop("tokens", 1))
    return weights, SASRRW(weights, rule, start=0, generator=seeded(1), **options)


def after(steps, **options):
    weights, optimizer = made(**options)
    for _ in range(steps):
        optimizer.step(losses(weights))
    return torch.cat([w.detach().flatten() for w in weights]), optimizer


@pytest.mark.parametrize("options", [{}, {"tokens": 3}, {"radius": 0.4}], ids=str)
def test_it_does_what_the_simulation_does(options):
    theta, optimizer = after(60, lr=0.8, b=0.9, **options)
    rule = SRRW(ring(), 5.0, 0.7, tokens=options.pop("tokens", 1))
    found = simulate(
        rule, MeanOf(VALUES), torch.zeros(3), 60, lr=0.8, b=0.9, start=0, compiled=False, generator=seeded(1), **options
    )
    torch.testing.assert_close(theta, found.theta[-1, 0], rtol=1e-12, atol=1e-14)
    nodes = found.state.node[0].tolist()
    assert optimizer.current_node() == (nodes if len(nodes) > 1 else nodes[0])
    torch.testing.assert_close(optimizer.history, found.state.history[0])


@pytest.mark.parametrize(
    ("base", "inner"),
    [
        ("momentum", lambda weights: torch.optim.SGD(weights, lr=1.0, momentum=0.9)),
        ("adam", lambda weights: torch.optim.Adam(weights, lr=1.0)),
    ],
)
def test_other_directions_are_those_of_torch(base, inner):
    theta, _ = after(30, lr=0.1, base=base)
    _, nodes = walk(SRRW(ring(), 5.0, 0.7), start_walk(SRRW(ring(), 5.0), start=0), 30, generator=seeded(1))
    weights = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)]
    for weight in weights:
        weight.requires_grad_()
    reference = inner(weights)
    for step, node in enumerate(nodes[0].tolist(), start=1):
        reference.param_groups[0]["lr"] = 0.1 * (step + 1) ** -0.9
        reference.zero_grad()
        losses(weights)(node).backward()
        reference.step()
    torch.testing.assert_close(theta, torch.cat([w.detach().flatten() for w in weights]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_known_optimum_and_a_round_trip_of_its_state(base, tokens):
    options = {"base": base, "tokens": tokens, "lr": 0.3 if base == "adam" else 1.0 if base == "sgd" else 0.1, "b": 0.9}
    theta, _ = after(1500, **options)
    assert (theta - VALUES.mean(0)).abs().max() < 0.15
    weights, optimizer = made(**options)
    for _ in range(25):
        optimizer.step(losses(weights))
    saved, kept = deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights]
    for _ in range(25):
        optimizer.step(losses(weights))
    again, resumed = made(**options)
    for weight, value in zip(again, kept, strict=True):
        weight.data.copy_(value)
    resumed.load_state_dict(saved)
    assert resumed.history.tolist() != optimizer.history.tolist()
    for _ in range(25):
        resumed.step(losses(again))
    for weight, value in zip(again, weights, strict=True):
        assert torch.equal(weight, value)
    assert torch.equal(resumed.history, optimizer.history)


def test_rates_are_those_of_the_groups_and_the_loss_is_returned():
    weights, optimizer = made(lr=0.5)
    nodes = []

    def closure(node):
        nodes.append(node)
        return losses(weights)(node)

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(0.5 * VALUES[nodes[0]].square().sum().item())
    assert not loss.requires_grad
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(weights[0].detach(), 0.5 * 2**-0.9 * VALUES[nodes[0], :2])
    with pytest.raises(CheckpointError, match="tokens"):
        optimizer.load_state_dict(made(tokens=2)[1].state_dict())
    for wrong in ({"base": "lion"}, {"lr": 0.0}, {"b": 0.5}, {"radius": -1.0}):
        with pytest.raises(ConfigError):
            made(**wrong)


def test_a_sampler_yields_the_walk_and_goes_on():
    rule = SRRW(ring(), 5.0)
    sampler = TokenSampler(rule, 70, start=0, block=32, generator=seeded(4))
    order = [node for _ in range(3) for node in sampler]
    _, nodes = walk(rule, start_walk(rule, start=0), 224, generator=seeded(4))
    assert order == nodes[0, :210].tolist()
    assert len(sampler) == 70
    batches = DataLoader(list(range(NODES)), batch_size=16, sampler=sampler)
    assert [len(batch) for batch in batches] == [16, 16, 16, 16, 6]


@pytest.mark.parametrize("stop", [0, 5, 31, 32, 33, 90, 140])
def test_a_sampler_resumes_anywhere(stop):
    shards = [[100 * node + k for k in range(3 + node % 4)] for node in range(NODES)]

    def sampler():
        return TokenSampler(
            SRRW(ring(), 5.0), 70, shards=shards, per_visit=2, start=0, block=16, generator=seeded(4)
        )  # fmt: skip

    def drawn(source, count):
        found = []
        while len(found) < count:
            for index in source:
                found.append(index)
                if len(found) == count:
                    break
        return found

    whole = drawn(sampler(), 200)
    first = sampler()
    begun = drawn(first, stop)
    state = first.state_dict()
    tensors = {"walk." + key: value for key, value in state["walk"].items() if isinstance(value, torch.Tensor)}
    assert load(save(tensors))  # what is saved are tensors and numbers
    json.dumps({key: value for key, value in state.items() if isinstance(value, int)})
    second = sampler()
    second.load_state_dict(state)
    assert begun + drawn(second, 200 - stop) == whole


def test_shards_are_read_in_turn():
    shards = [[10 * node, 10 * node + 1, 10 * node + 2] for node in range(NODES)]
    rule = SRRW(ring(), 2.0)
    order = list(TokenSampler(rule, 400, shards=shards, per_visit=2, start=0, generator=seeded(4)))
    _, nodes = walk(rule, start_walk(rule, start=0), 200, generator=seeded(4))
    assert [index // 10 for index in order] == nodes[0].repeat_interleave(2).tolist()
    for node in range(NODES):
        own = [index % 10 for index in order if index // 10 == node]
        assert own == [k % 3 for k in range(len(own))]


def test_the_order_lies_between_random_and_cyclic():
    """On a complete graph the counts of visits differ by much, by little, by hardly anything."""
    chain, spreads = independent_chain(torch.ones(NODES)), []
    for alpha in (0.0, 5.0, 200.0):
        counts = Counter(TokenSampler(SRRW(chain, alpha, 1.0), 2000, start=0, generator=seeded(6)))
        spreads.append(max(counts.values()) - min(counts.values()))
    assert spreads[0] > 20 > spreads[1] > spreads[2]
    assert spreads[2] <= 3


def test_what_a_sampler_refuses():
    rule = SRRW(ring(), 1.0)
    with pytest.raises(ConfigError, match="positive"):
        TokenSampler(rule, 0, generator=seeded(0))
    with pytest.raises(ConfigError, match="do nothing"):
        TokenSampler(rule, 5, per_visit=2, generator=seeded(0))
    with pytest.raises(ConfigError, match="a shard each"):
        TokenSampler(rule, 5, shards=[[1]], generator=seeded(0))
    with pytest.raises(DataError, match="shard 3"):
        TokenSampler(rule, 5, shards=[[1], [1], [1], []] + 6 * [[1]], generator=seeded(0))
    sampler = TokenSampler(rule, 5, generator=seeded(0))
    state = sampler.state_dict()
    state["walk"]["history"] = torch.ones(1, 3)
    with pytest.raises(CheckpointError, match="graph"):
        sampler.load_state_dict(state)
