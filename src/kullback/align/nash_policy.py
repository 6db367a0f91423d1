r"""Nash learning of a policy that can only be sampled: each proximal step is followed by policy gradients.

    g = E_{y~pi, y'~mu} [(P(y > y') - 1/2 - b log(pi/ref)(y) - (b/eta) log(pi/nu)(y)) grad log pi(y)]

with mu the opponent and nu the anchor.

| mode      | opponent mu                        | anchor nu                                                   |
|-----------|------------------------------------|-------------------------------------------------------------|
| nash-mp   | the policy itself                  | a moving average of its weights: in one loop, about         |
|           |                                    | 1 / (1 - decay) steps of gradient stand for a proximal step |
| nash-prox | the policy itself                  | a copy of its weights, renewed every `inner` steps          |
| nash-md   | geometric mixture with ref, token  | none                                                        |
|           | by token, exponent `mixture`       |                                                             |
| nash-ema  | a moving average of its weights    | none                                                        |
| self-play | the policy itself                  | none                                                        |
| ipo       | the policy itself                  | none: Online IPO's squared loss of pairs, no policy gradient|

Against the policy itself, completions of one prompt are each other's opponents: P(y > y') serves both. nash-md and
nash-ema give half of each prompt's completions to the opponent, and end where pi = ref exp(P(. > mu) / b) / Z.

Shapes: P prompts, G completions of each; sequence log-probabilities [P, G], nats; preferences [P, G], each
completion's mean chance to be preferred to the others. Sources: arXiv 2505.19731 (both versions); Online IPO
2403.08635; Nash-MD and Nash-EMA 2312.00886.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kullback.align.judges import Judge, RememberedJudge
from kullback.align.log_probs import sequence_log_probs
from kullback.align.methods import Batch
from kullback.align.policy_gradient import leave_one_out_baseline
from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "NashPolicy",
    "judged",
    "nash_policy_gradient_loss",
    "online_ipo_loss",
    "pair_preferences",
    "win_rates",
]

_MODES = ("nash-mp", "nash-prox", "nash-md", "nash-ema", "self-play", "ipo")


def pair_preferences(rewards: Tensor, *, rule: Literal["bradley-terry", "compare"] = "bradley-terry") -> Tensor:
    """The chance [P, G, G] that a prompt's completion is preferred to another, from rewards [P, G].

    "bradley-terry": sigmoid of the difference; "compare": 1 for the larger, 1/2 for a tie. Raises ShapeError,
    ConfigError, DataError for rewards that are not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ShapeError(f"rewards are [prompts, group], two completions or more each, got {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).sum())
        raise DataError(f"{bad} rewards are NaN or infinite: score them again or drop them")
    gap = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    if rule == "bradley-terry":
        return gap.sigmoid()
    if rule == "compare":
        return 0.5 * (gap.sign() + 1.0)
    raise ConfigError(f"rule is bradley-terry or compare, not {rule!r}")


def win_rates(preferences: Tensor) -> Tensor:
    """Each completion's mean chance to be preferred to the others, from preferences [P, G, G]; [P, G].

    Raises ShapeError, DataError for preferences outside [0, 1].

    >>> win_rates(pair_preferences(torch.tensor([[1.0, 0.0, 0.0]]), rule="compare"))
    tensor([[1.0000, 0.2500, 0.2500]])
    """
    shape = preferences.shape
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 2:
        raise ShapeError(f"preferences are [prompts, group, group], two completions or more each, got {tuple(shape)}")
    _check_chances(preferences)
    return (preferences.sum(-1) - preferences.diagonal(dim1=-2, dim2=-1)) / (preferences.shape[-1] - 1)


def _check_chances(preferences: Tensor) -> None:
    if not ((preferences >= 0.0) & (preferences <= 1.0)).all():
        raise DataError("preferences are chances in [0, 1], and some lie outside or are NaN")


def judged(
    judge: Judge, *, both_orders: bool = True, remembered: int = 65536, symmetric: bool | None = None
) -> Callable[..., Tensor]:
    """A reward function from a pairwise judge: each completion's mean chance against the others of the same prompt.

    judge(prompts, firsts, seconds) gives the chances that the first is preferred. It is asked once for all pairs of
    the batch, each once, in both orders where `both_orders`, and averaged, so that minding the order does no harm; a
    completion that is alone or equal to another ties with it without being asked. Where some are an opponent's, as the
    column `opponent` tells, the others are compared with those alone. remembered: answers kept for later batches, 0 for
    a judge that changes its mind; symmetric: one order is asked and serves both (see `RememberedJudge`).

    >>> longer = judged(lambda prompts, a, b: [float(len(x) > len(y)) for x, y in zip(a, b)])
    >>> longer(["p"] * 3, ["long one", "mid", "s"])
    tensor([1.0000, 0.5000, 0.0000])
    """
    judge = RememberedJudge(judge, size=remembered, symmetric=symmetric)

    def reward(prompts: Sequence[str], completions: Sequence[str], opponent: Sequence[bool] = ()) -> Tensor:
        sides = torch.tensor(opponent) if opponent else torch.arange(len(completions))  # each on a side of its own
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(place)
        met: dict[str, tuple[list[str], Tensor, Tensor]] = {}  # texts [U], which is each row's [R], rivals [R, U]
        asked: list[tuple[str, int, int]] = []
        for prompt, rows in groups.items():
            texts = list(dict.fromkeys(completions[i] for i in rows))
            which = torch.tensor([texts.index(completions[i]) for i in rows])
            taken = torch.nn.functional.one_hot(which, len(texts)).float()
            rivals = (sides[rows].unsqueeze(1) != sides[rows]).float() @ taken
            meet = taken.mT @ rivals > 0
            met[prompt] = (texts, which, rivals)
            asked += [(prompt, a, b) for a, b in (meet | meet.mT).triu(1).nonzero().tolist()]
        chances = _asked(judge, asked, {prompt: texts for prompt, (texts, _, _) in met.items()}, both_orders)
        rates = torch.full((len(completions),), 0.5)
        for prompt, (texts, which, rivals) in met.items():
            table = torch.full((len(texts), len(texts)), 0.5)
            for (_, a, b), chance in chances.get(prompt, []):
                table[a, b], table[b, a] = chance, 1.0 - chance
            size = rivals.sum(1)
            rate = (table[which] * rivals).sum(1) / size.clamp(min=1.0)
            rates[groups[prompt]] = torch.where(size > 0, rate, 0.5)
        return rates

    return reward


def _asked(
    judge: Judge, pairs: Sequence[tuple[str, int, int]], texts: Mapping[str, Sequence[str]], both_orders: bool
) -> dict[str, list[tuple[tuple[str, int, int], float]]]:
    """What the judge says of pairs (prompt, number of a text, of another), by prompt."""
    orders = [*pairs, *((prompt, b, a) for prompt, a, b in pairs)] if both_orders else list(pairs)
    if not orders:
        return {}
    firsts, seconds = [texts[p][a] for p, a, _ in orders], [texts[p][b] for p, _, b in orders]
    found = torch.tensor(judge([prompt for prompt, _, _ in orders], firsts, seconds))
    if both_orders:
        found = 0.5 * (found[: len(pairs)] + 1.0 - found[len(pairs) :])
    said: dict[str, list[tuple[tuple[str, int, int], float]]] = {}
    for pair, chance in zip(pairs, found.tolist(), strict=True):
        said.setdefault(pair[0], []).append((pair, chance))
    return said


def nash_policy_gradient_loss(
    reference_log_prob: Tensor,
    anchor_log_prob: Tensor,
    log_prob: Tensor,
    preference: Tensor,
    *,
    beta: float,
    eta: float,
    baseline: Literal["loo", "none"] = "loo",
    count: Tensor | float | None = None,
) -> Tensor:
    """The surrogate [] whose gradient climbs P(pi > mu) - b KL(pi, ref) - (b / eta) KL(pi, nu); all [P, G].

    preference: P(y > mu) of each completion, drawn from the policy; eta may be infinite, for no anchor. baseline "loo":
    the mean of the other completions of the prompt. count: what the sum is divided by, P G by default. Raises
    ShapeError, ConfigError, DataError for preferences outside [0, 1].
    """
    shapes = {tuple(x.shape) for x in (reference_log_prob, anchor_log_prob, log_prob, preference)}
    if len(shapes) != 1 or log_prob.ndim != 2 or not log_prob.numel():
        raise ShapeError(f"log-probabilities and preferences are [prompts, group] alike, got {sorted(shapes)}")
    if not 0.0 < beta < math.inf or not eta > 0.0:
        raise ConfigError(f"beta is positive and finite, and eta positive, got {beta} and {eta}")
    _check_chances(preference)
    fixed = log_prob.detach()
    reward = preference - 0.5 - beta * (fixed - reference_log_prob) - (beta / eta) * (fixed - anchor_log_prob)
    if baseline == "loo":
        reward = reward - leave_one_out_baseline(reward)
    elif baseline != "none":
        raise ConfigError(f'baseline is "loo" or "none", not {baseline!r}')
    return -(reward.detach() * log_prob).sum() / (log_prob.numel() if count is None else count)


def online_ipo_loss(
    reference_log_prob: Tensor,
    log_prob: Tensor,
    preferences: Tensor,
    *,
    beta: float,
    count: Tensor | float | None = None,
) -> Tensor:
    """Online IPO []: the mean over pairs of a prompt's completions of (h_i - h_j - (P_ij - 1/2) / b)^2.

    h is log pi / ref [P, G], preferences [P, G, G]; it is the mean of IPO's loss over labels drawn from P, up to a
    constant. count: what the sum over completions is divided by. Raises ShapeError, ConfigError, DataError for
    preferences outside [0, 1].
    """
    if not 0.0 < beta < math.inf:
        raise ConfigError(f"beta is positive and finite, got {beta}")
    group = log_prob.shape[-1] if log_prob.ndim == 2 else 0
    if group < 2 or preferences.shape != (*log_prob.shape, group) or reference_log_prob.shape != log_prob.shape:
        shapes = f"{tuple(log_prob.shape)}, {tuple(reference_log_prob.shape)}, {tuple(preferences.shape)}"
        raise ShapeError(f"log-probabilities are [P, G] with G >= 2 and preferences [P, G, G], got {shapes}")
    _check_chances(preferences)
    ratio = log_prob - reference_log_prob
    gap = ratio.unsqueeze(-1) - ratio.unsqueeze(-2) - (preferences - 0.5) / beta
    off = 1.0 - torch.eye(ratio.shape[-1], dtype=gap.dtype, device=gap.device)
    per_completion = (off * gap.square()).sum(-1) / (group - 1)
    return per_completion.sum() / (log_prob.numel() if count is None else count)


@dataclass(frozen=True, slots=True, kw_only=True)
class NashPolicy:
    """Nash learning as a method of the room: rewards, or a judge's win rates, make the game.

    beta, eta: as in the module; eta is 2 beta by default. mode: see there, with decay of the moving average, inner
    steps of nash-prox, and the exponent `mixture` of nash-md. preferences: how rewards become chances (see
    `win_rates`), or "given" where the reward is a win rate already. Raises ConfigError for values out of range.
    """

    beta: float = 0.1
    eta: float | None = None
    decay: float = 0.95
    mode: Literal["nash-mp", "nash-prox", "nash-md", "nash-ema", "self-play", "ipo"] = "nash-mp"
    inner: int = 16
    mixture: float = 0.125
    preferences: Literal["bradley-terry", "compare", "given"] = "bradley-terry"
    needs_reference: bool = field(default=True, init=False)
    anchor_decay: float | None = field(default=None, init=False)
    anchor_every: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < math.inf or (self.eta is not None and not self.eta > 0.0):
            raise ConfigError(f"beta is positive and finite, and eta positive, got {self.beta} and {self.eta}")
        if not 0.0 <= self.decay < 1.0 or not 0.0 <= self.mixture <= 1.0 or self.inner < 1:
            given = f"{self.decay}, {self.mixture} and {self.inner}"
            raise ConfigError(f"decay lies in [0, 1), mixture in [0, 1], inner is 1 or more, got {given}")
        if self.mode not in _MODES:
            raise ConfigError(f"mode is one of {', '.join(_MODES)}, not {self.mode!r}")
        if self.preferences not in ("bradley-terry", "compare", "given"):
            raise ConfigError(f"preferences are bradley-terry, compare or given, not {self.preferences!r}")
        if self.mode == "ipo" and self.preferences == "given":
            raise ConfigError("mode ipo compares completions one by one, and win rates are their mean: give rewards")
        decay = {"nash-mp": self.decay, "nash-ema": self.decay, "nash-prox": 0.0}.get(self.mode)
        object.__setattr__(self, "anchor_decay", decay)
        object.__setattr__(self, "anchor_every", self.inner if self.mode == "nash-prox" else 1)

    @property
    def opponent(self) -> str:
        """Who the opponent is, where it is not the policy itself."""
        return {"nash-md": "mixture", "nash-ema": "anchor"}.get(self.mode, "policy")

    @property
    def smallest_group(self) -> int:
        """Completions of a prompt that there must be."""
        return 2 if self.opponent == "policy" else 4

    def opponents(self, group: int) -> int:
        """Completions of a group that the opponent draws."""
        return 0 if self.opponent == "policy" else group // 2

    def prepare(self, batch: dict[str, Any], *, group: int, generator: torch.Generator) -> dict[str, Any]:
        """Adds advantages [B], or for "ipo" the preferences [B, G] of each completion to those of its prompt.

        Completions of another policy are there to be compared with, and no longer in what is returned. Raises DataError
        for rewards that are not finite, or no win rates where they are "given".
        """
        rates = batch["rewards"].view(-1, group)
        if self.preferences == "given":
            _check_chances(rates)
        others = self.opponents(group)
        if others:
            own = ~batch["opponent"]
            rates = self._against(rates, group - others)
            batch = {name: part[own] if part.shape[:1] == own.shape else part for name, part in batch.items()}
            group -= others
        elif self.preferences != "given":
            preferences = pair_preferences(rates, rule=self.preferences)
            if self.mode == "ipo":
                return {**batch, "preferences": preferences.reshape(-1, group)}
            rates = win_rates(preferences)
        mask = batch["completion_mask"]
        log_prob, reference = (
            sequence_log_probs(batch[name], mask).view(-1, group) for name in ("old_log_prob", "reference_log_prob")
        )
        advantage = rates - 0.5 - self.beta * (log_prob - reference)
        if self.mode in ("nash-mp", "nash-prox"):
            anchor = sequence_log_probs(batch["anchor_log_prob"], mask).view(-1, group)
            eta = 2.0 * self.beta if self.eta is None else self.eta
            advantage = advantage - (self.beta / eta) * (log_prob - anchor)
        advantage = advantage - leave_one_out_baseline(advantage)
        return {**batch, "advantages": advantage.reshape(-1)}

    def _against(self, rewards: Tensor, own: int) -> Tensor:
        """The mean chances [P, own] against the opponent's completions, the last of each prompt's [P, G]."""
        if self.preferences == "given":
            return rewards[:, :own]
        return pair_preferences(rewards, rule=self.preferences)[:, :own, own:].mean(-1)

    def count(self, batch: Batch) -> float:
        """Completions."""
        return float(len(batch["rewards"]))

    def loss(self, log_prob: Tensor, batch: Batch, *, count: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """The surrogate, or the squared loss of pairs."""
        mask = batch["completion_mask"]
        policy, reference = (sequence_log_probs(x, mask) for x in (log_prob, batch["reference_log_prob"]))
        metrics = {"reward": batch["rewards"].float().mean(), "divergence": (policy - reference).detach().mean()}
        if self.mode == "ipo":
            group = batch["preferences"].shape[1]
            grouped = (reference.view(-1, group), policy.view(-1, group), batch["preferences"].view(-1, group, group))
            return online_ipo_loss(*grouped, beta=self.beta, count=count), metrics
        return -(batch["advantages"] * policy).sum() / count, metrics
