"""SequenceMatch inside transformers.Trainer: windows of text, a buffer of own trajectories, two forwards a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import Trainer

from kullback.align.least_squares import SquaredTargets, squared_targets_loss
from kullback.align.sequencematch import Divergence, SequenceMatchOutput, policy_entropy, sequencematch_loss
from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.decode.backspace import (
    Layout,
    additive_mask,
    backspace_layout,
    block_mask,
    generate_with_backspace,
    inject_noise,
)

__all__ = ["SequenceMatchSettings", "SequenceMatchTrainer", "layout_logits", "likely_tokens", "with_backspace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMatchSettings:
    """noise: the share of positions of the data before which a wrong token and a backspace are put; refresh_every:
    steps between new trajectories, samples of `length` visible tokens each time, of which `kept` stay in the buffer;
    nll_share: of the likelihood in the loss at the end, from 1 at the first step, linearly over the first half;
    terminal: what follows the action `end` ("zero" or "absorbing", see `sequencematch`); without an end all windows are
    cut; squared: the loss is that of `least_squares`, by these targets, in place of the divergence; closed: actions
    that are never taken and count in no value, such as the begin token and ids that only pad a head. Raises ConfigError
    for values out of range.
    """

    noise: float = 0.1
    mask_noise: bool = True
    alpha: float = 100.0
    gamma: float = 0.95
    divergence: Divergence = "chi2_mixture"
    nll_share: float = 0.2
    refresh_every: int = 25
    samples: int = 32
    kept: int = 64
    length: int = 40
    terminal: Literal["zero", "absorbing"] = "zero"
    end: int | None = None
    squared: SquaredTargets | None = None
    closed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise < 1.0 or not 0.0 <= self.nll_share <= 1.0:
            raise ConfigError(f"noise lies in [0, 1) and nll_share in [0, 1], got {self.noise} and {self.nll_share}")
        if not self.alpha > 0.0 or not 0.0 < self.gamma <= 1.0:
            raise ConfigError(f"alpha is positive and gamma lies in (0, 1], got {self.alpha} and {self.gamma}")
        if self.divergence not in get_args(Divergence) or self.terminal not in ("zero", "absorbing"):
            raise ConfigError(f"there is no divergence {self.divergence!r} with terminal {self.terminal!r}")
        if min(self.refresh_every, self.samples, self.length) < 1 or self.kept < self.samples:
            raise ConfigError("refresh_every, samples and length are 1 or more, and kept is at least samples")
        if self.terminal == "absorbing" and self.end is None:
            raise ConfigError("terminal='absorbing' is of texts that end: give the action that ends them as end")

    def share(self, step: int, steps: int) -> float:
        """The likelihood's share at a step of so many."""
        return max(self.nll_share, 1.0 - (1.0 - self.nll_share) * 2.0 * step / max(steps, 1))


def layout_logits(model: Any, layout: Layout, *, closed: tuple[int, ...] = ()) -> Tensor:
    """The logits [B, T, V] of a layout's stream: each token sees its ancestors, at its depth; closed: ids with -inf."""
    flexible = getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention"
    mask = block_mask(layout) if flexible else additive_mask(layout, next(model.parameters()).dtype)
    found: Tensor = model(
        input_ids=layout.input_ids, position_ids=layout.position_ids, attention_mask=mask, use_cache=False
    ).logits
    return _without(found, closed)


def _without(logits: Tensor, closed: tuple[int, ...]) -> Tensor:
    if not closed:
        return logits
    return logits.index_fill(-1, torch.tensor(closed, device=logits.device), -torch.inf)


def likely_tokens(model: Any, *, begin: int, above: float) -> Callable[[Tensor, Tensor], Tensor]:
    """What `inject_noise` takes as `exclude`: proposals that the model, trained before, gives more than `above`, from 0
    to 1. In small alphabets much noise could be right, and deleting it would be taught otherwise. Raises ConfigError.
    """
    if not 0.0 <= above <= 1.0:
        raise ConfigError(f"above is a probability, got {above}")

    @torch.no_grad()
    def likely(ids: Tensor, proposed: Tensor) -> Tensor:
        start = torch.full_like(ids[:, :1], begin)
        logits = model(input_ids=torch.cat([start, ids[:, :-1]], 1), use_cache=False).logits
        found = logits.float().softmax(-1).gather(2, proposed.unsqueeze(2)).squeeze(2)
        return found > above

    return likely


