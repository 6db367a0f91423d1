"""Distillation: a teacher's distribution brought into a student."""

from typing import Any

from kullback.distill.bd_kd import BalanceWeights, balanced_kl, bdkd_loss, bdkd_teacher_loss, bdkd_weights
from kullback.distill.pld import PLDLoss, pld_objective
from kullback.distill.sinkd import SinkhornKD, sinkd_loss

__all__ = [
    "BalanceWeights",
    "PLDLoss",
    "PLDTrainer",
    "SinkhornKD",
    "balanced_kl",
    "bdkd_loss",
    "bdkd_teacher_loss",
    "bdkd_weights",
    "pld_objective",
    "sinkd_loss",
]


def __getattr__(name: str) -> Any:
    if name == "PLDTrainer":  # which imports transformers
        from kullback.distill._hf_pld import PLDTrainer

        return PLDTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
