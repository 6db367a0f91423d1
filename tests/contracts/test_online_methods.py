"""What methods that learn from the policy's own completions obey, after `prepare`; each law is shown to bite.

Methods on given completions have their laws in test_alignment.py.
"""

import math

import pytest
import torch

from kullback.align.dph import Dph
from kullback.align.f_dpg import FDpg
from kullback.align.grpo import Grpo
from kullback.align.kdrl import Kdrl
from kullback.align.nash_policy import NashPolicy
from kullback.align.policy_gradient import reduce_tokens
from kullback.align.rehearsal import RehearsalBuffer
from kullback.align.rollouts import Rollouts
from kullback.core.rng import generator as stream

PROMPTS, GROUP, PROMPT, TOKENS = 4, 4, 3, 6
ROWS = PROMPTS * GROUP


def rehearsed():
    """A buffer of two answers."""
    draws = stream(8)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    buffer = RehearsalBuffer()
    whole = torch.cat([torch.ones(2, PROMPT, dtype=torch.bool), mask], 1)
    ids = torch.randint(1, 9, whole.shape, generator=draws)
    found = Rollouts(
        ids=ids, attention_mask=whole, completion_mask=mask, prompt_index=torch.arange(2),
        log_probs=-torch.rand(mask.shape, generator=draws), finished=torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    buffer.add(found, torch.ones(2))
    return buffer


METHODS = {
    "grpo": lambda: Grpo(),
    "grpo, k3": lambda: Grpo(beta=0.1),
    "grpo, k2, by completion": lambda: Grpo(beta=0.1, penalty="k2", reduction="seq-mean-token-mean"),
    "grpo, k1": lambda: Grpo(beta=0.1, penalty="k1", level="sequence", reduction="seq-mean-token-sum"),
    "dr-grpo": lambda: Grpo(scale="none", reduction=64, dual_clip=3.0),
    "kdrl": lambda: Kdrl(),
    "kdrl, masked": lambda: Kdrl(keep="response"),
    "f-dpg": lambda: FDpg(),
    "nash-mp": lambda: NashPolicy(),
    "online ipo": lambda: NashPolicy(mode="ipo"),
    "dph-f": lambda: Dph(buffer=rehearsed(), eta=0.3, rehearsed=2),
    "dph-js": lambda: Dph(buffer=rehearsed(), eta=0.3, rehearsed=2, divergence="js", form="definition", visited=1.0),
}
# These weigh part of the loss by what one micro-batch holds, so that another split is another, equally fair, estimate.
SPLIT_DEPENDENT = {"dph-f", "dph-js"}


def sampled(extra=0):
    """A batch as the trainer makes it, with `extra` columns of padding."""
    draws = stream(7)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=draws)
    shape = (ROWS, TOKENS)
    old = -2 * torch.rand(shape, generator=draws, dtype=torch.float64)
    tensors = {
        "old_log_prob": old, "reference_log_prob": old + 0.2 * torch.randn(shape, generator=draws).double(),
        "anchor_log_prob": old + 0.2 * torch.randn(shape, generator=draws).double(),
        "log_prob": old + 0.2 * torch.randn(shape, generator=draws).double(),
    }  # fmt: skip
    tensors = {name: torch.nn.functional.pad(part, (0, extra)) for name, part in tensors.items()}
    mask = torch.arange(TOKENS + extra) < lengths[:, None]
    ids = torch.randint(1, 9, (ROWS, PROMPT + TOKENS), generator=draws)
    rewards = (torch.rand(ROWS, generator=draws) < 0.5).float()
    return tensors | {
        "input_ids": torch.nn.functional.pad(ids, (0, extra)), "completion_mask": mask, "rewards": rewards,
        "attention_mask": torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.bool), mask], 1),
        "prompt_index": torch.arange(PROMPTS).repeat_interleave(GROUP),
    }  # fmt: skip


def prepared(method, batch):
    return method.prepare(batch, group=GROUP, generator=stream(9))


def run(method, batch, count=None):
    """The loss and its gradient by log_prob, whose rows beyond the sampled ones are the first policy's own."""
    log_prob = batch["log_prob"]
    if "rehearsal" in batch:
        log_prob = torch.where(batch["rehearsal"][:, None], batch["reference_log_prob"] + 0.1, log_prob)
    log_prob = log_prob.detach().clone().requires_grad_()
    loss, metrics = method.loss(log_prob, batch, count=method.count(batch) if count is None else count)
    return loss, torch.autograd.grad(loss, log_prob)[0], metrics


