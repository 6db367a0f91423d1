"""Small models: their weights come from the generator alone, and the teacher trained on the spot is kept and helps."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.data.corpora import Corpus
from kullback.models import small
from kullback.models.small import small_llama, trained_llama

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "length": 16}
TINY = {**SIZES, "vocabulary": 300, "steps": 30, "batch": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def few_texts(monkeypatch):
    """A corpus small enough to be learnt in a second."""
    texts = [f"the {animal} sat on the {thing} and slept. " * 3 for animal in ("cat", "dog") for thing in "abcdefgh"]
    monkeypatch.setattr(small, "corpus_of", lambda name: Corpus(texts[2:], texts[:2], []))


def weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_weights_come_from_the_generator_alone():
    state = torch.random.get_rng_state()
    first = small_llama(50, **SIZES, generator=generator(0, "model"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)  # another global state
    again = small_llama(50, **SIZES, generator=generator(0, "model"))
    other = small_llama(50, **SIZES, generator=generator(1, "model"))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_the_shape_is_as_asked():
    model = small_llama(50, **SIZES, generator=generator(0, "model"))
    assert model.get_input_embeddings().weight.shape == (50, 32)
    assert model.get_output_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert model.config.num_hidden_layers == 2
    assert model.config.max_position_embeddings == 16
    assert model.config.intermediate_size == 96
    ids = torch.randint(50, (3, 16), generator=generator(0, "ids"))
    assert model(input_ids=ids).logits.shape == (3, 16, 50)


def test_deviations_are_as_documented():
    model = small_llama(2000, hidden=128, layers=8, heads=2, length=16, generator=generator(0, "model"))
    expected = {
        "embed_tokens": 1.0, "lm_head": 0.02, "q_proj": 128**-0.5, "gate_proj": 128**-0.5,
        "o_proj": 128**-0.5 / 4, "down_proj": model.config.intermediate_size**-0.5 / 4,
    }  # fmt: skip
    for name, deviation in expected.items():
        weight = next(value.detach() for key, value in model.named_parameters() if name in key)
        error = deviation / (2 * weight.numel()) ** 0.5
        assert abs(float(weight.std()) - deviation) < 6 * error


def test_a_fresh_model_reads_its_context_and_prefers_little():
    """Near the uniform distribution, and yet not blind to what came before: its samples differ by context."""
    model = small_llama(200, **SIZES, generator=generator(0, "model"))
    ids = torch.randint(200, (8, 16), generator=generator(0, "ids"))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert float(entropy.min()) > 0.98 * torch.tensor(200.0).log()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 200
    with torch.no_grad():
        others = model(input_ids=changed).logits
    assert not torch.allclose(others[:, -1], logits[:, -1], atol=1e-4)


def test_it_is_saved_and_loaded(tmp_path):
    model = small_llama(50, **SIZES, generator=generator(0, "model"))
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(loaded), weights(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden": 30, "heads": 4}, "multiple of 2 x heads"), ({"hidden": 6}, "multiple"), ({"layers": 0}, "layers"),
     ({"length": -1}, "length")],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        small_llama(50, **{**SIZES, **change}, generator=generator(0, "model"))


def test_training_learns_is_kept_and_is_told(few_texts):
    events = []
    folder = trained_llama(**TINY, learning_rate=1e-2, listen=events.append)
    record = json.loads((folder / "training.json").read_text())
    assert record["validation_cross_entropy"] < 0.4 * torch.tensor(300.0).log()
    losses = [event["loss"] for event in events if event["kind"] == "loss"]
    steps = [(event["step"], event["steps"]) for event in events if event["kind"] == "progress"]
    assert losses[-1] < losses[0] / 2
    assert steps == [(step, 30) for step in range(1, 31)]
    assert all(event["steps_a_second"] > 0 for event in events if event["kind"] == "progress")

    events.clear()
    assert trained_llama(**TINY, learning_rate=1e-2, listen=events.append) == folder
    assert not events  # from the cache


def test_the_record_tells_the_truth(few_texts):
    folder = trained_llama(**TINY)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    texts = small.corpus_of("prose").validation
    ids = torch.tensor([token for text in texts for token in (*tokenizer(text).input_ids, 0)])
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        log_p = model(input_ids=blocks).logits.log_softmax(-1)[:, :-1]
    expected = -log_p.gather(-1, blocks[:, 1:, None]).mean()
    record = json.loads((folder / "training.json").read_text())
    assert record["validation_cross_entropy"] == pytest.approx(float(expected), rel=1e-5)


def test_the_same_configuration_gives_the_same_weights(few_texts, tmp_path, monkeypatch):
    def trained(**changes):
        return weights(AutoModelForCausalLM.from_pretrained(trained_llama(**{**TINY, "steps": 3, **changes})))

    first = trained()
    other = trained(seed=1)
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "another"))
    torch.rand(5)
    assert torch.equal(trained(), first)
    assert not torch.equal(other, first)


def test_the_real_corpus_in_few_steps():
    folder = trained_llama(**{**TINY, "steps": 2})
    assert json.loads((folder / "training.json").read_text())["corpus"] == "prose"


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": 0}, {"length": 1}, {"learning_rate": 0.0}])
def test_training_that_cannot_work_is_refused(change):
    with pytest.raises(ConfigError, match="training needs"):
        trained_llama(**{**TINY, **change})


def test_a_length_beyond_the_text_is_refused(few_texts):
    with pytest.raises(ConfigError, match="tokens in a split"):
        trained_llama(**{**TINY, "length": 4000})
