"""Rewards: what each verifies, and the one sentence that a reward gone wrong gives."""

import math
import signal
import sys
import threading
import time

import pytest
import torch

from kullback.align.rewards import (
    ArithmeticReward,
    ExactReward,
    ModelReward,
    PatternReward,
    arithmetic_value,
    constant_groups,
    load_reward,
    score,
)
from kullback.core.errors import ConfigError, DataError, RewardError
from kullback.core.rng import generator as stream
from kullback.models.small import small_llama


def lengths(prompts, completions):
    return [len(text) for text in completions]


def test_a_function_is_called_with_the_columns_it_names():
    seen = {}

    def all_columns(prompts, completions, **columns):
        seen.update(columns)
        return torch.arange(len(prompts))

    assert score(lengths, ["a", "b"], ["x", "yy"], answer=["1", "2"]).tolist() == [1.0, 2.0]
    assert score(all_columns, ["a", "b"], ["x", "yy"], answer=["1", "2"]).tolist() == [0.0, 1.0]
    assert seen == {"answer": ["1", "2"]}
    assert score(lambda prompts, completions: [True, False], ["a", "b"], ["x", "y"]).tolist() == [1.0, 0.0]


def two_lines():
    raise OSError("down\nfor a while\n")


def hangs(prompts, completions):
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # a reward that swallows exceptions is interrupted all the same
            continue


def catches_all(prompts, completions):
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass
        finally:
            time.sleep(0.001)


def answers_late(prompts, completions):
    try:
        time.sleep(5.0)
    except BaseException:
        return [1.0, 1.0]


@pytest.mark.parametrize("reward", [catches_all, answers_late])
def test_a_reward_that_catches_everything_ends_too(reward):
    begin, traced = time.monotonic(), sys.gettrace()
    with pytest.raises(RewardError, match="took over 0.1 s"):
        score(reward, ["a", "b"], ["x", "y"], seconds=0.1)
    assert time.monotonic() - begin < 3.0
    assert sys.gettrace() is traced


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (hangs, "hangs took over 0.1 s for 2 completions"),
        (lambda prompts, completions: 1 / 0, "raised ZeroDivisionError"),
        (lambda prompts, completions: sys.exit(3), "raised SystemExit: 3"),
        (lambda prompts, completions: two_lines(), "raised OSError: down for a while"),
        (lambda prompts, completions: [1.0], r"returned \(1,\) values for 2"),
        (lambda prompts, completions: torch.ones(2, 1), r"returned \(2, 1\) values for 2"),
        (lambda prompts, completions: [1.0, math.nan], "nan for completion 1 and 1 of 2"),
        (lambda prompts, completions: [math.inf, math.nan], "inf for completion 0 and 2 of 2"),
        (lambda prompts, completions: None, "number a completion"),
        (lambda prompts, completions: ["good", "bad"], "number a completion"),
        (lambda prompts: [1.0, 1.0], "raised TypeError"),
    ],
)
@pytest.mark.parametrize("inside", ["main thread", "thread"])
def test_one_sentence_for_a_reward_gone_wrong(reward, message, inside):
    found = []

    def call():
        with pytest.raises(RewardError, match=message) as error:
            score(reward, ["a", "b"], ["x", "y"], seconds=0.1)
        found.append(error.value)

    if inside == "main thread":
        call()
    elif reward is not hangs:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(10)
    else:
        slow = threading.Thread(target=lambda: found.append(late(lambda prompts, completions: time.sleep(0.5))))
        slow.start()
        slow.join(10)
    assert len(found) == 1
    assert "\n" not in str(found[0])


def late(reward):
    try:
        score(reward, ["a"], ["b"], seconds=0.05)
    except RewardError as error:
        return error


def test_the_alarm_is_put_back():
    before = signal.getsignal(signal.SIGALRM)
    left, _ = signal.setitimer(signal.ITIMER_REAL, 250.0)
    score(lengths, ["a"], ["b"], seconds=5.0)
    late(hangs)
    assert signal.getsignal(signal.SIGALRM) == before
    inside, _ = signal.setitimer(signal.ITIMER_REAL, left)
    assert 200.0 < inside <= 250.0
    assert score(lengths, ["a"], ["b"], seconds=None).tolist() == [1.0]
    with pytest.raises(ConfigError, match="time limit"):
        score(lengths, ["a"], ["b"], seconds=0.0)


