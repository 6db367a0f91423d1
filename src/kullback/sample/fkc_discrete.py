"""Products and annealing of discrete samplers, such as masked language models, with exact weights: a kernel like `fkc`.

Every expert i is a reverse kernel that fills some places of a sequence at each step, each place independently given the
sequence so far: q_i(x'|x) = prod_s q_i(x'_s|x). With powers b_i the particles move by the normalised product and weigh
what normalising takes away,

    x' ~ prod_i q_i(x'|x)^b_i / Z(x),    log w <- log w + log Z(x),   Z(x) = prod_s sum_v prod_i q_i(v|x)^b_i.

The target is the product of the experts' laws of whole paths, given the order in which places are filled. This is the
product of their marginals only where one place is filled at a time and each expert is the same law in every order; so
it is another target than that of fkc_targets.py, and an extension of ours that arXiv 2503.02819 does not have.

Shapes: R swarms, K particles, T places, V tokens: tokens [R, K, T], log-weights [R, K]; experts see [N, T].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.types import Kernel
from kullback.sample.draws import Generators, draw_index, uniform
from kullback.sample.fkc import log_normalizer, systematic_resample

__all__ = ["DiscreteFKCInfo", "DiscreteFKCState", "discrete_fkc"]

Expert = Callable[[Tensor], Tensor]


class DiscreteFKCState(NamedTuple):
    """After `step` steps: tokens [R, K, T], log_weights [R, K] of mean weight 1, log_z [R], origins [R, K]."""

    step: int
    tokens: Tensor
    log_weights: Tensor
    log_z: Tensor
    origins: Tensor


class DiscreteFKCInfo(NamedTuple):
    """Of one step: effective sample size before resampling and growth of log Z, [R] each; parents [R, K]."""

    effective: Tensor
    log_increment: Tensor
    parents: Tensor


def discrete_fkc(
    experts: Sequence[Expert],
    order: Sequence[Sequence[int]],
    *,
    mask: int,
    num_particles: int,
    powers: float | Sequence[float] = 1.0,
    ess_threshold: float | None = None,
) -> Kernel:
    """`init(*, generator, chains=1)` from sequences of the mask alone, then a `step` for each group of places in order.

    experts: from tokens [N, T], partly `mask`, to log-probabilities [N, T, V]. order: the places filled at each step,
    together all of 0..T-1. powers: one for all or one each; a single expert with power beta is annealed. ess_threshold:
    resample a swarm below that share of K; None always. Raises ConfigError for options out of range, ShapeError or
    DataError for what an expert gives.
    """
    chosen = [float(powers)] * len(experts) if isinstance(powers, (int, float)) else list(powers)
    places = sorted(place for group in order for place in group)
    if not experts or len(chosen) != len(experts) or not all(math.isfinite(power) for power in chosen):
        raise ConfigError(f"a product takes experts with a finite power each, got {len(experts)} and {chosen}")
    if not places or places != list(range(len(places))) or not all(order):
        raise ConfigError("order fills each place from 0 on once, some places at each step")
    if num_particles < 2 or (ess_threshold is not None and not 0.0 < ess_threshold <= 1.0):
        raise ConfigError(f"two particles or more and a threshold in (0, 1], got {num_particles} and {ess_threshold}")

    def init(*, generator: Generators, chains: int = 1) -> DiscreteFKCState:
        first = generator if isinstance(generator, torch.Generator) else generator[0]
        shape, device = (chains, num_particles), first.device
        weights = torch.zeros(shape, dtype=torch.float64, device=device)
        tokens = torch.full((*shape, len(places)), mask, device=device)
        origins = torch.arange(num_particles, device=device).repeat(chains, 1)
        return DiscreteFKCState(0, tokens, weights, weights.new_zeros(chains), origins)

    def step(state: DiscreteFKCState, *, generator: Generators) -> tuple[DiscreteFKCState, DiscreteFKCInfo]:
        if state.step >= len(order):
            raise ConfigError(f"all {len(order)} steps are done: begin again with init")
        group = torch.tensor(list(order[state.step]), device=state.tokens.device)
        logits = _mixed(experts, chosen, state.tokens, group)
        log_totals = logits.logsumexp(-1)
        numbers = uniform(logits.shape[:-1], generator).unsqueeze(-1)
        filled = state.tokens.clone()
        filled[..., group] = draw_index(logits, numbers).squeeze(-1)
        weights = state.log_weights + log_totals.sum(-1)
        grown = log_normalizer(weights)
        if not bool(grown.isfinite().all()):
            raise DataError("no particle has a token that all experts allow: take other powers or more particles")
        weights = weights - grown.unsqueeze(1)
        effective = num_particles**2 / (2.0 * weights).exp().sum(1)
        parents = systematic_resample(weights, generator=generator)
        renew = torch.ones_like(effective, dtype=torch.bool)
        if ess_threshold is not None:
            renew = effective < ess_threshold * num_particles
        parents = torch.where(renew.unsqueeze(1), parents, torch.arange(num_particles, device=parents.device))
        following = DiscreteFKCState(
            state.step + 1, filled.gather(1, parents.unsqueeze(-1).expand_as(filled)),
            weights.masked_fill(renew.unsqueeze(1), 0.0), state.log_z + grown, state.origins.gather(1, parents),
        )  # fmt: skip
        return following, DiscreteFKCInfo(effective, grown, parents)

    return Kernel(init, step)


def _mixed(experts: Sequence[Expert], powers: Sequence[float], tokens: Tensor, group: Tensor) -> Tensor:
    """sum_i b_i log q_i at the places of a group, [R, K, S, V]."""
    flat, total = tokens.flatten(0, 1), None
    for expert, power in zip(experts, powers, strict=True):
        with torch.no_grad():
            log_probs = expert(flat)
        if log_probs.ndim != 3 or log_probs.shape[:2] != flat.shape:
            raise ShapeError(f"an expert gives [N, T, V] for tokens {tuple(flat.shape)}, not {tuple(log_probs.shape)}")
        part = log_probs[:, group].double()
        if bool(part.isnan().any()) or bool((part > 1e-6).any()):
            raise DataError("an expert's log-probabilities are NaN or above 0: take log_softmax of its logits")
        # A token of no probability stays out whatever its power, 0 aside.
        part = torch.where(part == -math.inf, -math.inf if power else 0.0, power * part)
        total = part if total is None else total + part
    if total is None:
        raise ConfigError("a product takes at least one expert")
    return total.view(*tokens.shape[:2], *total.shape[1:])
