"""Distillation: a teacher's distribution brought into a student."""

from kullback.distill.bd_kd import BalanceWeights, balanced_kl, bdkd_loss, bdkd_teacher_loss, bdkd_weights
from kullback.distill.sinkd import SinkhornKD, sinkd_loss

__all__ = [
    "BalanceWeights",
    "SinkhornKD",
    "balanced_kl",
    "bdkd_loss",
    "bdkd_teacher_loss",
    "bdkd_weights",
    "sinkd_loss",
]
