r"""Has a model forgotten? The divergence of its margins from those of models retrained without the forget set.

    margin(x) = z_y - logsumexp_{c != y} z_c, the log-odds of the label
    KLoM(x)   = KL(unlearned, oracle) of the margins of N unlearned and M retrained models, histogrammed on shared bins

Of exact oracles KLoM is not 0 but a floor that falls with the number of models (`klom_floor`); report it beside.
Shapes: N, M models; n points; C classes; nats. Sources: arXiv 2410.23232; the likelihood-ratio attack 2403.01218.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, MissingExtra, ShapeError

_POINTS = 512  # at once, so that they stay in a processor's cache

__all__ = ["KLoMSummary", "klom", "klom_floor", "klom_report", "margin", "ulira"]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-odds of the label: logits [..., C], labels [...] (or what broadcasts to it) to [...].

    Raises ShapeError, and DataError for labels that are no number of an output.

    >>> margin(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor([2.])
    """
    if logits.ndim < 1 or logits.shape[-1] < 2 or labels.ndim > logits.ndim - 1 or any(
        mine not in (1, whole) for mine, whole in zip(reversed(labels.shape), reversed(logits.shape[:-1]))
    ):  # fmt: skip
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ShapeError(f"logits are [..., C] of two classes or more and labels [...], got {shapes}")
    wrong = labels.is_floating_point() or labels.dtype == torch.bool
    if wrong or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]):
        raise DataError(f"labels are whole numbers from 0 to {logits.shape[-1] - 1}, and one is not")
    where = labels.long().expand(logits.shape[:-1]).unsqueeze(-1)
    own = logits.gather(-1, where).squeeze(-1)
    return own - logits.scatter(-1, where, -math.inf).logsumexp(-1)


def klom(
    unlearned: Tensor,
    oracle: Tensor,
    *,
    bins: int = 20,
    eps: float = 1e-5,
    clip: float = 100.0,
    direction: Literal["unlearned||oracle", "oracle||unlearned"] = "unlearned||oracle",
    include_max: bool = True,
    compiled: bool | None = None,
) -> Tensor:
    """KLoM of every point from margins [N, n] of unlearned and [M, n] of retrained models; [n], float64.

    Bins span both samples' joint range after clipping; empty bins of the second distribution count as eps. include_max:
    the largest margin belongs to the last bin; False drops it, as released code of the paper's authors does. compiled:
    None takes numba where it is installed and the margins are on a processor. Raises ShapeError for fewer than two
    models, DataError for NaN, ConfigError, MissingExtra.

    >>> klom(torch.zeros(4, 1), torch.ones(4, 1))  # log(1 / eps)
    tensor([11.5129], dtype=torch.float64)
    """
    _check_shapes(unlearned, oracle)
    if not isinstance(bins, int) or bins < 2 or not 0.0 < eps < 1.0 or not clip > 0.0:
        given = f"{bins}, {eps} and {clip}"
        raise ConfigError(f"bins are a whole number from 2 on, eps lies in (0, 1) and clip is positive, got {given}")
    if direction not in ("unlearned||oracle", "oracle||unlearned"):
        raise ConfigError(f"direction is unlearned||oracle or oracle||unlearned, not {direction!r}")
    pair = (unlearned, oracle) if direction == "unlearned||oracle" else (oracle, unlearned)
    fits = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) for x in pair)
    loops = _numba() if compiled is not False else None
    if compiled and loops is None:
        raise MissingExtra("numba", extra="numba")
    if loops is not None and fits:
        found = torch.empty(unlearned.shape[1], dtype=torch.float64)
        rows = (x.detach().contiguous().numpy() for x in pair)
        if not loops.klom(*rows, bins, eps, clip, include_max, found.numpy()):
            _check(*pair)
        return found
    _check(*pair)
    parts = []
    for start in range(0, unlearned.shape[1], _POINTS):
        first, second = (x[:, start : start + _POINTS].double().clamp(-clip, clip) for x in pair)
        parts.append(_klom(first, second, bins, eps, include_max))
    return torch.cat(parts) if parts else unlearned.new_zeros(0, dtype=torch.float64)


def _numba() -> ModuleType | None:
    try:
        from kullback.diagnose import _unlearning_numba
    except ImportError:
        return None
    return _unlearning_numba


def _klom(first: Tensor, second: Tensor, bins: int, eps: float, include_max: bool) -> Tensor:
    """KL(first, second) of some points, clipped."""
    low, high = torch.minimum(first.amin(0), second.amin(0)), torch.maximum(first.amax(0), second.amax(0))
    p, q = (_histogram(x, low, high, bins, include_max) for x in (first, second))
    return (torch.xlogy(p, p) - torch.xlogy(p, torch.where(q > 0, q, eps))).sum(1)


