"""Particle smoothing beside `particles` in one run: time, memory and error by number of particles. Writes paris.json.

E[sum x_{t-1} x_t | y] of a scalar linear Gaussian model over 100 steps, against the Kalman smoother, float64, one
thread. Both resample at every step and move particles by the model. The peer's online smoother takes the exact mean
over all pairs; its PaRIS draws backward indices as ours does, in loops of Python (with numpy 2 it fails, since it puts
arrays of one entry where numbers belong; here its queue gives it numbers). Each time is the median of several calls,
ours and the peer's in turn, in seconds of this process; "ratio" is the time over that of kullback's default. Error: the
mean of all estimates made, "estimates" in number, minus the exact value; deviation: of a single estimate. Memory: by
how much a process grows in a pass, once a small pass has brought in all code.

Then chains: 200 in one batch beside 200 runs of one chain, of which a few are timed, in seconds of the clock with one
thread and with two. The bar is a tenth of the time. A run of one chain spends some 2 us a particle and step, nearly all
of it on calls, and a batch with 100 particles some 0.3 us: most of it on its two backward draws (2.6 proposals each, 25
to 30 ns a proposal; one draw in 70 sums all weights). On one thread that is a seventh; threads share out the chains of
a batch and have nothing to share of a single chain; two bring it to a ninth or an eleventh. The rest, random numbers
and the like, stays on one. At last the slope of time in N.
"""

import json
import math
import multiprocessing
import os
import resource
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads would spin where ours want to work

import torch

try:
    import particles
except ImportError:
    # It asks for numpy below 2, which no other peer can live with, and runs with later ones all the same.
    print("skipped: this benchmark needs pip install --no-deps particles==0.4")
    raise SystemExit(0) from None
from particles import collectors, distributions, resampling, state_space_models

from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.sample.exact_smoothing import kalman_smoother
from kullback.sample.paris import paris
from kullback.sample.ppg import ppg
from kullback.sample.state_space import LinearGaussianModel

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # the peer warns of numpy functions that are to go
MODEL, TIMES = LinearGaussianModel.scalar(0.9, 0.6, 1.0), 100
CHAINS = 200


class Peer(state_space_models.StateSpaceModel):
    def PX0(self):
        return distributions.Normal(scale=0.6 / math.sqrt(1 - 0.81))

    def PX(self, t, xp):
        return distributions.Normal(loc=0.9 * xp, scale=0.6)

    def PY(self, t, xp, x):
        return distributions.Normal(loc=x, scale=1.0)

    def upper_bound_log_pt(self, t):
        return -math.log(0.6) - 0.5 * math.log(2 * math.pi)


class PeerFilter(state_space_models.Bootstrap):
    def add_func(self, t, xp, x):
        return np.zeros_like(x) if t == 0 else xp * x


class NumberQueue(resampling.MultinomialQueue):
    def dequeue(self, k):
        drawn = super().dequeue(k)
        return drawn[0] if k == 1 else drawn


resampling.MultinomialQueue = NumberQueue


def data():
    source = generator(0, "paris", "benchmark")
    x, rows = MODEL.sample_init((1, 1), generator=source), []
    for step in range(TIMES + 1):
        x = MODEL.sample_trans(x, step, generator=source) if step else x
        rows.append(x[0, 0] + torch.randn(1, generator=source, dtype=torch.float64))
    return torch.stack(rows)


def product(x, x_next, observation, step):
    return x * x_next


def exact(y):
    smoothed = kalman_smoother(MODEL, y)
    return ((smoothed.mean[0, :-1] * smoothed.mean[0, 1:]).sum() + smoothed.lag_covariance.sum()).item()


def ours(y, count, chains=1, **options):
    """A call that smooths with new random numbers each time, and returns [chains] estimates."""
    smoother, source = paris(MODEL, product, num_particles=count, **options), generator(1, "ours", count)

    def call():
        state = smoother.init(y[0], generator=source, chains=chains)
        for row in y[1:]:
            state, _ = smoother.step(state, row, generator=source)
        return state.estimate.flatten()

    return call


def theirs(y, count, collector):
    values = list(y.numpy()[:, 0])

    def call():
        smc = particles.SMC(fk=PeerFilter(ssm=Peer(), data=values), N=count, collect=[collector], ESSrmin=1.0)
        smc.run()
        return torch.tensor([float(getattr(smc.summaries, collector.summary_name)[-1])])

    return call


