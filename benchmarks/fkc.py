"""Feynman-Kac correctors: what weights and resampling add to bare sampling, and resampling beside a peer.

Guidance of weight 2, systematic resampling at every step. "bare" is the loop that one writes by hand in plain torch:
mixed score, drift, noise, no weight, no check. A toy network (2 dimensions), a small one (64), and a convolutional
network on images (3 x 32 x 32), in single precision on one thread. Times are medians of processor seconds in turn,
"over" is ours over bare, less one, median over rounds, of which 0.15 was asked at most of the toy network and 0.03 of
the real ones; "MB" is the peak beyond what the process held before. Resampling beside the package `particles` (numba)
and torch.multinomial; "error" is the variance of the counts of an ancestor, relative to multinomial draws. Writes
fkc.json.
"""

import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

try:
    import particles.resampling
except ImportError:
    # It asks for numpy below 2, which no other peer can live with, and runs with later ones all the same.
    print("skipped: this benchmark needs pip install --no-deps particles==0.4")
    raise SystemExit(0) from None
from _measure import medians, peak_memory, race, ratio
from kullback.core.environment import environment
from kullback.sample.denoisers import Denoiser, network_score
from kullback.sample.fkc import fkc, systematic_resample
from kullback.sample.fkc_paths import VE, DiffusionPath, steps_of
from kullback.sample.fkc_targets import GeometricMean

torch.set_num_threads(1)
SCHEDULE = VE(0.02, 20.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Images(torch.nn.Module):
    """A residual network of 3 x 3 convolutions."""

    def __init__(self, seed, width=64, blocks=4):
        super().__init__()
        self.first = torch.nn.Conv2d(3, width, 3, padding=1)
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks))
        self.last = torch.nn.Conv2d(width, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.02, generator=seeded(seed))

    def forward(self, x, level):
        hidden = self.first(x / (1.0 + level**2).sqrt())
        for one, two in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            hidden = hidden + two(torch.nn.functional.silu(one(hidden)))
        return x / (1.0 + level**2) + 0.1 * self.last(hidden)


# name -> shape, particles, steps, network of a seed
SIZES = {
    "toy": ((2,), 2000, 100, lambda seed: Denoiser(2, spread=1.0, generator=seeded(seed), width=128)),
    "small": ((64,), 512, 50, lambda seed: Denoiser(64, spread=1.0, generator=seeded(seed), width=768)),
    "images": ((3, 32, 32), 16, 4, Images),
}


def scores(size):
    networks = [SIZES[size][3](seed) for seed in (1, 2)]
    return [network_score(network, SCHEDULE) for network in networks]


def bare(size, weight=2.0):
    """The loop by hand."""
    shape, count, number, _ = SIZES[size]
    first, second = scores(size)
    steps = steps_of(SCHEDULE, number)

    def call():
        source = seeded(0)
        with torch.no_grad():
            x = SCHEDULE.sigma_max * torch.randn(count, *shape, generator=source)
            for step in steps:
                level = torch.tensor(step.level)
                mixed = torch.lerp(first(x, level), second(x, level), weight)
                noise = torch.randn(x.shape, generator=source)
                x = x.add(mixed, alpha=step.h).add_(noise, alpha=math.sqrt(step.h))
        return x

    with torch.no_grad():
        first(torch.zeros(count, *shape), torch.tensor(1.0))  # as below
    return call


def corrected(size, resample="systematic"):
    shape, count, number, _ = SIZES[size]
    target = GeometricMean(*(DiffusionPath(score, shape) for score in scores(size)), 2.0)
    kernel = fkc(
        target, SCHEDULE, num_particles=count, num_steps=number, resample=resample, dtype=torch.float32
    )
    kernel.step(kernel.init(generator=seeded(0)), generator=seeded(0))  # what is compiled is loaded once

    def call():
        source = seeded(0)
        state = kernel.init(generator=source)
        for _ in range(number):
            state, _ = kernel.step(state, generator=source)
        return state

    return call


def overheads(rounds):
    rows = []
    for size, (shape, count, number, _) in SIZES.items():
        calls = {
            "bare": bare(size),
            "kullback": corrected(size),
            "kullback, weights only": corrected(size, "none"),
            "kullback, births and deaths": corrected(size, "birth_death"),
        }
        times, _ = race(calls, rounds, clock=time.process_time)
        for name, seconds in medians(times).items():
            row = {"case": f"{size}, {count} particles of {math.prod(shape)}, {number} steps", "who": name}
            row |= {"ms_a_step": 1e3 * seconds / number, "over": ratio(times, name, "bare") - 1.0}
            function = {"bare": "bare", "kullback": "corrected"}.get(name)
            row["MB"] = peak_memory(__file__, function, size) / 2**20 if function else None
            rows.append(row)
    return rows


def resamplers(log_weights):
    """Ancestors from log-weights [1, K]."""
    count, logs, source = log_weights.shape[1], log_weights[0].numpy(), seeded(1)

    def peer():
        number = torch.rand(1, generator=source, dtype=torch.float64).item()
        positions = (number + np.arange(count)) / count
        weights = particles.resampling.exp_and_normalise(logs)
        return torch.from_numpy(particles.resampling.inverse_cdf(positions, weights))

    return {
        "kullback": lambda: systematic_resample(log_weights, generator=source)[0],
        "kullback, tensors": lambda: systematic_resample(log_weights, generator=source, compiled=False)[0],
        "particles": peer,
        "torch.multinomial": lambda: torch.multinomial(
            log_weights[0].softmax(0), count, replacement=True, generator=source
        ),
    }


def resampling(rounds):
    rows = []
    for count in (1000, 100_000, 1_000_000):
        log_weights = torch.randn(1, count, generator=seeded(0), dtype=torch.float64)
        weights = log_weights.softmax(1)
        calls = resamplers(log_weights)
        times, _ = race(calls, rounds, clock=time.process_time)
        for name, seconds in medians(times).items():
            counts = torch.stack([calls[name]().bincount(minlength=count)[:50].double() for _ in range(20)])
            share = count * weights[0, :50]
            error = ((counts - share).square().mean(0) / (share * (1 - weights[0, :50]))).mean().item()
            row = {"case": f"resampling of {count}", "who": name, "ms": 1e3 * seconds}
            rows.append(row | {"ratio": ratio(times, name, "kullback"), "error": error})
    return rows


def main():
    rounds = 3 if "--quick" in sys.argv else 9
    rows = overheads(rounds) + resampling(rounds)
    for row in rows:
        if "over" in row:
            held = f"{row['MB']:7.1f} MB" if row["MB"] is not None else ""
            tail = f"{row['ms_a_step']:9.3f} ms a step  {100 * row['over']:+6.1f} %  {held}"
        else:
            tail = f"{row['ms']:9.3f} ms  x {row['ratio']:6.2f}  error {row['error']:.3f}"
        print(f"{row['case']:44} {row['who']:28} {tail}")
    peers = {"particles": importlib.metadata.version("particles"), "torch": torch.__version__}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
