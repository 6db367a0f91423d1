"""What every sampler with `init` and `step` obeys, law by law, and for each law a wrong sampler that it rejects.

A row of the table says how to begin and to go on, and what is known: `value(state, info)` [R, ...] has the mean
`target` after `steps` steps of R independent chains. `streams`: chains with a generator of their own each give the bits
that they give alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kullback.core.checkpoint import load_state, save_state
from kullback.core.types import Kernel
from kullback.models.masked_diffusion import LogLinearSchedule, mdm_exact_distribution
from kullback.models.masked_diffusion_sampling import AncestralSampler
from kullback.optim.chains import base_chain
from kullback.optim.srrw import srrw
from kullback.sample.exact_smoothing import kalman_paths, kalman_smoother
from kullback.sample.fkc import fkc
from kullback.sample.fkc_paths import VE, gaussian_mixture_path
from kullback.sample.fkc_targets import Annealed, GeometricMean, ProductOfExperts, RewardTilted
from kullback.sample.paris import paris
from kullback.sample.ppg import particle_gibbs, ppg
from kullback.sample.state_space import LinearGaussianModel, LinearGaussianProposal


@dataclass(frozen=True)
class Row:
    """begin(kernel, generator, chains) -> state; advance(kernel, state, generator) -> (state, info)."""

    kernel: Kernel
    begin: Callable[[Kernel, Any, int], Any]
    value: Callable[[Any, Any], torch.Tensor]
    target: torch.Tensor
    steps: int
    chains: int
    streams: bool = False
    advance: Callable[[Kernel, Any, Any], tuple[Any, Any]] = lambda kernel, state, generator: kernel.step(
        state, generator=generator
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def advanced(row: Row, state: Any, generator: Any, steps: int) -> tuple[Any, Any]:
    info = None
    for _ in range(steps):
        state, info = row.advance(row.kernel, state, generator)
    return state, info


def leaves(tree: Any) -> list[Any]:
    """Tensors and numbers of a nested state, in order."""
    if isinstance(tree, (tuple, list)):
        return [leaf for entry in tree for leaf in leaves(entry)]
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def same(one: Any, other: Any) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def copied(state: Any) -> Any:
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(copied(entry) for entry in state))
    return state.clone() if isinstance(state, torch.Tensor) else state


def check_same_generator_same_bits(row: Row, folder: Path) -> None:
    before = torch.random.get_rng_state()
    ends = []
    for seed in (1, 1, 2):
        source = seeded(seed)
        ends.append(advanced(row, row.begin(row.kernel, source, 2), source, 2))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def check_a_step_leaves_its_state_alone(row: Row, folder: Path) -> None:
    source = seeded(1)
    state = row.begin(row.kernel, source, 2)
    kept = copied(state)
    row.advance(row.kernel, state, source)
    assert same(state, kept)


def check_resumed_equals_straight(row: Row, folder: Path) -> None:
    source = seeded(1)
    state, _ = advanced(row, row.begin(row.kernel, source, 2), source, 1)
    save_state(folder, "chain", {"state": state, "generator": source.get_state()})
    straight, _ = advanced(row, state, source, 2)
    saved, again = load_state(folder, "chain"), torch.Generator()
    again.set_state(saved["generator"])
    resumed, _ = advanced(row, type(state)(*saved["state"]), again, 2)
    assert same(straight, resumed)


def check_moments_of_the_target(row: Row, folder: Path) -> None:
    source = seeded(5)
    values = row.value(*advanced(row, row.begin(row.kernel, source, row.chains), source, row.steps))
    assert values.shape[0] == row.chains
    error = values.std(0) / row.chains**0.5
    assert bool(((values.mean(0) - row.target).abs() <= 6 * error).all())


def check_chains_are_independent(row: Row, folder: Path) -> None:
    """Batched equals looped, where each chain has its own generator."""
    if not row.streams:
        pytest.skip("chains share a generator")
    streams = [seeded(seed) for seed in (1, 2, 3)]
    batch = advanced(row, row.begin(row.kernel, streams, 3), streams, 2)
    for index, seed in enumerate((1, 2, 3)):
        alone = [seeded(seed)]
        single = advanced(row, row.begin(row.kernel, alone, 1), alone, 2)
        for whole, part in zip(leaves(batch), leaves(single), strict=True):
            if isinstance(whole, torch.Tensor) and whole.ndim:
                torch.testing.assert_close(whole[index], part[0], rtol=1e-12, atol=1e-12)
            else:
                assert whole == part


LAWS = [
    check_same_generator_same_bits, check_a_step_leaves_its_state_alone, check_resumed_equals_straight,
    check_moments_of_the_target, check_chains_are_independent,
]  # fmt: skip


def smoothers() -> dict[str, Row]:
    """Particle smoothers of a linear Gaussian model, whose smoothed product is known."""
    model, source = LinearGaussianModel.scalar(0.9, 0.6, 1.0), seeded(0)
    y = torch.randn(9, 1, generator=source, dtype=torch.float64)
    exact = kalman_smoother(model, y)
    target = (exact.mean[0, :-1] * exact.mean[0, 1:]).sum() + exact.lag_covariance.sum()
    product: Callable[..., torch.Tensor] = lambda x, x_next, y, time: x * x_next  # noqa: E731

    def filtered(num_particles: int = 1500, **options: Any) -> Row:
        return Row(
            paris(model, product, num_particles=num_particles, **options),
            begin=lambda kernel, generator, chains: kernel.init(y[0], generator=generator, chains=chains),
            advance=lambda kernel, state, generator: kernel.step(state, y[state.time + 1], generator=generator),
            value=lambda state, info: state.estimate,
            target=target, steps=8, chains=20, streams=True,
        )  # fmt: skip

    def swept(kernel: Kernel) -> Row:
        def begin(kernel: Kernel, generator: Any, chains: int) -> Any:
            if isinstance(generator, Sequence):
                return kernel.init(generator=generator, chains=chains)
            return kernel.init(kalman_paths(model, y, chains, generator=generator), generator=generator)

        return Row(
            kernel, begin, value=lambda state, info: info.estimate,
            target=target, steps=3, chains=3000, streams=True,
        )  # fmt: skip

    guided = LinearGaussianProposal(model)
    return {
        "PaRIS": filtered(),
        "PaRIS, exact draws": filtered(500, backward="exact"),
        "PaRIS, metropolis draws": filtered(backward="metropolis"),
        "PaRIS, vectorised hybrid draws": filtered(backward="hybrid", compiled=False),
        "PaRIS, guided, systematic, at need": filtered(proposal=guided, resampling="systematic", threshold=0.5),
        "PPG": swept(ppg(model, product, y, num_particles=4)),
        "PPG, exact mean": swept(ppg(model, product, y, num_particles=4, num_backward=None)),
        "PPG, guided": swept(ppg(model, product, y, num_particles=4, proposal=guided)),
        "particle Gibbs": swept(particle_gibbs(model, product, y, num_particles=4)),
        "particle Gibbs, ancestor sampling": swept(
            particle_gibbs(model, product, y, num_particles=4, refresh="ancestor")
        ),
        "particle Gibbs, traced": swept(particle_gibbs(model, product, y, num_particles=4, refresh="traced")),
    }


def walks() -> dict[str, Row]:
    """Self-repellent walks on a ring, where by symmetry the mean history is uniform at any time."""
    nodes = torch.arange(7)
    ring = torch.zeros(7, 7)
    ring[nodes, (nodes + 1) % 7] = 1.0
    chain, target = base_chain(ring + ring.T), torch.full((7,), 1 / 7, dtype=torch.float64)

    def row(alpha: float, a: float, **options: Any) -> Row:
        return Row(
            srrw(chain, alpha, a, **options),
            begin=lambda kernel, generator, chains: kernel.init(runs=chains, generator=generator),
            value=lambda state, info: state.history, target=target, steps=12, chains=2000,
        )  # fmt: skip

    return {
        "base chain": row(0.0, 1.0),
        "self-repellent walk": row(8.0, 0.8),
        "self-repellent walks of two tokens": row(3.0, 0.7, tokens=2),
        "self-repellent walk, weighted, warmed up": row(5.0, 1.0, weight_power=1.0, warm_up=6),
    }


def correctors() -> dict[str, Row]:
    """Feynman-Kac correctors of Gaussians, whose mean under each target is known; a run's end has it."""
    schedule, steps = VE(0.02, 10.0), 60

    def normal(mean: float, variance: float) -> Any:
        return gaussian_mixture_path(torch.tensor([[mean]], dtype=torch.float64), variance, schedule)

    def row(target: Any, mean: float, **options: Any) -> Row:
        kernel = fkc(target, schedule, num_particles=500, num_steps=steps, heun=True, **options)
        return Row(
            kernel,
            begin=lambda kernel, generator, chains: kernel.init(generator=generator, chains=chains),
            value=lambda state, info: state.mean,
            target=torch.tensor([mean], dtype=torch.float64), steps=steps, chains=40, streams=True,
        )  # fmt: skip

    one, two = normal(-1.0, 1.0), normal(1.0, 0.5)
    return {
        "FKC, annealed": row(Annealed(two, 2.0), 1.0),
        "FKC, product": row(ProductOfExperts((one, two)), 1 / 3),
        "FKC, guidance, resampled at need": row(GeometricMean(one, two, 1.5), 1.4, ess_threshold=0.5),
        "FKC, reward, births and deaths": row(RewardTilted(two, lambda x, t: x[:, 0], 1), 1.5, resample="birth_death"),
    }


