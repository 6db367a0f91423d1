"""Composable inference (arXiv 1711.03219) in small: valid pieces are exactly valid, wrong ones are caught.

Exact part: algorithms on four small programs, each run by enumeration in rational arithmetic and compared with the
program's meaning, then wrong variants on programs of growing size. Statistical part: three algorithms over tensors on a
linear Gaussian model of 50 steps, beside its Kalman filter.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.sample import LinearGaussianModel, kalman_smoother
from kullback.sample.compose import (
    MH,
    PMMH,
    RMSMC,
    SMC,
    SMC2,
    Importance,
    Population,
    Prior,
    Program,
    Represented,
    Steps,
    Transformed,
    algorithm,
    bernoulli,
    collapse,
    extract_evidence,
    factor,
    meaning,
    pmmh,
    program,
    resample,
    rmsmc,
    sample,
    self_normalised,
    smc,
    spawn,
    validate,
    yield_,
)
from kullback.sample.compose.transformations import acceptance

__all__ = ["draw", "reproduce"]

HALF = Fraction(1, 2)
LENGTH, PARTICLES, CHAINS, MOVED_CHAINS = 50, 200, 100, 40
PMMH_CHAINS, CHAIN_STEPS = 20, 150
COEFFICIENT, SCALE = 0.9, 0.5

Row = dict[str, Any]


@program
def coin() -> Any:
    """Heads or tails, heads three times as heavy."""
    heads = yield sample(bernoulli(HALF))
    yield factor(3 if heads else 1)
    yield yield_()
    return heads


@program
def hidden_chain(observed: Sequence[int], stay: Fraction = Fraction(3, 4)) -> Any:
    """Two hidden states, observed wrongly one time in four, with a checkpoint after each observation."""
    state, states = None, []
    for seen in observed:
        state = yield sample(bernoulli(HALF if state is None else stay if state else 1 - stay))
        states.append(state)
        yield factor(Fraction(3, 4) if state == bool(seen) else Fraction(1, 4))
        yield yield_()
    return tuple(states)


@program
def branching() -> Any:
    """One choice or two."""
    x = yield sample(bernoulli(HALF))
    if not x:
        return (x,)
    y = yield sample(bernoulli(Fraction(1, 3)))
    yield factor(2 if y else HALF)
    yield yield_()
    return x, y


@program
def geometric() -> Any:
    """Flips until heads, four at most, weighted by their number."""
    flips = 1
    while flips < 4 and not (yield sample(bernoulli(HALF))):
        flips += 1
        yield yield_()
    yield factor(Fraction(flips, 2))
    return flips


PROGRAMS: dict[str, tuple[Program, int]] = {  # with the points of a grid that keeps its laws
    "coin": (coin(), 2),
    "hidden chain": (hidden_chain((1, 0, 1)), 4),
    "branching": (branching(), 6),
    "geometric": (geometric(), 2),
}
VALID: dict[str, Any] = {
    "importance": Importance(2),
    "collapse": Transformed(Importance(3), collapse),
    "extract evidence": Transformed(Importance(2), extract_evidence),
    "SMC, multinomial": SMC(2, None, "multinomial"),
    "SMC, systematic": SMC(2),
    "SMC, stratified": SMC(2, None, "stratified"),
    "SMC, residual": SMC(2, None, "residual"),
    "SMC, by effective size": SMC(2, 2, "multinomial", 0.8),
    "MH, one site": MH(1),
    "MH, all sites": MH(2, "all"),
    "resample-move": RMSMC(2, 1),
    "resample-move, local": RMSMC(2, 1, local=True),
}


def of_two(stays: bool) -> Program:
    """The hidden chain with a parameter."""
    return hidden_chain((1, 0), Fraction(3, 4) if stays else Fraction(1, 4))


@program
def joint() -> Any:
    """The parameter and the chain."""
    stays = yield sample(bernoulli(HALF))
    path = yield of_two(stays)
    return stays, path


NESTED: dict[str, Any] = {"PMMH": PMMH(of_two, 2, 2), "SMC squared": SMC2(of_two, 2, 1, 1)}


def _forget(value: Represented) -> Represented:
    inner = value.representation.inner  # type: ignore[attr-defined]
    drawn = resample(value)
    equal = inner.map(drawn.value, lambda pairs: tuple((Fraction(1, len(pairs)), x) for _, x in pairs))
    return Represented(value.representation, equal)


@algorithm
def whole_copies(base: Any, code: Program) -> Represented:
    """Copies of weight one."""
    population = Population(base)
    twice = base.map(population.of(spawn(2) >> code), lambda pairs: tuple((2 * weight, x) for weight, x in pairs))
    return Represented(population, twice)


WRONG: dict[str, Any] = {
    "resampling forgets the total": Transformed(Importance(2), _forget),
    "weights normalised": Transformed(Importance(2), self_normalised),
    "copies of weight one": whole_copies,
    "MH without trace lengths": MH(1, accept=functools.partial(acceptance, single=False)),
    "MH accepts everything": MH(1, accept=lambda old, new: Fraction(1)),
}


@program
def flip() -> Any:
    """A coin without a factor, the smallest program."""
    return (yield sample(bernoulli(HALF)))


GROWING: list[tuple[Program, int, int]] = [  # with its size, the longest trace, and its grid
    (flip(), 1, 2),
    (coin(), 1, 2),
    (branching(), 2, 6),
    (hidden_chain((1, 0)), 2, 4),
    (hidden_chain((1, 0, 1)), 3, 4),
]


def exact_study(run: Run) -> list[Row]:
    """A row for each algorithm and program, and for each wrong variant."""
    rows: list[Row] = []
    for name, method in VALID.items():
        for code, (made, grid) in PROGRAMS.items():
            begun = time.process_time()
            found = validate(method, made, grid=grid)
            row: Row = {"study": "valid", "algorithm": name, "program": code, "gap": float(found.max_abs_diff)}
            rows.append(row | {"outcomes": found.outcomes, "seconds": time.process_time() - begun})
    exact = meaning(joint())
    for name, method in NESTED.items():
        begun = time.process_time()
        found = validate(method, sample(bernoulli(HALF)), expected=exact, grid=4)
        row = {"study": "valid", "algorithm": name, "program": "hidden chain", "gap": float(found.max_abs_diff)}
        rows.append(row | {"outcomes": found.outcomes, "seconds": time.process_time() - begun})
    run.event("valid", checks=len(rows))
    for name, method in WRONG.items():
        gaps = [float(validate(method, made, grid=grid).max_abs_diff) for made, _, grid in GROWING]
        caught = [size for gap, (_, size, _) in zip(gaps, GROWING, strict=True) if gap > 0.0]
        rows.append({"study": "wrong", "algorithm": name, "gap": max(gaps), "smallest": min(caught, default=0)})
    return rows


def linear_steps(data: Tensor, coefficient: Any = COEFFICIENT) -> Steps:
    """The linear Gaussian chain with observations of unit variance, keeping its last state and the sum of states."""
    stationary = SCALE / math.sqrt(1.0 - COEFFICIENT**2)

    def weigh(x: Tensor, time: int) -> Tensor:
        return -0.5 * (data[time] - x).square() - 0.5 * math.log(2.0 * math.pi)

    def start(z: Tensor) -> Any:
        x = stationary * z[..., 0]
        return (x, x), weigh(x, 0)

    def step(state: Any, z: Tensor, time: int) -> Any:
        x = coefficient * state[0] + SCALE * z[..., 0]
        return (x, state[1] + x), weigh(x, time)

    return Steps(start, step, len(data))


def simulated(source: torch.Generator) -> Tensor:
    """Observations [LENGTH] of the chain."""
    x = SCALE / math.sqrt(1.0 - COEFFICIENT**2) * torch.randn((), generator=source, dtype=torch.float64)
    seen: list[Tensor] = []
    for noise in torch.randn(LENGTH, 2, generator=source, dtype=torch.float64).unbind(0):
        x = x if not seen else COEFFICIENT * x + SCALE * noise[0]
        seen.append(x + noise[1])
    return torch.stack(seen)


def evidence_of_coefficients(data: Tensor, theta: Tensor) -> Tensor:
    """Exact log-evidence [n] under coefficients [n], with the first state's law as it is."""
    ones = torch.ones(len(theta), 1, 1, dtype=torch.float64)
    first = SCALE**2 / (1.0 - COEFFICIENT**2) * ones
    coefficients, noise = theta.view(-1, 1, 1), SCALE**2 * ones
    model = LinearGaussianModel(coefficients, noise, ones[:1], ones[:1], 0.0 * ones[..., 0], first)
    return kalman_smoother(model, data.unsqueeze(1)).log_likelihood


