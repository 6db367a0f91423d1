r"""Unlearning: a model fine-tuned to the outputs of one that never saw the forget set, and the older ways beside it.

    matching     min mean_x |f(x) - target(x)|^2 over the forget set F and a fresh random part of the retained data R;
                 targets of a retrained model (oracle matching) or predicted by attribution (datamodel matching)
    direct       no fine-tuning: the predicted shift is added to the outputs
    descent      the loss of R; ascent: minus that of F; both: the two in turn (gda)
    SCRUB        KL to the original model: away from it on F at temperature 4 in the first epochs, near it on R

All take a module from inputs [n, D] to logits [..., n, C], leading dimensions for an ensemble whose members are
unlearned side by side, work on a copy of it, and return the copy; optimizer is "adam", "adamw" or "sgd", without
momentum, each with PyTorch's other settings. At the oracle the matching loss of every point is 0, so that plain descent
with a constant step arrives there without noise. Source: arXiv 2410.23232; SCRUB 2302.09880.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import from_logits, kl

__all__ = [
    "ForgetProblem",
    "Optimizer",
    "datamodel_direct",
    "datamodel_matching",
    "gradient_ascent",
    "gradient_descent",
    "gradient_descent_ascent",
    "scrub",
]

Optimizer = Literal["adam", "adamw", "sgd"]
_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True, slots=True)
class ForgetProblem:
    """The training data, inputs [n, D] and labels [n], and the numbers [f] of what is to be forgotten.

    Raises ShapeError for numbers out of range or given twice, ConfigError where nothing is left, DataError for NaN.
    """

    inputs: Tensor
    labels: Tensor
    forget: Tensor

    def __post_init__(self) -> None:
        labels = self.labels
        if labels.ndim != 1 or labels.is_floating_point() or len(self.inputs) != len(labels):
            shapes = f"{tuple(self.inputs.shape)} and {tuple(labels.shape)} of {labels.dtype}"
            raise ShapeError(f"inputs are [n, ...] and labels [n] whole numbers, one a point, got {shapes}")
        if self.inputs.is_floating_point() and not bool(self.inputs.isfinite().all()):
            raise DataError("inputs are finite numbers, and some are not: leave out or repair these training points")
        _check_places(self.forget, len(labels))
        if len(self.forget) == len(labels):
            raise ConfigError("the forget set is all of the training data and nothing is left to retain: train anew")

    @property
    def retain(self) -> Tensor:
        """The numbers of all other points."""
        kept = torch.ones(len(self.labels), dtype=torch.bool)
        kept[self.forget] = False
        return kept.nonzero().squeeze(1)


def _check_places(places: Tensor, count: int) -> None:
    wrong = not isinstance(places, Tensor) or places.ndim != 1 or places.dtype not in (torch.int64, torch.int32)
    if wrong or len(places.unique()) != len(places) or (len(places) and not 0 <= places.min() <= places.max() < count):
        raise ShapeError(f"forget has numbers of {count} training points from 0 on, none twice, got {places}")


def datamodel_matching(
    model: nn.Module,
    problem: ForgetProblem,
    targets: Tensor,
    *,
    generator: torch.Generator,
    epochs: int = 4,
    learning_rate: float = 1e-4,
    batch_size: int = 512,
    forget_multiplier: int = 5,
    retain_multiplier: int = 20,
    optimizer: Optimizer = "adam",
    loss: Literal["mse", "kl"] = "mse",
) -> nn.Module:
    """Fine-tune a copy to targets [..., n, C] of all training points; with those of a retrained model, oracle matching.

    An epoch has the forget set `forget_multiplier` times, and retain_multiplier times as many points of R, drawn anew.
    loss "kl" matches the softmax of the targets. An empty forget set leaves the model as it is. Raises ConfigError,
    ShapeError.
    """
    if loss not in ("mse", "kl"):
        raise ConfigError(f"loss is mse or kl, not {loss!r}")
    if min(forget_multiplier, retain_multiplier) < 0 or forget_multiplier + retain_multiplier == 0:
        given = f"{forget_multiplier} and {retain_multiplier}"
        raise ConfigError(f"forget_multiplier and retain_multiplier are 0 or more and one of them is more, got {given}")
    if targets.ndim < 2 or targets.shape[-2] != len(problem.labels):
        shape = tuple(targets.shape)
        raise ShapeError(f"targets are [..., {len(problem.labels)}, C], one a training point, got {shape}")
    if bool(targets.isnan().any()):
        raise DataError("targets are NaN: a model that they were made from has diverged, leave it out")
    found = deepcopy(model)
    if not len(problem.forget):
        return found

    def match(points: Tensor) -> Tensor:
        given, wanted = found(problem.inputs[points]), targets[..., points, :].detach()
        if given.shape[-1] != wanted.shape[-1] or given.ndim < wanted.ndim:
            shapes = f"{tuple(wanted.shape)} and {tuple(given.shape)}"
            raise ShapeError(f"targets are [..., n, C] as the model's outputs are, got {shapes} for a batch")
        if loss == "kl":
            return from_logits(kl, wanted, given).mean(-1).sum()
        return (given - wanted).square().mean((-2, -1)).sum()

    order = _rehearsed(problem, forget_multiplier, retain_multiplier, generator)
    return _train(found, match, order, epochs, learning_rate, batch_size, optimizer)


def _rehearsed(
    problem: ForgetProblem, forget: int, retain: int, generator: torch.Generator
) -> Callable[[], Tensor]:
    """An epoch's points in random order."""

    def epoch() -> Tensor:
        others = problem.retain
        some = others[torch.randperm(len(others), generator=generator)][: retain * len(problem.forget)]
        points = torch.cat([problem.forget.repeat(forget), some])
        return points[torch.randperm(len(points), generator=generator)]

    return epoch


