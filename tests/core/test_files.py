"""Files and directories appear whole or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kullback.core.errors import CheckpointError, KullbackError
from kullback.core.files import atomic_directory, atomic_write, clear_partial, writing


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_whole(tmp_path):
    atomic_write(tmp_path / "deep" / "a", "one")
    atomic_write(tmp_path / "deep" / "a", "two, ü".encode())
    assert contents(tmp_path) == {"deep/a": "two, ü"}


def test_files_are_as_readable_as_others(tmp_path):
    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "ours", "")
    with atomic_directory(tmp_path / "folder"):
        pass
    (tmp_path / "other").mkdir()
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert mode["ours"] == mode["plain"]
    assert mode["folder"] == mode["other"]


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(small_disk):
    atomic_write(small_disk / "a", "old")
    with pytest.raises(CheckpointError, match=r"cannot write .*a \(No space left on device\)"):
        atomic_write(small_disk / "a", b"x" * 1_000_000)
    assert contents(small_disk) == {"a": "old"}


def test_a_full_disk_leaves_the_old_directory(small_disk):
    with atomic_directory(small_disk / "model") as place:
        (place / "weights").write_text("old")
    with pytest.raises(CheckpointError, match="No space left"), atomic_directory(small_disk / "model") as place:
        (place / "weights").write_bytes(b"x" * 1_000_000)
    assert contents(small_disk) == {"model/weights": "old"}


def test_a_full_disk_reported_by_compiled_code_is_understood(tmp_path):
    with pytest.raises(CheckpointError, match="No space left on device"), writing(tmp_path / "model"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_no_permission_is_one_sentence(tmp_path):
    """As another user where the tests run as root, whom permissions do not bind."""
    tmp_path.chmod(0o555)
    code = (
        "import os, sys; from pathlib import Path; from kullback.core.files import atomic_write, atomic_directory\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "for write in (lambda p: atomic_write(p, 'x'), lambda p: atomic_directory(p).__enter__()):\n"
        "    try: write(Path(sys.argv[1]) / 'a')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o005)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    sentence = f"cannot write {tmp_path / 'a'} (Permission denied): free some space or choose another place"
    assert done.stdout.splitlines() == [f"CheckpointError {sentence}"] * 2
    tmp_path.chmod(0o755)
    assert contents(tmp_path) == {}


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        atomic_write(tmp_path / "file" / "a", "x")
    with pytest.raises(CheckpointError, match="cannot write"), atomic_directory(tmp_path / "file" / "a"):
        pytest.fail("there is no place to write to")


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyboardInterrupt(), FileNotFoundError(2, "theirs"), KullbackError("x")]
)
def test_other_errors_pass_unchanged_and_leave_nothing(tmp_path, error):
    def fill() -> None:
        with atomic_directory(tmp_path / "model") as place:
            (place / "half").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fill()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_whole(tmp_path):
    for name in ("one", "two"):
        with atomic_directory(tmp_path / "model") as place:
            (place / name).write_text(name)
            assert (tmp_path / "model").exists() == (name == "two")
    assert contents(tmp_path) == {"model/two": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from kullback.core.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]) / 'model') as place:\n"
        "    (place / 'half').write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".partial-not ours").touch()
    clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".partial-not ours"]
