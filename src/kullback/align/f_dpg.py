r"""f-DPG: a policy brought to an unnormalised target P by any f-divergence, as a policy gradient with its own reward.

    p = P / Z,   t(x) = pi(x) / p(x),   R(x) = -f'(t(x)),   grad D(p, pi) = -E_{x~q} [(pi/q)(x) R(x) grad log pi(x)]

q is what samples: the policy itself (online), or the best of its past (offline, `proposals.ProposalContest`). Z is the
running mean of P/q, one for each context in the conditional case. The table gives D(p, pi) in kullback's order, the
target first.

| in the paper      | here                  | R up to a constant          |
|-------------------|-----------------------|-----------------------------|
| KL(p, pi)         | `kl`                  | p / pi (DPG, GDC)           |
| KL(pi, p)         | `reverse_kl`          | log p - log pi (RL with KL) |
| Jensen-Shannon    | `jsd` scaled by 2     | softplus(log p - log pi)    |
| total variation   | `total_variation`     | sign(p - pi) / 2            |
| chi2(p, pi)       | `pearson`             | (p / pi)^2                  |
| chi2(pi, p)       | `neyman`              | -2 pi / p                   |

Shapes: n samples, all log-probabilities of whole sequences [n], nats. Source: arXiv 2302.08215; quasi-rejection
sampling is from arXiv 2112.05702.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kullback.align.log_probs import sequence_log_probs
from kullback.align.methods import Batch
from kullback.align.proposals import ProposalContest
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import FDivergence, f_divergence

__all__ = [
    "FDPGOutput",
    "FDpg",
    "PartitionEstimator",
    "RunningBaseline",
    "divergence_estimates",
    "fdpg_loss",
    "quasi_rejection",
    "target_divergence",
]

JENSEN_SHANNON = f_divergence("jsd").scaled(2.0)


def target_divergence(name: str, *, alpha: float = 0.5) -> FDivergence:
    """A divergence D(target||policy) by name: js is twice the usual Jensen-Shannon divergence, as in the paper.

    forward_kl and the names of the family are taken too; alpha is for alpha_divergence. Raises ConfigError for others.

    >>> target_divergence("js").name, target_divergence("forward_kl").name
    ('2 * jsd', 'kl')
    """
    plain: Any = name.replace("-", "_")
    if plain == "js":
        return JENSEN_SHANNON
    if plain == "alpha_divergence":
        return f_divergence("alpha_divergence", alpha=alpha)
    return f_divergence("kl" if plain == "forward_kl" else plain)


class FDPGOutput(NamedTuple):
    """loss: the scalar to be minimised; pseudo_reward and advantage [n], without a gradient."""

    loss: Tensor
    pseudo_reward: Tensor
    advantage: Tensor


def fdpg_loss(
    log_target: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    log_partition: Tensor | float,
    *,
    divergence: FDivergence = JENSEN_SHANNON,
    baseline: Tensor | float | None = None,
    max_ratio: float | None = None,
    count: Tensor | float | None = None,
) -> FDPGOutput:
    """The surrogate whose gradient is that of D(target||policy), from samples of the proposal.

    log_target: log P [n] without its constant, -inf where the target has no mass; log_partition: log Z, or one a
    sample; baseline: taken off the pseudo-reward, which leaves the gradient's mean as it is; max_ratio: the largest
    policy / proposal; count: what the sum is divided by, n by default. Samples with Z = 0 or P = pi = 0 teach nothing.
    Raises ShapeError, DataError for NaN, an empty batch, or a sample outside the target's support under a divergence
    that is infinite there.

    >>> log_policy = torch.tensor([0.5, 0.5]).log().requires_grad_()
    >>> log_target = torch.tensor([0.9, 0.1]).log()
    >>> output = fdpg_loss(log_target, log_policy, log_policy.detach(), 0.0, divergence=f_divergence("reverse_kl"))
    >>> output.pseudo_reward  # log p - log pi
    tensor([ 0.5878, -1.6094])
    """
    _check_samples(log_target, log_policy, log_proposal)
    fixed = log_policy.detach()
    partition = torch.as_tensor(log_partition, dtype=fixed.dtype, device=fixed.device)
    held = (partition > -math.inf).expand_as(fixed)
    log_ratio = torch.where(held, fixed - log_target.detach() + partition, 0.0)
    reward = divergence.pseudo_reward(log_ratio)
    if not reward.isfinite().all():
        wrong = int((~reward.isfinite()).sum())
        raise DataError(
            f"{wrong} of {len(reward)} samples lie outside the target's support, where {divergence.name} is infinite, "
            "or steeper than numbers go: take js or kl, or give the target a floor"
        )
    advantage = reward if baseline is None else reward - baseline
    advantage = torch.where(held, advantage, 0.0)
    _check_ratio(max_ratio)
    ratio = (fixed - log_proposal.detach()).exp()
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    loss = -(ratio * advantage * log_policy).sum() / (len(fixed) if count is None else count)
    return FDPGOutput(loss, reward, advantage)


def _check_ratio(max_ratio: float | None) -> None:
    if max_ratio is not None and not max_ratio > 0.0:
        raise ConfigError(f"the largest ratio of policy to proposal is positive, got {max_ratio}: None for no bound")


def _check_samples(*samples: Tensor) -> None:
    first = samples[0]
    if first.ndim != 1 or not len(first) or any(x.shape != first.shape for x in samples):
        shapes = ", ".join(str(tuple(x.shape)) for x in samples)
        raise ShapeError(f"target, policy and proposal give one log-probability a sample, [n] each, got {shapes}")
    for name, x in zip(("target", "policy", "proposal"), samples, strict=False):
        wrong = x.isnan() | (x == math.inf) | ((x == -math.inf) & (name != "target"))
        if wrong.any():
            raise DataError(f"{int(wrong.sum())} log-probabilities of the {name} are NaN or infinite: score them again")


class PartitionEstimator:
    """log Z of each context as the running mean of P/q over all samples so far, never outside of log space.

    largest: a bound on each estimate of Z, reached by shrinking the largest weights of the update that exceeds it.
    """

    def __init__(self, *, largest: float | None = None) -> None:
        if largest is not None and not largest > 0.0:
            raise ConfigError(f"the largest Z is positive, got {largest}: None for no bound")
        self.largest = largest
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._counts = torch.zeros(0, dtype=torch.float64)

    def update(self, log_target: Tensor, log_proposal: Tensor, context: Tensor | None = None) -> None:
        """Take in samples [n], with the numbers [n] of their contexts where there are several.

        Raises ShapeError, and DataError for weights that are NaN or infinite or a context below 0.
        """
        given = [log_target, log_proposal] if context is None else [log_target, log_proposal, context]
        if log_target.ndim != 1 or any(x.shape != log_target.shape for x in given):
            shapes = ", ".join(str(tuple(x.shape)) for x in given)
            raise ShapeError(f"target, proposal and context are one a sample, [n] each, got {shapes}")
        if context is not None and bool((context < 0).any()):
            raise DataError(f"contexts are numbered from 0, got {int(context.min())}")
        weights = (log_target - log_proposal).detach().double().cpu()
        if weights.isnan().any() or (weights == math.inf).any():
            raise DataError("weights of a partition function are NaN or infinite: score those samples again")
        where = torch.zeros(len(weights), dtype=torch.long) if context is None else context.detach().cpu().long()
        self._grow(int(where.max()) + 1 if len(where) else 0)
        size = len(self._counts)
        counts = self._counts.index_add(0, where, torch.ones_like(weights))
        if self.largest is not None:
            weights = self._shrunk(weights, where, counts * self.largest)
        top = torch.full((size,), -math.inf, dtype=torch.float64).scatter_reduce(0, where, weights, "amax")
        top = torch.maximum(top, self._sums)
        safe = top.clamp(min=torch.finfo(torch.float64).min)
        total = (self._sums - safe).exp().index_add(0, where, (weights - safe[where]).exp())
        self._sums, self._counts = total.log() + safe, counts

    def log_partition(self, context: Tensor | None = None) -> Tensor:
        """log Z, of the one context or of each of those numbered [n]; -inf where P was 0 so far; float64.

        Raises DataError for a context of which no sample has come.
        """
        where = torch.zeros((), dtype=torch.long) if context is None else context.detach().cpu().long()
        if len(self._counts) <= int(where.max()) or (self._counts[where] == 0).any():
            raise DataError("the partition function of a context is asked for before a sample of it has come")
        found = self._sums[where] - self._counts[where].log()
        return found if context is None else found.to(context.device)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._sums, self._counts = state["sums"].double(), state["counts"].double()

    def _grow(self, size: int) -> None:
        more = size - len(self._counts)
        if more > 0:
            self._sums = torch.cat([self._sums, self._sums.new_full((more,), -math.inf)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])

    def _shrunk(self, weights: Tensor, where: Tensor, room: Tensor) -> Tensor:
        """Weights so bounded that their sum, with what is there, stays at or below room [C] in each context."""
        weights = weights.clone()
        for place in where.unique().tolist():
            rows = (where == place).nonzero().squeeze(1)
            free = (room[place] - self._sums[place].exp()).clamp(min=0.0)
            values, order = weights[rows].exp().sort()
            if values.sum() <= free:
                continue
            # the level at which the weights above it are cut, so that all together fill the free room
            before = torch.cat([values.new_zeros(1), values.cumsum(0)[:-1]])
            level = (free - before) / torch.arange(len(values), 0, -1, dtype=values.dtype)
            cut = int((level <= values).nonzero()[0])
            values[cut:] = level[cut].clamp(min=0.0)
            weights[rows[order]] = values.log()
        return weights


class RunningBaseline:
    """The mean of the last `window` pseudo-rewards that came before; None as long as there is none."""

    def __init__(self, window: int = 1024) -> None:
        if window < 1:
            raise ConfigError(f"the window of a baseline is 1 or more, got {window}")
        self.window = window
        self._held = torch.zeros(0, dtype=torch.float64)

    @property
    def value(self) -> float | None:
        """The baseline for the next samples."""
        return self._held.mean().item() if len(self._held) else None

    def update(self, pseudo_reward: Tensor) -> None:
        """Take in the pseudo-rewards [n] of a batch, after its advantages were taken."""
        self._held = torch.cat([self._held, pseudo_reward.detach().double().cpu()])[-self.window :]

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"held": self._held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._held = state["held"].double()


def divergence_estimates(
    log_target: Tensor, log_policy: Tensor, log_proposal: Tensor, log_partition: Tensor | float
) -> dict[str, Tensor]:
    """How far the policy is from the target, from samples of the proposal: kl, reverse_kl, js, total_variation.

    Importance weighted, unbiased where log_partition is exact, and none is negative. Log-probabilities [n] to scalars.
    reverse_kl is infinite where a sample lies outside the target's support.
    """
    _check_samples(log_target, log_policy, log_proposal)
    ratio = log_policy - log_target + torch.as_tensor(log_partition, dtype=log_policy.dtype)
    weight = (log_policy - log_proposal).exp()
    known = {"kl": f_divergence("kl"), "reverse_kl": f_divergence("reverse_kl"), "js": JENSEN_SHANNON}
    known["total_variation"] = f_divergence("total_variation")
    return {name: (weight * d.penalty(ratio, samples_from="model")).mean() for name, d in known.items()}


def quasi_rejection(
    log_target: Tensor, log_proposal: Tensor, *, log_bound: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(accepted [n] bool, acceptance rate []) of samples of the proposal, each kept with probability min(1, P / (b q)).

    With b = exp(log_bound) at least the largest P/q the accepted ones are samples of the target; a smaller b accepts
    more of them and is less exact (quasi-rejection sampling). Raises ConfigError for a bound that is not finite.
    """
    if not math.isfinite(log_bound):
        raise ConfigError(f"the logarithm of the bound is finite, got {log_bound}")
    _check_samples(log_target, log_proposal)
    chance = (log_target - log_proposal - log_bound).clamp(max=0.0).exp()
    draw = torch.rand(len(chance), generator=generator, dtype=torch.float64, device=chance.device)
    return draw < chance, chance.mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class FDpg:
    """f-DPG as a method of the room: rewards make the target, and the policy's own completions the gradient.

    target "tilt": P = reference exp(reward / beta), the optimum of RLHF, or with beta 1 and the reward <lambda, phi> of
    `fit_multipliers` the nearest law with given moments; "constraint": P = reference where the reward is over one half,
    0 elsewhere. baseline: "window" (the last 1024 pseudo-rewards), "leave-one-out" in each group, or
    "none". Z is kept for every prompt. partition, running and contest remember, and are made anew for each training.

    proposal: what completions are drawn from: "online" the policy itself, "offline" the best of its past, which the
    contest renews, "given" another one whose log-probabilities come with them. defence: a share of each group that the
    reference draws, rounded up: q is the mixture of both, whose weights P / q are bounded, so that the running Z does
    not miss what the policy has left. The metric target_share is the effective share of the weights P / (Z q), on which
    Z and the heavy-tailed forward KL rest. Raises ConfigError for values out of range, and for a divergence that a
    constraint makes infinite.
    """

    divergence: FDivergence = JENSEN_SHANNON
    beta: float = 0.1
    target: Literal["tilt", "constraint"] = "tilt"
    baseline: Literal["window", "leave-one-out", "none"] = "window"
    max_ratio: float | None = None
    proposal: Literal["online", "offline", "given"] = "online"
    defence: float = 0.0
    partition: PartitionEstimator = field(default_factory=PartitionEstimator)
    running: RunningBaseline = field(default_factory=RunningBaseline)
    contest: ProposalContest = field(default_factory=ProposalContest)
    needs_reference: bool = field(default=True, init=False)
    opponent: Literal["reference"] = field(default="reference", init=False)

    def __post_init__(self) -> None:
        if not (self.beta > 0.0 and math.isfinite(self.beta)):
            raise ConfigError(f"beta is positive and finite, not {self.beta}")
        if self.target not in ("tilt", "constraint"):
            raise ConfigError(f"target is tilt or constraint, not {self.target!r}")
        if self.baseline not in ("window", "leave-one-out", "none"):
            raise ConfigError(f"baseline is window, leave-one-out or none, not {self.baseline!r}")
        if self.proposal not in ("online", "offline", "given"):
            raise ConfigError(f"proposal is online, offline or given, not {self.proposal!r}")
        if not 0.0 <= self.defence < 1.0 or (self.defence and self.proposal == "given"):
            raise ConfigError(f"defence is a share in [0, 1) of what the job itself draws, got {self.defence}")
        _check_ratio(self.max_ratio)
        outside = self.divergence.pseudo_reward(torch.tensor([math.inf]))
        if self.target == "constraint" and not outside.isfinite().all():
            raise ConfigError(
                f"{self.divergence.name} is infinite where a constraint leaves no mass: take js, forward_kl or "
                "total_variation"
            )

    @property
    def needs_policy(self) -> bool:
        """Whether the batch must have the policy's own log-probabilities: something else has drawn the completions."""
        return self.proposal != "online" or self.defence > 0.0

    @property
    def smallest_group(self) -> int:
        """Completions of a prompt that there must be."""
        return max(2 if self.baseline == "leave-one-out" else 1, 2 if self.defence else 1)

    def opponents(self, group: int) -> int:
        """Completions of a group that the reference draws."""
        return min(math.ceil(self.defence * group), group - 1)

    def renews(self, step: int) -> bool:
        """Whether the policy becomes the proposal before this step."""
        return self.contest.decide(step)

    def prepare(
        self,
        batch: dict[str, Any],
        *,
        group: int,
        generator: torch.Generator,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> dict[str, Any]:
        """Adds advantages [B] and log q [B], after Z and the baseline have taken in what all processes sampled."""
        mask, prompts = batch["completion_mask"], batch["prompt_index"]
        log_policy = sequence_log_probs(batch["policy_log_prob" if self.needs_policy else "old_log_prob"], mask)
        log_proposal = self._log_proposal(batch, log_policy, group)
        log_target = sequence_log_probs(batch["reference_log_prob"], mask) + self._preference(batch["rewards"])
        self.partition.update(gather(log_target), gather(log_proposal), gather(prompts))
        partition = self.partition.log_partition(prompts)
        output = fdpg_loss(
            log_target.double(), log_policy.double(), log_proposal.double(), partition, divergence=self.divergence
        )
        advantages = output.pseudo_reward
        if self.baseline == "leave-one-out":
            rewards = advantages.view(-1, group)
            advantages = (rewards - (rewards.sum(1, keepdim=True) - rewards) / max(group - 1, 1)).view(-1)
        elif self.baseline == "window" and self.running.value is not None:
            advantages = advantages - self.running.value
        self.running.update(gather(output.pseudo_reward))
        if self.proposal == "offline":
            self.contest.update(*(gather(x) for x in (log_target, log_policy, log_proposal, partition)))
        advantages = torch.where(partition > -math.inf, advantages, 0.0).to(batch["old_log_prob"].dtype)
        weight = torch.where(partition > -math.inf, log_target - log_proposal - partition, -math.inf)
        return {**batch, "advantages": advantages, "log_proposal": log_proposal, "log_target_weight": weight}

    def _log_proposal(self, batch: Batch, log_policy: Tensor, group: int) -> Tensor:
        """log q [B]: what drew the completions, or its mixture with the reference."""
        mask = batch["completion_mask"]
        if not self.defence:
            return sequence_log_probs(batch["old_log_prob"], mask)
        own = sequence_log_probs(batch["proposal_log_prob"], mask) if self.proposal == "offline" else log_policy
        reference = sequence_log_probs(batch["reference_log_prob"], mask)
        share = self.opponents(group) / group
        return torch.logaddexp(own + math.log1p(-share), reference + math.log(share))

    def count(self, batch: Batch) -> float:
        """Completions."""
        return float(len(batch["rewards"]))

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The surrogate of the completions."""
        mask = batch["completion_mask"]
        log_policy = sequence_log_probs(log_prob, mask)
        ratio = (log_policy.detach() - batch["log_proposal"]).exp()
        if self.max_ratio is not None:
            ratio = ratio.clamp(max=self.max_ratio)
        loss = -(ratio * batch["advantages"] * log_policy).sum() / count
        gap = log_policy.detach() - sequence_log_probs(batch["reference_log_prob"], mask)
        metrics = {"reward": (ratio * batch["rewards"]).float().mean(), "divergence": (ratio * gap).mean()}
        if self.needs_policy:
            metrics["effective_share"] = ratio.mean().square() / ratio.square().mean()
        if "log_target_weight" in batch:  # what Z and the forward KL rest on
            weight = batch["log_target_weight"]
            weight = (weight - weight.max().clamp(min=-1e300)).exp()
            metrics["target_share"] = weight.mean().square() / weight.square().mean().clamp(min=1e-300)
        return loss, metrics

    def state_dict(self) -> dict[str, Any]:
        """What Z, the baseline and the contest of proposals remember."""
        parts = {"partition": self.partition, "running": self.running, "contest": self.contest}
        return {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.partition.load_state_dict(state["partition"])
        self.running.load_state_dict(state["running"])
        self.contest.load_state_dict(state["contest"])

    def _preference(self, rewards: Tensor) -> Tensor:
        if self.target == "tilt":
            return rewards / self.beta
        return torch.zeros_like(rewards).masked_fill(rewards <= 0.5, -math.inf)
