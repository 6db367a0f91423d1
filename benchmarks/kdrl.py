"""KDRL's loss from hidden states beside one on whole logits, and beside GRPO with a reference. Writes kdrl.json.

8 completions of 256 tokens, hidden size 256, float32, one thread, medians of calls in turn, in seconds of the
processor; a call takes the sampled tokens' log-probabilities under student and teacher, the loss, and its gradients by
the student's states and head. "kullback" goes through both heads in chunks; "whole" forms the logits of both and their
log_softmax; "grpo" is GRPO with a k3 penalty to a reference, chunked as well. "exact" is the divergence of whole
next-token laws in place of the sampled tokens', chunked, and "exact, whole" the same from logits.
"ratio" is kullback's time over each; "mib" the highest memory; "error" and "error_exact" those of the gradient by the
hidden states against the whole logits, relative.
"large": 64 completions of 1024 tokens with a vocabulary of 32 000, whose logits would take 8 GB each, with hidden size
32 so that a call ends in half a minute: kullback and grpo, each timed once after a first call.
"""

import json
import time
from pathlib import Path

import torch

import _measure
from kullback.align.compared import TeacherStates, compared_from_hidden
from kullback.align.grpo import Grpo
from kullback.align.kdrl import kdrl_loss, reverse_kl_top_k
from kullback.align.log_probs import log_probs_from_hidden
from kullback.core.environment import environment

SIZES = (4_000, 16_000, 32_000)
SMALL, LARGE = (8, 256, 256), (64, 1024, 32)  # completions, tokens of each, hidden size
CONTENDERS = ("kullback", "whole", "grpo", "exact", "exact, whole")


def inputs(vocabulary, shape):
    rows, length, size = shape
    source = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(rows, length, size, generator=source) for _ in range(2))
    heads = [torch.randn(vocabulary, size, generator=source) / size**0.5 for _ in range(2)]
    ids = torch.randint(vocabulary, (rows, length), generator=source)
    rewards = torch.randint(2, (rows,), generator=source).float()
    return hidden.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1], ids, rewards


def chunked(hidden, head, teacher, teacher_head, ids):
    with torch.no_grad():
        reference = log_probs_from_hidden(teacher, teacher_head, ids).log_probs
    return reference, log_probs_from_hidden(hidden, head, ids).log_probs, None


def whole(hidden, head, teacher, teacher_head, ids):
    with torch.no_grad():
        reference = (teacher @ teacher_head.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return reference, (hidden @ head.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), None


def exact(hidden, head, teacher, teacher_head, ids):
    states = TeacherStates(teacher, teacher_head)
    return None, *compared_from_hidden(states, hidden, head, ids, divergence=reverse_kl_top_k)


def exact_whole(hidden, head, teacher, teacher_head, ids):
    with torch.no_grad():
        other = teacher @ teacher_head.T
    log_q = (hidden @ head.T).log_softmax(-1)
    divergence = (log_q.exp() * (log_q - other.log_softmax(-1))).sum(-1)
    return None, log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1), divergence


FORMS = {"whole": whole, "exact": exact, "exact, whole": exact_whole}


def prepare(who, vocabulary, shape=SMALL):
    hidden, head, teacher, teacher_head, ids, rewards = inputs(vocabulary, shape)
    mask, grpo = torch.ones(ids.shape, dtype=torch.bool), Grpo(beta=0.01)

    def call():
        reference, log_prob, divergence = FORMS.get(who, chunked)(hidden, head, teacher, teacher_head, ids)
        batch = {"rewards": rewards, "completion_mask": mask, "old_log_prob": log_prob.detach()}
        batch = grpo.prepare({**batch, "reference_log_prob": reference}, group=8, generator=torch.Generator())
        if who == "grpo":
            loss = grpo.loss(log_prob, batch, count=grpo.count(batch))[0]
        else:
            loss = kdrl_loss(reference, log_prob, batch["advantages"], mask, beta=5e-3, divergences=divergence).loss
        return torch.autograd.grad(loss, (hidden, head))

    return call


def error(found, expected):
    return ((found[0] - expected[0]).norm() / expected[0].norm()).item()


def measured(vocabulary):
    calls = {who: prepare(who, vocabulary) for who in CONTENDERS}
    times, results = _measure.race(calls, rounds=3, clock=time.process_time)
    return {
        "vocabulary": vocabulary, "seconds": _measure.medians(times),
        "ratio": {other: _measure.ratio(times, "kullback", other) for other in CONTENDERS[1:]},
        "mib": {who: _measure.peak_memory(__file__, "prepare", who, vocabulary) / 2**20 for who in calls},
        "error": error(results["kullback"], results["whole"]),
        "error_exact": error(results["exact"], results["exact, whole"]),
    }  # fmt: skip


def main():
    torch.set_num_threads(1)
    found = [measured(vocabulary) for vocabulary in SIZES]
    calls = {who: prepare(who, SIZES[-1], LARGE) for who in ("kullback", "grpo")}
    times, _ = _measure.race(calls, rounds=1, clock=time.process_time)
    large = {
        "seconds": _measure.medians(times),
        "ratio": {"grpo": _measure.ratio(times, "kullback", "grpo")},
    }  # fmt: skip
    content = {"environment": environment(), "sizes": found, "large": large}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
