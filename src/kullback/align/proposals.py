"""The best of a policy's past as what it is sampled from: renewed when the policy has come nearer to the target.

With samples of the proposal q, both divergences from the target p = P / Z are importance sampled,

    D(p, pi) = E_q [(pi/q) f(pi/p)],   D(p, q) = E_q [f(q/p)],

over a number of steps, after which q becomes a copy of pi where D(p, pi) < D(p, q). For the KL the difference of the
two is E_q [(P / (Z q)) log(pi / q)]. Shapes: n samples, log-probabilities of whole sequences [n], nats.
Source: arXiv 2302.08215, with the rule and the default interval of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.divergences import FDivergence, f_divergence

__all__ = ["ProposalContest"]


@dataclass(slots=True, kw_only=True)
class ProposalContest:
    """Sums of the estimated divergences of the policy and of the proposal from the target, since the last decision.

    divergence: by which the two are compared. Raises ConfigError for an interval below 1.
    """

    divergence: FDivergence = field(default_factory=lambda: f_divergence("kl"))
    every: int = 16
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"the proposal is judged every 1 or more steps, got {self.every}")

    def update(self, log_target: Tensor, log_policy: Tensor, log_proposal: Tensor, log_partition: Tensor) -> None:
        """Take in samples of the proposal [n]; those of a context with Z = 0 are passed over."""
        held = log_partition > -math.inf
        target, policy, proposal, partition = (
            x.detach().double().cpu()[held.cpu()] for x in (log_target, log_policy, log_proposal, log_partition)
        )
        if not len(target):
            return
        weight = (policy - proposal).exp()
        far = weight * self.divergence.penalty(policy - target + partition, samples_from="model")
        stays = self.divergence.penalty(proposal - target + partition, samples_from="model")
        self.sums = self.sums + torch.stack([far.sum(), stays.sum(), far.new_tensor(float(len(far)))])

    @property
    def values(self) -> tuple[float, float]:
        """(D(p, pi), D(p, q)) as estimated so far; NaN before a sample has come."""
        policy, proposal, count = self.sums.tolist()
        return (policy / count, proposal / count) if count else (math.nan, math.nan)

    def decide(self, step: int) -> bool:
        """Whether the policy takes the proposal's place before this step; what was summed up to then is forgotten."""
        if step % self.every or not self.sums[2]:
            return False
        policy, proposal = self.values
        self.sums = torch.zeros_like(self.sums)
        return policy < proposal

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.sums = state["sums"].double()
