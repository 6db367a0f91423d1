"""The methods of `kullback align` by name: what each learns from, and its options with their defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from kullback.align.dph import Dph
from kullback.align.f_dpg import FDpg, PartitionEstimator, target_divergence
from kullback.align.f_dpo import FDPOLoss, paper_divergence
from kullback.align.grpo import Grpo
from kullback.align.implicit import FSFT, matching_divergence
from kullback.align.kdrl import BetaSchedule, Kdrl
from kullback.align.methods import Preference, Supervised
from kullback.align.nash_policy import NashPolicy
from kullback.align.ppo import Ppo
from kullback.align.proposals import ProposalContest
from kullback.align.rehearsal import RehearsalBuffer
from kullback.core.errors import ConfigError
from kullback.divergences import FDivergence, f_divergence
from kullback.jobs._options import keywords

if TYPE_CHECKING:
    from kullback.align.methods import Method
    from kullback.jobs.align import MethodConfig

__all__ = ["Choice", "Kind", "Rehearsal", "chosen_method", "method_names"]

Kind = Literal["pair", "completion", "online"]
_PAPER = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The first stage of a method that rehearses: see `align.rehearsal.rehearse`."""

    threshold: float = 0.75
    answers: int = 8
    kept: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A method, what it learns from, and the stage before it, where it has one."""

    kind: Kind
    method: Method
    rehearsal: Rehearsal | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: Kind
    build: Callable[..., Method | tuple[Method, Rehearsal]]


def chosen_method(config: MethodConfig) -> Choice:
    """The method of this name with its options. Raises ConfigError for an unknown name, option or value."""
    known = _entries()
    name = config.name.replace("_", "-")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"there is no method {config.name!r}: {hint}")
    entry = known[name]
    given = keywords(f"the method {name}", entry.build, config.options, where="method.options")
    built = entry.build(**given)
    return Choice(entry.kind, *built) if isinstance(built, tuple) else Choice(entry.kind, built)


def method_names() -> list[str]:
    """The names that `chosen_method` knows."""
    return list(_entries())


def _entries() -> dict[str, _Entry]:
    return {
        "sft": _Entry("completion", _sft),
        "f-sft": _Entry("completion", _f_sft),
        "dpo": _Entry("pair", _dpo),
        "ipo": _Entry("pair", _ipo),
        "f-dpo": _Entry("pair", _f_dpo),
        "grpo": _Entry("online", _grpo),
        "dr-grpo": _Entry("online", _dr_grpo),
        "rloo": _Entry("online", _rloo),
        "ppo": _Entry("online", _ppo),
        "f-dpg": _Entry("online", _f_dpg),
        "dph-rl": _Entry("online", _dph),
        "nash-mp": _Entry("online", _nash_mp),
        "salsa": _Entry("online", _salsa),
        "kdrl": _Entry("online", _kdrl),
    }


def _sft() -> Method:
    return Supervised()


def _f_sft(
    *, divergence: str = "hellinger", beta: float = 0.05, baseline: str = "zero", level: str = "sequence",
    largest_weight: float | None = 4.0,
) -> Method:  # fmt: skip
    chosen: dict[str, Any] = {"baseline": baseline, "level": level, "largest_weight": largest_weight}
    name: Any = divergence.replace("-", "_")
    return FSFT(divergence=matching_divergence(name), beta=beta, **chosen)


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
    level: str = "token", epochs: int = 1, mini_batches: int = 1,
) -> Method:  # fmt: skip
    chosen: dict[str, Any] = {
        "penalty": penalty, "scale": scale, "baseline": baseline, "reduction": reduction, "level": level,
        "epochs": epochs, "mini_batches": mini_batches,
    }  # fmt: skip
    return Grpo(beta=beta, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, **chosen)


def _dr_grpo(*, beta: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2, length: int = 256) -> Method:
    return Grpo(beta=beta, clip_low=clip_low, clip_high=clip_high, scale="none", reduction=length)


def _rloo(*, beta: float = 0.05) -> Method:
    return Grpo(
        beta=beta, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
        clip_low=float("inf"), clip_high=float("inf"),
    )  # fmt: skip


def _ppo(
    *, beta: float = 0.05, critic: str = "head", critic_rate: float = 10.0, gamma: float = 1.0, trace: float = 0.95,
    whiten: bool = True, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
    value_clip: float = 0.2, value_weight: float = 0.5, epochs: int = 1, mini_batches: int = 1,
) -> Method:  # fmt: skip
    kind: Any = critic
    return Ppo(
        beta=beta, critic=kind, critic_rate=critic_rate, gamma=gamma, trace=trace, whiten=whiten, clip_low=clip_low,
        clip_high=clip_high, dual_clip=dual_clip, value_clip=value_clip, value_weight=value_weight, epochs=epochs,
        mini_batches=mini_batches,
    )  # fmt: skip


def _salsa(
    *, algorithm: str = "rloo", beta: float = 0.05, critic: str = "head", critic_rate: float = 10.0, epochs: int = 1,
    mini_batches: int = 1,
) -> Method:  # fmt: skip
    if algorithm == "ppo":
        return _ppo(beta=beta, critic=critic, critic_rate=critic_rate, epochs=epochs, mini_batches=mini_batches)
    if algorithm != "rloo":
        raise ConfigError(f"algorithm is rloo or ppo, not {algorithm!r}")
    if (critic, critic_rate, epochs, mini_batches) != ("head", 10.0, 1, 1):
        raise ConfigError("critic, critic_rate, epochs and mini_batches are options of algorithm ppo, not of rloo")
    return _rloo(beta=beta)


def _f_dpg(
    *, divergence: str = "js", alpha: float = 0.5, beta: float = 0.1, target: str = "tilt", baseline: str = "window",
    max_ratio: float | None = None, largest: float | None = None, proposal: str = "online", defence: float = 0.0,
    every: int = 16, judged_by: str = "kl",
) -> Method:  # fmt: skip
    chosen: dict[str, Any] = {"target": target, "baseline": baseline, "proposal": proposal}
    if proposal != "offline" and (every, judged_by) != (16, "kl"):
        raise ConfigError("every and judged_by are of proposal offline, which is renewed: set it, or leave them out")
    contest = ProposalContest(divergence=target_divergence(judged_by), every=every)
    return FDpg(
        divergence=target_divergence(divergence, alpha=alpha), beta=beta, max_ratio=max_ratio, defence=defence,
        partition=PartitionEstimator(largest=largest), contest=contest, **chosen,
    )  # fmt: skip


def _nash_mp(
    *, beta: float = 0.1, eta: float | None = None, decay: float = 0.95, mode: str = "nash-mp", inner: int = 16,
    mixture: float = 0.125, preferences: str = "bradley-terry",
) -> Method:  # fmt: skip
    chosen: dict[str, Any] = {"mode": mode, "preferences": preferences}
    return NashPolicy(beta=beta, eta=eta, decay=decay, inner=inner, mixture=mixture, **chosen)


def _kdrl(
    *, beta: float = 5e-3, beta_end: float = 1e-3, schedule: str = "constant", delta: float = 5e-5, steps: int = 100,
    kind: str = "k2", credit: str = "token", keep: str = "none", shaping: str = "loss", reinforced: bool = True,
    reward_from: int = 0, most_log_ratio: float | None = None, divergence: str = "sampled", top_k: int = 0,
    support: str = "student", tail: str = "bucket", clip_low: float = 0.2, clip_high: float = 0.2,
    scale: str = "group", baseline: str = "mean", epochs: int = 1, mini_batches: int = 1,
) -> Method:  # fmt: skip
    shape: Any = schedule
    chosen: dict[str, Any] = {
        "kind": kind, "credit": credit, "keep": keep, "shaping": shaping, "reinforced": reinforced,
        "reward_from": reward_from, "most_log_ratio": most_log_ratio, "divergence": divergence, "top_k": top_k or None,
        "support": support, "tail": tail,
    }  # fmt: skip
    part: dict[str, Any] = {"scale": scale, "baseline": baseline}
    policy = Grpo(clip_low=clip_low, clip_high=clip_high, epochs=epochs, mini_batches=mini_batches, **part)
    schedule_of = BetaSchedule(kind=shape, start=beta, end=beta_end, delta=delta, steps=steps)
    return Kdrl(schedule=schedule_of, policy=policy, **chosen)


def _dph(
    *, divergence: str = "forward_kl", alpha: float = 0.2, eta: float = 0.02, rehearsed: int = 0, level: str = "token",
    form: str = "generator", visited: float = 0.1, threshold: float = 0.75, answers: int = 8, kept: int = 1,
    clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0, clamp: float | None = None,
    epochs: int = 1, mini_batches: int = 1,
) -> tuple[Method, Rehearsal]:  # fmt: skip
    chosen: dict[str, Any] = {"divergence": divergence, "level": level, "form": form, "clamp": clamp}
    policy = Grpo(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, epochs=epochs, mini_batches=mini_batches
    )
    method = Dph(
        buffer=RehearsalBuffer(), policy=policy, alpha=alpha, eta=eta, rehearsed=rehearsed, visited=visited, **chosen
    )
    return method, Rehearsal(threshold=threshold, answers=answers, kept=kept)
