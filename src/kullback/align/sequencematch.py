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

What comes after a row's last action, at time n:

    zero: V' = 0;   bootstrap: V' of the last state, of windows cut out of longer texts
    absorbing: the end repeats itself for ever with one value V_end, learnt: V' = V_end, and to both sums is added
        g^n / (1 - g) times the term of a step with r = (1 - g) V_end and V - g V' = (1 - g) V_end

Shapes: logits [B, T, V] over a layout's stream, see `decode.backspace`. Source: arXiv 2306.05426.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.implicit import matching_divergence, phi_transform
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.decode.backspace import Layout

__all__ = [
    "Divergence",
    "SequenceMatchOutput",
    "Terminal",
    "policy_entropy",
    "sequencematch_loss",
    "transition_rewards",
]

Divergence = Literal["chi2_mixture", "chi2", "js", "kl", "mle"]
Terminal = Literal["zero", "bootstrap", "absorbing"]
_PHI: dict[str, Literal["chi2", "js", "reverse_kl"]] = {"chi2": "chi2", "js": "js", "kl": "reverse_kl"}


class SequenceMatchOutput(NamedTuple):
    """loss; objective J; nll, nats an action of the data; the mean rewards of data and model, without a gradient."""

    loss: Tensor
    objective: Tensor
    nll: Tensor
    reward_data: Tensor
    reward_model: Tensor


class _Transitions(NamedTuple):
    """[B, A] each: log-probabilities of actions, values before and after (discounted), rewards, discounted weights.

    With an absorbing end [B, A + 1]: the last column stands for all its steps.
    """

    log_prob: Tensor
    value: Tensor
    following: Tensor
    reward: Tensor
    weight: Tensor


