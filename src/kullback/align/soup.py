"""Soups: the average of models that were fine-tuned from one ancestor, as a reference for alignment (SALSA).

    theta_soup = sum_k w_k theta_k,  w on the simplex

For tables of logits the soup is the geometric mixture pi_g of its parents, and with V(ref) = b log E_ref exp(R / b),
the best value that a reference allows, and D = -log sum sqrt(p q), pi* the parents tilted by exp(R / b),

    V(pi_g) = (V(pi_1) + V(pi_2)) / 2 + b (D(pi_1, pi_2) - D(pi_1*, pi_2*)):

the soup is better than its parents on average where the reward brings them together. Networks are tables only as far
as the loss between them has no barrier (`linear_connectivity`).

Shapes: log-probabilities and rewards [..., N], in nats. Source: arXiv 2411.01798.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kullback.align._shards import Shards, open_shards
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.files import atomic_directory
from kullback.models.adapters import check_one_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Connectivity",
    "geometric_soup",
    "linear_connectivity",
    "soft_value",
    "soup",
    "soup_gain",
    "soup_model",
    "soup_state_dict",
]


def soup_state_dict(
    state_dicts: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The weighted mean of models' tensors, taken in dtype at least and cast back; equal weights by default.

    Tensors of whole numbers must be equal and are copied; a tensor that a state dict holds twice (tied weights) stays
    one. Raises ShapeError for other names or shapes, ConfigError for weights that do not sum to one, and for adapters
    that are not merged: the average of A and that of B do not give that of B A.

    >>> soup_state_dict([{"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}], [0.25, 0.75])
    {'a': tensor([2.5000])}
    """
    shares = _weights(len(state_dicts), weights)
    first = state_dicts[0]
    _check_alike(first, state_dicts[1:])
    made: dict[tuple[int, ...], Tensor] = {}
    found = {}
    for name in first:
        parts = [state[name] for state in state_dicts]
        same = tuple(part.data_ptr() for part in parts) if parts[0].numel() else (hash(name),)
        if same not in made or made[same].shape != parts[0].shape:
            made[same] = _average(name, parts, shares, dtype)
        found[name] = made[same]
    return found


def _average(name: str, parts: Sequence[Tensor], shares: Sequence[float], dtype: torch.dtype) -> Tensor:
    if not parts[0].is_floating_point():
        if any(not torch.equal(parts[0], part) for part in parts[1:]):
            raise ShapeError(f"{name} holds whole numbers that differ between the models: they have no average")
        return parts[0].clone()
    wide = torch.promote_types(parts[0].dtype, dtype)
    total = parts[0].to(wide) * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total.add_(part.to(wide), alpha=share)
    return total.to(parts[0].dtype)


