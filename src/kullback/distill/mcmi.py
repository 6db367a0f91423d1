"""Conditional mutual information of a classifier, and the loss that raises it in a teacher before distillation.

With P_i the output for sample i, y_i its class and Q_y the mean of P_i over class y (its centroid),

    I(X; Yhat | Y) = mean_i KL(P_i || Q_{y_i}) = mean_i H(Q_{y_i}) - mean_i H(P_i),

the spread of the outputs within the classes: 0 where each class is mapped to one vector. Maximum likelihood drives it
to 0; a teacher fine-tuned on CE - lam I(X; Yhat | Y) keeps what tells the samples of a class apart. Q_y minimises
sum_i KL(P_i || Q), so the gradient through an exactly computed centroid is zero, and taking it as a constant is exact.
Source: Ye et al. 2024 (arXiv 2401.08732); coefficients and optimiser as in their released code.

Shapes: n samples, C outputs, G groups to condition on (the classes, G = C, or clusters of tokens); nats throughout.
Labels and groups below 0 are left out.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kullback.core.errors import ConfigError, DataError, MissingExtra, ShapeError

__all__ = ["CMIMeter", "MCMITerms", "class_centroids", "effective_dimension", "empirical_cmi", "mcmi_loss"]

_FLOOR = 1e-12  # a centroid may be 0 where it was computed from other outputs than those it is compared with
_ENTRIES = 1 << 17  # outputs that a meter takes in at once on a processor
_NAN = "outputs are probabilities, and some are NaN: leave out the samples on which the model failed"
_NOT_FINITE = "logits are numbers or -inf, one above it in each row, and some are not: the model has diverged"
Bonus = Literal["cmi", "entropy", "smoothing", "separation"]


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_rows(outputs: Tensor, labels: Tensor, name: str = "labels") -> None:
    if outputs.ndim != 2:
        raise ShapeError(f"outputs have shape [n, C], one row a sample, got {tuple(outputs.shape)}: flatten them first")
    if labels.shape != outputs.shape[:1]:
        raise ShapeError(f"{name} have shape {tuple(labels.shape)} for {len(outputs)} samples: give one for each")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"{name} are whole numbers and came as {labels.dtype}: convert them with .long()")


def _check_range(labels: Tensor, count: int, name: str = "labels") -> None:
    if labels.numel() and int(labels.max()) >= count:
        raise DataError(f"{name} go up to {int(labels.max())} and there are {count} of them, counted from 0")


def class_centroids(
    probs: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    weights: Tensor | None = None,
    empty: Literal["nan", "uniform"] = "nan",
) -> Tensor:
    """The mean output of each class: probabilities [n, C] and labels [n] to [num_classes, C].

    weights [n]: of the samples, 1 by default. A class without samples becomes a row of NaN, with a warning, or the
    uniform distribution where empty="uniform". Differentiable. Raises ShapeError, or DataError for labels too large.

    >>> class_centroids(torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]]), torch.tensor([0, 0, 1]), 2)
    tensor([[0.6000, 0.4000],
            [0.1000, 0.9000]])
    """
    _check_rows(probs, labels)
    _check_range(labels, num_classes)
    if empty not in ("nan", "uniform"):
        raise ConfigError(f'empty is "nan" or "uniform", not {empty!r}')
    if weights is not None and (weights.shape != labels.shape or not bool((weights >= 0).all())):
        raise ShapeError(f"weights are {len(labels)} numbers from 0 on, got {tuple(weights.shape)}")
    probs, kept = _widened(probs), labels >= 0
    share = torch.ones_like(labels, dtype=probs.dtype) if weights is None else weights.to(probs.dtype)
    if not bool(kept.all()):
        probs, labels, share = probs[kept], labels[kept], share[kept]
    mass = probs.new_zeros(num_classes).index_add(0, labels, share)
    shares = probs if weights is None else share.unsqueeze(-1) * probs
    total = probs.new_zeros(num_classes, probs.shape[1]).index_add(0, labels, shares)
    if bool(total.isnan().any()):
        raise DataError(_NAN)
    missing = mass == 0
    if bool(missing.any()) and empty == "nan":
        warnings.warn(
            f"{int(missing.sum())} of {num_classes} classes have no sample, and their centroids are NaN", stacklevel=2
        )
    filler = torch.nan if empty == "nan" else 1.0 / probs.shape[1]
    return torch.where(missing.unsqueeze(-1), filler, total / mass.masked_fill(missing, 1.0).unsqueeze(-1))


def empirical_cmi(
    logits: Tensor,
    labels: Tensor,
    *,
    centroids: Tensor | None = None,
    temperature: float = 1.0,
    per_class: bool = False,
) -> Tensor:
    """I(X; Yhat | Y) of logits [n, C] and labels [n]: a scalar, or the mean over each group's samples [G], in nats.

    centroids [G, C]: fixed ones in place of those of these samples; the value is then an upper bound. A group without
    samples is NaN in [G]. Differentiable, through the centroids too where they are not given; `CMIMeter` has no
    gradient and takes a fraction of the time. Raises ShapeError, and DataError for NaN or without a sample.

    >>> empirical_cmi(torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log(), torch.tensor([0, 0]))
    tensor(0.3681)
    """
    _check_rows(logits, labels)
    _check_temperature(temperature)
    logits, labels = _counted(logits, labels)
    wide = _widened(logits)
    log_probs = torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)
    groups = len(centroids) if centroids is not None else max(int(labels.max()) + 1, logits.shape[1])
    if centroids is None:
        centroids = class_centroids(log_probs.exp(), labels, groups, empty="uniform")
    else:
        _used_centroids(centroids, logits, labels, centroids.dtype)
    spread = _divergence(log_probs, centroids.clamp(min=_FLOOR).log()[labels])
    if bool(spread.isnan().any()):
        raise DataError(_NOT_FINITE)
    if not per_class:
        return spread.mean()
    counts = torch.bincount(labels, minlength=groups)
    total = spread.new_zeros(groups).index_add(0, labels, spread)
    return total / counts.masked_fill(counts == 0, 1) + torch.where(counts == 0, torch.nan, 0.0)


def _counted(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose labels are not below 0, without a copy where that is all."""
    kept = labels >= 0
    if not bool(kept.any()):
        raise DataError("there is no sample to measure: labels below 0 are left out, and none is left")
    return (outputs, labels) if bool(kept.all()) else (outputs[kept], labels[kept])


