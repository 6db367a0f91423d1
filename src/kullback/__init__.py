"""kullback brings one distribution to another.

>>> import torch
>>> from kullback.divergences import jsd
>>> jsd(torch.log_softmax(torch.zeros(1, 4), -1), torch.log_softmax(torch.zeros(1, 4), -1))
tensor([0.])
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_ROOMS = (
    "align", "core", "data", "diagnose", "distill", "divergences",
    "jobs", "models", "optim", "papers", "sample", "stream",
)  # fmt: skip
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    """Rooms are imported when first touched, so that `import kullback` costs nothing."""
    if name in _ROOMS:
        return import_module(f"kullback.{name}")
    raise AttributeError(f"module 'kullback' has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
