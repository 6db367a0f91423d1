"""Copies of a policy's trained weights beside it: a moving average, the best of its past."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["average_into", "copied_weights", "put_in_place"]


def copied_weights(policy: Any) -> dict[str, Tensor]:
    """The weights that are trained, as they are now."""
    return {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}


@torch.no_grad()
def average_into(held: dict[str, Tensor], policy: Any, *, decay: float) -> None:
    """One step of a moving average of the trained weights; it starts as a copy of them.

    >>> layer, held = torch.nn.Linear(1, 1, bias=False), {}
    >>> average_into(held, layer, decay=0.5)
    >>> torch.equal(held["weight"], layer.weight)
    True
    """
    for name, weight in policy.named_parameters():
        if not weight.requires_grad:
            continue
        if name not in held:
            held[name] = weight.detach().clone()
        held[name] = held[name].to(weight.device).lerp(weight.detach(), 1.0 - decay)


@contextmanager
def put_in_place(policy: Any, held: dict[str, Tensor]) -> Iterator[None]:
    """While open, the policy has the weights that are held; with none held, its own."""
    places = dict(policy.named_parameters())
    own = {name: places[name].data for name in held}
    try:
        for name, tensor in held.items():
            places[name].data = tensor.to(places[name].device)
        yield
    finally:
        for name, tensor in own.items():
            places[name].data = tensor
