"""CS-IB as an estimator of scikit-learn: fit and predict on tables. Importing it needs scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, MissingExtra
from kullback.core.rng import generator
from kullback.distill.bottleneck import Bandwidth, Bottleneck, CSIBLoss, bandwidth_of
from kullback.distill.bottleneck_bounds import generalisation_proxy
from kullback.divergences.cauchy_schwarz_samples import cs_qmi_normalized

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingExtra("scikit-learn", extra="sklearn") from error

__all__ = ["CSIBRegressor"]

_MEASURED, _ROWS = 10, 512  # how often in a fit the information plane is measured, and on how many rows at most


class CSIBRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Regression through a bottleneck with Cauchy-Schwarz divergences: a perceptron trained with Adam on `CSIBLoss`.

    X [n, d] and y [n] or [n, o] are standardised inside, and bandwidths are of standardised values. beta, sigma_x,
    sigma_y, symmetric: see `CSIBLoss`; hidden, k, stochastic: see `Bottleneck`. decay: the factor on lr every ten
    epochs (the paper: hidden=(128, 128, 128), k=128, sigma_x=1.0, lr=1e-4, decay=0.6, epochs=200). random_state: a
    whole number.

    After a fit: loss_curve_, the mean loss of each epoch; information_plane_, ten points of a fit, each with its epoch,
    compression I(x; t) (normalised, of t with its noise), relevance I(y; t) in bits, taken as log2(var y / MSE) / 2 (0
    for a constant y), and proxy, the root of compression over n, to which the gap to new data is related. Raises
    ConfigError for values out of range, and scikit-learn's ValueError for tables that are empty, not finite or of the
    wrong shape.

    >>> X = np.linspace(-1, 1, 40).reshape(-1, 1)
    >>> float(CSIBRegressor(epochs=100, k=8, sigma_x=0.3).fit(X, X[:, 0] ** 2).score(X, X[:, 0] ** 2)) > 0.9
    True
    """

    def __init__(
        self,
        *,
        beta: float = 1e-2,
        sigma_x: Bandwidth = "sqrt_d",
        sigma_y: Bandwidth = 1.0,
        hidden: Sequence[int] = (128, 128),
        k: int = 16,
        lr: float = 1e-3,
        decay: float = 1.0,
        batch: int = 128,
        epochs: int = 80,
        symmetric: bool = True,
        stochastic: bool = False,
        random_state: int = 0,
    ) -> None:
        self.beta, self.sigma_x, self.sigma_y, self.symmetric = beta, sigma_x, sigma_y, symmetric
        self.hidden, self.k, self.stochastic = hidden, k, stochastic
        self.lr, self.decay, self.batch, self.epochs, self.random_state = lr, decay, batch, epochs, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit a fresh network to X [n, d] and y [n] or [n, o]."""
        self._check_options()
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, ensure_min_samples=2, dtype=np.float64)
        self._flat = y.ndim == 1
        targets = np.asarray(y, dtype=np.float64).reshape(len(X), -1)
        self._center, self._scale = _standards(X)
        self._target_center, self._target_scale = _standards(targets)
        x = torch.tensor((X - self._center) / self._scale, dtype=torch.float32)
        z = torch.tensor((targets - self._target_center) / self._target_scale, dtype=torch.float32)
        self.network_ = Bottleneck(
            x.shape[1], z.shape[1], hidden=self.hidden, k=self.k, stochastic=self.stochastic,
            generator=generator(self.random_state, "weights"),
        )  # fmt: skip
        self.loss_curve_: list[float] = []
        self.information_plane_: list[dict[str, float]] = []
        self._train(x, z, CSIBLoss(beta=self.beta, sigma_x=bandwidth_of(x, self.sigma_x), sigma_y=self.sigma_y,
                                   symmetric=self.symmetric))  # fmt: skip
        self.network_.double()  # so that a prediction does not depend on the rows beside it
        return self

    def predict(self, X: Any) -> np.ndarray[Any, Any]:
        """Predictions [n] or [n, o], as y was given; a stochastic network predicts from its means."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            x = torch.from_numpy((X - self._center) / self._scale)
            found = self.network_(x).prediction.numpy() * self._target_scale + self._target_center
        return found[:, 0] if self._flat else found

    def _check_options(self) -> None:
        if min(self.batch - 1, self.epochs, self.k, len(self.hidden), *self.hidden) < 1 or not 0 < self.lr < math.inf:
            raise ConfigError("epochs, k and one or more hidden widths are at least 1, batch is at least 2, lr > 0")
        if not 0.0 < self.decay < math.inf:
            raise ConfigError(f"decay is the factor on lr every ten epochs, above 0, and is {self.decay}")
        if not isinstance(self.random_state, int | np.integer) or self.random_state < 0:
            raise ConfigError(f"random_state is a whole number, 0 or more, and is {self.random_state!r}")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _train(self, x: Tensor, z: Tensor, loss: CSIBLoss) -> None:
        order, noise = generator(self.random_state, "batches"), generator(self.random_state, "noise")
        optimizer = torch.optim.Adam(self.network_.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, self.decay)
        parts = max(round(len(x) / self.batch), 1)  # batches of one size: a small last one estimates badly
        every = max(self.epochs // _MEASURED, 1)
        for epoch in range(1, self.epochs + 1):
            total = 0.0
            for rows in torch.randperm(len(x), generator=order).tensor_split(parts):
                out = self.network_(x[rows], noise)
                value = loss(x[rows], z[rows], out.prediction, out.representation)["loss"]
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.item() * len(rows)
            schedule.step()
            self.loss_curve_.append(total / len(x))
            if epoch % every == 0 or epoch == self.epochs:
                self.information_plane_.append({"epoch": epoch, **self._information(x, z, loss)})

    def _information(self, x: Tensor, z: Tensor, loss: CSIBLoss) -> dict[str, float]:
        step = -(-len(x) // _ROWS)
        x, z = x[::step], z[::step]
        with torch.no_grad():
            t = self.network_(x, generator(self.random_state, "information")).representation  # with its noise
            error = (self.network_(x).prediction - z).square().mean().item()
            sigma_x, sigma_t = bandwidth_of(x, loss.sigma_x), bandwidth_of(t, loss.sigma_t)
            compression = cs_qmi_normalized(x, t, sigma_x=sigma_x, sigma_t=sigma_t).item()
        spread = z.var(correction=0).item()  # of a constant target there is nothing to know
        relevance = 0.5 * math.log2(spread / max(error, 1e-30)) if spread > 0.0 else 0.0
        return {"compression": compression, "relevance": relevance, "proxy": generalisation_proxy(compression, len(x))}


def _standards(table: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Means and deviations of the columns, 1 for a constant one."""
    scale = table.std(0)
    return table.mean(0), np.where(scale > 0, scale, 1.0)
