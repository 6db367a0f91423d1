r"""Fine-tuning on demonstrations read as learning a reward: f-SFT, and what the implicit reward tells.

SFT and DPO learn r = b log(policy / reference) on one manifold. Matching a demonstrator with a pull to the reference
(see `matching`) maximises, over policies and a free constant c,

    J = E_demonstrations phi(b d + c) - c,   d = log policy - log reference,   phi(x) = -f\*(-x).

Maximum likelihood has phi(x) = x: c and the reference drop out, and nothing limits the drift. f-SFT keeps phi, whose
slope is the weight of a demonstration, less for those that have been raised already:

| divergence D(demonstrator||policy) | phi(x)               | weight phi'(x)    | here                          |
|------------------------------------|----------------------|-------------------|-------------------------------|
| none ("sft", "tv")                 | x                    | 1                 | total variation without limit |
| chi-squared (u - 1)^2              | x - x^2 / 4          | 1 - x / 2         | `neyman`                      |
| squared Hellinger (sqrt u - 1)^2   | x / (1 + x)          | (1 + x)^-2        | `squared_hellinger` times 2   |
| Jensen-Shannon                     | log(2 - e^-x)        | 1 / (2 e^x - 1)   | `jsd` times 2                 |
| reverse KL u log u                 | 1 - e^-x             | e^-x              | `reverse_kl`                  |
| forward KL -log u                  | log(1 + x)           | 1 / (1 + x)       | `kl`                          |

Every f here has f'(1) = 0, so that phi(0) = 0 and phi'(0) = 1: at the reference each loss has the gradient of SFT. The
paper writes the two KLs without that, which moves x by 1 and is taken up by c.
Values: b d of a token is Q - V, so V(s_t) = V(x) + the sum of b d up to t, and the whole sum is r - V(x).
Source: arXiv 2507.00018. Shapes: B completions of T tokens; log-probabilities and mask [B, T], the reference first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.methods import Batch
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence, f_divergence

__all__ = [
    "FSFT",
    "FSFTOutput",
    "drift_report",
    "fsft_loss",
    "implicit_reward_accuracy",
    "matching_divergence",
    "phi_transform",
    "prefix_values",
]

_NAMES = ("tv", "chi2", "hellinger", "js", "reverse_kl", "forward_kl")


def matching_divergence(name: Literal["tv", "chi2", "hellinger", "js", "reverse_kl", "forward_kl"]) -> FDivergence:
    """The divergence of the table by the paper's name; ConfigError for another.

    >>> matching_divergence("chi2").name
    'neyman'
    """
    if name not in _NAMES:
        raise ConfigError(f"the divergences of f-SFT are {', '.join(_NAMES)}, not {name!r}")
    if name in ("hellinger", "js"):
        return f_divergence("squared_hellinger" if name == "hellinger" else "jsd").scaled(2.0)
    return f_divergence({"tv": "total_variation", "chi2": "neyman", "forward_kl": "kl"}.get(name, name))


def phi_transform(
    x: Tensor, *, divergence: FDivergence, largest_weight: float | None = 4.0
) -> tuple[Tensor, Tensor]:
    """phi(x) and its slope phi'(x), the weight, both as x [...].

    Below the point where the weight reaches largest_weight phi goes on as a straight line (for Hellinger at x = -1/2);
    None leaves it as it is, and x beyond its domain raises DataError. Chi-squared goes on as its parabola for x > 2,
    with a negative weight: such demonstrations are pulled back. Total variation is the identity.

    >>> phi_transform(torch.tensor([-0.5, 0.0, 1.0]), divergence=matching_divergence("hellinger"))
    (tensor([-1.0000,  0.0000,  0.5000]), tensor([4.0000, 1.0000, 0.2500]))
    """
    if largest_weight is not None and not 1.0 < largest_weight < math.inf:
        raise ConfigError(f"largest_weight exceeds 1, phi's weight at 0, or is None, got {largest_weight}")
    if divergence.name == "total_variation":
        return x, torch.ones_like(x)
    if largest_weight is None:
        if (x <= -divergence.dual().domain[1]).any():
            edge = -divergence.dual().domain[1]
            raise DataError(f"phi of {divergence.name} ends at x = {edge:g}: set largest_weight to go on from there")
        return _phi(divergence, x)
    edge = -divergence.link(torch.tensor(math.log(largest_weight), dtype=torch.float64)).item()
    phi, weight = _phi(divergence, x.clamp(min=edge))
    return phi + largest_weight * (x - edge).clamp(max=0.0), weight


def _phi(divergence: FDivergence, x: Tensor) -> tuple[Tensor, Tensor]:
    if divergence.name == "neyman":
        return x - 0.25 * x.square(), 1.0 - 0.5 * x.detach()
    return -divergence.dual().conjugate(-x), divergence.link_inverse(-x.detach()).exp()


class FSFTOutput(NamedTuple):
    """loss, x and weight [B], or at level "token" [B, T]; the baseline c, a scalar. Weights carry no gradient."""

    loss: Tensor
    x: Tensor
    weight: Tensor
    baseline: Tensor


def fsft_loss(
    log_reference: Tensor | None,
    log_policy: Tensor,
    mask: Tensor,
    *,
    divergence: FDivergence,
    beta: float = 1.0,
    baseline: Literal["zero", "profile"] | Tensor = "zero",
    level: Literal["sequence", "token"] = "sequence",
    largest_weight: float | None = 4.0,
) -> FSFTOutput:
    """-(phi(x) - c) / beta of every demonstration (or of every token), x = beta d + c; never reduced.

    log_reference [B, T]: None only for total variation, which is maximum likelihood and differs from it by the constant
    log reference. level: "sequence" sums d over the mask (choose beta near 1 / typical |d|), "token" takes each alone
    and leaves 0 outside the mask. baseline: c = 0, a scalar that the caller learns with the policy, or "profile", the c
    that is best for this batch of two or more; fitted to each demonstration by itself it would undo the divergence.
    Raises ConfigError, ShapeError, and DataError for NaN or for x outside the domain of phi.
    """
    d = _log_ratio(log_reference, log_policy, mask, divergence)
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
    if level not in ("sequence", "token"):
        raise ConfigError(f'level is "sequence" or "token", not {level!r}')
    if level == "sequence":
        d = d.sum(-1)
    kept = mask.bool() if level == "token" else torch.ones_like(d, dtype=torch.bool)
    if not d.isfinite().all():
        raise DataError(f"{int((~d.isfinite()).sum())} log-ratios are infinite or NaN: look at both models' outputs")
    c = _baseline(beta * d.detach()[kept], divergence, baseline, largest_weight).to(d)
    x = beta * d + c
    phi, weight = phi_transform(x.masked_fill(~kept, 0.0), divergence=divergence, largest_weight=largest_weight)
    loss = (-(phi - c) / beta).masked_fill(~kept, 0.0)
    return FSFTOutput(loss, x.detach(), weight.masked_fill(~kept, 0.0), c)


def _log_ratio(log_reference: Tensor | None, log_policy: Tensor, mask: Tensor, divergence: FDivergence) -> Tensor:
    if log_reference is None:
        if divergence.name != "total_variation":
            raise ConfigError(f"{divergence.name} compares with the reference: give log_reference, or total variation")
        log_reference = torch.zeros_like(log_policy)
    if not log_policy.shape == log_reference.shape == mask.shape or log_policy.ndim != 2:
        shapes = f"{tuple(log_reference.shape)}, {tuple(log_policy.shape)} and {tuple(mask.shape)}"
        raise ShapeError(f"log-probabilities of both models and the mask are [B, T], got {shapes}")
    wide = torch.promote_types(log_policy.dtype, torch.float32)
    return torch.where(mask.bool(), log_policy.to(wide) - log_reference.detach().to(wide), 0.0)


def _baseline(
    scaled: Tensor, divergence: FDivergence, baseline: str | Tensor, largest_weight: float | None
) -> Tensor:
    """c for b d [n]; "profile" solves mean phi'(b d + c) = 1, at which J is largest."""
    if isinstance(baseline, str) and baseline == "zero":
        return scaled.new_zeros(())
    if divergence.name == "total_variation":
        raise ConfigError('a baseline drops out of maximum likelihood: leave it "zero"')
    if isinstance(baseline, Tensor):
        if baseline.ndim:
            raise ShapeError(f"the baseline is one number for all, got shape {tuple(baseline.shape)}")
        if not baseline.isfinite():
            raise DataError(f"the baseline is {baseline.item()}: start it at 0 and let it learn more slowly")
        return baseline
    if baseline != "profile":
        raise ConfigError(f'baseline is "zero", "profile" or a scalar tensor, not {baseline!r}')
    if scaled.numel() < 2:
        raise ShapeError(
            f'baseline="profile" is one for several demonstrations, and there are {scaled.numel()}: take a larger batch'
            " and drop a smaller last one"
        )
    # Weights fall in x and are 1 at x = 0, so c lies between the b d's, reversed.
    low, high = -scaled.amax(), -scaled.amin()
    for _ in range(60):
        at = 0.5 * (low + high)
        mean = phi_transform(scaled + at, divergence=divergence, largest_weight=largest_weight or 1e6)[1].mean()
        low, high = torch.where(mean > 1.0, at, low), torch.where(mean > 1.0, high, at)
    return 0.5 * (low + high)


