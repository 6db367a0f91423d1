"""KDRL's loss from hidden states beside one on whole logits, and beside GRPO with a reference. Writes kdrl.json.

8 completions of 256 tokens, hidden size 256, float32, one thread, medians of calls in turn (64 of 1024 tokens, as on an
accelerator, take a minute a call here, and are only more chunks); a call takes the sampled tokens' log-probabilities
under student and teacher, the loss, and its gradients by the student's states and head.
"kullback" goes through both heads in chunks; "whole" forms the logits of both and their log_softmax; "grpo" is GRPO
with a k3 penalty to a reference, chunked as well. "ratio" is kullback's time over each; "mib" the highest memory;
"error" that of the gradient by the hidden states against the whole logits, relative.
"""

import json
from pathlib import Path

import torch

import _measure
from kullback.align.grpo import Grpo
from kullback.align.kdrl import kdrl_loss
from kullback.align.log_probs import log_probs_from_hidden
from kullback.core.environment import environment

ROWS, LENGTH, HIDDEN = 8, 256, 256
SIZES = (4_000, 16_000, 32_000)


def inputs(vocabulary):
    source = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(ROWS, LENGTH, HIDDEN, generator=source) for _ in range(2))
    heads = [torch.randn(vocabulary, HIDDEN, generator=source) / HIDDEN**0.5 for _ in range(2)]
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=source)
    rewards = torch.randint(2, (ROWS,), generator=source).float()
    return hidden.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1], ids, rewards


def chunked(hidden, head, teacher, teacher_head, ids):
    with torch.no_grad():
        reference = log_probs_from_hidden(teacher, teacher_head, ids).log_probs
    return reference, log_probs_from_hidden(hidden, head, ids).log_probs


def whole(hidden, head, teacher, teacher_head, ids):
    with torch.no_grad():
        reference = (teacher @ teacher_head.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return reference, (hidden @ head.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def prepare(who, vocabulary):
    hidden, head, teacher, teacher_head, ids, rewards = inputs(vocabulary)
    mask, grpo = torch.ones(ROWS, LENGTH, dtype=torch.bool), Grpo(beta=0.01)

    def call():
        form = whole if who == "whole" else chunked
        reference, log_prob = form(hidden, head, teacher, teacher_head, ids)
        batch = {"rewards": rewards, "completion_mask": mask, "old_log_prob": log_prob.detach()}
        batch = grpo.prepare({**batch, "reference_log_prob": reference}, group=ROWS, generator=torch.Generator())
        if who == "grpo":
            loss = grpo.loss(log_prob, batch, count=grpo.count(batch))[0]
        else:
            loss = kdrl_loss(reference, log_prob, batch["advantages"], mask, beta=5e-3).loss
        return torch.autograd.grad(loss, (hidden, head))

    return call


def main():
    torch.set_num_threads(1)
    found = []
    for vocabulary in SIZES:
        calls = {who: prepare(who, vocabulary) for who in ("kullback", "whole", "grpo")}
        times, results = _measure.race(calls, rounds=5)
        exact = results["whole"][0]
        found.append({
            "vocabulary": vocabulary, "seconds": _measure.medians(times),
            "ratio": {other: _measure.ratio(times, "kullback", other) for other in ("whole", "grpo")},
            "mib": {who: _measure.peak_memory(__file__, "prepare", who, vocabulary) / 2**20 for who in calls},
            "error": ((results["kullback"][0] - exact).norm() / exact.norm()).item(),
        })  # fmt: skip
    content = {"environment": environment(), "sizes": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
