"""Doors to the algorithms: `run` one on a layer, or call it by its name on a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kullback.core.errors import ConfigError
from kullback.sample.compose.algorithms import MH, PMMH, RMSMC, SMC, SMC2, Algorithm, Importance, Rejection
from kullback.sample.compose.programs import Program, Recorded, Ret, Trace
from kullback.sample.compose.representations import Enum, Population, Represented, Sam, Traced, Weighted
from kullback.sample.compose.steps import Numbers, Particles, Steps
from kullback.sample.compose.transformations import mh_step
from kullback.sample.compose.vectorised import Chain, Prior, over
from kullback.sample.compose.weights import log_of

__all__ = ["importance", "mh", "pmmh", "rejection", "rmsmc", "run", "smc", "smc2"]

Source = torch.Generator | Numbers


def run(
    method: Algorithm,
    model: Program | Steps | Prior,
    *,
    layer: str | None = None,
    generator: Source | None = None,
    chains: int = 1,
    grid: int | None = None,
) -> Any:
    """An algorithm on a layer: "sample" draws, "torch" draws over tensors, "enum" lists its exact law.

    The layer is that of the model when left out. Returns Particles, a Chain, a single result of Rejection, or from
    "enum" a dictionary of weights. generator: of all draws; grid: see `validate`.
    """
    layer = layer or ("torch" if isinstance(model, (Steps, Prior)) else "sample")
    if layer not in ("sample", "torch", "enum"):
        raise ConfigError(f"layer is 'sample', 'torch' or 'enum', and not {layer!r}")
    if (layer == "torch") != isinstance(model, (Steps, Prior)):
        raise ConfigError(f"the layer {layer} does not run {type(model).__name__}: tensors take Steps, others programs")
    if layer == "enum":
        return method.on(Enum(grid), model).meaning()  # type: ignore[arg-type]
    if generator is None:
        raise ConfigError("drawing takes a generator: pass torch.Generator().manual_seed(0)")
    numbers = generator if isinstance(generator, Numbers) else Numbers(generator)
    if layer == "torch":
        return over(method, model, numbers, chains=chains)  # type: ignore[arg-type]
    if isinstance(method, (MH, PMMH)):
        return _chain(method, model, numbers)  # type: ignore[arg-type]
    base = Sam()
    made = method.on(base, model)  # type: ignore[arg-type]
    return _drawn(made, base.draw(made.value, numbers))


def _drawn(made: Represented, value: Any) -> Any:
    if isinstance(made.representation, Weighted):
        value = (value,)
    elif not isinstance(made.representation, Population):
        return value
    logs = torch.tensor([log_of(weight) for weight, _ in value], dtype=torch.float64)
    return Particles([x for _, x in value], logs)


def _chain(method: MH | PMMH, program: Program, numbers: Numbers) -> Chain:
    """A state after each move, from a trace that the prior gives with a density above zero."""
    base = Sam()
    traced = Traced(Weighted(base))
    code, init = method.start(base, program), getattr(method, "init", None)
    pair: Any = None
    if init is not None:
        pair = code, base.draw(base.of(Recorded(code, tuple(init), silent=True)), numbers)
    for _ in range(10_000 if pair is None else 0):
        _, pair = base.draw(traced.of(code), numbers)
        if pair[1].density != 0:
            break
    if init is None and pair[1].density == 0:
        raise ConfigError("the prior gave no run of positive weight in 10000: begin nearer to the data, with init")
    values, densities, accepted = [], [], 0
    for _ in range(method.num_steps):
        before: Trace = pair[1]
        here = Represented(traced, traced.inner.of(Ret(pair)))
        step = mh_step(here, sites=method.sites, drift=method.drift, accept=getattr(method, "accept", None))
        _, pair = base.draw(step.value, numbers)
        accepted += pair[1] is not before
        values.append(pair[1].value)
        densities.append(log_of(pair[1].density))
    share = accepted / max(method.num_steps, 1)
    return Chain(values, torch.tensor(densities, dtype=torch.float64), share, pair[1].choices)


def importance(model: Any, num_particles: int, *, generator: Source, chains: int = 1) -> Particles:
    """num_particles independent runs, weighted: Particles."""
    found: Particles = run(Importance(num_particles), model, generator=generator, chains=chains)
    return found


def rejection(model: Program, bound: Any, *, generator: Source, attempts: int | None = None) -> Any:
    """A draw of the normalised measure; bound: the largest weight that a run can have. None after so many attempts."""
    return run(Rejection(bound, attempts), model, generator=generator)


def smc(
    model: Any,
    num_particles: int,
    num_steps: int | None = None,
    *,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    generator: Source,
    chains: int = 1,
) -> Particles:
    """A particle filter over the checkpoints of a program, or over Steps in `chains` at once.

    >>> walk = Steps(lambda z: (z[..., 0], -(z[..., 0] ** 2)), lambda x, z, time: (x + z[..., 0], -(x**2)), length=3)
    >>> smc(walk, 100, generator=torch.Generator(), chains=2).log_evidence().shape
    torch.Size([2])
    """
    method = SMC(num_particles, num_steps, resampler, ess_threshold)
    found: Particles = run(method, model, generator=generator, chains=chains)
    return found


def rmsmc(
    model: Any, num_particles: int, num_steps: int, *, generator: Source, chains: int = 1, **options: Any
) -> Particles:
    """A particle filter with moves of traces at each checkpoint; options: those of `RMSMC`."""
    found: Particles = run(RMSMC(num_particles, num_steps, **options), model, generator=generator, chains=chains)
    return found


def mh(
    model: Any,
    num_steps: int,
    *,
    sites: str | Sequence[Sequence[int]] = "one",
    drift: float | None = None,
    init: Any = None,
    generator: Source,
    chains: int = 1,
) -> Chain:
    """A Markov chain over traces, num_steps states after the first, see `mh_step`; init: where to begin, see `MH`."""
    found: Chain = run(MH(num_steps, sites, drift, init=init), model, generator=generator, chains=chains)
    return found


def pmmh(
    prior: Program | Prior,
    model: Callable[[Any], Any],
    num_particles: int,
    num_steps: int,
    *,
    generator: Source,
    chains: int = 1,
    **options: Any,
) -> Chain:
    """A Markov chain over parameters, with values (parameters, a result of the filter); options: those of `PMMH`."""
    method = PMMH(model, num_particles, num_steps=num_steps, **options)
    found: Chain = run(method, prior, generator=generator, chains=chains)
    return found


def smc2(
    prior: Program | Prior,
    model: Callable[[Any], Any],
    num_parameters: int,
    num_particles: int,
    num_steps: int,
    *,
    generator: Source,
    **options: Any,
) -> Particles:
    """A particle filter over parameters, with values (parameters, a result of its filter); options: those of `SMC2`."""
    found: Particles = run(SMC2(model, num_parameters, num_particles, num_steps, **options), prior, generator=generator)
    return found