@dataclass(frozen=True, slots=True, kw_only=True)
class FSFT:
    """f-SFT as a method of alignment (see `methods.Method`); its options are those of `fsft_loss`.

    The sum over a batch is divided by its tokens at both levels, so that total variation is the usual SFT. The other
    remedy against drift is a smaller learning rate, a fifth of the usual one at the same number of steps (see
    `pipeline`). baseline "learned": one c over all batches, which climbs dJ/dc = mean phi'(x) - 1 of each batch that is
    trained on by baseline_rate of it; `state_dict` holds it. Raises ConfigError as `fsft_loss`.

    >>> FSFT(divergence=matching_divergence("hellinger"), beta=0.05).needs_reference
    True
    """

    divergence: FDivergence
    beta: float = 1.0
    baseline: Literal["zero", "profile", "learned"] = "zero"
    level: Literal["sequence", "token"] = "sequence"
    largest_weight: float | None = 4.0
    baseline_rate: float = 0.1
    needs_reference: bool = field(init=False, repr=False)
    learned: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_reference", self.divergence.name != "total_variation")
        object.__setattr__(self, "learned", torch.zeros((), dtype=torch.float64))
        if not (self.baseline_rate > 0.0 and math.isfinite(self.baseline_rate)):
            raise ConfigError(f"baseline_rate is positive and finite, not {self.baseline_rate}")
        two = torch.zeros(2, 1)
        self._of(two, two, torch.ones_like(two))  # refuses what fsft_loss does

    def _of(self, log_reference: Tensor | None, log_policy: Tensor, mask: Tensor) -> FSFTOutput:
        baseline = self.learned if self.baseline == "learned" else self.baseline
        return fsft_loss(
            log_reference, log_policy, mask, divergence=self.divergence, beta=self.beta, baseline=baseline,
            level=self.level, largest_weight=self.largest_weight,
        )  # fmt: skip

    def count(self, batch: Batch) -> float:
        """Tokens."""
        return float(batch["completion_mask"].sum())

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss a token; logged are x and the weights of demonstrations, with their least and largest."""
        mask = batch["completion_mask"]
        reference = batch["reference_log_prob"] if self.needs_reference else None
        output = self._of(reference, log_prob, mask)
        kept = mask.bool() if self.level == "token" else torch.ones_like(output.x, dtype=torch.bool)
        x, weight = output.x[kept], output.weight[kept]
        if self.baseline == "learned" and log_prob.requires_grad and torch.is_grad_enabled():
            self.learned.add_(self.baseline_rate * (_mean_of_all(weight) - 1.0))
        if not self.needs_reference or not len(x):
            return output.loss.sum() / count, {}
        seen = {"baseline": output.baseline} if self.baseline != "zero" else {}
        seen |= {"x": x.mean(), "weight": weight.mean(), "weight/least": weight.min(), "weight/largest": weight.max()}
        return output.loss.sum() / count, seen

    def state_dict(self) -> dict[str, Any]:
        """The baseline, where it is learned."""
        return {"baseline": self.learned.item()} if self.baseline == "learned" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the baseline back its value."""
        self.learned.fill_(state["baseline"])


