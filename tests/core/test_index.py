"""The index over runs is a cache: right when fresh, deleted, stale, damaged, or shared."""

import json
import multiprocessing
import os
import sqlite3
from pathlib import Path

import pytest

from kullback.core import index
from kullback.core.errors import DataError
from kullback.core.index import RunIndex
from kullback.core.runs import Run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs: one done, one with two checkpoints, one that cannot be read."""
    done = Run.start(tmp_path / "a", {"rate": 0.5}, kind="distill", seed=1)
    done.report({"loss": 0.25, "name": "x", "ok": True, "gain": {"mean": 1}})
    other = Run.start(tmp_path / "sweep" / "b", {}, kind="align")
    for step in (1, 2):
        with other.checkpoint(step) as place:
            (place / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.toml").write_text("kind = ")
    return tmp_path


def by_path(root: Path) -> dict[str, dict]:
    return {row.pop("path"): row for row in RunIndex(root).rows()}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were read, and not taken from the index."""
    names: list[str] = []
    describe = index.describe_run

    def counted(path: Path) -> dict:
        names.append(path.name)
        return describe(path)

    monkeypatch.setattr(index, "describe_run", counted)
    return names


def test_rows_say_what_is_there(root):
    rows = by_path(root)
    assert sorted(rows) == ["a", "broken", "sweep/b"]
    a, b = rows["a"], rows["sweep/b"]
    assert (a["kind"], a["seed"], a["status"], a["config"]) == ("distill", 1, "done", {"rate": 0.5})
    assert a["metrics"] == {"loss": 0.25, "gain.mean": 1}
    assert (b["status"], b["step"], b["checkpoints"]) == ("unfinished", 2, 2)
    assert 2000 < b["bytes"] < 4000
    assert rows["broken"]["status"] == "damaged"
    assert a["started"] <= b["started"]


def test_a_second_look_reads_nothing_again(root, reads):
    first = RunIndex(root).rows()
    assert sorted(reads) == ["a", "b", "broken"]
    reads.clear()
    before = (root / ".runs.sqlite").stat().st_mtime_ns
    assert RunIndex(root).rows() == first
    assert reads == []
    assert (root / ".runs.sqlite").stat().st_mtime_ns == before


def test_what_changed_is_read_again_and_what_went_is_gone(root, reads):
    RunIndex(root).rows()
    reads.clear()
    Run.open(root / "sweep" / "b").report({"loss": 1.0})
    Run.start(root / "c", {}, kind="new")
    (root / "broken" / "run.toml").unlink()
    rows = by_path(root)
    assert sorted(reads) == ["b", "c"]
    assert sorted(rows) == ["a", "c", "sweep/b"]
    assert rows["sweep/b"]["metrics"] == {"loss": 1.0}
    with Run.open(root / "sweep" / "b").checkpoint(7) as place:
        (place / "weights").touch()
    assert by_path(root)["sweep/b"]["step"] == 7


def test_a_deleted_index_is_made_again(root, reads):
    first = RunIndex(root).rows()
    (root / ".runs.sqlite").unlink()
    assert RunIndex(root).rows() == first
    assert len(reads) == 6


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 4096])
def test_something_else_in_its_place_is_replaced(root, content):
    first = RunIndex(root).rows()
    (root / ".runs.sqlite").write_bytes(content)
    assert RunIndex(root).rows() == first
    assert RunIndex(root)._read()


def test_overwritten_bytes_are_never_believed(root):
    """Wherever 64 bytes of the file are overwritten, the answer is the same."""
    first = RunIndex(root).rows()
    whole = (root / ".runs.sqlite").read_bytes()
    for place in range(0, len(whole), 509):
        broken = bytearray(whole)
        broken[place : place + 64] = bytes(byte ^ 0x15 for byte in broken[place : place + 64])
        (root / ".runs.sqlite").write_bytes(bytes(broken))
        assert RunIndex(root).rows() == first


def test_a_row_that_was_edited_is_read_again(root, reads):
    first = RunIndex(root).rows()
    reads.clear()
    with sqlite3.connect(root / ".runs.sqlite") as connection:
        connection.execute("UPDATE runs SET row = replace(row, '0.25', '0.99')")
    connection.close()
    assert RunIndex(root).rows() == first
    assert reads == ["a"]


def test_another_schema_is_replaced(root):
    first = RunIndex(root).rows()
    (root / ".runs.sqlite").unlink()
    with sqlite3.connect(root / ".runs.sqlite") as connection:
        connection.execute("CREATE TABLE runs (path INTEGER)")
    connection.close()
    assert RunIndex(root).rows() == first


def test_the_run_itself_can_be_the_root(root):
    (row,) = RunIndex(root / "a").rows()
    assert row["path"] == "."
    assert not (root / "a" / ".runs.sqlite").exists()


def test_a_root_that_cannot_be_written_has_rows_but_no_index(root, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(index.tempfile, "mkstemp", refuse)
    assert len(RunIndex(root).rows()) == 3
    assert not (root / ".runs.sqlite").exists()


def test_a_missing_root_is_said(tmp_path):
    with pytest.raises(DataError, match="not a directory"):
        RunIndex(tmp_path / "missing")


def _look(root: Path, count: int) -> None:
    for number in range(count):
        run = Run.start(root / f"run-{os.getpid()}-{number}", {"number": number}, kind="test")
        run.report({"number": number})
        if number % 5 == 0:
            (root / ".runs.sqlite").unlink(missing_ok=True)
        mine = [row for row in RunIndex(root).rows() if f"-{os.getpid()}-" in row["path"]]
        if sorted(row["metrics"]["number"] for row in mine) != list(range(number + 1)):
            raise ValueError(json.dumps(mine))


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_look, args=(tmp_path, 20)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(RunIndex(tmp_path).rows()) == 40
    assert [path.name for path in tmp_path.glob(".*")] == [".runs.sqlite"]
