"""Evidence by annealing: one call a move, adaptive steps, states that stay samples, errors that tell the truth."""

import math
import warnings

import pytest
import torch
from scipy import stats

from kullback.align._annealing import Schedule, anneal, jackknife_log_mean, next_inverse
from kullback.align._moves import Walkers
from kullback.align.evidence import PriorSampler, from_policy, log_evidence, posterior_sample, token_move
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator

LENGTH, TOKENS, BETA = 5, 3, 0.5


class Chain:
    """Strings of a Markov chain, all of whose probabilities can be summed; it counts the samples that it scores."""

    def __init__(self):
        draw = generator(0, "chain")
        self.first = torch.randn(TOKENS, generator=draw, dtype=torch.float64).log_softmax(0)
        self.next = (1.5 * torch.randn(TOKENS, TOKENS, generator=draw, dtype=torch.float64)).log_softmax(1)
        self.next[1, 2] = -torch.inf  # never one after the other
        self.next = self.next.log_softmax(1)
        self.calls = 0
        self.all = torch.cartesian_prod(*[torch.arange(TOKENS)] * LENGTH)

    def laws(self, x):
        self.calls += len(x)
        return torch.cat([self.first.expand(len(x), 1, TOKENS), self.next[x[:, :-1]]], 1)

    def log_prior(self, x):
        laws = torch.cat([self.first.expand(len(x), 1, TOKENS), self.next[x[:, :-1]]], 1)
        return laws.gather(2, x.unsqueeze(2)).squeeze(2).sum(1)

    def sample(self, count, draw):
        self.calls += count
        places = torch.multinomial(self.log_prior(self.all).exp(), count, replacement=True, generator=draw)
        return self.all[places]

    @staticmethod
    def reward(x):
        return (x == 2).sum(1).double() - 0.7 * (x[:, 1:] == x[:, :-1]).sum(1)

    def law(self, inverse):
        return self.log_prior(self.all) + inverse * self.reward(self.all)

    def problem(self, tokens=1):
        return PriorSampler(self.sample, self.reward, token_move(self.laws, tokens=tokens))

    def shares(self, x):
        return (x @ TOKENS ** torch.arange(LENGTH - 1, -1, -1)).bincount(minlength=TOKENS**LENGTH)


def p_value(counts, law):
    """Of the chi-squared test, the rare outcomes together."""
    expected = law.softmax(0) * counts.sum()
    rare = expected < 8
    pooled = [torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) for x in (counts.double(), expected)]
    return stats.chisquare(*(x.numpy() for x in pooled)).pvalue


@pytest.mark.parametrize("tokens", [1, 2])
def test_moves_with_laws_that_are_kept_leave_every_law_on_the_way_in_place(tokens):
    chain = Chain()
    walkers = Walkers(chain.problem(tokens), 40_000, generator(1, "walk", tokens))
    tilted = chain.law(1.3)
    places = torch.multinomial(
        (1.3 * walkers.rewards).softmax(0), 40_000, replacement=True, generator=generator(1, "pick")
    )
    walkers.keep(places)
    for number in range(12):
        walkers.step(1.3, generator(2, "step", number, tokens))
    assert p_value(chain.shares(walkers.x), tilted) > 1e-3
    torch.testing.assert_close(walkers.laws, chain.laws(walkers.x), msg="the laws are those of the samples")


@pytest.mark.parametrize("tries", [2, 6])
def test_moves_that_the_reward_chooses_leave_every_law_in_place(tries, monkeypatch):
    chain = Chain()
    problem = PriorSampler(chain.sample, chain.reward, token_move(chain.laws, tries=tries))
    tilted = chain.law(1.3)

    def walked(draw):
        walkers = Walkers(problem, 30_000, draw)
        law = chain.law(1.3).softmax(0)
        walkers.x = chain.all[torch.multinomial(law, 30_000, replacement=True, generator=draw)]
        walkers.rewards, asked = chain.reward(walkers.x), chain.calls
        for _ in range(8):
            before = walkers.x
            taken = walkers.step(1.3, draw)
            assert torch.equal((walkers.x != before).any(1), taken)
        assert walkers.calls - 30_000 == chain.calls - asked
        return walkers

    walkers = walked(generator(14, "walk", tries))
    assert p_value(chain.shares(walkers.x), tilted) > 1e-3
    torch.testing.assert_close(walkers.laws, chain.laws(walkers.x), msg="the laws are those of the samples")
    torch.testing.assert_close(walkers.rewards, chain.reward(walkers.x))
    monkeypatch.setattr(Walkers, "_taken", lambda self, chance, draw: torch.ones(len(chance), dtype=torch.bool))
    chain.next[1, 2] = -8.0  # else some of these would have no law to go on from
    assert p_value(chain.shares(walked(generator(14, "wrong", tries)).x), chain.law(1.3)) < 1e-6, "the rest counts"


