"""Distillation inside transformers.Trainer: only the loss differs.

Shapes: B batch, T positions, H hidden size, V vocabulary. Position t of the student predicts token t + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kullback.core.errors import ShapeError
from kullback.core.rng import generator
from kullback.core.types import Teacher, TeacherOutput
from kullback.distill.objective import Objective
from kullback.distill.on_policy import sample_continuations
from kullback.models.heads import has_plain_head, replaced_head

__all__ = ["DistillTrainer", "LiveTeacher", "common_vocabulary"]

def common_vocabulary(teacher_tokens: int, student_tokens: int, tokenizer_tokens: int) -> int:
    """How many entries of both heads are compared: all, or the common part where one is only padded further.

    Raises ShapeError when one head is too small for the tokenizer, which is more than padding.

    >>> common_vocabulary(512, 512, 500), common_vocabulary(640, 512, 500)
    (512, 512)
    """
    common = min(teacher_tokens, student_tokens)
    if teacher_tokens != student_tokens and common < tokenizer_tokens:
        raise ShapeError(
            f"teacher has {teacher_tokens} tokens, student {student_tokens}, and the tokenizer {tokenizer_tokens}: "
            "distillation compares them token by token, so give a student with the teacher's tokenizer"
        )
    return common


class LiveTeacher:
    """A causal language model in memory as the teacher: hidden states and head where they determine the logits."""

    def __init__(self, model: Any, vocabulary: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary or model.get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherOutput:
        """Hidden states [B, T, H] with the head, or logits [B, T, V]."""
        if not has_plain_head(self.model):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return TeacherOutput(logits=logits[..., : self.vocabulary])
        head = self.model.get_output_embeddings()
        with replaced_head(self.model, lambda hidden: hidden):
            hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        bias = None if head.bias is None else head.bias[: self.vocabulary]
        return TeacherOutput(hidden=hidden, weight=head.weight[: self.vocabulary], bias=bias)


class DistillTrainer(Trainer):
    """A Trainer whose loss is an Objective between a Teacher and the model, from hidden states where it can.

    `objective`, `teacher`, `on_policy` (the share of steps on the student's own samples, as in GKD, arXiv 2306.13649),
    `prompt` (tokens kept as a prompt on such steps), `vocabulary` (entries compared, see `common_vocabulary`) and
    `seed` come by keyword, the rest is the Trainer's. The batch has input_ids [B, T], labels [B, T] (-100: not counted)
    and, where there is padding, attention_mask [B, T]. The loss is divided by the tokens of the whole accumulated batch
    over all processes, so neither accumulation nor the number of processes changes the gradient.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None,
        objective: Objective,
        on_policy: float = 0.0,
        prompt: int = 16,
        vocabulary: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher: Teacher | None = teacher
        self.objective: Objective = objective
        self.on_policy, self.prompt, self.vocabulary, self.stream = on_policy, prompt, vocabulary, seed
        self.model_accepts_loss_kwargs = True  # asks the Trainer for the number of tokens of the accumulated batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        objective = self.objective.on_own_samples() if inputs.get("own_samples") else self.objective
        target = self.teacher(ids, mask) if self.teacher is not None and objective.needs_teacher else None
        draw = generator(self.stream, "rows", self.state.global_step, self.args.process_index)

        def loss_of(hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return objective.loss(
                target, hidden, labels, weight=weight, bias=bias, count=num_items_in_batch, generator=draw
            )

        unwrapped = self.accelerator.unwrap_model(model)
        if has_plain_head(unwrapped):
            head = unwrapped.get_output_embeddings()
            size = self.vocabulary

            def from_hidden(hidden: Tensor) -> Tensor:
                return loss_of(hidden, head.weight[:size], None if head.bias is None else head.bias[:size])

            with replaced_head(unwrapped, from_hidden):
                loss = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        else:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = loss_of(logits[..., : self.vocabulary])
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The accumulated batch; on an on-policy step its texts are replaced by the student's own continuations."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        coin = torch.rand((), generator=generator(self.stream, "on-policy", self.state.global_step)).item()
        if not batches or coin >= self.on_policy:
            return batches, count
        draw = generator(self.stream, "samples", self.state.global_step, self.args.process_index, device=device)
        batches = [self._own_samples(batch, draw) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _own_samples(self, batch: dict[str, Any], draw: torch.Generator) -> dict[str, Any]:
        ids = batch["input_ids"]
        prompt = min(self.prompt, ids.shape[1] - 1)
        sampled = sample_continuations(
            self.model_wrapped, ids[:, :prompt], length=ids.shape[1], vocabulary=self.vocabulary, generator=draw
        )
        labels = sampled.clone()
        labels[:, :prompt] = -100
        return {"input_ids": sampled, "labels": labels, "own_samples": True}
