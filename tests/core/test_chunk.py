"""Losses from hidden states: the twin of whole logits in value and every gradient, and the wrong ones it is not."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from kullback.core.chunk import LinearHead, linear_chunked, linear_chunked_values, rows_chunked
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.reduce import masked_mean
from kullback.divergences import NAMES, dual, jsd, kl, mixture, named, reverse_kl

NAMES_OF_TENSORS = ("hidden_p", "weight_p", "hidden_q", "weight_q", "bias_p", "bias_q")
OPTIONS = {"alpha_divergence": {"alpha": 0.3}, "generalized_jsd": {"beta": 0.3}, "renyi": {"alpha": 0.5},
           "skew_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1}}  # fmt: skip


def tensors(generator, rows=(7,), hidden=(5, 3), vocabulary=11, dtype=torch.float64, bias=True):
    """Both heads, of different widths, all with gradients."""
    shapes = {
        "hidden_p": (*rows, hidden[0]), "weight_p": (vocabulary, hidden[0]),
        "hidden_q": (*rows, hidden[1]), "weight_q": (vocabulary, hidden[1]),
    }  # fmt: skip
    if bias:
        shapes |= {"bias_p": (vocabulary,), "bias_q": (vocabulary,)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def dense(
    divergence, hidden_p, weight_p, hidden_q, weight_q, *, bias_p=None, bias_q=None, mask=None, count=None,
    temperature=1.0, chunk=None,
):  # fmt: skip
    """The naive twin: all logits at once."""
    p = torch.log_softmax(linear(hidden_p, weight_p, bias_p).div(temperature), -1)
    q = torch.log_softmax(linear(hidden_q, weight_q, bias_q).div(temperature), -1)
    return masked_mean(divergence(p, q), mask, count=count)


def evaluated(function, divergence, inputs, **options):
    """The value and the gradients by whichever inputs take one."""
    value = function(divergence, **inputs, **options)
    live = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    assert value.requires_grad
    gradients = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
    return {"value": value.detach(), **dict(zip(live, gradients))}


def close(one, other, rtol=1e-10, atol=1e-12):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, msg=f"another {name}: {{}}".format)


def law_equals_whole_logits(chunked, generator):
    for rows, chunk in (((7,), 3), ((7,), 7), ((3,), 8), ((1,), 1), ((1,), None), ((2, 5), 4), ((2, 3, 2), 5)):
        inputs = tensors(generator, rows)
        close(evaluated(chunked, kl, inputs, chunk=chunk), evaluated(dense, kl, inputs))


def law_equals_whole_logits_in_float32(chunked, generator):
    inputs = tensors(generator, (101,), (17, 9), 73, torch.float32)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    results, truth = evaluated(chunked, reverse_kl, inputs, chunk=10), evaluated(dense, reverse_kl, exact)
    for name, result in results.items():
        assert result.dtype == torch.float32
        assert (result - truth[name]).norm() < 1e-5 * truth[name].norm(), name


def law_halves_are_summed_in_float32(chunked, generator):
    inputs = tensors(generator, (512,), (24, 16), 40, torch.bfloat16)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    results, truth = evaluated(chunked, kl, inputs, chunk=8), evaluated(dense, kl, exact)
    assert results["value"].dtype == torch.float32
    for name, result in results.items():
        assert result.dtype == (torch.float32 if name == "value" else torch.bfloat16)
        assert (result.double() - truth[name]).norm() < 0.01 * truth[name].norm(), name


def law_halves_do_not_underflow(chunked, generator):
    inputs = tensors(generator, (20,), (8, 8), 400, torch.float16)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    results = evaluated(lambda *a, **k: 1e7 * chunked(*a, **k), kl, inputs, count=1e7)
    for name, true in evaluated(dense, kl, exact, count=1.0).items():
        assert (results[name].double() - true).norm() < 0.01 * true.norm(), name


def law_temperature(chunked, generator):
    inputs = tensors(generator)
    for temperature in (0.5, 3.0):
        options = {"temperature": temperature}
        close(evaluated(chunked, kl, inputs, chunk=3, **options), evaluated(dense, kl, inputs, **options))


def law_a_mask_is_slicing(chunked, generator):
    for rows, chunk in (((11,), 2), ((3, 5), 4)):
        inputs = tensors(generator, rows)
        mask = torch.rand(rows, generator=generator) < 0.6
        mask.view(-1)[:2] = torch.tensor([True, False])
        for one in (mask, mask.long(), mask.double()):
            close(evaluated(chunked, kl, inputs, mask=one, chunk=chunk), evaluated(dense, kl, inputs, mask=one))
        sliced = {name: x[mask] if name.startswith("hidden") else x for name, x in inputs.items()}
        torch.testing.assert_close(chunked(kl, **inputs, mask=mask, chunk=chunk), dense(kl, **sliced))


def law_what_is_masked_is_not_seen(chunked, generator):
    inputs = tensors(generator)
    mask = torch.arange(7) % 3 != 1
    for junk in (float("nan"), float("inf")):
        spoilt = {
            name: x.detach().masked_fill(~mask[:, None], junk).requires_grad_() if name.startswith("hidden") else x
            for name, x in inputs.items()
        }
        close(evaluated(chunked, kl, spoilt, mask=mask, chunk=3), evaluated(dense, kl, inputs, mask=mask))


def law_an_empty_mask_gives_zero_with_a_gradient(chunked, generator):
    inputs = tensors(generator)
    for options in ({}, {"count": 3}, {"count": torch.tensor(5)}):
        results = evaluated(chunked, kl, inputs, mask=torch.zeros(7, dtype=torch.bool), **options)
        assert not any(result.any() for result in results.values())


def law_micro_batches_add_up(chunked, generator):
    inputs = tensors(generator)
    mask = torch.tensor([True, False, True, True, True, True, False])
    total: dict = {}
    for part in (slice(0, 2), slice(2, 7)):
        split = {name: x[part] if name.startswith("hidden") else x for name, x in inputs.items()}
        value = chunked(kl, **split, mask=mask[part], count=mask.sum(), chunk=2)
        gradients = torch.autograd.grad(value, list(inputs.values()))
        for name, tensor in zip(("value", *inputs), (value.detach(), *gradients)):
            total[name] = total.get(name, 0) + tensor
    close(total, evaluated(dense, kl, inputs, mask=mask))


def law_the_gradient_is_that_of_what_follows(chunked, generator):
    inputs = tensors(generator)
    scaled = evaluated(lambda *a, **k: 3.0 * chunked(*a, **k).square(), kl, inputs, chunk=3)
    close(scaled, evaluated(lambda *a, **k: 3.0 * dense(*a, **k).square(), kl, inputs))


def law_only_what_takes_a_gradient_gets_one(chunked, generator):
    for live in ("hidden_q", "weight_q", "bias_q hidden_p", "weight_p", "bias_p", "hidden_q weight_q"):
        inputs = {name: x.detach().requires_grad_(name in live.split()) for name, x in tensors(generator).items()}
        close(evaluated(chunked, kl, inputs, chunk=3), evaluated(dense, kl, inputs))
    constants = {name: tensor.detach() for name, tensor in inputs.items()}
    assert not chunked(kl, **constants).requires_grad
    with torch.no_grad():
        assert not chunked(kl, **tensors(generator)).requires_grad


def law_layout_changes_nothing(chunked, generator):
    inputs = tensors(generator, (7,), bias=False)
    apart = {}
    for name, x in inputs.items():
        room = torch.zeros(x.shape[1] + 2, 2 * x.shape[0], dtype=x.dtype)
        apart[name] = room[1:-1, ::2].T.copy_(x.detach()).requires_grad_()
        assert not apart[name].is_contiguous()
    close(evaluated(chunked, kl, apart, chunk=3), evaluated(dense, kl, inputs))


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def law_whole_logits_are_never_held(chunked, generator):
    inputs = tensors(generator, (96,), (4, 4), 64, torch.float32)
    for temperature in (1.0, 2.0):
        with Largest() as largest:
            chunked(jsd, **inputs, chunk=8, temperature=temperature).backward()
        assert largest.elements <= 8 * 64


def law_one_derivative_once(chunked, generator):
    inputs = tensors(generator)
    value = chunked(kl, **inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value * value, inputs["hidden_q"], create_graph=True)
    value = chunked(kl, **inputs)
    torch.autograd.grad(value, inputs["hidden_q"], retain_graph=True)
    with pytest.raises(RuntimeError, match="once: compute the loss again"):
        torch.autograd.grad(value, inputs["hidden_q"])


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


@pytest.mark.parametrize("block", [22, 1 << 17])
@pytest.mark.parametrize("law", LAWS)
def test_law(law, block, generator, monkeypatch):
    monkeypatch.setattr("kullback.core.chunk._BLOCK", block)
    LAWS[law](linear_chunked, generator)


# Wrong implementations, most of them `linear_chunked` with one argument changed.


def but(**changes):
    """linear_chunked with options replaced; a function makes the option from what was given."""

    def wrong(divergence, **inputs):
        for name, change in changes.items():
            if inputs.get(name) is not None:
                inputs[name] = change(inputs[name]) if callable(change) else change
        return linear_chunked(divergence, **inputs)

    return wrong


def by_parts(combine, detach_last=False):
    """Whole logits of one chunk after the other, put together by combine(values, rows of each, rows in all)."""

    def wrong(divergence, hidden_p, weight_p, hidden_q, weight_q, *, mask=None, chunk=None, **options):
        p, q = hidden_p.flatten(0, -2), hidden_q.flatten(0, -2)
        if mask is not None:
            p, q = p[mask.flatten().bool()], q[mask.flatten().bool()]
        parts = list(zip(p.split(chunk or 128), q.split(chunk or 128)))
        values = [dense(divergence, x, weight_p, y, weight_q, **options) for x, y in parts]
        if detach_last:
            values[-1] = values[-1].detach() + 0 * values[0]
        return combine(torch.stack(values), torch.tensor([len(x) for x, _ in parts]), len(p))

    return wrong


def weighted(values, rows, total):
    return (values * rows / total).sum()


mean_of_chunk_means = by_parts(lambda values, rows, total: values.mean())
without_last_gradient = by_parts(weighted, detach_last=True)


def swapped(divergence, hidden_p, weight_p, hidden_q, weight_q, **options):
    return linear_chunked(dual(divergence), hidden_p, weight_p, hidden_q, weight_q, **options)


def squared_temperature(divergence, *, temperature=1.0, **inputs):
    return temperature**2 * linear_chunked(divergence, temperature=temperature, **inputs)


def masked_by_product(divergence, *, mask=None, **inputs):
    if mask is not None:
        inputs["hidden_p"], inputs["hidden_q"] = (inputs[n] * mask[..., None] for n in ("hidden_p", "hidden_q"))
        inputs["count"] = inputs.get("count") or mask.sum()
    return linear_chunked(divergence, **inputs)


class _Deaf(torch.autograd.Function):
    """The identity, whose gradient does not look at what follows."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.ones_like(grad)


