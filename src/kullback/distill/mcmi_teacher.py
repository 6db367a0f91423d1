"""A teacher fine-tuned for conditional mutual information, and distillation where classes or examples are missing.

Maximum likelihood first; then a few epochs on CE - lam I(X; Yhat | Y), by turns with the centroids Q: with Q fixed,
gradient steps on the teacher; then Q anew. The best teacher on validation data is kept. Any distillation follows.
Source: Ye et al. 2024 (arXiv 2401.08732). The text renews the centroids as training goes on; the released runs compute
them once, in training mode: refresh="never", train_mode=True.

Shapes: n samples, C classes; batches are pairs (inputs [b, ...], labels [b]).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.distill.mcmi import Bonus, CMIMeter, MCMITerms, class_centroids, mcmi_loss

__all__ = [
    "CentroidTracker", "Datasets", "MCMISettings", "balanced_batches", "balanced_subset", "expected_calibration_error",
    "finetune_teacher", "kd_loss", "measured", "shuffled_batches", "zero_shot_distill",
]  # fmt: skip

Refresh = Literal["never", "epoch", "ema", "batch"]
Batches = Iterable[tuple[Tensor, Tensor]]
StudentLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
Listener = Callable[[Mapping[str, Any]], None]
_REFRESHES = ("never", "epoch", "ema", "batch")


class CentroidTracker:
    """The centroids that the loss takes as constants, renewed as `refresh` says.

    "never": by the first `fit` alone; "epoch": by `fit`, to be called before every epoch; "ema": besides, each update
    moves the rows of the classes in the batch by 1 - decay towards the batch's means; "batch": it sets them to those.
    train_mode: whether `fit` runs the model in training mode, where batch norm takes the batch's statistics.
    """

    def __init__(
        self,
        num_classes: int,
        refresh: Refresh = "epoch",
        decay: float = 0.9999,
        *,
        train_mode: bool = False,
        temperature: float = 1.0,
    ) -> None:
        if refresh not in _REFRESHES:
            raise ConfigError(f"refresh is one of {', '.join(_REFRESHES)}, not {refresh!r}")
        if num_classes < 1:
            raise ConfigError(f"there is a class at least, got {num_classes}")
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay is the share of the old centroid in [0, 1) and is {decay}")
        self.num_classes, self.refresh, self.decay = num_classes, refresh, decay
        self.train_mode, self.temperature = train_mode, temperature
        self._centroids: Tensor | None = None

    @torch.no_grad()
    def fit(self, model: Callable[[Tensor], Tensor], loader: Batches) -> CentroidTracker:
        """Set the centroids from one pass over the batches, of all processes together; "never" does so only once."""
        if self._centroids is not None and self.refresh == "never":
            return self
        meter = measured(
            model, loader, self.num_classes, train_mode=self.train_mode, temperature=self.temperature
        ).all_reduce()
        meter.samples  # noqa: B018 - raises where there was no batch
        return self.set(meter.centroids())

    def set(self, centroids: Tensor) -> CentroidTracker:
        """Take these centroids [C, C]."""
        if centroids.shape[0] != self.num_classes:
            raise ShapeError(f"there are {self.num_classes} classes and came {centroids.shape[0]} centroids")
        if bool(centroids.isnan().any()):
            raise DataError('centroids are NaN: make those of classes without a sample uniform, empty="uniform"')
        self._centroids = centroids.detach().clone()
        return self

    @torch.no_grad()
    def update(self, probs: Tensor, labels: Tensor) -> CentroidTracker:
        """Renew the rows of the classes in a batch of outputs [b, C]; nothing to do for "never" and "epoch"."""
        if self.refresh not in ("ema", "batch"):
            return self
        centroids = self.centroids
        seen = torch.unique(labels[labels >= 0])
        means = class_centroids(probs, labels, self.num_classes, empty="uniform")[seen].to(centroids)
        share = 1.0 if self.refresh == "batch" else 1.0 - self.decay
        centroids[seen.to(centroids.device)] = torch.lerp(centroids[seen], means, share)
        return self

    @property
    def centroids(self) -> Tensor:
        """All centroids [C, C]; NotFitted before `fit`."""
        if self._centroids is None:
            raise NotFitted("the centroids are those of a model on data: call fit before the first batch")
        return self._centroids

    def get(self, labels: Tensor) -> Tensor:
        """The centroids of the labels [b], [b, C]; DataError for labels that are no class."""
        _check_labels(labels, self.num_classes)
        return self.centroids[labels]


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"labels are whole numbers and came as {labels.dtype}: convert them with .long()")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"labels are from 0 to {classes - 1}, got from {int(labels.min())} to {int(labels.max())}")


def _check_pairs(inputs: Tensor, labels: Tensor) -> None:
    if not len(inputs) or labels.shape != inputs.shape[:1]:
        shapes = f"{len(inputs)} and {tuple(labels.shape)}"
        raise DataError(f"there is one label for each of one or more inputs, got {shapes}")


@torch.no_grad()
def measured(
    model: Callable[[Tensor], Tensor],
    loader: Batches,
    num_classes: int,
    *,
    train_mode: bool = False,
    temperature: float = 1.0,
    separation: bool = False,
) -> CMIMeter:
    """A meter that has seen a model's logits on all batches; the model comes back in the mode that it was in.

    train_mode: batch norm takes the batch's statistics, and its running ones move. temperature, separation: as in
    `CMIMeter`.
    """
    meter = CMIMeter(num_classes, temperature=temperature, separation=separation)
    training = model.training if isinstance(model, nn.Module) else False
    if isinstance(model, nn.Module):
        model.train(train_mode)
    try:
        for inputs, labels in loader:
            meter.update(model(inputs), labels)
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return meter


def shuffled_batches(
    inputs: Tensor, labels: Tensor, size: int, *, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the samples in random order, `size` at a time. Raises ConfigError, DataError without a sample."""
    _check_pairs(inputs, labels)
    if size < 1:
        raise ConfigError(f"size is 1 or more and is {size}")
    for rows in torch.randperm(len(inputs), generator=generator).split(size):
        yield inputs[rows], labels[rows]


