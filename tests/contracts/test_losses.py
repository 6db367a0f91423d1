"""What every divergence obeys, law by law, and for each law wrong divergences and reductions that it rejects."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from kullback import testing
from kullback.core.reduce import masked_mean, masked_sum
from kullback.distill import balanced_kl
from kullback.divergences import (
    NAMES,
    alpha_divergence,
    cauchy_schwarz,
    dual,
    f_divergence,
    from_logits,
    generalized_jsd,
    jeffreys,
    jsd,
    kl,
    mixture,
    neyman,
    pearson,
    pld_loss,
    renyi,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_hellinger,
    total_variation,
)


@dataclass(frozen=True)
class Row:
    """A divergence, its value at the card's pair, and which laws it needs or is excused from.

    tail: its value where p and q share almost nothing; model_zero, target_zero: whether it is infinite where only q or
    only p is exactly 0; processes: whether channels cannot raise it; smooth: whether it has a second derivative;
    excused: laws that it does not obey, which is shown.
    """

    divergence: Callable
    value: float
    tail: str = "bounded"
    model_zero: bool = False
    target_zero: bool = False
    processes: bool = True
    smooth: bool = True
    excused: tuple[str, ...] = ()


def pld(log_p, log_q, **options):
    """PLD with the teacher's second choice as the label, which makes it a function of two distributions."""
    labels = log_p.topk(2, -1).indices[..., 1]
    return pld_loss(log_p, log_q, labels, reduction="none", **options)


# No divergence: it is positive where student and teacher agree, and its gradient takes the teacher as a constant.
ranking = {"excused": ("zero_at_equality", "gradient"), "processes": False, "smooth": False, "tail": "grows"}
truncated = (*ranking["excused"], "exact_zeros")  # a class that is not picked may be an exact zero of the student
grows, overflows = {"tail": "grows"}, {"tail": "overflows"}
infinite, gated = {"model_zero": True, "target_zero": True}, {**grows, "processes": False}  # a channel can move a gate
TABLE = {
    "kl": Row(kl, 0.2772588722, **grows, model_zero=True),
    "reverse_kl": Row(reverse_kl, 0.3465735903, **grows, target_zero=True),
    "jeffreys": Row(jeffreys, 0.6238324625, **grows, model_zero=True, target_zero=True),
    "jsd": Row(jsd, 0.0736710448),
    "generalized_jsd 0.1": Row(partial(generalized_jsd, beta=0.1), 0.0251192982),
    "generalized_jsd 0.9": Row(partial(generalized_jsd, beta=0.9), 0.0297871824),
    "generalized_jsd 0.1, normalised": Row(partial(generalized_jsd, beta=0.1, normalised=True), 0.2791033137),
    "generalized_jsd 0, normalised": Row(
        partial(generalized_jsd, beta=0.0, normalised=True), 0.2772588722, **grows, model_zero=True
    ),
    "skew_kl 0.1": Row(partial(skew_kl, alpha=0.1), 0.2278689185),
    "skew_kl 0.7": Row(partial(skew_kl, alpha=0.7), 0.0333259691),
    "skew_reverse_kl 0.1": Row(partial(skew_reverse_kl, alpha=0.1), 0.2570158728),
    "alpha_divergence 0.5": Row(partial(alpha_divergence, alpha=0.5), 0.3029437252),
    "alpha_divergence 0.97": Row(partial(alpha_divergence, alpha=0.97), 0.2783933115),
    "alpha_divergence 2": Row(partial(alpha_divergence, alpha=2.0), 0.2625, **overflows, model_zero=True),
    "alpha_divergence -1": Row(partial(alpha_divergence, alpha=-1.0), 0.525, **overflows, target_zero=True),
    "alpha_divergence 3": Row(partial(alpha_divergence, alpha=3.0), 0.284375, **overflows, model_zero=True),
    "pearson": Row(pearson, 0.525, **overflows, model_zero=True),
    "neyman": Row(neyman, 1.05, **overflows, target_zero=True),
    "total_variation": Row(total_variation, 0.3, smooth=False),
    "squared_hellinger": Row(squared_hellinger, 0.0757359313),
    "renyi 0.5": Row(partial(renyi, alpha=0.5), 0.1575149190, **grows),
    "renyi 0.97": Row(partial(renyi, alpha=0.97), 0.2711412922, **grows),
    "renyi 2": Row(partial(renyi, alpha=2.0), 0.4219944101, **grows, model_zero=True),
    "cauchy_schwarz": Row(cauchy_schwarz, 0.4870275121, **grows, processes=False),
    "mixture of pearson": Row(mixture(pearson, 0.3), 0.5210918114),
    "dual of kl": Row(dual(kl), 0.3465735903, **grows, target_zero=True),
    "pld_loss": Row(pld, 0.8695705574, **ranking, model_zero=True),
    "pld_loss, two picks": Row(partial(pld, topk=2), 0.8695705574, **{**ranking, "excused": truncated}),
    "definition of jsd": Row(f_divergence("jsd").definition, 0.0736710448),
    "balanced_kl": Row(balanced_kl, 0.9704060528, **infinite, **gated),
    "balanced_kl, inverse": Row(partial(balanced_kl, mode="bdkd_inverse"), 0.9010913347, **infinite, **gated),
    "balanced_kl at power 4": Row(partial(balanced_kl, power=4.0, delta=3.0), 1.3169796431, **infinite, **gated),
    "balanced_kl by confidence": Row(partial(balanced_kl, gate="confidence"), 0.9704060528, **infinite, **gated),
}