def deaf_to_what_follows(divergence, **inputs):
    return _Deaf.apply(linear_chunked(divergence, **inputs))


def summed_in_halves(divergence, *, hidden_p, hidden_q, chunk=None, **options):
    """The gradient of each chunk rounded to the weights' type before it is added."""
    parts = zip(hidden_p.split(chunk), hidden_q.split(chunk))
    count = len(hidden_q)
    return sum(linear_chunked(divergence, hidden_p=p, hidden_q=q, count=count, **options) for p, q in parts)


def scaled_at_once(divergence, *, count=1.0, **inputs):
    """Divided by the count before the gradient by the logits is narrowed."""
    return linear_chunked(lambda log_p, log_q: divergence(log_p, log_q) / count, count=1.0, **inputs)


def always_recording(divergence, **inputs):
    with torch.enable_grad():
        return linear_chunked(divergence, **inputs)


def contiguous_by_force(divergence, **inputs):
    """Reads the storage as if rows followed each other."""
    torn = {
        name: x.as_strided(x.shape, (x.shape[1], 1)) if isinstance(x, torch.Tensor) and x.ndim == 2 else x
        for name, x in inputs.items()
    }
    return linear_chunked(divergence, **torn)


def empty_is_a_constant(divergence, *, mask=None, **inputs):
    if mask is not None and not mask.any():
        return torch.zeros((), dtype=torch.float64)
    return linear_chunked(divergence, mask=mask, **inputs)


