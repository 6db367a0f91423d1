"""Divergences from log-probabilities: accuracy, limits, blocks of rows, vmap, NaN, names, wrappers and errors.

The values of the card and the laws of the family are in tests/contracts/test_losses.py.
"""

import inspect
import math
from functools import partial

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.divergences import (
    NAMES,
    alpha_divergence,
    dual,
    f_divergence,
    from_logits,
    fused,
    generalized_jsd,
    jsd,
    kl,
    log_mixture,
    mixture,
    named,
    pearson,
    renyi,
    reverse_kl,
    skew_kl,
    total_variation,
)

OPTIONS = {
    "alpha_divergence": [{"alpha": a} for a in (-1.0, 0.5, 0.98, 2.0)],
    "generalized_jsd": [{"beta": b} for b in (0.1, 0.9)],
    "renyi": [{"alpha": a} for a in (0.5, 0.99, 2.0)],
    "skew_kl": [{"alpha": a} for a in (0.1, 0.7)],
    "skew_reverse_kl": [{"alpha": a} for a in (0.1, 0.7)],
}
FAMILY = {
    " ".join([name, *map(str, options.values())]): named(name, **options)
    for name in NAMES
    for options in OPTIONS.get(name, [{}])
}
EVERY = pytest.mark.parametrize("divergence", FAMILY.values(), ids=FAMILY)


def pair(generator, *shape, scale=2.0, dtype=torch.float64):
    return torch.log_softmax(scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64), -1).to(dtype)


def value_and_gradients(divergence, log_p, log_q):
    log_p, log_q = log_p.clone().requires_grad_(), log_q.clone().requires_grad_()
    value = divergence(log_p, log_q)
    return value.detach(), *torch.autograd.grad(value.sum(), (log_p, log_q))


@EVERY
@pytest.mark.parametrize("shape", [(3, 5, 11), (1, 11), (11,), (0, 11)])
def test_blocks_of_rows_change_no_bit(divergence, shape, generator, monkeypatch):
    log_p, log_q = pair(generator, *shape, dtype=torch.float32)
    whole = value_and_gradients(divergence, log_p, log_q)
    for elements in (1, 30):
        monkeypatch.setattr(fused, "_BLOCK", elements)
        for found, wanted in zip(value_and_gradients(divergence, log_p, log_q), whole):
            assert torch.equal(found, wanted)
        assert torch.equal(divergence(log_p, log_q), whole[0])  # without a gradient


@EVERY
def test_vmap_is_one_more_dimension_of_rows(divergence, generator):
    log_p, log_q = pair(generator, 4, 3, 7)
    mapped = torch.func.vmap(divergence)
    torch.testing.assert_close(mapped(log_p, log_q), divergence(log_p, log_q))
    torch.testing.assert_close(
        torch.func.vmap(divergence, in_dims=(0, None))(log_p, log_q[0]), divergence(log_p, log_q[:1].expand(4, 3, 7))
    )
    torch.testing.assert_close(
        torch.func.vmap(divergence, in_dims=(1, 2))(log_p, log_q.movedim(1, 2)),
        divergence(log_p, log_q).transpose(0, 1),
    )
    gradient = torch.func.vmap(torch.func.grad(lambda q, p: divergence(p, q).sum()))(log_q, log_p)
    torch.testing.assert_close(gradient, value_and_gradients(divergence, log_p, log_q)[2])


@EVERY
def test_a_nan_stays_in_its_row(divergence, generator):
    for ruined in (0, 1):
        logs = list(pair(generator, 3, 7))
        logs[ruined] = logs[ruined].clone()
        logs[ruined][1, 2] = math.nan
        value = divergence(*logs)
        assert value.isnan().tolist() == [False, True, False]


@EVERY
def test_a_second_derivative_is_refused_rather_than_wrong(divergence, generator):
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    value = from_logits(divergence, torch.zeros(2, 7, dtype=torch.float64), logits).sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="definition"):
        torch.autograd.grad(weight * from_logits(divergence, logits.detach(), logits).sum(), logits, create_graph=True)
    assert torch.isfinite(gradient).all()


@EVERY
def test_float32_is_accurate_from_near_equality_to_disjoint_supports(divergence, generator):
    """Against the same inputs in float64; near p = q the absolute error stays that of a few roundings."""
    for scale in (1e-3, 1.0, 5.0, 30.0):
        base = torch.randn(50, 300, generator=generator, dtype=torch.float64)
        log_p = torch.log_softmax(base, -1).float()
        log_q = torch.log_softmax(base + scale * torch.randn(base.shape, generator=generator, dtype=base.dtype), -1)
        log_q = log_q.float()
        exact = divergence(log_p.double(), log_q.double())
        inside = exact < 1e30
        error = (divergence(log_p, log_q).double() - exact)[inside].abs() / exact[inside].clamp(min=1.0)
        assert bool((error < 2e-5).all()), (scale, error.max())


