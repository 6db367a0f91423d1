"""Composed inference beside particles, loops by hand and the interpreter: writes composable_inference.json.

Filters of a hidden chain of two states and of a linear Gaussian chain, 50 steps, systematic resampling at each: over
tensors, by hand (the same tensor operations without the pieces), by particles' SMC and, for few particles, by the
interpreter of programs. Single-site Metropolis-Hastings: moves a second over tensors, by the interpreter, and by a loop
in NumPy that is written for this model. Contenders take turns, one thread; times are medians, "ratio" is the other's
over ours, the median over rounds; what pieces and checks add to the loop by hand is 1 / ratio - 1, of which 0.1 was
allowed, and a model of a few operations misses it by a little at 100 particles. "error": relative, of the mean evidence
estimate of 50 runs against the exact one, and "se" its standard error. "mb": peak memory above what the inputs hold, of
the middle size.
"""

import json
import math
import time
import warnings
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import numpy as np
import particles
import torch
from particles import distributions, state_space_models

import _measure
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.sample import LinearGaussianModel, kalman_smoother
from kullback.sample.compose import Steps, bernoulli, factor, mh, program, sample, smc, yield_

torch.set_num_threads(1)
warnings.simplefilter("ignore")
LENGTH, SIZES, RUNS = 50, (100, 1000, 10_000), 50
STAY, RIGHT = 0.75, 0.75
SEEN = (torch.rand(LENGTH, generator=generator(0, "seen")) < 0.6).tolist()
DATA = torch.randn(LENGTH, generator=generator(0, "data"), dtype=torch.float64)
LOG_RIGHT, LOG_WRONG = math.log(RIGHT), math.log(1 - RIGHT)


def hidden():
    def weigh(state, time):
        return torch.where(state if SEEN[time] else ~state, LOG_RIGHT, LOG_WRONG).double()

    def start(u):
        state = u[..., 0] >= 0.5
        return state, weigh(state, 0)

    def step(state, u, time):
        state = (u[..., 0] >= STAY) ^ state
        return state, weigh(state, time)

    return Steps(start, step, LENGTH, noise="uniform")


def linear():
    def weigh(x, time):
        return -0.5 * (DATA[time] - x).square() - 0.5 * math.log(2 * math.pi)

    def start(z):
        x = z[..., 0] / math.sqrt(1 - 0.81)
        return x, weigh(x, 0)

    def step(x, z, time):
        x = 0.9 * x + z[..., 0]
        return x, weigh(x, time)

    return Steps(start, step, LENGTH)


MODELS = {"hidden chain": hidden(), "linear Gaussian": linear()}


def by_hand(model, count, source):
    """The filter without pieces or checks."""
    draw = torch.rand if model.noise == "uniform" else torch.randn
    places = torch.arange(count, dtype=torch.float64)
    state, weights = model.start(draw(1, count, 1, generator=source, dtype=torch.float64))
    weights = weights - math.log(count)
    for step in range(1, LENGTH):
        total = weights.logsumexp(1, keepdim=True)
        ends = weights.softmax(1).cumsum(1) * count
        u = torch.rand(1, 1, generator=source, dtype=torch.float64)
        index = torch.searchsorted(ends, u + places, right=True).clamp(max=count - 1)
        state = state.index_select(1, index[0])
        state, more = model.step(state, draw(1, count, 1, generator=source, dtype=torch.float64), step)
        weights = more + (total - math.log(count))
    return float(weights.logsumexp(1))


class Chain(state_space_models.StateSpaceModel):
    """The hidden chain as particles has it."""

    def PX0(self):
        return distributions.Categorical(p=np.array([0.5, 0.5]))

    def PX(self, t, xp):
        return distributions.Categorical(p=np.array([[STAY, 1 - STAY], [1 - STAY, STAY]])[xp])

    def PY(self, t, xp, x):
        return distributions.Categorical(p=np.array([[RIGHT, 1 - RIGHT], [1 - RIGHT, RIGHT]])[x])


class Linear(state_space_models.StateSpaceModel):
    def PX0(self):
        return distributions.Normal(scale=1 / math.sqrt(1 - 0.81))

    def PX(self, t, xp):
        return distributions.Normal(loc=0.9 * xp)

    def PY(self, t, xp, x):
        return distributions.Normal(loc=x)


def by_particles(name, count):
    model, data = (Chain(), np.array(SEEN, dtype=int)) if name == "hidden chain" else (Linear(), DATA.numpy())
    found = particles.SMC(
        fk=state_space_models.Bootstrap(ssm=model, data=data), N=count, resampling="systematic", ESSrmin=1.0
    )
    found.run()
    return float(found.logLt)