class _ChosenAndValues(torch.autograd.Function):
    """Logits of the actions and values of the states with one pass over the logits each way, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, backspace: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        values = logits.to(wide).logsumexp(-1)
        first = logits[:, 0].to(wide, copy=True)
        first[:, backspace] = -torch.inf
        values[:, 0] = first.logsumexp(-1)
        ctx.save_for_backward(logits, places, values)
        ctx.backspace = backspace
        return logits.flatten(1).gather(1, places).to(wide), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, places, values = ctx.saved_tensors
        of_chosen, of_values = grads
        found = logits.to(values.dtype, copy=True).sub_(values.unsqueeze(-1)).exp_().mul_(of_values.unsqueeze(-1))
        found[:, 0, ctx.backspace] = 0.0
        found.flatten(1).scatter_add_(1, places, of_chosen)
        return found.to(logits.dtype), None, None


def transition_rewards(
    logits: Tensor,
    layout: Layout,
    *,
    backspace: int,
    gamma: float = 0.98,
    terminal: Terminal = "zero",
    end: int | None = None,
    end_value: Tensor | None = None,
) -> _Transitions:
    """Values and rewards of each action under logits [B, T, V]; the backspace cannot be taken where nothing is visible.

    terminal: what follows a row's last action, "zero", "bootstrap" or "absorbing", which takes the value end_value [].
    end: the action that ends a text; rows that do not end with it are cut, and bootstrap. None: all rows are alike.
    Raises ShapeError, ConfigError, DataError for an action without a logit and for logits that are not finite.
    """
    _check_transitions(logits, layout, backspace, gamma, terminal, end, end_value)
    held = layout.held
    places = layout.state_index * logits.shape[-1] + layout.actions.clamp(min=0)
    chosen, values = _ChosenAndValues.apply(logits, places, backspace)  # type: ignore[no-untyped-call]
    value, after = values.gather(1, layout.state_index), values.gather(1, layout.next_index)
    count = held.sum(1)
    last = torch.nn.functional.one_hot(count - 1, held.shape[1]).bool()
    ended = torch.ones_like(count, dtype=torch.bool) if end is None else (layout.actions == end).any(1)
    if terminal != "bootstrap":
        beyond = values.new_zeros(()) if end_value is None else end_value.to(values.dtype)
        after = torch.where(last & ended.unsqueeze(1), beyond, after)
    times = torch.arange(held.shape[1], device=logits.device, dtype=values.dtype)
    weight = torch.where(held, layout.weight.to(values.dtype) * gamma**times, 0.0)
    following = gamma * after
    parts = [torch.where(held, x, 0.0) for x in (chosen - value, value, following, chosen - following)]
    found = _Transitions(parts[0], parts[1], parts[2], parts[3], weight)
    if not (found.log_prob.isfinite() & found.reward.isfinite()).all():
        raise DataError("logits are NaN or infinite where an action is taken: it must be one that the model can take")
    if end_value is None:
        return found
    for_ever = torch.where(ended, gamma ** count.to(values.dtype) / (1.0 - gamma), 0.0)
    steps = (0.0 * beyond, beyond, gamma * beyond, (1.0 - gamma) * beyond, for_ever)
    columns = (x.expand(len(held)).unsqueeze(1) for x in steps)
    return _Transitions(*(torch.cat(pair, 1) for pair in zip(found, columns, strict=True)))


def _check_transitions(
    logits: Tensor, layout: Layout, backspace: int, gamma: float, terminal: str, end: int | None,
    end_value: Tensor | None,
) -> None:  # fmt: skip
    if logits.ndim != 3 or logits.shape[:2] != layout.input_ids.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(layout.input_ids.shape)}"
        raise ShapeError(f"logits are [B, T, V] over the stream of the layout, got {shapes}")
    if int(layout.actions.max()) >= logits.shape[-1]:
        raise DataError(f"action {int(layout.actions.max())} is none of the {logits.shape[-1]} that have logits")
    if backspace != layout.backspace or backspace >= logits.shape[-1]:
        raise ConfigError(
            f"the backspace is {backspace} here, {layout.backspace} in the layout, of {logits.shape[-1]} actions"
        )
    if not 0.0 < gamma <= 1.0:
        raise ConfigError(f"gamma lies in (0, 1], got {gamma}")
    if terminal not in ("zero", "bootstrap", "absorbing"):
        raise ConfigError(f"terminal is zero, bootstrap or absorbing, not {terminal!r}")
    if (terminal == "absorbing") != (end_value is not None) or (end_value is not None and end_value.ndim):
        raise ConfigError("terminal='absorbing', and no other, takes the value of the end, end_value, one number")
    if terminal == "absorbing" and gamma == 1.0:
        raise ConfigError("an end that is absorbing lasts for ever: take gamma below 1")
    if end is not None and terminal == "bootstrap":
        raise ConfigError("terminal='bootstrap' takes every row as cut: leave end out, or take zero or absorbing")


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
    values_of: Literal["both", "data", "start"] = "both",
    terminal: Terminal = "zero",
    end: int | None = None,
    end_value: Tensor | None = None,
) -> SequenceMatchOutput:
    """nll_share times the negative log-likelihood of the data, and (1 - nll_share) times -J.

    logits [B, T, V] over the streams of the two layouts; normalise: sums over actions are divided by their discounted
    weights, or by the number of trajectories; values_of: where the sum of V - g V' is taken, on both halves, on the
    data alone, or as V of the first state, to which each sum telescopes but for actions of weight 0 and cut windows:
    the three forms of IQ-Learn (arXiv 2106.12142), which with divergence="chi2" is "start". terminal, end and
    end_value: see `transition_rewards`. Raises ShapeError, ConfigError for options out of range.
    """
    if not alpha > 0.0 or not 0.0 <= nll_share <= 1.0:
        raise ConfigError(f"alpha is positive and nll_share lies in [0, 1], got {alpha} and {nll_share}")
    if divergence not in ("chi2_mixture", "chi2", "js", "kl", "mle"):
        raise ConfigError(f"divergence is chi2_mixture, chi2, js, kl or mle, not {divergence!r}")
    if normalise not in ("discounted_tokens", "trajectory"):
        raise ConfigError(f"normalise is discounted_tokens or trajectory, not {normalise!r}")
    if values_of not in ("both", "data", "start"):
        raise ConfigError(f"values_of is both, data or start, not {values_of!r}")
    options: dict[str, Any] = {
        "backspace": backspace, "gamma": gamma, "terminal": terminal, "end": end, "end_value": end_value,
    }  # fmt: skip
    data = transition_rewards(logits_data, layout_data, **options)
    model = transition_rewards(logits_model, layout_model, **options)

    def total(values: Tensor, part: _Transitions) -> Tensor:
        return (part.weight * values).sum() / _scale(part, normalise)

    gained = total(_gain(data.reward, alpha, divergence), data)
    if divergence == "chi2_mixture":
        gained = gained - total(model.reward.square() / (8.0 * alpha), model)
    if values_of == "start":
        rows = layout_data.weight.amax(1).to(data.value.dtype)  # noise at the start has weight 0, its row has not
        spent = (rows * data.value[:, 0]).sum() / _scale(data, normalise)
    else:
        spent = total(data.value - data.following, data)
        if values_of == "both":
            spent = 0.5 * (spent + total(model.value - model.following, model))
    objective = gained - spent
    counted = layout_data.weight.to(data.weight.dtype)
    nll = -(counted * data.log_prob[:, : counted.shape[1]]).sum() / counted.sum().clamp(min=1e-12)
    loss = nll_share * nll - (1.0 - nll_share) * objective
    means = (total(part.reward, part).detach() for part in (data, model))
    return SequenceMatchOutput(loss, objective.detach(), nll.detach(), *means)


@torch.no_grad()
def policy_entropy(logits: Tensor, layout: Layout) -> Tensor:
    """The mean entropy [], in nats, of the next action at the states of a layout under logits [B, T, V].

    log V of a policy that has lost everything, as too small an alpha makes it.
    """
    held = layout.held
    rows = torch.arange(len(held), device=logits.device).unsqueeze(1).expand_as(held)[held]
    law = logits[rows, layout.state_index[held]].float().softmax(-1)
    return torch.special.entr(law).sum(-1).mean()


def _scale(part: _Transitions, normalise: str) -> Tensor | float:
    return part.weight.sum().clamp(min=1e-12) if normalise == "discounted_tokens" else float(len(part.weight))


def _gain(reward: Tensor, alpha: float, divergence: Divergence) -> Tensor:
    """a phi(r / a) on the data."""
    if divergence == "mle":
        return reward
    if divergence == "chi2_mixture":
        return reward - reward.square() / (8.0 * alpha)
    found, _ = phi_transform(reward / alpha, divergence=matching_divergence(_PHI[divergence]))
    return alpha * found