def test_mixtures_are_accurate_where_p_is_close_to_q(generator):
    """Where the value is 1e-9, errors of the size of a rounding of p would leave nothing of it, not even its sign."""

    def by_difference(log_p, log_q):  # the cheaper (p - q) / q for expm1(log p - log q)
        p, q = log_p.exp(), log_q.exp()
        log_m_over_q = ((p - q) / q).mul(0.5).log1p()
        return 0.5 * (p * (log_p - log_q - log_m_over_q)).sum(-1) - 0.5 * (q * log_m_over_q).sum(-1)

    base = 2 * torch.randn(200, 1000, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(base, -1).float()
    log_q = torch.log_softmax(base + 1e-4 * torch.randn(base.shape, generator=generator, dtype=base.dtype), -1).float()
    exact = f_divergence("jsd").definition(log_p.double(), log_q.double())
    errors = [(loss(log_p, log_q) - exact).abs().max().item() for loss in (jsd, by_difference)]
    assert errors[0] < 5e-11
    assert errors[1] > 5e-9
    assert bool((jsd(log_p, log_q) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixtures_at_extreme_ratios(dtype):
    """p = (1, tiny), q = (tiny, 1): the generalized JSD is the entropy of (b, 1 - b), the skew KL -log a."""
    for depth in (-90.0, -800.0, -1e4, -math.inf):
        log_p = torch.tensor([0.0, depth], dtype=dtype)
        log_q = log_p.flip(0)
        for b in (1e-6, 0.1, 0.5, 0.9):
            entropy = -b * math.log(b) - (1 - b) * math.log1p(-b)
            tolerance = 3e-6 if dtype == torch.float32 else 1e-13
            assert generalized_jsd(log_p, log_q, beta=b).item() == pytest.approx(entropy, rel=tolerance)
            assert skew_kl(log_p, log_q, alpha=b).item() == pytest.approx(-math.log(b), rel=tolerance)


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (partial(alpha_divergence, alpha=1.0 - 1e-9), kl),
        (partial(alpha_divergence, alpha=1.0 + 1e-9), kl),
        (partial(alpha_divergence, alpha=1e-9), reverse_kl),
        (partial(alpha_divergence, alpha=-1e-9), reverse_kl),
        (partial(renyi, alpha=1.0 - 1e-9), kl),
        (partial(renyi, alpha=1.0 + 1e-9), kl),
        (partial(generalized_jsd, beta=1e-9, normalised=True), kl),
        (partial(generalized_jsd, beta=1.0 - 1e-9, normalised=True), reverse_kl),
        (partial(generalized_jsd, beta=0.0, normalised=True), kl),
        (partial(generalized_jsd, beta=1.0, normalised=True), reverse_kl),
        (partial(skew_kl, alpha=1e-9), kl),
    ],
)
def test_limits_are_smooth(near, limit, generator):
    log_p, log_q = pair(generator, 20, 9)
    targets = log_p.softmax(-1), log_q.softmax(-1)  # gradients by log_p and log_q are right behind log_softmax only

    def centred(gradient, probabilities):
        return gradient - probabilities * gradient.sum(-1, keepdim=True)

    found, wanted = (value_and_gradients(loss, log_p, log_q) for loss in (near, limit))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-7)
    for one, other, probabilities in zip(found[1:], wanted[1:], targets):
        torch.testing.assert_close(centred(one, probabilities), centred(other, probabilities), rtol=1e-6, atol=1e-6)


def test_only_the_gradients_asked_for_are_made(generator):
    log_p, log_q = pair(generator, 3, 7)
    assert not kl(log_p, log_q).requires_grad
    log_q.requires_grad_()
    with torch.no_grad():
        assert not kl(log_p, log_q).requires_grad
    kl(log_p, log_q).sum().backward()
    assert log_p.grad is None
    torch.testing.assert_close(log_q.grad, -log_p.exp())


def test_at_ties_total_variation_has_the_subgradient_zero():
    logits = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64, requires_grad=True)
    total_variation(torch.log_softmax(logits.detach(), -1), torch.log_softmax(logits, -1)).backward()
    assert not logits.grad.any()


def test_from_logits(generator):
    target, model = 3 * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    wanted = kl(torch.log_softmax(target / 2.5, -1), torch.log_softmax(model / 2.5, -1))
    torch.testing.assert_close(from_logits(kl, target, model, 2.5), wanted)
    wanted = kl(torch.log_softmax(target, -1), torch.log_softmax(model, -1))
    torch.testing.assert_close(from_logits(kl, target, model), wanted)
    halves = target.bfloat16(), model.bfloat16()
    wanted = from_logits(kl, *(x.float() for x in halves), temperature=2.0)
    assert torch.equal(from_logits(kl, *halves, temperature=2.0), wanted)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="temperature must be positive"):
            from_logits(kl, target, model, temperature)


def test_the_temperature_divides_the_gradient_of_the_logits():
    """Card 01: z -> z/T multiplies the gradient by 1/T, and no T^2 is applied."""
    target, model = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64).log()
    model.requires_grad_()
    from_logits(kl, target, model, 3.0).backward()
    difference = (model / 3).softmax(-1) - (target / 3).softmax(-1)
    torch.testing.assert_close(model.grad, difference.detach() / 3)


