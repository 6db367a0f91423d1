"""Algorithms over tensors: against the interpreter on the same numbers, the Kalman filter, and exact limits."""

import math
import sys
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample import LinearGaussianModel, kalman_smoother
from kullback.sample.compose import (
    MH,
    RMSMC,
    SMC,
    Importance,
    Numbers,
    Prior,
    Rejection,
    Steps,
    bernoulli,
    factor,
    importance,
    mh,
    pmmh,
    program,
    rmsmc,
    run,
    sample,
    smc,
    smc2,
    yield_,
)
from kullback.sample.compose.steps import ancestor_index, begin, frozen, onward, replayed
from kullback.sample.compose.vectorised import _move

sys.path.insert(0, str(Path(__file__).parent))
from _programs import hmm_measure

OBSERVED = (1, 0, 1, 1)
DATA = torch.tensor([0.3, -0.4, 1.1, 0.8, -0.2, 0.5, 1.4, 0.9], dtype=torch.float64)


@program
def interpreted(observed=OBSERVED):
    """The hidden chain with checkpoints between its steps, returning its last state."""
    state = None
    for time, seen in enumerate(observed):
        if time:
            yield yield_()
        state = yield sample(bernoulli(F(1, 2) if state is None else F(3, 4) if state else F(1, 4)))
        yield factor(F(3, 4) if state == bool(seen) else F(1, 4))
    return state


def hidden_chain(observed=OBSERVED):
    """The same over tensors."""

    def weigh(state, time):
        return torch.where(state == bool(observed[time]), 0.75, 0.25).double().log()

    def start(u):
        state = u[..., 0] >= 0.5
        return state, weigh(state, 0)

    def step(state, u, time):
        state = u[..., 0] >= torch.where(state, 0.25, 0.75).double()
        return state, weigh(state, time)

    return Steps(start, step, len(observed), noise="uniform")


def linear(data=DATA, coefficient=0.8, noise=0.6):
    """A linear Gaussian chain with observations of unit variance."""
    stationary = noise / math.sqrt(1 - 0.8**2)

    def weigh(x, time):
        return -0.5 * (data[time] - x) ** 2 - 0.5 * math.log(2 * math.pi)

    def start(z):
        x = stationary * z[..., 0]
        return x, weigh(x, 0)

    def step(x, z, time):
        x = coefficient * x + noise * z[..., 0]
        return x, weigh(x, time)

    return Steps(start, step, len(data))


def kalman(data=DATA):
    return kalman_smoother(LinearGaussianModel.scalar(0.8, 0.6, 1.0), data.unsqueeze(1))


def within(values, expected, errors=6.0):
    """Whether independent values [R] have a mean."""
    return abs(values.mean().item() - expected) <= errors * values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("scheme", ["systematic", "multinomial", "stratified"])
@pytest.mark.parametrize("ess_threshold", [1.0, 0.7])
def test_the_same_numbers_give_the_same_particles_as_the_interpreter(scheme, ess_threshold, generator):
    for count in (1, 2, 7):
        u = torch.rand(2000, generator=generator, dtype=torch.float64)
        method = SMC(count, None, scheme, ess_threshold)
        one = run(method, interpreted(), generator=Numbers(u))
        other = run(method, hidden_chain(), generator=Numbers(u))
        assert one.values == other.values[0].tolist()
        torch.testing.assert_close(one.log_weights, other.log_weights[0], rtol=1e-12, atol=1e-12)


