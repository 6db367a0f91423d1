"""Every f-divergence as one object: generator, derivative, conjugate, inverse, curvature, dual and loss agree."""

import dataclasses
import math

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.divergences import F_NAMES, FDivergence, dual, f_divergence

MEMBERS = [
    ("kl", {}),
    ("reverse_kl", {}),
    ("jeffreys", {}),
    ("jsd", {}),
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 0.9}),
    ("generalized_jsd", {"beta": 1e-4, "normalised": True}),
    ("generalized_jsd", {"beta": 0.0, "normalised": True}),
    ("skew_kl", {"alpha": 0.0}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_kl", {"alpha": 0.7}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.7}),
    *[("alpha_divergence", {"alpha": a}) for a in (-1.0, -0.01, 0.0, 0.03, 0.5, 0.7, 0.98, 1.0, 1.001, 2.0, 3.0)],
    ("pearson", {}),
    ("neyman", {}),
    ("total_variation", {}),
    ("squared_hellinger", {}),
]
ALL = pytest.mark.parametrize(("name", "options"), MEMBERS, ids=[f"{n}{list(o.values()) or ''}" for n, o in MEMBERS])
LOG_T = torch.linspace(math.log(1e-3), math.log(1e3), 241, dtype=torch.float64)
LOG_T[120] = 0.0  # exactly, for the kink of total variation


def card_form(name, t, **options):
    """f, f' and f''(1) as the table of card 01 writes them, before f is shifted to f'(1) = 0."""
    log = torch.log
    if name == "alpha_divergence":
        a = options["alpha"]
        return (t**a - a * t - (1 - a)) / (a * (a - 1)), (t ** (a - 1) - 1) / (a - 1), 1.0
    if name in ("jsd", "generalized_jsd"):
        b = options.get("beta", 0.5)
        u = b * t + 1 - b
        scale = 1 / (b * (1 - b)) if options.get("normalised") else 1.0
        return scale * (b * t * log(t) - u * log(u)), scale * b * log(t / u), scale * b * (1 - b)
    if name == "skew_kl":
        a = options["alpha"]
        v = a * t + 1 - a
        return t * log(t / v), log(t / v) + 1 - a * t / v, (1 - a) ** 2
    if name == "skew_reverse_kl":
        a = options["alpha"]
        return -log(a + (1 - a) * t), -(1 - a) / (a + (1 - a) * t), (1 - a) ** 2
    return {
        "kl": (t * log(t) - t + 1, log(t), 1.0),
        "reverse_kl": (-log(t) + t - 1, 1 - 1 / t, 1.0),
        "jeffreys": ((t - 1) * log(t), log(t) + 1 - 1 / t, 2.0),
        "pearson": ((t - 1) ** 2, 2 * (t - 1), 2.0),
        "neyman": ((1 - t) ** 2 / t, 1 - 1 / t**2, 2.0),
        "total_variation": ((t - 1).abs() / 2, (t - 1).sign() / 2, None),
        "squared_hellinger": (1 - t.sqrt(), -1 / (2 * t.sqrt()), 0.25),
    }[name]


def check_fenchel(member: FDivergence) -> None:
    """f(t) + f*(f'(t)) = t f'(t), relative to the size of its terms."""
    t, slope = LOG_T.exp(), member.derivative(LOG_T)
    gap = member.f(LOG_T) + member.conjugate(slope) - t * slope
    scale = 1.0 + member.f(LOG_T).abs() + (t * slope).abs()
    torch.testing.assert_close(gap / scale, torch.zeros_like(gap), rtol=0, atol=1e-9)


@ALL
def test_fenchel(name, options):
    check_fenchel(f_divergence(name, **options))


@pytest.mark.parametrize(
    "wrong",
    [
        {"conjugate": lambda y: torch.expm1(-y)},
        {"derivative": lambda log_t: 1.0 + log_t},  # the derivative of t log t, with the conjugate of t log t - t + 1
        {"f": lambda log_t: torch.expm1(log_t) - log_t},
        {"derivative": lambda log_t: log_t.exp()},
    ],
    ids=["conjugate mirrored", "derivative not shifted", "generator of the dual", "ratio for log-ratio"],
)
def test_fenchel_bites(wrong):
    with pytest.raises(AssertionError):
        check_fenchel(dataclasses.replace(f_divergence("kl"), **wrong))


