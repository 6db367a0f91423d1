"""How good a policy is on prompts that it is not trained on, how varied, and how far from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

from kullback.align.log_probs import completion_log_probs
from kullback.align.measures import distinct_n, mean_pass_at_k, sampled_divergence, token_entropy
from kullback.core.rng import generator
from kullback.jobs._align_data import Examples, collator

if TYPE_CHECKING:
    from kullback.jobs._alignment import Alignment

__all__ = ["METRICS", "Validation"]

METRICS = (
    "reward", "reward_error", "pass_1", "pass_1_low", "pass_1_high", "pass_k", "pass_k_low", "pass_k_high",
    "divergence", "divergence_error", "entropy", "distinct", "tokens", "finished", "loss", "accuracy", "margin",
)  # fmt: skip

_ROWS = 8  # examples whose loss is taken at once


class Validation:
    """Completions of the validation prompts, always from the same random numbers, and what they tell."""

    def __init__(self, work: Alignment, examples: Examples) -> None:
        self.work, self.examples = work, examples
        self.source = work.rollouts(examples, work.reward_failed(work.run))
        self.samples = work.config.sampling.validation

    @torch.no_grad()
    def measure(self, trainer: Any) -> dict[str, float]:
        """The reward, pass@1 and pass@k where there is one, KL to the reference, entropy and variety of completions.

        Where the method learns from given completions also its loss on those of the validation set. Each process takes
        a share of the prompts.
        """
        policy = trainer.accelerator.unwrap_model(trainer.model)
        training = policy.training
        policy.eval()
        try:
            found = self._of_samples(gather_object([self._sampled(policy)]))
            if self.work.kind != "online":
                found |= self._of_examples(trainer, policy)
        finally:
            policy.train(training)
        return found

    def texts(self, policy: Any, count: int) -> list[dict[str, Any]]:
        """The first completion of each of the first prompts, with its reward."""
        index = list(range(min(count, len(self.examples))))
        draw = generator(0, "report samples", device=next(policy.parameters()).device)
        rollouts, rewards = self.source(policy.eval(), index, group=1, generator=draw)
        return [
            {"prompt": self.examples.texts[i], "completion": text, "reward": reward}
            for i, text, reward in zip(index, rollouts.texts or (), rewards.tolist(), strict=True)
        ]

    def _sampled(self, policy: Any) -> dict[str, Any]:
        """This process's completions, in tensors as wide as completions can be."""
        rank, count = self.work.state.process_index, self.work.state.num_processes
        index = list(range(rank, len(self.examples), count))
        if not index:
            return {}
        draw = generator(0, "validation", rank, device=next(policy.parameters()).device)
        rollouts, rewards = self.source(policy, index, group=self.samples, generator=draw)
        mask = rollouts.completion_mask
        given = (rollouts.ids, rollouts.attention_mask, mask)
        found = completion_log_probs(
            policy, *given, temperature=rollouts.temperature, vocabulary=len(self.work.tokenizer), entropy=True
        )
        tensors = {"mask": mask, "log_prob": found.log_probs, "entropy": found.entropy}
        tensors["reference"] = self.work.reference_of(policy)(*given)
        width = self.work.config.data.length - mask.shape[1]
        groups = [rollouts.prompt_index == i for i in index]
        return {
            "rewards": rewards.view(-1, self.samples).cpu(),
            "finished": rollouts.finished.cpu(),
            "distinct": [distinct_n(rollouts.completion_ids[rows], mask[rows]) for rows in groups],
            **{name: pad(tensor.cpu(), (0, width)) for name, tensor in tensors.items() if tensor is not None},
        }

    def _of_samples(self, parts: Sequence[dict[str, Any]]) -> dict[str, float]:
        held = [part for part in parts if part]
        whole = {name: torch.cat([part[name] for part in held]) for name in held[0] if name != "distinct"}
        distinct = [value for part in held for value in part["distinct"]]
        divergence = sampled_divergence(whole["log_prob"], whole["reference"], whole["mask"])
        found = {
            "divergence": divergence.mean,
            "divergence_error": divergence.standard_error,
            "entropy": token_entropy(whole["entropy"], whole["mask"]),
            "distinct": sum(distinct) / len(distinct),
            "tokens": whole["mask"].sum(-1).double().mean().item(),
            "finished": whole["finished"].double().mean().item(),
        }
        return found | (self._of_rewards(whole["rewards"]) if self.work.reward is not None else {})

    def _of_rewards(self, rewards: Tensor) -> dict[str, float]:
        means = rewards.double().mean(-1)
        error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
        found = {"reward": means.mean().item()}
        if len(means) > 1:
            found["reward_error"] = error
        right = (rewards > self.work.config.reward.correct).sum(-1)
        for name, k in (("pass_1", 1), ("pass_k", self.samples)):
            passed = mean_pass_at_k(self.samples, right, k)
            found |= {name: passed.mean, f"{name}_low": passed.low, f"{name}_high": passed.high}
        return found

    def _of_examples(self, trainer: Any, policy: Any) -> dict[str, float]:
        """The method's loss on the given completions, all in every process."""
        method, reference = trainer.method, self.work.reference_of(policy)
        collate, device = collator(self.work.tokenizer.eos_token_id), next(policy.parameters()).device
        sums: dict[str, float] = {}
        count = 0.0
        for start in range(0, len(self.examples), _ROWS):
            items = [self.examples[i] for i in range(start, min(start + _ROWS, len(self.examples)))]
            batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
            given = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
            log_prob = completion_log_probs(policy, *given, vocabulary=len(self.work.tokenizer)).log_probs
            if method.needs_reference:
                batch["reference_log_prob"] = reference(*given)
            total, metrics = method.loss(log_prob, batch, count=1.0)
            sums["loss"] = sums.get("loss", 0.0) + total.item()
            for name, key in (("accuracy", "rewards/accuracy"), ("margin", "rewards/margin")):
                if key in metrics:
                    sums[name] = sums.get(name, 0.0) + metrics[key].item() * method.count(batch)
            count += method.count(batch)
        return {name: value / max(count, 1.0) for name, value in sums.items()}
