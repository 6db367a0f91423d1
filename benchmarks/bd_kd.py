"""BD-KD beside the loss as one writes it, and beside TRL's KL, in one run. Writes bd_kd.json.

From logits to the gradient by the student's, float32, temperature 4, one thread. "plain torch" takes both KLs and both
entropies from softmax and log_softmax, as public re-implementations do; "trl, forward KL" has a single divergence and
no gate. "ratio" is a contender's time over ours, the median over rounds; "error" that of the value against float64,
relative; memory is the peak of one call above its inputs. The last case is a step of two convolutional networks on
images of 32 x 32, with the losses of BD-KD and with cross-entropy alone.
"""

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

import _measure
from kullback.core.environment import environment, installed
from kullback.distill import OnlineDistiller, OnlineLoss, bdkd_loss
from kullback.divergences import from_logits, kl

torch.set_num_threads(1)
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
T = 4.0


def ours(teacher, student):
    return bdkd_loss(teacher, student, temperature=T)["loss"]


def ours_kl(teacher, student):
    return T**2 * from_logits(kl, teacher, student, T).mean()


def plain_torch(teacher, student):
    with torch.no_grad():
        entropies = []
        for logits in (teacher, student):
            log_p = torch.log_softmax(logits, -1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        gap = entropies[1] - entropies[0]
        ahead, back = torch.where(gap < 0, 2.0, 1.0), torch.where(gap > 0, 2.0, 1.0)
    log_p, log_q = torch.log_softmax(teacher / T, -1), torch.log_softmax(student / T, -1)
    forward = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    reverse = nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return T**2 * (ahead * forward + back * reverse).mean()


def trl_kl(teacher, student):
    from trl.experimental.gkd import GKDTrainer

    return T**2 * GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0, temperature=T)


CONTENDERS = {"kullback": ours, "plain torch": plain_torch, "kullback, forward KL": ours_kl, "trl, forward KL": trl_kl}


def logits(rows, classes):
    source = torch.Generator().manual_seed(0)
    teacher, student = 3 * torch.randn(2, rows, classes, generator=source)
    return teacher, student.requires_grad_()


def prepared(name, rows, classes):
    """What `peak_memory` calls: value and gradient of a contender."""
    teacher, student = logits(rows, classes)
    return lambda: torch.autograd.grad(CONTENDERS[name](teacher, student), student)


def loss(rows, classes):
    teacher, student = logits(rows, classes)
    calls = {name: prepared(name, rows, classes) for name in CONTENDERS}
    times, found = _measure.race(calls, rounds=9, clock=time.process_time)
    wide = student.detach().double().requires_grad_()
    exact = plain_torch(teacher.double(), wide)
    (slope,) = torch.autograd.grad(exact, wide)
    table = []
    for name, seconds in _measure.medians(times).items():
        row = {"case": f"value and gradient, [{rows}, {classes}]", "who": name, "ms": round(1e3 * seconds, 3)}
        row["ratio"] = round(_measure.ratio(times, name, "kullback"), 2)
        if "KL" not in name:
            value = CONTENDERS[name](teacher, student).item()
            row["error"] = abs(value / exact.item() - 1.0)
            row["gradient_error"] = ((found[name][0] - slope).norm() / slope.norm()).item()
        if classes > 1000:
            row["megabytes"] = round(_measure.peak_memory(__file__, "prepared", name, rows, classes) / 1e6, 1)
        table.append(row)
    return table


def network(width, classes):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
        width *= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def step(classes, batch=128):
    """A step of two networks; in the second contender nothing is distilled."""
    source = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=source)
    labels = torch.randint(0, classes, (batch,), generator=source)
    networks = [network(48, classes), network(32, classes)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.0) for net in networks]
    distiller = OnlineDistiller(networks, optimizers, loss=OnlineLoss(temperature=T))

    def alone():
        for net, optimizer in zip(networks, optimizers):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()

    calls = {"kullback": lambda: distiller.step(images, labels), "cross-entropy alone": alone}
    times, _ = _measure.race(calls, rounds=5, clock=time.process_time)
    return [
        {
            "case": f"step of two networks, batch {batch}, {classes} classes",
            "who": name,
            "ms": round(1e3 * seconds, 2),
            "ratio": round(_measure.ratio(times, name, "kullback"), 3),
        }
        for name, seconds in _measure.medians(times).items()
    ]


def main():
    table = []
    for rows, classes in ((128, 100), (128, 1000), (256, 32000)):
        table += loss(rows, classes)
    for classes in (100, 1000):
        table += step(classes)
    for row in table:
        error = f"error {row['error']:.1e}, {row['gradient_error']:.1e}" if "error" in row else ""
        memory = f"{row['megabytes']} MB" if "megabytes" in row else ""
        print(f"{row['case']:50} {row['who']:22} {row['ms']:10.3f} ms  x {row['ratio']:6.3f}  {memory:10} {error}")
    content = {"environment": environment(), "threads": 1, "peers": {"trl": installed("trl")}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
