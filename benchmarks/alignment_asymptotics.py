"""Optima of a KL budget beside scipy's root finder called prompt by prompt, and exact types beside a loop over them.

Prompts by outcomes, normal logits and rewards, budgets uniform up to 3 nats, float64, one thread, processor seconds.
"naive": scipy.optimize.brentq on numpy's logsumexp, to 1e-12, timed on 100 prompts at most and scaled to all.
"error": the largest difference of the KL to its budget. Ours evaluates a block of rows some seven times, seven passes
each, in the caches and without new memory: rewards and reference are read twice, the tilt is written once. Types:
best of exp(0.2 m) over three letters; the naive loop makes a Python list of the types. "MB": the peak above what the
process held (Linux). Writes alignment_asymptotics.json.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp

from _measure import medians, peak_memory, race, ratio
from kullback.align.memoryless import MemorylessAlignment
from kullback.align.tradeoff import solve_tilt_for_kl
from kullback.core.environment import environment

torch.set_num_threads(1)
SIZES = ((100, 50), (1000, 300), (10_000, 1000))
P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def problem(prompts, outcomes):
    source = torch.Generator().manual_seed(0)
    log_p = torch.randn(prompts, outcomes, generator=source, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(prompts, outcomes, generator=source, dtype=torch.float64)
    return log_p, reward, 3.0 * torch.rand(prompts, generator=source, dtype=torch.float64)


def naive_one(log_p, reward, delta):
    def excess(beta):
        logits = log_p + beta * reward
        log_z = logsumexp(logits)
        return beta * (np.exp(logits - log_z) @ reward) - log_z - delta

    high = 1.0
    while excess(high) < 0.0 and high < 1e6:
        high *= 2.0
    beta = brentq(excess, 0.0, high, xtol=1e-12) if high < 1e6 else math.inf
    return beta, excess(beta) + delta if high < 1e6 else delta


def ours(prompts, outcomes):
    inputs = problem(prompts, outcomes)
    return lambda: solve_tilt_for_kl(*inputs).kl


def naive(prompts, outcomes):
    log_p, reward, delta = (x[:100].numpy() for x in problem(prompts, outcomes))
    return lambda: torch.tensor([naive_one(*row)[1] for row in zip(log_p, reward, delta, strict=True)])


def naive_types(m, delta=0.2):
    """KL of best of n a letter, from types one by one."""
    log_p, r, rows = P.log().tolist(), Q.log().tolist(), []
    for a in range(m + 1):
        for b in range(m + 1 - a):
            n = (a, b, m - a - b)
            weight = gammaln(m + 1) + sum(k * x - gammaln(k + 1) for k, x in zip(n, log_p, strict=True))
            rows.append((sum(k * x for k, x in zip(n, r, strict=True)), weight))
    rows.sort()
    mass = np.exp([weight for _, weight in rows])
    upper = np.minimum(mass.cumsum(), 1.0)
    n = math.exp(m * delta)
    law = np.diff(upper**n, prepend=0.0)
    kept = law > 0
    return (law[kept] * np.log(law[kept] / mass[kept])).sum() / m


def main():
    rounds, rows = 3 if "--quick" in sys.argv else 5, []
    for prompts, outcomes in SIZES:
        scale = prompts / min(prompts, 100)
        calls = {"kullback": ours(prompts, outcomes), "naive": naive(prompts, outcomes)}
        times, results = race(calls, rounds, clock=time.process_time)
        times["naive"] = [scale * seconds for seconds in times["naive"]]
        delta = problem(prompts, outcomes)[2]
        for name, seconds in medians(times).items():
            error = (results[name] - delta[: len(results[name])]).abs().max().item()
            row = {"case": f"{prompts} prompts of {outcomes}", "who": name, "ms": 1e3 * seconds, "error": error}
            row["MB"] = peak_memory(__file__, "ours" if name == "kullback" else "naive", prompts, outcomes) / 2**20
            rows.append(row | {"ratio": ratio(times, name, "kullback")})
    letters = MemorylessAlignment(P, Q)
    for m in (20, 80, 320):
        exact = letters.bon_gap(m, 0.2).kl
        calls = {"kullback": lambda m=m: letters.bon_gap(m, 0.2).kl, "naive": lambda m=m: naive_types(m)}
        times, results = race(calls, rounds, clock=time.process_time)
        for name, seconds in medians(times).items():
            row = {"case": f"types of {m} letters", "who": name, "ms": 1e3 * seconds}
            row |= {"error": abs(results[name] - exact), "MB": None}
            rows.append(row | {"ratio": ratio(times, name, "kullback")})
    for row in rows:
        held = f"{row['MB']:7.1f} MB" if row["MB"] is not None else ""
        tail = f"{row['ms']:10.2f} ms  x {row['ratio']:7.1f}  error {row['error']:.1e}  {held}"
        print(f"{row['case']:28} {row['who']:10} {tail}")
    peers = {"scipy": scipy.__version__, "numpy": np.__version__}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
