"""DPH-RL beside trl's GRPO: a step of the loss, and log-probabilities from hidden states. Writes dph_rl.json.

A step is forward, loss and backward on the same number of rows. DPH-RL takes half of its rows from the buffer, whose
log-probabilities of the first policy are stored; trl with beta > 0 runs its reference model over all rows in each step.
trl's loss is its trainer's own method with its fused head, called on a stand-in that holds the options it reads. For
the parts alone, GRPO without a reference stands beside GRPO without a reference. One thread, float32; times are
medians of the processor's time, ours and the peer's in turn; "ratio" is the median of the peer's time over ours.

"chunks" forms the logits of all chunks but one twice, so as to hold a chunk of 16 MiB alone: up to four products,
where whole logits take three. "three products" are those alone, without which no way of taking the gradient can do; a
time of 0.6 of whole logits was asked for, and they are 0.5 to 0.6 of it by themselves on this processor.
"""

import json
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from _measure import medians, peak_memory, race, ratio
from kullback.align import completion_log_probs, log_probs_from_hidden, rehearsal_loss
from kullback.align.dph import Dph
from kullback.align.grpo import Grpo
from kullback.align.rehearsal import RehearsalBuffer
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.models.small import small_llama

torch.set_num_threads(1)
warnings.simplefilter("ignore")
SIZES = ((8, 32, 4096), (16, 64, 8192), (16, 128, 16384))  # rows, completion tokens, vocabulary
PROMPT, WIDTH = 16, 128


def made(rows, tokens, vocabulary):
    """A policy, and a batch of rows: completions of many lengths with advantages and old log-probabilities."""
    policy = small_llama(
        vocabulary, hidden=WIDTH, layers=2, heads=4, length=PROMPT + tokens, generator=generator(0, "policy")
    )
    draws = generator(0, "rows")
    ids = torch.randint(vocabulary, (rows, PROMPT + tokens), generator=draws)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows,), generator=draws)
    held = torch.arange(tokens) < lengths[:, None]
    attention = torch.cat([torch.ones(rows, PROMPT, dtype=torch.bool), held], 1)
    with torch.no_grad():
        old = completion_log_probs(policy, ids, attention, held).log_probs
    return policy, {
        "input_ids": ids, "attention_mask": attention, "completion_mask": held, "old_log_prob": old - 0.05,
        "reference_log_prob": old - 0.1, "advantages": torch.randn(rows, generator=draws),
        "rewards": torch.rand(rows, generator=draws), "mixed": torch.tensor(False),
        "rehearsal": torch.arange(rows) >= rows // 2,
    }  # fmt: skip


def kullback(method, *size):
    policy, batch = made(*size)
    given = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])

    def call():
        policy.zero_grad()
        loss, _ = method.loss(completion_log_probs(policy, *given).log_probs, batch, count=method.count(batch))
        loss.backward()
        return loss.detach()

    return call


def dph(*size):
    buffer = RehearsalBuffer()
    return kullback(Dph(buffer=buffer, policy=Grpo(), divergence="forward_kl", eta=0.02), *size)


def grpo(*size):
    return kullback(Grpo(), *size)


