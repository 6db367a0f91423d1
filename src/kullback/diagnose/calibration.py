"""Calibration: whether a classifier that says 80% is right in 80% of such cases.

The expected calibration error groups n samples by confidence into M bins and compares what is said with what is true:

    ECE = sum_m (n_m / n) |accuracy_m - confidence_m|,

over bins of equal width, ((m-1)/M, m/M], with 0 in the first (Naeini et al. 2015), or of equal mass (adaptive ECE,
Nixon et al. 2019). It is biased upwards where bins hold few samples: report n and M with it.

Shapes: probabilities [..., C] with integer labels [...], or confidences [...] with booleans [...], whether right.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "ReliabilityBins", "adaptive_ece", "brier", "classwise_ece", "ece", "fit_temperature", "mce", "nll", "reliability",
]  # fmt: skip


class ReliabilityBins(NamedTuple):
    """A reliability diagram, float64 [M]: samples, mean confidence and accuracy of each bin, 0 where it is empty."""

    samples: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = 15, equal_mass: bool = False) -> ReliabilityBins:
    """The bins by confidence in the predicted class; equal_mass: of as many samples each, equal ones in given order.

    Raises DataError for NaN, for probabilities outside [0, 1] or that do not sum to 1, for labels out of range and for
    no samples at all; ShapeError for shapes that do not match; ConfigError for fewer than one bin.

    >>> reliability(torch.tensor([0.9, 0.9, 0.6]), torch.tensor([True, False, True]), bins=2).samples
    tensor([0., 3.], dtype=torch.float64)
    """
    confidence, correct = _confidence(probabilities, labels)
    return _binned(confidence, correct, _places(confidence, bins, equal_mass), bins)


def _binned(confidence: Tensor, correct: Tensor, places: Tensor, bins: int) -> ReliabilityBins:
    count = torch.bincount(places, minlength=bins).double()
    sums = [torch.bincount(places, weights=x.double(), minlength=bins) for x in (confidence, correct)]
    return ReliabilityBins(count, *(total / count.clamp(min=1) for total in sums))


def _places(confidence: Tensor, bins: int, equal_mass: bool) -> Tensor:
    """The bin of each sample."""
    if bins < 1:
        raise ConfigError(f"a reliability diagram has at least one bin, got {bins}")
    if not equal_mass:
        edges = torch.arange(1, bins, device=confidence.device, dtype=torch.float64) / bins
        return torch.bucketize(confidence.contiguous(), edges.to(confidence.dtype))
    rank = torch.empty_like(confidence, dtype=torch.long)
    rank[confidence.argsort(stable=True)] = torch.arange(len(confidence), device=confidence.device)
    return rank * bins // len(confidence)


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat confidences and whether the prediction was right."""
    if labels.dtype == torch.bool and labels.shape == probabilities.shape:
        confidence = probabilities.detach().flatten()
        _check_range(confidence)
        return _wide(confidence), labels.flatten()
    flat, own = _rows(probabilities, labels)
    confidence, predicted = flat.max(-1)
    return confidence, predicted == own


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_range(probabilities: Tensor) -> None:
    if probabilities.numel() == 0:
        raise DataError("calibration is measured on samples and there are none")
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):  # NaN is neither
        raise DataError("probabilities lie in [0, 1], and one is outside or NaN: give softmax(logits), not logits")


