"""PLD beside knowledge distillation in torch and the paper's listing, in one run: time, memory, error. Writes pld.json.

A call takes loss and gradient by the student's logits, float32, one thread. "kullback" sorts the teacher's logits each
time, "kullback_kept" has the rankings from an earlier epoch. "torch_kd" is kl_div of two log_softmax with cross-entropy
beside it. "listing" is the loss as the paper's appendix has it: argsort, the label put first, logcumsumexp, autograd.
Times are medians of calls in turn; "ratio" is the time over torch_kd's, the median over rounds; "mib" is what a call
holds at its highest beyond its inputs; "error" is that of the gradient against float64, relative.
"""

import json
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import _measure
from kullback.core.environment import environment
from kullback.divergences.plackett_luce import listwise_loss, pld_loss, ranking_of

SIZES = ((1024, 100, None), (1024, 1000, None), (256, 32_000, 64))
WHO = ("kullback", "kullback_kept", "torch_kd", "listing")


def inputs(rows, classes, dtype=torch.float32):
    source = torch.Generator().manual_seed(0)
    teacher, student = 3 * torch.randn(2, rows, classes, generator=source)
    labels = torch.randint(classes, (rows,), generator=source)
    return teacher.to(dtype), student.to(dtype).requires_grad_(), labels


def listing(teacher, student, labels, topk):
    """As in the appendix; with topk the classes that are not picked are one more entry of the list."""
    weights = teacher.softmax(-1)
    order = teacher.argsort(-1, descending=True)
    others = order[order != labels.unsqueeze(-1)].view(len(labels), -1)
    order = torch.cat([labels.unsqueeze(-1), others], -1)[:, :topk]
    picked, alpha = student.gather(-1, order).flip(-1), weights.gather(-1, order).flip(-1)
    if topk is not None:
        rest = student.scatter(-1, order, -torch.inf).logsumexp(-1, keepdim=True)
        left = torch.cat([rest, picked], -1).logcumsumexp(-1)[:, 1:]
    else:
        left = picked.logcumsumexp(-1)
    return (alpha * (left - picked)).sum(-1).mean()


def kd(teacher, student, labels, temperature=2.0):
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return 0.9 * temperature**2 * soft + 0.1 * F.cross_entropy(student, labels)


def prepare(who, rows, classes, topk, dtype=torch.float32):
    """The call of one contender: value and gradient."""
    teacher, student, labels = inputs(rows, classes, dtype)
    if who == "kullback":
        loss = partial(pld_loss, teacher, student, labels, topk=topk)
    elif who == "kullback_kept":
        ranking = ranking_of(teacher, labels, topk=topk)
        loss = lambda: listwise_loss(student, *ranking).mean()  # noqa: E731
    elif who == "torch_kd":
        loss = partial(kd, teacher, student, labels)
    else:
        loss = partial(listing, teacher, student, labels, topk)

    def call():
        value = loss()
        return value.detach(), torch.autograd.grad(value, student)[0]

    return call


def case(rows, classes, topk):
    times, results = _measure.race({who: prepare(who, rows, classes, topk) for who in WHO}, 9, time.process_time)
    medians = _measure.medians(times)
    exact = {"torch_kd": prepare("torch_kd", rows, classes, topk, torch.float64)()[1]}
    exact |= dict.fromkeys(set(WHO) - set(exact), prepare("listing", rows, classes, topk, torch.float64)()[1])
    table = []
    for who in WHO:
        error = ((results[who][1].double() - exact[who]).norm() / exact[who].norm()).item()
        memory = _measure.peak_memory(__file__, "prepare", who, rows, classes, topk) / 2**20
        name = f"{rows} rows of {classes} classes" + ("" if topk is None else f", {topk} picks")
        ratio = _measure.ratio(times, who, "torch_kd")
        table.append(
            {"case": name, "who": who, "ms": round(1e3 * medians[who], 2), "ratio": round(ratio, 2),
             "mib": round(memory, 1), "error": error}
        )  # fmt: skip
    return table


def main():
    torch.set_num_threads(1)
    table = [row for size in SIZES for row in case(*size)]
    for row in table:
        print(
            f"{row['case']:40} {row['who']:14} {row['ms']:9.2f} ms  x {row['ratio']:5.2f}  {row['mib']:8.1f} MiB"
            f"  error {row['error']:.1e}"
        )
    content = {"environment": environment(), "threads": 1, "peers": {"torch": torch.__version__}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
