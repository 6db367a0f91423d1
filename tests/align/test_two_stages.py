"""f-SFT and then f-DPO inside the room's Trainer, on a small model: drift, the first losses, accumulated batches."""

import math

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from kullback.align._hf import AlignTrainer, collate_completions
from kullback.align._hf_pipeline import trained_by_trainer
from kullback.align.f_dpo import FDPOLoss, paper_divergence
from kullback.align.implicit import FSFT, drift_report, fsft_loss, matching_divergence
from kullback.align.log_probs import completion_log_probs
from kullback.align.methods import Preference, Supervised
from kullback.align.pipeline import PostTrainingPipeline, Stage
from kullback.core.errors import ConfigError
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


def test_the_pipeline_inside_the_trainer(tmp_path):
    """SFT at a fifth of the rate, then DPO from it, with the trainer's own arguments and one data set a stage."""

    def collate(items):
        prompts = [prompt for _ in items[0]["completions"] for prompt in (item["prompt"] for item in items)]
        completions = [completion for column in zip(*(i["completions"] for i in items)) for completion in column]
        return collate_completions(prompts, completions, 0)

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    pairs = [
        {"prompt": prompt, "completions": [shown, shunned]}
        for prompt, shown, shunned in zip(PROMPTS, SHOWN, SHUNNED, strict=True)
    ]
    data = {"sft": [{**row, "completions": row["completions"][:1]} for row in pairs], "dpo": pairs}
    seen = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen.append((args.output_dir.rsplit("/", 1)[-1], logs["learning_rate"], logs["loss"]))

    train = trained_by_trainer(arguments, data, collate, callbacks=[Listener()])
    policy = model()
    pipeline = PostTrainingPipeline(
        sft=Stage(name="sft", method=Supervised(), learning_rate=1e-2, steps=10),
        preference=Stage(name="dpo", method=Preference(options=FDPOLoss(beta=0.5)), learning_rate=5e-3, steps=6),
    )
    with pytest.raises(ConfigError, match="stage 'sft' has no data set: there are 'dpo'"):
        pipeline.run(policy, trained_by_trainer(arguments, {"dpo": pairs}, collate))
    found = pipeline.run(policy, train, measure=lambda base, now: {"kl": moved(now)})
    assert [name for name, *_ in seen] == ["sft"] * 10 + ["dpo"] * 6
    assert all(rate == pytest.approx(2e-3 if name == "sft" else 5e-3) for name, rate, _ in seen)
    assert seen[10][2] == pytest.approx(math.log(2), abs=1e-4)
    assert seen[-1][2] < seen[10][2]
    assert 0.0 < found.reports["sft"]["kl"] < moved(policy)


def test_a_learned_baseline_finds_the_best_constant(generator):
    """On one batch, c ends where the mean weight is 1, as "profile" has it; a checkpoint holds it."""
    reference, policy = -2 * torch.rand(2, 6, 4, generator=generator)
    batch = {"completion_mask": torch.ones(6, 4), "reference_log_prob": reference}
    method = FSFT(divergence=matching_divergence("hellinger"), beta=0.2, baseline="learned", baseline_rate=0.3)
    wanted = fsft_loss(
        reference, policy, torch.ones(6, 4), divergence=method.divergence, beta=0.2, baseline="profile"
    ).baseline
    assert wanted.abs() > 0.01
    with torch.no_grad():
        method.loss(policy, batch, count=24.0)
    assert method.state_dict() == {"baseline": 0.0}  # nothing is learned from what is only looked at
    for _ in range(100):
        _, seen = method.loss(policy.clone().requires_grad_(), batch, count=24.0)
    assert seen["baseline"].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert seen["weight"].item() == pytest.approx(1.0, abs=1e-5)
    other = FSFT(divergence=matching_divergence("hellinger"), beta=0.2, baseline="learned")
    other.load_state_dict(method.state_dict())
    assert other.learned.item() == method.learned.item()
    assert FSFT(divergence=method.divergence).state_dict() == {}
    with pytest.raises(ConfigError, match="drops out"):
        FSFT(divergence=matching_divergence("tv"), baseline="learned")
    with pytest.raises(ConfigError, match="baseline_rate"):
        FSFT(divergence=method.divergence, baseline="learned", baseline_rate=0.0)
