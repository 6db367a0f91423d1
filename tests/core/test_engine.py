"""Units of work: isolation, what is kept, and going on after a kill or a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kullback.core.engine import Unit, run_units
from kullback.core.errors import CheckpointError, ConfigError, MissingExtra

HERE = Path(__file__).parent
SWEEP = """
import sys
from pathlib import Path
from kullback.core.engine import Unit, run_units
seconds = [float(text) for text in sys.argv[2:]]
units = [Unit(key=f"u{number}", call="_units:wait", arguments={"seconds": wait}) for number, wait in enumerate(seconds)]
try:
    run_units(units, root=Path(sys.argv[1]), workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(autouse=True)
def _units_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def squares(count: int) -> list[Unit]:
    return [Unit(key=f"square/{number}", call="_units:square", arguments={"number": number}) for number in range(count)]


def until(condition, seconds: float = 20.0) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process still works; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_results_come_in_order_and_done_units_are_skipped(tmp_path):
    units = squares(3)
    events: list[tuple[str, str]] = []
    note = lambda event: events.append((event["kind"], event["key"]))  # noqa: E731
    first = run_units(units[:2], root=tmp_path, workers=2, on_event=note)
    second = run_units(units[::-1], root=tmp_path, on_event=note)
    assert [result.result["square"] for result in first] == [0, 1]
    assert [(result.result["square"], result.skipped) for result in second] == [(4, False), (1, True), (0, True)]
    assert [(tmp_path / unit.key / "ran").read_text() for unit in units] == ["x", "x", "x"]
    assert sorted(events[:4]) == [
        ("done", "square/0"),
        ("done", "square/1"),
        ("started", "square/0"),
        ("started", "square/1"),
    ]
    assert events[4:] == [
        ("skipped", "square/1"), ("skipped", "square/0"), ("started", "square/2"), ("done", "square/2"),
    ]  # fmt: skip
    assert second[0].seconds > 0
    assert second[0].result["threads"] == "1"


def test_one_failing_unit_takes_no_other_down_and_its_traceback_is_kept(tmp_path):
    ways = {
        "raise": ("ValueError: no such luck", "raise ValueError"),
        "kill": ("the process was killed by SIGKILL", "SIGKILL"),
        "segfault": ("the process was killed by SIGSEGV", "a last word"),
        "exit": ("the process ended with exit code 1: enough", "enough"),
        "no mapping": (
            "ConfigError: _units:fail returned a object: a unit returns a mapping",
            "a unit returns a mapping",
        ),
        "no JSON": ("TypeError: Object of type object is not JSON serializable", "TypeError"),
    }
    bad = [Unit(key=way.replace(" ", "-"), call="_units:fail", arguments={"way": way}) for way in ways]
    results = run_units([*bad, *squares(1)], root=tmp_path, workers=2)
    assert [result.status for result in results] == ["failed"] * len(bad) + ["done"]
    for result, (error, kept) in zip(results, ways.values()):
        assert result.error == error
        assert kept in (result.path / "traceback.txt").read_text()
    assert not (results[-1].path / "traceback.txt").exists()


def test_what_cannot_be_found_fails_alone(tmp_path):
    calls = ["_units:missing", "no_such_module:f"]
    results = run_units([Unit(key=str(n), call=call) for n, call in enumerate(calls)], root=tmp_path, workers=2)
    assert [result.error.split(":")[0] for result in results] == ["AttributeError", "ModuleNotFoundError"]


def test_a_failed_unit_runs_again(tmp_path):
    unit = Unit(key="once", call="_units:once", arguments={"number": 3})
    (first,) = run_units([unit], root=tmp_path)
    (second,) = run_units([unit], root=tmp_path)
    assert (first.status, second.status, dict(second.result)) == ("failed", "done", {"number": 3})
    assert not (tmp_path / "once" / "traceback.txt").exists()


def test_a_unit_that_is_a_run_goes_on_from_its_checkpoint(tmp_path):
    unit = Unit(key="count", call="_units:count", arguments={"to": 4})
    (first,) = run_units([unit], root=tmp_path)
    (second,) = run_units([unit], root=tmp_path)
    assert first.error == "the process was killed by SIGKILL"
    assert second.result == {"begun": 2, "ended": 4}


def test_a_damaged_result_is_a_missing_one(tmp_path):
    (unit,) = squares(1)
    run_units([unit], root=tmp_path)
    (tmp_path / unit.key / "unit.json").write_text('{"status": "do')
    (result,) = run_units([unit], root=tmp_path)
    assert (result.status, result.skipped) == ("done", False)


def test_a_unit_done_with_other_arguments_is_refused(tmp_path):
    run_units(squares(1), root=tmp_path)
    with pytest.raises(CheckpointError, match="arguments.number: 0 -> 7"):
        run_units([Unit(key="square/0", call="_units:square", arguments={"number": 7})], root=tmp_path)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([Unit(key="../up", call="a:b")], "is not a path"),
        ([Unit(key="/root", call="a:b")], "is not a path"),
        ([Unit(key="a", call="a.b")], "module:function"),
        ([Unit(key="a", call="a:b", arguments={"x": object()})], "JSON"),
        ([Unit(key="a", call="a:b")] * 2, "two units"),
        ([Unit(key="a", call="a:b"), Unit(key="a/b", call="a:b")], "inside"),
    ],
)
def test_units_that_cannot_work_are_refused_before_anything_runs(tmp_path, units, message):
    with pytest.raises(ConfigError, match=message):
        run_units([*squares(1), *units], root=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 0}, {"engine": "slurm"}])
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(ConfigError):
        run_units(squares(1), root=tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


def sweep(root: Path, *seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SWEEP, str(root), *map(str, seconds)])


