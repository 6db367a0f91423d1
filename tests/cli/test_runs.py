"""`kullback runs` on a few small runs."""

import json
from pathlib import Path

import pytest

from kullback import cli
from kullback.core.runs import Run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    one = Run.start(tmp_path / "one", {"steps": 3, "objective": {"name": "kl"}}, kind="distill", seed=1)
    one.report({"loss": 0.5, "bad": float("nan")})
    one.figure("curve").touch()
    two = Run.start(tmp_path / "two", {"steps": 4, "objective": {"name": "kl"}}, kind="distill", seed=2)
    for step in (1, 2, 3):
        with two.checkpoint(step) as place:
            (place / "weights").write_bytes(b"x" * 2000)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.execute(["runs", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.execute(["runs", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def checkpoints(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "two" / "ckpt").iterdir())


def test_ls(root, capsys):
    head, one, two = run(capsys, "ls", root).splitlines()
    assert head.split() == ["run", "kind", "seed", "status", "started", "step", "checkpoints"]
    assert one.split()[:4] == ["one", "distill", "1", "done"]
    assert two.split()[:4] == ["two", "distill", "2", "unfinished"]
    assert two.split()[-4:] == ["3", "3,", "6.2", "kB"]


def test_ls_as_json(root, capsys):
    one, two = json.loads(run(capsys, "ls", root, "--json"))
    assert (one["path"], one["status"], one["metrics"]) == ("one", "done", {"loss": 0.5, "bad": None})
    assert (two["path"], two["step"], two["config"]["steps"]) == ("two", 3, 4)


def test_ls_of_nothing(tmp_path, capsys, monkeypatch):
    assert run(capsys, "ls", tmp_path) == f"no runs below {tmp_path}\n"
    assert run(capsys, "ls", tmp_path, "--json") == "[]\n"
    monkeypatch.chdir(tmp_path)
    assert "runs is not a directory" in fails(capsys, "ls")


def test_show(root, capsys):
    out = run(capsys, "show", root / "one")
    for words in (["steps", "3"], ["objective.name", "kl"], ["loss", "0.5"], ["seed", "1"], ["status", "done"]):
        assert words in [line.split() for line in out.splitlines()]
    assert str(root / "one" / "figures" / "curve.svg") in out
    found = json.loads(run(capsys, "show", root / "one", "--json"))
    assert found["config"] == {"steps": 3, "objective.name": "kl"}
    assert found["metrics"] == {"loss": 0.5, "bad": None}
    assert found["files"] == ["env.json", "events.jsonl", "figures/curve.svg", "report.json", "run.toml"]


def test_diff(root, capsys):
    out = [line.split() for line in run(capsys, "diff", root / "one", root / "two").splitlines()]
    for words in (["seed", "1", "->", "2"], ["steps", "3", "->", "4"], ["loss", "0.5", "->", "-"]):
        assert words in out
    assert not any("objective.name" in words for words in out)
    found = json.loads(run(capsys, "diff", root / "one", root / "two", "--json"))
    assert found["config"] == {"steps": [3, 4]}
    assert found["metrics"]["loss"] == [0.5, None]


def test_diff_of_equal_runs(root, capsys):
    assert run(capsys, "diff", root / "one", root / "one") == "no difference\n"


def test_prune_says_first_and_removes_only_when_told(root, capsys):
    out = run(capsys, "prune", root, "--keep", 1)
    assert "would remove 2 checkpoints, 4.1 kB (--yes does it)" in out
    assert str(root / "two" / "ckpt" / "step-00000001") in out
    assert len(checkpoints(root)) == 3
    assert json.loads(run(capsys, "prune", root, "--keep", 2, "--json"))["removed"] is False
    assert "removed 2 checkpoints" in run(capsys, "prune", root, "--keep", 1, "--yes")
    assert checkpoints(root) == ["step-00000003"]
    assert "would remove 0 checkpoints, 0 B\n" in run(capsys, "prune", root)


def test_prune_can_keep_none_and_take_one_run(root, capsys):
    found = json.loads(run(capsys, "prune", root / "two", "--keep", 0, "--yes", "--json"))
    assert found["removed"] is True
    assert len(found["checkpoints"]) == 3
    assert checkpoints(root) == []


def test_what_is_no_run_is_one_sentence(root, tmp_path, capsys):
    assert "is not a run directory" in fails(capsys, "show", tmp_path / "nothing")
    assert "is not a run directory" in fails(capsys, "diff", root / "one", tmp_path)
    (root / "two" / "run.toml").write_text("kind =")
    assert "damaged" in fails(capsys, "show", root / "two")
    assert "damaged" in run(capsys, "ls", root)
    assert "would remove 0" in run(capsys, "prune", root)