def _check_temperature(temperature: float) -> None:
    if not temperature > 0.0:
        raise ConfigError(f"temperature must be positive and is {temperature}")


def _divergence(log_probs: Tensor, log_centroids: Tensor) -> Tensor:
    """KL(P || Q) of rows [n, C] to [n]; outputs that are exactly 0 count for nothing."""
    probs = log_probs.exp()
    return (probs * (log_probs.masked_fill(probs == 0, 0.0) - log_centroids)).sum(-1)


def effective_dimension(probs: Tensor, labels: Tensor) -> Tensor:
    """In how many directions outputs [n, C] spread within their classes: (tr S)^2 / tr S^2, a scalar in 1..C-1.

    S is the covariance around the class means, over all samples with labels from 0 on. NaN where nothing spreads.

    >>> effective_dimension(torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.5, 0.1], [0.3, 0.6, 0.1]]), torch.tensor([0, 0, 0]))
    tensor(1.0000)
    """
    _check_rows(probs, labels)
    probs, labels = _counted(_widened(probs), labels)
    if bool(probs.isnan().any()):
        raise DataError(_NAN)
    apart = probs - class_centroids(probs, labels, int(labels.max()) + 1, empty="uniform")[labels]
    covariance = apart.T @ apart
    return covariance.trace().square() / covariance.square().sum()


class MCMITerms(NamedTuple):
    """Scalars: the loss, ce_weight x CE - lam x bonus, and its parts; cmi is the bonus that was chosen."""

    loss: Tensor
    ce: Tensor
    cmi: Tensor


