"""The only reductions, and the wrong ones that their laws reject."""

import pytest
import torch

from kullback.core.errors import ShapeError
from kullback.core.reduce import masked_mean, masked_sum


def values(generator, shape=(4, 5)):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def some(generator, shape=(4, 5)):
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    return mask


def law_mask_is_slicing(mean, generator):
    x, mask = values(generator), some(generator)
    torch.testing.assert_close(mean(x, mask), x[mask].mean())
    torch.testing.assert_close(mean(x, None), x.mean())


def law_parts_with_a_count_are_the_whole(mean, generator):
    x, mask = values(generator), some(generator)
    mask[2:] = False
    mask[2, 0] = True  # parts of very different size
    count = mask.sum()
    parts = mean(x[:2], mask[:2], count=count) + mean(x[2:], mask[2:], count=count)
    torch.testing.assert_close(parts, mean(x, mask))


def law_an_empty_mask_gives_zero_with_a_gradient(mean, generator):
    x = values(generator).requires_grad_()
    for count in (None, 3):
        value = mean(x, torch.zeros(4, 5, dtype=torch.bool), count=count)
        assert value.item() == 0.0
        (gradient,) = torch.autograd.grad(value, x)
        assert not gradient.any()


def law_what_is_masked_is_not_seen(mean, generator):
    mask = some(generator)
    for junk in (float("nan"), float("inf")):
        x = values(generator).masked_fill(~mask, junk).requires_grad_()
        value = mean(x, mask)
        (gradient,) = torch.autograd.grad(value, x)
        assert torch.isfinite(value)
        torch.testing.assert_close(gradient, mask.double() / mask.sum())


def law_the_type_is_kept_and_masks_may_be_numbers(mean, generator):
    mask = some(generator)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = values(generator).to(dtype)
        assert mean(x, mask).dtype == dtype
        assert torch.equal(mean(x, mask.long()), mean(x, mask))


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


def ignoring(x, mask=None, *, count=None):
    return masked_mean(x, None if mask is None else torch.ones_like(mask), count=count)


def over_everything(x, mask=None, *, count=None):
    return masked_sum(x, mask) / (x.numel() if count is None else count)


def deaf_to_count(x, mask=None, *, count=None):
    return masked_mean(x, mask)


def by_product(x, mask=None, *, count=None):
    mask = torch.ones_like(x) if mask is None else mask
    return (x * mask).sum() / (mask.sum().clamp(min=1) if count is None else count)


def by_selection(x, mask=None, *, count=None):
    kept = x if mask is None else x[mask.bool()]
    return kept.mean() if count is None else kept.sum() / count


def widened(x, mask=None, *, count=None):
    return masked_mean(x.double(), mask, count=count)


def a_sum(x, mask=None, *, count=None):
    return masked_sum(x, mask)


@pytest.mark.parametrize("law", LAWS)
def test_law(law, generator):
    LAWS[law](masked_mean, generator)


WRONG = [
    ("mask_is_slicing", ignoring),
    ("mask_is_slicing", over_everything),
    ("mask_is_slicing", a_sum),
    ("parts_with_a_count_are_the_whole", deaf_to_count),
    ("an_empty_mask_gives_zero_with_a_gradient", by_selection),
    ("what_is_masked_is_not_seen", by_product),
    ("what_is_masked_is_not_seen", ignoring),
    ("the_type_is_kept_and_masks_may_be_numbers", widened),
]


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    with pytest.raises(AssertionError):
        LAWS[law](wrong, generator)


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)


def test_a_count_may_be_a_tensor_and_nothing_at_all_has_mean_zero():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert masked_mean(x, count=torch.tensor(12)).item() == 0.5
    assert masked_mean(torch.zeros(0)).item() == 0.0
    assert masked_sum(x).item() == 6.0


def test_a_mask_of_another_shape_is_refused_rather_than_broadcast():
    for reduction in (masked_sum, masked_mean):
        with pytest.raises(ShapeError, match=r"mask has shape \(2, 1\) and the values have \(2, 3\)"):
            reduction(torch.zeros(2, 3), torch.ones(2, 1))
