"""Chapters 4, 7 and 9: continua of arms, sets of atoms, and games."""

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.stream import bandits
from kullback.stream.bandits import combinatorial, games, lipschitz

# -- continua --------------------------------------------------------------------------------------------------------


def test_mesh_is_as_wide_as_the_formula_says():
    log = math.log(20_000)
    assert lipschitz.mesh_size(20_000) == math.ceil((20_000 / log) ** (1 / 3))
    assert lipschitz.mesh_size(20_000, lipschitz=8.0) == math.ceil((20_000 * 64 / log) ** (1 / 3))
    assert lipschitz.mesh_size(20_000, dimension=2) == math.ceil((20_000 / log) ** (1 / 4))
    assert lipschitz.grid(3, 2).tolist()[1] == pytest.approx([1 / 6, 1 / 2])


def test_discretisation_finds_the_best_cell(generator):
    policy = bandits.UniformDiscretization(horizon=3000, dimension=2, cells=3)
    target = np.array([0.8, 0.2])
    for _ in range(3000):
        arm = policy.pull(None, generator=generator)
        policy.update(arm, 1.0 - np.abs(policy.points[arm] - target).max(), None)
    best = policy.points[policy.policy.seen.counts.argmax()]
    assert best.tolist() == pytest.approx([5 / 6, 1 / 6])


@pytest.mark.parametrize("dimension", [1, 2])
def test_zooming_keeps_its_invariants(dimension, generator):
    """Before an old arm is pulled all is covered; when an arm comes, its point was in no ball."""
    policy = bandits.Zooming(horizon=1500, dimension=dimension, exploration=0.5, resolution=[0, 256, 24][dimension])
    target = np.full(dimension, 0.3)
    for _ in range(1500):
        known, radii = policy.points.copy(), policy.radii.copy()
        arm = policy.pull(None, generator=generator)
        distances = np.abs(policy.candidates[:, None] - known).max(-1) if len(known) else np.zeros((1, 0))
        covered = (distances <= radii).any(axis=1)
        if arm == len(known):
            inside = np.abs(known - policy.points[arm]).max(-1) <= radii if len(known) else np.zeros(0)
            assert not inside.any()
        else:
            assert covered.all()
        policy.update(arm, max(0.0, 1.0 - 2 * np.abs(policy.points[arm] - target).max()), None)
    assert (policy.radii == policy.root_log / np.sqrt(policy.counts + 1)).all()
    near = np.abs(policy.points - target).max(-1) < 0.25
    assert policy.counts[near].sum() > 0.5 * policy.counts.sum()


def test_zooming_takes_any_metric_and_scales_with_the_lipschitz_constant(generator):
    euclid = lambda x, points: np.sqrt(((points - x) ** 2).sum(-1))  # noqa: E731
    count = {}
    for slope in (1.0, 4.0):
        policy = bandits.Zooming(horizon=800, lipschitz=slope, metric=euclid, exploration=0.5, resolution=128)
        for _ in range(800):
            policy.update(policy.pull(None, generator=generator), 0.5, None)
        count[slope] = len(policy.points)
    assert count[4.0] > 2 * count[1.0]


def test_compiled_zooming_pays_what_the_policy_pays(generator):
    pytest.importorskip("numba")
    cells, horizon, runs = 512, 1000, 60
    truth = np.maximum(0.9 - np.abs(lipschitz.grid(cells)[:, 0] - 0.6), 0.0)
    naive, fast, active = [], [], []
    for _ in range(runs):
        options = {"exploration": 0.5, "steps": [10, horizon], "generator": generator}
        curve, count = lipschitz.zooming_regret(truth, horizon, **options)
        assert 0 < curve[0] < curve[1]
        fast.append(curve[1])
        active.append(count)
    for _ in range(8):
        policy = bandits.Zooming(horizon=horizon, exploration=0.5, resolution=cells)
        regret = 0.0
        for _ in range(horizon):
            arm = policy.pull(None, generator=generator)
            mean = max(0.9 - abs(policy.points[arm, 0] - 0.6), 0.0)
            policy.update(arm, float(torch.rand((), generator=generator) < mean), None)
            regret += truth.max() - mean
        naive.append(regret)
        assert min(active) - 2 <= len(policy.points) <= max(active) + 2
    error = math.hypot(np.std(naive, ddof=1) / math.sqrt(len(naive)), np.std(fast, ddof=1) / math.sqrt(runs))
    assert abs(np.mean(naive) - np.mean(fast)) < 6 * error
    assert np.mean(fast) > 12 * error  # so that the comparison says something


