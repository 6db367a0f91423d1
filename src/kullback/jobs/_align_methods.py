"""The methods of `kullback align` by name: what each learns from, and its options with their defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from kullback.align.f_dpo import FDPOLoss, paper_divergence
from kullback.align.grpo import Grpo
from kullback.align.methods import Preference, Supervised
from kullback.core.errors import ConfigError
from kullback.divergences import FDivergence, f_divergence
from kullback.jobs._options import keywords

if TYPE_CHECKING:
    from kullback.align.methods import Method
    from kullback.jobs.align import MethodConfig

__all__ = ["Kind", "chosen_method", "method_names"]

Kind = Literal["pair", "completion", "online"]
_PAPER = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: Kind
    build: Callable[..., Method]


def chosen_method(config: MethodConfig) -> tuple[Kind, Method]:
    """What the method learns from, and the method. Raises ConfigError for an unknown name, option or value."""
    known = _entries()
    name = config.name.replace("_", "-")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"there is no method {config.name!r}: {hint}")
    entry = known[name]
    given = keywords(f"the method {name}", entry.build, config.options, where="method.options")
    return entry.kind, entry.build(**given)


def method_names() -> list[str]:
    """The names that `chosen_method` knows."""
    return list(_entries())


def _entries() -> dict[str, _Entry]:
    return {
        "sft": _Entry("completion", _sft),
        "dpo": _Entry("pair", _dpo),
        "ipo": _Entry("pair", _ipo),
        "f-dpo": _Entry("pair", _f_dpo),
        "grpo": _Entry("online", _grpo),
        "dr-grpo": _Entry("online", _dr_grpo),
        "rloo": _Entry("online", _rloo),
    }


def _sft() -> Method:
    return Supervised()


def _dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    return Preference(options=FDPOLoss(beta=beta, label_smoothing=label_smoothing))


def _ipo(*, beta: float = 0.1, length_normalised: bool = True) -> Method:
    return Preference(options=FDPOLoss(beta=beta, loss="ipo"), length_normalised=length_normalised)


def _f_dpo(
    *, divergence: str = "forward_kl", alpha: float = 0.5, beta: float = 0.1, loss: str = "sigmoid",
    label_smoothing: float = 0.0, match_curvature: bool = False,
) -> Method:  # fmt: skip
    options: dict[str, Any] = {"loss": loss, "label_smoothing": label_smoothing, "match_curvature": match_curvature}
    return Preference(options=FDPOLoss(divergence=_divergence(divergence, alpha), beta=beta, **options))


def _divergence(name: str, alpha: float) -> FDivergence:
    """A divergence by the name of a paper of this room or by that of the family."""
    plain: Any = name.replace("-", "_")
    return paper_divergence(plain, alpha=alpha) if plain in _PAPER else f_divergence(plain)


def _grpo(
    *, beta: float = 0.0, penalty: str = "k3", clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = None, scale: str = "group", baseline: str = "mean", reduction: str = "token-mean",
    level: str = "token",
) -> Method:  # fmt: skip
    chosen: dict[str, Any] = {
        "penalty": penalty, "scale": scale, "baseline": baseline, "reduction": reduction, "level": level,
    }  # fmt: skip
    return Grpo(beta=beta, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, **chosen)


def _dr_grpo(*, beta: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2, length: int = 256) -> Method:
    return Grpo(beta=beta, clip_low=clip_low, clip_high=clip_high, scale="none", reduction=length)


def _rloo(*, beta: float = 0.05) -> Method:
    return Grpo(
        beta=beta, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
        clip_low=float("inf"), clip_high=float("inf"),
    )  # fmt: skip
