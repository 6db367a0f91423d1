"""The small model that adds: the same from the cache, and better than chance."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.models.adder import trained_adder

TINY = {"limit": 3, "copies": 8, "hidden": 32, "layers": 1, "heads": 2, "steps": 200, "batch": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path))


def test_it_is_made_once_and_answers_in_the_right_form():
    events = []
    folder = trained_adder(**TINY, listen=events.append)
    assert len(events) == TINY["steps"]
    assert trained_adder(**TINY, listen=events.append) == folder
    assert len(events) == TINY["steps"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(f"{a}+{b}=").input_ids for a in range(3) for b in range(3)])
    digits = model(ids).logits[:, -1].softmax(-1)[:, tokenizer("0123456789").input_ids]
    right = digits[torch.arange(9), torch.tensor([a + b for a in range(3) for b in range(3)])]
    assert digits.sum(-1).min() > 0.8, "it answers with a digit"
    assert right.mean() > 0.25, "and with the right one more often than one in ten"
