"""A step of DPO from hidden states beside trl's trainer, and the exact optimum beside a bisection. Writes f_dpo.json.

A step is forward, loss and backward on chosen and rejected completions, with log-probabilities of the reference
computed before; half of each sequence is the prompt. trl's loss is its trainer's own method with its fused head, called
on a stand-in that holds the options it reads; "whole logits" is the same step without any chunks. All divergences that
trl knows are run at the first size, forward KL at each, and there with the memory, which does not hang on the
divergence; "apart" is how far a loss is from ours, "gradient_apart" the same of the head's gradient, relatively, and a
difference ends the run. One thread, float32, medians of the processor's time, all called in turn; "ratio" is the median
of the other's time over ours. The optimum: problems x outcomes, float64; the bisection, of sixty steps, is timed on 200
of the problems.
"""

import json
import time
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from _measure import medians, peak_memory, race, ratio
from kullback.align import FDPOLoss, f_regularised_policy, paper_divergence
from kullback.align.log_probs import log_probs_from_hidden, log_probs_from_logits, sequence_log_probs
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.models.small import small_llama

torch.set_num_threads(1)
warnings.simplefilter("ignore")
SIZES = ((2, 128, 32_768), (4, 256, 32_768), (2, 256, 131_072))  # pairs, tokens a sequence, vocabulary
WIDTH, LAYERS = 256, 2
PROBLEMS = ((1000, 100), (1000, 1000), (10_000, 1000))
NAMES = ("reverse_kl", "forward_kl", "jensen_shannon")
# the paper's name, alpha, and trl's name, whose coefficient is 1 - alpha
KINDS = (
    ("forward_kl", 0.5, "forward_kl"), ("reverse_kl", 0.5, "reverse_kl"), ("jensen_shannon", 0.5, "js_divergence"),
    ("alpha", 0.3, "alpha_divergence"),
)  # fmt: skip
# Of losses, and of gradients relatively: the log-probabilities are near -700, where float32 steps by 6e-5, and each
# contender's gradient is 4e-5 to 5e-5 from that of float64.
APART = (1e-5, 1e-4)


def made(pairs, tokens, vocabulary):
    """A policy, token ids [2 pairs, T], the mask of completions, and the reference's log-probabilities [2, pairs]."""
    sizes = {"hidden": WIDTH, "layers": LAYERS, "heads": 4, "length": tokens}
    model = small_llama(vocabulary, **sizes, generator=generator(0, "model"))
    source = generator(0, "tokens")
    ids = torch.randint(vocabulary, (2 * pairs, tokens), generator=source)
    mask = torch.zeros(2 * pairs, tokens, dtype=torch.long)
    mask[:, tokens // 2 :] = 1
    with torch.no_grad():
        log_probs = chunked(model, ids, mask)
    return model, ids, mask, log_probs.view(2, -1) + 0.1 * torch.randn(2, pairs, generator=source)


def chunked(model, ids, mask):
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    kept = mask[:, 1:].bool()
    found = log_probs_from_hidden(hidden, model.lm_head.weight, ids[:, 1:], mask=kept)
    return sequence_log_probs(found.log_probs, kept)


def whole(model, ids, mask):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return sequence_log_probs(log_probs_from_logits(logits, ids[:, 1:]).log_probs, mask[:, 1:].bool())


def ours(form, kind, *size):
    """A call of a step; form is "chunked" or "whole", kind one of KINDS."""
    model, ids, mask, reference = made(*size)
    options = FDPOLoss(divergence=paper_divergence(kind[0], alpha=kind[1]))

    def call():
        model.zero_grad()
        policy = globals()[form](model, ids, mask).view(2, -1)
        loss = options(*reference, *policy).loss.mean()
        loss.backward()
        return loss.detach(), model.lm_head.weight.grad

    return call


def peer(kind, *size):
    model, ids, mask, reference = made(*size)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type=kind[2], f_alpha_divergence_coef=1.0 - kind[1], beta=0.1, loss_types=["sigmoid"],
        loss_weights=[1.0], label_smoothing=0.0, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)), args=SimpleNamespace(),
    )  # fmt: skip
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    batch |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}

    def call():
        model.zero_grad()
        loss = DPOTrainer._compute_loss(trainer, model, batch, False)
        loss.backward()
        return loss.detach(), model.lm_head.weight.grad

    return call


