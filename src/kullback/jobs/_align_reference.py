"""The reference of an align job that is no directory, and the teacher of one whose texts end otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kullback.align._hf_reference import ServedReference
from kullback.align.kdrl import Kdrl
from kullback.core.errors import ConfigError

if TYPE_CHECKING:
    from kullback.jobs.align import AlignConfig

__all__ = ["check_served", "served_reference", "with_teacher"]


def served_reference(references: Sequence[str]) -> ServedReference | None:
    """The server that is named as the reference, None where there is none."""
    return ServedReference(references[0]) if any(map(_served, references)) else None


def check_served(config: AlignConfig, method: Any) -> None:
    """Whether a reference behind a server can do what is asked of it. Raises ConfigError before anything is run."""
    served = [name for name in config.reference if _served(name)]
    if not served:
        return
    if len(config.reference) > 1:
        raise ConfigError(f"{served[0]} is a server, and only models in directories are averaged: name it alone")
    if getattr(method, "compares", None) is not None:
        raise ConfigError(
            f"divergence {method.divergence} compares the laws of all tokens, and {served[0]} gives log-probabilities "
            "of drawn tokens alone: name a teacher's directory, or leave method.options.divergence at sampled"
        )
    drawn = hasattr(method, "opponents") and method.opponents(config.sampling.group)
    if drawn and method.opponent in ("reference", "mixture"):
        raise ConfigError(f"{config.method.name} draws from the reference too: name a directory, not {served[0]}")
    if config.sampling.temperature != 1:
        raise ConfigError(
            "a server answers with log-probabilities at temperature 1 and sampling.temperature is "
            f"{config.sampling.temperature}: leave one of them out"
        )


def with_teacher(method: Any, *, correct: float, end: int, ends: Sequence[int]) -> Any:
    """The method that counts as right what the job does, and is deaf to a teacher where the model ends.

    end: the model's end token; ends: those of the references, in whose eyes another one is all but impossible.
    """
    if not isinstance(method, Kdrl):
        return method
    return replace(method, correct_over=correct, unheard=(end,) if any(other != end for other in ends) else ())


def _served(name: str) -> bool:
    return name.startswith(("http://", "https://"))