def law_value(row, generator):
    testing.check_value(row.divergence, row.value, tolerance=2e-10)


def law_zero_at_equality(row, generator):
    testing.check_zero_at_equality(row.divergence, generator)


def law_non_negative(row, generator):
    testing.check_non_negative(row.divergence, generator)


def law_data_processing(row, generator):
    if row.processes:
        testing.check_data_processing(row.divergence, generator)
    else:
        with pytest.raises(AssertionError, match="channel|split"):
            testing.check_data_processing(row.divergence, generator)


def law_permutation_invariant(row, generator):
    testing.check_permutation_invariant(row.divergence, generator)


def law_shift_invariant(row, generator, **options):
    testing.check_shift_invariant(row.divergence, generator, **options)


def law_squared_temperature(row, generator, **options):
    if row.smooth:
        testing.check_squared_temperature(row.divergence, generator, **options)
    else:
        with pytest.raises(AssertionError, match="T\\^2"):
            testing.check_squared_temperature(row.divergence, generator, **options)


def law_gradient(row, generator):
    testing.check_gradient(row.divergence, generator)


def law_mask_is_slicing(row, generator, **options):
    testing.check_mask_is_slicing(row.divergence, generator, **options)


def law_split_is_whole(row, generator, **options):
    testing.check_split_is_whole(row.divergence, generator, **options)


def law_finite_at(row, generator):
    testing.check_finite_at(row.divergence, generator, tail=row.tail)


def law_exact_zeros(row, generator):
    infinite = {"infinite_at_model_zero": row.model_zero, "infinite_at_target_zero": row.target_zero}
    testing.check_exact_zeros(row.divergence, generator, **infinite)


def law_shape_and_type(row, generator):
    testing.check_shape_and_type(row.divergence, generator)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TABLE)
def test_law(name, law, generator):
    if law in TABLE[name].excused:
        with pytest.raises(AssertionError):
            LAWS[law](TABLE[name], generator)
    else:
        LAWS[law](TABLE[name], generator)


def test_every_divergence_has_a_row():
    assert {name.split()[0] for name in TABLE} >= set(NAMES)


def test_every_check_is_a_law():
    assert {f"check_{law}" for law in LAWS} == set(testing.__all__)


def over_outcomes(divergence):
    """A mean where the sum over V belongs, as reduction="mean" of torch's kl_div has it."""
    return lambda log_p, log_q: divergence(log_p, log_q) / log_p.shape[-1]