def statistical_study(run: Run) -> list[Row]:
    """A row for each algorithm: a mean under the posterior, and for filters the log-evidence, beside Kalman's."""
    data = simulated(generator(run.seed, "data"))
    exact = kalman_smoother(LinearGaussianModel.scalar(COEFFICIENT, SCALE, 1.0), data.unsqueeze(1))
    rows = []
    for name, chains in {"SMC": CHAINS, "resample-move": MOVED_CHAINS}.items():
        numbers, begun = generator(run.seed, name), time.perf_counter()
        if name == "SMC":
            found = smc(linear_steps(data), PARTICLES, generator=numbers, chains=chains)
        else:
            options = {"mh_steps": 1, "sites": "all", "drift": 0.1}
            found = rmsmc(linear_steps(data), PARTICLES, LENGTH, generator=numbers, chains=chains, **options)
        logs, means = found.log_evidence(), found.expect(lambda state: state[1] / LENGTH)
        row: Row = {"study": "linear", "algorithm": name, "seconds": time.perf_counter() - begun}
        row |= {"log_evidence": float(logs[0]), "deviation": float(logs.std())}
        row |= {"exact_evidence": float(exact.log_likelihood), "mean": float(means[0]), "error": float(means.std())}
        rows.append(row | {"exact": float(exact.mean[0, :, 0].mean())})
    prior, begun = Prior(lambda z: torch.tanh(z[..., 0])), time.perf_counter()
    chain = pmmh(
        prior, lambda theta: linear_steps(data, theta), PARTICLES, CHAIN_STEPS,
        drift=0.7, generator=generator(run.seed, "PMMH"), chains=PMMH_CHAINS,
    )  # fmt: skip
    means = chain.values[0][CHAIN_STEPS // 5 :].mean(0)
    theta = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500).tanh()
    exact_mean = float((evidence_of_coefficients(data, theta).softmax(0) * theta).sum())
    row = {"study": "linear", "algorithm": "PMMH", "seconds": time.perf_counter() - begun, "mean": float(means.mean())}
    row |= {"error": float(means.std()) / math.sqrt(PMMH_CHAINS), "exact": exact_mean}
    run.event("linear", accepted=float(chain.accepted.mean()))
    return [*rows, row]


