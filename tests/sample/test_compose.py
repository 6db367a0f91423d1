"""Inference from pieces: every algorithm against the exact measure of its program, wrong ones found out, and limits."""

import functools
import math
import sys
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from kullback.core.errors import ConfigError, DataError
from kullback.sample.compose import (
    MH,
    RMSMC,
    SMC,
    Enum,
    Importance,
    Population,
    Rejection,
    Represented,
    Traced,
    Transformed,
    Weighted,
    algorithm,
    apply_weight,
    bernoulli,
    collapse,
    evidence,
    extract_evidence,
    factor,
    flatten,
    freeze,
    marginal,
    meaning,
    mh_step,
    program,
    push_evidence,
    resample,
    run,
    sample,
    self_normalised,
    spawn,
    validate,
    yield_,
)  # fmt: skip
from kullback.sample.compose.programs import Ret
from kullback.sample.compose.transformations import acceptance

sys.path.insert(0, str(Path(__file__).parent))
from _programs import (
    branching,
    coin,
    coin_flip,
    geometric,
    hmm,
    hmm_measure,
    planted,
    quiet,
)

BASE = Enum(6)
SCHEMES = ["multinomial", "systematic", "stratified", "residual"]
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def population(base, code, copies=2, inner=None):
    stack = Population(inner or base)
    return Represented(stack, stack.of(spawn(copies) >> code))


def nested(base, code):
    """A population of populations with unequal shares."""
    inner = Population(base)
    value = inner.map(inner.of(spawn(2) >> code), lambda x: ((F(1, 3), x), (F(2, 3), x)))
    return Represented(Population(inner), value)


@program
def spawning():
    """Copies in the middle."""
    x = yield coin_flip()
    yield factor(2 if x else F(1, 2))
    yield spawn(2)
    y = yield sample(bernoulli(F(3, 4) if x else F(1, 4)))
    yield factor(3 if y else 1)
    return x, y


