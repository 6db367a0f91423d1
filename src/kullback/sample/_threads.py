"""Compiled loops over chains in as many threads as torch has; chains know nothing of one another, so no bit changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch

__all__ = ["over_chains"]

_LEAST = 4096  # rows of work for a thread: with fewer, waking it costs more than it does


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # One a process, since threads do not outlive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="chains")


def over_chains(loop: Callable[..., bool], *arrays: Any) -> bool:
    """loop(*arrays) in blocks of chains, the first dimension of all arrays; whether every block returned True.

    The loop releases the interpreter (`nogil`). The number of rows of work is that of chains times the second
    dimension of the last array.
    """
    chains = len(arrays[-1])
    threads = min(torch.get_num_threads(), chains, chains * arrays[-1].shape[1] // _LEAST)
    if threads < 2:
        return loop(*arrays)
    bounds = [chains * k // threads for k in range(threads + 1)]
    blocks = [[array[begin:end] for array in arrays] for begin, end in pairwise(bounds)]
    waiting = [_pool(os.getpid(), torch.get_num_threads()).submit(loop, *block) for block in blocks[1:]]
    done = loop(*blocks[0])
    return all([done, *(future.result() for future in waiting)])
