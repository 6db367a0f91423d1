"""The manners of scikit-learn for dataclasses: their fields are the parameters, and what is fitted ends in _."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, MissingExtra, NotFitted, ShapeError

__all__ = ["Parameters", "as_table", "check_fitted"]


class Parameters:
    """get_params and set_params from the fields of a dataclass, so that scikit-learn's clone and searches take it."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters as they were given; deep has no effect, since none of them is an estimator."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}  # type: ignore[arg-type]

    def set_params(self, **parameters: Any) -> Self:
        """Set some parameters; raises ConfigError for an unknown name. What was fitted stays until the next fit."""
        known = self.get_params()
        for name, value in parameters.items():
            if name not in known:
                raise ConfigError(f"{type(self).__name__} has no parameter {name!r}: it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return any(name.endswith("_") and not name.startswith("_") for name in vars(self))

    def __sklearn_tags__(self) -> Any:
        try:
            from sklearn.utils import InputTags, Tags, TargetTags
        except ImportError as error:
            raise MissingExtra("scikit-learn", extra="sklearn") from error
        return Tags(estimator_type=None, target_tags=TargetTags(required=False), input_tags=InputTags())

    def __repr__(self) -> str:
        changed = []
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if one.init and (isinstance(value, Tensor) or (value is not default and value != default)):
                changed.append(f"{one.name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"


def check_fitted(estimator: Any, name: str) -> None:
    """Raises NotFitted where the attribute `name` of an estimator is not there yet."""
    if not hasattr(estimator, name):
        raise NotFitted(f"{type(estimator).__name__} is not fitted: call fit first")


def as_table(data: Any, *, features: int | None = None, name: str = "data") -> Tensor:
    """Rows of features as a tensor [n, d], float32 if given so and float64 otherwise.

    Raises ShapeError for another shape or number of features, DataError where there is no row or one is not finite.
    """
    table = data.detach() if isinstance(data, Tensor) else torch.from_numpy(np.array(data))  # a list is float64
    table = table if table.dtype == torch.float32 else table.double()
    if table.ndim != 2 or table.shape[1] == 0:
        raise ShapeError(f"{name} has shape [n, d], a row an item, got {tuple(table.shape)}")
    if features is not None and table.shape[1] != features:
        raise ShapeError(f"{name} has {table.shape[1]} features and fit saw {features}: give the same ones")
    if not len(table):
        raise DataError(f"{name} is empty: give at least one row")
    if not bool(torch.isfinite(table).all()):
        raise DataError(f"{name} has entries that are not finite: drop or impute those rows")
    return table