@ALL
def test_agrees_with_the_table_of_the_card_up_to_a_slope(name, options):
    member = f_divergence(name, **options)
    if options.get("alpha") in (0.0, 1.0) or options.get("beta") == 0.0:
        name, options = {"kl": ("kl", {}), "reverse_kl": ("reverse_kl", {})}.get(
            member.name, ("kl" if options.get("alpha") == 1.0 else "reverse_kl", {})
        )
    t = LOG_T.exp()
    f, derivative, second = card_form(name, t, **options)
    slope = card_form(name, torch.ones(1, dtype=torch.float64), **options)[1].item()
    tolerance = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(member.f(LOG_T), f - slope * (t - 1), **tolerance)
    torch.testing.assert_close(member.derivative(LOG_T), derivative - slope, **tolerance)
    assert member.second_at_one == (None if second is None else pytest.approx(second, rel=1e-12))


@ALL
def test_derivative_and_curvature_by_differentiation(name, options):
    member = f_divergence(name, **options)
    log_t = LOG_T[LOG_T != 0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(member.f(log_t).sum(), log_t)  # df/dlog t = t f'(t)
    torch.testing.assert_close(slope, log_t.exp() * member.derivative(log_t), rtol=1e-8, atol=1e-9)
    if member.second_at_one is not None:
        h = torch.tensor([-1e-4, 0.0, 1e-4], dtype=torch.float64)
        low, middle, high = member.f(torch.log1p(h))
        assert float((high - 2 * middle + low) / 1e-8) == pytest.approx(member.second_at_one, rel=1e-4)
    one = torch.zeros(1, dtype=torch.float64)
    assert member.f(one).item() == pytest.approx(0.0, abs=1e-15)
    assert member.derivative(one).item() == pytest.approx(0.0, abs=1e-15)
    assert bool((member.f(LOG_T) >= -1e-15).all())


@ALL
def test_inverse_of_the_derivative(name, options):
    member = f_divergence(name, **options)
    if member.derivative_inverse is None:
        assert name == "total_variation"
        return
    inside = LOG_T[LOG_T.abs() < 3]
    slope = member.derivative(inside)
    assert bool(((slope > member.domain[0]) & (slope < member.domain[1])).all())
    torch.testing.assert_close(member.derivative_inverse(slope), inside, rtol=1e-7, atol=1e-9)
    slope = slope.clone().requires_grad_()  # (f*)' = (f')^-1
    (ratio,) = torch.autograd.grad(member.conjugate(slope).sum(), slope)
    torch.testing.assert_close(ratio, inside.exp(), rtol=1e-7, atol=1e-9)


@ALL
def test_the_domain_is_the_range_of_slopes_and_the_conjugate_is_infinite_above(name, options):
    member = f_divergence(name, **options)
    ends = member.derivative(torch.tensor([-1e5, 1e5], dtype=torch.float64))
    for end, bound in zip(ends.tolist(), member.domain):
        if math.isfinite(bound):
            assert end == pytest.approx(bound, abs=1e-2)
        else:
            assert end * math.copysign(1.0, bound) > 50
    if math.isfinite(member.domain[1]):
        above = torch.tensor([member.domain[1] + 0.1], dtype=torch.float64)
        assert member.conjugate(above).item() == math.inf
    if math.isfinite(member.domain[0]):  # below the least slope the supremum is at t = 0
        below = torch.tensor([member.domain[0] - 1.0], dtype=torch.float64)
        at_zero = member.f(torch.tensor([-math.inf], dtype=torch.float64))
        torch.testing.assert_close(member.conjugate(below), -at_zero)


def pair(generator, scale=2.0, rows=40, outcomes=9, dtype=torch.float64):
    logits = scale * torch.randn(2, rows, outcomes, generator=generator, dtype=dtype)
    return torch.log_softmax(logits, -1)


@ALL
def test_the_loss_is_the_sum_of_the_generator(name, options, generator):
    member = f_divergence(name, **options)
    log_p, log_q = pair(generator)
    naive = (log_q.exp() * member.f(log_p - log_q)).sum(-1)
    torch.testing.assert_close(member(log_p, log_q), naive, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(member.definition(log_p, log_q), naive, rtol=1e-9, atol=1e-12)


@ALL
def test_gradients_of_loss_and_definition_agree(name, options, generator):
    member = f_divergence(name, **options)
    p_logits, q_logits = (pair(generator)[i].clone().requires_grad_() for i in (0, 1))
    weight = torch.rand(40, generator=generator, dtype=torch.float64)
    inputs = (p_logits, q_logits)

    def gradients(divergence):
        log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
        return torch.autograd.grad((weight * divergence(log_p, log_q)).sum(), inputs)

    for fast, naive in zip(gradients(member.loss), gradients(member.definition)):
        torch.testing.assert_close(fast, naive, rtol=1e-9, atol=1e-12)


@ALL
def test_the_logit_gradient_is_minus_the_conjugate_of_the_slope(name, options, generator):
    """dD/dz = q (h - sum q h) with h = f(r) - r f'(r) = -f*(f'(r)); it sums to zero."""
    member = f_divergence(name, **options)
    log_p, log_q = pair(generator, scale=1.0)
    logits = log_q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(member(log_p, torch.log_softmax(logits, -1)).sum(), logits)
    h = -member.conjugate(member.derivative(log_p - log_q))
    expected = log_q.exp() * (h - (log_q.exp() * h).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(40, dtype=torch.float64), rtol=0, atol=1e-12)


@ALL
def test_dual(name, options, generator):
    member = f_divergence(name, **options)
    log_p, log_q = pair(generator)
    torch.testing.assert_close(member.dual()(log_p, log_q), dual(member)(log_p, log_q), rtol=1e-10, atol=1e-13)
    t = LOG_T.exp()
    torch.testing.assert_close(member.dual().f(LOG_T), t * member.f(-LOG_T), rtol=1e-9, atol=1e-9)


@ALL
def test_normalised_is_half_chi_squared_to_second_order(name, options, generator):
    member = f_divergence(name, **options)
    if member.second_at_one is None:
        with pytest.raises(ConfigError, match="no second derivative"):
            member.normalised()
        return
    member = member.normalised()
    assert member.second_at_one == 1.0
    check_fenchel(member)
    log_q = pair(generator, scale=1.0)[0]
    logits = log_q + 1e-4 * torch.randn(log_q.shape, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)
    chi_squared = ((log_p.exp() - log_q.exp()) ** 2 / log_q.exp()).sum(-1)
    torch.testing.assert_close(member(log_p, log_q), chi_squared / 2, rtol=2e-3, atol=0)


@ALL
def test_huge_ratios_never_give_nan(name, options):
    member = f_divergence(name, **options)
    for dtype in (torch.float32, torch.float64):
        log_ratio = torch.tensor([-math.inf, -1e4, -200.0, -1.0, 0.0, 1.0, 200.0, 1e4], dtype=dtype)
        for function in (member.f, member.derivative, member.link, member.pseudo_reward):
            assert not function(log_ratio).isnan().any(), (function, dtype)
        for source in ("reference", "model"):
            assert not member.penalty(log_ratio, samples_from=source).isnan().any()


@ALL
def test_definition_and_its_gradients_at_exact_zeros(name, options):
    member = f_divergence(name, **options)
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    log_q = torch.tensor([0.2, 0.3, 0.5, 0.0], dtype=torch.float64).log().requires_grad_()
    value = member.definition(log_p, log_q)
    torch.testing.assert_close(value, member(log_p[:3], log_q.detach()[:3]), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(value, log_q, create_graph=True)
    assert torch.isfinite(gradient).all()
    (second,) = torch.autograd.grad(gradient.square().sum(), log_q)
    assert torch.isfinite(second).all()


def test_links_are_the_scores_of_f_dpo():
    """Card 09: s(d) = d, -e^-d, log 2 + logsigmoid(d), (1 - e^(-a d))/a, up to constants and the scale of its JS."""
    d = torch.linspace(-3, 3, 25, dtype=torch.float64)
    scores = {
        "reverse_kl": d,
        "kl": 1 - torch.exp(-d),
        "jsd": 0.5 * (math.log(2) + torch.nn.functional.logsigmoid(d)),
    }
    for name, score in scores.items():
        torch.testing.assert_close(f_divergence(name).link(d), score)
    for a in (0.3, 0.5, 0.7):
        member = f_divergence("alpha_divergence", alpha=a)
        torch.testing.assert_close(member.link(d), (1 - torch.exp(-a * d)) / a)
        torch.testing.assert_close(member.link_inverse(member.link(d)), d)
    plain = [
        name for name in F_NAMES if name not in ("alpha_divergence", "generalized_jsd", "skew_kl", "skew_reverse_kl")
    ]
    bounded = {name for name in plain if not f_divergence(name).keeps_support}
    assert bounded == {"neyman", "total_variation"}


@ALL
def test_pseudo_reward_gives_the_gradient_of_the_divergence(name, options, generator):
    """The theorem of f-DPG by enumeration: grad D(target||model) = -E_model [pseudo_reward grad log model]."""
    member = f_divergence(name, **options)
    log_target = pair(generator, scale=1.0)[0][0]
    logits = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    log_model = torch.log_softmax(logits, -1)
    reward = member.pseudo_reward(log_model - log_target)
    assert not reward.requires_grad
    surrogate = -(log_model.detach().exp() * reward * log_model).sum()
    (sampled,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(member(log_target, log_model), logits)
    torch.testing.assert_close(sampled, exact, rtol=1e-9, atol=1e-12)


@ALL
def test_penalties_are_unbiased_and_not_negative(name, options, generator):
    member = f_divergence(name, **options)
    log_p, log_q = pair(generator, scale=1.0)
    from_reference = member.penalty(log_q - log_p, samples_from="reference")
    from_model = member.penalty(log_q - log_p, samples_from="model")
    assert bool((from_reference >= -1e-15).all() and (from_model >= -1e-15).all())
    exact = member(log_p, log_q)
    torch.testing.assert_close((log_p.exp() * from_reference).sum(-1), exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((log_q.exp() * from_model).sum(-1), exact, rtol=1e-9, atol=1e-12)


def test_the_numbers_of_the_card_of_dph_rl():
    """Card 05, exact checks 1 and 2: D_f(model||reference); its JS is twice the JSD."""
    two = torch.tensor([2.0], dtype=torch.float64).log()
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    model = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    for name, options, factor, at_two, divergence in [
        ("jsd", {}, 2.0, 0.1698990368, 0.1811316999),
        ("alpha_divergence", {"alpha": 0.5}, 1.0, 0.3431457505, 0.3696523928),
        ("alpha_divergence", {"alpha": 0.2}, 1.0, 0.3681179588, 0.3827238869),
        ("alpha_divergence", {"alpha": 0.8}, 1.0, 0.3206352813, 0.3621552183),
        ("kl", {}, 1.0, 0.3068528194, 0.3600624406),
        ("reverse_kl", {}, 1.0, None, 0.3948162052),
    ]:
        member = f_divergence(name, **options).scaled(factor) if factor != 1.0 else f_divergence(name, **options)
        if at_two is not None:
            assert member.penalty(two, samples_from="reference").item() == pytest.approx(at_two, abs=1e-10)
        assert member(reference, model).item() == pytest.approx(divergence, abs=1e-10)


def test_errors():
    with pytest.raises(ConfigError, match="not an f-divergence"):
        f_divergence("renyi", alpha=2.0)
    with pytest.raises(ConfigError, match="did you mean 'neyman'"):
        f_divergence("neymann")
    with pytest.raises(ConfigError, match="positive finite"):
        f_divergence("kl").scaled(0.0)
    with pytest.raises(ConfigError, match="no inverse"):
        f_divergence("total_variation").link_inverse(torch.zeros(1))
    with pytest.raises(ConfigError, match="samples_from"):
        f_divergence("kl").penalty(torch.zeros(1), samples_from="teacher")
    for options in ({"alpha": -1.0}, {"alpha": 1.0}, {"alpha": float("nan")}):
        with pytest.raises(ConfigError, match=r"alpha in \[0, 1\)"):
            f_divergence("skew_kl", **options)
    with pytest.raises(ConfigError, match=r"beta in \[0, 1\]"):
        f_divergence("generalized_jsd", beta=-0.2, normalised=True)