def _weights(count: int, weights: Sequence[float] | None) -> list[float]:
    if count < 1:
        raise ConfigError("a soup has one model at least")
    shares = [1.0 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(shares) != count or any(not 0.0 <= share <= 1.0 for share in shares) or abs(sum(shares) - 1.0) > 1e-6:
        raise ConfigError(f"weights are {count} shares in [0, 1] that sum to 1, one a model, got {shares}")
    return shares


def _check_alike(first: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> None:
    for name in first:
        if ".lora_" in name:
            raise ConfigError(f"{name} is part of an adapter, and averages of parts are none of models: merge it first")
    for other in others:
        differ = sorted(first.keys() ^ other.keys())
        if differ:
            raise ShapeError(f"the models differ in their tensors, as {differ[0]}: average models of one architecture")
        for name, tensor in first.items():
            if other[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} and {tuple(other[name].shape)}"
                raise ShapeError(f"{name} has shapes {shapes}: average models of one architecture")


def soup(folders: Sequence[str | Path], weights: Sequence[float] | None = None, *, save_to: str | Path) -> Path:
    """The soup of model directories as a directory of its own, shard by shard: never a whole model is held.

    The directories are ones of transformers with safetensors, or of LoRA adapters of one model, each of which counts as
    that model with its adapter merged in: what is averaged are the products B A, never A and B. All but the weights is
    copied from the first. Raises DataError for a directory without safetensors or one that is there already, ShapeError
    for models or vocabularies that differ, ConfigError for weights, and for adapters of different models.
    """
    from safetensors.torch import save_file

    target = Path(save_to)
    shares = _weights(len(folders), weights)
    shards = _open_alike(folders)
    if target.exists():
        raise DataError(f"{target} is there already: name another directory for the soup")
    with atomic_directory(target) as out:
        for path in sorted(shards[0].folder.iterdir()):
            if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt"):
                shutil.copy2(path, out / path.name)
        for file, names in shards[0].files.items():
            averaged = {name: _read_average(name, shards, shares) for name in names}
            save_file(averaged, out / file, metadata={"format": "pt"})
    return target


def soup_model(
    models: Sequence[PreTrainedModel | str | Path], weights: Sequence[float] | None = None
) -> PreTrainedModel:
    """The soup of models in memory, or of directories as `soup` takes them, as a new model in evaluation mode.

    Of directories alone it holds the average and not the parents, two models' memory at most; beside models in memory a
    directory is loaded whole. The models stay as they are; the new one has the first one's class, configuration, types
    and device. Raises as `soup` and `soup_state_dict`: nothing is left out of an average because it differs.
    """
    shares = _weights(len(models), weights)
    folders = [model for model in models if isinstance(model, str | Path)]
    if len(folders) == len(models):
        return _loaded_average(folders, shares)
    parents = [_loaded_average([model], [1.0]) if isinstance(model, str | Path) else model for model in models]
    states = [parent.state_dict() for parent in parents]
    _check_alike(states[0], states[1:])
    made = copy.deepcopy(parents[0]).eval()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            parts = [state[name].to(tensor.device) for state in states]
            tensor.copy_(_average(name, parts, shares, torch.float32))
    return made


def _loaded_average(folders: Sequence[str | Path], shares: Sequence[float]) -> PreTrainedModel:
    import transformers

    shards = _open_alike(folders)
    place = shards[0].folder
    config = transformers.AutoConfig.from_pretrained(place)
    name = (config.architectures or ["none"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ConfigError(f"{place} holds a model of class {name!r}, which transformers has not: load it and give that")
    state = {part: _read_average(part, shards, shares) for part in shards[0]}
    model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)
    if (place / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(place)
    return model


def _read_average(name: str, shards: Sequence[Shards], shares: Sequence[float]) -> Tensor:
    parts, kept = zip(*(shard.read(name) for shard in shards), strict=True)
    if any(part.shape != parts[0].shape for part in parts):
        raise ShapeError(f"{name} has another shape in one model: average models of one architecture")
    return _average(name, parts, shares, torch.float32).to(kept[0])


def _open_alike(folders: Sequence[str | Path]) -> list[Shards]:
    """The tensors of each directory, which have the same names."""
    places = [Path(folder) for folder in folders]
    check_one_base(places)
    shards = [open_shards(place) for place in places]
    first = set(shards[0])
    for other in shards[1:]:
        differ = sorted(first ^ set(other))
        if differ:
            raise ShapeError(
                f"the models differ in their tensors, as {differ[0]}: average models of one architecture"
            )
    return shards


class Connectivity(NamedTuple):
    """Losses [A] at the shares alpha [A] of the second model, and the barrier: how far the loss rises above the chord.

    connected: the barrier is at most a tenth of the mean loss at both ends.
    """

    alphas: Tensor
    losses: Tensor
    barrier: float
    connected: bool


@torch.no_grad()
def linear_connectivity(
    first: torch.nn.Module,
    second: torch.nn.Module,
    loss: Callable[[Any], float],
    *,
    alphas: Sequence[float] | None = None,
) -> Connectivity:
    """The loss along the straight line between two models; both are left as they were.

    loss: of a model, called with `first` holding the mixed weights. Raises ShapeError for models that do not match.
    """
    shares = [place / 10 for place in range(11)] if alphas is None else list(alphas)
    if not shares or any(not 0.0 <= share <= 1.0 for share in shares):
        raise ConfigError(f"alphas are shares in [0, 1], got {shares}")
    ends = [{name: x.detach().clone() for name, x in model.state_dict().items()} for model in (first, second)]
    _check_alike(ends[0], ends[1:])
    found = []
    try:
        for share in shares:
            first.load_state_dict(soup_state_dict(ends, [1.0 - share, share]))
            found.append(float(loss(first)))
    finally:
        first.load_state_dict(ends[0])
    line, losses = torch.tensor(shares, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)
    low, high = losses[line.argmin()], losses[line.argmax()]
    span = (line.max() - line.min()).clamp(min=1e-12)
    chord = low + (high - low) * (line - line.min()) / span
    barrier = (losses - chord).max().item()
    return Connectivity(line, losses, barrier, barrier <= 0.1 * (0.5 * (low + high)).abs().item())


def geometric_soup(log_parents: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The normalised geometric mixture of parents [..., N]: the soup of tables of logits.

    >>> a, b = (torch.tensor(x).log() for x in ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3)))
    >>> geometric_soup([a, b]).exp()
    tensor([0.3334, 0.4083, 0.2583])
    """
    shares = _weights(len(log_parents), weights)
    total = sum(share * log_parent for share, log_parent in zip(shares, log_parents, strict=True))
    return torch.as_tensor(total).log_softmax(-1)


def soft_value(
    log_reference: Tensor, rewards: Tensor, *, beta: float, log_proposal: Tensor | None = None
) -> Tensor:
    """V = b log E_ref exp(R / b), what the best policy with a KL to this reference attains; [..., N] to [...].

    Exact over the last dimension, or with log_proposal an importance-weighted mean over samples of that law.
    """
    _check_beta(beta)
    scores = log_reference + rewards / beta
    if log_proposal is None:
        return beta * scores.logsumexp(-1)
    return beta * ((scores - log_proposal).logsumexp(-1) - math.log(scores.shape[-1]))


def soup_gain(
    log_first: Tensor, log_second: Tensor, rewards: Tensor, *, beta: float, log_proposal: Tensor | None = None
) -> Tensor:
    """How much the equal-weight geometric soup attains above the mean of its parents, [..., N] to [...]; may be < 0.

    Exact over the last dimension, or with log_proposal an importance-weighted estimate over samples of that law.
    """
    _check_beta(beta)
    weights = torch.zeros_like(log_first) if log_proposal is None else -log_proposal - math.log(log_first.shape[-1])
    between, tilt = 0.5 * (log_first + log_second) + weights, rewards / beta
    partitions = [(parent + tilt + weights).logsumexp(-1) for parent in (log_first, log_second)]
    # D of the parents, less that of the tilted ones, whose partition functions are taken out.
    apart = (between + tilt).logsumexp(-1) - between.logsumexp(-1) - 0.5 * (partitions[0] + partitions[1])
    return beta * apart


def _check_beta(beta: float) -> None:
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
