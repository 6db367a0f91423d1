"""f-SFT and then f-DPO inside the room's Trainer, on a small model: drift, the first losses, accumulated batches."""

import math

import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf import AlignTrainer, collate_completions
from kullback.align.f_dpo import FDPOLoss, paper_divergence
from kullback.align.implicit import FSFT, drift_report, matching_divergence
from kullback.align.log_probs import completion_log_probs
from kullback.align.methods import Preference, Supervised
from kullback.core.rng import generator as stream
from kullback.models.small import small_llama

PROMPTS = [[1], [2, 3], [4, 5, 6], [7, 1]] * 4
SHOWN = [[8, 9], [8, 8, 9], [9], [8, 9, 9]] * 4
SHUNNED = [[10], [11, 10], [11, 11, 10], [10, 11]] * 4


def model():
    return small_llama(12, hidden=16, layers=1, heads=2, length=16, generator=stream(0))


def reference(frozen):
    def log_prob(*given):
        with torch.no_grad():
            return completion_log_probs(frozen, *given).log_probs

    return log_prob


def trained(folder, policy, method, rows, frozen=None, accumulate=1, steps=20):
    """rows: per item its completions, one to be shown, or the preferred one and the other."""
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate, learning_rate=1e-2, report_to=[], save_strategy="no", logging_steps=1,
        use_cpu=True, remove_unused_columns=False, disable_tqdm=True, average_tokens_across_devices=True,
        max_grad_norm=0.0,
    )  # fmt: skip

    def collate(items):
        prompts = [prompt for _ in items[0]["completions"] for prompt in (item["prompt"] for item in items)]
        completions = [completion for column in zip(*(i["completions"] for i in items)) for completion in column]
        return collate_completions(prompts, completions, 0)

    data = [{"prompt": prompt, "completions": list(group)} for prompt, group in zip(PROMPTS, rows, strict=True)]
    trainer = AlignTrainer(
        model=policy, args=arguments, train_dataset=data, data_collator=collate, method=method,
        reference=None if frozen is None else reference(frozen),
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def moved(policy):
    batch = collate_completions(PROMPTS, SHOWN, 0)
    given = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    with torch.no_grad():
        before, after = (completion_log_probs(m, *given).log_probs for m in (model(), policy))
    return drift_report(before, after, batch["completion_mask"])["kl"]


def test_f_sft_moves_less_than_sft_and_total_variation_is_sft(tmp_path):
    shown = [(completion,) for completion in SHOWN]
    ends, losses = {}, {}
    for name, method in {
        "sft": Supervised(),
        "tv": FSFT(divergence=matching_divergence("tv")),
        "hellinger": FSFT(divergence=matching_divergence("hellinger"), beta=0.5),
    }.items():
        policy = model()
        frozen = model() if method.needs_reference else None
        losses[name] = trained(tmp_path / name, policy, method, shown, frozen)
        ends[name] = moved(policy)
    for one, other in zip(losses["tv"], losses["sft"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert 0.0 < ends["hellinger"] < 0.9 * ends["sft"]
    assert losses["hellinger"][0]["metric/weight"] == pytest.approx(1.0, abs=1e-4)
    assert losses["hellinger"][-1]["metric/weight"] < 0.5


def test_f_dpo_starts_at_log_two_and_accumulation_changes_nothing(tmp_path):
    pairs = list(zip(SHOWN, SHUNNED, strict=True))
    method = Preference(options=FDPOLoss(divergence=paper_divergence("forward_kl"), beta=0.5))
    runs = [
        trained(tmp_path / str(parts), model(), method, pairs, model(), accumulate=parts, steps=8) for parts in (1, 2)
    ]
    assert runs[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert runs[0][-1]["loss"] < 0.5
    assert runs[0][-1]["metric/rewards/accuracy"] == 1.0
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
