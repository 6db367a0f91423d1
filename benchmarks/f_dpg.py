"""f-DPG beside the same update item by item, and beside leave-one-out policy gradients. Writes f_dpg.json.

One thread, medians of calls in turn; log-probabilities of 64 to 4096 completions of 32 tokens. A call takes in what was
sampled (Z of every prompt, pseudo-rewards, baseline) and gives the loss with its gradient. "items" does so one sample
after the other with Python numbers, as libraries do that score item by item; "rloo" is the room's policy gradient with
the KL inside the reward. "ratio" is the time over each; "error" the largest difference of the gradient to "items".
"""

import json
import math
from functools import partial
from pathlib import Path

import torch

import _measure
from kullback.align.f_dpg import FDpg
from kullback.align.grpo import Grpo
from kullback.core.environment import environment
from kullback.core.rng import generator

BETA, GROUP, LENGTH = 0.5, 8, 32
RLOO = Grpo(
    beta=BETA, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
    clip_low=math.inf, clip_high=math.inf,
)  # fmt: skip


def batch(rows):
    draw = generator(0, "batch")
    old, reference = (0.3 * torch.randn(rows, LENGTH, generator=draw, dtype=torch.float64) - 1.0 for _ in range(2))
    return {
        "old_log_prob": old, "reference_log_prob": reference,
        "completion_mask": torch.ones(rows, LENGTH, dtype=torch.bool),
        "rewards": torch.rand(rows, generator=draw, dtype=torch.float64),
        "prompt_index": torch.arange(rows) // GROUP, "step": torch.tensor(0),
    }  # fmt: skip


def tensors(method, given):
    def call():
        log_prob = given["old_log_prob"].clone().requires_grad_()
        prepared = method().prepare(given, group=GROUP, generator=torch.Generator())
        loss, _ = method().loss(log_prob, prepared, count=float(len(log_prob)))
        return torch.autograd.grad(loss, log_prob)[0]

    return call


def items(given):
    rows = len(given["rewards"])
    log_prob = given["old_log_prob"].clone().requires_grad_()
    policy = [row.sum() for row in log_prob]
    weights: dict[int, list[float]] = {}
    targets = []
    for place in range(rows):
        targets.append(given["reference_log_prob"][place].sum().item() + given["rewards"][place].item() / BETA)
        weight = math.exp(targets[place] - policy[place].item())
        weights.setdefault(given["prompt_index"][place].item(), []).append(weight)
    loss = torch.zeros((), dtype=torch.float64)
    for place in range(rows):
        seen = weights[given["prompt_index"][place].item()]
        ratio = policy[place].item() - targets[place] + math.log(sum(seen) / len(seen))
        reward = -2.0 * 0.5 * (math.log(2.0) - math.log1p(math.exp(-ratio)))  # -f' of twice the Jensen-Shannon
        loss = loss - reward * policy[place] / rows
    return torch.autograd.grad(loss, log_prob)[0]


def main():
    torch.set_num_threads(1)
    found = []
    for rows in (64, 512, 4096):
        given = batch(rows)
        calls = {"kullback": tensors(lambda: FDpg(beta=BETA), given), "rloo": tensors(lambda: RLOO, given)}
        times, results = _measure.race({**calls, "items": partial(items, given)}, rounds=5)
        seconds = _measure.medians(times)
        ratio = {other: _measure.ratio(times, "kullback", other) for other in ("rloo", "items")}
        error = (results["kullback"] - results["items"]).abs().max().item()
        found.append({"completions": rows, "seconds": seconds, "ratio": ratio, "error": error})
    content = {"environment": environment(), "sizes": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
