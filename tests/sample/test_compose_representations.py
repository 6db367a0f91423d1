"""Representations: monad and morphism laws on random programs, and what carries them."""

import functools
import math
import sys
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings

from kullback.sample.compose import (
    Enum,
    Importance,
    Population,
    Represented,
    Sam,
    Suspended,
    Traced,
    Weighted,
    bernoulli,
    bind,
    factor,
    meaning,
    prim,
    program,
    run,
    sample,
)  # fmt: skip
from kullback.sample.compose.programs import Bound, Ret

sys.path.insert(0, str(Path(__file__).parent))
from _programs import (
    coin_flip,
    count,
    geometric,
    hmm,
    hmm_measure,
    integral,
    measure,
    planted,
    quiet,
    trees,
)

BASE = Enum(6)
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
