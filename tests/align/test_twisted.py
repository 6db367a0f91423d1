"""Twisted SMC: exact twists leave no error, any other none on average; its samples are of the posterior."""

import math

import pytest
import torch
from scipy import stats

from kullback.align.twisted import twisted_smc
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator

LENGTH, TOKENS, INVERSE = 4, 3, 2.0
_DRAW = generator(0, "tables")
FIRST = torch.randn(TOKENS, generator=_DRAW, dtype=torch.float64).log_softmax(0)
NEXT = torch.randn(TOKENS, TOKENS, generator=_DRAW, dtype=torch.float64).log_softmax(1)
ALL = torch.cartesian_prod(*[torch.arange(TOKENS)] * LENGTH)


def next_laws(x):
    return NEXT[x[:, -1]] if x.shape[1] else FIRST.expand(len(x), TOKENS)


def scored(x):
    """r / b: the last token counts, and repeats are punished."""
    return INVERSE * ((x == 2).sum(1).double() - 0.5 * (x[:, 1:] == x[:, :-1]).sum(1))


def log_prior(x):
    return sum(next_laws(x[:, :t]).gather(1, x[:, t : t + 1]).squeeze(1) for t in range(x.shape[1]))


JOINT = log_prior(ALL) + scored(ALL)
EXACT = JOINT.logsumexp(0).item()


def exact_twist(x):
    """log E [exp(r / b) | x], by summing."""
    found = []
    rows, places = x.unique(dim=0, return_inverse=True)
    for row in rows:
        held = (ALL[:, : len(row)] == row).all(1)
        found.append(JOINT[held].logsumexp(0) - log_prior(ALL)[held].logsumexp(0))
    return torch.stack(found)[places]


def each(twist):
    """A twist of all next tokens from one of sequences."""

    def found(x):
        with_next = torch.cat([x.repeat_interleave(TOKENS, 0), torch.arange(TOKENS).repeat(len(x)).unsqueeze(1)], 1)
        return twist(with_next).view(len(x), TOKENS)

    return found


def poor_twist(x):
    """What is there already, and nothing of what is to come; bad guesses on purpose before the end."""
    return scored(x) + (0.0 if x.shape[1] == LENGTH else 0.8 * (x[:, -1] == 0).double())


def test_the_exact_twist_leaves_no_error():
    found = twisted_smc(next_laws, each(exact_twist), 64, LENGTH, generator=generator(1))
    assert found.evidence.log_evidence == pytest.approx(EXACT, abs=1e-10)
    assert found.evidence.standard_error < 1e-10
    assert found.evidence.effective_size == pytest.approx(64.0)
    assert found.evidence.calls == 64 * LENGTH
    blind = twisted_smc(next_laws, exact_twist, 64, LENGTH, generator=generator(1), sees_next=False)
    assert abs(blind.evidence.log_evidence - EXACT) > 1e-3, "the weights of draws from the prior vary"


@pytest.mark.parametrize("sees_next", [True, False])
def test_any_twist_is_right_on_average(sees_next):
    twist = each(poor_twist) if sees_next else poor_twist
    values = torch.tensor([
        twisted_smc(next_laws, twist, 32, LENGTH, generator=generator(2, seed), sees_next=sees_next)
        .evidence.log_evidence for seed in range(200)
    ]).double().sub(EXACT).exp()  # fmt: skip
    error = (values.std() / math.sqrt(200)).item()
    assert abs(values.mean().item() - 1.0) < 6 * error, "Z is unbiased"
    assert error > 1e-3


@pytest.mark.parametrize("sees_next", [True, False])
def test_samples_are_of_the_posterior(sees_next):
    twist = each(poor_twist) if sees_next else poor_twist
    found = twisted_smc(next_laws, twist, 40_000, LENGTH, generator=generator(3), sees_next=sees_next)
    shares = (found.x @ TOKENS ** torch.arange(LENGTH - 1, -1, -1)).bincount(minlength=TOKENS**LENGTH) / 40_000
    assert 0.5 * (shares - JOINT.softmax(0)).abs().sum().item() < 0.03
    assert 0.5 * (shares - log_prior(ALL).exp()).abs().sum().item() > 0.2
    assert found.swarm.bincount().tolist() == [10_000] * 4


def test_without_twists_it_is_importance_sampling():
    flat = twisted_smc(
        next_laws, lambda x: scored(x) if x.shape[1] == LENGTH else torch.zeros(len(x)), 500, LENGTH,
        generator=generator(4), sees_next=False, swarms=1, resample=0.0,
    )  # fmt: skip
    x, draw = torch.zeros(500, 0, dtype=torch.long), generator(4)
    for _ in range(LENGTH):
        x = torch.cat([x, torch.multinomial(next_laws(x).exp(), 1, generator=draw)], 1)
    plain = scored(x).logsumexp(0).item() - math.log(500)
    assert flat.evidence.log_evidence == pytest.approx(plain, abs=1e-9)
    z = scored(x).exp()
    assert flat.evidence.standard_error == pytest.approx((z.std() / z.mean()).item() / math.sqrt(500))


def test_the_samples_follow_the_laws_in_the_chi_squared_test():
    found = twisted_smc(next_laws, each(exact_twist), 5000, LENGTH, generator=generator(5), swarms=1)
    counts = (found.x @ TOKENS ** torch.arange(LENGTH - 1, -1, -1)).bincount(minlength=TOKENS**LENGTH)
    expected = JOINT.softmax(0) * 5000
    rare = expected < 8
    pooled = [torch.cat([v[~rare], v[rare].sum(0, keepdim=True)]).numpy() for v in (counts.double(), expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-3


def test_bad_input():
    options = {"generator": generator(0)}
    with pytest.raises(ConfigError, match="swarms"):
        twisted_smc(next_laws, each(scored), 10, LENGTH, swarms=3, **options)
    with pytest.raises(ConfigError, match="share"):
        twisted_smc(next_laws, each(scored), 8, LENGTH, resample=2.0, **options)
    with pytest.raises(ShapeError, match="laws and twists"):
        twisted_smc(next_laws, scored, 8, LENGTH, **options)
    with pytest.raises(ShapeError, match="one each"):
        twisted_smc(next_laws, each(scored), 8, LENGTH, sees_next=False, **options)
    with pytest.raises(DataError, match="log-twists"):
        twisted_smc(next_laws, lambda x: torch.full((len(x), TOKENS), math.nan), 8, LENGTH, **options)
