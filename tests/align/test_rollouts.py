"""Rollouts: the order of rows, masks, texts, and log-probabilities that a fresh forward pass confirms."""

import pytest
import torch

from kullback.align.log_probs import completion_log_probs
from kullback.align.rollouts import Rollouts, pad_left, sample_rollouts
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.models.small import small_llama

PROMPTS = [[1, 2, 3], [4], [5, 6], [1]]


@pytest.fixture(scope="module")
def model():
    model = small_llama(7, hidden=16, layers=2, heads=2, length=24, generator=stream(0)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module", params=[None, 1, 3])
def rollouts(model, request):
    return sample_rollouts(
        model, PROMPTS, group=3, length=6, generator=stream(1), temperature=1.5, end=2, batch=request.param,
        decode=lambda row: " ".join(map(str, row)),
    )  # fmt: skip


def test_rows_follow_the_prompts(rollouts):
    assert rollouts.prompt_index.tolist() == [prompt for prompt in range(4) for _ in range(3)]
    assert rollouts.prompt_length == 3
    for row, prompt in enumerate(rollouts.prompt_index.tolist()):
        held = rollouts.attention_mask[row, :3]
        assert rollouts.ids[row, :3][held].tolist() == PROMPTS[prompt]
        tokens = rollouts.completion_ids[row][rollouts.completion_mask[row]].tolist()
        assert len(tokens) == rollouts.lengths[row]
        assert rollouts.finished[row] == (tokens[-1] == 2)
        assert rollouts.texts[row] == " ".join(str(token) for token in tokens if token != 2)
    assert torch.equal(rollouts.attention_mask[:, 3:], rollouts.completion_mask)


def test_a_fresh_forward_pass_gives_the_log_probs(model, rollouts):
    given = (model, rollouts.ids, rollouts.attention_mask, rollouts.completion_mask)
    found = completion_log_probs(*given, temperature=rollouts.temperature).log_probs
    assert torch.allclose(found, rollouts.log_probs, atol=2e-5)
    assert not torch.allclose(completion_log_probs(*given).log_probs, rollouts.log_probs, atol=1e-2)


def test_selection(rollouts):
    some = rollouts.select([4, 0])
    assert some.prompt_index.tolist() == [1, 0]
    assert some.texts == (rollouts.texts[4], rollouts.texts[0])
    assert torch.equal(rollouts.select(rollouts.prompt_index == 2).ids, rollouts.ids[6:9])
    assert len(rollouts.to("cpu")) == 12


def test_numbers_of_prompts_and_a_tensor(model):
    made = sample_rollouts(
        model, torch.tensor([[1, 2], [3, 4]]), group=2, length=2, generator=stream(2), prompt_index=[7, 9]
    )
    assert made.prompt_index.tolist() == [7, 7, 9, 9]
    assert made.texts is None
    assert not made.finished.any()


def test_what_is_refused(model):
    with pytest.raises(DataError, match="prompt"):
        pad_left([[1], []], 0)
    with pytest.raises(DataError, match="prompt"):
        pad_left([], 0)
    with pytest.raises(ConfigError, match="batch"):
        sample_rollouts(model, PROMPTS, group=1, length=2, generator=stream(0), batch=0)
    with pytest.raises(ShapeError, match="prompt_index"):
        sample_rollouts(model, PROMPTS, group=1, length=2, generator=stream(0), prompt_index=[1])
    ids, mask = pad_left(PROMPTS, 0)
    with pytest.raises(ShapeError, match="row for each"):
        Rollouts(ids=ids, attention_mask=mask, completion_mask=mask[:2, :1], prompt_index=torch.arange(4),
                 log_probs=torch.zeros(4, 1), finished=torch.zeros(4))  # fmt: skip
