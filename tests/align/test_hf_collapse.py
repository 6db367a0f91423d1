"""The monitor of collapse: in a Trainer, on a policy that is the posterior of a reward, and on a collapsed one."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from kullback.align._hf_collapse import CollapseMonitor
from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.models.small import small_llama

PROMPTS = [[1, 2], [3], [4, 5, 1]]


@pytest.fixture
def model():
    return small_llama(8, hidden=16, layers=1, heads=2, length=32, generator=generator(0, "m")).eval()


def test_it_is_called_at_evaluations(model, tmp_path):
    monitor = CollapseMonitor(copy.deepcopy(model), PROMPTS, lambda x: x.lengths.double(), group=4, length=6)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, use_cpu=True,
        report_to="none", eval_strategy="steps", eval_steps=2, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = torch.randint(8, (16, 6), generator=generator(1, "rows"))
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[monitor]).train()
    assert [entry["step"] for entry in monitor.history] == [2.0, 4.0]
    assert monitor.history[1]["divergence"] > 0.0
    assert monitor.history[1]["reward"] == 6.0


def test_it_reads_the_temperature_of_a_posterior(model):
    """One token of answer: logits raised by r / b are the posterior of r at b."""
    policy, reward = copy.deepcopy(model), torch.randn(8, generator=generator(2, "r"))
    forward = policy.forward

    def tilted(*args, **given):
        out = forward(*args, **given)
        out["logits"] = out["logits"] + reward / 0.4
        return out

    def rewards(rollouts):
        return reward[rollouts.completion_ids[:, 0]]

    monitor = CollapseMonitor(model, PROMPTS, rewards, group=40, length=1)
    policy.forward = tilted
    found = monitor.report(policy, generator(3, "draw"))
    policy.forward = forward
    assert found["beta"] == pytest.approx(0.4, abs=1e-4)
    assert found["fit"] == pytest.approx(1.0, abs=1e-5)
    still = monitor.report(model, generator(3, "draw"))
    assert still["divergence"] == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    sunk = monitor.report(model, generator(4, "draw"))
    assert sunk["single"] == 1.0 > found["single"]
    assert sunk["entropy"] < 0.01 < found["entropy"]


def test_bad_input(model):
    with pytest.raises(ConfigError, match="two answers"):
        CollapseMonitor(model, PROMPTS, lambda x: x.lengths, group=1)