def diffusions() -> dict[str, Row]:
    """Ancestral sampling of 4 symbols from a denoiser that is a table, whose law at 3 steps is enumerated."""
    table = torch.randn(4, 4, 4, 4, 4, 3, generator=seeded(0), dtype=torch.float64)
    linear = LogLinearSchedule(0.0)
    law = mdm_exact_distribution(lambda z, t: table[tuple(z.T)], 3, 4, 3, schedule=linear)
    others = [tuple(place for place in range(4) if place != one) for one in range(4)]
    target = torch.stack([law.sum(other) @ torch.arange(3.0, dtype=torch.float64) for other in others])

    def row(**options: Any) -> Row:
        sampler = AncestralSampler(lambda z, t: table[tuple(z.T)], steps=3, mask_id=3, schedule=linear, **options)
        return Row(
            sampler, begin=lambda kernel, generator, chains: kernel.init(chains, 4),
            value=lambda state, info: state.z.double(), target=target, steps=3, chains=3000,
        )  # fmt: skip

    return {"masked diffusion": row(), "masked diffusion, no cache": row(cache=False)}


TABLE: dict[str, Row] = {**smoothers(), **diffusions(), **correctors(), **walks()}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_every_kernel_obeys(name, law, tmp_path):
    law(TABLE[name], tmp_path)


