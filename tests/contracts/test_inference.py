"""What every inference algorithm from pieces obeys, law by law, and for each law a wrong one that it rejects."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch

from kullback.sample.compose import (
    MH,
    PMMH,
    RMSMC,
    SMC,
    SMC2,
    Chain,
    Enum,
    Importance,
    Population,
    Represented,
    Sam,
    Transformed,
    bernoulli,
    factor,
    meaning,
    program,
    run,
    sample,
    self_normalised,
    validate,
    yield_,
)
from kullback.sample.compose.programs import Ret

HALF = Fraction(1, 2)


@program
def observed(rate: Fraction = HALF, weight: Any = 3) -> Any:
    first = yield sample(bernoulli(rate))
    yield factor(weight if first else 1)
    yield yield_()
    second = yield sample(bernoulli(HALF))
    yield factor(2 if second == first else HALF)
    return first, second


@program
def impossible() -> Any:
    yield sample(bernoulli(HALF))
    yield factor(0)
    yield yield_()
    return 1


@program
def rates() -> Any:
    return Fraction(1, 4) if (yield sample(bernoulli(HALF))) else HALF


@program
def joint() -> Any:
    rate = yield rates()
    found = yield observed(rate)
    return rate, found


@dataclass(frozen=True)
class Row:
    """A method; code: the program that it is given; stands_for: the one whose meaning it has."""

    method: Any
    code: Callable[[], Any] = observed
    stands_for: Callable[[], Any] = observed


def drawn(row: Row, seed: int) -> Any:
    return run(row.method, row.code(), generator=torch.Generator().manual_seed(seed))


def check_the_meaning_is_kept(row: Row) -> None:
    found = validate(row.method, row.code(), expected=meaning(row.stands_for()), grid=4)
    assert found.equal
    assert isinstance(found.max_abs_diff, Fraction)


def check_same_generator_same_draws(row: Row) -> None:
    before = torch.random.get_rng_state()
    runs = [drawn(row, seed) for seed in (1, 1, 2, 3, 4)]
    assert runs[0].values == runs[1].values
    assert any(other.values != runs[0].values for other in runs[2:])
    assert torch.equal(torch.random.get_rng_state(), before)


def check_impossible_is_zero(row: Row) -> None:
    """On every base: no mass, no NaN."""
    if row.code is not observed or isinstance(row.method, MH):
        pytest.skip("parameters before the program, or a chain that has nowhere to begin")
    assert row.method.on(Enum(4), impossible()).meaning() == {}
    found = run(row.method, impossible(), generator=torch.Generator().manual_seed(1))
    assert found.log_evidence().item() == -math.inf
    assert not bool(found.log_weights.isnan().any())


def check_drawing_finds_the_mean(row: Row) -> None:
    """Of the results' share whose two values agree, by many short runs, or one long chain."""
    exact = meaning(row.stands_for())
    agree = lambda value: value[-1][0] == value[-1][1] if isinstance(value[-1], tuple) else value[0] == value[1]  # noqa: E731
    mass = float(sum(weight for value, weight in exact.items() if agree(value)))
    if isinstance(row.method, (MH, PMMH)):
        long = type(row.method)(**{**vars(row.method), "num_steps": 600})
        chain = run(long, row.code(), generator=torch.Generator().manual_seed(7))
        assert isinstance(chain, Chain)
        found = sum(map(agree, chain.values)) / 600
        assert found == pytest.approx(mass / float(sum(exact.values())), abs=0.15)
        return
    estimates = torch.stack([drawn(row, seed).unnormalized_expect(agree) for seed in range(80)])
    assert abs(estimates.mean().item() - mass) <= 6 * estimates.std().item() / math.sqrt(80)


LAWS = [
    check_the_meaning_is_kept, check_same_generator_same_draws, check_impossible_is_zero, check_drawing_finds_the_mean,
]  # fmt: skip

TABLE = {
    "importance": Row(Importance(4)),
    "smc": Row(SMC(3)),
    "smc, multinomial, all steps": Row(SMC(2, None, "multinomial")),
    "smc, stratified": Row(SMC(2, 1, "stratified")),
    "smc, residual, effective size": Row(SMC(3, 1, "residual", 0.8)),
    "mh": Row(MH(2)),
    "mh, all sites": Row(MH(2, "all")),
    "rmsmc": Row(RMSMC(2, 1)),
    "rmsmc, local": Row(RMSMC(2, 1, 2, local=True)),
    "pmmh": Row(PMMH(observed, 2, 1, 1), rates, joint),
    "smc2": Row(SMC2(observed, 2, 1, 1), rates, joint),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", TABLE)
def test_law(name: str, law: Callable[[Row], None]) -> None:
    law(TABLE[name])


@dataclass(frozen=True)
class Stuck:
    """Draws nothing."""

    def on(self, base: Any, code: Any) -> Represented:
        return Represented(Population(base), base.of(Ret(((Fraction(1), (True, True)),))))


@dataclass(frozen=True)
class Restless:
    """Draws from the global source as well."""

    def on(self, base: Any, code: Any) -> Represented:
        if isinstance(base, Sam):
            torch.rand(1)
        return Importance(4).on(base, code)


WRONG = {
    check_the_meaning_is_kept: Row(Transformed(Importance(2), self_normalised)),
    check_same_generator_same_draws: Row(Restless()),
    check_impossible_is_zero: Row(Stuck()),
    check_drawing_finds_the_mean: Row(Transformed(Importance(4), self_normalised)),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_law_bites(law: Callable[[Row], None]) -> None:
    with pytest.raises(AssertionError):
        law(WRONG[law])