def mcmi_loss(
    logits: Tensor,
    labels: Tensor,
    centroids: Tensor,
    *,
    lam: float,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    bonus: Bonus = "cmi",
    smoothing: float = 0.1,
    groups: Tensor | None = None,
) -> MCMITerms:
    """The teacher's loss, ce_weight CE - lam mean_i KL(P_i || Q_{y_i}), from logits [b, C] and labels [b].

    centroids [G, C] are constants, at the same temperature. groups [b]: what is conditioned on, the labels by default.
    bonus: "entropy" raises mean H(P) in place of the information, "smoothing" lowers KL(P || smoothed label),
    "separation" raises the mean KL(P_i || P_j) over pairs of different groups; they are the controls of the authors.
    Raises ConfigError for lam < 0, which would draw the classes together, DataError for centroids that do not sum to 1.

    >>> centroids = torch.tensor([[0.6, 0.4], [0.2, 0.8]])
    >>> mcmi_loss(torch.zeros(2, 2), torch.tensor([0, 1]), centroids, lam=0.25).loss
    tensor(0.6627)
    """
    _check_rows(logits, labels)
    _check_temperature(temperature)
    if not 0.0 <= lam < math.inf:
        raise ConfigError(f"lam is 0 or more and is {lam}: the information is subtracted from the loss, so it rises")
    groups = labels if groups is None else groups
    _check_rows(logits, groups, "groups")
    _check_range(labels, logits.shape[1])
    wide = _widened(logits)
    if bonus == "cmi" and temperature == 1.0:
        used = _used_centroids(centroids, logits, groups, wide.dtype)
        ce, value = _Together.apply(wide, labels, groups, used)
        _check_terms(ce, value)
        return MCMITerms(ce_weight * ce - lam * value, ce, value)
    _used_centroids(centroids, logits, groups, centroids.dtype)
    kept = labels >= 0
    count = kept.sum().clamp(min=1)
    negative = -torch.log_softmax(wide, dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ce = torch.where(kept, negative, 0.0).sum() / count
    log_probs = torch.log_softmax(wide / temperature, dim=-1)
    kept = kept & (groups >= 0)
    if bonus == "separation":
        value = _separation(log_probs[kept], groups[kept])
    else:
        value = _bonus(log_probs[kept], labels[kept], groups[kept], centroids.detach().to(wide.dtype), bonus, smoothing)
        value = value.sum() / kept.sum().clamp(min=1)
    _check_terms(ce, value)
    return MCMITerms(ce_weight * ce - lam * value, ce, value)


def _check_terms(ce: Tensor, value: Tensor) -> None:
    if bool((ce + value).isnan()):
        raise DataError(_NOT_FINITE)


class _Together(torch.autograd.Function):
    """Cross-entropy and mean KL(P_i || Q_i) from one softmax of logits [b, C], with centroids Q [b, C] as constants.

    Gradients by logits: (P - e_y) / b and P (log(P / Q) - KL) / b. Q is overwritten.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, groups: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(logits, dim=-1)
        own = labels.clamp(min=0).unsqueeze(-1)
        negative = log_probs.gather(-1, own).squeeze(-1).neg_()
        probs = log_probs.exp()
        # an output that is 0 counts for nothing
        ratio = log_probs.clamp_(min=-1e30).sub_(used.clamp_(min=_FLOOR).log_())
        spread = torch.mul(probs, ratio, out=used).sum(-1)
        by_label = (labels >= 0).to(probs.dtype)
        by_group = by_label if groups is labels else by_label * (groups >= 0)
        by_label, by_group = (weight / weight.sum().clamp(min=1.0) for weight in (by_label, by_group))
        ctx.save_for_backward(probs, ratio, spread, own, by_label, by_group)
        negative, spread = (v.masked_fill(w == 0, 0.0) for v, w in ((negative, by_label), (spread, by_group)))
        return negative @ by_label, spread @ by_group

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_cmi: Tensor) -> tuple[Tensor | None, ...]:
        probs, ratio, spread, own, by_label, by_group = ctx.saved_tensors
        hard, soft = (grad_ce * by_label).unsqueeze(-1), (grad_cmi * by_group).unsqueeze(-1)
        gradient = torch.addcmul(hard - soft * spread.unsqueeze(-1), ratio, soft).mul_(probs)
        return gradient.scatter_add_(-1, own, -hard), None, None, None


def _used_centroids(centroids: Tensor, logits: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The centroid of each sample [b, C], a copy, after checks."""
    if centroids.ndim != 2 or centroids.shape[1] != logits.shape[1]:
        raise ShapeError(f"centroids have shape [G, {logits.shape[1]}], one row a class, got {tuple(centroids.shape)}")
    _check_range(groups, len(centroids), "groups")
    used = centroids.detach().index_select(0, groups.clamp(min=0)).to(dtype)
    if not bool(((used.sum(-1) - 1.0).abs() <= 1e-4).all() and (used >= 0.0).all()):
        raise DataError("centroids are distributions over the outputs, and one is negative or does not sum to 1")
    return used


def _bonus(
    log_probs: Tensor, labels: Tensor, groups: Tensor, centroids: Tensor, bonus: str, smoothing: float
) -> Tensor:
    if bonus == "cmi":
        return _divergence(log_probs, centroids.clamp(min=_FLOOR).log()[groups])
    if bonus == "entropy":
        return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)
    if bonus != "smoothing":
        raise ConfigError(f'bonus is "cmi", "entropy", "smoothing" or "separation", not {bonus!r}')
    if not 0.0 < smoothing < 1.0:
        raise ConfigError(f"smoothing is the mass off the label, between 0 and 1, and is {smoothing}")
    target = torch.full_like(log_probs, smoothing / (log_probs.shape[1] - 1))
    return -_divergence(log_probs, target.scatter(-1, labels.unsqueeze(-1), 1.0 - smoothing).clamp(min=_FLOOR).log())