def test_dual_and_names(generator):
    log_p, log_q = pair(generator, 5, 9)
    assert torch.equal(dual(kl)(log_p, log_q), reverse_kl(log_p, log_q))
    assert torch.equal(dual(dual(pearson))(log_p, log_q), pearson(log_p, log_q))
    assert named("kl") is kl
    assert torch.equal(named("skew-kl", alpha=0.3)(log_p, log_q), skew_kl(log_p, log_q, alpha=0.3))
    for name in NAMES:
        assert inspect.getdoc(named(name, **OPTIONS.get(name, [{}])[0]))


@pytest.mark.parametrize("normalised", [True, False])
def test_mixture_by_its_definition(normalised, generator):
    log_p, log_q = pair(generator, 5, 9)
    for b in (0.05, 0.3, 0.5, 0.8):
        log_m = (b * log_p.exp() + (1 - b) * log_q.exp()).log()
        scale = 1 / (b * (1 - b)) if normalised else 1.0
        for divergence in (kl, pearson, total_variation, renyi_half):
            wanted = scale * (b * divergence(log_p, log_m) + (1 - b) * divergence(log_q, log_m))
            found = mixture(divergence, b, normalised=normalised)(log_p, log_q)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        by_jsd = mixture(jsd, b, normalised=normalised)(log_p, log_q)
        torch.testing.assert_close(by_jsd, generalized_jsd(log_p, log_q, beta=b, normalised=normalised))


renyi_half = partial(renyi, alpha=0.5)


def test_the_ends_of_a_mixture(generator):
    log_p, log_q = pair(generator, 5, 9)
    for divergence, ends in ((jsd, (kl, reverse_kl)), (kl, (kl, reverse_kl)), (pearson, (pearson, dual(pearson)))):
        for b, end in zip((0.0, 1.0), ends):
            torch.testing.assert_close(mixture(divergence, b)(log_p, log_q), end(log_p, log_q))
    near = mixture(renyi_half, 1e-3)(log_p, log_q)
    torch.testing.assert_close(near, renyi_half(log_p, log_q), rtol=1e-1, atol=0)


def test_log_mixture(generator):
    log_p, log_q = pair(generator, 5, 9)
    torch.testing.assert_close(log_mixture(log_p, log_q, 0.3).exp(), 0.3 * log_p.exp() + 0.7 * log_q.exp())
    one_sided = log_mixture(torch.tensor([-math.inf, 0.0]), torch.tensor([0.0, -math.inf]), 0.3)
    torch.testing.assert_close(one_sided, torch.tensor([0.7, 0.3]).log())
    both = torch.tensor([-math.inf, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_mixture(both, both, 0.3)[1], both)
    assert gradient.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, q: kl(p[..., :5], q), ShapeError, "5 outcomes and log_q has 7: cut both"),
        (lambda p, q: kl(p[:1], q), ShapeError, r"shape \(1, 7\) and log_q has \(2, 7\): give both the same"),
        (lambda p, q: kl(torch.tensor(0.0), q), ShapeError, "got a scalar"),
        (lambda p, q: generalized_jsd(p, q, beta=1.5), ConfigError, r"beta in \[0, 1\] and got 1.5"),
        (lambda p, q: generalized_jsd(p, q, beta=0.0), ConfigError, "zero everywhere: normalised=True"),
        (lambda p, q: skew_kl(p, q, alpha=1.0), ConfigError, r"alpha in \[0, 1\) and got 1.0"),
        (lambda p, q: alpha_divergence(p, q, alpha=math.nan), ConfigError, "finite alpha and got nan"),
        (lambda p, q: renyi(p, q, alpha=0.0), ConfigError, r"alpha in \(0, inf\) and got 0"),
        (lambda p, q: mixture(kl, -0.1), ConfigError, r"beta in \[0, 1\] and got -0.1"),
        (lambda p, q: mixture(kl, 1.0, normalised=False), ConfigError, "zero everywhere"),
        (lambda p, q: log_mixture(p, q, 1.0), ConfigError, r"beta in \(0, 1\) and got 1.0"),
        (lambda p, q: named("jds"), ConfigError, "no divergence is called 'jds': did you mean 'jsd'"),
        (lambda p, q: named("zzz"), ConfigError, "the names are alpha_divergence, "),
        (lambda p, q: named("kl", alpha=1.0), ConfigError, "kl takes no option 'alpha': it takes none at all"),
        (lambda p, q: named("renyi", beta=1.0), ConfigError, "renyi takes no option 'beta': it takes alpha"),
        (lambda p, q: named("skew-kl", alpha=-1.0), ConfigError, r"alpha in \[0, 1\) and got -1.0"),
        (lambda p, q: named("renyi", alpha=0.0), ConfigError, r"alpha in \(0, inf\) and got 0"),
        (lambda p, q: kl(p[:, :0], q[:, :0]), ShapeError, "needs an outcome at least"),
        (lambda p, q: named("generalized-jsd"), ConfigError, r"needs beta: named\('generalized_jsd', beta=...\)"),
    ],
)
def test_errors(call, error, message, generator):
    with pytest.raises(error, match=message):
        call(*pair(generator, 2, 7))
