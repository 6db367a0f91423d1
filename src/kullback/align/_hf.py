"""Alignment inside transformers.Trainer: the loss is a method's, and where a method asks for it the batch is sampled.

Shapes: B rows of L prompt tokens, padded on the left, and T completion tokens, padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kullback.align.log_probs import completion_log_probs
from kullback.align.methods import Method
from kullback.align.rollouts import Rollouts, pad_left
from kullback.core.errors import ConfigError
from kullback.core.rng import generator

__all__ = ["AlignTrainer", "Reference", "adapter_reference", "collate_completions", "frozen_reference", "index_items"]

# (model, numbers of prompts, *, group, generator) -> completions and their rewards: ScoredRollouts, FilteredSource
RolloutSource = Callable[..., tuple[Rollouts, Tensor]]
# (ids [B, L + T], attention_mask [B, L + T], completion_mask [B, T]) -> log-probabilities [B, T]
Reference = Callable[[Tensor, Tensor, Tensor], Tensor]


def frozen_reference(model: Any, *, temperature: float = 1.0, vocabulary: int | None = None) -> Reference:
    """The log-probabilities of a model that is not trained."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def log_probs(ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        given = (ids, attention_mask, completion_mask)
        return completion_log_probs(model.to(ids.device), *given, temperature=temperature, vocabulary=vocabulary)[0]

    return log_probs


def adapter_reference(model: Any, *, temperature: float = 1.0, vocabulary: int | None = None) -> Reference:
    """The log-probabilities of a model with its adapters switched off, which needs no second model."""

    @torch.no_grad()
    def log_probs(ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        given, training = (ids, attention_mask, completion_mask), model.training
        try:
            with model.eval().disable_adapter():
                return completion_log_probs(model, *given, temperature=temperature, vocabulary=vocabulary)[0]
        finally:
            model.train(training)

    return log_probs


def collate_completions(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], filler: int) -> Any:
    """A batch of prompts with a completion each: input_ids, attention_mask [B, L + T] and completion_mask [B, T].

    >>> batch = collate_completions([[5], [6, 7]], [[1, 2], [3]], 0)
    >>> batch["input_ids"], batch["completion_mask"]
    (tensor([[0, 5, 1, 2],
            [6, 7, 3, 0]]), tensor([[ True,  True],
            [ True, False]]))
    """
    ids, mask = pad_left(prompts, filler)
    # What is padded on the right, read backwards, is padded on the left.
    backwards, held = pad_left([list(reversed(completion)) for completion in completions], filler)
    tokens, counted = backwards.flip(1), held.flip(1)
    return {
        "input_ids": torch.cat([ids, tokens], 1),
        "attention_mask": torch.cat([mask, counted], 1),
        "completion_mask": counted,
    }


def index_items(numbers: Iterable[int]) -> list[dict[str, Tensor]]:
    """The data set of a method that samples: the numbers of its prompts."""
    return [{"index": torch.tensor(number)} for number in numbers]


