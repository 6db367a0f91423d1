"""SinKD: the Sinkhorn distance between the teacher's and the student's outputs on a batch, as a distillation loss.

Batchwise, the n rows of either model are a cloud of points of weight 1/n each, and with P the entropic transport plan

    L_SD = n <P, C>,   C_ij = |softmax(s_i / tau) - softmax(t_j / tau)|_1 in [0, 2].

It sees how the rows lie to each other, which no sum over single rows does, but not which row belongs to which: a
permutation of the student's rows changes nothing, so it goes beside cross-entropy or KL, as in `SinkhornKD`.
Samplewise, it is the transport between the two distributions of each row, under a ground cost between classes.
Source: Cui et al. 2024 (arXiv 2402.17110); constants and conventions as in their released code.

Shapes: logits [..., V], rows of any leading shape: [b, V] or [B, T, V]; a mask [...] picks n of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.reduce import masked_mean, masked_sum
from kullback.divergences.pairwise import pairwise_cost
from kullback.divergences.sinkhorn import sinkhorn_cost, sinkhorn_divergence

__all__ = ["RELEASED", "ReleasedSetting", "SinkhornKD", "gather_rows", "sinkd_loss"]


def sinkd_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    tau: float | None = 2.0,
    eps: float = 0.1,
    n_iters: int = 20,
    mode: Literal["batchwise", "samplewise"] = "batchwise",
    estimator: Literal["sharp", "entropic", "debiased"] = "sharp",
    gradient: Literal["envelope", "unroll"] = "envelope",
    cost: Literal["l1", "l2", "squared", "cosine"] = "l1",
    ground: Tensor | None = None,
    mask: Tensor | None = None,
    limit: int | None = None,
    generator: torch.Generator | None = None,
    gather: bool = False,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """The Sinkhorn distance between teacher and student outputs [..., V]: a scalar, the sum or mean over rows.

    The teacher is a constant. tau: temperature of the softmax, or None for raw outputs (regression heads, or hidden
    states of one width). eps, n_iters, gradient, and estimator as mode: see `sinkhorn_cost`; "sharp" is the paper's,
    "debiased" alone is zero for equal clouds. Batchwise: cost between rows as in `pairwise_cost`; gather: over the rows
    of all processes, see `gather_rows`. Samplewise: ground [V, V], the cost between classes, by default 1 for any two.
    mask: the rows that count; limit: at most so many, drawn by generator (for language models, about 1024).
    Raises ShapeError for different vocabularies or fewer than two rows batchwise, DataError for NaN, else ConfigError.

    >>> teacher = 4 * torch.eye(3)
    >>> sinkd_loss(teacher, torch.zeros(3, 3)), sinkd_loss(teacher, teacher[[1, 2, 0]])
    (tensor(2.7219), tensor(1.0033e-05))
    """
    if tau is not None and not tau > 0.0:
        raise ConfigError(f"tau must be positive and is {tau}: None takes the outputs as they are")
    if reduction not in ("sum", "mean"):
        raise ConfigError(f'reduction is "sum" or "mean", not {reduction!r}')
    _check_pair(teacher_logits, student_logits, mask)
    chosen = _chosen_rows(student_logits, mask, limit, generator)
    teacher, student = (_widened(x.flatten(0, -2)[chosen]) for x in (teacher_logits.detach(), student_logits))
    transport: dict[str, Any] = {"eps": eps, "n_iters": n_iters, "mode": estimator, "gradient": gradient}
    if mode == "batchwise":
        if ground is not None:
            raise ConfigError('ground is a cost between classes, for mode="samplewise": batchwise takes cost')
        if tau is not None:
            teacher, student = torch.softmax(teacher / tau, dim=-1), torch.softmax(student / tau, dim=-1)
        if gather:
            teacher, student = gather_rows(teacher), gather_rows(student)
        value = _between_clouds(teacher, student, cost, transport)
        return value * len(student) if reduction == "sum" else value
    if mode != "samplewise":
        raise ConfigError(f'mode is "batchwise" or "samplewise", not {mode!r}')
    if tau is None or cost != "l1" or gather:
        raise ConfigError("samplewise compares the distributions of single rows: leave cost and gather out, set tau")
    log_p, log_q = torch.log_softmax(teacher / tau, dim=-1), torch.log_softmax(student / tau, dim=-1)
    values = sinkhorn_divergence(log_p, log_q, cost=ground, **transport)
    return masked_sum(values) if reduction == "sum" else masked_mean(values)


def _check_pair(teacher: Tensor, student: Tensor, mask: Tensor | None) -> None:
    if teacher.ndim < 2 or teacher.ndim != student.ndim:
        shapes = f"{tuple(teacher.shape)} for the teacher and {tuple(student.shape)} for the student"
        raise ShapeError(f"outputs have shape [b, V] or [B, T, V], the same for both models, got {shapes}")
    if teacher.shape[-1] != student.shape[-1]:
        raise ShapeError(
            f"teacher has {teacher.shape[-1]} classes or tokens, student {student.shape[-1]}: cut both to the shared "
            "vocabulary if one is padded, or choose a student with the teacher's tokenizer"
        )
    rows = tuple(student.shape[:-1])
    if teacher.shape != student.shape:
        raise ShapeError(f"teacher rows {tuple(teacher.shape[:-1])} and student rows {rows} must match")
    if mask is not None and mask.shape != rows:
        raise ShapeError(f"mask has shape {tuple(mask.shape)} and the rows {rows}: one entry a row")


def _chosen_rows(
    student: Tensor, mask: Tensor | None, limit: int | None, generator: torch.Generator | None
) -> Tensor | slice:
    """Which of the flattened rows count, so that no others are copied."""
    if mask is None and (limit is None or limit >= student.shape[:-1].numel()):
        return slice(None)
    kept = torch.ones(student.shape[:-1], device=student.device) if mask is None else mask
    chosen = kept.flatten().nonzero().squeeze(-1)
    if limit is None or limit >= len(chosen):
        return chosen
    if limit < 2 or generator is None:
        raise ConfigError("limit draws at least 2 rows and needs a generator: kullback.core.rng.generator(seed, name)")
    return chosen[torch.randperm(len(chosen), generator=generator, device=generator.device)[:limit].to(chosen.device)]


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _between_clouds(teacher: Tensor, student: Tensor, cost: str, transport: dict[str, Any]) -> Tensor:
    if len(student) < 2:
        raise ShapeError(
            f'a batch of {len(student)} rows is no cloud: batchwise needs two or more, or choose mode="samplewise"'
        )
    own = None
    if transport["mode"] == "debiased":
        own = pairwise_cost(student, student, cost), pairwise_cost(teacher, teacher, cost)
    # The student is the rows, so that the last scaling, that of the columns, is the teacher's, as in the released code.
    return sinkhorn_cost(pairwise_cost(student, teacher, cost), self_costs=own, **transport)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [n, D] of all processes in the order of their ranks; with a single process, the rows as they are.

    The rows of other processes are constants; the gradient of the own ones is multiplied by the number of processes,
    so that the average over processes that data-parallel training takes is the gradient of the loss on all rows.
    n may differ between processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    processes = distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(processes)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[-1])
    padded[: len(rows)] = rows.detach()
    shards = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(shards, padded)
    shards = [shard[:size] for shard, size in zip(shards, sizes)]
    shards[distributed.get_rank()] = rows.detach() + processes * (rows - rows.detach())
    return torch.cat(shards)


@dataclass(frozen=True, slots=True)
class ReleasedSetting:
    """What the authors released for one GLUE task: the loss's alpha and KD temperature, and how they trained."""

    alpha: float
    kd_temperature: float
    learning_rate: float
    epochs: int
    batch: int