# -- combinatorial actions -------------------------------------------------------------------------------------------


def brute_force(actions, costs):
    return min(float(np.dot(action, costs)) for action in actions)


def trees(edges, nodes):
    """All spanning trees, by trying every set of edges of the right size."""
    for chosen in combinations(range(len(edges)), nodes - 1):
        reached, grown = {edges[chosen[0]][0]}, True
        while grown:
            grown = False
            for edge in chosen:
                if len(reached & set(edges[edge])) == 1:
                    reached |= set(edges[edge])
                    grown = True
        if len(reached) == nodes:
            yield np.isin(np.arange(len(edges)), chosen).astype(float)


def paths(edges, source, target):
    for chosen in product((0.0, 1.0), repeat=len(edges)):
        balance = np.zeros(max(map(max, edges)) + 1)
        for take, (tail, head) in zip(chosen, edges, strict=True):
            balance[tail] -= take
            balance[head] += take
        wanted = np.zeros_like(balance)
        wanted[source], wanted[target] = -1.0, 1.0
        if (balance == wanted).all():
            yield np.array(chosen)


EDGES = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 3), (1, 4), (3, 4)]
FAMILIES = {
    "top-m": (
        combinatorial.top_m(8, 3),
        [np.array(bits, float) for bits in product((0, 1), repeat=8) if sum(bits) == 3],
    ),
    "path": (combinatorial.shortest_path(EDGES, 0, 4), list(paths(EDGES, 0, 4))),
    "tree": (combinatorial.spanning_tree(EDGES), list(trees(EDGES, 5))),
    "assignment": (
        combinatorial.assignment(3),
        [np.eye(3)[list(order)].reshape(-1) for order in permutations(range(3))],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_is_as_good_as_brute_force(family, generator):
    oracle, actions = FAMILIES[family]
    size = len(actions[0])
    for costs in torch.randn(60, size, generator=generator, dtype=torch.float64).numpy():
        action = oracle(costs)
        assert any((action == other).all() for other in actions)
        assert action @ costs == pytest.approx(brute_force(actions, costs), abs=1e-12)


def test_oracles_refuse_what_has_no_answer():
    with pytest.raises(ConfigError, match="topological"):
        combinatorial.shortest_path([(1, 0)], 0, 1)
    with pytest.raises(DataError, match="no path"):
        combinatorial.shortest_path([(0, 1)], 0, 2)(np.ones(1))
    with pytest.raises(DataError, match="connected"):
        combinatorial.spanning_tree([(0, 1), (2, 3)])(np.ones(2))
    with pytest.raises(ConfigError, match="m lies"):
        combinatorial.top_m(3, 4)
    with pytest.raises(DataError, match="NaN"):
        combinatorial.top_m(2, 1)([math.nan, 0.0])


def test_perturbed_leader_keeps_its_bound(generator):
    """Costs of at most 1/d an atom, alternating so that the leader itself fails."""
    atoms, rounds, oracle = 8, 600, combinatorial.top_m(8, 1)
    costs = np.zeros((rounds, atoms))
    costs[0::2, 0], costs[1::2, 1] = 1.0, 1.0
    costs[:, 2:] = 0.6
    for perturbation in ("uniform", "exponential"):
        learner = bandits.FPL(oracle, atoms, horizon=rounds, perturbation=perturbation)
        paid = 0.0
        for row in costs:
            paid += float(learner.play(generator=generator) @ row)
            learner.observe(row)
        assert paid - costs.sum(0).min() <= 2 * math.sqrt(atoms * rounds)
    leader, paid = bandits.FPL(oracle, atoms, noise=1e-9), 0.0
    for row in costs:
        paid += float(leader.play(generator=generator) @ row)
        leader.observe(row)
    assert paid - costs.sum(0).min() > 2 * math.sqrt(atoms * rounds)


def test_geometric_resampling_estimates_costs_without_bias(generator):
    oracle, costs = combinatorial.top_m(4, 2), np.array([0.9, 0.1, 0.5, 0.3])
    learner, total, squares, repeats = bandits.FPL(oracle, 4, noise=1.0, cap=500), np.zeros(4), np.zeros(4), 3000
    for _ in range(repeats):
        learner.reset()
        action = learner.play(generator=generator)
        learner.update(action, np.where(action > 0, costs, np.nan_to_num(np.nan)), generator=generator)
        total += learner.costs
        squares += learner.costs**2
    mean = total / repeats
    error = np.sqrt((squares / repeats - mean**2) / repeats)
    assert (np.abs(mean - costs) < 6 * error + 1e-12).all()
    short = bandits.FPL(oracle, 4, noise=1.0, cap=1)
    action = short.play(generator=generator)
    short.update(action, costs, generator=generator)
    np.testing.assert_allclose(short.costs, action * costs)  # a cap of 1 does not weight at all


@pytest.mark.parametrize("learner", ["hedge", "leader"])
def test_semi_bandits_find_a_path(learner, generator):
    oracle, actions = FAMILIES["path"]
    means, rounds = np.array([0.9, 0.2, 0.5, 0.9, 0.2, 0.9, 0.5, 0.2]), 600
    hedge = bandits.SemiBanditHedge(actions, horizon=rounds)
    leader = bandits.FPL(oracle, 8, horizon=rounds, bound=0.5, perturbation="exponential", cap=50)
    paid = 0.0
    for _ in range(rounds):
        costs = (torch.rand(8, generator=generator).numpy() < means).astype(float)
        if learner == "hedge":
            arm = hedge.pull(None, generator=generator)
            action = hedge.actions[arm]
            hedge.update(arm, np.where(action > 0, costs, math.nan), None)
        else:
            action = leader.play(generator=generator)
            leader.update(action, costs, generator=generator)
        paid += float(action @ means)
    best = brute_force(actions, means)
    worst = max(float(action @ means) for action in actions)
    assert paid - rounds * best < 0.35 * rounds * (worst - best)


def test_semi_bandit_hedge_sees_every_atom():
    actions = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    hedge = bandits.SemiBanditHedge(actions, rate=5.0, mixing=0.2)
    for _ in range(50):
        hedge.update(0, [1.0, 1.0, 0.0, 0.0], None)
    included = hedge.probabilities() @ np.array(actions, float)
    assert included.min() >= 0.2 / len(hedge.covering) - 1e-12
    with pytest.raises(DataError, match="no action"):
        bandits.SemiBanditHedge([[1, 0]], rate=1.0, mixing=0.0)
    with pytest.raises(ShapeError, match="zeros and ones"):
        bandits.SemiBanditHedge([[0.5, 1.0]], rate=1.0, mixing=0.0)
    with pytest.raises(DataError, match="costs"):
        hedge.update(0, [2.0, 0.0, 0.0, 0.0], None)


# -- games -----------------------------------------------------------------------------------------------------------

ROCK = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("mixed", [True, False])
def test_certificate_is_the_mean_of_the_regrets(mixed, generator):
    matrix = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    result = games.play_zero_sum(
        matrix, bandits.Hedge(4, horizon=500), bandits.Hedge(3, horizon=500), 500, mixed=mixed, generator=generator
    )
    assert result.certificate == pytest.approx((result.row_regret + result.column_regret) / 500, abs=1e-12)
    assert result.row.sum().item() == pytest.approx(1.0)
    if mixed:
        assert result.row_regret <= math.sqrt(500 * math.log(4) / 2)


def test_rock_paper_scissors(generator):
    skewed = [bandits.Hedge(3, horizon=4000) for _ in range(2)]
    skewed[0].log_weights[:] = [2.0, 0.0, -1.0]  # begin away from the solution
    result = games.play_zero_sum(ROCK, *skewed, 4000, mixed=True, generator=generator)
    assert result.lower <= 0.5 <= result.upper
    assert result.certificate < 0.05
    assert (result.row - 1 / 3).abs().max() < 0.06
    assert (result.column - 1 / 3).abs().max() < 0.06


def test_hedge_against_a_best_response_certifies_the_value(generator):
    """The classical proof of the minimax theorem: value of [[0.9, 0.2], [0.3, 0.8]] is (0.72 - 0.06) / 1.2."""
    matrix = torch.tensor([[0.9, 0.2], [0.3, 0.8]], dtype=torch.float64)
    result = games.play_zero_sum(
        matrix, bandits.Hedge(2, horizon=4000), games.BestResponse(matrix.T), 4000, mixed=True, generator=generator
    )
    assert result.lower <= 0.55 <= result.upper
    assert result.certificate < 0.03


def test_bandits_play_games_too(generator):
    result = games.play_zero_sum(ROCK, bandits.TsallisINF(3), bandits.Exp3(3, horizon=3000), 3000, generator=generator)
    assert result.certificate < 0.2
    with pytest.raises(ConfigError, match="full feedback"):
        games.play_zero_sum(ROCK, bandits.TsallisINF(3), bandits.Hedge(3, rate=1.0), 3, mixed=True, generator=generator)


def test_general_sum_play_approaches_coarse_correlated_equilibrium(generator):
    """A game of three players, each of whom wants to differ from the next one."""
    payoffs = []
    for player in range(3):
        table = torch.zeros(2, 2, 2, dtype=torch.float64)
        for joint in product(range(2), repeat=3):
            table[joint] = float(joint[player] != joint[(player + 1) % 3])
        payoffs.append(table)
    learners = [bandits.Hedge(2, horizon=2000) for _ in range(3)]
    joint = games.play_general(payoffs, learners, 2000, generator=generator)
    assert joint.sum().item() == pytest.approx(1.0)
    assert games.coarse_correlated_gap(payoffs, joint) <= math.sqrt(math.log(2) / 2 / 2000) + 6 * 0.5 / math.sqrt(2000)
    pure = torch.zeros(2, 2, 2)
    pure[0, 0, 0] = 1.0
    assert games.coarse_correlated_gap(payoffs, pure) == pytest.approx(1.0)


def test_uniform_play_is_an_equilibrium_of_rock_paper_scissors():
    assert games.coarse_correlated_gap([ROCK, 1 - ROCK], torch.full((3, 3), 1 / 9)) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(DataError, match="sum to 1"):
        games.coarse_correlated_gap([ROCK, 1 - ROCK], torch.full((3, 3), 0.5))


def test_bad_games_are_refused(generator):
    hedge = lambda: bandits.Hedge(2, rate=1.0)  # noqa: E731
    with pytest.raises(DataError, match="0, 1"):
        games.play_zero_sum([[2.0, 0.0]], hedge(), hedge(), 3, generator=generator)
    with pytest.raises(ShapeError, match="matrix"):
        games.play_zero_sum([1.0], hedge(), hedge(), 3, generator=generator)
    with pytest.raises(ShapeError, match="players"):
        games.play_general([ROCK], [hedge(), hedge()], 3, generator=generator)
