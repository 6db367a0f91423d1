"""What a token carries and what a visit does to it, beside the optimizers of torch."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.optim.chains import base_chain
from kullback.optim.srrw import SRRW, srrw_kernel
from kullback.optim.token_walk import TokenUpdate, check_walk, counted, log_increments, next_node

TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def slope(theta, node):
    return (theta - (node + 1) * TARGET).sin()


def ends(update, steps=40):
    payload = update.payload(torch.zeros(3, dtype=torch.float64))
    for visit in range(1, steps + 1):
        update.apply_(payload, slope, visit % 4, visit)
    return payload[0]


def reference(inner, b, lr, steps=40):
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    inner = inner([theta])
    for visit in range(1, steps + 1):
        inner.param_groups[0]["lr"] = lr * (visit + 1) ** -b
        theta.grad = slope(theta.detach(), visit % 4)
        inner.step()
    return theta.detach()


TORCH = {
    "sgd": torch.optim.SGD,
    "momentum": lambda weights: torch.optim.SGD(weights, momentum=0.7),
    "adam": lambda weights: torch.optim.Adam(weights, betas=(0.8, 0.95)),
}


@pytest.mark.parametrize("base", TORCH)
def test_updates_are_those_of_torch(base):
    update = TokenUpdate(base, lr=0.3, b=0.6, momentum=0.7, betas=(0.8, 0.95))
    expected = reference(TORCH[base], 0.6, 0.3)
    torch.testing.assert_close(ends(update), expected, rtol=1e-12, atol=1e-14)
    for other in TORCH:
        if other != base:
            assert (reference(TORCH[other], 0.6, 0.3) - expected).abs().max() > 1e-3


def test_a_ball_holds_the_parameters():
    assert ends(TokenUpdate("adam", radius=0.4)).norm().item() == pytest.approx(0.4)


def ring():
    adjacency = torch.zeros(6, 6)
    for node in range(6):
        adjacency[node, (node + 1) % 6] = 1.0
    adjacency[0, 3] = 1.0
    return base_chain(adjacency + adjacency.T)


def test_counts_of_visits_are_the_history_up_to_scale():
    rule, nodes = SRRW(ring(), 4.0, 0.7), [3, 2, 3, 0, 5, 0, 3, 4]
    logs, x = check_walk(rule, 8, [0] * 6, [0], 1, None), rule.chain.target.clone()
    for log, gamma, node in zip(log_increments(rule, 8), rule.steps(0, 8).tolist(), nodes, strict=True):
        logs[node] = counted(logs[node], log)
        x = (1.0 - gamma) * x
        x[node] += gamma
    counts = torch.tensor(logs, dtype=torch.float64)
    torch.testing.assert_close(counts.softmax(0), x, rtol=1e-12, atol=0)
    row = srrw_kernel(rule.chain, x, 4.0)[0]
    drawn = [next_node(rule, 0, dict(enumerate(logs)), (k + 0.5) / 4000) for k in range(4000)]
    share = torch.tensor(drawn).bincount(minlength=6) / 4000
    torch.testing.assert_close(share.double(), row, rtol=0, atol=1e-3)
    assert (share - ring().matrix()[0]).abs().max() > 0.05  # the base chain is another


def test_what_is_refused():
    for options in ({"base": "lion"}, {"momentum": 1.0}, {"betas": (0.9, -0.1)}, {"lr": 0.0}, {"radius": 0.0},
                    {"b": 0.5}, {"epsilon": 0.0}):  # fmt: skip
        with pytest.raises(ConfigError):
            TokenUpdate(**options)
    with pytest.raises(ShapeError, match="vector"):
        TokenUpdate().payload(torch.zeros(2, 2))
    payload = TokenUpdate().payload(torch.zeros(2))
    for wrong in (torch.zeros(3), torch.tensor([math.nan, 0.0])):
        with pytest.raises(DataError, match="gradient at node 4, visit 2"):
            TokenUpdate().apply_(payload, lambda theta, node, wrong=wrong: wrong, 4, 2)
    good = {"steps": 5, "owners": [0] * 6, "starts": [0], "places": 1, "history": None}
    for change, kind, words in (
        ({"steps": 0}, ConfigError, "at least one visit"), ({"owners": [0]}, ConfigError, "owners"),
        ({"owners": [2] * 6}, ConfigError, "owners"), ({"starts": []}, ConfigError, "starts"),
        ({"starts": [6]}, ConfigError, "starts"), ({"history": torch.zeros(6)}, DataError, "positive"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            check_walk(SRRW(ring(), 1.0), **{**good, **change})
    with pytest.raises(ConfigError, match="cap or a warm-up"):
        check_walk(SRRW(ring(), 1.0, cap=2.0), **good)
    with pytest.raises(ConfigError, match="tokens at 1"):
        check_walk(SRRW(ring(), 1.0, tokens=2), **good)
