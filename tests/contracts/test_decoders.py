"""What every decoder obeys, law by law, and for each law a wrong decoder that it rejects.

A decoder is called with (model, ids [N, P], mask [N, P], count, end) at its neutral setting, at which it is greedy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kullback.core.rng import generator
from kullback.decode.ancestral import Drawn, draw_tokens
from kullback.decode.backspace import PAD, generate_with_backspace
from kullback.decode.contrastive import contrastive_search
from kullback.decode.mixture import GeometricMixture
from kullback.models.small import small_llama

WORDS, END, PADDING = 9, 8, 0
IDS = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 6, 1], [0, 7, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]])


@dataclass(frozen=True)
class Row:
    """How to decode, and whether prompts may be padded."""

    decode: Callable
    pads: bool = True


def ancestral(model, ids, mask, count, end):
    """At a temperature near 0."""
    return draw_tokens(model, ids, mask=mask, count=count, end=end, temperature=1e-4, generator=generator(0, "d"))


def mixture(model, ids, mask, count, end):
    """A geometric mixture without the second model."""
    other = small_llama(WORDS, hidden=16, layers=1, heads=2, length=40, generator=generator(1, "other"))
    return ancestral(GeometricMixture(model, other, share=0.0), ids, mask, count, end)


def contrastive(**options):
    def decode(model, ids, mask, count, end):
        return contrastive_search(model, ids, mask=mask, count=count, end=end, **options)

    return decode


def backspace(model, ids, mask, count, end):
    """Which never deletes, and whose logits are sharp; the token before a row's prompt begins it."""

    def sharp(text, logits):
        return 1e4 * logits.index_fill(1, torch.tensor([PADDING]), -torch.inf)

    rows = []
    for row, held in zip(ids, mask.bool(), strict=True):
        prompt = row[held]
        actions = generate_with_backspace(
            model, 1, backspace=PADDING, begin=int(prompt[0]), prompts=prompt[None, 1:], length=count,
            most_actions=count, generator=generator(0, "d"), end=end[0] if end else None, processor=sharp,
        )[0]  # fmt: skip
        rows.append(torch.nn.functional.pad(actions, (0, count - len(actions)), value=PAD))
    tokens = torch.stack(rows)
    held = tokens != PAD
    width = int(held.sum(1).max())
    return Drawn(tokens.masked_fill(~held, PADDING)[:, :width], held[:, :width], torch.zeros(len(ids), width))


TABLE = {
    "ancestral": Row(ancestral),
    "mixture": Row(mixture),
    "contrastive, no penalty": Row(contrastive(alpha=0.0)),
    "contrastive, one candidate": Row(contrastive(candidates=1)),
    "backspace": Row(backspace, pads=False),
}


@pytest.fixture(scope="module")
def model():
    model = small_llama(WORDS, hidden=16, layers=2, heads=2, length=40, generator=generator(1, "model")).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(WORDS).index_fill_(0, torch.tensor([PADDING]), -100.0))
    return model


@torch.no_grad()
def greedy(model, prompt, count, end):
    """One text, without a cache; the token that stands for padding and backspace is never written."""
    text = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([text])).logits[0, -1]
        logits[PADDING] = -torch.inf
        text.append(int(logits.argmax()))
        if text[-1] in end:
            break
    return text[len(prompt) :]


def texts(drawn):
    return [tokens[held].tolist() for tokens, held in zip(drawn.tokens, drawn.mask, strict=True)]


def check_neutral_is_greedy(row, model):
    for end in ((), (END,)):
        found = texts(row.decode(model, IDS, MASK, 12, end))
        assert found == [greedy(model, ids[held].tolist(), 12, end) for ids, held in zip(IDS, MASK.bool(), strict=True)]


def check_padding_changes_nothing(row, model):
    found = texts(row.decode(model, IDS, MASK, 12, ()))
    other = texts(row.decode(model, IDS.masked_fill(MASK == 0, 7), MASK, 12, ()))
    assert found == other
    order = torch.tensor([2, 0, 3, 1])
    assert texts(row.decode(model, IDS[order], MASK[order], 12, ())) == [found[place] for place in order.tolist()]


def check_nothing_counts_after_the_end(row, model):
    whole, ended = row.decode(model, IDS, MASK, 12, ()), row.decode(model, IDS, MASK, 12, (END,))
    assert ended.tokens.shape == ended.mask.shape == ended.log_probs.shape
    assert len({len(text) for text in texts(ended)}) > 1, "of different lengths"
    for text, tokens, mask, full in zip(texts(ended), ended.tokens, ended.mask, texts(whole), strict=True):
        assert END not in text[:-1]
        assert mask.int().tolist() == sorted(mask.int().tolist(), reverse=True)
        assert (tokens[~mask] == PADDING).all()
        assert full[: len(text)] == text
        assert text[-1] == END or len(text) == 12


def check_all_is_left_as_it_was(row, model):
    ids, mask = IDS.clone(), MASK.clone()
    weights = [parameter.clone() for parameter in model.parameters()]
    for training in (True, False):
        model.train(training)
        row.decode(model, ids, mask, 3, (END,))
        assert model.training == training
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, MASK)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


LAWS = [check_neutral_is_greedy, check_padding_changes_nothing, check_nothing_counts_after_the_end,
        check_all_is_left_as_it_was]  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_every_decoder_obeys(name, law, model):
    if TABLE[name].pads or law is not check_padding_changes_nothing:
        law(TABLE[name], model)


def warm(model, ids, mask, count, end):
    return draw_tokens(model, ids, mask=mask, count=count, end=end, generator=generator(0, "d"))


def reads_padding(model, ids, mask, count, end):
    return contrastive_search(model, ids, count=count, end=end, alpha=0.0)


def goes_on(model, ids, mask, count, end):
    return contrastive_search(model, ids, mask=mask, count=count, alpha=0.0)


def forgets_the_mode(model, ids, mask, count, end):
    model.eval()
    return contrastive_search(model, ids, mask=mask, count=count, end=end, alpha=0.0)


BITES = {
    check_neutral_is_greedy: warm,
    check_padding_changes_nothing: reads_padding,
    check_nothing_counts_after_the_end: goes_on,
    check_all_is_left_as_it_was: forgets_the_mode,
}


@pytest.mark.parametrize("law", LAWS)
def test_every_law_rejects_a_wrong_decoder(law, model):
    with pytest.raises(AssertionError):
        law(Row(BITES[law]), model)
    model.eval()
