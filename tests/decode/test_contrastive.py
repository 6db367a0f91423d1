"""Contrastive search beside a naive one that reads each text anew, alone and without a cache."""

import pytest
import torch
import transformers

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator as stream
from kullback.decode.contrastive import ContrastiveSearch, contrastive_search
from kullback.models.small import small_llama

PROMPTS = [[1, 2, 3, 4], [5], [6, 1]]
IDS = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 5], [0, 0, 6, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])


@pytest.fixture(scope="module")
def model():
    model = small_llama(11, hidden=16, layers=2, heads=2, length=40, generator=stream(3)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


@torch.no_grad()
def naive(model, prompt, count, alpha, candidates, end=(), rule=max, replaced=None):
    """Tokens and their log-probabilities, one text, one candidate and one similarity at a time."""
    text, log_probs = list(prompt), []
    for place in range(count):
        out = model(input_ids=torch.tensor([text]), output_hidden_states=True)
        law, before = out.logits[0, -1].float().log_softmax(0), out.hidden_states[-1][0]
        scores = {}
        for token in law.topk(candidates).indices.tolist():
            new = model(input_ids=torch.tensor([[*text, token]]), output_hidden_states=True).hidden_states[-1][0, -1]
            penalty = rule(torch.cosine_similarity(new, old, dim=0).item() for old in before)
            scores[token] = (1 - alpha) * law[token].exp().item() - alpha * penalty
        chosen = max(scores, key=scores.get)
        if replaced is not None:
            chosen = replaced(place, chosen)
        text.append(chosen)
        log_probs.append(law[chosen].item())
        if chosen in end:
            break
    return text[len(prompt) :], log_probs


@pytest.mark.parametrize(("alpha", "candidates"), [(0.6, 4), (0.3, 11), (1.0, 3), (0.5, 1), (0.0, 5)])
def test_it_is_the_naive_search(model, alpha, candidates):
    drawn = contrastive_search(model, IDS, mask=MASK, count=14, alpha=alpha, candidates=candidates, end=(9,))
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        tokens, log_probs = naive(model, prompt, 14, alpha, candidates, end=(9,))
        held = drawn.mask[row]
        lengths.add(len(tokens))
        assert drawn.tokens[row][held].tolist() == tokens
        assert drawn.log_probs[row][held].tolist() == pytest.approx(log_probs, abs=2e-5)
        assert (drawn.tokens[row][~held] == 0).all()
    assert drawn.tokens.shape[1] == max(lengths)


def mean(values):
    found = list(values)
    return sum(found) / len(found)


def test_the_penalty_is_the_largest_similarity_and_minds_no_padding(model):
    found = contrastive_search(model, IDS, mask=MASK, count=14).tokens
    greedy = contrastive_search(model, IDS, mask=MASK, count=14, alpha=0.0).tokens
    assert not torch.equal(found, greedy)
    listed_wrong = [naive(model, prompt, 14, 0.6, 4, rule=mean)[0] for prompt in PROMPTS]
    assert found.tolist() != listed_wrong
    unmasked = contrastive_search(model, IDS, count=14).tokens
    assert not torch.equal(found[1:], unmasked[1:])
    assert torch.equal(found[0], unmasked[0])
    other_pads = IDS.masked_fill(MASK == 0, 8)
    assert torch.equal(found, contrastive_search(model, other_pads, mask=MASK, count=14).tokens)


def test_tokens_that_a_channel_replaces_are_read_in_their_place(model):
    calls = []

    def channel(tokens):
        place = len(calls)
        calls.append(tokens.clone())
        return torch.where((torch.arange(len(tokens)) + place) % 3 == 0, (tokens + 5) % 11, tokens)

    drawn = contrastive_search(model, IDS, mask=MASK, count=9, replace=channel)
    for row, prompt in enumerate(PROMPTS):
        expected, log_probs = naive(
            model, prompt, 9, 0.6, 4, replaced=lambda place, token, row=row: (token + 5) % 11 if (row + place) % 3 == 0
            else token,
        )  # fmt: skip
        assert drawn.tokens[row].tolist() == expected
        assert drawn.log_probs[row].tolist() == pytest.approx(log_probs, abs=2e-5)
    same = contrastive_search(model, IDS, mask=MASK, count=9, replace=lambda tokens: tokens)
    assert torch.equal(same.tokens, contrastive_search(model, IDS, mask=MASK, count=9).tokens)


class WithoutCache(torch.nn.Module):
    """A model with no cache that could be repeated."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **given):
        out = self.model(**{**given, "use_cache": False})
        assert "cache" not in given
        return out


def test_a_model_without_a_cache_reads_everything_anew(model):
    def flip(tokens):
        return torch.where(torch.arange(len(tokens)) == 1, 10 - tokens, tokens)

    for options in ({}, {"replace": flip}):
        with_it, without = (
            contrastive_search(each, IDS, mask=MASK, count=8, **options) for each in (model, WithoutCache(model).eval())
        )
        assert torch.equal(with_it.tokens, without.tokens)


def test_processors_and_reasons_to_stop_see_the_texts(model):
    seen = []

    def odd_only(text, logits):
        seen.append(text.clone())
        return logits.masked_fill(torch.arange(logits.shape[1]) % 2 == 0, -torch.inf)

    drawn = contrastive_search(
        model, IDS, mask=MASK, count=12, processor=odd_only, stop=lambda text: (text == 7).sum(1) >= 2
    )
    assert (drawn.tokens[drawn.mask] % 2 == 1).all()
    assert torch.equal(seen[0], IDS)
    for row in drawn.tokens.tolist():
        assert row.count(7) <= 2
    first = contrastive_search(model, IDS, mask=MASK, count=1)
    assert torch.equal(first.tokens, contrastive_search(model, IDS, mask=MASK, count=5).tokens[:, :1])
    with_dead = []
    contrastive_search(
        model, IDS, mask=MASK, count=4, replace=lambda tokens: (tokens + 1) % 11,
        processor=lambda text, logits: with_dead.append(text.shape[1]) or logits,
    )  # fmt: skip
    assert with_dead == [4, 5, 6, 7], "what was replaced is in no text"


def config(name):
    sizes = {"vocab_size": 11, "bos_token_id": 1, "eos_token_id": 9, "pad_token_id": 0}
    if name == "gpt2":
        return transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, **sizes)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, **sizes}
    if name == "neox":
        return transformers.GPTNeoXConfig(max_position_embeddings=40, **small)
    return transformers.MistralConfig(num_key_value_heads=1, sliding_window=5, head_dim=8, **small)


@pytest.mark.parametrize("name", ["gpt2", "neox", "mistral"])
def test_other_models_and_generate(name):
    model, source = transformers.AutoModelForCausalLM.from_config(config(name)).eval(), stream(0, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2, generator=source)
    drawn = contrastive_search(model, IDS, mask=MASK, count=10, end=(9,))
    for row, prompt in enumerate(PROMPTS):
        assert drawn.tokens[row][drawn.mask[row]].tolist() == naive(model, prompt, 10, 0.6, 4, end=(9,))[0]
    whole = model.generate(
        IDS, attention_mask=MASK, custom_generate=ContrastiveSearch(alpha=0.6, candidates=4), max_new_tokens=10
    )
    assert torch.equal(whole, torch.cat([IDS, drawn.tokens], 1))
    short = model.generate(
        IDS, attention_mask=MASK, custom_generate=ContrastiveSearch(), max_new_tokens=10, min_new_tokens=10
    )
    assert short.shape[1] == 14
    assert not (short[:, 4:13] == 9).any(), "generate's own processors hold"


def test_what_is_refused(model):
    for options, message in (
        ({"count": 0}, "count"), ({"candidates": 0}, "candidates"), ({"alpha": 1.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            contrastive_search(model, IDS, **({"count": 3} | options))
    with pytest.raises(ConfigError, match="alpha"):
        ContrastiveSearch(alpha=-0.1)
    with pytest.raises(ShapeError, match="left"):
        contrastive_search(model, IDS, count=3, mask=MASK.flip(1))
    with pytest.raises(ShapeError, match="prompts"):
        contrastive_search(model, IDS[:0], count=3)

    class Silent(WithoutCache):
        def forward(self, **given):
            return super().forward(**{**given, "output_hidden_states": False})

    with pytest.raises(ConfigError, match="hidden_states"):
        contrastive_search(Silent(model), IDS, count=3)
    model.train()
    contrastive_search(model, IDS, count=1)
    assert model.training
    model.eval()
