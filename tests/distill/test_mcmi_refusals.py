"""What the conditional mutual information of teachers refuses: each bad input with one clear sentence."""

import math

import pytest
import torch
from torch import nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.distill.mcmi import CMIMeter, class_centroids, effective_dimension, empirical_cmi, mcmi_loss
from kullback.distill.mcmi_teacher import (
    CentroidTracker,
    Datasets,
    MCMISettings,
    balanced_batches,
    balanced_subset,
    expected_calibration_error,
    finetune_teacher,
    kd_loss,
    shuffled_batches,
    zero_shot_distill,
)

LOGITS = torch.randn(20, 3, generator=generator(0, "logits"))
LABELS = torch.arange(20) % 3
NAN, NONE = LOGITS * math.nan, LOGITS[:0]
CENTROIDS = class_centroids(LOGITS.softmax(-1), LABELS, 3)
NEGATIVE = torch.tensor([[2.0, -0.5, -0.5]]).expand(3, 3)
DRAW = {"generator": generator(0, "draw")}
ONCE = MCMISettings(epochs=1)
DATA = Datasets(LOGITS, LABELS, LOGITS, LABELS)


def net(outputs=3):
    return nn.Linear(3, outputs)


def tuned(teacher, *data, **options):
    return finetune_teacher(teacher, *data, ONCE, **DRAW, **options)


def taught(data, teacher=None, student=None, **options):
    return zero_shot_distill(teacher or net(), student or net(), data, **{"omit": [], "epochs": 1, **DRAW, **options})


MEASURES = [
    (DataError, "NaN", lambda: class_centroids(NAN, LABELS, 3)),
    (ShapeError, "numbers from 0 on", lambda: class_centroids(LOGITS, LABELS, 3, weights=torch.full((20,), math.nan))),
    (DataError, "NaN", lambda: empirical_cmi(NAN, LABELS)),
    (DataError, "diverged", lambda: empirical_cmi(NAN, LABELS, centroids=CENTROIDS)),
    (DataError, "no sample", lambda: empirical_cmi(NONE, LABELS[:0])),
    (ShapeError, "one for each", lambda: empirical_cmi(LOGITS, LABELS[:, None])),
    (DataError, "go up to", lambda: empirical_cmi(LOGITS, LABELS, centroids=CENTROIDS[:2])),
    (ConfigError, "temperature", lambda: empirical_cmi(LOGITS, LABELS, temperature=math.nan)),
    (DataError, "NaN", lambda: effective_dimension(NAN, LABELS)),
    (DataError, "diverged", lambda: mcmi_loss(NAN, LABELS, CENTROIDS, lam=0.1)),
    (DataError, "diverged", lambda: mcmi_loss(NAN, LABELS, CENTROIDS, lam=0.1, bonus="entropy")),
    (DataError, "go up to", lambda: mcmi_loss(LOGITS, LABELS + 9, CENTROIDS, lam=0.1)),
    (ConfigError, "0 or more", lambda: mcmi_loss(LOGITS, LABELS, CENTROIDS, lam=math.inf)),
    (DataError, "negative", lambda: mcmi_loss(LOGITS, LABELS, NEGATIVE, lam=0.1)),
    (DataError, "go up to", lambda: CMIMeter(3).update(LOGITS, LABELS + 9)),
    (DataError, "go up to", lambda: CMIMeter(3, num_groups=2).update(LOGITS, LABELS + 9, LABELS.clamp(max=1))),
    (ShapeError, "groups have shape", lambda: CMIMeter(3).update(LOGITS, LABELS, LABELS[:4])),
    (ShapeError, "4 outputs", lambda: CMIMeter(4).update(LOGITS, LABELS)),
]
TEACHERS = [
    (ConfigError, "NoneType", lambda: tuned(None, LOGITS, LABELS)),
    (DataError, "diverged", lambda: tuned(net(), NAN, LABELS)),
    (DataError, "whole numbers", lambda: tuned(net(), LOGITS, LABELS.double())),
    (DataError, "go up to", lambda: tuned(net(), LOGITS, LABELS + 9)),
    (DataError, "none is left", lambda: tuned(net(), LOGITS, LABELS * 0 - 1)),
    (DataError, "one label", lambda: tuned(net(), LOGITS, LABELS, validation=(NONE, LABELS[:0]))),
    (ConfigError, "NoneType", lambda: zero_shot_distill(None, net(), DATA, omit=[], **DRAW)),
    (ConfigError, "there are a teacher", lambda: zero_shot_distill([], net(), DATA, omit=[], **DRAW)),
    (ConfigError, "the student", lambda: zero_shot_distill(net(), "student", DATA, omit=[], **DRAW)),
    (DataError, "from 0 to 2", lambda: taught(DATA, omit=[9])),
    (DataError, "from 0 to 2", lambda: taught(DATA._replace(test_labels=LABELS + 9))),
    (DataError, "one label", lambda: taught(DATA._replace(test_inputs=NONE, test_labels=LABELS[:0]))),
    (DataError, "one label", lambda: taught(DATA._replace(labels=LABELS[:4]))),
    (DataError, "diverged", lambda: taught(DATA._replace(inputs=NAN))),
    (ShapeError, "same shape", lambda: taught(DATA, student=net(2))),
    (ConfigError, "1 sample a batch", lambda: taught(DATA, batch=0)),
    (ConfigError, "temperature", lambda: kd_loss(LOGITS, LOGITS, LABELS, temperature=0.0)),
    (ConfigError, "alpha", lambda: kd_loss(LOGITS, LOGITS, LABELS, alpha=2.0)),
    (ShapeError, "same shape", lambda: kd_loss(LOGITS[:1], LOGITS, LABELS)),
    (DataError, "one label", lambda: balanced_subset(LABELS[:0], 0.5, **DRAW)),
    (DataError, "one label", lambda: list(balanced_batches(LOGITS, LABELS[:3], 2, **DRAW))),
    (ConfigError, "per_class", lambda: list(balanced_batches(LOGITS, LABELS, 0, **DRAW))),
    (ConfigError, "size is 1", lambda: list(shuffled_batches(LOGITS, LABELS, 0, **DRAW))),
    (DataError, "NaN", lambda: expected_calibration_error(NAN, LABELS)),
    (DataError, "one label", lambda: expected_calibration_error(LOGITS, LABELS[:3])),
    (ConfigError, "a class at least", lambda: CentroidTracker(0)),
    (DataError, "without a sample", lambda: CentroidTracker(3).set(CENTROIDS * math.nan)),
    (DataError, "from 0 to 2", lambda: CentroidTracker(3).set(CENTROIDS).get(LABELS - 1)),
]


@pytest.mark.parametrize(("error", "words", "call"), MEASURES + TEACHERS)
def test_what_is_refused_and_with_which_words(error, words, call):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_class_without_a_sample_is_no_error():
    """Not in training, where its centroid is uniform and not used, nor among the classes of a student."""
    few = LABELS.clamp(max=1)
    assert isinstance(tuned(net(), LOGITS, few), nn.Linear)
    assert taught(DATA._replace(labels=few)).shape == (3,)
    assert taught(DATA._replace(test_labels=few))[2].isnan()
