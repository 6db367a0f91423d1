"""What layouts, noise, generation and losses of SequenceMatch refuse, with a sentence."""

import math

import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf_sequencematch import SequenceMatchSettings, SequenceMatchTrainer, layout_logits
from kullback.align.sequencematch import policy_entropy, transition_rewards
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.decode.backspace import PAD, backspace_layout, generate_with_backspace, inject_noise, visible_text
from kullback.models.small import small_llama


def test_actions_that_are_closed_are_never_taken_and_count_in_no_value(tmp_path):
    """As if the head had no such rows: of ids that only pad it, and the begin token."""
    model = small_llama(9, hidden=16, layers=1, heads=2, length=64, generator=generator(6, "m")).eval()
    layout = backspace_layout(torch.tensor([[1, 2, 8, 3], [3, 1, 2, PAD]]), backspace=8, begin=0)
    with torch.no_grad():
        closed = layout_logits(model, layout, closed=(0, 5, 6, 7))
        plain = layout_logits(model, layout)
    narrow = plain[..., [1, 2, 3, 4, 8]]
    smaller = backspace_layout(torch.tensor([[0, 1, 4, 2], [2, 0, 1, PAD]]), backspace=4, begin=9)
    found, expected = transition_rewards(closed, layout, backspace=8), transition_rewards(narrow, smaller, backspace=4)
    torch.testing.assert_close(found.reward, expected.reward)
    torch.testing.assert_close(policy_entropy(closed, layout), policy_entropy(narrow, smaller))
    assert not torch.allclose(transition_rewards(plain, layout, backspace=8).reward, expected.reward)
    windows = torch.randint(1, 5, (16, 10), generator=generator(7, "w"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = SequenceMatchTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row} for row in windows], backspace=8, begin=0,
        settings=SequenceMatchSettings(samples=16, kept=16, length=10, refresh_every=1, noise=0.3, closed=(0, 5, 6, 7)),
    )  # fmt: skip
    trainer.train()
    assert not torch.isin(torch.cat(trainer.buffer), torch.tensor([0, 5, 6, 7])).any()
    entries = [entry for entry in trainer.state.log_history if "metric/entropy" in entry]
    assert all(0.0 < entry["metric/entropy"] < math.log(5) + 1e-6 for entry in entries)
    assert all(math.isfinite(entry["grad_norm"]) for entry in entries)


@pytest.fixture(scope="module")
def model():
    return small_llama(8, hidden=16, layers=1, heads=2, length=32, generator=generator(0, "model")).eval()


def generated(model, **options):
    given = {"backspace": 7, "begin": 0, "length": 4, "most_actions": 8, "generator": generator(0)} | options
    return generate_with_backspace(model, 2, **given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backspace": 8}, ConfigError, "8 actions"),
        ({"end": 7}, ConfigError, "neither"),
        ({"begin": 7}, ConfigError, "neither"),
        ({"prompts": torch.tensor([[1, 7], [1, 2]])}, DataError, "prompt"),
        ({"processor": lambda text, logits: logits[:, :3]}, ShapeError, "processor"),
        ({"processor": lambda text, logits: logits - math.inf}, DataError, "no action left"),
        ({"replace": lambda tokens: torch.full_like(tokens, 7)}, DataError, "replace"),
    ],
)
def test_generation_refuses(model, options, error, message):
    with pytest.raises(error, match=message):
        generated(model, **options)


def test_layouts_noise_and_losses_refuse():
    ids = torch.tensor([[1, 2, 3]])
    for actions, options, error in (
        (ids.float(), {}, DataError), (ids[:0], {}, ShapeError), (torch.full((1, 3), PAD), {}, DataError),
        (ids, {"weights": torch.full((1, 3), math.nan)}, DataError), (ids, {"weights": -torch.ones(1, 3)}, DataError),
        (ids, {"begin": 7}, ConfigError), (ids, {"begin": -1}, ConfigError),
    ):  # fmt: skip
        with pytest.raises(error):
            backspace_layout(actions, **({"backspace": 7, "begin": 0} | options))
    with pytest.raises(DataError, match="nothing is visible"):
        visible_text(torch.tensor([[1, 7, 7]]), backspace=7)
    for given, options, error, message in (
        (ids, {"vocabulary": 9}, ConfigError, "none of the 9"), (ids[0], {}, ShapeError, "ids"),
        (ids + 5, {}, DataError, "from 0 to 6"), (ids[:0], {}, ShapeError, "ids"),
        (ids, {"exclude": lambda true, wrong: torch.zeros(2)}, ShapeError, "exclude"),
    ):  # fmt: skip
        plain = {"share": 0.5, "vocabulary": 7, "backspace": 7, "generator": generator(0)}
        with pytest.raises(error, match=message):
            inject_noise(given, **(plain | options))
    layout = backspace_layout(ids, backspace=7, begin=0)
    logits = torch.zeros(1, 4, 8)
    with pytest.raises(ConfigError, match="3 here, 7 in the layout"):
        transition_rewards(logits, layout, backspace=3)
    for wrong in (math.nan, math.inf):
        with pytest.raises(DataError, match="NaN or infinite"):
            transition_rewards(logits + wrong, layout, backspace=7)
    closed = logits.index_fill(2, torch.tensor([5]), -math.inf)  # an action that nobody takes may be closed
    assert transition_rewards(closed, layout, backspace=7).reward.isfinite().all()
    for wrong in ({"noise": 1.0}, {"alpha": 0.0}, {"gamma": 1.5}, {"nll_share": -0.1}, {"divergence": "tv"}):
        with pytest.raises(ConfigError):
            SequenceMatchSettings(**wrong)
