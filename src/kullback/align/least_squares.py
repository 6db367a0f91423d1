r"""SequenceMatch's mixture read as regression: Q-values that meet squared targets (LS-IQ).

With the logits as Q, V = logsumexp of them, e = Q(s, a) - g V(s') and R = 4 a, chi-squared against the mixture is

    J = const - 1/(2R) ( sum_data g^t (Q - (R + g V'))^2 + sum_model g^t (Q - (-R + g V'))^2 ) - entropy

so a step of data is worth R and a step of the model's own -R. Where the model's trajectories are the policy's, the
gradient of the squares, with samples as constants, is that of `sequencematch_loss` (its values telescope to V of the
start, and the mean gradient of Q over the policy's actions is that of V); from a buffer it is another. Read as
regression, targets can be held still, kept in the range that rewards within R allow, and be known at an end that is
absorbing, with no value to learn.

Shapes: logits [B, T, V] over a layout's stream, see `decode.backspace`. Source: arXiv 2303.00599; the mixture as
SequenceMatch's default 2306.05426.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.sequencematch import SequenceMatchOutput, Terminal, transition_rewards
from kullback.core.errors import ConfigError
from kullback.decode.backspace import Layout

__all__ = ["SquaredTargets", "squared_targets_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredTargets:
    """data: targets of the data are R + g V' ("bootstrap"), or R / (1 - g) whatever comes after ("fixed"), as if it
    went on for ever; own: what meets the targets of the model is Q of the action taken ("actions"), or V of the
    model's states ("values"), or of those and the data's in equal parts ("all values"); clip: V' is kept within
    R / (1 - g); still: targets carry no gradient. Raises ConfigError for another word.
    """

    data: Literal["bootstrap", "fixed"] = "bootstrap"
    own: Literal["actions", "values", "all values"] = "actions"
    clip: bool = True
    still: bool = True

    def __post_init__(self) -> None:
        if self.data not in ("bootstrap", "fixed"):
            raise ConfigError(f"data is bootstrap or fixed, not {self.data!r}")
        if self.own not in ("actions", "values", "all values"):
            raise ConfigError(f"own is actions, values or all values, not {self.own!r}")


def squared_targets_loss(
    logits_data: Tensor,
    layout_data: Layout,
    logits_model: Tensor,
    layout_model: Layout,
    *,
    backspace: int,
    targets: SquaredTargets | None = None,
    alpha: float = 20.0,
    gamma: float = 0.98,
    nll_share: float = 0.2,
    normalise: Literal["discounted_tokens", "trajectory"] = "discounted_tokens",
    terminal: Terminal = "zero",
    end: int | None = None,
    target_logits: tuple[Tensor, Tensor] | None = None,
) -> SequenceMatchOutput:
    """nll_share times the negative log-likelihood of the data, and the rest times the squares over 2 R, R = 4 alpha.

    The squares are less their value at logits of 0, and objective is their negative. terminal "absorbing": the step
    that ends a text is worth R / (1 - gamma), or minus that on the model's own; otherwise and the other arguments as of
    `sequencematch_loss`. target_logits: of another model on both streams, whose values make the targets. Raises
    ShapeError, ConfigError for options out of range.
    """
    how = SquaredTargets() if targets is None else targets
    _check(alpha, nll_share, gamma, normalise, terminal, how)
    ends: dict[str, Any] = {
        "backspace": backspace, "gamma": gamma, "end": end,
        "terminal": "zero" if terminal == "absorbing" else terminal,
    }  # fmt: skip
    bound, pair = 4.0 * alpha, target_logits or (None, None)
    data = _errors(logits_data, layout_data, pair[0], how, bound, ends)
    own = _errors(logits_model, layout_model, pair[1], how, bound, ends)
    absorbing = terminal == "absorbing"
    worth = [_worth(layout, gamma, end) if absorbing else 1.0 for layout in (layout_data, layout_model)]

    def missed(part: _Errors, error: Tensor, target: Tensor | float) -> Tensor:
        """The sum of ((error - R target)^2 - (R target)^2) / 2 R, which does not cancel in float32."""
        weight = part.steps.weight
        scale = weight.sum().clamp(min=1e-12) if normalise == "discounted_tokens" else float(len(weight))
        return (weight * (error.square() / (2.0 * bound) - target * error)).sum() / scale

    fixed = how.data == "fixed"
    squares = missed(data, data.q, 1.0 / (1.0 - gamma)) if fixed else missed(data, data.action, worth[0])
    if how.own == "all values":
        squares = squares + 0.5 * (missed(data, data.value, -worth[0]) + missed(own, own.value, -worth[1]))
    else:
        squares = squares + missed(own, own.action if how.own == "actions" else own.value, -worth[1])
    counted = layout_data.weight.to(data.q.dtype)
    nll = -(counted * data.steps.log_prob).sum() / counted.sum().clamp(min=1e-12)
    loss = nll_share * nll + (1.0 - nll_share) * squares
    rewards = [_mean(part.steps.reward, part.steps.weight).detach() for part in (data, own)]
    return SequenceMatchOutput(loss, -squares.detach(), nll.detach(), rewards[0], rewards[1])


class _Errors(NamedTuple):
    """The steps; Q of their actions; Q less g V' of the targets, and V less that, all [B, A]."""

    steps: Any
    q: Tensor
    action: Tensor
    value: Tensor


def _errors(
    logits: Tensor, layout: Layout, target_logits: Tensor | None, how: SquaredTargets, bound: float,
    ends: dict[str, Any],
) -> _Errors:  # fmt: skip
    steps = transition_rewards(logits, layout, **ends)
    q, after = steps.reward + steps.following, steps.following
    if target_logits is not None:
        with torch.no_grad():
            after = transition_rewards(target_logits, layout, **ends).following
    if how.clip and ends["gamma"] < 1.0:
        largest = ends["gamma"] * bound / (1.0 - ends["gamma"])
        after = after.clamp(-largest, largest)
    after = after.detach() if how.still else after
    return _Errors(steps, q, q - after, steps.value - after)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (weight * values).sum() / weight.sum().clamp(min=1e-12)


def _worth(layout: Layout, gamma: float, end: int | None) -> Tensor:
    """1 a step, and 1 / (1 - gamma) for the one that ends a text [B, A]."""
    held = layout.held
    last = torch.nn.functional.one_hot(held.sum(1) - 1, held.shape[1]).bool()
    ended = last if end is None else last & (layout.actions == end)
    return torch.where(ended, 1.0 / (1.0 - gamma), 1.0)


def _check(
    alpha: float, nll_share: float, gamma: float, normalise: str, terminal: str, how: SquaredTargets
) -> None:
    if not alpha > 0.0 or not 0.0 <= nll_share <= 1.0:
        raise ConfigError(f"alpha is positive and nll_share lies in [0, 1], got {alpha} and {nll_share}")
    if normalise not in ("discounted_tokens", "trajectory"):
        raise ConfigError(f"normalise is discounted_tokens or trajectory, not {normalise!r}")
    if gamma == 1.0 and (how.data == "fixed" or terminal == "absorbing"):
        raise ConfigError("a fixed target and an absorbing end are worth R / (1 - gamma): take gamma below 1")
