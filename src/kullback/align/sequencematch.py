r"""SequenceMatch: a language model as an imitator of whole trajectories, with a backspace among its actions.

With the logits as soft Q-values, V = logsumexp of them, and r = l(a|s) - g V(s') for the action a that leads from s to
s', g the discount, maximise over the logits

    J = sum_data g^t a phi(r / a) - 1/2 sum_data g^t (V - g V') - 1/2 sum_model g^t (V - g V')

with phi of the divergence between the occupancies of data and model, a its weight against the entropy bonus. The
default compares with the mixture of both, by chi-squared:

    chi2_mixture: r - r^2 / (8 a) on data and -r^2 / (8 a) on the model's own trajectories
    chi2: r - r^2 / (4 a);   js: a log(2 - e^(-r/a));   kl: -a e^(-r/a - 1) + const;   mle: r

Of "mle" with g = 1 and no backspace -J is the negative log-likelihood. The model's samples are constants. Small a
drives the policy to uniform: for a vocabulary of tens take 20 or more.

Shapes: logits [B, T, V] over a layout's stream, see `decode.backspace`. Source: arXiv 2306.05426.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.implicit import matching_divergence, phi_transform
from kullback.core.errors import ConfigError, ShapeError
from kullback.decode.backspace import Layout

__all__ = ["Divergence", "SequenceMatchOutput", "Terminal", "sequencematch_loss", "transition_rewards"]

Divergence = Literal["chi2_mixture", "chi2", "js", "kl", "mle"]
Terminal = Literal["zero", "bootstrap"]
_PHI: dict[str, Literal["chi2", "js", "reverse_kl"]] = {"chi2": "chi2", "js": "js", "kl": "reverse_kl"}


class SequenceMatchOutput(NamedTuple):
    """loss; objective J; nll, nats an action of the data; the mean rewards of data and model, without a gradient."""

    loss: Tensor
    objective: Tensor
    nll: Tensor
    reward_data: Tensor
    reward_model: Tensor


class _Transitions(NamedTuple):
    """[B, A] each: log-probabilities of actions, values before and after (discounted), rewards, discounted weights."""

    log_prob: Tensor
    value: Tensor
    following: Tensor
    reward: Tensor
    weight: Tensor


def transition_rewards(
    logits: Tensor, layout: Layout, *, backspace: int, gamma: float = 0.98, terminal: Terminal = "zero"
) -> _Transitions:
    """Values and rewards of each action under logits [B, T, V]; the backspace cannot be taken where nothing is visible.

    terminal "zero": the value after a row's last action is 0, as of an end; "bootstrap": that of its last state, for
    windows cut out of longer texts. Raises ShapeError, ConfigError.
    """
    if logits.ndim != 3 or logits.shape[:2] != layout.input_ids.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(layout.input_ids.shape)}"
        raise ShapeError(f"logits are [B, T, V] over the stream of the layout, got {shapes}")
    if not 0.0 < gamma <= 1.0:
        raise ConfigError(f"gamma lies in (0, 1], got {gamma}")
    if terminal not in ("zero", "bootstrap"):
        raise ConfigError(f"terminal is zero or bootstrap, not {terminal!r}")
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    root = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    root[backspace] = True
    first = logits[:, :1].masked_fill(root, -torch.inf)
    values = torch.cat([first, logits[:, 1:]], 1).logsumexp(-1)
    held = layout.held
    chosen = logits.reshape(len(logits), -1).gather(
        1, layout.state_index * logits.shape[-1] + layout.actions.clamp(min=0)
    )
    value, after = values.gather(1, layout.state_index), values.gather(1, layout.next_index)
    if terminal == "zero":
        last = held & ~torch.cat([held[:, 1:], torch.zeros_like(held[:, :1])], 1)
        after = after.masked_fill(last, 0.0)
    times = torch.arange(held.shape[1], device=logits.device, dtype=values.dtype)
    weight = torch.where(held, layout.weight.to(values.dtype) * gamma**times, 0.0)
    following = gamma * after
    parts = [torch.where(held, x, 0.0) for x in (chosen - value, value, following, chosen - following)]
    return _Transitions(parts[0], parts[1], parts[2], parts[3], weight)


def sequencematch_loss(
    logits_data: Tensor,
    layout_data: Layout,
    logits_model: Tensor,
    layout_model: Layout,
    *,
    backspace: int,
    alpha: float = 20.0,
    gamma: float = 0.98,
    divergence: Divergence = "chi2_mixture",
    nll_share: float = 0.2,
    normalise: Literal["discounted_tokens", "trajectory"] = "discounted_tokens",
    terminal: Terminal = "zero",
) -> SequenceMatchOutput:
    """nll_share times the negative log-likelihood of the data, and (1 - nll_share) times -J.

    logits [B, T, V] over the streams of the two layouts; normalise: sums over actions are divided by their discounted
    weights, or by the number of trajectories. Raises ShapeError, ConfigError for options out of range.
    """
    if not alpha > 0.0 or not 0.0 <= nll_share <= 1.0:
        raise ConfigError(f"alpha is positive and nll_share lies in [0, 1], got {alpha} and {nll_share}")
    if divergence not in ("chi2_mixture", "chi2", "js", "kl", "mle"):
        raise ConfigError(f"divergence is chi2_mixture, chi2, js, kl or mle, not {divergence!r}")
    if normalise not in ("discounted_tokens", "trajectory"):
        raise ConfigError(f"normalise is discounted_tokens or trajectory, not {normalise!r}")
    options = {"backspace": backspace, "gamma": gamma, "terminal": terminal}
    data = transition_rewards(logits_data, layout_data, **options)  # type: ignore[arg-type]
    model = transition_rewards(logits_model, layout_model, **options)  # type: ignore[arg-type]

    def total(values: Tensor, part: _Transitions) -> Tensor:
        scale = part.weight.sum().clamp(min=1e-12) if normalise == "discounted_tokens" else float(len(part.weight))
        return (part.weight * values).sum() / scale

    gained = total(_gain(data.reward, alpha, divergence), data)
    if divergence == "chi2_mixture":
        gained = gained - total(model.reward.square() / (8.0 * alpha), model)
    spent = 0.5 * (total(data.value - data.following, data) + total(model.value - model.following, model))
    objective = gained - spent
    counted = torch.where(data.weight > 0, layout_data.weight.to(data.weight.dtype), 0.0)
    nll = -(counted * data.log_prob).sum() / counted.sum().clamp(min=1e-12)
    loss = nll_share * nll - (1.0 - nll_share) * objective
    means = (total(part.reward, part).detach() for part in (data, model))
    return SequenceMatchOutput(loss, objective.detach(), nll.detach(), *means)


def _gain(reward: Tensor, alpha: float, divergence: Divergence) -> Tensor:
    """a phi(r / a) on the data."""
    if divergence == "mle":
        return reward
    if divergence == "chi2_mixture":
        return reward - reward.square() / (8.0 * alpha)
    found, _ = phi_transform(reward / alpha, divergence=matching_divergence(_PHI[divergence]))
    return alpha * found
