"""The main job in processes of its own: two at once, and one that is killed."""

import json
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
    one = losses(job.run(config, tmp_path / "one").path)
    assert one.keys() == two.keys()
    for step, event in one.items():
        for name in ("cross_entropy", "divergence"):
            assert two[step][name] == pytest.approx(event[name], rel=1e-5)


def sharded(*words, stop=""):
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    script = Path(__file__).with_name("_sharded.py")
    return subprocess.run(
        [sys.executable, "-m", *launch, str(script), "distill", *map(str, words)],
        env={**ENVIRONMENT, "KULLBACK_TEST_STOP": stop}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


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
