"""Directories of adapters as models and references of the align job, and as the parents of SALSA's soup."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.align.soup import soup
from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator
from kullback.jobs import align as job
from kullback.jobs._models import load_model
from kullback.jobs._training import LoraSettings

sys.path.insert(0, str(Path(__file__).parent))
from _adding import align_config, make_adder


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    """With adapters first/ and second/ of the model, which know no tokenizer, and third/ of moved/."""
    root = make_adder(tmp_path_factory.mktemp("adder"))
    for seed, (name, base) in enumerate((("first", "model"), ("second", "model"), ("third", "moved"))):
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / base), settings)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    weight.normal_(std=0.05, generator=generator(seed, "adapter"))
        model.save_pretrained(root / name)
    return root


def evaluations(run):
    lines = (run.path / "parts" / "aligned-0" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "evaluation"]


@pytest.mark.parametrize("method", ["salsa", "dpo"])
def test_adapters_have_the_reference_that_their_saved_soup_is(method, adder, tmp_path):
    parents = (str(adder / "first"), str(adder / "second"))
    saved = soup(parents, save_to=tmp_path / "soup")
    AutoTokenizer.from_pretrained(adder / "model").save_pretrained(saved)
    config = align_config(adder, method=method, model=parents[0], reference=parents)
    once = evaluations(job.run(config, tmp_path / "adapters"))
    alone = (str(saved), str(saved)) if method == "salsa" else (str(saved),)
    again = evaluations(job.run(replace(config, reference=alone), tmp_path / "saved"))
    parent = evaluations(job.run(replace(config, reference=(parents[1],) * 2), tmp_path / "parent"))
    assert once[0]["divergence"] == pytest.approx(again[0]["divergence"], rel=1e-4)
    assert abs(once[0]["divergence"] - parent[0]["divergence"]) > 1e-3 * parent[0]["divergence"], "another reference"


def test_models_that_have_no_average(adder, tmp_path):
    """Neurons in another order make the same model, and no average of both is one; adapters of one model have one."""
    permuted = AutoModelForCausalLM.from_pretrained(adder / "model")
    order = torch.randperm(permuted.config.intermediate_size, generator=generator(0, "order"))
    with torch.no_grad():
        for layer in permuted.model.layers:
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.copy_(part.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    permuted.save_pretrained(tmp_path / "permuted")
    AutoTokenizer.from_pretrained(adder / "model").save_pretrained(tmp_path / "permuted")
    for other, apart in ((tmp_path / "permuted", True), (adder / "first", False)):
        told = []
        config = align_config(adder, method="salsa", reference=(str(adder / "model"), str(other)))
        run = job.run(config, tmp_path / f"run {apart}", listen=told.append)
        said = [e["text"] for e in told if e["kind"] == "note" and "the average of the 2 references" in e["text"]]
        assert len(said) == apart
        kept = json.loads((run.path / "report.json").read_text())["notes"]
        assert [note for note in kept if "average" in note] == said


def test_an_adapter_is_aligned_with_adapters_of_its_own(adder, tmp_path):
    config = align_config(adder, model=str(adder / "first"), lora=LoraSettings(rank=2))
    run = job.run(config, tmp_path / "run")
    assert evaluations(run)[0]["divergence"] == pytest.approx(0.0, abs=1e-9), "the reference is the adapted model"
    start = load_model(adder / "first", role="model").state_dict()
    end = load_file(run.path / "model" / "model.safetensors")
    assert set(end) == set(start)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(start[name], load_file(adder / "model" / "model.safetensors")[name])


def test_adapters_that_cannot_be_read(adder, tmp_path):
    parents = (str(adder / "first"), str(adder / "third"))
    with pytest.raises(ConfigError, match="adapters of different models, .*model and .*moved"):
        job.run(align_config(adder, method="salsa", reference=parents), tmp_path / "run")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    with pytest.raises(DataError, match="download the model that it adapts"):
        job.run(align_config(adder, model=str(tmp_path / "lost")), tmp_path / "run")
    settings = json.loads((adder / "first" / "adapter_config.json").read_text())
    (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="an adapter that does not fit its model"):
        job.run(align_config(adder, model=str(tmp_path / "lost")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