def steps(kind, *size):
    contenders = {"kullback": ours("chunked", kind, *size), "trl": peer(kind, *size)}
    if kind == KINDS[0]:
        contenders["whole logits"] = ours("whole", kind, *size)
    times, results = race(contenders, rounds=3 if size == SIZES[0] else 2, clock=time.process_time)
    value, gradient = results["kullback"]
    apart = {
        name: ((other - value).abs().item(), ((slope - gradient).norm() / gradient.norm()).item())
        for name, (other, slope) in results.items()
    }
    if any(found > most for pair in apart.values() for found, most in zip(pair, APART, strict=True)):
        raise RuntimeError(f"{kind[0]}: {apart}")
    case = "{} pairs x {} tokens, vocabulary {}".format(*size)
    table = [
        {
            "case": case, "divergence": kind[0], "who": name, "ms": round(1e3 * seconds, 1),
            "ratio": round(ratio(times, name, "kullback"), 2),
            "apart": apart[name][0], "gradient_apart": apart[name][1],
        }
        for name, seconds in medians(times).items()
    ]  # fmt: skip
    return table if kind != KINDS[0] else [row | used for row, used in zip(table, memory(kind, *size), strict=True)]


def memory(kind, *size):
    """What each contender takes at its highest."""
    orders = (("ours", "chunked"), ("peer",), ("ours", "whole"))
    peaks = [peak_memory(__file__, *order, kind, *size) for order in orders]
    return [{"memory_MB": round(peak / 1e6), "memory_ratio": round(peak / peaks[0], 2)} for peak in peaks]


def bisected(log_p, reward, divergence, beta):
    """The multiplier by halving the interval between the least and the largest reward, sixty times."""
    low, high = reward.amin(-1, keepdim=True), reward.amax(-1, keepdim=True)
    for _ in range(60):
        at = 0.5 * (low + high)
        ratio = divergence.link_inverse((reward - at) / beta).nan_to_num(nan=float("inf"))
        over = (log_p + ratio).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(over, at, low), torch.where(over, high, at)
    return at.squeeze(-1)


def optima(problems, outcomes):
    source = generator(0, "problems")
    log_p = torch.randn(problems, outcomes, generator=source, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(problems, outcomes, generator=source, dtype=torch.float64)
    table = []
    for name in NAMES:
        divergence = paper_divergence(name)

        def exact(divergence=divergence):
            return f_regularised_policy(log_p, reward, divergence=divergence, beta=0.5)

        few = slice(0, 200)  # the bisection is slow
        check = bisected(log_p[few], reward[few], divergence, 0.5)
        error = (exact().multiplier[few] - check).abs().max().item()
        times, _ = race({"kullback": exact}, rounds=3, clock=time.process_time)
        begin = time.process_time()
        bisected(log_p[few], reward[few], divergence, 0.5)
        other = (time.process_time() - begin) * problems / len(log_p[few])
        mine = medians(times)["kullback"]
        row = {"case": f"optimum, {problems} x {outcomes}, {name}", "ms": round(1e3 * mine, 1), "error": error}
        table.append(row | {"who": "kullback", "bisection_ratio": round(other / mine, 1)})
    return table


def main():
    table = [row for size in SIZES for row in steps(KINDS[0], *size)]
    table += [row for kind in KINDS[1:] for row in steps(kind, *SIZES[0])]
    table += [row for size in PROBLEMS for row in optima(*size)]
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    content = {"environment": environment(), "threads": 1, "peers": {"trl": trl.__version__}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
