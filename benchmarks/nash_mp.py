"""Nash mirror prox beside the two products of a matrix and a vector that an iteration cannot do without.

Writes nash_mp.json. Double precision, one thread, medians of calls in turn: milliseconds an iteration, "products" the
two bare products, "ratio" the time over theirs. "batched": 64 games of 100 answers at once, over one after the other.
"scipy": the fixed point of the equilibrium's logarithms by scipy.optimize.root, over `regularised_nash`, with the error
of both (the largest residual).
"""

import json
from pathlib import Path

import torch
from scipy import optimize

import _measure
from kullback.align.nash import PreferenceGame, nash_mirror_prox, regularised_nash
from kullback.core.environment import environment
from kullback.core.rng import generator

SIZES, ITERATIONS = (100, 1000, 3000), 20


def game(size, batch=(), beta=0.1):
    logits = 3.0 * torch.randn(*batch, size, size, generator=generator(0, "game", size), dtype=torch.float64)
    preferences = ((logits - logits.mT) / 2**0.5).sigmoid()
    return PreferenceGame(preferences, torch.zeros(*batch, size, dtype=torch.float64).log_softmax(-1), beta)


def products(given):
    policy = given.log_reference.exp()
    for _ in range(2 * ITERATIONS):
        policy = given.preferences @ policy


def iterations(size):
    given = game(size)
    calls = {"kullback": lambda: nash_mirror_prox(given, ITERATIONS), "products": lambda: products(given)}
    times, _ = _measure.race(calls)
    found = {name: 1000 * value / ITERATIONS for name, value in _measure.medians(times).items()}
    return {"answers": size, **found, "ratio": _measure.ratio(times, "kullback", "products")}


def batched():
    together = game(100, (64,))
    alone = [PreferenceGame(p, r, 0.1) for p, r in zip(together.preferences, together.log_reference, strict=True)]
    times, _ = _measure.race({
        "at once": lambda: nash_mirror_prox(together, ITERATIONS),
        "one by one": lambda: [nash_mirror_prox(one, ITERATIONS) for one in alone],
    })  # fmt: skip
    return {"games": 64, "answers": 100, "ratio": _measure.ratio(times, "at once", "one by one")}


def residual(given, logits):
    gap = logits - given.log_reference - given.beats(logits.log_softmax(0)) / given.beta
    return gap - gap.mean()


def by_scipy(given):
    def gap(logits):
        return residual(given, torch.from_numpy(logits)).numpy()

    found = optimize.root(gap, given.log_reference.numpy(), method="hybr", tol=1e-12)
    return torch.from_numpy(found.x)


def equilibrium(size):
    given = game(size)
    calls = {"kullback": lambda: regularised_nash(given), "scipy": lambda: by_scipy(given)}
    times, results = _measure.race(calls, rounds=3)
    errors = {name: residual(given, policy).abs().max().item() for name, policy in results.items()}
    seconds = _measure.medians(times)
    return {"answers": size, "seconds": seconds, "ratio": _measure.ratio(times, "kullback", "scipy"), "error": errors}


def main():
    torch.set_num_threads(1)
    found = {
        "environment": environment(), "iterations": [iterations(size) for size in SIZES], "batched": batched(),
        "equilibrium": [equilibrium(size) for size in (10, 100, 200)],
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
