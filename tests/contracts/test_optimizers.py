"""What every optimizer obeys, law by law, and for each law a wrong optimizer that it rejects.

A row makes an optimizer for two parameters; `advance` takes one step on the loss of the table, whose optimum is known.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kullback.optim.chains import base_chain
from kullback.optim.srrw import SRRW
from kullback.optim.token_optimizer import SASRRW


@dataclass(frozen=True)
class Row:
    """make(params, generator) -> optimizer; advance(optimizer, params) takes a step; reached in `steps`, to `error`."""

    make: Callable[[list[torch.Tensor], torch.Generator], torch.optim.Optimizer]
    advance: Callable[[Any, list[torch.Tensor]], None]
    steps: int
    error: float


VALUES = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5).sin()
OPTIMUM = VALUES.mean(0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters() -> list[torch.Tensor]:
    return [torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64).requires_grad_()]


def joined(params: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in params])


def loss_at(params: list[torch.Tensor], node: int) -> torch.Tensor:
    return 0.5 * (torch.cat([param.flatten() for param in params]) - VALUES[node]).square().sum()


def steps_of(row: Row, count: int, seed: int = 1) -> tuple[list[torch.Tensor], Any]:
    params = parameters()
    optimizer = row.make(params, seeded(seed))
    for _ in range(count):
        row.advance(optimizer, params)
    return params, optimizer


def check_known_optimum(row: Row) -> None:
    params, _ = steps_of(row, row.steps)
    assert (joined(params) - OPTIMUM).abs().max() < row.error


def check_state_round_trip(row: Row) -> None:
    params, optimizer = steps_of(row, 7)
    saved = deepcopy(optimizer.state_dict())
    again = [param.detach().clone().requires_grad_() for param in params]
    resumed = row.make(again, seeded(99))
    resumed.load_state_dict(saved)
    for _ in range(9):
        row.advance(optimizer, params)
        row.advance(resumed, again)
    assert torch.equal(joined(params), joined(again))


def check_same_generator_same_bits(row: Row) -> None:
    before = torch.random.get_rng_state()
    ends = [joined(steps_of(row, 5, seed)[0]) for seed in (1, 1)]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def check_parameters_without_gradient_stay(row: Row) -> None:
    params = parameters()
    idle = torch.ones(4, dtype=torch.float64, requires_grad=True)
    optimizer = row.make([*params, idle], seeded(1))
    for _ in range(3):
        row.advance(optimizer, params)
    assert torch.equal(idle.detach(), torch.ones(4, dtype=torch.float64))


LAWS = [
    check_known_optimum, check_state_round_trip, check_same_generator_same_bits, check_parameters_without_gradient_stay,
]  # fmt: skip


def tokens() -> dict[str, Row]:
    chain = base_chain(torch.ones(6, 6))

    def row(alpha: float, lr: float = 1.0, walkers: int = 1, **options: Any) -> Row:
        return Row(
            lambda params, generator: SASRRW(
                params, SRRW(chain, alpha, 0.7, tokens=walkers), lr, generator=generator, **options
            ),
            lambda optimizer, params: optimizer.step(lambda node: loss_at(params, node)),
            steps=600, error=0.1,
        )  # fmt: skip

    return {
        "SASRRW": row(8.0),
        "SASRRW, plain walk": row(0.0),
        "SASRRW, momentum": row(8.0, 0.2, base="momentum"),
        "SASRRW, Adam, two tokens": row(8.0, 0.3, walkers=2, base="adam"),
    }


TABLE: dict[str, Row] = {**tokens()}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_every_optimizer_obeys(name, law):
    law(TABLE[name])


def uphill(optimizer: Any, params: list[torch.Tensor]) -> None:
    optimizer.step(lambda node: -1e-3 * loss_at(params, node))


class Forgetful(SASRRW):
    """Its state is only that of its parameters."""

    def state_dict(self):
        return {key: value for key, value in super().state_dict().items() if key in ("state", "param_groups")}

    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


def noisy(optimizer: Any, params: list[torch.Tensor]) -> None:
    TABLE["SASRRW"].advance(optimizer, params)
    params[0].data.add_(1e-3 * torch.randn(2, dtype=torch.float64))


def decaying(optimizer: Any, params: list[torch.Tensor]) -> None:
    TABLE["SASRRW"].advance(optimizer, params)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.data.mul_(0.99)


def forgetful() -> Row:
    chain = base_chain(torch.ones(6, 6))
    return replace(TABLE["SASRRW"], make=lambda params, source: Forgetful(params, SRRW(chain, 8.0), generator=source))


BITES = {
    check_known_optimum: replace(TABLE["SASRRW"], advance=uphill),
    check_state_round_trip: forgetful(),
    check_same_generator_same_bits: replace(TABLE["SASRRW"], advance=noisy),
    check_parameters_without_gradient_stay: replace(TABLE["SASRRW"], advance=decaying),
}


@pytest.mark.parametrize("law", LAWS)
def test_every_law_rejects_a_wrong_optimizer(law):
    with pytest.raises(AssertionError):
        law(BITES[law])