WRONG = [
    ("equals_whole_logits", mean_of_chunk_means),
    ("equals_whole_logits", without_last_gradient),
    ("equals_whole_logits", swapped),
    ("equals_whole_logits", but(bias_q=lambda bias: None)),
    ("equals_whole_logits", but(hidden_p=torch.Tensor.detach)),
    ("equals_whole_logits_in_float32", mean_of_chunk_means),
    ("equals_whole_logits_in_float32", without_last_gradient),
    ("equals_whole_logits_in_float32", but(weight_q=torch.Tensor.bfloat16)),
    ("halves_are_summed_in_float32", summed_in_halves),
    ("halves_do_not_underflow", scaled_at_once),
    ("temperature", but(temperature=1.0)),
    ("temperature", squared_temperature),
    ("a_mask_is_slicing", but(mask=torch.ones_like)),
    ("a_mask_is_slicing", masked_by_product),
    ("a_mask_is_slicing", but(mask=lambda mask: mask.flatten().sort(stable=True).values.view_as(mask))),
    ("what_is_masked_is_not_seen", masked_by_product),
    ("an_empty_mask_gives_zero_with_a_gradient", empty_is_a_constant),
    ("an_empty_mask_gives_zero_with_a_gradient", but(mask=torch.ones_like)),
    ("micro_batches_add_up", but(count=lambda count: None)),
    ("micro_batches_add_up", but(mask=torch.ones_like)),
    ("the_gradient_is_that_of_what_follows", deaf_to_what_follows),
    ("only_what_takes_a_gradient_gets_one", always_recording),
    ("layout_changes_nothing", contiguous_by_force),
    ("whole_logits_are_never_held", dense),
    ("whole_logits_are_never_held", but(chunk=lambda chunk: 12 * chunk)),
    ("one_derivative_once", dense),
]


