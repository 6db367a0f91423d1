"""What every estimator obeys in scikit-learn's manners, law by law, and for each law a wrong one that it rejects.

A row makes an estimator and data, and says what is measured after a fit: a tensor of numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, NotFitted
from kullback.diagnose import BayesMixture, HighDimKDE, KDERegimes, PNCriterion, SGLDEnsemble
from kullback.diagnose.exponential_families import gaussian


@dataclass(frozen=True)
class Row:
    """make: () -> estimator; data: generator -> rows; measure: (fitted, rows) -> numbers; change: a parameter's value.

    parts: rows to what fit takes, the rows themselves or inputs and labels. order: whether that of the rows does not
    matter; prior: whether it predicts before a fit; table: whether it takes any table of finite numbers.
    """

    make: Callable
    data: Callable
    measure: Callable
    change: tuple[str, object]
    parts: Callable = lambda data: (data,)
    order: bool = True
    prior: bool = False
    table: bool = True

    def fitted(self, data):
        return self.make().fit(*self.parts(data))


def normal(generator):
    return torch.randn(60, 4, generator=generator, dtype=torch.float64)


def diagnosis(estimator, data):
    found = estimator.diagnose(0.5, data[:7])
    return torch.tensor([found.mu, *found.mu_ci, found.h_kl, found.participation, found.stderr_log])


NORMAL = gaussian(4)


def criterion(estimator, data):
    estimator.score(data)
    return torch.tensor([*estimator.theta_, estimator.expansion_.a, estimator.expansion_.b, *estimator.result_])


def labelled(data):
    return data, torch.arange(len(data)) % 2


NETWORK = torch.nn.Linear(4, 2)
LAWS_OF_FOUR = torch.arange(48.0, dtype=torch.float64).cos().view(6, 4, 2).log_softmax(-1)
PRIOR = torch.full((6,), -math.log(6), dtype=torch.float64)


def pairs(generator):
    return torch.stack([torch.randint(size, (60,), generator=generator) for size in (4, 2)], dim=1)


TABLE = {
    "HighDimKDE": Row(HighDimKDE, normal, lambda e, x: e.score_samples(x), ("bandwidth", 0.7)),
    "HighDimKDE, likelihood": Row(
        lambda: HighDimKDE("likelihood"), normal, lambda e, x: e.score_samples(x), ("precision", "single")
    ),
    "PNCriterion": Row(lambda: PNCriterion(NORMAL, draws=2000), normal, criterion, ("delta", 0.2)),
    "SGLDEnsemble": Row(
        lambda: SGLDEnsemble(NETWORK, steps=30, burn_in=10, thin=5),
        normal,
        lambda e, x: e.predict_log_proba(x),
        ("lr", 1e-3),
        parts=labelled,
        order=False,
        table=False,
    ),
    "BayesMixture": Row(
        lambda: BayesMixture(PRIOR, LAWS_OF_FOUR),
        pairs,
        lambda e, x: torch.cat([e.predict_log_proba(range(4)).flatten(), e.posterior()]),
        ("log_prior", torch.arange(6.0).log_softmax(0)),
        parts=lambda data: tuple(zip(*data)) if isinstance(data, list) else (data[:, 0], data[:, 1]),
        prior=True,
        table=False,
    ),
    "KDERegimes": Row(KDERegimes, normal, diagnosis, ("k", 9)),
}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def law_parameters(row, data):
    estimator = row.make()
    given = estimator.get_params()
    again = type(estimator)(**given)
    assert again.get_params() == given
    name, value = row.change
    assert given[name] is not value
    assert estimator.set_params(**{name: value}) is estimator
    assert estimator.get_params() == {**given, name: value}
    with pytest.raises(ConfigError, match="nonsense"):
        estimator.set_params(nonsense=1)
    assert (row.measure(row.fitted(data), data) - row.measure(estimator.fit(*row.parts(data)), data)).abs().max() > 0


def law_fit_keeps_parameters(row, data):
    estimator = row.make()
    given = estimator.get_params()
    assert estimator.fit(*row.parts(data)) is estimator
    assert estimator.get_params() == given


def law_not_fitted(row, data):
    if row.prior:
        return
    with pytest.raises(NotFitted, match="fit"):
        row.measure(row.make(), data)


def law_data_unchanged(row, data):
    copy = data.clone()
    row.measure(row.fitted(data), data)
    assert torch.equal(copy, data)


def law_refit_forgets(row, data):
    once = row.fitted(data[:40])
    twice = row.fitted(data[20:]).fit(*row.parts(data[:40]))
    close(row.measure(once, data), row.measure(twice, data))


def law_same_every_time(row, data):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, other = (row.measure(row.fitted(data), data) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def law_arrays(row, data):
    expected = row.measure(row.fitted(data), data)
    close(row.measure(row.fitted(data.numpy()), data.numpy()), expected)
    close(row.measure(row.fitted(data.tolist()), data), expected)


def law_order_of_rows(row, data):
    if row.order:
        close(row.measure(row.fitted(data.flip(0)), data), row.measure(row.fitted(data), data))


def law_bad_data(row, data):
    if not row.table:
        return
    broken = data.clone()
    broken[3, 1] = float("nan")
    for bad in (broken, data[:0], data[0], data.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"finite|empty|shape|rows|points"):
            row.make().fit(bad)
    with pytest.raises(ValueError, match="features"):
        row.measure(row.fitted(data), data[:, :-1])


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_law(name, law, generator):
    LAWS[law](TABLE[name], TABLE[name].data(generator))


@pytest.mark.parametrize("name", TABLE)
def test_scikit_learn_clones_it(name, generator):
    base = pytest.importorskip("sklearn.base")
    row = TABLE[name]
    data = row.data(generator)
    fitted = row.fitted(data)
    fresh = base.clone(fitted)
    assert fresh.get_params().keys() == fitted.get_params().keys()  # it copies tensors and modules
    law_not_fitted(replace(row, make=lambda: fresh), data)
    close(row.measure(fresh.fit(*row.parts(data)), data), row.measure(fitted, data))


class Wrong(HighDimKDE):
    """Right but for what a subclass below breaks."""

    def fit(self, X, y=None):
        return super().fit(X)


class ForgetsParameters(Wrong):
    def set_params(self, **parameters):
        return self


class OverwritesParameters(Wrong):
    def fit(self, X, y=None):
        super().fit(X)
        self.bandwidth = self.bandwidth_
        return self


class NeverUnfitted(Wrong):
    def score_samples(self, X):
        return super().score_samples(X) if hasattr(self, "points_") else torch.zeros(len(X))


class ScalesInPlace(Wrong):
    def fit(self, X, y=None):
        X -= 1.0
        return super().fit(X)


class WarmStart(Wrong):
    def fit(self, X, y=None):
        rows = torch.as_tensor(X)
        self.rows = torch.cat([self.rows, rows]) if hasattr(self, "rows") else rows
        return super().fit(self.rows)


class GlobalRandomState(Wrong):
    def fit(self, X, y=None):
        super().fit(X)
        self.bandwidth_ *= 1.0 + float(torch.rand(()))
        return self


class TensorsOnly(Wrong):
    def fit(self, X, y=None):
        return super().fit(X.double())


class FirstRowsOnly(Wrong):
    def fit(self, X, y=None):
        return super().fit(torch.as_tensor(X)[:30])


class FillsGaps(Wrong):
    def fit(self, X, y=None):
        return super().fit(torch.as_tensor(X).nan_to_num())


WRONG = [
    ("parameters", ForgetsParameters),
    ("fit_keeps_parameters", OverwritesParameters),
    ("not_fitted", NeverUnfitted),
    ("data_unchanged", ScalesInPlace),
    ("refit_forgets", WarmStart),
    ("same_every_time", GlobalRandomState),
    ("arrays", TensorsOnly),
    ("order_of_rows", FirstRowsOnly),
    ("bad_data", FillsGaps),
]


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    row = replace(TABLE["HighDimKDE"], make=wrong)
    with pytest.raises((AssertionError, AttributeError, pytest.fail.Exception)):
        LAWS[law](row, row.data(generator))


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)