def test_the_evidence_is_unbiased(generator):
    exact = kalman().log_likelihood.item()
    for options in (
        {}, {"resampler": "multinomial"}, {"resampler": "stratified"}, {"resampler": "residual"},
        {"ess_threshold": 0.5}, {"num_steps": 0}, {"num_steps": 3},
    ):  # fmt: skip
        found = smc(linear(), 30, generator=generator, chains=600, **options)
        ratio = (found.log_evidence() - exact).exp()
        assert within(ratio, 1.0)
        mean = found.unnormalized_expect(lambda x: x) / math.exp(exact)
        assert within(mean, kalman().mean[0, -1, 0].item())
    moved = rmsmc(linear(), 20, 7, generator=generator, chains=400)
    assert within((moved.log_evidence() - exact).exp(), 1.0)
    plain = importance(linear(), 30, generator=generator, chains=600)
    assert within((plain.log_evidence() - exact).exp(), 1.0)
    # without the total that resampling carries, the estimate is far off
    last = smc(linear(), 30, generator=generator, chains=600)
    forgotten = (last.log_weights - last.log_weights.logsumexp(1, keepdim=True)).exp().sum(1)
    assert not within((forgotten.log() - exact).exp() + 1e-9 * torch.rand(600, generator=generator), 1.0)


def test_local_moves_are_valid_and_leave_the_past_as_it_is(generator):
    exact = kalman()
    for options in ({}, {"sites": "all", "drift": 0.5}):
        found = rmsmc(linear(), 30, 7, mh_steps=2, local=True, generator=generator, chains=500, **options)
        assert within((found.log_evidence() - exact.log_likelihood).exp(), 1.0)
        mean = found.unnormalized_expect(lambda x: x) / exact.log_likelihood.exp()
        assert within(mean, exact.mean[0, -1, 0].item())
    mass = float(sum(hmm_measure(OBSERVED).values()))
    local = rmsmc(hidden_chain(), 10, 3, local=True, generator=generator, chains=800)
    assert within(local.log_evidence().exp(), mass)
    now = begin(hidden_chain(), (3, 50), Numbers(generator), keep=True)
    once = frozen(now)
    assert (once.noise.shape[2], once.since, once.log_density.abs().max().item()) == (0, 1, 0.0)
    later = onward(hidden_chain(), once, Numbers(generator))
    state, density = replayed(hidden_chain(), later.noise, later.since, later.fixed)
    assert torch.equal(state, later.state)
    assert torch.equal(density, later.log_density)
    assert torch.equal(later.fixed, now.state)
    picked = later.reindexed(torch.zeros(3, 50, dtype=torch.int64), later.log_weights)  # the past goes along
    assert bool((picked.fixed == now.state[:, :1]).all())


def test_local_moves_of_the_newest_choice_have_its_conditional_law():
    """From one past of two, many moves of what came after have the posterior given that past, and no other."""
    model, generator = hidden_chain(), torch.Generator().manual_seed(2)
    now = frozen(begin(model, (1, 4000), Numbers(generator), keep=True))
    now = onward(model, now, Numbers(generator))
    for _ in range(12):
        now, _ = _move(RMSMC(1, 1), model, now, Numbers(generator))
    for past, stays in ((True, 0.75), (False, 0.25)):
        newest = now.state[now.fixed == past].double()
        one, other = stays * 0.25, (1 - stays) * 0.75  # OBSERVED[1] is 0
        share = one / (one + other)
        assert abs(newest.mean().item() - share) < 6 * math.sqrt(share * (1 - share) / len(newest))
        whole = 0.75 * one / (0.75 * one + 0.25 * other)
        assert abs(newest.mean().item() - whole) > 6 * math.sqrt(whole * (1 - whole) / len(newest))  # another answer


def test_exact_masses_of_a_hidden_chain(generator):
    mass = float(sum(hmm_measure(OBSERVED).values()))
    found = smc(hidden_chain(), 10, generator=generator, chains=800)
    assert within(found.log_evidence().exp(), mass)
    ones = float(sum(w for path, w in hmm_measure(OBSERVED).items() if path[-1]))
    assert within(found.unnormalized_expect(lambda state: state.double()), ones)


def test_one_particle_is_a_forward_simulation():
    found = smc(linear(), 1, generator=torch.Generator().manual_seed(3))
    source, total, x = torch.Generator().manual_seed(3), 0.0, None
    for time, y in enumerate(DATA.tolist()):
        if time:
            torch.rand(1, 1, generator=source, dtype=torch.float64)  # of resampling, which changes nothing
        z = torch.randn(1, 1, 1, generator=source, dtype=torch.float64).item()
        x = z if x is None else 0.8 * x + 0.6 * z
        total += -0.5 * (y - x) ** 2 - 0.5 * math.log(2 * math.pi)
    assert found.values.item() == pytest.approx(x)
    assert found.log_evidence().item() == pytest.approx(total)


