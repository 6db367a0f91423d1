"""The run directory: what is in it, what resuming asks for, and what signals and kills leave."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import kullback
from kullback.core import environment
from kullback.core.errors import CheckpointError, ConfigError
from kullback.core.runs import Run, stop_signals


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Settings:
    steps: int = 5
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None


def fill(run: Run, step: int, size: int = 10) -> None:
    with run.checkpoint(step) as place:
        (place / "part").mkdir()
        (place / "part" / "weights").write_bytes(b"x" * size)


def test_a_run_directory_says_what_was_asked_and_where(tmp_path):
    run = Run.start(tmp_path / "run", Settings(limit=3), kind="test", seed=7)
    run.event("step", loss=torch.tensor(0.5), many=np.arange(2), where=Path("a"))
    run.figure("curve").write_text("<svg/>")
    run.report({"loss": np.float64(0.25), "rows": [{"a": float("nan")}]})
    fill(run, 3)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "ckpt", "env.json", "events.jsonl", "figures", "report.json", "run.toml",
    ]  # fmt: skip
    again = Run.open(run.path)
    assert (again.kind, again.seed, again.path) == ("test", 7, tmp_path / "run")
    assert again.config == {"steps": 5, "inner": {"rate": 0.1}, "limit": 3}
    start, step = again.events()
    assert start["kind"] == "start"
    assert {key: step[key] for key in ("kind", "loss", "many", "where")} == {
        "kind": "step", "loss": 0.5, "many": [0, 1], "where": "a",
    }  # fmt: skip
    assert step["time"] >= start["time"] > 1.5e9
    assert json.loads((run.path / "report.json").read_text())["loss"] == 0.25
    assert (run.path / "figures" / "curve.svg").exists()


def test_env_json_says_where_it_ran(tmp_path):
    found = Run.start(tmp_path / "run", {}, kind="test").environment()
    assert found["versions"]["kullback"] == kullback.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert set(found) == {"python", "platform", "cpu", "cores", "threads", "versions", "commit"}


def test_the_commit_is_that_of_the_checkout_and_of_no_other(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    file = tmp_path / "package" / "core" / "environment.py"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "package" / "other.py").touch()
    monkeypatch.setattr(environment, "__file__", str(file))
    assert environment.commit() is None  # inside a repository, but not of it
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment.commit() == head
    (tmp_path / "notes").touch()
    assert environment.commit() == head
    (tmp_path / "package" / "other.py").write_text("# changed")
    assert environment.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None


def test_a_directory_in_use_says_how_to_resume(tmp_path):
    Run.start(tmp_path, Settings(), kind="test")
    with pytest.raises(CheckpointError, match="resume it"):
        Run.start(tmp_path, Settings(), kind="test")


def test_a_directory_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"thesis\.tex"):
            Run.start(tmp_path, Settings(), kind="test", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="choose a directory"):
        Run.start(tmp_path / "file", Settings(), kind="test")
    with pytest.raises(CheckpointError, match="cannot write"):
        Run.start(tmp_path / "file" / "run", Settings(), kind="test")


def test_a_start_that_was_cut_short_can_start_again(tmp_path):
    for name in ("env.json", "unit.json", ".partial-run.toml-x.tmp"):
        (tmp_path / name).write_text("{")
    run = Run.start(tmp_path, Settings(), kind="test")
    assert Run.open(run.path).kind == "test"
    assert not (tmp_path / ".partial-run.toml-x.tmp").exists()


def test_resuming_the_same_configuration_goes_on(tmp_path):
    first = Run.start(tmp_path, Settings(), kind="test", seed=1)
    fill(first, 1)
    (tmp_path / "ckpt" / ".partial-step-00000002-x.tmp").mkdir()
    run = Run.start(tmp_path, Settings(), kind="test", seed=1, resume=True)
    assert [event["kind"] for event in run.events()] == ["start", "resume"]
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (Settings(steps=6), {}, r"steps: 5 -> 6"),
        (Settings(inner=Inner(rate=0.2)), {}, r"inner.rate: 0.1 -> 0.2"),
        (Settings(limit=1), {}, r"limit: \(not set\) -> 1"),
        (Settings(), {"seed": 2}, r"seed: 1 -> 2"),
        (Settings(), {"kind": "other"}, r'kind: "test" -> "other"'),
        (Settings(steps=6, limit=2), {}, r"limit: .*; .*steps: 5 -> 6"),
    ],
)
def test_resuming_another_configuration_is_refused_with_what_changed(tmp_path, settings, options, message):
    Run.start(tmp_path, Settings(), kind="test", seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        Run.start(tmp_path, settings, resume=True, **{"kind": "test", "seed": 1, **options})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", ["kind = 1\nseed", "kind = 'a'\nseed = 1\n", ""])
def test_a_damaged_or_missing_run_is_one_sentence(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"no run\.toml"):
        Run.open(tmp_path)
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        Run.open(tmp_path)


@pytest.mark.parametrize("torn", [b'{"kind": "st', b"\0\0\0", b"{" * 10_000])
def test_a_torn_last_line_is_passed_over_and_repaired(tmp_path, torn):
    run = Run.start(tmp_path, Settings(), kind="test")
    run.event("step", number=1)
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(torn)
    again = Run.open(tmp_path)
    assert [event["kind"] for event in again.events()] == ["start", "step"]
    again.event("step", number=2)
    again.event("step", number=3)
    assert [event.get("number") for event in again.events()] == [None, 1, 2, 3]


def test_damage_before_the_last_line_is_said(tmp_path):
    run = Run.start(tmp_path, Settings(), kind="test")
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b'{"kind": \n{"kind": "step"}\n')
    with pytest.raises(CheckpointError, match=r"line 2 of .*events\.jsonl is damaged"):
        list(run.events())


def test_lines_of_several_threads_do_not_mix(tmp_path):
    runs = [Run.start(tmp_path, Settings(), kind="test"), *(Run.open(tmp_path) for _ in range(3))]

    def work(run: Run, name: int) -> None:
        for number in range(100):
            run.event("step", name=name, number=number, text="x" * 500)

    threads = [threading.Thread(target=work, args=(run, name)) for name, run in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(event["name"], event["number"]) for event in runs[0].events() if event["kind"] == "step"]
    assert sorted(found) == [(name, number) for name in range(4) for number in range(100)]


def test_events_hold_what_json_can(tmp_path):
    run = Run.start(tmp_path, Settings(), kind="test")
    with pytest.raises(ConfigError, match="which JSON cannot keep"):
        run.event("step", thing=object())
    assert len(list(run.events())) == 1


def test_checkpoints_are_found_by_their_number_and_pruned(tmp_path):
    run = Run.start(tmp_path, Settings(), kind="test")
    assert run.latest_checkpoint() is None
    assert run.prune_checkpoints(1) == []
    for step in (2, 10, 123_456_789, 9):
        fill(run, step)
    assert [path.name for path in run.checkpoints()] == [
        "step-00000002", "step-00000009", "step-00000010", "step-123456789",
    ]  # fmt: skip
    assert run.latest_checkpoint() == tmp_path / "ckpt" / "step-123456789"
    assert [path.name for path in run.prune_checkpoints(2)] == ["step-00000002", "step-00000009"]
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["step-00000010", "step-123456789"]
    with pytest.raises(ConfigError, match="at least 0"):
        run.prune_checkpoints(-1)
    run.prune_checkpoints(0)
    assert run.latest_checkpoint() is None


def test_a_checkpoint_that_is_not_whole_is_no_checkpoint(tmp_path):
    run = Run.start(tmp_path, Settings(), kind="test")
    for step in (1, 2, 3, 4):
        fill(run, step)
    folder = tmp_path / "ckpt"
    (folder / "step-00000004" / "part" / "weights").write_bytes(b"x")
    (folder / "step-00000003" / "part" / "weights").unlink()
    (folder / "step-00000002" / "manifest.json").write_text("{")
    (folder / "step-00000005").mkdir()
    (folder / "notes.txt").touch()
    assert run.latest_checkpoint() == folder / "step-00000001"


def test_a_failed_checkpoint_leaves_the_ones_before(tmp_path):
    run = Run.start(tmp_path, Settings(), kind="test")
    fill(run, 1)

    def fails() -> None:
        with run.checkpoint(2) as place:
            (place / "half").touch()
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fails()
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step-00000001"]


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(small_disk):
    run = Run.start(small_disk / "run", Settings(), kind="test")
    fill(run, 1, 100_000)
    with pytest.raises(CheckpointError, match="No space left"):
        fill(run, 2, 400_000)
    assert [path.name for path in (small_disk / "run" / "ckpt").iterdir()] == ["step-00000001"]
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.json"):
        run.report({"text": "x" * 400_000})
    assert not (small_disk / "run" / "report.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_an_event_on_a_full_disk_is_one_sentence(tmp_path):
    run = Run.start(tmp_path, Settings(), kind="test")
    log = tmp_path / "events.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    run._whole = True  # there is nothing to repair in a device
    with pytest.raises(CheckpointError, match=r"cannot write .*events\.jsonl \(No space left on device\)"):
        run.event("step")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_handlers_come_back(number):
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_signals_are_left_alone():
    found = []

    def work() -> None:
        with stop_signals() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_core_needs_no_torch():
    code = (
        "import sys, kullback\n"
        "from kullback.core import config, engine, environment, errors, files, index, runs\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules or 'pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
