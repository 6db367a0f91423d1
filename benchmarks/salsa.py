"""A soup of two model directories beside reading them, and beside averaging whole models. Writes salsa.json.

Two float32 checkpoints of 99 MiB, in one file and in shards of 24, one thread, medians of calls in turn. "read" reads
every tensor of both; "whole" loads both models with transformers and averages their weights, without writing. "ratio"
is the soup's time, writing included, over "read" plus that of writing one checkpoint; "mib" the highest memory of each.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import _measure
from kullback.align.soup import soup
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.models.small import small_llama

SHARDS = {"one": "1GB", "four": "25MB"}
HERE = Path(tempfile.gettempdir()) / "kullback-salsa"


def make(shards):
    folder = HERE / shards
    for name in ("a", "b"):
        if not (folder / name).exists():
            model = small_llama(16_000, hidden=512, layers=3, heads=8, length=64, generator=generator(0, name))
            model.save_pretrained(folder / name, max_shard_size=SHARDS[shards])
    return folder


def read(folder):
    for name in ("a", "b"):
        for path in sorted((folder / name).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    file.get_tensor(key).sum()


def write(folder):
    for path in sorted((folder / "a").glob("*.safetensors")):
        save_file(load_file(path), folder / "copy.safetensors")


def average(folder):
    shutil.rmtree(folder / "soup", ignore_errors=True)
    soup([folder / "a", folder / "b"], save_to=folder / "soup")


def whole(folder):
    from transformers import AutoModelForCausalLM

    a, b = (AutoModelForCausalLM.from_pretrained(folder / name) for name in "ab")
    with torch.no_grad():
        for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)


CALLS = {"kullback": average, "read": read, "write": write, "whole": whole}


def prepare(who, shards):
    folder = make(shards)
    return lambda: CALLS[who](folder)


def main():
    torch.set_num_threads(1)
    found = []
    for shards in SHARDS:
        folder = make(shards)
        times, _ = _measure.race({who: prepare(who, shards) for who in CALLS}, rounds=5)
        seconds = _measure.medians(times)
        bare = [a + b for a, b in zip(times["read"], times["write"], strict=True)]
        mib = {who: _measure.peak_memory(__file__, "prepare", who, shards) / 2**20 for who in ("kullback", "whole")}
        size = sum(path.stat().st_size for path in (folder / "a").glob("*.safetensors")) / 2**20
        ratio = sorted(a / b for a, b in zip(times["kullback"], bare, strict=True))[len(bare) // 2]
        found.append({"shards": shards, "checkpoint_mib": size, "seconds": seconds, "ratio": ratio, "mib": mib})
    content = {"environment": environment(), "sizes": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(HERE, ignore_errors=True)


if __name__ == "__main__":
    main()