@pytest.mark.parametrize(("law", "wrong"), WRONG)
def test_law_bites(law, wrong, generator):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        LAWS[law](wrong, generator)


def test_every_law_is_shown_to_bite():
    assert {law for law, _ in WRONG} == set(LAWS)


def test_the_parts_are_right_when_put_together_rightly(generator):
    law_equals_whole_logits(by_parts(weighted), generator)


@pytest.mark.parametrize("name", NAMES)
def test_every_divergence(name, generator):
    divergence = named(name, **OPTIONS.get(name, {}))
    inputs = tensors(generator, (9,))
    options = {"mask": torch.arange(9) % 4 != 2, "temperature": 1.7}
    exact = evaluated(dense, divergence, inputs, **options)
    close(evaluated(linear_chunked, divergence, inputs, chunk=2, **options), exact)


def test_divergences_made_of_others_and_plain_functions(generator):
    def squared_distance(log_p, log_q):
        return (log_p.exp() - log_q.exp()).square().sum(-1)

    inputs = tensors(generator, (9,))
    for divergence in (dual(kl), mixture(jsd, 0.2), mixture(reverse_kl, 0.4, normalised=False), squared_distance):
        close(evaluated(linear_chunked, divergence, inputs, chunk=4), evaluated(dense, divergence, inputs))


