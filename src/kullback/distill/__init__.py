"""Distillation: a teacher's distribution brought into a student."""

from typing import TYPE_CHECKING, Any

from kullback.distill.bd_kd import BalanceWeights, balanced_kl, bdkd_loss, bdkd_teacher_loss, bdkd_weights
from kullback.distill.mcmi import CMIMeter, class_centroids, effective_dimension, empirical_cmi, mcmi_loss
from kullback.distill.mcmi_teacher import (
    CentroidTracker,
    MCMISettings,
    balanced_subset,
    finetune_teacher,
    kd_loss,
    zero_shot_distill,
)
from kullback.distill.pld import PLDLoss, pld_objective
from kullback.distill.sinkd import SinkhornKD, sinkd_loss

if TYPE_CHECKING:
    from kullback.distill._hf_mcmi import MCMITeacherTrainer
    from kullback.distill._hf_pld import PLDTrainer

__all__ = [
    "BalanceWeights",
    "CMIMeter",
    "CentroidTracker",
    "MCMISettings",
    "MCMITeacherTrainer",
    "PLDLoss",
    "PLDTrainer",
    "SinkhornKD",
    "balanced_kl",
    "balanced_subset",
    "bdkd_loss",
    "bdkd_teacher_loss",
    "bdkd_weights",
    "class_centroids",
    "effective_dimension",
    "empirical_cmi",
    "finetune_teacher",
    "kd_loss",
    "mcmi_loss",
    "pld_objective",
    "sinkd_loss",
    "zero_shot_distill",
]


def __getattr__(name: str) -> Any:
    if name == "PLDTrainer":  # which imports transformers
        from kullback.distill._hf_pld import PLDTrainer

        return PLDTrainer
    if name == "MCMITeacherTrainer":
        from kullback.distill._hf_mcmi import MCMITeacherTrainer

        return MCMITeacherTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
