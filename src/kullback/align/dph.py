"""DPH-RL: policy gradients on prompts to be explored, a mass-covering divergence to the first policy on mastered ones.

With u_t = pi(y_t) / pi_0(y_t) for tokens of the first policy's own correct answers, which a buffer holds,

    loss = clipped policy gradient, without a KL (exploring) + eta mean over tokens of f(u_t) (mastered)

    forward_kl  f(u) = u - 1 - log u                          KL(pi_0||pi); the -1 + u only takes variance away
    js          f(u) = u log u - (u + 1) log((u + 1) / 2)     KL(pi_0||m) + KL(pi||m), m = (pi + pi_0) / 2: twice jsd
    alpha       f(u) = (u^(1-a) - (1-a) u - a) / (a (a - 1))  forward KL for a to 1, reverse KL for a to 0
    reverse_kl  f(u) = u log u - u + 1                        KL(pi||pi_0), from samples of pi_0

No reference model is held: its log-probabilities lie in the buffer. With form="definition" the two halves of `js` are
taken apart, KL(pi_0||m) on the buffer and KL(pi||m) on the policy's own samples, which does need one.

At the exact optimum of E r - eta D(pi_0||pi) every divergence keeps the proportions of pi_0 among equally rewarded
answers (`f_regularised_policy`), reverse KL too: what collapses does so by finite steps and shared parameters.
Because the buffer holds correct answers only, it estimates the divergence from pi_0 given that the answer is correct.

Shapes: log_prob, reference_log_prob and mask [B, T], nats. Source: arXiv 2509.07430; names forward_kl, js and alpha as
there, with the scales of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kullback.align.grpo import Grpo
from kullback.align.methods import Batch
from kullback.align.policy_gradient import Reduction, reduce_tokens
from kullback.align.rehearsal import RehearsalBuffer
from kullback.align.rollouts import Rollouts
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence, f_divergence

__all__ = ["Dph", "Rehearsed", "rehearsal_divergence", "rehearsal_loss", "visited_penalty"]

Rehearsed = Literal["forward_kl", "js", "alpha", "reverse_kl"]
_TWO_SIDED = ("input_ids", "attention_mask")


def rehearsal_divergence(name: Rehearsed, *, alpha: float = 0.2) -> FDivergence:
    """The divergence D(pi_0||pi) by its name in the paper, on the paper's scale; alpha is for "alpha" alone.

    Raises ConfigError for another name, and for alpha outside (0, 1).

    >>> log_u = torch.tensor([1.0, 2.0]).log()
    >>> rehearsal_divergence("js").penalty(log_u, samples_from="reference")
    tensor([0.0000, 0.1699])
    """
    if name == "alpha":
        if not 0.0 < alpha < 1.0:
            raise ConfigError(f"alpha is between 0 and 1, not {alpha}: its limits are reverse_kl and forward_kl")
        return f_divergence("alpha_divergence", alpha=alpha)
    if name == "js":
        return f_divergence("jsd").scaled(2.0)
    if name in ("forward_kl", "reverse_kl"):
        return f_divergence(name.removeprefix("forward_"))
    raise ConfigError(f"a rehearsed divergence is one of forward_kl, js, alpha, reverse_kl, not {name!r}")


def rehearsal_loss(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    *,
    divergence: FDivergence | Rehearsed = "forward_kl",
    alpha: float = 0.2,
    level: Literal["token", "sequence"] = "token",
    reduction: Reduction = "token-mean",
    clamp: float | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """The divergence D(pi_0||pi) from answers of pi_0: the mean of f(pi / pi_0), a scalar.

    level "token" (as published) is the sum over steps of the divergence between next-token laws along those answers,
    which for forward KL is the divergence between whole answers; level "sequence" takes u of the whole answer, for any
    divergence, with a larger variance, and is averaged over answers. clamp: bounds log u on both sides, beyond which a
    token has no gradient: none by default, so that tokens forgotten badly are still learned. reduction and count as in
    `reduce_tokens`. Raises ShapeError, ConfigError, and DataError for a reference that is not finite under the mask.

    >>> log_prob = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> rehearsal_loss(log_prob, torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2)).detach()
    tensor(0.1839)
    """
    chosen = rehearsal_divergence(divergence, alpha=alpha) if isinstance(divergence, str) else divergence
    log_ratio = _log_ratio(log_prob, reference_log_prob, mask)
    if level == "sequence":
        if reduction != "token-mean":
            raise ConfigError(f'level="sequence" averages over answers: reduction={reduction!r} would do nothing')
        whole = _bounded(log_ratio.sum(-1), clamp)
        held = mask.bool().any(-1)
        values = torch.where(held, chosen.penalty(whole, samples_from="reference"), 0.0)
        return values.sum() / (held.sum().clamp(min=1) if count is None else count)
    if level != "token":
        raise ConfigError(f'level is "token" or "sequence", not {level!r}')
    values = chosen.penalty(_bounded(log_ratio, clamp), samples_from="reference")
    return reduce_tokens(values, mask, reduction, count=count)


def visited_penalty(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    *,
    divergence: FDivergence,
    gradient: Literal["value", "divergence"] = "value",
    reduction: Reduction = "token-mean",
    count: Tensor | float | None = None,
) -> Tensor:
    """D(pi_0||pi) token by token from the policy's own completions; its value is unbiased, and none is negative.

    gradient "value" differentiates the estimate itself, as the paper's code does, which is the gradient of another
    divergence; "divergence" is that of D(pi_0||pi) on the prefixes visited. reduction and count as in `reduce_tokens`.
    """
    log_ratio = _log_ratio(log_prob, reference_log_prob, mask)
    if gradient == "value":
        return reduce_tokens(divergence.penalty(log_ratio, samples_from="model"), mask, reduction, count=count)
    if gradient != "divergence":
        raise ConfigError(f'gradient is "value" or "divergence", not {gradient!r}')
    fixed = log_ratio.detach()
    values = divergence.penalty(fixed, samples_from="model") + divergence.link(fixed) * (log_ratio - fixed)
    return reduce_tokens(values, mask, reduction, count=count)


def _log_ratio(log_prob: Tensor, reference_log_prob: Tensor, mask: Tensor) -> Tensor:
    """log pi - log pi_0 [B, T], 0 outside the mask; float32 at least."""
    if log_prob.ndim != 2 or log_prob.shape != reference_log_prob.shape or log_prob.shape != mask.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (log_prob, reference_log_prob, mask))
        raise ShapeError(f"log_prob, reference_log_prob and mask are [B, T] alike, got {shapes}")
    held = mask.bool()
    reference = torch.where(held, reference_log_prob.detach(), 0.0)
    if not reference.isfinite().all():
        wrong = int((~reference.isfinite()).sum())
        raise DataError(f"{wrong} log-probabilities of the first policy are NaN or infinite: draw the buffer again")
    wide = torch.promote_types(torch.promote_types(log_prob.dtype, reference.dtype), torch.float32)
    return torch.where(held, log_prob, 0.0).to(wide) - reference.to(wide)


def _bounded(log_ratio: Tensor, clamp: float | None) -> Tensor:
    if clamp is None:
        return log_ratio
    if not clamp > 0.0:
        raise ConfigError(f"clamp is a positive bound of log u, or None for no bound, got {clamp}")
    return log_ratio.clamp(-clamp, clamp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dph:
    """DPH-RL as a method of the room: the policy gradient of `policy` on what is sampled, rehearsal beside it.

    buffer: the first policy's answers, or an empty one for none; rehearsed: answers of it a step, 0 for as many as
    completions are sampled; eta: weight of the divergence, 0.01 to 0.05 for forward_kl and alpha, 0.05 to 0.2 for js;
    divergence, alpha, level and clamp as in `rehearsal_loss`. form "definition": `js` taken apart, its half on the
    policy's own completions for a random share `visited` of the batches, with the gradient `visited_gradient`. The two
    losses are averaged apart. Raises ConfigError for values out of range and for a policy with a penalty of its own.
    """

    buffer: RehearsalBuffer
    policy: Grpo = field(default_factory=lambda: Grpo(clip_high=0.28, dual_clip=3.0))
    divergence: Rehearsed = "forward_kl"
    alpha: float = 0.2
    eta: float = 0.02
    rehearsed: int = 0
    level: Literal["token", "sequence"] = "token"
    clamp: float | None = None
    form: Literal["generator", "definition"] = "generator"
    visited: float = 0.1
    visited_gradient: Literal["value", "divergence"] = "value"
    needs_reference: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        rehearsal_divergence(self.divergence, alpha=self.alpha)
        if not self.eta >= 0.0 or self.rehearsed < 0 or not 0.0 <= self.visited <= 1.0:
            given = f"{self.eta}, {self.rehearsed} and {self.visited}"
            raise ConfigError(f"eta and rehearsed are 0 or more and visited a share from 0 to 1, got {given}")
        if self.form not in ("generator", "definition"):
            raise ConfigError(f'form is "generator" or "definition", not {self.form!r}')
        if self.form == "definition" and self.divergence != "js":
            raise ConfigError(f'form="definition" takes js apart, and the divergence is {self.divergence!r}')
        if self.policy.beta:
            raise ConfigError("DPH-RL explores without a KL: give a policy with beta=0, or use Grpo by itself")
        object.__setattr__(self, "needs_reference", self.form == "definition" and self.visited > 0.0)

    @property
    def epochs(self) -> int:
        """How often the same completions serve, with the same answers of the buffer beside them."""
        return self.policy.epochs

    @property
    def mini_batches(self) -> int:
        """Parts that they are cut into, each with its share of both."""
        return self.policy.mini_batches

    def prepare(self, batch: dict[str, Any], *, group: int, generator: torch.Generator) -> dict[str, Any]:
        """Adds advantages, and behind the sampled rows those of the buffer, which `rehearsal` [B] marks."""
        batch = self.policy.prepare(batch, group=group, generator=generator)
        rows = len(batch["input_ids"])
        drawn = torch.rand((), generator=generator, device=generator.device) < self.visited
        batch["mixed"] = drawn.to(batch["input_ids"].device)
        batch["rehearsal"] = torch.zeros(rows, dtype=torch.bool, device=batch["input_ids"].device)
        if not len(self.buffer) or self.eta == 0.0:
            return batch
        found = self.buffer.sample(self.rehearsed or rows, generator=generator).to(batch["input_ids"].device)
        return _joined(batch, found, self.buffer.pad)

    def count(self, batch: Batch) -> float:
        """That of the policy, of the sampled rows."""
        return self.policy.count(_rows(batch, ~batch["rehearsal"]))

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate of the sampled rows and eta times the divergence on the others."""
        held = batch["rehearsal"]
        sampled, kept = _rows(batch, ~held), _rows(batch, held)
        loss, metrics = self.policy.loss(log_prob[~held], sampled, count=count)
        share = self.policy.count(sampled) / count  # of this micro-batch in the whole
        weight = self.eta * share
        metrics["rehearsal"] = loss.new_zeros(())  # so that all processes tell of the same things
        if len(kept["completion_mask"]):
            half = f_divergence("skew_kl", alpha=0.5) if self.form == "definition" else self.divergence
            rehearsed = rehearsal_loss(
                log_prob[held], kept["reference_log_prob"], kept["completion_mask"],
                divergence=half, alpha=self.alpha, level=self.level, clamp=self.clamp,
            )  # fmt: skip
            loss, metrics["rehearsal"] = loss + weight * rehearsed, rehearsed.detach()
        if self.needs_reference and self.eta and bool(batch["mixed"]):
            visited = visited_penalty(
                log_prob[~held], sampled["reference_log_prob"], sampled["completion_mask"],
                divergence=f_divergence("skew_reverse_kl", alpha=0.5), gradient=self.visited_gradient,
            )  # fmt: skip
            loss = loss + weight * visited
        return loss, metrics


