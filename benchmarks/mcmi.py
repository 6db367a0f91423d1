"""The loss and the meter of MCMI beside plain torch, and what its fine-tuning costs. Writes mcmi.json.

No library ships the method; the peers are the operations it cannot do without: cross-entropy for the loss, log_softmax
for the meter, each in one process and in turn with ours. Float32, one thread, processor time. "ratio" is ours over the
peer's, the median over rounds; "error" is to float64.

The meter aims at 1.3 times a log_softmax of 50,000 samples and 1000 classes. Compiled by numba it reads each row once
and takes less than one there, 1.4 at 10 classes and 1.9 at 100, where the logits of a log_softmax are in the cache as
well: the exponentials are work for both, and the largest entry of a row, the sums of each class in double precision
and the checks come on top. Without numba it is at two to five, as many passes over the same numbers. The loss adds a
quarter of a millisecond to a step of 64 images at 100 classes.
"""

import json
import time
from pathlib import Path

import torch
from torch import nn

import _measure
from kullback.core.environment import environment
from kullback.distill.mcmi import CMIMeter, class_centroids, empirical_cmi, mcmi_loss

torch.set_num_threads(1)


def batch(n, classes):
    source = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(n, classes, generator=source)
    return logits, torch.randint(classes, (n,), generator=source)


def raced(case, contenders, peer, rounds=7):
    times, results = _measure.race(contenders, rounds=rounds, clock=time.process_time)
    seconds = _measure.medians(times)
    rows = []
    for name in contenders:
        ratio = _measure.ratio(times, name, peer)
        rows.append({"case": case, "who": name, "ms": round(1e3 * seconds[name], 3), "ratio": round(ratio, 3)})
    return rows, results


def meter(n, classes):
    """One pass over n outputs: the information and its parts, beside a log_softmax of the same logits."""
    logits, labels = batch(n, classes)
    rows, results = raced(
        f"meter, n = {n}, C = {classes}",
        {
            "log_softmax": lambda: torch.log_softmax(logits, -1),
            "kullback meter": lambda: CMIMeter(classes).update(logits, labels).cmi,
            "kullback meter without numba": lambda: CMIMeter(classes, compiled=False).update(logits, labels).cmi,
            "kullback empirical_cmi": lambda: empirical_cmi(logits, labels).item(),
        },
        "log_softmax",
    )
    exact = empirical_cmi(logits.double(), labels).item()
    for row in rows[1:]:
        row["error"] = abs(results[row["who"]] - exact) / exact
    return rows


def loss(n, classes):
    """The loss and its gradient by the logits, beside cross-entropy."""
    logits, labels = batch(n, classes)
    centroids = class_centroids(logits.softmax(-1), labels, classes, empty="uniform")
    variable = logits.clone().requires_grad_()

    def gradient(value):
        return torch.autograd.grad(value, variable)[0]

    rows, results = raced(
        f"loss and gradient, b = {n}, C = {classes}",
        {
            "cross_entropy": lambda: gradient(nn.functional.cross_entropy(variable, labels)),
            "kullback": lambda: gradient(mcmi_loss(variable, labels, centroids, lam=0.15).loss),
        },
        "cross_entropy",
    )
    wide = logits.double().requires_grad_()
    exact = torch.autograd.grad(mcmi_loss(wide, labels, centroids.double(), lam=0.15).loss, wide)[0]
    rows[1]["error"] = ((results["kullback"] - exact).norm() / exact.norm()).item()
    return rows


def step(width):
    """A training step of a small convolutional network at 100 classes, 64 images of 32 x 32, with either loss."""
    source = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 100),
    )  # fmt: skip
    images, labels = torch.randn(64, 3, 32, 32, generator=source), torch.randint(100, (64,), generator=source)
    centroids = torch.full((100, 100), 0.01)

    def taken(value):
        model.zero_grad()
        value(model(images)).backward()

    rows, _ = raced(
        f"training step, width {width}",
        {
            "cross_entropy": lambda: taken(lambda logits: nn.functional.cross_entropy(logits, labels)),
            "kullback": lambda: taken(lambda logits: mcmi_loss(logits, labels, centroids, lam=0.15).loss),
        },
        "cross_entropy",
    )
    return rows


def prepare(which, n, classes):
    """For the peak memory of a call, in a process of its own."""
    logits, labels = batch(n, classes)
    if which == "log_softmax":
        return lambda: torch.log_softmax(logits, -1)
    compiled = which == "kullback meter"
    CMIMeter(classes, compiled=compiled).update(logits[:2], labels[:2])  # loads what is compiled
    return lambda: CMIMeter(classes, compiled=compiled).update(logits, labels).cmi


def main():
    table = []
    for n, classes in ((2000, 10), (10_000, 100), (50_000, 1000)):
        table += meter(n, classes)
    for n, classes in ((64, 10), (64, 100), (256, 1000)):
        table += loss(n, classes)
    for width in (16, 32):
        table += step(width)
    for which in ("log_softmax", "kullback meter", "kullback meter without numba"):
        peak = _measure.peak_memory(__file__, "prepare", which, 50_000, 1000)
        table.append({"case": "memory, n = 50000, C = 1000", "who": which, "MB": round(peak / 1e6, 1)})
    for row in table:
        error = f"error {row['error']:.1e}" if "error" in row else ""
        size = f"{row['MB']:8.1f} MB" if "MB" in row else f"{row['ms']:10.3f} ms  x {row['ratio']:6.3f}"
        print(f"{row['case']:38} {row['who']:28} {size}  {error}")
    content = {"environment": environment(), "threads": 1, "peers": {"torch": torch.__version__}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
