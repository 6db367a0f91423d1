"""Inference from pieces: monad and morphism laws on random programs, and every algorithm against the exact measure."""

import functools
import math
import sys
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings

from kullback.core.errors import ConfigError, DataError
from kullback.sample.compose import (
    MH,
    PMMH,
    RMSMC,
    SMC,
    SMC2,
    Enum,
    Importance,
    LogWeight,
    Population,
    Rejection,
    Represented,
    Sam,
    Suspended,
    Traced,
    Transformed,
    Unit,
    Weighted,
    advance,
    algorithm,
    apply_weight,
    bernoulli,
    bind,
    categorical,
    collapse,
    compose,
    evidence,
    extract_evidence,
    factor,
    finish,
    flatten,
    freeze,
    hoist,
    marginal,
    meaning,
    mh_step,
    prim,
    program,
    propose,
    push_evidence,
    resample,
    run,
    sample,
    self_normalised,
    spawn,
    uniform_integer,
    validate,
    yield_,
)  # fmt: skip
from kullback.sample.compose.programs import Bound, Recorded, Ret, Trace
from kullback.sample.compose.transformations import acceptance

sys.path.insert(0, str(Path(__file__).parent))
from _programs import branching, coin, count, geometric, hmm, hmm_measure, integral, measure, planted, quiet, trees

BASE = Enum(6)
SCHEMES = ["multinomial", "systematic", "stratified", "residual"]
STACKS = {
    "Enum": BASE,
    "Weighted": Weighted(BASE),
    "Weighted of Sam": Weighted(Sam()),
    "Population": Population(BASE),
    "Population of Sam": Population(Sam()),
    "Population of Weighted": Population(Weighted(BASE)),
    "Population of Population": Population(Population(BASE)),
    "Weighted of Weighted": Weighted(Weighted(BASE)),
    "Suspended": Suspended(Population(BASE)),
    "Traced": Traced(Weighted(BASE)),
    "Suspended of Traced": Suspended(Traced(Population(BASE))),
}
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def law(stack, value):
    return Represented(stack, value).meaning()


# --- representations ---


@pytest.mark.parametrize("name", STACKS)
@few
@given(tree=trees, then=quiet, last=quiet)
def test_monad_laws_and_meanings(name, tree, then, last):
    stack = STACKS[name]
    if "Traced" in name:  # a uniform number has six values
        assume(count(tree, "flip") <= 2 - count(tree, "spawn"))
        last = ("factor", F(2), ("ret", 1))
    follow, onward = (functools.partial(planted, then), functools.partial(planted, last))
    whole = functools.partial(measure, then)
    value = stack.of(planted(tree))
    assert law(stack, value) == measure(tree)  # `of` is a morphism
    bound = stack.bind(value, follow)
    assert law(stack, bound) == integral(measure(tree), whole)  # and so is `bind`
    assert law(stack, bound) == law(stack, stack.of(bind(planted(tree), follow)))
    assert law(stack, stack.bind(stack.of(Ret(2)), follow)) == measure(then, 2)
    assert law(stack, stack.bind(value, Ret)) == measure(tree)
    apart = stack.bind(bound, onward)
    together = stack.bind(value, lambda x: Bound(follow(x), onward))
    assert law(stack, apart) == law(stack, together)


@few
@given(one=trees, other=trees)
def test_independent_parts_commute(one, other):
    @program
    def pair(first, second, *, swapped):
        x = yield planted(first)
        y = yield planted(second)
        return (y, x) if swapped else (x, y)

    assert meaning(pair(one, other, swapped=False)) == meaning(pair(other, one, swapped=True))


def test_lifted_values_keep_their_meaning():
    @program
    def lifted():
        x = yield prim(lambda base: base.of(sample(bernoulli(F(1, 3)))))
        yield factor(2 if x else 1)
        return x

    expected = {False: F(2, 3), True: F(2, 3)}
    assert meaning(lifted()) == expected
    for stack in STACKS.values():
        assert law(stack, stack.of(lifted())) == expected
    assert law(Weighted(BASE), Weighted(BASE).lift(BASE.of(coin_flip()))) == {False: F(1, 2), True: F(1, 2)}
    assert law(Population(BASE), Population(BASE).lift(BASE.of(coin_flip()))) == {False: F(1, 2), True: F(1, 2)}


def coin_flip():
    return sample(bernoulli(F(1, 2)))