def test_with_tries_fewer_calls_go_further():
    """A token that is wanted and rare, at as many calls of the model: what is left of the error is a third."""
    law = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)

    def sample(count, draw):
        return torch.multinomial(law, 10 * count, replacement=True, generator=draw).view(count, 10)

    exact = 10 * math.log(0.9 + 0.1 * math.exp(3.0))
    errors, calls = {}, {}
    for tries, moves in ((1, 6), (12, 11)):
        move = token_move(lambda x: law.log().expand(*x.shape, 3), tries=tries)
        problem = PriorSampler(sample, lambda x: (x == 2).sum(1).double(), move)
        options = {"method": "annealed", "temperatures": 10, "moves": moves, "beta": 1 / 3}
        found = [log_evidence(problem, 80, generator=generator(15, tries, seed), **options) for seed in range(16)]
        errors[tries] = sum((x.log_evidence - exact) ** 2 for x in found) / 16
        calls[tries] = sum(x.calls for x in found)
    assert calls[12] < 1.1 * calls[1]
    assert errors[12] < 0.5 * errors[1]


def test_a_move_makes_one_call_a_sample():
    chain = Chain()
    found = log_evidence(
        chain.problem(), 40, beta=BETA, generator=generator(3), method="annealed", temperatures=6, moves=5, swarms=2
    )
    assert found.calls == chain.calls == 40 * (1 + 1 + 6 * 5)
    chain = Chain()
    found = log_evidence(
        chain.problem(), 40, beta=BETA, generator=generator(3), method="annealed", temperatures=6, moves=4,
        swarms=2, recycle=True,
    )  # fmt: skip
    assert found.calls == chain.calls == 40 * 6
    twice = token_move(chain.laws)
    chain.calls = 0
    twice(chain.all[:10], generator(4))
    assert chain.calls == 20, "by itself it reads the laws before and after"


@pytest.mark.parametrize("options", [{}, {"adaptive": 0.8}, {"recycle": True, "moves": 4}, {"moves": 3, "swarms": 1}])
@pytest.mark.parametrize("method", ["annealed", "thermodynamic"])
def test_every_way_comes_to_the_evidence(method, options):
    chain = Chain()
    exact = chain.law(1.0 / BETA).logsumexp(0).item()
    found = [
        log_evidence(
            chain.problem(), 1000, beta=BETA, generator=generator(5, method, seed), method=method, **options
        )
        for seed in range(6)
    ]  # fmt: skip
    values = torch.tensor([x.log_evidence for x in found], dtype=torch.float64)
    error = max(values.std().item(), 0.01) / math.sqrt(6)
    # Simpson's rule over 16 steps is not the integral itself; what is left is far below this.
    assert abs(values.mean().item() - exact) < 6 * error


def test_adaptive_steps_have_the_effective_size_that_was_asked_for():
    rewards = torch.randn(500, generator=generator(6, "r"), dtype=torch.float64)
    scores = torch.randn(500, generator=generator(6, "s"), dtype=torch.float64)
    found = next_inverse(scores, rewards, now=0.2, last=50.0, share=0.7)
    weights, steps = scores.softmax(0), ((found - 0.2) * rewards).exp()
    assert ((weights @ steps) ** 2 / (weights @ steps**2)).item() == pytest.approx(0.7, abs=1e-9)
    assert next_inverse(scores, rewards, now=0.2, last=0.25, share=0.7).item() == 0.25, "the rest is near enough"
    assert next_inverse(scores, torch.ones_like(rewards), now=0.0, last=1e6, share=0.9).item() == 1e6
    chain, calls = Chain(), {}
    for share in (0.5, 0.95):
        calls[share] = log_evidence(
            chain.problem(), 400, beta=0.1, generator=generator(7), method="annealed", adaptive=share
        ).calls
    assert calls[0.95] > 1.5 * calls[0.5]