VALID = {
    "importance": (Importance(3), hmm(), None),
    "importance, spawn inside": (Importance(2), spawning(), None),
    "smc, to the last checkpoint": (SMC(2, None, "multinomial"), hmm(), None),
    "smc, uneven checkpoints": (SMC(2), geometric(), None),
    "smc, three particles": (SMC(3, 2, "multinomial"), hmm(), None),
    "smc, three steps": (SMC(2, 3, "multinomial"), hmm((1, 0, 1)), None),
    "smc, effective size": (SMC(2, 2, ess_threshold=0.8), hmm(good=F(7, 8)), None),
    "mh": (MH(1), branching(), 6),
    "mh, three steps": (MH(3), branching(), 6),
    "mh, all": (MH(2, "all"), branching(), 6),
    "mh, blocks": (MH(2, [(0,), (0, 1), (1,)]), branching(), 6),
    "mh, chain": (MH(2), hmm(), 4),
    "rmsmc": (RMSMC(2, 1), hmm(), 4),
    "rmsmc, local": (RMSMC(2, 2, local=True), hmm(), 4),
    "rmsmc, no moves": (RMSMC(2, 2, 0, "multinomial"), hmm(), 4),
    "resample in the end": (Transformed(Importance(2), resample(scheme="stratified")), hmm(), None),
    "resample to three": (Transformed(Importance(2), resample(size=3, scheme="systematic")), hmm(), None),
    "resample to one": (Transformed(Importance(3), resample(size=1)), hmm(), None),
    "collapse": (Transformed(Importance(3), collapse), hmm(), None),
    "extract evidence": (Transformed(Importance(2), extract_evidence), hmm(), None),
    "push evidence": (
        algorithm(lambda base, code: push_evidence(population(base, code, inner=Weighted(base)))), hmm(), None,
    ),
    "apply weight": (
        algorithm(lambda base, code: apply_weight(collapse(population(base, code, inner=Weighted(base))))), hmm(), None,
    ),
    "flatten": (algorithm(lambda base, code: flatten(nested(base, code))), hmm(), None),
    "freeze": (
        algorithm(lambda base, code: marginal(mh_step(freeze(Represented(Traced(Weighted(base)),
                                                                        Traced(Weighted(base)).of(code)))))),
        branching(), 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_valid_algorithms_mean_what_the_program_means(name):
    method, code, grid = VALID[name]
    found = validate(method, code, grid=grid)
    assert found.equal
    assert found.max_abs_diff == 0
    assert isinstance(found.max_abs_diff, F)  # rational arithmetic to the end


@pytest.mark.parametrize("scheme", SCHEMES)
@few
@given(tree=quiet, then=quiet)
def test_filters_are_valid_on_random_programs(scheme, tree, then):
    @program
    def two():
        x = yield planted(tree)
        yield yield_()
        return (yield planted(then, x))

    for method in (SMC(2, 1, scheme), SMC(3, 1, scheme, 0.7)):
        assert validate(method, two()).equal


def forgotten(value):
    """Resampling with weights 1/n: the total is lost."""
    inner = value.representation.inner
    drawn = resample(value)
    return Represented(value.representation, inner.map(drawn.value, lambda p: tuple((F(1, len(p)), x) for _, x in p)))


def unreset(value):
    """Resampling that keeps the old weights."""
    inner = value.representation.inner

    def onward(pairs):
        indices = inner.map(inner.of(uniform_draws(pairs)), lambda found: tuple(pairs[i] for i in found))
        return indices

    return Represented(value.representation, inner.chain(value.value, onward))


def uniform_draws(pairs):
    from kullback.sample.compose.transformations import ancestors

    return ancestors([w for w, _ in pairs], len(pairs), "multinomial")


def whole_copies(base, code):
    """Copies of weight one instead of 1/n."""
    stack = Population(base)
    doubled = base.map(population(base, code).value, lambda pairs: tuple((2 * w, x) for w, x in pairs))
    return Represented(stack, doubled)


WRONG = {
    "total forgotten": (Transformed(Importance(2), forgotten), hmm(), None),
    "weights kept": (Transformed(Importance(2), unreset), hmm(), None),
    "normalised": (Transformed(Importance(2), self_normalised), hmm(), None),
    "whole copies": (algorithm(whole_copies), hmm(), None),
    "mh without lengths": (MH(2, accept=functools.partial(acceptance, single=False)), branching(), 6),
    "mh accepts all": (MH(1, accept=lambda old, new: F(1)), branching(), 6),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_algorithms_are_found_out(name):
    method, code, grid = WRONG[name]
    found = validate(method, code, grid=grid)
    assert not found.equal
    assert found.max_abs_diff > F(1, 1000)


def test_evidence_has_the_mass_as_its_mean():
    mass = sum(hmm_measure((1, 0)).values())
    for found in (
        evidence(SMC(2, 2, "multinomial").on(BASE, hmm())), evidence(collapse(Importance(2).on(BASE, hmm()))),
    ):  # fmt: skip
        assert sum(value * p for value, p in found.meaning().items()) == mass


def test_rejection_draws_from_the_normalised_measure():
    measure_ = meaning(coin())
    found = Rejection(3, attempts=2).on(BASE, coin()).meaning()
    accepted = {value: p for value, p in found.items() if value is not None}
    assert {v: p / sum(accepted.values()) for v, p in accepted.items()} == {
        v: w / sum(measure_.values()) for v, w in measure_.items()
    }
    assert found[None] == F(1, 3) ** 2  # a run is accepted with probability (1/3 + 1) / 2
    with pytest.raises(DataError, match="above the bound"):
        Rejection(2, attempts=1).on(BASE, coin())
    draws = [run(Rejection(3), coin(), generator=torch.Generator().manual_seed(s)) for s in range(400)]
    assert sum(draws) / 400 == pytest.approx(0.75, abs=6 * math.sqrt(0.1875 / 400))


def test_programs_without_factors_keep_equal_weights():
    @program
    def plain():
        x = yield coin_flip()
        yield yield_()
        return x, (yield coin_flip())

    for scheme in SCHEMES:
        for pairs, _ in SMC(3, 1, scheme).on(BASE, plain()).value:
            assert [weight for weight, _ in pairs] == [F(1, 3)] * 3
        found = run(SMC(3, 1, scheme), plain(), generator=torch.Generator().manual_seed(1))
        assert found.log_evidence().item() == pytest.approx(0.0, abs=1e-12)


def test_impossible_observations():
    @program
    def impossible():
        x = yield coin_flip()
        yield factor(0)
        yield yield_()
        return x

    for scheme in SCHEMES:
        assert validate(SMC(2, 1, scheme), impossible()).equal
        found = run(SMC(4, 1, scheme), impossible(), generator=torch.Generator().manual_seed(1))
        assert found.log_evidence().item() == -math.inf
        assert not found.log_weights.isnan().any()
        assert found.unnormalized_expect(float).item() == 0.0
    pairs = ((F(0), "a"), (F(0), "b"))
    stack = Population(BASE)
    assert resample(Represented(stack, BASE.of(Ret(pairs)))).value == ((pairs, F(1)),)
    assert collapse(Represented(stack, BASE.of(Ret(pairs)))).meaning() == {}
    with pytest.raises(ConfigError, match="no run of positive weight"):
        run(MH(3), impossible(), generator=torch.Generator().manual_seed(1))
