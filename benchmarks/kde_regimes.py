"""Kernel density estimates beside scikit-learn's tree and plain torch in one run; and how fast regimes are told.

Gaussian data in d dimensions, log-densities of 200 to 1000 queries at h = h_G, one thread. Times are medians of calls
in turn, "ratio" is the other's time over ours; "error" is the largest one of a log-density against differences in
float64, "MB" what the process holds at its peak beyond what it held before (Linux only). The product of the matrices
alone, in blocks that stay in the cache, is the roof. A diagnosis takes the same pass with sums of squares and the
nearest points beside it, and some 10 ms whatever the size: replicates for the spread; so its ratio falls with the
number of queries, from 4 to a little above 2. Writes kde_regimes.json.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import sklearn
import torch
from sklearn.neighbors import KernelDensity

from kullback.core.environment import environment
from kullback.diagnose import GaussianSpectrumTheory, HighDimKDE, KDERegimes, knn_order_statistics

torch.set_num_threads(1)
QUERIES = {3_000: 1000, 20_000: 500, 100_000: 200}


def cloud(n, d):
    source = torch.Generator().manual_seed(0)
    h = float(GaussianSpectrumTheory(torch.ones(d)).h_glass(n, finite=True))
    return torch.randn(n, d, generator=source), torch.randn(QUERIES[n], d, generator=source), h


def dense(points, queries, h):
    n, d = points.shape
    logits = -torch.cdist(queries, points).square() / (2 * h * h)
    return logits.logsumexp(1) - math.log(n) - 0.5 * d * math.log(2 * math.pi * h * h)


def exact(points, queries, h):
    n, d = points.shape
    found = []
    for query in queries.double():
        logits = -(points.double() - query).square().sum(1) / (2 * h * h)
        found.append(logits.logsumexp(0) - math.log(n) - 0.5 * d * math.log(2 * math.pi * h * h))
    return torch.stack(found)


def product(model, queries):
    points, rows = model.points_, model.points_.centred(queries)
    block = (1 << 19) // (128 * rows.element_size())
    out = torch.empty(128, block, dtype=rows.dtype)
    for part in rows.split(128):
        for begin in range(0, len(points.rows), block):
            columns = points.transposed[:, begin : begin + block]
            torch.mm(part, columns, out=out[: len(part), : columns.shape[1]].contiguous())


def contenders(n, d):
    points, queries, h = cloud(n, d)
    single, double = HighDimKDE(h).fit(points), HighDimKDE(h, precision="double").fit(points)
    tree = KernelDensity(bandwidth=h).fit(points.numpy())
    regimes = KDERegimes(n_queries=QUERIES[n]).fit(points)
    return {
        "kullback single": lambda: single.score_samples(queries),
        "kullback double": lambda: double.score_samples(queries),
        "torch cdist": lambda: dense(points, queries, h),
        "product alone, single": lambda: product(single, queries),
        "kullback diagnose": lambda: regimes.diagnose(h),
        "scikit-learn tree": lambda: torch.from_numpy(tree.score_samples(queries.numpy())),
    }


def many_queries(n, d, count):
    """A thousand queries of the points themselves, diagnosed beside one density estimate of as many; no peer."""
    points, _, h = cloud(n, d)
    single, regimes = HighDimKDE(h).fit(points), KDERegimes(n_queries=count).fit(points)
    calls = {
        "kullback single": lambda: single.score_samples(points[:count]),
        "kullback diagnose": lambda: regimes.diagnose(h),
    }
    seconds, _ = race(calls, 3)
    case = f"n = {n}, d = {d}, {count} queries"
    return [
        {"case": case, "who": who, "ms": round(1e3 * taken, 2), "ratio": round(taken / seconds["kullback single"], 2)}
        for who, taken in seconds.items()
    ]


def megabytes(call):
    """The peak of resident memory during a call, above that before."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")
    call()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high, now = (int(status[name].split()[0]) for name in ("VmHWM", "VmRSS"))
    return round((high - now) / 1024, 1)


def race(calls, rounds):
    results = {name: call() for name, call in calls.items()} if rounds > 1 else {}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            results[name] = call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}, results


def densities(n, d, rounds):
    points, queries, h = cloud(n, d)
    calls = contenders(n, d)
    seconds, results = race(calls, rounds)
    truth = exact(points, queries[:200], h)
    table = []
    for name, taken in seconds.items():
        error = (results[name][:200] - truth).abs().max().item() if isinstance(results[name], torch.Tensor) else None
        ratio = round(taken / seconds["kullback single"], 2)
        row = {"case": f"n = {n}, d = {d}", "who": name, "ms": round(1e3 * taken, 2), "ratio": ratio, "error": error}
        table.append(row | {"MB": None if name == "scikit-learn tree" and rounds == 1 else megabytes(calls[name])})
    return table


def theory():
    spectrum = GaussianSpectrumTheory(torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 0.1)
    law, source = GaussianSpectrumTheory(torch.ones(400)).distances, torch.Generator().manual_seed(2)
    calls = {
        "h_glass, 1000 eigenvalues": lambda: spectrum.h_glass(1e6),
        "log_density, 1000 eigenvalues": lambda: spectrum.log_density(0.5, 1e6),
        "10000 nearest of e^100 points": lambda: knn_order_statistics(100.0, law, size=1, k=10_000, generator=source),
    }
    seconds, _ = race(calls, 51)
    return [{"case": "theory", "who": name, "ms": round(1e3 * taken, 3)} for name, taken in seconds.items()]


def main():
    table = theory()
    sizes = ((3_000, 20, 5), (20_000, 32, 3), (100_000, 64, 1)) if "--quick" not in sys.argv else ((3_000, 20, 3),)
    for n, d, rounds in sizes:
        table += densities(n, d, rounds)
    table += many_queries(100_000, 64, 1000) if "--quick" not in sys.argv else []
    for row in table:
        error, held = row.get("error") or 0.0, row.get("MB") or 0.0
        tail = f"x {row['ratio']:8.2f}  error {error:.1e}  {held:7.1f} MB" if "ratio" in row else ""
        print(f"{row['case']:22} {row['who']:32} {row['ms']:10.2f} ms  {tail}")
    peers = {"scikit-learn": sklearn.__version__}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