def _histogram(x: Tensor, low: Tensor, high: Tensor, bins: int, include_max: bool) -> Tensor:
    """Shares [n, bins] of each point's margins in its own bins."""
    count = x.shape[1]
    scale = torch.where(high > low, bins / (high - low), 1.0)
    place = (x - low).mul_(scale).long().clamp_(max=bins - 1)
    place += torch.arange(count, device=x.device) * bins
    if not include_max:
        place = place[x < high]
    counted = torch.bincount(place.flatten(), minlength=count * bins).view(count, bins).double()
    return counted / (len(x) if include_max else counted.sum(1, keepdim=True).clamp(min=1.0))


def _check_shapes(*margins: Tensor) -> None:
    for x in margins:
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != margins[0].shape[1]:
            shapes = " and ".join(str(tuple(x.shape)) for x in margins)
            raise ShapeError(f"margins are [models, points], two models at least and the same points, got {shapes}")


def _check(*margins: Tensor) -> None:
    _check_shapes(*margins)
    for x in margins:
        if x.isnan().any():
            raise DataError(f"{int(x.isnan().sum())} margins are NaN: a model has diverged, leave it out")


def klom_floor(oracle: Tensor, *, generator: torch.Generator, bins: int = 20, repeats: int = 8) -> Tensor:
    """What KLoM says of exact oracles: the mean over random halves of retrained models [M, n] against each other; [n].

    Halves have half the models, so compare with ensembles of M / 2.
    """
    _check(oracle)
    if repeats < 1:
        raise ConfigError(f"repeats is 1 or more, got {repeats}")
    if len(oracle) < 4:
        raise ShapeError(f"halves of two models each take four retrained models, got {len(oracle)}")
    total = torch.zeros(oracle.shape[1], dtype=torch.float64)
    for _ in range(repeats):
        order = torch.randperm(len(oracle), generator=generator)
        half = len(oracle) // 2
        total += klom(oracle[order[:half]], oracle[order[half : 2 * half]], bins=bins)
    return total / repeats


class KLoMSummary(NamedTuple):
    """Mean, 95th and 99th percentile of KLoM over points."""

    mean: float
    percentile_95: float
    percentile_99: float


def klom_report(unlearned: Tensor, oracle: Tensor, sets: Mapping[str, Tensor]) -> dict[str, KLoMSummary]:
    """KLoM over the points of each named set of numbers: forget, retain, validation. All three belong to an answer."""
    values = klom(unlearned, oracle)
    if not sets:
        raise ConfigError("no set was named: forget, retain and validation points all belong to an answer")
    found = {}
    for name, points in sets.items():
        if not len(points):
            raise ShapeError(f"the set {name!r} has no point")
        if points.dtype != torch.bool and not 0 <= int(points.min()) <= int(points.max()) < len(values):
            raise ShapeError(f"the set {name!r} has numbers of {len(values)} points from 0 on, and one is not")
        chosen = values[points]
        tails = torch.quantile(chosen, torch.tensor([0.95, 0.99], dtype=chosen.dtype)).tolist()
        found[name] = KLoMSummary(chosen.mean().item(), *tails)
    return found


def ulira(with_point: Tensor, without_point: Tensor, unlearned: Tensor) -> Tensor:
    """How often an attack tells that a point was in the data: accuracy [n], 1/2 where nothing is left of it.

    Margins [S, n] of shadow models that unlearned the point, and [S, n] of ones that never saw it, give a normal each;
    the attack guesses the likelier for the models `unlearned` [N, n] (deleted it) and for those that never saw it. The
    cheap form takes one unlearned model, N = 1, and models of all data in place of shadow models. Raises as `klom`.
    """
    _check(with_point, without_point)
    if unlearned.ndim != 2 or not len(unlearned):
        raise ShapeError(f"unlearned margins are [models, points], one model at least, got {tuple(unlearned.shape)}")
    _check(with_point, unlearned.expand(2, -1) if len(unlearned) == 1 else unlearned)
    if not all(bool(x.isfinite().all()) for x in (with_point, without_point, unlearned)):
        raise DataError("margins are finite for normal densities, and some are not: clip them, as to -100 and 100")

    def log_density(x: Tensor, sample: Tensor) -> Tensor:
        mean, spread = sample.double().mean(0), sample.double().std(0).clamp(min=1e-6)
        return -0.5 * ((x.double() - mean) / spread).square() - spread.log()

    told = log_density(unlearned, with_point) > log_density(unlearned, without_point)
    spared = log_density(without_point, with_point) <= log_density(without_point, without_point)
    return 0.5 * (told.double().mean(0) + spared.double().mean(0))
