r"""KDRL: one policy gradient for a verifiable reward and for the reverse KL to a teacher, on the student's own samples.

    R_t = log teacher(y_t) - log pi(y_t)        L = -GRPO + beta D,   D the masked mean over tokens of

| kind      | value         | gradient in the mean                                                    |
|-----------|---------------|-------------------------------------------------------------------------|
| k2        | R^2 / 2       | that of KL(pi, teacher) at each token; the paper's choice               |
| k3        | e^R - 1 - R   | that of KL(teacher, pi), weighted by an unbounded ratio                  |
| k1_reward | -R            | none as a loss: -R is a reward, added to the advantage after the groups  |

credit "return_to_go" counts what a token does to later ones: then k2 has the gradient of the KL of whole completions.
`reverse_kl_top_k` is D without sampling, over the whole vocabulary or over the K likeliest tokens.

Shapes: P prompts, G completions, B = P G rows, T tokens, V vocabulary; mask [B, T]; nats. Source: arXiv 2506.02208.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.grpo import Grpo
from kullback.align.methods import Batch
from kullback.align.policy_gradient import clipped_policy_loss, grouped_advantages, reduce_tokens
from kullback.core.errors import ConfigError, ShapeError
from kullback.divergences import kl_sampled, reverse_kl

__all__ = [
    "BetaSchedule",
    "KDRLOutput",
    "Kdrl",
    "kd_mask",
    "kd_terms",
    "kdrl_loss",
    "reverse_kl_top_k",
]

Kind = Literal["k2", "k3", "k1_reward"]
Keep = Literal["none", "response", "group"]
_MOST_RATIO = 2.0  # of student over the policy that sampled, in front of the teacher's term


def kd_terms(
    log_teacher: Tensor,
    log_student: Tensor,
    *,
    kind: Kind = "k2",
    credit: Literal["token", "return_to_go"] = "token",
    ratio: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The teacher's term of each token [B, T] that the student drew, with the gradient of the table.

    ratio: student over the policy that drew the tokens, taken as a constant; mask: the tokens that exist, for credit
    "return_to_go". k1_reward gives the value alone, without a gradient. Raises ConfigError for unknown names.

    >>> log_student = torch.tensor([[-1.0]], requires_grad=True)
    >>> term = kd_terms(torch.tensor([[-1.5]]), log_student)
    >>> term.detach(), torch.autograd.grad(term.sum(), log_student)[0]
    (tensor([[0.1250]]), tensor([[0.5000]]))
    """
    if kind not in ("k2", "k3", "k1_reward"):
        raise ConfigError(f"kind is k2, k3 or k1_reward, not {kind!r}")
    if credit not in ("token", "return_to_go"):
        raise ConfigError(f"credit is token or return_to_go, not {credit!r}")
    later = credit == "return_to_go"
    if later and kind != "k2":
        raise ConfigError(f'credit="return_to_go" belongs to k2, the gradient of the reverse KL, and not to {kind}')
    gradient = {"k2": "reverse_sequence" if later else "reverse", "k3": "forward", "k1_reward": "none"}[kind]
    return kl_sampled(
        log_teacher, log_student, value=kind[:2], gradient=gradient, ratio=ratio, mask=mask if later else None
    )


def reverse_kl_top_k(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    kept: int | None = None,
    support: Literal["student", "teacher"] = "student",
    tail: Literal["bucket", "renormalise"] = "bucket",
) -> Tensor:
    """KL(student, teacher) of next-token laws without sampling, [..., V] to [...]; over the `kept` likeliest tokens.

    support: whose likeliest tokens. tail "bucket" keeps the rest as one more outcome, which makes it a lower bound;
    "renormalise" forgets the rest. kept = V or None is the whole KL. Raises ConfigError, ShapeError.

    >>> teacher, student = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    >>> reverse_kl_top_k(teacher, student), reverse_kl_top_k(teacher, student, kept=1)
    (tensor(0.3466), tensor(0.3112))
    """
    if teacher_logits.shape != student_logits.shape:
        shapes = f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        raise ShapeError(f"teacher and student have the same vocabulary, got {shapes}")
    if support not in ("student", "teacher") or tail not in ("bucket", "renormalise"):
        raise ConfigError(f"support is student or teacher and tail bucket or renormalise, got {support!r} and {tail!r}")
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    size = log_p.shape[-1]
    if kept is None or kept == size:
        return reverse_kl(log_p, log_q)
    if not 1 <= kept < size:
        raise ConfigError(f"kept is from 1 to the {size} tokens of the vocabulary, got {kept}")
    chosen = (log_q if support == "student" else log_p).detach().topk(kept, -1).indices
    top_p, top_q = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
    if tail == "renormalise":
        return reverse_kl(top_p.log_softmax(-1), top_q.log_softmax(-1))
    rest_p, rest_q = (_rest(log_law, chosen) for log_law in (log_p, log_q))
    return reverse_kl(torch.cat([top_p, rest_p], -1), torch.cat([top_q, rest_q], -1))


