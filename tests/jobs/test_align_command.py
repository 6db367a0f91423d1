"""`kullback align` as it is typed, killed, and run by two processes."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kullback import cli
from kullback.core.config import to_toml
from kullback.jobs import align as job

sys.path.insert(0, str(Path(__file__).parent))
from _adding import align_config, make_adder, with_training
from _launch import assert_same_bits, killed, launched

FEW = ["--set", "training.steps=2", "--set", "training.batch=4", "--set", "data.length=4", "--set", "data.holdout=0.2"]


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    return make_adder(tmp_path_factory.mktemp("adder"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(adder, *more):
    pair = ["--model", adder / "model", "--data", adder / "pairs.jsonl", "--reward", "exact"]
    return ["align", *map(str, pair), *FEW, *map(str, more)]


def output(capsys, arguments):
    assert cli.execute(arguments) == 0
    return capsys.readouterr().out


def test_a_job_prints_a_table_and_where_everything_is(adder, folder, capsys):
    out = output(capsys, typed(adder, "--method", "grpo", "--set", "seeds=[0,1]"))
    for words in ("after grpo", "pass@1", "pass@8", "KL to reference", "distinct-2", "nats a completion"):
        assert words in out
    for name in ("model", "report.json", "samples.jsonl", "curves.csv", "figures/curves.svg"):
        assert f"runs/align-1/{name}" in out
        assert (folder / "runs" / "align-1" / name).exists()
    again = json.loads(output(capsys, ["align", "--resume", "runs/align-1", "--json"]))
    assert again["rows"][1]["policy"] == "after grpo"
    assert "[" in output(capsys, typed(adder, "--method", "dpo", "--reference", adder / "model")), "an interval"


def test_the_plan_costs_nothing_and_writes_nothing(adder, folder, capsys):
    plan = json.loads(output(capsys, typed(adder, "--set", "training.steps=1000", "--dry-run", "--json")))
    assert plan["completions_a_step"] == 4 * 8
    assert plan["completions_in_all"] == 1000 * 4 * 8
    assert plan["minutes"] > 0
    assert not list(folder.iterdir())


def test_bad_input_is_one_sentence(adder, folder, capsys):
    (folder / "pairs.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "2"}\n')
    cases = {
        "no method": ["--method", "dppo"], "no option": ["--set", "method.options.bta=1"],
        "no reward": ["--reward", "exactly"], "to itself": ["--method", "dpo", "--data", "pairs.jsonl"],
    }  # fmt: skip
    for words, more in cases.items():
        assert cli.execute(typed(adder, *more)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert words.removeprefix("no ") in lines[0]
        assert "Traceback" not in captured.out + captured.err
        assert not list(folder.rglob("run.toml"))
    assert cli.execute(["align", "--resume", "runs/align-1", "--method", "dpo"]) == 2
    assert "no other option" in capsys.readouterr().err


def test_what_is_not_there_is_said_at_once(adder, folder, capsys, monkeypatch):
    """Before the job is loaded, which takes seconds."""
    monkeypatch.setitem(sys.modules, "kullback.jobs.align", None)
    monkeypatch.delattr("kullback.jobs.align")
    (folder / "run").mkdir()
    (folder / "run" / "run.toml").touch()
    cases = {
        "model gone is not a directory": ["--model", "gone"], "reference gone is not a": ["--reference", "gone"],
        "gone.jsonl does not exist": ["--data", "gone.jsonl"], "run already holds a run": ["--out", "run"],
    }  # fmt: skip
    for words, more in cases.items():
        assert cli.execute(typed(adder, *more)) == 2
        assert words in capsys.readouterr().err
    assert cli.execute(["align", "--resume", "gone"]) == 2
    assert "gone is not a run directory" in capsys.readouterr().err


def test_sigkill_at_any_step_then_resume_gives_the_same_bits(adder, tmp_path):
    config = with_training(align_config(adder, options={"beta": 0.1}), steps=30)
    (tmp_path / "job.toml").write_text(to_toml(config))
    straight = job.run(config, tmp_path / "straight").path
    killed("align", tmp_path / "job.toml", tmp_path / "killed", "aligned-0")
    launched("align", "--resume", tmp_path / "killed")
    assert_same_bits(straight, tmp_path / "killed")


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_two_processes_have_the_loss_of_one(method, adder, tmp_path):
    options = {"epochs": 2} if method == "ppo" else {}
    config = replace(align_config(adder, method=method, options=options), seeds=(0,))
    (tmp_path / "job.toml").write_text(to_toml(config))
    launched("align", "--config", tmp_path / "job.toml", "--out", tmp_path / "two", processes=2)
    lines = (tmp_path / "two" / "parts" / "aligned-0" / "events.jsonl").read_text().splitlines()
    two = [event for event in map(json.loads, lines) if event["kind"] == "evaluation"]
    assert two[-1]["divergence"] > 1e-6
    if method == "ppo":  # each process samples completions of its own
        assert 0.0 <= two[-1]["reward"] <= 1.0
        return
    one = job.run(config, tmp_path / "one").path
    lines = (one / "parts" / "aligned-0" / "events.jsonl").read_text().splitlines()
    for event, expected in zip(two, [e for e in map(json.loads, lines) if e["kind"] == "evaluation"], strict=True):
        assert event["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(before, after, adder, tmp_path):
    """With completions held for a second use, which are drawn anew."""
    config = align_config(adder, method="ppo", options={"epochs": 2})
    config = with_training(config, steps=3, save_every=3)
    (tmp_path / "job.toml").write_text(to_toml(config))
    launched("align", "--config", tmp_path / "job.toml", "--out", tmp_path / "run", processes=before)
    part = tmp_path / "run" / "parts" / "aligned-0"
    # As if it had been stopped there: a run of more steps, whose part is not done.
    for place in (tmp_path / "run", part):
        (place / "report.json").unlink()
        (place / "run.toml").write_text((place / "run.toml").read_text().replace("steps = 3", "steps = 6"))
    for place in (tmp_path / "run" / "model", part / "model"):
        shutil.rmtree(place)
    launched("align", "--resume", tmp_path / "run", processes=after)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(math.isfinite(value) for value in report["rows"][1].values() if isinstance(value, float))
    assert sorted(path.name for path in (part / "ckpt").iterdir())[-1] == "step-00000006"
