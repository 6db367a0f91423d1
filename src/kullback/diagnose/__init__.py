"""Statistics that tell how well a model or a training run fares."""

from kullback.diagnose.kde import HighDimKDE
from kullback.diagnose.kde_regimes import (
    KDERegimes,
    collapse_step,
    condensation,
    knn_order_statistics,
    participation_ratio,
)
from kullback.diagnose.kde_theory import GaussianSpectrumTheory, h_clt, h_glass, h_kl, regime, tail_index
from kullback.diagnose.pn_criterion import PNCriterion, kl_budget, max_dimension, pn_criterion, required_n, tic
from kullback.diagnose.quadratic_forms import SquaredDistance
from kullback.diagnose.risk_expansion import RiskExpansion, estimation_risk, estimation_risk_psi

__all__ = [
    "GaussianSpectrumTheory",
    "HighDimKDE",
    "KDERegimes",
    "PNCriterion",
    "RiskExpansion",
    "SquaredDistance",
    "collapse_step",
    "condensation",
    "estimation_risk",
    "estimation_risk_psi",
    "h_clt",
    "h_glass",
    "h_kl",
    "kl_budget",
    "knn_order_statistics",
    "max_dimension",
    "participation_ratio",
    "pn_criterion",
    "regime",
    "required_n",
    "tail_index",
    "tic",
]
