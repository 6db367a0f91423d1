"""Alignment inside transformers.Trainer: the loss is a method's, and where a method asks for it the batch is sampled.

Shapes: B rows of L prompt tokens, padded on the left, and T completion tokens, padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kullback.align._hf_copies import Copies, Opponents
from kullback.align._hf_reference import (
    Reference,
    adapter_reference,
    check_reference,
    check_temperatures,
    frozen_reference,
)
from kullback.align._hf_reuse import RepeatedPrompts, rows_of_use
from kullback.align.compared import compared_completions
from kullback.align.critic import add_critic
from kullback.align.log_probs import completion_log_probs
from kullback.align.methods import Method
from kullback.align.rollouts import Rollouts, pad_left
from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.models.heads import head_inputs

__all__ = ["AlignTrainer", "Reference", "adapter_reference", "collate_completions", "frozen_reference", "index_items"]

# (model, numbers of prompts, *, group, generator) -> completions and their rewards: ScoredRollouts, FilteredSource
RolloutSource = Callable[..., tuple[Rollouts, Tensor]]


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

    By keyword, the rest is the Trainer's: `model`; `method`; `reference`, where the method needs one, and
    `reference_model` for one that samples from it, None for the policy with its adapters off; `rollouts`, for methods
    that learn from the policy's own completions: then a batch is {"index": [P]}, the numbers of prompts, and `group`
    completions of each are sampled from the stream of (seed, step, process), to be used for as many steps as the
    method's epochs and mini_batches say. What else a method may ask for is listed with `methods.OnlineMethod`. Other
    batches have what `collate_completions` makes, chosen rows before rejected ones. temperature: of the policy in the
    loss; another one of the reference or the rollouts needs allow_temperature_mismatch. vocabulary: entries of the head
    that exist. entropy: metric/entropy in the log is the policy's, the mean in nats of its laws of each token of the
    completions, at the price of another product with the head in the steps that are logged, whose entropy it is; with a
    logging_strategy other than "steps" that is all of them. The loss is divided by the count of the whole accumulated
    batch over all processes.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: Any,
        method: Method,
        reference: Reference | None = None,
        reference_model: Any = None,
        rollouts: RolloutSource | None = None,
        group: int = 1,
        temperature: float = 1.0,
        vocabulary: int | None = None,
        entropy: bool = False,
        seed: int = 0,
        allow_temperature_mismatch: bool = False,
        **kwargs: Any,
    ) -> None:
        check_reference(method, reference)
        if not allow_temperature_mismatch:
            check_temperatures(temperature, reference=reference, rollouts=rollouts)
        kind = getattr(method, "critic", None)
        self.critic = None if kind is None else add_critic(model, kind)
        super().__init__(model=model, **kwargs)
        self._check(method, rollouts)
        if entropy and getattr(method, "compares", None) is not None:
            raise ConfigError(f"{type(method).__name__} compares whole laws, and no entropy of them is measured")
        self.method, self.reference, self.rollouts, self.group = method, reference, rollouts, group
        self.temperature, self.vocabulary, self.stream = temperature, vocabulary, seed
        self.model_accepts_loss_kwargs = True  # asks the Trainer for the count of the accumulated batch
        self.copies = Copies()
        self.opponents = Opponents(method, reference_model, self.copies)
        self.uses = getattr(method, "epochs", 1) * getattr(method, "mini_batches", 1)
        self._held: list[dict[str, Any]] = []
        self._sums: dict[str, Tensor] = {}
        self._terms = 0
        self.entropy = entropy
        self._spread = torch.zeros(2, dtype=torch.float64)  # the sum of entropies, and their tokens
        self._drawn = torch.zeros(2)  # completions that did not end, and all

    def _check(self, method: Method, rollouts: RolloutSource | None) -> None:
        name = type(method).__name__
        if rollouts is not None and not hasattr(method, "prepare"):
            raise ConfigError(f"{name} learns from given completions, and would not look at rollouts")
        if rollouts is not None and self.is_fsdp_enabled:
            raise ConfigError("sampling needs the whole model in every process: leave training.fsdp out")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        if self._looks_at_reference and "reference_log_prob" not in inputs and self.reference is not None:
            inputs = {**inputs, "reference_log_prob": self.reference(*given)}
        compares, found = getattr(self.method, "compares", None), {}
        if compares is None:
            log_prob, values = self._under(model, given, measures=self._logs_this_step(model))
            found = {} if values is None else {"values": values}
        else:
            teacher: Any = self.reference
            log_prob, found["teacher_divergence"] = compared_completions(
                model, *given, teacher=teacher.states(*given), divergence=compares, temperature=self.temperature,
                vocabulary=self.vocabulary,
            )  # fmt: skip
        inputs = {**inputs, **found}
        count = self.method.count(inputs) if num_items_in_batch is None else num_items_in_batch
        loss, metrics = self.method.loss(log_prob, inputs, count=count)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        self._note(metrics)
        return (loss, {}) if return_outputs else loss

    @property
    def _looks_at_reference(self) -> bool:
        """Whether the method wants the reference's log-probabilities of the tokens, and not its whole laws."""
        return self.method.needs_reference and getattr(self.method, "compares", None) is None

    def _logs_this_step(self, model: Any) -> bool:
        """Whether an entropy is measured of this batch of training."""
        if not self.entropy or not model.training:
            return False
        step, every = self.state.global_step, max(int(self.state.logging_steps or 1), 1)
        first = self.args.logging_first_step and step == 0
        return first or self.args.logging_strategy != "steps" or (step + 1) % every == 0

    def _under(
        self, model: Any, given: tuple[Tensor, Tensor, Tensor], *, measures: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [B, T], and values [B, T] where there is a critic."""
        options: dict[str, Any] = {"temperature": self.temperature, "vocabulary": self.vocabulary}
        options["entropy"] = "measured" if measures else False
        bare = getattr(model, "module", model)
        listens: AbstractContextManager[Any] = nullcontext() if self.critic is None else head_inputs(bare)
        with listens as heard:
            found = completion_log_probs(model, *given, **options)
        if found.entropy is not None:
            tokens = given[2].bool()
            self._spread += torch.stack([found.entropy[tokens].double().sum(), tokens.sum().double()]).cpu()
        return found.log_probs, None if self.critic is None else self.critic(heard[-1], *given)

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's, in which the critic has a rate of its own: the method's critic_rate times the policy's."""
        made = super().create_optimizer(model)
        rate = getattr(self.method, "critic_rate", 1.0)
        if self.critic is None or rate == 1.0:
            return made
        mine = {id(weight) for weight in self.critic.parameters()}
        for group in list(made.param_groups):
            own = [weight for weight in group["params"] if id(weight) in mine]
            if own:
                group["params"] = [weight for weight in group["params"] if id(weight) not in mine]
                made.add_param_group({**group, "params": own, "lr": rate * group["lr"]})
        return made

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The accumulated batch, sampled and rewarded where the method learns from its own completions."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.rollouts is not None:
            batches = self._rolled_out(self.rollouts, batches, device)
        if self.rollouts is not None and hasattr(self.method, "settle"):
            batches = self.method.settle(batches, step=self.state.global_step, total=self.accelerator.reduce)
        count = torch.tensor(sum(self.method.count(batch) for batch in batches), device=device, dtype=torch.float64)
        return batches, self.accelerator.reduce(count).clamp(min=1.0)

    def _rolled_out(self, source: RolloutSource, batches: Sequence[Any], device: Any) -> list[dict[str, Any]]:
        """Completions of these prompts, or the next part of those that are held, which serve for several steps."""
        step, rank = self.state.global_step, self.args.process_index
        use = step % self.uses
        if use == 0 or len(self._held) != len(batches):
            self.copies.move(self.method, self.accelerator.unwrap_model(self.model), step)
            draw = generator(self.stream, "rollouts", step, rank, device=device)
            self._held = [self._roll_out(source, batch["index"].tolist(), draw) for batch in batches]
        if self.uses == 1:
            held, self._held = self._held, []
            return held
        parts: int = getattr(self.method, "mini_batches", 1)
        names = (self.stream, step // self.uses, rank)
        return [
            rows_of_use(batch, use, parts, seed=(*names, number)) if parts > 1 else batch
            for number, batch in enumerate(self._held)
        ]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.uses == 1 or self.rollouts is None:
            return super()._get_train_sampler(train_dataset)
        prompts: Any = self.train_dataset if train_dataset is None else train_dataset
        a_step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return RepeatedPrompts(len(prompts), a_step=a_step, repeats=self.uses, seed=self.stream)

    def extra_state(self) -> dict[str, Any]:
        """What the method remembers, the copies of weights and the critic, for a checkpoint."""
        method: Any = self.method
        return {
            "method": method.state_dict() if hasattr(method, "state_dict") else {},
            "copies": self.copies.state_dict(),
            "critic": {} if self.critic is None else self.critic.state_dict(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Give the method back what it remembered."""
        method: Any = self.method
        if state["method"]:
            method.load_state_dict(state["method"])
        self.copies.load_state_dict(state["copies"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])

    def process_state(self) -> dict[str, Any]:
        """The completions of this process that later steps use again, and what its rollouts remember."""
        source: Any = self.rollouts
        return {"held": self._held, "rollouts": source.state_dict() if hasattr(source, "state_dict") else {}}

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        source: Any = self.rollouts
        self._held = [{name: part.to(self.args.device) for name, part in batch.items()} for batch in state["held"]]
        if state["rollouts"]:
            source.load_state_dict(state["rollouts"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with the means of what the method tells, as metric/..., and the share of completions cut."""
        if self._sums and "loss" in logs:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name] / self._terms for name in names])
            means = self.accelerator.reduce(means, reduction="mean")
            logs.update({f"metric/{name}": value for name, value in zip(names, means.tolist(), strict=True)})
            self._sums, self._terms = {}, 0
        if self.entropy and "loss" in logs:
            spread, tokens = self.accelerator.reduce(self._spread.to(self.args.device)).tolist()
            if tokens:
                logs["metric/entropy"] = spread / tokens
            self._spread.zero_()
        if self.rollouts is not None and "loss" in logs:
            cut, drawn = self.accelerator.reduce(self._drawn.to(self.args.device)).tolist()
            if drawn:
                logs["metric/cut"] = cut / drawn
            self._drawn.zero_()
        super().log(logs, start_time)

    def _roll_out(self, source: RolloutSource, index: Sequence[int], draw: torch.Generator) -> dict[str, Any]:
        policy = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), self._precision():
            rolled, rewards, opponent = self.opponents.draw(source, policy, index, group=self.group, generator=draw)
            given = (rolled.ids, rolled.attention_mask, rolled.completion_mask)
            self._drawn += torch.tensor([(~rolled.finished).sum().item(), len(rolled)])
            batch = {
                **dict(zip(("input_ids", "attention_mask", "completion_mask"), given, strict=True)),
                "old_log_prob": rolled.log_probs,
                "prompt_index": rolled.prompt_index,
                "rewards": rewards,
                "step": torch.tensor(self.state.global_step),
            }
            if opponent is not None:
                batch["opponent"] = opponent
            if self._looks_at_reference and self.reference is not None:
                batch["reference_log_prob"] = self.reference(*given)
            self._judge(batch, policy, given)
            gathers = hasattr(self.method, "load_state_dict") or getattr(self.method, "gathers", False)
            method: Any = self.method
            more = {"gather": self.accelerator.gather} if gathers else {}
            prepared: dict[str, Any] = method.prepare(batch, group=self.group, generator=draw, **more)
            return prepared

    def _judge(self, batch: dict[str, Any], policy: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
        """What the policy, the critic and the copies of the policy say of the completions, where anyone asks."""
        if self.critic is not None or getattr(self.method, "needs_policy", False):
            batch["policy_log_prob"], values = self._under(policy, given)
            if values is not None:
                batch["old_values"] = values
        for name, held in (("anchor", self.copies.anchor), ("proposal", self.copies.proposal)):
            if held:
                with self.copies.placed(name, policy):
                    batch[f"{name}_log_prob"] = self._under(policy, given)[0]

    def _precision(self) -> Any:
        return self.compute_loss_context_manager() if self.args.bf16 else nullcontext()

    def _note(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach().double()
        self._terms += 1
