"""Bandits: policies that learn which of several actions pays from the rewards of those taken, and how to judge them.

A policy is `pull(context, *, generator) -> arm` and `update(arm, reward, context)`; learners with full feedback have
`observe(costs)` in place of update. The files follow the chapters of Slivkins' book (arXiv 1904.07272).
"""

from kullback.stream.bandits.adversarial import Exp3, Exp3IX, Exp3P, Exp3S, Exp4, TsallisINF
from kullback.stream.bandits.bayesian import (
    BayesUCB,
    ThompsonBeta,
    ThompsonFinite,
    ThompsonGaussian,
    bayes_optimal_arm,
    bayes_optimal_value,
)
from kullback.stream.bandits.combinatorial import FPL, SemiBanditHedge
from kullback.stream.bandits.contextual import LinTS, LinUCB, PerContext, mesh_cell
from kullback.stream.bandits.experts import Halving, Hedge, WeightedMajority
from kullback.stream.bandits.games import coarse_correlated_gap, play_general, play_zero_sum
from kullback.stream.bandits.incentives import (
    BetaPrior,
    FinitePrior,
    HiddenExploration,
    RepeatedHE,
    is_bic,
    max_bic_epsilon,
    posterior_gap,
)
from kullback.stream.bandits.knapsacks import LagrangeBwK, PrimalDualBwK, UcbBwK, bwk_lp, play_knapsack
from kullback.stream.bandits.lipschitz import UniformDiscretization, Zooming
from kullback.stream.bandits.lower_bounds import (
    bernoulli_kl,
    lai_robbins_constant,
    min_samples_two_coins,
    worst_case_instance,
)
from kullback.stream.bandits.off_policy import (
    DecisionService,
    Log,
    OffPolicyEstimator,
    OracleEpsilonGreedy,
    OracleExploreFirst,
)
from kullback.stream.bandits.simulate import Bernoulli, Gaussian, RegretResult, RewardTable
from kullback.stream.bandits.stochastic import (
    KLUCB,
    UCB1,
    UCBV,
    Doubling,
    EpsilonGreedy,
    ExploreFirst,
    IndexPolicy,
    SuccessiveElimination,
)

__all__ = [
    "FPL",
    "KLUCB",
    "UCB1",
    "UCBV",
    "BayesUCB",
    "Bernoulli",
    "BetaPrior",
    "DecisionService",
    "Doubling",
    "EpsilonGreedy",
    "Exp3",
    "Exp3IX",
    "Exp3P",
    "Exp3S",
    "Exp4",
    "ExploreFirst",
    "FinitePrior",
    "Gaussian",
    "Halving",
    "Hedge",
    "HiddenExploration",
    "IndexPolicy",
    "LagrangeBwK",
    "LinTS",
    "LinUCB",
    "Log",
    "OffPolicyEstimator",
    "OracleEpsilonGreedy",
    "OracleExploreFirst",
    "PerContext",
    "PrimalDualBwK",
    "RegretResult",
    "RepeatedHE",
    "RewardTable",
    "SemiBanditHedge",
    "SuccessiveElimination",
    "ThompsonBeta",
    "ThompsonFinite",
    "ThompsonGaussian",
    "TsallisINF",
    "UcbBwK",
    "UniformDiscretization",
    "WeightedMajority",
    "Zooming",
    "bayes_optimal_arm",
    "bayes_optimal_value",
    "bernoulli_kl",
    "bwk_lp",
    "coarse_correlated_gap",
    "is_bic",
    "lai_robbins_constant",
    "max_bic_epsilon",
    "mesh_cell",
    "min_samples_two_coins",
    "play_general",
    "play_knapsack",
    "play_zero_sum",
    "posterior_gap",
    "worst_case_instance",
]
