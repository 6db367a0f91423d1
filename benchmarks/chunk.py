"""Losses from hidden states beside whole logits and beside trl's kernel: time and peak memory. Writes chunk.json.

Forward and backward, float32, N rows, V tokens, H wide, the gradient by the student's hidden states and weights. KL
from the teacher to the student, one number for all; values and gradients are compared before anything is reported.
trl takes 4096 rows at once, so that here it holds all logits of both models; "trl, 256 rows" is told to take fewer.
Times are medians, and ratios medians over rounds in which all are called in turn: the processor's time on one thread,
the clock's on two. The bars stand beside the ratios.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin measure what else runs on the machine

import torch
from trl.kernels import chunked_divergence

from _measure import medians, peak_memory, race, ratio
from kullback.core.chunk import linear_chunked
from kullback.core.environment import environment, installed
from kullback.divergences import NAMES, kl, named

warnings.simplefilter("ignore")
ROWS, VOCABULARY, WIDTH = 2048, 32768, 256
OPTIONS = {
    "alpha_divergence": {"alpha": 0.3},
    "generalized_jsd": {"beta": 0.3},
    "renyi": {"alpha": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
}


def inputs(rows):
    """Hidden states and weights of the teacher and of the student; the student's take a gradient."""
    source = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, WIDTH, generator=source), torch.randn(VOCABULARY, WIDTH, generator=source)]
    made += [torch.randn(rows, WIDTH, generator=source), torch.randn(VOCABULARY, WIDTH, generator=source)]
    for weight in made[1::2]:
        weight.mul_(WIDTH**-0.5)
    return [*made[:2], *(tensor.requires_grad_() for tensor in made[2:])]


def with_gradient(loss, rows=ROWS):
    """A call of loss(inputs): its value and its gradients by the student."""
    tensors = inputs(rows)

    def call():
        value = loss(*tensors)
        return value.detach(), *torch.autograd.grad(value, tensors[2:])

    return call


def kullback(*tensors):
    return linear_chunked(kl, *tensors)


def whole_logits(hidden_p, weight_p, hidden_q, weight_q):
    log_p = torch.log_softmax(hidden_p @ weight_p.T, -1)
    return kl(log_p, torch.log_softmax(hidden_q @ weight_q.T, -1)).mean()


def plain_torch(hidden_p, weight_p, hidden_q, weight_q):
    log_p = torch.log_softmax(hidden_p @ weight_p.T, -1)
    log_q = torch.log_softmax(hidden_q @ weight_q.T, -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def trl(hidden_p, weight_p, hidden_q, weight_q, rows=4096):
    chunked_divergence.TOKEN_CHUNK_SIZE = rows
    function = chunked_divergence.ChunkedDivergenceFunction.apply
    values, _ = function(hidden_q, weight_q, None, hidden_p, weight_p, None, 0.0)
    return values.mean()


def trl_256(*tensors):
    return trl(*tensors, rows=256)


CONTENDERS = {
    "kullback": kullback,
    "whole logits": whole_logits,
    "plain torch": plain_torch,
    "trl": trl,
    "trl, 256 rows": trl_256,
}
BARS = {"memory": {"whole logits": 0.5, "trl": 0.6}, "time": {"whole logits": 1.0}, "family": 1.25}


def prepared(name):
    """For the process in which memory is measured."""
    return with_gradient(CONTENDERS[name])


def checked(results):
    """How far each contender's value and gradients are from ours, relatively; RuntimeError above 1e-5."""
    differences = {}
    for name, result in results.items():
        differences[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(result, results["kullback"]))
        if differences[name] > 1e-5:
            raise RuntimeError(f"{name} differs from kullback by {differences[name]}: not the same loss")
    return differences


def timed(threads, names, rounds):
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    times, results = race({name: with_gradient(CONTENDERS[name]) for name in names}, rounds, clock)
    differences, table = checked(results), []
    for name, seconds in medians(times).items():
        row = {"who": name, "threads": threads, "seconds": round(seconds, 3)}
        row |= {"ratio": round(ratio(times, "kullback", name), 3), "bar": BARS["time"].get(name)}
        table.append(row | {"difference": differences[name]})
        print(f"{name:15} {threads} threads {seconds:8.3f} s   x {row['ratio']:5.3f}  {bar(row)}")
    return table


def memory():
    """Peaks of fresh processes of one thread."""
    peaks, table = {name: peak_memory(__file__, "prepared", name) for name in CONTENDERS}, []
    for name, peak in peaks.items():
        row = {"who": name, "mb": round(peak / 1e6, 1), "ratio": round(peaks["kullback"] / peak, 3)}
        table.append(row | {"bar": BARS["memory"].get(name)})
        print(f"{name:15}           {row['mb']:8.1f} MB  x {row['ratio']:5.3f}  {bar(table[-1])}")
    return table


def bar(row):
    if row["bar"] is None:
        return ""
    return f"{'within' if row['ratio'] <= row['bar'] else 'ABOVE'} {row['bar']}"


def family(rounds, rows=512):
    """Every divergence under linear_chunked, over forward KL under linear_chunked; one thread."""
    torch.set_num_threads(1)

    def chunked(name):
        divergence = named(name, **OPTIONS.get(name, {}))
        return with_gradient(lambda *tensors: linear_chunked(divergence, *tensors), rows)

    names = ("kl", *(name for name in NAMES if name != "kl"))
    times, _ = race({name: chunked(name) for name in names}, rounds, time.process_time)
    seconds = medians(times)
    table = []
    for name, median in seconds.items():
        row = {"divergence": name, "seconds": round(median, 3), "ratio": round(ratio(times, name, "kl"), 3)}
        table.append(row | {"bar": BARS["family"]})
        print(f"{name:20} {median:8.3f} s  x {row['ratio']:5.3f}  {bar(table[-1])}")
    return table


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    content = {
        "environment": environment(),
        "peers": {"trl": installed("trl")},
        "rows": ROWS, "vocabulary": VOCABULARY, "width": WIDTH, "rounds": rounds, "bars": BARS,
        "memory": memory(),
        "time": [*timed(1, ["kullback", "whole logits", "plain torch", "trl"], rounds),
                 *timed(2, ["kullback", "whole logits", "plain torch"], rounds)],
        "family": family(rounds),
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