@program
def interpreted():
    state = None
    for time_, seen in enumerate(SEEN):
        if time_:
            yield yield_()
        odds = Fraction(1, 2) if state is None else Fraction(3, 4) if state else Fraction(1, 4)
        state = yield sample(bernoulli(odds))
        yield factor(Fraction(3, 4) if state == seen else Fraction(1, 4))
    return state


def filters(name, count):
    model, source = MODELS[name], generator(0, "filter")
    calls = {
        "kullback": lambda: float(smc(model, count, generator=source).log_evidence()),
        "loop by hand": lambda: by_hand(model, count, source),
        "particles": lambda: by_particles(name, count),
    }
    if name == "hidden chain" and count == SIZES[0]:
        calls["kullback, interpreter"] = lambda: float(smc(interpreted(), count, generator=source).log_evidence())
    return calls


def exact(name):
    if name == "linear Gaussian":
        return float(kalman_smoother(LinearGaussianModel.scalar(0.9, 1.0, 1.0), DATA.unsqueeze(1)).log_likelihood)
    moves = torch.tensor([[STAY, 1 - STAY], [1 - STAY, STAY]], dtype=torch.float64)
    shown = torch.tensor([[RIGHT, 1 - RIGHT], [1 - RIGHT, RIGHT]], dtype=torch.float64)
    first = torch.tensor([0.5, 0.5], dtype=torch.float64)
    now, total = first, 0.0
    for index, seen in enumerate(SEEN):
        now = (now if not index else now @ moves) * shown[:, int(seen)]
        total += math.log(float(now.sum()))
        now = now / now.sum()
    return total


def memory_of_filter(who, name, count):
    return filters(name, count)[who]


def filter_rows(name, count):
    calls = filters(name, count)
    np.random.seed(0)  # noqa: NPY002 - particles draws from it
    times, _ = _measure.race(calls, rounds=21 if count < 10_000 else 3, clock=time.process_time)
    middle, wanted, rows = _measure.medians(times), exact(name), []
    for who, call in calls.items():
        row = {"case": f"{name}, {LENGTH} steps, {count} particles", "who": who, "ms": 1e3 * middle[who]}
        row["ratio"] = _measure.ratio(times, who, "kullback")
        if who != "kullback, interpreter" and count < 10_000:
            ratios = np.exp([call() - wanted for _ in range(RUNS)])
            row |= {"error": float(abs(ratios.mean() - 1)), "se": float(ratios.std() / math.sqrt(RUNS))}
        if count == SIZES[1]:
            row["mb"] = _measure.peak_memory(__file__, "memory_of_filter", who, name, count) / 1e6
        rows.append(row)
    return rows


def numpy_moves(chains, moves):
    """Single-site moves of the linear chain in NumPy, the trace as normal numbers, run again in full."""
    source = np.random.default_rng(0)
    data, scale = DATA.numpy(), 1 / math.sqrt(1 - 0.81)

    def density(z):
        x, total = scale * z[:, 0], 0.0
        for step in range(LENGTH):
            x = x if not step else 0.9 * x + z[:, step]
            total = total - 0.5 * (data[step] - x) ** 2
        return total

    z = source.standard_normal((chains, LENGTH))
    now, rows = density(z), np.arange(chains)
    for _ in range(moves):
        new = z.copy()
        new[rows, source.integers(LENGTH, size=chains)] = source.standard_normal(chains)
        other = density(new)
        accept = np.log(source.random(chains)) < other - now
        z, now = np.where(accept[:, None], new, z), np.where(accept, other, now)


def moves(chains, count=10):
    source = generator(0, "moves")
    calls = {
        "kullback": lambda: mh(MODELS["linear Gaussian"], count, generator=source, chains=chains),
        "loop in NumPy": lambda: numpy_moves(chains, count),
    }
    if chains == 1:
        calls["kullback, interpreter"] = lambda: mh(interpreted(), count, generator=source)
    times, _ = _measure.race(calls, rounds=5, clock=time.process_time)
    middle = _measure.medians(times)
    return [
        {"case": f"single-site moves, {LENGTH} sites, {chains} chains", "who": who,
         "moves_per_s": chains * count / middle[who], "ratio": _measure.ratio(times, who, "kullback")}
        for who in times
    ]  # fmt: skip


def main():
    table = [row for name in MODELS for count in SIZES for row in filter_rows(name, count)]
    table += [row for chains in (1, 100, 1000) for row in moves(chains)]
    for row in table:
        row |= {key: float(f"{value:.4g}") for key, value in row.items() if isinstance(value, float)}
        rest = "  ".join(f"{name} {value}" for name, value in row.items() if name not in ("case", "who"))
        print(f"{row['case']:45} {row['who']:22} {rest}")
    content = {"environment": environment(), "threads": 1, "peers": {"particles": version("particles")}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
