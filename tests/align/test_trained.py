"""DPH-RL and filtered rollouts inside the room's Trainer, on a small model and a reward of one token."""

import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf import AlignTrainer, index_items
from kullback.align.difficulty import difficulty_filter
from kullback.align.difficulty_sampler import FilteredSource
from kullback.align.dph import Dph
from kullback.align.grpo import Grpo
from kullback.align.log_probs import completion_log_probs
from kullback.align.rehearsal import rehearse
from kullback.align.scored import ScoredRollouts
from kullback.core.rng import generator as stream
from kullback.models.small import small_llama

PROMPTS = [[1], [2, 3], [4, 5, 6], [7]]


def few(prompts, completions):
    """1 where the completion has a 3 in it."""
    return [float("3" in text) for text in completions]


@pytest.fixture
def source():
    return ScoredRollouts(
        prompts=PROMPTS, texts=[str(prompt) for prompt in PROMPTS], reward=few, length=3, decode=lambda row: str(row)
    )


def model():
    made = small_llama(12, hidden=16, layers=1, heads=2, length=16, generator=stream(0))
    with torch.no_grad():
        made.lm_head.weight[3].add_(0.3)
    return made


def trained(folder, policy, method, rollouts, reference=None):
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-3,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, average_tokens_across_devices=True,
    )  # fmt: skip
    trainer = AlignTrainer(
        model=policy, args=arguments, train_dataset=index_items(range(len(PROMPTS))), method=method,
        rollouts=rollouts, group=8, reference=reference,
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", ["generator", "definition"])
def test_rehearsal_holds_the_first_policy(form, tmp_path, source):
    policy = model()
    split, buffer = rehearse(source, policy, range(4), generator=stream(1), threshold=0.01, kept=8)
    assert len(split.mastered)
    rows = buffer.rows(list(range(len(buffer))))
    given = (rows.ids, rows.attention_mask, rows.completion_mask)

    def reference(*batch):
        with torch.no_grad():
            return completion_log_probs(first, *batch).log_probs

    def moved(eta):
        after = model()
        name = {"divergence": "js"} if form == "definition" else {}
        method = Dph(buffer=buffer, eta=eta, rehearsed=16, form=form, visited=1.0, **name)
        logs = trained(tmp_path / str(eta), after, method, source, reference if method.needs_reference else None)
        assert all(abs(entry["loss"]) < 100 for entry in logs)
        assert all("metric/rehearsal" in entry for entry in logs)
        with torch.no_grad():
            return (completion_log_probs(after, *given).log_probs - rows.log_probs).abs().mean().item()

    first = model()
    assert moved(20.0) < 0.7 * moved(0.0)


def test_filtered_rollouts(tmp_path, source):
    told = []
    keep = difficulty_filter("nonzero")
    filtered = FilteredSource(source=source, keep=keep, max_draws=64, told=lambda *counts: told.append(counts))
    logs = trained(tmp_path, model(), Grpo(), filtered)
    assert len(logs) == 6
    assert len(told) == 12
    assert all(draws >= 2 for draws, _ in told)
    assert all("metric/reward" in entry for entry in logs)
