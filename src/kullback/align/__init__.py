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

__all__ = [
    "TokenLogProbs",
    "clipped_policy_loss",
    "clipped_share",
    "completion_log_probs",
    "grouped_advantages",
    "leave_one_out_baseline",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "policy_ratio",
    "reduce_tokens",
    "reference_penalty",
    "sequence_log_probs",
]
