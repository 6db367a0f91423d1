"""A world for the align job: a small model that adds in a directory, and files of sums in every format."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.data.arithmetic import sum_examples
from kullback.jobs._training import TrainingConfig
from kullback.jobs.align import AlignConfig, ExampleConfig, MethodConfig, RewardConfig, SamplingConfig
from kullback.models.adder import trained_adder


def make_adder(root: Path) -> Path:
    """A folder with model/, moved/ (another model of its tokenizer) and pairs.jsonl (which has answers too)."""
    with mock.patch.dict(os.environ, KULLBACK_CACHE=str(root / "cache")):
        model = trained_adder(limit=5, copies=16, hidden=32, layers=1, heads=2, steps=300, batch=64)
    model.rename(root / "model")
    moved = AutoModelForCausalLM.from_pretrained(root / "model")
    with torch.no_grad():
        moved.lm_head.weight.mul_(0.5)
    moved.save_pretrained(root / "moved")
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "moved")
    lines = [
        {"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected, **e.others} for e in sum_examples(5)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def align_config(root: Path, **options) -> AlignConfig:
    """A job of a second."""
    method = options.pop("method", "grpo")
    if method == "salsa":
        options.setdefault("reference", (str(root / "model"), str(root / "moved")))
    if method == "kdrl":
        options.setdefault("reference", (str(root / "moved"),))
    base = AlignConfig(
        model=str(root / "model"),
        data=ExampleConfig(train=str(root / "pairs.jsonl"), holdout=0.2, length=4, validation_prompts=5),
        method=MethodConfig(name=method, options=options.pop("options", {})),
        reward=RewardConfig(name="exact"),
        sampling=SamplingConfig(group=4, validation=4),
        training=TrainingConfig(
            steps=4, batch=4, learning_rate=1e-3, weight_decay=0.0, warmup=0.0, save_every=2, evaluate_every=2
        ),
    )
    return replace(base, **options)


def with_training(config: AlignConfig, **values) -> AlignConfig:
    return replace(config, training=replace(config.training, **values))
