"""A tiny teacher and student in Hugging Face directories, with one tokenizer, and a text file, made on the spot."""

from pathlib import Path

import pytest
import torch

from kullback.core.rng import generator
from kullback.data.corpora import corpus
from kullback.data.tokenizer import train_byte_bpe
from kullback.jobs._training import TrainingConfig
from kullback.jobs.distill import DistillConfig, ObjectiveConfig, TextConfig
from kullback.models.small import small_llama

LENGTH = 32


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with teacher/, student/ (both directories that save_pretrained wrote) and text.txt."""
    root = tmp_path_factory.mktemp("world")
    texts = corpus("prose").train[:20]
    tokenizer = train_byte_bpe(texts, 300)
    for name, hidden in (("teacher", 32), ("student", 16)):
        model = small_llama(
            len(tokenizer), hidden=hidden, layers=2, heads=2, length=LENGTH, generator=generator(1, name)
        )
        if name == "teacher":  # fresh heads are close to uniform: there would be nothing to learn from it
            with torch.no_grad():
                model.lm_head.weight.mul_(20)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return root


@pytest.fixture
def config(world) -> DistillConfig:
    """A job of a few seconds."""
    return DistillConfig(
        teacher=str(world / "teacher"),
        student=str(world / "student"),
        data=TextConfig(train=str(world / "text.txt"), length=LENGTH, holdout=0.2, validation_blocks=8),
        objective=ObjectiveConfig(cross_entropy=0.25),
        training=TrainingConfig(steps=6, batch=4, learning_rate=1e-2, save_every=2, evaluate_every=3),
    )


@pytest.fixture(autouse=True)
def _deterministic():
    with torch.random.fork_rng():
        yield
