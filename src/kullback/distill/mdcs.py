"""MDCS: experts that are made to differ by their logit adjustment, each distilled from its own weakly augmented view.

With counts n_c, prior pi_c = n_c / sum n, and plain logits v_k of expert k for a weak and a strong view of each sample:

    a_k = v_k + lam_k log pi                                       (training only; v_k are averaged for predictions)
    loss = sum_k [ CE(a_k, y), mean over both views + alpha ramp T^2 mean KL(p_k || q_k) ],
    p_k = softmax(a_k(weak) / T),   q_k = softmax(a_k(strong) / T).

lam_k = 0 is plain cross-entropy, 1 the balanced softmax; below 0 an expert leans to frequent classes, above 1 to rare
ones, since what is added in training the network makes up for. The KL is over the samples that the weak view gets right
(confident instance sampling), its first argument a constant. The optimum of CE is v_k = log P(c|x) - lam_k log pi_c.
Source: Zhao et al. 2023 (arXiv 2308.09922); lam, alpha and ramp as in the released code for CIFAR-100-LT.

Shapes: logits [E, ..., C], labels [...], counts [C]; a result a number per expert is [E]. Labels [E, ...] are for
experts that see samples of their own, as those of several models side by side do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import kl

__all__ = ["LAM", "MDCSLoss", "combine_experts", "diversity_logits", "mdcs_loss"]

LAM = (-0.5, 1.0, 2.5)  # of the released code: for frequent, all, and rare classes
Selection = Literal["correct", "confident", "none"]
Direction = Literal["weak_to_strong", "symmetric"]
TeacherOf = Literal["own", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """The options of `mdcs_loss`."""

    lam: tuple[float, ...] = LAM
    alpha: float = 0.6
    temperature: float = 1.0
    selection: Selection = "correct"
    threshold: float | None = None
    direction: Direction = "weak_to_strong"
    teacher: TeacherOf = "own"

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("selection", self.selection, Selection),
            ("direction", self.direction, Direction),
            ("teacher", self.teacher, TeacherOf),
        ):
            if value not in get_args(kind):
                raise ConfigError(f"{name} is one of {', '.join(get_args(kind))}, not {value!r}")
        if not self.lam or not all(math.isfinite(strength) for strength in self.lam):
            raise ConfigError(f"lam has a finite strength for each expert, got {self.lam}")
        if not 0.0 <= self.alpha < math.inf or not 0.0 < self.temperature < math.inf:
            raise ConfigError(
                f"alpha is finite and at least 0, and a temperature positive: got {self.alpha} and {self.temperature}"
            )
        if (self.selection == "confident") != (self.threshold is not None):
            raise ConfigError('selection="confident" and threshold go together: the least largest probability')
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold is a probability, got {self.threshold}")


def _strengths(lam: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(strength) for strength in lam)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lam is a sequence of numbers, one for each expert, got {lam!r}") from error


def _log_prior(class_counts: Tensor | Sequence[float], min_count: float | None) -> Tensor:
    """log pi [C] in at least float32; only differences matter, so counts and shares give the same loss."""
    class_counts = torch.as_tensor(class_counts)
    counts = class_counts.detach().to(torch.promote_types(class_counts.dtype, torch.float32))
    if counts.ndim != 1 or len(counts) == 0:
        raise ShapeError(f"class_counts holds one number for each class, [C], got {tuple(class_counts.shape)}")
    if bool((counts < 0).any()):
        raise DataError(f"a class has a negative count, {counts.min().item():g}: counts are numbers of samples")
    if min_count is not None:
        counts = counts.clamp(min=min_count)
    if not bool(((counts > 0) & counts.isfinite()).all()):
        raise DataError(
            "class counts are positive numbers: a class that was never seen has no prior, so leave it out or give "
            "min_count=1"
        )
    return (counts / counts.sum()).log()


def diversity_logits(
    logits: Tensor,
    class_counts: Tensor | Sequence[float],
    lam: Sequence[float] = LAM,
    *,
    min_count: float | None = None,
) -> Tensor:
    """The logits that cross-entropy and distillation see in training: logits [E, ..., C] + lam_k log pi.

    class_counts [C]: samples of each class, or their shares; min_count: what a smaller count is taken for.
    Raises ShapeError where E, C and the lengths of lam and class_counts differ, DataError for counts not positive.

    >>> adjusted = diversity_logits(torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([100.0, 10.0, 1.0]), lam=[1.0])
    >>> adjusted.softmax(-1)
    tensor([[0.9396, 0.0570, 0.0035]])
    """
    return _adjusted(logits, _shift(_strengths(lam), _log_prior(class_counts, min_count)))


def _shift(lam: tuple[float, ...], log_prior: Tensor) -> Tensor:
    """lam_k log pi, [E, C]."""
    return torch.tensor(lam, dtype=log_prior.dtype, device=log_prior.device).unsqueeze(-1) * log_prior


def _adjusted(logits: Tensor, shift: Tensor) -> Tensor:
    experts, classes = shift.shape
    if logits.ndim < 2 or logits.shape[0] != experts or logits.shape[-1] != classes:
        raise ShapeError(
            f"logits [E, ..., C] have one expert for each of the {experts} entries of lam and {classes} classes, got "
            f"{tuple(logits.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide + shift.to(wide).view(experts, *[1] * (logits.ndim - 2), classes)


def combine_experts(logits: Tensor, how: Literal["mean", "confidence"] = "mean") -> Tensor:
    """One prediction [..., C] from plain logits [E, ..., C], to which no prior is added.

    "mean" is the paper's. "confidence" weighs the experts of each sample by their largest probability (an extension).

    >>> combine_experts(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([1.0000, 0.5000])
    """
    if logits.ndim < 2:
        raise ShapeError(f"logits are [E, ..., C], experts first, got {tuple(logits.shape)}")
    if how == "mean":
        return logits.mean(0)
    if how != "confidence":
        raise ConfigError(f'how is "mean" or "confidence", not {how!r}')
    confidence = logits.softmax(-1).amax(-1, keepdim=True)
    return (logits * (confidence / confidence.sum(0))).sum(0)


def mdcs_loss(
    logits_weak: Tensor,
    logits_strong: Tensor,
    labels: Tensor,
    class_counts: Tensor | Sequence[float],
    *,
    lam: Sequence[float] = LAM,
    alpha: float = 0.6,
    temperature: float = 1.0,
    ramp: float = 1.0,
    selection: Selection = "correct",
    threshold: float | None = None,
    direction: Direction = "weak_to_strong",
    teacher: TeacherOf = "own",
    teacher_logits: Tensor | None = None,
    min_count: float | None = None,
) -> dict[str, Tensor]:
    """The loss of E experts on two views of a batch: "loss", and of each expert "cross_entropy", "consistency", "kept".

    logits_weak, logits_strong [E, ..., C]: plain logits; labels [...] or [E, ...], -100 is left out. ramp in [0, 1]
    multiplies alpha. selection: distil where the teacher is "correct", where it is "confident" with a largest
    probability of at least threshold, or everywhere; "kept" is the number of such samples, and their mean is 0 where
    there are none. direction: "symmetric" is the mean of both. teacher: each expert its "own", or the "mean" of the
    experts' adjusted distributions for all; teacher_logits [E, ..., C]: plain logits of the weak view from elsewhere,
    such as an average of the weights over time. Raises ShapeError, ConfigError, and DataError for labels or counts out
    of range.

    >>> views = torch.tensor([[[1.0, 0.5, 0.0]]]), torch.tensor([[[0.5, 0.5, 0.0]]])
    >>> terms = mdcs_loss(*views, torch.tensor([0]), torch.tensor([100, 10, 1]), lam=[1.0])
    >>> {name: round(value.item(), 4) for name, value in terms.items()}
    {'loss': 0.0865, 'cross_entropy': 0.0816, 'consistency': 0.0082, 'kept': 1.0}
    """
    settings = _Settings(
        lam=_strengths(lam), alpha=alpha, temperature=temperature, selection=selection, threshold=threshold,
        direction=direction, teacher=teacher,
    )  # fmt: skip
    if not 0.0 <= ramp <= 1.0:
        raise ConfigError(f"ramp is the share of alpha that is reached, in [0, 1], and is {ramp}")
    shift = _shift(settings.lam, _log_prior(class_counts, min_count))
    return _loss(logits_weak, logits_strong, labels, shift, settings, alpha * ramp, teacher_logits)


def _loss(
    weak: Tensor,
    strong: Tensor,
    labels: Tensor,
    shift: Tensor,
    settings: _Settings,
    weight: float | Tensor,
    teacher_logits: Tensor | None,
) -> dict[str, Tensor]:
    _check(weak, strong, labels, teacher_logits)
    adjusted = [_adjusted(logits, shift) for logits in (weak, strong)]
    views = [logits.log_softmax(-1) for logits in adjusted]
    labels = labels.long().expand(weak.shape[:-1])
    counted = labels != -100
    chosen = labels.clamp(min=0).unsqueeze(-1)
    hard = [view.gather(-1, chosen).squeeze(-1) for view in views]
    cross_entropy = _means(-0.5 * (hard[0] + hard[1]), counted)
    teacher, log_teacher = adjusted[0].detach(), views[0].detach()
    if teacher_logits is not None:
        teacher = _adjusted(teacher_logits.detach(), shift)
        log_teacher = teacher.log_softmax(-1)
    active = isinstance(weight, Tensor) or weight > 0.0
    # without weight the term is measured all the same, and builds no graph
    with torch.set_grad_enabled(torch.is_grad_enabled() and active):
        consistency, kept = _one_way(teacher, log_teacher, adjusted[1], views[1], labels, counted, settings)
        if settings.direction == "symmetric":
            back = adjusted[1].detach(), views[1].detach(), adjusted[0], views[0]
            consistency = (consistency + _one_way(*back, labels, counted, settings)[0]) / 2
    loss = cross_entropy.sum()
    loss = loss + weight * consistency.sum() if active else loss
    return {"loss": loss, "cross_entropy": cross_entropy, "consistency": consistency, "kept": kept}


def _check(weak: Tensor, strong: Tensor, labels: Tensor, teacher: Tensor | None) -> None:
    for name, other in (("strong", strong), ("teacher", teacher)):
        if other is not None and other.shape != weak.shape:
            raise ShapeError(
                f"the weak view's logits have shape {tuple(weak.shape)} and the {name}'s {tuple(other.shape)}: give "
                "the same experts, samples and classes"
            )
    if weak.ndim < 2 or labels.shape not in (weak.shape[1:-1], weak.shape[:-1]):
        raise ShapeError(f"logits [E, ..., C] have labels [...]: got {tuple(weak.shape)} and {tuple(labels.shape)}")
    if labels.numel() == 0:
        raise DataError("the batch is empty: give at least one sample")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"labels are whole numbers of classes, got {labels.dtype}: convert them with .long()")
    if torch.compiler.is_compiling():
        return  # what follows looks at values, which a compiled graph cannot branch on
    wrong = (labels != -100) & ((labels < 0) | (labels >= weak.shape[-1]))
    if bool(wrong.any()):
        raise DataError(f"labels are classes from 0 to {weak.shape[-1] - 1}, or -100; one is {int(labels[wrong][0])}")


def _one_way(
    teacher: Tensor,
    log_teacher: Tensor,
    student: Tensor,
    log_student: Tensor,
    labels: Tensor,
    counted: Tensor,
    settings: _Settings,
) -> tuple[Tensor, Tensor]:
    """T^2 KL(teacher || student) from adjusted logits and their log_softmax: its mean over the samples kept, and how
    many these are, both [E]; the teacher is a constant.
    """
    temperature = settings.temperature
    log_p = log_teacher if temperature == 1.0 else (teacher / temperature).log_softmax(-1)
    if settings.teacher == "mean":
        log_teacher, log_p = _mean(log_teacher), _mean(log_p)
    kept = counted
    if settings.selection == "correct":
        own = log_teacher.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kept = kept & (own >= log_teacher.amax(-1))  # no class is likelier; several times as fast as argmax
    elif settings.threshold is not None:
        kept = kept & (log_teacher.amax(-1) >= math.log(max(settings.threshold, 1e-38)))
    log_q = log_student if temperature == 1.0 else (student / temperature).log_softmax(-1)
    values = kl(log_p, log_q)
    return temperature**2 * _means(values, kept), kept.flatten(1).sum(1).to(values.dtype)


def _means(values: Tensor, kept: Tensor) -> Tensor:
    """The mean of each expert [E] over the samples that it keeps, 0 where there are none; all [E, ...]."""
    total = torch.where(kept, values, 0.0).flatten(1).sum(1)
    return total / kept.flatten(1).sum(1).clamp(min=1)


def _mean(log_p: Tensor) -> Tensor:
    """The logarithm of the experts' mean distribution, for each of them."""
    return (log_p.logsumexp(0) - math.log(len(log_p))).expand_as(log_p)


class MDCSLoss(nn.Module):
    """`mdcs_loss` with its class counts as a buffer and alpha reached over warm_epochs: set_epoch(e) before each epoch.

    The counts are those of the whole training set, over all processes; which samples are distilled is decided in each.
    Options go to `mdcs_loss`. Raises as it does. Under torch.compile it is one graph for all epochs, and does not tell
    labels out of range from others.

    >>> loss = MDCSLoss(torch.tensor([100, 10, 1]))
    >>> loss.ramp
    0.0
    >>> loss.set_epoch(10)
    >>> round(loss.alpha * loss.ramp, 12)
    0.3
    """

    log_prior: Tensor
    strength: Tensor
    weight: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[float],
        *,
        warm_epochs: float = 20,
        min_count: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not warm_epochs >= 0:
            raise ConfigError(f"warm_epochs counts epochs and is {warm_epochs}: 0 starts with the whole alpha")
        unknown = set(options) - set(_Settings.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"mdcs_loss has no option {min(unknown)!r} here: it has {', '.join(_Settings.__dataclass_fields__)}"
            )
        if "lam" in options:
            options["lam"] = _strengths(options["lam"])
        self.settings, self.warm_epochs, self.epoch = _Settings(**options), warm_epochs, 0.0
        log_prior = _log_prior(class_counts, min_count)
        self.register_buffer("log_prior", log_prior)
        strength = torch.tensor(self.settings.lam, dtype=log_prior.dtype, device=log_prior.device)
        self.register_buffer("strength", strength.unsqueeze(-1), persistent=False)
        self.register_buffer("weight", torch.tensor(self.alpha * self.ramp), persistent=False)

    @property
    def alpha(self) -> float:
        """The weight of the consistency term at the end of the ramp."""
        return self.settings.alpha

    @property
    def ramp(self) -> float:
        """The share of alpha in force, min(epoch / warm_epochs, 1)."""
        return min(self.epoch / self.warm_epochs, 1.0) if self.warm_epochs else 1.0

    def set_epoch(self, epoch: float) -> None:
        """Tell the epoch, counted from 0; fractions are fine."""
        if not 0 <= epoch < math.inf:
            raise ConfigError(f"epochs are counted from 0, got {epoch}")
        self.epoch = float(epoch)
        self.weight.fill_(self.alpha * self.ramp)

    def extra_repr(self) -> str:
        return f"classes={len(self.log_prior)}, lam={self.settings.lam}, alpha={self.alpha}, ramp={self.ramp:g}"

    def forward(
        self, logits_weak: Tensor, logits_strong: Tensor, labels: Tensor, *, teacher_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of `mdcs_loss` at this epoch."""
        # compiled, alpha times the ramp is an input: as a number it would be a constant of the graph
        weight = self.weight if torch.compiler.is_compiling() else self.alpha * self.ramp
        shift = self.strength * self.log_prior  # which a state that is loaded replaces
        return _loss(logits_weak, logits_strong, labels, shift, self.settings, weight, teacher_logits)