def _separation(log_probs: Tensor, groups: Tensor) -> Tensor:
    """Mean of KL(P_i || P_j) over ordered pairs of different groups, 0 without any."""
    probs, bounded = log_probs.exp(), log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    pairs = (probs * bounded).sum(-1, keepdim=True) - probs @ bounded.T
    apart = groups.unsqueeze(-1) != groups
    return torch.where(apart, pairs, 0.0).sum() / apart.sum().clamp(min=1)


def _scratch(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what the meter makes of so many rows: log P, P, and either in double precision."""
    logits = _widened(logits[:0]).new_empty(logits.shape)
    precise = logits.dtype if logits.device.type == "mps" else torch.float64
    return logits, torch.empty_like(logits), torch.empty_like(logits, dtype=precise)


def _hits(log_probs: Tensor, labels: Tensor, chosen: Tensor) -> int:
    """In how many rows [n, C] the label [n, 1], whose log-probability is `chosen` [n, 1], comes first.

    Above 1/2 it does, below 1/C it cannot, and only rows in between are searched.
    """
    sure = chosen > -0.693
    doubtful = (~sure & (chosen >= -math.log(log_probs.shape[1]) - 1e-3)).squeeze(-1).nonzero().squeeze(-1)
    return int(sure.sum()) + int((log_probs[doubtful].argmax(-1, keepdim=True) == labels[doubtful]).sum())


def _numba() -> ModuleType | None:
    try:
        from kullback.distill import _mcmi_numba
    except ImportError:
        return None
    return _mcmi_numba


def _add(total: Tensor, groups: Tensor, values: Tensor) -> None:
    """Add values [n, ...] to the rows of their groups [n]; where they are on another device, summed there first."""
    if values.device != total.device:
        groups, values = torch.arange(len(total)), values.new_zeros(total.shape).index_add_(0, groups, values).to(total)
    total.index_add_(0, groups, values)


class CMIMeter:
    """I(X; Yhat | Y) over a stream of batches, in one pass and G x C numbers; meters of several processes add up.

    It keeps for each group the number of samples, the sum of P, and that of sum P log P, in float64: the value is that
    of all samples at once, to rounding. separation: keeps sums of log P too, for `separation` and `normalised`, at
    twice the memory. num_groups: G where what is conditioned on is not the class. compiled: None takes numba, where it
    is installed, for logits in single precision on a processor. Raises DataError for logits that are NaN, after which
    the meter is of no use.

    >>> meter = CMIMeter(2)
    >>> meter.update(torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log(), torch.tensor([0, 0])).cmi
    0.36806...
    """

    def __init__(
        self, num_classes: int, *, num_groups: int | None = None, temperature: float = 1.0, separation: bool = False,
        compiled: bool | None = None,
    ) -> None:  # fmt: skip
        groups = num_classes if num_groups is None else num_groups
        if num_classes < 2 or groups < 1:
            raise ConfigError(f"a meter needs 2 or more outputs and a group, got {num_classes} and {groups}")
        _check_temperature(temperature)
        self.temperature = temperature
        self.count = torch.zeros(groups, dtype=torch.float64)
        self.negative_entropy = torch.zeros(groups, dtype=torch.float64)
        self.probs = torch.zeros(groups, num_classes, dtype=torch.float64)
        self.log_probs = torch.zeros_like(self.probs) if separation else None
        self.correct, self.cross_entropy = 0.0, 0.0
        self._loops = None if compiled is False else _numba()
        if compiled and self._loops is None:
            raise MissingExtra("numba", extra="numba")

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, groups: Tensor | None = None) -> CMIMeter:
        """Take in logits [n, C] and labels [n]; groups [n] where they are not the labels. Returns itself."""
        _check_rows(logits, labels)
        if logits.shape[1] != self.probs.shape[1]:
            raise ShapeError(f"the meter is for {self.probs.shape[1]} outputs and got {logits.shape[1]}")
        groups = labels if groups is None else groups
        if groups is not labels:
            _check_rows(logits, groups, "groups")
        _check_range(labels, logits.shape[1])
        kept = labels >= 0 if groups is labels else (labels >= 0) & (groups >= 0)
        if not bool(kept.all()):
            logits, labels, groups = logits[kept], labels[kept], groups[kept]
        if groups is not labels or len(self.count) < logits.shape[1]:
            _check_range(groups, len(self.count), "groups")
        self.count += torch.bincount(groups, minlength=len(self.count)).to(self.count)
        single = _widened(logits[:0]).dtype == torch.float32
        if self._loops is not None and logits.device.type == "cpu" and single and len(logits):
            self._take_compiled(self._loops, logits.float(), labels, groups)
            return self
        rows = max(1, _ENTRIES // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
        scratch = _scratch(logits[:rows])
        for part in zip(logits.split(rows), labels.split(rows), groups.split(rows)):
            self._take(*part, scratch)
        return self

    def _take_compiled(self, loops: ModuleType, logits: Tensor, labels: Tensor, groups: Tensor) -> None:
        log_probs = np.empty((0, 0)) if self.log_probs is None else self.log_probs.numpy()
        rows = (x.numpy() for x in (logits, labels.long(), groups.long()))
        sums = (self.probs.numpy(), log_probs, self.negative_entropy.numpy())
        hits, cross_entropy, wrong = loops.take(*rows, np.float32(1.0 / self.temperature), *sums)
        if wrong >= 0:
            raise DataError(_NOT_FINITE)
        self.correct, self.cross_entropy = self.correct + hits, self.cross_entropy + cross_entropy

    def _take(self, logits: Tensor, labels: Tensor, groups: Tensor, scratch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add a few rows, whose outputs stay in the caches from one sum to the next."""
        log_probs, probs, wide = (buffer[: len(logits)] for buffer in scratch)
        logits = logits.to(log_probs.dtype)
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        torch.log_softmax(logits, -1, out=log_probs)
        torch.exp(log_probs, out=probs)
        own = labels.unsqueeze(-1)
        chosen = log_probs.gather(-1, own)
        _add(self.probs, groups, wide.copy_(probs))
        entropies = probs.mul_(log_probs).sum(-1)
        if bool(entropies.isnan().any()):  # where outputs are exactly 0
            entropies = (log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1)
            if bool(entropies.isnan().any()):
                raise DataError(_NOT_FINITE)
        _add(self.negative_entropy, groups, entropies.to(wide.dtype))
        if self.log_probs is not None:
            _add(self.log_probs, groups, wide.copy_(log_probs))
        self.cross_entropy -= float(chosen.sum(dtype=wide.dtype))
        self.correct += _hits(log_probs, own, chosen)

    def merge(self, other: CMIMeter) -> CMIMeter:
        """Take in what another meter of the same kind has seen, as of another process; returns itself."""
        if other.probs.shape != self.probs.shape or (other.log_probs is None) != (self.log_probs is None):
            raise ShapeError(f"meters of one kind add up, got {tuple(self.probs.shape)} and {tuple(other.probs.shape)}")
        if other.temperature != self.temperature:
            raise ConfigError(f"meters at temperatures {self.temperature} and {other.temperature} do not add up")
        self.count += other.count
        self.probs += other.probs
        self.negative_entropy += other.negative_entropy
        if self.log_probs is not None and other.log_probs is not None:
            self.log_probs += other.log_probs
        self.correct, self.cross_entropy = self.correct + other.correct, self.cross_entropy + other.cross_entropy
        return self

    def all_reduce(self) -> CMIMeter:
        """Add up the meters of all processes, G x C numbers once; a single process keeps its own. Returns itself."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            place = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            scalars = torch.tensor([self.correct, self.cross_entropy], dtype=torch.float64)
            for part in (self.count, self.probs, self.negative_entropy, self.log_probs, scalars):
                if part is not None:
                    total = part.to(place)
                    torch.distributed.all_reduce(total)
                    part.copy_(total)
            self.correct, self.cross_entropy = scalars.tolist()
        return self

    @property
    def samples(self) -> float:
        """How many samples came; DataError while there is none."""
        if not (total := float(self.count.sum())):
            raise DataError("the meter has seen no sample: call update first")
        return total

    def centroids(self, *, empty: Literal["nan", "uniform"] = "uniform") -> Tensor:
        """The mean outputs [G, C], float64; a group that was not seen is uniform, or NaN."""
        filler = torch.nan if empty == "nan" else 1.0 / self.probs.shape[1]
        mean = self.probs / self.count.clamp(min=1.0).unsqueeze(-1)
        return torch.where((self.count == 0).unsqueeze(-1), filler, mean)

    @property
    def per_class(self) -> Tensor:
        """The mean of KL(P || Q) over the samples of each group [G], NaN for one that was not seen."""
        mean = self.centroids()
        entropy = -torch.special.xlogy(mean, mean).sum(-1)
        spread = (entropy + self.negative_entropy / self.count.clamp(min=1.0)).clamp(min=0.0)
        return spread.masked_fill(self.count == 0, torch.nan)

    @property
    def cmi(self) -> float:
        """I(X; Yhat | Y) of all samples, in nats."""
        return float((self.count * self.per_class.nan_to_num(nan=0.0)).sum() / self.samples)

    @property
    def accuracy(self) -> float:
        """The share of samples whose largest output is the label."""
        return self.correct / self.samples

    @property
    def mean_cross_entropy(self) -> float:
        """Mean of -log P(y) at the meter's temperature, in nats."""
        return self.cross_entropy / self.samples

    @property
    def separation(self) -> float:
        """Mean of -sum P_i log P_j over ordered pairs of samples of different groups, in nats."""
        if self.log_probs is None:
            raise ConfigError("this meter keeps no sums of log P: make it with separation=True")
        pairs = self.samples**2 - float(self.count.square().sum())
        if not pairs:
            raise DataError("separation compares samples of different groups, and only one group was seen")
        everything = (self.probs.sum(0) * self.log_probs.sum(0)).sum()
        within = (self.probs * self.log_probs).sum()
        return float(within - everything) / pairs

    @property
    def normalised(self) -> float:
        """I(X; Yhat | Y) over `separation`: the spread within the classes in units of that between them."""
        return self.cmi / self.separation
