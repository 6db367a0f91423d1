"""Commands in processes of their own: one, or two under accelerate."""

import os
import socket
import subprocess
import sys

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
