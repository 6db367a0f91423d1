"""Traces, parameters, and runs that are drawn: their laws against the exact measure."""

import math
import sys
from fractions import Fraction as F
from pathlib import Path

import pytest
import torch

from kullback.sample.compose import (
    MH,
    PMMH,
    RMSMC,
    SMC,
    SMC2,
    Enum,
    Importance,
    bernoulli,
    evidence,
    factor,
    meaning,
    program,
    propose,
    run,
    sample,
    validate,
)  # fmt: skip
from kullback.sample.compose.programs import Recorded, Ret, Trace
from kullback.sample.compose.transformations import acceptance

sys.path.insert(0, str(Path(__file__).parent))
from _programs import (
    branching,
    hmm,
    hmm_measure,
)

BASE = Enum(6)


def parameters():
    return sample(bernoulli(F(1, 2)))


def given_model(stays):
    return hmm((1, 0), F(3, 4) if stays else F(1, 4))


def joint_measure():
    parts = {}
    for stays in (False, True):
        for path, weight in hmm_measure((1, 0), F(3, 4) if stays else F(1, 4)).items():
            parts[(stays, path)] = weight / 2
    return parts


@pytest.mark.parametrize(
    "method",
    [
        PMMH(given_model, 2, 2), PMMH(given_model, 2, None, 1, "multinomial"), PMMH(given_model, 1, 1, 2, sites="all"),
        SMC2(given_model, 2, 1, 1), SMC2(given_model, 1, 2, 1),
        pytest.param(SMC2(given_model, 1, 2, 2), marks=pytest.mark.slow),
    ],
    ids=["pmmh", "pmmh, all checkpoints", "pmmh, one particle", "smc2", "smc2, two particles", "smc2, two steps"],
)  # fmt: skip
def test_parameters_and_paths_have_their_joint_measure(method):
    assert validate(method, parameters(), expected=joint_measure(), grid=4).equal
    wrong = {**joint_measure(), (True, (True, True)): F(0)}
    assert not validate(method, parameters(), expected=wrong, grid=4).equal


def test_smc2_without_parameters_has_the_evidence_of_smc():
    for scheme in ("multinomial", "systematic"):
        inner = evidence(SMC(2, 2, scheme).on(Enum(4), hmm())).meaning()
        outer = evidence(SMC2(lambda _: hmm(), 1, 2, 2, resampler=scheme).on(Enum(4), Ret(None))).meaning()
        assert inner == outer


def test_the_kernel_of_traces_of_varying_length_on_a_grid():
    base, code = Enum(6), branching()
    grid = [F(2 * i + 1, 12) for i in range(6)]
    traces = [[u] if u < F(1, 2) else [u, v] for u in grid for v in (grid if u >= F(1, 2) else [None])]
    states = [base.of(Recorded(code, tuple(choices), silent=True))[0][0] for choices in traces]
    place = {trace.choices: index for index, trace in enumerate(states)}
    kernel = torch.zeros(len(states), len(states), dtype=torch.float64)
    for index, trace in enumerate(states):
        for after, p in base.of(propose(code, trace)):
            kernel[index, place[after.choices]] += float(p)
    torch.testing.assert_close(kernel.sum(1), torch.ones(len(states), dtype=torch.float64))
    law_ = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    for _ in range(400):
        law_ = law_ @ kernel
    wanted, found = meaning(code), {}
    for trace, p in zip(states, law_.tolist(), strict=True):
        found[trace.value] = found.get(trace.value, 0.0) + p
    for value, weight in wanted.items():
        assert found[value] == pytest.approx(float(weight / sum(wanted.values())), abs=1e-12)


def test_a_trace_of_density_zero_accepts_anything_better():
    empty, full = Trace((F(1, 2),), 0, F(0)), Trace((F(1, 2),), 1, F(1, 5))
    assert acceptance(empty, full) == 1
    assert acceptance(empty, empty) == 0
    assert acceptance(full, empty) == 0


def test_drawn_runs_agree_with_the_exact_measure(generator):
    measure_ = hmm_measure((1, 0, 1))
    mass = sum(measure_.values())
    share = sum(w for path, w in measure_.items() if path[1]) / mass
    for method in (Importance(40), SMC(40), SMC(40, 2, "residual"), SMC(40, 3, "stratified", 0.5), RMSMC(20, 3)):
        found = [run(method, hmm((1, 0, 1)), generator=generator) for _ in range(20)]
        masses = torch.stack([one.log_evidence().exp() for one in found])
        assert masses.mean().item() == pytest.approx(float(mass), abs=6 * masses.std().item() / 20**0.5)
        second = torch.stack([one.unnormalized_expect(lambda path: path[1]) for one in found])
        assert second.mean().item() == pytest.approx(float(mass * share), abs=6 * second.std().item() / 20**0.5)
    for options in ({}, {"sites": "all"}, {"drift": 1.0}):
        chain = run(MH(1500, **options), hmm((1, 0, 1)), generator=generator)
        assert sum(path[1] for path in chain.values) / 1500 == pytest.approx(float(share), abs=0.17)
        assert 0.3 < chain.accepted < 0.99
    assert run(MH(50, accept=lambda old, new: F(1)), hmm((1, 0, 1)), generator=generator).accepted == 1.0


def test_drawn_parameters_agree_with_the_joint_measure(generator):
    joint = joint_measure()
    share = float(sum(w for (stays, _), w in joint.items() if stays) / sum(joint.values()))
    chain = run(PMMH(given_model, 4, num_steps=600), parameters(), generator=generator)
    assert sum(stays for stays, _ in chain.values) / 600 == pytest.approx(share, abs=0.12)
    found = [run(SMC2(given_model, 6, 6, 2), parameters(), generator=generator) for _ in range(20)]
    masses = torch.stack([one.log_evidence().exp() for one in found])
    assert masses.mean().item() == pytest.approx(float(sum(joint.values())), abs=6 * masses.std().item() / 20**0.5)


def test_continuous_laws_are_drawn(generator):
    @program
    def normal():
        x = yield sample(torch.distributions.Normal(1.0, 2.0))
        yield factor(log=-0.5 * (x - 3.0) ** 2)
        return x

    found = run(Importance(4000), normal(), generator=generator)
    evidence_ = -0.5 * 4.0 / 5.0 - 0.5 * math.log(5.0)
    assert found.log_evidence().item() == pytest.approx(evidence_, abs=0.1)
    assert found.expect(lambda x: x).item() == pytest.approx(1 + 4 / 5 * 2, abs=0.15)
    chain = run(MH(2000, drift=0.2), normal(), generator=generator)
    assert sum(chain.values) / 2000 == pytest.approx(2.6, abs=0.25)
