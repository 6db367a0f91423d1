"""Distillation: a teacher's distribution brought into a student."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kullback.distill.bd_kd import (
    BalanceWeights,
    balanced_kl,
    bdkd_loss,
    bdkd_teacher_loss,
    bdkd_weights,
)
from kullback.distill.bd_kd_objective import BalancedKL, bdkd_objective
from kullback.distill.bottleneck import CSIBLoss, fgsm, pgd
from kullback.distill.bottleneck_bounds import generalisation_proxy, independence_criterion, robustness_bound
from kullback.distill.didi import grouped_advantages, two_step_trajectory
from kullback.distill.didi_sampler import RGASampler
from kullback.distill.didi_trainer import DiDiSettings, DiDiTrainer
from kullback.distill.dkd import dkd_loss, standardised
from kullback.distill.mcmi import CMIMeter, class_centroids, effective_dimension, empirical_cmi, mcmi_loss
from kullback.distill.mcmi_teacher import (
    CentroidTracker,
    MCMISettings,
    balanced_subset,
    finetune_teacher,
    kd_loss,
    zero_shot_distill,
)
from kullback.distill.mdcs import MDCSLoss, combine_experts, diversity_logits, mdcs_loss
from kullback.distill.mdcs_classifier import MDCSClassifier, fit_together
from kullback.distill.online import OnlineDistiller, OnlineLoss
from kullback.distill.pld import PLDLoss, pld_objective
from kullback.distill.rankings import KeptRankings, WithRankings, write_rankings
from kullback.distill.sinkd import SinkhornKD, sinkd_loss

if TYPE_CHECKING:
    from kullback.distill._hf_mcmi import MCMITeacherTrainer
    from kullback.distill._hf_mdcs import MDCSTrainer, TwoViews
    from kullback.distill._hf_online import OnlineDistillationTrainer, OnlineNetworks
    from kullback.distill._hf_pld import PLDTrainer
    from kullback.distill.bottleneck_regressor import CSIBRegressor

__all__ = [
    "BalanceWeights",
    "BalancedKL",
    "CMIMeter",
    "CSIBLoss",
    "CSIBRegressor",
    "CentroidTracker",
    "DiDiSettings",
    "DiDiTrainer",
    "KeptRankings",
    "MCMISettings",
    "MCMITeacherTrainer",
    "MDCSClassifier",
    "MDCSLoss",
    "MDCSTrainer",
    "OnlineDistillationTrainer",
    "OnlineDistiller",
    "OnlineLoss",
    "OnlineNetworks",
    "PLDLoss",
    "PLDTrainer",
    "RGASampler",
    "SinkhornKD",
    "TwoViews",
    "WithRankings",
    "balanced_kl",
    "balanced_subset",
    "bdkd_loss",
    "bdkd_objective",
    "bdkd_teacher_loss",
    "bdkd_weights",
    "class_centroids",
    "combine_experts",
    "diversity_logits",
    "dkd_loss",
    "effective_dimension",
    "empirical_cmi",
    "fgsm",
    "finetune_teacher",
    "fit_together",
    "generalisation_proxy",
    "grouped_advantages",
    "independence_criterion",
    "kd_loss",
    "mcmi_loss",
    "mdcs_loss",
    "pgd",
    "pld_objective",
    "robustness_bound",
    "sinkd_loss",
    "standardised",
    "two_step_trajectory",
    "write_rankings",
    "zero_shot_distill",
]


_LATE = {  # what imports transformers, which takes long, or needs an extra
    "CSIBRegressor": "bottleneck_regressor",
    "MCMITeacherTrainer": "_hf_mcmi",
    "MDCSTrainer": "_hf_mdcs",
    "OnlineDistillationTrainer": "_hf_online",
    "OnlineNetworks": "_hf_online",
    "PLDTrainer": "_hf_pld",
    "TwoViews": "_hf_mdcs",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"kullback.distill.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