def test_the_error_between_swarms_sees_what_one_swarm_does_not():
    """Two peaks of which few samples find the higher one, and moves that never cross: inside a swarm all looks well."""

    def sample(count, draw):
        return torch.rand(count, generator=draw, dtype=torch.float64)

    problem = PriorSampler(sample, lambda x: torch.where(x < 0.004, 12.0, 6.0 * x), lambda x, draw: x)
    exact = math.log(0.004 * math.exp(12.0) + (math.exp(6.0) - math.exp(0.024)) / 6.0)
    options = {"beta": 1.0, "method": "annealed", "temperatures": 12, "moves": 1}
    misses = {1: [], 8: []}
    for swarms, found in misses.items():
        for seed in range(12):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                x = log_evidence(problem, 400, generator=generator(8, seed), swarms=swarms, **options)
            found.append(abs(x.log_evidence - exact) / x.standard_error)
    one, many = (sorted(found)[6] for found in misses.values())
    assert one > 2 * many
    assert many < 3


def test_the_jackknife():
    values = torch.tensor([1.0, 1.2, 0.9, 1.1], dtype=torch.float64)
    mean, error = jackknife_log_mean(values)
    first_order = (values.exp().std() / values.exp().mean() / 2.0).item()
    assert mean == pytest.approx(values.exp().mean().log().item())
    assert error == pytest.approx(first_order, rel=0.05)
    assert jackknife_log_mean(torch.tensor([0.0, 0.0, 0.0, 20.0]))[1] > 5.0, "one of four has nearly all of Z"
    assert jackknife_log_mean(values[:1])[1] == math.inf


@pytest.mark.parametrize("options", [{"adaptive": 0.8}, {"recycle": True, "moves": 9, "temperatures": 6}])
def test_annealed_samples_are_of_the_posterior(options):
    chain = Chain()
    found = posterior_sample(
        chain.problem(), 20_000, beta=BETA, generator=generator(9), method="annealed", **options
    )
    shares = chain.shares(found.x) / 20_000
    assert 0.5 * (shares - chain.law(1.0 / BETA).softmax(0)).abs().sum().item() < 0.06


def test_chains_of_kept_laws_come_to_the_posterior():
    chain = Chain()
    found = posterior_sample(
        chain.problem(), 5000, beta=BETA, generator=generator(10), method="metropolis", steps=80
    )
    assert chain.calls == 5000 * 82
    assert p_value(chain.shares(found.x), chain.law(1.0 / BETA)) > 1e-3