def check_what_the_mask_hides_reaches_nothing(make, name):
    clean = prepared(make(), sampled())
    loss, slope, _ = run(make(), clean)
    broken, hidden = dict(clean), ~clean["completion_mask"]
    for part in ("old_log_prob", "reference_log_prob", "log_prob", "anchor_log_prob"):
        broken[part] = clean[part].masked_fill(hidden, math.nan)
    found, other, metrics = run(make(), broken)
    assert torch.allclose(found, loss, atol=1e-12)
    assert torch.allclose(other, slope, atol=1e-12)
    assert (other[hidden] == 0).all()
    assert all(value.isfinite().all() for value in metrics.values())


def check_padding_changes_nothing(make, name):
    loss, slope, _ = run(make(), prepared(make(), sampled()))
    found, other, _ = run(make(), prepared(make(), sampled(extra=5)))
    assert torch.allclose(found, loss, atol=1e-12)
    assert torch.allclose(other[:, :TOKENS], slope, atol=1e-12)


def check_the_count_divides(make, name):
    batch = prepared(make(), sampled())
    count = make().count(batch)
    assert count > 0
    loss, slope, _ = run(make(), batch)
    half, other, _ = run(make(), batch, count=2 * count)
    assert torch.allclose(half, loss / 2, atol=1e-12)
    assert torch.allclose(other, slope / 2, atol=1e-12)
    assert run(make(), batch, count=torch.tensor(count, dtype=torch.float64))[0] == loss


def rows_of(batch, rows):
    size = len(batch["input_ids"])
    return {name: part[rows] if part.shape[:1] == (size,) else part for name, part in batch.items()}


def halves(batch):
    """Two micro-batches of whole groups."""
    return torch.arange(2 * GROUP), torch.arange(2 * GROUP, len(batch["input_ids"]))


def check_micro_batches_add_up(make, name):
    if name in SPLIT_DEPENDENT:
        return
    batch = prepared(make(), sampled())
    loss, slope, _ = run(make(), batch)
    count = make().count(batch)
    parts = halves(batch)
    found = [run(make(), rows_of(batch, rows), count=count) for rows in parts]
    assert torch.allclose(found[0][0] + found[1][0], loss, atol=1e-12)
    for rows, (_, other, _) in zip(parts, found, strict=True):
        assert torch.allclose(other, slope[rows], atol=1e-12)
    counts = sum(make().count(rows_of(batch, rows)) for rows in parts)
    assert counts == count


def check_the_order_of_prompts_is_nothing(make, name):
    batch = prepared(make(), sampled())
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * GROUP + torch.arange(GROUP)).flatten()
    rows = torch.cat([rows, torch.arange(ROWS, len(batch["input_ids"]))])
    loss, slope, _ = run(make(), batch)
    found, other, _ = run(make(), rows_of(batch, rows))
    assert torch.allclose(found, loss, atol=1e-12)
    assert torch.allclose(other, slope[rows], atol=1e-12)


LAWS = [
    check_what_the_mask_hides_reaches_nothing, check_padding_changes_nothing, check_the_count_divides,
    check_micro_batches_add_up, check_the_order_of_prompts_is_nothing,
]  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_the_method_keeps_the_law(name, law):
    law(METHODS[name], name)


class Wrong:
    """The cross-entropy of what was sampled, with a mistake of one's choice."""

    needs_reference = False

    def __init__(self, mistake):
        self.mistake = mistake

    def prepare(self, batch, *, group, generator):
        return dict(batch)

    def count(self, batch):
        return float(batch["completion_mask"].sum())

    def loss(self, log_prob, batch, *, count):
        mask = batch["completion_mask"]
        if self.mistake == "multiplies by the mask":
            return -(log_prob * mask).sum() / count, {}
        if self.mistake == "averages over columns":
            return -torch.where(mask, log_prob, 0.0).mean() * len(mask) / count, {}
        if self.mistake == "has its own count":
            return reduce_tokens(-log_prob, mask, "token-mean"), {}
        if self.mistake == "divides by rows":
            return reduce_tokens(-log_prob, mask, "token-mean") * len(mask) / count, {}
        weight = torch.arange(1.0, len(mask) + 1).double().unsqueeze(1)
        return reduce_tokens(-log_prob * weight, mask, "token-mean", count=count), {}


@pytest.mark.parametrize(
    ("law", "mistake"),
    [
        (check_what_the_mask_hides_reaches_nothing, "multiplies by the mask"),
        (check_padding_changes_nothing, "averages over columns"),
        (check_the_count_divides, "has its own count"),
        (check_micro_batches_add_up, "divides by rows"),
        (check_the_order_of_prompts_is_nothing, "weighs the first more"),
    ],
)
def test_the_law_bites(law, mistake):
    with pytest.raises(AssertionError):
        law(lambda: Wrong(mistake), "wrong")