def test_many_particles_find_the_filtering_mean(generator):
    exact = kalman().mean[0, -1, 0].item()
    found = smc(linear(), 40_000, generator=generator)
    assert found.expect(lambda x: x).item() == pytest.approx(exact, abs=0.03)
    moved = rmsmc(linear(), 4000, 7, mh_steps=2, sites="all", drift=0.5, generator=generator)
    assert moved.expect(lambda x: x).item() == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize(
    "options", [{}, {"sites": "all", "drift": 0.5}, {"sites": [(0, 1, 2, 3), (4, 5, 6, 7)]}, {"drift": 1.0}]
)
def test_chains_of_traces_have_the_posterior(options, generator):
    exact = kalman()
    chain = mh(linear(), 600, generator=generator, chains=60, **options)
    assert chain.values.shape == chain.log_density.shape == (600, 60)
    assert within(chain.values[150:].mean(0), exact.mean[0, -1, 0].item())
    spread = (chain.values[150:] - exact.mean[0, -1, 0]).square().mean(0)
    assert within(spread, exact.covariance[0, -1, 0, 0].item())
    uniform = mh(hidden_chain(), 250, generator=generator, chains=100, **options if "sites" not in options else {})
    mass = hmm_measure(OBSERVED)
    share = float(sum(w for path, w in mass.items() if path[-1]) / sum(mass.values()))
    assert within(uniform.values[50:].double().mean(0), share)


@pytest.mark.parametrize("options", [{}, {"sites": "all", "drift": 0.5}])
def test_a_chain_goes_on_from_its_trace(options):
    source = torch.Generator().manual_seed(5)
    whole = mh(linear(), 30, generator=source, chains=3, **options)
    source = torch.Generator().manual_seed(5)
    first = mh(linear(), 12, generator=source, chains=3, **options)
    then = mh(linear(), 18, generator=source, chains=3, init=first.trace, **options)
    assert torch.equal(torch.cat([first.values, then.values]), whole.values)
    assert torch.equal(then.trace, whole.trace)
    one = mh(linear(), 2, generator=source, chains=3, init=whole.trace[0])
    assert one.trace.shape == (3, len(DATA), 1)
    numbers = Numbers(torch.Generator().manual_seed(6))
    straight = run(MH(30), interpreted(), generator=numbers)
    numbers = Numbers(torch.Generator().manual_seed(6))
    begun = run(MH(12), interpreted(), generator=numbers)
    rest = mh(interpreted(), 18, init=begun.trace, generator=numbers)
    assert begun.values + rest.values == straight.values
    assert rest.trace == straight.trace != begun.trace


def coefficients():
    return Prior(lambda z: 0.9 * torch.tanh(z[..., 0]))


def of_coefficient(theta):
    return linear(coefficient=theta)


def exact_coefficient():
    """Posterior mean of the coefficient and the evidence, by a Kalman filter at each of many quantiles."""
    z = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    theta = 0.9 * torch.tanh(z)
    ones = torch.ones(400, 1, 1, dtype=torch.float64)
    first = torch.full((400, 1, 1), 0.36 / (1 - 0.64), dtype=torch.float64)
    model = LinearGaussianModel(theta.view(400, 1, 1), 0.36 * ones, ones[:1], ones[:1], ones[..., 0] * 0.0, first)
    logs = kalman_smoother(model, DATA.unsqueeze(1)).log_likelihood
    return (logs.softmax(0) * theta).sum().item(), (logs.logsumexp(0) - math.log(400)).item()


