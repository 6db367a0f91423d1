"""Log-probabilities without entropies, whose gradients are matrix products: beside whole logits, in every mode."""

import math

import pytest
import torch

from kullback.align import _token_log_probs
from kullback.align._token_log_probs import token_log_probs
from kullback.core.errors import ConfigError
from kullback.core.rng import generator

ROWS, WIDTH, VOCABULARY = 11, 8, 50


def parts(dtype=torch.float64):
    draws = generator(1, "parts")
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    tensors = [torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors], torch.randint(VOCABULARY, (ROWS,), generator=draws)


def whole(hidden, weight, bias, ids, temperature=1.0):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return (logits / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def slopes(found, tensors):
    return torch.autograd.grad(found.sin().sum(), [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("chunk", [None, 1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("block", [1, 1 << 19])
def test_values_and_gradients_are_those_of_whole_logits(chunk, temperature, biased, block, monkeypatch):
    monkeypatch.setattr(_token_log_probs, "_BLOCK", block)
    (hidden, weight, bias), ids = parts()
    tensors = [hidden, weight, bias if biased else None]
    found = token_log_probs(hidden, weight, ids, bias=tensors[2], temperature=temperature, chunk=chunk)
    expected = whole(*tensors, ids, temperature)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    by_products = slopes(found, tensors)
    for a, b in zip(by_products, slopes(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    wrong = slopes(whole(*tensors, ids, temperature + 0.1), tensors)
    assert not torch.allclose(by_products[0], wrong[0], atol=1e-3)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(chunk):
    """The room of the last chunk is taken up by others on the way back."""
    (hidden, weight, _), ids = parts()
    found = token_log_probs(hidden, weight, ids, chunk=chunk).sum()
    first = torch.autograd.grad(found, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(found, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_alone(wanted):
    tensors, ids = parts()
    expected = torch.autograd.grad(whole(*tensors, ids).sum(), tensors[wanted])[0]
    alone = [tensor if place == wanted else tensor.detach() for place, tensor in enumerate(tensors)]
    found = token_log_probs(alone[0], alone[1], ids, bias=alone[2], chunk=4)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), alone[wanted])[0], expected, atol=1e-12, rtol=0)
    assert not token_log_probs(*(tensor.detach() for tensor in tensors[:2]), ids).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_widened_and_do_not_underflow(dtype):
    tensors, ids = parts(torch.float32)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    found = token_log_probs(low[0], low[1], ids, bias=low[2], chunk=4)
    assert found.dtype == torch.float32
    wide = [tensor.detach().float().requires_grad_() for tensor in low]
    expected = whole(*wide, ids)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    for a, b in zip(torch.autograd.grad(found.sum(), low), torch.autograd.grad(expected.sum(), wide), strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.05, rtol=0.05)
    small = token_log_probs(low[0], low[1], ids, bias=low[2], chunk=4)
    slope = torch.autograd.grad(1e-7 * small.sum(), low[1])[0].float()
    if dtype == torch.bfloat16:  # which can hold it at all
        large = torch.autograd.grad(whole(*wide, ids).sum(), wide[1])[0]
        torch.testing.assert_close(1e7 * slope, large, atol=0.1, rtol=0.1)


def test_under_autocast_it_is_of_that_type():
    tensors, ids = parts(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_log_probs(tensors[0], tensors[1], ids, bias=tensors[2])
    assert found.dtype == torch.float32
    assert 0 < (found - whole(*tensors, ids)).abs().max() < 0.1
    assert torch.autograd.grad(found.sum(), tensors[0])[0].dtype == torch.float32


def test_a_token_ruled_out_has_no_slope_and_large_logits_do_not_overflow():
    (hidden, weight, bias), ids = parts()
    ids = ids.clamp(max=48)
    closed = torch.cat([bias.detach()[:49], torch.tensor([-math.inf], dtype=bias.dtype)])
    found = token_log_probs(hidden, weight, ids, bias=closed)
    expected = whole(hidden, weight[:49], closed[:49], ids)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    a, b = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found, expected))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    large = token_log_probs(1e4 * hidden, weight, ids)
    torch.testing.assert_close(large, whole(1e4 * hidden, weight, None, ids), atol=1e-8, rtol=1e-9)


def test_no_rows_and_no_chunk():
    (hidden, weight, _), ids = parts()
    nothing = token_log_probs(hidden[:0], weight, ids[:0])
    assert nothing.shape == (0,)
    assert (torch.autograd.grad(nothing.sum(), weight)[0] == 0).all()
    with pytest.raises(ConfigError, match="at least 1"):
        token_log_probs(hidden, weight, ids, chunk=0)
