"""Feynman-Kac correctors: what weights and resampling add to bare sampling, and resampling beside a peer.

Guidance of weight 2, systematic resampling at every step. "bare" is the loop that one writes by hand in plain torch:
mixed score, drift, noise, no weight, no check. A toy network (2 dimensions), a small one (64), and a convolutional
network on images (3 x 32 x 32), in single precision on one thread. Times are medians of processor seconds in turn,
"over" is ours over bare, less one, median over rounds, of which 0.15 was asked at most of the toy network and 0.03 of
the real ones; "MB" is the peak beyond what the process held before. Resampling beside the package `particles` (numba)
and torch.multinomial; "error" is the variance of the counts of an ancestor, relative to multinomial draws.

Quality: the 40 modes of the reproduction at inverse temperature 2, 2000 particles, single precision. Mixed scores,
corrected ones, and tempered sequential Monte Carlo on the final density from a Gaussian of its mean and covariance,
which anneals its logarithm in steps with one Langevin move (Metropolis adjusted) each and resamples, as one does who
has the density and no diffusion. "tv" is the distance of mode occupancies, "w2" that of 1000 particles to exact
samples, means of four runs; "evaluations" of the score a particle, and "s" seconds a run. Writes fkc.json.
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
from kullback.papers.fkc import reproduce as study
from kullback.sample.denoisers import Denoiser, network_score
from kullback.sample.fkc import fkc, systematic_resample
from kullback.sample.fkc_paths import VE, DiffusionPath, gaussian_mixture_path, steps_of
from kullback.sample.fkc_targets import Annealed, GeometricMean
from kullback.sample.sample_distances import wasserstein_distance

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


def tempered(path, level, count, steps, source):
    """Sequential Monte Carlo from a Gaussian to q^2 along powers of both; Langevin moves of half the modes' width."""
    width, h = study.DEVIATION / math.sqrt(2.0), 0.25
    spread = path.variance.sqrt()
    x = path.mean + spread * torch.randn(count, 2, generator=source)

    def both(x, share):
        wide = -0.5 * ((x - path.mean) / spread).square().sum(1)
        density = 2.0 * path.log_density(x, level)
        slope = share * 2.0 * path.score(x, level) - (1 - share) * (x - path.mean) / spread.square()
        return density, wide, slope

    shares = [((step + 1) / steps) ** 2 for step in range(steps)]  # more of them where the density is far from wide
    before = 0.0
    for share in shares:
        density, wide, _ = both(x, share)
        weights = (share - before) * (density - wide)
        x = x[systematic_resample(weights.unsqueeze(0), generator=source)[0]]
        size, before = h * width**2 / share, share
        density, wide, slope = both(x, share)
        y = x + size * slope + math.sqrt(2 * size) * torch.randn(x.shape, generator=source)
        after, broad, back = both(y, share)
        change = share * (after - density) + (1 - share) * (broad - wide)
        there = (y - x - size * slope).square().sum(1) - (x - y - size * back).square().sum(1)
        accept = torch.rand(count, generator=source).log() < change + there / (4 * size)
        x = torch.where(accept.unsqueeze(1), y, x)
    return x


def quality(runs=4, count=2000):
    means, log_weights = study.forty_modes(0)
    path = gaussian_mixture_path(means, study.DEVIATION**2, study.SCHEDULE, log_weights=log_weights)
    last = torch.tensor(study.SCHEDULE.sigma_min)
    law = lambda x: 2.0 * path.log_density(x, last)  # noqa: E731
    shares, exact = study.cell_shares(law, means, 48.0, 500), study.exact_samples(law, 0, 1000, "benchmark")

    def diffused(steps, resample):
        return lambda source: study.sampled(
            Annealed(path, 2.0), study.SCHEDULE, (count, 1, resample), steps, source
        ).samples[0]

    calls = {}
    for steps in (100, 300):
        calls[f"mixed scores, {steps} steps"] = (steps, diffused(steps, "none"))
        calls[f"kullback, {steps} steps"] = (steps, diffused(steps, "systematic"))
        calls[f"tempered density, {steps // 3} powers"] = (
            steps, lambda source, steps=steps: tempered(path, last, count, steps // 3, source)
        )  # fmt: skip
    calls["exact samples"] = (0, lambda source: study.exact_samples(law, 0, count, str(source.initial_seed())))
    rows = []
    for who, (evaluations, call) in calls.items():
        begin, clouds = time.process_time(), [call(seeded(run)) for run in range(runs)]
        seconds = (time.process_time() - begin) / runs
        even = torch.zeros(1, count)
        tv = sum(study.distances(x.unsqueeze(0), even, means, shares).item() for x in clouds) / runs
        picked = torch.randperm(count, generator=seeded(9))[:1000]
        w2 = sum(wasserstein_distance(x[picked], exact) for x in clouds) / runs
        row = {"case": f"40 modes, {count} particles", "who": who, "evaluations": evaluations}
        rows.append(row | {"tv": round(tv, 4), "w2": round(w2, 3), "s": round(seconds, 3)})
    return rows


def main():
    rounds = 3 if "--quick" in sys.argv else 7
    rows = overheads(rounds) + resampling(rounds) + quality()
    for row in rows:
        if "over" in row:
            held = f"{row['MB']:7.1f} MB" if row["MB"] is not None else ""
            tail = f"{row['ms_a_step']:9.3f} ms a step  {100 * row['over']:+6.1f} %  {held}"
        elif "tv" in row:
            tail = f"{row['evaluations']:4} scores  tv {row['tv']:.3f}  w2 {row['w2']:6.2f}  {row['s']:.2f} s"
        else:
            tail = f"{row['ms']:9.3f} ms  x {row['ratio']:6.2f}  error {row['error']:.3f}"
        print(f"{row['case']:44} {row['who']:28} {tail}")
    peers = {"particles": importlib.metadata.version("particles"), "torch": torch.__version__}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
