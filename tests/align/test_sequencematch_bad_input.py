"""What layouts, noise, generation and losses of SequenceMatch refuse, with a sentence."""

import math

import pytest
import torch

from kullback.align._hf_sequencematch import SequenceMatchSettings
from kullback.align.sequencematch import transition_rewards
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.decode.backspace import PAD, backspace_layout, generate_with_backspace, inject_noise, visible_text
from kullback.models.small import small_llama


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
