"""`kullback doctor`."""

import json
from pathlib import Path

import pytest

import kullback
from kullback import cli
from kullback.cli import doctor


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.execute(["doctor", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_says_what_is_there(capsys, cache):
    found = json.loads(run(capsys, "--json"))
    assert found["environment"]["versions"]["kullback"] == kullback.__version__
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert 0 < found["disk"]["free"] <= found["disk"]["total"]
    assert found["cache"] == {"path": str(cache), "writable": True}
    assert not cache.exists()
    assert {row["extra"] for row in found["extras"]} >= {"parquet", "lora", "ray", "tensorboard", "trackio", "sklearn"}
    assert all(row["install"] == f"pip install 'kullback[{row['extra']}]'" for row in found["extras"])


def test_the_page_says_the_same(capsys, cache):
    lines = dict(line.split(maxsplit=1) for line in run(capsys).splitlines())
    assert lines["kullback"] == kullback.__version__
    assert lines["cache"] == str(cache)
    assert lines["memory"].endswith("GB")


def test_a_missing_package_comes_with_its_install_line(capsys, monkeypatch):
    monkeypatch.setattr("kullback.core.environment.installed", lambda package: None if package == "ray" else "1.0")
    lines = dict(line.split(maxsplit=1) for line in run(capsys).splitlines())
    assert lines["ray"] == "not installed: pip install 'kullback[ray]'"
    assert lines["peft"] == "1.0"


def test_a_cache_that_cannot_be_written_is_said(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "file"))
    assert not doctor._writable(tmp_path / "file")
    assert "cannot be written: set KULLBACK_CACHE" in run(capsys)
