"""Every test runs on one thread, with no network and with caches of its own."""

import errno
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A fixed source of randomness."""
    return torch.Generator().manual_seed(20_261_125)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds 256 kB: a real file system where one can be mounted, else by an fsync that fails."""
    # Not below pytest's own folders, which it could not remove while something is mounted there.
    folder = Path(tempfile.mkdtemp(prefix="kullback-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if mounted:
        yield folder
        gc.collect()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # memory maps may be open still
        folder.rmdir()
        return
    sync = os.fsync

    def fsync(handle: int) -> None:
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if used > 256_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    yield folder
    shutil.rmtree(folder)
