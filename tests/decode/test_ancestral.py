"""Ancestral sampling: padding, groups and end tokens leave the law alone, and log-probabilities are the model's."""

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator as stream
from kullback.decode.ancestral import draw_tokens
from kullback.models.small import small_llama


@pytest.fixture(scope="module")
def model():
    model = small_llama(7, hidden=16, layers=2, heads=2, length=24, generator=stream(0)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def naive(model, prompt, tokens, temperature):
    """The log-probability of each token after the prompt, one sequence at a time and without a cache."""
    whole = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        log_p = (model(whole).logits[0] / temperature).log_softmax(-1)
    return log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


@pytest.mark.parametrize("group", [1, 3])
def test_log_probs_are_those_of_each_unpadded_sequence(model, group):
    prompts = [[1, 2, 3, 4], [5], [6, 1]]
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 6, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])
    drawn = draw_tokens(
        model, ids, mask=mask, count=9, generator=stream(1), temperature=1.7, group=group, end=(2, 3), pad=0
    )
    assert drawn.tokens.shape == drawn.mask.shape == drawn.log_probs.shape
    assert len(drawn.tokens) == 3 * group
    for row in range(3 * group):
        held = drawn.mask[row]
        tokens = drawn.tokens[row][held].tolist()
        assert torch.allclose(drawn.log_probs[row][held], naive(model, prompts[row // group], tokens, 1.7), atol=2e-5)
        assert not any(token in (2, 3) for token in tokens[:-1])
        assert tokens[-1] in (2, 3) or len(tokens) == drawn.tokens.shape[1]
        assert (drawn.tokens[row][~held] == 0).all()
        assert (drawn.log_probs[row][~held] == 0).all()
    shifted = naive(model, [1, 1, 1, 5], drawn.tokens[group][drawn.mask[group]].tolist(), 1.7)
    assert not torch.allclose(drawn.log_probs[group][drawn.mask[group]], shifted, atol=1e-2), "padding that is read"


def test_the_model_works_on_what_has_not_ended(model):
    sizes = []

    def listen(_, args, given):
        sizes.append(len(given["input_ids"]))

    hook = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        drawn = draw_tokens(model, torch.tensor([[1]]), count=20, generator=stream(5), end=(2, 5), group=64)
    finally:
        hook.remove()
    running = drawn.mask.sum(0).tolist()
    assert sizes[0] == 1
    assert running[-1] < 16
    assert all(left <= size < 2 * left or size == left for size, left in zip(sizes[1:], running[1:], strict=True))
    for row in range(64):
        tokens = drawn.tokens[row][drawn.mask[row]].tolist()
        assert torch.allclose(drawn.log_probs[row][drawn.mask[row]], naive(model, [1], tokens, 1.0), atol=2e-5)


def test_frequencies_of_a_padded_prompt_are_those_of_the_model(model):
    drawn = draw_tokens(
        model, torch.tensor([[0, 4, 1]]), mask=torch.tensor([[0, 1, 1]]), count=2, generator=stream(2), group=6000
    )
    with torch.no_grad():
        first = torch.softmax(model(torch.tensor([[4, 1]])).logits[0, -1], -1)
        steps = torch.cat([torch.tensor([[4, 1]]).expand(7, 2), torch.arange(7)[:, None]], 1)
        second = first @ torch.softmax(model(steps).logits[:, -1], -1)
    for column, expected in enumerate((first, second)):
        found = torch.bincount(drawn.tokens[:, column], minlength=7) / 6000
        assert ((found - expected).abs() < 6 * (expected * (1 - expected) / 6000).sqrt() + 1e-9).all()


def test_it_stops_when_all_have_ended_and_keeps_the_mode(model):
    model.train()
    drawn = draw_tokens(model, torch.tensor([[1]]), count=15, generator=stream(3), end=range(7), group=4)
    assert model.training
    model.eval()
    assert drawn.tokens.shape == (4, 1)
    again = draw_tokens(model, torch.tensor([[1]]), count=15, generator=stream(3), group=4)
    assert torch.equal(again.tokens[:, :1], drawn.tokens)
    assert again.mask.all()
    assert again.tokens.shape == (4, 15)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ConfigError, "count"),
        ({"group": 0}, ConfigError, "group"),
        ({"temperature": 0.0}, ConfigError, "temperature"),
        ({"mask": torch.ones(1, 3)}, ShapeError, "mask"),
        ({"mask": torch.tensor([[1, 0]])}, ShapeError, "left"),
    ],
)
def test_what_is_refused(model, options, error, message):
    given = {"count": 3, "generator": stream(0)} | options
    with pytest.raises(error, match=message):
        draw_tokens(model, torch.tensor([[1, 2]]), **given)
    with pytest.raises(ShapeError, match="prompts"):
        draw_tokens(model, torch.zeros(0, 2, dtype=torch.long), count=3, generator=stream(0))