def _train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], epoch: Callable[[], Tensor], epochs: int, rate: float,
    size: int, optimizer: Optimizer,
) -> nn.Module:  # fmt: skip
    if epochs < 0 or size < 1 or not rate >= 0.0:
        raise ConfigError(f"epochs and learning_rate are 0 or more, batch_size 1 or more, got {epochs}, {rate}, {size}")
    if optimizer not in _OPTIMIZERS:
        raise ConfigError(f"optimizer is one of {', '.join(_OPTIMIZERS)}, not {optimizer!r}")
    stepper = _OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    for _ in range(epochs):
        for points in _batches(epoch(), size):
            stepper.zero_grad()
            loss(points).backward()  # type: ignore[no-untyped-call]
            stepper.step()
    return model


def _batches(points: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(points), size):
        yield points[start : start + size]


def datamodel_direct(outputs: Tensor, beta: Tensor, forget: Tensor, *, scale: float = 1.0) -> Tensor:
    """Outputs [..., k, C] with the shift that beta [n, k, C] predicts for leaving the points `forget` out.

    Raises ShapeError, also for numbers out of range or given twice, DataError for NaN.
    """
    _check_places(forget, len(beta))
    if beta.ndim != 3 or outputs.shape[-2:] != beta.shape[1:]:
        raise ShapeError(f"outputs are [..., k, C] and beta [n, k, C], got {tuple(outputs.shape)}, {tuple(beta.shape)}")
    if bool(beta[forget].isnan().any()):
        raise DataError("beta is NaN for points to be forgotten: fit it anew without models that have diverged")
    return outputs - scale * beta[forget].sum(0).to(outputs.dtype)


def _cross_entropy(model: nn.Module, problem: ForgetProblem) -> Callable[[Tensor], Tensor]:
    """The mean over points, summed over the members of an ensemble."""

    def loss(points: Tensor) -> Tensor:
        logits = model(problem.inputs[points])
        if len(points) and not 0 <= problem.labels[points].min() <= problem.labels[points].max() < logits.shape[-1]:
            raise DataError(f"labels are from 0 to {logits.shape[-1] - 1}, as the model has outputs, and one is not")
        labels = problem.labels[points].expand(logits.shape[:-1])
        each = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return each.view(labels.shape).mean(-1).sum()

    return loss


