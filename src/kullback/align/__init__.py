"""Alignment: losses and policy gradients that bring a language model to preferences, rewards and targets."""

from kullback.align.calibration import ece_gap_bound, preference_ece
from kullback.align.dph import Dph, rehearsal_divergence, rehearsal_loss, visited_penalty
from kullback.align.f_dpg import (
    FDpg,
    PartitionEstimator,
    RunningBaseline,
    divergence_estimates,
    fdpg_loss,
    quasi_rejection,
    target_divergence,
)
from kullback.align.f_dpo import (
    FDPOLoss,
    FDPOOutput,
    fdpo_loss,
    fppo_penalty,
    implicit_reward,
    paper_divergence,
    preference_metrics,
)
from kullback.align.grpo import Grpo
from kullback.align.log_probs import (
    TokenLogProbs,
    completion_log_probs,
    log_probs_from_hidden,
    log_probs_from_logits,
    sequence_log_probs,
)
from kullback.align.measures import (
    coverage_at_k,
    distinct_n,
    mean_pass_at_k,
    pass_at_k,
    sampled_divergence,
    self_similarity,
    token_entropy,
)
from kullback.align.methods import Method, OnlineMethod, Preference, StatefulMethod, Supervised
from kullback.align.policy_gradient import (
    clipped_policy_loss,
    clipped_share,
    grouped_advantages,
    leave_one_out_baseline,
    policy_ratio,
    reduce_tokens,
    reference_penalty,
)
from kullback.align.regularised import RegularisedPolicy, f_regularised_policy
from kullback.align.rehearsal import Partition, RehearsalBuffer, partition_by_pass_rate, rehearse
from kullback.align.rewards import (
    ArithmeticReward,
    ExactReward,
    ModelReward,
    PatternReward,
    arithmetic_value,
    constant_groups,
    load_reward,
    score,
)
from kullback.align.rollouts import Rollouts, pad_left, sample_rollouts
from kullback.align.scored import ScoredRollouts

__all__ = [
    "ArithmeticReward",
    "Dph",
    "ExactReward",
    "FDPOLoss",
    "FDPOOutput",
    "FDpg",
    "Grpo",
    "Method",
    "ModelReward",
    "OnlineMethod",
    "Partition",
    "PartitionEstimator",
    "PatternReward",
    "Preference",
    "RegularisedPolicy",
    "RehearsalBuffer",
    "Rollouts",
    "RunningBaseline",
    "ScoredRollouts",
    "StatefulMethod",
    "Supervised",
    "TokenLogProbs",
    "arithmetic_value",
    "clipped_policy_loss",
    "clipped_share",
    "completion_log_probs",
    "constant_groups",
    "coverage_at_k",
    "distinct_n",
    "divergence_estimates",
    "ece_gap_bound",
    "f_regularised_policy",
    "fdpg_loss",
    "fdpo_loss",
    "fppo_penalty",
    "grouped_advantages",
    "implicit_reward",
    "leave_one_out_baseline",
    "load_reward",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "mean_pass_at_k",
    "pad_left",
    "paper_divergence",
    "partition_by_pass_rate",
    "pass_at_k",
    "policy_ratio",
    "preference_ece",
    "preference_metrics",
    "quasi_rejection",
    "reduce_tokens",
    "reference_penalty",
    "rehearsal_divergence",
    "rehearsal_loss",
    "rehearse",
    "sample_rollouts",
    "sampled_divergence",
    "score",
    "self_similarity",
    "sequence_log_probs",
    "target_divergence",
    "token_entropy",
    "visited_penalty",
]
