"""Optimisers and distributed optimisation."""

from kullback.optim.chains import Chain, base_chain, independent_chain
from kullback.optim.srrw import SRRW, WalkState, srrw, srrw_kernel, start_walk, stationary_of, walk
from kullback.optim.srrw_simulation import GeneralizedLinear, MeanOf, Simulation, follow, simulate
from kullback.optim.srrw_theory import optimization_covariance, sampling_covariance
from kullback.optim.token_actors import walk_actors
from kullback.optim.token_optimizer import SASRRW, TokenSampler
from kullback.optim.token_processes import walk_tokens
from kullback.optim.token_walk import TokenResult
from kullback.optim.visit_orders import non_backtracking, shuffled_visits

__all__ = [
    "SASRRW",
    "SRRW",
    "Chain",
    "GeneralizedLinear",
    "MeanOf",
    "Simulation",
    "TokenResult",
    "TokenSampler",
    "WalkState",
    "base_chain",
    "follow",
    "independent_chain",
    "non_backtracking",
    "optimization_covariance",
    "sampling_covariance",
    "shuffled_visits",
    "simulate",
    "srrw",
    "srrw_kernel",
    "start_walk",
    "stationary_of",
    "walk",
    "walk_actors",
    "walk_tokens",
]
