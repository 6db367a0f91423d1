"""The risk of a fit to second order beside a bootstrap of 1500 fits, in one run: time, and error against simulation.

Tables of scikit-learn with a full normal law, and gamma and pairwise laws on drawn data, one thread. The bootstrap fits
with scikit-learn's GaussianMixture, scipy's gamma.fit and our Newton for the pairwise law, a fit a sample; and once
more for the normal law, all fits in one batch of torch. Of the slow ones 60 fits are timed, and 1500 stand for 25 times
that. "error": relative, of the risk at n against 20000 simulated fits, 1500 for the last two (of the bootstrap, its
standard error at 1500); "first" that of the first order. Writes pn_criterion.json.
"""

import json
import math
import statistics
import time
import warnings
from pathlib import Path

import scipy
import scipy.stats
import sklearn
import torch
from sklearn.mixture import GaussianMixture

from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.diagnose import estimation_risk
from kullback.diagnose.exponential_families import gamma, gaussian, ising
from kullback.papers.pn_criterion import reproduce as study

torch.set_num_threads(1)
warnings.simplefilter("ignore")
TIMED, SAMPLES, DRAWS = 60, 1500, 40_000


def median_seconds(call, rounds=5):
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), result


def scaled(call):
    seconds, _ = median_seconds(call, 1)
    return seconds * SAMPLES / TIMED


def expand(family, data):
    xi = family.statistics(data)
    draws = family.sample(family.solve(xi.mean(0)), DRAWS, generator(0, "draws"))
    return estimation_risk(xi, family.statistics(draws), population=True)


def resampled(data, n, count):
    source = generator(0, "rows")
    return [data[torch.randint(len(data), (n,), generator=source)] for _ in range(count)]


def row(case, n, expansion, seconds, peers, truth, spread):
    error, first = (abs(value / truth - 1) for value in (expansion.risk(n), expansion.a / n))
    common = {"case": case, "n": n, "p": expansion.p}
    rows = [{**common, "who": "kullback", "ms": round(1e3 * seconds, 1), "ratio": 1.0, "error": error, "first": first}]
    for who, taken in peers.items():
        ratio = round(taken / seconds, 2)
        rows.append({**common, "who": who, "ms": round(1e3 * taken, 1), "ratio": ratio, "error": spread})
    return rows


def normal(name, multiple):
    data = study.table(name)
    family, d = gaussian(data.shape[1], quasi=True), data.shape[1]
    seconds, found = median_seconds(lambda: expand(family, data))
    n = multiple * found.p

    def mixture():
        for rows in resampled(data, n, TIMED):
            GaussianMixture(1).fit(rows.numpy())

    def batch():
        study.SAMPLES = {n: SAMPLES}
        return study.risks(data, n, generator(0, "batch"))

    batched, _ = median_seconds(batch)
    study.SAMPLES = {n: 20_000}
    simulated = study.risks(data, n, generator(1, "truth"))
    peers = {"bootstrap, scikit-learn": scaled(mixture), "bootstrap, one batch": batched}
    spread = float(simulated.std() / simulated.mean()) / math.sqrt(SAMPLES)
    return row(f"{name}, {d} columns", n, found, seconds, peers, float(simulated.mean()), spread)


def one_by_one(case, family, data, n, fit):
    seconds, found = median_seconds(lambda: expand(family, data))
    samples = resampled(data, n, TIMED)
    slow = scaled(lambda: [fit(rows) for rows in samples])
    best = family.solve(family.statistics(data).mean(0))
    risks = []
    for rows in resampled(data, n, SAMPLES):
        fitted = family.solve(family.statistics(rows).mean(0))
        mean = family.statistics(data).mean(0)
        risks.append(float(family.psi(fitted) - family.psi(best) - (fitted - best) @ mean))
    risks = torch.tensor(risks)
    spread = float(risks.std() / risks.mean()) / math.sqrt(SAMPLES)
    return row(case, n, found, seconds, {"bootstrap, a fit each": slow}, float(risks.mean()), spread)


def main():
    table = []
    for name in study.TABLES:
        for multiple in (4, 8):
            table += normal(name, multiple)
    data = gamma().sample(torch.tensor([1.0, -1.0], dtype=torch.float64), 500, generator(0, "gamma")) ** 1.3
    table += one_by_one("gamma law, skewed data", gamma(), data, 40, lambda x: scipy.stats.gamma.fit(x.numpy(), floc=0))
    pairs = ising(4)
    theta = torch.full((10,), 0.1, dtype=torch.float64)
    spins = pairs.sample(theta, 2000, generator(0, "ising"))
    table += one_by_one("pairwise law", pairs, spins, 80, lambda x: pairs.solve(pairs.statistics(x).mean(0)))
    for line in table:
        first = f", first order {line['first']:.3f}" if "first" in line else ""
        case = f"{line['case']:26} n = {line['n']:4} p = {line['p']:3} {line['who']:24}"
        print(f"{case} {line['ms']:10.1f} ms  x {line['ratio']:8.2f}  error {line['error']:.3f}{first}")
    peers = {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