class AlignTrainer(Trainer):
    """A Trainer whose loss is a Method of the align room, on the log-probabilities of completions.

    By keyword, the rest is the Trainer's: `method`; `reference`, where the method needs one; `rollouts`, for methods
    that learn from the policy's own completions: then a batch is {"index": [P]}, the numbers of prompts, and `group`
    completions of each are sampled from the stream of (seed, step, process). A method with an `anchor_decay` finds the
    log-probabilities under a moving average of the weights as anchor_log_prob. Other batches have what
    `collate_completions` makes, chosen rows before rejected ones. temperature: of the policy in the loss. vocabulary:
    entries of the head that exist. The loss is divided by the count of the whole accumulated batch over all processes.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        method: Method,
        reference: Reference | None = None,
        rollouts: RolloutSource | None = None,
        group: int = 1,
        temperature: float = 1.0,
        vocabulary: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if method.needs_reference and reference is None:
            raise ConfigError(f"{type(method).__name__} looks at the reference policy: give the trainer one")
        if rollouts is not None and not hasattr(method, "prepare"):
            raise ConfigError(f"{type(method).__name__} learns from given completions, and would not look at rollouts")
        if rollouts is not None and self.is_fsdp_enabled:
            raise ConfigError("sampling needs the whole model in every process: leave training.fsdp out")
        self.method, self.reference, self.rollouts, self.group = method, reference, rollouts, group
        self.temperature, self.vocabulary, self.stream = temperature, vocabulary, seed
        self.model_accepts_loss_kwargs = True  # asks the Trainer for the count of the accumulated batch
        self.anchor: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._terms = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        if self.method.needs_reference and "reference_log_prob" not in inputs and self.reference is not None:
            inputs = {**inputs, "reference_log_prob": self.reference(*given)}
        found = completion_log_probs(model, *given, temperature=self.temperature, vocabulary=self.vocabulary)
        count = self.method.count(inputs) if num_items_in_batch is None else num_items_in_batch
        loss, metrics = self.method.loss(found.log_probs, inputs, count=count)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        self._note(metrics)
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The accumulated batch, sampled and rewarded where the method learns from its own completions."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.rollouts is not None:
            self._move_anchor()
            draw = generator(self.stream, "rollouts", self.state.global_step, self.args.process_index, device=device)
            batches = [self._roll_out(self.rollouts, batch["index"].tolist(), draw) for batch in batches]
        count = torch.tensor(sum(self.method.count(batch) for batch in batches), device=device, dtype=torch.float64)
        return batches, self.accelerator.reduce(count).clamp(min=1.0)

    def extra_state(self) -> dict[str, Any]:
        """What the method remembers and the anchor, for a checkpoint."""
        method: Any = self.method
        return {"method": method.state_dict() if hasattr(method, "state_dict") else {}, "anchor": self.anchor}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Give the method back what it remembered."""
        method: Any = self.method
        if state["method"]:
            method.load_state_dict(state["method"])
        self.anchor = state["anchor"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with the means of what the method tells, under the names metric/..."""
        if self._sums and "loss" in logs:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name] / self._terms for name in names])
            means = self.accelerator.reduce(means, reduction="mean")
            logs.update({f"metric/{name}": value for name, value in zip(names, means.tolist(), strict=True)})
            self._sums, self._terms = {}, 0
        super().log(logs, start_time)

    def _roll_out(self, source: RolloutSource, index: Sequence[int], draw: torch.Generator) -> dict[str, Any]:
        policy = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), self._precision():
            rolled, rewards = source(policy, index, group=self.group, generator=draw)
            given = (rolled.ids, rolled.attention_mask, rolled.completion_mask)
            batch = {
                **dict(zip(("input_ids", "attention_mask", "completion_mask"), given, strict=True)),
                "old_log_prob": rolled.log_probs,
                "prompt_index": rolled.prompt_index,
                "rewards": rewards,
                "step": torch.tensor(self.state.global_step),
            }
            if self.method.needs_reference and self.reference is not None:
                batch["reference_log_prob"] = self.reference(*given)
            if self.anchor:
                with self._anchored(policy):
                    found = completion_log_probs(
                        policy, *given, temperature=self.temperature, vocabulary=self.vocabulary
                    )
                batch["anchor_log_prob"] = found.log_probs
            remembers = {"gather": self.accelerator.gather} if hasattr(self.method, "load_state_dict") else {}
            method: Any = self.method
            prepared: dict[str, Any] = method.prepare(batch, group=self.group, generator=draw, **remembers)
            return prepared

    @torch.no_grad()
    def _move_anchor(self) -> None:
        """Where the method has an anchor, a moving average of the trained weights: one step of it a step."""
        decay = getattr(self.method, "anchor_decay", None)
        if decay is None:
            return
        for name, weight in self.accelerator.unwrap_model(self.model).named_parameters():
            if not weight.requires_grad:
                continue
            if name not in self.anchor:
                self.anchor[name] = weight.detach().clone()
            self.anchor[name] = self.anchor[name].to(weight.device).lerp(weight.detach(), 1.0 - decay)

    @contextmanager
    def _anchored(self, policy: Any) -> Iterator[None]:
        """While open, the policy has the anchor's weights."""
        own = {name: weight.data for name, weight in policy.named_parameters() if name in self.anchor}
        places = dict(policy.named_parameters())
        try:
            for name, tensor in self.anchor.items():
                places[name].data = tensor
            yield
        finally:
            for name, tensor in own.items():
                places[name].data = tensor

    def _precision(self) -> Any:
        return self.compute_loss_context_manager() if self.args.bf16 else nullcontext()

    def _note(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach().double()
        self._terms += 1
