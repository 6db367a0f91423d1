"""Statistics that tell how well a model or a training run fares."""

from kullback.diagnose.attribution import (
    TRAKFeatures,
    calibrated_scale,
    ensemble_scores,
    fit_datamodels,
    predict_without,
    ridge_without,
)
from kullback.diagnose.bayes_mixtures import (
    BayesMixture,
    BetaBernoulliMixture,
    ContextTreeMixture,
    DirichletMixture,
)
from kullback.diagnose.calibration import adaptive_ece, brier, classwise_ece, ece, fit_temperature, reliability
from kullback.diagnose.ensembles import disagreement, geometric_mean, mean_pairwise_kl, prediction_variance
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
from kullback.diagnose.unlearning import klom, klom_floor, klom_report, margin, ulira

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
    "TRAKFeatures",
    "adaptive_ece",
    "ball_bound",
    "brier",
    "calibrated_scale",
    "capacity",
    "classwise_ece",
    "collapse_step",
    "condensation",
    "disagreement",
    "ece",
    "ensemble_scores",
    "estimation_risk",
    "estimation_risk_psi",
    "exp_bound",
    "fit_datamodels",
    "fit_temperature",
    "geometric_mean",
    "h_clt",
    "h_glass",
    "h_kl",
    "hypothesis_weight",
    "kl_budget",
    "klom",
    "klom_floor",
    "klom_report",
    "knn_order_statistics",
    "local_dimension",
    "log_weight_ti",
    "margin",
    "max_dimension",
    "mean_pairwise_kl",
    "participation_ratio",
    "pn_criterion",
    "predict_without",
    "prediction_variance",
    "regime",
    "regret_batch",
    "regret_online",
    "regret_supervised",
    "reliability",
    "required_n",
    "ridge_without",
    "sample_complexity",
    "tail_index",
    "tic",
    "ulira",
    "universality_report",
]
