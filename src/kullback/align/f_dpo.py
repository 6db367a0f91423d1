"""f-DPO: the pairwise loss of DPO with the slope of any f-divergence where the log-ratio stands.

The policy that maximises E r - b D(reference||policy), with the f of arXiv 2309.16240 taken at u = policy / reference,
has r = b f'(u) + const(prompt) wherever f' reaches -inf at u = 0. The constant cancels in a comparison, so that

    L = -log sigmoid(b s(d_w) - b s(d_l)),   d = log policy - log reference of a whole completion,   s(d) = f'(e^d).

| the paper's name | here                          | s(d)               | weight s'(d) of a sample's gradient |
|------------------|-------------------------------|--------------------|-------------------------------------|
| reverse KL       | `reverse_kl`                  | d (plain DPO)      | 1                                   |
| forward KL       | `kl`                          | 1 - e^-d           | e^-d                                |
| Jensen-Shannon   | `jsd` scaled by 2             | log 2 + log sig d  | sigmoid(-d)                         |
| alpha in (0, 1)  | `alpha_divergence(alpha)`     | (1 - e^(-a d)) / a | e^(-a d)                            |

All but plain DPO push hard where the policy has lost mass and stop where it has gained much. d is the sum over the
tokens of the completion, its end included and the prompt left out: their mean belongs to another objective.
Where s is steeper than `steepest` it goes on as a straight line: e^-d leaves float32 at d = -88, and the difference of
two infinities is no number.

Shapes: B pairs; sequence log-probabilities [B] in nats, the reference first; losses and rewards [B].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence, f_divergence

__all__ = [
    "FDPOLoss",
    "FDPOOutput",
    "fdpo_loss",
    "fppo_penalty",
    "implicit_reward",
    "paper_divergence",
    "preference_metrics",
]

_FARTHEST = 1000  # log-ratios up to which the steepness of a link is looked at
_LOSSES = ("sigmoid", "robust", "hinge", "ipo")
REVERSE_KL = f_divergence("reverse_kl")


def paper_divergence(
    name: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"], *, alpha: float = 0.5
) -> FDivergence:
    """The divergence that arXiv 2309.16240 calls by this name; ConfigError for another, or for alpha outside (0, 1).

    Its Jensen-Shannon divergence is twice the usual one. trl's f_alpha_divergence_coef is 1 - alpha.

    >>> paper_divergence("forward_kl").link(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.7183,  0.0000,  0.6321])
    """
    if name == "alpha":
        if not 0.0 < alpha < 1.0:
            raise ConfigError(f"alpha lies strictly between 0 (reverse KL) and 1 (forward KL), got {alpha}")
        return f_divergence("alpha_divergence", alpha=alpha)
    if name == "jensen_shannon":
        return f_divergence("jsd").scaled(2.0)
    if name not in ("reverse_kl", "forward_kl"):
        raise ConfigError(f"the paper has reverse_kl, forward_kl, jensen_shannon and alpha, not {name!r}")
    return f_divergence("kl" if name == "forward_kl" else name)


class _Edges(NamedTuple):
    """Between low and high the link is as steep as asked at most; its slopes at both."""

    low: float
    high: float
    slope_low: float
    slope_high: float


@lru_cache(maxsize=128)
def _edges(divergence: FDivergence, steepest: float) -> _Edges:
    with torch.enable_grad():
        grid = torch.arange(-_FARTHEST, _FARTHEST + 1, dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad(divergence.link(grid).sum(), grid)
    fine = (slope <= steepest) & (slope >= 0.0)
    if not fine[_FARTHEST]:
        raise ConfigError(f"{divergence.name} is steeper than {steepest:g} at a ratio of 1 already: raise steepest")
    below = int(fine[: _FARTHEST + 1].flip(0).long().cumprod(0).sum()) - 1
    above = int(fine[_FARTHEST:].long().cumprod(0).sum()) - 1
    low = -math.inf if below == _FARTHEST else -float(below)
    high = math.inf if above == _FARTHEST else float(above)
    return _Edges(low, high, slope[_FARTHEST - below].item(), slope[_FARTHEST + above].item())


def _score(divergence: FDivergence, log_ratio: Tensor, steepest: float) -> Tensor:
    """The link, continued as a straight line with its own slope where it is steeper than allowed."""
    edges = _edges(divergence, steepest)
    score = divergence.link(log_ratio.clamp(edges.low, edges.high))
    if edges.low > -math.inf:
        score = score + edges.slope_low * (log_ratio - edges.low).clamp(max=0.0)
    if edges.high < math.inf:
        score = score + edges.slope_high * (log_ratio - edges.high).clamp(min=0.0)
    return score


def _log_ratio(log_reference: Tensor, log_policy: Tensor, what: str) -> Tensor:
    if log_reference.shape != log_policy.shape:
        raise ShapeError(
            f"{what}: the reference has shape {tuple(log_reference.shape)} and the policy {tuple(log_policy.shape)}: "
            "give one log-probability a completion for both"
        )
    wide = torch.promote_types(torch.promote_types(log_reference.dtype, log_policy.dtype), torch.float32)
    ratio = log_policy.to(wide) - log_reference.to(wide).detach()
    if not ratio.isfinite().all():
        raise DataError(
            f"{what}: {int((~ratio.isfinite()).sum())} of {ratio.numel()} log-ratios are infinite or NaN: take a "
            "reference without a top-k filter, which gives every token some probability, and look whether the policy "
            "has diverged"
        )
    return ratio


def implicit_reward(
    log_reference: Tensor,
    log_policy: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: FDivergence = REVERSE_KL,
    beta: float = 1.0,
    steepest: float = 1e30,
) -> Tensor:
    """b s(d), the reward for which the policy is the optimum, up to a constant for each prompt; differentiable.

    Log-probabilities of completions [B], or with a mask [B, T] of their tokens [B, T], of which only those of the mask
    are summed; to [B]. Float32 at least. Raises ShapeError, ConfigError for beta <= 0, DataError for NaN.

    >>> implicit_reward(torch.tensor([-3.5, -1.2]), torch.tensor([-3.0, -1.0]), beta=0.1)
    tensor([0.0500, 0.0200])
    """
    _check_positive("beta", beta)
    if mask is not None:
        if mask.shape != log_policy.shape or mask.shape != log_reference.shape:
            raise ShapeError(f"mask has shape {tuple(mask.shape)} and the tokens {tuple(log_policy.shape)}")
        kept = mask.bool()
        log_reference, log_policy = (torch.where(kept, x, 0.0) for x in (log_reference, log_policy))
    ratio = _log_ratio(log_reference, log_policy, "implicit reward")
    return beta * _score(divergence, ratio if mask is None else ratio.sum(-1), steepest)


class FDPOOutput(NamedTuple):
    """loss [B] of each pair; chosen_reward and rejected_reward [B], b s(d) without a gradient; the log-ratios d."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    chosen_log_ratio: Tensor
    rejected_log_ratio: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FDPOLoss:
    """The options of f-DPO; called with sequence log-probabilities [B] it gives the losses of the pairs.

    divergence: from `paper_divergence` or any other `f_divergence`; beta: the coefficient of the divergence.
    loss, of the margin m = beta (s_w - s_l):
        "sigmoid"  -(1 - e) log sigmoid(m) - e log sigmoid(-m), e the label_smoothing (conservative DPO);
        "robust"   [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e), unbiased if a share e of labels is wrong;
        "hinge"    max(0, 1 - m);
        "ipo"      (s_w - s_l - 1 / (2 beta))^2.
    match_curvature: divide the divergence by f''(1), so that one beta is as strong for all near the reference.
    allow_invalid: take a divergence whose slope at ratio 0 is finite, for which the optimum has no such form.
    steepest: the slope of s beyond which it is continued as a straight line.
    Raises ConfigError for values out of range and for options that would do nothing.

    >>> pairs = (torch.tensor([-3.5]), torch.tensor([-2.0]), torch.tensor([-3.0]), torch.tensor([-2.5]))
    >>> FDPOLoss(divergence=paper_divergence("forward_kl"))(*pairs).loss
    tensor([0.6424])
    """

    divergence: FDivergence = REVERSE_KL
    beta: float = 0.1
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    match_curvature: bool = False
    allow_invalid: bool = False
    steepest: float = 1e30
    used: FDivergence = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        _check_positive("steepest", self.steepest)
        if self.loss not in _LOSSES:
            raise ConfigError(f"loss is one of {', '.join(_LOSSES)}, not {self.loss!r}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is a share of wrong labels in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ConfigError(f'label_smoothing does nothing with loss="{self.loss}": leave it at 0')
        if self.loss == "robust" and not self.label_smoothing:
            raise ConfigError('loss="robust" is "sigmoid" without label_smoothing: set the share of wrong labels')
        if not self.divergence.keeps_support and not self.allow_invalid:
            raise ConfigError(
                f"{self.divergence.name} has a finite slope at ratio 0, so its optimum may drop completions and no "
                "pairwise loss finds it: take another divergence, or allow_invalid=True"
            )
        object.__setattr__(self, "used", self.divergence.normalised() if self.match_curvature else self.divergence)

    def __call__(
        self,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        *,
        lengths: tuple[Tensor, Tensor] | None = None,
    ) -> FDPOOutput:
        """Losses [B] from log-probabilities [B]; the gradient flows into the policy's only, and nothing is reduced.

        lengths: tokens [B] of the chosen and of the rejected completions, by which their scores are divided (the form
        of IPO that its authors report); without it scores are those of whole completions.
        Raises ShapeError for shapes that differ, an empty batch or log-probabilities of tokens, DataError for NaN.
        """
        shapes = f"{tuple(policy_chosen.shape)} and {tuple(policy_rejected.shape)}"
        if policy_chosen.shape != policy_rejected.shape or not policy_chosen.numel():
            raise ShapeError(f"chosen and rejected come in pairs, at least one, got shapes {shapes}")
        if policy_chosen.ndim != 1:
            raise ShapeError(f"f-DPO compares whole completions, [B], got {shapes}: sum over each one's tokens first")
        chosen = _log_ratio(reference_chosen, policy_chosen, "chosen")
        rejected = _log_ratio(reference_rejected, policy_rejected, "rejected")
        score_chosen, score_rejected = (_score(self.used, d, self.steepest) for d in (chosen, rejected))
        rewards = (self.beta * score_chosen.detach(), self.beta * score_rejected.detach())
        if lengths is not None:
            score_chosen = score_chosen / _length(lengths[0], chosen)
            score_rejected = score_rejected / _length(lengths[1], rejected)
        return FDPOOutput(self._of(score_chosen - score_rejected), *rewards, chosen.detach(), rejected.detach())

    def _of(self, difference: Tensor) -> Tensor:
        """The loss of each pair from s_w - s_l."""
        if self.loss == "ipo":
            return (difference - 0.5 / self.beta).square()
        margin, wrong = self.beta * difference, self.label_smoothing
        if self.loss == "hinge":
            return (1.0 - margin).clamp(min=0.0)
        if not wrong:
            return -logsigmoid(margin)
        right, flipped = -(1.0 - wrong) * logsigmoid(margin), -wrong * logsigmoid(-margin)
        return (right - flipped) / (1.0 - 2.0 * wrong) if self.loss == "robust" else right + flipped


def _check_positive(name: str, value: float) -> None:
    if not (value > 0.0 and math.isfinite(value)):
        raise ConfigError(f"{name} is positive and finite, not {value}")


def _length(tokens: Tensor, ratio: Tensor) -> Tensor:
    if tokens.shape != ratio.shape:
        raise ShapeError(f"lengths have shape {tuple(tokens.shape)} and pairs {tuple(ratio.shape)}: one a completion")
    return tokens.to(ratio.dtype).clamp(min=1.0)


def fdpo_loss(
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    divergence: FDivergence = REVERSE_KL,
    beta: float = 0.1,
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    match_curvature: bool = False,
) -> FDPOOutput:
    """`FDPOLoss` with these options on sequence log-probabilities [B]: losses and implicit rewards [B].

    >>> output = fdpo_loss(*torch.tensor([[-3.5], [-2.0], [-3.0], [-2.5]]))  # plain DPO
    >>> output.loss, output.chosen_reward - output.rejected_reward
    (tensor([0.6444]), tensor([0.1000]))
    """
    options = FDPOLoss(
        divergence=divergence, beta=beta, loss=loss, label_smoothing=label_smoothing, match_curvature=match_curvature
    )
    return options(reference_chosen, reference_rejected, policy_chosen, policy_rejected)


@torch.no_grad()
def preference_metrics(options: FDPOLoss, output: FDPOOutput) -> dict[str, Tensor]:
    """What a trainer logs of a batch, each a scalar: rewards, their margin and accuracy, log-ratios, the divergence.

    Accuracy counts a tie as half. divergence is unbiased where both completions were drawn from the reference.
    straight: the share of log-ratios on the straight continuation of s (see `FDPOLoss`).
    """
    margin = output.chosen_reward - output.rejected_reward
    ratios = torch.cat([output.chosen_log_ratio, output.rejected_log_ratio])
    edges = _edges(options.used, options.steepest)
    return {
        "rewards/chosen": output.chosen_reward.mean(),
        "rewards/rejected": output.rejected_reward.mean(),
        "rewards/margin": margin.mean(),
        "rewards/accuracy": (0.5 * (margin.sign() + 1.0)).mean(),
        "log_ratio/chosen": output.chosen_log_ratio.mean(),
        "log_ratio/rejected": output.rejected_log_ratio.mean(),
        "divergence": options.used.penalty(ratios, samples_from="reference").mean(),
        "straight": ((ratios < edges.low) | (ratios > edges.high)).to(margin.dtype).mean(),
    }


def fppo_penalty(
    log_reference: Tensor, log_policy: Tensor, *, divergence: FDivergence = REVERSE_KL, beta: float = 0.1
) -> Tensor:
    """-b f°(reference / policy) of samples of the policy [...], detached: what f-PPO adds to the reward of a token.

    Its mean is -b D(reference||policy). In the authors' code the generator is written for reference / policy, which
    mirrors the names; here they are those of the table above. f has no slope at 1, so that no sample is rewarded for
    its deviation: for `reverse_kl` it is u^-1 - 1 + log u, where the authors have log u, with the same mean.

    >>> fppo_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    tensor([-0.0149, -0.0368])
    """
    _check_positive("beta", beta)
    ratio = _log_ratio(log_reference, log_policy.detach(), "penalty")
    return -beta * divergence.penalty(ratio, samples_from="model")