def test_bad_input():
    chain = Chain()
    options = {"beta": BETA, "generator": generator(0), "method": "annealed"}
    for wrong, message in (
        ({"adaptive": 1.0}, "adaptive"), ({"swarms": 3}, "swarms"), ({"swarms": 0}, "swarms"),
        ({"recycle": True, "moves": 0}, "multiples"), ({"recycle": True, "moves": 6}, "multiples"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            log_evidence(chain.problem(), 40, **options, **wrong)
    with pytest.raises(ShapeError, match="laws"):
        token_move(lambda x: torch.zeros(len(x), TOKENS))(chain.all, generator(0))
    for wrong in ({"tries": 0}, {"tries": 2, "tokens": 2}):
        with pytest.raises(ConfigError, match="tries"):
            token_move(chain.laws, **wrong)


def test_a_policy_may_stand_in_the_priors_place():
    """Near the posterior it leaves little error, at it none; chains, swarms and rejection keep the posterior."""
    chain = Chain()
    posterior, reward = chain.law(1.0 / BETA).log_softmax(0), chain.reward(chain.all)
    exact = chain.law(1.0 / BETA).logsumexp(0).item()
    held = posterior > -math.inf
    noise = torch.randn(len(posterior), generator=generator(16, "noise"), dtype=torch.float64)
    near = (posterior + 0.3 * noise).log_softmax(0)

    def problem(policy):
        def sample(count, draw):
            return torch.multinomial(policy.exp(), count, replacement=True, generator=draw)

        return from_policy(
            sample, lambda x: reward[x], lambda x: chain.log_prior(chain.all)[x], lambda x: policy[x], beta=BETA
        )

    at_it = log_evidence(problem(posterior), 100, beta=BETA, generator=generator(16))
    assert at_it.log_evidence == pytest.approx(exact, abs=1e-10)
    assert at_it.effective_size == pytest.approx(100.0)
    found = log_evidence(problem(near), 4000, beta=BETA, generator=generator(16))
    assert abs(found.log_evidence - exact) < 5 * found.standard_error
    plain = log_evidence(chain.problem(), 4000, beta=BETA, generator=generator(16))
    assert found.standard_error < 0.3 * plain.standard_error
    bound = (BETA * (posterior + exact - near))[held].max().item() + 1e-9
    for method, options in (("rejection", {"largest_reward": bound}), ("metropolis", {"steps": 10}), ("annealed", {})):
        draw = generator(16, method)
        x = posterior_sample(problem(near), 20_000, beta=BETA, generator=draw, method=method, **options).x
        counts = x.bincount(minlength=len(posterior))
        assert p_value(counts, posterior) > 1e-3 or method == "annealed"
        assert 0.5 * (counts / len(x) - posterior.exp()).abs().sum().item() < 0.06
    assert p_value(problem(near).sample(20_000, generator(17)).bincount(minlength=len(posterior)), posterior) < 1e-6
    with pytest.raises(ConfigError, match="beta"):
        from_policy(chain.sample, chain.reward, chain.log_prior, chain.log_prior, beta=0.0)


class Counting(Chain):
    """It keeps the sizes of the batches in which the model reads."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def laws(self, x):
        self.batches.append(len(x))
        return super().laws(x)


@pytest.mark.parametrize("options", [{}, {"recycle": True, "moves": 4}, {"adaptive": 0.6}])
def test_swarms_share_a_batch(options):
    """As many calls as one swarm after the other, in a quarter of the batches."""
    found = {}
    for at_once in (None, 1):
        chain = Counting()
        given = {"beta": BETA, "generator": generator(11), "method": "annealed", "temperatures": 6, "moves": 5}
        evidence = log_evidence(chain.problem(), 200, at_once=at_once, **{**given, **options})
        assert evidence.calls == chain.calls
        found[at_once] = chain.batches
    assert max(found[None]) == 4 * max(found[1])
    if "adaptive" not in options:
        assert 4 * len(found[None]) == len(found[1])
        assert sum(found[None]) == sum(found[1])


def test_swarms_in_a_batch_go_each_its_own_way():
    """With adaptive steps each takes its own, ends when it is there, and is of the posterior by itself."""
    chain = Chain()
    paths = anneal(chain.problem(), 4000, 0.2, generator(12), Schedule(1, 3, 0.7), swarms=5)
    ways = [tuple(path.inverses) for path in paths]
    assert len(set(ways)) == 5
    assert {way[-1] for way in ways} == {5.0}
    assert all(list(way) == sorted(way) for way in ways)
    assert all(path.calls == 4000 * (2 + 3 * (len(path.inverses) - 1)) for path in paths)
    law = chain.law(5.0).softmax(0)
    for path in paths:
        assert 0.5 * (chain.shares(path.x) / 4000 - law).abs().sum().item() < 0.1
    spread = torch.tensor([path.log_evidence for path in paths]).std().item()
    assert 0.2 < spread / (sum(path.error for path in paths) / 5) < 5.0, "they are independent"


def test_a_move_that_makes_one_choice_for_all_its_rows_has_one_swarm_at_a_time():
    """Such a choice would make swarms dependent, and the error between them too small."""
    sizes = []

    def move(x, draw):
        sizes.append(len(x))
        return torch.where(torch.rand((), generator=draw) < 0.5, x, torch.rand(len(x), generator=draw).double())

    problem = PriorSampler(lambda n, draw: torch.rand(n, generator=draw).double(), lambda x: x, move)
    log_evidence(problem, 40, beta=0.5, generator=generator(13), method="annealed")
    assert set(sizes) == {10}
    sizes.clear()
    log_evidence(problem, 40, beta=0.5, generator=generator(13), method="annealed", at_once=2)
    assert set(sizes) == {20}, "unless told otherwise"
    with pytest.raises(ConfigError, match="at_once"):
        log_evidence(problem, 40, beta=0.5, generator=generator(13), method="annealed", at_once=0)
