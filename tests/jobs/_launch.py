"""Commands in processes of their own: one, or two under accelerate."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(*words, processes=1):
    if processes == 1:
        return [sys.executable, "-m", "kullback", *map(str, words)]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    # --multi_gpu is accelerate's name for one process beside the other, which are on gloo where there is no GPU
    launch += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", *launch, "-m", "kullback", *map(str, words)]


def launched(*words, processes=1):
    done = subprocess.run(
        command(*words, processes=processes), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def killed(job, config, out, part):
    """Start `kullback <job>` and kill it some time after its first checkpoint: at some step, or inside of one."""
    child = subprocess.Popen(
        command(job, "--config", config, "--out", out),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((out / "parts" / part / "ckpt").glob("step-*")):
        assert child.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.Random(os.getpid()).uniform(0.0, 0.3))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "report.json").exists()


def assert_same_bits(expected, found):
    """The models of two run directories are the same, bit by bit."""
    one, other = (load_file(path / "model" / "model.safetensors") for path in (expected, found))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