def test_continuations_can_be_entered_many_times():
    assert meaning(hmm((1, 0, 1))) == hmm_measure((1, 0, 1))
    assert meaning(geometric()) == {1: F(1, 4), 2: F(1, 4), 3: F(3, 16), 4: F(1, 4)}
    seen = []

    @program
    def noted():
        x = yield coin_flip()
        seen.append(x)
        y = yield coin_flip()
        return x, y

    assert set(meaning(noted()).values()) == {F(1, 4)}
    assert seen.count(True) <= 2  # once, and once more for the second answer


def test_long_programs_run_without_recursion():
    @program
    def long():
        total = 0
        for _ in range(1500):
            total += yield coin_flip()
            yield factor(F(1, 2))
            yield Ret(None)
        return total

    found = run(Importance(2), long(), generator=torch.Generator().manual_seed(0))
    assert found.log_weights.tolist() == pytest.approx([-1500 * math.log(2) - math.log(2)] * 2)
    assert abs(found.values[0] - 750) < 6 * math.sqrt(375)


# --- algorithms against the measure ---


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


def parameters():
    return sample(bernoulli(F(1, 2)))


def given_model(stays):
    return hmm((1, 0), F(3, 4) if stays else F(1, 4))


def joint_measure():
    parts = {}
    for stays in (False, True):
        for path, weight in hmm_measure((1, 0), F(3, 4) if stays else F(1, 4)).items():
            parts[(stays, path)] = weight / 2
    return parts


@pytest.mark.parametrize(
    "method",
    [
        PMMH(given_model, 2, 2), PMMH(given_model, 2, None, 1, "multinomial"), PMMH(given_model, 1, 1, 2, sites="all"),
        SMC2(given_model, 2, 1, 1), SMC2(given_model, 1, 2, 1),
        pytest.param(SMC2(given_model, 1, 2, 2), marks=pytest.mark.slow),
    ],
    ids=["pmmh", "pmmh, all checkpoints", "pmmh, one particle", "smc2", "smc2, two particles", "smc2, two steps"],
)  # fmt: skip
def test_parameters_and_paths_have_their_joint_measure(method):
    assert validate(method, parameters(), expected=joint_measure(), grid=4).equal
    wrong = {**joint_measure(), (True, (True, True)): F(0)}
    assert not validate(method, parameters(), expected=wrong, grid=4).equal


def test_smc2_without_parameters_has_the_evidence_of_smc():
    for scheme in ("multinomial", "systematic"):
        inner = evidence(SMC(2, 2, scheme).on(Enum(4), hmm())).meaning()
        outer = evidence(SMC2(lambda _: hmm(), 1, 2, 2, resampler=scheme).on(Enum(4), Ret(None))).meaning()
        assert inner == outer


def test_the_kernel_of_traces_of_varying_length_on_a_grid():
    base, code = Enum(6), branching()
    grid = [F(2 * i + 1, 12) for i in range(6)]
    traces = [[u] if u < F(1, 2) else [u, v] for u in grid for v in (grid if u >= F(1, 2) else [None])]
    states = [base.of(Recorded(code, tuple(choices), silent=True))[0][0] for choices in traces]
    place = {trace.choices: index for index, trace in enumerate(states)}
    kernel = torch.zeros(len(states), len(states), dtype=torch.float64)
    for index, trace in enumerate(states):
        for after, p in base.of(propose(code, trace)):
            kernel[index, place[after.choices]] += float(p)
    torch.testing.assert_close(kernel.sum(1), torch.ones(len(states), dtype=torch.float64))
    law_ = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    for _ in range(400):
        law_ = law_ @ kernel
    wanted, found = meaning(code), {}
    for trace, p in zip(states, law_.tolist(), strict=True):
        found[trace.value] = found.get(trace.value, 0.0) + p
    for value, weight in wanted.items():
        assert found[value] == pytest.approx(float(weight / sum(wanted.values())), abs=1e-12)


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


def test_a_trace_of_density_zero_accepts_anything_better():
    empty, full = Trace((F(1, 2),), 0, F(0)), Trace((F(1, 2),), 1, F(1, 5))
    assert acceptance(empty, full) == 1
    assert acceptance(empty, empty) == 0
    assert acceptance(full, empty) == 0


