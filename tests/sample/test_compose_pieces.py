"""Weights, laws, composition by hand, and what is refused."""

import math
import sys
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError
from kullback.sample.compose import (
    MH,
    PMMH,
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
    Unit,
    advance,
    apply_weight,
    bernoulli,
    categorical,
    collapse,
    compose,
    factor,
    finish,
    flatten,
    hoist,
    marginal,
    meaning,
    program,
    push_evidence,
    resample,
    run,
    sample,
    spawn,
    uniform_integer,
    validate,
    yield_,
)  # fmt: skip
from kullback.sample.compose.programs import Ret

sys.path.insert(0, str(Path(__file__).parent))
from _programs import (
    branching,
    coin,
    coin_flip,
    hmm,
    hmm_measure,
)

BASE = Enum(6)


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
        (lambda: SMC2(hmm, 0, 1, 1), ConfigError, "num_parameters"),
        (lambda: PMMH(hmm, 1, resampler="magic"), ConfigError, "magic"),
        (lambda: run(SMC(2), coin()), ConfigError, "generator"),
        (lambda: run(SMC(2), coin(), layer="gpu"), ConfigError, "layer"),
        (lambda: run(SMC(2), coin(), layer="torch", generator=generator), ConfigError, "tensors take Steps"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert validate(Importance(2), coin(), max_outcomes=50).equal
    assert BASE.of(list_result()) == (([1], F(1, 2)), ([1], F(1, 2)))
