"""The errors kullback raises: one sentence that says what was expected, what came, and what to do."""

from typing import ClassVar

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "Interrupted",
    "KullbackError", "MissingExtra", "NotFitted", "RewardError", "ShapeError",
]  # fmt: skip


class KullbackError(Exception):
    """Any error whose message is meant for the user: the command line prints it and exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


class ShapeError(KullbackError, ValueError):
    """Tensors whose shapes, vocabularies or supports do not belong together."""


class ConfigError(KullbackError, ValueError):
    """An option with an unknown name, a value out of range, or one that would do nothing."""


class DataError(KullbackError, ValueError):
    """Input data or a model directory that is missing, empty, damaged or of the wrong kind."""


class CheckpointError(KullbackError, RuntimeError):
    """A run directory or checkpoint that cannot be written, read, or resumed with this configuration."""


class Interrupted(KullbackError):
    """A job that was asked to stop by a signal and has saved its state."""

    exit_code = 130


class NotFitted(KullbackError, RuntimeError):
    """A method that was used before it was fitted."""


class RewardError(KullbackError, RuntimeError):
    """A reward that cannot be had: its function raises, takes too long, or returns no finite number a completion."""


class MissingExtra(KullbackError, ImportError):
    """An optional dependency that is not installed.

    >>> raise MissingExtra("pyarrow", extra="parquet")
    Traceback (most recent call last):
        ...
    kullback.core.errors.MissingExtra: pyarrow is needed here and is not installed: pip install 'kullback[parquet]'
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is needed here and is not installed: pip install 'kullback[{extra}]'")
