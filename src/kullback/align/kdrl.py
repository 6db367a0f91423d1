r"""KDRL: one policy gradient for a verifiable reward and for the reverse KL to a teacher, on the student's own samples.

    R_t = log teacher(y_t) - log pi(y_t)        L = -GRPO + beta D,   D the masked mean over tokens of

| kind      | value         | gradient in the mean                                                    |
|-----------|---------------|-------------------------------------------------------------------------|
| k2        | R^2 / 2       | that of KL(pi, teacher) at each token; the paper's choice               |
| k3        | e^R - 1 - R   | that of KL(teacher, pi), weighted by an unbounded ratio                  |
| k1_reward | -R            | none as a loss: -R is a reward, added to the advantage after the groups  |

`reverse_kl_top_k` is D without sampling a token: KL_t = KL(pi, teacher) of the laws after the same prefix, over the
whole vocabulary or over the K likeliest tokens. Its gradient is exact given the prefixes, which are still drawn. With
credit "token" these are fixed: the gradient is the mean of grad KL_t over the prefixes visited, and leaves out that of
the path, what a token does to later prefixes. With credit "return_to_go" grad log pi(y_t) counts that too, by the sum
of KL_u over u > t (in k2 by that of -R_u over u >= t): then k2 and the whole vocabulary have the gradient of the KL of
whole completions.

Shapes: P prompts, G completions, B = P G rows, T tokens, V vocabulary; mask [B, T]; nats. Source: arXiv 2506.02208.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.compared import RowDivergence
from kullback.align.grpo import Grpo
from kullback.align.methods import Batch
from kullback.align.policy_gradient import clipped_policy_loss, grouped_advantages, reduce_tokens
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl_sampled, reverse_kl

__all__ = [
    "BetaSchedule",
    "KDRLOutput",
    "Kdrl",
    "exact_kd_terms",
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


def exact_kd_terms(
    divergences: Tensor,
    log_student: Tensor,
    *,
    credit: Literal["token", "return_to_go"] = "token",
    ratio: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The teacher's term of each token [B, T] from divergences [B, T] of next-token laws, with their gradient.

    "return_to_go" adds that of the path, from log_student [B, T] of the drawn tokens, and keeps the value. ratio: see
    `kd_terms`, in front of the path's part; mask: the tokens that exist. Raises ConfigError.

    >>> divergences, log_student = torch.tensor([[0.2, 0.3, 0.5]]), torch.zeros(1, 3, requires_grad=True)
    >>> terms = exact_kd_terms(divergences, log_student, credit="return_to_go")
    >>> terms.detach(), torch.autograd.grad(terms.sum(), log_student)[0]
    (tensor([[0.2000, 0.3000, 0.5000]]), tensor([[0.8000, 0.5000, 0.0000]]))
    """
    if credit not in ("token", "return_to_go"):
        raise ConfigError(f"credit is token or return_to_go, not {credit!r}")
    held = torch.ones_like(divergences, dtype=torch.bool) if mask is None else mask.bool()
    terms = torch.where(held, divergences, 0.0)
    if credit == "token":
        return terms
    seen, log_prob = terms.detach(), torch.where(held, log_student, 0.0)
    later = seen.flip(-1).cumsum(-1).flip(-1) - seen
    later = later if ratio is None else later * ratio
    return terms + later * (log_prob - log_prob.detach())


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
    """loss, and its parts without a gradient: policy (GRPO's), distillation (D), divergence (the mean of -R), kept (the
    share of tokens on which the teacher is heard), ratio (the mean of student over the policy that sampled)."""

    loss: Tensor
    policy: Tensor
    distillation: Tensor
    divergence: Tensor
    kept: Tensor
    ratio: Tensor


