"""MDCS for rows of features: three experts on a shared layer, trained on two noisy views of every row.

Shapes: n rows of d features, C classes, E experts, M classifiers that are trained side by side.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.core.rng import generator as stream
from kullback.distill._averages import WeightAverage
from kullback.distill.mdcs import LAM, MDCSLoss
from kullback.models.experts import CosineHead, ExpertLinear, MultiExpert

__all__ = ["MDCSClassifier", "fit_together", "strong_noise", "weak_noise"]

Augment = Callable[[Tensor, torch.Generator], Tensor]


def weak_noise(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows [b, d] with normal noise of deviation 0.05."""
    return rows + 0.05 * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)


def strong_noise(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows [b, d] with normal noise of deviation 0.25, and then 15% of the entries set to 0."""
    noisy = rows + 0.25 * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    return noisy * (torch.rand(rows.shape, generator=generator) >= 0.15)


class MDCSClassifier:
    """A classifier of long-tailed labels in scikit-learn's manner: fit, predict, predict_proba, score, get_params.

    lam: a strength for each expert; alpha, warm_epochs and options: of the loss, see `MDCSLoss`; hidden, width: units
    of the shared layer and of each expert's own; scale: of the cosine heads, above the largest lam times
    log(imbalance). augment_weak, augment_strong: (rows [b, d], generator) to rows; the default ones are for features of
    about unit size. teacher_decay, in [0, 1): of the moving average of the weights over the steps, which then reads the
    weak view in place of the weights; None for these. Trained by SGD with Nesterov momentum and a learning rate that
    falls to 0 as a cosine. All random numbers come from seed.
    After fit: model_, classes_, counts_ and history_, a mapping of the loss's terms for each epoch.

    >>> x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    >>> x = x + 3 * torch.nn.functional.one_hot(y, 4)
    >>> MDCSClassifier(epochs=10, hidden=8, width=8, batch=16).fit(x, y).score(x, y) > 0.8
    True
    """

    model_: MultiExpert
    classes_: np.ndarray[Any, Any]
    counts_: Tensor
    history_: list[dict[str, list[float]]]

    def __init__(
        self,
        *,
        lam: Sequence[float] = LAM,
        alpha: float = 0.6,
        warm_epochs: float = 20,
        options: dict[str, Any] | None = None,
        hidden: int = 64,
        width: int = 32,
        scale: float = 16.0,
        augment_weak: Augment = weak_noise,
        augment_strong: Augment = strong_noise,
        teacher_decay: float | None = None,
        epochs: int = 40,
        batch: int = 64,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        self.lam, self.alpha, self.warm_epochs, self.options = lam, alpha, warm_epochs, options
        self.hidden, self.width, self.scale = hidden, width, scale
        self.augment_weak, self.augment_strong = augment_weak, augment_strong
        self.teacher_decay = teacher_decay
        self.epochs, self.batch, self.learning_rate = epochs, batch, learning_rate
        self.momentum, self.weight_decay, self.seed = momentum, weight_decay, seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters as they were given; deep has no effect."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set some parameters; raises ConfigError for an unknown name."""
        for name, value in parameters.items():
            if name not in inspect.signature(type(self)).parameters:
                raise ConfigError(f"MDCSClassifier has no parameter {name!r}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier", target_tags=TargetTags(required=True), input_tags=InputTags(),
            classifier_tags=ClassifierTags(),
        )  # fmt: skip

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows X [n, d] with labels y [n] of any kind; two classes or more."""
        fit_together([self], X, y)
        return self

    def _network(self, features: int, classes: int) -> MultiExpert:
        draw, experts = stream(self.seed, "network"), len(self.lam)
        stem = nn.Sequential(_SharedLinear(features, self.hidden, draw), nn.ReLU())
        branches = nn.Sequential(ExpertLinear(experts, self.hidden, self.width, generator=draw), nn.ReLU())
        heads = CosineHead(self.width, classes, experts=experts, scale=self.scale, generator=draw)
        return MultiExpert(stem, branches, heads)

    @torch.no_grad()
    def expert_logits(self, X: Any) -> Tensor:
        """The plain logits [E, n, C] of every expert."""
        if not hasattr(self, "model_"):
            raise NotFitted("MDCSClassifier is not fitted: call fit first")
        rows = _rows(X)
        inside = self.model_.stem[0].weight.shape[1]  # type: ignore[index]
        if rows.shape[1] != inside:
            raise ShapeError(f"X has {rows.shape[1]} features and fit saw {inside}: give the same ones")
        return self.model_(rows)["logits"]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n, C] from the mean of the experts' logits, in the order of classes_."""
        return self.expert_logits(X).mean(0).softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        places = self.expert_logits(X).mean(0).argmax(-1).numpy()
        return self.classes_[places]

    def score(self, X: Any, y: Any) -> float:
        """The share of rows whose class is predicted."""
        predicted = self.predict(X)
        return float((predicted == _labels(y, len(predicted))).mean())


def fit_together(members: Sequence[MDCSClassifier], X: Any, y: Any) -> None:
    """Train M classifiers on rows X [n, d] and labels y [n] at once, each as its own `fit` would, to rounding.

    One batched product serves all, so that twenty small ones take a few times as long as one does. They may differ in
    lam, alpha, seed and augmentations, and are alike in all else: ConfigError where they are not, and for several of
    them with teacher="mean", which would mix them.
    """
    rows = _rows(X)
    labels = _labels(y, len(rows))
    classes, inverse = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError("a classifier needs two classes or more in y")
    _check_alike(members)
    own = torch.from_numpy(inverse)
    counts = torch.bincount(own, minlength=len(classes))
    for member in members:
        member.classes_, member.counts_ = classes, counts
        member.model_ = member._network(rows.shape[1], len(classes))
        member.history_ = []
    lam = tuple(strength for member in members for strength in member.lam)
    largest = max(member.alpha for member in members)
    options = {"lam": lam, "alpha": largest, **(members[0].options or {})}
    _train(members, rows, own, MDCSLoss(counts, warm_epochs=members[0].warm_epochs, **options))


def _check_alike(members: Sequence[MDCSClassifier]) -> None:
    if not members:
        raise ConfigError("there is no classifier to train: give one or more")
    first = members[0]
    for name in ("epochs", "batch", "hidden", "width"):
        value = getattr(first, name)
        if value != int(value) or value < 1:
            raise ConfigError(f"epochs, batch, hidden and width are whole numbers of at least 1, and {name} is {value}")
    if not 0.0 < first.learning_rate < math.inf or not 0.0 <= first.momentum < 1.0 or not first.weight_decay >= 0.0:
        raise ConfigError(
            "learning_rate is positive, momentum in [0, 1) and weight_decay at least 0, got "
            f"{first.learning_rate}, {first.momentum} and {first.weight_decay}"
        )
    twice = {"lam", "alpha"} & set(first.options or {})
    if twice:
        raise ConfigError(f"{min(twice)} is a parameter of its own here: give it there and not in options")
    own = {"lam", "alpha", "seed", "augment_weak", "augment_strong"}
    for member in members[1:]:
        given = first.get_params()
        unlike = [name for name, value in member.get_params().items() if name not in own and value != given[name]]
        if unlike or len(member.lam) != len(first.lam):
            name = unlike[0] if unlike else "number of experts"
            raise ConfigError(f"classifiers that are trained together have one {name}: fit these apart")
    if len(members) > 1 and (first.options or {}).get("teacher", "own") != "own":
        raise ConfigError('teacher="mean" would average over all classifiers: fit these apart')


def _train(members: Sequence[MDCSClassifier], rows: Tensor, labels: Tensor, loss: MDCSLoss) -> None:
    first, experts = members[0], len(members[0].lam)
    network = first.model_ if len(members) == 1 else _side_by_side([member.model_ for member in members])
    optimizer = torch.optim.SGD(
        network.parameters(), lr=first.learning_rate, momentum=first.momentum, nesterov=first.momentum > 0.0,
        weight_decay=first.weight_decay, foreach=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, first.epochs)
    orders = [stream(member.seed, "batches") for member in members]
    noises = [stream(member.seed, "views") for member in members]
    average = None if first.teacher_decay is None else WeightAverage(first.teacher_decay)
    if average is not None:
        average.start(network)
    alpha = torch.tensor([member.alpha for member in members]).repeat_interleave(experts)
    for epoch in range(first.epochs):
        loss.set_epoch(epoch)
        totals: dict[str, Tensor] = {}
        shuffled = torch.stack([torch.randperm(len(rows), generator=order) for order in orders])
        for parts in shuffled.split(first.batch, dim=1):
            views = torch.stack([_views(*each, rows) for each in zip(members, parts, noises, strict=True)])
            views = views if len(members) > 1 else views[0]
            weak, strong = network(views)["logits"].chunk(2, dim=1)
            first_views = views.chunk(2, dim=-2)[0]
            teacher = None if average is None else average(network, first_views)["logits"]
            terms = loss(weak, strong, labels[parts].repeat_interleave(experts, 0), teacher_logits=teacher)
            weighted = terms["cross_entropy"] + loss.ramp * alpha * terms["consistency"]
            optimizer.zero_grad()
            weighted.sum().backward()
            optimizer.step()
            if average is not None:
                average.move(network)
            terms["loss"] = weighted.detach().view(len(members), experts).sum(1)
            share = parts.shape[1] / len(rows)
            for name, value in terms.items():
                part = value.detach() * (1.0 if name == "kept" else share)
                totals[name] = totals[name] + part if name in totals else part
        if not bool(totals["loss"].isfinite().all()):
            raise DataError(
                f"the loss is not finite in epoch {epoch}: lower learning_rate, or look at what the augmentations give"
            )
        schedule.step()
        for index, member in enumerate(members):
            member.history_.append(
                {name: value.view(len(members), -1)[index].tolist() for name, value in totals.items()}
            )
    if len(members) > 1:
        _take_back(network, [member.model_ for member in members])


def _views(member: MDCSClassifier, part: Tensor, noise: torch.Generator, rows: Tensor) -> Tensor:
    """The weak views of the rows and then the strong ones, [2b, d]."""
    views = [augment(rows[part], noise) for augment in (member.augment_weak, member.augment_strong)]
    if any(view.shape != rows[part].shape for view in views):
        raise ShapeError(
            f"augment_weak and augment_strong keep the shape of their rows, {tuple(rows[part].shape)}; they gave "
            f"{tuple(views[0].shape)} and {tuple(views[1].shape)}"
        )
    return torch.cat(views)


class _Repeated(nn.Module):
    """Features of each model [M, ...] for each of its experts, [M E, ...]."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, features: Tensor) -> Tensor:
        return features.repeat_interleave(self.experts, 0)


def _side_by_side(models: Sequence[MultiExpert]) -> MultiExpert:
    """One network of M models' weights, from [M, b, d] to logits [M E, b, C]."""
    unused, first = torch.Generator(), models[0]
    _, hidden, inside = _stacked(models, "stem.0.weight").shape
    experts, width, _ = first.get_parameter("branches.0.weight").shape
    classes, many = first.get_parameter("heads.weight").shape[1], len(models) * experts
    stem = nn.Sequential(ExpertLinear(len(models), inside, hidden, generator=unused), nn.ReLU(), _Repeated(experts))
    branches = nn.Sequential(ExpertLinear(many, hidden, width, generator=unused), nn.ReLU())
    scale = float(first.get_buffer("heads.scale"))
    network = MultiExpert(stem, branches, CosineHead(width, classes, experts=many, scale=scale, generator=unused))
    for name, value in network.named_parameters():
        value.data.copy_(_stacked(models, name).view(value.shape))
    return network


def _stacked(models: Sequence[MultiExpert], name: str) -> Tensor:
    return torch.stack([model.get_parameter(name).detach() for model in models])


@torch.no_grad()
def _take_back(network: MultiExpert, models: Sequence[MultiExpert]) -> None:
    for name, value in network.named_parameters():
        for model, own in zip(models, value.chunk(len(models)), strict=True):
            model.get_parameter(name).copy_(own.view(model.get_parameter(name).shape))


class _SharedLinear(nn.Linear):
    """A linear layer drawn from a generator."""

    def __init__(self, inside: int, outside: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inside, outside
        bound = inside**-0.5
        self.weight = nn.Parameter(torch.empty(outside, inside).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(outside).uniform_(-bound, bound, generator=generator))


def _labels(y: Any, rows: int) -> np.ndarray[Any, Any]:
    labels = np.asarray(y)
    if labels.shape != (rows,):
        raise ShapeError(f"y has one label for each of the {rows} rows of X, got shape {labels.shape}")
    if any(label is None or label != label for label in labels.tolist()):
        raise DataError("y has labels that are missing: drop those rows")
    return labels


def _rows(X: Any) -> Tensor:
    try:
        rows = X.detach().float() if isinstance(X, Tensor) else torch.from_numpy(np.asarray(X, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise DataError(f"X has rows of numbers, [n, d], and this is none: {str(error)[:80]}") from error
    if rows.ndim != 2 or not rows.numel():
        raise ShapeError(f"X has rows of features, [n, d], got {tuple(rows.shape)}")
    if not bool(rows.isfinite().all()):
        raise DataError("X has entries that are not finite: drop or impute those rows")
    return rows
