"""Sums: every prompt once, mistakes that are mistakes, and demonstrations right as often as they should be."""

import statistics

import pytest

from kullback.core.errors import ConfigError
from kullback.data.arithmetic import sum_demonstrations, sum_examples


def value(prompt):
    a, b = prompt.removesuffix("=").split("+")
    return int(a) + int(b)


def test_each_sum_comes_once_with_its_answer_and_a_mistake():
    examples = sum_examples(7)
    assert len({example.prompt for example in examples}) == 49
    for example in examples:
        assert example.chosen == example.others["answer"] == str(value(example.prompt))
        assert example.rejected != example.chosen
        assert int(example.rejected) >= 0
    assert examples == sum_examples(7)
    assert examples != sum_examples(7, seed=1)
    with pytest.raises(ConfigError, match="limit"):
        sum_examples(1)


def test_demonstrations_are_right_half_the_time_and_unevenly():
    demonstrations = sum_demonstrations(10, copies=50)
    right = [int(answer) == value(prompt) for prompt, answer in demonstrations]
    shares = [statistics.fmean(right[i : i + 50]) for i in range(0, len(right), 50)]
    assert abs(statistics.fmean(right) - 0.5) < 6 * (1 / 12 + 1 / 4 / 50) ** 0.5 / 10
    assert statistics.stdev(shares) > 0.2, "prompts differ in how often they are answered rightly"
