"""What the align job cuts it counts and says: in the events, to the listener, in the report and in print."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback import cli
from kullback.core.config import to_toml
from kullback.core.errors import ConfigError
from kullback.jobs import align as job

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
from _adding import align_config, make_adder, with_training
from _server import Server


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    return make_adder(tmp_path_factory.mktemp("adder"))


def with_data(config, lines, folder, **values):
    """Training and validation on the same records, of one sum each with a prompt and completions of any length."""
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = str(folder / "examples.jsonl")
    return replace(config, data=replace(config.data, train=path, validation=path, validation_prompts=6, **values))


def told_and_kept(config, out):
    told = []
    run = job.run(config, out, listen=told.append)
    report = json.loads((run.path / "report.json").read_text())
    return [event["text"] for event in told if event["kind"] == "note"], list(run.events()), report["notes"]


# A character is a token of the adder's, and each completion has an end token after it.
LINES = [
    {"prompt": f"{'1+' * i}1=", "chosen": str(i + 1) + "0" * i, "rejected": str(i) + "0" * i, "answer": str(i + 1)}
    for i in range(6)
]


@pytest.mark.parametrize(("method", "cut"), [("dpo", "12 of 24"), ("sft", "6 of 12")])
def test_completions_of_the_data(method, cut, adder, tmp_path):
    """Of 1, 2, ..., 6 characters and an end, those with over 4 tokens are cut: 4, 5 and 6 of them."""
    config = with_training(with_data(align_config(adder, method=method), LINES, tmp_path), steps=1)
    told, events, notes = told_and_kept(config, tmp_path / "run")
    wanted = f"{cut} completions have over data.length = 4 tokens, the end token among them, and are cut there "
    assert told[0].startswith(wanted + "(the longest has 7)")
    assert notes[0] == told[0]
    assert [event["text"] for event in events if event["kind"] == "input"] == told[:1]
    whole = replace(config, data=replace(config.data, length=7))
    assert "data.length = 7" not in " ".join(told_and_kept(whole, tmp_path / "whole")[0])


def test_pairs_that_are_alike_once_they_are_cut(adder, tmp_path):
    lines = [{"prompt": "1+1=", "chosen": "23451", "rejected": "23452", "answer": "2"}, *LINES[:1]]
    config = with_training(with_data(align_config(adder, method="dpo"), lines, tmp_path), steps=1)
    told, _, _ = told_and_kept(config, tmp_path / "run")
    assert told[0].endswith("; 2 pairs have nothing left that tells the sides apart"), "one in each file"


def test_prompts(adder, tmp_path):
    """Of 2, 4, ..., 12 tokens, those with over 8 lose their beginning."""
    config = with_training(with_data(align_config(adder), LINES, tmp_path, prompt_length=8), steps=1)
    told, _, notes = told_and_kept(config, tmp_path / "run")
    words = "4 of 12 prompts have over data.prompt_length = 8 tokens and lose their beginning (the longest has 12)"
    assert told[0] == notes[0] == f"{words}; a reward sees them whole"


@pytest.mark.parametrize("served", [False, True])
def test_rollouts(served, adder, tmp_path):
    """With room for one token no sum has an end; with room for four all have."""
    server = Server(AutoModelForCausalLM.from_pretrained(adder / "model").eval()) if served else None
    sampling = job.SamplingConfig(group=4, validation=4, server=server.url if server else "")
    config = with_training(align_config(adder, sampling=sampling), steps=10)
    short = replace(config, data=replace(config.data, length=1))
    told, _, notes = told_and_kept(short, tmp_path / "short")
    lines = (tmp_path / "short" / "parts" / "aligned-0" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert len(told) == len([event for event in events if event["kind"] == "cut"]) == 1
    assert "% of the completions of 5 batches in a row have not ended at data.length = 1 tokens" in told[0]
    (step,) = (event for event in events if event["kind"] == "step")
    assert step["metric/cut"] > 0.9
    assert notes[-1].startswith("completions that had not ended at data.length = 1 tokens and were cut there: ")
    assert f"{step['metric/cut']:.1%} of those drawn in training and " in notes[-1]
    assert told_and_kept(config, tmp_path / "whole")[0] == []
    if server:
        server.close()


def test_it_is_printed(adder, tmp_path, capsys):
    config = with_training(with_data(align_config(adder, method="sft"), LINES, tmp_path), steps=1)
    (tmp_path / "job.toml").write_text(to_toml(config))
    assert cli.execute(["align", "--config", str(tmp_path / "job.toml"), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    for words in (printed.out, printed.err):
        assert "6 of 12 completions have over data.length = 4 tokens" in " ".join(words.split())


def test_more_tokens_than_the_model_has_places_for(adder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(adder / "model")
    places = model.config.max_position_embeddings
    config = align_config(adder)
    with pytest.raises(ConfigError, match=f"has {places} positions: lower data.prompt_length"):
        job.run(replace(config, data=replace(config.data, length=places)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    tokens = AutoTokenizer.from_pretrained(adder / "model")("1+2=").input_ids
    fits = replace(config, data=replace(config.data, length=places - len(tokens)))
    assert job.run(with_training(fits, steps=1), tmp_path / "fits")