def test_drawn_runs_agree_with_the_exact_measure(generator):
    measure_ = hmm_measure((1, 0, 1))
    mass = sum(measure_.values())
    share = sum(w for path, w in measure_.items() if path[1]) / mass
    for method in (Importance(40), SMC(40), SMC(40, 2, "residual"), SMC(40, 3, "stratified", 0.5), RMSMC(20, 3)):
        found = [run(method, hmm((1, 0, 1)), generator=generator) for _ in range(20)]
        masses = torch.stack([one.log_evidence().exp() for one in found])
        assert masses.mean().item() == pytest.approx(float(mass), abs=6 * masses.std().item() / 20**0.5)
        second = torch.stack([one.unnormalized_expect(lambda path: path[1]) for one in found])
        assert second.mean().item() == pytest.approx(float(mass * share), abs=6 * second.std().item() / 20**0.5)
    for options in ({}, {"sites": "all"}, {"drift": 1.0}):
        chain = run(MH(1500, **options), hmm((1, 0, 1)), generator=generator)
        assert sum(path[1] for path in chain.values) / 1500 == pytest.approx(float(share), abs=0.17)
        assert 0.3 < chain.accepted < 0.99
    assert run(MH(50, accept=lambda old, new: F(1)), hmm((1, 0, 1)), generator=generator).accepted == 1.0


def test_drawn_parameters_agree_with_the_joint_measure(generator):
    joint = joint_measure()
    share = float(sum(w for (stays, _), w in joint.items() if stays) / sum(joint.values()))
    chain = run(PMMH(given_model, 4, num_steps=600), parameters(), generator=generator)
    assert sum(stays for stays, _ in chain.values) / 600 == pytest.approx(share, abs=0.12)
    found = [run(SMC2(given_model, 6, 6, 2), parameters(), generator=generator) for _ in range(20)]
    masses = torch.stack([one.log_evidence().exp() for one in found])
    assert masses.mean().item() == pytest.approx(float(sum(joint.values())), abs=6 * masses.std().item() / 20**0.5)


def test_continuous_laws_are_drawn(generator):
    @program
    def normal():
        x = yield sample(torch.distributions.Normal(1.0, 2.0))
        yield factor(log=-0.5 * (x - 3.0) ** 2)
        return x

    found = run(Importance(4000), normal(), generator=generator)
    evidence_ = -0.5 * 4.0 / 5.0 - 0.5 * math.log(5.0)
    assert found.log_evidence().item() == pytest.approx(evidence_, abs=0.1)
    assert found.expect(lambda x: x).item() == pytest.approx(1 + 4 / 5 * 2, abs=0.15)
    chain = run(MH(2000, drift=0.2), normal(), generator=generator)
    assert sum(chain.values) / 2000 == pytest.approx(2.6, abs=0.25)


# --- pieces ---


def test_log_weights_obey_the_arithmetic_of_numbers():
    one, other = LogWeight(math.log(0.3)), LogWeight(math.log(1.5))
    for found, expected in [
        (one * other, 0.45), (one + other, 1.8), (one / other, 0.2), (F(2) * one, 0.6), (one * F(2), 0.6),
        (3 + one, 3.3), (1 / one, 1 / 0.3), (one + LogWeight(-math.inf), 0.3), (LogWeight(-math.inf) * 2, 0.0),
    ]:  # fmt: skip
        assert float(found) == pytest.approx(expected)
    assert one < other
    assert other > F(1)
    assert LogWeight(0.0) == 1
    assert LogWeight(-math.inf) == 0
    assert (LogWeight(-5000.0) * LogWeight(-5000.0)).log == -10_000
    assert validate(SMC(2, 2), logarithmic()).equal  # up to rounding
    assert not isinstance(validate(SMC(2, 2), logarithmic()).max_abs_diff, F)


@program
def logarithmic():
    x = yield coin_flip()
    yield factor(log=-0.7 if x else -1.3)
    yield yield_()
    y = yield sample(bernoulli(F(1, 3)))
    yield factor(log=-0.2 if y else 0.4)
    yield yield_()
    return x, y


def test_laws():
    assert bernoulli(0.1).outcomes(None) == [(False, 1 - F(0.1)), (True, F(0.1))]
    assert categorical({"a": 1, "b": 3}).outcomes(None) == [("a", F(1, 4)), ("b", F(3, 4))]
    assert [categorical([1, 0, 3]).icdf(u) for u in (0.0, 0.2499, 0.25, 0.999)] == [0, 0, 2, 2]
    assert categorical([0.1] * 10).icdf(1.0 - 2**-53) == 9
    assert uniform_integer(4).icdf(F(3, 4)) == 3
    assert [u for u, _ in Unit().outcomes(2)] == [F(1, 4), F(3, 4)]
    assert sample(torch.distributions.Categorical(torch.tensor([0.5, 0.5]))).argument.outcomes(None) == [
        (0, F(1, 2)), (1, F(1, 2)),
    ]  # fmt: skip
    assert sample(torch.distributions.Bernoulli(torch.tensor(0.25))).argument.icdf(0.8) is True
    assert math.isfinite(sample(torch.distributions.Normal(0.0, 1.0)).argument.icdf(0.0))