def _rest(log_law: Tensor, chosen: Tensor) -> Tensor:
    return log_law.scatter(-1, chosen, -math.inf).logsumexp(-1, keepdim=True)


def kd_mask(correct: Tensor, *, mode: Keep = "none") -> Tensor:
    """Which completions the teacher is heard on, bool [P, G], from correct [P, G].

    "response": those that failed; "group": those whose whole group failed; "none": all.

    >>> kd_mask(torch.tensor([[1, 0, 0], [0, 0, 0]]), mode="group").tolist()
    [[False, False, False], [True, True, True]]
    """
    if correct.ndim != 2:
        raise ShapeError(f"correct is [prompts, group], got {tuple(correct.shape)}")
    right = correct.bool()
    if mode == "none":
        return torch.ones_like(right)
    if mode == "response":
        return ~right
    if mode == "group":
        return (~right.any(1, keepdim=True)).expand_as(right)
    raise ConfigError(f"the teacher is kept for none, response or group, not {mode!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BetaSchedule:
    """The weight of the teacher at an optimiser step, from 0: strong at first, and the reward later.

    kind "constant"; "linear": start - delta step, at least end; "cosine": from start to end over `steps`; "switch":
    start before step `steps` and end from then on (distil first, then reinforce). Raises ConfigError.

    >>> schedule = BetaSchedule(kind="linear", start=5e-3, end=1e-3, delta=5e-5)
    >>> [round(schedule(step), 6) for step in (0, 40, 80, 280)]
    [0.005, 0.003, 0.001, 0.001]
    """

    kind: Literal["constant", "linear", "cosine", "switch"] = "constant"
    start: float = 5e-3
    end: float = 1e-3
    delta: float = 5e-5
    steps: int = 100

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine", "switch"):
            raise ConfigError(f"kind is constant, linear, cosine or switch, not {self.kind!r}")
        if min(self.start, self.end, self.delta) < 0.0 or self.steps < 1:
            raise ConfigError("start, end and delta are 0 or more and steps 1 or more")

    def __call__(self, step: int) -> float:
        """The weight at `step`."""
        if self.kind == "linear":
            return max(self.start - self.delta * step, self.end)
        if self.kind == "cosine":
            share = min(step / self.steps, 1.0)
            return self.end + 0.5 * (self.start - self.end) * (1.0 + math.cos(math.pi * share))
        if self.kind == "switch":
            return self.start if step < self.steps else self.end
        return self.start


class KDRLOutput(NamedTuple):
    """loss, and its parts without a gradient: policy (GRPO's), distillation (D), divergence (the mean of -R), kept."""

    loss: Tensor
    policy: Tensor
    distillation: Tensor
    divergence: Tensor
    kept: Tensor


def kdrl_loss(
    log_teacher: Tensor,
    log_student: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kind: Kind = "k2",
    keep: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    clip_low: float = math.inf,
    clip_high: float = math.inf,
    credit: Literal["token", "return_to_go"] = "token",
    most_log_ratio: float | None = None,
    count: Tensor | float | None = None,
    kept_count: Tensor | float | None = None,
) -> KDRLOutput:
    """The loss of a batch of the student's completions: log-probabilities and mask [B, T], advantages [B].

    keep [B]: completions on which the teacher is heard (see `kd_mask`); its mean is over their tokens. old_log_prob: of
    the policy that sampled, where several steps are taken; the clip is on the reward's part, and the teacher's carries
    the ratio, at most 2. most_log_ratio: R is cut to at most this in size, for tokens that the teacher finds all but
    impossible. count and kept_count: tokens that the two sums are divided by. Both parts are token means. ConfigError.
    """
    held = mask.bool()
    teacher, student = (torch.where(held, x, 0.0) for x in (log_teacher, log_student))
    if most_log_ratio is not None:
        if not most_log_ratio > 0.0:
            raise ConfigError(f"most_log_ratio is positive, or None for no limit, got {most_log_ratio}")
        seen = student.detach()
        teacher = seen + (teacher - seen).clamp(-most_log_ratio, most_log_ratio)
    old = student.detach() if old_log_prob is None else torch.where(held, old_log_prob, 0.0)
    heard = held if keep is None else held & keep.bool().unsqueeze(1)
    bonus = advantages
    if kind == "k1_reward":
        reward = torch.where(heard, teacher - student.detach(), 0.0)
        bonus = advantages.unsqueeze(1) + beta * reward
    policy = clipped_policy_loss(student, old, bonus, mask, clip_low=clip_low, clip_high=clip_high, count=count)
    ratio = None if old_log_prob is None else (student.detach() - old).exp().clamp(max=_MOST_RATIO)
    terms = kd_terms(teacher, student, kind=kind, credit=credit, ratio=ratio, mask=held if credit != "token" else None)
    distillation = reduce_tokens(terms, heard, "token-mean", count=kept_count)
    loss = policy if kind == "k1_reward" else policy + beta * distillation
    divergence = reduce_tokens((student - teacher).detach(), held, "token-mean")
    share = heard.sum() / held.sum().clamp(min=1)
    return KDRLOutput(loss, policy.detach(), distillation.detach(), divergence, share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kdrl:
    """KDRL as a method of the room: the trainer's reference is the teacher.

    schedule: the teacher's weight; kind, credit, keep: as in the module. shaping "loss" is the paper's; "reward" puts
    beta R of the whole completion into its reward before the groups are normalised, which the paper found worse.
    reinforced: False leaves the reward's part out, for distillation on the student's own samples alone (KD-RKL);
    reward_from: the step from which it counts, so that with a schedule that switches to 0 there the student is
    distilled first and reinforced then. most_log_ratio: see `kdrl_loss`. policy: the options of the reward's part,
    without a penalty of its own. correct_from: rewards that count as right.
    """

    schedule: BetaSchedule = field(default_factory=BetaSchedule)
    kind: Kind = "k2"
    credit: Literal["token", "return_to_go"] = "token"
    keep: Keep = "none"
    shaping: Literal["loss", "reward"] = "loss"
    reinforced: bool = True
    reward_from: int = 0
    most_log_ratio: float | None = None
    policy: Grpo = field(default_factory=Grpo)
    correct_from: float = 0.5
    needs_reference: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        kd_mask(torch.zeros(1, 1), mode=self.keep)
        kd_terms(torch.zeros(1, 1), torch.zeros(1, 1), kind=self.kind, credit=self.credit)
        if self.shaping not in ("loss", "reward"):
            raise ConfigError(f"shaping is loss or reward, not {self.shaping!r}")
        if not self.reinforced and (self.shaping == "reward" or self.keep != "none" or self.reward_from):
            raise ConfigError(
                "without the reward's part the teacher is heard in the loss and on all completions: leave shaping, "
                "keep and reward_from out"
            )
        if self.reward_from < 0 or (self.reward_from and self.shaping == "reward"):
            raise ConfigError('reward_from is a step of 0 or more, and 0 with shaping="reward"')
        if self.most_log_ratio is not None and not self.most_log_ratio > 0.0:
            raise ConfigError(f"most_log_ratio is positive, or None for no limit, got {self.most_log_ratio}")
        if self.policy.beta:
            raise ConfigError("KDRL has no penalty to a reference: give a policy with beta=0")

    def prepare(self, batch: dict[str, Any], *, group: int, generator: torch.Generator) -> dict[str, Any]:
        """Adds advantages [B], keep [B] and beta []."""
        rewards, step = batch["rewards"], int(batch.get("step", 0))
        beta = self.schedule(step)
        if self.shaping == "reward":
            gap = torch.where(batch["completion_mask"], batch["reference_log_prob"] - batch["old_log_prob"], 0.0)
            gap = gap if self.most_log_ratio is None else gap.clamp(-self.most_log_ratio, self.most_log_ratio)
            rewards = rewards + beta * gap.sum(1)
        advantages = grouped_advantages(
            rewards.view(-1, group), scale=self.policy.scale, baseline=self.policy.baseline
        )
        if not self.reinforced or step < self.reward_from:
            advantages = torch.zeros_like(advantages)
        keep = kd_mask(batch["rewards"].view(-1, group) >= self.correct_from, mode=self.keep)
        return {
            **batch, "advantages": advantages.view(-1), "keep": keep.reshape(-1),
            "beta": rewards.new_full((len(rewards),), beta),
        }  # fmt: skip

    def count(self, batch: Batch) -> float:
        """Tokens."""
        return float(batch["completion_mask"].sum())

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss."""
        output = kdrl_loss(
            batch["reference_log_prob"], log_prob, batch["advantages"], batch["completion_mask"],
            beta=float(batch["beta"][0]) if self.shaping == "loss" else 0.0, kind=self.kind, keep=batch["keep"],
            old_log_prob=batch["old_log_prob"], clip_low=self.policy.clip_low, clip_high=self.policy.clip_high,
            credit=self.credit, most_log_ratio=self.most_log_ratio, count=count, kept_count=self._kept(batch, count),
        )  # fmt: skip
        metrics: Mapping[str, Tensor] = {
            "reward": batch["rewards"].float().mean(), "policy": output.policy, "distillation": output.distillation,
            "divergence": output.divergence, "kept": output.kept.float(), "beta": batch["beta"].float().mean(),
        }  # fmt: skip
        return output.loss, dict(metrics)

    def _kept(self, batch: Batch, count: Tensor | float) -> Tensor | float:
        """Tokens on which the teacher is heard in the whole accumulated batch, as this micro-batch lets one guess."""
        if self.keep == "none":
            return count
        mask = batch["completion_mask"].bool()
        heard = (mask & batch["keep"].bool().unsqueeze(1)).sum()
        return torch.clamp(heard * (count / mask.sum().clamp(min=1)), min=1.0)