def balanced_batches(
    inputs: Tensor, labels: Tensor, per_class: int, *, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with `per_class` samples of each class, as refresh="batch" wants them; about one pass over the samples.

    Drawn within a class without replacement until it runs out, and then anew.
    """
    _check_pairs(inputs, labels)
    classes = [torch.nonzero(labels == label).squeeze(-1) for label in torch.unique(labels)]
    if per_class < 1:
        raise ConfigError(f"per_class is 1 or more and is {per_class}")
    steps = max(1, len(labels) // (per_class * len(classes)))
    columns = []
    for rows in classes:
        passes = -(-steps * per_class // len(rows))
        order = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(passes)])
        columns.append(order[: steps * per_class].view(steps, per_class))
    for chosen in torch.cat(columns, dim=1):
        yield inputs[chosen], labels[chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class MCMISettings:
    """How a trained teacher is fine-tuned; the defaults are those released for CIFAR-100, but for the refresh.

    learning_rate: half of the original training's (0.05 for residual networks, 0.005 for mobile ones), by a cosine to
    0. lam: 0.1 to 0.25 were released; from about 0.4 on, accuracy falls. optimizer: "sgd" or "adam".
    """

    lam: float = 0.15
    epochs: int = 20
    batch: int = 64
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cosine: bool = True
    refresh: Refresh = "epoch"
    decay: float = 0.9999
    train_mode: bool = False
    ce_weight: float = 1.0
    temperature: float = 1.0
    bonus: Bonus = "cmi"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not self.learning_rate > 0.0:
            given = f"{self.epochs}, {self.batch} and {self.learning_rate}"
            raise ConfigError(f"epochs and batch are 1 or more and learning_rate is positive, got {given}")
        if not self.lam >= 0.0:
            raise ConfigError(f"lam is 0 or more and is {self.lam}: 0 is fine-tuning on cross-entropy alone")
        if self.optimizer not in ("sgd", "adam"):
            raise ConfigError(f'optimizer is "sgd" or "adam", not {self.optimizer!r}')


def finetune_teacher(
    teacher: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    settings: MCMISettings,
    *,
    generator: torch.Generator,
    num_classes: int | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    listen: Listener | None = None,
) -> nn.Module:
    """A copy of a trained classifier, fine-tuned for conditional mutual information; the given one stays as it is.

    inputs [n, ...], labels [n]; validation: pairs on which accuracy is taken after each epoch, and the weights of the
    best epoch are returned; without it, those of the last. listen: called after each epoch with its number, loss,
    cross-entropy ("ce"), "cmi" against the centroids in use, and "accuracy" where there is validation.
    """
    _check_module(teacher, "the teacher")
    _check_pairs(inputs, labels)
    if validation is not None:
        _check_pairs(*validation)
    if not bool((labels >= 0).any()):
        raise DataError("there is no sample to train on: labels below 0 are left out, and none is left")
    model = copy.deepcopy(teacher).requires_grad_()
    if (classes := num_classes or 0) < 1:
        with torch.no_grad():
            classes = model.eval()(inputs[:1]).shape[-1]
    tracker = CentroidTracker(
        classes, settings.refresh, settings.decay, train_mode=settings.train_mode, temperature=settings.temperature
    )
    optimizer = _optimizer(model, settings)
    steps = settings.epochs * -(-len(inputs) // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if settings.cosine else None
    best: tuple[float, dict[str, Tensor]] | None = None
    model.train()
    for epoch in range(settings.epochs):
        tracker.fit(model, zip(inputs.split(512), labels.split(512)))
        sums = torch.zeros(3)
        for batch, target in shuffled_batches(inputs, labels, settings.batch, generator=generator):
            terms = _step(model, batch, target, tracker, settings, optimizer)
            sums += len(batch) * torch.stack([term.detach().float().cpu() for term in terms])
            if schedule is not None:
                schedule.step()
        event: dict[str, Any] = dict(zip(("loss", "ce", "cmi"), (sums / len(inputs)).tolist()), epoch=epoch + 1)
        if validation is not None:
            event["accuracy"] = measured(model, [validation], classes).accuracy
            if best is None or event["accuracy"] >= best[0]:
                best = event["accuracy"], {name: value.clone() for name, value in model.state_dict().items()}
        if listen is not None:
            listen(event)
    if best is not None:
        model.load_state_dict(best[1])
    return model.eval()


def _check_module(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} is a trained module from inputs to logits, and is {type(model).__name__}")


def _optimizer(model: nn.Module, settings: MCMISettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        model.parameters(), settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _step(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    tracker: CentroidTracker,
    settings: MCMISettings,
    optimizer: torch.optim.Optimizer,
) -> MCMITerms:
    optimizer.zero_grad()
    logits = model(inputs)
    tracker.update((logits.detach() / settings.temperature).softmax(-1), labels)
    terms = mcmi_loss(
        logits, labels, tracker.centroids.to(logits.device), lam=settings.lam, ce_weight=settings.ce_weight,
        temperature=settings.temperature, bonus=settings.bonus,
    )  # fmt: skip
    terms.loss.backward()
    optimizer.step()
    return terms


# --- the student ---


def kd_loss(
    teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, *, alpha: float = 0.9, temperature: float = 4.0
) -> Tensor:
    """(1 - alpha) CE + alpha T^2 KL(softmax(t/T) || softmax(s/T)), mean over rows [b, C]; the teacher is a constant.

    Raises ShapeError, ConfigError.

    >>> kd_loss(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
    tensor(0.1809)
    """
    if teacher_logits.shape != student_logits.shape or labels.shape != student_logits.shape[:-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (teacher_logits, student_logits, labels))
        raise ShapeError(f"teacher and student have logits [b, C] of the same shape and labels are [b], got {shapes}")
    if not temperature > 0.0 or not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"temperature is positive and alpha between 0 and 1, got {temperature} and {alpha}")
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    hard = nn.functional.cross_entropy(student_logits, labels)
    return (1.0 - alpha) * hard + alpha * temperature**2 * soft


class Datasets(NamedTuple):
    """inputs [n, ...] and labels [n] to train on, and those to test on."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def zero_shot_distill(
    teacher: nn.Module | Sequence[nn.Module],
    student: nn.Module,
    data: Datasets,
    *,
    omit: Sequence[int],
    generator: torch.Generator,
    kd: StudentLoss = kd_loss,
    epochs: int = 60,
    batch: int = 64,
    learning_rate: float = 3e-3,
) -> Tensor:
    """Distil into `student`, in place, without the samples of the omitted classes; accuracy of each class [C].

    The student keeps all outputs: the teacher's mass on the omitted ones is all that it learns of them. kd: loss of
    (teacher logits, student logits, labels). omit may be empty. Adam. Several teachers: each distils a copy of the
    student, all on the same batches and in one pass; accuracies [teachers, C], and `student` stays as it is. Raises
    ConfigError without a teacher or where no sample is left, DataError for labels out of range and a teacher's NaN.
    """
    several = [teacher] if isinstance(teacher, nn.Module) or teacher is None else list(teacher)
    if not several or min(epochs + 1, batch) < 1:
        given = f"{len(several)}, {epochs} and {batch}"
        raise ConfigError(f"there are a teacher, 0 epochs or more and 1 sample a batch at least, got {given}")
    for model in (*several, student):
        _check_module(model, "the student" if model is student else "a teacher")
    _check_pairs(data.inputs, data.labels)
    _check_pairs(data.test_inputs, data.test_labels)
    kept = ~torch.isin(data.labels, data.labels.new_tensor(list(omit)))
    if not bool(kept.any()):
        raise ConfigError(f"no sample is left to train on without the classes {list(omit)}: omit fewer")
    inputs, labels = data.inputs[kept], data.labels[kept]
    with torch.no_grad():
        taught = torch.stack([model.eval()(inputs) for model in several])
    if bool(taught.isnan().any()):
        raise DataError("a teacher's logits are NaN: it has diverged, or the inputs are NaN")
    _check_labels(torch.cat([data.labels, data.test_labels, data.labels.new_tensor(list(omit))]), taught.shape[-1])
    student.train()
    parameters, loss = _together(student, len(several), kd)
    optimizer = torch.optim.Adam(list(parameters.values()), learning_rate, foreach=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(batch):
            optimizer.zero_grad()
            loss(taught[:, rows], inputs[rows], labels[rows]).backward()
            optimizer.step()
    accuracies = []
    judged = student if isinstance(teacher, nn.Module) else copy.deepcopy(student)
    for index in range(len(several)):
        judged.load_state_dict({name: value[index].detach() for name, value in parameters.items()}, strict=False)
        accuracies.append(_accuracy_by_class(judged.eval(), data, taught.shape[-1]))
    return accuracies[0] if isinstance(teacher, nn.Module) else torch.stack(accuracies)


def _together(
    student: nn.Module, count: int, kd: StudentLoss
) -> tuple[dict[str, Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Weights of `count` copies, stacked, and the sum of their losses from taught [count, b, C], inputs and labels."""
    parameters = {
        name: value.detach().expand(count, *value.shape).clone().requires_grad_()
        for name, value in student.named_parameters()
    }

    def loss(weights: dict[str, Tensor], taught: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        return kd(taught, torch.func.functional_call(student, weights, (inputs,)), labels)

    if count == 1:
        # Without vmap, so that layers with a state of their own, as batch norm, work.
        return parameters, lambda taught, inputs, labels: loss(
            {name: value[0] for name, value in parameters.items()}, taught[0], inputs, labels
        )
    mapped = torch.func.vmap(loss, in_dims=(0, 0, None, None))
    return parameters, lambda taught, inputs, labels: mapped(parameters, taught, inputs, labels).sum()


@torch.no_grad()
def _accuracy_by_class(model: nn.Module, data: Datasets, classes: int) -> Tensor:
    right = (model(data.test_inputs).argmax(-1) == data.test_labels).to(torch.float64)
    counts = torch.bincount(data.test_labels, minlength=classes)
    total = right.new_zeros(classes).index_add(0, data.test_labels, right)
    return total / counts.masked_fill(counts == 0, 1) + torch.where(counts == 0, torch.nan, 0.0)


def balanced_subset(labels: Tensor, share: float, *, generator: torch.Generator) -> Tensor:
    """Indices of a share of the samples of each class, at least one of each: the few shots, the same for all methods.

    >>> balanced_subset(torch.tensor([0, 0, 1, 1]), 0.5, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share is in (0, 1] and is {share}")
    _check_pairs(labels, labels)
    chosen = []
    for label in torch.unique(labels):
        rows = torch.nonzero(labels == label).squeeze(-1)
        count = max(1, round(share * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen)


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean over samples of |accuracy - confidence| within equal bins of the largest probability; logits [n, C].

    >>> round(expected_calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 0])), 6)
    0.1
    """
    if bins < 1 or not len(logits):
        raise ConfigError(f"there are 1 or more bins and samples, got {bins} and {len(logits)}")
    _check_pairs(logits, labels)
    if bool(logits.isnan().any()):
        raise DataError("logits are NaN: leave out the samples on which the model failed")
    confidence, chosen = logits.double().softmax(-1).max(-1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = (chosen == labels).double() - confidence
    return float(torch.zeros(bins, dtype=torch.float64).index_add(0, place, gap).abs().sum() / len(logits))
