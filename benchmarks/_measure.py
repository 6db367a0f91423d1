"""What benchmarks share: contenders timed in turn, and the peak memory of a call in a process of its own.

A benchmark imports this file from its own folder. Run by itself it does nothing.
"""

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def race(contenders, rounds=7, clock=time.perf_counter):
    """Seconds of every contender, called in turn, as lists of `rounds`; and what each returned in a call before that.

    Being called in turn, all of them meet the same disturbances: compare them round by round, as `ratio` does. On one
    thread of a shared machine, time.process_time does not count what others take.
    """
    results = {name: call() for name, call in contenders.items()}
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = clock()
            call()
            times[name].append(clock() - begin)
    return times, results


def medians(times):
    """The median of each contender's times."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times, one, other):
    """The median over rounds of one's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other]))


def peak_memory(file, function, *arguments, threads=1):
    """Bytes that a call takes at its highest, above what its process holds before it.

    In a fresh process, `function(*arguments)` of the file prepares the inputs and returns the call to be measured.
    """
    order = json.dumps([str(Path(file).resolve()), function, list(arguments), threads])
    command = [sys.executable, "-c", "import sys, _measure; _measure.child(sys.argv[1])", order]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function}{arguments} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def child(order):
    """The other end of `peak_memory`."""
    file, function, arguments, threads = json.loads(order)
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[Path(file).stem] = module
    specification.loader.exec_module(module)
    import torch

    torch.set_num_threads(threads)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # libraries allocate once, at their first product
    call = getattr(module, function)(*arguments)
    _forget_peak()
    before = _status("VmRSS")
    call()
    print(_status("VmHWM") - before)


def _forget_peak():
    """Let the highest mark start at what is held now; where the system refuses, preparing may raise it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not tell {field}: peak memory is measured on Linux")
