"""Entropic optimal transport against closed forms, its limits, its naive twin, POT and geomloss."""

import math
from functools import partial

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.divergences import sinkhorn
from kullback.divergences.pairwise import pairwise_cost
from kullback.divergences.sinkhorn import sinkhorn_cost, sinkhorn_divergence, sinkhorn_plan

F64 = torch.float64
SQUARE = torch.tensor([[0.0, 1.0], [1.0, 0.2]], dtype=F64)
MODES = ("sharp", "entropic", "debiased")


def rows(*shape, generator, dtype=F64):
    """Random distributions."""
    return torch.randn(*shape, generator=generator, dtype=dtype).softmax(-1)


def cost_of_clouds(x, y, **options):
    """sinkhorn_cost between two clouds, with the costs within them where the mode needs them."""
    own = (pairwise_cost(x, x), pairwise_cost(y, y)) if options.get("mode") == "debiased" else None
    return sinkhorn_cost(pairwise_cost(x, y), self_costs=own, **options)


def close(ours, expected, atol):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


# --- the optimum: closed form, marginals, invariance; and wrong solvers that the same check rejects


def two_by_two(eps):
    """The plan of unit mass for SQUARE: 2 P_11 = 1 / (1 + exp((C_11 + C_22 - C_12 - C_21) / (2 eps)))."""
    diagonal = 1 / (1 + math.exp((0.2 - 2.0) / (2 * eps)))
    return torch.tensor([[diagonal, 1 - diagonal], [1 - diagonal, diagonal]], dtype=F64) / 2


def check_solver(solve):
    """A solver (cost, log_a, log_b, eps) -> plan finds the optimum, has the marginals, and survives a large cost."""
    half = torch.full((2,), -math.log(2.0), dtype=F64)
    close(solve(SQUARE, half, half, 0.5), two_by_two(0.5), 1e-9)
    close(solve(SQUARE * 0.01 + 5.0, half, half, 0.005), two_by_two(0.5), 1e-9)
    log_a = torch.tensor([0.2, 0.8], dtype=F64).log()
    log_b = torch.tensor([0.7, 0.3], dtype=F64).log()
    plan = solve(SQUARE, log_a, log_b, 0.5)
    close(plan.sum(-1), log_a.exp(), 1e-9)
    close(plan.sum(-2), log_b.exp(), 1e-9)


def kernel_domain(cost, log_a, log_b, eps, *, steps=500, one_sided=False, weights=True, mass=1.0, inverse=False):
    """Sinkhorn as it is often written; every option but weights=True makes it wrong, and exp(-C / eps) underflows."""
    a, b = (log_a.exp(), log_b.exp()) if weights else (torch.full_like(w, 1 / len(w)) for w in (log_a, log_b))
    plan = torch.exp(-cost * eps if inverse else -cost / eps)
    for _ in range(steps):
        plan = plan * (b / plan.sum(0))
        plan = plan if one_sided else plan * (a / plan.sum(1)).unsqueeze(1)
    return mass * plan


def solve(cost, log_a, log_b, eps):
    return sinkhorn_plan(cost, log_a, log_b, eps=eps, n_iters=500).plan


def test_the_solver_is_right():
    check_solver(solve)
    check_solver(lambda cost, log_a, log_b, eps: solve(cost.mT, log_b, log_a, eps).mT)


@pytest.mark.parametrize(
    "wrong",
    [
        kernel_domain,
        partial(kernel_domain, mass=2.0),
        partial(kernel_domain, one_sided=True),
        partial(kernel_domain, weights=False),
        partial(kernel_domain, inverse=True),
        lambda cost, log_a, log_b, eps: solve(cost, log_b, log_a, eps),
        lambda cost, log_a, log_b, eps: solve(cost.mT + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), log_a, log_b, eps),
    ],
)
def test_the_check_rejects_wrong_solvers(wrong):
    with pytest.raises(AssertionError):
        check_solver(wrong)


def test_the_numbers_of_the_card():
    assert 2 * two_by_two(0.5)[0, 0].item() == pytest.approx(0.8581489351, abs=1e-10)
    assert 2 * sinkhorn_cost(SQUARE, eps=0.5, n_iters=200).item() == pytest.approx(0.4553319168, abs=1e-10)
    by_rows = sinkhorn_plan(SQUARE, eps=0.5, n_iters=200, mass="rows").plan
    close(by_rows, 2 * two_by_two(0.5), 1e-12)