def naive_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_of_probabilities(log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def clamped_kl(log_p, log_q):
    p, q = log_p.exp().clamp(min=1e-7), log_q.exp().clamp(min=1e-7)
    return (p * (p / q).log()).sum(-1)


def finite_kl(log_p, log_q):
    return torch.nan_to_num(log_p.exp() * (log_p - log_q), nan=0.0, posinf=0.0, neginf=0.0).sum(-1)


def cross_entropy(log_p, log_q):
    return -(log_p.exp() * log_q).sum(-1)


def smoothed_kl(log_p, log_q):
    return kl(log_p, (0.99 * log_q.exp() + 0.01 / log_q.shape[-1]).log())


def signed(log_p, log_q):
    return (log_p - log_q).mean(-1)


def squared_euclidean(log_p, log_q):
    return (log_p.exp() - log_q.exp()).square().sum(-1)


def cramer(log_p, log_q):
    return (log_p.exp() - log_q.exp()).cumsum(-1).square().sum(-1)


def kl_with_the_gradient_of_the_other(log_p, log_q):
    other = reverse_kl(log_p, log_q)
    return other + (kl(log_p, log_q) - other).detach()


def relative_to_the_batch(log_p, log_q):
    value = kl(log_p, log_q)
    return value / value.masked_fill(value.isinf(), 0.0).max()


def ignoring_the_mask(x, mask=None, *, count=None):
    return masked_mean(x, None if mask is None else torch.ones_like(mask), count=count)


def over_everything(x, mask=None, *, count=None):
    return masked_sum(x, mask) / (x.numel() if count is None else count)


def by_product(x, mask=None, *, count=None):
    return (x * mask).sum() / (mask.sum() if count is None else count)


def deaf_to_the_count(x, mask=None, *, count=None):
    return masked_mean(x, mask)


FORWARD = TABLE["kl"].value
WRONG = [
    ("value", Row(dual(kl), FORWARD), {}),
    ("value", Row(partial(skew_kl, alpha=0.9), TABLE["skew_kl 0.1"].value), {}),
    ("value", Row(partial(generalized_jsd, beta=0.9), TABLE["generalized_jsd 0.1"].value), {}),
    ("value", Row(partial(alpha_divergence, alpha=2.0), TABLE["pearson"].value), {}),
    ("value", Row(over_outcomes(kl), FORWARD), {}),
    ("value", Row(lambda p, q: kl(p, q) / math.log(2), FORWARD), {}),
    ("value", Row(lambda p, q: kl(p.exp(), q), FORWARD), {}),
    ("zero_at_equality", Row(cross_entropy, FORWARD), {}),
    ("zero_at_equality", Row(smoothed_kl, FORWARD), {}),
    ("non_negative", Row(lambda p, q: -kl(p, q), FORWARD), {}),
    ("non_negative", Row(signed, FORWARD), {}),
    ("non_negative", Row(lambda p, q: 0.0 * kl(p, q), FORWARD), {}),
    ("data_processing", Row(cauchy_schwarz, FORWARD), {}),
    ("data_processing", Row(squared_euclidean, FORWARD), {}),
    ("data_processing", Row(over_outcomes(kl), FORWARD), {}),
    ("data_processing", Row(kl, FORWARD, processes=False), {}),
    ("permutation_invariant", Row(cramer, FORWARD), {}),
    ("permutation_invariant", Row(lambda p, q: kl(p, q).cumsum(0), FORWARD), {}),
    ("shift_invariant", Row(kl, FORWARD), {"loss": lambda d, target, model: d(target, model)}),
    ("shift_invariant", Row(kl, FORWARD), {"loss": lambda d, target, model: d(target.log_softmax(-1), model)}),
    (
        "shift_invariant",
        Row(kl, FORWARD),
        {"loss": lambda d, target, model: d(*torch.log_softmax(torch.stack([target, model]), 1))},
    ),
    ("squared_temperature", Row(kl, FORWARD), {"loss": from_logits}),
    (
        "squared_temperature",
        Row(kl, FORWARD),
        {"loss": lambda d, *logits_and_t: logits_and_t[-1] * from_logits(d, *logits_and_t)},
    ),
    ("squared_temperature", Row(jsd, FORWARD, smooth=False), {}),
    ("gradient", Row(lambda p, q: kl(p.detach(), q), FORWARD), {}),
    ("gradient", Row(kl_with_the_gradient_of_the_other, FORWARD), {}),
    ("mask_is_slicing", Row(jsd, FORWARD), {"mean": ignoring_the_mask}),
    ("mask_is_slicing", Row(jsd, FORWARD), {"mean": over_everything}),
    ("mask_is_slicing", Row(kl, FORWARD), {"mean": by_product}),
    ("mask_is_slicing", Row(relative_to_the_batch, FORWARD), {}),
    ("split_is_whole", Row(jsd, FORWARD), {"mean": deaf_to_the_count}),
    ("split_is_whole", Row(relative_to_the_batch, FORWARD), {}),
    ("finite_at", Row(kl_of_probabilities, FORWARD, **grows), {}),
    ("finite_at", Row(clamped_kl, FORWARD, **grows), {}),
    ("finite_at", Row(pearson, FORWARD), {}),
    ("exact_zeros", Row(naive_kl, FORWARD, model_zero=True), {}),
    ("exact_zeros", Row(clamped_kl, FORWARD, model_zero=True), {}),
    ("exact_zeros", Row(finite_kl, FORWARD, model_zero=True), {}),
    ("exact_zeros", Row(finite_kl, FORWARD), {}),
    ("shape_and_type", Row(lambda p, q: kl(p, q).mean(), FORWARD), {}),
    ("shape_and_type", Row(naive_kl, FORWARD), {}),
    ("shape_and_type", Row(lambda p, q: kl(p.double(), q.double()), FORWARD), {}),
    ("shape_and_type", Row(relative_to_the_batch, FORWARD), {}),
]


@pytest.mark.parametrize(("law", "wrong", "options"), WRONG)
def test_law_bites(law, wrong, options, generator):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        LAWS[law](wrong, generator, **options)


def test_every_law_is_shown_to_bite():
    assert {law for law, *_ in WRONG} == set(LAWS)