def kdrl_loss(
    log_teacher: Tensor | None,
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
    divergences: Tensor | None = None,
) -> KDRLOutput:
    """The loss of a batch of the student's completions: log-probabilities and mask [B, T], advantages [B].

    keep [B] or [B, T]: completions or tokens on which the teacher is heard (see `kd_mask`); its mean is over their
    tokens. old_log_prob: of the policy that sampled, where several steps are taken; the clip is on the reward's part,
    and the teacher's carries the ratio, at most 2. most_log_ratio: R is cut to at most this in size, for tokens that
    the teacher finds all but impossible. count and kept_count: tokens that the two sums are divided by. divergences
    [B, T]: of next-token laws (`reverse_kl_top_k`), in place of log_teacher, kind and most_log_ratio. Both parts are
    token means. Raises ConfigError.
    """
    held = mask.bool()
    student = torch.where(held, log_student, 0.0)
    old = student.detach() if old_log_prob is None else torch.where(held, old_log_prob, 0.0)
    heard = held if keep is None else held & (keep.bool() if keep.ndim == 2 else keep.bool().unsqueeze(1))
    ratio = None if old_log_prob is None else (student.detach() - old).exp().clamp(max=_MOST_RATIO)
    bonus, later = advantages, held if credit != "token" else None
    if divergences is not None:
        if kind != "k2" or most_log_ratio is not None:
            raise ConfigError("kind and most_log_ratio are of sampled tokens: with divergences leave them out")
        terms = exact_kd_terms(divergences, student, credit=credit, ratio=ratio, mask=held)
        gap = divergences.detach()
    elif log_teacher is None:
        raise ConfigError("the teacher's log-probabilities are missing, and so are divergences from it: give one")
    else:
        teacher = _teacher(torch.where(held, log_teacher, 0.0), student.detach(), most_log_ratio)
        terms = kd_terms(teacher, student, kind=kind, credit=credit, ratio=ratio, mask=later)
        gap = (student - teacher).detach()
        if kind == "k1_reward":
            bonus = advantages.unsqueeze(1) - beta * torch.where(heard, gap, 0.0)
    policy = clipped_policy_loss(student, old, bonus, mask, clip_low=clip_low, clip_high=clip_high, count=count)
    distillation = reduce_tokens(terms, heard, "token-mean", count=kept_count)
    loss = policy if kind == "k1_reward" else policy + beta * distillation
    said = (gap, (student.detach() - old).exp())
    divergence, mean_ratio = (reduce_tokens(part, held, "token-mean") for part in said)
    share = heard.sum() / held.sum().clamp(min=1)
    return KDRLOutput(loss, policy.detach(), distillation.detach(), divergence, share, mean_ratio)


