"""What MDCS refuses beside what test_mdcs has: inputs of the wrong kind, and classes without samples."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.data.long_tail import long_tail_counts, make_long_tail, many_medium_few
from kullback.diagnose.ensembles import prediction_variance
from kullback.distill import (
    MDCSClassifier,
    MDCSLoss,
    MDCSTrainer,
    TwoViews,
    combine_experts,
    diversity_logits,
    mdcs_loss,
)
from kullback.models.experts import CosineHead, ExpertLinear

Y = torch.arange(30) % 3
COUNTS = torch.tensor([5, 4, 3, 2, 1])


@pytest.fixture
def views(generator):
    weak, strong = torch.randn(2, 3, 4, 5, generator=generator)
    return weak, strong, torch.tensor([0, 1, 2, 3])


@pytest.fixture
def rows(generator):
    return torch.randn(30, 6, generator=generator)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.ones(4)}, DataError, "whole numbers of classes, got torch.float32"),
        ({"labels": torch.ones(4).bool()}, DataError, "whole numbers"),
        ({"counts": [5, 4, 3, -2, 1], "min_count": 1}, DataError, "negative count, -2"),
        ({"counts": [5, 4, 3, 0, 1]}, DataError, "never seen has no prior"),
        ({"counts": [5, 4, 3, math.nan, 1]}, DataError, "positive numbers"),
        ({"lam": 1.0}, ConfigError, "a sequence of numbers"),
        ({"lam": "abc"}, ConfigError, "a sequence of numbers"),
        ({"alpha": math.inf}, ConfigError, "alpha is finite"),
        ({"temperature": math.inf}, ConfigError, "temperature positive"),
    ],
)
def test_the_loss_says_what_it_wants(views, change, error, message):
    given = {"labels": views[2], "counts": COUNTS} | change
    with pytest.raises(error, match=message):
        mdcs_loss(*views[:2], given.pop("labels"), given.pop("counts"), **given)


def test_what_is_not_a_number_reaches_the_loss_and_a_batch_without_labels_weighs_nothing(views):
    weak, strong, labels = views
    broken = weak.clone()
    broken[0, 0, 0] = math.nan
    for pair in (broken, strong), (weak, broken):
        assert mdcs_loss(*pair, labels, COUNTS)["loss"].isnan()
    none = mdcs_loss(weak, strong, torch.full((4,), -100), COUNTS)
    assert none["loss"] == 0.0 == none["kept"].sum()
    assert torch.equal(diversity_logits(weak, COUNTS.tolist()), diversity_logits(weak, COUNTS))
    assert torch.equal(mdcs_loss(weak, strong, labels.int(), COUNTS)["loss"], mdcs_loss(*views, COUNTS)["loss"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MDCSLoss(COUNTS).set_epoch(math.inf), ConfigError, "counted from 0"),
        (lambda: MDCSLoss([0, 0]), DataError, "min_count=1"),
        (lambda: combine_experts(torch.ones(3)), ShapeError, "experts first"),
        (lambda: long_tail_counts(10, 3, math.inf), ConfigError, "a ratio of at least 1"),
        (lambda: make_long_tail(Y, [1, -1, 2], torch.Generator()), DataError, "at least 0"),
        (lambda: make_long_tail(Y, torch.tensor([1.5, 1, 2]), torch.Generator()), DataError, "whole numbers"),
        (lambda: make_long_tail(Y[:0], [1, 1], torch.Generator()), DataError, "class 0 has 0 samples"),
        (lambda: many_medium_few(COUNTS, torch.full((5,), math.nan)), DataError, "no test sample"),
        (lambda: many_medium_few(-COUNTS, torch.ones(5)), DataError, "at least 0"),
        (lambda: prediction_variance(torch.ones(3, 4, 5)), DataError, "log_softmax of logits first"),
        (lambda: CosineHead(3, 3, scale=math.inf, generator=torch.Generator()), ConfigError, "scale"),
        (lambda: CosineHead(3, 0, generator=torch.Generator()), ConfigError, "at least 1"),
        (lambda: ExpertLinear(0, 3, 3, generator=torch.Generator()), ConfigError, "at least 1"),
    ],
)
def test_its_parts_say_what_they_want(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": math.nan}, ConfigError, "learning_rate is positive"),
        ({"momentum": 2.0}, ConfigError, "momentum in"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay"),
        ({"epochs": 2.5}, ConfigError, "epochs is 2.5"),
        ({"options": {"alpha": 1.0}}, ConfigError, "alpha is a parameter of its own"),
        ({"lam": ()}, ConfigError, "at least 1"),
        ({"augment_weak": lambda x, draw: x[:, :2]}, ShapeError, "keep the shape"),
        ({"augment_strong": lambda x, draw: x * math.nan}, DataError, "not finite in epoch 0"),
    ],
)
def test_the_classifier_says_what_it_wants(rows, change, error, message):
    with pytest.raises(error, match=message):
        MDCSClassifier(**{"epochs": 2, "hidden": 4, "width": 4, **change}).fit(rows, Y)


def test_labels_and_rows_that_are_no_such_thing(rows):
    few = {"epochs": 1, "hidden": 4, "width": 4}
    for labels in np.where(Y == 0, np.nan, 1.0), [None] * 15 + [1] * 15:
        with pytest.raises(DataError, match="missing"):
            MDCSClassifier(**few).fit(rows, labels)
    for x in [["a", "b"]] * 30, [[1, 2], [1]]:
        with pytest.raises(DataError, match="rows of numbers"):
            MDCSClassifier(**few).fit(x, Y)
    model = MDCSClassifier(**few).fit(rows, Y)
    with pytest.raises(ShapeError, match="one label for each of the 30 rows"):
        model.score(rows, Y[:-1])


def test_batches_of_the_trainer(rows):
    views = TwoViews(lambda x: x, lambda x: x, field="x")
    for items in [{"x": rows[0]}], [{"x": rows[0], "label": 1}, {"label": 0}], []:
        with pytest.raises(DataError, match="field 'x'"):
            views(items)
    with pytest.raises(ShapeError, match="one shape"):
        TwoViews(lambda x: x, lambda x: x[:3], field="x")([{"x": rows[0], "label": 1}])
    trainer = SimpleNamespace(loss=MDCSLoss(COUNTS), state=SimpleNamespace(epoch=0.0))
    with pytest.raises(DataError, match="this batch holds x alone"):
        MDCSTrainer.compute_loss(trainer, None, {"x": rows})
    for outputs in {"output": rows}, {"logits": rows}:
        with pytest.raises(ShapeError, match="wrap it in MultiExpert"):
            MDCSTrainer.compute_loss(trainer, lambda x, outputs=outputs: outputs, {"x": rows, "labels": Y})