def test_parameters_have_their_posterior(generator):
    mean, evidence = exact_coefficient()
    chain = pmmh(coefficients(), of_coefficient, 30, 150, generator=generator, chains=60)
    assert chain.values[0].shape == (150, 60)
    assert within(chain.values[0][50:].mean(0), mean)
    found = [smc2(coefficients(), of_coefficient, 40, 20, 7, generator=generator) for _ in range(25)]
    assert found[0].values[0].shape == found[0].log_weights.shape == (1, 40)
    masses = torch.stack([(one.log_evidence()[0] - evidence).exp() for one in found])
    assert within(masses, 1.0)
    weighted = torch.stack([one.unnormalized_expect(lambda v: v[0])[0] for one in found]) / math.exp(evidence)
    assert within(weighted, mean)


def test_impossible_observations_leave_no_nan(generator):
    impossible = Steps(
        lambda z: (z[..., 0], torch.full(z.shape[:-1], -math.inf, dtype=torch.float64)),
        lambda x, z, time: (x, torch.zeros_like(x)),
        3,
    )
    for options in ({}, {"ess_threshold": 0.5}, {"resampler": "multinomial"}, {"resampler": "residual"}):
        found = smc(impossible, 5, generator=generator, chains=2, **options)
        assert found.log_evidence().tolist() == [-math.inf] * 2
        assert not found.log_weights.isnan().any()
    dead = torch.full((1, 4), -math.inf, dtype=torch.float64)
    assert ancestor_index(dead, "systematic", Numbers(generator)).tolist() == [[0, 1, 2, 3]]
    chain = mh(impossible, 3, generator=generator)
    assert bool((chain.log_density == -math.inf).all())


@pytest.mark.parametrize("scheme", ["multinomial", "systematic", "stratified", "residual"])
def test_ancestors_are_as_many_as_they_should_be(scheme, generator):
    weights = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3], dtype=torch.float64)
    logs = weights.log().expand(4000, 5).contiguous()
    index = ancestor_index(logs, scheme, Numbers(generator))
    counts = torch.nn.functional.one_hot(index, 5).sum(1).double()
    assert counts[:, 2].max() == 0
    error = counts.std(0) / math.sqrt(4000) + 1e-9
    assert bool(((counts.mean(0) - 5 * weights).abs() <= 6 * error).all())
    if scheme in ("systematic", "residual"):
        assert bool((counts >= (5 * weights + 1e-9).floor()).all())


def test_many_systematic_ancestors_are_those_of_a_search(generator):
    logs = torch.randn(3, 2000, generator=generator, dtype=torch.float64)
    u = torch.rand(3, 1, generator=generator, dtype=torch.float64)
    ends = logs.softmax(1).cumsum(1) * 2000
    expected = torch.searchsorted(ends, u + torch.arange(2000), right=True).clamp(max=1999)
    assert torch.equal(ancestor_index(logs, "systematic", Numbers(u)), expected)
    dead = torch.cat([logs[:1], torch.full((1, 2000), -math.inf, dtype=torch.float64), logs[2:]])
    index = ancestor_index(dead, "systematic", Numbers(u))
    assert torch.equal(index[1], torch.arange(2000))
    assert torch.equal(index[0], expected[0])


def test_the_same_generator_gives_the_same_bits():
    before = torch.random.get_rng_state()
    runs = [rmsmc(linear(), 20, 7, generator=torch.Generator().manual_seed(s), chains=2) for s in (1, 1, 2)]
    assert torch.equal(runs[0].values, runs[1].values)
    assert not torch.equal(runs[0].values, runs[2].values)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tensors_are_made_on_the_device_of_the_numbers(generator):
    """Where the default is another device, one without memory, nothing of it comes in."""
    model, prior = linear(), coefficients()
    with torch.device("meta"):
        for scheme in ("systematic", "multinomial", "stratified", "residual"):
            found = smc(model, 20, resampler=scheme, ess_threshold=0.9, generator=generator, chains=2)
            assert found.log_weights.device.type == "cpu"
        smc(model, 20, generator=generator)
        smc(model, 4000, generator=generator)
        for sites in ("one", "all", [(0,), (0, 0)]):
            rmsmc(model, 10, 2, sites=sites, local=True, generator=generator)
            chain = mh(model, 3, sites=sites, drift=0.5, generator=generator, chains=2)
            assert {part.device.type for part in (chain.values, chain.accepted, chain.trace)} == {"cpu"}
        mh(model, 2, init=chain.trace, generator=generator, chains=2)
        pmmh(prior, of_coefficient, 5, 2, generator=generator, chains=2)
        smc2(prior, of_coefficient, 4, 3, 2, generator=generator)
        with pytest.raises(RuntimeError):
            (chain.accepted + torch.zeros(2)).tolist()  # which is how it would be noticed