def _mean_of_all(weight: Tensor) -> float:
    """The mean over this batch on all processes, so that all of them keep one baseline; 1 for no weight at all."""
    sums = torch.stack([weight.double().sum(), torch.tensor(float(weight.numel()), device=weight.device).double()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1]) if sums[1] else 1.0


def prefix_values(
    log_reference: Tensor, log_policy: Tensor, mask: Tensor, *, beta: float = 1.0, start: Tensor | float = 0.0
) -> Tensor:
    """V of every prefix [B, T + 1], from the V(x) of the prompt given as start, if known; constant after the mask ends.

    The last is V(x) plus the implicit reward, which is the outcome's reward where policy and reference are optimal and
    prior. Only differences inside a prompt are known: logits alone give values up to a shift for each state.
    Raises ShapeError, ConfigError for beta <= 0, DataError for log-ratios that are infinite or NaN.

    >>> log_reference, log_policy = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-0.5, -2.0]])
    >>> prefix_values(log_reference, log_policy, torch.ones(1, 2))
    tensor([[ 0.0000,  0.5000, -0.5000]])
    """
    if not log_policy.shape == log_reference.shape == mask.shape or log_policy.ndim != 2:
        shapes = f"{tuple(log_reference.shape)}, {tuple(log_policy.shape)} and {tuple(mask.shape)}"
        raise ShapeError(f"log-probabilities of both models and the mask are [B, T], got {shapes}")
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ConfigError(f"beta is positive and finite, not {beta}")
    gained = torch.where(mask.bool(), beta * (log_policy - log_reference), 0.0).cumsum(-1)
    if not gained.isfinite().all():
        raise DataError("some log-ratios inside the mask are infinite or NaN: look at both models' outputs")
    first = torch.as_tensor(start, device=gained.device).reshape(-1, 1)
    if len(first) not in (1, len(gained)):
        raise ShapeError(f"start is one value, or one for each of {len(gained)} completions, got {len(first)}")
    return torch.nn.functional.pad(gained, (1, 0)) + first


