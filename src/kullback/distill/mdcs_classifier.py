"""MDCS for rows of features: three experts on a shared layer, trained on two noisy views of every row.

Shapes: n rows of d features, C classes, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.core.rng import generator as stream
from kullback.distill.mdcs import LAM, MDCSLoss
from kullback.models.experts import CosineHead, ExpertLinear, MultiExpert

__all__ = ["MDCSClassifier", "strong_noise", "weak_noise"]

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
    about unit size. Trained by SGD with Nesterov momentum and a learning rate that falls to 0 as a cosine. All random
    numbers come from seed.
    After fit: model_, classes_, counts_ and history_, a mapping of the loss's terms for each epoch.

    >>> x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    >>> x = x + 3 * torch.nn.functional.one_hot(y, 4)
    >>> MDCSClassifier(epochs=10, hidden=8, width=8, batch=16).fit(x, y).score(x, y) > 0.8
    True
    """

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
        rows, labels = _rows(X), np.asarray(y)
        if labels.shape != (len(rows),):
            raise ShapeError(f"y has one label for each of the {len(rows)} rows of X, got shape {labels.shape}")
        self.classes_, inverse = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError("a classifier needs two classes or more in y")
        if min(self.epochs, self.batch, self.hidden, self.width) < 1:
            raise ConfigError("epochs, batch, hidden and width are at least 1")
        own = torch.from_numpy(inverse)
        self.counts_ = torch.bincount(own, minlength=len(self.classes_))
        options = {"lam": tuple(self.lam), "alpha": self.alpha, **(self.options or {})}
        loss = MDCSLoss(self.counts_, warm_epochs=self.warm_epochs, **options)
        self.model_ = self._network(rows.shape[1], len(self.classes_))
        self._train(rows, own, loss)
        return self

    def _network(self, features: int, classes: int) -> MultiExpert:
        draw, experts = stream(self.seed, "network"), len(self.lam)
        stem = nn.Sequential(_SharedLinear(features, self.hidden, draw), nn.ReLU())
        branches = nn.Sequential(ExpertLinear(experts, self.hidden, self.width, generator=draw), nn.ReLU())
        heads = CosineHead(self.width, classes, experts=experts, scale=self.scale, generator=draw)
        return MultiExpert(stem, branches, heads)

    def _train(self, rows: Tensor, labels: Tensor, loss: MDCSLoss) -> None:
        optimizer = torch.optim.SGD(
            self.model_.parameters(), lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0.0,
            weight_decay=self.weight_decay,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        order, noise = stream(self.seed, "batches"), stream(self.seed, "views")
        self.history_: list[dict[str, list[float]]] = []
        for epoch in range(self.epochs):
            loss.set_epoch(epoch)
            totals: dict[str, Tensor] = {}
            for part in torch.randperm(len(rows), generator=order).split(self.batch):
                views = [augment(rows[part], noise) for augment in (self.augment_weak, self.augment_strong)]
                weak, strong = self.model_(torch.cat(views))["logits"].chunk(2, dim=1)
                terms = loss(weak, strong, labels[part])
                optimizer.zero_grad()
                terms["loss"].backward()
                optimizer.step()
                share = len(part) / len(rows)
                for name, value in terms.items():
                    weighted = value.detach() * (1.0 if name == "kept" else share)
                    totals[name] = totals.get(name, torch.zeros_like(weighted)) + weighted
            schedule.step()
            self.history_.append({name: value.reshape(-1).tolist() for name, value in totals.items()})

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
        return float((self.predict(X) == np.asarray(y)).mean())


class _SharedLinear(nn.Linear):
    """A linear layer drawn from a generator."""

    def __init__(self, inside: int, outside: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inside, outside
        bound = inside**-0.5
        self.weight = nn.Parameter(torch.empty(outside, inside).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(outside).uniform_(-bound, bound, generator=generator))


def _rows(X: Any) -> Tensor:
    rows = X.detach().float() if isinstance(X, Tensor) else torch.from_numpy(np.asarray(X, dtype=np.float32))
    if rows.ndim != 2 or not rows.numel():
        raise ShapeError(f"X has rows of features, [n, d], got {tuple(rows.shape)}")
    if not bool(rows.isfinite().all()):
        raise DataError("X has entries that are not finite: drop or impute those rows")
    return rows
