"""Feynman-Kac correctors (arXiv 2503.02819) in small: annealing of 40 modes, Gaussians in closed form, trained scores.

Annealing: a mixture of 40 modes for each seed, with exact scores, at inverse temperature 2; the total variation between
the share of particles nearest to each mode and its share of q^2, integrated on a grid; and, of 1000 particles each, the
exact 2-Wasserstein distance to exact samples, that of their log-densities and the kernel distance. Closed forms: a
product and a guided pair. Trained: two denoisers, fitted to samples, annealed and multiplied, held against the laws of
their data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.sample.denoisers import Denoiser, network_score, train_denoiser
from kullback.sample.fkc import FKCResult, fkc_sampler
from kullback.sample.fkc_paths import VE, DiffusionPath, gaussian_mixture_path
from kullback.sample.fkc_targets import Annealed, GeometricMean, ProductOfExperts, Target
from kullback.sample.sample_distances import kernel_distance, wasserstein_distance

__all__ = ["draw", "reproduce"]

BETA, STEPS, DEVIATION, COMPARED = 2.0, 300, 1.3133, 1000
SCHEDULE = VE(0.01, 80.0)
# name -> particles, swarms, a, how particles are chosen
SETTINGS: Mapping[str, tuple[int, int, float, str]] = {
    "mixing, 2000": (2000, 2, 0.0, "none"),
    "corrected, 500": (500, 8, 0.0, "systematic"),
    "corrected, 2000": (2000, 8, 0.0, "systematic"),
    "corrected, 10000": (10_000, 2, 0.0, "systematic"),
    "tempered mixing, 2000": (2000, 2, 0.5, "none"),
    "tempered noise, 2000": (2000, 2, 0.5, "systematic"),
    "births and deaths, 2000": (2000, 2, 0.0, "birth_death"),
}
# Two models to be trained, along a path of their own: a ring of narrow and wide modes, and a broad Gaussian.
SMALL = VE(0.05, 20.0)
RING, NARROW, WIDE, BROAD, CENTRE = 6, 0.45, 1.0, 2.0, (2.0, 1.0)
SAMPLES, TRAINING, TRAINED_STEPS = 20_000, 1200, 120


def forty_modes(seed: int) -> tuple[Tensor, Tensor]:
    """Means uniform in [-40, 40]^2 [40, 2] and log-weights [40]."""
    source = generator(seed, "mixture")
    means = 80.0 * torch.rand(40, 2, generator=source) - 40.0
    return means, torch.randn(40, generator=source).log_softmax(0)


def cell_shares(log_density: Callable[[Tensor], Tensor], means: Tensor, reach: float, side: int) -> Tensor:
    """The share of exp(log_density) nearest to each mean [M], on a grid over [-reach, reach]^2."""
    line = (torch.arange(side, dtype=means.dtype) + 0.5) * (2.0 * reach / side) - reach
    total = torch.full((len(means),), -math.inf)
    for row in line.split(max(1, 60_000 // side)):
        x = torch.cartesian_prod(row, line)
        log_p, cell = log_density(x), torch.cdist(x, means).argmin(1)
        top = log_p.max()
        mass = torch.zeros(len(means)).scatter_add_(0, cell, (log_p - top).exp())
        total = torch.logaddexp(total, mass.log() + top)
    return total.softmax(0)


def distances(samples: Tensor, log_weights: Tensor, means: Tensor, shares: Tensor) -> Tensor:
    """Total variation between occupancies of the means' cells and their shares, a number a swarm [R]."""
    cell = torch.cdist(samples, means).argmin(-1)
    occupied = torch.zeros(len(samples), len(means)).scatter_add_(1, cell, log_weights.softmax(1))
    return 0.5 * (occupied - shares).abs().sum(1)


def exact_samples(log_density: Callable[[Tensor], Tensor], seed: int, count: int, name: str) -> Tensor:
    """Samples [count, 2] of q^2: of narrow modes with squared weights, drawn again by what that leaves out."""
    means, log_weights = forty_modes(seed)
    source = generator(seed, "exact", name)
    chosen = torch.multinomial((BETA * log_weights).softmax(0), 40 * count, replacement=True, generator=source)
    width = 1.05 * DEVIATION / math.sqrt(BETA)  # wider, so that no weight is large
    drawn = means[chosen] + width * torch.randn(len(chosen), 2, generator=source)
    proposal = gaussian_mixture_path(means, width**2, VE(1e-6, 1.0), log_weights=BETA * log_weights)
    log_ratio = log_density(drawn) - proposal.log_density(drawn, torch.tensor(1e-6))  # type: ignore[misc]
    kept = torch.multinomial(log_ratio.softmax(0), count, replacement=False, generator=source)
    return drawn[kept]


