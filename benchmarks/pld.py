"""PLD beside knowledge distillation, the paper's listing and peers, in one run: time, memory, error. Writes pld.json.

A call takes loss and gradient by the student's logits, float32, one thread. "kullback" sorts the teacher's logits each
time, "kullback_kept" has the rankings from an earlier epoch, "kullback_listmle" has equal weights. "torch_kd" is kl_div
of two log_softmax with cross-entropy beside it. "listing" is the loss as the paper's appendix has it: argsort, label
first, logcumsumexp, autograd; it takes 11 s for 4096 rows of 32000 classes and is left out there.
Peers: "allrank" is ListMLE of allRank (the teacher's logits as relevances, the label above all), "pylate_kd" the
distillation loss of PyLate, which is KL (its release has no Plackett-Luce loss), "torchsort" squared distance between
the student's soft ranks and the teacher's. "equal" says how far their values are from kullback's of one definition, and
for torchsort the share of ranks that are the same. Of allRank and PyLate, whose requirements are of other versions
of torch and transformers, pip install --no-deps takes what is needed here; who is not installed is left out.
The last case starts from hidden states: "chunked" is the objective of `kullback distill`, which holds some rows of
logits at a time, and "whole" the same loss of all logits.
Times are medians of calls in turn; "ratio" is the time over torch_kd's, or over whole's, the median over rounds; "mib"
is what a call holds at its highest beyond its inputs; "error" is that of the gradient against float64, relative.
"""

import importlib.metadata
import importlib.util
import json
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import _measure
from kullback.core.environment import environment
from kullback.core.types import TeacherOutput
from kullback.distill import pld_objective
from kullback.divergences import kl
from kullback.divergences.plackett_luce import (
    listmle_loss,
    listwise_loss,
    pld_loss,
    ranking_of,
    teacher_optimal_permutation,
)

PEERS = {"allrank": "allRank", "pylate_kd": "pylate", "torchsort": "torchsort"}
OURS, LISTS = ("kullback", "kullback_kept", "torch_kd"), ("kullback_listmle", "allrank", "pylate_kd", "torchsort")
SIZES = (
    (1024, 100, None, (*OURS, "listing", *LISTS), 9),
    (1024, 1000, None, (*OURS, "listing", *LISTS), 9),
    (256, 32_000, 64, (*OURS, "listing"), 7),
    (4096, 32_000, 64, OURS, 3),
)
STATES = (4096, 64, 32_000)  # rows, hidden size, classes
CHECKED = 64  # rows of a large case whose gradient is compared


def present(who):
    return who not in PEERS or importlib.util.find_spec(PEERS[who].lower()) is not None


def inputs(rows, classes, dtype=torch.float32, first=None):
    source = torch.Generator().manual_seed(0)
    teacher, student = 3 * torch.randn(2, rows, classes, generator=source)
    labels = torch.randint(classes, (rows,), generator=source)
    return teacher[:first].to(dtype), student[:first].to(dtype).requires_grad_(), labels[:first]


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


# --- peers


def raised(teacher, labels):
    """The teacher's logits with the label above all others."""
    top = teacher.amax(-1, keepdim=True) + 1
    return teacher.scatter(-1, labels.unsqueeze(-1), top)


def allrank(teacher, student, labels):
    for name in ("allrank.data.dataset_loading", "allrank.utils.file_utils"):  # read files with what no loss needs
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.PADDED_Y_VALUE, module.is_gs_path, module.copy_file_to_local = -1, None, None
    from allrank.models.losses.listMLE import listMLE

    return partial(listMLE, student, raised(teacher, labels))