def test_a_divergence_that_holds_one_side_constant(generator):
    inputs = tensors(generator)
    to_model_only = lambda log_p, log_q: kl(log_p.detach(), log_q)  # noqa: E731
    value = linear_chunked(to_model_only, **inputs, chunk=3)
    expected = dense(to_model_only, **inputs)
    value.backward()
    got = {name: x.grad for name, x in inputs.items()}
    for name in ("hidden_q", "weight_q", "bias_q"):
        torch.testing.assert_close(got[name], torch.autograd.grad(expected, inputs[name], retain_graph=True)[0])
    for name in ("hidden_p", "weight_p", "bias_p"):
        assert got[name] is None or not got[name].any()


def test_values_row_by_row(generator):
    inputs = tensors(generator, (3, 5))
    values = linear_chunked_values(kl, **inputs, temperature=2.0, chunk=4)
    assert values.shape == (3, 5)
    assert not values.requires_grad
    torch.testing.assert_close(values.mean(), dense(kl, **inputs, temperature=2.0).detach())
    rows = {name: x[1:2, 2] if name.startswith("hidden") else x for name, x in inputs.items()}
    torch.testing.assert_close(values[1, 2], dense(kl, **rows, temperature=2.0).detach())
    nothing = {name: x[:0] if name.startswith("hidden") else x for name, x in inputs.items()}
    assert linear_chunked_values(kl, **nothing).shape == (0, 5)
    assert linear_chunked_values(kl, **nothing).dtype == torch.float64


def test_values_hold_no_whole_logits(generator):
    inputs = tensors(generator, (96,), (4, 4), 64, torch.float32)
    with Largest() as largest:
        linear_chunked_values(jsd, **inputs, chunk=8)
    assert largest.elements <= 8 * 64


def mix(labels, share):
    """share cross-entropy + (1 - share) KL to the first head, row by row."""

    def loss(rows, target, model):
        log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(model, -1)
        return share * cross_entropy(model, labels[rows], reduction="none") + (1 - share) * kl(log_p, log_q)

    return loss


def test_rows_chunked_with_cross_entropy(generator):
    inputs = tensors(generator)
    labels = torch.randint(11, (7,), generator=generator)
    scale = torch.rand(7, generator=generator, dtype=torch.float64)
    heads = [LinearHead(*(inputs[f"{part}_{side}"] for part in ("hidden", "weight", "bias"))) for side in "pq"]
    whole = (mix(labels, 0.3)(slice(None), *(linear(*head) for head in heads)) * scale).sum()
    expected = torch.autograd.grad(whole, list(inputs.values()))
    for chunk in (1, 3, 7, None):
        value = rows_chunked(mix(labels, 0.3), heads, scale, chunk=chunk)
        close({"value": value.detach(), **dict(zip(inputs, torch.autograd.grad(value, list(inputs.values()))))},
              {"value": whole.detach(), **dict(zip(inputs, expected))})  # fmt: skip
    first_label_always = mix(labels[:1].expand(7), 0.3)
    assert (rows_chunked(first_label_always, heads, scale) - whole).abs() > 1e-3


def test_rows_chunked_with_one_head_and_a_head_that_is_not_looked_at(generator):
    inputs = tensors(generator)
    labels = torch.randint(11, (7,), generator=generator)
    student = LinearHead(inputs["hidden_q"], inputs["weight_q"])
    unseen = LinearHead(inputs["hidden_p"], inputs["weight_p"])
    alone = rows_chunked(lambda rows, z: cross_entropy(z, labels[rows], reduction="none"), [student], torch.ones(7) / 7)
    torch.testing.assert_close(alone, cross_entropy(linear(*student), labels).to(alone.dtype))
    second = lambda rows, _, z: cross_entropy(z, labels[rows], reduction="none")  # noqa: E731
    both = rows_chunked(second, [unseen, student], torch.ones(7, dtype=torch.float64) / 7, chunk=2)
    both.backward()
    torch.testing.assert_close(both.detach(), cross_entropy(linear(*student), labels).detach())
    assert inputs["hidden_p"].grad is None or not inputs["hidden_p"].grad.any()


