"""The align job from the inside: every method runs, learns, resumes in the same bits, and says what is wrong."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.core.errors import ConfigError, DataError, RewardError, ShapeError
from kullback.jobs import align as job
from kullback.jobs._align_methods import method_names
from kullback.jobs._align_rewards import EqualRewards
from kullback.jobs._training import LoraSettings

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
from _adding import align_config, make_adder, with_training
from _server import Server


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    return make_adder(tmp_path_factory.mktemp("adder"))


def events(run, part="aligned-0", kind="evaluation"):
    lines = (run / "parts" / part / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("method", method_names())
def test_every_method_runs_and_leaves_all_that_a_job_leaves(method, adder, tmp_path):
    run = job.run(with_training(align_config(adder, method=method), steps=10), tmp_path / "run")
    assert len(events(run.path, kind="step")) == 1, "a log is written every ten steps"
    report = json.loads((run.path / "report.json").read_text())
    before, after = report["rows"]
    assert before["policy"] == "before"
    assert after["policy"] == f"after {method}"
    if method not in ("salsa", "kdrl"):
        assert before["divergence"] == pytest.approx(0.0, abs=1e-9), "the reference is the model as it starts out"
    assert after["divergence"] > 1e-6, "it has moved"
    assert 0.0 <= before["pass_1"] <= before["pass_k"] <= 1.0
    assert before["pass_1_low"] <= before["pass_1"] <= before["pass_1_high"]
    assert all(math.isfinite(value) for key, value in after.items() if isinstance(value, float))
    for name in report["written"]:
        assert (run.path / name).exists(), name
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    assert model(**tokenizer("1+2=", return_tensors="pt")).logits.isfinite().all()
    sample = json.loads((run.path / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "before", "after", "reward_before", "reward_after"} <= sample.keys()


def test_rewards_are_learnt_and_the_penalty_holds_the_policy_back(adder, tmp_path):
    config = with_training(align_config(adder), steps=40, batch=10, learning_rate=2e-3, evaluate_every=40)
    config = replace(config, data=replace(config.data, validation=config.data.train, validation_prompts=25))
    free = events(job.run(config, tmp_path / "free").path)
    held = replace(config, method=replace(config.method, options={"beta": 0.5, "penalty": "k2"}))
    held = events(job.run(held, tmp_path / "held").path)
    assert free[-1]["reward"] > free[0]["reward"] + 0.2
    assert held[-1]["divergence"] < 0.7 * free[-1]["divergence"]


def test_pairs_are_learnt_from_log_two_on(adder, tmp_path):
    config = with_training(align_config(adder, method="dpo"), steps=40, batch=10, learning_rate=3e-3, evaluate_every=40)
    config = replace(config, data=replace(config.data, validation=config.data.train))
    first, last = events(job.run(config, tmp_path / "run").path)
    assert first["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert last["loss"] < 0.5
    assert last["accuracy"] > 0.8


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_accumulation_changes_nothing(method, adder, tmp_path):
    whole = job.run(align_config(adder, method=method), tmp_path / "whole")
    split = job.run(with_training(align_config(adder, method=method), accumulate=2), tmp_path / "split")
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(tensor, weights(split.path)[name], rtol=1e-3, atol=2e-5)


# Ways of a method that remember something of their own; a step's completions serve for four, so that a checkpoint
# falls in between.
MODES = {
    "ppo of several epochs": ("ppo", {"epochs": 2, "mini_batches": 2}),
    "ppo with a second model": ("ppo", {"critic": "model", "beta": 0.0}),
    "salsa on ppo": ("salsa", {"algorithm": "ppo", "critic": "shared"}),
    "offline f-dpg": ("f-dpg", {"proposal": "offline", "every": 1, "defence": 0.25}),
    "nash-md": ("nash-mp", {"mode": "nash-md"}),
    "dph-rl in mini-batches": ("dph-rl", {"epochs": 2, "mini_batches": 2, "clamp": 10.0}),
    "kdrl, whole laws": ("kdrl", {"divergence": "exact", "credit": "return_to_go", "keep": "response", "epochs": 2}),
    "kdrl, top tokens": ("kdrl", {"divergence": "top-k", "top_k": 4, "beta": 0.3, "schedule": "linear", "delta": 0.1}),
}
SAME = ("sft", "ipo", "dr-grpo", "salsa")  # which another method stands for


@pytest.mark.parametrize("method", [*(name for name in method_names() if name not in SAME), *MODES])
def test_an_interrupted_job_resumes_in_the_same_bits(method, adder, tmp_path):
    name, options = MODES.get(method, (method, {}))
    config = align_config(adder, method=name, options=options)
    straight = job.run(config, tmp_path / "straight")

    class Stop(Exception):
        pass

    def killer(event):
        if event["kind"] == "progress" and event["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        job.run(config, tmp_path / "killed", listen=killer)
    resumed = job.resume(tmp_path / "killed")
    for name, tensor in weights(straight.path).items():
        assert torch.equal(tensor, weights(resumed.path)[name]), name
    keys = ("step", "reward", "divergence", "entropy")
    found, expected = ([{k: e[k] for k in keys} for e in events(run.path)] for run in (resumed, straight))
    assert found == expected


@pytest.mark.parametrize("method", ["grpo", "f-dpo", "ppo", "nash-md", "offline f-dpg"])
def test_adapters_need_no_second_model(method, adder, tmp_path):
    name, options = MODES.get(method, (method, {"beta": 0.1}))
    config = align_config(adder, method=name, options=options, lora=LoraSettings(rank=2))
    run = job.run(with_training(config, learning_rate=1e-2), tmp_path / "run")
    first, *_, last = events(run.path)
    assert first["divergence"] == pytest.approx(0.0, abs=1e-9)
    assert last["divergence"] > 1e-6
    assert set(weights(run.path)) == set(load_file(adder / "model" / "model.safetensors")), "adapters are merged in"


def test_a_critic_is_not_a_part_of_the_model_that_is_kept(adder, tmp_path):
    run = job.run(align_config(adder, method="ppo", options={"critic": "model"}), tmp_path / "run")
    parts = run.path / "parts" / "aligned-0"
    for folder in (run.path / "model", *(parts / "ckpt").glob("step-*")):
        assert set(load_file(folder / "model.safetensors")) == set(load_file(adder / "model" / "model.safetensors"))
    config = align_config(adder, method="ppo", options={"critic": "model"}, lora=LoraSettings(rank=2))
    with pytest.raises(ConfigError, match="no adapters"):
        job.run(config, tmp_path / "adapted")


def test_salsa_with_one_parent_alone_is_the_method_it_stands_on(adder, tmp_path):
    """alpha = 1, step for step; the soup of two is another reference."""
    both, found = (str(adder / "model"), str(adder / "moved")), []
    for method, shares, options in (
        ("salsa", (1.0, 0.0), {"algorithm": "ppo"}), ("ppo", (), {}), ("salsa", (), {"algorithm": "ppo"}),
    ):  # fmt: skip
        reference = both if method == "salsa" else both[:1]
        config = align_config(adder, method=method, options=options, reference=reference, reference_weights=shares)
        found.append(weights(job.run(config, tmp_path / str(len(found))).path))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert any(not torch.equal(tensor, found[1][name]) for name, tensor in found[2].items())


def test_several_references_are_averaged(adder, tmp_path):
    both = (str(adder / "model"), str(adder / "moved"))
    alone = events(job.run(align_config(adder, method="dpo", reference=both[1:]), tmp_path / "alone").path)
    soup = events(job.run(align_config(adder, method="dpo", reference=both), tmp_path / "soup").path)
    config = align_config(adder, method="dpo", reference=both, reference_weights=(0.9, 0.1))
    near = events(job.run(config, tmp_path / "near").path)
    assert 0.0 < near[0]["divergence"] < soup[0]["divergence"] < alone[0]["divergence"]


def test_chats_and_prompts_of_any_length(adder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(adder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    AutoModelForCausalLM.from_pretrained(adder / "model").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [
        {"prompt": [{"role": "user", "content": f"{'1+' * i}1"}], "chosen": str(i + 1), "rejected": str(i)}
        for i in range(10)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = align_config(adder, method="dpo", model=str(tmp_path / "model"), reward=job.RewardConfig())
    chats = str(tmp_path / "chats.jsonl")
    config = replace(config, data=replace(config.data, train=chats, validation=chats, prompt_length=6))
    found = events(job.run(config, tmp_path / "run").path)
    assert "reward" not in found[0], "there is none"
    assert found[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert found[-1]["divergence"] > 1e-6, "cut to six tokens most of these prompts are alike, but it has moved"


REWARDS = '''
import time


def raises(prompts, completions):
    raise KeyError("no such thing")


def hangs(prompts, completions):
    time.sleep(60)


def nothing(prompts, completions):
    return [float("nan")] * len(prompts)


def few(prompts, completions):
    return [1.0]


def constant(prompts, completions):
    return [1.0] * len(prompts)
'''


@pytest.mark.parametrize(
    ("reward", "words"), [("raises", "KeyError"), ("hangs", "took over"), ("nothing", "nan"), ("few", "1,")]
)
def test_a_reward_that_fails_ends_the_job_or_gives_nothing(reward, words, adder, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    reward = job.RewardConfig(name=f"{tmp_path / 'rewards.py'}:{reward}", seconds=0.2)
    config = with_training(align_config(adder, reward=reward), steps=2)
    with pytest.raises(RewardError, match=words):
        job.run(config, tmp_path / "stopped")
    told = []
    run = job.run(replace(config, reward=replace(reward, on_error="zero")), tmp_path / "run", listen=told.append)
    assert any(words in event["text"] for event in told if event["kind"] == "note")
    assert len(events(run.path, kind="reward_error")) >= 2
    assert events(run.path)[-1]["reward"] == 0.0


def test_a_reward_that_fails_late_loses_nothing(adder, tmp_path):
    (tmp_path / "rewards.py").write_text(BREAKS.format(mended=str(tmp_path / "mended")))
    reward = job.RewardConfig(name=f"{tmp_path / 'rewards.py'}:breaks")
    config = with_training(align_config(adder, reward=reward), steps=6, save_every=2, evaluate_every=6)
    with pytest.raises(RewardError, match="raised OSError: no answer; .* kept up to step 4, --resume goes on"):
        job.run(config, tmp_path / "run")
    (tmp_path / "mended").touch()
    whole = job.run(config, tmp_path / "whole")
    mended = job.resume(tmp_path / "run")
    assert all(torch.equal(tensor, weights(whole.path)[name]) for name, tensor in weights(mended.path).items())


BREAKS = """
from pathlib import Path

