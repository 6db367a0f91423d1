"""The regret of mixtures and its bounds: closed forms, enumeration, chain rule, limits and invariances."""

import itertools
import math
from xml.etree import ElementTree

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.diagnose.bayes_mixtures import (
    BayesMixture,
    BetaBernoulliMixture,
    ContextTreeMixture,
    DirichletMixture,
)
from kullback.diagnose.universality import (
    averaged_predictor,
    ball_bound,
    capacity,
    exp_bound,
    hypothesis_weight,
    laplace_bound,
    local_dimension,
    merge_functions,
    posterior_bound,
    regret_batch,
    regret_online,
    regret_supervised,
    sample_complexity,
    student_excess,
    universality_report,
)

CASES = [  # n, theta, n R_o, exponential bound, ball bound
    (10, 0.3, 0.618816, 1.076744, 1.760636),
    (100, 0.3, 1.674580, 2.170786, 2.892043),
    (100, 0.5, 1.586753, 2.084244, 2.805077),
    (1000, 0.01, 4.352111, 4.835217, 5.565891),
]


def coins(count):
    """Biases in the middle of equal cells, for a uniform prior."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def kl(theta, other):
    theta = torch.as_tensor(theta, dtype=torch.float64)
    return theta * (theta / other).log() + (1 - theta) * ((1 - theta) / (1 - other)).log()


def uniform(size):
    return torch.full((size,), -math.log(size), dtype=torch.float64)


def table(biases):
    """Likelihoods [K, 1, 2] of coins."""
    return torch.stack([1 - biases, biases], dim=1).log().unsqueeze(1)


@pytest.mark.parametrize(("n", "theta", "exact", "exponential", "ball"), CASES)
def test_bernoulli_regret_and_bounds(n, theta, exact, exponential, ball):
    mixture = BetaBernoulliMixture()
    assert mixture.regret_online(theta, n) == pytest.approx(exact, abs=1e-6)
    divergences = kl(theta, coins(400_000))
    found = exp_bound(divergences, n, log_w=uniform(400_000)).value
    radius = ball_bound(divergences, n, log_w=uniform(400_000))
    assert found == pytest.approx(exponential, abs=2e-5)
    assert radius.value == pytest.approx(ball, abs=5e-4)  # of cells of 1/400000
    if n == 10:
        assert radius.eps_star == pytest.approx(0.04785, abs=5e-4)
    assert exact <= found <= radius.value
    # the ball bound is the smallest over radii, each of them a bound of its own
    for eps in (0.3 * radius.eps_star, 3 * radius.eps_star):
        weight = hypothesis_weight(divergences, eps, log_w=uniform(400_000)).value
        assert n * eps - math.log(weight) >= radius.value - 1e-9


def test_chain_rule():
    mixture = BetaBernoulliMixture()
    total = sum(mixture.regret_batch(0.3, t) for t in range(1, 101))
    assert total == pytest.approx(mixture.regret_online(0.3, 100), abs=1e-12)
    assert mixture.regret_batch(0.3, 100) == pytest.approx(0.004918, abs=1e-6)
    batch = [mixture.regret_batch(0.3, t) for t in (1, 10, 100, 400)]
    assert batch == sorted(batch, reverse=True)
    assert all(mixture.regret_batch(0.3, n) <= mixture.regret_online(0.3, n) / n for n in (1, 10, 100))


def test_cesaro_predictor_is_bounded_by_the_online_regret():
    theta, n = 0.3, 8
    mixture, nature = BetaBernoulliMixture(), torch.tensor([0.7, 0.3], dtype=torch.float64)
    risk = 0.0
    for past in itertools.product((0, 1), repeat=n - 1):
        mass = theta ** sum(past) * (1 - theta) ** (n - 1 - sum(past))
        steps = [mixture.fit(list(past[:t])).predict_log_proba() for t in range(n)]
        risk += mass * float(regret_online(nature.log(), averaged_predictor(steps)))
    assert risk <= mixture.regret_online(theta, n) / n


def finite_class():
    biases = torch.tensor([0.1, 0.3, 0.35, 0.6, 0.9], dtype=torch.float64)
    prior = torch.tensor([0.2, 0.1, 0.3, 0.2, 0.2], dtype=torch.float64).log()
    return biases, prior


def sequences(biases, n):
    """By the number of ones: log-probability under each coin [K, n + 1], and how many sequences."""
    ones = torch.arange(n + 1, dtype=torch.float64)
    logs = ones * biases.log().unsqueeze(1) + (n - ones) * (1 - biases).log().unsqueeze(1)
    many = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(ones + 1) - torch.lgamma(n - ones + 1)
    return logs, many


def test_a_finite_class_pays_at_most_its_weight():
    biases, prior = finite_class()
    regrets = []
    for n in (1, 5, 50, 500, 20_000):
        logs, many = sequences(biases, n)
        mixture = (prior.unsqueeze(1) + logs).logsumexp(0)
        regrets.append(float(regret_online(logs[1], mixture, log_count=many)))
        assert regrets[-1] <= -float(prior[1]) + 1e-9
        divergences = kl(0.3, biases)
        assert regrets[-1] <= exp_bound(divergences, n, log_w=prior).value + 1e-9
    assert regrets == sorted(regrets)
    assert regrets[-1] == pytest.approx(-float(prior[1]), abs=1e-6)


def test_regret_of_the_batch_learner_is_the_difference_of_online_ones():
    biases, prior = finite_class()
    n = 7
    logs, many = sequences(biases, n - 1)
    posterior = (prior.unsqueeze(1) + logs).log_softmax(0)
    following = (posterior.unsqueeze(2) + table(biases)).logsumexp(0)
    batch = regret_batch(logs[1], table(biases)[1].expand(n, 2), following, log_count=many)
    online = []
    for size in (n - 1, n):
        logs, many = sequences(biases, size)
        online.append(regret_online(logs[1], (prior.unsqueeze(1) + logs).logsumexp(0), log_count=many))
    assert float(batch) == pytest.approx(float(online[1] - online[0]), abs=1e-12)


def test_duplicated_hypotheses_change_nothing():
    biases, prior = finite_class()
    divergences = kl(0.3, biases)
    copies, shared = divergences.repeat_interleave(7), prior.repeat_interleave(7) - math.log(7)
    for n in (3, 300):
        assert exp_bound(copies, n, log_w=shared).value == pytest.approx(exp_bound(divergences, n, log_w=prior).value)
        assert ball_bound(copies, n, log_w=shared).value == pytest.approx(ball_bound(divergences, n, log_w=prior).value)
        assert local_dimension(copies, n, log_w=shared) == pytest.approx(local_dimension(divergences, n, log_w=prior))
    assert sample_complexity(copies, 0.01, log_w=shared) == sample_complexity(divergences, 0.01, log_w=prior)
    one = BayesMixture(prior, table(biases)).fit([0] * 9, [1, 0] * 4 + [1])
    many = BayesMixture(shared, table(biases.repeat_interleave(7))).fit([0] * 9, [1, 0] * 4 + [1])
    torch.testing.assert_close(one.predict_log_proba([0]), many.predict_log_proba([0]))
    assert one.log_evidence() == pytest.approx(many.log_evidence())


def test_local_dimension():
    regular = kl(0.3, coins(200_000))
    assert local_dimension(regular, 100_000) == pytest.approx(0.5, abs=0.01)
    bounds = [exp_bound(regular, n, log_w=uniform(200_000)).value for n in (9_990, 10_010)]
    slope = (bounds[1] - bounds[0]) / math.log(10_010 / 9_990)
    assert slope == pytest.approx(local_dimension(regular, 10_000, log_w=uniform(200_000)), abs=1e-5)
    side = coins(3000)
    singular = (side.unsqueeze(1) * side).square().flatten()
    n = 40_000  # lambda -> 1/2 with multiplicity 2: L = log(n) / 2 - log log n + const
    dimension = local_dimension(singular, n)
    assert dimension == pytest.approx(0.5 - 1 / math.log(n), abs=0.04)
    steps = [exp_bound(singular, m, log_w=uniform(len(singular))).value for m in (10_000, 40_000)]
    expected = [0.5 * math.log(m) - math.log(math.log(m)) for m in (10_000, 40_000)]
    assert steps[1] - steps[0] == pytest.approx(expected[1] - expected[0], abs=0.05)
    # two regular parameters would cost twice the half
    assert abs(steps[1] - steps[0] - math.log(4)) > 0.5


def test_laplace_is_the_limit_of_the_exponential_bound():
    theta, n = 0.3, 20_000
    exact = exp_bound(kl(theta, coins(400_000)), n, log_w=uniform(400_000)).value
    hessian = torch.tensor([[1 / (theta * (1 - theta))]])
    assert laplace_bound(hessian, 0.0, n) == pytest.approx(exact, abs=1e-3)
    with pytest.raises(DataError, match="singular"):
        laplace_bound(torch.diag(torch.tensor([1.0, 0.0])), 0.0, 100)


def test_draws_from_the_prior_estimate_bounds(generator):
    exact = exp_bound(kl(0.3, coins(100_000)), 50, log_w=uniform(100_000)).value
    found = [exp_bound(kl(0.3, torch.rand(2000, generator=generator).double()), 50) for _ in range(200)]
    values = torch.tensor([one.value for one in found])
    assert values.mean().item() == pytest.approx(exact, abs=6 * values.std().item() / math.sqrt(200) + 1e-3)
    assert values.std().item() == pytest.approx(torch.tensor([one.se for one in found]).mean().item(), rel=0.25)
    with pytest.warns(UserWarning, match="draws from the prior"):
        exp_bound(kl(0.3, torch.rand(200, generator=generator).double()), 1e6)
    none = hypothesis_weight(torch.ones(300), 0.1)
    assert (none.value, none.upper) == (0.0, 0.01)
    half = hypothesis_weight(torch.tensor([0.0, 1.0]).repeat(50), 0.1)
    assert (half.value, half.se) == (pytest.approx(0.5), pytest.approx(0.05))


def test_any_posterior_bounds_from_above():
    biases, prior = finite_class()
    divergences = kl(0.3, biases)
    best = exp_bound(divergences, 40, log_w=prior).value
    for share in (torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), torch.full((5,), 0.2)):
        share = share.double()
        kl_to_prior = float(torch.special.xlogy(share, share).sum() - (share * prior).sum())
        assert posterior_bound(kl_to_prior, float((share * divergences).sum()), 40) >= best
    tempered = (prior - 40 * divergences).softmax(0)
    kl_to_prior = float((tempered * (tempered.log() - prior)).sum())
    assert posterior_bound(kl_to_prior, float((tempered * divergences).sum()), 40) == pytest.approx(best)


def test_sample_complexity():
    biases, prior = finite_class()
    n = sample_complexity(kl(0.3, biases), 0.001, log_w=prior)
    assert exp_bound(kl(0.3, biases), n, log_w=prior).value / n <= 0.001
    assert exp_bound(kl(0.3, biases), n - 1, log_w=prior).value / (n - 1) > 0.001
    assert n == pytest.approx(-float(prior[1]) / 0.001, rel=0.1)
    with pytest.raises(DataError, match="too far"):
        sample_complexity(torch.tensor([0.5, 0.7]), 0.1)


def test_capacities():
    value, prior = capacity(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).log())
    assert value == pytest.approx(math.log(2), abs=1e-9)
    flip = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    value, prior = capacity(torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64).log())
    assert value == pytest.approx(math.log(2) - flip, abs=1e-9)
    assert value == pytest.approx(0.368064, abs=1e-6)
    assert prior.tolist() == pytest.approx([0.5, 0.5])
    laws = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.45, 0.45, 0.1]], dtype=torch.float64)
    value, prior = capacity(laws.log())
    divergences = regret_online(laws.log(), (prior @ laws).log().expand(3, 3))
    assert float(divergences.max()) == pytest.approx(value, abs=1e-8)  # the minimax property
    assert prior[2] < 1e-3  # a mixture of the others: never needed


def test_bayes_mixture_against_enumeration(generator):
    laws = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    prior = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    x = torch.randint(4, (30,), generator=generator)
    y = torch.randint(3, (30,), generator=generator)
    together = BayesMixture(prior, laws).fit(x, y)
    weights = prior + laws[:, x, y].sum(1)
    expected = (weights.log_softmax(0)[:, None, None] + laws).logsumexp(0)
    torch.testing.assert_close(together.predict_log_proba(torch.arange(4)), expected)
    one_by_one, by_function = BayesMixture(prior, laws), BayesMixture(prior, lambda at: laws[:, at])
    evidence = 0.0
    for at, label in zip(x.tolist(), y.tolist(), strict=True):
        evidence += float(one_by_one.predict_log_proba([at])[0, label])
        one_by_one.update(at, label)
        by_function.partial_fit(torch.tensor([at]), torch.tensor([label]))
    for other in (one_by_one, by_function):
        torch.testing.assert_close(other.posterior(), together.posterior())
        assert other.log_evidence() == pytest.approx(together.log_evidence())
        assert other.n_seen == 30
    assert evidence == pytest.approx(float(weights.logsumexp(0)))
    torch.testing.assert_close(by_function.predict_log_proba(torch.arange(4)), expected)
    truth = laws[2]
    assert together.regret(truth) == pytest.approx(float((truth.exp() * (truth - expected)).sum(1).mean()))
    assert together.score(x, y) == pytest.approx(float(expected[x, y].mean()))
    weighted = regret_supervised(truth, expected, inputs=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert float(weighted) == pytest.approx(float((truth[0].exp() * (truth[0] - expected[0])).sum()))


def test_impossible_samples_leave_no_hypothesis():
    certain = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]], dtype=torch.float64).log()
    mixture = BayesMixture(uniform(2), certain).fit([0, 0], [0, 1])
    torch.testing.assert_close(mixture.posterior().exp(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.raises(DataError, match="probability zero"):
        BayesMixture(uniform(2), certain[[0, 0]]).fit([0, 0], [0, 1]).posterior()


def test_conjugate_mixtures(generator):
    symbols = torch.randint(2, (25,), generator=generator)
    beta = BetaBernoulliMixture(0.5, 0.5).fit(symbols)
    kt = DirichletMixture(torch.full((2,), 0.5)).fit(symbols)
    assert beta.log_evidence() == pytest.approx(kt.log_evidence())
    torch.testing.assert_close(beta.predict_log_proba(), kt.predict_log_proba())
    grid = coins(20_000)
    ones = float(symbols.sum())
    likelihood = (ones * grid.log() + (25 - ones) * (1 - grid).log()).exp()
    flat = BetaBernoulliMixture().fit(symbols)
    assert flat.log_evidence() == pytest.approx(math.log(likelihood.mean().item()), abs=1e-6)
    pairs = DirichletMixture(torch.ones(3), order=2)
    expected = 2 * -math.log(3)
    counts: dict[tuple[int, int], list[float]] = {}
    sequence = torch.randint(3, (60,), generator=generator).tolist()
    for t in range(2, 60):
        row = counts.setdefault((sequence[t - 2], sequence[t - 1]), [1.0, 1.0, 1.0])
        expected += math.log(row[sequence[t]] / sum(row))
        row[sequence[t]] += 1.0
    assert pairs.fit(sequence).log_evidence() == pytest.approx(expected)
    assert pairs.update(0).log_evidence() < expected


def all_trees(depth):
    """Every context tree up to a depth: a set of leaves, each a tuple of symbols, latest first; and its prior mass."""
    if depth == 0:
        return [([()], 1.0)]
    found = [([()], 0.5)]
    for (left, p), (right, q) in itertools.product(all_trees(depth - 1), repeat=2):
        found.append(([(0, *leaf) for leaf in left] + [(1, *leaf) for leaf in right], 0.5 * p * q))
    return found


def test_context_trees_against_the_sum_over_all_trees(generator):
    depth = 3
    symbols = torch.randint(2, (40,), generator=generator).tolist()
    padded = [0] * depth + symbols
    total, prior = 0.0, 0.0
    for leaves, mass in all_trees(depth):
        log_p, counts = 0.0, {leaf: [0.5, 0.5] for leaf in leaves}
        for t, symbol in enumerate(symbols):
            past = tuple(padded[t : t + depth][::-1])
            row = next(counts[leaf] for leaf in leaves if past[: len(leaf)] == leaf)
            log_p += math.log(row[symbol] / sum(row))
            row[symbol] += 1.0
        total, prior = total + mass * math.exp(log_p), prior + mass
    assert prior == pytest.approx(1.0)
    mixture = ContextTreeMixture(depth).fit(symbols)
    assert mixture.log_evidence() == pytest.approx(math.log(total), abs=1e-10)
    following = [ContextTreeMixture(depth).fit([*symbols, s]).log_evidence() for s in (0, 1)]
    predicted = mixture.predict_log_proba()
    assert predicted.tolist() == pytest.approx([one - mixture.log_evidence() for one in following])
    assert float(predicted.logsumexp(0)) == pytest.approx(0.0, abs=1e-12)


def test_context_trees_learn_any_source_within_their_bound(generator):
    # leaves of the source, latest symbol first: 0 -> P(1) = .9; 10 -> .2; 11 -> .5
    symbols, past = [], (0, 0)
    for u in torch.rand(3000, generator=generator).tolist():
        p = 0.9 if past[0] == 0 else 0.2 if past[1] == 0 else 0.5
        symbols.append(int(u < p))
        past = (symbols[-1], past[0])
    mixture = ContextTreeMixture(6).fit(symbols)
    truth, past = 0.0, (0, 0)
    seen = {0.9: 0, 0.2: 0, 0.5: 0}
    for symbol in symbols:
        p = 0.9 if past[0] == 0 else 0.2 if past[1] == 0 else 0.5
        truth += math.log(p if symbol else 1 - p)
        seen[p] += 1
        past = (symbol, past[0])
    bound = sum(0.5 * math.log(n) + math.log(2) for n in seen.values()) + 5 * math.log(2)
    assert truth - mixture.log_evidence() <= bound
    shallow = ContextTreeMixture(0).fit(symbols)
    assert truth - shallow.log_evidence() > 10 * bound  # a class without the source pays in proportion to n
    assert shallow.log_evidence() == pytest.approx(DirichletMixture(torch.full((2,), 0.5)).fit(symbols).log_evidence())
    letters = ContextTreeMixture(2, alphabet=4).fit([0, 1, 2, 3] * 50)
    assert letters.predict_log_proba().exp()[0] > 0.8


def test_merged_functions():
    outputs = torch.tensor([[0, 1], [1, 1], [0, 1], [0, 1]])
    functions, log_w = merge_functions(outputs)
    assert functions.tolist() == [[0, 1], [1, 1]]
    torch.testing.assert_close(log_w.exp(), torch.tensor([0.75, 0.25], dtype=torch.float64))


def test_a_student_of_an_ensemble():
    truth, ensemble, student = (torch.tensor(p).log() for p in ([0.5, 0.5], [0.6, 0.4], [0.5, 0.5]))
    extra, divergence = student_excess(truth, ensemble, student)
    assert extra < 0 < divergence
    torch.testing.assert_close(student_excess(truth, ensemble, ensemble)[0], torch.tensor(0.0))


def test_report_and_its_plot(tmp_path):
    biases, prior = finite_class()
    mixture = BetaBernoulliMixture()
    report = universality_report(kl(0.3, coins(20_000)), [10, 100], exact=lambda n: mixture.regret_online(0.3, n))
    for exact, exponential, ball in zip(report.exact, report.exp_bound, report.ball_bound, strict=True):
        assert exact < exponential < ball
    assert report.n_at_regret[0][1] < report.n_at_regret[1][1]
    report.plot(tmp_path / "report.svg")
    assert ElementTree.parse(tmp_path / "report.svg").getroot().tag.endswith("svg")
    outside = kl(0.45, biases)
    against_best = universality_report(outside, [1000], log_w=prior, misspecified=True, regrets=(0.01,))
    best = int(outside.argmin())
    assert against_best.exp_bound[0] == pytest.approx(-float(prior[best]), abs=0.05)


def test_bad_input(generator):
    biases, prior = finite_class()
    d, laws = kl(0.3, biases), table(biases)
    mixture = BayesMixture(prior, laws)
    for call, error, message in [
        (lambda: exp_bound(d, 0), ConfigError, "1 or more"),
        (lambda: exp_bound(d, 3, log_w=prior + 0.1), DataError, "sums to one"),
        (lambda: exp_bound(d, 3, log_w=prior[:2]), ShapeError, "one each"),
        (lambda: exp_bound(d - 1, 3), DataError, "not negative"),
        (lambda: exp_bound(d * math.nan, 3), DataError, "NaN"),
        (lambda: exp_bound(d * math.inf, 3, log_w=prior), DataError, "infinite|NaN"),
        (lambda: ball_bound(d, 0.5), ConfigError, "1 or more"),
        (lambda: hypothesis_weight(d, 0.0), ConfigError, "eps"),
        (lambda: hypothesis_weight(d.unsqueeze(0), 0.1), ShapeError, r"\[M\]"),
        (lambda: sample_complexity(d, 0.0), ConfigError, "regret"),
        (lambda: posterior_bound(-1.0, 0.0, 3), DataError, "not negative"),
        (lambda: capacity(laws), ShapeError, r"\[K, X\]"),
        (lambda: capacity(torch.zeros(2, 2)), DataError, "normalised"),
        (lambda: merge_functions(torch.zeros(3)), ShapeError, r"\[M, N\]"),
        (lambda: BayesMixture(prior + 1, laws), DataError, "sum to one"),
        (lambda: BayesMixture(prior, laws[:2]), ShapeError, "K=5"),
        (lambda: BayesMixture(prior, laws + 0.5), DataError, "normalised"),
        (lambda: mixture.update([1], [0]), DataError, "0 to 0"),
        (lambda: mixture.update([0], [2]), DataError, "0 to 1"),
        (lambda: mixture.update([0, 0], [1]), ShapeError, "one each"),
        (lambda: mixture.update([0.5], [1]), DataError, "whole numbers"),
        (lambda: BayesMixture(prior, lambda x: laws).regret(laws[0]), ConfigError, "inputs x"),
        (lambda: BayesMixture(prior, lambda x: laws[:2]).update([0], [1]), ShapeError, "K=5"),
        (lambda: BetaBernoulliMixture(0.0), ConfigError, "positive"),
        (lambda: BetaBernoulliMixture().update([2]), DataError, "0 to 1"),
        (lambda: BetaBernoulliMixture().regret_online(1.0, 3), ConfigError, "theta"),
        (lambda: BetaBernoulliMixture().regret_batch(0.5, 0), ConfigError, "1 or more"),
        (lambda: DirichletMixture(torch.zeros(2)), ConfigError, "positive"),
        (lambda: DirichletMixture(torch.ones(2), order=-1), ConfigError, "order"),
        (lambda: ContextTreeMixture(-1), ConfigError, "depth"),
        (lambda: ContextTreeMixture(2).update([2]), DataError, "0 to 1"),
    ]:
        with pytest.raises(error, match=message):
            call()