def _rows(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, C] in at least float32, and their labels [n]."""
    if probabilities.ndim < 1 or labels.shape != probabilities.shape[:-1]:
        raise ShapeError(
            f"probabilities [..., C] have labels [...], got {tuple(probabilities.shape)} and {tuple(labels.shape)}; "
            "confidences [...] go with booleans [...]"
        )
    probabilities = _wide(probabilities.detach()).reshape(-1, probabilities.shape[-1])
    _check_range(probabilities)
    if not bool(((probabilities.sum(-1) - 1.0).abs() < 1e-2).all()):
        raise DataError("the probabilities of a sample sum to 1, and some do not: give softmax(logits)")
    return probabilities, _labels(labels, probabilities.shape[-1])


def _labels(labels: Tensor, classes: int) -> Tensor:
    labels = labels.flatten()
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < classes)).all()):
        raise DataError(f"labels are integers from 0 to {classes - 1}")
    return labels.long()


def _gap(found: ReliabilityBins, norm: str) -> float:
    gaps, shares = (found.accuracy - found.confidence).abs(), found.samples / found.samples.sum()
    if norm == "l1":
        return (shares * gaps).sum().item()
    if norm == "l2":
        return (shares * gaps.square()).sum().sqrt().item()
    if norm == "max":
        return gaps.max().item()
    raise ConfigError(f'norm is "l1", "l2" or "max", not {norm!r}')


def ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15, norm: Literal["l1", "l2", "max"] = "l1") -> float:
    """The expected calibration error in [0, 1] over bins of equal width; norm: of the gaps, "max" is `mce`.

    Raises as `reliability` does.

    >>> round(ece(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([True, False, True, False])), 6)
    0.25
    """
    return _gap(reliability(probabilities, labels, bins=bins), norm)


def adaptive_ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """The expected calibration error over bins that hold as many samples each."""
    return _gap(reliability(probabilities, labels, bins=bins, equal_mass=True), "l1")


def mce(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """The largest gap between accuracy and confidence of any bin; one sample can make it."""
    return ece(probabilities, labels, bins=bins, norm="max")


def classwise_ece(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """The mean over classes of the calibration error of each class's own probability, predicted or not."""
    rows, own = _rows(probabilities, labels)
    errors = []
    for index, column in enumerate(rows.T):
        errors.append(_gap(_binned(column, own == index, _places(column, bins, False), bins), "l1"))
    return sum(errors) / len(errors)


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """The Brier score, the mean over samples of sum_c (p_c - [c is the label])^2, in [0, 2]."""
    rows, own = _rows(probabilities, labels)
    return (rows.double() - torch.nn.functional.one_hot(own, rows.shape[-1])).square().sum(-1).mean().item()


def nll(logits: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood of the labels in nats, from logits [..., C] or log-probabilities."""
    return _of_temperature(*_logit_rows(logits, labels), 1.0)[0]


def _logit_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
        raise ShapeError(f"logits [..., C] have labels [...], got {tuple(logits.shape)} and {tuple(labels.shape)}")
    rows = logits.detach().double().reshape(-1, logits.shape[-1])
    if rows.numel() == 0 or bool(rows.isnan().any()):
        raise DataError("calibration is measured on logits of samples, and there are none or one is NaN")
    return rows, _labels(labels, rows.shape[-1])


def _of_temperature(rows: Tensor, own: Tensor, inverse: float) -> tuple[float, float, float]:
    """The mean negative log-likelihood of softmax(inverse * rows), and its two derivatives by inverse."""
    log_p = torch.log_softmax(inverse * rows, -1)
    finite = rows.masked_fill(torch.isneginf(rows), 0.0)  # whose probability is 0
    p, chosen = log_p.exp(), own.unsqueeze(-1)
    mean = (p * finite).sum(-1)
    slope = mean - rows.gather(-1, chosen).squeeze(-1)
    curvature = (p * finite.square()).sum(-1) - mean.square()
    value = -log_p.gather(-1, chosen).squeeze(-1)
    return value.mean().item(), slope.mean().item(), curvature.mean().item()


def fit_temperature(logits: Tensor, labels: Tensor, *, lowest: float = 1e-2, highest: float = 1e2) -> float:
    """The temperature T in [lowest, highest] at which softmax(logits / T) has the least negative log-likelihood.

    Fit it on data that was not trained on (Guo et al. 2017). The likelihood is concave in 1/T, so Newton's steps
    between shrinking bounds find the only maximum; on samples that are all right it is at lowest.

    >>> logits = torch.tensor([[4.0, 0.0]]).repeat(4, 1)
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 6) == round(4 / float(torch.tensor(3.0).log()), 6)
    True
    """
    if not 0.0 < lowest < highest:
        raise ConfigError(f"temperatures are searched from lowest to highest, both positive: got {lowest}, {highest}")
    rows, own = _logit_rows(logits, labels)
    low, high = 1.0 / highest, 1.0 / lowest
    if _of_temperature(rows, own, high)[1] <= 0.0:
        return lowest
    if _of_temperature(rows, own, low)[1] >= 0.0:
        return highest
    inverse = min(max(1.0, low), high)
    for _ in range(100):
        _, slope, curvature = _of_temperature(rows, own, inverse)
        low, high = (inverse, high) if slope < 0.0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0.0 else low
        following = step if low < step < high else 0.5 * (low + high)
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1.0 / inverse
