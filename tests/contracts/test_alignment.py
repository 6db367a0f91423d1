"""What every method of alignment on given completions obeys, law by law, and for each law a wrong one that it rejects.

A row makes a method (see `align.methods.Method`). Batches have 8 rows: for methods of pairs 4 chosen completions and
then their rejected ones. Where a method looks at the batch as a whole it is excused from `split_is_whole`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from kullback.align.f_dpo import FDPOLoss, paper_divergence
from kullback.align.implicit import FSFT, matching_divergence
from kullback.align.methods import Preference, Supervised
from kullback.divergences import f_divergence

ROWS, TOKENS = 8, 5


@dataclass(frozen=True)
class Row:
    """make: () -> method; pairs: whether rows are chosen and rejected; whole: whether the loss is not a sum of rows."""

    make: Callable
    pairs: bool = False
    whole: bool = False


def preference(divergence, **options):
    length_normalised = options.pop("length_normalised", False)
    return Row(
        lambda: Preference(options=FDPOLoss(divergence=divergence, **options), length_normalised=length_normalised),
        pairs=True,
    )


def f_sft(name, **options):
    divergence = matching_divergence(name)
    return Row(
        lambda: FSFT(divergence=divergence, beta=0.2, **options), whole=options.get("baseline") == "profile"
    )


TABLE = {
    "DPO": preference(paper_divergence("reverse_kl")),
    "DPO, smoothed": preference(paper_divergence("reverse_kl"), label_smoothing=0.1),
    "DPO, robust": preference(paper_divergence("reverse_kl"), loss="robust", label_smoothing=0.1),
    "DPO, hinge": preference(paper_divergence("reverse_kl"), loss="hinge"),
    "IPO": preference(paper_divergence("reverse_kl"), loss="ipo"),
    "IPO, per token": preference(paper_divergence("reverse_kl"), loss="ipo", length_normalised=True),
    "f-DPO, forward KL": preference(paper_divergence("forward_kl")),
    "f-DPO, Jensen-Shannon": preference(paper_divergence("jensen_shannon"), match_curvature=True),
    "f-DPO, alpha": preference(paper_divergence("alpha", alpha=0.3)),
    "f-DPO, Jeffreys": preference(f_divergence("jeffreys")),
    "SFT": Row(Supervised),
    "f-SFT, total variation": f_sft("tv"),
    "f-SFT, chi-squared": f_sft("chi2"),
    "f-SFT, Hellinger": f_sft("hellinger"),
    "f-SFT, Jensen-Shannon, tokens": f_sft("js", level="token"),
    "f-SFT, reverse KL, profile": f_sft("reverse_kl", baseline="profile"),
    "f-SFT, forward KL": f_sft("forward_kl"),
}


def batch(generator):
    """Log-probabilities [8, 5] of the policy, and a batch with masks of many lengths."""
    reference = -2 * torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    policy = reference + 0.3 * torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(TOKENS) < lengths
    return policy, {"completion_mask": mask, "reference_log_prob": reference}


def value(method, policy, given, count=None):
    """The loss and its gradient by the log-probabilities."""
    policy = policy.detach().clone().requires_grad_()
    loss, _ = method.loss(policy, given, count=method.count(given) if count is None else count)
    return loss.detach(), torch.autograd.grad(loss, policy)[0]


def close(one, other, tolerance=1e-10):
    for found, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def law_mask_is_slicing(row, generator):
    method, (policy, given) = row.make(), batch(generator)
    outside = ~given["completion_mask"]
    assert outside.any()
    wanted = value(method, policy, given)
    assert (wanted[1][outside] == 0).all()
    ruined = {**given, "reference_log_prob": given["reference_log_prob"].masked_fill(outside, 7.0)}
    close(value(method, policy.masked_fill(outside, float("nan")), ruined), wanted)


def law_padding_changes_nothing(row, generator):
    method, (policy, given) = row.make(), batch(generator)
    loss, gradient = value(method, policy, given)
    pad = torch.nn.functional.pad
    wider = {key: pad(tensor, (0, 3)) for key, tensor in given.items()}
    found = value(method, pad(policy, (0, 3), value=-1.0), wider)
    close(found, (loss, pad(gradient, (0, 3))))


def members(row, which):
    return torch.cat([which, which + ROWS // 2]) if row.pairs else which


def law_order_of_rows(row, generator):
    method, (policy, given) = row.make(), batch(generator)
    order = members(row, torch.randperm(ROWS // 2 if row.pairs else ROWS, generator=generator))
    loss, gradient = value(method, policy, given)
    close(value(method, policy[order], {key: tensor[order] for key, tensor in given.items()}), (loss, gradient[order]))


def law_split_is_whole(row, generator):
    if row.whole:
        return
    method, (policy, given) = row.make(), batch(generator)
    loss, gradient = value(method, policy, given)
    number, total, collected = ROWS // 2 if row.pairs else ROWS, 0.0, torch.zeros_like(gradient)
    for part in torch.arange(number).split([1, number - 1]):
        rows = members(row, part)
        cut = {key: tensor[rows] for key, tensor in given.items()}
        own, slope = value(method, policy[rows], cut, count=method.count(given))
        total, collected[rows] = total + own, slope
    close((total, collected), (loss, gradient))


def law_reference_is_constant(row, generator):
    method, (policy, given) = row.make(), batch(generator)
    reference = given["reference_log_prob"].clone().requires_grad_()
    loss, seen = method.loss(policy.requires_grad_(), {**given, "reference_log_prob": reference}, count=3.0)
    (found,) = torch.autograd.grad(loss, reference, allow_unused=True)
    assert found is None or not found.any()
    assert not any(entry.requires_grad for entry in seen.values())


def law_raises_what_is_wanted(row, generator):
    method, (_, given) = row.make(), batch(generator)
    _, slope = value(method, given["reference_log_prob"], given)
    inside = given["completion_mask"]
    wanted = inside.clone()
    if row.pairs:
        wanted[ROWS // 2 :] = False
    assert (slope[wanted] < 0).all()
    assert (slope[inside & ~wanted] > 0).all()


def law_float32_is_enough(row, generator):
    method, (policy, given) = row.make(), batch(generator)
    single = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in given.items()}
    found = value(method, policy.float(), single)
    assert found[0].dtype == torch.float32
    close((x.double() for x in found), value(method, policy, given), tolerance=1e-4)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_law(name, law, generator):
    LAWS[law](TABLE[name], generator)


@dataclass(frozen=True)
class Wrong:
    """DPO with one thing broken."""

    def count(self, given):
        return len(given["completion_mask"]) / 2

    def scores(self, log_prob, given):
        mask = given["completion_mask"]
        return torch.where(mask, log_prob - given["reference_log_prob"].detach(), 0.0).sum(-1)

    def margins(self, log_prob, given):
        chosen, rejected = self.scores(log_prob, given).view(2, -1)
        return chosen - rejected

    def loss(self, log_prob, given, *, count):
        return -torch.nn.functional.logsigmoid(self.margins(log_prob, given)).sum() / count, {}


class DeafToTheMask(Wrong):
    def scores(self, log_prob, given):
        return (log_prob - given["reference_log_prob"]).sum(-1)


class MeanOverThePadding(Wrong):
    def scores(self, log_prob, given):
        return super().scores(log_prob, given) / log_prob.shape[1]


class InterleavedPairs(Wrong):
    def margins(self, log_prob, given):
        chosen, rejected = self.scores(log_prob, given).view(-1, 2).T
        return chosen - rejected


class RelativeToTheBatch(Wrong):
    def margins(self, log_prob, given):
        margins = super().margins(log_prob, given)
        return margins / (1.0 + margins.detach().abs().max())


class MovingReference(Wrong):
    def scores(self, log_prob, given):
        return torch.where(given["completion_mask"], log_prob - given["reference_log_prob"], 0.0).sum(-1)


class Exchanged(Wrong):
    def margins(self, log_prob, given):
        return -super().margins(log_prob, given)


class InHalves(Wrong):
    def scores(self, log_prob, given):
        scores = super().scores(log_prob, given)
        return scores.bfloat16().float() if scores.dtype == torch.float32 else scores


WRONG = [
    ("mask_is_slicing", DeafToTheMask),
    ("padding_changes_nothing", MeanOverThePadding),
    ("order_of_rows", InterleavedPairs),
    ("split_is_whole", RelativeToTheBatch),
    ("reference_is_constant", MovingReference),
    ("raises_what_is_wanted", Exchanged),
    ("float32_is_enough", InHalves),
]


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    LAWS[law](replace(TABLE["DPO"], make=Wrong), generator)  # right but for what the subclass breaks
    with pytest.raises((AssertionError, RuntimeError)):
        LAWS[law](replace(TABLE["DPO"], make=wrong), generator)


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)
