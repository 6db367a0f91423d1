"""The few abstractions of kullback: structural, so that any function or object of the right shape fits.

Shapes are written in brackets: B batch, T positions, V vocabulary. Log-probabilities are normalised and in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Codec", "Decoder", "Divergence", "Kernel", "Monitor", "Policy", "Report", "Teacher", "TeacherOutput"]


class Divergence(Protocol):
    """D(p||q) in nats from normalised log-probabilities [..., V] to [...]; never reduced, never detached."""

    def __call__(self, log_p: Tensor, log_q: Tensor, /) -> Tensor: ...


class Kernel(NamedTuple):
    """A sampler: `init(position, *, generator) -> State` and `step(state, *, generator) -> (State, Info)`."""

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any]]


class Monitor(Protocol):
    """A detector over a stream, in bounded memory."""

    drift_detected: bool

    def update(self, x: Any) -> Monitor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Policy(Protocol):
    """A bandit policy."""

    def pull(self, context: Any, *, generator: torch.Generator) -> int: ...
    def update(self, arm: int, reward: float, context: Any) -> None: ...


class Codec(Protocol):
    """A lossy or lossless representation of tensors, whose bytes are counted from what it stores."""

    def encode(self, x: Tensor, /) -> Any: ...
    def decode(self, packed: Any, /) -> Tensor: ...
    def nbytes(self, packed: Any, /) -> int: ...


class Decoder(Protocol):
    """A decoding strategy in the form that `model.generate(custom_generate=...)` takes."""

    def __call__(self, model: Any, input_ids: Tensor, *, generation_config: Any, **kwargs: Any) -> Any: ...


class TeacherOutput(NamedTuple):
    """What a teacher says about each position, in one of three forms; the fields of the others are None.

    logits [B, T, V]; or hidden [B, T, H] with the head's weight [V, H] and bias [V], so that logits need never be held;
    or top_ids [B, T, K] with top_log_probs [B, T, K], the K most likely tokens, and tail_log_prob [B, T], the logarithm
    of all the mass that they leave, where wanted with tail_ids [B, T, M] and tail_log_probs [B, T, M], tokens drawn
    from that rest, with replacement, label_log_probs [B, T] of the token that comes next, kept or not, and entropy
    [B, T] of the whole distribution in nats, at temperature 1 whatever that of the probabilities is.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    tail_log_prob: Tensor | None = None
    tail_ids: Tensor | None = None
    tail_log_probs: Tensor | None = None
    label_log_probs: Tensor | None = None
    entropy: Tensor | None = None


class Teacher(Protocol):
    """The reference distribution over next tokens, live, cached or served: ids [B, T] and mask [B, T] in."""

    def __call__(self, ids: Tensor, mask: Tensor, /) -> TeacherOutput: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one seed of a paper's reproduction returns.

    metrics: name -> number, the quantities that the card's claims refer to; rows: the table behind the figure, one
    mapping per line; seconds is filled in by whoever runs it. Verdicts come from the card, never from the reproduction.
    """

    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    seconds: float = 0.0