def test_states_may_be_nested(generator):
    def start(z):
        return {"x": z[..., 0], "path": (z[..., :1],)}, torch.zeros(z.shape[:-1], dtype=torch.float64)

    def step(state, z, time):
        path = torch.cat([state["path"][0], z], dim=-1)
        return {"x": z[..., 0], "path": (path,)}, -(z[..., 0] ** 2)

    model = Steps(start, step, 3)
    found = smc(model, 50, generator=generator, chains=2)
    assert torch.equal(found.values["path"][0][..., -1], found.values["x"])
    assert found.values["path"][0].shape == (2, 50, 3)
    assert found.expect(lambda state: state["path"][0]).shape == (2, 3)
    moved = rmsmc(model, 50, 2, generator=generator)
    assert torch.equal(moved.values["path"][0][..., -1], moved.values["x"])
    assert mh(model, 4, generator=generator, chains=3).values["path"][0].shape == (4, 3, 3)


def test_bad_input(generator):
    good = linear()
    short = Steps(good.start, lambda x, z, time: (x, torch.zeros(3).double() if time == 2 else torch.zeros_like(x)), 4)
    broken = Steps(good.start, lambda x, z, time: (x, x * math.nan if time == 1 else x), 4)
    lists = Steps(lambda z: ([z[..., 0]], torch.zeros(z.shape[:-1]).double()), good.step, 3)
    for call, error, message in [
        (lambda: smc(short, 5, generator=generator), ShapeError, "step 2"),
        (lambda: smc(broken, 5, generator=generator), DataError, "step 1"),
        (lambda: smc(lists, 5, generator=generator), ShapeError, "tuples or dictionaries"),
        (lambda: Steps(good.start, good.step, 0), ConfigError, "length"),
        (lambda: Steps(good.start, good.step, 1, noise="gamma"), ConfigError, "noise"),
        (lambda: smc(good, 5, generator=generator, chains=0), ConfigError, "chains"),
        (lambda: smc(good, 5, generator=Numbers([0.5] * 3)), DataError, "used up"),
        (lambda: smc(Steps(good.start, broken.step, 2), 5, generator=generator), DataError, "step 1"),
        (lambda: importance(broken, 5, generator=generator), DataError, "step 1"),
        (lambda: replayed(good, torch.zeros(1, 2, 0, 1).double(), 3), ConfigError, "frozen"),
        (lambda: run(Rejection(1), good, generator=generator), ConfigError, "does not run over tensors"),
        (lambda: run(Importance(2), coefficients(), generator=generator), ConfigError, "takes a Steps"),
        (lambda: pmmh(coefficients(), lambda theta: 3, 2, 2, generator=generator), ConfigError, "Steps program"),
        (lambda: run(MH(1, accept=max), good, generator=generator), ConfigError, "one by one"),
        (lambda: mh(good, 0, generator=generator), ConfigError, "num_steps"),
        (lambda: mh(good, 2, init=torch.zeros(3, 1), generator=generator), ShapeError, "init"),
        (lambda: run(MH(1, init=(0.5,)), interpreted(), layer="enum", grid=4), ConfigError, "leave it out"),
        (lambda: run(SMC(2), good, layer="enum"), ConfigError, "others programs"),
        (lambda: ancestor_index(torch.zeros(1, 2), "magic", Numbers(generator)), ConfigError, "magic"),
    ]:
        with pytest.raises(error, match=message):
            call()