def _shuffled(points: Tensor, generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: points[torch.randperm(len(points), generator=generator)]


def gradient_descent(
    model: nn.Module, problem: ForgetProblem, *, generator: torch.Generator, epochs: int = 3,
    learning_rate: float = 1e-4, batch_size: int = 512, optimizer: Optimizer = "adam",
) -> nn.Module:  # fmt: skip
    """Fine-tune a copy on the retained data alone."""
    found = deepcopy(model)
    order = _shuffled(problem.retain, generator)
    return _train(found, _cross_entropy(found, problem), order, epochs, learning_rate, batch_size, optimizer)


def gradient_ascent(
    model: nn.Module, problem: ForgetProblem, *, generator: torch.Generator, epochs: int = 3,
    learning_rate: float = 1e-6, batch_size: int = 512, optimizer: Optimizer = "adam",
) -> nn.Module:  # fmt: skip
    """Raise the loss of the forget set in a copy; it has no place to stop."""
    found = deepcopy(model)
    rise = _cross_entropy(found, problem)
    order = _shuffled(problem.forget, generator)
    return _train(found, lambda points: -rise(points), order, epochs, learning_rate, batch_size, optimizer)


def gradient_descent_ascent(
    model: nn.Module, problem: ForgetProblem, *, generator: torch.Generator, epochs: int = 3,
    learning_rate: float = 1e-4, batch_size: int = 512, optimizer: Optimizer = "adam", ascent: float = 0.1,
) -> nn.Module:  # fmt: skip
    """Descent on the retained data, with `ascent` times the loss of the forget set taken off in every step."""
    if not ascent >= 0.0:
        raise ConfigError(f"ascent is the weight of the forget set's loss, 0 or more, got {ascent}")
    found = deepcopy(model)
    cross_entropy = _cross_entropy(found, problem)

    def loss(points: Tensor) -> Tensor:
        return cross_entropy(points) - ascent * cross_entropy(problem.forget)

    return _train(found, loss, _shuffled(problem.retain, generator), epochs, learning_rate, batch_size, optimizer)


def scrub(
    model: nn.Module,
    problem: ForgetProblem,
    *,
    generator: torch.Generator,
    epochs: int = 5,
    forget_epochs: int = 3,
    learning_rate: float = 5e-4,
    batch_size: int = 512,
    optimizer: Optimizer = "adam",
    temperature: float = 4.0,
    label_share: float = 0.99,
    near_share: float = 0.1,
) -> nn.Module:
    """Away from the original model on the forget set in the first epochs, and always near it on the rest.

    Each of the first forget_epochs climbs T^2 KL(original, model) on F; every epoch descends label_share cross-entropy
    and near_share of that KL on R.
    """
    if min(epochs, forget_epochs) < 0 or not temperature > 0.0:
        given = f"{epochs}, {forget_epochs} and {temperature}"
        raise ConfigError(f"epochs and forget_epochs are 0 or more and temperature is positive, got {given}")
    found, teacher = deepcopy(model), deepcopy(model).requires_grad_(False)
    cross_entropy = _cross_entropy(found, problem)

    def apart(points: Tensor) -> Tensor:
        inputs = problem.inputs[points]
        gap = from_logits(kl, teacher(inputs), found(inputs), temperature)
        return temperature**2 * gap.mean(-1).sum()

    options: tuple[Any, ...] = (learning_rate, batch_size, optimizer)
    for epoch in range(epochs):
        if epoch < forget_epochs:
            _train(found, lambda points: -apart(points), _shuffled(problem.forget, generator), 1, *options)
        _train(
            found, lambda points: label_share * cross_entropy(points) + near_share * apart(points),
            _shuffled(problem.retain, generator), 1, *options,
        )  # fmt: skip
    return found