def test_autocast_takes_products_in_bfloat16_and_gives_gradients_in_the_parameters_type(generator):
    inputs = tensors(generator, (64,), (24, 16), 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = evaluated(linear_chunked, kl, inputs, chunk=10)
        reference = evaluated(dense, kl, inputs)
    exact = evaluated(dense, kl, inputs)
    for name, result in results.items():
        assert result.dtype == torch.float32
        error, of_dense = ((x[name] - exact[name]).norm() for x in (results, reference))
        assert error < 0.03 * exact[name].norm(), name
        assert error < 1.1 * of_dense, name
    assert not torch.equal(results["value"], exact["value"])  # or it was not in bfloat16 at all


def test_a_teacher_in_another_type_than_the_student(generator):
    for teacher, student in ((torch.bfloat16, torch.float32), (torch.float64, torch.float32)):
        inputs = {name: x.detach().to(teacher if name.endswith("p") else student)
                  for name, x in tensors(generator).items()}  # fmt: skip
        for name in ("hidden_q", "weight_q", "bias_q"):
            inputs[name].requires_grad_()
        exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
        results, truth = evaluated(linear_chunked, kl, inputs, chunk=3), evaluated(dense, kl, exact)
        for name in results:
            assert (results[name] - truth[name]).norm() < 0.02 * truth[name].norm(), name


def test_one_set_of_weights_for_both_heads(generator):
    inputs = tensors(generator, hidden=(4, 4))
    inputs["weight_p"] = inputs["weight_q"]
    close(evaluated(linear_chunked, jsd, inputs, chunk=2), evaluated(dense, jsd, inputs))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_q": torch.zeros(7, 4)}, ShapeError, r"hidden_q has shape \(7, 4\) and weight_q \(11, 3\)"),
        ({"weight_p": torch.zeros(11)}, ShapeError, r"hidden_p has shape \(7, 5\) and weight_p \(11,\)"),
        ({"weight_p": torch.zeros(12, 5)}, ShapeError, "12 tokens and the model's 11: cut both"),
        ({"hidden_p": torch.zeros(6, 5)}, ShapeError, r"rows \(6,\) and hidden_q \(7,\)"),
        ({"mask": torch.ones(6)}, ShapeError, r"mask has shape \(6,\) and the rows \(7,\)"),
        ({"bias_q": torch.zeros(10)}, ShapeError, r"bias_q has shape \(10,\) and the head 11 tokens"),
        ({"temperature": 0.0}, ConfigError, "temperature must be positive and is 0.0"),
        ({"temperature": float("nan")}, ConfigError, "temperature must be positive and is nan"),
        ({"chunk": 0}, ConfigError, "chunk is a number of rows, at least 1, got 0"),
    ],
)
def test_errors_are_sentences(change, error, words, generator):
    inputs = {name: x.detach().float() for name, x in tensors(generator).items()}
    with pytest.raises(error, match=words):
        linear_chunked(kl, **(inputs | change))
    if "mask" not in change:
        with pytest.raises(error, match=words):
            linear_chunked_values(kl, **(inputs | change))


def test_the_default_chunk_gives_the_same(generator):
    inputs = tensors(generator, (300,), (6, 5), 33_000, torch.float32, bias=False)
    results, exact = evaluated(linear_chunked, kl, inputs), evaluated(dense, kl, inputs)
    for name in results:
        assert (results[name] - exact[name]).norm() < 1e-5 * exact[name].norm(), name
