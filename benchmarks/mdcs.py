"""MDCS beside the loss as released, one expert after the other; experts in one product beside a loop. Writes mdcs.json.

float32, one thread, three experts. Loss: two views from logits to the gradient by both, against a loop with
cross-entropy and kl_div on the kept samples. Heads: three branches and cosine heads, forward and backward, against a
loop over modules and against one head as wide as the three together, which gives a third of the logits. "compiled" is
under torch.compile, whole graphs or an error, with the seconds of compilation; the last cases are both together, from
features to the gradient by the weights. "ratio" is a contender's time over ours, the median over rounds; "error" the
difference of the gradient from the loop's, relative; memory the peak above the inputs.
"""

import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import _measure
from kullback.core.environment import environment
from kullback.data.long_tail import long_tail_counts
from kullback.distill import MDCSLoss
from kullback.models.experts import CosineHead, ExpertLinear, MultiExpert

torch.set_num_threads(1)
LAM = (-0.5, 1.0, 2.5)


def batch(rows, classes):
    source = torch.Generator().manual_seed(0)
    weak = 3 * torch.randn(3, rows, classes, generator=source)
    strong = weak + torch.randn(3, rows, classes, generator=source)
    labels = torch.randint(0, classes, (rows,), generator=source)
    labels = torch.where(torch.rand(rows, generator=source) < 0.6, weak[1].argmax(-1), labels)
    return weak.requires_grad_(), strong.requires_grad_(), labels, long_tail_counts(500, classes, 100)


def released(weak, strong, labels, counts):
    """The loop over experts, as the authors' code goes about it."""
    loss, prior = 0.0, counts.float()
    for k, strength in enumerate(LAM):
        shift = torch.log(torch.pow(prior, strength) + 1e-9)
        first, second = weak[k] + shift, strong[k] + shift
        loss = loss + functional.cross_entropy(torch.cat([first, second]), torch.cat([labels, labels]))
        target, log_q = functional.softmax(first, dim=1).detach(), functional.log_softmax(second, dim=1)
        kept = functional.softmax(first, dim=1).detach().max(1).indices == labels
        if kept.any():
            loss = loss + 0.6 * functional.kl_div(log_q[kept], target[kept], reduction="batchmean")
    return loss


def prepared(name, rows, classes):
    """What `peak_memory` calls: the loss and its gradient by both views."""
    weak, strong, labels, counts = batch(rows, classes)
    ours = MDCSLoss(counts, lam=LAM, warm_epochs=0)
    compiled = torch.compile(ours, fullgraph=True) if name == "kullback, compiled" else ours
    losses = {
        "kullback": lambda: ours(weak, strong, labels)["loss"],
        "kullback, compiled": lambda: compiled(weak, strong, labels)["loss"],
        "loop, as released": lambda: released(weak, strong, labels, counts),
    }
    return lambda: torch.autograd.grad(losses[name](), (weak, strong))


def loss(rows, classes):
    torch._dynamo.reset()
    calls = {name: prepared(name, rows, classes) for name in ("kullback", "kullback, compiled", "loop, as released")}
    started = time.perf_counter()
    calls["kullback, compiled"]()
    seconds_of_compilation = round(time.perf_counter() - started, 1)
    times, found = _measure.race(calls, rounds=9, clock=time.process_time)
    exact = found["loop, as released"]
    return [
        {
            "case": f"loss and gradient, [3, {rows}, {classes}]",
            "who": name,
            "ms": round(1e3 * seconds, 3),
            "ratio": round(_measure.ratio(times, name, "kullback"), 2),
            "error": max((a - b).norm() / b.norm() for a, b in zip(found[name], exact)).item(),
            **(
                {"seconds_of_compilation": seconds_of_compilation}
                if name == "kullback, compiled"
                else {"megabytes": round(_measure.peak_memory(__file__, "prepared", name, rows, classes) / 1e6, 1)}
            ),
        }
        for name, seconds in _measure.medians(times).items()
    ]


