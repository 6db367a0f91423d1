"""Samplers and estimators by sampling: kernels as `init` and `step`, batched, with their generator passed in."""

from kullback.sample.backward import backward_mean, backward_sample
from kullback.sample.exact_smoothing import hmm_paths, hmm_smoother, kalman_paths, kalman_smoother
from kullback.sample.paris import ParisInfo, ParisState, paris
from kullback.sample.ppg import PPGInfo, PPGState, particle_gibbs, path_statistic, ppg, ppg_rollout
from kullback.sample.qmc import (
    DigitalNet,
    DigitalNetB2,
    FastGP,
    FastGram,
    Faure,
    Halton,
    KernelDSI,
    KernelSI,
    Lattice,
    PointSet,
    Sobol,
    integrate,
)
from kullback.sample.score_ascent import score_ascent, score_statistic, stochastic_em
from kullback.sample.state_space import (
    AdditiveStatistic,
    BootstrapModel,
    FiniteModel,
    LinearGaussianModel,
    LinearGaussianProposal,
    StateSpaceModel,
)

__all__ = [
    "AdditiveStatistic",
    "BootstrapModel",
    "DigitalNet",
    "DigitalNetB2",
    "FastGP",
    "FastGram",
    "Faure",
    "FiniteModel",
    "Halton",
    "KernelDSI",
    "KernelSI",
    "Lattice",
    "LinearGaussianModel",
    "LinearGaussianProposal",
    "PPGInfo",
    "PPGState",
    "ParisInfo",
    "ParisState",
    "PointSet",
    "Sobol",
    "StateSpaceModel",
    "backward_mean",
    "backward_sample",
    "hmm_paths",
    "hmm_smoother",
    "integrate",
    "kalman_paths",
    "kalman_smoother",
    "paris",
    "particle_gibbs",
    "path_statistic",
    "ppg",
    "ppg_rollout",
    "score_ascent",
    "score_statistic",
    "stochastic_em",
]
