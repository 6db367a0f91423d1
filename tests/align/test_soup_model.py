"""Soups as models: of models in memory, of directories and adapters, and of both."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from kullback.align.soup import soup, soup_model, soup_state_dict
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.models.small import small_llama

SIZES = {"hidden": 16, "layers": 2, "heads": 2, "length": 16}
IDS = torch.tensor([[1, 5, 9, 2]])


@pytest.fixture
def parents():
    return [small_llama(260, **SIZES, generator=generator(2, name)) for name in "ab"]


@pytest.fixture
def folders(parents, tmp_path):
    parents[0].generation_config.max_new_tokens = 7
    for name, model in zip("ab", parents, strict=True):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    return [tmp_path / "a", tmp_path / "b"]


def equal(one, other, tolerance=1e-6):
    one, other = one.state_dict(), other if isinstance(other, dict) else other.state_dict()
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].float(), other[name].float(), atol=tolerance, rtol=0) for name in one
    )


def test_of_models_in_memory(parents):
    parents[0].train()
    before = [copy.deepcopy(model.state_dict()) for model in parents]
    made = soup_model(parents, [0.25, 0.75])
    assert equal(made, soup_state_dict([model.state_dict() for model in parents], [0.25, 0.75]), tolerance=0)
    assert not equal(made, soup_state_dict([model.state_dict() for model in parents]))
    assert all(equal(model, state, tolerance=0) for model, state in zip(parents, before, strict=True))
    assert parents[0].training
    assert not made.training
    assert made.config.to_dict() == parents[0].config.to_dict()
    own = {tensor.data_ptr() for model in parents for tensor in model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in made.state_dict().values()}, "a model of its own"
    assert made(IDS).logits.shape == (1, 4, 260)


def test_of_directories_it_is_what_soup_saves(folders, parents, tmp_path):
    made = soup_model(folders, [0.25, 0.75])
    saved = AutoModelForCausalLM.from_pretrained(soup(folders, [0.25, 0.75], save_to=tmp_path / "soup"))
    assert equal(made, saved, tolerance=0)
    assert equal(made, soup_model(parents, [0.25, 0.75]))
    assert type(made) is type(parents[0])
    assert made.generation_config.max_new_tokens == 7
    assert not made.training
    torch.testing.assert_close(made(IDS).logits, saved(IDS).logits)
    made.save_pretrained(tmp_path / "again")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), made, tolerance=0)
    assert equal(soup_model([str(folders[0]), parents[1]], [0.25, 0.75]), made), "a directory and a model"
    assert equal(soup_model([parents[0], folders[1]], [0.25, 0.75]), made)
    assert equal(soup_model(folders[:1]), parents[0], tolerance=0)


def test_tied_weights_and_halves(tmp_path):
    models = []
    for name in "ab":
        model = small_llama(260, **SIZES, generator=generator(5, name))
        model.config.tie_word_embeddings = True
        model.tie_weights()
        models.append(model.to(torch.bfloat16))
        model.save_pretrained(tmp_path / name)
    for made in soup_model(models), soup_model([tmp_path / "a", tmp_path / "b"]):
        assert made.lm_head.weight is made.model.embed_tokens.weight
        assert made.dtype == torch.bfloat16
        mean = sum(model.lm_head.weight.float() for model in models) / 2
        assert torch.equal(made.lm_head.weight, mean.to(torch.bfloat16))


def test_another_kind_of_model(parents, tmp_path):
    heads = []
    for name, model in zip("ab", parents, strict=True):
        head = LlamaForSequenceClassification(model.config)
        head.model.load_state_dict(model.model.state_dict())
        torch.nn.init.normal_(head.score.weight, generator=generator(6, name))
        head.save_pretrained(tmp_path / name)
        heads.append(head)
    made = soup_model([tmp_path / "a", tmp_path / "b"])
    assert type(made) is LlamaForSequenceClassification
    assert equal(made, soup_model(heads))


@pytest.fixture
def adapters(folders, tmp_path):
    for seed, (name, rank) in enumerate((("one", 2), ("two", 3))):
        base = AutoModelForCausalLM.from_pretrained(folders[0])
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"))
        draw = generator(seed, "adapter")
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    weight.normal_(std=0.3, generator=draw)
        model.save_pretrained(tmp_path / name)
    return [tmp_path / "one", tmp_path / "two"]


def test_of_adapters(adapters, folders, parents):
    merged = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), place).merge_and_unload()
        for place in adapters
    ]
    made = soup_model(adapters, [0.25, 0.75])
    assert equal(made, soup_model(merged, [0.25, 0.75]))
    assert not equal(made, parents[0], tolerance=1e-2), "the model without its adapters"
    assert equal(soup_model([adapters[0], merged[1]], [0.25, 0.75]), made), "an adapter beside a model"
    assert type(made) is type(parents[0])
    live = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), place) for place in adapters]
    with pytest.raises(ConfigError, match="merge it first"):
        soup_model(live)


def test_what_has_no_average(parents, folders, tmp_path):
    other = small_llama(260, **{**SIZES, "hidden": 8}, generator=generator(4))
    deeper = small_llama(260, **{**SIZES, "layers": 3}, generator=generator(4))
    for wrong, name in ((other, "other"), (deeper, "deeper")):
        wrong.save_pretrained(tmp_path / name)
        for models in ([parents[0], wrong], [folders[0], tmp_path / name], [folders[0], wrong]):
            with pytest.raises(ShapeError, match="one architecture"):
                soup_model(models)
    for models, weights in (([], None), (parents, [0.5, 0.6]), (folders, [1.0])):
        with pytest.raises(ConfigError, match="one model at least|sum to 1"):
            soup_model(models, weights)
    with pytest.raises(DataError, match="safetensors"):
        soup_model([tmp_path, folders[0]])
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "architectures": ["OursForCausalLM"]}))
    with pytest.raises(ConfigError, match="class 'OursForCausalLM', which transformers has not"):
        soup_model(folders)