calls = []


def breaks(prompts, completions):
    calls.append(len(prompts))
    if len(calls) == 6 and not Path({mended!r}).exists():
        raise OSError("no answer")
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("kept", ["balanced", "nonzero"])
def test_groups_of_one_difficulty(kept, adder, tmp_path):
    sampling = job.SamplingConfig(group=4, validation=4, filter=kept, most_draws=20)
    run = job.run(with_training(align_config(adder, sampling=sampling), steps=10), tmp_path / "run")
    (step,) = events(run.path, kind="step")
    assert 0.0 < step["metric/reward"] < 1.0, "no group was all right or all wrong"
    assert events(run.path)[-1]["divergence"] > 1e-6


def test_tracked_pass_rates_are_resumed_in_the_same_bits(adder, tmp_path):
    sampling = job.SamplingConfig(group=4, validation=4, filter="balanced", most_draws=20, tracked=True)
    config = with_training(align_config(adder, sampling=sampling), steps=8, evaluate_every=8)

    def killer(event):
        if event["kind"] == "progress" and event["step"] == 5:
            raise KeyboardInterrupt

    straight = job.run(config, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        job.run(config, tmp_path / "killed", listen=killer)
    resumed = job.resume(tmp_path / "killed")
    assert all(torch.equal(tensor, weights(resumed.path)[name]) for name, tensor in weights(straight.path).items())
    untracked = replace(config, sampling=replace(sampling, tracked=False))
    other = weights(job.run(untracked, tmp_path / "untracked").path)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights(straight.path).items())


