"""Statistics that tell how well a model or a training run fares."""

from kullback.diagnose.bayes_mixtures import (
    BayesMixture,
    BetaBernoulliMixture,
    ContextTreeMixture,
    DirichletMixture,
)
from kullback.diagnose.kde import HighDimKDE
from kullback.diagnose.kde_regimes import (
    KDERegimes,
    collapse_step,
    condensation,
    knn_order_statistics,
    participation_ratio,
)
from kullback.diagnose.kde_theory import GaussianSpectrumTheory, h_clt, h_glass, h_kl, regime, tail_index
from kullback.diagnose.langevin import SGLD, GaussianPrior, SGLDEnsemble, log_weight_ti
from kullback.diagnose.pn_criterion import PNCriterion, kl_budget, max_dimension, pn_criterion, required_n, tic
from kullback.diagnose.quadratic_forms import SquaredDistance
from kullback.diagnose.risk_expansion import RiskExpansion, estimation_risk, estimation_risk_psi
from kullback.diagnose.universality import (
    ball_bound,
    capacity,
    exp_bound,
    hypothesis_weight,
    local_dimension,
    regret_batch,
    regret_online,
    regret_supervised,
    sample_complexity,
    universality_report,
)

__all__ = [
    "SGLD",
    "BayesMixture",
    "BetaBernoulliMixture",
    "ContextTreeMixture",
    "DirichletMixture",
    "GaussianPrior",
    "GaussianSpectrumTheory",
    "HighDimKDE",
    "KDERegimes",
    "PNCriterion",
    "RiskExpansion",
    "SGLDEnsemble",
    "SquaredDistance",
    "ball_bound",
    "capacity",
    "collapse_step",
    "condensation",
    "estimation_risk",
    "estimation_risk_psi",
    "exp_bound",
    "h_clt",
    "h_glass",
    "h_kl",
    "hypothesis_weight",
    "kl_budget",
    "knn_order_statistics",
    "local_dimension",
    "log_weight_ti",
    "max_dimension",
    "participation_ratio",
    "pn_criterion",
    "regime",
    "regret_batch",
    "regret_online",
    "regret_supervised",
    "required_n",
    "sample_complexity",
    "tail_index",
    "tic",
    "universality_report",
]
