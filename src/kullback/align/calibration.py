"""How well a preference model's probabilities match the labels, and how far a divergence lets that go.

ECE = sum_b (n_b / n) |share of wins in bin b - mean probability in bin b|, in bins of equal width. Where every outcome
is its own bin it is sum |p - q|, twice the total variation to the truth p, so that by the triangle inequality
ECE(q1) - ECE(q2) <= 2 TV(q1, q2) <= 2 psi(D(q2||q1)), with TV <= psi(D) = sqrt(D / (2 f''(1))), Pinsker's inequality
where Gilardoni's condition holds. Sources: arXiv 2309.16240; Gilardoni 2010, IEEE Trans. Inf. Theory 56.

Shapes: probabilities and labels [n] of comparisons.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence

__all__ = ["ece_gap_bound", "preference_ece"]


def preference_ece(probability: Tensor, label: Tensor, *, bins: int = 10) -> Tensor:
    """Expected calibration error of probabilities [n] that the first of two wins, with labels [n] (1 where it did).

    bins: of equal width on [0, 1]. Raises ShapeError, ConfigError for bins < 1, DataError for numbers outside [0, 1].

    >>> preference_ece(torch.tensor([0.9, 0.9, 0.2, 0.2]), torch.tensor([1, 1, 0, 1]))
    tensor(0.2000)
    """
    if bins < 1:
        raise ConfigError(f"bins is a number of bins, at least 1, got {bins}")
    if probability.shape != label.shape or probability.ndim != 1 or not len(label):
        shapes = f"{tuple(probability.shape)} and {tuple(label.shape)}"
        raise ShapeError(f"probabilities and labels are [n] with n > 0, got shapes {shapes}")
    wide = torch.promote_types(probability.dtype, torch.float32)
    confidence, won = probability.detach().to(wide), label.detach().to(wide)
    for name, values in (("probabilities", confidence), ("labels", won)):
        if not ((values >= 0.0) & (values <= 1.0)).all():
            raise DataError(f"{name} must lie in [0, 1] and some do not: give sigmoid of the margin, and 0 or 1")
    where = (confidence * bins).long().clamp(max=bins - 1)
    return torch.zeros(bins, dtype=wide, device=won.device).index_add(0, where, won - confidence).abs().sum() / len(won)


def ece_gap_bound(value: Tensor | float, divergence: FDivergence) -> Tensor:
    """2 psi(D) [...]: how much worse calibrated one policy can be than another at divergence D = value [...] from it.

    sqrt(2 D) for both KL divergences and the alpha family with alpha in [-1, 2], 2 sqrt(D) for the paper's
    Jensen-Shannon divergence (twice the usual one). Raises ConfigError where that inequality is not known to hold,
    DataError for a negative value.

    >>> from kullback.divergences import f_divergence
    >>> ece_gap_bound(0.02, f_divergence("kl"))
    tensor(0.2000)
    """
    amount = torch.as_tensor(value)
    if not (amount >= 0.0).all():
        raise DataError("a divergence is never negative: give D >= 0")
    if not _obeys_pinsker(divergence):
        raise ConfigError(f"no bound of the total variation by {divergence.name} is known here: take kl or jsd")
    return 2.0 * (amount / (2.0 * divergence.second_at_one)).sqrt()  # type: ignore[operator]


@lru_cache(maxsize=128)
def _obeys_pinsker(divergence: FDivergence) -> bool:
    """Gilardoni's condition f(u) (1 - f'''(1) / (3 f''(1)) (u - 1)) >= f''(1) / 2 (u - 1)^2, on a grid of ratios."""
    if divergence.second_at_one is None:
        return False
    with torch.enable_grad():
        at = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(divergence.derivative(at), at, create_graph=True)  # u f''(u), by log u
        change = torch.autograd.grad(first, at)[0].item() if first.requires_grad else 0.0
    log_u = torch.linspace(-12.0, 12.0, 4801, dtype=torch.float64)
    excess = torch.expm1(log_u)
    second = divergence.second_at_one
    third = change - second
    left = divergence.f(log_u) * (1.0 - third / (3.0 * second) * excess)
    right = 0.5 * second * excess.square()
    return bool((left >= right - 1e-9 * (1.0 + right)).all())
