"""What unlearning and its yardsticks refuse: each bad input with one clear sentence."""

import math

import pytest
import torch
from torch import nn

from kullback.align.unlearn import (
    ForgetProblem,
    datamodel_direct,
    datamodel_matching,
    gradient_ascent,
    gradient_descent,
    gradient_descent_ascent,
    scrub,
)
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.diagnose.attribution import (
    TRAKFeatures,
    calibrated_scale,
    fit_datamodels,
    logistic_influence,
    predict_without,
    ridge_without,
)
from kullback.diagnose.unlearning import klom, klom_floor, klom_report, margin, ulira
from kullback.models.ensemble import EnsembleMLP, train_ensemble

DRAW = {"generator": generator(0, "draw")}
X, Y = torch.randn(20, 5, **DRAW), torch.arange(20) % 2
NAN = X * math.nan
MODEL = nn.Linear(5, 2)
GIVEN = ForgetProblem(X, Y, torch.arange(3))
ALIEN = ForgetProblem(X, Y + 7, torch.arange(3))
ZEROS = torch.zeros(20, 2)
MASKS, OUTPUTS = (torch.rand(10, 6, **DRAW) < 0.5).float(), torch.randn(10, 3, 2, **DRAW)
BETA, BASE = torch.ones(6, 3, 2), torch.zeros(3, 2)
MARGINS = torch.randn(6, 4, **DRAW)


def problem(*places, labels=Y, inputs=X):
    return ForgetProblem(inputs, labels, torch.tensor(places, dtype=torch.long))


def matched(targets=ZEROS, **options):
    return datamodel_matching(MODEL, GIVEN, targets, **DRAW, **options)


def trak(**options):
    return TRAKFeatures(MODEL, **{"dimensions": 4, **DRAW, **options})


def trained(inputs=X, labels=Y, **options):
    return train_ensemble(EnsembleMLP(2, (5, 2), **DRAW), inputs, labels, **{"steps": 1, **options})