def test_exact_layer_and_composition_by_hand():
    by_hand = compose(finish, advance, hoist(resample), advance, hoist(resample))
    stack = Suspended(Population(BASE))
    value = by_hand(Represented(stack, stack.of(spawn(2) >> BASE.prepare(hmm()))))
    assert value.meaning() == run(SMC(2, 2, "multinomial"), hmm(), layer="enum") == hmm_measure((1, 0))
    assert value.bind(lambda path: Ret(path[0])).meaning() == {False: F(5, 64), True: F(9, 64)}


def test_bad_input(generator):
    @program
    def endless():
        while not (yield coin_flip()):
            pass

    @program
    def strange():
        yield 3

    def plain():
        return 3

    @program
    def deep():
        yield sample(torch.distributions.Normal(0.0, 1.0))

    @program
    def list_result():
        yield coin_flip()
        return [1]

    stack = Population(BASE)
    pair = Represented(stack, stack.of(coin()))
    for call, error, message in [
        (lambda: meaning(endless(), max_outcomes=1000), DataError, "more than 1000 outcomes"),
        (lambda: meaning(deep()), ConfigError, "finite"),
        (lambda: meaning(sample(Unit())), ConfigError, "finite"),
        (lambda: meaning(strange()), ConfigError, "yields programs"),
        (lambda: program(plain), ConfigError, "no yield"),
        (lambda: factor(-1), DataError, "0 or more"),
        (lambda: factor(math.nan), DataError, "finite"),
        (lambda: factor(math.inf), DataError, "finite"),
        (lambda: factor(log=math.nan), DataError, "below infinity"),
        (lambda: factor(), ConfigError, "one weight"),
        (lambda: spawn(0), ConfigError, "1 copy"),
        (lambda: bernoulli(1.5), DataError, r"\[0, 1\]"),
        (lambda: categorical([]), DataError, "not all zero"),
        (lambda: categorical([1, -1]), DataError, "not negative"),
        (lambda: uniform_integer(0), DataError, "1 or more"),
        (lambda: sample(torch.distributions.Gamma(1.0, 1.0)), ConfigError, "icdf"),
        (lambda: sample(3), ConfigError, "no law"),
        (lambda: Sam().draw(Sam().of(coin()), lambda: 0.5), ConfigError, "no factor"),
        (lambda: validate(MH(1), branching(), grid=5), ConfigError, "grid of 5"),
        (lambda: validate(MH(1), branching()), ConfigError, "finite"),
        (lambda: resample(scheme="magic"), ConfigError, "magic"),
        (lambda: resample(ess_threshold=0.0), ConfigError, "ess_threshold"),
        (lambda: resample(size=0), ConfigError, "size"),
        (lambda: resample(collapse(pair)), ConfigError, "takes a Population"),
        (lambda: advance(pair), ConfigError, "takes a Suspended"),
        (lambda: marginal(pair), ConfigError, "takes a Traced"),
        (lambda: hoist(resample)(pair), ConfigError, "hoist takes"),
        (lambda: flatten(pair), ConfigError, "population of populations"),
        (lambda: push_evidence(pair), ConfigError, "base"),
        (lambda: apply_weight(collapse(pair)), ConfigError, "base"),
        (lambda: validate(MH(1, "some"), branching(), grid=6), ConfigError, "blocks"),
        (lambda: run(MH(1, drift=-1.0), branching(), generator=generator), ConfigError, "drift"),
        (lambda: SMC(0), ConfigError, "num_particles"),
        (lambda: SMC(2, -1), ConfigError, "num_steps"),
        (lambda: SMC(2, resampler="magic"), ConfigError, "magic"),
        (lambda: Rejection(0), ConfigError, "bound"),
        (lambda: SMC2(given_model, 0, 1, 1), ConfigError, "num_parameters"),
        (lambda: PMMH(given_model, 1, resampler="magic"), ConfigError, "magic"),
        (lambda: run(SMC(2), coin()), ConfigError, "generator"),
        (lambda: run(SMC(2), coin(), layer="gpu"), ConfigError, "layer"),
        (lambda: run(SMC(2), coin(), layer="torch", generator=generator), ConfigError, "tensors take Steps"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert validate(Importance(2), coin(), max_outcomes=50).equal
    assert BASE.of(list_result()) == (([1], F(1, 2)), ([1], F(1, 2)))