def pylate_kd(teacher, student, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pylate.losses.distillation import Distillation

    def model(features):
        return {"token_embeddings": torch.zeros(*features["input_ids"].shape, 1)}

    model.skiplist, model.do_query_expansion = [], True
    features = {"input_ids": torch.zeros(len(labels), 1, dtype=torch.long)}
    features["attention_mask"] = torch.ones_like(features["input_ids"])
    loss = Distillation(model, score_metric=lambda *a, **b: student, normalize_scores=False)
    return partial(loss, [features, features], teacher)


def torchsort(teacher, student, labels):
    from torchsort import soft_rank

    ranks = soft_rank(-raised(teacher, labels), regularization_strength=1e-6)
    return lambda: (soft_rank(-student, regularization_strength=0.1) - ranks).square().mean()


def equal(who, teacher, student, labels):
    """Relative distance between a peer's value and ours, or the share of equal ranks."""
    student = student.detach()
    found = globals()[who](teacher, student, labels)
    if who == "torchsort":
        from torchsort import soft_rank

        ranks = soft_rank(-raised(teacher, labels).double(), regularization_strength=1e-6).round().long() - 1
        return (ranks == teacher_optimal_permutation(teacher, labels).argsort(-1)).double().mean().item()
    if who == "pylate_kd":
        wanted = kl(teacher.log_softmax(-1), student.log_softmax(-1)).mean()
    else:
        wanted = listmle_loss(teacher, student, labels)
    return abs(found().item() / wanted.item() - 1)


# --- cases


def loss_of(who, teacher, student, labels, topk):
    if who == "kullback":
        return partial(pld_loss, teacher, student, labels, topk=topk)
    if who == "kullback_listmle":
        return partial(listmle_loss, teacher, student, labels)
    if who == "kullback_kept":
        ranking = ranking_of(teacher, labels, topk=topk)
        return lambda: listwise_loss(student, *ranking).mean()
    if who == "listing":
        return partial(listing, teacher, student, labels, topk)
    if who in PEERS:
        return globals()[who](teacher, student, labels)
    return partial(kd, teacher, student, labels)


def prepare(who, rows, classes, topk):
    """The call of one contender: value and gradient."""
    teacher, student, labels = inputs(rows, classes)
    return taken(loss_of(who, teacher, student, labels, topk), student)


def prepare_states(who):
    """The call from hidden states and both heads: value, and gradients by the student's states and head."""
    rows, hidden, classes = STATES
    source = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, rows + 1, hidden, generator=source)
    heads = 3 * torch.randn(2, classes, hidden, generator=source) / hidden**0.5
    labels = torch.randint(classes, (1, rows + 1), generator=source)
    student, head = states[1].requires_grad_(), heads[1].requires_grad_()
    if who == "chunked":
        target = TeacherOutput(hidden=states[0], weight=heads[0])
        loss = partial(pld_objective(topk=64).loss, target, student, labels, weight=head)
    else:
        def loss():
            return pld_loss(states[0][0, :-1] @ heads[0].T, student[0, :-1] @ head.T, labels[0, 1:], topk=64)
    return taken(loss, student, head)


def taken(loss, *by):
    def call():
        value = loss()
        return value.detach(), *torch.autograd.grad(value, by)

    return call


def exact(who, rows, classes, topk):
    """The gradient of the first rows in float64, of what the contender means."""
    first = min(rows, CHECKED if classes > 1000 else rows)
    means = {"kullback": "listing", "kullback_kept": "listing", "allrank": "kullback_listmle"}.get(who, who)
    teacher, student, labels = inputs(rows, classes, torch.float64, first)
    return taken(loss_of(means, teacher, student, labels, topk), student)()[1] * (first / rows)


def line(case, who, times, base, memory, error):
    milliseconds, ratio = 1e3 * _measure.medians(times)[who], _measure.ratio(times, who, base)
    return {
        "case": case, "who": who, "ms": round(milliseconds, 2), "ratio": round(ratio, 2),
        "mib": round(memory / 2**20, 1), "error": error,
    }  # fmt: skip


def case(rows, classes, topk, everyone, rounds):
    everyone = [who for who in everyone if present(who)]
    contenders = {who: prepare(who, rows, classes, topk) for who in everyone}
    times, results = _measure.race(contenders, rounds, time.process_time)
    name = f"{rows} rows of {classes} classes" + ("" if topk is None else f", {topk} picks")
    table = []
    for who in everyone:
        right = exact(who, rows, classes, topk)
        error = ((results[who][1][: len(right)].double() - right).norm() / right.norm()).item()
        memory = _measure.peak_memory(__file__, "prepare", who, rows, classes, topk)
        table.append(line(name, who, times, "torch_kd", memory, error))
        if who in PEERS:
            table[-1]["equal"] = equal(who, *inputs(rows, classes))
    return table


def states_case():
    times, results = _measure.race({who: prepare_states(who) for who in ("whole", "chunked")}, 3, time.process_time)
    name, table = "{} states of {} numbers, {} classes, 64 picks".format(*STATES), []
    right = results["whole"][1].double()
    for who in times:
        error = ((results[who][1].double() - right).norm() / right.norm()).item() if who == "chunked" else None
        table.append(line(name, who, times, "whole", _measure.peak_memory(__file__, "prepare_states", who), error))
    return table


def main():
    torch.set_num_threads(1)
    table = [row for size in SIZES for row in case(*size)] + states_case()
    for row in table:
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        same = "" if "equal" not in row else f"  equal {row['equal']:.1e}"
        figures = f"{row['ms']:9.2f} ms  x {row['ratio']:6.2f}  {row['mib']:8.1f} MiB"
        print(f"{row['case']:55} {row['who']:16} {figures}{error}{same}")
    peers = {name: importlib.metadata.version(name) for who, name in PEERS.items() if present(who)}
    peers = {"torch": torch.__version__, **peers}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
