"""Judges of pairs that are remembered: who is asked about what, over batches, orders and evictions."""

import math

import pytest
import torch

from kullback.align.judges import RememberedJudge
from kullback.align.nash_policy import judged
from kullback.core.errors import ConfigError, RewardError
from kullback.core.rng import generator as stream

NAMES = [f"text {number}" for number in range(7)]


class Counted:
    """Chances of its own for every prompt, text and order, and the pairs that it was asked about."""

    def __init__(self, symmetric=False):
        self.calls, self.really = [], symmetric

    def __call__(self, prompts, firsts, seconds):
        pairs = list(zip(prompts, firsts, seconds, strict=True))
        self.calls.append(pairs)
        return [self.chance(*pair) for pair in pairs]

    def chance(self, prompt, first, second):
        if self.really and second < first:
            return 1.0 - self.chance(prompt, second, first)
        key = sum(7 ** (place % 5) * ord(letter) for place, letter in enumerate(f"{prompt}|{first}|{second}"))
        return key % 1009 / 1009


def batches(count, *, prompts=3, group=5):
    """Prompts and completions of several batches, which share many pairs."""
    draws = stream(11)
    for _ in range(count):
        texts = torch.randint(len(NAMES), (prompts * group,), generator=draws).tolist()
        yield [f"prompt {place // group}" for place in range(prompts * group)], [NAMES[text] for text in texts]


@pytest.mark.parametrize("size", [65536, 40, 3, 0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_win_rates_are_the_same_however_much_is_remembered(size, symmetric):
    judge, plain = Counted(symmetric), Counted(symmetric)
    remembering = judged(judge, remembered=size, symmetric=symmetric)
    for prompts, completions in batches(12):
        found = remembering(prompts, completions)
        torch.testing.assert_close(found, judged(plain, remembered=0)(prompts, completions), rtol=0, atol=1e-6)
        asked = judge.calls[-1] if judge.calls else []
        assert len(asked) == len(set(asked))


def test_no_pair_is_asked_about_twice_over_batches():
    judge = Counted()
    reward = judged(judge)
    for prompts, completions in batches(30):
        reward(prompts, completions)
    asked = [pair for call in judge.calls for pair in call]
    assert len(asked) == len(set(asked)) <= 3 * 7 * 6
    forgetful = Counted()
    for prompts, completions in batches(30):
        judged(forgetful)(prompts, completions)
    assert sum(map(len, forgetful.calls)) > 5 * len(asked)
    before = len(judge.calls)
    for prompts, completions in batches(30):
        reward(prompts, completions)
    assert len(judge.calls) == before, "all is known, and the judge not called at all"


def test_a_judge_declared_symmetric_is_asked_in_one_order():
    judge = Counted(symmetric=True)
    judge.symmetric = True
    reward = judged(judge)
    for prompts, completions in batches(30):
        reward(prompts, completions)
    asked = [pair for call in judge.calls for pair in call]
    assert len(asked) == len({(prompt, *sorted(pair)) for prompt, *pair in asked}) <= 3 * 7 * 6 / 2
    assert not RememberedJudge(judge, symmetric=False).symmetric
    both = RememberedJudge(judge)
    there, back = both(["p", "p"], ["b", "a"], ["a", "b"])
    assert (both.asked, both.known) == (1, 1)
    assert there == pytest.approx(1.0 - back, abs=1e-12)
    assert there == pytest.approx(judge.chance("p", "b", "a"), abs=1e-6)


def test_a_judge_that_minds_the_order_is_asked_in_both():
    judge = RememberedJudge(lambda prompts, a, b: [0.7] * len(a))
    assert judge(["p", "p"], ["a", "b"], ["b", "a"]) == pytest.approx([0.7, 0.7])
    assert judge.asked == 2
    wrongly = RememberedJudge(judge.judge, symmetric=True)(["p", "p"], ["a", "b"], ["b", "a"])
    assert wrongly == pytest.approx([0.7, 0.3]), "listed wrong: one order for both where it is not declared"


class WithoutPrompt(RememberedJudge):
    """Listed wrong: texts alone are what is remembered by."""

    def __call__(self, prompts, firsts, seconds):
        known = self.__dict__.setdefault("known_texts", {})
        for row in zip(prompts, firsts, seconds, strict=True):
            if row[1:] not in known:
                known[row[1:]] = super().__call__(*([part] for part in row))[0]
        return [known[pair] for pair in zip(firsts, seconds, strict=True)]


def right_over_prompts(judge):
    asked = [("p", "a", "b"), ("q", "a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("p", "a", "b")]
    found = [judge([prompt], [first], [second])[0] for prompt, first, second in asked]
    return found == pytest.approx([Counted().chance(*pair) for pair in asked], abs=1e-6)


def test_the_prompt_and_the_order_are_part_of_what_is_remembered():
    assert right_over_prompts(RememberedJudge(Counted()))
    assert not right_over_prompts(WithoutPrompt(Counted()))
    assert not right_over_prompts(RememberedJudge(Counted(), symmetric=True)), "listed wrong: the order dropped"
    joined = RememberedJudge(Counted())
    assert joined(["a"], ["bc"], ["d"]) != joined(["ab"], ["c"], ["d"]), "texts do not run into each other"
    assert joined.asked == 2


def test_what_was_used_longest_ago_is_forgotten():
    judge = RememberedJudge(Counted(), size=2)
    judge(["p"] * 2, ["a", "b"], ["z", "z"])
    judge(["p"], ["a"], ["z"])  # used again
    judge(["p"], ["c"], ["z"])  # b goes
    assert len(judge) == 2
    asked = judge.asked
    judge(["p"], ["a"], ["z"])
    assert judge.asked == asked, "listed wrong: the first to come is the first to go"
    judge(["p"], ["b"], ["z"])
    assert judge.asked == asked + 1
    many = [str(number) for number in range(9)]
    assert judge(["p"] * 9, many, ["z"] * 9) == pytest.approx([Counted().chance("p", x, "z") for x in many], abs=1e-6)
    assert len(judge) == 2


def test_size_zero_remembers_nothing_beyond_a_call():
    draws = iter([[0.1], [0.9]])
    judge = RememberedJudge(lambda prompts, a, b: next(draws), size=0)
    assert judge(["p", "p"], ["a", "a"], ["b", "b"]) == pytest.approx([0.1, 0.1])
    assert judge(["p"], ["a"], ["b"]) == pytest.approx([0.9])
    assert len(judge) == 0


def test_nothing_wrong_is_remembered():
    answers = iter([[2.0], [math.nan], [0.5, 0.5], [0.25]])
    judge = RememberedJudge(lambda prompts, a, b: next(answers))
    for _ in range(3):
        with pytest.raises(RewardError, match=r"a chance in \[0, 1\] for each of 1 pairs"):
            judge(["p"], ["a"], ["b"])
        assert (len(judge), judge.asked) == (0, 0)
    assert judge(["p"], ["a"], ["b"]) == [0.25]
    assert judge(["p"], ["a"], ["b"]) == [0.25], "and what is right is"
    assert judge([], [], []) == []
    with pytest.raises(ConfigError, match="0 to remember none, got -1"):
        judged(judge, remembered=-1)