@torch.no_grad()
def with_backspace(model: Any) -> int:
    """Grow a model by one action in place, the backspace, and return its id: the mean of the head's rows to begin with.

    Its input embedding is never used.
    """
    size: int = model.get_output_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    head.weight[size] = head.weight[:size].mean(0)
    if head.bias is not None:
        head.bias[size] = head.bias[:size].mean()
    return size


class SequenceMatchTrainer(Trainer):
    """A Trainer on windows {"input_ids": [L]} of a model with a backspace; `settings`, `backspace`, `begin` and `seed`
    come by keyword. Every `refresh_every` steps the buffer takes in new trajectories of the model as it is.

    The log has the means of J, of the likelihood (nll), of the rewards on data and own trajectories, and the policy's
    entropy: rewards of the data below 0, or an entropy that nears log V, tell of too small an alpha. The value of an
    absorbing end is learnt as the parameter `end_value` of the model.
    """

    def __init__(
        self, *args: Any, settings: SequenceMatchSettings, backspace: int, begin: int, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.backspace, self.begin, self.stream = settings, backspace, begin, seed
        self.buffer: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._terms = 0
        if settings.terminal == "absorbing" and settings.squared is None:
            policy: Any = self.model
            weight = next(policy.parameters())
            policy.register_parameter("end_value", torch.nn.Parameter(weight.new_zeros((), dtype=torch.float32)))
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step, options = self.state.global_step, self.settings
        ids = inputs["input_ids"]
        draw = generator(self.stream, "sequencematch", step, self.args.process_index, device=ids.device)
        if not self.buffer or step % options.refresh_every == 0:
            self._refresh(draw)
        actions, weights = inject_noise(
            ids, share=options.noise, vocabulary=self.backspace, backspace=self.backspace, generator=draw,
            mask_noise=options.mask_noise,
            exclude=lambda _, wrong: torch.isin(wrong, torch.tensor(options.closed, device=wrong.device)),
        )  # fmt: skip
        data = backspace_layout(actions, backspace=self.backspace, begin=self.begin, weights=weights)
        own = backspace_layout(self._sampled(len(ids), draw), backspace=self.backspace, begin=self.begin)
        logits = layout_logits(model, data, closed=options.closed)
        streams = (logits, data, layout_logits(model, own, closed=options.closed), own)
        shared: dict[str, Any] = {
            "backspace": self.backspace, "alpha": options.alpha, "gamma": options.gamma, "end": options.end,
            "terminal": "bootstrap" if options.end is None else options.terminal,
            "nll_share": options.share(step, self.state.max_steps),
        }  # fmt: skip
        if options.squared is None:
            end_value = getattr(self.accelerator.unwrap_model(model), "end_value", None)
            output = sequencematch_loss(*streams, divergence=options.divergence, end_value=end_value, **shared)
        else:
            output = squared_targets_loss(*streams, targets=options.squared, **shared)
        if model.training:
            self._listen(output, policy_entropy(logits, data))
        return (output.loss, {}) if return_outputs else output.loss

    def _listen(self, output: SequenceMatchOutput, entropy: Tensor) -> None:
        seen = {
            "objective": output.objective, "nll": output.nll, "entropy": entropy,
            "reward/data": output.reward_data, "reward/model": output.reward_model,
        }  # fmt: skip
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in seen.items()}
        self._terms += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with the means of what the loss tells, under the names metric/..."""
        if self._sums and "loss" in logs:
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())) / self._terms, reduction="mean")
            logs.update({f"metric/{name}": value for name, value in zip(self._sums, means.tolist(), strict=True)})
            self._sums, self._terms = {}, 0
        super().log(logs, start_time)

    def _refresh(self, draw: torch.Generator) -> None:
        policy, closed = self.accelerator.unwrap_model(self.model), self.settings.closed
        found = generate_with_backspace(
            policy, self.settings.samples, backspace=self.backspace, begin=self.begin, length=self.settings.length,
            most_actions=3 * self.settings.length, generator=draw, end=self.settings.end,
            processor=(lambda _, logits: _without(logits, closed)) if closed else None,
        )  # fmt: skip
        self.buffer = [*found, *self.buffer][: self.settings.kept]

    def _sampled(self, count: int, draw: torch.Generator) -> Tensor:
        places = torch.randint(len(self.buffer), (count,), generator=draw, device=draw.device).tolist()
        rows = [self.buffer[place] for place in places]
        width = max(len(row) for row in rows)
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-100) for row in rows])