def sample_distances(x: Tensor, y: Tensor, log_density: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Of two samples [n, 2] of equal size."""
    energies = [log_density(sample).unsqueeze(1) for sample in (x, y)]
    return {
        "wasserstein": wasserstein_distance(x, y), "energy": wasserstein_distance(*energies),
        "kernel": kernel_distance(x, y),
    }  # fmt: skip


def sampled(target: Target, schedule: VE, setting: tuple[int, int, str], steps: int, source: Any) -> FKCResult:
    """A run in single precision; mixing alone has no weights at all."""
    particles, swarms, resample = setting
    result = fkc_sampler(
        target, schedule, particles, steps, num_swarms=swarms, generator=source, dtype=torch.float32,
        resample=resample,  # type: ignore[arg-type]
    )  # fmt: skip
    return result._replace(log_weights=torch.zeros_like(result.log_weights)) if resample == "none" else result


def annealing(run: Run) -> list[dict[str, Any]]:
    """One row a setting: the distance of mode occupancies, its spread over swarms, and that of exact samples."""
    means, log_weights = forty_modes(run.seed)
    path = gaussian_mixture_path(means, DEVIATION**2, SCHEDULE, log_weights=log_weights)
    last = torch.tensor(SCHEDULE.sigma_min)
    law = lambda x: BETA * path.log_density(x, last)  # type: ignore[misc]  # noqa: E731
    shares = cell_shares(law, means, 48.0, 500)
    exact_ones, others = (exact_samples(law, run.seed, COMPARED, name) for name in ("one", "other"))
    floors = {f"{name}_floor": value for name, value in sample_distances(exact_ones, others, law).items()}
    rows = []
    for name, (particles, swarms, a, resample) in SETTINGS.items():
        source = generator(run.seed, "annealing", name)
        result = sampled(Annealed(path, BETA, a), SCHEDULE, (particles, swarms, resample), STEPS, source)
        found = distances(result.samples, result.log_weights, means, shares)
        drawn = torch.multinomial(shares.expand(swarms, -1), particles, replacement=True, generator=source)
        exact = torch.zeros(swarms, 40).scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / particles))
        floor = 0.5 * (exact - shares).abs().sum(1).mean().item()
        row = {"study": "annealing", "setting": name, "particles": particles, "distance": found.mean().item()}
        low, high = found.min().item(), found.max().item()
        if particles >= COMPARED:
            picked = result.resampled(generator=source)[:2, torch.randperm(particles, generator=source)[:COMPARED]]
            each = [sample_distances(cloud, exact_ones, law) for cloud in picked]
            row |= {key: sum(one[key] for one in each) / len(each) for key in each[0]} | floors
        rows.append({**row, "low": low, "high": high, "floor": floor} | _cloud(run, name, result))
        run.event("annealing", setting=name, distance=row["distance"], floor=floor)
    return rows


def _cloud(run: Run, name: str, result: FKCResult) -> dict[str, Any]:
    """A few particles of the first seed, for the figure."""
    if run.seed or name not in ("mixing, 2000", "corrected, 2000"):
        return {}
    chosen = result.resampled(generator=generator(0, "cloud", name))[0]
    chosen = chosen[torch.randperm(len(chosen), generator=generator(1, "cloud", name))[:400]]
    return {"x": [round(v, 2) for v in chosen[:, 0].tolist()], "y": [round(v, 2) for v in chosen[:, 1].tolist()]}


def closed_forms(run: Run) -> list[dict[str, Any]]:
    """Means and variances of N(-1, 1) N(2, 1/4) and of guidance of weight 2 from N(0, 1) to N(1, 1/2)."""
    schedule = VE(0.01, 10.0)

    def normal(mean: float, variance: float) -> DiffusionPath:
        return gaussian_mixture_path(torch.tensor([[mean]], dtype=torch.float64), variance, schedule)

    cases: dict[str, tuple[Target, float, float]] = {
        "product": (ProductOfExperts((normal(-1.0, 1.0), normal(2.0, 0.25))), 1.4, 0.2),
        "guidance": (GeometricMean(normal(0.0, 1.0), normal(1.0, 0.5), 2.0), 4.0 / 3.0, 1.0 / 3.0),
    }
    rows = []
    for name, (target, mean, variance) in cases.items():
        for resample in ("none", "systematic"):
            source = generator(run.seed, name, resample)
            result = fkc_sampler(
                target, schedule, 10_000, 200, num_swarms=2, generator=source, heun=True,
                resample=resample,  # type: ignore[arg-type]
            )  # fmt: skip
            x = result.samples
            row = {"study": name, "setting": resample, "mean": x.mean().item(), "variance": x.var().item()}
            rows.append({**row, "exact_mean": mean, "exact_variance": variance, "log_z": result.log_z.mean().item()})
            run.event(name, **row)
    return rows


def ring() -> tuple[Tensor, Tensor]:
    """Means [6, 2] on a circle and standard deviations [6], in turn narrow and wide."""
    place = torch.arange(RING)
    angle = 2.0 * math.pi * place / RING
    return 4.0 * torch.stack([angle.cos(), angle.sin()], 1), torch.where(place % 2 == 0, NARROW, WIDE)


def fitted(data: Tensor, steps: int, seed: int, name: str) -> DiffusionPath:
    """A denoiser trained on data [n, 2], as a path; of its density nothing is known."""
    network = Denoiser(2, spread=data.std().item(), generator=generator(seed, name, "weights"), width=64)
    source = generator(seed, name, "training")
    train_denoiser(network, data, steps=steps, learning_rate=3e-3, generator=source)
    return DiffusionPath(network_score(network, SMALL), (2,), None, data.mean(0), data.var(0))


def trained(run: Run) -> list[dict[str, Any]]:
    """Annealing and a product of two trained models, by occupancy of the ring's modes under the laws of their data."""
    means, deviations = ring()
    source, centre, last = generator(run.seed, "data"), torch.tensor(CENTRE), torch.tensor(SMALL.sigma_min)
    mode = torch.randint(RING, (SAMPLES,), generator=source)
    on_ring = means[mode] + deviations[mode].unsqueeze(1) * torch.randn(SAMPLES, 2, generator=source)
    broad = centre + BROAD * torch.randn(SAMPLES, 2, generator=source)
    first, second = fitted(on_ring, TRAINING, run.seed, "ring"), fitted(broad, TRAINING // 4, run.seed, "broad")
    laws = {
        "annealed": lambda x: BETA * log_ring(x, last),
        "multiplied": lambda x: log_ring(x, last) + log_broad(x, last),
    }
    log_ring: Any = gaussian_mixture_path(means, deviations**2, SMALL).log_density
    log_broad: Any = gaussian_mixture_path(centre.unsqueeze(0), BROAD**2, SMALL).log_density
    targets: dict[str, Target] = {"annealed": Annealed(first, BETA), "multiplied": ProductOfExperts((first, second))}
    rows = []
    for name, target in targets.items():
        shares = cell_shares(laws[name], means, 12.0, 300)
        for resample in ("none", "systematic"):
            where = generator(run.seed, "trained", name, resample)
            result = sampled(target, SMALL, (2000, 4, resample), TRAINED_STEPS, where)
            distance = distances(result.samples, result.log_weights, means, shares).mean().item()
            row = {"study": f"trained, {name}", "setting": resample, "distance": distance}
            rows.append(row | _cloud(run, "mixing, 2000" if resample == "none" else "corrected, 2000", result))
            run.event("trained", target=name, resample=resample, distance=distance)
    return rows


def reproduce(run: Run) -> Report:
    """One seed: seven ways to anneal 40 modes, two closed forms, two targets of trained models."""
    anneal, closed, learned = annealing(run), closed_forms(run), trained(run)
    distance = {row["setting"]: row["distance"] for row in anneal}
    mixed, right = ({row["setting"]: row for row in anneal}[name] for name in ("mixing, 2000", "corrected, 2000"))
    corrected = {row["study"]: row for row in closed if row["setting"] == "systematic"}
    pairs = {(row["study"], row["setting"]): row["distance"] for row in learned}
    metrics = {
        "occupancy_distance_reduction": 1.0 - distance["corrected, 2000"] / distance["mixing, 2000"],
        "occupancy_distance_by_particles": distance["corrected, 10000"] / distance["corrected, 2000"],
        "wasserstein_ratio": right["wasserstein"] / mixed["wasserstein"],
        "energy_wasserstein_ratio": right["energy"] / mixed["energy"],
        "kernel_distance_ratio": right["kernel"] / mixed["kernel"],
        "wasserstein": right["wasserstein"],
        "wasserstein_floor": right["wasserstein_floor"],
        "product_mean_error": abs(corrected["product"]["mean"] - 1.4),
        "guidance_mean_error": abs(corrected["guidance"]["mean"] - 4.0 / 3.0),
        "trained_distance_ratio": max(
            pairs[study, "systematic"] / pairs[study, "none"] for study in ("trained, annealed", "trained, multiplied")
        ),
    }
    return Report(metrics=metrics, rows=anneal + closed + learned)


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], log_density: Callable[[Tensor], Tensor], reach: float) -> None:
    """A density, its logarithm in grey, below the particles of one row."""
    line = torch.linspace(-reach, reach, 161)
    values = log_density(torch.cartesian_prod(line, line)).view(161, 161).T
    grey = (values - values.max()).clamp(min=-7.0)
    extent = (-reach, reach, -reach, reach)
    axes.imshow(grey.tolist(), extent=extent, origin="lower", cmap="Greys", vmin=-7.0, vmax=4.0)
    axes.spines[:].set_visible(False)
    row = next(row for row in rows if "x" in row)
    axes.plot(row["x"], row["y"], ".", markersize=2.2, color="C3", alpha=0.7)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Densities and particles under annealing and under a product, by mixing and corrected; distances by particles."""
    from kullback.figures import figure

    means, log_weights = forty_modes(0)
    forty: Any = gaussian_mixture_path(means, DEVIATION**2, SCHEDULE, log_weights=log_weights).log_density
    places, deviations = ring()
    one: Any = gaussian_mixture_path(places, deviations**2, SMALL).log_density
    two: Any = gaussian_mixture_path(torch.tensor([CENTRE]), BROAD**2, SMALL).log_density
    low, last = torch.tensor(SCHEDULE.sigma_min), torch.tensor(SMALL.sigma_min)
    panels = [
        ("annealing", "mixing, 2000", "40 modes annealed: mixed scores", lambda x: BETA * forty(x, low), 46.0),
        ("annealing", "corrected, 2000", "40 modes annealed: corrected", lambda x: BETA * forty(x, low), 46.0),
        ("trained, multiplied", "none", "trained product: mixed", lambda x: one(x, last) + two(x, last), 7.0),
        ("trained, multiplied", "systematic", "trained product: corrected", lambda x: one(x, last) + two(x, last), 7.0),
    ]
    with figure(path, columns=5, size=(3.0, 3.1)) as axes:
        for place, (study, setting, title, log_density, reach) in zip(axes, panels, strict=False):
            chosen = [row for row in rows if row["study"] == study and row["setting"] == setting]
            _panel(place, chosen, log_density, reach)
            place.set_title(title, fontsize=9)
        _distances(axes[-1], [row for row in rows if row["study"] == "annealing"])


def _distances(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean distances over seeds by the number of particles, with the range of single runs and the sampling floor."""
    for index, family in enumerate(("mixing", "corrected", "tempered noise", "births and deaths")):
        settings = sorted({(row["particles"], row["setting"]) for row in rows if row["setting"].startswith(family)})
        chosen = [[row for row in rows if row["setting"] == setting] for _, setting in settings]
        counts = [count * 1.08 ** (index - 1) for count, _ in settings]
        middle = [sum(row["distance"] for row in group) / len(group) for group in chosen]
        below = [value - min(row["low"] for row in group) for value, group in zip(middle, chosen, strict=True)]
        above = [max(row["high"] for row in group) - value for value, group in zip(middle, chosen, strict=True)]
        style = {"fmt": "o-", "color": f"C{index}", "markersize": 4, "capsize": 2}
        axes.errorbar(counts, middle, [below, above], label=family, **style)
    corrected = sorted({(row["particles"], row["floor"]) for row in rows if row["setting"].startswith("corrected")})
    floors: dict[int, list[float]] = {}
    for count, floor in corrected:
        floors.setdefault(count, []).append(floor)
    means = [sum(values) / len(values) for values in floors.values()]
    axes.plot(list(floors), means, ":", color="0.5", label="exact samples")
    axes.set_xscale("log")
    axes.set(xlabel="particles", ylim=(0.0, None))
    axes.set_title("total variation of modes", fontsize=9)
    axes.legend(frameon=False, fontsize=6.5)
