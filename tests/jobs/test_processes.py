"""The main job in processes of its own: two at once, and one that is killed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kullback.core.config import to_toml
from kullback.jobs import distill as job

sys.path.insert(0, str(Path(__file__).parent))
from _launch import ENVIRONMENT, assert_same_bits, free_port, killed, launched


def run(*words, processes=1):
    return launched("distill", *words, processes=processes)


def losses(path, part="distilled-0"):
    events = [json.loads(line) for line in (path / "parts" / part / "events.jsonl").read_text().splitlines()]
    return {event["step"]: event for event in events if event["kind"] == "evaluation"}


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_two_processes_have_the_loss_of_one(config, tmp_path, on_policy):
    config = replace(config, objective=replace(config.objective, on_policy=on_policy, prompt=4))
    (tmp_path / "job.toml").write_text(to_toml(config))
    run("--config", tmp_path / "job.toml", "--out", tmp_path / "two", processes=2)
    randomness = (tmp_path / "two" / "parts" / "distilled-0" / "ckpt" / "step-00000006").glob("randomness-*.json")
    assert sorted(path.stem for path in randomness) == ["randomness-0", "randomness-1"], "there were two processes"
    two = losses(tmp_path / "two")
    if on_policy:  # each process draws samples of its own
        assert two[6]["divergence"] < two[0]["divergence"]
        return
    assert_same_losses(job.run(config, tmp_path / "one").path, tmp_path / "two")


def back_to(path, step, part="distilled-0"):
    """What a job that was killed after its checkpoint at `step` leaves."""
    for place in (path / "report.json", path / "parts" / part / "report.json"):
        place.unlink()
    for place in (path / "model", path / "parts" / part / "model"):
        shutil.rmtree(place)
    for place in (path / "parts" / part / "ckpt").glob("step-*"):
        if int(place.name.removeprefix("step-")) > step:
            shutil.rmtree(place)


def notes(path, part="distilled-0"):
    events = [json.loads(line) for line in (path / "parts" / part / "events.jsonl").read_text().splitlines()]
    return [event["text"] for event in events if event["kind"] == "note"]


def assert_same_losses(expected, found):
    assert losses(expected).keys() == losses(found).keys()
    for step, event in losses(expected).items():
        for name in ("cross_entropy", "divergence"):
            assert losses(found)[step][name] == pytest.approx(event[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_batches(config, tmp_path, before, after):
    (tmp_path / "job.toml").write_text(to_toml(config))
    straight = job.run(config, tmp_path / "straight").path
    run("--config", tmp_path / "job.toml", "--out", tmp_path / "moved", processes=before)
    back_to(tmp_path / "moved", 4)
    run("--resume", tmp_path / "moved", processes=after)
    assert notes(straight) == []
    (said,) = notes(tmp_path / "moved")
    assert said.startswith(f"{after} processes go on from a checkpoint of {before}")
    assert_same_losses(straight, tmp_path / "moved")


def sharded(*words, stop=""):
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    script = Path(__file__).with_name("_sharded.py")
    return subprocess.run(
        [sys.executable, "-m", *launch, str(script), "distill", *map(str, words)],
        env={**ENVIRONMENT, "KULLBACK_TEST_STOP": stop}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_a_fully_sharded_student_learns_from_the_samples_that_an_unsharded_one_draws(config, tmp_path):
    config = replace(config, objective=replace(config.objective, on_policy=1.0, prompt=4))
    (tmp_path / "whole.toml").write_text(to_toml(config))
    run("--config", tmp_path / "whole.toml", "--out", tmp_path / "whole", processes=2)
    (tmp_path / "parts.toml").write_text(to_toml(replace(config, training=replace(config.training, fsdp=True))))
    stopped = sharded("--config", tmp_path / "parts.toml", "--out", tmp_path / "parts", stop="3")
    assert "stopped after step 3 of 6, all saved" in stopped.stderr, stopped.stderr[-3000:]
    resumed = sharded("--resume", tmp_path / "parts")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "whole")[6]["divergence"] < 0.99 * losses(tmp_path / "whole")[0]["divergence"]
    for step, event in losses(tmp_path / "whole").items():  # the same tokens are drawn, or the losses would differ
        assert losses(tmp_path / "parts")[step]["divergence"] == pytest.approx(event["divergence"], rel=1e-4)


@pytest.mark.slow
def test_a_fully_sharded_student_is_the_same_student_stopped_and_resumed(config, tmp_path):
    config = replace(config, training=replace(config.training, fsdp=True))
    (tmp_path / "job.toml").write_text(to_toml(config))
    stopped = sharded("--config", tmp_path / "job.toml", "--out", tmp_path / "two", stop="3")
    assert "stopped after step 3 of 6, all saved" in stopped.stderr
    resumed = sharded("--resume", tmp_path / "two")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    one = job.run(replace(config, training=replace(config.training, fsdp=False)), tmp_path / "one")
    two = losses(tmp_path / "two")
    for step, event in losses(one.path).items():
        assert two[step]["cross_entropy"] == pytest.approx(event["cross_entropy"], rel=1e-5)
    expected = load_file(one.path / "model" / "model.safetensors")
    found = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)


def test_sigkill_at_any_step_then_resume_gives_the_same_bits(config, tmp_path):
    config = replace(config, training=replace(config.training, steps=12))
    (tmp_path / "job.toml").write_text(to_toml(config))
    run("--config", tmp_path / "job.toml", "--out", tmp_path / "straight")
    killed("distill", tmp_path / "job.toml", tmp_path / "killed", "distilled-0")
    run("--resume", tmp_path / "killed")
    assert_same_bits(tmp_path / "straight", tmp_path / "killed")
