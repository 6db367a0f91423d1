"""The parts of PPO with a critic: rewards for tokens, advantages over time, and the critic's loss.

    r_t = -b (log pi - log ref)_t + [t is the last token] R
    A_t = sum_k (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}),   returns = A + V
    critic: max((V - returns)^2, (V_old + clip(V - V_old) - returns)^2) / 2

With `policy_gradient.clipped_policy_loss` on the advantages [B, T] it is the PPO of RLHF. Shapes: [B, T], a mask of
completion tokens, nats. Sources: arXiv 1506.02438 (advantages), 1707.06347, 2203.02155.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kullback.align.policy_gradient import Reduction, reduce_tokens
from kullback.core.errors import ConfigError, ShapeError

__all__ = ["clipped_value_loss", "generalised_advantages", "shaped_rewards"]


def shaped_rewards(
    reference_log_prob: Tensor, log_prob: Tensor, rewards: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """Rewards of tokens [B, T]: the KL to the reference at each, and the completion's reward [B] at its last.

    Their sum is R - b (log pi(y) - log ref(y)); 0 outside the mask. A row without a token has none.

    >>> mask = torch.tensor([[True, True, False]])
    >>> shaped_rewards(torch.full((1, 3), -2.0), torch.full((1, 3), -1.0), torch.tensor([5.0]), mask, beta=0.1)
    tensor([[-0.1000,  4.9000,  0.0000]])
    """
    _check(mask, reference_log_prob, log_prob)
    if rewards.shape != mask.shape[:1]:
        raise ShapeError(f"rewards are one a completion, [{len(mask)}], got {tuple(rewards.shape)}")
    held = mask.bool()
    found = torch.where(held, reference_log_prob - log_prob.detach(), 0.0).mul_(beta)
    last = held.shape[1] - 1 - held.flip(1).byte().argmax(1, keepdim=True)
    paid = torch.where(held.gather(1, last), rewards.unsqueeze(1).to(found.dtype), 0.0)
    return found.scatter_add_(1, last, paid)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, T] and 0 outside the mask, from rewards and values of tokens.

    trace is GAE's lambda. A completion ends where its mask ends: nothing is worth anything afterwards. The values'
    gradient is not taken. Raises ShapeError, ConfigError for gamma or trace outside [0, 1].

    >>> one = torch.ones(1, 3)
    >>> generalised_advantages(one, torch.zeros(1, 3), one, trace=1.0)[0]
    tensor([[3., 2., 1.]])
    """
    _check(mask, rewards, values)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= trace <= 1.0):
        raise ConfigError(f"gamma and trace lie in [0, 1], got {gamma} and {trace}")
    held = mask.bool()
    value = torch.where(held, values.detach(), 0.0)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    surprise = torch.where(held, rewards + gamma * following - value, 0.0)
    found, running = torch.zeros_like(surprise), torch.zeros_like(surprise[:, 0])
    for place in range(mask.shape[1] - 1, -1, -1):
        running = torch.where(held[:, place], surprise[:, place] + gamma * trace * running, 0.0)
        found[:, place] = running
    return found, torch.where(held, found + value, 0.0)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    reduction: Reduction = "token-mean",
    count: Tensor | float | None = None,
) -> Tensor:
    """The critic's squared error, which gains nothing from moving further than clip from its old values; a scalar."""
    _check(mask, values, old_values, returns)
    if not clip > 0.0:
        raise ConfigError(f"clip is positive, got {clip}: math.inf switches it off")
    held = mask.bool()
    now, old, goal = (torch.where(held, x, 0.0) for x in (values, old_values.detach(), returns.detach()))
    bounded = old + (now - old).clamp(-clip, clip)
    loss = 0.5 * torch.maximum((now - goal).square(), (bounded - goal).square())
    return reduce_tokens(loss, mask, reduction, count=count)


def _check(mask: Tensor, *others: Tensor) -> None:
    if mask.ndim != 2 or any(other.shape != mask.shape for other in others):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mask, *others))
        raise ShapeError(f"the mask and what belongs to tokens are [B, T] alike, got {shapes}")