def implicit_reward_accuracy(
    reference_chosen: Tensor, reference_rejected: Tensor, policy_chosen: Tensor, policy_rejected: Tensor
) -> Tensor:
    """The share of pairs [B] whose chosen completion has the larger log(policy / reference); a tie counts as half.

    >>> reference = torch.tensor([-1.0, -2.0])
    >>> implicit_reward_accuracy(reference, reference, reference, reference)
    tensor(0.5000)
    """
    if not reference_chosen.shape == reference_rejected.shape == policy_chosen.shape == policy_rejected.shape:
        raise ShapeError("the four log-probabilities have one entry for each pair, and their shapes differ")
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    if margin.isnan().any() or not margin.numel():
        raise DataError("accuracy needs at least one pair, and no log-probability that is NaN")
    return (0.5 * (margin.sign() + 1.0)).mean()


@torch.no_grad()
def drift_report(
    log_reference: Tensor, log_policy: Tensor, mask: Tensor, *, entropy: Tensor | None = None
) -> dict[str, float]:
    """How far a policy has moved, from completions that it drew itself: log-probabilities [B, T] of their tokens.

    kl and kl_error: KL(policy||reference) of whole completions with its standard error, the mean of the log-ratio;
    kl_token: a token; tokens: mean length; entropy: of whole completions, from the entropies [B, T] of next tokens
    where they are given, else from -log policy. Raises ShapeError, and DataError for NaN or where there is no token.
    """
    ratio = prefix_values(log_reference, log_policy, mask)[:, -1].double()
    count = mask.bool().sum()
    if not count:
        raise DataError("drift is measured on the tokens of completions, and there is none: sample some first")
    spread = -log_policy if entropy is None else entropy
    if spread.shape != mask.shape:
        raise ShapeError(f"entropies are {tuple(mask.shape)} as the log-probabilities, got {tuple(spread.shape)}")
    if not spread[mask.bool()].isfinite().all():
        raise DataError("some entropies inside the mask are infinite or NaN: look at the policy's outputs")
    return {
        "kl": ratio.mean().item(),
        "kl_error": (ratio.std() / math.sqrt(len(ratio))).item() if len(ratio) > 1 else math.nan,
        "kl_token": (ratio.sum() / count).item(),
        "tokens": (count / len(ratio)).item(),
        "entropy": torch.where(mask.bool(), spread, 0.0).sum(-1).double().mean().item(),
    }
