"""Fifty steps of distillation, loss by loss, as they were when recorded: in the same bits on the same kind of machine.

A small perceptron over the two tokens before learns from a fixed one; float64, one thread. Where the version of torch,
the instructions it uses or the processor differ from those recorded, losses may differ by 1e-6 of themselves.
After a change that is meant to change them, record anew:  python tests/golden/test_trajectories.py
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from kullback.core.chunk import linear_chunked
from kullback.core.environment import cpu_name
from kullback.core.rng import generator
from kullback.distill.sinkd import sinkd_loss
from kullback.divergences import dual, jsd, kl, named, reverse_kl, skew_kl

FOLDER = Path(__file__).parent
STEPS, BATCH, LENGTH, VOCABULARY, DTYPE = 50, 6, 9, 48, torch.float64


class Perceptron(nn.Module):
    """Hidden states [B, T - 2, H] from the two tokens before, and the head's weight and bias."""

    def __init__(self, width, source, scale):
        super().__init__()

        def drawn(*shape):
            return nn.Parameter(torch.randn(shape, generator=source, dtype=DTYPE) * scale)

        self.embedding, self.inner = drawn(2, VOCABULARY, width), drawn(width, width)
        self.weight, self.bias = drawn(VOCABULARY, width), drawn(VOCABULARY)

    def forward(self, ids):
        first, second = self.embedding
        mixed = torch.tanh(first[ids[:, :-2]] + second[ids[:, 1:-1]])
        return mixed + torch.tanh(mixed @ self.inner)


def chunked(divergence, teacher, student, ids, temperature=2.0, masked=True):
    """linear_chunked in several chunks, the last one often short; predictions of tokens below 8 are left out."""
    return linear_chunked(
        divergence, teacher(ids), teacher.weight, student(ids), student.weight, bias_p=teacher.bias,
        bias_q=student.bias, mask=ids[:, 2:] >= 8 if masked else None, temperature=temperature, chunk=5,
    )  # fmt: skip


def transport(teacher, student, ids, **options):
    outputs = [model(ids) @ model.weight.T + model.bias for model in (teacher, student)]
    return sinkd_loss(*outputs, mask=ids[:, 2:] >= 8, reduction="mean", **options)


LOSSES = {
    "kl": partial(chunked, kl),
    "reverse_kl": partial(chunked, reverse_kl),
    "jsd": partial(chunked, jsd),
    "skew_kl": partial(chunked, partial(skew_kl, alpha=0.1)),
    "sinkd_loss": transport,
}


def trajectory(loss, learning_rate=0.02, seed=0):
    """The loss of each step, from the same beginnings and data for every loss."""
    teacher = Perceptron(16, generator(seed, "teacher"), 1.0).requires_grad_(False)
    student = Perceptron(8, generator(seed, "student"), 0.3)
    source, losses = generator(seed, "ids"), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    for _ in range(STEPS):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=source)
        value = loss(teacher, student, ids)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def machine():
    """What has to be the same for the bits to be the same."""
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": cpu_name()}


def recorded(name):
    content = json.loads((FOLDER / f"{name}.json").read_text())
    return content["machine"], [float.fromhex(value) for value in content["losses"]]


def check(losses, name, same):
    _, expected = recorded(name)
    assert len(losses) == len(expected) == STEPS
    for step, (value, before) in enumerate(zip(losses, expected)):
        equal = value == before if same else math.isclose(value, before, rel_tol=1e-6)
        assert equal, f"{name}, step {step}: {value!r} and was {before!r}; if meant, record anew (see this file's head)"


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_are_those_recorded(name):
    losses = trajectory(LOSSES[name])
    check(losses, name, same=recorded(name)[0] == machine())
    check(losses, name, same=False)


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_learns(name):
    _, losses = recorded(name)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


WRONG = {
    "a learning rate changed by a hundredth": ("kl", LOSSES["kl"], 0.0202),
    "arguments swapped, kl": ("kl", partial(chunked, dual(kl)), 0.02),
    "arguments swapped, reverse_kl": ("reverse_kl", partial(chunked, dual(reverse_kl)), 0.02),
    "arguments swapped, skew_kl": ("skew_kl", partial(chunked, dual(partial(skew_kl, alpha=0.1))), 0.02),
    "another weight in the mixture": ("jsd", partial(chunked, named("generalized_jsd", beta=0.51)), 0.02),
    "the temperature lost": ("jsd", partial(chunked, jsd, temperature=1.0), 0.02),
    "the mask lost": ("reverse_kl", partial(chunked, reverse_kl, masked=False), 0.02),
    "a learning rate changed, transport": ("sinkd_loss", transport, 0.0202),
    "one iteration fewer": ("sinkd_loss", partial(transport, n_iters=19), 0.02),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_bites(wrong):
    name, loss, learning_rate = WRONG[wrong]
    losses = trajectory(loss, learning_rate)
    for same in (True, False):
        with pytest.raises(AssertionError, match=f"{name}, step"):
            check(losses, name, same)


def record():
    torch.set_num_threads(1)
    for name, loss in LOSSES.items():
        content = {
            "command": "python tests/golden/test_trajectories.py",
            "machine": machine(),
            "losses": [value.hex() for value in trajectory(loss)],
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    record()