def peer(beta, rows, tokens, vocabulary):
    policy, batch = made(rows, tokens, vocabulary)
    reference, _ = made(rows, tokens, vocabulary)
    add_fused_lm_head(policy, outputs=("log_probs", "entropy"))
    add_fused_lm_head(reference)
    trainer = SimpleNamespace(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta,
        loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2, use_vllm=False, aux_loss_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=tokens,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, autocast=nullcontext
        ),
        _entropy_bonus_enabled=False, vllm_importance_sampling_correction=False,
    )  # fmt: skip

    def log_probs(*given, **options):
        return GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__(trainer, *given, **options)

    trainer._get_per_token_logps_and_entropies = log_probs
    mask = batch["completion_mask"].long()
    inputs = {
        "prompt_ids": batch["input_ids"][:, :PROMPT], "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": batch["input_ids"][:, PROMPT:], "completion_mask": mask,
        "advantages": batch["advantages"], "old_per_token_logps": batch["old_log_prob"],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    whole = torch.cat([inputs["prompt_mask"], mask], 1)

    def call():
        policy.zero_grad()
        trainer._metrics = {"train": Everything()}
        if beta:
            with torch.no_grad():
                inputs["ref_per_token_logps"] = log_probs(reference, batch["input_ids"], whole, tokens)[0]
        loss = GRPOTrainer._compute_loss(trainer, policy, inputs)
        loss.backward()
        return loss.detach()

    return call


class Everything(dict):
    """A list for each name."""

    def __missing__(self, name):
        self[name] = []
        return self[name]


def steps(rows, tokens, vocabulary):
    size = (rows, tokens, vocabulary)
    contenders = {
        "kullback DPH-F": dph(*size), "trl GRPO, beta 0.04": peer(0.04, *size), "kullback GRPO": grpo(*size),
        "trl GRPO, beta 0": peer(0.0, *size),
    }  # fmt: skip
    times, results = race(contenders, rounds=5, clock=time.process_time)
    if abs(results["kullback GRPO"] - results["trl GRPO, beta 0"]) > 1e-5:
        raise RuntimeError(f"the losses differ: {results}")
    memory = {
        "kullback DPH-F": peak_memory(__file__, "dph", *size),
        "trl GRPO, beta 0.04": peak_memory(__file__, "peer", 0.04, *size),
        "kullback GRPO": peak_memory(__file__, "grpo", *size),
        "trl GRPO, beta 0": peak_memory(__file__, "peer", 0.0, *size),
    }
    pairs = {"trl GRPO, beta 0.04": "kullback DPH-F", "trl GRPO, beta 0": "kullback GRPO"}
    return [
        {
            "case": f"step, {rows} x {tokens} tokens of {vocabulary}", "who": name, "ms": round(1e3 * seconds, 1),
            "MB": round(memory[name] / 1e6, 1), "beside": pairs.get(name),
            "ratio": round(ratio(times, name, pairs[name]), 2) if name in pairs else None,
        }
        for name, seconds in medians(times).items()
    ]  # fmt: skip


def head(kind, rows, vocabulary):
    """Hidden states to the rehearsal loss and its gradients, by chunks or by whole logits."""
    draws = generator(0, "head")
    hidden = torch.randn(1, rows, WIDTH, generator=draws).requires_grad_()
    weight = (torch.randn(vocabulary, WIDTH, generator=draws) * WIDTH**-0.5).requires_grad_()
    ids = torch.randint(vocabulary, (1, rows), generator=draws)
    stored, mask = torch.full((1, rows), -9.0), torch.ones(1, rows, dtype=torch.bool)

    by_logits = torch.randn(rows, vocabulary, generator=draws) if kind == "three products" else None

    def call():
        if by_logits is not None:
            bare = hidden.detach()[0]
            return (bare @ weight.detach().T)[0, 0], by_logits @ weight.detach(), by_logits.T @ bare
        if kind == "chunks":
            log_prob = log_probs_from_hidden(hidden, weight, ids).log_probs
        else:
            log_prob = (hidden @ weight.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        loss = rehearsal_loss(log_prob, stored, mask)
        return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

    return call


def heads(rows, vocabulary):
    times, results = race(
        {kind: head(kind, rows, vocabulary) for kind in ("chunks", "whole logits", "three products")},
        rounds=5, clock=time.process_time,
    )  # fmt: skip
    error = max(float((a - b).abs().max()) for a, b in zip(results["chunks"], results["whole logits"]))
    return [
        {
            "case": f"log-probabilities, {rows} rows of {vocabulary}", "who": kind, "ms": round(1e3 * seconds, 1),
            "MB": round(peak_memory(__file__, "head", kind, rows, vocabulary) / 1e6, 1),
            "ratio": round(ratio(times, kind, "chunks"), 2), "error": error,
        }
        for kind, seconds in medians(times).items()
    ]  # fmt: skip


def main():
    table = [row for size in SIZES for row in steps(*size)]
    for rows, vocabulary in ((256, 8192), (1024, 16384), (2048, 32768)):
        table += heads(rows, vocabulary)
    for row in table:
        print(row)
    about = {"about": " ".join(__doc__.split()), "trl": trl.__version__, "environment": environment(), "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
