"""Alignment: losses and policy gradients that bring a language model to preferences, rewards and targets."""

from kullback.align.log_probs import (
    TokenLogProbs,
    completion_log_probs,
    log_probs_from_hidden,
    log_probs_from_logits,
    sequence_log_probs,
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
from kullback.align.rollouts import Rollouts, pad_left, sample_rollouts

__all__ = [
    "Rollouts",
    "TokenLogProbs",
    "clipped_policy_loss",
    "clipped_share",
    "completion_log_probs",
    "grouped_advantages",
    "leave_one_out_baseline",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "pad_left",
    "policy_ratio",
    "reduce_tokens",
    "reference_penalty",
    "sample_rollouts",
    "sequence_log_probs",
]