def test_a_killed_sweep_leaves_no_orphans_and_resumes_with_what_is_missing(tmp_path):
    waits = (0.0, 600.0, 600.0)
    parent = sweep(tmp_path, *waits)
    until(lambda: all((tmp_path / f"u{number}" / "pid").exists() for number in range(3)))
    pids = [int((tmp_path / f"u{number}" / "pid").read_text()) for number in (1, 2)]
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    until(lambda: not any(alive(pid) for pid in pids), 5.0)
    for number in (1, 2):
        stored = tmp_path / f"u{number}" / "unit.json"
        content = json.loads(stored.read_text())
        assert content["status"] == "running"
        content["arguments"]["seconds"] = 0.0
        stored.write_text(json.dumps(content))
    units = [Unit(key=f"u{number}", call="_units:wait", arguments={"seconds": 0.0}) for number in range(3)]
    results = run_units(units, root=tmp_path)
    assert [(result.status, result.skipped) for result in results] == [("done", True), ("done", False), ("done", False)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_units_save_and_leaves_what_is_done(tmp_path, number):
    parent = sweep(tmp_path, 0.0, 600.0, 600.0, 600.0)
    until(lambda: all((tmp_path / f"u{unit}" / "pid").exists() for unit in range(3)))
    parent.send_signal(number)
    assert parent.wait(20) == 130
    assert [(tmp_path / f"u{unit}" / "saved").exists() for unit in range(3)] == [False, True, True]
    assert json.loads((tmp_path / "u0" / "unit.json").read_text())["status"] == "done"
    assert not (tmp_path / "u3").exists()


def test_a_units_own_processes_end_with_it(tmp_path):
    code = SWEEP.replace('"_units:wait"', '"_units:wait_with_child"').replace(
        'arguments={"seconds": wait}', "arguments={}"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "0"])
    until((tmp_path / "u0" / "pid").exists)
    pids = [int((tmp_path / "u0" / name).read_text()) for name in ("pid", "child")]
    parent.kill()
    parent.wait()
    until(lambda: not any(alive(pid) for pid in pids), 5.0)


def test_a_root_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        run_units(squares(1), root=tmp_path / "file")


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"kullback\[ray\]"):
        run_units(squares(1), root=tmp_path / "sweep", engine="ray")
    assert not (tmp_path / "sweep").exists()


RAY = """
import json, sys
from pathlib import Path
import ray
from kullback.core.engine import Unit, run_units
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
units = [Unit(key=f"square/{n}", call="_units:square", arguments={"number": n}) for n in range(3)]
units.append(Unit(key="bad", call="_units:fail", arguments={"way": "kill"}))
results = run_units(units, root=Path(sys.argv[1]), workers=2, engine="ray")
again = run_units(units[:3], root=Path(sys.argv[1]), workers=2, engine="ray")
print(json.dumps([[r.status, r.result.get("square"), r.skipped, r.error] for r in [*results, *again]]))
print(json.dumps(ray.is_initialized()))
"""


@pytest.mark.slow
def test_ray_runs_the_same_units(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows, still_there = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert rows == [
        *[["done", number**2, False, ""] for number in range(3)],
        ["failed", None, False, "the process was killed by SIGKILL"],
        *[["done", number**2, True, ""] for number in range(3)],
    ]
    assert still_there


@pytest.mark.slow
def test_a_signal_lets_units_on_ray_save(tmp_path):
    """From a driver that was started with SIGINT ignored, as in a shell's background."""
    code = SWEEP.replace("workers=2", 'workers=2, engine="ray"')
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "0", "600", "600"],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    until(lambda: all((tmp_path / f"u{unit}" / "pid").exists() for unit in range(3)), 60.0)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) == 130
    assert [(tmp_path / f"u{unit}" / "saved").exists() for unit in range(3)] == [False, True, True]
    assert json.loads((tmp_path / "u0" / "unit.json").read_text())["status"] == "done"