def _rows(batch: Mapping[str, Any], held: Tensor) -> dict[str, Any]:
    """The rows of a batch that are held [B]; what has no rows stays as it is."""
    rows = held.shape
    return {
        name: part[held] if isinstance(part, Tensor) and part.shape[:1] == rows else part
        for name, part in batch.items()
    }


def _joined(batch: Mapping[str, Any], found: Rollouts, pad: int) -> dict[str, Any]:
    """The batch with the buffer's rows behind its own: all as wide as the widest prompt and completion need."""
    rows, length = batch["completion_mask"].shape
    prompt = batch["input_ids"].shape[1] - length
    left, right = max(prompt, found.prompt_length), max(length, found.completion_mask.shape[1])
    own = {
        "input_ids": found.ids, "attention_mask": found.attention_mask, "completion_mask": found.completion_mask,
        "old_log_prob": found.log_probs, "reference_log_prob": found.log_probs, "prompt_index": found.prompt_index,
        "rehearsal": torch.ones(len(found), dtype=torch.bool, device=found.ids.device),
    }  # fmt: skip
    joined = {**batch, "reference_log_prob": batch.get("reference_log_prob", torch.zeros_like(batch["old_log_prob"]))}
    for name, part in joined.items():
        if not isinstance(part, Tensor) or part.shape[:1] != (rows,) or part.ndim > 2:
            continue
        if part.ndim == 1:
            more = own.get(name, part.new_zeros(len(found)))
        else:
            fill, sides = pad if name == "input_ids" else 0, name in _TWO_SIDED
            part = functional.pad(part, (sides * (left - prompt), right - length), value=fill)
            more = part.new_zeros(len(found), part.shape[1])
            if name in own:
                missing = right - found.completion_mask.shape[1]
                more = functional.pad(own[name], (sides * (left - found.prompt_length), missing), value=fill)
        joined[name] = torch.cat([part, more.to(part.dtype)])
    return joined
