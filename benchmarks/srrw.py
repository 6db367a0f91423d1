"""Self-repellent walks: steps a second beside loops over a networkx graph, memory, and error beside other orders.

Speed: one run on regular graphs of degree 10 and three sizes, one thread, in seconds of this process; the peer's loop
draws from the same rule over networkx's adjacency with `random.choices`, since no library has the rule. "steps_per_s"
counts the uniform numbers in. With an optimizer: 64 runs of logistic regression, walk and gradients together. Memory:
the peak above what the process held before, of 20,000 steps.

Error: the trace of the covariance of visits times n against `sampling_covariance`, 20 nodes, n = 20,000, a = 1. Then
the mean squared error of the reproduction's logistic regression after 30,000 gradients (b = 0.9): with a token, plain,
self-repellent or one that does not turn back, at independent nodes, in fresh random orders of all nodes, and by gossip,
in which all nodes step at once and average with their neighbours (300 rounds; its error is that of the mean of all
nodes). Visits a second of a token over two processes on gloo, and of one and four tokens over two actors of Ray.
Writes srrw.json.
"""

import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path

import networkx
import torch

import _measure
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.optim import (
    SRRW,
    base_chain,
    follow,
    non_backtracking,
    sampling_covariance,
    shuffled_visits,
    simulate,
    start_walk,
    walk,
    walk_actors,
)
from kullback.optim.srrw_simulation import step_sizes
from kullback.papers.srrw import reproduce as study

torch.set_num_threads(1)
DEGREE, SIZES, PEER_STEPS = 10, (100, 1000, 10_000), 4000


def regular(nodes):
    graph = networkx.random_regular_graph(DEGREE, nodes, seed=1)
    return graph, base_chain(networkx.to_scipy_sparse_array(graph, nodelist=range(nodes)))


def loop(graph, alpha, a, steps, seed=0):
    """The walk as one writes it over networkx; uniform target, equal degrees."""
    source, node, scale = random.Random(seed), 0, 1.0
    counts = dict.fromkeys(graph, 1.0 / len(graph))
    for step in range(1, steps + 1):
        near = list(graph.neighbors(node))
        node = source.choices(near, [counts[other] ** -alpha for other in near])[0]
        gamma = (step + 1) ** -a
        scale *= 1.0 - gamma
        counts[node] += gamma / scale
    return counts


def speed(nodes, alpha, rounds, a=0.8):
    graph, chain = regular(nodes)
    rule, source = SRRW(chain, alpha, a), generator(0, "walk")
    start, steps = start_walk(rule, start=0), 2_000_000
    calls = {
        "kullback": (steps, lambda: walk(rule, start, steps, generator=source)),
        "kullback, vectorised twin": (
            PEER_STEPS, lambda: walk(rule, start, PEER_STEPS, generator=source, compiled=False)
        ),
        "networkx loop": (PEER_STEPS, lambda: loop(graph, alpha, a, PEER_STEPS)),
    }  # fmt: skip
    times, _ = _measure.race({name: call for name, (_, call) in calls.items()}, rounds, time.process_time)
    rates = {name: calls[name][0] / seconds for name, seconds in _measure.medians(times).items()}
    case = f"walk, N = {nodes}, degree {DEGREE}, alpha = {alpha:g}"
    return [
        {"case": case, "who": who, "steps_per_s": round(rate), "ratio": round(rates["kullback"] / rate, 2)}
        for who, rate in rates.items()
    ]


def training(rounds):
    """Walk and gradients together."""
    chain, field = study.graph(generator(0, "graph")), study.samples(generator(0, "samples"))
    source, steps, runs = generator(0, "training"), 10_000, 64
    theta = torch.zeros(7, dtype=torch.float64)
    calls = {"kullback": lambda: simulate(SRRW(chain, 10.0), field, theta, steps, runs=runs, generator=source)}
    times, _ = _measure.race(calls, rounds, time.process_time)
    rate = steps * runs / _measure.medians(times)["kullback"]
    case = "walk and logistic regression, N = 100, d = 7, alpha = 10"
    return {"case": case, "who": "kullback", "steps_per_s": round(rate)}


def walk_of(nodes):
    _, chain = regular(nodes)
    rule = SRRW(chain, 10.0)
    start = start_walk(rule, start=0)
    walk(rule, start, 10, generator=generator(0, "memory"))  # brings in the compiled code
    return lambda: walk(rule, start, 20_000, generator=generator(0, "memory"))


def loop_of(nodes):
    graph, _ = regular(nodes)
    return lambda: loop(graph, 10.0, 0.8, 20_000)


def memory(nodes):
    rows = []
    for who, function in (("kullback", "walk_of"), ("networkx loop", "loop_of")):
        mebibytes = round(_measure.peak_memory(__file__, function, nodes) / 2**20, 2)
        rows.append({"case": f"memory, N = {nodes}", "who": who, "MiB": mebibytes})
    return rows


