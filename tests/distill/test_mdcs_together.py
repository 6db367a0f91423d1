"""MDCS classifiers that are trained side by side: each ends where it would have alone."""

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.distill.mdcs import mdcs_loss
from kullback.distill.mdcs_classifier import MDCSClassifier, fit_together

SETTINGS = {"epochs": 4, "hidden": 10, "width": 7, "batch": 16, "warm_epochs": 2}
MEMBERS = (
    {"lam": (-0.5, 1.0, 2.5), "alpha": 0.6, "seed": 0},
    {"lam": (-0.5, 1.0, 2.5), "alpha": 0.6, "seed": 1},
    {"lam": (1.0, 1.0, 1.0), "alpha": 0.0, "seed": 1},
    {"lam": (0.0, 0.0, 0.0), "alpha": 2.0, "seed": 7, "augment_weak": lambda rows, generator: rows},
)


@pytest.fixture
def table(generator):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 20, 7]))
    return 2 * torch.eye(3, 6)[labels] + torch.randn(67, 6, generator=generator), labels


def test_each_ends_where_it_would_alone(table):
    rows, labels = table
    together = [MDCSClassifier(**SETTINGS, **own) for own in MEMBERS]
    fit_together(together, rows, labels)
    for model, own in zip(together, MEMBERS, strict=True):
        alone = MDCSClassifier(**SETTINGS, **own).fit(rows, labels)
        torch.testing.assert_close(model.expert_logits(rows), alone.expert_logits(rows), rtol=0, atol=2e-4)
        assert len(model.history_) == SETTINGS["epochs"]
        for found, wanted in zip(model.history_, alone.history_, strict=True):
            assert found.keys() == wanted.keys()
            for name in wanted:
                assert found[name] == pytest.approx(wanted[name], abs=1e-4), name
    spread = [(one.expert_logits(rows) - together[0].expert_logits(rows)).abs().max() for one in together[1:]]
    assert min(spread) > 0.1, "four models, and not four copies of one"


def test_experts_may_see_samples_of_their_own(generator):
    weak, strong = torch.randn(2, 3, 8, 5, generator=generator, dtype=torch.float64).unbind()
    labels = torch.randint(-1, 5, (3, 8), generator=generator)
    labels = labels.masked_fill(labels < 0, -100)
    counts, lam = torch.tensor([50.0, 20.0, 9.0, 4.0, 1.0]), (-0.5, 1.0, 2.5)
    found = mdcs_loss(weak, strong, labels, counts, lam=lam)
    for k, strength in enumerate(lam):
        own = mdcs_loss(weak[k : k + 1], strong[k : k + 1], labels[k], counts, lam=[strength])
        for name in ("cross_entropy", "consistency", "kept"):
            torch.testing.assert_close(found[name][k], own[name][0])
    shared = mdcs_loss(weak, strong, labels[0], counts, lam=lam)
    assert not torch.allclose(shared["cross_entropy"], found["cross_entropy"]), "labels of the first expert for all"
    with pytest.raises(ShapeError, match="labels"):
        mdcs_loss(weak, strong, labels[:2], counts, lam=lam)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 8}, "one width"),
        ({"lam": (1.0, 1.0)}, "number of experts"),
        ({"options": {"temperature": 2.0}}, "one options"),
    ],
)
def test_what_differs_in_more_is_fitted_apart(table, changes, message):
    with pytest.raises(ConfigError, match=message):
        fit_together([MDCSClassifier(**SETTINGS), MDCSClassifier(**{**SETTINGS, **changes})], *table)


def test_none_and_a_common_teacher_are_refused(table):
    with pytest.raises(ConfigError, match="no classifier"):
        fit_together([], *table)
    with pytest.raises(ConfigError, match="average over all"):
        fit_together([MDCSClassifier(**SETTINGS, options={"teacher": "mean"}) for _ in range(2)], *table)
