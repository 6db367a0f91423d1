"""Alignment: losses and policy gradients that bring a language model to preferences, rewards and targets."""

from kullback.align.dph import Dph, rehearsal_divergence, rehearsal_loss, visited_penalty
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
from kullback.align.policy_gradient import (
    clipped_policy_loss,
    clipped_share,
    grouped_advantages,
    leave_one_out_baseline,
    policy_ratio,
    reduce_tokens,
    reference_penalty,
)
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

__all__ = [
    "ArithmeticReward",
    "Dph",
    "ExactReward",
    "ModelReward",
    "Partition",
    "PatternReward",
    "RehearsalBuffer",
    "Rollouts",
    "TokenLogProbs",
    "arithmetic_value",
    "clipped_policy_loss",
    "clipped_share",
    "completion_log_probs",
    "constant_groups",
    "coverage_at_k",
    "distinct_n",
    "grouped_advantages",
    "leave_one_out_baseline",
    "load_reward",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "mean_pass_at_k",
    "pad_left",
    "partition_by_pass_rate",
    "pass_at_k",
    "policy_ratio",
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
    "token_entropy",
    "visited_penalty",
]
