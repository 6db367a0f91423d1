"""Discrete correctors against enumeration of all sequences: products and annealing of a masked model's laws."""

import itertools
import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.sample.fkc_discrete import discrete_fkc

MASK, V, T = 3, 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masked_model(seed):
    """The conditionals of a random law over V^T, and its log-probabilities [V^T]."""
    law = (1.5 * torch.randn(V**T, generator=seeded(seed), dtype=torch.float64)).log_softmax(0)

    def expert(tokens):
        rows, (different, which) = [], tokens.unique(dim=0, return_inverse=True)
        for row in different:
            seen = row != MASK
            agree = (SEQUENCES[:, seen] == row[seen]).all(1)
            weights = law.masked_fill(~agree, -math.inf).softmax(0)
            rows.append(torch.stack([weights @ torch.eq(SEQUENCES, v).double() for v in range(V)], 1).log())
        return torch.stack(rows)[which].clamp(max=0.0)

    return expert, law


def run(kernel, steps, chains, seed=1):
    source = seeded(seed)
    state = kernel.init(generator=source, chains=chains)
    for _ in range(steps):
        state, info = kernel.step(state, generator=source)
    return state, info


def check_law(powers, exact, **options):
    experts = [masked_model(seed)[0] for seed in (1, 2)][: len(powers)]
    kernel = discrete_fkc(experts, [[1], [0], [2]], mask=MASK, num_particles=4000, powers=powers, **options)
    state, _ = run(kernel, 3, 8)
    place = (state.tokens * torch.tensor([9, 3, 1])).sum(-1)
    weights = state.log_weights.softmax(1)
    shares = torch.zeros(8, V**T, dtype=torch.float64).scatter_add_(1, place, weights)
    error = 6 * shares.std(0) / 8**0.5 + 2e-3
    assert bool(((shares.mean(0) - exact.softmax(0)).abs() <= error).all())
    spread = 6 * state.log_z.std().item() / 8**0.5 + 2e-3
    assert state.log_z.mean().item() == pytest.approx(exact.logsumexp(0).item(), abs=spread)


def test_one_place_at_a_time_the_product_is_that_of_the_laws():
    one, two = masked_model(1)[1], masked_model(2)[1]
    check_law([1.0, 1.0], one + two)
    check_law([2.0], 2.0 * one, ess_threshold=0.5)
    check_law([-0.5, 1.5], -0.5 * one + 1.5 * two)
    with pytest.raises(AssertionError):
        check_law([1.0, 1.0], one + 2.0 * two)


def test_places_filled_together_make_another_target():
    """All at once the target is the product of the marginals of single places."""
    expert, law = masked_model(1)
    kernel = discrete_fkc([expert], [[0, 1, 2]], mask=MASK, num_particles=20_000, powers=2.0)
    state, _ = run(kernel, 1, 1)
    marginals = torch.stack([torch.stack([law[SEQUENCES[:, t] == v].logsumexp(0) for v in range(V)]) for t in range(T)])
    for t in range(T):
        found = state.tokens[0, :, t].bincount(minlength=V) / 20_000
        assert (found - (2.0 * marginals[t]).softmax(0)).abs().max() < 6 * 0.5 / 20_000**0.5
    assert state.log_z.item() == pytest.approx((2.0 * marginals).logsumexp(1).sum().item(), abs=1e-9)


def test_power_one_has_even_weights():
    expert, _ = masked_model(1)
    state, info = run(discrete_fkc([expert], [[0], [1], [2]], mask=MASK, num_particles=50), 3, 2)
    assert info.effective.tolist() == pytest.approx([50.0, 50.0])
    assert state.log_z.abs().max().item() < 1e-9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": [[0], [0], [1]]}, "once"),
        ({"order": [[0], []]}, "once"),
        ({"powers": [1.0, 2.0]}, "finite power each"),
        ({"num_particles": 1}, "two particles"),
        ({"ess_threshold": 0.0}, "threshold"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    given = {"order": [[0], [1], [2]], "mask": MASK, "num_particles": 5, **options}
    with pytest.raises(ConfigError, match=words):
        discrete_fkc([lambda tokens: tokens], given.pop("order"), **given)


def test_bad_experts_are_refused():
    for expert, error in (
        (lambda tokens: torch.zeros(2, 2), ShapeError),
        (lambda tokens: torch.full((*tokens.shape, V), math.nan), DataError),
        (lambda tokens: torch.full((*tokens.shape, V), -math.inf), DataError),
    ):
        with pytest.raises(error):
            run(discrete_fkc([expert], [[0], [1]], mask=MASK, num_particles=5), 1, 1)
    expert, _ = masked_model(1)
    with pytest.raises(ConfigError, match="all 3 steps"):
        run(discrete_fkc([expert], [[0], [1], [2]], mask=MASK, num_particles=5), 4, 1)
