"""The teacher of KDRL in the align job: behind a server, with another end token, and in two processes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.core.config import to_toml
from kullback.core.errors import ConfigError, DataError
from kullback.decode.served import ServedScorer
from kullback.jobs import align as job
from kullback.jobs._align_methods import chosen_method
from kullback.jobs._align_reference import with_teacher

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
from _adding import align_config, make_adder, with_training
from _launch import launched
from _server import Server


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    return make_adder(tmp_path_factory.mktemp("adder"))


def events(run, kind="evaluation"):
    lines = (run / "parts" / "aligned-0" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("dialect", ["echo", "prompt_logprobs"])
def test_a_served_teacher_says_what_it_says_at_hand(dialect, adder, tmp_path):
    server = Server(AutoModelForCausalLM.from_pretrained(adder / "moved").eval(), dialect)
    config = with_training(align_config(adder, method="kdrl", options={"beta": 0.3}), steps=2)
    local = job.run(config, tmp_path / "local").path
    served = job.run(replace(config, reference=(server.url,)), tmp_path / "served").path
    for one, other in zip(events(served), events(local), strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-4)
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (local, served))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)
    server.close()


def test_what_a_served_teacher_cannot_do_is_said_before_the_run(adder, tmp_path):
    address = "http://127.0.0.1:9/v1"  # where nobody answers, and nobody is asked
    for change, words in (
        ({"options": {"divergence": "exact"}}, "log-probabilities of drawn tokens alone"),
        ({"options": {"divergence": "top-k", "top_k": 4}}, "a teacher's directory"),
        ({"reference": (address, str(adder / "moved"))}, "name it alone"),
        ({"sampling": job.SamplingConfig(temperature=0.5)}, "temperature 1"),
        ({"method": "nash-mp", "options": {"mode": "nash-md"}}, "draws from the reference too"),
    ):
        config = align_config(adder, **{"method": "kdrl", "reference": (address,), **change})
        with pytest.raises(ConfigError, match=words):
            job.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_server_that_says_too_little(adder):
    for dialect in ("top alone", "nothing"):
        server = Server(AutoModelForCausalLM.from_pretrained(adder / "model").eval(), dialect)
        with pytest.raises(DataError, match="every token of a text"):
            ServedScorer(server.url)([[1, 2, 3, 5]])
        server.close()


def test_a_teacher_whose_texts_end_otherwise(adder, tmp_path):
    """Its log-probability of the model's end token is no opinion: it is heard on all other tokens."""
    AutoModelForCausalLM.from_pretrained(adder / "moved").save_pretrained(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(adder / "model")
    tokenizer.eos_token = "z"
    tokenizer.save_pretrained(tmp_path / "other")
    config = with_training(align_config(adder, method="kdrl", reference=(str(tmp_path / "other"),)), steps=10)
    run = job.run(config, tmp_path / "run").path
    assert events(run, "end")[0]["text"].startswith("the teacher's texts end with another token")
    (step,) = events(run, "step")
    assert step["metric/kept"] < 1.0
    same = job.run(replace(config, reference=(str(adder / "moved"),)), tmp_path / "same").path
    assert not events(same, "end")
    assert events(same, "step")[0]["metric/kept"] == 1.0


def test_right_is_what_the_job_counts_as_right():
    method = chosen_method(job.MethodConfig(name="kdrl", options={"keep": "response"})).method
    found = with_teacher(method, correct=0.0, end=1, ends=[1, 1])
    assert (found.correct_over, found.unheard) == (0.0, ())
    batch = {
        "rewards": torch.tensor([0.0, 0.2]), "completion_mask": torch.ones(2, 1), "input_ids": torch.ones(2, 2),
    }  # fmt: skip
    heard = found.prepare(batch, group=2, generator=torch.Generator())["heard"]
    assert heard.tolist() == [[True], [False]]
    assert method.prepare(batch, group=2, generator=torch.Generator())["heard"].all()


@pytest.mark.slow
def test_two_processes_with_whole_laws_and_masks(adder, tmp_path):
    options = {"divergence": "exact", "keep": "response", "beta": 0.3}
    config = with_training(align_config(adder, method="kdrl", options=options), accumulate=2)
    (tmp_path / "job.toml").write_text(to_toml(config))
    launched("align", "--config", tmp_path / "job.toml", "--out", tmp_path / "two", processes=2)
    found = events(tmp_path / "two")
    assert 0.0 <= found[-1]["reward"] <= 1.0
    assert found[-1]["divergence"] != found[0]["divergence"]