def heads(rows, hidden, width, classes):
    source = torch.Generator().manual_seed(0)
    features = torch.randn(rows, hidden, generator=source, requires_grad=True)
    branch = ExpertLinear(3, hidden, width, generator=source)
    head = CosineHead(width, classes, experts=3, generator=source)
    wide = nn.Linear(hidden, 3 * width), CosineHead(3 * width, classes, generator=source)
    singles = [(nn.Linear(hidden, width), CosineHead(width, classes, generator=source)) for _ in range(3)]
    for k, (linear, cosine) in enumerate(singles):
        linear.weight.data.copy_(branch.weight[k])
        linear.bias.data.copy_(branch.bias[k, 0])
        cosine.weight.data.copy_(head.weight[k])

    def gradient(forward):
        return lambda: torch.autograd.grad(forward().square().mean(), features)

    calls = {
        "kullback": gradient(lambda: head(branch(features).relu())),
        "loop over modules": gradient(lambda: torch.stack([c(linear(features).relu()) for linear, c in singles])),
        "one head of that width": gradient(lambda: wide[1](wide[0](features).relu())),
    }
    times, found = _measure.race(calls, rounds=9, clock=time.process_time)
    ours, peers = found["kullback"][0], found["loop over modules"][0]
    error = ((ours - peers).norm() / peers.norm()).item()
    return [
        {
            "case": f"experts and heads, {rows} x {hidden} to 3 x {width} to {classes}",
            "who": name,
            "ms": round(1e3 * seconds, 3),
            "ratio": round(_measure.ratio(times, name, "kullback"), 2),
            "error": error if name == "kullback" else None,
        }
        for name, seconds in _measure.medians(times).items()
    ]


def step(rows, hidden, width, classes):
    """Experts, heads and loss from two views of the features to the gradient by all weights, eager and compiled."""
    source = torch.Generator().manual_seed(0)
    branches = nn.Sequential(ExpertLinear(3, hidden, width, generator=source), nn.ReLU())
    model = MultiExpert(nn.Identity(), branches, CosineHead(width, classes, experts=3, generator=source))
    loss = MDCSLoss(long_tail_counts(500, classes, 100), lam=LAM, warm_epochs=0)
    features = torch.randn(2 * rows, hidden, generator=source)
    labels = torch.randint(0, classes, (rows,), generator=source)

    def terms(features, labels):
        weak, strong = model(features)["logits"].chunk(2, dim=1)
        return loss(weak, strong, labels)["loss"]

    torch._dynamo.reset()
    compiled = torch.compile(terms, fullgraph=True)
    weights = list(model.parameters())
    calls = {
        "kullback": lambda: torch.autograd.grad(terms(features, labels), weights),
        "kullback, compiled": lambda: torch.autograd.grad(compiled(features, labels), weights),
    }
    calls["kullback, compiled"]()
    times, found = _measure.race(calls, rounds=9, clock=time.process_time)
    return [
        {
            "case": f"experts, heads and loss, 2 x {rows} x {hidden} to 3 x {width} to {classes}",
            "who": name,
            "ms": round(1e3 * seconds, 3),
            "ratio": round(_measure.ratio(times, name, "kullback"), 2),
            "error": max((a - b).norm() / b.norm() for a, b in zip(found[name], found["kullback"])).item(),
        }
        for name, seconds in _measure.medians(times).items()
    ]


def main():
    table = loss(64, 100) + loss(256, 1000) + loss(64, 8142)
    table += heads(128, 64, 32, 100) + heads(128, 256, 128, 1000) + heads(512, 512, 256, 100)
    table += step(64, 64, 32, 100) + step(128, 256, 128, 1000)
    for row in table:
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        memory = f"{row['megabytes']} MB" if "megabytes" in row else ""
        print(f"{row['case']:55} {row['who']:24} {row['ms']:9.3f} ms  x {row['ratio']:5.2f}  {memory:10} {error}")
    content = {"environment": environment(), "threads": 1, "peers": {}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
