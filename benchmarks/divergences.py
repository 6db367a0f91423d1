"""The divergences beside forward KL, torch's kl_div and TRL's generalized JSD in one run. Writes divergences.json.

float32, one thread, value and gradient. The family: [64, 32768], from given log-probabilities, from logits, and behind
a linear head from 256 hidden states, as ratios to forward KL. The peers: [512, 32000] from logits, the teacher's fixed.
Each time is the median of several calls, all contenders in turn. "ratio" is the time over that of kullback's kl in the
family and the peer's time over ours beside the peers; "error" is the largest of a row's value against float64.
"""

import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from kullback.core.environment import environment, installed
from kullback.divergences import NAMES, f_divergence, from_logits, jsd, kl, named, reverse_kl

torch.set_num_threads(1)
OPTIONS = {
    "alpha_divergence": [{"alpha": a} for a in (-1.0, 0.5, 0.98, 2.0)],
    "generalized_jsd": [{"beta": b} for b in (0.1, 0.9)],
    "renyi": [{"alpha": a} for a in (0.5, 0.98, 2.0)],
    "skew_kl": [{"alpha": a} for a in (0.1, 0.7)],
    "skew_reverse_kl": [{"alpha": a} for a in (0.1,)],
}


def family():
    """Every member under its name, forward KL first."""
    members = {"kl": kl}
    for name in NAMES:
        for options in OPTIONS.get(name, [{}]):
            members[" ".join([name, *(f"{value:g}" for value in options.values())])] = named(name, **options)
    return members


def race(contenders, most=15, seconds=10.0):
    """Median seconds of each contender, called in turn after a round that does not count.

    At least 3 rounds, then more until there are `most` or the time is used up.
    """
    times = {name: [] for name in contenders}
    start = time.perf_counter()
    for turn in range(most + 1):
        if turn > 3 and time.perf_counter() - start > seconds:
            break
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(values), len(values)) for name, values in times.items()}


def with_gradient(loss, *inputs):
    """A call of loss() and its gradient by the inputs."""
    return lambda: torch.autograd.grad(loss(), inputs)


def rows(case, results, reference, errors):
    base, _ = results[reference]
    return [
        {
            "case": case,
            "who": name,
            "ms": round(1e3 * seconds, 2),
            "ratio": round(seconds / base, 2),
            "calls": calls,
            "error": errors.get(name),
        }
        for name, (seconds, calls) in results.items()
    ]


def beside_forward_kl(size, vocabulary, width):
    """The family's time relative to forward KL, in three settings."""
    source = torch.Generator().manual_seed(0)
    target, model = 3 * torch.randn(2, size, vocabulary, generator=source)
    log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(model, -1).requires_grad_()
    model.requires_grad_()
    hidden = torch.randn(size, width, generator=source).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=source) * width**-0.5).requires_grad_()

    def from_log_probabilities(divergence):
        return with_gradient(lambda: divergence(log_p, log_q).sum(), log_q)

    def with_softmax(divergence):
        return with_gradient(lambda: divergence(log_p, torch.log_softmax(model, -1)).sum(), model)

    def with_head(divergence):
        def loss():
            return divergence(log_p, torch.log_softmax(hidden @ weight.T, -1)).sum()

        return with_gradient(loss, hidden, weight)

    table = []
    for case, build in (
        (f"from log-probabilities, [{size}, {vocabulary}]", from_log_probabilities),
        (f"from logits, [{size}, {vocabulary}]", with_softmax),
        (f"head of {width} included, [{size}, {vocabulary}]", with_head),
    ):
        table += rows(case, race({name: build(member) for name, member in family().items()}), "kl", {})
    return table


def torch_kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def torch_jsd(log_p, log_q, beta):
    """The generalized JSD as one writes it: two calls of kl_div at the mixture."""
    weights = torch.tensor([beta, 1.0 - beta]).log()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    return beta * torch_kl(log_p, log_m) + (1.0 - beta) * torch_kl(log_q, log_m)


def trl_jsd():
    """TRL's function (target logits, model logits, beta) -> [N], or None where TRL is not installed."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        return None

    def rowwise(target, model, beta):
        return GKDTrainer.generalized_jsd_loss(model, target, beta=beta, reduction="none").sum(-1)

    return rowwise


def beside_peers(size, vocabulary):
    """From logits to the gradient by the model's logits, beside torch and TRL."""
    source = torch.Generator().manual_seed(0)
    target, model = 3 * torch.randn(2, size, vocabulary, generator=source)
    model.requires_grad_()
    peer = trl_jsd()
    table = []
    for name, beta, ours, torchs, twin in (
        ("forward KL", 0.0, kl, torch_kl, f_divergence("kl")),
        ("reverse KL", 1.0, reverse_kl, lambda p, q: torch_kl(q, p), f_divergence("reverse_kl")),
        ("JSD", 0.5, jsd, partial(torch_jsd, beta=0.5), f_divergence("jsd")),
    ):
        losses = {"kullback": partial(from_logits, ours), "torch": partial(from_logits, torchs)}
        if peer is not None:
            losses["trl"] = partial(peer, beta=beta)
        with torch.no_grad():
            few = target[:32], model[:32]
            exact = from_logits(twin.definition, few[0].double(), few[1].double())
            errors = {who: (loss(*few).double() - exact).abs().max().item() for who, loss in losses.items()}
        contenders = {
            who: with_gradient(lambda loss=loss: loss(target, model).sum(), model) for who, loss in losses.items()
        }
        table += rows(f"{name} from logits, [{size}, {vocabulary}]", race(contenders), "kullback", errors)
    return table


def main():
    table = beside_forward_kl(64, 32_768, 256) + beside_peers(512, 32_000)
    for row in table:
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        print(f"{row['case']:46} {row['who']:22} {row['ms']:9.2f} ms  x {row['ratio']:5.2f}  {error}")
    peers = {name: installed(name) for name in ("torch", "trl")}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
