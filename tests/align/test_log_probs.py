"""Log-probabilities and entropies of given tokens: chunks against whole logits, masks, and a real model."""

import math

import pytest
import torch

from kullback.align.log_probs import (
    completion_log_probs,
    log_probs_from_hidden,
    log_probs_from_logits,
    sequence_log_probs,
)
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator as stream
from kullback.models.small import small_llama


def parts(dtype=torch.float64):
    draws = stream(1)
    tensors = [torch.randn(*shape, generator=draws, dtype=dtype) for shape in ((3, 5, 8), (50, 8), (50,))]
    ids, mask = torch.randint(50, (3, 5), generator=draws), torch.rand(3, 5, generator=draws) > 0.3
    return [tensor.requires_grad_() for tensor in tensors], ids, mask


def naive(hidden, weight, bias, ids, mask, temperature):
    log_p = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen, 0.0), torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_values_and_gradients_of_whole_logits(chunk, temperature):
    (hidden, weight, bias), ids, mask = parts()

    def scalar(found):
        return found[0].sin().sum() + found[1].square().sum()

    found = log_probs_from_hidden(
        hidden, weight, ids, bias=bias, mask=mask, temperature=temperature, entropy=True, chunk=chunk
    )
    whole = log_probs_from_logits(hidden @ weight.T + bias, ids, mask=mask, temperature=temperature, entropy=True)
    expected = naive(hidden, weight, bias, ids, mask, temperature)
    slopes = torch.autograd.grad(scalar(expected), [hidden, weight, bias])
    for one in (found, whole):
        for a, b in zip(one, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-13)
        for a, b in zip(torch.autograd.grad(scalar(one), [hidden, weight, bias]), slopes, strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    wrong = naive(hidden, weight, bias, ids, mask, temperature + 0.1)
    assert not torch.allclose(found[0], wrong[0], atol=1e-3)


def test_only_what_needs_a_gradient_gets_one_and_hidden_rows_cost_nothing():
    (hidden, weight, _), ids, mask = parts()
    broken = hidden.detach().masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    found = log_probs_from_hidden(broken, weight.detach(), ids, mask=mask)
    assert found.entropy is None
    assert found.log_probs.isfinite().all()
    found.log_probs.sum().backward()
    assert broken.grad.isfinite().all()
    assert (broken.grad[~mask] == 0).all()
    assert (log_probs_from_hidden(hidden, weight, ids, mask=torch.zeros_like(mask)).log_probs == 0).all()


def test_halves_are_widened():
    (hidden, weight, bias), ids, _ = parts(torch.float32)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight, bias)]
    found = log_probs_from_hidden(low[0], low[1], ids, bias=low[2], entropy=True)
    assert found.log_probs.dtype == torch.float32
    wide = [tensor.detach().float() for tensor in low]
    expected = log_probs_from_logits(wide[0] @ wide[1].T + wide[2], ids)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=0.05)
    (1e-9 * found.log_probs.sum()).backward()
    assert low[0].grad.abs().max() > 1e-12, "small slopes do not underflow on the way"


def test_logits_of_minus_infinity():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    found = log_probs_from_logits(logits, torch.tensor([2]), entropy=True)
    assert torch.allclose(torch.cat([found.log_probs, found.entropy]), torch.tensor([-math.log(2), math.log(2)]))


@pytest.mark.parametrize("left", [0, 2])
def test_completions_under_a_model_are_those_of_the_unpadded_text(left):
    model = small_llama(7, hidden=16, layers=2, heads=2, length=12, generator=stream(0)).eval()
    ids = torch.randint(1, 7, (2, 8), generator=stream(2))
    padded = torch.cat([torch.zeros(2, left, dtype=torch.long), ids], 1)
    attention = torch.arange(8 + left).expand(2, -1) >= left
    completion = torch.ones(2, 3, dtype=torch.bool)
    completion[1, 2] = False
    found = completion_log_probs(model, padded, attention, completion, temperature=0.5, entropy=True)
    log_p = (model(ids).logits / 0.5).log_softmax(-1)
    expected = log_p[:, 4:7].gather(-1, ids[:, 5:].unsqueeze(-1)).squeeze(-1).masked_fill(~completion, 0.0)
    assert torch.allclose(found.log_probs, expected, atol=1e-5)
    assert torch.allclose(sequence_log_probs(found.log_probs, completion), expected.sum(1), atol=1e-5)
    entropy = -(log_p.exp() * log_p).sum(-1)[:, 4:7].masked_fill(~completion, 0.0)
    assert torch.allclose(found.entropy, entropy, atol=1e-5)
    found.log_probs.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_what_is_refused():
    (hidden, weight, _), ids, mask = parts()
    with pytest.raises(ShapeError, match="same H"):
        log_probs_from_hidden(hidden[..., :5], weight, ids)
    with pytest.raises(ShapeError, match="entry for each"):
        log_probs_from_hidden(hidden, weight, ids[:, :2])
    with pytest.raises(ShapeError, match="entry for each"):
        log_probs_from_logits(hidden, ids, mask=mask[:1])
    with pytest.raises(ConfigError, match="temperature"):
        log_probs_from_logits(hidden, ids, temperature=0.0)
    with pytest.raises(ShapeError, match="P > 0"):
        completion_log_probs(None, ids, torch.ones_like(ids), mask)
    with pytest.raises(ShapeError, match="alike"):
        sequence_log_probs(hidden[..., 0], mask[:1])


def test_a_token_ruled_out_has_no_slope():
    """A bias of -inf in the head: values and gradients as from whole logits, entropy too."""
    (hidden, weight, bias), ids, _ = parts()
    ids = ids.clamp(max=48)
    closed = torch.cat([bias.detach()[:49], torch.tensor([-math.inf], dtype=bias.dtype)])
    found = log_probs_from_hidden(hidden, weight, ids, bias=closed, entropy=True)
    whole = log_probs_from_hidden(hidden, weight[:49], ids, bias=closed[:49], entropy=True)
    for one, other in zip(found, whole, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    slopes = [torch.autograd.grad(part[0].sum() + part[1].square().sum(), hidden)[0] for part in (found, whole)]
    assert torch.allclose(*slopes, atol=1e-12)