RELEASED: Mapping[str, ReleasedSetting] = {
    "cola": ReleasedSetting(0.9, 1.0, 5e-5, 20, 16),
    "mnli": ReleasedSetting(0.8, 3.0, 4e-5, 10, 16),
    "mrpc": ReleasedSetting(1.0, 4.0, 3e-5, 3, 16),
    "qnli": ReleasedSetting(0.8, 3.0, 3e-5, 6, 16),
    "qqp": ReleasedSetting(1.0, 4.0, 4e-5, 8, 32),
    "rte": ReleasedSetting(0.9, 3.5, 2e-5, 5, 16),
    "sst2": ReleasedSetting(0.9, 2.0, 4e-5, 2, 32),
}


class SinkhornKD(nn.Module):
    """The paper's objective: (1 - alpha) cross-entropy + alpha distillation, means over rows, + weight L_SD, a sum.

    The distillation term is -sum softmax(t / T) log softmax(s / T) at T = kd_temperature, without a factor T^2.
    weight: 0.8 x 1e-3 in the released code. cross_entropy: its weight where it is not 1 - alpha (T0 models: alpha=0.1,
    cross_entropy=1). anneal: the number of epochs over which T goes linearly to 1, reached in the last.
    transport: `sinkd_loss` or a partial of it. Raises ConfigError for values out of range.

    >>> loss = SinkhornKD.released("rte")
    >>> terms = loss(2 * torch.eye(3), torch.zeros(3, 3), torch.arange(3))
    >>> [f"{name} {value:.4f}" for name, value in terms.items()]
    ['loss 1.0998', 'distillation 1.0986', 'sinkhorn 1.4567', 'cross_entropy 1.0986']
    """

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        kd_temperature: float = 2.0,
        weight: float = 8e-4,
        cross_entropy: float | None = None,
        anneal: int | None = None,
        transport: Callable[..., Tensor] = sinkd_loss,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"alpha is the share of distillation in [0, 1] and is {alpha}")
        if not kd_temperature > 0.0:
            raise ConfigError(f"kd_temperature must be positive and is {kd_temperature}")
        if anneal is not None and anneal < 2:
            raise ConfigError(f"anneal is the number of epochs, 2 or more, and is {anneal}: None keeps the temperature")
        self.alpha, self.kd_temperature, self.weight, self.anneal = alpha, kd_temperature, weight, anneal
        self.cross_entropy = 1.0 - alpha if cross_entropy is None else cross_entropy
        self.transport = transport

    @classmethod
    def released(cls, task: str, **options: Any) -> SinkhornKD:
        """The objective with the released constants of a GLUE task, a key of RELEASED; options go over them."""
        if task not in RELEASED:
            raise ConfigError(f"no constants were released for {task!r}: the tasks are {', '.join(RELEASED)}")
        setting = RELEASED[task]
        return cls(**{"alpha": setting.alpha, "kd_temperature": setting.kd_temperature, **options})

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, kd_temperature={self.kd_temperature}, weight={self.weight}, anneal={self.anneal}"

    def temperature(self, epoch: int | None = None) -> float:
        """The annealed temperature at an epoch, counted from 0; ConfigError for one that is missing or in vain."""
        if (epoch is None) != (self.anneal is None):
            raise ConfigError("an epoch and anneal go together: give both or neither")
        if epoch is None or self.anneal is None:
            return self.kd_temperature
        return self.kd_temperature + (1.0 - self.kd_temperature) * min(epoch / (self.anneal - 1), 1.0)

    def forward(
        self,
        teacher_logits: Tensor,
        student_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        epoch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The terms, unweighted, and their weighted sum "loss", from logits [..., V] and labels [...] (-100: left out).

        mask [...]: the rows that count; generator: for a transport with a limit.
        """
        temperature = self.temperature(epoch)
        if labels is not None:
            mask = (labels != -100) if mask is None else mask.bool() & (labels != -100)
        elif self.cross_entropy > 0.0:
            raise ConfigError("cross-entropy has a weight and there are no labels: pass labels, or alpha=1")
        teacher, student = _widened(teacher_logits.detach()), _widened(student_logits)
        soft = -(teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)
        terms = {"distillation": masked_mean(soft.sum(-1), mask)}
        terms["sinkhorn"] = self.transport(teacher, student, mask=mask, generator=generator)
        loss = self.alpha * terms["distillation"] + self.weight * terms["sinkhorn"]
        if labels is not None:
            chosen = labels.clamp(min=0).unsqueeze(-1)
            negative = -student.log_softmax(-1).gather(-1, chosen).squeeze(-1)
            terms["cross_entropy"] = masked_mean(negative, mask)
            loss = loss + self.cross_entropy * terms["cross_entropy"]
        return {"loss": loss, **terms}
