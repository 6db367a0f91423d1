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
from kullback.diagnose.quadratic_forms import SquaredDistance

__all__ = [
    "GaussianSpectrumTheory",
    "HighDimKDE",
    "KDERegimes",
    "SquaredDistance",
    "collapse_step",
    "condensation",
    "h_clt",
    "h_glass",
    "h_kl",
    "knn_order_statistics",
    "participation_ratio",
    "regime",
    "tail_index",
]
