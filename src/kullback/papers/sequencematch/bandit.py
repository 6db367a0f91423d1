"""One action from p and then the end: where matching with an entropy bonus leads, exactly, by the loss itself."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.sequencematch import sequencematch_loss
from kullback.decode.backspace import backspace_layout

__all__ = ["BanditOptimum", "bandit_optimum"]


class BanditOptimum(NamedTuple):
    """The policy [K], its entropy, and the objective J, which is the divergence's weight times it minus the entropy."""

    policy: Tensor
    entropy: float
    objective: float


def bandit_optimum(
    demonstrated: Tensor, *, alpha: float, divergence: Literal["chi2", "chi2_mixture"], rounds: int = 60
) -> BanditOptimum:
    """The policy that the loss leads to from demonstrations of K actions with probabilities [K], in float64.

    The mixture takes the policy's own samples as given, so its loss is minimised again with those of the last policy,
    until nothing changes.
    """
    p = demonstrated.double()
    logits = torch.zeros(len(p), dtype=torch.float64, requires_grad=True)
    objective, policy = 0.0, p
    for _ in range(rounds if divergence == "chi2_mixture" else 1):
        before = logits.detach().softmax(0)
        objective = _maximised(logits, p, before, alpha, divergence)
        policy = logits.detach().softmax(0)
        if (policy - before).abs().max() < 1e-10:
            break
    return BanditOptimum(policy, -(policy * policy.log()).sum().item(), objective)


def _maximised(
    logits: Tensor, p: Tensor, own: Tensor, alpha: float, divergence: Literal["chi2", "chi2_mixture"]
) -> float:
    """J at its largest, over logits [K] in place, for data from p and the model's samples from own."""
    count = len(p)
    actions = torch.arange(count).unsqueeze(1)
    layouts = [backspace_layout(actions, backspace=count, begin=0, weights=x.unsqueeze(1)) for x in (p, own)]
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def closure() -> float:
        full = torch.cat([logits, logits.new_zeros(1)]).expand(count, layouts[0].input_ids.shape[1], count + 1)
        loss = sequencematch_loss(
            full, layouts[0], full, layouts[1], backspace=count, gamma=1.0, alpha=alpha, divergence=divergence,
            nll_share=0.0,
        ).loss  # fmt: skip
        logits.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return -closure()
