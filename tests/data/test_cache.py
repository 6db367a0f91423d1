"""The cache: one build for a configuration, whatever happens to its entry or to those who ask."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from kullback.core.errors import CheckpointError, ConfigError
from kullback.data.cache import cached


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Builder:
    """Writes two files, one in a folder, and counts how often."""

    def __init__(self):
        self.built = 0

    def __call__(self, folder):
        self.built += 1
        (folder / "a").write_text("first")
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text("second")


@dataclass(frozen=True)
class Size:
    width: int
    names: tuple[str, ...] = ("a", "b")


def test_built_once_for_a_configuration(cache):
    build = Builder()
    places = [cached("thing", config, build) for config in (Size(1), Size(1), {"width": 1, "names": ["a", "b"]})]
    assert build.built == 1
    assert len(set(places)) == 1
    assert (places[0] / "deep" / "b").read_text() == "second"
    assert places[0].is_relative_to(cache / "thing")


def test_every_part_of_the_configuration_counts():
    build = Builder()
    places = {cached("thing", config, build) for config in (Size(1), Size(2), Size(1, ("a",)), {"width": 1}, [1], None)}
    places.add(cached("another", Size(1), build))
    assert len(places) == build.built == 7
    assert cached("thing", {"a": 1, "b": 2}, build) == cached("thing", {"b": 2, "a": 1}, build)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "a").write_text("frist"),
        lambda place: (place / "a").write_text("firs"),
        lambda place: (place / "deep" / "b").unlink(),
        lambda place: (place / "extra").write_text("?"),
        lambda place: (place / "manifest.json").unlink(),
        lambda place: (place / "manifest.json").write_text("{"),
        lambda place: (place / "manifest.json").write_text("[]"),
        lambda place: (place / "manifest.json").write_text('{"config": 1, "files": {}}'),
        lambda place: (place.rename(place.parent / "away"), place.write_text("a file in its place")),
    ],
)
def test_a_damaged_entry_is_built_again(damage):
    build = Builder()
    place = cached("thing", Size(1), build)
    damage(place)
    assert cached("thing", Size(1), build) == place
    assert build.built == 2
    assert (place / "a").read_text() == "first"
    assert not (place / "extra").exists()
    cached("thing", Size(1), build)
    assert build.built == 2


def test_large_files_are_checked_by_size(monkeypatch):
    monkeypatch.setattr("kullback.data.cache._SMALL", 3)
    build = Builder()
    place = cached("thing", Size(1), build)
    (place / "a").write_text("firs")
    cached("thing", Size(1), build)
    assert build.built == 2


def test_a_failed_build_leaves_no_entry(cache):
    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        cached("thing", Size(1), fail)
    assert not list(cache.rglob("half"))
    build = Builder()
    cached("thing", Size(1), build)
    assert build.built == 1


def test_what_a_killed_build_left_is_swept_away(cache):
    code = (
        "import os; from kullback.data.cache import cached\n"
        "def build(folder):\n"
        "    (folder / 'half').write_text('half')\n"
        "    os._exit(9)\n"
        "cached('thing', {'width': 1}, build)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 9
    assert list(cache.rglob("half"))
    build = Builder()
    cached("thing", {"width": 1}, build)
    assert build.built == 1
    assert not list(cache.rglob("half"))


def test_two_processes_at_once_build_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from kullback.data.cache import cached\n"
        "log, me = Path(sys.argv[1]), sys.argv[2]\n"
        "def build(folder):\n"
        "    with open(log, 'a') as file: file.write(me)\n"
        "    time.sleep(0.7)\n"
        "    (folder / 'a').write_text('whole')\n"
        "(log.parent / f'ready{me}').touch()\n"
        "while len(list(log.parent.glob('ready*'))) < 2: time.sleep(0.01)\n"
        "print((cached('thing', {'width': 1}, build) / 'a').read_text())"
    )
    log = tmp_path / "log"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(log), me], stdout=subprocess.PIPE, text=True) for me in "12"
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == ["whole\n"] * 2
    assert len(log.read_text()) == 1


def test_configurations_that_cannot_key_are_refused():
    for config in ({"a": object()}, {"a": float("nan")}, Size):
        with pytest.raises(ConfigError, match="JSON"):
            cached("thing", config, Builder())


def test_a_cache_that_cannot_be_written_is_one_sentence(cache):
    cache.write_text("a file where the cache should be")
    with pytest.raises(CheckpointError, match="cannot write"):
        cached("thing", Size(1), Builder())