@pytest.mark.parametrize("method", ["dph-rl", "kdrl", "ppo of several epochs", "offline f-dpg", "nash-md"])
def test_no_method_minds_a_reward_that_comes_and_goes(method, adder, tmp_path):
    """It raises, hangs, is NaN, or the same for all, one call after the other: the run goes on and stays sound."""
    (tmp_path / "rewards.py").write_text(REWARDS + TURNS)
    name, options = MODES.get(method, (method, {}))
    reward = job.RewardConfig(name=f"{tmp_path / 'rewards.py'}:turns", seconds=0.05, on_error="zero")
    config = with_training(align_config(adder, method=name, options=options, reward=reward), steps=6, evaluate_every=6)
    run = job.run(config, tmp_path / "run")
    assert events(run.path, kind="reward_error")
    assert all(tensor.isfinite().all() for tensor in weights(run.path).values())


TURNS = """

class Turns:
    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions):
        self.calls += 1
        return (raises, hangs, nothing, constant)[self.calls % 4](prompts, completions)


turns = Turns()
"""


def test_constant_rewards_teach_nothing_and_hurt_nothing(adder, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    reward = job.RewardConfig(name=f"{tmp_path / 'rewards.py'}:constant")
    told = []
    run = job.run(with_training(align_config(adder, reward=reward), steps=12), tmp_path / "run", listen=told.append)
    notes = [event["text"] for event in told if event["kind"] == "note"]
    assert len(notes) == len(events(run.path, kind="reward_equal")) == 1
    assert "the reward 1, which tells none from another" in notes[0]
    for name, tensor in load_file(adder / "model" / "model.safetensors").items():
        assert torch.equal(tensor, weights(run.path)[name]), name


def test_equal_rewards_are_told_once():
    told, same, other = [], torch.ones(4), torch.arange(4.0)
    watch = EqualRewards(told.append)
    for rewards in [same] * 6 + [other] + [same] * 6:
        watch(rewards)
    assert len(told) == 1


@pytest.fixture
def server(adder):
    found = Server(AutoModelForCausalLM.from_pretrained(adder / "model").eval())
    yield found
    found.close()


def test_a_server_draws_the_completions(adder, server, tmp_path):
    config = align_config(adder, sampling=job.SamplingConfig(group=4, validation=4, server=server.url))
    run = job.run(config, tmp_path / "run")
    assert server.requests == config.training.steps
    assert events(run.path)[-1]["divergence"] > 1e-6
    first = server.requests
    again = job.run(config, tmp_path / "again")
    assert server.requests == 2 * first
    assert all(torch.equal(tensor, weights(again.path)[name]) for name, tensor in weights(run.path).items())


@pytest.mark.parametrize(("dialect", "words"), [("text", "by their text"), ("nothing", "of every token")])
def test_a_server_that_does_not_say_what_it_drew(dialect, words, adder, tmp_path):
    server = Server(AutoModelForCausalLM.from_pretrained(adder / "model").eval(), dialect)
    config = align_config(adder, sampling=job.SamplingConfig(group=4, validation=4, server=server.url))
    with pytest.raises(DataError, match=words):
        job.run(config, tmp_path / "run")
    server.close()


def test_a_judge_of_pairs(adder, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def longer(prompts, firsts, seconds):\n"
        "    return [0.5 + 0.5 * (len(a) > len(b)) - 0.5 * (len(a) < len(b)) for a, b in zip(firsts, seconds)]\n"
    )
    reward = job.RewardConfig(name=f"{tmp_path / 'judge.py'}:longer", pairwise=True)
    config = align_config(adder, method="nash-mp", options={"preferences": "given", "beta": 0.01}, reward=reward)
    found = events(job.run(with_training(config, steps=20, learning_rate=3e-3), tmp_path / "run").path)
    assert found[0]["reward"] == pytest.approx(0.5, abs=1e-6), "on its own completions a policy wins half the time"
    assert found[-1]["tokens"] > found[0]["tokens"]
    (tmp_path / "judge.py").write_text("def sure(prompts, firsts, seconds):\n    return [2.0] * len(firsts)\n")
    wrong = job.RewardConfig(name=f"{tmp_path / 'judge.py'}:sure", pairwise=True, on_error="zero")
    run = job.run(with_training(replace(config, reward=wrong), steps=2), tmp_path / "wrong")
    assert "a chance in [0, 1]" in events(run.path, kind="reward_error")[0]["text"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "gpro"}, ConfigError, "did you mean grpo"),
        ({"options": {"betta": 1.0}}, ConfigError, "did you mean beta"),
        ({"options": {"beta": "much"}}, ConfigError, "beta is like 0.0, got 'much'"),
        ({"method": "f-dpo", "options": {"divergence": "total_variation"}}, ConfigError, "total_variation"),
        ({"reward": job.RewardConfig()}, ConfigError, "none is named"),
        ({"method": "salsa", "reference": ("one",)}, ConfigError, "two or more"),
        ({"method": "kdrl", "reference": ()}, ConfigError, "teacher"),
        ({"method": "kdrl", "options": {"divergence": "whole"}}, ConfigError, "sampled, exact or top-k"),
        ({"method": "kdrl", "options": {"divergence": "top-k"}}, ConfigError, "top_k is the number"),
        ({"method": "kdrl", "options": {"divergence": "exact", "kind": "k3"}}, ConfigError, "leave them out"),
        ({"reference_weights": (1.0,)}, ConfigError, "one a reference"),
        ({"reward": job.RewardConfig(name="exactly")}, ConfigError, "there is no reward"),
        ({"reward": job.RewardConfig(name="regex")}, ConfigError, "reward.pattern"),
        ({"reward": job.RewardConfig(name="exact", pairwise=True)}, ConfigError, "judge of your own"),
        ({"reward": job.RewardConfig(name="exact", remembered=9)}, ConfigError, "of a judge of pairs"),
        ({"reward": job.RewardConfig(name="exact", remembered=-1)}, ConfigError, "0 for none, got -1"),
        ({"reward": job.RewardConfig(name="nowhere.py:f")}, DataError, "nowhere.py"),
        ({"sampling": job.SamplingConfig(group=1)}, ConfigError, "sampling.group"),
        ({"method": "nash-mp", "options": {"mode": "nash-md"}, "sampling": job.SamplingConfig(group=3)}, ConfigError,
         "needs 4"),
        ({"method": "nash-mp", "options": {"mode": "nash-md"}, "sampling": job.SamplingConfig(filter="nonzero")},
         ConfigError, "another policy's"),
        ({"method": "f-dpg", "options": {"proposal": "offline"}, "sampling": job.SamplingConfig(server="http://x")},
         ConfigError, "proposal offline"),
        ({"method": "f-dpg", "options": {"every": 3}}, ConfigError, "of proposal offline"),
        ({"method": "salsa", "options": {"epochs": 2}}, ConfigError, "algorithm ppo"),
        ({"method": "ppo", "options": {"epochs": 0}}, ConfigError, "epochs"),
        ({"sampling": job.SamplingConfig(server="http://x", temperature=0.5)}, ConfigError, "temperature 1"),
        ({"method": "dpo", "sampling": job.SamplingConfig(server="http://x")}, ConfigError, "sampling.server"),
        ({"sampling": job.SamplingConfig(filter="heavy")}, ConfigError, "heavy"),
        ({"sampling": job.SamplingConfig(tracked=True)}, ConfigError, "name a filter"),
        ({"sampling": job.SamplingConfig(filter="balanced", filter_threshold=0.7)}, ConfigError, "thresholds"),
        ({"method": "dpo", "sampling": job.SamplingConfig(filter="balanced")}, ConfigError, "sampling.filter"),
        ({"model": ""}, ConfigError, "no model"),
        ({"data": job.ExampleConfig()}, ConfigError, "no data"),
        ({"data": job.ExampleConfig(train="gone.jsonl")}, DataError, "gone.jsonl does not exist"),
        ({"reference": ("gone",)}, DataError, "gone is not a directory"),
        ({"seeds": ()}, ConfigError, "seeds"),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(change, error, words, adder, tmp_path):
    with pytest.raises(error, match=words):
        job.run(align_config(adder, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_references_of_another_shape_or_tokenizer(adder, tmp_path):
    from kullback.core.rng import generator
    from kullback.data.tokenizer import train_byte_bpe
    from kullback.models.small import small_llama

    sizes = {"hidden": 16, "layers": 1, "heads": 2, "length": 32}
    small_llama(257, **sizes, generator=generator(0)).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(adder / "model").save_pretrained(tmp_path / "other")
    both = (str(adder / "model"), str(tmp_path / "other"))
    with pytest.raises(ShapeError, match="average"):
        job.run(align_config(adder, reference=both), tmp_path / "run")
    train_byte_bpe(["abab"] * 9, 258).save_pretrained(tmp_path / "other")
    with pytest.raises(ShapeError, match="give a model with the reference's tokenizer"):
        job.run(align_config(adder, reference=both[1:]), tmp_path / "run")
