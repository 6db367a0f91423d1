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

from kullback.core.errors import ConfigError, ShapeError
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

    Raises ShapeError for numbers out of range or given twice.
    """

    inputs: Tensor
    labels: Tensor
    forget: Tensor

    def __post_init__(self) -> None:
        places = self.forget
        wrong = places.ndim != 1 or len(self.inputs) != len(self.labels) or len(places.unique()) != len(places)
        if wrong or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(self.labels)):
            raise ShapeError(f"forget has numbers of {len(self.labels)} training points, none twice, got {places}")

    @property
    def retain(self) -> Tensor:
        """The numbers of all other points."""
        kept = torch.ones(len(self.labels), dtype=torch.bool)
        kept[self.forget] = False
        return kept.nonzero().squeeze(1)


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
    if min(forget_multiplier, retain_multiplier) < 0 or targets.shape[-2] != len(problem.labels):
        shape = tuple(targets.shape)
        raise ShapeError(f"targets are [..., {len(problem.labels)}, C], one a training point, got {shape}")
    found = deepcopy(model)
    if not len(problem.forget):
        return found

    def match(points: Tensor) -> Tensor:
        given, wanted = found(problem.inputs[points]), targets[..., points, :].detach()
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
    """Outputs [..., k, C] with the shift that beta [n, k, C] predicts for leaving the points `forget` out."""
    return outputs - scale * beta[forget].sum(0).to(outputs.dtype)


def _cross_entropy(model: nn.Module, problem: ForgetProblem) -> Callable[[Tensor], Tensor]:
    """The mean over points, summed over the members of an ensemble."""

    def loss(points: Tensor) -> Tensor:
        logits = model(problem.inputs[points])
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