def accuracy(alpha, steps=20_000, runs=4000):
    graph = networkx.connected_watts_strogatz_graph(20, 4, 0.4, seed=2)
    chain = base_chain(networkx.to_scipy_sparse_array(graph, nodelist=range(20)))
    rule, source = SRRW(chain, alpha, 1.0), generator(0, "accuracy", str(alpha))
    state, _ = walk(rule, start_walk(rule, runs=runs, generator=source), steps, generator=source)
    found = (state.history - chain.target).square().sum(1).mean().item() * (steps + 1)
    theory = sampling_covariance(chain, alpha, 1.0).trace().item()
    case = f"n Var against theory, alpha = {alpha:g}, n = {steps}"
    return {"case": case, "who": "kullback", "found": round(found, 4), "theory": round(theory, 4),
            "error": round(found / theory - 1.0, 4)}  # fmt: skip


def gossip(chain, field, best, rounds, b=0.9):
    """All nodes step at once and average with their neighbours; nothing in it is random."""
    nodes = torch.arange(chain.nodes)
    theta, mixing = torch.zeros(chain.nodes, len(best), dtype=torch.float64), chain.matrix()
    for size in step_sizes(0, rounds, b).tolist():
        theta = mixing @ (theta + size * field(theta, nodes))
    return (theta.mean(0) - best).square().sum().item(), (theta - best).square().sum(-1).mean().item()


def errors(runs=100):
    chain, field = study.graph(generator(0, "srrw", "graph")), study.samples(generator(0, "srrw", "samples"))
    best, steps = field.optimum(chain.target), 30_000
    found = {}
    for alpha in (0.0, 5.0, 20.0):
        source, theta = generator(3, "errors", str(alpha)), torch.zeros(7, dtype=torch.float64)
        ends = simulate(SRRW(chain, alpha, 0.8), field, theta, steps, runs=runs, generator=source).theta[-1]
        name = "token, plain walk" if alpha == 0.0 else f"token, alpha = {alpha:g}"
        found[name] = (ends - best).square().sum(-1).mean().item()
    start, source = torch.zeros(7, dtype=torch.float64), generator(4, "errors")
    for name, nodes in {
        "token that does not turn back": non_backtracking(chain, steps, runs=runs, generator=source)[1],
        "independent nodes": torch.randint(chain.nodes, (runs, steps), generator=source),
        "random orders": shuffled_visits(chain.nodes, steps, runs=runs, generator=source),
    }.items():
        found[name] = (follow(field, start, nodes) - best).square().sum(-1).mean().item()
    found["gossip, mean of nodes"], found["gossip, a node"] = gossip(chain, field, best, steps // chain.nodes)
    plain = found["token, plain walk"]
    case = f"error after {steps} gradients"
    return [{"case": case, "who": who, "mse": float(f"{value:.3g}"), "ratio": round(plain / value, 2)}
            for who, value in found.items()]  # fmt: skip


def processes(visits=3000):
    """Visits a second over two processes, without the time they take to begin."""
    import tempfile

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "optim"))
    from test_token_processes import walked

    seconds = []
    for steps in (1, visits):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            walked(Path(folder), 2, starts=[0], steps=steps, alpha=5.0, a=0.8)
            seconds.append(time.perf_counter() - begin)
    rate = (visits - 1) / (seconds[1] - seconds[0])
    return {"case": "a token over two processes, gloo", "who": "kullback", "steps_per_s": round(rate)}


def actors(visits=300):
    """Visits a second of all tokens over two actors, without the time they take to begin."""
    try:
        import ray
    except ImportError:
        return []
    from _token_process import NODES, ring_with_chord

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows, theta = [], torch.zeros(3, dtype=torch.float64)
    for tokens in (1, 4):
        seconds = []
        for steps in (1, visits):
            begin = time.perf_counter()
            walk_actors(
                SRRW(ring_with_chord(), 5.0, 0.8), lambda owner: lambda theta, node: theta - node, theta, steps,
                owners=[place % 2 for place in range(NODES)], starts=[0] * tokens,
            )  # fmt: skip
            seconds.append(time.perf_counter() - begin)
        rate = tokens * (visits - 1) / (seconds[1] - seconds[0])
        case = f"{tokens} token{'s' * (tokens > 1)} over two actors, Ray"
        rows.append({"case": case, "who": "kullback", "steps_per_s": round(rate)})
    ray.shutdown()
    return rows


def main():
    rows = []
    for nodes in SIZES:
        for alpha in (0.0, 1.0, 20.0):
            rows += speed(nodes, alpha, 5)
    rows.append(training(5))
    for nodes in SIZES:
        rows += memory(nodes)
    rows += [accuracy(alpha) for alpha in (0.0, 1.0, 2.0, 5.0)]
    rows += errors()
    rows.append(processes())
    rows += actors()
    for row in rows:
        print(row)
    content = {"environment": environment(), "threads": 1, "peers": {"networkx": version("networkx")}, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
