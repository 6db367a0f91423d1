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
from kullback.stream.bandits.experts import Halving, Hedge, WeightedMajority
from kullback.stream.bandits.lower_bounds import (
    bernoulli_kl,
    lai_robbins_constant,
    min_samples_two_coins,
    worst_case_instance,
)
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
    "KLUCB",
    "UCB1",
    "UCBV",
    "BayesUCB",
    "Doubling",
    "EpsilonGreedy",
    "Exp3",
    "Exp3IX",
    "Exp3P",
    "Exp3S",
    "Exp4",
    "ExploreFirst",
    "Halving",
    "Hedge",
    "IndexPolicy",
    "SuccessiveElimination",
    "ThompsonBeta",
    "ThompsonFinite",
    "ThompsonGaussian",
    "TsallisINF",
    "WeightedMajority",
    "bayes_optimal_arm",
    "bayes_optimal_value",
    "bernoulli_kl",
    "lai_robbins_constant",
    "min_samples_two_coins",
    "worst_case_instance",
]