def reproduce(run: Run) -> Report:
    """One seed: the exact table, which does not depend on it, and the linear Gaussian model."""
    exact, drawn = exact_study(run), statistical_study(run)
    valid = [row for row in exact if row["study"] == "valid"]
    wrong = [row for row in exact if row["study"] == "wrong"]
    filters = [row for row in drawn if "deviation" in row]
    errors = [abs(row["log_evidence"] - row["exact_evidence"]) / row["deviation"] for row in filters]
    metrics = {
        "exact_share": sum(row["gap"] == 0.0 for row in valid) / len(valid),
        "smallest_gap_of_wrong": min(row["gap"] for row in wrong),
        "evidence_error_in_standard_errors": max(errors),
        "mean_error_in_standard_errors": max(abs(row["mean"] - row["exact"]) / row["error"] for row in drawn),
        "largest_program_needed": float(max(row["smallest"] for row in wrong)),
    }
    return Report(metrics=metrics, rows=[*exact, *drawn])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gaps of all algorithms, how many outcomes were added up for them, and estimates beside Kalman's."""
    from kullback.figures import figure

    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    valid, wrong = ([row for row in first if row["study"] == kind] for kind in ("valid", "wrong"))
    names = list(dict.fromkeys(row["algorithm"] for row in valid))
    with figure(path, columns=3, size=(3.9, 3.6)) as (gaps, listed, drawn):
        bars = [(name, max(row["gap"] for row in valid if row["algorithm"] == name), "C0") for name in names]
        bars += [(row["algorithm"], row["gap"], "C3") for row in wrong]
        for place, (_, gap, color) in enumerate(bars):
            if gap:
                gaps.barh(place, gap, color=color)
            else:
                gaps.text(1.3e-3, place, "0", color=color, va="center", fontsize=8)
        gaps.set(xscale="log", xlim=(1e-3, 3.0), ylim=(len(bars) - 0.5, -0.5), title="largest gap to the meaning")
        gaps.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
        for code, mark in zip(PROGRAMS, "osD^", strict=False):
            points = [(row["outcomes"], names.index(row["algorithm"])) for row in valid if row["program"] == code]
            listed.semilogx(*zip(*points, strict=True), mark, markersize=4, label=code)
        listed.set(title="outcomes of an algorithm's law", ylim=(len(names) - 0.5, -0.5))
        listed.set_yticks(range(len(names)), names, fontsize=7)
        listed.legend(frameon=False, fontsize=7, loc="upper right", bbox_to_anchor=(1.0, 0.45))
        for place, (_, algorithm_name, found, wanted, error) in enumerate(ESTIMATES):
            for row in rows:
                if row["study"] == "linear" and row["algorithm"] == algorithm_name:
                    at = place + 0.18 * (row["seed"] - 1)
                    drawn.errorbar((row[found] - row[wanted]) / row[error], at, xerr=1.0, fmt="ko", markersize=3)
        drawn.axvline(0.0, color="0.6", linewidth=0.8)
        drawn.set(title="off Kalman's, in standard errors", xlim=(-5, 5), ylim=(len(ESTIMATES) - 0.5, -0.5))
        drawn.set_yticks(range(len(ESTIMATES)), [label for label, *_ in ESTIMATES], fontsize=7)


ESTIMATES = [
    ("log-evidence, SMC", "SMC", "log_evidence", "exact_evidence", "deviation"),
    ("log-evidence, resample-move", "resample-move", "log_evidence", "exact_evidence", "deviation"),
    ("mean state, SMC", "SMC", "mean", "exact", "error"),
    ("mean state, resample-move", "resample-move", "mean", "exact", "error"),
    ("coefficient, PMMH", "PMMH", "mean", "exact", "error"),
]