def wrong(change: Callable[[Any, Any, torch.Generator], tuple[Any, Any]]) -> Row:
    """PPG with something done to what each step returns."""
    row = TABLE["PPG"]

    def advance(kernel: Kernel, state: Any, generator: Any) -> tuple[Any, Any]:
        after, info = kernel.step(state, generator=generator)
        return change(state, after, generator), info

    return replace(row, advance=advance)


def with_global_noise(state, after, generator):
    return after._replace(path=after.path + torch.randn(after.path.shape, dtype=torch.float64))


def in_place(state, after, generator):
    state.path.copy_(after.path)
    return after


class Forgetful:
    """A sampler with a memory that its state does not hold."""

    def __init__(self) -> None:
        self.sweeps = 0

    def __call__(self, state, after, generator):
        self.sweeps += 1
        return after._replace(path=after.path + 0.1 * self.sweeps)


def shrunk(state, after, generator):
    return after._replace(path=0.7 * after.path)


def mixed_over_chains(state, after, generator):
    return after._replace(path=0.5 * (after.path + after.path.mean(0)))


BITES = {
    check_same_generator_same_bits: with_global_noise,
    check_a_step_leaves_its_state_alone: in_place,
    check_resumed_equals_straight: Forgetful(),
    check_moments_of_the_target: shrunk,
    check_chains_are_independent: mixed_over_chains,
}


@pytest.mark.parametrize("law", LAWS)
def test_every_law_rejects_a_wrong_kernel(law, tmp_path):
    with pytest.raises(AssertionError):
        law(wrong(BITES[law]), tmp_path)