def test_functions_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def good(prompts, completions):\n    return [2.0] * len(prompts)\n\nnumber = 3\nclass Kind: ...\n")
    assert score(load_reward(f"{file}:good"), ["a"], ["b"]).tolist() == [2.0]
    assert load_reward("math:floor") is math.floor
    for place, error, message in (
        ("good", ConfigError, "named"),
        (f"{file}:", ConfigError, "named"),
        (f"{file}:bad", DataError, "AttributeError"),
        (f"{file}:number", DataError, "int"),
        (f"{file}:Kind", DataError, "class"),
        (f"{tmp_path}/none.py:good", DataError, "no file"),
        ("kullback.nothing:good", DataError, "ModuleNotFoundError"),
    ):
        with pytest.raises(error, match=message):
            load_reward(place)
    file.write_text("raise SystemError('broken')")
    with pytest.raises(DataError, match="broken"):
        load_reward(f"{file}:good")


def test_patterns_and_answers():
    texts = ["<a>1</a>", "<a>\n2 </a> x", "nothing"]
    assert PatternReward(r"<a>.*</a>")(texts, texts) == [1.0, 1.0, 0.0]
    assert PatternReward(r"<a>.*</a>", whole=True)(texts, texts) == [1.0, 0.0, 0.0]
    assert ExactReward(r"<a>(.*?)</a>")(texts, texts, answer=["1", 2, "3"]) == [1.0, 1.0, 0.0]
    assert ExactReward()(texts, [" 1 ", "2.0", ""], answer=[1, 2, ""]) == [1.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match="regular expression"):
        PatternReward("(")
    with pytest.raises(ConfigError, match="group"):
        ExactReward("a")


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1+2*3", 7), ("-(4-10)", 6), ("7//2", 3), ("-7 % 5", 3), ("8/4", 2), ("((3))", 3), ("+5--5", 10)],
)
def test_expressions(expression, value):
    assert arithmetic_value(expression) == value
    wanted = [f"What is {expression}?"] * 2
    assert ArithmeticReward()(wanted, [f"it is {value}, not 99", "99"]) == [1.0, 0.0]
    assert ArithmeticReward(last=True)(wanted, [f"99? {value}", "none"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "expression",
    ["1/0", "7/2", "2**9", "", "x+1", "__import__('os')", "1.5+1", "(" * 300 + "1" + ")" * 300, "9" * 61, "1+" * 600,
     "9" * 40 + "*" + "9" * 40, "10 ** 10 ** 10", "1,2", "True", "²"],
)  # fmt: skip
def test_nothing_else_is_evaluated(expression):
    with pytest.raises(DataError, match="integer expression"):
        arithmetic_value(expression)


def test_an_expression_among_other_numbers():
    prompts = ["In 2024 - long ago - what was 7*6?", "room 12: 3+4=", "(1/0) or 5"]
    assert ArithmeticReward()(prompts, ["42", "7", "5"]) == [1.0, 1.0, 1.0]


def test_a_prompt_without_an_expression_is_the_datas_fault():
    with pytest.raises(DataError, match="no integer expression"):
        score(ArithmeticReward(), ["what?"], ["1"])
    assert ArithmeticReward()(["1+1"], ["9" * 100]) == [0.0]


def test_a_reward_model_from_its_directory(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from kullback.data.tokenizer import train_byte_bpe

    tokenizer = train_byte_bpe(["some words that are rewarded, and some that are not"] * 20, 280)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1, max_position_embeddings=32,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    reward = ModelReward(tmp_path / "one", batch=2, length=32)
    prompts, texts = ["some ", "that ", "a"], ["words", "are rewarded and not", ""]
    found = score(reward, prompts, texts)
    for row in range(3):
        ids = tokenizer(prompts[row] + texts[row], return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.allclose(model(ids).logits[0], found[row], atol=1e-5)
    long = ModelReward(tmp_path / "one")(["some " * 100], ["words"])
    assert torch.equal(long, reward(["some " * 100], ["words"])), "what the model has no positions for is cut"
    model.config.num_labels = 2
    BertForSequenceClassification(model.config).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(DataError, match="one label"):
        ModelReward(tmp_path / "two")
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "length": 32}
    untrained = small_llama(len(tokenizer), **sizes, generator=stream(0, "policy"))
    untrained.config.num_labels = 1
    untrained.save_pretrained(tmp_path / "untrained")
    tokenizer.save_pretrained(tmp_path / "untrained")
    with pytest.raises(DataError, match="no weights for score.weight, which would be drawn at random"):
        ModelReward(tmp_path / "untrained")
    with pytest.raises(DataError, match="no sequence classifier"):
        ModelReward(tmp_path)


def test_constant_groups():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0 + 1e-3]])
    assert constant_groups(rewards) == 1
    assert constant_groups(rewards, tolerance=0.01) == 2
    with pytest.raises(ConfigError):
        constant_groups(rewards, tolerance=-1.0)


def test_a_module_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "of_this_folder.py").write_text("def reward(prompts, completions):\n    return [2.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    before = list(sys.path)
    assert score(load_reward("of_this_folder:reward"), ["a"], ["b"]).tolist() == [2.0]
    assert sys.path == before
