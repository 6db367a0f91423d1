"""The sampler in trl's own GRPO trainer, with a tiny model: what it trains on, records, saves, and resumes with."""

import pytest
import torch

from kullback.align.difficulty import PassRateTracker
from kullback.align.difficulty_trl import recorded_reward, sample_by_difficulty
from kullback.core.errors import DataError
from kullback.core.rng import generator as stream
from kullback.data.tokenizer import train_byte_bpe
from kullback.models.small import small_llama

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl's own options
ROWS = 8


def trainer(folder, tracker, seen, *, steps, rows=None):
    tokenizer = train_byte_bpe(["0123456789+="] * 4, 270)
    tokenizer.pad_token = tokenizer.eos_token
    model = small_llama(len(tokenizer), hidden=16, layers=1, heads=2, length=32, generator=stream(0))

    def reward(prompts, completions, prompt_number, **columns):
        seen.append(list(prompt_number))
        return [float(number < 2 and place % 2) for place, number in enumerate(prompt_number)]

    options = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=1, num_generations=2,
        max_completion_length=3, max_steps=steps, save_steps=1, report_to=[], use_cpu=True, beta=0.0, seed=5,
        learning_rate=1e-3, logging_strategy="no", disable_tqdm=True, save_only_model=False, bf16=False,
    )  # fmt: skip
    numbers = list(range(ROWS)) if rows is None else rows
    data = datasets.Dataset.from_dict({"prompt": [f"{n}+1=" for n in numbers], "prompt_number": numbers})
    return trl.GRPOTrainer(
        model=model, reward_funcs=recorded_reward(reward, tracker), args=options, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


def trained(folder, steps):
    tracker, seen = PassRateTracker(ROWS), []
    first = trainer(folder, tracker, seen, steps=steps)
    made = sample_by_difficulty(first, tracker)
    first.train()
    assert len(made) == 4 * 2 * 2
    assert len(seen) == steps
    return tracker, seen


def test_trl_trains_on_what_is_drawn(tmp_path):
    tracker, seen = trained(tmp_path, 2)
    for numbers in seen:
        assert numbers[::2] == numbers[1::2], "groups of two in a row"
        assert len(set(numbers)) == 2
    counts = torch.bincount(torch.tensor(seen).flatten(), minlength=ROWS)
    assert (tracker.solved + tracker.failed).tolist() == counts.tolist()
    assert tracker.solved.tolist() == [counts[0] / 2, counts[1] / 2, *[0] * 6]


def test_trl_resumes_with_what_was_known(tmp_path):
    tracker, seen = trained(tmp_path / "whole", 6)
    for step in (2, 3, 4):  # in the middle of a pass, before its last batch, and at its end
        again_tracker, again = PassRateTracker(ROWS), []
        resumed = trainer(tmp_path / "whole", again_tracker, again, steps=6)
        sample_by_difficulty(resumed, again_tracker, generator=stream(99))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again == seen[step:]
        assert torch.equal(again_tracker.solved, tracker.solved)
        assert torch.equal(again_tracker.failed, tracker.failed)


def test_data_that_is_numbered_otherwise(tmp_path):
    tracker = PassRateTracker(ROWS)
    with pytest.raises(DataError, match="numbers the training rows from 0 in order"):
        sample_by_difficulty(trainer(tmp_path, tracker, [], steps=1, rows=list(range(ROWS))[::-1]), tracker)
    with pytest.raises(DataError, match="needs 9 rows, as the tracker has"):
        sample_by_difficulty(trainer(tmp_path, tracker, [], steps=1), PassRateTracker(9))