def race(contenders, rounds, clock=time.process_time):
    """Median seconds of each contender, called in turn; and what all its calls returned."""
    results = {name: [call()] for name, call in contenders.items()}
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = clock()
            results[name].append(call())
            times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}, results


def smoothing(y, count, rounds):
    target = exact(y)
    contenders = {
        "kullback": ours(y, count),
        "kullback, exact draws": ours(y, count, backward="exact"),
        "kullback, vectorised": ours(y, count, compiled=False),
        "kullback, exact mean": ours(y, count, num_backward=None),
        "particles, exact mean": theirs(y, count, collectors.Online_smooth_ON2()),
    }
    if count > 400:
        contenders = {name: call for name, call in contenders.items() if name in ("kullback", "particles, exact mean")}
    seconds, results = race(contenders, rounds)
    if count == 100:  # many seconds a pass
        slow, result = race({"particles, PaRIS": theirs(y, count, collectors.Paris())}, 1)
        seconds, results = {**seconds, **slow}, {**results, **result}
    # Many estimates, where a batch gives them cheaply.
    for name in [name for name in results if name.startswith("kullback")]:
        options = {"num_backward": None} if name.endswith("mean") else {}
        results[name].append(ours(y, count, chains=40 if count <= 400 or not options else 4, **options)())
    rows = []
    for name, values in results.items():
        errors = torch.cat(values) - target
        rows.append(
            {
                "case": f"smoothing, T = {TIMES}, N = {count}",
                "who": name,
                "seconds": round(seconds[name], 5),
                "ratio": round(seconds[name] / seconds["kullback"], 2),
                "error": round(errors.mean().item(), 3),
                "deviation": round(errors.std().item(), 3) if len(errors) > 1 else None,
                "estimates": len(errors),
            }
        )
    return rows


def batches(y, count, rounds):
    """CHAINS chains in a batch, and the same number of runs of one chain."""
    kernel, source = ppg(MODEL, product, y, num_particles=count), generator(2, "sweeps", count)
    held = {chains: kernel.init(generator=source, chains=chains) for chains in (1, CHAINS)}
    rows = []
    for what, make in (
        ("PaRIS", lambda chains: ours(y, count, chains=chains)),
        ("PPG, one sweep", lambda chains: lambda: kernel.step(held[chains], generator=source)[1].estimate),
    ):
        alone = 0.0
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seconds, _ = race({"batch": make(CHAINS), "one": make(1)}, rounds, time.perf_counter)
            alone = alone or CHAINS * seconds["one"]  # a single chain is no faster with two
            rows.append(
                {
                    "case": f"{what}, {CHAINS} chains, N = {count}, threads = {threads}",
                    "who": "kullback, one batch",
                    "seconds": round(seconds["batch"], 5),
                    "ratio": round(alone / seconds["batch"], 2),
                    "one_by_one": round(alone, 4),
                }
            )
    torch.set_num_threads(1)
    return rows


def slope(y, counts, rounds):
    """The exponent of N in the time of a pass, by least squares on logarithms."""
    contenders = {str(count): ours(y, count) for count in counts}
    seconds, _ = race(contenders, rounds)
    fit = np.polyfit(np.log(counts), np.log([seconds[str(count)] for count in counts]), 1)[0]
    return {
        "case": f"slope of log seconds in log N, N = {counts[0]} to {counts[-1]}",
        "who": "kullback",
        "slope": round(float(fit), 3),
        "seconds": {str(count): round(seconds[str(count)], 4) for count in counts},
    }


def memory(y, count):
    """By how many MiB a process grows in a pass, each in a process of its own."""
    rows = []
    for name, make in (
        ("kullback", lambda size: ours(y, size)),
        ("particles, exact mean", lambda size: theirs(y, size, collectors.Online_smooth_ON2())),
    ):
        pipe, child = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=grow, args=(make(50), make(count), child))
        process.start()
        rows.append({"case": f"memory of a pass, N = {count}", "who": name, "MiB": pipe.recv()})
        process.join()
    return rows


def grow(small, call, pipe):
    small()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    pipe.send(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1))


def main():
    y = data()
    table = []
    for count, rounds in ((100, 7), (400, 5), (1600, 2)):
        table += smoothing(y, count, rounds)
    for count in (10, 30, 100):
        table += batches(y, count, 5)
    table += memory(y, 1600)
    table.append(slope(y, (1000, 4000, 16000, 64000), 3))
    for row in table:
        print(row)
    peers = {"particles": version("particles")}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