def test_the_error_tells_that_twenty_iterations_are_too_few():
    plan, *_, error = sinkhorn_plan(SQUARE, eps=0.1)
    close(plan.sum(-2), torch.full((2,), 0.5, dtype=F64), 1e-15)
    close(error, (plan.sum(-1) - 0.5).abs().sum(), 1e-15)
    assert 1e-4 < 2 * (plan.sum(-1) - 0.5).abs().max().item() < 1e-3
    assert sinkhorn_plan(SQUARE, eps=0.1, n_iters=30_000, tol=1e-6).error.item() <= 1e-6


# --- limits


def test_small_eps_is_the_assignment_and_large_eps_the_mean(generator):
    cost = torch.rand(3, 8, 8, generator=generator, dtype=F64)
    exact = torch.stack([each[linear_sum_assignment(each.numpy())].mean() for each in cost])
    close(sinkhorn_cost(cost, eps=1e-4, n_iters=2000, scaling=0.7), exact, 1e-4)
    for mode in ("sharp", "entropic"):
        close(sinkhorn_cost(cost, eps=1e6, mode=mode), cost.mean((-2, -1)), 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_zero_one_cost_tends_to_total_variation(mode, generator):
    p, q = rows(6, 7, generator=generator), rows(6, 7, generator=generator)
    for eps in (0.05, 0.005):
        value = sinkhorn_divergence(p.log(), q.log(), eps=eps, n_iters=2000, scaling=0.9, mode=mode)
        close(value, 0.5 * (p - q).abs().sum(-1), eps * math.log(7))  # the entropy of a plan is log V at most


def test_sharp_is_below_entropic_and_above_the_optimum(generator):
    cost = torch.rand(8, 8, generator=generator, dtype=F64)
    sharp, entropic = (sinkhorn_cost(cost, eps=0.1, n_iters=500, mode=mode).item() for mode in ("sharp", "entropic"))
    assert cost[linear_sum_assignment(cost.numpy())].mean().item() < sharp < entropic


def test_entropic_is_the_primal_value_once_converged(generator):
    cost, log_a, log_b = problem((), 6, 4, generator)
    plan = sinkhorn_plan(cost, log_a, log_b, eps=0.2, n_iters=1000).plan
    relative = (plan.log() - log_a.unsqueeze(-1) - log_b).mul(plan).sum()
    value = sinkhorn_cost(cost, log_a, log_b, eps=0.2, n_iters=1000, mode="entropic")
    close(value, (plan * cost).sum() + 0.2 * relative, 1e-12)
    early = sinkhorn_cost(cost, log_a, log_b, eps=0.2, n_iters=1, mode="entropic")
    assert early < value  # a lower bound


# --- the fast path is its naive twin


def problem(lead, m, n, generator, dtype=F64):
    cost = 2 * torch.rand(*lead, m, n, generator=generator, dtype=dtype)
    return cost, rows(*lead, m, generator=generator, dtype=dtype).log(), rows(n, generator=generator, dtype=dtype).log()


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_potentials_equal_those_of_the_log_domain(eps, dtype, scaling, generator):
    for lead, m, n in [((), 5, 7), ((2, 3), 6, 6), ((4,), 1, 3), ((), 33, 20)]:
        cost, log_a, log_b = problem(lead, m, n, generator, dtype)
        options = sinkhorn._Options(eps, 23, None, scaling)
        scaled, _ = sinkhorn._solve(cost, log_a, log_b, options)
        fast_f, fast_g = scaled.potentials(eps)
        f, g = sinkhorn._unrolled(cost, log_a, log_b, options)
        resolution = 200 * torch.finfo(dtype).eps
        close(fast_f, f, resolution)
        close(fast_g, g, resolution)
        plan = sinkhorn._plan(cost, log_a, log_b, f, g, eps)
        close(scaled.plan(), plan, 10 * resolution + 10 * torch.finfo(dtype).eps / eps)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_weights_of_zero_and_near_zero(dtype):
    log_p = torch.tensor([0.0, -math.inf, -1e4, -math.inf], dtype=dtype)
    log_q = torch.tensor([-math.inf, 0.0, -1e4, -math.inf], dtype=dtype)
    cost = torch.tensor([[abs(i - j) * 100.0 for j in range(4)] for i in range(4)], dtype=dtype)
    for mode in MODES:
        value = sinkhorn_divergence(log_p, log_q, cost=cost, eps=0.1, mode=mode)
        assert value.item() == pytest.approx(100.0, rel=1e-5)
    logits = log_p.clamp(min=-1e4).requires_grad_()
    sinkhorn_divergence(logits.log_softmax(-1), log_q, cost=cost, eps=0.1).backward()
    assert logits.grad.isfinite().all()


def test_a_start_goes_on_where_the_last_plan_ended(generator):
    cost, log_a, log_b = problem((3,), 8, 8, generator)
    first = sinkhorn_plan(cost, log_a, log_b, eps=0.02, n_iters=30)
    second = sinkhorn_plan(cost, log_a, log_b, eps=0.02, n_iters=30, start=first.g)
    whole = sinkhorn_plan(cost, log_a, log_b, eps=0.02, n_iters=60)
    close(second.plan, whole.plan, 1e-12)
    close(second.f, whole.f, 1e-12)
    assert (second.error < first.error).all()


def test_scaling_helps_small_eps(generator):
    cost = torch.rand(30, 30, generator=generator, dtype=F64)
    plain, scaled = (sinkhorn_plan(cost, eps=1e-3, n_iters=50, scaling=s).error.item() for s in (None, 0.7))
    assert scaled < plain / 2


def test_tol_stops_early_and_for_every_problem(generator):
    cost = torch.rand(4, 6, 6, generator=generator, dtype=F64)
    assert (sinkhorn_plan(cost, eps=0.05, n_iters=10**6, tol=1e-8).error <= 1e-8).all()
    for gradient in ("envelope", "unroll"):
        loose = sinkhorn_cost(cost, eps=0.05, n_iters=10**6, tol=1e-8, gradient=gradient)
        close(loose, sinkhorn_cost(cost, eps=0.05, n_iters=3000), 1e-7)


# --- laws


def test_permutation_transposition_shift_and_unit(generator):
    cost = torch.rand(7, 7, generator=generator, dtype=F64)
    order = torch.randperm(7, generator=generator)
    for mode in ("sharp", "entropic"):
        value = sinkhorn_cost(cost, eps=0.1, n_iters=500, mode=mode)
        close(sinkhorn_cost(cost[order], eps=0.1, n_iters=500, mode=mode), value, 1e-12)
        close(sinkhorn_cost(cost.mT, eps=0.1, n_iters=500, mode=mode), value, 1e-12)
        close(sinkhorn_cost(cost + 3.0, eps=0.1, n_iters=500, mode=mode), value + 3.0, 1e-12)
        close(sinkhorn_cost(100 * cost, eps=10.0, n_iters=500, mode=mode), 100 * value, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_parts_and_a_shared_cost_is_repeated(mode, generator):
    p, q = rows(5, 4, generator=generator).log(), rows(5, 4, generator=generator).log()
    cost = pairwise_cost(torch.arange(4, dtype=F64).unsqueeze(-1), torch.arange(4, dtype=F64).unsqueeze(-1))
    whole = sinkhorn_divergence(p, q, cost=cost, mode=mode)
    close(sinkhorn_divergence(p, q, cost=cost.expand(5, 4, 4), mode=mode), whole, 1e-14)
    close(torch.stack([sinkhorn_divergence(p[k], q[k], cost=cost, mode=mode) for k in range(5)]), whole, 1e-14)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([0.03, 0.3, 3.0]))
def test_debiased_is_positive_and_zero_for_equal_clouds_alone(seed, size, eps):
    generator = torch.Generator().manual_seed(seed)
    x, y = rows(size, 4, generator=generator), rows(size, 4, generator=generator)
    debiased = partial(cost_of_clouds, eps=eps, n_iters=3000, tol=1e-11, mode="debiased")
    assert debiased(x, y).item() > 1e-9
    assert abs(debiased(x, x[torch.randperm(size, generator=generator)]).item()) < 1e-9
    p, q = rows(size, generator=generator).log(), rows(size, generator=generator).log()
    assert sinkhorn_divergence(p, q, eps=eps, n_iters=3000, tol=1e-11).item() > 1e-9
    assert sinkhorn_divergence(p, p, eps=eps).item() == 0.0


@pytest.mark.parametrize("mode", ["sharp", "entropic"])
def test_the_other_modes_are_not_zero_for_equal_clouds(mode, generator):
    """The check of the debiased mode bites."""
    x = rows(6, 4, generator=generator)
    assert cost_of_clouds(x, x, eps=0.3, n_iters=500, mode=mode).item() > 1e-3


# --- gradients


def finite_difference(function, x, step=1e-5):
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        bump = torch.zeros_like(x).flatten()
        bump[index] = step
        up, down = function(x + bump.reshape(x.shape)), function(x - bump.reshape(x.shape))
        gradient.flatten()[index] = (up - down) / (2 * step)
    return gradient


def by_cost(cost, **options):
    cost = cost.clone().requires_grad_()
    return torch.autograd.grad(sinkhorn_cost(cost, **options), cost)[0]


@pytest.mark.parametrize("iterations", [3, 500])
def test_the_entropic_gradient_is_the_plan(iterations, generator):
    cost = torch.rand(5, 5, generator=generator, dtype=F64)
    plan = sinkhorn_plan(cost, eps=0.1, n_iters=iterations).plan
    close(by_cost(cost, eps=0.1, n_iters=iterations, mode="entropic"), plan, 1e-14)
    if iterations == 500:
        close(finite_difference(partial(sinkhorn_cost, eps=0.1, n_iters=500, mode="entropic"), cost), plan, 1e-8)


def check_sharp_gradient(gradient, generator):
    cost = torch.rand(5, 5, generator=generator, dtype=F64)
    close(gradient(cost), finite_difference(partial(sinkhorn_cost, eps=0.1, n_iters=500), cost), 1e-7)


def test_the_sharp_gradient_is_not_the_plan_alone(generator):
    check_sharp_gradient(partial(by_cost, eps=0.1, n_iters=500), generator)
    for wrong in (
        lambda cost: sinkhorn_plan(cost, eps=0.1, n_iters=500).plan,
        partial(by_cost, eps=0.1, n_iters=500, mode="entropic"),
        lambda cost: 2 * by_cost(cost, eps=0.1, n_iters=500),
    ):
        with pytest.raises(AssertionError):
            check_sharp_gradient(wrong, generator)


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_by_points_and_by_weights(mode, gradient, generator):
    x, y = (torch.randn(2, 3, 3, generator=generator, dtype=F64).requires_grad_() for _ in range(2))
    options = {"eps": 1.0, "n_iters": 40, "mode": mode, "gradient": gradient}
    assert torch.autograd.gradcheck(lambda x, y: cost_of_clouds(x.softmax(-1), y.softmax(-1), **options), (x, y))
    ground = pairwise_cost(x[0].detach(), x[0].detach(), "l2")
    assert torch.autograd.gradcheck(
        lambda x, y: sinkhorn_divergence(x.log_softmax(-1), y.log_softmax(-1), cost=ground, **options), (x, y)
    )


@pytest.mark.parametrize("mode", ["sharp", "entropic"])
def test_a_shared_cost_has_the_gradient_of_all_its_users(mode, generator):
    p, q = rows(3, 4, generator=generator).log(), rows(3, 4, generator=generator).log()
    cost = torch.rand(4, 4, generator=generator, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda cost: sinkhorn_divergence(p, q, cost=cost, eps=0.3, n_iters=300, mode=mode), cost
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_envelope_saves_no_iterations(mode, generator):
    x, y = rows(32, 4, generator=generator), rows(32, 4, generator=generator).requires_grad_()
    held = {}
    for gradient in ("envelope", "unroll"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            cost_of_clouds(x, y, eps=0.3, n_iters=40, mode=mode, gradient=gradient)
        held[gradient] = sum({t.data_ptr(): t.numel() for t in saved}.values()) / 32**2
    assert held["envelope"] < 8
    assert held["unroll"] > 40


def test_only_one_derivative_in_closed_form(generator):
    cost = torch.rand(4, 4, generator=generator, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match='take "unroll"'):
        torch.autograd.grad(sinkhorn_cost(cost, eps=0.1), cost, create_graph=True)
    value = sinkhorn_cost(cost, eps=0.1, gradient="unroll")
    (gradient,) = torch.autograd.grad(value, cost, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), cost)[0].isfinite().all()


# --- precision and peers


def test_halves_and_autocast_compute_in_float32(generator):
    x, y = (torch.randn(40, 8, generator=generator).softmax(-1).requires_grad_() for _ in range(2))
    exact = cost_of_clouds(x, y, eps=0.1)
    (gradient,) = torch.autograd.grad(exact, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cost_of_clouds(x, y, eps=0.1)
        (gradient_inside,) = torch.autograd.grad(inside, x)
    close(inside, exact, 0)
    close(gradient_inside, gradient, 0)
    cost = pairwise_cost(x, y).detach()
    halves = sinkhorn_cost(cost.bfloat16(), eps=0.1)
    assert halves.dtype == torch.float32
    close(halves, sinkhorn_cost(cost.bfloat16().float(), eps=0.1), 0)


@pytest.mark.parametrize("eps", [1.0, 0.1])
def test_equals_pot(eps, generator):
    cost = pairwise_cost(rows(32, 5, generator=generator), rows(24, 5, generator=generator))
    log_a, log_b = rows(32, generator=generator).log(), rows(24, generator=generator).log()
    expected = ot.sinkhorn(
        log_a.exp().numpy(), log_b.exp().numpy(), cost.numpy(), eps, numItermax=10_000, stopThr=1e-13
    )
    ours = sinkhorn_plan(cost, log_a, log_b, eps=eps, n_iters=10_000, tol=1e-13)
    close(ours.plan, torch.from_numpy(expected), 1e-8)
    value = sinkhorn_cost(cost, log_a, log_b, eps=eps, n_iters=10_000, tol=1e-13)
    close(value, (torch.from_numpy(expected) * cost).sum(), 1e-8)


@pytest.mark.parametrize(("speed", "atol"), [(0.5, 2e-3), (0.99, 1e-4)])
def test_equals_geomloss(speed, atol, generator):
    geomloss = pytest.importorskip("geomloss")
    x, y = rows(32, 5, generator=generator), rows(24, 5, generator=generator)
    peer = geomloss.SamplesLoss("sinkhorn", p=1, blur=0.1, cost=pairwise_cost, scaling=speed, backend="tensorized")
    ours = cost_of_clouds(x, y, eps=0.1, n_iters=10_000, tol=1e-10, mode="debiased")
    close(ours, peer(x, y), atol)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": -1.0}, "eps must be positive"),
        ({"eps": math.nan}, "eps must be positive"),
        ({"eps": 1.0, "n_iters": 0}, "n_iters must be a whole number"),
        ({"eps": 1.0, "n_iters": 20.0}, "n_iters must be a whole number"),
        ({"eps": 1.0, "tol": 0.0}, "tol must be positive"),
        ({"eps": 1.0, "scaling": 1.0}, "scaling must lie in"),
        ({"eps": 1.0, "mode": "blurred"}, "mode is"),
        ({"eps": 1.0, "gradient": "implicit"}, "gradient is"),
        ({"eps": 1.0, "mode": "debiased"}, "go with mode"),
        ({"eps": 1.0, "self_costs": (SQUARE, SQUARE)}, "go with mode"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        sinkhorn_cost(SQUARE, **options)


def test_plan_options_that_would_do_nothing():
    half = torch.full((2,), 0.5).log()
    with pytest.raises(ConfigError, match="for uniform weights"):
        sinkhorn_plan(SQUARE, half, half, eps=1.0, mass="rows")
    with pytest.raises(ConfigError, match="mass is"):
        sinkhorn_plan(SQUARE, eps=1.0, mass="b")
    with pytest.raises(ConfigError, match="exclude each other"):
        sinkhorn_plan(SQUARE, eps=1.0, start=torch.zeros(2, dtype=F64), scaling=0.5)


def test_shapes_and_numbers_that_do_not_fit():
    with pytest.raises(ShapeError, match="at least one row"):
        sinkhorn_plan(torch.zeros(3), eps=1.0)
    with pytest.raises(ShapeError, match="give 2 log-weights"):
        sinkhorn_plan(SQUARE, torch.zeros(3), eps=1.0)
    with pytest.raises(ShapeError, match="leading dimensions match"):
        sinkhorn_plan(torch.zeros(4, 2, 2), torch.zeros(3, 2), eps=1.0)
    with pytest.raises(ShapeError, match="give a g of 2 entries"):
        sinkhorn_plan(SQUARE, eps=1.0, start=torch.zeros(3))
    with pytest.raises(ShapeError, match="3 outcomes and log_q has 4"):
        sinkhorn_divergence(torch.zeros(3), torch.zeros(4))
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="NaN or infinite"):
            sinkhorn_cost(SQUARE + bad, eps=1.0)
    with pytest.raises(DataError, match="log_b has NaN"):
        sinkhorn_cost(SQUARE, None, torch.tensor([0.0, math.nan]), eps=1.0)