def _teacher(log_teacher: Tensor, log_student: Tensor, most: float | None) -> Tensor:
    """The teacher's log-probabilities no further than `most` from the student's."""
    if most is None:
        return log_teacher
    if not most > 0.0:
        raise ConfigError(f"most_log_ratio is positive, or None for no limit, got {most}")
    return log_student + (log_teacher - log_student).clamp(-most, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kdrl:
    """KDRL as a method of the room: the trainer's reference is the teacher.

    schedule: the teacher's weight at an optimiser step; kind, credit, keep: as in the module. divergence "sampled" is
    the paper's, of the drawn tokens alone; "exact" and "top-k" compare the laws of all tokens or of the top_k likeliest
    (see `reverse_kl_top_k`; support, tail), for which the teacher is at hand and costs its head once more backward.
    shaping "loss" is the paper's; "reward" puts beta R of the whole completion into its reward before the groups are
    normalised, which the paper found worse. reinforced: False leaves the reward's part out, for distillation on the
    student's own samples alone (KD-RKL); reward_from: the step from which it counts, so that with a schedule that
    switches to 0 there the student is distilled first and reinforced then. most_log_ratio: see `kdrl_loss`. unheard:
    tokens on which the teacher is not heard, such as an end token that is not its own. policy: the options of the
    reward's part, with its steps a batch, without a penalty of its own. correct_over: a larger reward counts as right.
    """

    schedule: BetaSchedule = field(default_factory=BetaSchedule)
    kind: Kind = "k2"
    credit: Literal["token", "return_to_go"] = "token"
    divergence: Literal["sampled", "exact", "top-k"] = "sampled"
    top_k: int | None = None
    support: Literal["student", "teacher"] = "student"
    tail: Literal["bucket", "renormalise"] = "bucket"
    keep: Keep = "none"
    shaping: Literal["loss", "reward"] = "loss"
    reinforced: bool = True
    reward_from: int = 0
    most_log_ratio: float | None = None
    unheard: tuple[int, ...] = ()
    policy: Grpo = field(default_factory=Grpo)
    correct_over: float = 0.5
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
        self._check_divergence()

    def _check_divergence(self) -> None:
        if self.divergence not in ("sampled", "exact", "top-k"):
            raise ConfigError(f"divergence is sampled, exact or top-k, not {self.divergence!r}")
        if (self.divergence == "top-k") != (self.top_k is not None):
            raise ConfigError(
                f"top_k is the number of tokens that divergence top-k compares, got {self.top_k} for {self.divergence}"
            )
        if self.divergence != "top-k" and (self.support, self.tail) != ("student", "bucket"):
            raise ConfigError(f"support and tail belong to divergence top-k, not to {self.divergence}")
        if self.top_k is not None:
            zeros = torch.zeros(1, max(self.top_k, 0) + 1)
            reverse_kl_top_k(zeros, zeros, kept=self.top_k, support=self.support, tail=self.tail)
        sampled = self.kind != "k2" or self.shaping == "reward" or self.most_log_ratio is not None
        if self.divergence != "sampled" and sampled:
            raise ConfigError(
                f"kind, shaping and most_log_ratio are of sampled tokens, and divergence is {self.divergence}: leave "
                "them out"
            )

    @property
    def epochs(self) -> int:
        """How often the same completions are gone through."""
        return self.policy.epochs

    @property
    def mini_batches(self) -> int:
        """In how many parts each time."""
        return self.policy.mini_batches

    @property
    def compares(self) -> RowDivergence | None:
        """The divergence of next-token laws from logits (teacher's, student's), None where drawn tokens do."""
        return None if self.divergence == "sampled" else self._compare

    def _compare(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        if self.unheard:  # the laws of what is no such token
            absent = torch.tensor(self.unheard, device=student_logits.device)
            teacher_logits = teacher_logits.index_fill(-1, absent, -math.inf)
            student_logits = student_logits.index_fill(-1, absent, -math.inf)
        kept = None if self.top_k is None else min(self.top_k, student_logits.shape[-1])
        return reverse_kl_top_k(teacher_logits, student_logits, kept=kept, support=self.support, tail=self.tail)

    def prepare(self, batch: dict[str, Any], *, group: int, generator: torch.Generator) -> dict[str, Any]:
        """Adds advantages [B] and heard [B, T], and what `settle` does. DataError where no token counts."""
        rewards, mask, step = batch["rewards"], batch["completion_mask"].bool(), int(batch.get("step", 0))
        if not mask.any():
            raise DataError("no completion of the batch has a token that counts: there is nothing to learn from")
        heard = mask & kd_mask(rewards.view(-1, group) > self.correct_over, mode=self.keep).reshape(-1, 1)
        if self.unheard:
            said = batch["input_ids"][:, -mask.shape[1] :]
            heard = heard & ~torch.isin(said, torch.tensor(self.unheard, device=said.device))
        if self.shaping == "reward":
            gap = torch.where(heard, batch["reference_log_prob"] - batch["old_log_prob"], 0.0)
            gap = gap if self.most_log_ratio is None else gap.clamp(-self.most_log_ratio, self.most_log_ratio)
            rewards = rewards + self.schedule(step) * gap.sum(1)
        advantages = grouped_advantages(
            rewards.view(-1, group), scale=self.policy.scale, baseline=self.policy.baseline
        )
        found = {"advantages": advantages.view(-1), "heard": heard}
        return self.settle([{**batch, **found}], step=step, total=lambda counts: counts)[0]

    def settle(
        self, batches: Sequence[dict[str, Any]], *, step: int, total: Callable[[Tensor], Tensor]
    ) -> list[dict[str, Any]]:
        """The micro-batches of an optimiser step with its beta [B], whether rewards count, reinforced [B], and
        heard_share [], of the whole step's tokens those on which the teacher is heard, so that its mean is over those
        of all micro-batches and processes; total: the sum over processes."""
        counts = sum(
            torch.stack([batch["heard"].sum(), batch["completion_mask"].bool().sum()]).double() for batch in batches
        )
        heard, held = total(counts)  # type: ignore[arg-type]
        share, beta = heard / held.clamp(min=1.0), self.schedule(step)
        counts_now = self.reinforced and step >= self.reward_from
        return [
            {
                **batch, "heard_share": share, "beta": torch.full_like(batch["advantages"], beta),
                "reinforced": torch.full_like(batch["advantages"], float(counts_now)),
            }
            for batch in batches
        ]  # fmt: skip

    def count(self, batch: Batch) -> float:
        """Tokens."""
        return float(batch["completion_mask"].sum())

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss."""
        exact = self.divergence != "sampled"
        output = kdrl_loss(
            None if exact else batch["reference_log_prob"], log_prob, batch["advantages"] * batch["reinforced"],
            batch["completion_mask"],
            beta=float(batch["beta"][0]) if self.shaping == "loss" else 0.0, kind=self.kind, keep=batch["heard"],
            old_log_prob=batch["old_log_prob"], clip_low=self.policy.clip_low, clip_high=self.policy.clip_high,
            credit=self.credit, most_log_ratio=self.most_log_ratio, count=count,
            kept_count=(count * batch["heard_share"]).clamp(min=1.0),
            divergences=batch["teacher_divergence"] if exact else None,
        )  # fmt: skip
        metrics: Mapping[str, Tensor] = {
            "reward": batch["rewards"].float().mean(), "policy": output.policy, "distillation": output.distillation,
            "divergence": output.divergence, "kept": output.kept.float(), "beta": batch["beta"].float().mean(),
            "ratio": output.ratio,
        }  # fmt: skip
        return output.loss, dict(metrics)