PROBLEMS = [
    (ConfigError, "nothing is left to retain", lambda: problem(*range(20))),
    (ShapeError, "none twice", lambda: problem(1, 1)),
    (ShapeError, "none twice", lambda: problem(20)),
    (ShapeError, "none twice", lambda: problem(-1)),
    (ShapeError, "none twice", lambda: ForgetProblem(X, Y, torch.ones(20, dtype=torch.bool))),
    (ShapeError, "none twice", lambda: ForgetProblem(X, Y, [1, 2])),
    (ShapeError, "one a point", lambda: problem(0, labels=Y[:3])),
    (ShapeError, "one a point", lambda: problem(0, labels=Y.float())),
    (DataError, "finite", lambda: problem(0, inputs=NAN)),
    (DataError, "NaN", lambda: matched(ZEROS * math.nan)),
    (ShapeError, "as the model", lambda: matched(torch.zeros(20, 3))),
    (ShapeError, "one a training point", lambda: matched(torch.zeros(20))),
    (ConfigError, "0 or more", lambda: matched(forget_multiplier=-1)),
    (ConfigError, "one of them", lambda: matched(forget_multiplier=0, retain_multiplier=0)),
    (ConfigError, "temperature", lambda: scrub(MODEL, GIVEN, temperature=0.0, **DRAW)),
    (ConfigError, "forget_epochs", lambda: scrub(MODEL, GIVEN, forget_epochs=-1, **DRAW)),
    (ConfigError, "ascent", lambda: gradient_descent_ascent(MODEL, GIVEN, ascent=-1.0, **DRAW)),
    (ShapeError, "none twice", lambda: datamodel_direct(BASE, BETA, torch.tensor([7]))),
    (ShapeError, "none twice", lambda: datamodel_direct(BASE, BETA, torch.tensor([1, 1]))),
    (ShapeError, "outputs are", lambda: datamodel_direct(torch.zeros(4, 2), BETA, torch.tensor([1]))),
    (DataError, "NaN", lambda: datamodel_direct(BASE, BETA * math.nan, torch.tensor([1]))),
]
ATTRIBUTIONS = [
    (DataError, "masks have NaN", lambda: fit_datamodels(MASKS * math.nan, OUTPUTS)),
    (DataError, "outputs have NaN", lambda: fit_datamodels(MASKS, OUTPUTS * math.nan)),
    (DataError, "raise the penalty", lambda: fit_datamodels(torch.ones(10, 6), OUTPUTS, penalty=0.0)),
    (ConfigError, "finite", lambda: fit_datamodels(MASKS, OUTPUTS, penalty=math.inf)),
    (ShapeError, "masks are", lambda: fit_datamodels(MASKS[:, :0], OUTPUTS)),
    (ShapeError, "none twice", lambda: predict_without(BETA, BASE, [7])),
    (ShapeError, "none twice", lambda: predict_without(BETA, BASE, [-1])),
    (ShapeError, "none twice", lambda: predict_without(BETA, BASE, [1, 1])),
    (ShapeError, "none twice", lambda: predict_without(BETA, BASE, [1.5])),
    (DataError, "beta have NaN", lambda: predict_without(BETA * math.nan, BASE, [1])),
    (DataError, "no held-out model", lambda: calibrated_scale(BETA, MASKS[:0], OUTPUTS[:0], BASE)),
    (DataError, "outputs have NaN", lambda: calibrated_scale(BETA, MASKS, OUTPUTS * math.nan, BASE)),
    (ShapeError, "base_outputs", lambda: calibrated_scale(BETA, MASKS, OUTPUTS, torch.zeros(4, 2))),
    (ConfigError, "penalty", lambda: trak(penalty=-1.0)),
    (ConfigError, "chunk", lambda: trak(chunk=0)),
    (ConfigError, "parameters", lambda: TRAKFeatures(nn.ReLU(), dimensions=4, **DRAW)),
    (ShapeError, "one point at least", lambda: trak().features(X[:0], Y[:0])),
    (ShapeError, "one point at least", lambda: trak().logit_features(X[:0])),
    (ShapeError, "one a point", lambda: trak().features(X, Y[:3])),
    (DataError, "from 0 to 1", lambda: trak().features(X, Y + 9)),
    (DataError, "inputs have NaN", lambda: trak().logit_features(NAN)),
    (ShapeError, "coefficients", lambda: logistic_influence(X, Y, torch.zeros(4), X, penalty=1.0)),
    (DataError, "0 or 1", lambda: logistic_influence(X, Y + 3, torch.zeros(5), X, penalty=1.0)),
    (ShapeError, "none twice", lambda: ridge_without(X, Y.float(), [99], penalty=1.0)),
    (DataError, "no point is left", lambda: ridge_without(X, Y.float(), range(20), penalty=0.0)),
    (DataError, "inputs have NaN", lambda: ridge_without(NAN, Y.float(), [1], penalty=1.0)),
    (ShapeError, "targets", lambda: ridge_without(X, Y.float()[:3], [1], penalty=1.0)),
]
YARDSTICKS = [
    (DataError, "from 0 to 1", lambda: margin(ZEROS, Y + 9)),
    (DataError, "from 0 to 1", lambda: margin(ZEROS, Y - 1)),
    (DataError, "whole numbers", lambda: margin(ZEROS, Y.float())),
    (ShapeError, "labels", lambda: margin(ZEROS, Y[:3])),
    (ShapeError, "two classes", lambda: margin(ZEROS[:, :1], Y)),
    (ConfigError, "whole number", lambda: klom(MARGINS, MARGINS, bins=2.5)),
    (ConfigError, "repeats", lambda: klom_floor(MARGINS, repeats=0, **DRAW)),
    (ShapeError, "one is not", lambda: klom_report(MARGINS, MARGINS, {"forget": torch.tensor([9])})),
    (ShapeError, "no point", lambda: klom_report(MARGINS, MARGINS, {"forget": torch.tensor([])})),
    (ConfigError, "no set", lambda: klom_report(MARGINS, MARGINS, {})),
    (DataError, "finite", lambda: ulira(MARGINS / 0.0, MARGINS, MARGINS)),
    (DataError, "NaN", lambda: ulira(MARGINS * math.nan, MARGINS, MARGINS)),
    (DataError, "from 0 to 1", lambda: trained(labels=Y + 9)),
    (ShapeError, "labels", lambda: trained(labels=Y[:3])),
    (DataError, "finite", lambda: trained(NAN)),
    (ShapeError, "5 numbers", lambda: trained(X[:, :3])),
    (ShapeError, "float32", lambda: trained(X.double())),
    (ConfigError, "steps", lambda: trained(steps=-1)),
    (ConfigError, "0 or more", lambda: trained(weights=torch.ones(2, 20).index_fill(1, torch.tensor(0), -0.5))),
]


@pytest.mark.parametrize(("error", "words", "call"), PROBLEMS + ATTRIBUTIONS + YARDSTICKS)
def test_what_is_refused_and_with_which_words(error, words, call):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("way", [gradient_descent, gradient_ascent, gradient_descent_ascent, scrub])
def test_every_way_refuses_labels_without_an_output(way):
    with pytest.raises(DataError, match="from 0 to 1"):
        way(MODEL, ALIEN, **DRAW)


def test_an_empty_forget_set_is_no_error():
    nothing = problem()
    assert torch.equal(gradient_ascent(MODEL, nothing, **DRAW).weight, MODEL.weight)
    assert torch.equal(datamodel_direct(BASE, BETA, torch.arange(0)), BASE)
    assert not torch.equal(gradient_descent(MODEL, nothing, **DRAW).weight, MODEL.weight)
