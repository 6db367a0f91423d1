"""Sinkhorn beside POT and geomloss in one run: time, and distance from the converged value. Writes sinkhorn.json.

Points are softmax rows of 10 classes, the cost is L1, float64, one thread. Each time is the median of several calls,
ours and the peers' in turn. "ratio" is the peer's time over ours.
"""

import json
import warnings
from pathlib import Path

import geomloss
import ot
import torch

import _measure
from kullback.core.environment import environment
from kullback.divergences.pairwise import pairwise_cost
from kullback.divergences.sinkhorn import sinkhorn_cost

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # POT warns of what it does not reach in a given number of iterations
EPS, TOLERANCE = 0.1, 1e-9


def clouds(*shape, dtype=torch.float64):
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=source, dtype=dtype).softmax(-1) for _ in range(2))
    return x.requires_grad_(), y


def race(**contenders):
    """Median seconds of each contender, called in turn; and what each returned."""
    times, results = _measure.race(contenders)
    return _measure.medians(times), results


def rows(case, seconds, errors):
    ours = seconds["kullback"]
    return [
        {"case": case, "who": name, "ms": round(1e3 * s, 3), "ratio": round(s / ours, 2), "error": errors.get(name)}
        for name, s in seconds.items()
    ]


def with_gradient(loss, x):
    """A call of loss(), its value and its gradient by x."""

    def call():
        value = loss()
        return value.detach(), *torch.autograd.grad(value, x)

    return call


def value(size):
    """<P, C> once the row sums are off by no more than the tolerance."""
    x, y = clouds(size, 10)
    cost = pairwise_cost(x, y).detach()
    matrix, weight = cost.numpy(), ot.unif(size)

    def pot(method):
        plan = ot.sinkhorn(weight, weight, matrix, EPS, method=method, stopThr=TOLERANCE, numItermax=10_000)
        return torch.tensor((plan * matrix).sum())

    seconds, results = race(
        kullback=lambda: sinkhorn_cost(cost, eps=EPS, n_iters=10_000, tol=TOLERANCE),
        pot_log=lambda: pot("sinkhorn_log"),
        pot_stabilized=lambda: pot("sinkhorn_stabilized"),
    )
    exact = sinkhorn_cost(cost, eps=EPS, n_iters=10_000)
    errors = {name: abs(result - exact).item() for name, result in results.items()}
    return rows(f"value to 1e-9, {size} x {size}", seconds, errors)


def loss(size, n_iters, tol):
    """The sharp loss from points to the gradient by the points; the error is the relative one of the gradient."""
    x, y = clouds(size, 10)
    weight = torch.full((size,), 1 / size, dtype=torch.float64)

    def ours(gradient):
        return sinkhorn_cost(pairwise_cost(x, y), eps=EPS, n_iters=n_iters, tol=tol, gradient=gradient)

    def pot():
        cost = torch.cdist(x, y, p=1)
        options = {"stopThr": tol or 0.0, "numItermax": n_iters, "warn": False}
        return (ot.sinkhorn(weight, weight, cost, EPS, method="sinkhorn_log", **options) * cost).sum()

    seconds, results = race(
        kullback=with_gradient(lambda: ours("envelope"), x),
        kullback_unrolled=with_gradient(lambda: ours("unroll"), x),
        pot_log=with_gradient(pot, x),
    )
    _, exact = with_gradient(lambda: sinkhorn_cost(pairwise_cost(x, y), eps=EPS, n_iters=1000), x)()
    errors = {name: ((by - exact).norm() / exact.norm()).item() for name, (_, by) in results.items()}
    stop = f"to {tol}" if tol else f"{n_iters} iterations"
    return rows(f"sharp loss and gradient, {stop}, {size} x {size}", seconds, errors)


def debiased(size):
    """The debiased loss and its gradient, at accuracies that geomloss reaches at two speeds."""
    x, y = clouds(size, 10)

    def ours(n_iters):
        own = pairwise_cost(x, x), pairwise_cost(y, y)
        return sinkhorn_cost(pairwise_cost(x, y), eps=EPS, n_iters=n_iters, mode="debiased", self_costs=own)

    def peer(speed):
        cost = lambda a, b: torch.cdist(a, b, p=1)  # noqa: E731
        return geomloss.SamplesLoss("sinkhorn", p=1, blur=EPS, cost=cost, scaling=speed, backend="tensorized")(x, y)

    seconds, results = race(
        kullback=with_gradient(lambda: ours(20), x),
        geomloss_fast=with_gradient(lambda: peer(0.5), x),
        geomloss_fine=with_gradient(lambda: peer(0.99), x),
    )
    errors = {name: abs(result - ours(3000)).item() for name, (result, _) in results.items()}
    return rows(f"debiased loss and gradient, {size} x {size}", seconds, errors)


def batched(count, size):
    """Many problems at once, 20 iterations, beside a loop of POT over them."""
    x, y = clouds(count, size, 10)
    cost = pairwise_cost(x, y).detach()
    matrices, weight = cost.numpy(), ot.unif(size)

    def pot():
        options = {"method": "sinkhorn_log", "stopThr": 0, "numItermax": 20, "warn": False}
        plans = [(ot.sinkhorn(weight, weight, matrix, EPS, **options) * matrix).sum() for matrix in matrices]
        return torch.tensor(plans)

    seconds, results = race(kullback=lambda: sinkhorn_cost(cost, eps=EPS), pot_log=pot)
    errors = {"pot_log": (results["pot_log"] - results["kullback"]).abs().max().item()}
    return rows(f"{count} problems of {size} x {size}, 20 iterations", seconds, errors)


def vocabulary(size, width):
    """The L1 cost between rows over a vocabulary, float32, and its gradient; the error is that of the gradient."""
    x, y = clouds(size, width, dtype=torch.float32)
    weights = torch.rand(size, size)
    seconds, results = race(
        kullback=with_gradient(lambda: (weights * pairwise_cost(x, y)).sum(), x),
        torch_cdist=with_gradient(lambda: (weights * torch.cdist(x, y, p=1)).sum(), x),
    )
    ours, peer = (by for _, by in results.values())
    return rows(
        f"L1 cost and gradient, {size} rows of {width}", seconds, {"torch_cdist": (ours - peer).abs().max().item()}
    )


def main():
    table = []
    for size in (64, 256):
        table += value(size) + loss(size, 10_000, TOLERANCE) + loss(size, 20, None) + debiased(size)
    table += batched(64, 64) + vocabulary(256, 4096)
    for row in table:
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        print(f"{row['case']:55} {row['who']:18} {row['ms']:10.2f} ms  x {row['ratio']:6.2f}  {error}")
    peers = {"POT": ot.__version__, "geomloss": geomloss.__version__}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
