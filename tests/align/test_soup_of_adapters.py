"""Soups of LoRA adapters: the average of the models that they make, which averages of their factors are not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kullback.align._shards import open_shards
from kullback.align.soup import soup, soup_state_dict
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.models.adapters import adapter_base
from kullback.models.small import small_llama

SIZES = {"hidden": 16, "layers": 2, "heads": 2, "length": 16}
# Of other ranks and scales: nothing but the products has an average.
SETTINGS = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "b": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
          "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}},
}  # fmt: skip


def adapter(base, place, *, seed, **settings):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = generator(seed, "adapter")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3, generator=draw)
    model.save_pretrained(place)


def merged(base, place):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place).merge_and_unload()


@pytest.fixture
def parents(tmp_path):
    small_llama(260, **SIZES, generator=generator(2)).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        adapter(tmp_path / "base", tmp_path / name, seed=seed, **settings)
    return tmp_path


def test_it_is_the_average_of_the_merged_models(parents):
    a, b = (merged(parents / "base", parents / name) for name in "ab")
    expected = soup_state_dict([a.state_dict(), b.state_dict()], [0.25, 0.75])
    place = soup([parents / "a", parents / "b"], [0.25, 0.75], save_to=parents / "soup")
    found = AutoModelForCausalLM.from_pretrained(place).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert not (place / "adapter_config.json").exists()
    mixed = soup([parents / "base", parents / "a"], save_to=parents / "mixed")
    half = soup_state_dict([AutoModelForCausalLM.from_pretrained(parents / "base").state_dict(), a.state_dict()])
    found = AutoModelForCausalLM.from_pretrained(mixed).state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in half.items())


def test_averages_of_factors_are_another_model_and_are_refused(parents):
    """Two adapters of one kind: the mean of B times the mean of A is not the mean of B A."""
    adapter(parents / "base", parents / "c", seed=7, **SETTINGS["a"])
    states = [load_file(parents / name / "adapter_model.safetensors") for name in "ac"]
    averaged = {name: 0.5 * (states[0][name] + states[1][name]) for name in states[0]}
    wrong = merged(parents / "base", parents / "a")
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(parents / "base").state_dict()
        for name, tensor in wrong.state_dict().items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
            if key.format("A") in averaged:
                tensor.copy_(base[name] + 3.0 * averaged[key.format("B")] @ averaged[key.format("A")])
    right = AutoModelForCausalLM.from_pretrained(soup([parents / "a", parents / "c"], save_to=parents / "soup"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (right.state_dict()[name] - wrong.state_dict()[name]).abs().max() > 0.1
    with pytest.raises(ConfigError, match="merge it first"):
        soup_state_dict(states)


def test_the_difference_is_not_lost_in_bfloat16(parents):
    """A step of half of what bf16 can tell apart is there in each merged tensor, and in the soup of two of them."""
    AutoModelForCausalLM.from_pretrained(parents / "base", dtype=torch.bfloat16).save_pretrained(parents / "narrow")
    for name in "ab":
        settings = json.loads((parents / name / "adapter_config.json").read_text())
        (parents / name / "adapter_config.json").write_text(
            json.dumps({**settings, "base_model_name_or_path": "narrow"})
        )
    assert adapter_base(parents / "a") == parents / "narrow", "beside the adapter"
    tensor, kept = open_shards(parents / "a").read("model.layers.0.self_attn.q_proj.weight")
    assert tensor.dtype == torch.float32
    assert kept == torch.bfloat16
    found = load_file(soup([parents / "a", parents / "b"], save_to=parents / "soup") / "model.safetensors")
    assert {part.dtype for part in found.values()} == {torch.bfloat16}


def test_bad_adapters(parents):
    both = [parents / "a", parents / "b"]
    shutil.copytree(parents / "base", parents / "again")
    small_llama(260, **SIZES, generator=generator(3)).save_pretrained(parents / "other", max_shard_size="20KB")
    settings = json.loads((parents / "b" / "adapter_config.json").read_text())

    def with_settings(**values):
        (parents / "b" / "adapter_config.json").write_text(json.dumps({**settings, **values}))

    with_settings(base_model_name_or_path=str(parents / "again"))
    assert soup(both, save_to=parents / "equal").is_dir()
    with_settings(base_model_name_or_path=str(parents / "other"))
    with pytest.raises(ConfigError, match="adapters of different models"):
        soup(both, save_to=parents / "soup")
    with_settings(base_model_name_or_path="somewhere/else")
    with pytest.raises(DataError, match="adapter of 'somewhere/else', and that is no directory here"):
        soup(both, save_to=parents / "soup")
    small_llama(260, **{**SIZES, "hidden": 8}, generator=generator(3)).save_pretrained(parents / "smaller")
    with_settings(base_model_name_or_path=str(parents / "smaller"))
    with pytest.raises(ShapeError, match="of another model"):
        soup(both[1:], save_to=parents / "soup")
    adapter(parents / "base", parents / "b", seed=1, r=2, target_modules="all-linear", use_dora=True)
    with pytest.raises(ConfigError, match="more than low-rank products"):
        soup(both, save_to=parents / "soup")
    (parents / "b" / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="save the adapter again"):
        soup(both, save_to=parents / "soup")
    assert not (parents / "soup").exists()
