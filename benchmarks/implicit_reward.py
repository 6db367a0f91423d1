"""A step of f-SFT beside trl's fine-tuning, and exact matching of a demonstrator. Writes implicit_reward.json.

A step is forward, loss and backward on completions after prompts of a quarter of the sequence; f-SFT has the
reference's log-probabilities, once computed before ("stored") and once by the reference beside it ("live"). trl's
loss is that of its fused head, which its trainer for fine-tuning takes. One thread, float32, medians of the processor's
time, all called in turn; "ratio" is the median of a contender's time over trl's. Matching: the time for many problems
at once, float64, and the largest gap between the primal and the dual value.
"""

import json
import time
import warnings
from pathlib import Path

import torch
import trl
from trl.trainer.utils import add_fused_lm_head

from _measure import medians, peak_memory, race, ratio
from kullback.align import FSFT, log_probs_from_hidden, matching_divergence, matching_dual, phi_transform
from kullback.align.methods import Supervised
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.models.small import small_llama

torch.set_num_threads(1)
warnings.simplefilter("ignore")
SIZES = ((4, 128, 8192), (8, 128, 32_768), (8, 256, 32_768))  # completions, tokens, vocabulary
WIDTH, LAYERS = 256, 2
PROBLEMS = ((1000, 10), (10_000, 50), (1000, 1000))
NAMES = ("chi2", "hellinger", "js", "reverse_kl", "forward_kl", "tv")
METHODS = {"SFT": Supervised(), "f-SFT": FSFT(divergence=matching_divergence("hellinger"), beta=0.05)}


def made(rows, tokens, vocabulary):
    """A model, its token ids [B, T] and the mask of completions."""
    sizes = {"hidden": WIDTH, "layers": LAYERS, "heads": 4, "length": tokens}
    model = small_llama(vocabulary, **sizes, generator=generator(0, "model"))
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator(0, "tokens"))
    mask = torch.arange(tokens).expand(rows, -1) >= tokens // 4
    return model, ids, mask


def log_probs(model, ids, mask):
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return log_probs_from_hidden(hidden, model.lm_head.weight, ids[:, 1:], mask=mask[:, 1:]).log_probs


def ours(name, reference, *size):
    """A call of a step; reference is "stored" or "live"."""
    model, ids, mask = made(*size)
    with torch.no_grad():
        stored = log_probs(model, ids, mask) + 0.01
    batch = {"completion_mask": mask[:, 1:], "reference_log_prob": stored}
    frozen = made(*size)[0] if reference == "live" else None

    def call():
        model.zero_grad()
        if frozen is not None:
            with torch.no_grad():
                batch["reference_log_prob"] = log_probs(frozen, ids, mask)
        method = METHODS[name]
        loss, _ = method.loss(log_probs(model, ids, mask), batch, count=method.count(batch))
        loss.backward()
        return loss.detach()

    return call


def peer(*size):
    model, ids, mask = made(*size)
    add_fused_lm_head(model)
    labels = ids.masked_fill(~mask, -100)

    def call():
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).loss
        loss.backward()
        return loss.detach()

    return call


def steps(*size):
    contenders = {
        "trl SFT": peer(*size), "kullback SFT": ours("SFT", "stored", *size),
        "kullback f-SFT, stored": ours("f-SFT", "stored", *size), "kullback f-SFT, live": ours("f-SFT", "live", *size),
    }  # fmt: skip
    times, results = race(contenders, rounds=3, clock=time.process_time)
    if abs(results["trl SFT"] - results["kullback SFT"]) > 1e-4:
        raise RuntimeError(f"the losses differ: {results}")
    memory = {
        "trl SFT": peak_memory(__file__, "peer", *size),
        "kullback f-SFT, stored": peak_memory(__file__, "ours", "f-SFT", "stored", *size),
    }
    case = "{} x {} tokens, vocabulary {}".format(*size)
    table = []
    for name, seconds in medians(times).items():
        row = {"case": case, "who": name, "ms": round(1e3 * seconds, 1)}
        row["ratio"] = round(ratio(times, name, "trl SFT"), 2)
        table.append(row | ({"memory_MB": round(memory[name] / 1e6)} if name in memory else {}))
    return table


def matching(problems, outcomes):
    source = generator(0, "problems")
    expert, reference = torch.randn(2, problems, outcomes, generator=source, dtype=torch.float64).log_softmax(-1)
    table = []
    for name in NAMES:
        divergence = matching_divergence(name)

        def solve(divergence=divergence):
            return matching_dual(expert, reference, beta=0.5, divergence=divergence)

        times, results = race({"kullback": solve}, rounds=3, clock=time.process_time)
        found = results["kullback"]
        phi, _ = phi_transform(found.reward, divergence=divergence, largest_weight=None)
        dual = (expert.exp() * phi).sum(-1) - 0.5 * (reference + found.reward / 0.5).logsumexp(-1)
        row = {"case": f"matching, {problems} x {outcomes}, {name}", "who": "kullback"}
        row |= {"ms": round(1e3 * medians(times)["kullback"], 1), "gap": (dual - found.value).abs().max().item()}
        table.append(row)
    return table


def main():
    table = [row for size in SIZES for row in steps(*size)] + [row for size in PROBLEMS for row in matching(*size)]
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    content = {"environment": environment(), "threads": 1, "peers": {"trl": trl.__version__}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
